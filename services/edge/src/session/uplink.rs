//! What a client submits: in order, within its window and its user's share, into the lane.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use millstream_runtime::telemetry;
use millstream_schemas::Code;
use millstream_schemas::frame::{ErrorFrame, MAX_FRAME_BYTES, SUBMIT_WINDOW, ServerFrame, Submit};
use millstream_schemas::stream::Submission;
use uuid::Uuid;

use super::wire::Wire;
use super::{End, RETRY_MS, Session};
use crate::lane::Item;

/// Most that a session has submitted and that is not known to be settled: changes, and bytes. The rest waits at the client, not
/// before the changes of others.
const UNSETTLED_CHANGES: usize = 10_000;
const UNSETTLED_BYTES: usize = 4 << 20;
/// A client that sends on while it is told to wait is not read for at most this time.
const DEAF: Duration = Duration::from_secs(1);

/// Submissions that were forwarded and are not known to be settled.
#[derive(Default)]
pub(super) struct Unsettled {
    /// `client_seq`, changes, bytes.
    submissions: VecDeque<(u64, usize, usize)>,
    changes: usize,
    bytes: usize,
}

impl Unsettled {
    fn push(&mut self, client_seq: u64, changes: usize, bytes: usize) {
        self.submissions.push_back((client_seq, changes, bytes));
        self.changes += changes;
        self.bytes += bytes;
    }

    fn settled(&mut self, upto: u64) {
        while let Some((_, changes, bytes)) = self.submissions.pop_front_if(|(client_seq, ..)| *client_seq <= upto) {
            self.changes -= changes;
            self.bytes -= bytes;
        }
    }

    /// Whether there is room for one more. The first always fits.
    fn fits(&self, changes: usize, bytes: usize) -> bool {
        self.submissions.is_empty()
            || (self.changes + changes <= UNSETTLED_CHANGES && self.bytes + bytes <= UNSETTLED_BYTES)
    }
}

impl Session {
    pub(super) async fn submit(&mut self, wire: &mut Wire, submit: Submit) -> Result<(), End> {
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
        let item = Item { submission: encoded, client_seq, stored: self.stored.0.clone() };
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_under_way_is_bounded_and_the_first_always_fits() {
        let mut unsettled = Unsettled::default();
        assert!(unsettled.fits(UNSETTLED_CHANGES + 1, UNSETTLED_BYTES + 1));
        unsettled.push(1, UNSETTLED_CHANGES - 1, 10);
        assert!(unsettled.fits(1, 10) && !unsettled.fits(2, 10) && !unsettled.fits(1, UNSETTLED_BYTES - 9));
        unsettled.push(2, 1, UNSETTLED_BYTES - 10);
        assert!(!unsettled.fits(1, 1));
        unsettled.settled(1);
        assert!(unsettled.fits(5, 10) && !unsettled.fits(5, 11));
        unsettled.settled(7);
        assert_eq!((unsettled.changes, unsettled.bytes, unsettled.submissions.len()), (0, 0, 0));
    }
}
