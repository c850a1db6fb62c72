//! What a session reads and sends, without sockets, databases and brokers.

use std::collections::BTreeSet;

use millstream_schemas::frame::SnapshotMark;
use millstream_schemas::{Code, Scope};
use uuid::Uuid;

pub use crate::downlink::{Downlink, Next, Out};
pub use crate::fence::Fence;
pub use crate::message::Message;
pub use crate::reach::{Moves, Reach};
pub use crate::session::text;
pub use crate::snapshot::reframed;

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

/// The token and the mark in these JSON texts as edges with this secret would have given them out, read, and given out again; and
/// the moment, if it is of these scopes and this layout.
pub fn resumed(
    secret: &[u8],
    (token, mark): (&str, &str),
    version: &str,
    scopes: &BTreeSet<Scope>,
) -> Option<([SnapshotMark; 2], Option<Fence>)> {
    let sealer = Sealer::new(secret);
    let (token, mark): (Token, Mark) = (serde_json::from_str(token).ok()?, serde_json::from_str(mark).ok()?);
    let give = |token: &Token, mark: &Mark| {
        let mark = sealer.seal(&token.moment()).mark(mark)?;
        Some(SnapshotMark { token: token.encode(&sealer, "user", Uuid::nil())?, mark })
    };
    let given = give(&token, &mark)?;
    let (token, mark) = resume::decode(&sealer, &given, "user", Uuid::nil())?;
    let again = give(&token, &mark)?;
    let moment = token.fence(version, scopes);
    Some(([given, again], moment))
}
