//! How a stack is put together and started.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use millstream_catalog::Config;
use millstream_provision::files::{write_atomically, write_secret};
use millstream_provision::keys::{self, Role};
use millstream_provision::names::SERVICE_ROLES;
use millstream_provision::setup;
use millstream_runtime::nats::StreamArgs;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _, Executor as _};

use crate::data::{DATABASE, initial_password_file};
use crate::error::Error;
use crate::ports::Ports;
use crate::process::Registry;
use crate::secrets::Secrets;
use crate::service::Service;
use crate::settings::Settings;
use crate::stack::{Binaries, Stack};
use crate::starting::READY_LIMIT;
use crate::{binaries, postgres, script};

/// The broker's configuration as shipped.
const NATS_CONF: &str = include_str!("../../../deploy/nats.conf");
/// Gets a line for each step that takes long.
type OnProgress = Box<dyn FnMut(&str) + Send>;

/// Puts a [`Stack`] together.
#[must_use]
#[derive(Default)]
pub struct Builder {
    dir: Option<PathBuf>,
    edge_port: Option<u16>,
    app_schema: Option<String>,
    seed: Option<String>,
    executable: Option<PathBuf>,
    nats_conf: String,
    deployed_keys_only: bool,
    services: Option<Vec<Service>>,
    database_only: bool,
    settings: Settings,
    progress: Option<OnProgress>,
}

impl Builder {
    /// Keep the data in this folder; without it, in a temporary one that goes with the stack.
    pub fn dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.dir = Some(dir.into());
        self
    }

    /// Port of the first edge.
    pub fn edge_port(mut self, port: u16) -> Self {
        self.edge_port = Some(port);
        self
    }

    /// SQL of the application's tables, run once on a new database.
    pub fn app_schema(mut self, sql: impl Into<String>) -> Self {
        self.app_schema = Some(sql.into());
        self
    }

    /// SQL of the first rows, run once after the schema.
    pub fn seed(mut self, sql: impl Into<String>) -> Self {
        self.seed = Some(sql.into());
        self
    }

    /// Path of `millstream.toml`. Without one only Postgres and NATS are started.
    pub fn config(mut self, path: impl Into<PathBuf>) -> Self {
        self.settings.config = Some(path.into());
        self
    }

    /// The program that runs the services: one with their subcommands. Without it, ourselves, if we are `millstream`.
    pub fn executable(mut self, path: impl Into<PathBuf>) -> Self {
        self.executable = Some(path.into());
        self
    }

    /// A setting of Postgres, over our own.
    pub fn postgres_setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.postgres.push((name.into(), value.into()));
        self
    }

    /// Parameters of every connection URL of Postgres, such as `sslmode=require`.
    pub fn postgres_parameters(mut self, parameters: impl Into<String>) -> Self {
        self.settings.postgres_parameters = parameters.into();
        self
    }

    /// Text that is added to the broker's configuration.
    pub fn nats_conf(mut self, text: &str) -> Self {
        self.nats_conf.push_str(text);
        self.nats_conf.push('\n');
        self
    }

    /// An environment variable for all of Millstream's own services.
    pub fn service_env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.env.push((None, name.into(), value.into()));
        self
    }

    /// An environment variable for one service.
    pub fn env_of(mut self, service: Service, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.settings.env.push((Some(service), name.into(), value.into()));
        self
    }

    /// Which of Millstream's own services to start; the others can be started later.
    pub fn services(mut self, services: impl Into<Vec<Service>>) -> Self {
        self.services = Some(services.into());
        self
    }

    /// Start Postgres alone, with all that `millstream setup` makes in it.
    pub fn database_only(mut self) -> Self {
        self.database_only = true;
        self
    }

    /// Make no broker user that may do everything ([`Role::Admin`]).
    pub fn deployed_keys_only(mut self) -> Self {
        self.deployed_keys_only = true;
        self
    }

    /// Gets a line for each step that takes long; without it, lines go to stderr.
    pub fn progress(mut self, progress: impl FnMut(&str) + Send + 'static) -> Self {
        self.progress = Some(Box::new(progress));
        self
    }

    /// Starts everything and waits until it is ready.
    pub async fn start(self) -> Result<Stack, Error> {
        let mut progress: OnProgress = self.progress.unwrap_or_else(|| Box::new(|line| eprintln!("{line}")));
        let (dir, temporary) = match self.dir {
            Some(dir) => (dir, None),
            None => {
                let temporary = tempfile::Builder::new()
                    .prefix("millstream-")
                    .tempdir()
                    .map_err(Error::folder(&std::env::temp_dir()))?;
                // Postgres may run as another user.
                use std::os::unix::fs::PermissionsExt as _;
                fs::set_permissions(temporary.path(), fs::Permissions::from_mode(0o711))
                    .map_err(Error::folder(temporary.path()))?;
                (temporary.path().to_path_buf(), Some(temporary))
            }
        };
        fs::create_dir_all(&dir).map_err(Error::folder(&dir))?;
        let dir = fs::canonicalize(&dir).map_err(Error::folder(&dir))?;
        let lock = lock(&dir)?;
        let run = dir.join("run.json");
        let (registry, left) = Registry::open(run.clone()).map_err(Error::folder(&run))?;
        if !left.is_empty() {
            progress(&format!("ended what an earlier run left: {}", left.join(", ")));
        }
        let millstream = match (&self.settings.config, self.executable) {
            (Some(_), None) if !self.database_only => Some(executable()?),
            (_, executable) => executable,
        };
        let binaries = Binaries {
            nats_server: match self.database_only {
                true => PathBuf::new(),
                false => binaries::nats_server(&mut progress).map_err(Error::Binaries)?,
            },
            postgres: binaries::postgres(&mut progress).map_err(Error::Binaries)?,
            millstream,
        };
        for name in ["logs", "secrets", "nats/store"] {
            fs::create_dir_all(dir.join(name)).map_err(Error::folder(&dir.join(name)))?;
        }
        let logs = dir.join("logs");
        remove_files(&logs).map_err(Error::folder(&logs))?;
        let ports = Ports::choose(&dir, self.edge_port)?;
        let secrets = Secrets::of(&dir)?;
        let mut roles = Role::DEPLOYED.to_vec();
        if !self.deployed_keys_only {
            roles.push(Role::Admin);
        }
        keys::ensure(&dir.join("nats"), &roles).map_err(Error::Keys)?;
        let conf = dir.join("nats/nats.conf");
        write_atomically(&conf, &format!("{NATS_CONF}{}", self.nats_conf)).map_err(Error::folder(&conf))?;

        let data = dir.join("postgres");
        if data.is_dir() {
            postgres::check_version(&binaries.postgres, &data)?;
        } else {
            let initial = postgres::create(&binaries.postgres, &data, &mut progress)?;
            let path = initial_password_file(&dir);
            write_secret(&path, &initial).map_err(Error::folder(&path))?;
        }
        let mut stack = Stack {
            processes: BTreeMap::new(),
            registry,
            binaries,
            settings: self.settings,
            ports,
            secrets,
            dir,
            _lock: lock,
            _temporary: temporary,
        };
        stack.spawn_instance((Service::Postgres, 0))?;
        if !self.database_only {
            stack.spawn_instance((Service::Nats, 0))?;
        }
        stack.wait_ready((Service::Postgres, 0)).await?;
        stack.take_over_database(self.app_schema.as_deref(), self.seed.as_deref(), &mut progress).await?;
        if !self.database_only {
            stack.wait_ready((Service::Nats, 0)).await?;
        }
        let Some(config) = stack.settings.config.clone() else { return Ok(stack) };
        let config = Config::read(&config).map_err(Error::Config)?;
        stack.deploy_database(&config).await?;
        if self.database_only {
            return Ok(stack);
        }
        let nats = stack.nats_args(Role::Setup);
        setup::streams(&nats, &StreamArgs::default(), READY_LIMIT).await.map_err(Error::Setup)?;
        let services = self.services.unwrap_or_else(|| Service::OWN.to_vec());
        for &service in &services {
            stack.spawn_instance((service, 0))?;
        }
        for &service in &services {
            stack.wait_ready((service, 0)).await?;
        }
        Ok(stack)
    }
}

impl Stack {
    /// A stack with everything at its default: in a temporary folder, on free ports.
    pub fn builder() -> Builder {
        Builder::default()
    }

    /// Gives the superuser his own password, and makes the application's database with its tables, each once.
    async fn take_over_database(
        &mut self,
        app_schema: Option<&str>,
        seed: Option<&str>,
        progress: &mut OnProgress,
    ) -> Result<(), Error> {
        let failed = |action: &str| {
            let action = action.to_owned();
            move |source| Error::Database { action, source }
        };
        let initial_file = initial_password_file(&self.dir);
        if let Ok(initial) = fs::read_to_string(&initial_file) {
            match PgConnection::connect(&self.url("postgres", initial.trim(), "postgres")).await {
                Ok(mut connection) => {
                    // Our own secret: letters and digits.
                    let statement = format!("ALTER ROLE postgres PASSWORD '{}'", self.secrets.superuser);
                    connection
                        .execute(AssertSqlSafe(statement))
                        .await
                        .map_err(failed("change the superuser's password"))?;
                }
                // An earlier start changed it and was cut before it removed the file.
                Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some("28P01") => {}
                Err(error) => return Err(failed("connect")(error)),
            }
            fs::remove_file(&initial_file).map_err(Error::folder(&initial_file))?;
        }
        let mut connection = PgConnection::connect(&self.url("postgres", &self.secrets.superuser, "postgres"))
            .await
            .map_err(failed("connect"))?;
        let exists: bool = sqlx::query_scalar("SELECT EXISTS (SELECT FROM pg_database WHERE datname = $1)")
            .bind(DATABASE)
            .fetch_one(&mut connection)
            .await
            .map_err(failed("look for the database"))?;
        if !exists {
            connection
                .execute(AssertSqlSafe(format!("CREATE DATABASE {DATABASE}")))
                .await
                .map_err(failed("create the database"))?;
        }
        let Some(app_schema) = app_schema else { return Ok(()) };
        let mut connection = PgConnection::connect(&self.postgres_url()).await.map_err(failed("connect"))?;
        // A comment on the database says that the schema is in, in the same transaction as the schema itself.
        let applied: Option<String> = sqlx::query_scalar(
            "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = current_database()",
        )
        .fetch_one(&mut connection)
        .await
        .map_err(failed("look for the schema"))?;
        let mark = format!("millstream: schema {:016x}", fnv1a(app_schema));
        match applied {
            None => {
                let mut transaction = connection.begin().await.map_err(failed("begin"))?;
                for (action, sql) in [("the application's schema", app_schema), ("the seed", seed.unwrap_or_default())]
                {
                    let left_out = script::apply(&mut transaction, sql).await.map_err(|error| Error::Database {
                        action: format!("{action}, {}", error.action),
                        source: error.source,
                    })?;
                    if left_out > 0 {
                        progress(&format!(
                            "{action}: {left_out} statements about roles or settings that are not here are left out"
                        ));
                    }
                }
                transaction
                    .execute(AssertSqlSafe(format!("COMMENT ON DATABASE {DATABASE} IS '{mark}'")))
                    .await
                    .map_err(failed("mark the schema"))?;
                transaction.commit().await.map_err(failed("commit the schema"))
            }
            Some(applied) => {
                if applied != mark {
                    progress(
                        "the schema file has changed since it was applied: apply the change with psql, or delete the data folder",
                    );
                }
                Ok(())
            }
        }
    }

    /// What `millstream setup` does in Postgres at a deployment.
    async fn deploy_database(&self, config: &Config) -> Result<(), Error> {
        let passwords = SERVICE_ROLES.map(|role| (role, self.secrets.roles.get(role.name()).cloned()));
        let args = millstream_runtime::postgres::Args { database_url: self.postgres_url() };
        let mut connection = setup::connect(&args, READY_LIMIT).await.map_err(Error::Setup)?;
        setup::database(&mut connection, config, &passwords).await.map(drop).map_err(Error::Setup)
    }
}

fn lock(dir: &Path) -> Result<fs::File, Error> {
    let path = dir.join("lock");
    let file = fs::File::create(&path).map_err(Error::folder(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(Error::Locked(dir.into())),
        Err(fs::TryLockError::Error(source)) => Err(Error::Folder { path, source }),
    }
}

fn remove_files(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        fs::remove_file(entry?.path())?;
    }
    Ok(())
}

/// Tells one schema text from another (FNV-1a, 64 bits); nothing depends on its strength.
fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The program that runs the services: ourselves, if we are `millstream`.
fn executable() -> Result<PathBuf, Error> {
    let own = std::env::current_exe().map_err(|_| Error::NoExecutable)?;
    if own.file_stem().is_some_and(|name| name == "millstream") { Ok(own) } else { Err(Error::NoExecutable) }
}
