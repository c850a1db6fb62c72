//! `millstream history`: what failed, as `millstream.changes_history` keeps it; shown, exported, and replayed with its
//! author's identity. And what cannot be applied now, as `millstream.parked` has it.

mod error;
mod parked;
mod replay;

use std::io::{self, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use millstream_client::{Rows, SqlValue};
use millstream_provision::exit::Exit;
use millstream_provision::keys::Role;
use millstream_runtime::{nats, postgres};
use millstream_schemas::Code;
use millstream_stack::data::data_nats;
use serde_json::Value;
use sqlx::postgres::{PgArguments, PgConnection, PgRow};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Connection as _, Postgres, Row as _};
use uuid::Uuid;

use self::error::Error;
use crate::database::DatabaseArgs;
use crate::output::{self, Output, print};

/// Rows that match [`Filter`], as parameters 1 to 6.
const MATCHES: &str = "\
($1::text IS NULL OR h.user_id = $1) AND ($2::uuid IS NULL OR h.client_id = $2) AND ($3::text IS NULL OR h.code = $3)
AND ($4::text IS NULL OR h.table_name = $4) AND ($5::float8 IS NULL OR h.at >= now() - make_interval(secs => $5))
AND ($6::text IS NULL OR h.at >= $6::text::timestamptz)";

/// Flags of `millstream history`.
#[derive(clap::Args)]
#[command(before_help = "Examples:
  millstream history list --user alice --since 2h
  millstream history show 17
  millstream history replay 17 18                 once their cause is gone; doing it again changes nothing
  millstream history export --code business_rule > failed.jsonl
  millstream history parked                       what waits, for a lock or because it fails, and why
  millstream history reject CLIENT_ID CLIENT_SEQ -m 'the order is closed'")]
#[command(
    after_help = "Reads the database as its owner. `replay` also needs the NATS key `operator.nk` that `millstream \
keys` makes, which may submit changes and nothing else. Without DATABASE_URL the stack of `millstream dev` in --data is \
used.

Exit status: 0 done, 1 failed or rejected again, 3 wrong configuration, 4 Postgres, NATS or the executor is not there."
)]
pub struct Args {
    /// The database.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// NATS, for replay
    #[arg(long, env = "NATS_URL")]
    pub nats_url: Option<String>,
    /// File with the seed of the nkey `operator`; MILLSTREAM_NATS_SEED may hold the seed itself
    #[arg(long, env = "MILLSTREAM_NATS_SEED_FILE")]
    pub nats_seed_file: Option<PathBuf>,
    /// How to print data
    #[arg(short, long, value_enum, global = true, default_value_t = Output::Text)]
    pub output: Output,
    /// What to do.
    #[command(subcommand)]
    pub command: HistoryCommand,
}

/// What to do.
#[derive(clap::Subcommand)]
pub enum HistoryCommand {
    /// The failed transactions, newest first
    List {
        /// Which.
        #[command(flatten)]
        filter: Filter,
        /// Show at most so many
        #[arg(long, default_value_t = 50)]
        limit: u32,
    },
    /// One of them, with its changes
    Show {
        /// Id, as `list` shows it
        id: i64,
    },
    /// Submit them again for their authors; each takes effect at most once, however often it is replayed
    Replay {
        /// Ids, as `list` shows them
        #[arg(required = true)]
        ids: Vec<i64>,
        /// Seconds to wait for each verdict
        #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=3_600))]
        wait: u64,
    },
    /// The transactions that cannot be applied now, longest first: who waits, for what, since when
    Parked,
    /// Reject one of these; its author is told, and may edit it
    Reject {
        /// Its client, as `parked` shows it
        client_id: Uuid,
        /// Its `client_seq`, as `parked` shows it
        client_seq: i64,
        /// What its author is told
        #[arg(short, long, default_value = "an operator rejected it, since it could not be applied")]
        message: String,
    },
    /// All of them, oldest first, one JSON object on each line
    Export {
        /// Which.
        #[command(flatten)]
        filter: Filter,
    },
}

/// Which failed transactions; without a flag, all.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct Filter {
    /// Of this user
    #[arg(long)]
    pub user: Option<String>,
    /// Of this client
    #[arg(long)]
    pub client: Option<Uuid>,
    /// Refused with this code
    #[arg(long)]
    pub code: Option<Code>,
    /// Whose change at fault is to this table
    #[arg(long)]
    pub table: Option<String>,
    /// Not older than this: 90s, 15m, 2h, 7d, or a time such as 2026-01-31T12:00Z
    #[arg(long, value_parser = since)]
    pub since: Option<Since>,
}

/// A time from which on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Since {
    /// So long ago.
    Ago(Duration),
    /// A time as Postgres reads it.
    At(String),
}

fn since(text: &str) -> Result<Since, String> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 60 * 60,
        "d" => 24 * 60 * 60,
        _ => return Ok(Since::At(text.to_owned())),
    };
    let number: u64 = number.parse().map_err(|_| format!("{number:?} is not a number"))?;
    number.checked_mul(seconds).map(|s| Since::Ago(Duration::from_secs(s))).ok_or_else(|| "too long ago".to_owned())
}

/// Runs `millstream history`.
pub async fn run(args: Args) -> Result<Exit, Error> {
    let (database, nats) = args.servers()?;
    let options = postgres::options(&database, "history").map_err(Error::Connect)?;
    let mut connection = postgres::connect(&options).await.map_err(Error::Connect)?;
    let exit = match &args.command {
        HistoryCommand::List { filter, limit } => list(&mut connection, filter, *limit, args.output).await?,
        HistoryCommand::Show { id } => show(&mut connection, *id, args.output).await?,
        HistoryCommand::Parked => parked::list(&mut connection, args.output).await?,
        HistoryCommand::Reject { client_id, client_seq, message } => {
            parked::reject(&mut connection, *client_id, *client_seq, message).await?
        }
        HistoryCommand::Export { filter } => export(&mut connection, filter).await?,
        HistoryCommand::Replay { ids, wait } => {
            replay::run(&mut connection, &nats, ids, Duration::from_secs(*wait), args.output).await?
        }
    };
    // Nothing is lost with a connection that does not close well.
    let _closed = connection.close().await;
    Ok(exit)
}

impl Args {
    /// Where Postgres and NATS are: as told, else as dev mode's data folder says.
    fn servers(&self) -> Result<(postgres::Args, nats::Args), Error> {
        let seed = self.nats_seed_file.clone();
        let database = self.database.find().map_err(Error::NoDatabase)?;
        if self.database.given().is_some() {
            let nats_url = self.nats_url.clone().unwrap_or_else(|| "nats://127.0.0.1:4222".to_owned());
            return Ok((database, nats::Args { nats_url, nats_seed_file: seed }));
        }
        let nats = data_nats(&self.database.data, Role::Operator);
        let mut nats = nats.map_err(|source| Error::NoDatabase(self.database.missing(source)))?;
        nats.nats_url = self.nats_url.clone().unwrap_or(nats.nats_url);
        nats.nats_seed_file = seed.or(nats.nats_seed_file);
        Ok((database, nats))
    }
}

impl Filter {
    fn bind<'q>(&self, query: Query<'q, Postgres, PgArguments>) -> Query<'q, Postgres, PgArguments> {
        let (ago, at) = match &self.since {
            None => (None, None),
            Some(Since::Ago(time)) => (Some(time.as_secs_f64()), None),
            Some(Since::At(text)) => (None, Some(text.clone())),
        };
        query
            .bind(self.user.clone())
            .bind(self.client)
            .bind(self.code.map(Code::as_str))
            .bind(self.table.clone())
            .bind(ago)
            .bind(at)
    }
}

async fn list(connection: &mut PgConnection, filter: &Filter, limit: u32, output: Output) -> Result<Exit, Error> {
    const COLUMNS: [&str; 11] = [
        "id",
        "at",
        "user_id",
        "client_id",
        "client_seq",
        "attempt",
        "table_name",
        "operation",
        "code",
        "rule",
        "message",
    ];
    let sql = format!(
        "SELECT h.id, to_char(h.at AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), h.user_id, h.client_id::text, \
         h.seq, h.attempt::int8, h.table_name, h.operation, h.code, h.rule, h.message \
         FROM millstream.changes_history h WHERE {MATCHES} ORDER BY h.id DESC LIMIT $7"
    );
    let rows = filter
        .bind(sqlx::query(AssertSqlSafe(sql)))
        .bind(i64::from(limit))
        .fetch_all(connection)
        .await
        .map_err(Error::Query)?;
    let value = |row: &PgRow, index: usize| -> Result<SqlValue, sqlx::Error> {
        Ok(match COLUMNS[index] {
            "id" | "client_seq" | "attempt" => SqlValue::Integer(row.try_get(index)?),
            _ => row.try_get::<Option<String>, _>(index)?.map_or(SqlValue::Null, SqlValue::Text),
        })
    };
    let rows = rows
        .iter()
        .map(|row| (0..COLUMNS.len()).map(|index| value(row, index)).collect::<Result<Vec<_>, _>>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(Error::Query)?;
    output::rows(&Rows { columns: COLUMNS.map(str::to_owned).to_vec(), rows }, output);
    Ok(Exit::Ok)
}

async fn show(connection: &mut PgConnection, id: i64, output: Output) -> Result<Exit, Error> {
    let text: Option<String> =
        sqlx::query_scalar("SELECT to_jsonb(h)::text FROM millstream.changes_history h WHERE h.id = $1")
            .bind(id)
            .fetch_optional(connection)
            .await
            .map_err(Error::Query)?;
    let text = text.ok_or(Error::NotFound(id))?;
    let record: Value = serde_json::from_str(&text).map_err(|source| Error::Payload { id, source })?;
    match output {
        Output::Json => print(&record.to_string()),
        Output::Text => print(record_text(&record).trim_end()),
    }
    Ok(Exit::Ok)
}

/// A record for people: what it says of the transaction, then its changes.
fn record_text(record: &Value) -> String {
    let word = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let mut text = String::new();
    for (name, value) in record.as_object().into_iter().flatten() {
        if name != "payload" && !value.is_null() {
            text.push_str(&format!("{name:<11} {}\n", word(value)));
        }
    }
    for change in record["payload"]["changes"].as_array().into_iter().flatten() {
        let at_fault = if change["change_id"] == record["change_id"] { "  <- refused" } else { "" };
        text.push_str(&format!("\n{} {} {}{at_fault}\n", word(&change["op"]), word(&change["table"]), change["key"]));
        let columns = change["columns"].as_array().into_iter().flatten();
        for (column, value) in columns.zip(change["values"].as_array().into_iter().flatten()) {
            text.push_str(&format!("    {} = {value}\n", word(column)));
        }
    }
    text
}

/// Streams: what is in memory at a time is a row, not the history.
async fn export(connection: &mut PgConnection, filter: &Filter) -> Result<Exit, Error> {
    let sql = format!("SELECT to_jsonb(h)::text FROM millstream.changes_history h WHERE {MATCHES} ORDER BY h.id");
    let mut rows = filter.bind(sqlx::query(AssertSqlSafe(sql))).fetch(connection);
    let mut out = io::BufWriter::new(io::stdout());
    let written = async {
        while let Some(row) = rows.try_next().await.map_err(Error::Query)? {
            let line: String = row.try_get(0).map_err(Error::Query)?;
            writeln!(out, "{line}").map_err(Error::Write)?;
        }
        out.flush().map_err(Error::Write)
    };
    match written.await {
        // A reader that has seen enough (`| head`) is no error.
        Err(Error::Write(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Exit::Ok),
        written => written.map(|()| Exit::Ok),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn times_are_spans_or_dates() {
        let seconds = |seconds| Ok(Since::Ago(Duration::from_secs(seconds)));
        for (text, expected) in [
            ("90s", seconds(90)),
            ("15m", seconds(900)),
            ("2h", seconds(7_200)),
            ("7d", seconds(604_800)),
            ("2026-01-31T12:00Z", Ok(Since::At("2026-01-31T12:00Z".into()))),
            ("d", Err("\"\" is not a number".into())),
            ("99999999999999999d", Err("too long ago".into())),
        ] {
            assert_eq!(since(text), expected, "{text}");
        }
    }

    #[test]
    fn records_name_the_change_at_fault() {
        let change = |id: u32, title: &str| json!({"change_id": id, "table": "tasks", "op": "insert", "key": ["k"], "columns": ["title"], "values": [title]});
        let record = json!({"id": 7, "code": "business_rule", "rule": null, "change_id": 2,
            "payload": {"changes": [change(1, "a"), change(2, "b")]}});
        let text = record_text(&record);
        assert!(text.contains("code        business_rule\n") && !text.contains("rule        null"), "{text}");
        assert!(text.contains("insert tasks [\"k\"]\n    title = \"a\"\n"), "{text}");
        assert!(text.contains("insert tasks [\"k\"]  <- refused\n    title = \"b\"\n"), "{text}");
    }
}
