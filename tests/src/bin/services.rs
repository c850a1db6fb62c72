//! Millstream's services as the system tests run them: built by cargo together with the tests, so never out of date. The
//! command `millstream` has the same subcommands, and its own tests run it.

use anyhow::Result;
use clap::Parser as _;
use millstream_runtime::shutdown::Shutdown;
use millstream_runtime::telemetry;

#[derive(clap::Parser)]
enum Service {
    Edge(millstream_edge::Args),
    Changes(millstream_changes::Args),
    Replication(millstream_replication::Args),
}

#[tokio::main]
async fn main() -> Result<()> {
    let service = Service::parse();
    let _telemetry = telemetry::init(match service {
        Service::Edge(_) => "edge",
        Service::Changes(_) => "changes",
        Service::Replication(_) => "replication",
    });
    let shutdown = Shutdown::on_signals()?;
    match service {
        Service::Edge(args) => millstream_edge::run(args, shutdown).await?,
        Service::Changes(args) => millstream_changes::run(args, shutdown).await?,
        Service::Replication(args) => millstream_replication::run(args, shutdown).await?,
    }
    Ok(())
}
