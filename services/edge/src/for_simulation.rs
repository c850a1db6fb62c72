//! What a session reads and sends, without sockets, databases and brokers.

use std::collections::BTreeSet;

use millstream_schemas::frame::SnapshotMark;
use millstream_schemas::{Code, Scope};
use uuid::Uuid;

pub use crate::copy::reframed;
pub use crate::downlink::{Downlink, Next, Out};
pub use crate::fence::Fence;
pub use crate::message::Message;
pub use crate::reach::{Moves, Reach};
pub use crate::session::text;

use crate::resume::{self, Mark, Sealer, Token};
use crate::token::Verifier;

/// The user that a token signed with `secret` names.
///
/// # Errors
/// It does not hold.
pub fn user(secret: &[u8], token: &str) -> Result<String, (Code, &'static str)> {
    Verifier::new(secret).user(token).map(|identity| identity.user_id)
}

/// A token and a mark of a cut snapshot that this secret's edges did not write: whether they are taken for theirs.
pub fn is_taken(secret: &[u8], cut: &SnapshotMark) -> bool {
    resume::decode(&Sealer::new(secret), cut, "user", Uuid::nil()).is_some()
}

/// The token and the mark of a cut snapshot, past whatever vouches for them, as they are read and written again; and the moment,
/// if it is of these scopes and this layout.
pub fn resumed(cut: &SnapshotMark, version: &str, scopes: &BTreeSet<Scope>) -> Option<(SnapshotMark, Option<Fence>)> {
    let (token, mark): (Token, Mark) = (serde_json::from_str(&cut.token).ok()?, serde_json::from_str(&cut.mark).ok()?);
    let again = SnapshotMark { token: serde_json::to_string(&token).ok()?, mark: serde_json::to_string(&mark).ok()? };
    Some((again, token.fence(version, scopes)))
}
