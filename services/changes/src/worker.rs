//! A worker: takes what is waiting, has it executed, and follows the policy on failure. One connection, some partitions.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use millstream_runtime::backoff::Backoff;
use millstream_runtime::health::Health;
use millstream_runtime::shutdown::Shutdown;
use millstream_schemas::Code;
use millstream_schemas::stream::{ChangesMessage, Submission};
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tracing::Instrument;
use uuid::Uuid;

use crate::batch::{Item, Mode, Owned, Queue, fences};
use crate::error::Refusal;
use crate::executor::{Executor, Failed};
use crate::external::{External, Questions};
use crate::plan::Condemned;
use crate::results::Results;
use crate::validator::Rejection;

/// After so many failures that nobody understands, a transaction is rejected as `internal`.
const MAX_STRIKES: u32 = 5;
/// Pause after the first of them; each further one is twice as long, so that what is wrong may pass.
const STRIKE_PAUSE: Duration = Duration::from_millis(100);
/// Pauses between attempts while Postgres does not serve.
const PAUSES: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// What a worker is told, in this order by one channel.
#[derive(Debug)]
pub(crate) enum Command {
    /// The partition is this worker's, from this position on.
    Own {
        /// Which.
        partition: u16,
        /// Its epoch and position.
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
    /// The epoch under which it was ours.
    pub epoch: i64,
}

/// What workers share.
#[derive(Clone)]
pub(crate) struct Shared {
    /// Where results go; none: to whoever makes the worker step.
    pub nats: Option<async_nats::Client>,
    /// Asks external validators.
    pub external: Arc<External>,
    pub lost: mpsc::Sender<Lost>,
    pub health: Health,
    pub shutdown: Shutdown,
}

pub(crate) struct Worker {
    index: usize,
    executor: Executor,
    commands: mpsc::Receiver<Command>,
    shared: Shared,
    owned: BTreeMap<u16, Owned>,
    /// What waits for external validators before it enters the queue.
    questions: Questions,
    queue: Queue,
    condemned: Condemned,
    strikes: HashMap<(Uuid, u64), u32>,
    backoff: Backoff,
}

impl Worker {
    pub fn new(index: usize, executor: Executor, commands: mpsc::Receiver<Command>, shared: Shared) -> Self {
        let questions = Questions::new(shared.external.clone());
        Worker {
            index,
            executor,
            commands,
            shared,
            questions,
            owned: BTreeMap::new(),
            queue: Queue::default(),
            condemned: Condemned::new(),
            strikes: HashMap::new(),
            backoff: Backoff::new(PAUSES.0, PAUSES.1),
        }
    }

    /// Works until shutdown, or until the sender of commands is gone.
    pub async fn run(mut self) {
        let shutdown = self.shared.shutdown.clone();
        loop {
            if self.queue.is_empty() {
                self.forget();
                tokio::select! {
                    command = self.commands.recv() => match command {
                        Some(command) => self.take(command).await,
                        None => break,
                    },
                    () = self.questions.ready() => {}
                    () = shutdown.requested() => break,
                }
            }
            // What is waiting, and never more than that: waiting for a full batch would only add latency.
            while !self.queue.is_full()
                && let Ok(command) = self.commands.try_recv()
            {
                self.take(command).await;
            }
            self.proceed();
            if shutdown.is_requested() {
                break;
            }
            if !self.queue.is_empty()
                && let Some(results) = self.step().await
            {
                self.publish(results).await;
            }
        }
        self.executor.close().await;
    }

    /// Takes a partition over.
    pub fn own(&mut self, partition: u16, state: Owned) {
        self.owned.insert(partition, state);
        self.retain();
    }

    /// Works until these items are done with; `isolated`: one by one.
    pub async fn settle(&mut self, items: Vec<Item>, isolated: bool, mut results: impl FnMut(Results)) {
        let count = items.len();
        self.queue.extend(items);
        if isolated {
            self.queue.failed(count, Mode::Single, None);
        }
        while !self.queue.is_empty() {
            self.step().await.into_iter().for_each(&mut results);
        }
        self.forget();
    }

    /// What is known of single transactions: they are done, or somebody else's.
    fn forget(&mut self) {
        self.strikes.clear();
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
                if let Err(error) = self.executor.release(partition, state.epoch).await {
                    // Others see it as ours until the ownership task releases it a little later.
                    tracing::warn!(%error, partition, "cannot release a partition");
                }
            }
            Command::Message { partition, sequence, payload, room } => {
                if self.owned.get(&partition).is_some_and(|state| sequence > state.position) {
                    items(partition, sequence, &payload, room).into_iter().for_each(|item| self.enqueue(item));
                }
            }
            Command::Advance { partition, sequence } => {
                if self.owned.get(&partition).is_some_and(|state| sequence > state.position) {
                    self.enqueue(Item { partition, sequence, submission: None, last: true, room: None });
                }
            }
        }
    }

    /// Into the queue, or to the external validators first.
    fn enqueue(&mut self, item: Item) {
        self.queue.extend(self.questions.push(item));
    }

    /// Into the queue with what validators have been heard on; what they refuse is condemned.
    fn proceed(&mut self) {
        let (queue, condemned) = (&mut self.queue, &mut self.condemned);
        self.questions.proceed(|item, refusal| {
            if let (Some(submission), Some(rejection)) = (&item.submission, refusal) {
                condemned.insert((submission.client_id, submission.seq), rejection);
            }
            queue.extend([item]);
        });
    }

    /// Drops what is done or somebody else's.
    fn retain(&mut self) {
        self.queue.retain(&self.owned);
        self.questions.gate.retain(&self.owned);
    }

    /// One attempt at the next batch; gives the results of what is committed.
    async fn step(&mut self) -> Option<Results> {
        let (items, mode) = self.queue.batch();
        let fences = fences(items, &self.owned);
        let count = items.len();
        let span =
            tracing::info_span!("execute", worker = self.index, transactions = count, partitions = fences.len(), ?mode);
        let outcome = self.executor.execute(items, &fences, mode, &self.condemned).instrument(span).await;
        let committed = |worker: &mut Self| {
            for item in worker.queue.batch().0.iter().take(count) {
                if let Some(submission @ Submission { client_id, seq, .. }) = &item.submission {
                    worker.questions.gate.settled(submission);
                    worker.condemned.remove(&(*client_id, *seq));
                    worker.strikes.remove(&(*client_id, *seq));
                }
            }
            for fence in &fences {
                if let Some(state) = worker.owned.get_mut(&fence.partition) {
                    state.position = state.position.max(fence.new);
                }
            }
            worker.queue.done(count, mode);
            worker.backoff.reset();
            worker.shared.health.set_ready("postgres", true);
        };
        match outcome {
            Ok(results) => {
                committed(self);
                return Some(results);
            }
            Err(Failed::Isolate { why, at }) => {
                tracing::debug!(worker = self.index, transactions = count, ?mode, why, at, "a batch is taken apart");
                self.queue.failed(count, mode, at);
            }
            Err(Failed::Stale) => {
                tracing::debug!(worker = self.index, "reading the catalog again before refusing names")
            }
            Err(Failed::Condemned(client_id, seq, rejection)) => {
                self.condemned.insert((client_id, seq), rejection);
            }
            Err(Failed::Fenced) => {
                self.recover().await;
            }
            Err(Failed::Ledger) => {
                tracing::warn!(worker = self.index, "the ledger was moved by somebody else; trying again");
                self.pause().await;
            }
            Err(Failed::Unsure(results, error)) => {
                tracing::warn!(worker = self.index, %error, "the outcome of a batch is unknown; reading the positions");
                // Where no position moves (the middle of a large message) the ledger will tell what was done.
                let single = match (mode, self.queue.batch().0) {
                    (Mode::Single, [Item { submission: Some(submission), .. }]) => {
                        Some((submission.client_id, submission.seq))
                    }
                    _ => None,
                };
                if let Some(stored) = self.recover().await
                    && fences.iter().any(|fence| fence.new != fence.old)
                    && fences.iter().all(|fence| {
                        stored.get(&fence.partition) == Some(&Owned { epoch: fence.epoch, position: fence.new })
                    })
                {
                    return Some(results);
                }
                // Perhaps one of its changes ends the backend, by what COMMIT does.
                match (mode, single) {
                    (_, Some((client_id, seq))) => self.strike(client_id, seq, &error).await,
                    (Mode::Fast | Mode::Careful, _) => self.queue.isolate(count),
                    (Mode::Savepoints | Mode::Single, _) => {
                        self.queue.failed(count.min(self.queue.len()), mode, None);
                    }
                }
            }
            Err(Failed::Strike(client_id, seq, error)) => self.strike(client_id, seq, &error).await,
            Err(Failed::Gone(error)) => {
                tracing::warn!(worker = self.index, %error, "the connection was lost while a batch was applied");
                self.recover().await;
                self.queue.isolate(count);
            }
            Err(Failed::Server(error)) => {
                tracing::warn!(worker = self.index, %error, "Postgres cannot take the batch now; it is kept and tried again");
                self.shared.health.set_ready("postgres", false);
                self.pause().await;
                self.recover().await;
            }
            Err(Failed::Model(error)) => {
                tracing::error!(
                    worker = self.index,
                    error = &error as &dyn std::error::Error,
                    "cannot read the catalog"
                );
                self.shared.health.set_ready("postgres", false);
                self.pause().await;
            }
        }
        None
    }

    async fn publish(&self, results: Results) {
        let Some(nats) = &self.shared.nats else { return };
        // While the broker is away its connection's queue may be full: results are hints, work is not.
        const PATIENCE: Duration = Duration::from_millis(200);
        let _ = tokio::time::timeout(PATIENCE, results.publish(nats)).await;
    }

    async fn strike(&mut self, client_id: Uuid, seq: u64, error: &sqlx::Error) {
        let strikes = self.strikes.entry((client_id, seq)).or_default();
        *strikes += 1;
        let (strikes, pause) = (*strikes, STRIKE_PAUSE * (1 << (*strikes - 1)));
        tracing::warn!(client.id = %client_id, client.seq = seq, strikes, %error, "a transaction failed in an unknown way");
        if strikes >= MAX_STRIKES {
            tracing::error!(client.id = %client_id, client.seq = seq, %error, "rejected as internal; see changes_history");
            let message = format!("the server failed on it {MAX_STRIKES} times");
            let of =
                |item: &Item| item.submission.as_ref().filter(|s| s.client_id == client_id && s.seq == seq).cloned();
            if let Some(submission) = self.queue.batch().0.iter().find_map(of) {
                let rejection = Rejection::new(&submission, 0, Refusal::new(Code::Internal, message));
                self.condemned.insert((client_id, seq), rejection);
            }
            return;
        }
        self.sleep(pause).await;
        // The connection may have gone with the failure.
        let (count, mode) = (self.queue.batch().0.len(), self.queue.batch().1);
        self.recover().await;
        // It stays apart from others, also where reading the positions made the queue forget it.
        match mode {
            Mode::Single => self.queue.failed(count.min(self.queue.len()), mode, None),
            Mode::Fast | Mode::Careful | Mode::Savepoints => self.queue.isolate(count),
        }
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

    /// Takes epochs and positions from Postgres, for as long as it takes; none if asked to stop meanwhile.
    async fn recover(&mut self) -> Option<BTreeMap<u16, Owned>> {
        let partitions: Vec<u16> = self.owned.keys().copied().collect();
        let stored = loop {
            match self.executor.positions(&partitions).await {
                Ok(stored) => break stored,
                Err(error) => {
                    tracing::warn!(worker = self.index, %error, "cannot read positions");
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
                Some(now) if now.epoch == state.epoch => {
                    changed |= now.position != state.position;
                    state.position = now.position;
                }
                _ => {
                    tracing::info!(partition, epoch = state.epoch, "a partition was taken over");
                    let lost = Lost { partition, epoch: state.epoch };
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

fn items(partition: u16, sequence: u64, payload: &[u8], room: OwnedSemaphorePermit) -> Vec<Item> {
    let room = Some(Arc::new(room));
    let submissions = match serde_json::from_slice::<ChangesMessage>(payload) {
        Ok(message) => message.submissions,
        Err(error) => {
            // Nobody can be told: it does not say whose it is. The sender never sees it confirmed and sends it again.
            // (The error's text could quote values.)
            tracing::error!(
                partition,
                stream.sequence = sequence,
                line = error.line(),
                column = error.column(),
                "a message cannot be decoded and is passed over"
            );
            Vec::new()
        }
    };
    if submissions.is_empty() {
        return vec![Item { partition, sequence, submission: None, last: true, room }];
    }
    let count = submissions.len();
    submissions
        .into_iter()
        .enumerate()
        .map(|(index, submission)| Item {
            partition,
            sequence,
            submission: Some(submission),
            last: index + 1 == count,
            room: room.clone(),
        })
        .collect()
}
