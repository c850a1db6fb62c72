//! A worker: takes what is waiting, has it executed, and follows the policy on failure. One connection for batches and one
//! aside, some partitions.

mod aside;
pub(crate) mod external;
mod gate;
mod pace;
pub(crate) mod parked;
mod progress;
mod queue;
mod reread;
mod turns;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::stream::Stream;
use bytes::Bytes;
use millstream_runtime::backoff::Backoff;
use millstream_runtime::error::chain;
use millstream_runtime::health::Health;
use millstream_runtime::shutdown::Shutdown;
use millstream_schemas::stream::Submission;
use millstream_schemas::{Code, subject};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tokio::time::Instant;
use tracing::Instrument;
use uuid::Uuid;

use crate::decide::plan::Condemned;
use crate::decide::results::Results;
use crate::decide::validator::Rejection;
use crate::error::{Refusal, is_out_of_time, keeps_connection};
use crate::item::{Item, Mode, Owned, PositionMove};
use crate::transaction::executor::Executor;
use crate::transaction::failed::Failed;
use crate::worker::aside::{Aside, Done};
use crate::worker::external::{External, Questions};
use crate::worker::parked::Parked;
use crate::worker::queue::Queue;
use crate::worker::reread::{Payload, Read, Reads};

/// After so many failures that nobody understands, a transaction is rejected as `internal`.
const MAX_STRIKES: u32 = 5;
/// How long a client is parked whose transaction is in trouble; each further time twice as long, up to the second, so
/// that what is wrong may pass.
const PARKED: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// After this many clients in a row whose transactions met a lack of resources, each alone, it is the server's.
const MAX_BUSY: u32 = 3;
/// Payloads that a worker takes from its cursor before it goes on with its work.
const TAKE_BYTES: usize = 4 << 20;
/// If others were served within this time, the connection aside rests after a transaction as long as that took, up to the second.
const BESIDE: Duration = Duration::from_millis(250);
const LONGEST_REST: Duration = Duration::from_millis(500);
/// Pauses between attempts while Postgres does not serve.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// What a worker is told, in this order by one channel.
#[derive(Debug)]
pub(crate) enum Command {
    /// The partition is this worker's, from this position on.
    Own {
        /// Which.
        partition: u16,
        /// Its term and position.
        state: Owned,
    },
    /// Finish the batch at hand and give the partition up, in Postgres too if it still is ours.
    Release {
        /// Which.
        partition: u16,
    },
    /// A message of the stream.
    Message {
        /// Its partition.
        partition: u16,
        /// Its stream sequence.
        sequence: u64,
        /// A [`ChangesMessage`].
        payload: Bytes,
        /// Room in memory.
        room: OwnedSemaphorePermit,
    },
    /// The partition has no message between its position and this sequence.
    Advance {
        /// Which.
        partition: u16,
        /// Up to and including this sequence.
        sequence: u64,
    },
}

/// A partition that turned out to be somebody else's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lost {
    /// Which.
    pub partition: u16,
    /// The term under which it was ours.
    pub term: i64,
}

/// What workers share.
#[derive(Clone)]
pub(crate) struct WorkerContext {
    /// Where results go; none: to the caller of [`Worker::settle`].
    pub nats: Option<async_nats::Client>,
    /// Where messages come from; none: nowhere.
    pub stream: Option<Stream>,
    /// Asks external validators.
    pub external: Arc<External>,
    pub lost: mpsc::Sender<Lost>,
    pub health: Health,
    /// What the operator sees of transactions that cannot be applied now.
    pub parked: Parked,
    pub shutdown: Shutdown,
}

pub(crate) struct Worker {
    index: usize,
    executor: Executor,
    aside: Aside,
    /// When something may be applied aside again.
    rested: Instant,
    /// When the last batch with changes was committed.
    worked: Option<Instant>,
    commands: mpsc::Receiver<Command>,
    shared: WorkerContext,
    owned: BTreeMap<u16, Owned>,
    /// What waits for external validators before it enters the queue.
    questions: Questions,
    queue: Queue,
    condemned: Condemned,
    troubles: HashMap<(Uuid, u64), Trouble>,
    /// How many clients in a row met a lack of resources.
    busy: u32,
    /// Messages that are read again.
    reads: Reads,
    backoff: Backoff,
    /// How many clients are parked, as the operator was told.
    told: usize,
}

/// What is known of a transaction that could not be committed.
#[derive(Debug, Default)]
struct Trouble {
    /// How often its client was parked for it.
    parked: u32,
    /// How often that was for a failure that nobody understands.
    strikes: u32,
}

impl Worker {
    pub fn new(index: usize, executor: Executor, commands: mpsc::Receiver<Command>, shared: WorkerContext) -> Self {
        let questions = Questions::new(shared.external.clone());
        let reads = Reads::new(shared.stream.clone());
        let queue = if shared.stream.is_some() { Queue::default() } else { Queue::in_order() };
        let aside = Aside::new(executor.another());
        // Without a stream nothing is applied aside.
        let executor = if shared.stream.is_some() { executor.brief() } else { executor };
        Worker {
            index,
            aside,
            rested: Instant::now(),
            worked: None,
            executor,
            commands,
            shared,
            questions,
            owned: BTreeMap::new(),
            queue,
            condemned: Condemned::new(),
            troubles: HashMap::new(),
            busy: 0,
            reads,
            backoff: Backoff::new(PAUSES.0, PAUSES.1),
            told: 0,
        }
    }

    /// Works until shutdown, or until the sender of commands is gone.
    pub async fn run(mut self) {
        let shutdown = self.shared.shutdown.clone();
        loop {
            self.start_aside();
            if !self.queue.is_ready() {
                self.forget();
                let wakes = self.queue.wakes();
                tokio::select! {
                    command = self.commands.recv(), if !self.queue.is_full() => match command {
                        Some(command) => self.take(command).await,
                        None => break,
                    },
                    Some(read) = self.reads.next() => self.load(read),
                    () = self.questions.ready() => {}
                    done = self.aside.done() => self.done_aside(done).await,
                    () = tokio::time::sleep_until(self.rested), if self.aside.is_free() && self.queue.has_aside() => {}
                    () = tokio::time::sleep_until(wakes.unwrap_or_else(Instant::now)), if wakes.is_some() => {}
                    () = shutdown.requested() => break,
                }
            }
            // What is waiting, and never more than that: waiting for a full batch would only add latency. All of it, since
            // clients take turns in the queue only.
            let mut bytes = 0;
            while bytes < TAKE_BYTES
                && !self.queue.is_full()
                && let Ok(command) = self.commands.try_recv()
            {
                bytes += if let Command::Message { payload, .. } = &command { payload.len() } else { 0 };
                self.take(command).await;
            }
            self.proceed();
            self.read();
            if let Some(done) = self.aside.ended().await {
                self.done_aside(done).await;
            }
            if shutdown.is_requested() {
                break;
            }
            self.start_aside();
            if self.queue.is_ready()
                && let Some(results) = self.step().await
            {
                self.publish(results).await;
            }
        }
        self.tell(0);
        self.aside.close().await;
        self.executor.close().await;
    }

    /// Takes a partition over.
    pub fn own(&mut self, partition: u16, state: Owned) {
        self.owned.insert(partition, state);
        // It is read from that position on, also if it was here before.
        self.queue.forget(partition);
        self.retain();
    }

    /// Works until these items are done with; `isolated`: one by one.
    pub async fn settle(&mut self, items: Vec<Item>, isolated: bool, mut results: impl FnMut(Results)) {
        self.queue.set_one_by_one(isolated);
        self.queue.extend(items);
        while !self.queue.is_empty() {
            if let Some(wakes) = self.queue.wakes().filter(|_| !self.queue.is_ready()) {
                tokio::time::sleep_until(wakes).await;
            }
            self.queue.wake(Instant::now());
            self.step().await.into_iter().for_each(&mut results);
        }
        self.forget();
    }

    /// What is known of single transactions, once nothing waits: they are done, or somebody else's.
    fn forget(&mut self) {
        if !self.queue.is_empty() {
            return;
        }
        self.troubles.clear();
        self.condemned.clear();
        if self.questions.gate.is_empty() {
            self.questions.gate.forget();
        }
    }

    async fn take(&mut self, command: Command) {
        match command {
            Command::Own { partition, state } => self.own(partition, state),
            Command::Release { partition } => {
                let Some(state) = self.owned.remove(&partition) else { return };
                self.retain();
                if let Err(error) = self.executor.release(partition, state.term).await {
                    // Others see it as ours until the ownership task releases it a little later.
                    tracing::warn!(error = chain(&error), partition, "cannot release a partition");
                }
            }
            Command::Message { partition, sequence, payload, room } => {
                if self.owned.get(&partition).is_some_and(|state| sequence > state.position) {
                    let items = Item::decode(partition, sequence, &payload, Some(room));
                    items.into_iter().for_each(|item| self.enqueue(item));
                }
            }
            Command::Advance { partition, sequence } => {
                if self.owned.get(&partition).is_some_and(|state| sequence > state.position) {
                    self.enqueue(Item::empty(partition, sequence));
                }
            }
        }
    }

    /// Into the queue, or to the external validators first.
    fn enqueue(&mut self, item: Item) {
        self.queue.extend(self.questions.push(item));
    }

    /// Into the queue with what validators have been heard on; what they refuse is condemned. And with what was parked
    /// until now.
    fn proceed(&mut self) {
        let (queue, condemned) = (&mut self.queue, &mut self.condemned);
        self.questions.proceed(|item, refusal| {
            if let (Some(submission), Some(rejection)) = (&item.submission, refusal) {
                condemned.insert((submission.client_id, submission.client_seq), rejection);
            }
            queue.extend([item]);
        });
        queue.wake(Instant::now());
        self.tell(self.queue.parked());
    }

    /// Reads again what clients left in the stream and have room for now.
    fn read(&mut self) {
        while let Some(read) = self.reads.done() {
            self.load(read);
        }
        while self.reads.has_room()
            && let Some((client_id, left)) = self.queue.wanted()
        {
            self.reads.begin(client_id, left);
        }
    }

    /// Takes in what was read again.
    fn load(&mut self, Read { client_id, left, payload }: Read) {
        match payload {
            Payload::Found(payload) => {
                let items = Item::decode(left.partition, left.sequence, &payload, None);
                self.queue.load(client_id, left, items);
            }
            Payload::Gone => self.queue.load(client_id, left, Vec::new()),
            Payload::Failed => self.queue.fail_to_load(client_id),
        }
    }

    /// Drops what is done or somebody else's.
    fn retain(&mut self) {
        self.queue.retain(&self.owned);
        self.questions.gate.retain(&self.owned);
    }

    /// Starts the next transaction that others are not to wait for.
    fn start_aside(&mut self) {
        if self.aside.is_free()
            && self.rested <= Instant::now()
            && let Some((item, mode)) = self.queue.take_aside()
        {
            self.condemned.extend(self.refused(std::slice::from_ref(&item)));
            let Some(state) = self.owned.get(&item.partition) else { return self.queue.drop_aside(&item) };
            let known = item.name().and_then(|name| self.condemned.get_key_value(&name));
            let condemned = known.into_iter().map(|(name, rejection)| (*name, rejection.clone())).collect();
            self.aside.start(item, state.term, mode, condemned);
        }
    }

    /// A transaction that was applied aside has ended.
    async fn done_aside(&mut self, Done { item, term, mode, outcome, took }: Done) {
        let Some((client_id, client_seq)) = item.name() else { return };
        let now = Instant::now();
        // While others are at work, too, it is not all of the machine that it may have.
        let beside = self.worked.is_some_and(|worked| now.duration_since(worked) < BESIDE);
        self.rested = now + took.filter(|_| beside).unwrap_or_default().min(LONGEST_REST);
        if let Some(took) = took {
            self.queue.took_aside(&item, took, now);
        }
        // Where the partition was somebody else's meanwhile, its messages are read again: what is done is a repeat then.
        let is_ours = self.owned.get(&item.partition).is_some_and(|state| state.term == term);
        let (error, is_strike) = match outcome {
            Ok(results) => {
                self.settled(&item);
                if is_ours {
                    self.queue.done_aside(&item)
                } else {
                    self.queue.drop_aside(&item)
                }
                return self.publish(results).await;
            }
            Err(_) if !is_ours => return self.queue.drop_aside(&item),
            Err(Failed::Condemned(client_id, client_seq, rejection)) => {
                self.condemned.insert((client_id, client_seq), rejection);
                return self.queue.return_aside(item, None);
            }
            Err(Failed::Strike(_, _, error)) => {
                if is_out_of_time(&error) {
                    self.queue.took_too_long(client_id, now);
                }
                (error, true)
            }
            Err(Failed::Unsure(_, error)) => (error, mode == Mode::Single),
            Err(Failed::Busy(error) | Failed::Gone(error)) => (error, false),
            Err(Failed::Server(error)) => {
                self.shared.health.set_ready("postgres", false);
                (error, false)
            }
            Err(Failed::Isolate { .. } | Failed::Stale) => return self.queue.return_aside(item, None),
            Err(Failed::Model(error)) => {
                tracing::error!(worker = self.index, error = chain(&error), "cannot read the catalog");
                self.shared.health.set_ready("postgres", false);
                let until = now + self.parked_for((client_id, client_seq));
                return self.queue.return_aside(item, Some(until));
            }
            Err(Failed::Fenced | Failed::Ledger) => {
                let until = now + self.parked_for((client_id, client_seq));
                return self.queue.return_aside(item, Some(until));
            }
        };
        let until = if is_strike && self.is_given_up((client_id, client_seq), item.submission.as_ref(), &error) {
            None
        } else {
            if !is_strike {
                tracing::warn!(client.id = %client_id, client.seq = client_seq, error = chain(&error), "a transaction cannot be applied now; it is kept and tried again");
            }
            let pause = self.parked_for((client_id, client_seq));
            self.note(item.submission.as_ref(), &error);
            Some(now + pause)
        };
        self.queue.return_aside(item, until);
        self.tell(self.queue.parked());
    }

    /// What was known of a transaction is not needed any more.
    fn settled(&mut self, item: &Item) {
        let Some(submission) = &item.submission else { return };
        self.questions.gate.settled(submission);
        let name = (submission.client_id, submission.client_seq);
        self.condemned.remove(&name);
        if self.troubles.remove(&name).is_some() {
            self.shared.parked.settled(name);
        }
    }

    /// Names a transaction that was tried in vain to the operator.
    fn note(&self, submission: Option<&Submission>, error: &sqlx::Error) {
        let Some(submission) = submission else { return };
        let tries =
            self.troubles.get(&(submission.client_id, submission.client_seq)).map_or(1, |trouble| trouble.parked);
        self.shared.parked.note(submission, tries, error);
    }

    /// Those of these that an operator has refused.
    fn refused(&self, items: &[Item]) -> Condemned {
        let submissions = items.iter().filter_map(|item| item.submission.as_ref());
        let refused = submissions.filter_map(|submission| {
            let name = (submission.client_id, submission.client_seq);
            let refusal = self.troubles.get(&name).and_then(|_| self.shared.parked.refusal(name))?;
            Some((name, Rejection::new(submission, 0, refusal)))
        });
        if self.troubles.is_empty() { Condemned::new() } else { refused.collect() }
    }

    /// One attempt at the next batch; gives the results of what is committed.
    async fn step(&mut self) -> Option<Results> {
        let (count, mode) = self.queue.batch();
        let fences = self.queue.fences(count, &self.owned);
        let span =
            tracing::info_span!("execute", worker = self.index, transactions = count, partitions = fences.len(), ?mode);
        self.condemned.extend(self.refused(&self.queue.items()[..count]));
        let items = &self.queue.items()[..count];
        let (start, warm) = (Instant::now(), self.executor.is_warm());
        let outcome = self.executor.execute(items, &fences, mode, &self.condemned).instrument(span).await;
        let took = start.elapsed();
        match outcome {
            Ok(results) => {
                if warm {
                    self.queue.took(count, took, Instant::now());
                }
                self.committed(count, mode, took, &fences, results.met_error);
                return Some(results);
            }
            Err(Failed::Isolate { why, at }) => {
                tracing::debug!(worker = self.index, transactions = count, ?mode, why, at, "a batch is taken apart");
                self.queue.failed(count, mode, at, took);
            }
            Err(Failed::Stale) => {
                tracing::debug!(worker = self.index, "reading the catalog again before refusing names")
            }
            Err(Failed::Condemned(client_id, client_seq, rejection)) => {
                self.condemned.insert((client_id, client_seq), rejection);
            }
            Err(Failed::Fenced) => {
                self.recover().await;
            }
            Err(Failed::Ledger) => {
                tracing::warn!(worker = self.index, "the ledger was moved by somebody else; trying again");
                self.pause().await;
            }
            Err(Failed::Unsure(results, error)) => {
                tracing::warn!(
                    worker = self.index,
                    error = chain(&error),
                    "the outcome of a batch is unknown; reading the positions"
                );
                // Where no position moves (the middle of a large message, or one before it waits) the ledger will tell what
                // was done.
                let single = self.queue.items().first().filter(|_| mode == Mode::Single).and_then(Item::name);
                if let Some(stored) = self.recover().await
                    && fences.iter().any(|fence| fence.new != fence.old)
                    && fences.iter().all(|fence| {
                        stored.get(&fence.partition) == Some(&Owned { term: fence.term, position: fence.new })
                    })
                {
                    return Some(results);
                }
                // Perhaps one of its changes ends the backend, by what COMMIT does.
                match (mode, single) {
                    (_, Some((client_id, client_seq))) => self.strike(client_id, client_seq, &error).await,
                    (Mode::Fast | Mode::Careful, _) => self.queue.isolate(count),
                    (Mode::Savepoints | Mode::Single, _) => self.queue.failed(count, mode, None, took),
                }
            }
            Err(Failed::Strike(client_id, client_seq, error)) => self.strike(client_id, client_seq, &error).await,
            Err(Failed::Busy(error)) => self.busy(count, mode, &error).await,
            Err(Failed::Gone(error)) => {
                tracing::warn!(
                    worker = self.index,
                    error = chain(&error),
                    "the connection was lost while a batch was applied"
                );
                self.recover().await;
                self.queue.isolate(count);
            }
            Err(Failed::Server(error)) => {
                tracing::warn!(
                    worker = self.index,
                    error = chain(&error),
                    "Postgres cannot take the batch now; it is kept and tried again"
                );
                self.shared.health.set_ready("postgres", false);
                self.pause().await;
                self.recover().await;
            }
            Err(Failed::Model(error)) => {
                tracing::error!(worker = self.index, error = chain(&error), "cannot read the catalog");
                self.shared.health.set_ready("postgres", false);
                self.pause().await;
            }
        }
        None
    }

    /// The first items of the batch are done with.
    fn committed(&mut self, count: usize, mode: Mode, took: Duration, fences: &[PositionMove], met_error: bool) {
        if self.queue.items()[..count].iter().any(|item| item.submission.is_some()) {
            self.worked = Some(Instant::now());
        }
        for item in self.queue.done(count, mode, took, met_error) {
            self.settled(&item);
        }
        for fence in fences {
            if let Some(state) = self.owned.get_mut(&fence.partition) {
                state.position = state.position.max(fence.new);
            }
        }
        self.busy = 0;
        self.backoff.reset();
        self.shared.health.set_ready("postgres", true);
    }

    async fn publish(&self, results: Results) {
        let Some(nats) = &self.shared.nats else { return };
        // While the broker is away its connection's queue may be full: results are hints, work is not.
        const PATIENCE: Duration = Duration::from_millis(200);
        let publish = async {
            for (client_id, message) in results.messages() {
                let payload = match serde_json::to_vec(&message) {
                    Ok(payload) => payload,
                    Err(error) => {
                        tracing::error!(error = chain(&error), "cannot encode results");
                        continue;
                    }
                };
                if let Err(error) = nats.publish(subject::results(client_id), payload.into()).await {
                    tracing::debug!(
                        error = chain(&error),
                        "a result was not published; the outbound stream will tell it"
                    );
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(PATIENCE, publish).await;
    }

    /// A transaction failed in a way that nobody understands. Its client waits, others do not.
    async fn strike(&mut self, client_id: Uuid, client_seq: u64, error: &sqlx::Error) {
        if !keeps_connection(error) {
            self.recover().await;
        }
        let Some(at) = self.queue.items().iter().position(|item| item.name() == Some((client_id, client_seq))) else {
            return;
        };
        if is_out_of_time(error) && self.shared.stream.is_some() {
            tracing::warn!(client.id = %client_id, client.seq = client_seq, "a transaction takes longer than others may wait; it is tried aside");
            self.queue.took_too_long(client_id, Instant::now());
            return self.queue.park(at, Instant::now());
        }
        let submission = self.queue.items().get(at).and_then(|item| item.submission.clone());
        if !self.is_given_up((client_id, client_seq), submission.as_ref(), error) {
            self.park(at, error);
        }
    }

    /// Counts a failure that nobody understands; whether it was one too many, so that the transaction is refused.
    fn is_given_up(&mut self, name: (Uuid, u64), submission: Option<&Submission>, error: &sqlx::Error) -> bool {
        let (client_id, client_seq) = name;
        let trouble = self.troubles.entry(name).or_default();
        trouble.strikes += 1;
        let strikes = trouble.strikes;
        tracing::warn!(client.id = %client_id, client.seq = client_seq, strikes, error = chain(&error), "a transaction failed in an unknown way");
        if strikes < MAX_STRIKES {
            return false;
        }
        tracing::error!(client.id = %client_id, client.seq = client_seq, error = chain(&error), "rejected as internal; see changes_history");
        let message = format!("the server failed on it {MAX_STRIKES} times");
        if let Some(submission) = submission {
            let rejection = Rejection::new(submission, 0, Refusal::new(Code::Internal, message));
            self.condemned.insert(name, rejection);
        }
        true
    }

    /// Statements for the first items of the batch met a lock, a deadlock or a lack of resources. Each is tried alone; if
    /// that does not help, the client waits, for as long as it takes.
    async fn busy(&mut self, count: usize, mode: Mode, error: &sqlx::Error) {
        if mode != Mode::Single {
            tracing::debug!(
                worker = self.index,
                error = chain(&error),
                "the transactions of a batch are tried one by one"
            );
            return self.queue.set_apart(count);
        }
        let Some((client_id, client_seq)) = self.queue.items().first().and_then(Item::name) else {
            return self.pause().await;
        };
        tracing::warn!(client.id = %client_id, client.seq = client_seq, error = chain(&error), "a transaction cannot be applied now; it is kept and tried again");
        self.park(0, error);
        // Locks and deadlocks are between transactions; everything else may be the server's state.
        let state = error.as_database_error().and_then(|error| error.code());
        if !state.is_some_and(|state| state.starts_with("40") || state.starts_with("55")) {
            self.busy += 1;
            if self.busy >= MAX_BUSY {
                self.shared.health.set_ready("postgres", false);
                self.pause().await;
            }
        }
    }

    /// Parks the client of the batch's item `at`.
    fn park(&mut self, at: usize, error: &sqlx::Error) {
        let Some(name) = self.queue.items().get(at).and_then(Item::name) else { return };
        let pause = self.parked_for(name);
        self.note(self.queue.items()[at].submission.as_ref(), error);
        self.queue.park(at, Instant::now() + pause);
        self.tell(self.queue.parked());
    }

    /// For how long the client of a transaction is parked: each time longer.
    fn parked_for(&mut self, name: (Uuid, u64)) -> Duration {
        let trouble = self.troubles.entry(name).or_default();
        trouble.parked += 1;
        PARKED.0.saturating_mul(1 << (trouble.parked - 1).min(16)).min(PARKED.1)
    }

    /// Tells the operator how many clients are parked.
    fn tell(&mut self, parked: usize) {
        if std::mem::replace(&mut self.told, parked) == parked {
            return;
        }
        let note = (parked > 0).then(|| format!("{parked} clients wait for another try of a transaction"));
        self.shared.health.set_note(&format!("parked by worker {}", self.index), note.as_deref());
    }

    async fn pause(&mut self) {
        let pause = self.backoff.next();
        self.sleep(pause).await;
    }

    async fn sleep(&self, pause: Duration) {
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = self.shared.shutdown.requested() => {}
        }
    }

    /// Takes terms and positions from Postgres, for as long as it takes; none if asked to stop meanwhile.
    async fn recover(&mut self) -> Option<BTreeMap<u16, Owned>> {
        let partitions: Vec<u16> = self.owned.keys().copied().collect();
        let stored = loop {
            match self.executor.positions(&partitions).await {
                Ok(stored) => break stored,
                Err(error) => {
                    tracing::warn!(worker = self.index, error = chain(&error), "cannot read positions");
                    self.shared.health.set_ready("postgres", false);
                    self.pause().await;
                }
            }
            if self.shared.shutdown.is_requested() {
                return None;
            }
        };
        self.backoff.reset();
        let mut changed = false;
        for partition in partitions {
            let Some(state) = self.owned.get_mut(&partition) else { continue };
            match stored.get(&partition) {
                Some(now) if now.term == state.term => {
                    changed |= now.position != state.position;
                    state.position = now.position;
                }
                _ => {
                    tracing::info!(partition, term = state.term, "a partition was taken over");
                    let lost = Lost { partition, term: state.term };
                    self.owned.remove(&partition);
                    changed = true;
                    if self.shared.lost.send(lost).await.is_err() {
                        return None;
                    }
                }
            }
        }
        if changed {
            self.retain();
        }
        Some(stored)
    }
}
