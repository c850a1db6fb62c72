//! The changes worker: drives the outbox.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use millstream_client_core::outbox::{Entry, Input, Outbox, Output};
use millstream_client_core::status::Status;
use millstream_client_store::Recorded;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use crate::Result;
use crate::bus::{Control, Progress, ToChanges, ToSync, WriterCommand};

pub(crate) struct ChangesWorker {
    pub events: mpsc::Receiver<ToChanges>,
    pub writer: mpsc::Sender<WriterCommand>,
    pub sync: mpsc::Sender<ToSync>,
    pub status: watch::Sender<Status>,
    pub progress: Arc<Progress>,
    pub control: watch::Receiver<Control>,
    pub outbox: Outbox,
}

type Loading = oneshot::Receiver<Result<Vec<Recorded>>>;

impl ChangesWorker {
    /// Runs until the client is closed or gone.
    pub async fn run(mut self) {
        let start = Instant::now();
        let now = || start.elapsed().as_millis() as u64;
        let mut session = 0;
        // Bounded by the window: the outbox gives out no more until something is accepted.
        let mut sends: VecDeque<ToSync> = VecDeque::new();
        let mut loading: Option<Loading> = None;
        loop {
            let wake = self.outbox.poll_timeout().map(|at| start + Duration::from_millis(at));
            let mut inputs = Vec::new();
            tokio::select! {
                biased;
                () = closed(&mut self.control) => return,
                event = self.events.recv() => {
                    let Some(event) = event else { return };
                    let mut event = Some(event);
                    while let Some(taken) = event {
                        take(taken, &mut session, &mut sends, &mut inputs);
                        event = self.events.try_recv().ok();
                    }
                }
                permit = self.sync.reserve(), if !sends.is_empty() => {
                    let Ok(permit) = permit else { return };
                    if let Some(send) = sends.pop_front() {
                        permit.send(send);
                    }
                    while let Some(send) = sends.pop_front() {
                        if let Err(refused) = self.sync.try_send(send) {
                            sends.push_front(refused.into_inner());
                            break;
                        }
                    }
                }
                loaded = answered(&mut loading), if loading.is_some() => {
                    loading = None;
                    let recorded = match loaded {
                        Ok(Ok(recorded)) => recorded,
                        Ok(Err(error)) => {
                            tracing::warn!(error.message = %error, "reading the queue failed");
                            Vec::new()
                        }
                        Err(_) => return,
                    };
                    inputs.push(Input::Loaded(recorded.into_iter().map(|r| Entry { seq: r.seq, text: r.text }).collect()));
                }
                () = tokio::time::sleep_until(wake.unwrap_or_else(Instant::now)), if wake.is_some() => inputs.push(Input::Tick),
            }
            for input in inputs {
                for output in self.outbox.handle(input, now()) {
                    match output {
                        Output::Send(entry) => sends.push_back(ToSync { session, text: entry.text }),
                        Output::Load { after, limit } => {
                            let (reply, answer) = oneshot::channel();
                            if self.writer.send(WriterCommand::Load { after, limit, reply }).await.is_err() {
                                return;
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
            // The common case does not wait for another turn.
            while let Some(send) = sends.pop_front() {
                if let Err(refused) = self.sync.try_send(send) {
                    sends.push_front(refused.into_inner());
                    break;
                }
            }
            self.tell();
        }
    }

    fn tell(&self) {
        let (uploading, accepted) = (self.outbox.is_uploading(), self.outbox.accepted());
        self.status.send_if_modified(|status| {
            let accepted = accepted.saturating_sub(status.confirmed_seq).min(status.pending.count);
            let changed = status.uploading != uploading || status.pending.accepted != accepted;
            status.uploading = uploading;
            status.pending.accepted = accepted;
            changed
        });
    }
}

/// Turns an event into inputs; frames that it makes void go.
fn take(event: ToChanges, session: &mut u64, sends: &mut VecDeque<ToSync>, inputs: &mut Vec<Input>) {
    match event {
        ToChanges::Recorded(entry) => match inputs.last_mut() {
            // What was recorded together is one input.
            Some(Input::Recorded(entries)) => entries.push(entry),
            _ => inputs.push(Input::Recorded(vec![entry])),
        },
        ToChanges::Known { last, confirmed } => {
            inputs.extend([Input::Confirmed { seq: confirmed }, Input::Known { last }]);
        }
        ToChanges::Connected { session: new, last_seq, window } => {
            *session = new;
            sends.clear();
            inputs.push(Input::Connected { last_seq, window });
        }
        ToChanges::Disconnected => {
            sends.clear();
            inputs.push(Input::Disconnected);
        }
        ToChanges::Accepted { seq } => inputs.push(Input::Accepted { seq }),
        ToChanges::Confirmed { seq } => inputs.push(Input::Confirmed { seq }),
        ToChanges::Refused { retry_after_ms } => {
            sends.clear();
            inputs.push(Input::Refused { retry_after_ms });
        }
    }
}

async fn answered(loading: &mut Option<Loading>) -> Result<Result<Vec<Recorded>>, oneshot::error::RecvError> {
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
