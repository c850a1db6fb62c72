//! How a snapshot goes on after a cut, at any edge: the client names the moment at which it began and the last row that it has.
//!
//! What is missing is read at a new moment, and behind it the stream is sent from where the first moment's began: rows from
//! before the cut catch up with it, and to the later ones it brings nothing that they do not have in the end. Rows come in
//! the order of their keys, so that a key says how far it was.

//!
//! Both texts are the server's word, not the client's: a message authentication code (HMAC-SHA-256, RFC 2104) binds the moment to
//! user, client, position and scopes, and the row to the moment. Its key follows from the secret of session tokens, so that
//! every edge knows what any of them wrote; with another secret a snapshot begins from the start. Whether the scopes were
//! held all the time since is asked of the stream ([`crate::history`]).

use hmac::{Hmac, KeyInit, Mac};
use millstream_catalog::layout;
use millstream_schemas::frame::SnapshotMark;
use millstream_schemas::{Lsn, Position, Scope};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use uuid::Uuid;

use crate::fence::Fence;

type Code = Hmac<Sha256>;

/// Bytes of a code that are kept: forging one takes 2^128 tries.
const CODE_BYTES: usize = 16;

/// Knows what edges of this deployment have written.
#[derive(Clone)]
pub struct Sealer(Code);

/// Writes and reads the marks of one snapshot.
#[derive(Clone)]
pub struct Seal(Code);

/// A moment at which a snapshot began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// Behind it, everything is in the stream that the moment does not see.
    pub from: Position,
    /// `pg_current_snapshot()`.
    visible: String,
    lsn: Lsn,
    layout: String,
    /// Of the scopes that it is about: hexadecimal SHA-256.
    scopes: String,
    /// Each of them is read for itself.
    pub apart: bool,
}

/// The last row of a frame.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    /// The scope, if they are read each for itself.
    pub scope: Option<String>,
    /// Number of the statement for it.
    pub pass: usize,
    /// The row's key.
    pub key: Vec<String>,
}

/// Adds a part, with its length before it: no two lists of parts look the same.
fn add(code: Code, part: &[u8]) -> Code {
    code.chain_update((part.len() as u64).to_be_bytes()).chain_update(part)
}

/// A text with its code behind it.
fn sealed(code: Code, text: String) -> String {
    use std::fmt::Write;
    let code = add(code, text.as_bytes()).finalize().into_bytes();
    let mut sealed = text;
    sealed.push('.');
    for byte in &code[..CODE_BYTES] {
        let _ = write!(sealed, "{byte:02x}");
    }
    sealed
}

/// The text of what [`sealed`] wrote; none for anything else.
fn opened(code: Code, sealed: &str) -> Option<&str> {
    let (text, found) = sealed.rsplit_once('.')?;
    if found.len() != 2 * CODE_BYTES || !found.is_ascii() {
        return None;
    }
    let byte = |at: usize| u8::from_str_radix(&found[2 * at..2 * at + 2], 16).ok();
    let found: Vec<u8> = (0..CODE_BYTES).map(byte).collect::<Option<_>>()?;
    add(code, text.as_bytes()).verify_truncated_left(&found).ok().map(|()| text)
}

impl Sealer {
    /// By the deployment's secret.
    pub fn new(secret: &[u8]) -> Sealer {
        // A key of any length will do.
        let keyed = |key: &[u8]| Code::new_from_slice(key).unwrap_or_else(|_| Code::new(&Default::default()));
        Sealer(keyed(&add(keyed(secret), b"millstream snapshots").finalize().into_bytes()))
    }

    /// For the marks of a moment ([`Token::moment`]).
    pub fn seal(&self, moment: &str) -> Seal {
        Seal(add(add(self.0.clone(), b"mark"), moment.as_bytes()))
    }

    fn token(&self, user_id: &str, client_id: Uuid) -> Code {
        add(add(add(self.0.clone(), b"token"), user_id.as_bytes()), client_id.as_bytes())
    }
}

impl Seal {
    /// A mark, as a client keeps it.
    pub fn mark(&self, mark: &Mark) -> Option<String> {
        Some(sealed(self.0.clone(), serde_json::to_string(mark).ok()?))
    }

    /// Reads a mark of this moment.
    pub fn open(&self, text: &str) -> Option<Mark> {
        serde_json::from_str(opened(self.0.clone(), text)?).ok()
    }
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

    /// What marks of its snapshot are bound to.
    pub fn moment(&self) -> String {
        moment(&self.visible, self.lsn, &self.layout)
    }

    /// The moment, if the snapshot is of these scopes and this layout.
    pub fn fence<'a>(&self, version: &str, scopes: impl IntoIterator<Item = &'a Scope>) -> Option<Fence> {
        let fits = self.layout == layout(version) && self.scopes == digest(scopes);
        Fence::parse(&self.visible, &self.lsn.to_string()).ok().filter(|_| fits)
    }

    /// As a client keeps it, for this user and client alone.
    pub fn encode(&self, sealer: &Sealer, user_id: &str, client_id: Uuid) -> Option<String> {
        Some(sealed(sealer.token(user_id, client_id), serde_json::to_string(self).ok()?))
    }
}

/// What marks of a snapshot with this fence are bound to.
pub fn moment_of(fence: &Fence, version: &str) -> String {
    moment(&fence.visible(), fence.lsn, layout(version))
}

fn moment(visible: &str, lsn: Lsn, layout: &str) -> String {
    format!("{visible} {lsn} {layout}")
}

/// Reads what a client kept; none unless edges of this deployment wrote it for this user and client.
pub fn decode(sealer: &Sealer, cut: &SnapshotMark, user_id: &str, client_id: Uuid) -> Option<(Token, Mark)> {
    let token: Token = serde_json::from_str(opened(sealer.token(user_id, client_id), &cut.token)?).ok()?;
    let mark = sealer.seal(&token.moment()).open(&cut.mark)?;
    Some((token, mark))
}

/// Of equal sets.
fn digest<'a>(scopes: impl IntoIterator<Item = &'a Scope>) -> String {
    use sha2::Digest;
    let mut names: Vec<String> = scopes.into_iter().map(Scope::to_string).collect();
    names.sort_unstable();
    Sha256::digest(names.join("\n")).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_for_its_user_client_scopes_and_layout() {
        let sealer = Sealer::new(b"0123456789abcdef0123456789abcdef");
        let fence = Fence::parse("100:105:101,103", "0/5000").unwrap();
        let from = Position { epoch: Uuid::nil(), stream_seq: 7, lsn: Lsn(9) };
        let (a, b) = (Scope::new("project", "a"), Scope::new("project", "b"));
        let token = Token::new(from, &fence, "0123456789abcdef", [&a, &b], true);
        let mark = Mark { scope: Some(a.to_string()), pass: 2, key: vec!["k.".into()] };
        let text = token.encode(&sealer, "u", Uuid::nil()).unwrap();
        let kept = |token: &str, mark: &str| SnapshotMark { token: token.into(), mark: mark.into() };
        let sealed_mark = sealer.seal(&moment_of(&fence, "0123456789abcdef")).mark(&mark).unwrap();
        let good = kept(&text, &sealed_mark);
        let (token, read) = decode(&sealer, &good, "u", Uuid::nil()).unwrap();
        assert_eq!(read, mark);
        assert_eq!(token.fence("01234567xxxxxxxx", [&b, &a]), Some(fence.clone()));
        assert_eq!(token.fence("x1234567xxxxxxxx", [&b, &a]), None);
        assert_eq!(token.fence("0123456789abcdef", [&a]), None);

        assert_eq!(decode(&sealer, &good, "v", Uuid::nil()), None, "another user's");
        assert_eq!(decode(&sealer, &good, "u", Uuid::max()), None, "another client's");
        assert_eq!(decode(&Sealer::new(b"another"), &good, "u", Uuid::nil()), None, "another deployment's");
        let later = Fence::parse("100:106:101,103", "0/5000").unwrap();
        let other = sealer.seal(&moment_of(&later, "0123456789abcdef")).mark(&mark).unwrap();
        assert_eq!(decode(&sealer, &kept(&text, &other), "u", Uuid::nil()), None, "another moment's mark");
        let plain = serde_json::to_string(&token).unwrap();
        for forged in
            ["", ".", "x", &plain, &format!("{plain}.{}", "0".repeat(32)), &text[1..], &text[..text.len() - 1]]
        {
            assert_eq!(decode(&sealer, &kept(forged, &sealed_mark), "u", Uuid::nil()), None, "{forged}");
            assert_eq!(decode(&sealer, &kept(&text, forged), "u", Uuid::nil()), None, "{forged}");
        }
        for at in 0..text.len() {
            let mut bytes = text.clone().into_bytes();
            bytes[at] ^= 1;
            let Ok(forged) = String::from_utf8(bytes) else { continue };
            assert_eq!(decode(&sealer, &kept(&forged, &sealed_mark), "u", Uuid::nil()), None, "{forged}");
        }
    }
}
