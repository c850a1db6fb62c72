//! SQL functions of the store's connections, and the guard over what the app's statements may do.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use millstream_client_core::format::is_reserved;
use millstream_client_core::types::Kind;
use millstream_schemas::Clocks;
use millstream_schemas::spelling::{Spelling, double, respelt, spelling};
use rusqlite::Connection;
use rusqlite::functions::FunctionFlags;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use rusqlite::types::ValueRef;
use uuid::Uuid;

use crate::error::{During, StoreError};
use crate::value::bound;

/// What the store asks of its surroundings.
pub trait Host: Send + Sync {
    /// Microseconds since 1970.
    fn now_micros(&self) -> u64;
    /// A new UUIDv7.
    fn uuid(&self) -> Uuid;
}

/// State of the connection that SQL functions see.
pub(crate) struct ConnectionState {
    host: Arc<dyn Host>,
    /// The app's transaction; 0 outside of one and while the store writes for itself.
    tx: AtomicI64,
    /// The `client_seq` that it gets, unless it is held back.
    client_seq: AtomicI64,
    /// This run of the store; see [`millstream_schemas::frame::Submit::run_id`].
    run_id: Mutex<Option<Uuid>>,
    /// The app's statements are being prepared: the guard is up.
    guarded: AtomicBool,
    /// A statement of the app's met damage.
    damaged: AtomicBool,
    /// Last stamp given out or seen: the hybrid logical clock, in microseconds.
    stamp: AtomicU64,
    traceparent: Mutex<Option<String>>,
    /// Names of synced tables, in small letters.
    synced: Mutex<BTreeSet<String>>,
    /// Why the guard refused the last statement that it refused.
    refused: Mutex<Option<String>>,
    /// Tables that statements write which were compiled since the last look.
    compiled: Mutex<BTreeSet<String>>,
    /// Tables that triggers of the app's have been compiled to write while the store wrote for itself.
    fired: Mutex<BTreeSet<String>>,
    /// The last trigger of the app's that was refused to write a table, and the table.
    trespass: Mutex<Option<(String, String)>>,
    /// The app made, changed or dropped a table, or something on one, or had the connection itself.
    defined: AtomicBool,
}

impl ConnectionState {
    pub fn new(host: Arc<dyn Host>) -> Self {
        ConnectionState {
            host,
            tx: AtomicI64::new(0),
            client_seq: AtomicI64::new(0),
            run_id: Mutex::new(None),
            guarded: AtomicBool::new(false),
            damaged: AtomicBool::new(false),
            stamp: AtomicU64::new(0),
            traceparent: Mutex::new(None),
            synced: Mutex::default(),
            refused: Mutex::default(),
            compiled: Mutex::default(),
            fired: Mutex::default(),
            trespass: Mutex::default(),
            defined: AtomicBool::new(false),
        }
    }

    /// These tables are synced.
    pub fn set_synced<'a>(&self, tables: impl Iterator<Item = &'a str>) {
        *self.synced.lock().unwrap_or_else(PoisonError::into_inner) = tables.map(str::to_ascii_lowercase).collect();
    }

    pub fn is_synced(&self, table: &str) -> bool {
        self.synced.lock().unwrap_or_else(PoisonError::into_inner).contains(&table.to_ascii_lowercase())
    }

    /// Why the guard refused a statement, told once.
    pub fn take_refused(&self) -> Option<String> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Tables that statements write which were compiled since the last call.
    pub fn take_compiled(&self) -> BTreeSet<String> {
        std::mem::take(&mut *self.compiled.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Tables that triggers of the app's can write while the store writes for itself.
    pub fn fired(&self) -> BTreeSet<String> {
        self.fired.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The last trigger of the app's that was refused to write a table, and the table; told once.
    pub fn take_trespass(&self) -> Option<(String, String)> {
        self.trespass.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Runs `work`, whose statements are the store's own, within a transaction of the app's or outside of one.
    pub fn as_store<T>(&self, work: impl FnOnce() -> T) -> T {
        self.guarding(false, work)
    }

    /// Runs `work`, which only compiles statements as the app would.
    pub fn as_app<T>(&self, work: impl FnOnce() -> T) -> T {
        self.guarding(true, work)
    }

    fn guarding<T>(&self, guarded: bool, work: impl FnOnce() -> T) -> T {
        let guarded = self.guarded.swap(guarded, Ordering::Relaxed);
        let result = work();
        self.guarded.store(guarded, Ordering::Relaxed);
        result
    }

    /// The app may have changed the tables.
    pub fn note_defined(&self) {
        self.defined.store(true, Ordering::Relaxed);
    }

    /// Whether the app may have changed the tables since the last call.
    pub fn take_defined(&self) -> bool {
        self.defined.swap(false, Ordering::Relaxed)
    }

    /// Notes what a statement does that is being compiled.
    fn note(&self, context: &AuthContext<'_>) {
        let guarded = self.guarded.load(Ordering::Relaxed);
        match context.action {
            AuthAction::Insert { table_name }
            | AuthAction::Delete { table_name }
            | AuthAction::Update { table_name, .. } => {
                let add = |to: &Mutex<BTreeSet<String>>| {
                    to.lock().unwrap_or_else(PoisonError::into_inner).insert(table_name.to_owned());
                };
                add(&self.compiled);
                if !guarded && context.accessor.is_some_and(|name| !name.starts_with("millstream_")) {
                    add(&self.fired);
                }
                if guarded && matches!(table_name, "sqlite_master" | "sqlite_temp_master") {
                    self.note_defined();
                }
            }
            AuthAction::AlterTable { .. } if guarded => self.note_defined(),
            _ => {}
        }
    }

    /// The app's statements follow, as transaction `tx` with the number `client_seq`.
    pub fn begin(&self, tx: u64, client_seq: u64, traceparent: Option<&str>) {
        *self.traceparent.lock().unwrap_or_else(PoisonError::into_inner) = traceparent.map(str::to_owned);
        self.tx.store(tx as i64, Ordering::Relaxed);
        self.client_seq.store(client_seq as i64, Ordering::Relaxed);
        self.guarded.store(true, Ordering::Relaxed);
    }

    /// The store's own statements follow.
    pub fn end(&self) {
        self.tx.store(0, Ordering::Relaxed);
        self.guarded.store(false, Ordering::Relaxed);
    }

    pub fn note_damage(&self) {
        self.damaged.store(true, Ordering::Relaxed);
    }

    pub fn has_met_damage(&self) -> bool {
        self.damaged.load(Ordering::Relaxed)
    }

    pub fn host(&self) -> &dyn Host {
        &*self.host
    }

    /// Wall-clock time, in microseconds.
    pub fn now(&self) -> u64 {
        self.host.now_micros()
    }

    pub fn uuid(&self) -> Uuid {
        self.host.uuid()
    }

    /// This run of the store: made when it first numbers a transaction, so that a copy of the file that another process
    /// opens never numbers under the same.
    pub fn run_id(&self) -> Uuid {
        let mut run_id = self.run_id.lock().unwrap_or_else(PoisonError::into_inner);
        *run_id.get_or_insert_with(|| self.host.uuid())
    }

    /// Numbers that are given from now on are of another run: some of those given before mean something else now.
    pub fn renew_run(&self) {
        *self.run_id.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Next stamp: the time, or one more than the last stamp where the clock stands or was set back.
    pub fn next_stamp(&self) -> u64 {
        let next = self.now().max(self.stamp.load(Ordering::Relaxed) + 1);
        self.stamp.store(next, Ordering::Relaxed);
        next
    }

    /// A stamp was seen: later ones come after it.
    pub fn observe(&self, stamp: u64) {
        self.stamp.fetch_max(stamp, Ordering::Relaxed);
    }

    pub fn stamp(&self) -> u64 {
        self.stamp.load(Ordering::Relaxed)
    }
}

/// Registers the functions; `writer` adds those that triggers call.
pub(crate) fn register(
    connection: &Connection,
    session: &Arc<ConnectionState>,
    writer: bool,
) -> Result<(), StoreError> {
    let flags = FunctionFlags::SQLITE_UTF8 | FunctionFlags::SQLITE_INNOCUOUS;
    let operation = "registering SQL functions";
    let s = Arc::clone(session);
    connection
        .create_scalar_function("millstream_uuid", 0, flags, move |_| Ok(s.uuid().to_string()))
        .during(operation)?;
    if !writer {
        return Ok(());
    }
    let s = Arc::clone(session);
    connection
        .create_scalar_function("millstream_tx", 0, flags, move |_| {
            let tx = s.tx.load(Ordering::Relaxed);
            Ok((tx != 0).then_some(tx))
        })
        .during(operation)?;
    let s = Arc::clone(session);
    connection
        .create_scalar_function("millstream_seq", 0, flags, move |_| Ok(s.client_seq.load(Ordering::Relaxed)))
        .during(operation)?;
    let s = Arc::clone(session);
    connection
        .create_scalar_function("millstream_instance", 0, flags, move |_| Ok(s.run_id().to_string()))
        .during(operation)?;
    let s = Arc::clone(session);
    connection.create_scalar_function("millstream_now", 0, flags, move |_| Ok(s.now() as i64)).during(operation)?;
    let s = Arc::clone(session);
    connection
        .create_scalar_function("millstream_stamp", 1, flags, move |context| {
            if let Some(clocks) = context.get::<Option<String>>(0)? {
                s.observe(Clocks::parse(&clocks).newest().stamp);
            }
            Ok(s.next_stamp() as i64)
        })
        .during(operation)?;
    connection
        .create_scalar_function("millstream_spelt", 3, flags, |context| {
            let (name, sql_type) = (context.get::<String>(0)?, context.get::<String>(1)?);
            let Some(text) = context.get::<Option<String>>(2)? else { return Ok(None::<i64>) };
            let message = match spelling(&sql_type, &text) {
                Spelling::Known(known) if known == text => return Ok(None),
                Spelling::Any => return Ok(None),
                Spelling::Known(known) => {
                    format!("the server would name this row differently: {name} is '{known}' there, not '{text}'; write it like that")
                }
                Spelling::Other(form) => format!("'{text}' is not how {name} is written, as a {sql_type}: write it like '{form}'"),
            };
            Err(rusqlite::Error::UserFunctionError(format!("millstream: {message}").into()))
        })
        .during(operation)?;
    connection
        .create_scalar_function("millstream_spelling", 2, flags | FunctionFlags::SQLITE_DETERMINISTIC, |context| {
            Ok(match (context.get_raw(0).as_str(), context.get_raw(1).as_str()) {
                (Ok(sql_type), Ok(text)) => {
                    Some(respelt(sql_type, text)).filter(|spelt| spelt != text).map(Cow::into_owned)
                }
                // Null, a blob, or no UTF-8.
                _ => None,
            })
        })
        .during(operation)?;
    connection
        .create_scalar_function("millstream_real", 2, flags | FunctionFlags::SQLITE_DETERMINISTIC, |context| {
            let Ok(sql_type) = context.get_raw(0).as_str() else { return Ok(None) };
            let given = context.get_raw(1);
            let text = match given {
                ValueRef::Real(number) => Cow::Owned(double(number)),
                _ => match given.as_str() {
                    Ok(text) => Cow::Borrowed(text),
                    Err(_) => return Ok(None),
                },
            };
            let spelt = bound(Kind::Real, &respelt(sql_type, &text))?;
            Ok(Some(spelt).filter(|spelt| ValueRef::from(spelt) != given))
        })
        .during(operation)?;
    connection
        .create_scalar_function("millstream_double", 1, flags | FunctionFlags::SQLITE_DETERMINISTIC, |context| {
            Ok(context.get::<Option<f64>>(0)?.map(double))
        })
        .during(operation)?;
    let s = Arc::clone(session);
    connection
        .create_scalar_function("millstream_traceparent", 0, flags, move |_| {
            Ok(s.traceparent.lock().unwrap_or_else(PoisonError::into_inner).clone())
        })
        .during(operation)
}

/// PRAGMAs that only tell something, with an argument or without.
const TELL: [&str; 17] = [
    "collation_list",
    "compile_options",
    "database_list",
    "foreign_key_check",
    "foreign_key_list",
    "function_list",
    "index_info",
    "index_list",
    "index_xinfo",
    "integrity_check",
    "module_list",
    // ANALYZE, where it is due.
    "optimize",
    "pragma_list",
    "quick_check",
    "table_info",
    "table_list",
    "table_xinfo",
];
/// PRAGMAs that tell a setting or a count; with an argument they would change it.
const SETTINGS: [&str; 32] = [
    "application_id",
    "auto_vacuum",
    "automatic_index",
    "busy_timeout",
    "cache_size",
    "cell_size_check",
    "data_version",
    "defer_foreign_keys",
    "encoding",
    "foreign_keys",
    "freelist_count",
    "fullfsync",
    "ignore_check_constraints",
    "journal_mode",
    "journal_size_limit",
    "legacy_alter_table",
    "locking_mode",
    "max_page_count",
    "mmap_size",
    "page_count",
    "page_size",
    "query_only",
    "read_uncommitted",
    "recursive_triggers",
    "schema_version",
    "secure_delete",
    "synchronous",
    "temp_store",
    "threads",
    "trusted_schema",
    "user_version",
    "writable_schema",
];
/// PRAGMAs that the app may set: SQLite keeps these numbers for it and makes nothing of them, and the last ends with the transaction.
const OF_THE_APP: [&str; 3] = ["application_id", "user_version", "defer_foreign_keys"];

/// Why a statement of the app's may not do something; none: it may. Transactions, the store's own tables and triggers, the columns
/// of synced tables, and every PRAGMA that could change what is recorded, or how durably, are the store's.
fn refusal(context: AuthContext<'_>, is_synced: impl Fn(&str) -> bool) -> Option<String> {
    let own = |name: &str| {
        let is_own = is_reserved(name) && !name.to_ascii_lowercase().starts_with("sqlite_");
        is_own.then(|| {
            format!("\"{name}\" is the store's own: it can be read, and the queue has methods for everything else")
        })
    };
    let synced =
        |name: &str| is_synced(name).then(|| format!("\"{name}\" is synced: the server's schema makes it what it is"));
    // Such a table or view would stand before the store's of the same name.
    let is_temporary = context.database_name.is_some_and(|name| name.eq_ignore_ascii_case("temp"));
    match context.action {
        AuthAction::Transaction { .. } => Some(
            "BEGIN, COMMIT and ROLLBACK are the store's: a call is a transaction as a whole; use savepoints within it"
                .into(),
        ),
        AuthAction::Savepoint { savepoint_name, .. } if savepoint_name == "millstream_part" => own(savepoint_name),
        AuthAction::Attach { .. } | AuthAction::Detach { .. } => {
            Some("no database can be attached to the store: open it by a connection of its own".into())
        }
        AuthAction::Insert { table_name }
        | AuthAction::Delete { table_name }
        | AuthAction::Update { table_name, .. } => own(table_name),
        AuthAction::CreateTable { table_name: name }
        | AuthAction::CreateVtable { table_name: name, .. }
        | AuthAction::CreateView { view_name: name } => own(name).or_else(|| synced(name).filter(|_| is_temporary)),
        AuthAction::CreateTempTable { table_name: name } | AuthAction::CreateTempView { view_name: name } => {
            own(name).or_else(|| synced(name))
        }
        // SQLite does not say what it is renamed to.
        AuthAction::AlterTable { database_name, .. } if database_name.eq_ignore_ascii_case("temp") => {
            Some("a temporary table cannot be altered: create it anew".into())
        }
        AuthAction::DropTable { table_name }
        | AuthAction::DropVtable { table_name, .. }
        | AuthAction::AlterTable { table_name, .. } => own(table_name).or_else(|| synced(table_name)),
        AuthAction::CreateIndex { index_name, table_name } | AuthAction::DropIndex { index_name, table_name } => {
            own(table_name).or_else(|| own(index_name))
        }
        AuthAction::CreateTrigger { trigger_name, table_name }
        | AuthAction::CreateTempTrigger { trigger_name, table_name }
        | AuthAction::DropTrigger { trigger_name, table_name } => own(table_name).or_else(|| own(trigger_name)),
        AuthAction::Pragma { pragma_name, pragma_value } => {
            let name = pragma_name.to_ascii_lowercase();
            let may = TELL.contains(&name.as_str())
                || (pragma_value.is_none() && SETTINGS.contains(&name.as_str()))
                || OF_THE_APP.contains(&name.as_str());
            (!may).then(|| format!("PRAGMA {name} could change what the store records, or how durably"))
        }
        // Reading, functions, and what is the app's: its tables, views, indexes and triggers.
        AuthAction::Read { .. }
        | AuthAction::Select
        | AuthAction::Recursive
        | AuthAction::Function { .. }
        | AuthAction::Savepoint { .. }
        | AuthAction::Reindex { .. }
        | AuthAction::Analyze { .. }
        | AuthAction::CreateTempIndex { .. }
        | AuthAction::DropTempIndex { .. }
        | AuthAction::DropTempTable { .. }
        | AuthAction::DropTempTrigger { .. }
        | AuthAction::DropTempView { .. }
        | AuthAction::DropView { .. } => None,
        _ => Some("the store does not know what this statement does".into()),
    }
}

/// Holds the app's statements to [`refusal`].
pub(crate) fn guard(connection: &Connection, session: &Arc<ConnectionState>) -> Result<(), StoreError> {
    let session = Arc::clone(session);
    let hook = move |context: AuthContext<'_>| {
        session.note(&context);
        let guarded = session.guarded.load(Ordering::Relaxed);
        let refused = match context.accessor {
            // A trigger or a view. Those of the store may do what it does.
            Some(name) if name.starts_with("millstream_") => None,
            // The app's write none of its tables, whoever sets them off. What they write of the synced tables is recorded when the app
            // does; nobody would ever know of it while the store applies the server's rows.
            Some(name) => match context.action {
                AuthAction::Insert { table_name }
                | AuthAction::Delete { table_name }
                | AuthAction::Update { table_name, .. } => {
                    let refused = refusal(context, |_| false).or_else(|| {
                        let silent = !guarded && session.is_synced(table_name);
                        silent.then(|| format!("\"{table_name}\" is synced"))
                    });
                    if refused.is_some() {
                        *session.trespass.lock().unwrap_or_else(PoisonError::into_inner) =
                            Some((name.to_owned(), table_name.to_owned()));
                    }
                    refused
                }
                _ => None,
            },
            None if guarded => refusal(context, |name| session.is_synced(name)),
            None => None,
        };
        match refused {
            None => Authorization::Allow,
            Some(refusal) => {
                *session.refused.lock().unwrap_or_else(PoisonError::into_inner) = Some(refusal);
                Authorization::Deny
            }
        }
    };
    connection.authorizer(Some(hook)).during("installing the guard")
}
