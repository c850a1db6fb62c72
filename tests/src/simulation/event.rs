//! Events of the simulation.

use std::rc::Rc;

use millstream_edge::for_simulation::Fence;
use millstream_schemas::frame::Hello;
use millstream_schemas::stream::Submission;

use super::postgres::State;

/// A millisecond.
pub const MS: u64 = 1_000;
/// Beside the milliseconds: a pause in which nothing is asked for.
pub const PAUSE: u64 = 800 * MS;

/// A submission in a lane: from which session.
pub type Stored = (usize, Submission);

/// What happens.
pub enum Event {
    /// The app of a client writes.
    App(usize),
    /// A person looks at what failed.
    Person(usize),
    /// A client's own pulse; the second: which run of it.
    Poll(usize, u64),
    Connect(usize, u64),
    /// A frame arrives.
    ToEdge(usize, String),
    ToClient(usize, String),
    /// One side hears that the session is cut.
    EdgeGone(usize),
    ClientGone(usize),
    /// The edge has read what it needs for a session.
    Open(usize, Box<Hello>, Rc<State>, Fence),
    /// A lane publishes; the second: which run of the edge.
    Lane(usize, u64),
    /// The third: which inbound stream, as the broker counts them.
    Published(usize, u64, u64, Vec<Stored>),
    /// An edge reads the outbound stream.
    Tail(usize),
    /// An executor reads, and commits.
    Execute(usize),
    Commit(usize),
    TakeOver,
    Replicate,
    ReplicationUp,
    /// A commit becomes visible.
    Show(u32),
    /// A writer that knows nothing of Millstream.
    Sql,
    /// Something breaks.
    Trouble,
    Heal,
}
