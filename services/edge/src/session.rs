//! One WebSocket: the shell around the downlink and the lanes. The files below it know one another in this order:
//! `state`, `visible`, `uplink`, `send`, `join`, `feed`, `open`, `behind`; none of them knows this one.

mod behind;
mod end;
mod feed;
mod join;
mod open;
mod send;
mod state;
pub mod text;
mod unsettled;
mod uplink;
mod visible;
mod wire;

use std::sync::Arc;
use std::time::{Duration, Instant};

use millstream_schemas::Code;
use millstream_schemas::frame::{Hello, ServerFrame};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use self::end::End;
use self::state::{PUMP, Session};
use self::uplink::deaf;
use self::wire::{PING_INTERVAL, Wire};
pub use self::wire::{UNSENT_KIB, upgrade};
use crate::downlink::Out;
use crate::edge::Edge;
use crate::hub::FellBehind;
use crate::shares::Admission;

/// Such batches handled before the socket is looked at again.
const PUMP_BATCHES: usize = 16;
/// How long a client may take for the last words of a session.
const GOODBYE: Duration = Duration::from_secs(5);

/// Serves a WebSocket until it ends. `admission` is its place among sockets of strangers.
pub async fn serve(edge: Arc<Edge>, mut wire: Wire, admission: Admission) {
    let said = tokio::select! {
        said = open::hello(&edge, &mut wire) => said,
        () = admission.is_over() => Err(End::Gone),
    };
    let end = match said {
        Ok((hello, identity)) => {
            drop(admission);
            let (user_id, issued) = (identity.user_id.clone(), identity.issued);
            let right = async {
                tokio::select! {
                    () = tokio::time::sleep(identity.left) =>
                        End::fatal(Code::NeedsAuth, "the token has run out; connect with a new one"),
                    () = edge.evictions.wait(&user_id, issued) =>
                        End::fatal(Code::NeedsAuth, "an operator ended this user's sessions; sign in again"),
                }
            };
            // Whatever the session is at: its right ends it.
            tokio::select! {
                end = session(&edge, &mut wire, hello, identity.user_id) => end,
                end = right => end,
            }
        }
        Err(end) => end,
    };
    if let End::Fatal(frame) = end {
        let close = match frame.code {
            Code::TooLarge => CloseCode::Size,
            Code::ShuttingDown => CloseCode::Restart,
            Code::Unavailable | Code::Overloaded | Code::SlowConsumer | Code::EpochChanged | Code::SchemaChanged => {
                CloseCode::Again
            }
            _ => CloseCode::Policy,
        };
        let reason = frame.code.as_str();
        let goodbye = async {
            // Within a text that was given up half-way, only a control frame can follow.
            if wire.is_whole() {
                let _ = wire.send(&[Out::Own(ServerFrame::Error(frame))]).await;
            }
            let _ = wire.close(close, reason).await;
        };
        let _ = tokio::time::timeout(GOODBYE, goodbye).await;
    }
}

async fn session(edge: &Arc<Edge>, wire: &mut Wire, hello: Hello, user_id: String) -> End {
    let place = match edge.shares.enter(&user_id) {
        Ok(place) => {
            wire.trust(place.unsent.clone(), hello.credit);
            place
        }
        Err(wait) => return End::overloaded(wait, "this user has too many sessions, or opens them too often"),
    };
    // What is rare is boxed: a session keeps room for the largest of its futures for as long as it lives.
    match Box::pin(open::open(edge, wire, hello, user_id, place)).await {
        Ok(mut session) => {
            tracing::debug!(session = %session.id, client = %session.client_id, "session opened");
            let end = session.run(wire).await;
            tracing::debug!(session = %session.id, "session ended");
            end
        }
        Err(end) => end,
    }
}

impl Session {
    /// Sends what the ring holds behind the cursor.
    async fn pump(&mut self, wire: &mut Wire) -> Result<(), End> {
        if self.start.is_some() && !Box::pin(self.begin(wire)).await? {
            return Ok(());
        }
        let mut batch = Vec::new();
        for _ in 0..PUMP_BATCHES {
            batch.clear();
            if self.membership.read(self.downlink.cursor(), PUMP, &mut batch) == Err(FellBehind) {
                Box::pin(self.fell_behind(wire)).await?;
                continue;
            }
            for message in &batch {
                self.feed(wire, message).await?;
            }
            self.downlink.settle(&mut self.out);
            self.flush_live(wire).await?;
            if self.downlink.is_cut() && self.out.is_empty() {
                return Err(End::retry(Code::Unavailable, "there are more failures to tell: connect again"));
            }
            // Until nothing is left, not until a batch is short: a scope joined meanwhile was not woken for before.
            if batch.is_empty() {
                return Ok(());
            }
            if self.edge.hub.newest_move() > self.looked.max(self.downlink.cursor()) {
                Box::pin(self.still_holds()).await?;
            }
        }
        // The socket gets its turn; then on.
        self.membership.wake.notify_one();
        Ok(())
    }

    async fn run(&mut self, wire: &mut Wire) -> End {
        match self.steps(wire).await {
            Ok(()) => End::Gone,
            Err(end) => end,
        }
    }

    async fn steps(&mut self, wire: &mut Wire) -> Result<(), End> {
        let mut watermarks = self.edge.watermarks.subscribe();
        let mut waiting = None;
        let mut ticks = tokio::time::interval(PING_INTERVAL);
        ticks.tick().await;
        let wake = self.membership.wake.clone();
        let (shutdown, mut catalogs) = (self.edge.shutdown.clone(), self.edge.catalogs.subscribe());
        if !Arc::ptr_eq(&catalogs.borrow_and_update(), &self.known) {
            return Err(End::schema_changed());
        }
        // Waits once for all: sessions by the hundred that line up for it anew after each frame get in each other's way.
        let mut ended = std::pin::pin!(async {
            tokio::select! {
                Ok(()) = catalogs.changed() => End::schema_changed(),
                () = shutdown.requested() => End::shutting_down(),
            }
        });
        loop {
            wire.answer().await?;
            if !wire.has_credit() {
                Box::pin(self.credit(wire)).await?;
            }
            self.pump(wire).await?;
            if self.downlink.waits() || self.start.is_some() {
                waiting.get_or_insert_with(|| self.edge.watermarks.wait());
            } else {
                waiting = None;
            }
            tokio::select! {
                () = wake.notified() => {}
                frame = wire.next(), if self.deaf_until.is_none() => self.heard(wire, frame).await?,
                () = deaf(self.deaf_until), if self.deaf_until.is_some() => {
                    self.deaf_until = None;
                    wire.heard = Instant::now();
                }
                Some(client_seq) = self.stored.1.recv() => self.stored(wire, client_seq).await?,
                Some(result) = self.results.recv() => self.told(wire, result).await?,
                Ok(()) = watermarks.changed(), if waiting.is_some() => {
                    if let Some(watermark) = *watermarks.borrow_and_update() {
                        self.downlink.watermark(watermark);
                    }
                }
                _ = ticks.tick() => wire.beat().await?,
                end = &mut ended => return Err(end),
            }
        }
    }
}
