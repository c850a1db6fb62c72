//! What the parts of a client tell each other: closed types over bounded channels.
//!
//! ```text
//! app ──WriterCommand──▶ writer (thread, owns the store) ──ToChanges──▶ changes worker (outbox) ──ToSync──▶ sync worker (socket)
//!                          ▲          ▲───────── load ─────────┘            ▲                                 │
//!                          └───────── perform, install, ledger ─────────────┴──────────── ToChanges ──────────┘
//! ```
//!
//! **No deadlock**: the writer never waits for a channel, the changes worker never waits for the sync worker (it keeps
//! what the window lets it send), and the sync worker may wait for both.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use millstream_client_core::outbox::Entry;
use millstream_client_core::replica::Work;
use millstream_client_store::{Applied, FailedWrite, Info, QueueEntry, Recorded, Store};
use millstream_schemas::Schema;
use tokio::sync::oneshot;

use crate::{Error, Result};

/// Commands that wait for the writer.
pub(crate) const WRITER_QUEUE: usize = 1_024;
/// Events that wait for the changes worker.
pub(crate) const CHANGES_QUEUE: usize = 1_024;
/// Frames that wait for the sync worker.
pub(crate) const SYNC_QUEUE: usize = 512;
/// Notices of changed tables that a watch may lag behind before it takes them all for changed.
pub(crate) const NOTICES: usize = 256;

/// A write of the app. It runs within a transaction of its own, and replies once that is durable.
pub(crate) struct Job(pub Box<dyn FnOnce(&mut Store) -> Done + Send>);

/// What a write came to.
pub(crate) struct Done {
    /// What it left in the queue.
    pub recorded: Option<Recorded>,
    /// Answers the app; with an error if the commit failed.
    pub reply: Box<dyn FnOnce(Option<Error>) + Send>,
}

/// Where an answer goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

/// Commands to the writer.
pub(crate) enum WriterCommand {
    /// The app writes.
    Write(Job),
    /// Tell when this transaction is settled; none: when all recorded so far are.
    Settled(Option<u64>, Reply<()>),
    /// List failed transactions.
    Failed(Reply<Vec<FailedWrite>>),
    /// List the newest entries of the queue.
    Queue(usize, Reply<Vec<QueueEntry>>),
    /// Queue a failed transaction again; gives its new number.
    Retry(u64, Reply<u64>),
    /// Forget a failed transaction.
    Discard(u64, Reply<()>),
    /// Read unsettled transactions for the outbox.
    Load { after: u64, limit: usize, reply: Reply<Vec<Recorded>> },
    /// Apply what the edge sent.
    Perform(Vec<Work>, Reply<Applied>),
    /// Install the edge's schema; true: a snapshot is needed.
    Install(Box<Schema>, Reply<bool>),
    /// Compare the server's ledger with the store.
    Ledger { last_seq: u64, reply: Reply<Ledger> },
    /// The store's facts.
    Info(Reply<Info>),
    /// The position is of no use any more: ask for a snapshot next time.
    ForgetPosition(Reply<()>),
    /// Look for other processes' commits and due retries.
    Poll,
    /// Stop.
    Close(oneshot::Sender<()>),
}

/// How the server's ledger compares with the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ledger {
    /// They agree, or the server went back and the store with it: go on after `last_seq`.
    Continue,
    /// The store is a copy of another installation's and took a new identity: connect again.
    NewIdentity,
}

/// Events to the changes worker.
#[derive(Debug)]
pub(crate) enum ToChanges {
    /// The app recorded a transaction.
    Recorded(Entry),
    /// The store holds transactions up to `last`, and knows those up to `confirmed` to be settled.
    Known { last: u64, confirmed: u64 },
    /// A session began.
    Connected { session: u64, last_seq: u64, window: u32 },
    /// The session ended.
    Disconnected,
    /// The broker has everything up to `seq`.
    Accepted { seq: u64 },
    /// The store knows everything up to `seq` to be settled.
    Confirmed { seq: u64 },
    /// The edge refused a submission.
    Refused { retry_after_ms: Option<u64> },
}

/// Frames to the sync worker.
#[derive(Debug)]
pub(crate) struct ToSync {
    /// The session that it was made for; those of an earlier session are dropped.
    pub session: u64,
    /// The encoded frame.
    pub text: String,
}

/// Tables whose rows changed.
#[derive(Clone, Debug)]
pub(crate) enum Notice {
    /// These.
    Tables(Arc<BTreeSet<String>>),
    /// Another process wrote: any.
    Any,
}

/// How far the outbox is; read by the writer for the states in `local_changes` and the status.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// Sent up to here.
    pub sent: AtomicU64,
    /// Accepted up to here.
    pub accepted: AtomicU64,
}

/// What the app wants of the workers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Control {
    /// No connection is wanted.
    pub paused: bool,
    /// Everything ends.
    pub closed: bool,
    /// Raised: connect now.
    pub kicks: u64,
    /// Raised: cut the socket.
    pub cuts: u64,
}
