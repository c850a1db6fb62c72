//! Resolving the configuration against the database.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Write as _;
use std::time::Duration;

use millstream_schemas::spelling::{MAX_SCALE, decimals};
use millstream_schemas::{Merge, Numeric, Reference, TableScope};
use sha2::{Digest, Sha256};
use sqlx::{PgConnection, Row};

use crate::config::{ClockNames, Config, Conflict, DeleteMissing, InsertExisting, MembershipConfig, TableConfig};
use crate::model::{
    Aside, Catalog, Column, ConflictPolicy, Members, Membership, Rule, ScopeColumn, Table, Validate, WriteRules,
};
use crate::stores::store_misfits;
use crate::{defaults, growth};

/// Why the configuration does not fit the database.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    /// The database's catalog cannot be read.
    #[error("cannot read the database's catalog")]
    Query(#[source] sqlx::Error),
    /// A column that clients may set is not there.
    #[error(
        "[tables.{table}]: `writable` names `{column}`, which is not a column of it (generated columns cannot be written)"
    )]
    Writable {
        /// As written in the file.
        table: String,
        /// As written there.
        column: String,
    },
    /// A declaration of what SQLite has for numbers does not fit.
    #[error("[tables.{table}]: {what}")]
    Numeric {
        /// As written in the file.
        table: String,
        /// What is wrong and what to do.
        what: String,
    },
    /// A declaration does not fit.
    #[error("[tables.{table}]: {what}")]
    Table {
        /// As written in the file.
        table: String,
        /// What is wrong and what to do.
        what: String,
    },
}

impl Catalog {
    /// Finds every declared table, its columns, types and key in the database. A table that is not there, that `publication`
    /// lacks, that clients' stores cannot take, or that does not fit what is declared of it is set aside ([`Catalog::aside`]):
    /// a migration on one table stops no other. `writable` columns that are not there, and declarations of numbers that do not
    /// fit, are passed over.
    ///
    /// # Errors
    /// No table fits (the first reason), or the database cannot be asked.
    pub async fn load(
        connection: &mut PgConnection,
        config: &Config,
        publication: Option<&str>,
    ) -> Result<Catalog, CatalogError> {
        let (mut tables, mut problems) = found(connection, config).await?;
        // A column that was dropped is no reason for standing still: clients may not set what is not there. Nor is another type
        // of a number: SQLite has its text then.
        problems.retain(|problem| !matches!(problem, CatalogError::Writable { .. } | CatalogError::Numeric { .. }));
        if let Some(publication) = publication {
            problems.extend(unpublished(connection, &tables, publication).await?);
        }
        let misfits = store_misfits(&tables).into_iter();
        problems.extend(misfits.map(|misfit| CatalogError::Table { table: misfit.table, what: misfit.message }));
        let mut aside: Vec<Aside> = problems
            .iter()
            .filter_map(|problem| match problem {
                CatalogError::Table { table, what } => Some(Aside { table: table.clone(), why: what.clone() }),
                _ => None,
            })
            .collect();
        tables.retain(|table| !aside.iter().any(|aside| aside.table == table.name));
        let mut seen = BTreeSet::new();
        for aside in aside.iter_mut().filter(|aside| seen.insert(aside.table.clone())) {
            let kinds: Vec<&str> = config.granted_by(&aside.table).map(|(kind, _)| kind).collect();
            if kinds.is_empty() {
                continue;
            }
            // Whose rows the others are is another question than whether clients can have its own.
            let kept = match source(connection, &aside.table, config, publication, &tables).await? {
                Some(source) => {
                    tables.push(source);
                    "its memberships still count"
                }
                None => "meanwhile it grants nobody a scope of these kinds",
            };
            aside.why = format!("{}; {kept}: {}", aside.why, kinds.join(", "));
        }
        if !tables.iter().any(|table| table.synced)
            && let Some(problem) = problems.into_iter().next()
        {
            return Err(problem);
        }
        Catalog::of(connection, config, tables, aside).await
    }

    /// The catalog of what could be found, and every declaration that does not fit. With problems, the catalog is good for
    /// finding more of them and for nothing else.
    ///
    /// # Errors
    /// The database cannot be asked.
    pub async fn collect(
        connection: &mut PgConnection,
        config: &Config,
    ) -> Result<(Catalog, Vec<CatalogError>), CatalogError> {
        let (tables, problems) = found(connection, config).await?;
        Ok((Catalog::of(connection, config, tables, Vec::new()).await?, problems))
    }

    async fn of(
        connection: &mut PgConnection,
        config: &Config,
        mut tables: Vec<Table>,
        aside: Vec<Aside>,
    ) -> Result<Catalog, CatalogError> {
        references(connection, &mut tables).await?;
        let kinds = config.kinds().unwrap_or_default().into_iter().map(str::to_owned).collect();
        let synced = tables.iter().enumerate().filter(|(_, table)| table.synced);
        let by_name = synced.map(|(index, table)| (table.name.clone(), index)).collect();
        let mut catalog = Catalog { version: String::new(), tables, aside, kinds, by_name };
        catalog.version = version(&catalog);
        let readable: Vec<String> = catalog.tables.iter().map(|table| catalog.readable(table)).collect();
        catalog.tables.iter_mut().zip(readable).for_each(|(table, readable)| table.readable = readable);
        Ok(catalog)
    }
}

/// The declared tables that are there, and every declaration that does not fit.
async fn found(
    connection: &mut PgConnection,
    config: &Config,
) -> Result<(Vec<Table>, Vec<CatalogError>), CatalogError> {
    let mut tables = Vec::with_capacity(config.tables.len());
    let mut problems = Vec::new();
    for (name, declared) in &config.tables {
        let mut found = Problems { table: name, problems: &mut problems, left_out: HashMap::new() };
        tables.extend(table(connection, name, Some(declared), config, &mut found).await?);
    }
    for name in config.sources() {
        let mut found = Problems { table: name, problems: &mut problems, left_out: HashMap::new() };
        let before = found.problems.len();
        tables.extend(table(connection, name, None, config, &mut found).await?);
        for problem in &mut problems[before..] {
            if let (CatalogError::Table { what, .. }, Some((kind, _))) = (problem, config.granted_by(name).next()) {
                let _ = write!(what, " (it is read for the memberships of [scopes.{kind}])");
            }
        }
    }
    problems.extend(id_types(&tables));
    Ok((tables, problems))
}

/// A table that is set aside, as one that is read for its memberships alone; `None` if not even that can be done.
async fn source(
    connection: &mut PgConnection,
    name: &str,
    config: &Config,
    publication: Option<&str>,
    others: &[Table],
) -> Result<Option<Table>, CatalogError> {
    let mut problems = Vec::new();
    let mut found = Problems { table: name, problems: &mut problems, left_out: HashMap::new() };
    let Some(source) = table(connection, name, None, config, &mut found).await? else { return Ok(None) };
    if let Some(publication) = publication {
        problems.extend(unpublished(connection, std::slice::from_ref(&source), publication).await?);
    }
    let all: Vec<Table> = others.iter().chain([&source]).cloned().collect();
    problems.extend(id_types(&all));
    Ok(problems.is_empty().then_some(source))
}

/// Tables whose changes are not published.
async fn unpublished(
    connection: &mut PgConnection,
    tables: &[Table],
    publication: &str,
) -> Result<Vec<CatalogError>, CatalogError> {
    let published: Vec<i64> = sqlx::query_scalar(
        "SELECT r.prrelid::int8 FROM pg_publication_rel r JOIN pg_publication p ON p.oid = r.prpubid WHERE p.pubname = $1 \
         UNION ALL SELECT c.oid::int8 FROM pg_class c JOIN pg_publication p ON p.pubname = $1 WHERE p.puballtables OR EXISTS ( \
           SELECT FROM pg_publication_namespace n WHERE n.pnpubid = p.oid AND n.pnnspid = c.relnamespace)",
    )
    .bind(publication)
    .fetch_all(connection)
    .await
    .map_err(CatalogError::Query)?;
    // None at all: `setup` was not run yet, or it has another name, which replication knows.
    let missing = tables.iter().filter(|table| !published.is_empty() && !published.contains(&i64::from(table.oid)));
    Ok(missing
        .map(|table| CatalogError::Table {
            table: table.name.clone(),
            what: format!("it is not in the publication {publication}; run `millstream setup`"),
        })
        .collect())
}

/// Columns that carry ids of one kind of scope and are of different types: an id of one might be no value of another.
fn id_types(tables: &[Table]) -> Vec<CatalogError> {
    fn base(sql_type: &str) -> &str {
        let name = sql_type.split('(').next().unwrap_or(sql_type);
        if name == "character varying" { "text" } else { name }
    }
    let mut seen: HashMap<&str, (&Table, &Column)> = HashMap::new();
    let mut problems = Vec::new();
    for table in tables {
        let granted =
            table.memberships.iter().map(|found| ScopeColumn { kind: &found.kind, column: Some(found.scope) });
        for ScopeColumn { kind, column } in granted.chain(table.row_scope_columns()) {
            let Some(column) = column.map(|index| &table.columns[index]) else { continue };
            let (other, first) = *seen.entry(kind).or_insert((table, column));
            if base(&first.sql_type) != base(&column.sql_type) {
                let what = format!(
                    "`{}` is {}, but `{}.{}`, which names a {kind} too, is {}; give both the same type",
                    column.name, column.sql_type, other.name, first.name, first.sql_type
                );
                problems.push(CatalogError::Table { table: table.name.clone(), what });
            }
        }
    }
    problems
}

/// Finds the foreign keys between synced tables that refer to a key.
async fn references(connection: &mut PgConnection, tables: &mut [Table]) -> Result<(), CatalogError> {
    let keys: HashMap<i64, (String, Vec<String>)> = tables
        .iter()
        .filter(|table| table.synced)
        .map(|table| {
            let key = table.key.iter().map(|&column| table.columns[column].name.clone()).collect();
            (table.oid.into(), (table.name.clone(), key))
        })
        .collect();
    let found = sqlx::query(
        "SELECT c.conrelid::int8 AS child, c.confrelid::int8 AS parent, c.confdeltype = 'c' AS cascades,
                ARRAY(SELECT attname::text FROM unnest(c.conkey) WITH ORDINALITY AS k(number, at)
                      JOIN pg_attribute ON attrelid = c.conrelid AND attnum = number ORDER BY at) AS columns,
                ARRAY(SELECT attname::text FROM unnest(c.confkey) WITH ORDINALITY AS k(number, at)
                      JOIN pg_attribute ON attrelid = c.confrelid AND attnum = number ORDER BY at) AS refers_to
         FROM pg_constraint c
         WHERE c.contype = 'f' AND c.conparentid = 0 AND c.conrelid::int8 = ANY ($1) AND c.confrelid::int8 = ANY ($1)
         ORDER BY c.conrelid, c.conname",
    )
    .bind(keys.keys().copied().collect::<Vec<_>>())
    .fetch_all(&mut *connection)
    .await
    .map_err(CatalogError::Query)?;
    for row in &found {
        let (child, parent): (i64, i64) = (row.get("child"), row.get("parent"));
        let Some(table) = tables.iter_mut().find(|table| i64::from(table.oid) == child) else { continue };
        let Some((name, key)) = keys.get(&parent) else { continue };
        let (columns, refers_to): (Vec<String>, Vec<String>) = (row.get("columns"), row.get("refers_to"));
        if refers_to.len() != key.len() {
            continue;
        }
        // In the order of the parent's key. A generated column is not synced.
        let columns: Option<Vec<usize>> = key
            .iter()
            .map(|part| table.column(&columns[refers_to.iter().position(|column| column == part)?]))
            .collect();
        if let Some(columns) = columns {
            table.references.push(Reference { columns, table: name.clone(), cascades: row.get("cascades") });
        }
    }
    Ok(())
}

/// What does not fit in the declaration of one table.
struct Problems<'a> {
    table: &'a str,
    problems: &'a mut Vec<CatalogError>,
    /// Columns that are not synced, with the reason.
    left_out: HashMap<String, &'static str>,
}

impl Problems<'_> {
    fn add(&mut self, what: impl Into<String>) {
        self.problems.push(CatalogError::Table { table: self.table.to_owned(), what: what.into() });
    }

    fn numeric(&mut self, what: String) {
        self.problems.push(CatalogError::Numeric { table: self.table.to_owned(), what });
    }

    /// The index of a column, if there is one of that name.
    fn column(&mut self, columns: &[Column], name: &str) -> Option<usize> {
        let found = columns.iter().position(|column| column.name == name);
        if found.is_none() {
            self.add(match self.left_out.get(name) {
                Some(why) => format!("`{name}` is {why}, and only synced columns can name scopes, members and roles"),
                None => format!("it has no column `{name}`"),
            });
        }
        found
    }
}

/// What messages of the outbound stream say beside their rows. One that lacks something would be read as saying that there is none,
/// so another format is another layout, and begins a new epoch. 2: which memberships move. 3: which kinds of scopes are to be read again.
const FORMAT: &str = "3\n";

/// Of SHA-256, the first 8 hexadecimal digits for the [`layout`], then 8 for the rest of what clients see, so that every
/// service computes the same.
fn version(catalog: &Catalog) -> String {
    let (mut layout, mut rest) = (Sha256::new(), Sha256::new());
    layout.update(FORMAT);
    for table in &catalog.tables {
        if !table.synced {
            layout.update("for its memberships alone\n");
        }
        let schema = table.schema();
        // Its oid too: rows do not say it when another table takes the name of one.
        layout.update(format!(
            "{}\n{}\n{:?}\n{:?}\n{:?}\n",
            schema.name, table.oid, schema.key, schema.scopes, schema.clocks
        ));
        // Who is a member moves with these without a row that tells.
        for membership in &table.memberships {
            layout.update(format!("{membership:?}\n"));
        }
        rest.update(format!("{:?}\n", schema.references));
        for column in &schema.columns {
            layout.update(format!("{}\t{}\n", column.name, column.r#type));
            rest.update(format!(
                "{}\t{}\t{:?}\t{:?}\t{:?}\n",
                column.nullable, column.writable, column.default, column.merge, column.numeric
            ));
        }
    }
    [layout, rest]
        .into_iter()
        .flat_map(|hash| hash.finalize().into_iter().take(4))
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The part of a schema's version that says how rows are laid out and which scopes they belong to: rows of one layout can
/// be read by whoever knows another version with the same one.
pub fn layout(version: &str) -> &str {
    version.get(..8).unwrap_or(version)
}

/// A table as it is `declared`; without that, as one that is read for its memberships alone.
async fn table(
    connection: &mut PgConnection,
    name: &str,
    declared: Option<&TableConfig>,
    config: &Config,
    problems: &mut Problems<'_>,
) -> Result<Option<Table>, CatalogError> {
    let (schema, relation) = name.split_once('.').unwrap_or(("public", name));
    let found = sqlx::query(
        "SELECT c.oid::int8 AS oid, c.relkind::text AS kind,
                format('%I.%I', n.nspname, c.relname) AS sql_name
         FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
         WHERE n.nspname = $1 AND c.relname = $2 AND c.relkind IN ('r', 'p', 'v', 'm', 'f')",
    )
    .bind(schema)
    .bind(relation)
    .fetch_optional(&mut *connection)
    .await
    .map_err(CatalogError::Query)?;
    let Some(found) = found else {
        problems.add(format!("table {schema}.{relation} does not exist in the database"));
        return Ok(None);
    };
    if !matches!(found.get("kind"), "r" | "p") {
        problems.add(match found.get("kind") {
            "f" => "it is a foreign table: its changes are not in this database's write-ahead log",
            _ => "only ordinary and partitioned tables can be synced, not views",
        });
        return Ok(None);
    }
    let oid: i64 = found.get("oid");

    let (synced, nothing) = (declared.is_some(), TableConfig::source());
    if !synced {
        let may_read: bool = sqlx::query_scalar("SELECT has_table_privilege($1::int8::oid, 'SELECT')")
            .bind(oid)
            .fetch_one(&mut *connection)
            .await
            .map_err(CatalogError::Query)?;
        if !may_read {
            problems.add("its memberships cannot be read: run `millstream setup`");
        }
    }
    let declared = declared.unwrap_or(&nothing);
    let key_numbers = key(connection, oid, declared, problems).await?;
    let (mut columns, mut numbers) = columns(connection, oid, declared, problems).await?;
    if !synced {
        let named: BTreeSet<&str> = config.granted_by(name).flat_map(|(_, of)| of.columns()).collect();
        let needed = |column: &Column, number: &i16| named.contains(&*column.name) || key_numbers.contains(number);
        (columns, numbers) = columns.into_iter().zip(numbers).filter(|(column, number)| needed(column, number)).unzip();
    }
    let key: Vec<usize> = key_numbers.iter().filter_map(|number| numbers.iter().position(|n| n == number)).collect();
    if key.len() < key_numbers.len() {
        problems.add("a generated or hidden column is part of its key");
    }

    let mut scopes = Vec::new();
    for scope in declared.scope.as_slice() {
        let column = scope.column.as_deref().map(|column| problems.column(&columns, column));
        if column != Some(None) {
            scopes.push(TableScope { kind: scope.kind.clone(), column: column.flatten() });
        }
    }
    let memberships: Vec<Membership> =
        config.granted_by(name).filter_map(|(kind, of)| membership(kind, of, &columns, problems)).collect();
    if declared.write.insert.is_some() {
        for missing in key.iter().map(|&column| &columns[column]).filter(|column| !column.writable) {
            problems.add(format!("clients may insert, so the key column `{}` must be in `writable`", missing.name));
        }
    }
    merges(declared, &columns, &key, problems);
    let named = scopes.iter().filter_map(|scope| scope.column);
    let granted = memberships.iter().flat_map(|found| [Some(found.scope), found.members().column]).flatten();
    let ids: Vec<usize> = named.chain(granted).collect();
    numerics(declared, &mut columns, &key, &ids, problems);
    let conflict = conflict(declared.conflict, &declared.clocks, &columns, problems);
    Ok(Some(Table {
        synced,
        oid: u32::try_from(oid).unwrap_or_default(),
        name: name.to_owned(),
        sql_name: found.get("sql_name"),
        hidden: declared.hidden.clone(),
        partitioned: found.get::<&str, _>("kind") == "p",
        columns,
        key,
        scopes,
        memberships,
        // Once all tables are known.
        references: Vec::new(),
        readable: String::new(),
        write: WriteRules {
            insert: declared.write.insert.clone(),
            update: declared.write.update.clone(),
            delete: declared.write.delete.clone(),
        },
        conflict,
        renamed: declared.renamed.clone(),
        dropped: declared.dropped.clone(),
        delete_missing_accepted: declared.delete_missing == DeleteMissing::Accept,
        insert_existing_merges: declared.insert_existing == InsertExisting::Merge,
        rules: declared
            .rules
            .iter()
            .map(|rule| Rule {
                code: rule.code.clone(),
                message: rule.message.clone(),
                on: rule.on.clone(),
                check: rule.check.clone(),
            })
            .collect(),
        validate: declared.validate.as_ref().map(|validate| Validate {
            on: validate.on.clone(),
            deadline: Duration::from_millis(validate.deadline_ms),
        }),
    }))
}

/// The attribute numbers of the key: the primary key, else the unique index that can stand in for it.
async fn key(
    connection: &mut PgConnection,
    oid: i64,
    declared: &TableConfig,
    problems: &mut Problems<'_>,
) -> Result<Vec<i16>, CatalogError> {
    // By way of text: an int2vector counts from 0, which sqlx does not decode. Columns by INCLUDE come last.
    let rows = sqlx::query(
        "SELECT i.indisprimary, key.numbers,
                ARRAY(SELECT attname::text FROM unnest(key.numbers) WITH ORDINALITY AS k(number, at)
                      JOIN pg_attribute ON attrelid = i.indrelid AND attnum = number ORDER BY at) AS names
         FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid,
              LATERAL (SELECT (string_to_array(i.indkey::text, ' ')::int2[])[1:i.indnkeyatts] AS numbers) AS key
         WHERE i.indrelid = $1::int8::oid AND (i.indisprimary OR (
               i.indisunique AND i.indisvalid AND i.indimmediate AND i.indpred IS NULL AND i.indexprs IS NULL
               AND NOT EXISTS (SELECT FROM pg_attribute a WHERE a.attrelid = i.indrelid AND a.attnum = ANY (key.numbers)
                               AND (NOT a.attnotnull OR a.attgenerated <> '' OR a.attname = ANY ($2)))))
         ORDER BY NOT i.indisprimary, c.relname",
    )
    .bind(oid)
    .bind(&declared.hidden)
    .fetch_all(&mut *connection)
    .await
    .map_err(CatalogError::Query)?;
    let mut keys: Vec<(Vec<i16>, Vec<String>)> =
        rows.iter().map(|row| (row.get("numbers"), row.get::<Vec<String>, _>("names"))).collect();
    if rows.first().is_some_and(|row| row.get("indisprimary")) {
        keys.truncate(1);
    }
    // Two indexes over the same columns are one key.
    keys.dedup_by_key(|(numbers, _)| sorted(numbers));
    if !declared.key.is_empty() {
        let wanted = sorted(&declared.key);
        keys.retain(|(_, names)| sorted(names) == wanted);
        if keys.is_empty() {
            problems.add(format!(
                "`key` names `{}`, which is neither its primary key nor, where it has none, a unique index over NOT NULL columns",
                declared.key.join("`, `")
            ));
        }
    } else if keys.is_empty() {
        problems.add("it has no primary key; a synced table needs one, or a unique index over NOT NULL columns");
    } else if keys.len() > 1 {
        let names: Vec<String> = keys.iter().map(|(_, names)| format!("{names:?}")).collect();
        problems.add(format!(
            "it has no primary key and several unique indexes: say by `key = …` which serves as key: {}",
            names.join(" or ")
        ));
    }
    Ok(keys.into_iter().next().map(|(numbers, _)| numbers).unwrap_or_default())
}

fn sorted<T: Ord + Clone>(list: &[T]) -> Vec<T> {
    let mut list = list.to_vec();
    list.sort();
    list
}

/// The types of which the greatest and least value are known to clients too.
const ORDERED: [&str; 6] =
    ["smallint", "integer", "bigint", "date", "timestamp without time zone", "timestamp with time zone"];

/// Columns declared in `merge` have to be ones that clients change, of types with which it can be done.
fn merges(declared: &TableConfig, columns: &[Column], key: &[usize], problems: &mut Problems<'_>) {
    for (name, merge) in &declared.merge {
        let Some(index) = problems.column(columns, name) else { continue };
        let column = &columns[index];
        if !column.writable || key.contains(&index) {
            problems.add(format!("`merge` names `{name}`, which clients cannot change: add it to `writable`"));
        }
        let fits = match merge {
            Merge::Add => column.is_whole_number(),
            Merge::Max | Merge::Min => ORDERED.contains(&column.sql_type.as_str()),
        };
        if !fits {
            let needs = match merge {
                Merge::Add => "smallint, integer or bigint",
                Merge::Max | Merge::Min => {
                    "smallint, integer, bigint, date, timestamp or timestamptz without a precision"
                }
            };
            problems.add(format!("`merge` of `{name}`: its type is {}, and has to be {needs}", column.sql_type));
        }
    }
}

/// Columns declared in `numeric` have to be ones for which SQLite can have it so.
fn numerics(declared: &TableConfig, columns: &mut [Column], key: &[usize], ids: &[usize], problems: &mut Problems<'_>) {
    for (name, numeric) in &declared.numeric {
        let Some(index) = columns.iter().position(|column| column.name == *name) else {
            problems.numeric(format!("it has no column `{name}`"));
            continue;
        };
        let sql_type = &columns[index].sql_type;
        let is_numeric = sql_type == "numeric" || sql_type.starts_with("numeric(");
        let fault = match numeric {
            _ if !is_numeric => Some(format!("its type is {sql_type}, and has to be numeric")),
            Numeric::Integer if decimals(sql_type).is_none() => Some(format!(
                "\"integer\" counts the smallest unit, so the type has to be numeric(p,s) with a scale of 0 to {MAX_SCALE}, and is \
                 {sql_type}; choose \"real\" or \"text\", or give the column a scale"
            )),
            Numeric::Real if key.contains(&index) => {
                Some("it is part of the key, which has to be exact; choose \"text\" or \"integer\"".to_owned())
            }
            Numeric::Real | Numeric::Integer if ids.contains(&index) => {
                Some("it names a scope or its members, whose ids are text; choose \"text\"".to_owned())
            }
            _ => None,
        };
        if let Some(fault) = fault {
            problems.numeric(format!("`numeric` of `{name}`: {fault}"));
            columns[index].numeric = None;
        }
    }
}

/// A membership with its columns; none if one is missing.
fn membership(
    kind: &str,
    declared: &MembershipConfig,
    columns: &[Column],
    problems: &mut Problems<'_>,
) -> Option<Membership> {
    let scope = problems.column(columns, &declared.scope);
    let of = match (&declared.user, &declared.through, &declared.via) {
        (Some(user), ..) => {
            let user = problems.column(columns, user);
            let roles = match &declared.roles {
                None => Some(None),
                Some(roles) => problems.column(columns, &roles.column).map(|column| Some((column, roles.r#in.clone()))),
            };
            user.zip(roles).map(|(column, roles)| Members::User { column, roles })
        }
        (None, Some(through), Some(via)) => {
            problems.column(columns, via).map(|column| Members::Through { kind: through.clone(), column })
        }
        // Contradicts itself: the configuration's own problems tell of it.
        _ => None,
    };
    Some(Membership { kind: kind.to_owned(), scope: scope?, of: of? })
}

/// How concurrent changes meet: as declared, else by what columns there are.
fn conflict(
    declared: Option<Conflict>,
    names: &ClockNames,
    columns: &[Column],
    problems: &mut Problems<'_>,
) -> ConflictPolicy {
    let mut find = |name: &str, sql_type: &str| {
        let is_it = |column: &Column| column.name == name && column.sql_type == sql_type && column.domain.is_none();
        let found = columns.iter().position(is_it)?;
        if columns[found].writable {
            problems.add(format!(
                "`{name}` is kept by Millstream: take it out of `writable`, or name another column in `clocks`"
            ));
        }
        Some(found)
    };
    // A column `client_id` may well be the app's own: merging by row has to be asked for.
    let policy = match declared {
        Some(Conflict::Arrival) => Some(ConflictPolicy::Arrival),
        Some(Conflict::Row) => find(&names.updated_at, "timestamp with time zone")
            .zip(find(&names.client_id, "uuid"))
            .map(|(updated_at, client_id)| ConflictPolicy::Row { updated_at, client_id }),
        Some(Conflict::Column) | None => find(&names.field_clocks, "jsonb").map(|clocks| ConflictPolicy::Column {
            clocks,
            updated_at: find(&names.updated_at, "timestamp with time zone"),
            client_id: find(&names.client_id, "uuid"),
        }),
    };
    let needs = match (policy, declared) {
        (None, Some(Conflict::Column)) => {
            format!("conflict = \"column\" needs a column `{} jsonb`", names.field_clocks)
        }
        (None, Some(Conflict::Row)) => format!(
            "conflict = \"row\" needs columns `{} timestamptz` and `{} uuid`",
            names.updated_at, names.client_id
        ),
        (policy, _) => return policy.unwrap_or(ConflictPolicy::Arrival),
    };
    let table = problems.table;
    problems.add(format!("{needs}; `millstream attach {table}` writes the migration that adds them"));
    ConflictPolicy::Arrival
}

/// The synced columns and their attribute numbers. Generated columns are left out: the WAL does not carry them.
async fn columns(
    connection: &mut PgConnection,
    oid: i64,
    declared: &TableConfig,
    problems: &mut Problems<'_>,
) -> Result<(Vec<Column>, Vec<i16>), CatalogError> {
    let rows = sqlx::query(
        "SELECT attname::text AS name, quote_ident(attname) AS sql_name, attnum AS number, atttypid::int8 AS type,
                format_type(below.type, below.typmod) AS sql_type, attgenerated <> '' AS generated,
                CASE WHEN below.depth > 0 THEN format_type(atttypid, atttypmod) END AS domain,
                attnotnull OR below.not_null AS not_null,
                coalesce((SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef WHERE adrelid = attrelid AND adnum = attnum),
                         (SELECT pg_get_expr(typdefaultbin, 0) FROM pg_type WHERE pg_type.oid = atttypid AND typtype = 'd')) AS default
         FROM pg_attribute, LATERAL (
             WITH RECURSIVE levels AS (
                 SELECT atttypid AS type, atttypmod AS typmod, false AS not_null, 0 AS depth
               UNION ALL
                 SELECT typbasetype, typtypmod, not_null OR typnotnull, depth + 1
                 FROM levels JOIN pg_type ON pg_type.oid = levels.type WHERE typtype = 'd'
             )
             SELECT * FROM levels ORDER BY depth DESC LIMIT 1
         ) AS below
         WHERE attrelid = $1::int8::oid AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
    )
    .bind(oid)
    .fetch_all(&mut *connection)
    .await
    .map_err(CatalogError::Query)?;
    let growth = growth::read(connection, oid).await.map_err(CatalogError::Query)?;
    let mut writable: HashMap<&str, bool> = declared.writable.iter().map(|column| (column.as_str(), false)).collect();
    let mut columns = Vec::with_capacity(rows.len());
    let mut numbers = Vec::with_capacity(rows.len());
    for row in &rows {
        let column: String = row.get("name");
        let is_hidden = declared.hidden.contains(&column);
        if is_hidden || row.get("generated") {
            problems.left_out.insert(column, if is_hidden { "hidden" } else { "a generated column" });
            continue;
        }
        let writable = writable.get_mut(column.as_str()).map(|seen| *seen = true).is_some();
        let sql_type: String = row.get("sql_type");
        let default = row.get::<Option<&str>, _>("default").and_then(|default| defaults::constant(default, &sql_type));
        columns.push(Column {
            sql_name: row.get("sql_name"),
            sql_type,
            domain: row.get("domain"),
            type_oid: u32::try_from(row.get::<i64, _>("type")).unwrap_or_default(),
            growth: growth.get(&row.get::<i16, _>("number")).copied().unwrap_or_default(),
            nullable: !row.get::<bool, _>("not_null"),
            writable,
            default,
            merge: declared.merge.get(&column).copied(),
            numeric: declared.numeric.get(&column).copied(),
            name: column,
        });
        numbers.push(row.get("number"));
    }
    for unknown in declared.writable.iter().filter(|column| !writable[column.as_str()]) {
        problems.problems.push(CatalogError::Writable { table: problems.table.to_owned(), column: unknown.clone() });
    }
    // Not passed over: under another name it would be sent to clients.
    let unknown = |column: &&String| !problems.left_out.contains_key(*column);
    for unknown in declared.hidden.iter().filter(unknown).collect::<Vec<_>>() {
        problems.add(format!("`hidden` names `{unknown}`, which is not a column of it"));
    }
    for (old, new) in &declared.renamed {
        if !columns.iter().any(|column| column.name == *new) {
            problems.add(format!("`renamed` says that `{old}` is now `{new}`, which is not a column of it"));
        }
    }
    for old in declared.renamed.keys().chain(&declared.dropped) {
        if columns.iter().any(|column| column.name == *old) {
            problems.add(format!("`{old}` is a column of it, and neither renamed nor dropped"));
        }
    }
    Ok((columns, numbers))
}
