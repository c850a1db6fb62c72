//! A Postgres with the tables of `schema.sql`, and submissions to be executed on it.

use std::path::{Path, PathBuf};

use millstream_changes::direct::Direct;
use millstream_provision::keys::Role;
use millstream_schemas::stream::{Submission, TransactionResult};
use millstream_schemas::{Change, Operation};
use millstream_stack::Stack;
use sqlx::Connection as _;
use sqlx::postgres::PgConnection;
use uuid::Uuid;

const CONFIG: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/system/executor/millstream.toml");

async fn executor(stack: &Stack, config: &Path) -> Direct {
    let args = millstream_runtime::postgres::Args { database_url: stack.postgres_url_of(Role::Changes) };
    let options = millstream_runtime::postgres::options(&args, "test").unwrap();
    Direct::connect(options, config.into()).await.unwrap()
}

pub struct Database {
    pub stack: Stack,
    /// As the superuser.
    pub sql: PgConnection,
    pub direct: Direct,
    pub config: PathBuf,
    _folder: Option<tempfile::TempDir>,
}

impl Database {
    pub async fn start() -> Database {
        Database::prepare(include_str!("schema.sql"), CONFIG.into(), None).await
    }

    /// With other tables.
    pub async fn with(schema: &str, config: &str) -> Database {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("millstream.toml");
        std::fs::write(&file, config).unwrap();
        // Of no consequence here, but `setup` refuses tables whose deletes could not be routed.
        let schema = format!(
            "{schema};
            DO $$ DECLARE t regclass; BEGIN
                FOR t IN SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relreplident = 'd' LOOP
                    EXECUTE format('ALTER TABLE %s REPLICA IDENTITY FULL', t);
                END LOOP;
            END $$"
        );
        Database::prepare(&schema, file, Some(folder)).await
    }

    async fn prepare(schema: &str, config: PathBuf, folder: Option<tempfile::TempDir>) -> Database {
        let stack = Stack::builder()
            .app_schema(schema)
            .config(&config)
            // None of our services is started.
            .executable("/bin/false")
            .services([])
            .postgres_setting("fsync", "off")
            .start()
            .await
            .unwrap();
        let sql = PgConnection::connect(&stack.postgres_url()).await.unwrap();
        let direct = executor(&stack, &config).await;
        Database { stack, sql, direct, config, _folder: folder }
    }

    /// Another executor, with a partition of its own.
    pub async fn another(&self) -> Direct {
        executor(&self.stack, &self.config).await
    }

    /// One JSON text a query.
    pub async fn json(&mut self, sql: &'static str) -> String {
        sqlx::query_scalar::<_, Option<String>>(sql).fetch_one(&mut self.sql).await.unwrap().unwrap_or_default()
    }

    /// Executes one after the other.
    pub async fn each(&mut self, submissions: Vec<Submission>) -> Vec<(Uuid, TransactionResult)> {
        self.direct.execute(submissions, true).await.unwrap()
    }

    /// Executes all at once.
    pub async fn batch(&mut self, submissions: Vec<Submission>) -> Vec<(Uuid, TransactionResult)> {
        self.direct.execute(submissions, false).await.unwrap()
    }
}

/// A client's transactions, in order.
pub struct Client {
    pub id: Uuid,
    pub user: &'static str,
    pub run_id: Uuid,
    pub client_seq: u64,
}

impl Client {
    pub fn new(id: u128, user: &'static str) -> Client {
        Client { id: Uuid::from_u128(id), user, run_id: Uuid::from_u128(id + 1000), client_seq: 0 }
    }

    pub fn submit(&mut self, changes: Vec<Change>) -> Submission {
        self.client_seq += 1;
        Submission {
            client_id: self.id,
            user_id: self.user.into(),
            client_seq: self.client_seq,
            attempt: 1,
            run_id: self.run_id,
            previous: None,
            after: Vec::new(),
            changes,
            traceparent: None,
        }
    }
}

/// A change; the key's column is set too where it is an insert.
pub fn change(table: &str, op: Operation, key: &[(&str, &str)], set: &[(&str, Option<&str>)], stamp: u64) -> Change {
    let mut columns: Vec<String> = set.iter().map(|(name, _)| (*name).to_owned()).collect();
    let mut values: Vec<Option<String>> = set.iter().map(|(_, value)| value.map(str::to_owned)).collect();
    if op == Operation::Insert {
        columns.extend(key.iter().map(|(name, _)| (*name).to_owned()));
        values.extend(key.iter().map(|(_, value)| Some((*value).to_owned())));
    }
    let key = key.iter().map(|(_, value)| Some((*value).to_owned())).collect();
    Change {
        change_id: Uuid::new_v4(),
        table: table.into(),
        op,
        key,
        columns,
        values,
        adds: Vec::new(),
        gone: false,
        stamp,
    }
}
