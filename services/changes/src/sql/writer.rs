//! The SQL text of one shape.

use millstream_catalog::{ConflictPolicy, Table, literal};
use millstream_schemas::{Merge, Operation};

use crate::decide::validator::rule;
use crate::sql::predicate::Mentions;

/// Who writes, for predicates.
const AUTH: &str =
    "LATERAL (SELECT millstream_input.ms_user AS user_id, millstream_input.ms_client AS client_id) AS auth";
/// A version of a row.
const VERSION: &str = "old.tableoid || ' ' || old.ctid";
/// Whether a version that is seen is of this transaction: others that are not over are not seen. Ids of its savepoints come after its
/// own.
const OWN_VERSION: &str = "CASE WHEN age(old.xmin) BETWEEN -1000000 AND 0 \
     THEN pg_xact_status((pg_current_xact_id()::text::bigint - age(old.xmin))::text::xid8) = 'in progress' ELSE false END";
/// The change's time.
const AT: &str = "(timestamptz 'epoch' + millstream_input.ms_at * interval '1 microsecond')";
const CLOCK: &str = "millstream_input.ms_clock COLLATE \"C\"";
const NOBODY: &str = "uuid '00000000-0000-0000-0000-000000000000'";

/// What every statement is told of each row beside key and values.
const OWN_PARAMETERS: [(&str, &str); 4] =
    [("ms_user", "text"), ("ms_client", "uuid"), ("ms_clock", "text"), ("ms_at", "bigint")];

/// Makes the texts of a shape.
#[derive(Clone, Copy)]
pub(crate) struct Writer<'a> {
    pub table: &'a Table,
    pub op: Operation,
    pub columns: &'a [usize],
    /// Those of `columns` whose value is added.
    pub adds: &'a [usize],
    /// Number of its first parameter.
    pub first: usize,
    /// See [`Statement::watched`].
    pub watched: bool,
}

impl<'a> Writer<'a> {
    pub fn rules(&self) -> impl Iterator<Item = &'a millstream_catalog::Rule> + use<'a> {
        let op = self.op;
        self.table.rules.iter().filter(move |rule| rule.on.contains(&op))
    }

    /// The permission predicate, then those of rules.
    pub fn predicates(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        // The validator lets no operation through that has no rule.
        let permission = rule(self.table, self.op).unwrap_or("false");
        std::iter::once(permission).chain(self.rules().map(|rule| rule.check.as_str()))
    }

    fn column(&self, index: usize) -> &'a str {
        &self.table.columns[index].sql_name
    }

    fn cast(&self, input: &str, index: usize) -> String {
        format!("millstream_input.{input}::{}", self.table.columns[index].cast_type())
    }

    /// The value that the change gives a column.
    fn value(&self, index: usize) -> Option<String> {
        let place = self.columns.iter().position(|set| *set == index)?;
        let (value, old) = (self.cast(&format!("ms_v{place}"), index), self.column(index));
        let extreme = match self.merge(index) {
            None => return Some(value),
            // An amount may be greater than what the column holds.
            Some(Merge::Add) => {
                let sum = format!("coalesce(old.{old}, 0)::bigint + millstream_input.ms_v{place}::bigint");
                return Some(format!("({sum})::{}", self.table.columns[index].cast_type()));
            }
            Some(Merge::Max) => format!("greatest(old.{old}, {value})"),
            Some(Merge::Min) => format!("least(old.{old}, {value})"),
        };
        // Null is neither: it stands where it is newer.
        let newer = self.is_newer(index);
        Some(format!("CASE WHEN {value} IS NOT NULL THEN {extreme} WHEN NOT ({newer}) THEN old.{old} END"))
    }

    /// How the change of a column meets what the row has, if it counts whatever is newer.
    fn merge(&self, index: usize) -> Option<Merge> {
        let declared = self.table.columns[index].merge.filter(|merge| *merge != Merge::Add);
        let merge = if self.adds.contains(&index) { Some(Merge::Add) } else { declared };
        merge.filter(|_| self.op == Operation::Update)
    }

    /// Whether some columns of the change may win and others lose.
    fn is_parted(&self) -> bool {
        self.columns.len() > 1
            && match self.table.conflict {
                ConflictPolicy::Column { .. } => true,
                ConflictPolicy::Row { .. } => self.columns.iter().any(|index| self.merge(*index).is_some()),
                ConflictPolicy::Arrival => false,
            }
    }

    fn keys(&self) -> usize {
        if self.op == Operation::Insert { 0 } else { self.table.key.len() }
    }

    /// How many parameters there are.
    pub fn parameters(&self) -> usize {
        self.keys() + self.columns.len() + OWN_PARAMETERS.len()
    }

    /// The parameters, as [`crate::transaction::apply`] binds them: keys (but of inserts, whose values hold them), values, users,
    /// clients, clocks, times.
    fn input(&self) -> String {
        let keys = self.keys();
        let texts = keys + self.columns.len();
        let mut arrays: Vec<String> = (0..texts).map(|n| format!("${}::text[]", self.first + n)).collect();
        let mut names: Vec<String> = (0..keys).map(|n| format!("ms_k{n}")).collect();
        names.extend((0..self.columns.len()).map(|n| format!("ms_v{n}")));
        for (name, r#type) in OWN_PARAMETERS {
            arrays.push(format!("${}::{type}[]", self.first + arrays.len()));
            names.push(name.to_owned());
        }
        format!("unnest({}) WITH ORDINALITY AS millstream_input({}, ms_i)", arrays.join(", "), names.join(", "))
    }

    /// Where `old` is the change's row.
    fn key(&self) -> String {
        let part = |(place, index): (usize, &usize)| {
            format!("old.{} = {}", self.column(*index), self.cast(&format!("ms_k{place}"), *index))
        };
        self.table.key.iter().enumerate().map(part).collect::<Vec<_>>().join(" AND ")
    }

    /// `SELECT` list of a row: as the change gives it, else as `other` does.
    fn row(&self, value: impl Fn(usize) -> String) -> String {
        let columns = 0..self.table.columns.len();
        columns.map(|index| format!("{} AS {}", value(index), self.column(index))).collect::<Vec<_>>().join(", ")
    }

    /// A predicate, true or not. Line ends keep a comment at its end within it.
    fn holds(&self, predicate: &str) -> String {
        let plain = format!("(\n{predicate}\n)");
        if self.op != Operation::Update || !Mentions::of(predicate).names.contains("new") {
            return plain;
        }
        let on = |row: String| format!("(SELECT {plain} FROM (SELECT {row}) AS new)");
        let old = |index: usize| format!("old.{}", self.column(index));
        let meant = on(self.row(|index| self.value(index).unwrap_or_else(|| old(index))));
        if !self.is_parted() {
            return meant;
        }
        // It has to be allowed as its author meant it, and as it is once some columns have lost.
        let merged = on(self.row(|index| match self.value(index) {
            Some(value) => format!("CASE WHEN {} THEN {value} ELSE {} END", self.wins_column(index), old(index)),
            None => old(index),
        }));
        format!("({meant} AND ({} OR NOT ({}) OR {merged}))", self.wins_columns(" AND "), self.wins_columns(" OR "))
    }

    /// All predicates.
    fn guard(&self) -> String {
        self.predicates().map(|predicate| self.holds(predicate)).collect::<Vec<_>>().join(" AND ")
    }

    /// Clock of a column of `old`; only for tables that merge by column.
    fn clock(&self, index: usize) -> String {
        let ConflictPolicy::Column { clocks, .. } = self.table.conflict else { return "''".to_owned() };
        let (clocks, name) = (self.column(clocks), literal(&self.table.columns[index].name));
        format!("coalesce(old.{clocks}->>{name}, old.{clocks}->>'', '') COLLATE \"C\"")
    }

    fn wins_column(&self, index: usize) -> String {
        if self.merge(index).is_some() { "true".to_owned() } else { self.is_newer(index) }
    }

    /// Whether the change is as new as what a column has.
    fn is_newer(&self, index: usize) -> String {
        match self.table.conflict {
            ConflictPolicy::Arrival => "true".to_owned(),
            ConflictPolicy::Row { updated_at, client_id } => self.newer(updated_at, client_id),
            ConflictPolicy::Column { .. } => format!("{CLOCK} >= {}", self.clock(index)),
        }
    }

    /// The clock of a column whose change counts, whatever is newer: the newer one. What is newer becomes so by a hair: a clock that
    /// stays says that somebody else than the executor wrote the column (`keep_clocks` in `migrations`).
    fn counted_clock(&self, index: usize) -> String {
        let clock = self.clock(index);
        format!(
            "CASE WHEN {CLOCK} > {clock} OR ({clock}) !~ '[0-9]{{4}}$' THEN millstream_input.ms_clock \
             ELSE left({clock}, -4) || lpad(least(right({clock}, 4)::int + 1, 9999)::text, 4, '0') END"
        )
    }

    fn wins_columns(&self, operator: &str) -> String {
        let mut wins: Vec<String> = self.columns.iter().map(|index| self.wins_column(*index)).collect();
        // Of a row that is newer as a whole, all columns say the same.
        wins.dedup();
        wins.join(operator)
    }

    /// Whether the change is newer than (some of) what it writes over.
    fn wins(&self) -> String {
        match (self.table.conflict, self.op) {
            (ConflictPolicy::Arrival, _) | (_, Operation::Insert) => "true".to_owned(),
            (_, Operation::Update) => format!("({})", self.wins_columns(" OR ")),
            (ConflictPolicy::Column { clocks, .. }, Operation::Delete) => self.newest(clocks),
            (ConflictPolicy::Row { updated_at, client_id }, _) => self.newer(updated_at, client_id),
        }
    }

    /// Whether the change is as new as every column of `old`.
    fn newest(&self, clocks: usize) -> String {
        format!(
            "NOT EXISTS (SELECT FROM jsonb_each_text(old.{}) AS ms_c WHERE ms_c.value COLLATE \"C\" > {CLOCK})",
            self.column(clocks)
        )
    }

    /// Whether it is as new as the row, by time and client. A time farther ahead than any that we write says nothing: somebody else's
    /// SQL has set it.
    fn newer(&self, updated_at: usize, client_id: usize) -> String {
        let (updated_at, client_id) = (self.column(updated_at), self.column(client_id));
        format!(
            "(({AT}, millstream_input.ms_client) >= (old.{updated_at}, coalesce(old.{client_id}, {NOBODY})) \
             OR old.{updated_at} > now() + interval '61 seconds')"
        )
    }

    /// The row's time and client, as text.
    fn row_clock(&self, updated_at: usize, client_id: usize) -> String {
        format!("concat_ws(' ', old.{}, old.{})", self.column(updated_at), self.column(client_id))
    }

    /// Columns that Millstream keeps, with what the operation sets them to.
    fn kept(&self) -> Vec<(usize, String)> {
        let client = || "millstream_input.ms_client".to_owned();
        let (clocks, updated_at, client_id) = match self.table.conflict {
            ConflictPolicy::Arrival => return Vec::new(),
            ConflictPolicy::Row { updated_at, client_id } => {
                let (mut at, mut by) = (AT.to_owned(), client());
                // As of a column whose change counts.
                if self.columns.iter().any(|index| self.merge(*index).is_some()) {
                    let newer = self.newer(updated_at, client_id);
                    let later = format!("old.{} + interval '1 microsecond'", self.column(updated_at));
                    at = format!("CASE WHEN {newer} THEN {at} ELSE {later} END");
                    by = format!("CASE WHEN {newer} THEN {by} ELSE old.{} END", self.column(client_id));
                }
                return vec![(updated_at, at), (client_id, by)];
            }
            ConflictPolicy::Column { clocks, updated_at, client_id } => (clocks, updated_at, client_id),
        };
        let insert = self.op == Operation::Insert;
        let written = match self.columns {
            _ if insert => "jsonb_build_object('', millstream_input.ms_clock)".to_owned(),
            [one] if self.merge(*one).is_none() => format!(
                "old.{} || jsonb_build_object({}, millstream_input.ms_clock)",
                self.column(clocks),
                literal(&self.table.columns[*one].name)
            ),
            many => {
                let won = |index: &usize| {
                    let name = literal(&self.table.columns[*index].name);
                    if self.merge(*index).is_some() {
                        return format!("{name}, {}", self.counted_clock(*index));
                    }
                    format!("{name}, CASE WHEN {} THEN millstream_input.ms_clock END", self.wins_column(*index))
                };
                let won: Vec<String> = many.iter().map(won).collect();
                let clocks = self.column(clocks);
                // A function takes 100 arguments.
                let parts = won.chunks(50).map(|part| format!("jsonb_build_object({})", part.join(", ")));
                format!("old.{clocks} || jsonb_strip_nulls({})", parts.collect::<Vec<_>>().join(" || "))
            }
        };
        let mut kept = vec![(clocks, written)];
        if let Some(index) = updated_at {
            let at = if insert { AT.to_owned() } else { format!("greatest(old.{}, {AT})", self.column(index)) };
            kept.push((index, at));
        }
        if let Some(index) = client_id {
            let newest = match updated_at {
                Some(updated_at) => self.newer(updated_at, index),
                None => self.newest(clocks),
            };
            let old = self.column(index);
            let newer = || format!("CASE WHEN {newest} THEN millstream_input.ms_client ELSE old.{old} END");
            kept.push((index, if insert { client() } else { newer() }));
        }
        kept
    }

    pub fn write(&self) -> String {
        let (name, rows, guard) = (&self.table.sql_name, self.table.sql_rows(), self.guard());
        let from = format!("{}, {AUTH}", self.input());
        let sql = match self.op {
            Operation::Insert => {
                let kept = self.kept();
                let names = self.columns.iter().chain(kept.iter().map(|(index, _)| index)).map(|i| self.column(*i));
                let values = self.columns.iter().map(|index| format!("new.{}", self.column(*index)));
                format!(
                    "INSERT INTO {name} ({})\nSELECT {}\nFROM {from}, {}\nWHERE {guard}\nORDER BY millstream_input.ms_i",
                    names.collect::<Vec<_>>().join(", "),
                    values.chain(kept.iter().map(|(_, value)| value.clone())).collect::<Vec<_>>().join(", "),
                    self.inserted(),
                )
            }
            Operation::Update => {
                let parted = self.is_parted();
                let set = |index: &usize| {
                    let (column, value) = (self.column(*index), self.value(*index).unwrap_or_default());
                    if parted && self.merge(*index).is_none() {
                        format!("{column} = CASE WHEN {} THEN {value} ELSE old.{column} END", self.wins_column(*index))
                    } else {
                        format!("{column} = {value}")
                    }
                };
                let kept = self.kept().into_iter().map(|(index, value)| format!("{} = {value}", self.column(index)));
                // In RETURNING, `old` is the row as it is now: a column has the change's clock, or the one it lost to.
                let contested: Vec<usize> =
                    self.columns.iter().copied().filter(|index| parted && self.merge(*index).is_none()).collect();
                let winner = match self.table.conflict {
                    _ if contested.is_empty() => "NULL::text".to_owned(),
                    ConflictPolicy::Row { updated_at, client_id } => format!(
                        "CASE WHEN NOT {} THEN {} END",
                        self.newer(updated_at, client_id),
                        self.row_clock(updated_at, client_id)
                    ),
                    ConflictPolicy::Column { .. } | ConflictPolicy::Arrival => {
                        let clocks: Vec<String> = contested.iter().map(|index| self.clock(*index)).collect();
                        format!("nullif(greatest({}), millstream_input.ms_clock)", clocks.join(", "))
                    }
                };
                format!(
                    "UPDATE {rows} AS old SET {}\nFROM {from}\nWHERE {} AND {guard} AND {}\nRETURNING millstream_input.ms_i, {winner} AS winner",
                    self.columns.iter().map(set).chain(kept).collect::<Vec<_>>().join(", "),
                    self.key(),
                    self.wins(),
                )
            }
            Operation::Delete => format!(
                "DELETE FROM {rows} AS old USING {from}\nWHERE {} AND {guard} AND {}\nRETURNING millstream_input.ms_i, NULL::text AS winner",
                self.key(),
                self.wins(),
            ),
        };
        format!("{} {sql}", self.mark())
    }

    /// A delete that tells of the rows that are there which it did not write: a trigger may have written them instead.
    pub fn delete_watched(&self) -> String {
        format!(
            "{} WITH millstream_before AS MATERIALIZED (SELECT millstream_input.ms_i, {VERSION} AS version\nFROM {} JOIN {} AS old ON {}),\n\
             millstream_written AS ({})\n\
             SELECT b.ms_i, w.winner, b.version, w.ms_i IS NOT NULL AS written\n\
             FROM millstream_before AS b LEFT JOIN millstream_written AS w ON w.ms_i = b.ms_i",
            self.mark(),
            self.input(),
            self.table.sql_rows(),
            self.key(),
            self.write(),
        )
    }

    /// A comment, for those who look at what runs.
    fn mark(&self) -> String {
        format!("/* millstream {} */", self.op.as_str())
    }

    /// `new` of an insert.
    fn inserted(&self) -> String {
        let row = self.row(|index| {
            let null = || format!("NULL::{}", self.table.columns[index].cast_type());
            self.value(index).unwrap_or_else(null)
        });
        format!("LATERAL (SELECT {row}) AS new")
    }

    pub fn readable(&self) -> String {
        format!(
            "/* millstream readable */ SELECT EXISTS (SELECT FROM {} CROSS JOIN {AUTH} JOIN {} AS old ON {} WHERE {})",
            self.input(),
            self.table.sql_rows(),
            self.key(),
            self.table.readable,
        )
    }

    /// `row_security`: rows that are allowed may not be written nevertheless.
    pub fn explain(&self, row_security: bool) -> String {
        let (join, found) = match self.op {
            Operation::Insert => (format!("CROSS JOIN {}", self.inserted()), "true".to_owned()),
            Operation::Update | Operation::Delete => (
                format!("LEFT JOIN {} AS old ON {}", self.table.sql_rows(), self.key()),
                // No part of a key is null.
                format!("old.{} IS NOT NULL", self.column(self.table.key[0])),
            ),
        };
        let mut predicates = self.predicates().map(|predicate| format!("coalesce({}, false)", self.holds(predicate)));
        let allowed = predicates.next().unwrap_or_else(|| "false".to_owned());
        let broken: String = predicates.enumerate().map(|(n, holds)| format!(" WHEN NOT {holds} THEN {n}")).collect();
        let broken = if broken.is_empty() {
            "NULL::int".to_owned()
        } else {
            format!("CASE WHEN NOT ({found}) THEN NULL{broken} END")
        };
        let winner = match (self.table.conflict, self.op) {
            (ConflictPolicy::Arrival, _) | (_, Operation::Insert) => "NULL::text".to_owned(),
            (ConflictPolicy::Column { .. }, Operation::Update) => {
                let clocks: Vec<String> = self.columns.iter().map(|index| self.clock(*index)).collect();
                format!("greatest({})", clocks.join(", "))
            }
            (ConflictPolicy::Column { clocks, .. }, Operation::Delete) => {
                format!(
                    "(SELECT max(ms_c.value COLLATE \"C\") FROM jsonb_each_text(old.{}) AS ms_c)",
                    self.column(clocks)
                )
            }
            (ConflictPolicy::Row { updated_at, client_id }, _) => self.row_clock(updated_at, client_id),
        };
        let readable = match self.op {
            Operation::Insert => "true".to_owned(),
            Operation::Update | Operation::Delete => {
                format!(
                    "CASE WHEN {found} AND ({row_security} OR NOT ms_allowed) THEN coalesce({}, false) ELSE true END",
                    self.table.readable
                )
            }
        };
        let version = match self.op {
            Operation::Delete if self.watched => format!("CASE WHEN {OWN_VERSION} THEN {VERSION} END"),
            Operation::Insert | Operation::Update | Operation::Delete => "NULL::text".to_owned(),
        };
        // OFFSET 0: or the predicate would be copied to wherever its value is looked at.
        format!(
            "/* millstream explain */ SELECT millstream_input.ms_i, {found} AS found, {readable} AS readable, ms_allowed AS allowed, \
             {broken} AS broken, CASE WHEN {found} THEN {} ELSE false END AS wins, {winner} AS winner, {version} AS version\n\
             FROM {} CROSS JOIN {AUTH} {join}\n\
             CROSS JOIN LATERAL (SELECT CASE WHEN {found} THEN {allowed} ELSE false END AS ms_allowed OFFSET 0) AS millstream_guard\n\
             ORDER BY millstream_input.ms_i",
            self.wins(),
            self.input(),
        )
    }
}

#[cfg(test)]
mod tests {
    use millstream_catalog::{Column, Rule};

    use super::*;
    use crate::decide::validator::tests::tasks;

    fn sql(table: &Table, op: Operation, columns: &[usize]) -> String {
        Writer { table, op, columns, adds: &[], first: 1, watched: false }.write()
    }

    fn check(sql: &str, parts: &[&str]) {
        for part in parts {
            assert!(sql.contains(part), "{part} in\n{sql}");
        }
    }

    /// `tasks` with the columns that Millstream keeps.
    fn merging() -> Table {
        let mut table = tasks();
        for (name, sql_type) in
            [("field_clocks", "jsonb"), ("updated_at", "timestamp with time zone"), ("client_id", "uuid")]
        {
            table.columns.push(Column {
                name: name.into(),
                sql_name: name.into(),
                sql_type: sql_type.into(),
                type_oid: 0,
                growth: Default::default(),
                merge: None,
                numeric: None,
                domain: None,
                default: None,
                nullable: false,
                writable: false,
            });
        }
        table.conflict = ConflictPolicy::Column { clocks: 4, updated_at: Some(5), client_id: Some(6) };
        table
    }

    #[test]
    fn texts_hold_what_they_must() {
        let mut table = tasks();
        table.rules.push(Rule {
            code: "short".into(),
            message: "m".into(),
            on: vec![Operation::Insert],
            check: "length(new.title) > 2 -- letters".into(),
        });
        let insert = sql(&table, Operation::Insert, &[0, 1]);
        check(
            &insert,
            &[
                "INSERT INTO \"public\".\"tasks\" (\"id\", \"title\")",
                "unnest($1::text[], $2::text[], $3::text[], $4::uuid[], $5::text[], $6::bigint[])",
                "millstream_input.ms_v0::uuid AS \"id\"",
                "millstream_input.ms_v1::character varying AS \"title\"",
                "NULL::boolean AS \"done\"",
                "(\nnew.title <> ''\n) AND (\nlength(new.title) > 2 -- letters\n)",
                "ORDER BY",
            ],
        );
        let update = sql(&table, Operation::Update, &[2]);
        check(
            &update,
            &[
                "UPDATE ONLY \"public\".\"tasks\" AS old SET \"done\" = millstream_input.ms_v0::boolean",
                "old.\"id\" = millstream_input.ms_k0::uuid",
                "EXISTS (SELECT FROM members m",
            ],
        );
        // No rule: nobody may.
        check(
            &sql(&table, Operation::Delete, &[]),
            &["DELETE FROM ONLY \"public\".\"tasks\" AS old USING", "(\nfalse\n)"],
        );
        let explain =
            Writer { table: &table, op: Operation::Insert, columns: &[0, 1], adds: &[], first: 1, watched: false }
                .explain(false);
        check(
            &explain,
            &["WHEN NOT coalesce((\nlength(new.title) > 2 -- letters\n), false) THEN 0", "true AS readable"],
        );
        table.readable = "may read".into();
        let explain =
            Writer { table: &table, op: Operation::Update, columns: &[2], adds: &[], first: 1, watched: false }
                .explain(false);
        check(&explain, &["(false OR NOT ms_allowed) THEN coalesce(may read, false) ELSE true END AS readable"]);
    }

    #[test]
    fn newer_columns_stay() {
        let mut table = merging();
        let clock = "coalesce(old.field_clocks->>'title', old.field_clocks->>'', '')";
        check(&sql(&table, Operation::Insert, &[0]), &["jsonb_build_object('', millstream_input.ms_clock)"]);
        let one = sql(&table, Operation::Update, &[1]);
        check(&one, &[clock, "old.field_clocks || jsonb_build_object('title', millstream_input.ms_clock)"]);
        assert!(!one.contains("THEN millstream_input.ms_v0"), "{one}");
        let two = sql(&table, Operation::Update, &[1, 2]);
        check(
            &two,
            &[clock, "THEN millstream_input.ms_v0::character varying ELSE old.\"title\" END", "nullif(greatest("],
        );
        check(&sql(&table, Operation::Delete, &[]), &["NOT EXISTS (SELECT FROM jsonb_each_text(old.field_clocks)"]);
        table.conflict = ConflictPolicy::Row { updated_at: 5, client_id: 6 };
        check(&sql(&table, Operation::Delete, &[]), &[">= (old.updated_at, coalesce(old.client_id, "]);
        // What counts in any order.
        table = merging();
        table.columns[3].sql_type = "integer".into();
        let add = |table: &Table, columns: &[usize]| {
            Writer { table, op: Operation::Update, columns, adds: &[3], first: 1, watched: false }.write()
        };
        let counted = "\"secret\" = (coalesce(old.\"secret\", 0)::bigint + millstream_input.ms_v0::bigint)::integer";
        check(
            &add(&table, &[3]),
            &[counted, "'secret', CASE WHEN millstream_input.ms_clock", "AND (true)", "NULL::text AS winner"],
        );
        let both = add(&table, &[1, 3]);
        check(&both, &["THEN millstream_input.ms_v0::character varying ELSE old.\"title\" END", "OR true)"]);
        assert_eq!(both.matches("old.\"secret\" END").count(), 0, "{both}");
        table.conflict = ConflictPolicy::Row { updated_at: 5, client_id: 6 };
        let row = add(&table, &[1, 3]);
        check(
            &row,
            &[
                "ELSE old.\"title\" END",
                "ELSE old.updated_at + interval '1 microsecond' END",
                "AS winner",
                "concat_ws(",
            ],
        );
        table.columns[3].merge = Some(Merge::Max);
        check(
            &sql(&table, Operation::Update, &[3]),
            &["THEN greatest(old.\"secret\", millstream_input.ms_v0::integer) WHEN NOT ("],
        );
        // A rule has to hold for what is meant and for what comes of it.
        table = merging();
        table.write.update = Some("new.title <> old.title".into());
        let both = sql(&table, Operation::Update, &[1, 2]);
        assert_eq!(both.matches("new.title <> old.title").count(), 2, "{both}");
        assert_eq!(sql(&table, Operation::Update, &[1]).matches("new.title <> old.title").count(), 1);
    }
}
