//! The rules for what an app adds to its database, so that nothing of it meets the server's rows.
//!
//! One rule book for two occasions: what breaks a rule is refused when it is made, and set aside (`aside.rs`) where it is there
//! already, made by an older version or by another program. The rules:
//!
//! - An index on a synced table is not `UNIQUE`: rows arrive in an order of their own, and would meet it one by one.
//! - A trigger on a synced table does not `RAISE`: `ABORT` would refuse a row of the server, `IGNORE` would leave it out.
//! - What rows of a synced table set off, through triggers of any depth, writes neither synced tables nor the store's. SQLite says
//!   what that is: the store's own statements are compiled, and the authorizer (`functions.rs`) refuses such writes.
//! - A table of the app's has no foreign key to a synced table.
//! - The store's own statements compile.
//!
//! What fails only with some row, such as an index over `json_extract`, is found when that row comes: see [`Store::unhindered`].

use millstream_client_core::format::is_reserved;
use millstream_client_core::sql::quote;
use millstream_client_core::territory::{self, Kind};
use rusqlite::OptionalExtension;

use crate::error::{During, cause};
use crate::statements::Tables;
use crate::{Store, StoreError};

/// An index, a view or a trigger of the app's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    pub kind: Kind,
    pub name: String,
    /// The table that it is on; of a view its own name.
    pub table: String,
    /// The SQL that makes it.
    pub sql: String,
    /// It is in the connection's temporary database.
    pub temporary: bool,
}

impl Object {
    /// Its name in SQL.
    pub fn place(&self) -> String {
        format!("{}.{}", if self.temporary { "temp" } else { "main" }, quote(&self.name))
    }

    fn words(&self) -> String {
        match self.kind {
            Kind::View => format!("the view \"{}\"", self.name),
            kind => format!("the {} \"{}\" on \"{}\"", kind.as_str(), self.name, self.table),
        }
    }
}

/// What breaks a rule.
pub(crate) enum Offence {
    /// This index or trigger, and why.
    Of(Object, String),
    /// The foreign key of the first table to the second.
    Reference(String, String),
    /// Something: the store's own statements do not compile.
    Unknown { table: String, why: String },
}

impl Offence {
    /// For people: what it is, why it is not allowed, and what to do.
    pub fn words(&self) -> String {
        match self {
            Offence::Of(_, words) => words.clone(),
            Offence::Reference(table, parent) => format!(
                "\"{table}\" has a foreign key to \"{parent}\", which is synced: the server deletes its rows, and puts them in, as it \
                 sees fit. Delete your rows by a trigger: CREATE TRIGGER … AFTER DELETE ON {} BEGIN DELETE FROM {} WHERE …; END",
                quote(parent),
                quote(table)
            ),
            Offence::Unknown { table, why } => {
                format!(
                    "nothing could be written to \"{table}\" with this, which is synced: {why}. Drop first what needs it"
                )
            }
        }
    }
}

impl Store {
    /// The app's indexes on synced tables, views and triggers, in the order in which they were made.
    pub(crate) fn objects(&self) -> Result<Vec<Object>, StoreError> {
        let during = "reading what the app added";
        let mut statement = self
            .connection
            .prepare_cached(
                "SELECT type, name, tbl_name, sql, 0 FROM main.sqlite_schema WHERE type IN ('index', 'view', 'trigger') AND sql IS NOT NULL \
                 UNION ALL SELECT type, name, tbl_name, sql, 1 FROM temp.sqlite_schema WHERE type IN ('view', 'trigger') AND sql IS NOT NULL",
            )
            .during(during)?;
        let object = |row: &rusqlite::Row<'_>| {
            let kind = Kind::of(&row.get::<_, String>(0)?).unwrap_or(Kind::Trigger);
            let (sql, temporary) = (row.get::<_, String>(3)?, row.get(4)?);
            let sql = if temporary { territory::temporary(&sql) } else { sql };
            Ok(Object { kind, name: row.get(1)?, table: row.get(2)?, sql, temporary })
        };
        let found: Vec<Object> =
            statement.query_map([], object).during(during)?.collect::<rusqlite::Result<_>>().during(during)?;
        let is_own = |object: &Object| is_reserved(&object.name) || is_reserved(&object.table);
        let concerns = |object: &Object| object.kind != Kind::Index || self.session.is_synced(&object.table);
        Ok(found.into_iter().filter(|object| !is_own(object) && concerns(object)).collect())
    }

    /// What breaks a rule, if anything does.
    pub(crate) fn offence(&self, tables: &Tables) -> Result<Option<Offence>, StoreError> {
        if tables.is_empty() {
            return Ok(None);
        }
        let objects = self.objects()?;
        for object in objects.iter().filter(|object| self.session.is_synced(&object.table)) {
            let why = match object.kind {
                Kind::Index if self.is_unique(object)? => {
                    "is UNIQUE, and the table is synced: rows of the server come in an order of their own, and would meet it one by one. \
                     Make a plain index; what is unique is for Postgres to say"
                }
                Kind::Trigger if territory::raises(&object.sql) => {
                    "uses RAISE, and the table is synced: rows of the server would be refused by it, or left out. Check what the app \
                     writes in the app, or by a constraint or a rule on the server"
                }
                _ => continue,
            };
            return Ok(Some(Offence::Of(object.clone(), format!("{} {why}", object.words()))));
        }
        if let Some((table, parent)) = self.reference()? {
            return Ok(Some(Offence::Reference(table, parent)));
        }
        if objects.iter().all(|object| object.kind == Kind::View) {
            return Ok(None);
        }
        let Err(Misfit { trespass, table, why }) = self.probe(tables) else { return Ok(None) };
        let culprit = trespass.and_then(|(name, written)| {
            let of_name = |object: &&Object| object.kind == Kind::Trigger && object.name == name;
            objects.iter().find(of_name).map(|object| (object.clone(), written))
        });
        let Some((object, written)) = culprit else { return Ok(Some(Offence::Unknown { table, why })) };
        let set_off = match self.session.is_synced(&object.table) {
            true => String::new(),
            false => format!(", which is set off by what is written to \"{table}\","),
        };
        let words = match self.session.is_synced(&written) {
            true => format!(
                "{}{set_off} writes \"{written}\", which is synced: it fires for rows that come from the server, too, and what it \
                 writes for those would be on this device only. A trigger may write the app's own tables; write \"{written}\" in the \
                 app's transaction, or by a trigger in Postgres",
                object.words()
            ),
            false => format!("{}{set_off} writes \"{written}\", which is the store's own", object.words()),
        };
        Ok(Some(Offence::Of(object, words)))
    }

    fn is_unique(&self, index: &Object) -> Result<bool, StoreError> {
        self.connection
            .prepare_cached("SELECT \"unique\" FROM pragma_index_list(?1) WHERE name = ?2")
            .and_then(|mut statement| statement.query_row([&index.table, &index.name], |row| row.get(0)).optional())
            .map(|unique| unique.unwrap_or(false))
            .during("reading an index")
    }

    /// A table of the app's with a foreign key to a synced one, which is not known.
    fn reference(&self) -> Result<Option<(String, String)>, StoreError> {
        let during = "reading foreign keys";
        let mut statement = self
            .connection
            .prepare_cached(
                "SELECT t.name, f.\"table\" FROM sqlite_schema t, pragma_foreign_key_list(t.name) f WHERE t.type = 'table' AND \
                 t.sql LIKE '%REFERENCES%' AND NOT EXISTS (SELECT 1 FROM millstream_aside WHERE kind = 'foreign_key' AND name = t.name)",
            )
            .during(during)?;
        let mut rows = statement.query([]).during(during)?;
        while let Some(row) = rows.next().during(during)? {
            let (table, parent): (String, String) = (row.get(0).during(during)?, row.get(1).during(during)?);
            if self.session.is_synced(&parent) && !self.session.is_synced(&table) {
                return Ok(Some((table, parent)));
            }
        }
        Ok(None)
    }

    /// Compiles what the store executes on synced tables, and with it all that this sets off.
    pub(crate) fn probe(&self, tables: &Tables) -> Result<(), Misfit> {
        let mut names: Vec<&String> = tables.keys().collect();
        names.sort();
        for name in names {
            let table = &tables[name];
            self.session.take_trespass();
            // The store updates no key; but this compiles every trigger on updates.
            let key = &table.table.columns[table.table.key.first().copied().unwrap_or(0)].name;
            let update = format!("UPDATE {} SET {1} = {1}", quote(name), quote(key));
            for sql in [&table.upsert, &table.delete, &update] {
                if let Err(error) = self.connection.prepare(sql) {
                    self.session.take_refused();
                    let why = cause(&error);
                    return Err(Misfit { trespass: self.session.take_trespass(), table: name.clone(), why });
                }
            }
        }
        Ok(())
    }

    /// The app changed the tables: holds it to the rules.
    pub(crate) fn require_order(&self) -> Result<(), StoreError> {
        self.session.as_store(|| {
            if let Some(offence) = self.offence(&self.tables)? {
                return Err(StoreError::NotAllowed(offence.words()));
            }
            self.tidy_aside()
        })
    }
}

/// The store's own statement on a table does not compile.
#[derive(PartialEq, Eq)]
pub(crate) struct Misfit {
    /// The trigger of the app's that writes what it may not, and the table that it writes.
    pub trespass: Option<(String, String)>,
    pub table: String,
    pub why: String,
}
