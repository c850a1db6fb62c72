//! What the app added and had to give way: it is dropped or renamed, and kept in `millstream_aside` with the reason and its SQL.

use millstream_client_core::format::is_reserved;
use millstream_client_core::sql::quote;
use millstream_client_core::territory::{self, Kind, SetAside};
use rusqlite::config::DbConfig;
use rusqlite::{OptionalExtension, params};

use crate::error::{During, cause};
use crate::statements::Tables;
use crate::territory::{Object, Offence};
use crate::{Store, StoreError};

/// An attempt that is not to last.
enum Attempt {
    Worked,
    Failed,
}

impl From<StoreError> for Attempt {
    fn from(_: StoreError) -> Attempt {
        Attempt::Failed
    }
}

/// Something that was dropped for a while, and whether it fitted before: a statement that uses it compiled.
pub(crate) struct Parked {
    pub object: Object,
    fitted: bool,
}

impl Store {
    /// What the app added and had to give way.
    ///
    /// # Errors
    /// SQLite failed.
    pub fn set_aside(&self) -> Result<Vec<SetAside>, StoreError> {
        self.connection
            .prepare_cached("SELECT kind, name, tbl, reason, sql, moved_to FROM millstream_aside ORDER BY kind, name")
            .and_then(|mut statement| {
                let row = |row: &rusqlite::Row<'_>| {
                    Ok(SetAside {
                        kind: Kind::of(&row.get::<_, String>(0)?).unwrap_or(Kind::Table),
                        name: row.get(1)?,
                        table: row.get(2)?,
                        reason: row.get(3)?,
                        sql: row.get(4)?,
                        moved_to: row.get(5)?,
                    })
                };
                statement.query_map([], row)?.collect()
            })
            .during("reading what was set aside")
    }

    fn keep(&self, aside: &SetAside) -> Result<(), StoreError> {
        self.connection
            .prepare_cached("INSERT OR REPLACE INTO millstream_aside (kind, name, tbl, reason, sql, moved_to) VALUES (?1, ?2, ?3, ?4, ?5, ?6)")
            .and_then(|mut statement| {
                let SetAside { kind, name, table, reason, sql, moved_to } = aside;
                statement.execute(params![kind.as_str(), name, table, reason, sql, moved_to])
            })
            .map(drop)
            .during("keeping what was set aside")
    }

    fn keep_object(&self, object: &Object, reason: String) -> Result<(), StoreError> {
        let Object { kind, name, table, sql, .. } = object.clone();
        let table = (kind != Kind::View).then_some(table);
        self.keep(&SetAside { kind, name, table, reason, sql: Some(sql), moved_to: None })
    }

    /// Forgets what was set aside under a name. False: nothing was.
    pub(crate) fn forget_aside(&self, kind: Kind, name: &str) -> Result<bool, StoreError> {
        self.connection
            .prepare_cached("DELETE FROM millstream_aside WHERE kind = ?1 AND name = ?2 AND sql IS NOT NULL")
            .and_then(|mut statement| statement.execute([kind.as_str(), name]))
            .map(|forgotten| forgotten > 0)
            .during("forgetting what was set aside")
    }

    /// Forgets what is there again, and what was renamed and is not there any more.
    pub(crate) fn tidy_aside(&self) -> Result<(), StoreError> {
        self.connection
            .prepare_cached(
                "DELETE FROM millstream_aside WHERE \
                 (sql IS NOT NULL AND kind <> 'table' AND EXISTS (SELECT 1 FROM sqlite_schema s WHERE s.type = kind AND s.name = millstream_aside.name COLLATE NOCASE)) \
                 OR (kind = 'foreign_key' AND NOT EXISTS (SELECT 1 FROM pragma_foreign_key_list(millstream_aside.name) f \
                     WHERE f.\"table\" = tbl COLLATE NOCASE)) \
                 OR (moved_to IS NOT NULL AND NOT EXISTS (SELECT 1 FROM sqlite_schema s WHERE s.name = moved_to COLLATE NOCASE) \
                     AND NOT EXISTS (SELECT 1 FROM temp.sqlite_schema s WHERE s.name = moved_to COLLATE NOCASE) \
                     AND NOT EXISTS (SELECT 1 FROM pragma_table_info(tbl) c WHERE c.name = moved_to COLLATE NOCASE))",
            )
            .and_then(|mut statement| statement.execute([]))
            .map(drop)
            .during("forgetting what is there again")
    }

    fn drop_object(&self, object: &Object) -> Result<(), StoreError> {
        let sql = format!("DROP {} IF EXISTS {}", object.kind.as_str(), object.place());
        self.connection.execute_batch(&sql).during("setting aside what the app added")
    }

    /// Sets aside what an older version or another program has made against the rules, if the tables have changed since the last look.
    pub(crate) fn put_in_order(&mut self) -> Result<(), StoreError> {
        let version = || -> Result<i64, StoreError> {
            self.connection
                .prepare_cached("PRAGMA schema_version")
                .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
                .during("reading schema_version")
        };
        if version()? == self.in_order {
            return Ok(());
        }
        if self.offence(&self.tables)?.is_some() {
            self.transact(|store| store.settle(&store.tables))?;
        }
        self.in_order = version()?;
        Ok(())
    }

    /// Sets aside what breaks the rules: see `territory.rs`. Within a transaction.
    pub(crate) fn settle(&self, tables: &Tables) -> Result<(), StoreError> {
        while let Some(offence) = self.offence(tables)? {
            match &offence {
                Offence::Of(object, words) => {
                    self.drop_object(object)?;
                    self.keep_object(object, words.clone())?;
                }
                Offence::Reference(table, parent) => self.keep(&SetAside {
                    kind: Kind::ForeignKey,
                    name: table.clone(),
                    table: Some(parent.clone()),
                    reason: format!("{}. It is not heeded while the server's rows are applied", offence.words()),
                    sql: None,
                    moved_to: None,
                })?,
                Offence::Unknown { .. } => {
                    if !self.settle_unknown(tables)? {
                        return Ok(());
                    }
                }
            }
        }
        Ok(())
    }

    /// Sets the first index or trigger aside without which the store's statements compile, or fail otherwise. False: none.
    fn settle_unknown(&self, tables: &Tables) -> Result<bool, StoreError> {
        let Err(before) = self.probe(tables) else { return Ok(true) };
        // What this process lacks, another one may have.
        const LACKING: [&str; 5] =
            ["no such function", "no such module", "no such collation", "unknown tokenizer", "no such tokenizer"];
        if LACKING.iter().any(|lacking| before.why.contains(lacking)) {
            return Ok(false);
        }
        for object in self.objects()?.iter().filter(|object| object.kind != Kind::View) {
            self.savepoint("SAVEPOINT millstream_probe")?;
            self.drop_object(object)?;
            if self.probe(tables).err().as_ref() != Some(&before) {
                let reason = format!("nothing could be written to \"{}\" with it: {}", before.table, before.why);
                self.keep_object(object, reason)?;
                self.savepoint("RELEASE millstream_probe")?;
                return Ok(true);
            }
            self.savepoint("ROLLBACK TO millstream_probe")?;
            self.savepoint("RELEASE millstream_probe")?;
        }
        Ok(false)
    }

    pub(crate) fn savepoint(&self, sql: &str) -> Result<(), StoreError> {
        self.connection.execute_batch(sql).during("setting a savepoint")
    }

    /// Does what has to be done with the server's rows in a transaction. Where it fails, and would not without something that the app
    /// has added to synced tables, it is done without: that is set aside.
    pub(crate) fn unhindered<T>(&self, work: impl Fn(&Store) -> Result<T, StoreError>) -> Result<T, StoreError> {
        self.without_references(|| {
            let error = match self.transact(&work) {
                Err(error) if error.may_be_of_the_app() => error,
                result => return result,
            };
            let mut guilty: Vec<Object> = self.objects()?;
            guilty.retain(|object| object.kind != Kind::View && self.session.is_synced(&object.table));
            let works = |without: &[Object]| {
                let attempt = self.transact(|store| {
                    without.iter().try_for_each(|object| store.drop_object(object))?;
                    work(store)?;
                    Err::<(), _>(Attempt::Worked)
                });
                matches!(attempt, Err(Attempt::Worked))
            };
            if guilty.is_empty() || !works(&guilty) {
                return Err(error);
            }
            // Those without which it works as well are not to blame.
            for place in (0..guilty.len()).rev() {
                let kept = guilty.remove(place);
                if !works(&guilty) {
                    guilty.insert(place, kept);
                }
            }
            let reason = format!("rows of the server could not be applied with it: {}", crate::error::chain(&error));
            self.transact(|store| {
                for object in &guilty {
                    store.drop_object(object)?;
                    store.keep_object(object, reason.clone())?;
                }
                work(store)
            })
        })
    }

    /// Runs `work` with foreign keys off, where a table of the app's has one to a synced table.
    fn without_references<T>(&self, work: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        let known: bool = self
            .connection
            .prepare_cached("SELECT EXISTS (SELECT 1 FROM millstream_aside WHERE kind = 'foreign_key')")
            .and_then(|mut statement| statement.query_row([], |row| row.get(0)))
            .during("looking for foreign keys")?;
        if known { self.without_foreign_keys(work) } else { work() }
    }

    /// Runs `work` with foreign keys off. Not within a transaction.
    pub(crate) fn without_foreign_keys<T>(
        &self,
        work: impl FnOnce() -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let set = |on: bool| self.connection.pragma_update(None, "foreign_keys", on).during("setting foreign_keys");
        set(false)?;
        let result = work();
        set(true)?;
        result
    }

    /// Drops the app's views and triggers, and its indexes on these tables: none of them is in the way of what follows.
    pub(crate) fn park(&self, changes: impl Fn(&str) -> bool) -> Result<Vec<Parked>, StoreError> {
        let objects = self.objects()?;
        let parked: Vec<Parked> = self.strictly(|| {
            let parked = |object: Object| Parked { fitted: self.compile(&object).is_ok(), object };
            objects
                .into_iter()
                .filter(|object| object.kind != Kind::Index || changes(&object.table))
                .map(parked)
                .collect()
        })?;
        for kind in [Kind::Trigger, Kind::View, Kind::Index] {
            for Parked { object, .. } in parked.iter().filter(|parked| parked.object.kind == kind) {
                self.drop_object(object)?;
            }
        }
        Ok(parked)
    }

    /// Makes what was dropped again, and what was set aside earlier, where it fits; the rest is set aside.
    pub(crate) fn restore(&self, parked: Vec<Parked>, tables: &Tables) -> Result<(), StoreError> {
        let mut all = parked;
        for SetAside { kind, name, table, sql, .. } in self.set_aside()? {
            if let Some(sql) = sql {
                let temporary = sql.starts_with("CREATE TEMP");
                let object = Object { kind, table: table.unwrap_or_else(|| name.clone()), name, sql, temporary };
                all.push(Parked { object, fitted: true });
            }
        }
        let of = |kind: Kind| all.iter().filter(move |parked| parked.object.kind == kind);
        for Parked { object, .. } in of(Kind::Index) {
            self.remake(object)?;
        }
        let mut views = Vec::new();
        for parked in of(Kind::View) {
            if self.remake(&parked.object)? {
                views.push(parked);
            }
        }
        // A view of a view that does not fit does not fit.
        loop {
            let before = views.len();
            let mut fitting = Vec::new();
            for view in views {
                match self.strictly(|| self.misfit(view))? {
                    None => fitting.push(view),
                    Some(why) => self.give_up(&view.object, why)?,
                }
            }
            views = fitting;
            if views.len() == before {
                break;
            }
        }
        let before = self.probe(tables).err();
        for parked in of(Kind::Trigger) {
            if !self.remake(&parked.object)? {
                continue;
            }
            let misfit = match self.session.is_synced(&parked.object.table) {
                // SQLite takes columns that are not there for columns that nobody updates.
                true => {
                    let columns = self.columns_of(&parked.object.table)?;
                    let is_gone = |name: &String| !columns.iter().any(|column| column.eq_ignore_ascii_case(name));
                    let gone = territory::update_of(&parked.object.sql).into_iter().find(is_gone);
                    gone.map(|name| format!("no such column: {name}"))
                }
                false => self.strictly(|| self.misfit(parked))?,
            };
            if let Some(why) = misfit.or_else(|| {
                self.probe(tables).err().filter(|now| before.as_ref() != Some(now)).map(|misfit| misfit.why)
            }) {
                self.give_up(&parked.object, why)?;
            }
        }
        self.tidy_aside()
    }

    /// Sets aside what was dropped.
    pub(crate) fn lose(&self, parked: Vec<Parked>, reason: &str) -> Result<(), StoreError> {
        parked.iter().try_for_each(|parked| self.keep_object(&parked.object, reason.to_owned()))
    }

    /// Makes something again. False: it was set aside.
    fn remake(&self, object: &Object) -> Result<bool, StoreError> {
        let made = self.strictly(|| self.connection.execute_batch(&object.sql))?;
        match made {
            Ok(()) => self.forget_aside(object.kind, &object.name).map(|_| true),
            Err(error) => self
                .keep_object(object, format!("it does not fit the tables any more: {}", cause(&error)))
                .map(|()| false),
        }
    }

    fn give_up(&self, object: &Object, why: String) -> Result<(), StoreError> {
        self.drop_object(object)?;
        self.keep_object(object, format!("it does not fit the tables any more: {why}"))
    }

    /// Runs `work` while SQLite takes no name that is not there for a text.
    fn strictly<T>(&self, work: impl FnOnce() -> T) -> Result<T, StoreError> {
        let set = |lenient: bool| {
            [DbConfig::SQLITE_DBCONFIG_DQS_DDL, DbConfig::SQLITE_DBCONFIG_DQS_DML]
                .into_iter()
                .try_for_each(|config| self.connection.set_db_config(config, lenient).map(drop))
                .during("setting what quotes mean")
        };
        set(false)?;
        let result = work();
        set(true)?;
        Ok(result)
    }

    /// Why something does not fit that did; what never did is left as it is.
    fn misfit(&self, Parked { object, fitted }: &Parked) -> Option<String> {
        let compiled = if *fitted { self.compile(object) } else { Ok(()) };
        compiled.err().map(|error| cause(&error))
    }

    /// Compiles a statement that uses a view or a trigger of the app's, as the app would.
    fn compile(&self, object: &Object) -> rusqlite::Result<()> {
        let table = quote(&object.table);
        let sql = match (object.kind, territory::event(&object.sql)) {
            (Kind::View, _) => format!("SELECT * FROM {}", object.place()),
            (Kind::Trigger, Some("insert")) => format!("INSERT INTO {table} DEFAULT VALUES"),
            (Kind::Trigger, Some("delete")) => format!("DELETE FROM {table}"),
            (Kind::Trigger, Some(_)) => {
                let columns = self.columns_of(&object.table).unwrap_or_default();
                let set: Vec<String> = columns.iter().map(|name| format!("{0} = {0}", quote(name))).collect();
                format!("UPDATE {table} SET {}", set.join(", "))
            }
            _ => return Ok(()),
        };
        let compiled = self.session.as_app(|| self.connection.prepare(&sql).map(drop));
        self.session.take_refused();
        compiled
    }

    /// The columns that a table has, hidden ones included.
    pub(crate) fn columns_of(&self, table: &str) -> Result<Vec<String>, StoreError> {
        self.connection
            .prepare_cached("SELECT name FROM pragma_table_xinfo(?1)")
            .and_then(|mut statement| statement.query_map([table], |row| row.get(0))?.collect())
            .during("reading the columns of a table")
    }

    /// Gives tables and indexes of the app's other names than this one, which a synced table is about to have. `is_own`: tables of
    /// the store; `taken`: names that nothing may get; `last`: what cannot be renamed is dropped.
    pub(crate) fn make_room(
        &self,
        name: &str,
        last: bool,
        is_own: impl Fn(&str) -> bool,
        taken: impl Fn(&str) -> bool,
    ) -> Result<(), StoreError> {
        let during = "looking for a table";
        let found: Vec<(String, String, String, Option<String>, bool)> = self
            .connection
            .prepare_cached(
                "SELECT type, name, tbl_name, sql, 0 FROM main.sqlite_schema WHERE name = ?1 COLLATE NOCASE AND type <> 'trigger' \
                 UNION ALL SELECT type, name, tbl_name, sql, 1 FROM temp.sqlite_schema WHERE name = ?1 COLLATE NOCASE AND type <> 'trigger'",
            )
            .and_then(|mut statement| {
                let row = |row: &rusqlite::Row<'_>| {
                    Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get(4)?))
                };
                statement.query_map([name], row)?.collect()
            })
            .during(during)?;
        for (kind, found, table, sql, temporary) in found {
            let sql = sql.unwrap_or_default();
            if kind == "table" {
                if !temporary && is_own(&found) {
                    continue;
                }
                self.move_table(&found, if last { &sql } else { "" }, temporary, &taken)?;
                continue;
            }
            let kind = Kind::of(&kind).unwrap_or(Kind::View);
            let sql = if temporary { territory::temporary(&sql) } else { sql };
            let object = Object { kind, name: found, table, sql, temporary };
            self.drop_object(&object)?;
            self.keep_object(&object, format!("the server has a table \"{name}\" now"))?;
        }
        Ok(())
    }

    /// Another process installed a schema: temporary tables of this one must not stand before its tables.
    pub(crate) fn clear_temporary(&self) -> Result<(), StoreError> {
        self.transact(|store| {
            let mut names: Vec<&String> = store.tables.keys().collect();
            names.sort();
            names.into_iter().try_for_each(|name| store.make_room(name, true, |_| true, |_| false))
        })
    }

    /// `sql`: if it makes a virtual table, that may be dropped where it cannot be renamed.
    fn move_table(
        &self,
        name: &str,
        sql: &str,
        temporary: bool,
        taken: &impl Fn(&str) -> bool,
    ) -> Result<(), StoreError> {
        // A shadow table goes by the name of its virtual table.
        let owner: Option<String> = self
            .connection
            .prepare_cached(
                "SELECT v.name FROM sqlite_schema v JOIN pragma_table_list s ON s.schema = 'main' AND s.name = ?1 AND s.type = 'shadow' \
                 WHERE v.type = 'table' AND v.rootpage = 0 AND substr(?1, 1, length(v.name) + 1) = (v.name || '_') COLLATE NOCASE \
                 ORDER BY length(v.name) DESC",
            )
            .and_then(|mut statement| statement.query_row([name], |row| row.get(0)).optional())
            .during("looking for a virtual table")?;
        let moved = owner.as_deref().unwrap_or(name);
        let new = self.free_name(moved, taken)?;
        let place = format!("{}.{}", if temporary { "temp" } else { "main" }, quote(moved));
        let renamed = self.connection.execute_batch(&format!("ALTER TABLE {place} RENAME TO {}", quote(&new)));
        let mut aside = SetAside {
            kind: Kind::Table,
            name: moved.to_owned(),
            table: None,
            reason: format!("the server has a table \"{name}\" now; this one is \"{new}\" now, with all its rows"),
            sql: None,
            moved_to: Some(new),
        };
        if let Err(error) = renamed {
            let is_virtual = sql.get(..14).is_some_and(|start| start.eq_ignore_ascii_case("CREATE VIRTUAL"));
            if !is_virtual || owner.is_some() {
                return Err(error).during("renaming a table of the app's");
            }
            self.connection.execute_batch(&format!("DROP TABLE {place}")).during("dropping a virtual table")?;
            let why = cause(&error);
            let reason = format!("the server has a table \"{name}\" now; the virtual table cannot be renamed: {why}");
            aside = SetAside { reason, sql: Some(sql.to_owned()), moved_to: None, ..aside };
        }
        self.keep(&aside)
    }

    /// A name like this one that is free.
    fn free_name(&self, name: &str, taken: impl Fn(&str) -> bool) -> Result<String, StoreError> {
        for n in 1_u32.. {
            let new = format!("{name}_of_the_app{}", if n == 1 { String::new() } else { format!("_{n}") });
            let exists: bool = self
                .connection
                .prepare_cached(
                    "SELECT EXISTS (SELECT 1 FROM main.sqlite_schema WHERE name = ?1 COLLATE NOCASE) \
                     OR EXISTS (SELECT 1 FROM temp.sqlite_schema WHERE name = ?1 COLLATE NOCASE)",
                )
                .and_then(|mut statement| statement.query_row([&new], |row| row.get(0)))
                .during("looking for a free name")?;
            if !exists && !taken(&new) && !is_reserved(&new) {
                return Ok(new);
            }
        }
        Err(StoreError::Schema(format!("there is no free name like \"{name}\"")))
    }

    /// Gives a column of the app's on a synced table another name than this one, which the server's column is about to have.
    pub(crate) fn move_column(&self, table: &str, column: &str, taken: &[String]) -> Result<(), StoreError> {
        let is_taken = |new: &str| taken.iter().any(|name| name.eq_ignore_ascii_case(new));
        let new = (1_u32..)
            .map(|n| format!("{column}_of_the_app{}", if n == 1 { String::new() } else { format!("_{n}") }))
            .find(|new| !is_taken(new))
            .unwrap_or_default();
        let sql = format!("ALTER TABLE {} RENAME COLUMN {} TO {}", quote(table), quote(column), quote(&new));
        self.connection.execute_batch(&sql).during("renaming a column of the app's")?;
        self.keep(&SetAside {
            kind: Kind::Column,
            name: column.to_owned(),
            table: Some(table.to_owned()),
            reason: format!(
                "the server's table has a column of this name now; this one is \"{new}\" now, with all its values"
            ),
            sql: None,
            moved_to: Some(new),
        })
    }

    /// Columns of the app's go with a synced table that has to be made from the start: their values are kept in a table of their own.
    pub(crate) fn move_columns(
        &self,
        table: &str,
        key: &[String],
        columns: &[String],
        taken: impl Fn(&str) -> bool,
    ) -> Result<(), StoreError> {
        if columns.is_empty() {
            return Ok(());
        }
        let new = self.free_name(table, taken)?;
        let names: Vec<String> = key.iter().chain(columns).map(|name| quote(name)).collect();
        let sql = format!("CREATE TABLE {} AS SELECT {} FROM {}", quote(&new), names.join(", "), quote(table));
        self.connection.execute_batch(&sql).during("keeping columns of the app's")?;
        columns.iter().try_for_each(|column| {
            self.keep(&SetAside {
                kind: Kind::Column,
                name: column.clone(),
                table: Some(table.to_owned()),
                reason: format!("the server's table had to be made from the start; its values are in \"{new}\" now"),
                sql: None,
                moved_to: Some(new.clone()),
            })
        })
    }
}
