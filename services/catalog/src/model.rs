//! The catalog: the synced tables with everything that the services need to know of them.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use millstream_schemas::subject::USER_KIND;
use millstream_schemas::{ColumnSchema, Merge, Numeric, Operation, Reference, Schema, Scope, TableSchema, TableScope};

use crate::growth::Growth;

/// The synced tables, as declared in `millstream.toml` and found in the database. Immutable; shared in an `Arc`.
#[derive(Clone, Debug)]
pub struct Catalog {
    /// Hash of what clients see of the tables (16 hexadecimal digits).
    pub version: String,
    /// The tables, by name: the synced ones, and those that are read for their memberships alone.
    pub tables: Vec<Table>,
    /// Declared tables that cannot be synced as they are: no part of it, while all others are.
    pub aside: Vec<Aside>,
    /// The declared kinds of scopes, each behind those that it is reached through.
    pub(crate) kinds: Vec<String>,
    pub(crate) by_name: HashMap<String, usize>,
}

impl Catalog {
    /// The synced table of that name.
    pub fn table(&self, name: &str) -> Option<&Table> {
        self.by_name.get(name).map(|&index| &self.tables[index])
    }

    /// The tables that clients have.
    pub fn synced(&self) -> impl Iterator<Item = &Table> {
        self.tables.iter().filter(|table| table.synced)
    }

    /// What makes users members of scopes: each behind those of the kinds that it is reached through.
    pub fn memberships(&self) -> impl Iterator<Item = (&Table, &Membership)> {
        self.kinds.iter().flat_map(move |kind| {
            self.tables.iter().flat_map(move |table| {
                table.memberships.iter().filter(move |found| found.kind == *kind).map(move |found| (table, found))
            })
        })
    }

    /// What clients are told.
    pub fn schema(&self) -> Schema {
        Schema { version: self.version.clone(), tables: self.synced().map(Table::schema).collect() }
    }
}

/// A declared table that is set aside: it is not there, or does not fit what is declared of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Aside {
    /// Its name, as declared.
    pub table: String,
    /// Why, and what to do.
    pub why: String,
}

/// One synced table, or one that is read for its memberships alone.
#[derive(Clone, Debug)]
pub struct Table {
    /// Whether clients have its rows. If not, its columns are the key and those that memberships name, and all that is published
    /// is that memberships have moved.
    pub synced: bool,
    /// Object id.
    pub oid: u32,
    /// Its name: the same in Postgres, on the wire and in local stores.
    pub name: String,
    /// `"schema"."name"`, quoted for SQL.
    pub sql_name: String,
    /// Its rows are in partitions.
    pub partitioned: bool,
    /// The synced columns in wire order (the table's own order, without generated columns).
    pub columns: Vec<Column>,
    /// Names of columns that never leave the database, and are none of `columns`.
    pub hidden: Vec<String>,
    /// Indexes into `columns` of the primary key, in key order.
    pub key: Vec<usize>,
    /// The scopes that each row belongs to.
    pub scopes: Vec<TableScope>,
    /// Memberships that rows of this table grant; such rows are published in the members' scope too.
    pub memberships: Vec<Membership>,
    /// Foreign keys to the primary keys of synced tables.
    pub references: Vec<Reference>,
    /// SQL predicate over `old` and `auth`: whether the user may read the row, by its scopes and the memberships. Refusals ask.
    pub readable: String,
    /// Who may write.
    pub write: WriteRules,
    /// How concurrent changes to one row meet.
    pub conflict: ConflictPolicy,
    /// Former names of columns, with their names of today.
    pub renamed: BTreeMap<String, String>,
    /// Columns that are gone, and that clients may still set, to no effect.
    pub dropped: Vec<String>,
    /// Whether the delete of a row that is not there is applied rather than rejected.
    pub delete_missing_accepted: bool,
    /// Whether the insert of a row that is there already updates it rather than being rejected.
    pub insert_existing_merges: bool,
    /// Business rules, in the order in which they are declared.
    pub rules: Vec<Rule>,
    /// Which changes external validators are asked about.
    pub validate: Option<Validate>,
}

impl Table {
    /// Index of the column of that name.
    pub fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }

    /// What to read its rows `FROM`: those that the change stream tells of, without those of children by inheritance.
    pub fn sql_rows(&self) -> String {
        if self.partitioned { self.sql_name.clone() } else { format!("ONLY {}", self.sql_name) }
    }

    /// The scopes of a row, given its values in column order. Null scope columns give no scope.
    pub fn row_scopes<'a>(&'a self, row: impl Fn(usize) -> Option<&'a str>) -> Vec<Scope> {
        let mut scopes: Vec<Scope> = Vec::with_capacity(self.scopes.len() + self.memberships.len());
        for scope in self.row_scope_columns() {
            let found = match scope.column {
                None => Some(Scope::global()),
                Some(column) => row(column).map(|id| Scope::new(scope.kind, id)),
            };
            scopes.extend(found.filter(|scope| !scopes.contains(scope)));
        }
        scopes
    }

    /// How the scopes of a row are read off it: those declared, and for rows that grant memberships those of the members.
    pub fn row_scope_columns(&self) -> impl Iterator<Item = ScopeColumn<'_>> {
        let declared = self.scopes.iter().map(|scope| ScopeColumn { kind: &scope.kind, column: scope.column });
        declared.chain(self.memberships.iter().map(Membership::members))
    }

    /// The columns that the replica identity must cover: the key finds the row at the client, the scope columns
    /// and those of memberships say whose row it was.
    pub fn identity_columns(&self) -> Vec<usize> {
        let mut columns = self.key.clone();
        let scopes = self.row_scope_columns().filter_map(|scope| scope.column);
        let granted = self.memberships.iter().map(|membership| membership.scope);
        for column in scopes.chain(granted) {
            if !columns.contains(&column) {
                columns.push(column);
            }
        }
        columns
    }

    /// What clients are told.
    pub fn schema(&self) -> TableSchema {
        let mut scopes = Vec::with_capacity(self.scopes.len() + self.memberships.len());
        for ScopeColumn { kind, column } in self.row_scope_columns() {
            let scope = TableScope { kind: kind.to_owned(), column };
            if !scopes.contains(&scope) {
                scopes.push(scope);
            }
        }
        TableSchema {
            name: self.name.clone(),
            columns: self
                .columns
                .iter()
                .map(|column| ColumnSchema {
                    name: column.name.clone(),
                    r#type: column.sql_type.clone(),
                    nullable: column.nullable,
                    writable: column.writable,
                    default: column.default.clone(),
                    merge: column.merge,
                    numeric: column.numeric,
                })
                .collect(),
            key: self.key.clone(),
            scopes,
            references: self.references.clone(),
            clocks: match self.conflict {
                ConflictPolicy::Column { clocks, .. } => Some(clocks),
                ConflictPolicy::Row { .. } | ConflictPolicy::Arrival => None,
            },
        }
    }
}

/// One column.
#[derive(Clone, Debug)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// The name, quoted for SQL.
    pub sql_name: String,
    /// Its type as `format_type` writes it, fit for a cast; of a domain, the type below it. What is assigned to the column is still held
    /// to the domain's checks.
    pub sql_type: String,
    /// The domain, if it is one.
    pub domain: Option<String>,
    /// Object id of the type.
    pub type_oid: u32,
    /// How much longer its values may become when Postgres writes them.
    pub growth: Growth,
    /// Whether it may be null.
    pub nullable: bool,
    /// Whether clients may set it (key columns: on insert only).
    pub writable: bool,
    /// The value that it has where an insert names none, in its text form, if that is always the same.
    pub default: Option<String>,
    /// How concurrent changes of it meet, if both are to count.
    pub merge: Option<Merge>,
    /// What SQLite has for its values, if that is declared.
    pub numeric: Option<Numeric>,
}

impl Column {
    /// Whether amounts can be added to it.
    pub fn is_whole_number(&self) -> bool {
        matches!(self.sql_type.as_str(), "smallint" | "integer" | "bigint")
    }

    /// The type to cast text to: without the length, so that a value that is too long is refused by the assignment or missed by
    /// the comparison that follows, instead of being cut by the cast.
    pub fn cast_type(&self) -> String {
        let sql_type = self.sql_type.as_str();
        let (name, suffix) = match sql_type.split_once('(') {
            Some((name, rest)) if !sql_type.starts_with('"') && !sql_type.contains('.') => {
                (name, rest.split_once(')').map_or("", |(_, suffix)| suffix))
            }
            _ => (sql_type, ""),
        };
        let name = match name {
            "character" => "bpchar",
            "bit" => "bit varying",
            other => other,
        };
        format!("{name}{suffix}")
    }

    /// SQL for its value as the WAL and COPY spell it, by the type's output function; null stays null. (A cast to text strips the
    /// blanks of `char(n)`, and spells a boolean in another way. `IS NOT NULL` is false of a row with a null in it.)
    pub fn text(&self) -> String {
        text(&self.sql_name)
    }

    /// The same of its value in what SQL calls `row`.
    pub(crate) fn text_in(&self, row: &str) -> String {
        text(&format!("{row}.{}", self.sql_name))
    }

    /// SQL that says whether it holds one of `ids` (SQL for an array of texts), by an index where there is one. Ids are spelled as
    /// the stream spells them: `1.0` is another than `1`, whatever numeric has to say of it, and so with citext and collations.
    pub fn is_one_of(&self, ids: &str) -> String {
        self.named_is_one_of(&self.sql_name, ids)
    }

    /// The same of its value in what SQL calls `row`.
    pub(crate) fn is_one_of_in(&self, row: &str, ids: &str) -> String {
        self.named_is_one_of(&format!("{row}.{}", self.sql_name), ids)
    }

    /// The same for many rows and many ids: `ids` is read once, and joined by an index or a hash.
    pub fn is_among(&self, ids: &str) -> String {
        let name = &self.sql_name;
        let equal = format!("{name} IN (SELECT unnest({ids}::text[])::{})", self.cast_type());
        if self.has_one_spelling() {
            return equal;
        }
        format!("{equal} AND ({}) COLLATE \"C\" IN (SELECT unnest({ids}::text[]) COLLATE \"C\")", text(name))
    }

    /// Equal values have one spelling.
    fn has_one_spelling(&self) -> bool {
        matches!(self.sql_type.as_str(), "uuid" | "bigint" | "integer" | "smallint")
    }

    fn named_is_one_of(&self, name: &str, ids: &str) -> String {
        let equal = format!("{name} = ANY ({ids}::text[]::{}[])", self.cast_type());
        if self.has_one_spelling() {
            return equal;
        }
        format!("{equal} AND ({}) COLLATE \"C\" = ANY ({ids}::text[])", text(name))
    }
}

fn text(name: &str) -> String {
    format!("CASE WHEN {name} IS DISTINCT FROM NULL THEN concat({name}) END")
}

/// How a scope of a row is read off it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScopeColumn<'a> {
    /// Kind of the scope.
    pub kind: &'a str,
    /// Index of the column with its id; none for `global`.
    pub column: Option<usize>,
}

/// A row of the table makes some users members of the scope `kind:{scope column}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Kind of the scope.
    pub kind: String,
    /// Index of the column with the scope's id.
    pub scope: usize,
    /// Who becomes a member.
    pub of: Members,
}

/// Whom a row makes members.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Members {
    /// The user that it names.
    User {
        /// Index of the column with the user id.
        column: usize,
        /// Index of the column with the role, and the roles that count; none if all do.
        roles: Option<(usize, Vec<String>)>,
    },
    /// Every member of another scope.
    Through {
        /// Kind of the other scope.
        kind: String,
        /// Index of the column with its id.
        column: usize,
    },
}

impl Membership {
    /// The scope of those whom a row makes members: it is published there, so that they learn of it.
    pub fn members(&self) -> ScopeColumn<'_> {
        match &self.of {
            Members::User { column, .. } => ScopeColumn { kind: USER_KIND, column: Some(*column) },
            Members::Through { kind, column } => ScopeColumn { kind, column: Some(*column) },
        }
    }
}

/// How concurrent changes to one row meet, with the columns that tell which is newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConflictPolicy {
    /// The newer change wins, column by column.
    Column {
        /// Index of `field_clocks`: the row's [`millstream_schemas::Clocks`].
        clocks: usize,
        /// Index of `updated_at`, if there is one: time of the row's newest change.
        updated_at: Option<usize>,
        /// Index of `client_id`, if there is one: the client of the row's newest change.
        client_id: Option<usize>,
    },
    /// The newer change wins, for the row.
    Row {
        /// Index of `updated_at`.
        updated_at: usize,
        /// Index of `client_id`.
        client_id: usize,
    },
    /// The later arrival wins.
    Arrival,
}

/// A business rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Its name, for programs.
    pub code: String,
    /// For people.
    pub message: String,
    /// Which operations it is for.
    pub on: Vec<Operation>,
    /// SQL predicate over `new` (insert, update), `old` (update, delete) and `auth`.
    pub check: String,
}

/// Which changes external validators are asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Validate {
    /// Which operations.
    pub on: Vec<Operation>,
    /// How long to wait for an answer.
    pub deadline: Duration,
}

/// SQL predicates, one an operation; an operation without one is refused to every client.
///
/// A predicate sees `new` (insert, update), `old` (update, delete) and `auth` (`auth.user_id text`,
/// `auth.client_id uuid`), and is evaluated in the statement that does the write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriteRules {
    /// May this row be inserted?
    pub insert: Option<String>,
    /// May this row be changed so?
    pub update: Option<String>,
    /// May this row be deleted?
    pub delete: Option<String>,
}

/// A text as a literal in SQL.
pub fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_are_quoted() {
        assert_eq!(literal("it's"), "'it''s'");
    }

    #[test]
    fn casts_do_not_cut_values() {
        for (declared, cast) in [
            ("uuid", "uuid"),
            ("character varying(20)", "character varying"),
            ("character varying(20)[]", "character varying[]"),
            ("character(5)", "bpchar"),
            ("bit(3)", "bit varying"),
            ("numeric(10,2)", "numeric"),
            ("timestamp(3) with time zone", "timestamp with time zone"),
            ("board.status", "board.status"),
            ("\"Odd (name)\"", "\"Odd (name)\""),
        ] {
            let column = Column {
                name: "c".into(),
                sql_name: "c".into(),
                sql_type: declared.into(),
                type_oid: 0,
                growth: Growth::default(),
                default: None,
                merge: None,
                numeric: None,
                domain: None,
                nullable: true,
                writable: true,
            };
            assert_eq!(column.cast_type(), cast);
        }
    }
}
