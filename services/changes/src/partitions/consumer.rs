//! A worker's cursor: reads those of the owned partitions that are the worker's from the stream, in order, and hands each
//! message over. A worker without room holds up its own cursor and no other.
//!
//! A throw-away pull consumer without acknowledgements (`AckNone`), started behind what has been handed over. Nothing
//! depends on its state: on any doubt it is dropped and another one is made.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy, pull};
use async_nats::jetstream::stream::Stream;
use futures_util::StreamExt;
use millstream_runtime::error::chain;
use millstream_runtime::health::Health;
use millstream_runtime::shutdown::Shutdown;
use millstream_schemas::subject::{CHANGES_SUBJECTS, PARTITIONS, changes};
use tokio::sync::{Semaphore, mpsc, watch};
use uuid::Uuid;

use crate::item::WORKER_KIB;
use crate::partitions::ownership::Assignment;
use crate::worker::Command;

/// A cursor that hears nothing for twice this time is dropped.
const HEARTBEAT: Duration = Duration::from_millis(500);
/// Life of one pull request.
const EXPIRES: Duration = Duration::from_secs(3);
/// Most messages, and bytes, asked for at a time.
const PULL_MESSAGES: usize = 500;
const PULL_BYTES: usize = 8 << 20;
/// Pause before another cursor is made.
const PAUSE: Duration = Duration::from_millis(200);
/// Time for making a cursor.
const CREATE_TIMEOUT: Duration = Duration::from_secs(2);
/// The server forgets a cursor that is not read for this time.
const INACTIVE: Duration = Duration::from_secs(30);
/// How often the stream's identity and end are compared with what is known.
const CHECK: Duration = Duration::from_secs(5);
/// Commands that may wait for a worker.
pub(crate) const WORKER_COMMANDS: usize = 1_024;
/// Which of `workers` a partition belongs to.
pub(crate) fn worker_of(partition: u16, workers: usize) -> usize {
    usize::from(partition) % workers
}

/// A worker, as its cursor sees it.
#[derive(Debug)]
pub(crate) struct WorkerLink {
    /// Which one it is, of how many.
    pub index: usize,
    pub workers: usize,
    /// Its commands.
    pub commands: mpsc::Sender<Command>,
    /// Its room in memory.
    pub room: Arc<Semaphore>,
}

/// An idle partition that holds no message up to `sequence`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Idle {
    pub partition: u16,
    pub sequence: u64,
}

/// Readiness of the stream: it is there when every cursor reads.
#[derive(Clone, Debug)]
pub(crate) struct Reading {
    health: Health,
    /// The workers whose cursor does not.
    missing: Arc<Mutex<BTreeSet<usize>>>,
}

impl Reading {
    pub fn new(health: Health, workers: usize) -> Self {
        Reading { health, missing: Arc::new(Mutex::new((0..workers).collect())) }
    }

    fn set(&self, worker: usize, reads: bool) {
        let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        if reads {
            missing.remove(&worker)
        } else {
            missing.insert(worker)
        };
        // Under the lock, so that the last word is the right one.
        self.health.set_ready("stream", missing.is_empty());
    }
}

/// Why the cursor ended.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Asked to.
    Shutdown,
    /// The stream is another one than at the start.
    StreamRecreated,
}

/// Why a cursor was dropped.
#[derive(Debug, thiserror::Error)]
enum Dropped {
    #[error("cannot ask for the stream")]
    Info(#[source] async_nats::jetstream::stream::InfoError),
    #[error("cannot create a cursor")]
    Create(#[source] async_nats::jetstream::stream::ConsumerError),
    #[error("creating a cursor took too long")]
    CreateTimeout,
    #[error("cannot pull")]
    Pull(#[source] async_nats::jetstream::consumer::StreamError),
    #[error("the cursor failed")]
    Message(#[source] async_nats::jetstream::consumer::pull::MessagesError),
    #[error("the cursor ended")]
    End,
    #[error("a message has no JetStream reply subject")]
    Reply,
    #[error("the cursor left out a message: {found} instead of {expected}")]
    Hole { found: u64, expected: u64 },
    #[error("a worker is gone")]
    WorkerGone,
}

/// What became of a cursor that was not at fault.
enum CursorOutcome {
    Ended(Ended),
    /// Another set of partitions, or nothing to do.
    Again,
    /// The stream ends before a position.
    Behind {
        last: u64,
        position: u64,
    },
}

pub(crate) struct Consumer {
    stream: Stream,
    incarnation: String,
    link: WorkerLink,
    assignment: watch::Receiver<Assignment>,
    idle: mpsc::Receiver<Idle>,
    reading: Reading,
    shutdown: Shutdown,
    /// Per partition of the worker: its term, and the last sequence that it has been handed.
    handed: BTreeMap<u16, (i64, u64)>,
    /// Highest sequence seen.
    highest: u64,
}

impl Consumer {
    pub fn new(
        stream: Stream,
        incarnation: String,
        link: WorkerLink,
        assignment: watch::Receiver<Assignment>,
        idle: mpsc::Receiver<Idle>,
        reading: Reading,
        shutdown: Shutdown,
    ) -> Self {
        Consumer { stream, incarnation, link, assignment, idle, reading, shutdown, handed: BTreeMap::new(), highest: 0 }
    }

    /// Runs until shutdown or until the stream turns out to be another one.
    pub async fn run(mut self) -> Ended {
        let shutdown = self.shutdown.clone();
        loop {
            let step = tokio::select! {
                () = shutdown.requested() => return Ended::Shutdown,
                step = self.tail() => step,
            };
            let pause = match step {
                Ok(CursorOutcome::Ended(ended)) => return ended,
                Ok(CursorOutcome::Again) => continue,
                Ok(CursorOutcome::Behind { last, position }) => {
                    tracing::error!(
                        stream.last = last,
                        position,
                        "MS_CHANGES ends before what has been executed: it was restored to an older state, and new changes \
                         would be passed over. Delete the stream and declare it again (`millstream setup`); clients then \
                         submit again what they have not seen confirmed"
                    );
                    CHECK
                }
                Err(error) => {
                    tracing::warn!(error = chain(&error), "another cursor is made");
                    PAUSE
                }
            };
            self.reading.set(self.link.index, false);
            tokio::select! {
                () = shutdown.requested() => return Ended::Shutdown,
                () = tokio::time::sleep(pause) => {}
            }
        }
    }

    /// Tells the worker what it owns now. It had been told of the same partitions before, so only changes are sent.
    async fn assign(&mut self) -> Result<Assignment, Dropped> {
        let mut assignment = self.assignment.borrow_and_update().clone();
        let (index, workers) = (self.link.index, self.link.workers);
        assignment.owned.retain(|partition, _| worker_of(*partition, workers) == index);
        let gone: Vec<u16> =
            self.handed.keys().copied().filter(|partition| !assignment.owned.contains_key(partition)).collect();
        for partition in gone {
            self.handed.remove(&partition);
            self.send(Command::Release { partition }).await?;
        }
        for (&partition, &state) in &assignment.owned {
            if self.handed.get(&partition).is_none_or(|(term, _)| *term != state.term) {
                self.send(Command::Own { partition, state }).await?;
                self.handed.insert(partition, (state.term, state.position));
            }
        }
        Ok(assignment)
    }

    async fn send(&self, command: Command) -> Result<(), Dropped> {
        self.link.commands.send(command).await.map_err(|_| Dropped::WorkerGone)
    }

    /// Compares the stream with what is known of it.
    async fn check(&mut self, position: u64) -> Result<Option<CursorOutcome>, Dropped> {
        let info = self.stream.get_info().await.map_err(Dropped::Info)?;
        if incarnation_of(&info) != self.incarnation {
            return Ok(Some(CursorOutcome::Ended(Ended::StreamRecreated)));
        }
        let last = info.state.last_sequence;
        if last < position.max(self.highest) {
            return Ok(Some(CursorOutcome::Behind { last, position: position.max(self.highest) }));
        }
        self.highest = last;
        Ok(None)
    }

    /// One cursor's life.
    async fn tail(&mut self) -> Result<CursorOutcome, Dropped> {
        let assignment = self.assign().await?;
        if assignment.owned.is_empty() {
            self.reading.set(self.link.index, true);
            // An error means that the ownership task is gone, and with it this one soon.
            let _ = self.assignment.changed().await;
            return Ok(CursorOutcome::Again);
        }
        if let Some(step) = self.check(assignment.highest).await? {
            return Ok(step);
        }
        let start = self.handed.values().map(|(_, sequence)| *sequence).min().unwrap_or(0) + 1;
        let name = format!("changes-{}", Uuid::new_v4().simple());
        let config = config(&name, start, &assignment);
        let consumer = tokio::time::timeout(CREATE_TIMEOUT, self.stream.create_consumer(config))
            .await
            .map_err(|_| Dropped::CreateTimeout)?
            .map_err(Dropped::Create)?;
        let outcome = self.read(&consumer).await;
        // Best effort: the server forgets it by itself after a while.
        let stream = self.stream.clone();
        tokio::spawn(async move {
            let _ = stream.delete_consumer(&name).await;
        });
        outcome
    }

    async fn read(
        &mut self,
        consumer: &async_nats::jetstream::consumer::Consumer<pull::Config>,
    ) -> Result<CursorOutcome, Dropped> {
        let mut messages = consumer
            .stream()
            .heartbeat(HEARTBEAT)
            .expires(EXPIRES)
            .max_messages_per_batch(PULL_MESSAGES)
            .max_bytes_per_batch(PULL_BYTES)
            .messages()
            .await
            .map_err(Dropped::Pull)?;
        self.reading.set(self.link.index, true);
        let mut expected = 1;
        let mut check = tokio::time::interval_at(tokio::time::Instant::now() + CHECK, CHECK);
        check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let message = tokio::select! {
                message = messages.next() => message.ok_or(Dropped::End)?.map_err(Dropped::Message)?,
                _ = self.assignment.changed() => return Ok(CursorOutcome::Again),
                Some(idle) = self.idle.recv() => {
                    self.advance(idle).await?;
                    continue;
                }
                _ = check.tick() => match self.check(0).await? {
                    Some(step) => return Ok(step),
                    None => continue,
                },
            };
            let (sequence, found) = match message.info() {
                Ok(info) => (info.stream_sequence, info.consumer_sequence),
                Err(_) => return Err(Dropped::Reply),
            };
            if found != expected {
                return Err(Dropped::Hole { found, expected });
            }
            expected += 1;
            self.highest = self.highest.max(sequence);
            let message = message.split().0;
            match partition_of(&message.subject) {
                Some(partition) => self.hand(partition, sequence, message.payload).await?,
                None => {
                    tracing::error!(subject = %message.subject, stream.sequence = sequence, "a message on a subject without a partition is passed over")
                }
            }
            // Up to here this cursor has given everything there was, for every partition that it reads.
            for (_, handed) in self.handed.values_mut() {
                *handed = (*handed).max(sequence);
            }
        }
    }

    async fn hand(&mut self, partition: u16, sequence: u64, payload: bytes::Bytes) -> Result<(), Dropped> {
        if self.handed.get(&partition).is_none_or(|(_, handed)| sequence <= *handed) {
            return Ok(());
        }
        let kib = (payload.len() / 1024 + 1).min(WORKER_KIB) as u32;
        let room = self.link.room.clone().acquire_many_owned(kib).await.map_err(|_| Dropped::WorkerGone)?;
        self.send(Command::Message { partition, sequence, payload, room }).await
    }

    async fn advance(&mut self, idle: Idle) -> Result<(), Dropped> {
        let Some((_, handed)) = self.handed.get_mut(&idle.partition) else { return Ok(()) };
        *handed = (*handed).max(idle.sequence);
        self.send(Command::Advance { partition: idle.partition, sequence: idle.sequence }).await
    }
}

fn config(name: &str, start: u64, assignment: &Assignment) -> pull::Config {
    let mut config = pull::Config {
        name: Some(name.to_owned()),
        description: Some("cursor of an executor; safe to delete".to_owned()),
        deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: start },
        ack_policy: AckPolicy::None,
        memory_storage: true,
        num_replicas: 1,
        inactive_threshold: INACTIVE,
        ..pull::Config::default()
    };
    if assignment.owned.len() == usize::from(PARTITIONS) {
        config.filter_subject = CHANGES_SUBJECTS.to_owned();
    } else {
        config.filter_subjects = assignment.owned.keys().map(|partition| changes(*partition)).collect();
    }
    config
}

fn partition_of(subject: &str) -> Option<u16> {
    let partition: u16 = subject.strip_prefix("ms.changes.")?.parse().ok()?;
    (partition < PARTITIONS && changes(partition) == subject).then_some(partition)
}

/// What tells a stream from another of the same name: the time of its creation, as RFC 3339.
pub(crate) fn incarnation_of(info: &async_nats::jetstream::stream::Info) -> String {
    let at = info.created;
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:09}Z",
        at.year(),
        u8::from(at.month()),
        at.day(),
        at.hour(),
        at.minute(),
        at.second(),
        at.nanosecond(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_ready_when_every_cursor_reads() {
        let health = Health::new();
        let reading = Reading::new(health.clone(), 2);
        for (worker, reads, ready) in
            [(0, true, false), (1, true, true), (0, false, false), (1, true, false), (0, true, true)]
        {
            reading.set(worker, reads);
            assert_eq!(health.is_ready(), ready, "{worker} {reads}");
        }
    }

    #[test]
    fn subjects_name_partitions() {
        for (subject, expected) in [
            ("ms.changes.0", Some(0)),
            ("ms.changes.63", Some(63)),
            ("ms.changes.64", None),
            ("ms.changes.007", None),
            ("ms.changes.+7", None),
            ("ms.changes.x", None),
            ("ms.wal.origin", None),
        ] {
            assert_eq!(partition_of(subject), expected, "{subject}");
        }
    }
}
