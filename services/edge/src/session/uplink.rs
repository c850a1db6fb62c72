//! What a client submits: in order, within its window and its user's share, into the lane.

use std::time::{Duration, Instant};

use millstream_runtime::telemetry;
use millstream_schemas::Code;
use millstream_schemas::frame::{ErrorFrame, MAX_FRAME_BYTES, SUBMIT_WINDOW, ServerFrame, Submit};
use millstream_schemas::stream::{Submission, TransactionResult};
use uuid::Uuid;

use super::end::{End, RETRY_MS};
use super::state::Session;
use super::text;
use super::wire::{Socket, SocketError, Wire};
use crate::lane::Queued;
use crate::snapshot::Snapshot;

/// Refused frames after which a client is cut.
const MAX_REFUSALS: u32 = 100;
/// A client that sends on while it is told to wait is not read for at most this time.
const DEAF: Duration = Duration::from_secs(1);

impl Session {
    /// Takes what the client says.
    pub(super) async fn heard(
        &mut self,
        wire: &mut Wire,
        frame: Option<Result<Socket, SocketError>>,
    ) -> Result<(), End> {
        let text = match frame {
            Some(Ok(Socket::Text(text))) => text,
            Some(Ok(Socket::Ping(_) | Socket::Pong(_))) => return Ok(()),
            Some(Ok(Socket::Binary(_))) => {
                return self.refuse(wire, Code::BadFrame, "frames are JSON texts".to_owned(), None).await;
            }
            Some(Err(SocketError::Capacity(_))) => {
                return Err(End::fatal(Code::TooLarge, format!("a frame is far over {MAX_FRAME_BYTES} bytes")));
            }
            Some(Ok(Socket::Close(_) | Socket::Frame(_)) | Err(_)) | None => return Err(End::Gone),
        };
        match text::submit(&text) {
            Ok(submit) => self.submit(wire, submit).await,
            Err(refused) if refused.code == Code::OutOfOrder => Err(End::fatal(refused.code, refused.message)),
            Err(refused) => self.refuse(wire, refused.code, refused.message, refused.client_seq).await,
        }
    }

    /// The broker has what was forwarded up to this number, or further.
    pub(super) async fn stored(&mut self, wire: &mut Wire, client_seq: u64) -> Result<(), End> {
        let mut highest = client_seq;
        while let Ok(client_seq) = self.stored.1.try_recv() {
            highest = highest.max(client_seq);
        }
        self.accepted = self.accepted.max(highest);
        wire.own(ServerFrame::Accepted { client_seq: highest }).await
    }

    /// Verdicts that the executor has published.
    pub(super) async fn told(&mut self, wire: &mut Wire, first: TransactionResult) -> Result<(), End> {
        let mut results = vec![first];
        while let Ok(result) = self.results.try_recv() {
            results.push(result);
        }
        if !self.is_bound {
            let now = Snapshot::begin(&self.edge.pool).await.map_err(|error| End::unavailable(&error))?;
            Box::pin(self.bind(now)).await?;
        }
        if self.is_bound { wire.own(ServerFrame::Results { results }).await } else { Ok(()) }
    }

    async fn submit(&mut self, wire: &mut Wire, submit: Submit) -> Result<(), End> {
        let client_seq = submit.client_seq;
        // What was confirmed meanwhile came by another session; the client goes on behind it.
        if self.downlink.confirmed() >= self.expected {
            self.expected = self.downlink.confirmed() + 1;
            self.last_run = self.downlink.confirmed_run();
        }
        if client_seq > self.expected {
            // Said once for each run of numbers: those under way behind a refusal follow from it.
            if self.passed_over.replace(client_seq) == Some(client_seq - 1) {
                return Ok(());
            }
            let message = format!("client_seq {client_seq} leaves a gap: {} comes next", self.expected);
            return self.refuse(wire, Code::Gap, message, Some(self.expected)).await;
        }
        if client_seq == self.expected
            && let Some(last) = self.last_run
            && !follows(&submit, last)
        {
            // The ledger would skip it without a word. Its next welcome says what the client needs to know.
            return Err(wrong_previous(client_seq, last));
        }
        let run_id = submit.run_id;
        let span = tracing::info_span!("submit", client = %self.client_id, client_seq);
        telemetry::set_client_parent(&span, submit.traceparent.as_deref());
        let submission = Submission {
            client_id: self.client_id,
            user_id: self.user_id.clone(),
            client_seq,
            attempt: submit.attempt,
            run_id: submit.run_id,
            previous: submit.previous,
            after: submit.after,
            changes: submit.changes,
            traceparent: span.in_scope(telemetry::traceparent).or(submit.traceparent.map(telemetry::unsampled)),
        };
        let encoded = serde_json::to_vec(&submission)
            .map_err(|error| End::fatal(Code::Internal, format!("the submission cannot be encoded: {error}")))?;
        if encoded.len() > millstream_schemas::stream::MAX_MESSAGE_BYTES {
            let message =
                format!("the transaction has {} bytes on the broker; the limit is {MAX_FRAME_BYTES}", encoded.len());
            return self.refuse(wire, Code::TooLarge, message, Some(client_seq)).await;
        }
        let (changes, bytes) = (submission.changes.len(), encoded.len());
        if let Some(wait) = self.over_share(client_seq, changes, bytes) {
            // What comes before then is not read: a client that keeps to what it is told sends nothing.
            self.deaf_until = Some(Instant::now() + wait.min(DEAF));
            return self.overloaded(wire, client_seq, wait, "more is submitted than this user's share").await;
        }
        let item = Queued { submission: encoded, client_seq, stored: self.stored.0.clone() };
        if self.edge.lanes.submit(self.client_id, item).is_err() {
            let wait = Duration::from_millis(RETRY_MS);
            return self.overloaded(wire, client_seq, wait, "too many changes wait for the broker").await;
        }
        if client_seq == self.expected {
            self.unsettled.push(client_seq, changes, bytes);
            self.expected = client_seq + 1;
            self.last_run = Some(run_id);
        }
        self.passed_over = None;
        Ok(())
    }

    pub(super) async fn refuse(
        &mut self,
        wire: &mut Wire,
        code: Code,
        message: String,
        client_seq: Option<u64>,
    ) -> Result<(), End> {
        self.refusals += 1;
        if self.refusals > MAX_REFUSALS {
            return Err(End::fatal(code, format!("{MAX_REFUSALS} frames were refused; the last: {message}")));
        }
        wire.own(ServerFrame::Error(ErrorFrame { code, message, client_seq, retry_after_ms: None, fatal: false })).await
    }

    async fn overloaded(&mut self, wire: &mut Wire, client_seq: u64, wait: Duration, what: &str) -> Result<(), End> {
        self.passed_over = Some(client_seq);
        let frame = ErrorFrame {
            code: Code::Overloaded,
            message: format!("{what}; send again from this client_seq"),
            client_seq: Some(client_seq),
            retry_after_ms: Some(u64::try_from(wait.as_millis()).unwrap_or(u64::MAX).max(1)),
            fatal: false,
        };
        wire.own(ServerFrame::Error(frame)).await
    }

    /// How long a submission has to wait, if it is over what the client or its user may have under way.
    fn over_share(&mut self, client_seq: u64, changes: usize, bytes: usize) -> Option<Duration> {
        self.unsettled.settled(self.downlink.confirmed());
        if client_seq > self.accepted + u64::from(SUBMIT_WINDOW) || !self.unsettled.fits(changes, bytes) {
            return Some(Duration::from_millis(RETRY_MS));
        }
        self.place.submit(changes, bytes).err()
    }
}

/// Resolves when the client is read again; never, if it is read.
pub(super) async fn deaf(until: Option<Instant>) {
    match until {
        Some(until) => tokio::time::sleep_until(until.into()).await,
        None => std::future::pending().await,
    }
}

/// The ledger's rule: the run of the store that submitted the transaction before goes on, or this one knows of it.
fn follows(submit: &Submit, last: Uuid) -> bool {
    submit.run_id == last || submit.previous == Some(last)
}

fn wrong_previous(client_seq: u64, last: Uuid) -> End {
    let message = format!(
        "client_seq {client_seq} comes after a transaction of run {last}, which must be its `run_id` or its `previous`; connect again \
         and compare the queue with `welcome.runs`"
    );
    let code = Code::WrongPrevious;
    End::Fatal(ErrorFrame { code, message, client_seq: Some(client_seq), retry_after_ms: None, fatal: true })
}
