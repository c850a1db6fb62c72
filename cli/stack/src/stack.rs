//! A running stack: where its parts are, and how they are stopped.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use millstream_provision::keys::Role;
use millstream_provision::names::role_name;
use millstream_provision::token::{DEFAULT_LIFE, mint};
use tempfile::TempDir;

use crate::binaries;
use crate::data::DATABASE;
use crate::logs::end_of;
use crate::ports::Ports;
use crate::process::{Process, Registry, Signal};
use crate::secrets::Secrets;
use crate::service::{Instance, Service, instance_name};
use crate::settings::Settings;

/// A running stack. Dropping it kills everything, and removes the folder if it is a temporary one.
pub struct Stack {
    // Before the folder: dropped first.
    pub(crate) processes: BTreeMap<Instance, Process>,
    pub(crate) registry: Registry,
    pub(crate) binaries: Binaries,
    pub(crate) settings: Settings,
    pub(crate) ports: Ports,
    pub(crate) secrets: Secrets,
    pub(crate) dir: PathBuf,
    /// Held for as long as the stack lives.
    pub(crate) _lock: fs::File,
    pub(crate) _temporary: Option<TempDir>,
}

/// The programs.
pub(crate) struct Binaries {
    pub(crate) nats_server: PathBuf,
    pub(crate) postgres: binaries::Postgres,
    pub(crate) millstream: Option<PathBuf>,
}

impl Stack {
    /// URL of the first edge's WebSocket.
    pub fn edge_url(&self) -> String {
        self.edge_url_of(0)
    }

    /// URL of an edge's WebSocket.
    pub fn edge_url_of(&self, number: u32) -> String {
        format!("ws://127.0.0.1:{}", self.ports.of((Service::Edge, number)).unwrap_or_default())
    }

    /// A session token for a user.
    pub fn token(&self, user: &str) -> String {
        // Signing with HMAC has no way to fail; an empty token would be refused with `bad_token`.
        mint(&self.secrets.token, user, DEFAULT_LIFE).unwrap_or_default()
    }

    /// The secret that the edges check tokens with.
    pub fn token_secret(&self) -> &str {
        &self.secrets.token
    }

    /// URL of the application's database for its owner, a superuser.
    pub fn postgres_url(&self) -> String {
        self.url("postgres", &self.secrets.superuser, DATABASE)
    }

    /// URL of the application's database for one of Millstream's services.
    pub fn postgres_url_of(&self, role: Role) -> String {
        let password = self.secrets.roles.get(role.name()).map_or("", String::as_str);
        self.url(&role_name(role), password, DATABASE)
    }

    pub(crate) fn url(&self, user: &str, password: &str, database: &str) -> String {
        let parameters = &self.settings.postgres_parameters;
        let parameters = if parameters.is_empty() { String::new() } else { format!("?{parameters}") };
        format!("postgres://{user}:{password}@127.0.0.1:{}/{database}{parameters}", self.port(Service::Postgres))
    }

    /// URL of the broker.
    pub fn nats_url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port(Service::Nats))
    }

    /// URL of the health report of a part that is not the edge.
    pub fn health_url(&self, service: Service) -> String {
        format!("http://127.0.0.1:{}/readyz", self.ports.health((service, 0)).unwrap_or_default())
    }

    /// URL of the broker's monitoring pages.
    pub fn nats_monitor_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.ports.monitor)
    }

    /// How a role connects to the broker. [`Role::Admin`], which may do everything, exists only in private stacks.
    pub fn nats_args(&self, role: Role) -> millstream_runtime::nats::Args {
        millstream_runtime::nats::Args {
            nats_url: self.nats_url(),
            nats_seed_file: Some(role.seed_file(&self.dir.join("nats"))),
        }
    }

    /// The data folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The log of a part.
    pub fn log_path(&self, service: Service) -> PathBuf {
        self.log_path_of((service, 0))
    }

    pub(crate) fn log_path_of(&self, instance: Instance) -> PathBuf {
        self.dir.join("logs").join(format!("{}.log", instance_name(instance)))
    }

    /// The end of every part's log, for a failed test's output.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        let mut paths: Vec<PathBuf> =
            fs::read_dir(self.dir.join("logs")).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            text.push_str(&format!("--- {name}\n{}\n", end_of(&path)));
        }
        text
    }

    /// Process id of a part, while it runs.
    pub fn pid(&mut self, service: Service) -> Option<u32> {
        let process = self.processes.get_mut(&(service, 0))?;
        process.is_running().then(|| process.pid())
    }

    /// The parts that ended without being asked, and how.
    pub fn ended(&mut self) -> Vec<(Instance, ExitStatus)> {
        self.processes
            .iter_mut()
            .filter_map(|(instance, process)| process.exit_status().map(|status| (*instance, status)))
            .collect()
    }

    /// `kill -9` of a part (its first process).
    pub fn kill(&mut self, service: Service) {
        self.kill_instance((service, 0));
    }

    /// `kill -9` of one process.
    pub fn kill_instance(&mut self, instance: Instance) {
        if let Some(mut process) = self.processes.remove(&instance) {
            process.kill();
        }
    }

    /// SIGSTOP: the part hangs without closing its connections. Of Postgres only the main process.
    pub fn pause(&mut self, service: Service) {
        self.signal(service, Signal::SIGSTOP);
    }

    /// SIGCONT.
    pub fn resume(&mut self, service: Service) {
        self.signal(service, Signal::SIGCONT);
    }

    fn signal(&mut self, service: Service, signal: Signal) {
        if let Some(process) = self.processes.get_mut(&(service, 0)) {
            process.signal(signal);
        }
    }

    /// An orderly stop of one part.
    pub async fn stop_service(&mut self, service: Service) {
        self.stop_instance((service, 0)).await;
    }

    /// An orderly stop of one process.
    pub async fn stop_instance(&mut self, instance: Instance) {
        if let Some(mut process) = self.processes.remove(&instance) {
            let (signal, grace) = instance.0.stop();
            process.stop(signal, grace).await;
        }
    }

    /// An orderly stop of Postgres.
    pub async fn stop_postgres(&mut self) {
        self.stop_service(Service::Postgres).await;
    }

    /// Stops everything in order: what takes work in first, what keeps it last.
    pub async fn stop(mut self) {
        for service in Service::ALL.into_iter().rev() {
            let mut stopping: Vec<Process> = Vec::new();
            while let Some(instance) = self.processes.keys().find(|(of, _)| *of == service).copied() {
                stopping.extend(self.processes.remove(&instance));
            }
            let (signal, grace) = service.stop();
            for process in &mut stopping {
                process.signal(signal);
            }
            for process in &mut stopping {
                process.stop(signal, grace).await;
            }
        }
    }

    pub(crate) fn port(&self, service: Service) -> u16 {
        self.ports.of((service, 0)).unwrap_or_default()
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        // Services first: they would only complain about the loss of the others.
        for service in Service::ALL.into_iter().rev() {
            self.processes.retain(|(of, _), _| *of != service);
        }
    }
}
