//! Files that appear whole: a reader sees the old text or the new one, never half of it.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// Writes a file that only its owner may read.
///
/// # Errors
/// It cannot be written.
pub fn write_secret(path: &Path, secret: &str) -> io::Result<()> {
    let temporary = temporary(path);
    if let Err(error) = fs::remove_file(&temporary)
        && error.kind() != io::ErrorKind::NotFound
    {
        return Err(error);
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    writeln!(file, "{secret}")?;
    file.sync_all()?;
    fs::rename(&temporary, path)
}

/// Writes a file in place of what is there.
///
/// # Errors
/// It cannot be written.
pub fn write_atomically(path: &Path, text: &str) -> io::Result<()> {
    let temporary = temporary(path);
    fs::write(&temporary, text)?;
    fs::rename(&temporary, path)
}

fn temporary(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    path.with_file_name(name)
}
