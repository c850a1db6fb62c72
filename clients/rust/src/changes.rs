//! The changes worker: drives the outbox.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use millstream_client_core::outbox::{Entry, Input, Outbox, Output};
use millstream_client_core::status::Status;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::Result;
use crate::bus::{Control, Link, Progress, Sender, Supervised, ToChanges, ToSync, WorkerEnd, WriterCommand};
use crate::error::chain;

/// What was handed to the sync worker and has not reached the socket after this time was lost on the way.
const HANDED_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) struct ChangesWorker {
    pub events: mpsc::Receiver<ToChanges>,
    pub writer: mpsc::Sender<WriterCommand>,
    pub sync: Sender<ToSync>,
    pub status: watch::Sender<Status>,
    pub progress: Arc<Progress>,
    pub control: watch::Receiver<Control>,
}

type Loading = oneshot::Receiver<Result<Vec<Entry>>>;

/// What the worker knows between two turns.
struct Run {
    outbox: Outbox,
    link: Link,
    /// Bounded by the window: the outbox gives out no more until something is accepted.
    sends: VecDeque<ToSync>,
    /// Highest number handed to the sync worker in this session, and when.
    handed: (u64, Instant),
}

impl Supervised for ChangesWorker {
    /// All that it knows comes from the store and from what it is told again and again.
    async fn run(&mut self) -> WorkerEnd {
        let restarts = self.control.borrow().changes_restarts;
        let mut control = self.control.clone();
        let (reply, info) = oneshot::channel();
        if self.writer.send(WriterCommand::Info(reply)).await.is_err() {
            return WorkerEnd::Closed;
        }
        let outbox = match info.await {
            Ok(Ok(info)) => Outbox::new(info.last_seq, info.confirmed_seq),
            Ok(Err(error)) => {
                tracing::warn!(error.message = %chain(&error), "reading the queue failed");
                return WorkerEnd::Restart;
            }
            Err(_) => return WorkerEnd::Closed,
        };
        let start = Instant::now();
        let now = || start.elapsed().as_millis() as u64;
        let mut run = Run { outbox, link: Link::default(), sends: VecDeque::new(), handed: (0, start) };
        let mut loading: Option<Loading> = None;
        loop {
            let wake = run.outbox.poll_timeout().map(|at| start + Duration::from_millis(at));
            let mut inputs = Vec::new();
            tokio::select! {
                biased;
                () = closed(&mut control) => return WorkerEnd::Closed,
                () = raised(&mut self.control, |control| control.changes_restarts, restarts) => return WorkerEnd::Restart,
                event = self.events.recv() => {
                    let Some(event) = event else { return WorkerEnd::Closed };
                    let mut event = Some(event);
                    while let Some(taken) = event {
                        run.take(taken, &mut inputs);
                        event = self.events.try_recv().ok();
                    }
                }
                room = self.sync.ready(), if !run.sends.is_empty() => {
                    if !room {
                        return WorkerEnd::Closed;
                    }
                }
                loaded = answered(&mut loading), if loading.is_some() => {
                    loading = None;
                    let entries = match loaded {
                        Ok(Ok(entries)) => entries,
                        Ok(Err(error)) => {
                            tracing::warn!(error.message = %chain(&error), "reading the queue failed");
                            Vec::new()
                        }
                        Err(_) => return WorkerEnd::Closed,
                    };
                    inputs.push(Input::Loaded(entries));
                }
                () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => inputs.push(Input::Tick),
            }
            for input in inputs {
                for output in run.outbox.handle(input, now()) {
                    match output {
                        Output::Send(entry) => {
                            let (session, confirmed) = (run.link.session, run.outbox.confirmed());
                            run.sends.push_back(ToSync { session, confirmed, entry });
                        }
                        Output::Load { after, limit } => {
                            let (reply, answer) = oneshot::channel();
                            if self.writer.send(WriterCommand::Load { after, limit, reply }).await.is_err() {
                                return WorkerEnd::Closed;
                            }
                            loading = Some(answer);
                        }
                        Output::Mark { sent, accepted } => {
                            self.progress.sent.store(sent, Ordering::Relaxed);
                            self.progress.accepted.store(accepted, Ordering::Relaxed);
                        }
                    }
                }
            }
            while let Some(send) = run.sends.pop_front() {
                let client_seq = send.entry.client_seq;
                if let Err(refused) = self.sync.try_send(send) {
                    run.sends.push_front(refused);
                    break;
                }
                run.handed = (client_seq, Instant::now());
            }
            self.tell(&run.outbox);
        }
    }
}

impl ChangesWorker {
    fn tell(&self, outbox: &Outbox) {
        let (uploading, accepted) = (outbox.is_uploading(), outbox.accepted());
        self.status.send_if_modified(|status| {
            let accepted = accepted.saturating_sub(status.confirmed_seq).min(status.pending.count);
            let changed = status.uploading != uploading || status.pending.accepted != accepted;
            status.uploading = uploading;
            status.pending.accepted = accepted;
            changed
        });
    }
}

impl Run {
    /// Turns an event into inputs; frames that it makes void go.
    fn take(&mut self, event: ToChanges, inputs: &mut Vec<Input>) {
        match event {
            ToChanges::Recorded(entry) => match inputs.last_mut() {
                // What was recorded together is one input.
                Some(Input::Recorded(entries)) => entries.push(entry),
                _ => inputs.push(Input::Recorded(vec![entry])),
            },
            ToChanges::Known { last, confirmed } => {
                inputs.extend([Input::Confirmed { client_seq: confirmed }, Input::Known { last }]);
            }
            ToChanges::Link(link) => self.linked(link, inputs),
        }
    }

    fn linked(&mut self, link: Link, inputs: &mut Vec<Input>) {
        let before = self.link;
        // Older than what is known: within a session, online comes before offline.
        if link.session < before.session || (link.session == before.session && link.online && !before.online) {
            return;
        }
        if link.session != before.session {
            self.sends.clear();
            self.handed = (0, Instant::now());
            self.link = Link { refusals: 0, losses: 0, ..link };
            if link.online {
                inputs.push(Input::Connected { last_seq: link.last_seq, window: link.window });
            }
        }
        if before.online && !link.online {
            self.sends.clear();
            inputs.push(Input::Disconnected);
        }
        if link.online {
            inputs.push(Input::Accepted { client_seq: link.accepted });
            let lost = self.sends.is_empty() && link.sent < self.handed.0 && self.handed.1.elapsed() > HANDED_TIMEOUT;
            let refused = link.refusals > self.link.refusals;
            if refused || lost || link.losses > self.link.losses {
                self.sends.clear();
                self.handed = (0, Instant::now());
                let wait = link.not_before.map(|at| at.saturating_duration_since(Instant::now()));
                let retry_after_ms = wait.filter(|wait| !wait.is_zero()).map(|wait| wait.as_millis() as u64 + 1);
                inputs.push(if refused { Input::Refused { retry_after_ms } } else { Input::Lost });
            }
        }
        self.link = link;
    }
}

async fn answered(loading: &mut Option<Loading>) -> Result<Result<Vec<Entry>>, oneshot::error::RecvError> {
    match loading {
        Some(answer) => answer.await,
        None => std::future::pending().await,
    }
}

/// Resolves when the client is closed or gone.
pub(crate) async fn closed(control: &mut watch::Receiver<Control>) {
    // An error means that the client is gone.
    let _ = control.wait_for(|control| control.closed).await;
}

/// Resolves when a counter is above `known`.
pub(crate) async fn raised(control: &mut watch::Receiver<Control>, counter: fn(&Control) -> u64, known: u64) {
    if control.wait_for(|control| counter(control) > known).await.is_err() {
        // The client is gone: `closed` tells.
        std::future::pending::<()>().await;
    }
}
