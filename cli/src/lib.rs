//! The command `millstream` as a library: dev mode, the private [`stack`] that system tests run on, the deploy step,
//! the command line client, the bench.
//!
//! - [`stack`]: Postgres, NATS and the services as child processes, each of which can be killed and started again
//! - [`dev`]: the stack with an example and logs
//! - [`binaries`], [`fetch`]: where nats-server and Postgres come from
//! - [`process`]: child processes that do not outlive us
//! - [`setup`], [`keys`]: the deploy step; [`attach`], [`check`]: the application's tables before it
//! - [`client`], [`history`], [`sessions`], [`token`], [`healthcheck`], [`mod@bench`]: for developers and operators
//! - [`database`]: which database those are about; [`exit`]: exit codes

pub mod attach;
pub mod bench;
pub mod binaries;
pub mod check;
pub mod client;
mod command;
pub mod database;
pub mod dev;
pub mod exit;
pub mod fetch;
pub mod healthcheck;
pub mod history;
pub mod keys;
pub mod logs;
pub mod process;
pub mod sessions;
pub mod setup;
pub mod stack;
pub mod token;

pub use command::main;
