//! `millstream healthcheck`: for containers without curl.

use millstream_stack::healthcheck::{Error, get};

/// Flags of `millstream healthcheck`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Exit status: 0 ready, 4 not ready or no answer.")]
pub struct Args {
    /// Plain http:// URL; without a path, /readyz.
    pub url: String,
}

/// Runs `millstream healthcheck`.
pub fn run(args: &Args) -> Result<(), Error> {
    get(&args.url).map(drop)
}
