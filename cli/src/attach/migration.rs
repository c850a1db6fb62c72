//! What a table has to have for a conflict policy, and the SQL that gives it that. Pure.

use std::fmt::Write as _;

use millstream_catalog::ConflictPolicy;
use millstream_replication::Misfit;
use millstream_schemas::clock::{CLIENT_ID, FIELD_CLOCKS, UPDATED_AT};

/// A statement gives up rather than queue the table's readers behind a long transaction.
const LOCK_TIMEOUT: &str = "5s";
/// Names of the triggers: on insert, on update. The same for both policies, so that one takes the other's place.
pub const TRIGGERS: [&str; 2] = ["millstream_clocks_insert", "millstream_clocks_update"];

/// How concurrent changes to a row of the table shall meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Policy {
    /// The newer change wins, column by column
    Column,
    /// The newer change wins, for the row
    Row,
}

impl Policy {
    /// The policy of a synced table whose triggers would find all columns that they set.
    pub fn of(conflict: ConflictPolicy) -> Option<Policy> {
        match conflict {
            ConflictPolicy::Column { updated_at: Some(_), client_id: Some(_), .. } => Some(Policy::Column),
            ConflictPolicy::Row { .. } => Some(Policy::Row),
            ConflictPolicy::Column { .. } | ConflictPolicy::Arrival => None,
        }
    }

    /// As `millstream.toml` names it.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Column => "column",
            Policy::Row => "row",
        }
    }

    /// The function of the schema `millstream` that its triggers call.
    pub fn function(self) -> &'static str {
        match self {
            Policy::Column => "keep_clocks",
            Policy::Row => "keep_updated_at",
        }
    }

    /// The columns: name, type as `format_type` writes it, definition.
    fn columns(self) -> &'static [(&'static str, &'static str, &'static str)] {
        static ALL: [(&str, &str, &str); 3] = [
            (FIELD_CLOCKS, "jsonb", "jsonb NOT NULL DEFAULT '{}'"),
            (UPDATED_AT, "timestamp with time zone", "timestamptz NOT NULL DEFAULT now()"),
            (CLIENT_ID, "uuid", "uuid"),
        ];
        match self {
            Policy::Column => &ALL,
            Policy::Row => &ALL[1..],
        }
    }
}

/// A table as the database has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// As written on the command line or in the file.
    pub name: String,
    /// Quoted for SQL.
    pub sql_name: String,
    /// `relkind`.
    pub kind: String,
    /// The table that it is a partition of, quoted.
    pub partition_of: Option<String>,
    /// Whether it has a primary key.
    pub has_key: bool,
    /// Its columns.
    pub columns: Vec<FoundColumn>,
    /// Its triggers for each row before insert or update.
    pub triggers: Vec<FoundTrigger>,
    /// Whether some row has a value in `client_id`.
    pub client_id_used: bool,
    /// What `writable` declares.
    pub writable: Vec<String>,
    /// What its replica identity lacks, and the remedy.
    pub identity: Vec<Misfit>,
}

/// A column.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundColumn {
    /// Its name.
    pub name: String,
    /// As `format_type` writes it.
    pub sql_type: String,
    /// Whether it may not be null.
    pub not_null: bool,
    /// Whether it is computed.
    pub generated: bool,
    /// Whether a foreign key or an index names it.
    pub referenced: bool,
}

/// A trigger.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FoundTrigger {
    /// Its name.
    pub name: String,
    /// `schema.function`, quoted.
    pub function: String,
    /// Whether it fires.
    pub enabled: bool,
}

/// What is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Columns.
    pub columns: Vec<&'static str>,
    /// Triggers: absent, disabled or of the other policy.
    pub triggers: Vec<&'static str>,
}

impl Missing {
    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.columns.is_empty() && self.triggers.is_empty()
    }
}

/// What the table lacks for the policy.
///
/// # Errors
/// Why it cannot be attached, and what to do.
pub fn missing(table: &Found, policy: Policy) -> Result<Missing, String> {
    if !matches!(table.kind.as_str(), "r" | "p") {
        return Err("only ordinary and partitioned tables can be synced, not views".to_owned());
    }
    if let Some(root) = &table.partition_of {
        return Err(format!("it is a partition of {root}: attach that one"));
    }
    if !table.has_key {
        return Err("it has no primary key; a synced table needs one".to_owned());
    }
    let mut missing = Missing::default();
    for &(name, sql_type, definition) in policy.columns() {
        if table.writable.iter().any(|writable| writable == name) {
            return Err(format!("`{name}` is kept by Millstream: take it out of `writable` in millstream.toml"));
        }
        let Some(column) = table.columns.iter().find(|column| column.name == name) else {
            missing.columns.push(name);
            continue;
        };
        if column.sql_type != sql_type || column.generated {
            let kind = if column.generated { " (generated)" } else { "" };
            return Err(format!(
                "it has a column `{name}` of type {}{kind}, where Millstream keeps its own `{name} {definition}`: rename it first",
                column.sql_type
            ));
        }
        let must_have = name == FIELD_CLOCKS || (name == UPDATED_AT && policy == Policy::Row);
        if must_have && !column.not_null {
            let (table, default) = (&table.sql_name, if name == FIELD_CLOCKS { "'{}'" } else { "now()" });
            return Err(format!(
                "its column `{name}` may be null: UPDATE {table} SET {name} = {default} WHERE {name} IS NULL; \
                 ALTER TABLE {table} ALTER COLUMN {name} SET DEFAULT {default}, ALTER COLUMN {name} SET NOT NULL"
            ));
        }
        let is_apps_own = column.not_null || column.referenced || table.client_id_used;
        if name == CLIENT_ID && is_apps_own && !table.has_triggers() {
            return Err(
                "its column `client_id` is in use by the application (NOT NULL, a foreign key, an index or values); \
                 Millstream would overwrite it: rename it first"
                    .to_owned(),
            );
        }
    }
    let function = format!("millstream.{}", policy.function());
    missing.triggers = TRIGGERS
        .into_iter()
        .filter(|name| !table.triggers.iter().any(|t| t.name == *name && t.enabled && t.function == function))
        .collect();
    Ok(missing)
}

impl Found {
    fn has_triggers(&self) -> bool {
        self.triggers.iter().any(|trigger| TRIGGERS.contains(&trigger.name.as_str()))
    }

    /// Triggers of the application that fire after ours: Postgres goes by name.
    pub fn later_triggers(&self) -> impl Iterator<Item = &str> {
        let names = self.triggers.iter().map(|trigger| trigger.name.as_str());
        names.filter(|name| *name > TRIGGERS[0] && !TRIGGERS.contains(name))
    }
}

/// The statements that make the triggers of a table, whose name is quoted: on insert, on update.
///
/// They fire where the statement has not set the clocks itself, as the executor does.
pub fn triggers(policy: Policy, table: &str) -> [String; 2] {
    let (insert, update) = match policy {
        Policy::Column => (
            "NEW.field_clocks IS NULL OR NEW.field_clocks = '{}'",
            "NEW.field_clocks IS NOT DISTINCT FROM OLD.field_clocks",
        ),
        // The default has been put in before the trigger sees the row.
        Policy::Row => (
            "NEW.client_id IS NULL AND (NEW.updated_at IS NULL OR NEW.updated_at = now())",
            "NEW.updated_at IS NOT DISTINCT FROM OLD.updated_at AND NEW.client_id IS NOT DISTINCT FROM OLD.client_id",
        ),
    };
    let statement = |name: &str, event: &str, when: &str| {
        format!(
            "CREATE OR REPLACE TRIGGER {name} BEFORE {event} ON {table}\n    FOR EACH ROW WHEN ({when})\n    \
             EXECUTE FUNCTION millstream.{}()",
            policy.function()
        )
    };
    [statement(TRIGGERS[0], "INSERT", insert), statement(TRIGGERS[1], "UPDATE", update)]
}

/// The migration for tables that lack something.
pub fn migration(tables: &[(&Found, Policy)]) -> String {
    let of = |policy: Policy| {
        let names: Vec<&str> =
            tables.iter().filter(|(_, p)| *p == policy).map(|(table, _)| table.sql_name.as_str()).collect();
        (!names.is_empty()).then(|| names.join(", "))
    };
    let mut sql = String::new();
    let mut comment = |text: &str| {
        // A name may hold a line end, and must not end the comment with it.
        let _infallible = writeln!(sql, "{}", format!("-- {}", text.replace(['\n', '\r'], " ")).trim_end());
    };
    if let Some(names) = of(Policy::Column) {
        comment(&format!("What: {names}: concurrent changes to a row merge by column (Millstream)."));
        comment("Why:  edits of different columns are both kept; of two edits of one column the newer wins.");
        comment(
            "      `field_clocks` holds when each column was last changed. Rows that are there before have none ('{}'):",
        );
        comment("      they count as older than any change.");
    }
    if let Some(names) = of(Policy::Row) {
        comment(&format!("What: {names}: of concurrent changes to a row the newer wins (Millstream)."));
        comment(
            "Why:  `updated_at` and `client_id` tell which change is newer. Where `updated_at` is added, rows that are there",
        );
        comment("      before count as written now. In millstream.toml the table needs conflict = \"row\".");
    }
    comment("      Triggers keep these columns for statements that know nothing of them.");
    comment("Undo: put conflict = \"arrival\" into millstream.toml and restart the services, then");
    for (table, policy) in tables {
        for trigger in TRIGGERS {
            comment(&format!("      DROP TRIGGER {trigger} ON {};", table.sql_name));
        }
        let lacks = |name: &str| !table.columns.iter().any(|column| column.name == name);
        let drops: Vec<String> = policy
            .columns()
            .iter()
            .filter(|column| lacks(column.0))
            .map(|column| format!("DROP COLUMN {}", column.0))
            .collect();
        if !drops.is_empty() {
            comment(&format!("      ALTER TABLE {} {};", table.sql_name, drops.join(", ")));
        }
    }
    comment("");
    comment(
        "Written by `millstream attach`. Run it as the tables' owner; a second time changes nothing. It rewrites no table,",
    );
    comment("but needs each for a moment alone: it gives up after the time below rather than make everybody wait.");
    for (table, _) in tables {
        for trigger in table.later_triggers() {
            comment(&format!(
                "Note: trigger {trigger} of {} fires after Millstream's, so columns that it changes get no clock: rename it to sort before {}.",
                table.sql_name, TRIGGERS[0]
            ));
        }
        for found in &table.identity {
            comment(&format!("Still to do: {}:", found.message));
            found.fix.lines().for_each(|line| comment(&format!("    {line}")));
        }
    }
    let _infallible = write!(sql, "\nSET lock_timeout = '{LOCK_TIMEOUT}';\n");
    let mut body = String::new();
    for (table, policy) in tables {
        let columns: Vec<String> = policy
            .columns()
            .iter()
            .map(|(name, _, definition)| format!("\n    ADD COLUMN IF NOT EXISTS {name} {definition}"))
            .collect();
        let _infallible = write!(sql, "\nALTER TABLE {}{};\n", table.sql_name, columns.join(","));
        for statement in triggers(*policy, &table.sql_name) {
            let _infallible = writeln!(body, "{statement};");
        }
    }
    let tag = tag(&body);
    let _infallible = write!(
        sql,
        "\n-- Where the schema millstream is not there yet, `millstream setup` makes the triggers.\nDO {tag} BEGIN\n\
         IF to_regprocedure('millstream.keep_clocks()') IS NOT NULL THEN\n{body}END IF;\nEND {tag};\n\nRESET lock_timeout;\n"
    );
    sql
}

/// A dollar quote that the text does not contain.
fn tag(body: &str) -> String {
    let mut tag = "$$".to_owned();
    let mut number = 0;
    while body.contains(&tag) {
        tag = format!("$m{number}$");
        number += 1;
    }
    tag
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(name: &str, sql_type: &str) -> FoundColumn {
        FoundColumn { name: name.into(), sql_type: sql_type.into(), ..FoundColumn::default() }
    }

    fn table(columns: Vec<FoundColumn>) -> Found {
        let name = "\"public\".\"t\"".to_owned();
        Found { name: "t".into(), sql_name: name, kind: "r".into(), has_key: true, columns, ..Found::default() }
    }

    fn refused(table: &Found, policy: Policy) -> String {
        missing(table, policy).expect_err("it is refused")
    }

    #[test]
    fn what_cannot_be_attached_is_refused_with_the_reason() {
        let not_null = |column: FoundColumn| FoundColumn { not_null: true, ..column };
        for (table, policy, says) in [
            (Found { kind: "v".into(), ..table(vec![]) }, Policy::Column, "not views"),
            (Found { has_key: false, ..table(vec![]) }, Policy::Column, "no primary key"),
            (Found { partition_of: Some("app.t".into()), ..table(vec![]) }, Policy::Column, "partition of app.t"),
            (Found { writable: vec!["updated_at".into()], ..table(vec![]) }, Policy::Column, "take it out"),
            (Found { writable: vec!["client_id".into()], ..table(vec![]) }, Policy::Row, "take it out"),
            (table(vec![column("field_clocks", "json")]), Policy::Column, "`field_clocks` of type json"),
            (table(vec![column("updated_at", "timestamp without time zone")]), Policy::Row, "without time zone"),
            (table(vec![column("client_id", "bigint")]), Policy::Column, "`client_id` of type bigint"),
            (table(vec![column("field_clocks", "jsonb")]), Policy::Column, "SET NOT NULL"),
            (table(vec![column("updated_at", "timestamp with time zone")]), Policy::Row, "SET DEFAULT now()"),
            (table(vec![not_null(column("client_id", "uuid"))]), Policy::Column, "in use by the application"),
            (
                Found { client_id_used: true, ..table(vec![column("client_id", "uuid")]) },
                Policy::Column,
                "in use by the application",
            ),
        ] {
            assert!(refused(&table, policy).contains(says), "{says}: {}", refused(&table, policy));
        }
        // What the row policy does not use is the application's.
        assert!(missing(&table(vec![column("field_clocks", "json")]), Policy::Row).is_ok());
    }

    #[test]
    fn what_is_there_is_not_missing() {
        let mut table = table(vec![]);
        let all = missing(&table, Policy::Column).unwrap();
        assert_eq!((all.columns.len(), all.triggers.len()), (3, 2));
        table.columns = [("field_clocks", "jsonb"), ("updated_at", "timestamp with time zone"), ("client_id", "uuid")]
            .map(|(name, sql_type)| FoundColumn { not_null: name != "client_id", ..column(name, sql_type) })
            .into();
        table.triggers = TRIGGERS
            .map(|name| FoundTrigger { name: name.into(), function: "millstream.keep_clocks".into(), enabled: true })
            .into();
        assert!(missing(&table, Policy::Column).unwrap().is_empty());
        // The other policy's triggers, or disabled ones, do not count.
        assert_eq!(missing(&table, Policy::Row).unwrap().triggers, TRIGGERS);
        table.triggers[1].enabled = false;
        assert_eq!(missing(&table, Policy::Column).unwrap().triggers, [TRIGGERS[1]]);
    }

    #[test]
    fn names_cannot_leave_their_place() {
        let odd = Found { sql_name: "\"public\".\"a\nDROP $$ TABLE b\"".into(), ..table(vec![]) };
        let sql = migration(&[(&odd, Policy::Column)]);
        let (header, body) = sql.split_once("SET lock_timeout").unwrap();
        assert!(header.lines().all(|line| line.is_empty() || line.starts_with("--")), "{header}");
        assert!(body.contains("DO $m0$"), "{body}");
    }

    #[test]
    fn triggers_that_fire_later_are_noted() {
        let trigger = |name: &str| FoundTrigger { name: name.into(), ..FoundTrigger::default() };
        let table = Found { triggers: vec![trigger("a_trim"), trigger("trim"), trigger(TRIGGERS[1])], ..table(vec![]) };
        assert_eq!(table.later_triggers().collect::<Vec<_>>(), ["trim"]);
    }
}
