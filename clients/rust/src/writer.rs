//! The writer: the thread that owns the store.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use millstream_client_core::status::{State, Status};
use millstream_client_store::{Host, Meeting, Outcome, Performing, Recorded, Settled, Store, StoreError, Verdict};
use millstream_schemas::stream::Failure;
use tokio::sync::{broadcast, mpsc, watch};

use crate::bus::{Done, Job, Notice, Progress, Reply, Sender, ToChanges, WriterCommand};
use crate::error::chain;
use crate::host::SystemHost;
use crate::watch::Readers;
use crate::{Error, Result};

/// Most writes that share a commit.
const GROUP: usize = 64;
/// Most calls between two slices of what the edge sent, and the longest time: an edge gives a snapshot only so much of it.
const CALLS: usize = 64;
const APART: Duration = Duration::from_millis(30);
/// Most commands of sessions that wait for the end of what the edge sent. A session waits for each of its own, so that more come only
/// of sessions that were cut off.
const BEHIND: usize = 16;
/// Polls between looks for due retries.
const RETRY_POLLS: u64 = 5;
/// Polls between writes of the entries' states.
const MARK_POLLS: u64 = 20;
/// Polls between prunings of settled entries.
const PRUNE_POLLS: u64 = 6_000;

pub(crate) struct Writer {
    pub store: Store,
    pub commands: mpsc::Receiver<WriterCommand>,
    pub changes: Sender<ToChanges>,
    pub notices: broadcast::Sender<Notice>,
    pub status: watch::Sender<Status>,
    pub progress: Arc<Progress>,
    pub retention: Duration,
    /// Who waits for which local transaction.
    pub waiting: HashMap<u64, Vec<Reply<Outcome>>>,
    /// Who waits for everything up to which number.
    pub waiting_for_all: BTreeMap<u64, Vec<Reply<()>>>,
    pub last_seq: u64,
    pub polls: u64,
    pub readers: Arc<Readers>,
    /// Why the store is of no use any more: the answer to everything.
    pub lost: Option<StoreError>,
    pub order: Order,
}

/// Which command comes next.
#[derive(Default)]
pub(crate) struct Order {
    /// What the edge sent, in slices, so that calls of the app need not wait for the end of it.
    performing: Option<(Performing, Reply<()>)>,
    /// Commands that wait until all of it is done.
    behind: VecDeque<WriterCommand>,
    /// The command that ended a group of writes.
    next: Option<WriterCommand>,
    /// Calls since the last slice, and when that ended.
    calls: usize,
    sliced: Option<Instant>,
}

impl Writer {
    /// Runs until the client is closed or gone.
    pub fn run(mut self) {
        self.refresh_or_report();
        while let Some(command) = self.next() {
            match command {
                WriterCommand::Write(job) => self.order.next = self.write(job),
                WriterCommand::Close(reply) => {
                    let _ = self.store.flush_marks();
                    for reply in std::mem::take(&mut self.waiting).into_values().flatten() {
                        let _ = reply.send(Err(Error::Closed));
                    }
                    for reply in std::mem::take(&mut self.waiting_for_all).into_values().flatten() {
                        let _ = reply.send(Err(Error::Closed));
                    }
                    // The file is closed before the app hears of it, so that it may open it again at once.
                    drop(self.store);
                    let _ = reply.send(());
                    return;
                }
                other => self.other(other),
            }
        }
    }

    /// Waits for the next command. While there is something of the edge's to do, that is done instead of waiting.
    fn next(&mut self) -> Option<WriterCommand> {
        loop {
            if self.order.performing.is_none() {
                let behind = self.order.behind.pop_front();
                return behind.or_else(|| self.order.next.take()).or_else(|| self.commands.blocking_recv());
            }
            let mut call = None;
            let is_due = self.order.sliced.is_some_and(|sliced| sliced.elapsed() > APART);
            if !is_due && self.order.calls < CALLS && self.order.behind.len() < BEHIND {
                call = self.order.next.take().or_else(|| self.commands.try_recv().ok());
            }
            match call {
                Some(command) if command.is_of_a_session() => self.order.behind.push_back(command),
                Some(command) => {
                    self.order.calls += 1;
                    return Some(command);
                }
                None => self.slice(),
            }
        }
    }

    /// Does a part of what the edge sent, and answers once all of it is done.
    fn slice(&mut self) {
        self.order.calls = 0;
        let Some((mut performing, reply)) = self.order.performing.take() else { return };
        match self.perform(&mut performing) {
            Ok(()) if !performing.is_done() => self.order.performing = Some((performing, reply)),
            result => self.answer(reply, result),
        }
        self.order.sliced = Some(Instant::now());
    }

    fn other(&mut self, command: WriterCommand) {
        match command {
            // Handled by `run`.
            WriterCommand::Write(_) | WriterCommand::Close(_) => {}
            WriterCommand::Settled(tx, reply) => self.settled(tx, reply),
            WriterCommand::AllSettled(reply) => self.all_settled(reply),
            WriterCommand::Schema(reply) => {
                let schema = self.store.schema().cloned();
                self.answer(reply, Ok::<_, StoreError>(schema));
            }
            WriterCommand::Failed(reply) => {
                let failed = self.store.failed();
                self.answer(reply, failed);
            }
            WriterCommand::QueueEntries(tx, reply) => {
                let entries = self.store.transaction(tx);
                self.answer(reply, entries);
            }
            WriterCommand::Queue(limit, reply) => {
                let entries = self.store.entries(limit);
                self.answer(reply, entries);
            }
            WriterCommand::Retry(tx, edits, reply) => {
                let result = self.store.edit(tx, &edits).map(drop);
                self.queue_changed();
                self.answer(reply, result);
            }
            WriterCommand::Discard(tx, reply) => {
                let result = self.store.discard(tx);
                if result.is_ok() {
                    for waiting in self.waiting.remove(&tx).unwrap_or_default() {
                        let _ = waiting.send(Err(Error::Discarded(tx)));
                    }
                }
                self.queue_changed();
                self.answer(reply, result);
            }
            WriterCommand::Load { after, limit, reply } => {
                let entries = self.store.entries_after(after, limit);
                self.answer(reply, entries);
            }
            WriterCommand::Perform(works, reply) => {
                self.order.performing = Some((Performing::new(works), reply));
                self.slice();
            }
            WriterCommand::Install(schema, reply) => {
                let result = self.store.install(&schema);
                let _ = self.notices.send(Notice::Any);
                self.refresh_or_report();
                self.answer(reply, result);
            }
            WriterCommand::Meet { last_seq, runs, failed, lost, reply } => {
                let result = self.store.meet(last_seq, &runs, &failed, &lost).and_then(|met| self.met(met, last_seq));
                self.answer(reply, result);
            }
            WriterCommand::ForgetPosition(reply) => {
                let forgotten = self.store.forget_position();
                self.answer(reply, forgotten);
            }
            WriterCommand::Claim(user, reply) => {
                let claimed = self.store.claim(&user);
                self.answer(reply, claimed);
            }
            WriterCommand::Info(reply) => {
                let info = self.store.info();
                self.answer(reply, info);
            }
            WriterCommand::Import(saved, reply) => {
                let imported = self.store.import(&saved);
                self.queue_changed();
                self.answer(reply, imported);
            }
            WriterCommand::Damaged(error, reply) => self.answer(reply, Err(error)),
            WriterCommand::Checked => {
                if let Err(error) = self.store.checked() {
                    self.report(error);
                }
            }
            WriterCommand::Poll => {
                if self.lost.is_none()
                    && let Err(error) = self.poll()
                {
                    self.report(error);
                }
            }
        }
    }

    /// Runs a write, and with it those that wait behind it: they share one commit, as a database groups its commits.
    /// Gives back the command that ended the group.
    fn write(&mut self, first: Job) -> Option<WriterCommand> {
        let mut jobs = vec![first];
        let mut next = None;
        while jobs.len() < GROUP
            && let Ok(command) = self.commands.try_recv()
        {
            match command {
                WriterCommand::Write(job) => jobs.push(job),
                other => {
                    next = Some(other);
                    break;
                }
            }
        }
        if jobs.len() == 1 {
            let dones: Vec<Done> = jobs.into_iter().map(|Job(job)| job(&mut self.store)).collect();
            self.done(dones, None);
        } else {
            let mut dones = Vec::with_capacity(jobs.len());
            let result = self.store.group(|store| dones.extend(jobs.into_iter().map(|Job(job)| job(store))));
            self.done(dones, result.err());
        }
        next
    }

    fn done(&mut self, mut dones: Vec<Done>, failed: Option<StoreError>) {
        let failed = failed.map(|error| Arc::new(self.examine(error)));
        if let Some(damage) = dones.iter_mut().find_map(|done| done.damage.take()) {
            self.examine(damage);
        }
        if failed.is_some() || self.lost.is_some() {
            if let (Some(error), None) = (&failed, &self.lost) {
                self.tell_of(error);
            }
            for done in dones {
                let durable = failed.is_none() && done.recorded.is_some();
                (done.reply)(match (&self.lost, &failed) {
                    _ if durable => None,
                    (Some(lost), _) => lost.lost().map(Error::Store),
                    (None, failed) => failed.as_ref().map(|error| Error::Commit(Arc::clone(error))),
                });
            }
            return;
        }
        if self.publish() {
            // Something of the database was made or dropped, perhaps what had been set aside.
            self.refresh_or_report();
        }
        // The frame leaves first: it is what others wait for.
        let mut replies = Vec::with_capacity(dones.len());
        for done in dones {
            if let Some(recorded) = done.recorded {
                self.recorded(recorded);
            }
            replies.push(done.reply);
        }
        for reply in replies {
            reply(None);
        }
    }

    /// Hands a durable transaction to the changes worker. Its state in `local_changes` stays `pending` for now: writing
    /// `sending` first would cost another fsync, and a transaction sent twice is told apart by the server's ledger. A
    /// full channel loses nothing either: the outbox reads from the store what it was not told.
    fn recorded(&mut self, recorded: Recorded) {
        let Some(entry) = recorded.entry else { return self.refresh_or_report() };
        self.last_seq = self.last_seq.max(entry.client_seq);
        let (last, at) = (self.last_seq, recorded.at / 1_000);
        let _ = self.changes.try_send(ToChanges::Recorded(entry));
        self.status.send_modify(|status| {
            status.pending.count = last.saturating_sub(status.confirmed_seq);
            status.pending.oldest_at.get_or_insert(at);
        });
    }

    fn perform(&mut self, performing: &mut Performing) -> Result<(), StoreError> {
        let (sent, accepted) =
            (self.progress.sent.load(Ordering::Relaxed), self.progress.accepted.load(Ordering::Relaxed));
        self.store.mark(sent, accepted);
        let applied = self.store.perform_slice(performing)?;
        if applied.is_none() && !performing.is_done() {
            return Ok(());
        }
        let applied = applied.unwrap_or_default();
        self.publish();
        self.settle(&applied.settled);
        if applied.released {
            self.renumbered()?;
        }
        self.refresh()?;
        self.tell();
        self.status.send_modify(|status| {
            status.last_synced_at = Some(SystemHost.now_micros() / 1_000);
            status.applied_transactions += applied.transactions;
        });
        Ok(())
    }

    /// Something of the queue was retried, discarded or released.
    fn queue_changed(&mut self) {
        self.publish();
        self.refresh_or_report();
        self.tell();
    }

    /// Tells the changes worker how far the store is; whatever event was lost, this makes up for it.
    fn tell(&self) {
        let confirmed = self.status.borrow().confirmed_seq;
        let _ = self.changes.try_send(ToChanges::Known { last: self.last_seq, confirmed });
    }

    /// Answers those who wait for these transactions.
    fn settle(&mut self, settled: &[Settled]) {
        for Settled { tx, result } in settled {
            for reply in self.waiting.remove(tx).unwrap_or_default() {
                let _ = reply.send(result.clone().map_err(|failure| rejected(*tx, failure)));
            }
        }
    }

    /// Answers those who wait for transactions that the store knows to be settled.
    fn settle_by_store(&mut self) -> Result<(), StoreError> {
        let waiting: Vec<u64> = self.waiting.keys().copied().collect();
        for tx in waiting {
            let verdict = self.store.verdict(tx)?;
            if verdict != Verdict::Open {
                for reply in self.waiting.remove(&tx).unwrap_or_default() {
                    let _ = reply.send(outcome(tx, verdict.clone()));
                }
            }
        }
        Ok(())
    }

    fn settled(&mut self, tx: u64, reply: Reply<Outcome>) {
        match self.store.verdict(tx) {
            Ok(Verdict::Open) if self.lost.is_none() => self.waiting.entry(tx).or_default().push(reply),
            verdict => self.answer(reply, verdict.map_err(Error::from).and_then(|verdict| outcome(tx, verdict))),
        }
    }

    fn all_settled(&mut self, reply: Reply<()>) {
        if self.lost.is_some() {
            self.answer(reply, Ok::<_, Error>(()));
        } else if self.last_seq <= self.status.borrow().confirmed_seq {
            let _ = reply.send(Ok(()));
        } else {
            self.waiting_for_all.entry(self.last_seq).or_default().push(reply);
        }
    }

    fn met(&mut self, meeting: Meeting, last_seq: u64) -> Result<Meeting, StoreError> {
        match meeting {
            Meeting::Continue => return Ok(meeting),
            Meeting::WentBack => {
                tracing::warn!(ledger.last_seq = last_seq, "the server went back: submitting again what it lost")
            }
            Meeting::NewIdentity => {
                tracing::warn!(
                    ledger.last_seq = last_seq,
                    "another copy of this store uses its client id: it has a new identity now"
                );
            }
        }
        self.renumbered()?;
        self.settle_by_store()?;
        self.queue_changed();
        Ok(meeting)
    }

    /// Transactions got other numbers: callers that wait for all of them wait for the new numbers.
    fn renumbered(&mut self) -> Result<(), StoreError> {
        self.last_seq = self.store.info()?.last_seq;
        let waiting: Vec<Reply<()>> = std::mem::take(&mut self.waiting_for_all).into_values().flatten().collect();
        self.waiting_for_all.insert(self.last_seq, waiting);
        Ok(())
    }

    fn poll(&mut self) -> Result<(), StoreError> {
        self.polls += 1;
        if self.store.changed_elsewhere()? {
            let _ = self.notices.send(Notice::Any);
            self.refresh()?;
            self.settle_by_store()?;
        }
        if self.polls.is_multiple_of(RETRY_POLLS) && self.status.borrow().failed > 0 && self.store.retry_due()? {
            self.publish();
            self.refresh()?;
        }
        if self.polls.is_multiple_of(MARK_POLLS) && self.status.borrow().pending.count > 0 {
            let (sent, accepted) =
                (self.progress.sent.load(Ordering::Relaxed), self.progress.accepted.load(Ordering::Relaxed));
            if sent > 0 {
                self.store.mark(sent, accepted);
                self.store.flush_marks()?;
            }
        }
        if self.polls % PRUNE_POLLS == 1 {
            let before = SystemHost.now_micros().saturating_sub(self.retention.as_micros() as u64);
            let pruned = self.store.prune(before)?;
            tracing::debug!(queue.pruned = pruned, "pruned settled entries");
        }
        self.tell();
        Ok(())
    }

    /// Brings the status up to the store.
    fn refresh(&mut self) -> Result<(), StoreError> {
        let info = self.store.info()?;
        self.last_seq = info.last_seq;
        let accepted = self.progress.accepted.load(Ordering::Relaxed).min(info.last_seq);
        for aside in &info.set_aside {
            if !self.status.borrow().set_aside.contains(aside) {
                tracing::warn!(
                    aside.kind = aside.kind.as_str(),
                    aside.name = %aside.name,
                    aside.reason = %aside.reason,
                    "something that the app added was set aside"
                );
            }
        }
        self.status.send_modify(|status| {
            status.set_aside = info.set_aside;
            status.client_id = info.client_id;
            status.position = info.position;
            status.has_synced = info.position.is_some();
            status.schema = info.schema;
            status.confirmed_seq = info.confirmed_seq;
            status.failed = info.failed;
            status.held = info.held;
            status.pending.count = info.last_seq.saturating_sub(info.confirmed_seq);
            status.pending.accepted = accepted.saturating_sub(info.confirmed_seq);
            status.pending.oldest_at = info.oldest_pending.map(|at| at / 1_000);
        });
        let open = self.waiting_for_all.split_off(&(info.confirmed_seq + 1));
        for reply in std::mem::replace(&mut self.waiting_for_all, open).into_values().flatten() {
            let _ = reply.send(Ok(()));
        }
        Ok(())
    }

    fn refresh_or_report(&mut self) {
        if self.lost.is_none()
            && let Err(error) = self.refresh()
        {
            self.report(error);
        }
    }

    /// Tells watches of the tables that were written. True: it is not only rows that were.
    fn publish(&mut self) -> bool {
        let tables = self.store.take_written();
        let defined = tables.contains("sqlite_master");
        if !tables.is_empty() {
            // Without a watch nobody listens.
            let _ = self.notices.send(Notice::Tables(Arc::new(tables)));
        }
        defined
    }

    /// Looks at an error of the store, and gives what the app is to hear: damage ends the store, whatever was being done.
    fn examine(&mut self, error: StoreError) -> StoreError {
        if let Some(lost) = self.lost.as_ref().and_then(StoreError::lost) {
            return lost;
        }
        let error = if error.is_damage() { self.store.put_aside(error) } else { error };
        if let Some(lost) = error.lost() {
            self.lose(lost);
        }
        error
    }

    /// The store is of no use any more: everybody hears of it.
    fn lose(&mut self, lost: StoreError) {
        let again = || lost.lost().map_or(Error::Closed, Error::Store);
        tracing::error!(error.code = again().code(), error.message = %lost, "the store is lost");
        if let Some(error) = lost.lost() {
            self.readers.lose(error);
        }
        self.status.send_modify(|status| {
            let message = lost.to_string();
            status.state = State::Damaged;
            status.reason = Some(message.clone());
            status.retry_at = None;
            (status.uploading, status.downloading, status.download) = (false, false, None);
            status.caught_up = false;
            status.last_error = Some(crate::LastError { code: again().code().to_owned(), message });
        });
        for reply in std::mem::take(&mut self.waiting).into_values().flatten() {
            let _ = reply.send(Err(again()));
        }
        for reply in std::mem::take(&mut self.waiting_for_all).into_values().flatten() {
            let _ = reply.send(Err(again()));
        }
        self.lost = Some(lost);
        // Watches ask again, and hear of it too.
        let _ = self.notices.send(Notice::Any);
    }

    fn report(&mut self, error: StoreError) {
        let error = self.examine(error);
        if self.lost.is_none() {
            self.tell_of(&error);
        }
    }

    fn tell_of(&self, error: &StoreError) {
        let message = chain(error);
        tracing::error!(error.message = %message, "the store failed");
        self.status.send_modify(|status| {
            status.last_error = Some(crate::LastError { code: "store".into(), message });
        });
    }

    /// Answers, unless the store is lost: then that is the answer. The asker may have gone.
    fn answer<T, E: Into<Error>>(&mut self, reply: Reply<T>, result: Result<T, E>) {
        let mut result = result.map_err(Into::into);
        if let Err(Error::Store(error)) = result {
            result = Err(self.examine(error).into());
        }
        let lost = self.lost.as_ref().and_then(StoreError::lost);
        let _ = reply.send(match lost {
            Some(lost) => Err(lost.into()),
            None => result,
        });
    }
}

fn outcome(tx: u64, verdict: Verdict) -> Result<Outcome> {
    match verdict {
        Verdict::Open => Ok(Outcome::Applied),
        Verdict::Confirmed(outcome) => Ok(outcome),
        Verdict::Failed(failed) => Err(Error::Rejected {
            tx,
            change_id: failed.change_id,
            code: failed.code.unwrap_or(millstream_schemas::Code::Internal),
            rule: failed.rule,
            message: failed.message,
        }),
    }
}

fn rejected(tx: u64, failure: Failure) -> Error {
    let Failure { change_id, code, rule, message, .. } = failure;
    Error::Rejected { tx, change_id, code, rule, message }
}
