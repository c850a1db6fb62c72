//! Folders that appear whole or not at all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Makes a folder that appears whole or not at all: `fill` works in a temporary one beside it, which is then renamed.
/// Another process that was faster wins; both made the same.
pub(crate) fn create_whole<E>(
    target: &Path,
    fill: impl FnOnce(&Path) -> Result<(), E>,
    io_error: impl Fn(PathBuf, io::Error) -> E,
) -> Result<(), E> {
    let parent = target.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(parent).map_err(|error| io_error(parent.into(), error))?;
    let temporary =
        tempfile::Builder::new().prefix(".part-").tempdir_in(parent).map_err(|error| io_error(parent.into(), error))?;
    fill(temporary.path())?;
    match fs::rename(temporary.path(), target) {
        Ok(()) => {
            // Renamed: nothing is left to remove at the old place.
            let _gone = temporary.keep();
            Ok(())
        }
        Err(_) if target.is_dir() => Ok(()),
        Err(error) => Err(io_error(target.into(), error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_appear_whole() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a/b");
        let failed: Result<(), String> = create_whole(&target, |_| Err("broken".to_owned()), |_, e| e.to_string());
        assert_eq!(failed, Err("broken".to_owned()));
        assert!(!target.exists());
        create_whole(
            &target,
            |dir| fs::write(dir.join("x"), "1").map_err(|e| e.to_string()),
            |_, error| error.to_string(),
        )
        .unwrap();
        assert_eq!(fs::read_to_string(target.join("x")).unwrap(), "1");
        assert_eq!(fs::read_dir(dir.path().join("a")).unwrap().count(), 1, "no temporary folder is left");
    }
}
