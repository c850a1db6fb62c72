//! How a session begins: who the client is, what Postgres knows of it, and from where it is brought up to date.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use millstream_catalog::layout;
use millstream_runtime::error::chain;
use millstream_schemas::frame::{
    Hello, Limits, MAX_FRAME_BYTES, MAX_HELLO_BYTES, MAX_SCOPES_BYTES, MAX_TRANSACTION_CHANGES, Resume, SUBMIT_WINDOW,
    ScopesDigest, ServerFrame, Welcome,
};
use millstream_schemas::{Code, Lsn, PROTOCOL_VERSION, Position, Scope};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::end::End;
use super::state::{Cut, Holds, Session, Start};
use super::text;
use super::unsettled::Unsettled;
use super::visible::{another_user, settled};
use super::wire::{HEARTBEAT, Room, Socket, SocketError, Wire};
use crate::catalogs::Loaded;
use crate::catchup;
use crate::downlink::Downlink;
use crate::edge::Edge;
use crate::fence::Fence;
use crate::resume;
use crate::shares::Place;
use crate::token::Identity;

/// Acknowledgements of lanes between two looks at them.
const STORED_QUEUE: usize = 4 * SUBMIT_WINDOW as usize;
/// How long the tail may lag behind a client that came from a faster edge.
const HEAD_WAIT: Duration = Duration::from_secs(2);
/// A client that is asked for its scopes has this long to name them.
const SCOPES_TIMEOUT: Duration = Duration::from_secs(30);
/// What a list of scopes takes in memory, as a multiple of its text.
const SCOPES_WEIGHT: usize = 3;
/// A client that names more scopes that its user may not read gets a snapshot instead of being told of each.
const MAX_LOST: usize = 10_000;
/// `hello` must have come within this time.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Reads and checks the first frame: the only work done for a client that nobody vouches for.
pub(super) async fn hello(edge: &Edge, wire: &mut Wire) -> Result<(Hello, Identity), End> {
    let first = async {
        loop {
            match wire.next().await {
                Some(Ok(Socket::Text(text))) => return Ok(text),
                Some(Ok(Socket::Ping(_) | Socket::Pong(_))) => {}
                Some(Ok(Socket::Binary(_))) => return Err(End::fatal(Code::BadFrame, "frames are JSON texts")),
                Some(Err(SocketError::Io(error))) if error.kind() == ErrorKind::Other => {
                    return Err(End::fatal(Code::TooLarge, format!("hello is over {MAX_HELLO_BYTES} bytes")));
                }
                Some(Ok(Socket::Close(_) | Socket::Frame(_)) | Err(_)) | None => return Err(End::Gone),
            }
        }
    };
    let text = tokio::time::timeout(HELLO_TIMEOUT, first)
        .await
        .map_err(|_| End::fatal(Code::HeartbeatTimeout, "no hello within 5 s"))??;
    let hello = text::hello(&text).map_err(|refused| End::fatal(refused.code, refused.message))?;
    let identity = edge.verifier.user(&hello.token).map_err(|(code, message)| End::fatal(code, message))?;
    if edge.evictions.hold(&identity.user_id, identity.issued) {
        return Err(End::fatal(Code::NeedsAuth, "an operator ended this user's sessions; sign in again"));
    }
    Ok((hello, identity))
}

/// Asks the client for the scopes whose rows it holds; they take room while the session begins.
async fn name_scopes(wire: &mut Wire) -> Result<(Vec<Scope>, Vec<Room>), End> {
    wire.own(ServerFrame::ScopesWanted {}).await?;
    let named = async {
        let (mut scopes, mut rooms, mut bytes) = (Vec::new(), Vec::new(), 0);
        loop {
            let text = match wire.next().await {
                Some(Ok(Socket::Text(text))) => text,
                Some(Ok(Socket::Ping(_) | Socket::Pong(_))) => {
                    wire.answer().await?;
                    continue;
                }
                Some(Ok(Socket::Binary(_))) => return Err(End::fatal(Code::BadFrame, "frames are JSON texts")),
                Some(Ok(Socket::Close(_) | Socket::Frame(_)) | Err(_)) | None => return Err(End::Gone),
            };
            bytes += text.len();
            if bytes > MAX_SCOPES_BYTES {
                let message = format!("the scopes have over {MAX_SCOPES_BYTES} bytes: say hello without a position");
                return Err(End::fatal(Code::TooLarge, message));
            }
            rooms.push(wire.room_for((text.len() * SCOPES_WEIGHT).div_ceil(1024))?);
            let (some, last) = text::scopes(&text).map_err(|refused| End::fatal(refused.code, refused.message))?;
            scopes.extend(some);
            if last {
                return Ok((scopes, rooms));
            }
        }
    };
    tokio::time::timeout(SCOPES_TIMEOUT, named)
        .await
        .map_err(|_| End::fatal(Code::HeartbeatTimeout, "the scopes did not come within 30 s"))?
}

/// A session's outbound half at the end of the stream, with nothing held.
pub(super) fn downlink_at_head(
    edge: &Edge,
    client_id: Uuid,
    user_id: &str,
    known: &Loaded,
    authorization: &Arc<Fence>,
) -> Result<Downlink, End> {
    let (head, open) = head(edge)?;
    Ok(Downlink::new(client_id, user_id, known.reach.clone(), head, open, [], authorization.clone()))
}

/// Where the stream ends, and the transaction of which only a part has been published by then.
fn head(edge: &Edge) -> Result<(Position, Option<(Lsn, u32)>), End> {
    let Some(head) = *edge.hub.head().borrow() else {
        return Err(End::retry(Code::Unavailable, "this edge has not reached the outbound stream yet; try again"));
    };
    let open = edge.hub.at(head.stream_seq).filter(|message| !message.last).map(|message| (message.lsn(), message.xid));
    Ok((head, open))
}

/// Reads what Postgres knows of the client, welcomes it and brings it up to date.
pub(super) async fn open(
    edge: &Arc<Edge>,
    wire: &mut Wire,
    hello: Hello,
    user_id: String,
    place: Place,
) -> Result<Session, End> {
    let unavailable = |error| End::unavailable(&error);
    // Before the snapshot, which then sees whatever has changed the tables before.
    let Some(known) = edge.catalogs.agreeing(&edge.hub).await.map_err(|error| End::unavailable(&error))? else {
        tracing::warn!("the outbound stream is encoded by another schema than that of this edge");
        return Err(End::retry(Code::Unavailable, "the server is about to change its tables; try again"));
    };
    // Before the snapshot too: what has been published by now, it sees or it is looked back for.
    let (head, open) = head(edge)?;
    // What the client says is looked at while no connection is held for it.
    let kept = match position(&hello, &known) {
        Some(position) if position.epoch == head.epoch && vouched(edge, wire, position).await? => Some(position),
        _ => None,
    };
    let cut = hello.snapshot.as_ref().and_then(|cut| resume::decode(&edge.sealer, cut, &user_id, hello.client_id));
    let cut = match cut {
        Some((token, mark)) if kept.is_none() && token.from.epoch == head.epoch => {
            vouched(edge, wire, token.from).await?.then_some((token, mark))
        }
        _ => None,
    };
    let (mut snapshot, ledger) = settled(edge, hello.client_id, hello.confirmed_seq, head.stream_seq).await?;
    if ledger.user_id.as_ref().is_some_and(|bound| *bound != user_id) {
        return Err(another_user());
    }
    let ledger_fence = snapshot.fence.lsn;
    if !snapshot.spells(&known.catalog, &user_id).await.map_err(unavailable)? {
        return Err(End::fatal(
            Code::BadToken,
            "the token's `sub` is not spelled as the database writes it in columns that name users, such as a UUID in lower case",
        ));
    }
    let scopes = snapshot.scopes(&known.catalog, &user_id).await.map_err(unavailable)?;
    let fence = Arc::new(snapshot.fence.clone());
    // Nor while it is sent anything.
    drop(snapshot);
    // The scopes are only claimed: `Session::begin` checks them.
    let (claimed, room) = match (kept, &hello.scopes_digest) {
        (None, _) => Default::default(),
        (Some(_), None) => (hello.scopes, Vec::new()),
        (Some(_), Some(digest)) if *digest == ScopesDigest::of(&scopes) => {
            (scopes.iter().cloned().collect(), Vec::new())
        }
        (Some(_), Some(_)) => name_scopes(wire).await?,
    };
    let (held, lost): (Vec<Scope>, Vec<Scope>) = claimed.into_iter().partition(|scope| scopes.contains(scope));
    let kept = kept.filter(|_| lost.len() <= MAX_LOST);
    let (held, lost) = if kept.is_some() { (held, lost) } else { Default::default() };
    drop(room);

    if !known.agrees(&edge.hub) {
        // They changed while we read: rows behind this head would meet the old schema.
        return Err(End::schema_changed());
    }
    let cut = cut.and_then(|(token, mark)| {
        token.fence(&known.catalog.version, &scopes).map(|fence| Cut { token, mark, fence: Arc::new(fence) })
    });
    let (membership, results) = edge.hub.enter(hello.client_id);
    let id = Uuid::new_v4();
    wire.own(ServerFrame::Welcome(Welcome {
        protocol: PROTOCOL_VERSION,
        session: id,
        user_id: user_id.clone(),
        schema: (hello.schema.as_ref() != Some(&known.catalog.version)).then(|| known.catalog.schema()),
        limits: Limits {
            window: SUBMIT_WINDOW,
            frame_bytes: MAX_FRAME_BYTES,
            transaction_changes: MAX_TRANSACTION_CHANGES,
            heartbeat_ms: HEARTBEAT.as_millis() as u64,
        },
        last_seq: ledger.last_seq,
        runs: ledger.runs.clone(),
        failed: ledger.failed.iter().map(|failure| failure.client_seq).collect(),
        lost: ledger.lost.clone(),
        epoch: head.epoch,
        resume: if kept.is_some() { Resume::CatchUp } else { Resume::Snapshot },
    }))
    .await?;

    let stands = kept.or(cut.as_ref().map(|cut| cut.token.from)).unwrap_or(head);
    let open = open.filter(|_| stands == head);
    let mut downlink = Downlink::new(hello.client_id, &user_id, known.reach.clone(), stands, open, held, fence.clone());
    // Not more than a server knows that was restored to an earlier state.
    downlink.knows(hello.confirmed_seq.min(ledger.last_seq));
    let mut out = Vec::new();
    for scope in lost {
        downlink.removed(scope, &mut out);
    }
    let last_run = ledger.runs.last().map(|span| span.run_id);
    let (last_seq, is_bound, too_many) = (ledger.last_seq, ledger.user_id.is_some(), ledger.is_cut());
    downlink.ledger(ledger_fence, ledger.confirmed(), too_many);
    let mut session = Session {
        edge: edge.clone(),
        id,
        client_id: hello.client_id,
        user_id,
        place,
        is_bound,
        known,
        membership,
        downlink,
        start: None,
        looked: 0,
        results,
        stored: mpsc::channel(STORED_QUEUE),
        expected: last_seq + 1,
        last_run,
        accepted: last_seq,
        unsettled: Unsettled::default(),
        passed_over: None,
        refusals: 0,
        holds: Holds::Nothing,
        sending: Vec::new(),
        deaf_until: None,
        out,
    };
    if kept.is_some() || cut.is_some() {
        session.start = Some(Start { fence, scopes, cut });
    } else {
        // It needs rows: those that others need too. Nothing is held for it while it is told what it lost.
        session.flush(wire).await?;
        let mut snapshot = edge.shared.begin(&session.known).await.map_err(unavailable)?;
        let scopes = session.scopes_in(&mut snapshot).await?;
        session.join(wire, snapshot, scopes).await?;
    }
    Ok(session)
}

/// The client's position, if its rows are of our layout.
fn position(hello: &Hello, known: &Loaded) -> Option<Position> {
    let schema = hello.schema.as_deref()?;
    hello.position.filter(|_| layout(schema) == layout(&known.catalog.version))
}

/// Whether the stream holds this position: its history, and at its sequence its LSN.
async fn vouched(edge: &Edge, wire: &mut Wire, position: Position) -> Result<bool, End> {
    let mut head = edge.hub.head();
    let reached = async {
        let is_there = |head: &Option<Position>| {
            head.is_none_or(|head| head.stream_seq >= position.stream_seq || head.epoch != position.epoch)
        };
        head.wait_for(is_there).await.is_ok()
    };
    if wire.alive(tokio::time::timeout(HEAD_WAIT, reached)).await? != Ok(true) {
        // Ahead of the stream: the stream lost something that the client has seen.
        return Ok(false);
    }
    if let Some(found) = edge.hub.at(position.stream_seq) {
        return Ok(found.position == position);
    }
    Ok(match wire.alive(catchup::at(&edge.nats, position.stream_seq)).await? {
        Ok(Some(message)) => message.position == position,
        Ok(None) => false,
        Err(error) => {
            tracing::warn!(error = chain(&error), "a client's position cannot be checked; it gets a snapshot");
            false
        }
    })
}
