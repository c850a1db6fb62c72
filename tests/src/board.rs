//! A stack with the board example and an audit of everything that was ever applied.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use millstream_client::Client;
use millstream_stack::{Builder, Service, Stack};
use sqlx::{Connection, PgConnection, Row};

/// The board example's own tables.
const SCHEMA: &str = include_str!("../../examples/board/schema.sql");

/// Every row operation in the order in which Postgres applied it, with the text that the workload marks it by. A change
/// that is lost, doubled or out of order shows here, whatever the final rows are.
const AUDIT: &str = r"
CREATE TABLE audit (n bigserial PRIMARY KEY, tbl text NOT NULL, op text NOT NULL, id text NOT NULL, marker text NOT NULL);
CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE r record;
BEGIN
    IF TG_OP = 'DELETE' THEN r := OLD; ELSE r := NEW; END IF;
    INSERT INTO audit (tbl, op, id, marker)
    VALUES (TG_TABLE_NAME, lower(TG_OP), r.id, coalesce(to_jsonb(r)->>'title', to_jsonb(r)->>'body', to_jsonb(r)->>'name'));
    RETURN NULL;
END $$;
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON projects FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON tasks FOR EACH ROW EXECUTE FUNCTION audit();
CREATE TRIGGER audit AFTER INSERT OR UPDATE OR DELETE ON comments FOR EACH ROW EXECUTE FUNCTION audit();
";

/// How long tests wait for what must happen.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The program that runs the services: beside the tests in the target folder.
fn services() -> Result<PathBuf> {
    let own = std::env::current_exe()?;
    let folder = own.parent().and_then(Path::parent).context("the test has no target folder")?;
    Ok(folder.join("services"))
}

/// A running stack, and a folder for the clients' stores.
pub struct Board {
    /// Postgres, NATS and the services.
    pub stack: Stack,
    stores: tempfile::TempDir,
}

impl Board {
    /// Starts everything.
    ///
    /// # Errors
    /// A part does not start.
    pub async fn start() -> Result<Board> {
        Board::with(|builder| builder).await
    }

    /// Starts everything, with changes to how.
    ///
    /// # Errors
    /// A part does not start.
    pub async fn with(change: impl FnOnce(Builder) -> Builder) -> Result<Board> {
        let builder = Stack::builder()
            .app_schema(format!("{SCHEMA}{AUDIT}"))
            .config(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/board/millstream.toml"))
            .executable(services()?)
            .progress(|_| {});
        let stack = change(builder).start().await.context("start the stack")?;
        Ok(Board { stack, stores: tempfile::tempdir()? })
    }

    /// Path of a store of that name.
    pub fn store(&self, name: &str) -> PathBuf {
        self.stores.path().join(format!("{name}.db"))
    }

    /// A client of `user`, with the store `name`, connected and in sync.
    ///
    /// # Errors
    /// It does not get in sync.
    pub async fn client(&self, name: &str, user: &str) -> Result<Client> {
        let client = self.builder(name, user).open().await?;
        tokio::time::timeout(PATIENCE, client.ready()).await.with_context(|| format!("{name} got no snapshot"))??;
        Ok(client)
    }

    /// How such a client is opened.
    pub fn builder(&self, name: &str, user: &str) -> millstream_client::Builder {
        Client::builder(self.store(name)).edge(self.stack.edge_url()).token(self.stack.token(user))
    }

    /// A connection as the database's owner.
    ///
    /// # Errors
    /// Postgres is down.
    pub async fn postgres(&self) -> Result<PgConnection> {
        Ok(PgConnection::connect(&self.stack.postgres_url()).await?)
    }

    /// The audit in the order of application: table, operation, id, marker.
    ///
    /// # Errors
    /// Postgres is down.
    pub async fn audit(&self) -> Result<Vec<(String, String, String, String)>> {
        let mut postgres = self.postgres().await?;
        let rows = sqlx::query("SELECT tbl, op, id, marker FROM audit ORDER BY n").fetch_all(&mut postgres).await?;
        Ok(rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3))).collect())
    }

    /// Kills a service with SIGKILL and starts it again.
    ///
    /// # Errors
    /// It does not start.
    pub async fn kill_and_restart(&mut self, service: Service) -> Result<()> {
        self.stack.kill(service);
        self.stack.start_service(service).await.with_context(|| format!("restart {}", service.name()))
    }

    /// Runs a test and shows the services' logs when it fails.
    pub fn explain<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            eprintln!("{}", self.stack.logs());
        }
        result
    }
}
