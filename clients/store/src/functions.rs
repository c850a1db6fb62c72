//! SQL functions of the store's connections, and the guard over what the app's statements may do.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use millstream_client_core::trigger;
use millstream_schemas::Clocks;
use rusqlite::Connection;
use rusqlite::functions::FunctionFlags;
use rusqlite::hooks::{AuthAction, AuthContext, Authorization};
use uuid::Uuid;

use crate::StoreError;
use crate::error::During;

/// What the store asks of its surroundings.
pub trait Host: Send + Sync {
    /// Microseconds since 1970.
    fn now_micros(&self) -> u64;
    /// A new UUIDv7.
    fn uuid(&self) -> Uuid;
}

/// State of the connection that SQL functions see.
pub(crate) struct Session {
    host: Arc<dyn Host>,
    /// The app's transaction; 0 outside of one and while the store writes for itself.
    tx: AtomicI64,
    /// The `client_seq` that it gets, unless it is held back.
    seq: AtomicI64,
    /// This run of the store; see [`millstream_schemas::frame::Submit::instance`].
    instance: Mutex<Option<Uuid>>,
    /// The app's statements are being prepared: the guard is up.
    guarded: AtomicBool,
    /// A statement of the app's met damage.
    damaged: AtomicBool,
    /// Last stamp given out or seen: the hybrid logical clock, in microseconds.
    stamp: AtomicU64,
    traceparent: Mutex<Option<String>>,
}

impl Session {
    pub fn new(host: Arc<dyn Host>) -> Self {
        Session {
            host,
            tx: AtomicI64::new(0),
            seq: AtomicI64::new(0),
            instance: Mutex::new(None),
            guarded: AtomicBool::new(false),
            damaged: AtomicBool::new(false),
            stamp: AtomicU64::new(0),
            traceparent: Mutex::new(None),
        }
    }

    /// The app's statements follow, as transaction `tx` with the number `seq`.
    pub fn begin(&self, tx: u64, seq: u64, traceparent: Option<&str>) {
        *self.traceparent.lock().unwrap_or_else(PoisonError::into_inner) = traceparent.map(str::to_owned);
        self.tx.store(tx as i64, Ordering::Relaxed);
        self.seq.store(seq as i64, Ordering::Relaxed);
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
    pub fn instance(&self) -> Uuid {
        let mut instance = self.instance.lock().unwrap_or_else(PoisonError::into_inner);
        *instance.get_or_insert_with(|| self.host.uuid())
    }

    /// Numbers that are given from now on are of another instance: some of those given before mean something else now.
    pub fn renew_instance(&self) {
        *self.instance.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
pub(crate) fn register(connection: &Connection, session: &Arc<Session>, writer: bool) -> Result<(), StoreError> {
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
        .create_scalar_function("millstream_seq", 0, flags, move |_| Ok(s.seq.load(Ordering::Relaxed)))
        .during(operation)?;
    let s = Arc::clone(session);
    connection
        .create_scalar_function("millstream_instance", 0, flags, move |_| Ok(s.instance().to_string()))
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
    let s = Arc::clone(session);
    connection
        .create_scalar_function("millstream_traceparent", 0, flags, move |_| {
            Ok(s.traceparent.lock().unwrap_or_else(PoisonError::into_inner).clone())
        })
        .during(operation)
}

/// The app's statements may not end the transaction, nor write the store's own tables other than through triggers.
pub(crate) fn guard(connection: &Connection, session: &Arc<Session>) -> Result<(), StoreError> {
    let session = Arc::clone(session);
    let hook = move |context: AuthContext<'_>| {
        if !session.guarded.load(Ordering::Relaxed) || context.accessor.is_some() {
            return Authorization::Allow;
        }
        let denied = match context.action {
            AuthAction::Transaction { .. } | AuthAction::Attach { .. } | AuthAction::Detach { .. } => true,
            AuthAction::Insert { table_name }
            | AuthAction::Delete { table_name }
            | AuthAction::Update { table_name, .. }
            | AuthAction::DropTable { table_name }
            | AuthAction::AlterTable { table_name, .. } => {
                trigger::is_reserved(table_name) && !table_name.starts_with("sqlite_")
            }
            AuthAction::DropTrigger { trigger_name, .. } => trigger_name.starts_with("millstream_"),
            _ => false,
        };
        if denied { Authorization::Deny } else { Authorization::Allow }
    };
    connection.authorizer(Some(hook)).during("installing the guard")
}
