//! How a snapshot goes on after a cut, at any edge: the client names the moment at which it began and the last row that it has.
//!
//! What is missing is read at a new moment, and behind it the stream is sent from where the first moment's began: rows from
//! before the cut catch up with it, and to the later ones it brings nothing that they do not have in the end. Rows come in
//! the order of their keys, so that a key says how far it was.

use std::hash::{DefaultHasher, Hash, Hasher};

use millstream_catalog::layout;
use millstream_schemas::frame::SnapshotMark;
use millstream_schemas::{Lsn, Position, Scope};
use serde::{Deserialize, Serialize};

use crate::fence::Fence;

/// A moment at which a snapshot began, as clients keep it (JSON). It gives no rights: scopes are authorised anew.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Behind it, everything is in the stream that the moment does not see.
    pub from: Position,
    /// `pg_current_snapshot()`.
    visible: String,
    lsn: Lsn,
    layout: String,
    /// Of the scopes that it is about.
    scopes: u64,
    /// Each of them is read for itself.
    pub apart: bool,
}

/// The last row of a frame, as clients keep it (JSON).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The scope, if they are read each for itself.
    pub scope: Option<String>,
    /// Number of the statement for it.
    pub pass: usize,
    /// The row's key.
    pub key: Vec<String>,
}

impl Token {
    /// Of a snapshot of these scopes.
    pub fn new<'a>(
        from: Position,
        fence: &Fence,
        version: &str,
        scopes: impl IntoIterator<Item = &'a Scope>,
        apart: bool,
    ) -> Token {
        let (visible, lsn) = (fence.visible(), fence.lsn);
        Token { from, visible, lsn, layout: layout(version).to_owned(), scopes: digest(scopes), apart }
    }

    /// The moment, if the snapshot is of these scopes and this layout.
    pub fn fence<'a>(&self, version: &str, scopes: impl IntoIterator<Item = &'a Scope>) -> Option<Fence> {
        let fits = self.layout == layout(version) && self.scopes == digest(scopes);
        Fence::parse(&self.visible, &self.lsn.to_string()).ok().filter(|_| fits)
    }

    /// As text.
    pub fn encode(&self) -> Option<String> {
        serde_json::to_string(self).ok()
    }
}

/// Reads what a client kept; none if we did not write it so.
pub fn decode(cut: &SnapshotMark) -> Option<(Token, Mark)> {
    Some((serde_json::from_str(&cut.token).ok()?, serde_json::from_str(&cut.mark).ok()?))
}

/// Of equal sets; in doubt (another version of the hash) a snapshot begins anew.
fn digest<'a>(scopes: impl IntoIterator<Item = &'a Scope>) -> u64 {
    let mut names: Vec<String> = scopes.into_iter().map(Scope::to_string).collect();
    names.sort_unstable();
    let mut hasher = DefaultHasher::new();
    names.hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    #[test]
    fn a_token_fits_its_scopes_and_layout() {
        let fence = Fence::parse("100:105:101,103", "0/5000").unwrap();
        let from = Position { epoch: Uuid::nil(), seq: 7, lsn: Lsn(9) };
        let (a, b) = (Scope::new("project", "a"), Scope::new("project", "b"));
        let token = Token::new(from, &fence, "0123456789abcdef", [&a, &b], true);
        let mark = Mark { scope: Some(a.to_string()), pass: 2, key: vec!["k".into()] };
        let kept = SnapshotMark { token: token.encode().unwrap(), mark: serde_json::to_string(&mark).unwrap() };
        let (token, read) = decode(&kept).unwrap();
        assert_eq!(read, mark);
        assert_eq!(token.fence("01234567xxxxxxxx", [&b, &a]), Some(fence));
        assert_eq!(token.fence("x1234567xxxxxxxx", [&b, &a]), None);
        assert_eq!(token.fence("0123456789abcdef", [&a]), None);
        assert_eq!(decode(&SnapshotMark { token: "{}".into(), mark: "x".into() }), None);
    }
}
