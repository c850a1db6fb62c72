//! Passwords and secrets of a data folder: made once, and kept.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use millstream_provision::files::write_secret;
use millstream_provision::names::SERVICE_ROLES;
use rand::distr::{Alphanumeric, SampleString as _};

use crate::data::token_secret_file;
use crate::error::Error;

/// Length of generated passwords and secrets: about 190 bits.
const SECRET_CHARACTERS: usize = 32;

/// The secrets of a stack.
pub(crate) struct Secrets {
    /// Password of the database's owner.
    pub superuser: String,
    /// Passwords of the services' roles, by the services' names.
    pub roles: BTreeMap<&'static str, String>,
    /// The secret that tokens are signed with.
    pub token: String,
}

impl Secrets {
    /// Those of a folder; what is missing is made.
    pub fn of(dir: &Path) -> Result<Secrets, Error> {
        let password = |name: &str| secret(&dir.join("secrets").join(format!("{name}.password")));
        let mut roles = BTreeMap::new();
        for role in SERVICE_ROLES {
            roles.insert(role.name(), password(role.name())?);
        }
        Ok(Secrets { superuser: password("postgres")?, roles, token: secret(&token_secret_file(dir))? })
    }
}

/// The secret in a file; made when the file is missing.
pub(crate) fn secret(path: &Path) -> Result<String, Error> {
    match fs::read_to_string(path) {
        Ok(secret) => Ok(secret.trim().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let secret = Alphanumeric.sample_string(&mut rand::rng(), SECRET_CHARACTERS);
            write_secret(path, &secret).map_err(Error::folder(path))?;
            Ok(secret)
        }
        Err(source) => Err(Error::Folder { path: path.into(), source }),
    }
}
