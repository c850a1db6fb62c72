//! Decoder of Postgres' `pgoutput` messages, protocol version 1, text format.
//!
//! Pure: bytes in, one message out, borrowing from the input. Source of the format:
//! <https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html>.

use millstream_schemas::Lsn;

/// Microseconds from 1970 to 2000, the origin of Postgres' times.
const POSTGRES_EPOCH_MICROS: i64 = 946_684_800_000_000;
/// Of ours, not of Postgres: in place of a value's tag, length and bytes, where a longer message was shortened (`abridge`).
pub const TOO_LARGE: u8 = b'x';

/// One message of the change stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A committed transaction begins.
    Begin {
        /// LSN of its commit record.
        final_lsn: Lsn,
        /// Commit time, microseconds since 1970.
        at: i64,
        /// Transaction id.
        xid: u32,
    },
    /// The transaction is complete.
    Commit {
        /// LSN of the commit record.
        lsn: Lsn,
        /// LSN just behind it.
        end_lsn: Lsn,
        /// Commit time, microseconds since 1970.
        at: i64,
    },
    /// The transaction came from a replication origin.
    Origin,
    /// Shape of a table, sent before its first row and after every change of it.
    Relation(Relation<'a>),
    /// A type that is not built in.
    Type,
    /// A new row.
    Insert {
        /// Table.
        relation: u32,
        /// The row.
        new: Tuple<'a>,
    },
    /// A changed row.
    Update {
        /// Table.
        relation: u32,
        /// The old row or its identity, if sent.
        old: Option<Old<'a>>,
        /// The row as it is now.
        new: Tuple<'a>,
    },
    /// A deleted row.
    Delete {
        /// Table.
        relation: u32,
        /// The old row or its identity.
        old: Old<'a>,
    },
    /// Tables were emptied.
    Truncate {
        /// The tables.
        relations: Vec<u32>,
    },
    /// `pg_logical_emit_message`.
    Logical {
        /// Whether it belongs to the transaction around it.
        transactional: bool,
        /// Names its kind.
        prefix: &'a str,
        /// What it says.
        content: &'a [u8],
    },
}

/// Shape of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation<'a> {
    /// Object id.
    pub id: u32,
    /// Schema; empty for `pg_catalog`.
    pub namespace: &'a str,
    /// Name.
    pub name: &'a str,
    /// Columns in the order of the tuples.
    pub columns: Vec<RelationColumn<'a>>,
}

/// One column of a [`Relation`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelationColumn<'a> {
    /// Whether it belongs to the replica identity.
    pub identity: bool,
    /// Name.
    pub name: &'a str,
    /// Object id of its type.
    pub type_oid: u32,
}

/// The old image of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Old<'a> {
    /// Only the columns of the replica identity count; the others read as null.
    Key(Tuple<'a>),
    /// The whole row (`REPLICA IDENTITY FULL`).
    Full(Tuple<'a>),
}

/// The values of a row, in the order of the relation's columns.
pub type Tuple<'a> = Vec<Value<'a>>;

/// One value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// Null.
    Null,
    /// Stored out of line and not changed, so not sent.
    Unchanged,
    /// Left out by `abridge`.
    TooLarge,
    /// Postgres' text output.
    Text(&'a [u8]),
    /// Postgres' binary output; only with the option `binary`, which is not asked for.
    Binary(&'a [u8]),
}

/// The bytes are not a message of protocol version 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Bytes are missing.
    #[error("the message ends too early")]
    Truncated,
    /// Bytes are left over.
    #[error("{0} bytes behind the end of the message")]
    Trailing(usize),
    /// An unknown kind of message or part.
    #[error("unknown tag 0x{0:02X}")]
    UnknownTag(u8),
    /// A name that is not UTF-8.
    #[error("a name is not UTF-8")]
    NotUtf8,
    /// A length below zero.
    #[error("negative length")]
    NegativeLength,
}

/// Turns Postgres' time (microseconds since 2000) into microseconds since 1970.
pub fn unix_micros(postgres: i64) -> i64 {
    postgres.saturating_add(POSTGRES_EPOCH_MICROS)
}

/// Decodes one message.
pub fn decode(bytes: &[u8]) -> Result<Message<'_>, DecodeError> {
    let mut input = Input { bytes };
    let message = match input.byte()? {
        b'B' => Message::Begin { final_lsn: input.lsn()?, at: unix_micros(input.i64()?), xid: input.u32()? },
        b'C' => {
            input.byte()?;
            Message::Commit { lsn: input.lsn()?, end_lsn: input.lsn()?, at: unix_micros(input.i64()?) }
        }
        b'O' => {
            input.lsn()?;
            input.text()?;
            Message::Origin
        }
        b'R' => Message::Relation(relation(&mut input)?),
        b'Y' => {
            input.u32()?;
            input.text()?;
            input.text()?;
            Message::Type
        }
        b'I' => {
            let relation = input.u32()?;
            input.expect(b'N')?;
            Message::Insert { relation, new: tuple(&mut input)? }
        }
        b'U' => {
            let relation = input.u32()?;
            let old = match input.peek()? {
                b'N' => None,
                _ => Some(old(&mut input)?),
            };
            input.expect(b'N')?;
            Message::Update { relation, old, new: tuple(&mut input)? }
        }
        b'D' => Message::Delete { relation: input.u32()?, old: old(&mut input)? },
        b'T' => {
            let count = input.length()?;
            input.byte()?;
            // Reserve nothing on the word of the input: a wrong count ends in `Truncated`.
            let relations = (0..count).map(|_| input.u32()).collect::<Result<_, _>>()?;
            Message::Truncate { relations }
        }
        b'M' => {
            let transactional = input.byte()? & 1 != 0;
            input.lsn()?;
            let prefix = input.text()?;
            let length = input.length()?;
            Message::Logical { transactional, prefix, content: input.take(length)? }
        }
        tag => return Err(DecodeError::UnknownTag(tag)),
    };
    match input.bytes.len() {
        0 => Ok(message),
        left => Err(DecodeError::Trailing(left)),
    }
}

fn relation<'a>(input: &mut Input<'a>) -> Result<Relation<'a>, DecodeError> {
    let id = input.u32()?;
    let namespace = input.text()?;
    let name = input.text()?;
    input.byte()?;
    let count = input.u16()?;
    let mut columns = Vec::with_capacity(usize::from(count).min(input.bytes.len()));
    for _ in 0..count {
        let identity = input.byte()? & 1 != 0;
        let name = input.text()?;
        let type_oid = input.u32()?;
        input.u32()?;
        columns.push(RelationColumn { identity, name, type_oid });
    }
    Ok(Relation { id, namespace, name, columns })
}

fn old<'a>(input: &mut Input<'a>) -> Result<Old<'a>, DecodeError> {
    match input.byte()? {
        b'K' => Ok(Old::Key(tuple(input)?)),
        b'O' => Ok(Old::Full(tuple(input)?)),
        tag => Err(DecodeError::UnknownTag(tag)),
    }
}

fn tuple<'a>(input: &mut Input<'a>) -> Result<Tuple<'a>, DecodeError> {
    let count = input.u16()?;
    let mut values = Vec::with_capacity(usize::from(count).min(input.bytes.len()));
    for _ in 0..count {
        values.push(match input.byte()? {
            b'n' => Value::Null,
            b'u' => Value::Unchanged,
            TOO_LARGE => Value::TooLarge,
            b't' => {
                let length = input.length()?;
                Value::Text(input.take(length)?)
            }
            b'b' => {
                let length = input.length()?;
                Value::Binary(input.take(length)?)
            }
            tag => return Err(DecodeError::UnknownTag(tag)),
        });
    }
    Ok(values)
}

struct Input<'a> {
    bytes: &'a [u8],
}

impl<'a> Input<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], DecodeError> {
        let (head, tail) = self.bytes.split_at_checked(count).ok_or(DecodeError::Truncated)?;
        self.bytes = tail;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, tail) = self.bytes.split_first_chunk::<N>().ok_or(DecodeError::Truncated)?;
        self.bytes = tail;
        Ok(*head)
    }

    fn peek(&self) -> Result<u8, DecodeError> {
        self.bytes.first().copied().ok_or(DecodeError::Truncated)
    }

    fn byte(&mut self) -> Result<u8, DecodeError> {
        Ok(self.array::<1>()?[0])
    }

    fn expect(&mut self, tag: u8) -> Result<(), DecodeError> {
        match self.byte()? {
            found if found == tag => Ok(()),
            found => Err(DecodeError::UnknownTag(found)),
        }
    }

    fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn i64(&mut self) -> Result<i64, DecodeError> {
        Ok(i64::from_be_bytes(self.array()?))
    }

    fn lsn(&mut self) -> Result<Lsn, DecodeError> {
        Ok(Lsn(u64::from_be_bytes(self.array()?)))
    }

    fn length(&mut self) -> Result<usize, DecodeError> {
        usize::try_from(i32::from_be_bytes(self.array()?)).map_err(|_| DecodeError::NegativeLength)
    }

    fn text(&mut self) -> Result<&'a str, DecodeError> {
        let end = self.bytes.iter().position(|&byte| byte == 0).ok_or(DecodeError::Truncated)?;
        let text = std::str::from_utf8(self.take(end)?).map_err(|_| DecodeError::NotUtf8)?;
        self.byte()?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Appends big-endian numbers, strings with their end, and tags.
    struct Bytes(Vec<u8>);

    impl Bytes {
        fn tag(tag: u8) -> Self {
            Bytes(vec![tag])
        }
        fn raw(mut self, bytes: &[u8]) -> Self {
            self.0.extend_from_slice(bytes);
            self
        }
        fn u16(self, n: u16) -> Self {
            self.raw(&n.to_be_bytes())
        }
        fn u32(self, n: u32) -> Self {
            self.raw(&n.to_be_bytes())
        }
        fn u64(self, n: u64) -> Self {
            self.raw(&n.to_be_bytes())
        }
        fn text(self, text: &str) -> Self {
            self.raw(text.as_bytes()).raw(&[0])
        }
        fn value(self, text: &str) -> Self {
            self.raw(b"t").u32(text.len() as u32).raw(text.as_bytes())
        }
    }

    fn samples() -> Vec<(Vec<u8>, Message<'static>)> {
        vec![
            (
                Bytes::tag(b'B').u64(0x1_0000_0002).u64(5).u32(742).0,
                Message::Begin { final_lsn: Lsn(0x1_0000_0002), at: POSTGRES_EPOCH_MICROS + 5, xid: 742 },
            ),
            (
                Bytes::tag(b'C').raw(&[0]).u64(7).u64(9).u64(5).0,
                Message::Commit { lsn: Lsn(7), end_lsn: Lsn(9), at: POSTGRES_EPOCH_MICROS + 5 },
            ),
            (Bytes::tag(b'O').u64(3).text("upstream").0, Message::Origin),
            (
                Bytes::tag(b'R')
                    .u32(16_385)
                    .text("public")
                    .text("tasks")
                    .raw(b"i")
                    .u16(2)
                    .raw(&[1])
                    .text("id")
                    .u32(2950)
                    .u32(u32::MAX)
                    .raw(&[0])
                    .text("título")
                    .u32(25)
                    .u32(u32::MAX)
                    .0,
                Message::Relation(Relation {
                    id: 16_385,
                    namespace: "public",
                    name: "tasks",
                    columns: vec![
                        RelationColumn { identity: true, name: "id", type_oid: 2950 },
                        RelationColumn { identity: false, name: "título", type_oid: 25 },
                    ],
                }),
            ),
            (Bytes::tag(b'Y').u32(9).text("public").text("mood").0, Message::Type),
            (
                Bytes::tag(b'I').u32(1).raw(b"N").u16(3).value("a").raw(b"n").raw(b"u").0,
                Message::Insert { relation: 1, new: vec![Value::Text(b"a"), Value::Null, Value::Unchanged] },
            ),
            (
                Bytes::tag(b'U').u32(1).raw(b"N").u16(1).value("").0,
                Message::Update { relation: 1, old: None, new: vec![Value::Text(b"")] },
            ),
            (
                Bytes::tag(b'U').u32(1).raw(b"K").u16(1).value("x").raw(b"N").u16(1).value("y").0,
                Message::Update {
                    relation: 1,
                    old: Some(Old::Key(vec![Value::Text(b"x")])),
                    new: vec![Value::Text(b"y")],
                },
            ),
            (
                Bytes::tag(b'U').u32(1).raw(b"O").u16(1).raw(b"n").raw(b"N").u16(1).raw(b"b").u32(2).raw(&[1, 2]).0,
                Message::Update {
                    relation: 1,
                    old: Some(Old::Full(vec![Value::Null])),
                    new: vec![Value::Binary(&[1, 2])],
                },
            ),
            (
                Bytes::tag(b'D').u32(1).raw(b"K").u16(2).value("k").raw(b"n").0,
                Message::Delete { relation: 1, old: Old::Key(vec![Value::Text(b"k"), Value::Null]) },
            ),
            (Bytes::tag(b'T').u32(2).raw(&[1]).u32(10).u32(11).0, Message::Truncate { relations: vec![10, 11] }),
            (
                Bytes::tag(b'M').raw(&[1]).u64(4).text("millstream.origin").u32(2).raw(b"{}").0,
                Message::Logical { transactional: true, prefix: "millstream.origin", content: b"{}" },
            ),
        ]
    }

    #[test]
    fn every_message_is_decoded() {
        for (bytes, expected) in samples() {
            assert_eq!(decode(&bytes), Ok(expected));
        }
    }

    #[test]
    fn cut_and_extended_messages_are_refused() {
        for (bytes, message) in samples() {
            for end in 0..bytes.len() {
                assert!(decode(&bytes[..end]).is_err(), "{message:?} cut at {end}");
            }
            let mut longer = bytes.clone();
            longer.push(0);
            assert_eq!(decode(&longer), Err(DecodeError::Trailing(1)), "{message:?}");
        }
    }

    #[test]
    fn damaged_messages_never_panic() {
        for (bytes, _) in samples() {
            for at in 0..bytes.len() {
                for byte in [0, 1, 0x7F, 0x80, 0xFF] {
                    let mut damaged = bytes.clone();
                    damaged[at] = byte;
                    let _ = decode(&damaged);
                }
            }
        }
        assert_eq!(decode(b"T\xff\xff\xff\xff\0"), Err(DecodeError::NegativeLength));
        assert_eq!(decode(b"T\x7f\xff\xff\xff\0"), Err(DecodeError::Truncated));
        assert_eq!(decode(b"?"), Err(DecodeError::UnknownTag(b'?')));
        assert_eq!(decode(b""), Err(DecodeError::Truncated));
    }
}
