//! One NATS identity per service, with no more rights than it needs.
//!
//! A user's seed is a file `{role}.nk` with mode 0600; `nats-auth.conf` holds the public keys and the grants, and is
//! included by `deploy/nats.conf`. Keys that exist are kept, so that the command can run at every deployment.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use millstream_schemas::subject::{
    CHANGES_STREAM, CHANGES_SUBJECTS, RESULTS_STREAM, RESULTS_SUBJECTS, WAL_STREAM, WAL_SUBJECTS, WATERMARK, validate,
};
use nkeys::KeyPair;

use crate::exit::{Exit, HasExit};
use crate::files::{write_atomically, write_secret};

/// Name of the file with public keys and grants.
pub const AUTH_CONF: &str = "nats-auth.conf";

/// Who connects to NATS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The WebSocket service.
    Edge,
    /// Validator and executor.
    Changes,
    /// WAL to stream.
    Replication,
    /// The deploy step, which alone may create or change streams.
    Setup,
    /// External validators: programs outside that are asked about changes.
    Validator,
    /// Whoever replays failed changes by `millstream history replay`.
    Operator,
    /// Everything: for tests and the bench. Never part of a deployment, see [`Role::DEPLOYED`].
    Admin,
}

impl Role {
    /// The roles that `millstream keys` makes.
    pub const DEPLOYED: [Role; 6] =
        [Role::Edge, Role::Changes, Role::Replication, Role::Setup, Role::Validator, Role::Operator];

    /// The role's name: of its key file and of its inbox.
    pub fn name(self) -> &'static str {
        match self {
            Role::Edge => "edge",
            Role::Changes => "changes",
            Role::Replication => "replication",
            Role::Setup => "setup",
            Role::Validator => "validator",
            Role::Operator => "operator",
            Role::Admin => "admin",
        }
    }

    /// The role's seed file in a folder.
    pub fn seed_file(self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.nk", self.name()))
    }

    /// What the role may publish, and what it may subscribe to beside its own inbox.
    fn grants(self) -> Grants {
        let mut publish: Vec<String> = Vec::new();
        let mut subscribe: Vec<String> = Vec::new();
        match self {
            Role::Edge => {
                publish.extend([CHANGES_SUBJECTS.into(), WATERMARK.into()]);
                publish.extend(consumer_api(WAL_STREAM));
                publish.extend(direct_get(WAL_STREAM));
                publish.extend([stream_api("INFO", WAL_STREAM), stream_api("INFO", CHANGES_STREAM)]);
                subscribe.push(RESULTS_SUBJECTS.into());
            }
            Role::Changes => {
                publish.extend([RESULTS_SUBJECTS.into(), validate(">")]);
                publish.extend(consumer_api(CHANGES_STREAM));
                publish.extend([
                    stream_api("INFO", CHANGES_STREAM),
                    stream_api("PURGE", CHANGES_STREAM),
                    stream_api("MSG.GET", CHANGES_STREAM),
                    stream_api("INFO", RESULTS_STREAM),
                ]);
            }
            Role::Replication => {
                publish.push(WAL_SUBJECTS.into());
                publish.extend([stream_api("INFO", WAL_STREAM), stream_api("MSG.GET", WAL_STREAM)]);
                publish.extend(direct_get(WAL_STREAM));
                subscribe.push(WATERMARK.into());
            }
            Role::Setup => {
                publish.push("$JS.API.INFO".into());
                for stream in [CHANGES_STREAM, WAL_STREAM, RESULTS_STREAM] {
                    publish.extend(["CREATE", "UPDATE", "INFO"].map(|verb| stream_api(verb, stream)));
                }
            }
            // Replies only, see below.
            Role::Validator => subscribe.push(validate(">")),
            // Its replays go the way of all changes, and the ledger has the verdict.
            Role::Operator => publish.push(CHANGES_SUBJECTS.into()),
            Role::Admin => {
                publish.push(">".into());
                subscribe.push(">".into());
            }
        }
        // Replies go to an inbox of the role's own: with a shared prefix any service could read another's. Who makes no
        // requests needs none.
        if self != Role::Validator {
            subscribe.push(format!("_INBOX_{}.>", self.name()));
        }
        // Replication answers watermark requests and validators questions, on whatever inbox they name.
        Grants { publish, subscribe, allow_responses: matches!(self, Role::Replication | Role::Validator) }
    }
}

struct Grants {
    publish: Vec<String>,
    subscribe: Vec<String>,
    allow_responses: bool,
}

/// Requests that open, read and drop a pull consumer of a stream.
fn consumer_api(stream: &str) -> Vec<String> {
    vec![
        format!("$JS.API.CONSUMER.CREATE.{stream}"),
        format!("$JS.API.CONSUMER.CREATE.{stream}.>"),
        format!("$JS.API.CONSUMER.INFO.{stream}.*"),
        format!("$JS.API.CONSUMER.DELETE.{stream}.*"),
        format!("$JS.API.CONSUMER.MSG.NEXT.{stream}.*"),
    ]
}

/// Requests that read messages of a stream without a consumer.
fn direct_get(stream: &str) -> Vec<String> {
    vec![format!("$JS.API.DIRECT.GET.{stream}"), format!("$JS.API.DIRECT.GET.{stream}.>")]
}

fn stream_api(verb: &str, stream: &str) -> String {
    format!("$JS.API.STREAM.{verb}.{stream}")
}

/// Keys could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the folder.
    #[error("cannot access {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A seed file holds something else.
    #[error("{path} holds no NATS user seed")]
    Seed {
        /// Which.
        path: PathBuf,
        /// Why.
        source: nkeys::error::Error,
    },
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        Exit::Failed
    }
}

/// Makes the keys that are missing and writes [`AUTH_CONF`]. Returns the roles whose key is new.
pub fn ensure(dir: &Path, roles: &[Role]) -> Result<Vec<Role>, Error> {
    fs::create_dir_all(dir).map_err(|source| Error::File { path: dir.into(), source })?;
    let mut created = Vec::new();
    let mut users = Vec::new();
    for &role in roles {
        let path = role.seed_file(dir);
        let key = match fs::read_to_string(&path) {
            Ok(seed) => KeyPair::from_seed(seed.trim()).map_err(|source| Error::Seed { path: path.clone(), source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = KeyPair::new_user();
                let seed = key.seed().map_err(|source| Error::Seed { path: path.clone(), source })?;
                write_secret(&path, &seed).map_err(|source| Error::File { path: path.clone(), source })?;
                created.push(role);
                key
            }
            Err(source) => return Err(Error::File { path, source }),
        };
        users.push((role, key.public_key()));
    }
    let path = dir.join(AUTH_CONF);
    write_atomically(&path, &auth_conf(&users)).map_err(|source| Error::File { path, source })?;
    Ok(created)
}

/// The text of [`AUTH_CONF`].
fn auth_conf(users: &[(Role, String)]) -> String {
    let mut text = String::from(
        "# Written by `millstream keys`; changes are overwritten. Public keys only: the seeds are in the *.nk files.\n\
         accounts {\n    SYS {}\n    APP {\n        jetstream: enabled\n        users: [\n",
    );
    for (role, public_key) in users {
        let grants = role.grants();
        text.push_str(&format!("            # {}\n            {{\n", role.name()));
        text.push_str(&format!("                nkey: {public_key}\n                permissions {{\n"));
        // An empty list of what is allowed would be easy to take for no limit.
        let publish = match grants.publish.as_slice() {
            [] => "deny: \">\"".to_owned(),
            allowed => format!("allow: {}", list(allowed)),
        };
        text.push_str(&format!("                    publish {{ {publish} }}\n"));
        text.push_str(&format!("                    subscribe {{ allow: {} }}\n", list(&grants.subscribe)));
        if grants.allow_responses {
            text.push_str("                    allow_responses: true\n");
        }
        text.push_str("                }\n            }\n");
    }
    text.push_str("        ]\n    }\n}\nsystem_account: SYS\n");
    text
}

fn list(subjects: &[String]) -> String {
    let quoted: Vec<String> = subjects.iter().map(|subject| format!("\"{subject}\"")).collect();
    format!("[{}]", quoted.join(", "))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn keys_are_private_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("keys");
        assert_eq!(ensure(&dir, &Role::DEPLOYED).unwrap(), Role::DEPLOYED);
        let seed = Role::Edge.seed_file(&dir);
        assert_eq!(fs::metadata(&seed).unwrap().permissions().mode() & 0o777, 0o600);
        let (before, conf) = (fs::read(&seed).unwrap(), fs::read(dir.join(AUTH_CONF)).unwrap());
        assert_eq!(ensure(&dir, &Role::DEPLOYED).unwrap(), []);
        assert_eq!(fs::read(&seed).unwrap(), before);
        assert_eq!(fs::read(dir.join(AUTH_CONF)).unwrap(), conf);
    }

    #[test]
    fn a_damaged_seed_is_not_replaced() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(Role::Edge.seed_file(dir.path()), "not a seed").unwrap();
        assert!(matches!(ensure(dir.path(), &[Role::Edge]), Err(Error::Seed { .. })));
    }

    #[test]
    fn services_get_no_more_than_they_need() {
        let check = |role: Role, denied: &[&str]| {
            let grants = role.grants();
            for subject in denied {
                assert!(!grants.publish.iter().any(|allowed| matches(allowed, subject)), "{role:?} {subject}");
            }
            assert!(!grants.publish.iter().chain(&grants.subscribe).any(|subject| subject == ">"), "{role:?}");
        };
        check(Role::Edge, &["ms.wal.project.x", "ms.results.x", "$JS.API.STREAM.PURGE.MS_CHANGES"]);
        check(Role::Changes, &["ms.wal.project.x", "ms.changes.1", "$JS.API.STREAM.DELETE.MS_CHANGES"]);
        check(Role::Replication, &["ms.changes.1", "ms.results.x", "$JS.API.STREAM.PURGE.MS_WAL"]);
        check(Role::Setup, &["ms.changes.1", "$JS.API.STREAM.DELETE.MS_WAL"]);
        check(
            Role::Operator,
            &["ms.wal.project.x", "ms.results.x", "ms.validate.tasks", "$JS.API.STREAM.INFO.MS_CHANGES"],
        );
        check(Role::Validator, &["ms.changes.1", "ms.validate.tasks", "_INBOX_changes.x", "$JS.API.INFO"]);
        // Only the executor asks, only validators hear, and they say nothing but their answers.
        let asks = |role: Role| role.grants().publish.iter().any(|allowed| matches(allowed, "ms.validate.tasks"));
        let hears = |role: Role| role.grants().subscribe.iter().any(|allowed| matches(allowed, "ms.validate.tasks"));
        assert!(Role::DEPLOYED.into_iter().all(|role| asks(role) == (role == Role::Changes)));
        assert!(Role::DEPLOYED.into_iter().all(|role| hears(role) == (role == Role::Validator)));
        let validator = Role::Validator.grants();
        assert_eq!((validator.publish.len(), validator.allow_responses), (0, true));
        assert_eq!(validator.subscribe, ["ms.validate.>"]);
        let operator = Role::Operator.grants();
        assert_eq!((operator.publish, operator.allow_responses), (vec![CHANGES_SUBJECTS.to_owned()], false));
        let conf = auth_conf(&[(Role::Validator, "U".into())]);
        assert!(conf.contains("publish { deny: \">\" }") && conf.contains("allow_responses"), "{conf}");
    }

    /// NATS' rule for subjects, for the patterns used here.
    fn matches(pattern: &str, subject: &str) -> bool {
        let (mut pattern, mut subject) = (pattern.split('.'), subject.split('.'));
        loop {
            match (pattern.next(), subject.next()) {
                (Some(">"), Some(_)) | (None, None) => return true,
                (Some("*"), Some(_)) => {}
                (Some(a), Some(b)) if a == b => {}
                _ => return false,
            }
        }
    }
}
