//! One batch in one Postgres transaction: `at_once` if it can be foreseen, else as a `batch` whose changes are applied
//! set-wise or one by one. Why it was not committed is told by `failed`; what is tried next is the worker's to say.

pub(crate) mod apply;
pub(crate) mod at_once;
pub(crate) mod batch;
pub(crate) mod executor;
pub(crate) mod explain;
pub(crate) mod failed;
pub(crate) mod history;
pub(crate) mod memory;
pub(crate) mod settle;
pub(crate) mod suspects;
