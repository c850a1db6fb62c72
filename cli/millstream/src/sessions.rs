//! `millstream sessions`: ends the sessions of a user, and what tokens they hold. Edges notice within a second or two.

use millstream_provision::exit::{Exit, HasExit};
use millstream_provision::setup::is_absence;
use millstream_runtime::postgres;
use sqlx::Row as _;

use crate::database::{DatabaseArgs, NoDatabase};

/// Flags of `millstream sessions`.
#[derive(clap::Args)]
#[command(before_help = "Examples:
  millstream sessions end --user alice        her account is closed, or a device was lost
  millstream sessions list
  millstream sessions forget --user alice     older tokens are good again")]
#[command(
    after_help = "`end` closes the user's sessions on every edge with `needs_auth`, and refuses tokens that were issued until \
now (by their claim `iat`; a token without one is refused until `forget`). A newer token is taken: stop issuing them first where \
the user is to stay out. Without DATABASE_URL the stack of `millstream dev` in --data is used."
)]
pub struct Args {
    /// The database.
    #[command(flatten)]
    pub database: DatabaseArgs,
    /// What to do.
    #[command(subcommand)]
    pub command: SessionsCommand,
}

/// What to do.
#[derive(clap::Subcommand)]
pub enum SessionsCommand {
    /// End all sessions of a user
    End {
        /// User id, as tokens name it in `sub`
        #[arg(long)]
        user: String,
    },
    /// Users whose sessions were ended, and when
    List,
    /// Take older tokens of a user again
    Forget {
        /// User id
        #[arg(long)]
        user: String,
    },
}

/// Sessions cannot be ended.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither settings nor dev mode.
    #[error("which database?")]
    NoDatabase(#[source] NoDatabase),
    /// Postgres cannot be reached.
    #[error("cannot connect to Postgres")]
    Connect(#[source] sqlx::Error),
    /// A statement.
    #[error("cannot use millstream.ended_sessions; has `millstream setup` run?")]
    Query(#[source] sqlx::Error),
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        match self {
            Error::NoDatabase(error) => error.exit(),
            Error::Connect(error) if is_absence(error) => Exit::Dependency,
            _ => Exit::Failed,
        }
    }
}

/// Runs `millstream sessions`.
///
/// # Errors
/// See [`Error`].
pub async fn run(args: Args) -> Result<(), Error> {
    let database = args.database.find().map_err(Error::NoDatabase)?;
    let options = postgres::options(&database, "sessions").map_err(Error::Connect)?;
    let mut connection = postgres::connect(&options).await.map_err(Error::Connect)?;
    match &args.command {
        SessionsCommand::End { user } => {
            let end = "INSERT INTO millstream.ended_sessions (user_id) VALUES ($1)
                       ON CONFLICT (user_id) DO UPDATE SET ended_at = excluded.ended_at";
            sqlx::query(end).bind(user).execute(&mut connection).await.map_err(Error::Query)?;
            println!("ended: sessions of {user}, and tokens issued until now");
        }
        SessionsCommand::List => {
            let list = "SELECT user_id, ended_at::text FROM millstream.ended_sessions ORDER BY ended_at DESC, user_id";
            for row in sqlx::query(list).fetch_all(&mut connection).await.map_err(Error::Query)? {
                println!("{}  {}", row.get::<&str, _>(1), row.get::<&str, _>(0));
            }
        }
        SessionsCommand::Forget { user } => {
            let forget = "DELETE FROM millstream.ended_sessions WHERE user_id = $1";
            let found = sqlx::query(forget).bind(user).execute(&mut connection).await.map_err(Error::Query)?;
            println!("{}", if found.rows_affected() > 0 { "forgotten" } else { "nothing was ended for this user" });
        }
    }
    Ok(())
}
