//! What is sent when: the upload as a state machine without I/O.
//!
//! The store holds every local transaction until it is confirmed; the outbox only decides which of them are to be sent
//! now. It sends in the order of `client_seq`, several in flight up to the server's window, and goes on after a cut at
//! the server's ledger. It may send a transaction again at any time: the ledger tells repetitions.
//!
//! Entries in memory are a cache of the store. Whatever does not fit is left there and asked for by [`Output::Load`].

use std::collections::VecDeque;

use crate::backoff::RETRY_AFTER_CAP_MS;

/// Most entries kept ready in memory.
pub const READY_ENTRIES: usize = 512;
/// Most bytes of entries kept ready in memory.
pub const READY_BYTES: usize = 4 * 1024 * 1024;
/// Nothing accepted for this long while something is in flight: send again (milliseconds).
pub const ACCEPT_STALL_MS: u64 = 15_000;
/// Nothing confirmed for this long while something is accepted: send again (milliseconds). The broker may have lost what
/// it accepted, and then the executor waits for the gap to be filled. Doubles up to [`CONFIRM_STALL_CAP_MS`].
pub const CONFIRM_STALL_MS: u64 = 30_000;
/// Longest wait between such repetitions (milliseconds).
pub const CONFIRM_STALL_CAP_MS: u64 = 480_000;
/// Wait before the store is asked again when it had nothing (milliseconds): a confirmation is about to explain it.
pub const LOAD_RETRY_MS: u64 = 500;
/// Wait after a refusal that names no time (milliseconds).
pub const REFUSED_MS: u64 = 1_000;

/// A transaction ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// `client_seq`.
    pub client_seq: u64,
    /// The encoded `submit` frame.
    pub text: String,
}

/// What happens to the outbox.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A session began.
    Connected {
        /// Last `client_seq` in the server's ledger.
        last_seq: u64,
        /// Most transactions submitted and not accepted.
        window: u32,
    },
    /// The session ended.
    Disconnected,
    /// Transactions were recorded by this process, in order. May be lost or repeated: [`Input::Known`] makes up for it.
    Recorded(Vec<Entry>),
    /// The store holds transactions up to this one.
    Known {
        /// Highest `client_seq` in the store.
        last: u64,
    },
    /// Answer to [`Output::Load`], by rising `client_seq`; empty when the store could not be read.
    Loaded(Vec<Entry>),
    /// The broker has everything up to `client_seq`.
    Accepted {
        /// Highest `client_seq` stored.
        client_seq: u64,
    },
    /// Everything up to `client_seq` is settled, and the store knows it.
    Confirmed {
        /// Highest settled `client_seq`.
        client_seq: u64,
    },
    /// The edge refused a submission without ending the session: nothing more is sent for a while, and then everything from
    /// the first one that is not accepted. The pause outlives the session.
    Refused {
        /// The least wait (milliseconds), up to [`RETRY_AFTER_CAP_MS`].
        retry_after_ms: Option<u64>,
    },
    /// A frame was lost on the way to the socket: send again from the first one that is not accepted.
    Lost,
    /// Time passed.
    Tick,
}

/// What the caller does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send this frame.
    Send(Entry),
    /// Read unsettled transactions after `after` from the store and answer with [`Input::Loaded`].
    Load {
        /// `client_seq` before the first.
        after: u64,
        /// At most so many.
        limit: usize,
    },
    /// For the store's record of states, whenever it next writes.
    Mark {
        /// Sent up to here.
        sent: u64,
        /// Accepted up to here.
        accepted: u64,
    },
}

/// The state machine. Times are milliseconds of any clock that does not go backwards.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Window of the session, if there is one.
    online: Option<u64>,
    /// Next to be sent.
    next: u64,
    accepted: u64,
    confirmed: u64,
    /// Highest in the store, as far as known.
    last: u64,
    /// Consecutive entries from `next` on.
    ready: VecDeque<Entry>,
    ready_bytes: usize,
    loading: bool,
    /// The store had nothing for us: do not ask again before this.
    load_after: Option<u64>,
    /// The edge refused something: nothing is sent before this, and then from the first one that is not accepted.
    paused_until: Option<u64>,
    accept_progress: u64,
    confirm_progress: u64,
    confirm_stall: u64,
}

impl Outbox {
    /// An outbox over a store that holds transactions up to `last` and knows those up to `confirmed` to be settled.
    pub fn new(last: u64, confirmed: u64) -> Self {
        Outbox {
            last,
            confirmed,
            accepted: confirmed,
            next: confirmed + 1,
            confirm_stall: CONFIRM_STALL_MS,
            ..Self::default()
        }
    }

    /// Sent and not accepted.
    pub fn in_flight(&self) -> u64 {
        if self.online.is_some() { (self.next - 1).saturating_sub(self.accepted) } else { 0 }
    }

    /// Highest accepted `client_seq`.
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Highest settled `client_seq`.
    pub fn confirmed(&self) -> u64 {
        self.confirmed
    }

    /// Whether there is something to send or in flight.
    pub fn is_uploading(&self) -> bool {
        self.online.is_some() && self.accepted < self.last
    }

    /// When [`Input::Tick`] is wanted.
    pub fn poll_timeout(&self) -> Option<u64> {
        self.online?;
        let accept = (self.in_flight() > 0).then_some(self.accept_progress + ACCEPT_STALL_MS);
        let confirm = (self.accepted > self.confirmed).then_some(self.confirm_progress + self.confirm_stall);
        [self.paused_until, self.load_after, accept, confirm].into_iter().flatten().min()
    }

    /// Takes an input; the outputs are to be done in their order.
    pub fn handle(&mut self, input: Input, now_ms: u64) -> Vec<Output> {
        let mut outputs = Vec::new();
        match input {
            Input::Connected { last_seq, window } => {
                self.online = Some(u64::from(window.max(1)));
                // What the ledger has is taken into account; its confirmation comes with the rows.
                self.accepted = last_seq;
                self.confirmed = self.confirmed.min(last_seq);
                self.last = self.last.max(last_seq);
                self.confirm_stall = CONFIRM_STALL_MS;
                self.accept_progress = now_ms;
                self.confirm_progress = now_ms;
                self.go_back_to(last_seq + 1);
            }
            Input::Disconnected => {
                self.online = None;
                self.clear_ready();
            }
            Input::Recorded(entries) => self.recorded(entries),
            // The store's word: after it took another identity there may be less than there was.
            Input::Known { last } => self.last = last,
            Input::Loaded(entries) => {
                self.loading = false;
                self.loaded(entries);
                if self.ready.is_empty() {
                    self.load_after = Some(now_ms + LOAD_RETRY_MS);
                }
            }
            Input::Accepted { client_seq } => {
                // Beyond what was sent would be a server's mistake; it must not make us skip anything.
                let client_seq = client_seq.min(self.next - 1);
                if client_seq > self.accepted {
                    if self.accepted <= self.confirmed {
                        self.confirm_progress = now_ms;
                    }
                    self.accepted = client_seq;
                    self.accept_progress = now_ms;
                    outputs.push(self.mark());
                }
            }
            Input::Confirmed { client_seq } => {
                if client_seq > self.confirmed {
                    self.confirmed = client_seq;
                    self.confirm_progress = now_ms;
                    self.confirm_stall = CONFIRM_STALL_MS;
                    if client_seq > self.accepted {
                        self.accepted = client_seq;
                        self.accept_progress = now_ms;
                    }
                    if client_seq >= self.next {
                        self.go_back_to(client_seq + 1);
                    }
                }
            }
            Input::Refused { retry_after_ms } => {
                // The server also refuses the transactions in flight behind the refused one, because of the gap, and names no
                // time for them. Such a refusal must neither lengthen nor shorten the pause.
                let until = match (self.paused_until, retry_after_ms) {
                    (Some(until), None) if until > now_ms => until,
                    (until, wait) => {
                        let wait = wait.unwrap_or(REFUSED_MS).min(RETRY_AFTER_CAP_MS);
                        until.unwrap_or(0).max(now_ms + wait)
                    }
                };
                self.paused_until = Some(until);
            }
            Input::Lost => self.go_back_to(self.accepted + 1),
            Input::Tick => self.tick(now_ms),
        }
        self.advance(now_ms, &mut outputs);
        outputs
    }

    fn mark(&self) -> Output {
        Output::Mark { sent: self.next - 1, accepted: self.accepted }
    }

    fn clear_ready(&mut self) {
        self.ready.clear();
        self.ready_bytes = 0;
        // A load under way was asked for by an earlier state; its answer is checked when it comes.
        self.loading = false;
        self.load_after = None;
    }

    fn go_back_to(&mut self, next: u64) {
        self.next = next;
        self.clear_ready();
    }

    fn push(&mut self, entry: Entry) -> bool {
        let follows = entry.client_seq == self.next + self.ready.len() as u64;
        let fits = self.ready.len() < READY_ENTRIES
            && (self.ready.is_empty() || self.ready_bytes + entry.text.len() <= READY_BYTES);
        if follows && fits {
            self.ready_bytes += entry.text.len();
            self.ready.push_back(entry);
        }
        follows && fits
    }

    fn recorded(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            self.last = self.last.max(entry.client_seq);
            if self.online.is_some() && !self.loading && self.push(entry) {
                self.load_after = None;
            }
        }
    }

    fn loaded(&mut self, entries: Vec<Entry>) {
        for entry in entries {
            self.last = self.last.max(entry.client_seq);
            if self.online.is_some() && entry.client_seq >= self.next + self.ready.len() as u64 && !self.push(entry) {
                break;
            }
        }
    }

    fn tick(&mut self, now_ms: u64) {
        if self.online.is_none() {
            return;
        }
        if self.in_flight() > 0 && now_ms >= self.accept_progress + ACCEPT_STALL_MS {
            self.accept_progress = now_ms;
            self.go_back_to(self.accepted + 1);
        }
        if self.accepted > self.confirmed && now_ms >= self.confirm_progress + self.confirm_stall {
            self.confirm_progress = now_ms;
            self.confirm_stall = (self.confirm_stall * 2).min(CONFIRM_STALL_CAP_MS);
            self.accepted = self.confirmed;
            self.go_back_to(self.confirmed + 1);
        }
    }

    fn advance(&mut self, now_ms: u64, outputs: &mut Vec<Output>) {
        let Some(window) = self.online else { return };
        if let Some(until) = self.paused_until {
            if now_ms < until {
                return;
            }
            // Only now: what was accepted during the pause is not sent again.
            self.paused_until = None;
            self.accept_progress = now_ms;
            self.go_back_to(self.accepted + 1);
        }
        if self.in_flight() == 0 {
            self.accept_progress = now_ms;
        }
        let before = self.next;
        while self.in_flight() < window
            && let Some(entry) = self.ready.pop_front()
        {
            self.ready_bytes -= entry.text.len();
            self.next += 1;
            outputs.push(Output::Send(entry));
        }
        if self.next > before {
            outputs.push(self.mark());
        }
        let may_load = !self.loading && self.load_after.is_none_or(|after| now_ms >= after);
        if self.ready.is_empty() && may_load && self.next <= self.last && self.in_flight() < window {
            self.load_after = None;
            self.loading = true;
            outputs.push(Output::Load { after: self.next - 1, limit: READY_ENTRIES });
        }
    }
}

#[cfg(test)]
#[path = "outbox_tests.rs"]
mod tests;
