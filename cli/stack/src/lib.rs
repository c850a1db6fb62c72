//! A private Millstream: Postgres, NATS and the services as child processes, in one data folder. Dev mode, the system
//! tests and the bench run on it; each part can be killed, paused and started again.
//!
//! ```no_run
//! # async fn example() -> Result<(), millstream_stack::Error> {
//! use millstream_stack::{Service, Stack};
//! let mut stack = Stack::builder().app_schema("CREATE TABLE …").config("millstream.toml").start().await?;
//! stack.kill(Service::Changes);
//! stack.start_service(Service::Changes).await?;
//! println!("{} {}", stack.edge_url(), stack.token("alice"));
//! # Ok(()) }
//! ```
//!
//! - [`Builder`] puts a [`Stack`] together; [`Service`]: its parts
//! - [`data`]: what lies where in a data folder
//! - [`binaries`], [`fetch`]: where nats-server and Postgres come from
//! - [`process`]: child processes that do not outlive us; [`logs`]: what they say; [`healthcheck`]: whether they are ready

pub mod binaries;
mod builder;
pub mod data;
mod error;
pub mod fetch;
mod files;
pub mod healthcheck;
pub mod logs;
mod ports;
mod postgres;
pub mod process;
mod script;
mod secrets;
mod service;
mod settings;
mod stack;
mod starting;

pub use builder::Builder;
pub use error::Error;
pub use service::{Instance, Service};
pub use stack::Stack;
