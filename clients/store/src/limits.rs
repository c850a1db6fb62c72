//! Limits that several files keep to.

use millstream_schemas::frame::MAX_FRAME_BYTES;

/// Largest encoded transaction, in bytes. Less than a frame: on the broker the edge puts the user and the installation
/// with it, and what the edge cannot pass on would block the queue.
pub const MAX_TRANSACTION_BYTES: usize = MAX_FRAME_BYTES - 4 * 1024;
/// How long a write waits for another process's write, in milliseconds.
pub(crate) const BUSY_TIMEOUT_MS: u64 = 10_000;
/// Most prepared statements kept by a connection.
pub(crate) const STATEMENTS: usize = 256;
