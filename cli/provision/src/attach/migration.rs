//! What a table has to have for a conflict policy, and the SQL that gives it that. Pure.

use std::fmt::Write as _;

use millstream_catalog::{ClockNames, ConflictPolicy, Table, literal};

use super::found::{Found, FoundTrigger, TRIGGERS};

/// A statement gives up rather than queue the table's readers behind a long transaction.
const LOCK_TIMEOUT: &str = "5s";
/// How concurrent changes to a row of the table shall meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Policy {
    /// The newer change wins, column by column
    Column,
    /// The newer change wins, for the row
    Row,
}

impl Policy {
    /// The policy of a synced table whose triggers would find all columns that they set, and the names of these.
    pub fn of(table: &Table) -> Option<(Policy, ClockNames)> {
        let name = |column: usize| table.columns[column].name.clone();
        let names = |updated_at, client_id| ClockNames {
            updated_at: name(updated_at),
            client_id: name(client_id),
            ..ClockNames::default()
        };
        match table.conflict {
            ConflictPolicy::Column { clocks, updated_at: Some(updated_at), client_id: Some(client_id) } => {
                Some((Policy::Column, ClockNames { field_clocks: name(clocks), ..names(updated_at, client_id) }))
            }
            ConflictPolicy::Row { updated_at, client_id } => Some((Policy::Row, names(updated_at, client_id))),
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

    /// The function of the schema `millstream` that its triggers call, and their arguments: none for the default names.
    pub fn function(self, names: &ClockNames) -> (&'static str, Vec<&str>) {
        let arguments: Vec<&str> = self.columns(names).into_iter().map(|column| column.name).collect();
        let defaults = ClockNames::default();
        let is_default = self.columns(&defaults).into_iter().map(|column| column.name).eq(arguments.iter().copied());
        match (self, is_default) {
            (Policy::Column, true) => ("keep_clocks", Vec::new()),
            (Policy::Row, true) => ("keep_updated_at", Vec::new()),
            (Policy::Column, false) => ("keep_named_clocks", arguments),
            (Policy::Row, false) => ("keep_named_updated_at", arguments),
        }
    }

    /// Whether a trigger of the table does what this policy needs.
    pub fn is_kept_by(self, trigger: &FoundTrigger, names: &ClockNames) -> bool {
        let (function, arguments) = self.function(names);
        trigger.function == format!("millstream.{function}") && trigger.arguments == arguments
    }

    /// The names of the columns that a trigger of ours keeps, if these are not the default ones.
    fn kept_by(self, trigger: &FoundTrigger) -> Option<ClockNames> {
        let names = match (self, trigger.arguments.as_slice()) {
            (Policy::Column, [field_clocks, updated_at, client_id]) => ClockNames {
                field_clocks: field_clocks.clone(),
                updated_at: updated_at.clone(),
                client_id: client_id.clone(),
            },
            (Policy::Row, [updated_at, client_id]) => {
                ClockNames { updated_at: updated_at.clone(), client_id: client_id.clone(), ..ClockNames::default() }
            }
            _ => return None,
        };
        (TRIGGERS.contains(&trigger.name.as_str()) && self.is_kept_by(trigger, &names)).then_some(names)
    }

    fn columns(self, names: &ClockNames) -> Vec<ClockColumn<'_>> {
        let column = |what, name, sql_type, definition| ClockColumn { what, name, sql_type, definition };
        let all = vec![
            column(Clock::Fields, names.field_clocks.as_str(), "jsonb", "jsonb NOT NULL DEFAULT '{}'"),
            column(
                Clock::UpdatedAt,
                names.updated_at.as_str(),
                "timestamp with time zone",
                "timestamptz NOT NULL DEFAULT now()",
            ),
            column(Clock::ClientId, names.client_id.as_str(), "uuid", "uuid"),
        ];
        match self {
            Policy::Column => all,
            Policy::Row => all[1..].to_vec(),
        }
    }
}

/// One of the columns that tell which change is newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clock {
    Fields,
    UpdatedAt,
    ClientId,
}

#[derive(Clone, Copy, Debug)]
struct ClockColumn<'a> {
    what: Clock,
    name: &'a str,
    /// As `format_type` writes it.
    sql_type: &'static str,
    definition: &'static str,
}

impl ClockColumn<'_> {
    /// What another name begins with, where the default one is taken.
    const PREFIX: &'static str = "millstream_";

    /// Its name in SQL.
    fn sql_name(&self) -> String {
        quoted(self.name)
    }

    /// Why a column of that name is the application's, and not ours.
    fn taken(&self, table: &Found) -> Option<String> {
        let column = table.columns.iter().find(|column| column.name == self.name)?;
        if column.sql_type != self.sql_type || column.generated {
            let kind = if column.generated { " (generated)" } else { "" };
            return Some(format!("of type {}{kind}, and not {}", column.sql_type, self.sql_type));
        }
        let is_apps_own = column.not_null || column.referenced || table.client_id_used;
        (self.what == Clock::ClientId && is_apps_own && !table.has_triggers())
            .then(|| "in use by the application (NOT NULL, a foreign key, an index or values)".to_owned())
    }
}

/// A name in SQL, quoted where it has to be.
fn quoted(name: &str) -> String {
    let defaults = ClockNames::default();
    let plain = [&defaults.field_clocks, &defaults.updated_at, &defaults.client_id]
        .into_iter()
        .any(|known| name == known.as_str() || name.strip_prefix(ClockColumn::PREFIX) == Some(known));
    if plain { name.to_owned() } else { format!("\"{}\"", name.replace('"', "\"\"")) }
}

/// What is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Missing {
    /// Columns.
    pub columns: Vec<String>,
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
        return Err(
            "it has no primary key; a synced table needs one, or a unique index over NOT NULL columns".to_owned()
        );
    }
    let mut missing = Missing::default();
    for clock in policy.columns(&table.clocks) {
        let ClockColumn { what, name, definition, .. } = clock;
        if table.writable.iter().any(|writable| writable == name) {
            return Err(format!(
                "`{name}` is kept by Millstream: take it out of `writable` in millstream.toml, or name another column in `clocks`"
            ));
        }
        let Some(column) = table.columns.iter().find(|column| column.name == name) else {
            missing.columns.push(name.to_owned());
            continue;
        };
        if let Some(why) = clock.taken(table) {
            return Err(format!(
                "its column `{name}` is {why}, where Millstream keeps its own `{name} {definition}`: name another one in `clocks` in millstream.toml"
            ));
        }
        let must_have = what == Clock::Fields || (what == Clock::UpdatedAt && policy == Policy::Row);
        if must_have && !column.not_null {
            let (table, default) = (&table.sql_name, if what == Clock::Fields { "'{}'" } else { "now()" });
            return Err(format!(
                "its column `{name}` may be null: UPDATE {table} SET {name} = {default} WHERE {name} IS NULL; \
                 ALTER TABLE {table} ALTER COLUMN {name} SET DEFAULT {default}, ALTER COLUMN {name} SET NOT NULL"
            ));
        }
    }
    let keeps = |t: &FoundTrigger| t.enabled && policy.is_kept_by(t, &table.clocks);
    missing.triggers = TRIGGERS
        .into_iter()
        .filter(|name| !table.triggers.iter().any(|trigger| trigger.name == *name && keeps(trigger)))
        .collect();
    Ok(missing)
}

/// Gives Millstream's columns other names where the application has columns of the default ones. Says whether it did.
pub fn rename_taken(table: &mut Found, policy: Policy) -> bool {
    let (defaults, mut names) = (ClockNames::default(), table.clocks.clone());
    if let Some(kept) = table.triggers.iter().find_map(|trigger| policy.kept_by(trigger)).filter(|_| names == defaults)
    {
        // An earlier run has named them.
        table.clocks = kept;
        return true;
    }
    for column in policy.columns(&defaults) {
        let name = match column.what {
            Clock::Fields => &mut names.field_clocks,
            Clock::UpdatedAt => &mut names.updated_at,
            Clock::ClientId => &mut names.client_id,
        };
        // A name that the file gives is left as it is.
        if *name == column.name && column.taken(table).is_some() {
            *name = format!("{}{}", ClockColumn::PREFIX, column.name);
        }
    }
    let renamed = names != table.clocks;
    // The column found there is the application's.
    table.client_id_used &= names.client_id == table.clocks.client_id;
    table.clocks = names;
    renamed
}

/// The statements that make the triggers of a table, whose name is quoted: on insert, on update.
///
/// They fire where the statement has not set the clocks itself, as the executor does.
pub fn triggers(policy: Policy, table: &str, names: &ClockNames) -> [String; 2] {
    let [fields, at, client] = [&names.field_clocks, &names.updated_at, &names.client_id].map(|name| quoted(name));
    let (insert, update) = match policy {
        Policy::Column => (
            format!("NEW.{fields} IS NULL OR NEW.{fields} = '{{}}'"),
            format!("NEW.{fields} IS NOT DISTINCT FROM OLD.{fields}"),
        ),
        // The default has been put in before the trigger sees the row.
        Policy::Row => (
            format!("NEW.{client} IS NULL AND (NEW.{at} IS NULL OR NEW.{at} = now())"),
            format!("NEW.{at} IS NOT DISTINCT FROM OLD.{at} AND NEW.{client} IS NOT DISTINCT FROM OLD.{client}"),
        ),
    };
    let (function, arguments) = policy.function(names);
    let arguments: Vec<String> = arguments.into_iter().map(literal).collect();
    let arguments = arguments.join(", ");
    let statement = |name: &str, event: &str, when: &str| {
        format!(
            "CREATE OR REPLACE TRIGGER {name} BEFORE {event} ON {table}\n    FOR EACH ROW WHEN ({when})\n    \
             EXECUTE FUNCTION millstream.{function}({arguments})"
        )
    };
    [statement(TRIGGERS[0], "INSERT", &insert), statement(TRIGGERS[1], "UPDATE", &update)]
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
            "      A column of clocks holds when each column was last changed. Rows that are there before have none ('{}'):",
        );
        comment("      they count as older than any change.");
    }
    if let Some(names) = of(Policy::Row) {
        comment(&format!("What: {names}: of concurrent changes to a row the newer wins (Millstream)."));
        comment(
            "Why:  a time and a client's id tell which change is newer. Where the time is added, rows that are there",
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
            .columns(&table.clocks)
            .iter()
            .filter(|column| lacks(column.name))
            .map(|column| format!("DROP COLUMN {}", column.sql_name()))
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
            .columns(&table.clocks)
            .iter()
            .map(|column| format!("\n    ADD COLUMN IF NOT EXISTS {} {}", column.sql_name(), column.definition))
            .collect();
        let _infallible = write!(sql, "\nALTER TABLE {}{};\n", table.sql_name, columns.join(","));
        for statement in triggers(*policy, &table.sql_name, &table.clocks) {
            let _infallible = writeln!(body, "{statement};");
        }
    }
    let tag = tag(&body);
    let needs = if body.contains("keep_named") { "keep_named_clocks" } else { "keep_clocks" };
    let _infallible = write!(
        sql,
        "\n-- Where the schema millstream is not there yet, `millstream setup` makes the triggers.\nDO {tag} BEGIN\n\
         IF to_regprocedure('millstream.{needs}()') IS NOT NULL THEN\n{body}END IF;\nEND {tag};\n\nRESET lock_timeout;\n"
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
    use crate::attach::found::FoundColumn;

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
            (table(vec![column("field_clocks", "json")]), Policy::Column, "`field_clocks` is of type json"),
            (table(vec![column("updated_at", "timestamp without time zone")]), Policy::Row, "without time zone"),
            (table(vec![column("client_id", "bigint")]), Policy::Column, "`client_id` is of type bigint"),
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
            .map(|name| FoundTrigger {
                name: name.into(),
                function: "millstream.keep_clocks".into(),
                enabled: true,
                ..FoundTrigger::default()
            })
            .into();
        assert!(missing(&table, Policy::Column).unwrap().is_empty());
        // The other policy's triggers, or disabled ones, do not count.
        assert_eq!(missing(&table, Policy::Row).unwrap().triggers, TRIGGERS);
        table.triggers[1].enabled = false;
        assert_eq!(missing(&table, Policy::Column).unwrap().triggers, [TRIGGERS[1]]);
    }

    #[test]
    fn columns_of_the_application_keep_their_names() {
        let own = vec![column("updated_at", "timestamp without time zone"), column("client_id", "bigint")];
        for policy in [Policy::Column, Policy::Row] {
            let mut table = table(own.clone());
            assert!(rename_taken(&mut table, policy));
            assert!(missing(&table, policy).unwrap().columns.contains(&"millstream_updated_at".to_owned()));
            let sql = migration(&[(&table, policy)]);
            for part in [
                "ADD COLUMN IF NOT EXISTS millstream_updated_at timestamptz",
                "'millstream_updated_at', 'millstream_client_id'",
            ] {
                assert!(sql.contains(part), "{sql}");
            }
            assert!(!sql.contains(" updated_at "), "{sql}");
            assert!(!rename_taken(&mut table, policy), "once is enough");
        }
        // Names of the file are kept, and quoted.
        let mut named = table(own);
        named.clocks = ClockNames { updated_at: "a \"b".into(), client_id: "order".into(), ..ClockNames::default() };
        assert!(!rename_taken(&mut named, Policy::Row));
        let sql = migration(&[(&named, Policy::Row)]);
        for part in
            ["ADD COLUMN IF NOT EXISTS \"a \"\"b\"", "ADD COLUMN IF NOT EXISTS \"order\" uuid", "('a \"b', 'order')"]
        {
            assert!(sql.contains(part), "{sql}");
        }
        assert!(!rename_taken(&mut table(vec![]), Policy::Column));
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
