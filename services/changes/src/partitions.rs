//! Which partitions of the stream are this process's, and what of them it still needs: owned by a heartbeat in Postgres, read by
//! a cursor a worker, and cut to what is not done with.

pub(crate) mod consumer;
pub(crate) mod janitor;
pub(crate) mod ownership;
pub(crate) mod retention;
