//! What lies where in a data folder.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use millstream_provision::keys::Role;
use millstream_runtime::nats;

use crate::ports::saved;
use crate::service::Service;

/// Data folder of dev mode, in the working folder.
pub const DEV_DATA: &str = ".millstream/dev";
/// The application's database.
pub const DATABASE: &str = "app";

/// URL of the application's database for its owner, as a data folder says.
///
/// # Errors
/// No stack was started in the folder.
pub fn data_postgres_url(data: &Path) -> io::Result<String> {
    let password = fs::read_to_string(data.join("secrets/postgres.password"))?;
    let port = saved(data, Service::Postgres)?;
    Ok(format!("postgres://postgres:{}@127.0.0.1:{port}/{DATABASE}", password.trim()))
}

/// How a role connects to the broker, as a data folder says.
///
/// # Errors
/// No stack was started in the folder.
pub fn data_nats(data: &Path, role: Role) -> io::Result<nats::Args> {
    let port = saved(data, Service::Nats)?;
    Ok(nats::Args {
        nats_url: format!("nats://127.0.0.1:{port}"),
        nats_seed_file: Some(role.seed_file(&data.join("nats"))),
    })
}

/// File with the secret of a data folder's tokens.
pub fn token_secret_file(data: &Path) -> PathBuf {
    data.join("secrets/token.secret")
}

/// The superuser's password as of the template; removed once he has his own.
pub(crate) fn initial_password_file(dir: &Path) -> PathBuf {
    dir.join("secrets/postgres.initial")
}
