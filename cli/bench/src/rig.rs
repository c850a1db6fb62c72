//! The rig that benches stand on: a folder, a private stack, and at the end the report.

use std::path::Path;

use millstream_stack::Stack;
use serde::Serialize;
use tempfile::TempDir;

use crate::error::Error;

/// The whole stack runs the board example.
pub const CONFIG: &str = include_str!("../../../examples/board/millstream.toml");
const SCHEMA: &str = include_str!("../../../examples/board/schema.sql");

/// A new folder with a `millstream.toml`.
pub fn folder(dir: Option<&Path>, config: &str) -> Result<TempDir, Error> {
    let folder = match dir {
        Some(dir) => std::fs::create_dir_all(dir).and_then(|()| tempfile::tempdir_in(dir)),
        None => tempfile::Builder::new().prefix("millstream-bench-").tempdir(),
    };
    let folder = folder.map_err(|source| Error::Folder { path: dir.unwrap_or(Path::new("")).into(), source })?;
    let file = |source| Error::Folder { path: folder.path().into(), source };
    // Postgres may run as another user, who must get through.
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o711)).map_err(file)?;
    std::fs::write(folder.path().join("millstream.toml"), config).map_err(file)?;
    Ok(folder)
}

/// Starts a private stack with the board example.
pub async fn start(folder: &TempDir) -> Result<Stack, Error> {
    eprintln!("starting a private stack …");
    let mut builder = Stack::builder();
    if let Ok(own) = std::env::current_exe() {
        builder = builder.executable(own);
    }
    builder
        .dir(folder.path().join("stack"))
        .app_schema(SCHEMA)
        .config(folder.path().join("millstream.toml"))
        .service_env("RUST_LOG", "warn")
        .start()
        .await
        .map_err(Error::Stack)
}

/// Stops the stack, and prints what was measured; where that failed, the stack's logs.
pub async fn finish<R: Serialize>(
    stack: Stack,
    outcome: Result<R, Error>,
    json: bool,
    print: fn(&R),
) -> Result<(), Error> {
    if outcome.is_err() {
        eprintln!("{}", stack.logs());
    }
    stack.stop().await;
    let report = outcome?;
    if json {
        println!("{}", serde_json::to_string(&report).unwrap_or_default());
    } else {
        print(&report);
    }
    Ok(())
}
