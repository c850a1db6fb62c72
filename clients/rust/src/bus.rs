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
//!
//! **Nothing is lost**: what the changes worker and the sync worker tell each other may be lost, repeated, and meet a
//! worker that was started anew. The truth is in the store and at the server. [`ToChanges::Known`] and [`ToChanges::Link`]
//! say all that there is to know, so the next one makes up for a lost one, and each is repeated on a timer; a frame that
//! gets lost leaves a gap, or `Link::sent` behind what was handed over, and is sent again. [`Faults`] puts this to the test.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use millstream_client_core::outbox::Entry;
use millstream_client_core::replica::Work;
use millstream_client_store::{
    Edit, FailedWrite, Imported, Info, Meeting, Outcome, QueueEntry, Recorded, Saved, Store, StoreError,
};
use millstream_schemas::Schema;
use millstream_schemas::stream::{Loss, RunSpan};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use crate::{Error, Result};

/// Commands that wait for the writer.
pub(crate) const WRITER_QUEUE: usize = 1_024;
/// Events that wait for the changes worker.
pub(crate) const CHANGES_QUEUE: usize = 1_024;
/// Frames that wait for the sync worker.
pub(crate) const SYNC_QUEUE: usize = 512;
/// Notices of changed tables that a watch may lag behind before it takes them all for changed.
pub(crate) const NOTICES: usize = 256;

/// How often the next message goes out: a test may lose and repeat messages.
pub(crate) type Copies = Arc<dyn Fn() -> usize + Send + Sync>;

/// The sending end of a channel of the bus.
pub(crate) struct Sender<T> {
    channel: mpsc::Sender<T>,
    copies: Option<Copies>,
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Sender { channel: self.channel.clone(), copies: self.copies.clone() }
    }
}

impl<T: Clone> Sender<T> {
    pub fn new(channel: mpsc::Sender<T>, copies: Option<Copies>) -> Self {
        Sender { channel, copies }
    }

    fn times(&self) -> usize {
        self.copies.as_ref().map_or(1, |copies| copies())
    }

    /// Sends, waiting for room. False: the receiver is gone.
    pub async fn send(&self, message: T) -> bool {
        for _ in 0..self.times() {
            if self.channel.send(message.clone()).await.is_err() {
                return false;
            }
        }
        !self.channel.is_closed()
    }

    /// Sends if there is room; gives the message back if not.
    pub fn try_send(&self, message: T) -> Result<(), T> {
        let times = self.times();
        if times == 0 {
            return Ok(());
        }
        for _ in 1..times {
            let _ = self.channel.try_send(message.clone());
        }
        self.channel.try_send(message).map_err(|refused| refused.into_inner())
    }

    /// Waits for room. False: the receiver is gone.
    pub async fn ready(&self) -> bool {
        self.channel.reserve().await.is_ok()
    }
}

/// A write of the app. It runs within a transaction of its own, and replies once that is durable.
pub(crate) struct Job(pub Box<dyn FnOnce(&mut Store) -> Done + Send>);

/// What a write came to.
pub(crate) struct Done {
    /// What it left in the queue.
    pub recorded: Option<Recorded>,
    /// It met damage of the store, or the store gone.
    pub damage: Option<StoreError>,
    /// Answers the app; with an error if the commit failed.
    pub reply: Box<dyn FnOnce(Option<Error>) + Send>,
}

/// Where an answer goes.
pub(crate) type Reply<T> = oneshot::Sender<Result<T>>;

/// Commands to the writer.
pub(crate) enum WriterCommand {
    /// The app writes.
    Write(Job),
    /// Tell when this transaction is settled.
    Settled(u64, Reply<Outcome>),
    /// Tell when all that has a number by now is settled.
    AllSettled(Reply<()>),
    /// List failed transactions.
    Failed(Reply<Vec<FailedWrite>>),
    /// List the newest entries of the queue.
    Queue(usize, Reply<Vec<QueueEntry>>),
    /// The entries of a transaction.
    QueueEntries(u64, Reply<Vec<QueueEntry>>),
    /// Queue a failed transaction again, with these edits.
    Retry(u64, Vec<Edit>, Reply<()>),
    /// Forget a failed or held transaction.
    Discard(u64, Reply<()>),
    /// Read unsettled transactions for the outbox.
    Load { after: u64, limit: usize, reply: Reply<Vec<Entry>> },
    /// The installed schema.
    Schema(Reply<Option<Schema>>),
    /// Apply what the edge sent.
    Perform(Vec<Work>, Reply<()>),
    /// Install the edge's schema; true: a snapshot is needed.
    Install(Box<Schema>, Reply<bool>),
    /// Compare the server's ledger with the store.
    Meet { last_seq: u64, runs: Vec<RunSpan>, failed: Vec<u64>, lost: Vec<Loss>, reply: Reply<Meeting> },
    /// This user wants to use the store.
    Claim(String, Reply<()>),
    /// The store's facts.
    Info(Reply<Info>),
    /// The position is of no use any more: ask for a snapshot next time.
    ForgetPosition(Reply<()>),
    /// Record the saved changes of a damaged store.
    Import(Box<Saved>, Reply<Vec<Imported>>),
    /// A reading connection met this error, which shows damage.
    Damaged(StoreError, Reply<Infallible>),
    /// The whole store was looked through, and is sound.
    Checked,
    /// Look for other processes' commits and due retries.
    Poll,
    /// Stop.
    Close(oneshot::Sender<()>),
}

impl WriterCommand {
    /// It comes from a session, and so after all that sessions brought before: it waits until that is done.
    pub fn is_of_a_session(&self) -> bool {
        match self {
            WriterCommand::Perform(..)
            | WriterCommand::Install(..)
            | WriterCommand::Meet { .. }
            | WriterCommand::Claim(..)
            | WriterCommand::Info(_)
            | WriterCommand::ForgetPosition(_) => true,
            WriterCommand::Write(_)
            | WriterCommand::Settled(..)
            | WriterCommand::AllSettled(_)
            | WriterCommand::Failed(_)
            | WriterCommand::Queue(..)
            | WriterCommand::QueueEntries(..)
            | WriterCommand::Retry(..)
            | WriterCommand::Discard(..)
            | WriterCommand::Load { .. }
            | WriterCommand::Schema(_)
            | WriterCommand::Import(..)
            | WriterCommand::Damaged(..)
            | WriterCommand::Checked
            | WriterCommand::Poll
            | WriterCommand::Close(_) => false,
        }
    }
}

/// Events to the changes worker.
#[derive(Clone, Debug)]
pub(crate) enum ToChanges {
    /// The app recorded a transaction.
    Recorded(Entry),
    /// The store holds transactions up to `last`, and knows those up to `confirmed` to be settled.
    Known { last: u64, confirmed: u64 },
    /// Where the connection stands.
    Link(Link),
}

/// Where the connection stands: everything that the changes worker needs to know of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Link {
    /// Rises with each session.
    pub session: u64,
    /// Whether that session goes on.
    pub online: bool,
    /// Last `client_seq` in the server's ledger when it began.
    pub last_seq: u64,
    /// Most transactions submitted and not accepted.
    pub window: u32,
    /// Highest `client_seq` that went to the socket.
    pub sent: u64,
    /// The broker has everything up to here.
    pub accepted: u64,
    /// Submissions that the edge refused in the session.
    pub refusals: u64,
    /// The edge wants no submission before this.
    pub not_before: Option<Instant>,
    /// Frames that the bus lost on the way to the socket.
    pub losses: u64,
}

/// Frames to the sync worker.
#[derive(Clone, Debug)]
pub(crate) struct ToSync {
    /// The session that it was made for; those of an earlier session are dropped.
    pub session: u64,
    /// Everything up to here is settled: that it was not sent in this session is no gap.
    pub confirmed: u64,
    /// The encoded frame, with its number.
    pub entry: Entry,
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
    /// Raised: there is another token.
    pub tokens: u64,
    /// Raised: cut the socket.
    pub cuts: u64,
    /// Raised: start the changes worker anew.
    pub changes_restarts: u64,
    /// Raised: start the sync worker anew.
    pub sync_restarts: u64,
}

/// A worker, as its supervisor sees it.
pub(crate) trait Supervised: Send + 'static {
    /// Runs until the client is closed or gone, or the worker is to start anew.
    fn run(&mut self) -> impl Future<Output = WorkerEnd> + Send;
}

/// A worker ended, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WorkerEnd {
    /// The client was closed, or is gone.
    Closed,
    /// It is to be started anew.
    Restart,
}
