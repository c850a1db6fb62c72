//! The parts of a stack.

use std::time::Duration;

use millstream_provision::keys::Role;

use crate::process::Signal;

/// How long a service has to drain after SIGTERM.
const SERVICE_GRACE: Duration = Duration::from_secs(10);
/// How long NATS and Postgres have to stop.
const SERVER_GRACE: Duration = Duration::from_secs(20);

/// A part of the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Service {
    /// The database.
    Postgres,
    /// The broker.
    Nats,
    /// WAL to stream.
    Replication,
    /// Validator and executor.
    Changes,
    /// The WebSocket service.
    Edge,
}

impl Service {
    /// Every part, in the order of starting.
    pub const ALL: [Service; 5] =
        [Service::Postgres, Service::Nats, Service::Replication, Service::Changes, Service::Edge];
    /// Millstream's own services, in the order of starting.
    pub const OWN: [Service; 3] = [Service::Replication, Service::Changes, Service::Edge];

    /// Its name; for Millstream's own also the subcommand.
    pub fn name(self) -> &'static str {
        match self {
            Service::Postgres => "postgres",
            Service::Nats => "nats",
            Service::Replication => "replication",
            Service::Changes => "changes",
            Service::Edge => "edge",
        }
    }

    /// The identity of one of Millstream's own services.
    pub(crate) fn role(self) -> Option<Role> {
        match self {
            Service::Postgres | Service::Nats => None,
            Service::Replication => Some(Role::Replication),
            Service::Changes => Some(Role::Changes),
            Service::Edge => Some(Role::Edge),
        }
    }

    /// The signal for an orderly stop (Postgres: without waiting for its clients) and the time for it.
    pub(crate) fn stop(self) -> (Signal, Duration) {
        match self {
            Service::Postgres => (Signal::SIGINT, SERVER_GRACE),
            Service::Nats => (Signal::SIGTERM, SERVER_GRACE),
            _ => (Signal::SIGTERM, SERVICE_GRACE),
        }
    }
}

/// One process of a part: there may be several edges and executors.
pub type Instance = (Service, u32);

/// Name of a process: of its log, and in the file of ports.
pub(crate) fn instance_name((service, number): Instance) -> String {
    if number == 0 { service.name().to_owned() } else { format!("{}-{number}", service.name()) }
}
