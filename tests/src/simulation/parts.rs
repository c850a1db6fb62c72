//! The simulated services, and what each of them holds.

use std::collections::VecDeque;
use std::sync::Arc;

use millstream_edge::for_simulation::{Downlink, Message};
use millstream_schemas::Lsn;
use millstream_schemas::stream::Submission;
use uuid::Uuid;

use super::event::Stored;

#[derive(Default)]
pub struct Broker {
    /// Inbound messages by rising sequence.
    pub inbound: Vec<(u64, Vec<Submission>)>,
    pub last: u64,
    /// Which stream of that name it is.
    pub stream: u64,
    /// Outbound messages; sequence 1 first.
    pub outbound: Vec<Arc<Message>>,
    /// It has lost outbound messages that clients may have seen.
    pub has_lost: bool,
}

pub struct Item {
    pub sequence: u64,
    pub submission: Submission,
    pub last: bool,
}

/// An executor that owns the partition, or believes so.
pub struct Executor {
    pub is_up: bool,
    pub stream: u64,
    pub owner: i64,
    pub position: u64,
    pub handed: u64,
    pub items: VecDeque<Item>,
    pub batch: Option<usize>,
}

#[derive(Default)]
pub struct Replication {
    pub is_up: bool,
    /// The stream and the slot do not fit together: a new epoch has to begin.
    pub is_lost: bool,
    pub epoch: Uuid,
    /// Next commit of the log.
    pub next: usize,
    /// How far the slot is confirmed.
    pub confirmed: Lsn,
}

#[derive(Default)]
pub struct Edge {
    /// Which run of the process.
    pub run: u64,
    pub lane: Vec<Stored>,
    pub publishing: bool,
    /// Outbound messages read.
    pub seen: usize,
}

/// One WebSocket, as the edge and the network know it.
pub struct Session {
    pub edge: usize,
    pub client: usize,
    pub client_id: Uuid,
    pub user: String,
    /// None: not welcomed yet, or ended.
    pub downlink: Option<Downlink>,
    pub is_cut: bool,
    pub ended: bool,
    pub expected: u64,
    pub last_run: Option<Uuid>,
    pub passed_over: Option<u64>,
    /// When the last frame in each direction arrives.
    pub up: u64,
    pub down: u64,
}

impl Session {
    pub fn end(&mut self) {
        self.downlink = None;
        self.ended = true;
    }

    /// Everything has been sent that the stream holds up to here.
    pub fn is_idle(&self, length: usize) -> bool {
        let downlink = self.downlink.as_ref();
        downlink.is_some_and(|d| d.cursor() == length as u64 && !d.waits() && !d.in_bracket())
    }
}
