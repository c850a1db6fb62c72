//! `millstream bench`: measures the whole loop on a private stack, or a part of it, and in the same run the floor below it:
//! what this machine's Postgres and JetStream do at best. Absolutes depend on the machine; the ratio to the floor travels.

mod broadcast;
mod catchup;
mod cpu;
mod drain;
mod error;
mod executor;
mod fanout;
mod figures;
mod floor;
mod load;
mod rig;
mod snapshot;
mod socket;
mod verify;
mod whole_loop;

pub use broadcast::BroadcastArgs;
pub use catchup::CatchupArgs;
pub use drain::DrainArgs;
pub use error::Error;
pub use executor::ExecutorArgs;
pub use fanout::FanoutArgs;
pub use load::LoopArgs;
pub use snapshot::SnapshotArgs;

/// Flags of `millstream bench`.
#[derive(clap::Args, Debug)]
#[command(before_help = "Examples:
  cargo millstream bench loop            for people
  cargo millstream bench loop --json     one JSON object on stdout
  cargo millstream bench executor        the executor beside plain SQL
  cargo millstream bench drain           a long offline queue
  cargo millstream bench snapshot        a new client's first rows
  cargo millstream bench fanout          one scope with many subscribers
  cargo millstream bench catchup         a client that comes back far behind")]
pub struct Args {
    /// What to measure.
    #[command(subcommand)]
    pub what: What,
}

/// What to measure.
#[derive(clap::Subcommand, Debug)]
pub enum What {
    /// From a write on one client to the applied row on another: latency at a steady rate, then throughput
    Loop(LoopArgs),
    /// From submitted changes to committed rows: the executor beside the same batches by plain SQL
    Executor(ExecutorArgs),
    /// From going online with a long queue to its last confirmation, and whether rows flicker meanwhile
    Drain(DrainArgs),
    /// From opening a new store to its holding a scope of many rows: beside COPY into SQLite
    Snapshot(SnapshotArgs),
    /// From a write to many subscribers of its scope: latency, CPU and memory, beside a server that only broadcasts
    Fanout(FanoutArgs),
    /// From opening a store that is far behind to its being up to date
    Catchup(CatchupArgs),
    /// The server that only broadcasts
    #[command(hide = true)]
    Broadcast(BroadcastArgs),
}

/// Runs `millstream bench`.
///
/// # Errors
/// See [`Error`].
pub async fn run(args: Args) -> Result<(), Error> {
    match args.what {
        What::Loop(args) => whole_loop::run(args).await,
        What::Executor(args) => executor::run(args).await,
        What::Drain(args) => drain::run(args).await,
        What::Snapshot(args) => snapshot::run(args).await,
        What::Fanout(args) => fanout::run(args).await,
        What::Catchup(args) => catchup::run(args).await,
        What::Broadcast(args) => broadcast::serve(args).await,
    }
}
