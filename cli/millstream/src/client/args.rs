//! Flags of `millstream client`.

use std::path::PathBuf;

use millstream_stack::data::DEV_DATA;

use crate::output::Output;

/// Flags of `millstream client`.
#[derive(clap::Args)]
#[command(before_help = "Examples:
  millstream client --store a.db --user alice sql \"SELECT title, done FROM tasks\"
  millstream client --store a.db --user alice sql \"UPDATE tasks SET done = 1 WHERE title = 'Buy milk'\"
  millstream client --store a.db --user alice sql \"INSERT INTO projects (id, name) VALUES (millstream_uuid(), 'Attic')\"
  millstream client --store b.db --user bob watch tasks
  millstream client --store a.db --offline sql \"DELETE FROM comments\"      queued, sent when next online
  millstream client --store a.db --user alice -o json status
  millstream client --store a.db --user alice queue list --failed
  millstream client --store a.db --user alice queue show 7
  millstream client --store a.db --user alice queue edit 7 --set title='Buy oat milk'")]
#[command(
    after_help = "Exit status: 0 done (applied, or queued while offline), 1 failed or rejected, or `status` found that the edge does not take this client, 3 wrong \
configuration, 4 the edge is needed and not there. Data goes to stdout, the rest to stderr."
)]
pub struct Args {
    /// The local SQLite store; created when missing
    #[arg(long, env = "MILLSTREAM_STORE")]
    pub store: PathBuf,
    /// URL of the edge
    #[arg(long, env = "MILLSTREAM_EDGE", default_value = "ws://127.0.0.1:4800")]
    pub edge: String,
    /// Do not connect
    #[arg(long)]
    pub offline: bool,
    /// Act as this user, with a token made with dev mode's secret
    #[arg(long, conflicts_with = "token_file")]
    pub user: Option<String>,
    /// File with a session token
    #[arg(long, env = "MILLSTREAM_TOKEN_FILE")]
    pub token_file: Option<PathBuf>,
    /// The session token itself: by the environment only
    #[arg(long = "token", env = "MILLSTREAM_TOKEN", hide = true, hide_env_values = true)]
    pub token: Option<String>,
    /// Data folder of dev mode, for --user
    #[arg(long, env = "MILLSTREAM_DEV_DATA", default_value = DEV_DATA)]
    pub data: PathBuf,
    /// Seconds to wait for the connection, for more of a first snapshot, and for the verdict on a write
    #[arg(long, default_value_t = 5.0)]
    pub wait: f64,
    /// How to print data
    #[arg(short, long, value_enum, global = true, default_value_t = Output::Text)]
    pub output: Output,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(clap::Subcommand)]
pub enum Command {
    /// Read, or write: several statements are one transaction
    Sql {
        /// SQLite statements; millstream_uuid() makes an id
        #[arg(required = true)]
        statements: Vec<String>,
    },
    /// Show a table or query now and whenever it changes, until Ctrl-C
    Watch {
        /// Name of a table, or a SELECT
        query: String,
        /// End once the rows have been shown this often
        #[arg(long)]
        times: Option<u64>,
    },
    /// Connection, queue, failures, position
    Status,
    /// The queue of local changes: what waits, what failed and why, and what to do about it
    #[command(subcommand)]
    Queue(Queue),
}

/// What to do with the queue. Transactions are named by their number in it.
#[derive(clap::Subcommand)]
pub enum Queue {
    /// The newest entries, settled ones included
    #[command(
        after_help = "States: pending (recorded), sending, accepted (on the broker), then applied, merged or superseded \
(took effect, or lost to newer changes); retry_wait (rejected, tried again by itself), error (rejected, waits for you), \
held (waits for an earlier transaction on the same rows)."
    )]
    List {
        /// Most entries to list
        #[arg(long, default_value_t = 50)]
        limit: usize,
        /// Only those that failed or are held back
        #[arg(long)]
        failed: bool,
    },
    /// All of one transaction: its changes, and why it has not taken effect
    Show {
        /// Its number
        transaction: u64,
    },
    /// Submit a failed transaction again
    Retry {
        /// Its number
        transaction: u64,
    },
    /// Submit a failed transaction again with other values
    Edit {
        /// Its number
        transaction: u64,
        /// column=value, as Postgres writes it; column= is an empty text
        #[arg(long, value_name = "COLUMN=VALUE", value_parser = assignment, required_unless_present = "set_null")]
        set: Vec<(String, String)>,
        /// A column to set to null
        #[arg(long, value_name = "COLUMN")]
        set_null: Vec<String>,
        /// The change, by its id; otherwise the one that failed
        #[arg(long)]
        change: Option<uuid::Uuid>,
    },
    /// Forget a failed or held transaction: its rows show the server's state
    Discard {
        /// Its number
        transaction: u64,
    },
    /// Record the unsent changes of a store that was damaged again, each transaction as a new one
    #[command(
        after_help = "A damaged store is put aside when it is opened, and what was unsent is saved beside it. What does not apply \
stays in the file, with the reason told; what was recorded is not recorded again. Exit status: 1 if anything was kept."
    )]
    Import {
        /// The file that the damaged store left: `STORE.unsent-TIME.json`
        file: PathBuf,
        /// Also transactions of which changes may be missing
        #[arg(long)]
        incomplete: bool,
    },
}

fn assignment(text: &str) -> Result<(String, String), &'static str> {
    match text.split_once('=') {
        Some((column, value)) if !column.is_empty() => Ok((column.to_owned(), value.to_owned())),
        _ => Err("expected COLUMN=VALUE"),
    }
}
