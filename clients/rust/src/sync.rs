//! The sync worker: the one socket. Connects, and connects again when a session (`session.rs`) has ended.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use millstream_client_core::backoff::{Backoff, HEALTHY_MS};
use millstream_client_core::status::{LastError, Role, State, Status};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep};

use crate::bus::{Control, Link, Sender, Supervised, ToChanges, ToSync, WorkerEnd, WriterCommand};
use crate::changes::{closed, raised};
use crate::error::chain;
use crate::leader;
use crate::socket::{End, Then};
use crate::spans::ApplySpan;
use crate::token::Tokens;

/// Code of the error that there is no token to connect with.
pub(crate) const NO_TOKEN: &str = "token";
/// Code of the error that the store failed.
pub(crate) const STORE: &str = "store";
/// Before a client that the edge refuses for good, or whose token it refuses, asks again, in milliseconds.
const REFUSED_WAIT_MS: u64 = 60_000;
/// How long at least it counts that the store could not take what the edge sent.
const STUCK_MEMORY: Duration = Duration::from_secs(600);
/// Wait before another try of a client whose store cannot take what the edge sends: twice as long each time, up to the second.
const STUCK_WAIT_MS: u64 = 500;
const STUCK_WAIT_MAX_MS: u64 = 3_600_000;
pub(crate) struct SyncWorker {
    pub path: PathBuf,
    pub edge: Option<String>,
    pub tokens: Arc<Tokens>,
    pub auth: Auth,
    pub apply_span: Option<ApplySpan>,
    pub writer: mpsc::Sender<WriterCommand>,
    pub changes: Sender<ToChanges>,
    pub frames: mpsc::Receiver<ToSync>,
    pub status: watch::Sender<Status>,
    pub control: watch::Receiver<Control>,
    /// Where the connection stands.
    pub link: Link,
    /// A frame is missing that has been asked for again.
    pub gap: bool,
    /// When the edge welcomed us, in this session.
    pub welcomed: Option<Instant>,
    /// Rows that a cut snapshot has staged.
    pub cut: u64,
    /// Sessions that ended because the store could not take what came, and until when they count.
    pub stuck: (u32, Instant),
}

/// Which token was refused, and what follows from it.
#[derive(Default)]
pub(crate) struct Auth {
    /// The token of the session under way, or of the last one.
    pub(crate) token: String,
    /// Another one, that the app gave when this one was refused: for the next attempt.
    pub(crate) fresh: Option<String>,
    /// The app was asked for another since a session was healthy or the app set one: so a server that refuses every token is not
    /// asked in a loop.
    renewed: bool,
    /// Tokens that the app has set, as `Control` counts them.
    set: u64,
}

impl Supervised for SyncWorker {
    async fn run(&mut self) -> WorkerEnd {
        let mut control = self.control.clone();
        let restarts = control.borrow().sync_restarts;
        let mut status = self.status.subscribe();
        let ended = tokio::select! {
            ended = self.sync() => ended,
            () = raised(&mut control, |control| control.sync_restarts, restarts) => WorkerEnd::Restart,
            // Nothing works without the store.
            _ = status.wait_for(|status| status.state == State::Damaged) => WorkerEnd::Closed,
        };
        // A session that was cut off has ended.
        if !self.tell(|link| link.online = false).await { WorkerEnd::Closed } else { ended }
    }
}

impl SyncWorker {
    async fn sync(&mut self) -> WorkerEnd {
        let mut control = self.control.clone();
        let Some(edge) = self.edge.clone() else {
            closed(&mut control).await;
            return WorkerEnd::Closed;
        };
        let _leadership = tokio::select! {
            leadership = leader::lead(&self.path) => leadership,
            () = closed(&mut control) => return WorkerEnd::Closed,
        };
        self.status.send_modify(|status| status.role = Role::Leader);
        let start = Instant::now();
        let now = || start.elapsed().as_millis() as u64;
        let mut backoff = Backoff::new();
        loop {
            if control.wait_for(|control| control.closed || !control.paused).await.is_err() || control.borrow().closed {
                return WorkerEnd::Closed;
            }
            let before = control.borrow_and_update().clone();
            self.tell_status(|status| {
                status.state = State::Connecting;
                status.retry_at = None;
                status.caught_up = false;
            });
            self.welcomed = None;
            let mut end = tokio::select! {
                end = self.session(&edge) => end,
                () = interrupted(&mut control, &before, true) => End::new(Then::Interrupted, "interrupted", "the app wanted it"),
            };
            if !self.tell(|link| link.online = false).await || end.then == Then::Gone {
                return WorkerEnd::Closed;
            }
            end = self.unless_stuck(end);
            if end.then == Then::Snapshot
                && self.ask(WriterCommand::ForgetPosition).await.is_err_and(|end| end.then == Then::Gone)
            {
                return WorkerEnd::Closed;
            }
            if let Some(welcomed) = self.welcomed {
                backoff.connected((welcomed - start).as_millis() as u64);
            }
            let before = control.borrow().clone();
            if end.then == Then::Auth && end.code != NO_TOKEN {
                tokio::select! {
                    renewed = self.renew(end, before.tokens) => end = renewed,
                    () = closed(&mut control) => return WorkerEnd::Closed,
                }
            }
            let wait = self.ended(&end, |retry_after| backoff.failed(now(), rand::random(), retry_after));
            if wait > 0 && !before.closed {
                tokio::select! {
                    () = sleep(Duration::from_millis(wait)) => {}
                    () = interrupted(&mut control, &before, false) => backoff.reset(),
                }
            }
        }
    }

    /// A batch that does not apply is answered with a snapshot, once: another one would end the same way.
    fn unless_stuck(&mut self, end: End) -> End {
        if end.code != STORE || !matches!(end.then, Then::Snapshot | Then::Refused) {
            return end;
        }
        let (before, until) = self.stuck;
        let count = if Instant::now() < until { before + 1 } else { 1 };
        // It may pass by itself: the next session sends the whole of a schema that changed meanwhile.
        let wait = (STUCK_WAIT_MS << (count - 1).min(16)).min(STUCK_WAIT_MAX_MS);
        self.stuck = (count, Instant::now() + Duration::from_millis(2 * wait) + STUCK_MEMORY);
        if end.then == Then::Snapshot && count == 1 {
            return end;
        }
        let message = format!(
            "{}. Nothing is lost: what the app writes is recorded and waits. It is tried again now and then, and at once by \
             Client::connect_now; the store's file and this message are what a report needs",
            end.message
        );
        End { then: Then::Refused, message, retry_after_ms: Some(wait), ..end }
    }

    /// The edge refused the token, as `end` says. Once, the app is asked for another, to connect with at once. `set` is how many the
    /// app has set.
    async fn renew(&mut self, end: End, set: u64) -> End {
        self.tokens.refused(&self.auth.token);
        let healthy = self.welcomed.is_some_and(|since| since.elapsed() >= Duration::from_millis(HEALTHY_MS));
        if healthy || std::mem::replace(&mut self.auth.set, set) != set {
            self.auth.renewed = false;
        }
        if std::mem::replace(&mut self.auth.renewed, true) {
            return end;
        }
        match self.tokens.get().await {
            Ok(token) if token != self.auth.token => {
                self.auth.fresh = Some(token);
                End { then: Then::Now, ..end }
            }
            Ok(_) => end,
            Err(error) => {
                let message = format!("{}: {}; and for another token: {}", end.code, end.message, chain(&*error));
                End::new(Then::Auth, NO_TOKEN, message)
            }
        }
    }

    /// Tells the changes worker where the connection stands now. False: the client is gone.
    pub(crate) async fn tell(&mut self, change: impl FnOnce(&mut Link)) -> bool {
        change(&mut self.link);
        self.changes.send(ToChanges::Link(self.link)).await
    }

    /// Changes the status, unless the store is lost: that stays.
    pub(crate) fn tell_status(&self, change: impl FnOnce(&mut Status)) {
        self.status.send_if_modified(|status| {
            let told = status.state != State::Damaged;
            if told {
                change(status);
            }
            told
        });
    }

    /// Tells of the end of a session; gives the wait before the next, in milliseconds.
    fn ended(&self, end: &End, mut backoff: impl FnMut(Option<u64>) -> u64) -> u64 {
        let wait = match end.then {
            Then::Again | Then::Snapshot => backoff(end.retry_after_ms),
            // No connection was tried.
            Then::Auth if end.code == NO_TOKEN => backoff(None),
            Then::Auth | Then::Refused => backoff(Some(end.retry_after_ms.unwrap_or(REFUSED_WAIT_MS))),
            Then::Now | Then::Interrupted | Then::Gone => 0,
        };
        if matches!(end.then, Then::Now | Then::Interrupted) {
            tracing::debug!(session.end = %end.message, "session ended");
        } else {
            tracing::info!(session.end = %end.message, error.code = %end.code, retry.wait_ms = wait, "session ended");
        }
        self.tell_status(|status| {
            status.state = match end.then {
                Then::Auth => State::NeedsAuth,
                Then::Refused => State::Error,
                _ => State::Offline,
            };
            status.reason = Some(end.message.clone());
            status.retry_at = (wait > 0).then(|| wall_ms() + wait);
            status.uploading = false;
            (status.downloading, status.download) = (false, None);
            status.caught_up = false;
            status.reconnects += u64::from(self.welcomed.is_some());
            if !matches!(end.then, Then::Now | Then::Interrupted) {
                status.last_error = Some(LastError { code: end.code.clone(), message: end.message.clone() });
            }
        });
        wait
    }
}

/// Resolves when the app wants something else than before; `session`: also when it wants the socket cut.
async fn interrupted(control: &mut watch::Receiver<Control>, before: &Control, session: bool) {
    let wants = |control: &Control| {
        control.closed
            || control.paused != before.paused
            || (session && control.cuts != before.cuts)
            || (!session && (control.kicks != before.kicks || control.tokens != before.tokens))
    };
    // An error means that the client is gone.
    let _ = control.wait_for(wants).await;
}

fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}
