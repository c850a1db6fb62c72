//! The command line: subcommands, exit codes, errors for people.

use std::error::Error as StdError;
use std::io::Write as _;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use millstream_catalog::{CatalogError, ConfigError};
use millstream_provision::exit::{Exit, HasExit};
use millstream_runtime::shutdown::Shutdown;
use millstream_runtime::telemetry;

use crate::{attach, check, client, dev, healthcheck, history, keys, sessions, setup, token};

/// Offline-first sync for Postgres over NATS JetStream
#[derive(Parser)]
#[command(name = "millstream", version, propagate_version = true)]
#[command(before_help = "Examples:
  millstream dev                                                        everything on this machine
  millstream client --store a.db --user alice sql \"SELECT * FROM tasks\"
  millstream client --store b.db --user bob watch tasks
  millstream bench loop --json")]
#[command(
    after_help = "Exit status: 0 done, 1 failed, 2 wrong usage, 3 wrong configuration, 4 something needed is not \
there, 5 a check found problems."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run everything privately on this machine: Postgres, NATS, the services, an example
    Dev(dev::Args),
    /// A client of one's own: read, write, watch, online and offline
    Client(client::Args),
    /// Failed changes: list, show, replay, export
    History(history::Args),
    /// End the sessions of a user
    Sessions(sessions::Args),
    /// Mint a session token
    Token(token::Args),
    /// Measure latency and throughput of the whole loop
    Bench(millstream_bench::Args),
    /// Write the migration that lets concurrent changes to a table merge
    Attach(attach::Args),
    /// Hold millstream.toml against the database
    Check(check::Args),
    /// Deploy step: migrations, roles, publication, streams
    Setup(setup::Args),
    /// Deploy step: NATS identities of the services
    Keys(keys::Args),
    /// Ask a service whether it is ready
    Healthcheck(healthcheck::Args),
    /// Service: WebSockets of the clients
    Edge(millstream_edge::Args),
    /// Service: from submitted change to committed row
    Changes(millstream_changes::Args),
    /// Service: from WAL to stream
    Replication(millstream_replication::Args),
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    let command = Cli::parse().command;
    // Services tell of themselves; the other commands only when asked, since stderr is for people there.
    let asked = std::env::var_os("RUST_LOG").is_some_and(|value| !value.is_empty()) || telemetry::is_configured();
    let service = match &command {
        Command::Edge(_) => Some("edge"),
        Command::Changes(_) => Some("changes"),
        Command::Replication(_) => Some("replication"),
        Command::Client(_) => asked.then_some("client"),
        _ => asked.then_some("cli"),
    };
    let _telemetry = service.map(telemetry::init);
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return fail(&error),
    };
    match runtime.block_on(run(command)) {
        Ok(exit) => exit.into(),
        Err(Failure(error)) => fail(error.as_ref()),
    }
}

/// An error that ends the program.
struct Failure(Box<dyn HasExit>);

impl<E: HasExit + 'static> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure(Box::new(error))
    }
}

/// A service ended.
#[derive(Debug, thiserror::Error)]
enum ServiceError {
    #[error(transparent)]
    Edge(millstream_edge::Error),
    #[error(transparent)]
    Changes(millstream_changes::Error),
    #[error(transparent)]
    Replication(millstream_replication::Error),
}

impl HasExit for ServiceError {
    /// Services know nothing of exit codes; what each of them reads first is its configuration.
    fn exit(&self) -> Exit {
        let mut next = self.source();
        while let Some(error) = next {
            if error.is::<ConfigError>() || error.is::<CatalogError>() {
                return Exit::Config;
            }
            next = error.source();
        }
        Exit::Failed
    }
}

async fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Dev(args) => dev::run(args).await?,
        Command::Client(args) => return Ok(client::run(args).await?),
        Command::History(args) => return Ok(history::run(args).await?),
        Command::Sessions(args) => sessions::run(args).await?,
        Command::Token(args) => token::run(&args)?,
        Command::Bench(args) => millstream_bench::run(args).await?,
        Command::Attach(args) => attach::run(args).await?,
        Command::Check(args) => return Ok(check::run(args).await?),
        Command::Setup(args) => setup::run(args).await?,
        Command::Keys(args) => keys::run(&args)?,
        Command::Healthcheck(args) => healthcheck::run(&args)?,
        Command::Edge(args) => millstream_edge::run(args, Shutdown::on_signals()?).await.map_err(ServiceError::Edge)?,
        Command::Changes(args) => {
            millstream_changes::run(args, Shutdown::on_signals()?).await.map_err(ServiceError::Changes)?
        }
        Command::Replication(args) => {
            millstream_replication::run(args, Shutdown::on_signals()?).await.map_err(ServiceError::Replication)?
        }
    }
    Ok(Exit::Ok)
}

/// The error with its causes on stderr, and its exit code.
fn fail(error: &dyn HasExit) -> ExitCode {
    let mut text = format!("error: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        let line = error.to_string();
        // Some libraries repeat the cause in their own text.
        if !text.ends_with(&line) {
            text.push_str(&format!("\n  because: {line}"));
        }
        cause = error.source();
    }
    let _unread = writeln!(std::io::stderr(), "{text}");
    error.exit().into()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }
}
