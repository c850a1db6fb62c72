//! The private Postgres: its files, its user, its settings.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::binaries;
use crate::error::Error;
use crate::files::create_whole;
use crate::process::{self, Signal, Spec, User};
use crate::secrets::secret;

/// Users to run as when started as root, which Postgres refuses.
const UNPRIVILEGED: [&str; 2] = ["postgres", "nobody"];

/// Settings of the private server: everything durable as in production, nothing outside the data folder.
const SETTINGS: [(&str, &str); 15] = [
    ("listen_addresses", "127.0.0.1"),
    ("unix_socket_directories", ""),
    ("wal_level", "logical"),
    ("fsync", "on"),
    ("synchronous_commit", "on"),
    ("max_connections", "200"),
    ("max_wal_senders", "20"),
    ("max_replication_slots", "20"),
    ("max_slot_wal_keep_size", "10GB"),
    ("wal_sender_timeout", "60s"),
    ("password_encryption", "scram-sha-256"),
    ("log_line_prefix", "%m [%p] %q%a "),
    ("log_checkpoints", "off"),
    // In the data folder instead of /dev/shm, where a kill -9 would leave them.
    ("dynamic_shared_memory_type", "mmap"),
    ("timezone", "UTC"),
];

/// Environment variables by which the caller's own Postgres settings would leak in.
const FOREIGN_ENV: [&str; 7] = ["PGDATA", "PGPORT", "PGHOST", "PGUSER", "PGDATABASE", "PGPASSWORD", "PGOPTIONS"];

/// The user that Postgres runs as: none when we are not root.
pub(crate) fn user(bin: &Path, data: &Path) -> Option<User> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let user = UNPRIVILEGED.iter().find_map(|name| nix::unistd::User::from_name(name).ok().flatten())?;
    let (uid, gid) = (user.uid.as_raw(), user.gid.as_raw());
    let through_folders =
        !(may_enter(bin, uid, gid) && data.parent().is_some_and(|parent| may_enter(parent, uid, gid)));
    Some(User { uid, gid, through_folders })
}

/// Whether a user may enter a folder and all above it.
fn may_enter(path: &Path, uid: u32, gid: u32) -> bool {
    path.ancestors().all(|folder| {
        let Ok(metadata) = fs::metadata(if folder.as_os_str().is_empty() { Path::new(".") } else { folder }) else {
            return true;
        };
        let needed = if metadata.uid() == uid {
            0o100
        } else if metadata.gid() == gid {
            0o010
        } else {
            0o001
        };
        metadata.mode() & needed != 0
    })
}

/// The command line of the server.
pub(crate) fn spec(
    programs: &binaries::Postgres,
    data: &Path,
    port: u16,
    settings: &[(String, String)],
    log: PathBuf,
) -> Spec {
    let mut arguments = vec!["-D".to_owned(), data.to_string_lossy().into_owned(), "-p".to_owned(), port.to_string()];
    let defaults = SETTINGS.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    // The last one counts.
    for (name, value) in defaults.chain(settings.iter().cloned()) {
        arguments.extend(["-c".to_owned(), format!("{name}={value}")]);
    }
    Spec {
        name: "postgres".into(),
        program: programs.bin.join("postgres"),
        arguments,
        env: vec![("LC_ALL".into(), "C".into())],
        without_env: FOREIGN_ENV.to_vec(),
        dir: Some("/".into()),
        log,
        user: user(&programs.bin, data),
        has_children: true,
    }
}

/// Makes the files of a new server from a template in the cache: `initdb` takes a second or more. Returns the
/// superuser's password as of the template, to be changed at the first start.
pub(crate) fn create(
    programs: &binaries::Postgres,
    data: &Path,
    progress: &mut dyn FnMut(&str),
) -> Result<String, Error> {
    let cache = binaries::cache_dir().map_err(Error::Binaries)?;
    let version: String =
        programs.version.chars().map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' }).collect();
    let owner = user(&programs.bin, data).map_or(nix::unistd::geteuid().as_raw(), |user| user.uid);
    let template = cache.join(format!("postgres-data-{version}-{owner}"));
    if !template.is_dir() {
        progress("initdb …");
        create_whole(&template, |dir| initdb(programs, dir), |path, source| Error::Folder { path, source })?;
    }
    let password_file = template.join("password");
    let password = fs::read_to_string(&password_file).map_err(Error::folder(&password_file))?;
    let owner = user(&programs.bin, data);
    create_whole(
        data,
        |dir| copy(&template.join("data"), dir, owner.as_ref()).map_err(Error::folder(data)),
        |path, source| Error::Folder { path, source },
    )?;
    Ok(password.trim().to_owned())
}

/// Whether the folder's files are of the programs' major version.
pub(crate) fn check_version(programs: &binaries::Postgres, data: &Path) -> Result<(), Error> {
    let path = data.join("PG_VERSION");
    let found = fs::read_to_string(&path).map_err(Error::folder(&path))?;
    let found = found.trim();
    let fits = programs.version.strip_prefix(found).is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()));
    if fits {
        return Ok(());
    }
    Err(Error::PostgresVersion { path: data.into(), found: found.into(), needed: programs.version.clone() })
}

/// Runs `initdb` into `dir/data`, with a new superuser password in `dir/password`.
fn initdb(programs: &binaries::Postgres, dir: &Path) -> Result<(), Error> {
    let (data, password_file) = (dir.join("data"), dir.join("password"));
    let user = user(&programs.bin, &data);
    secret(&password_file)?;
    if let Some(user) = &user {
        for path in [dir, &password_file] {
            std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)).map_err(Error::folder(path))?;
        }
    }
    let mut command = process::command(user.as_ref(), Signal::SIGKILL, &programs.bin.join("initdb"));
    command.args(["--username=postgres", "--auth=scram-sha-256", "--encoding=UTF8", "--locale=C", "--no-sync"]);
    command.arg("--pgdata").arg(&data).arg("--pwfile").arg(&password_file);
    for name in FOREIGN_ENV {
        command.env_remove(name);
    }
    let output = command
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| Error::Spawn { name: "initdb".into(), source })?;
    if output.status.success() {
        return Ok(());
    }
    Err(Error::Initdb(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// Copies a folder with its modes, for a new owner. The target exists.
fn copy(from: &Path, to: &Path, owner: Option<&User>) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            fs::create_dir(&target)?;
            copy(&entry.path(), &target, owner)?;
        } else {
            fs::copy(entry.path(), &target)?;
            chown(&target, owner)?;
        }
    }
    fs::set_permissions(to, fs::Permissions::from_mode(0o700))?;
    chown(to, owner)
}

fn chown(path: &Path, owner: Option<&User>) -> io::Result<()> {
    match owner {
        Some(user) => std::os::unix::fs::chown(path, Some(user.uid), Some(user.gid)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_folders_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("private/open");
        fs::create_dir_all(&inner).unwrap();
        let stranger = 4_000_000_000;
        for (mode, enters) in [(0o755, true), (0o700, false), (0o711, true)] {
            fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
            fs::set_permissions(dir.path().join("private"), fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(may_enter(&inner, stranger, stranger), enters, "{mode:o}");
        }
    }

    #[test]
    fn data_of_another_version_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("PG_VERSION"), "15\n").unwrap();
        let check = |version: &str, fits: bool| {
            let programs = binaries::Postgres { bin: "/".into(), version: version.into() };
            assert_eq!(check_version(&programs, dir.path()).is_ok(), fits, "{version}");
        };
        check("15.18 (Debian 15.18-0+deb12u1)", true);
        check("15beta2", true);
        check("18.6", false);
        check("150.1", false);
    }
}
