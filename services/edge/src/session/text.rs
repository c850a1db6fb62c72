//! What is looked at in a client's text before anything is done with it: its size and its shape. Pure.

use millstream_schemas::frame::{
    ClientFrame, Hello, MAX_FRAME_BYTES, MAX_HELLO_BYTES, MAX_TRANSACTION_CHANGES, Submit,
};
use millstream_schemas::{Code, PROTOCOL_VERSION, Scope};
use serde::Deserialize;

/// Why a text is refused.
#[derive(Debug)]
pub struct Refused {
    /// What it is.
    pub code: Code,
    /// What to do about it.
    pub message: String,
    /// The submission that it is about, if that can be read. Its number stays unused.
    pub client_seq: Option<u64>,
}

/// The number of a submission that is refused, if it can be read.
fn number(text: &str) -> Option<u64> {
    #[derive(Deserialize)]
    #[serde(tag = "type", rename_all = "snake_case")]
    enum Numbered {
        Submit { client_seq: u64 },
    }
    let Numbered::Submit { client_seq } = serde_json::from_str(text).ok()?;
    (client_seq > 0).then_some(client_seq)
}

fn refused(code: Code, message: impl Into<String>) -> Refused {
    Refused { code, message: message.into(), client_seq: None }
}

/// Reads the first frame of a session.
///
/// # Errors
/// It is too large, or no `hello` of this protocol.
pub fn hello(text: &str) -> Result<Hello, Refused> {
    if text.len() > MAX_HELLO_BYTES {
        return Err(refused(Code::TooLarge, format!("hello is over {MAX_HELLO_BYTES} bytes")));
    }
    let hello = match serde_json::from_str(text) {
        Ok(ClientFrame::Hello(hello)) => hello,
        Ok(_) => return Err(refused(Code::OutOfOrder, "the first frame must be hello")),
        Err(error) => return Err(refused(Code::BadFrame, format!("not a frame of this protocol: {error}"))),
    };
    if hello.protocol != PROTOCOL_VERSION {
        let message = format!("this server speaks protocol {PROTOCOL_VERSION}, the client {}", hello.protocol);
        return Err(refused(Code::UpgradeRequired, message));
    }
    Ok(hello)
}

/// Reads a frame that names scopes.
///
/// # Errors
/// It is another one, or too large.
pub fn scopes(text: &str) -> Result<(Vec<Scope>, bool), Refused> {
    if text.len() > MAX_FRAME_BYTES {
        return Err(refused(Code::TooLarge, format!("the frame is over {MAX_FRAME_BYTES} bytes")));
    }
    match serde_json::from_str(text) {
        Ok(ClientFrame::Scopes { scopes, last }) => Ok((scopes, last)),
        Ok(_) => Err(refused(Code::OutOfOrder, "after scopes_wanted come the scopes, and nothing else")),
        Err(error) => Err(refused(Code::BadFrame, format!("not a frame of this protocol: {error}"))),
    }
}

/// Reads a later frame.
///
/// # Errors
/// It is too large, or no submission that the executor could take up.
pub fn submit(text: &str) -> Result<Submit, Refused> {
    if text.len() > MAX_FRAME_BYTES {
        let message = format!("the frame has {} bytes; the limit is {MAX_FRAME_BYTES}", text.len());
        return Err(Refused { code: Code::TooLarge, message, client_seq: number(text) });
    }
    let submit = match serde_json::from_str(text) {
        Ok(ClientFrame::Submit(submit)) => submit,
        Ok(ClientFrame::Hello(_)) => {
            return Err(refused(Code::OutOfOrder, "hello comes once, as the first frame"));
        }
        Ok(ClientFrame::Scopes { .. }) => {
            return Err(refused(Code::OutOfOrder, "scopes are named where they are asked for, before welcome"));
        }
        // What holds of the session was taken note of when the frame came.
        Ok(ClientFrame::Taken { .. }) => {
            return Err(refused(Code::BadFrame, "more bytes are said to be taken than were sent"));
        }
        Ok(ClientFrame::Ping {}) => return Err(refused(Code::BadFrame, "a ping has less than 128 bytes")),
        Err(error) => {
            let message = format!("not a frame of this protocol: {error}");
            return Err(Refused { code: Code::BadFrame, message, client_seq: number(text) });
        }
    };
    let client_seq = submit.client_seq;
    let about = |code, message| Err(Refused { code, message, client_seq: Some(client_seq) });
    if submit.changes.is_empty() || submit.changes.len() > MAX_TRANSACTION_CHANGES {
        let changes = submit.changes.len();
        let message = format!("a transaction has 1 to {MAX_TRANSACTION_CHANGES} changes, this one {changes}");
        return about(Code::TooLarge, message);
    }
    if submit.after.len() > MAX_TRANSACTION_CHANGES || submit.after.iter().any(|earlier| *earlier >= client_seq) {
        let message =
            format!("`after` names at most {MAX_TRANSACTION_CHANGES} transactions, all before client_seq {client_seq}");
        return about(Code::BadFrame, message);
    }
    Ok(submit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_names_the_submission_if_it_can_be_read() {
        let frame = |client_seq: &str, title: &str| {
            format!(
                r#"{{"type":"submit","client_seq":{client_seq},"attempt":1,"run_id":"0190f3c2-7d1e-7000-8000-000000000007","changes":[
                {{"change_id":"0190f3c2-7d1e-7000-8000-000000000001","table":"t","op":"insert","key":["k"],
                "columns":["k"],"values":["{title}"],"stamp":1}}]}}"#
            )
        };
        let check = |text: &str, code, client_seq| {
            let refused = submit(text).expect_err(text);
            assert_eq!((refused.code, refused.client_seq), (code, client_seq), "{text:.200}");
        };
        assert_eq!(submit(&frame("7", "x")).unwrap().client_seq, 7);
        let room = MAX_FRAME_BYTES - frame("7", "").len();
        assert!(submit(&frame("7", &"x".repeat(room))).is_ok(), "at the limit");
        check(&frame("7", &"x".repeat(room + 1)), Code::TooLarge, Some(7));
        check(&frame("7", &"x".repeat(room + 99))[..MAX_FRAME_BYTES + 1], Code::TooLarge, None);
        check(&frame("7", "x").replace("stamp", "stomp"), Code::BadFrame, Some(7));
        check(r#"{"type":"submit","client_seq":7}"#, Code::BadFrame, Some(7));
        for client_seq in ["0", "-1", "1.5", "\"7\"", "18446744073709551616"] {
            check(&frame(client_seq, "x").replace("stamp", "stomp"), Code::BadFrame, None);
        }
        check(&frame("0", "x"), Code::BadFrame, None);
        check(&frame("7", "x").replace(r#""attempt":1"#, r#""attempt":0"#), Code::BadFrame, Some(7));
        for text in ["", "{", "[7]", r#"{"type":"submit"}"#, r#"{"type":"push","tx":7}"#] {
            check(text, Code::BadFrame, None);
        }
    }
}
