//! Starting the parts, and telling when they are ready.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use millstream_provision::setup::is_absence;
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;

use crate::data::{initial_password_file, token_secret_file};
use crate::error::Error;
use crate::logs::end_of;
use crate::process::{Process, Spec};
use crate::service::{Instance, Service, instance_name};
use crate::stack::Stack;
use crate::{healthcheck, postgres};

/// How long a part has to become ready; Postgres may have to recover from a crash first.
pub(crate) const READY_LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked at meanwhile.
const READY_POLL: Duration = Duration::from_millis(10);
/// Most bytes that a private broker keeps on disk and in memory.
const NATS_MAX_FILE: &str = "20GB";
const NATS_MAX_MEMORY: &str = "256MB";

/// Variables that configure a service; what the caller's environment says of them must not leak into a private stack.
const SERVICE_ENV: [&str; 11] = [
    "NATS_URL",
    "MILLSTREAM_NATS_SEED",
    "MILLSTREAM_NATS_SEED_FILE",
    "DATABASE_URL",
    "MILLSTREAM_CONFIG",
    "MILLSTREAM_TOKEN_SECRET",
    "MILLSTREAM_TOKEN_SECRET_FILE",
    "MILLSTREAM_HEALTH_LISTEN",
    "MILLSTREAM_EDGE_LISTEN",
    "MILLSTREAM_SNAPSHOT_SECONDS",
    "MILLSTREAM_LOG_FORMAT",
];

impl Stack {
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

    /// Starts Postgres again.
    pub async fn start_postgres(&mut self) -> Result<(), Error> {
        self.start_service(Service::Postgres).await
    }

    /// An orderly stop and a start of NATS.
    pub async fn restart_nats(&mut self) -> Result<(), Error> {
        self.stop_service(Service::Nats).await;
        self.start_service(Service::Nats).await
    }

    /// Starts one process; returns at once.
    pub(crate) fn spawn_instance(&mut self, instance: Instance) -> Result<(), Error> {
        self.ports.ensure(instance)?;
        let spec = match instance.0 {
            Service::Postgres => postgres::spec(
                &self.binaries.postgres,
                &self.dir.join("postgres"),
                self.port(Service::Postgres),
                &self.settings.postgres,
                self.log_path_of(instance),
            ),
            Service::Nats => self.nats_spec(),
            _ => self.service_spec(instance)?,
        };
        let name = spec.name.clone();
        let process = Process::spawn(&spec).map_err(|source| Error::Spawn { name, source })?;
        self.registry.add(&process).map_err(Error::folder(&self.dir))?;
        // One that still runs under that name is killed by being dropped.
        self.processes.insert(instance, process);
        Ok(())
    }

    fn nats_spec(&self) -> Spec {
        let dir = self.dir.join("nats");
        let env = [
            ("MILLSTREAM_NATS_HOST", "127.0.0.1".to_owned()),
            ("MILLSTREAM_NATS_PORT", self.port(Service::Nats).to_string()),
            ("MILLSTREAM_NATS_MONITOR", format!("127.0.0.1:{}", self.ports.monitor)),
            // Quoted for the configuration's syntax: a path may hold blanks.
            ("MILLSTREAM_NATS_STORE", format!("\"{}\"", dir.join("store").display())),
            ("MILLSTREAM_NATS_MAX_FILE", NATS_MAX_FILE.to_owned()),
            ("MILLSTREAM_NATS_MAX_MEMORY", NATS_MAX_MEMORY.to_owned()),
        ];
        Spec {
            name: Service::Nats.name().into(),
            program: self.binaries.nats_server.clone(),
            arguments: vec!["-c".into(), dir.join("nats.conf").to_string_lossy().into_owned()],
            env: env.map(|(name, value)| (name.to_owned(), value)).to_vec(),
            without_env: Vec::new(),
            dir: Some(dir),
            log: self.log_path(Service::Nats),
            user: None,
            has_children: false,
        }
    }

    fn service_spec(&self, instance: Instance) -> Result<Spec, Error> {
        let (service, _) = instance;
        let role = service.role().ok_or(Error::NoExecutable)?;
        let program = self.binaries.millstream.clone().ok_or(Error::NoExecutable)?;
        let nats = self.nats_args(role);
        let mut env = vec![
            ("NATS_URL".to_owned(), nats.nats_url),
            ("DATABASE_URL".to_owned(), self.postgres_url_of(role)),
            ("MILLSTREAM_HEALTH_LISTEN".to_owned(), self.address(self.ports.health(instance))),
            ("MILLSTREAM_LOG_FORMAT".to_owned(), "json".to_owned()),
        ];
        let mut path = |name: &str, path: Option<PathBuf>| {
            env.extend(path.map(|path| (name.to_owned(), path.to_string_lossy().into_owned())));
        };
        path("MILLSTREAM_NATS_SEED_FILE", nats.nats_seed_file);
        let config = self.settings.config.as_deref().map(|path| std::path::absolute(path).unwrap_or(path.into()));
        path("MILLSTREAM_CONFIG", config);
        if service == Service::Edge {
            path("MILLSTREAM_TOKEN_SECRET_FILE", Some(token_secret_file(&self.dir)));
            env.push(("MILLSTREAM_EDGE_LISTEN".to_owned(), self.address(self.ports.of(instance))));
        }
        let own = self.settings.env.iter().filter(|(of, _, _)| of.is_none_or(|of| of == service));
        env.extend(own.map(|(_, name, value)| (name.clone(), value.clone())));
        Ok(Spec {
            name: instance_name(instance),
            program,
            arguments: vec![service.name().to_owned()],
            env,
            without_env: SERVICE_ENV.to_vec(),
            dir: None,
            log: self.log_path_of(instance),
            user: None,
            has_children: false,
        })
    }

    fn address(&self, port: Option<u16>) -> String {
        format!("127.0.0.1:{}", port.unwrap_or_default())
    }

    /// Waits until a process is ready to serve.
    pub async fn wait_ready(&mut self, instance: Instance) -> Result<(), Error> {
        let deadline = Instant::now() + READY_LIMIT;
        loop {
            let Err(reason) = self.probe(instance).await else { return Ok(()) };
            let name = instance_name(instance);
            let log = self.log_path_of(instance);
            if let Some(status) = self.processes.get_mut(&instance).and_then(Process::exit_status) {
                return Err(Error::Ended { name, status, log: end_of(&log) });
            }
            if Instant::now() >= deadline {
                return Err(Error::NotReady { name, seconds: READY_LIMIT.as_secs(), reason, log: end_of(&log) });
            }
            tokio::time::sleep(READY_POLL).await;
        }
    }

    /// Asks a process once whether it is ready; says why not.
    async fn probe(&self, instance: Instance) -> Result<(), String> {
        let url = match instance.0 {
            Service::Postgres => {
                // Before the first start is complete, the template's password still holds.
                let initial = std::fs::read_to_string(initial_password_file(&self.dir)).ok();
                let password = initial.as_deref().map_or(self.secrets.superuser.as_str(), str::trim);
                let url = self.url("postgres", password, "postgres");
                return match PgConnection::connect(&url).await {
                    Err(error) if is_absence(&error) => Err(error.to_string()),
                    // A refusal is an answer: the server is there.
                    _ => Ok(()),
                };
            }
            Service::Nats => format!("{}/healthz", self.nats_monitor_url()),
            // The edge tells of its health where it serves.
            Service::Edge => format!("http://{}/readyz", self.address(self.ports.of(instance))),
            _ => format!("http://{}/readyz", self.address(self.ports.health(instance))),
        };
        let asked = tokio::task::spawn_blocking(move || healthcheck::get(&url)).await;
        match asked {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }
}
