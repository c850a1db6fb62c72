//! The contract of Millstream: everything that crosses a process boundary, and nothing else.
//!
//! - [`frame`]: the frames of the WebSocket between a client and an edge
//! - [`stream`]: the messages on JetStream (`MS_CHANGES`, `MS_WAL`, `MS_RESULTS`) and the origin record in the WAL
//! - [`change`]: one row operation, as clients record it and services carry it
//! - [`clock`]: which of two changes to a column is the newer one
//! - [`schema`]: the synced tables as clients see them
//! - [`subject`]: subject names, partitions and scopes
//! - [`position`]: log sequence numbers and a client's place in the outbound stream
//! - [`trace`]: what a `traceparent` is
//! - [`code`]: the closed list of error codes, each with the policy that clients follow
//!
//! Every JSON document has a JSON Schema beside this crate (`schemas/json/`), generated from these types by
//! `MILLSTREAM_UPDATE=1 cargo test -p millstream-schemas`; a test fails when they drift apart.

pub mod change;
pub mod clock;
pub mod code;
pub mod frame;
pub mod position;
pub mod schema;
pub mod spelling;
pub mod stream;
pub mod subject;
pub mod trace;

pub use change::{Change, Operation, Row, TableChanges, TableOp, Value};
pub use clock::{Clock, Clocks};
pub use code::{Code, Retry};
pub use position::{Lsn, Position};
pub use schema::{ColumnSchema, Merge, Numeric, Reference, Schema, TableSchema, TableScope};
pub use subject::Scope;

/// Version of the protocol that this crate speaks. A client of another version gets `upgrade_required`.
///
/// History: 1 = first version.
pub const PROTOCOL_VERSION: u32 = 1;

/// The audience that every session token names.
pub const AUDIENCE: &str = "millstream";
