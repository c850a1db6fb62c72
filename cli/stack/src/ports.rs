//! Which ports the parts listen on: free ones, kept from run to run where they still are.

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};

use millstream_provision::files::write_atomically;
use rand::RngExt as _;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::service::{Instance, Service, instance_name};

/// Below the ports that systems give to outgoing connections: a port that is free now is then not taken by chance while
/// its owner restarts.
const RANGE: std::ops::Range<u16> = 20_000..32_000;
/// How often another port is tried.
const TRIES: usize = 200;

/// The ports of a stack.
#[derive(Debug, Default)]
pub(crate) struct Ports {
    path: PathBuf,
    used: Used,
    /// NATS' monitoring pages.
    pub monitor: u16,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Used {
    /// Where the part serves.
    serving: BTreeMap<String, u16>,
    /// Where one of Millstream's services tells of its health.
    health: BTreeMap<String, u16>,
}

impl Ports {
    /// Reads what was used last time, and finds other ports for those that are taken now.
    pub fn choose(dir: &Path, edge: Option<u16>) -> Result<Ports, Error> {
        let path = file(dir);
        // A missing or damaged file only means that the ports change.
        let used: Used = fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        let mut ports = Ports { path, used: Used::default(), monitor: 0 };
        if let Some(port) = edge {
            if !is_free(port) {
                return Err(Error::PortTaken(port));
            }
            ports.used.serving.insert(instance_name((Service::Edge, 0)), port);
        }
        for service in Service::ALL {
            let name = instance_name((service, 0));
            let last = used.serving.get(&name).copied();
            if !ports.used.serving.contains_key(&name) {
                let port = ports.keep_or_find(last)?;
                ports.used.serving.insert(name.clone(), port);
            }
            let last = used.health.get(&name).copied();
            let port = ports.keep_or_find(last)?;
            ports.used.health.insert(name, port);
        }
        ports.monitor = ports.health((Service::Nats, 0)).unwrap_or_default();
        ports.write()?;
        Ok(ports)
    }

    /// Where an instance serves.
    pub fn of(&self, instance: Instance) -> Option<u16> {
        self.used.serving.get(&instance_name(instance)).copied()
    }

    /// Where an instance tells of its health.
    pub fn health(&self, instance: Instance) -> Option<u16> {
        self.used.health.get(&instance_name(instance)).copied()
    }

    /// Makes sure that an instance has its ports.
    pub fn ensure(&mut self, instance: Instance) -> Result<(), Error> {
        let name = instance_name(instance);
        if !self.used.serving.contains_key(&name) {
            let port = self.keep_or_find(None)?;
            self.used.serving.insert(name.clone(), port);
        }
        if !self.used.health.contains_key(&name) {
            let port = self.keep_or_find(None)?;
            self.used.health.insert(name, port);
        }
        self.write()
    }

    fn keep_or_find(&self, last: Option<u16>) -> Result<u16, Error> {
        let mut random = rand::rng();
        let others = (0..TRIES).map(|_| random.random_range(RANGE));
        last.into_iter()
            .chain(others)
            .find(|port| {
                let ours = self.used.serving.values().chain(self.used.health.values()).any(|used| used == port);
                !ours && is_free(*port)
            })
            .ok_or(Error::NoPort)
    }

    fn write(&self) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(&self.used).unwrap_or_default();
        write_atomically(&self.path, &text).map_err(Error::folder(&self.path))
    }
}

/// Where a part served when the stack of a data folder was last started.
pub(crate) fn saved(dir: &Path, service: Service) -> std::io::Result<u16> {
    let used: Used = serde_json::from_slice(&fs::read(file(dir))?)?;
    used.serving.get(service.name()).copied().ok_or_else(|| std::io::ErrorKind::NotFound.into())
}

fn file(dir: &Path) -> PathBuf {
    dir.join("ports.json")
}

fn is_free(port: u16) -> bool {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_stay_while_they_are_free() {
        let dir = tempfile::tempdir().unwrap();
        let first = Ports::choose(dir.path(), None).unwrap();
        let again = Ports::choose(dir.path(), None).unwrap();
        assert_eq!(first.used.serving, again.used.serving);
        assert_eq!(first.used.health, again.used.health);
        let postgres = first.of((Service::Postgres, 0)).unwrap();
        let _taken = TcpListener::bind((Ipv4Addr::LOCALHOST, postgres)).unwrap();
        let moved = Ports::choose(dir.path(), None).unwrap();
        assert_ne!(moved.of((Service::Postgres, 0)), Some(postgres));
        assert_eq!(moved.of((Service::Nats, 0)), first.of((Service::Nats, 0)));
    }

    #[test]
    fn a_taken_port_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert!(matches!(Ports::choose(dir.path(), Some(port)), Err(Error::PortTaken(found)) if found == port));
    }
}
