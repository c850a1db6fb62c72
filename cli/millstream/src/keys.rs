//! `millstream keys`: one NATS identity per service.

use std::path::PathBuf;

use millstream_provision::keys::{AUTH_CONF, Error, Role, ensure};

/// Flags of `millstream keys`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Writes DIR/edge.nk, changes.nk, replication.nk, setup.nk, validator.nk and operator.nk (seeds, mode 0600) \
where they are missing, and DIR/nats-auth.conf, which deploy/nats.conf includes."
)]
pub struct Args {
    /// Folder for the keys; created when missing.
    pub dir: PathBuf,
}

/// Runs `millstream keys`.
pub fn run(args: &Args) -> Result<(), Error> {
    let created = ensure(&args.dir, &Role::DEPLOYED)?;
    for role in Role::DEPLOYED {
        let what = if created.contains(&role) { "made" } else { "kept" };
        eprintln!("{what} {}", role.seed_file(&args.dir).display());
    }
    eprintln!("wrote {}", args.dir.join(AUTH_CONF).display());
    Ok(())
}
