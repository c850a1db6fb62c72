//! A private Millstream: Postgres, NATS and the services as child processes, in one data folder. Dev mode, the system
//! tests and the bench run on it; each part can be killed, paused and started again.
//!
//! ```no_run
//! # async fn example() -> Result<(), millstream::stack::Error> {
//! use millstream::stack::{Service, Stack};
//! let mut stack = Stack::builder().app_schema("CREATE TABLE …").config("millstream.toml").start().await?;
//! stack.kill(Service::Changes);
//! stack.start_service(Service::Changes).await?;
//! println!("{} {}", stack.edge_url(), stack.token("alice"));
//! # Ok(()) }
//! ```

mod builder;
mod ports;
mod postgres;
mod script;
mod services;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use tempfile::TempDir;

use crate::keys::Role;
use crate::process::{Process, Registry, Signal};
use crate::{binaries, keys, setup, token};

pub use builder::Builder;

/// Data folder of dev mode, in the working folder.
pub const DEV_DATA: &str = ".millstream/dev";
/// The application's database.
pub const DATABASE: &str = "app";

/// How long a service has to drain after SIGTERM.
const SERVICE_GRACE: Duration = Duration::from_secs(10);
/// How long NATS and Postgres have to stop.
const SERVER_GRACE: Duration = Duration::from_secs(20);
/// Most bytes of a log that go into an error or on the screen.
const LOG_TAIL_BYTES: usize = 4 * 1024;

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
    fn role(self) -> Option<Role> {
        match self {
            Service::Postgres | Service::Nats => None,
            Service::Replication => Some(Role::Replication),
            Service::Changes => Some(Role::Changes),
            Service::Edge => Some(Role::Edge),
        }
    }

    /// The signal for an orderly stop (Postgres: without waiting for its clients) and the time for it.
    fn stop(self) -> (Signal, Duration) {
        match self {
            Service::Postgres => (Signal::SIGINT, SERVER_GRACE),
            Service::Nats => (Signal::SIGTERM, SERVER_GRACE),
            _ => (Signal::SIGTERM, SERVICE_GRACE),
        }
    }
}

/// One process of a part: there may be several edges and executors.
pub type Instance = (Service, u32);

/// The stack could not be started, or one of its parts.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// nats-server or Postgres.
    #[error("a program is missing")]
    Binaries(#[source] binaries::Error),
    /// The data folder.
    #[error("cannot use {path}")]
    Folder {
        /// Which path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody else runs in the data folder.
    #[error("another stack runs in {0}: stop it first, or use another folder (--data)")]
    Locked(PathBuf),
    /// The data folder was made by another major version.
    #[error(
        "the data in {path} is of Postgres {found}, the programs are of {needed}: delete the folder or use another"
    )]
    PostgresVersion {
        /// The folder.
        path: PathBuf,
        /// Version of the data.
        found: String,
        /// Version of the programs.
        needed: String,
    },
    /// A given port is taken.
    #[error("port {0} is taken: use another (--port)")]
    PortTaken(u16),
    /// No free port.
    #[error("no free port found")]
    NoPort,
    /// The program of the services.
    #[error("this program cannot run the services: name one that can (Builder::executable)")]
    NoExecutable,
    /// A program does not start.
    #[error("cannot start {name}")]
    Spawn {
        /// Which.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// A part ended while it was waited for.
    #[error("{name} ended ({status}); its log ends with:\n{log}")]
    Ended {
        /// Which.
        name: String,
        /// How.
        status: ExitStatus,
        /// End of its log.
        log: String,
    },
    /// A part does not become ready.
    #[error("{name} is not ready after {seconds} s: {reason}; its log ends with:\n{log}")]
    NotReady {
        /// Which.
        name: String,
        /// How long was waited.
        seconds: u64,
        /// What it says.
        reason: String,
        /// End of its log.
        log: String,
    },
    /// Making the database's files.
    #[error("initdb failed: {0}")]
    Initdb(String),
    /// The application's database.
    #[error("Postgres: {action}")]
    Database {
        /// What was done.
        action: String,
        /// Why it failed.
        source: sqlx::Error,
    },
    /// `millstream.toml`.
    #[error("the configuration is not usable")]
    Config(#[source] millstream_catalog::ConfigError),
    /// The deploy step.
    #[error("the deploy step failed")]
    Setup(#[source] setup::Error),
    /// Keys.
    #[error("the NATS keys")]
    Keys(#[source] keys::Error),
    /// A token.
    #[error("a token")]
    Token(#[source] token::Error),
}

impl Error {
    fn folder(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
        move |source| Error::Folder { path: path.into(), source }
    }
}

/// A running stack. Dropping it kills everything, and removes the folder if it is a temporary one.
pub struct Stack {
    // Before the folder: dropped first.
    processes: BTreeMap<Instance, Process>,
    registry: Registry,
    binaries: Binaries,
    settings: builder::Settings,
    ports: ports::Ports,
    secrets: Secrets,
    dir: PathBuf,
    /// Held for as long as the stack lives.
    _lock: fs::File,
    _temporary: Option<TempDir>,
}

struct Binaries {
    nats_server: PathBuf,
    postgres: binaries::Postgres,
    millstream: Option<PathBuf>,
}

struct Secrets {
    superuser: String,
    roles: BTreeMap<&'static str, String>,
    token: String,
}

impl Stack {
    /// A stack with everything at its default: in a temporary folder, on free ports.
    pub fn builder() -> Builder {
        Builder::default()
    }

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
        token::mint(&self.secrets.token, user, token::DEFAULT_LIFE).unwrap_or_default()
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
        self.url(&setup::role_name(role), password, DATABASE)
    }

    fn url(&self, user: &str, password: &str, database: &str) -> String {
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

    fn log_path_of(&self, instance: Instance) -> PathBuf {
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
            text.push_str(&format!("--- {name}\n{}\n", tail(&path)));
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

    /// Starts a part that is not running, and waits until it is ready.
    pub async fn start_service(&mut self, service: Service) -> Result<(), Error> {
        self.start_instance((service, 0)).await
    }

    /// Starts one process, and waits until it is ready. Numbers from 1 are further edges or executors.
    pub async fn start_instance(&mut self, instance: Instance) -> Result<(), Error> {
        self.spawn_instance(instance)?;
        self.wait_ready(instance).await
    }

    /// Kills the part if it runs, and starts it.
    pub async fn restart(&mut self, service: Service) -> Result<(), Error> {
        self.kill(service);
        self.start_service(service).await
    }

    /// An orderly stop of Postgres.
    pub async fn stop_postgres(&mut self) {
        self.stop_service(Service::Postgres).await;
    }

    /// Starts Postgres again.
    pub async fn start_postgres(&mut self) -> Result<(), Error> {
        self.start_service(Service::Postgres).await
    }

    /// An orderly stop and a start of NATS.
    pub async fn restart_nats(&mut self) -> Result<(), Error> {
        self.stop_service(Service::Nats).await;
        self.start_service(Service::Nats).await
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

    fn port(&self, service: Service) -> u16 {
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

/// URL of the application's database for its owner, as a data folder says.
///
/// # Errors
/// No stack was started in the folder.
pub fn data_postgres_url(data: &Path) -> io::Result<String> {
    let password = fs::read_to_string(data.join("secrets/postgres.password"))?;
    let port = ports::saved(data, Service::Postgres)?;
    Ok(format!("postgres://postgres:{}@127.0.0.1:{port}/{DATABASE}", password.trim()))
}

/// How a role connects to the broker, as a data folder says.
///
/// # Errors
/// No stack was started in the folder.
pub fn data_nats(data: &Path, role: Role) -> io::Result<millstream_runtime::nats::Args> {
    let port = ports::saved(data, Service::Nats)?;
    Ok(millstream_runtime::nats::Args {
        nats_url: format!("nats://127.0.0.1:{port}"),
        nats_seed_file: Some(role.seed_file(&data.join("nats"))),
    })
}

/// File with the secret of a data folder's tokens.
pub fn token_secret_file(data: &Path) -> PathBuf {
    data.join("secrets/token.secret")
}

fn instance_name((service, number): Instance) -> String {
    if number == 0 { service.name().to_owned() } else { format!("{}-{number}", service.name()) }
}

/// The end of a file, from the start of a line.
fn tail(path: &Path) -> String {
    let text = fs::read(path).unwrap_or_default();
    let mut end = &text[text.len().saturating_sub(LOG_TAIL_BYTES)..];
    if end.len() < text.len()
        && let Some(at) = end.iter().position(|&byte| byte == b'\n')
    {
        end = &end[at + 1..];
    }
    String::from_utf8_lossy(end).into_owned()
}
