//! Messages of the change stream that are too long to be held.
//!
//! Such a message is read piece by piece and comes out as a shorter one, in which what would make it too long is left out: a
//! row keeps its key, a logical message its prefix. Pure: bytes in, at the end the shorter message out. The format is that of
//! [`crate::pgoutput`], with one tag more: [`TOO_LARGE`].

use millstream_schemas::stream::MAX_ROW_BYTES;

use crate::pgoutput::{DecodeError, TOO_LARGE};

/// Longest message that is held as it is, in bytes.
pub const MAX_WHOLE_BYTES: usize = 16 * 1024 * 1024;
/// Most bytes of values that are kept of one image of a row in a longer message. More than a row may have that is sent to
/// clients, so what is left out of a new row never was to be sent.
pub const MAX_IMAGE_BYTES: usize = 8 * 1024 * 1024;
/// Longest prefix of a logical message that is kept; ours is shorter.
const MAX_PREFIX_BYTES: usize = 64;

const _: () = assert!(MAX_IMAGE_BYTES >= 2 * MAX_ROW_BYTES);

/// What comes next.
#[derive(Debug)]
enum State {
    /// A part of fixed size.
    Fixed(Piece),
    /// The bytes of a value that is kept.
    Value { left: usize },
    /// The bytes of one that is not.
    Skipped { left: usize },
    /// A logical message's prefix, up to its zero byte.
    Prefix,
    /// Nothing more that is of use.
    Rest,
}

#[derive(Clone, Copy, Debug)]
enum Piece {
    Tag,
    Relation,
    /// What kind of row image follows, if one does.
    Image,
    Count,
    ValueTag,
    ValueLength(u8),
    LogicalHead,
}

impl Piece {
    fn bytes(self) -> usize {
        match self {
            Piece::Tag | Piece::Image | Piece::ValueTag => 1,
            Piece::Count => 2,
            Piece::Relation | Piece::ValueLength(_) => 4,
            Piece::LogicalHead => 9,
        }
    }
}

/// One value of the image that is being read.
#[derive(Debug)]
enum Kept {
    /// Its tag stands for it all.
    Tag(u8),
    /// With length and bytes.
    Bytes(u8, Vec<u8>),
}

/// Shortens one message.
#[derive(Debug)]
pub struct Abridge {
    state: State,
    /// What there is of a fixed part.
    fixed: Vec<u8>,
    /// Values of the image that are still to come.
    values: u16,
    image: u8,
    kept: Vec<Kept>,
    kept_bytes: usize,
    out: Vec<u8>,
}

impl Default for Abridge {
    fn default() -> Self {
        Abridge {
            state: State::Fixed(Piece::Tag),
            fixed: Vec::new(),
            values: 0,
            image: 0,
            kept: Vec::new(),
            kept_bytes: 0,
            out: Vec::new(),
        }
    }
}

impl Abridge {
    /// Takes the next bytes of the message, all of them.
    ///
    /// # Errors
    /// They are no message.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), DecodeError> {
        while !bytes.is_empty() {
            match &mut self.state {
                State::Fixed(part) => {
                    let part = *part;
                    let missing = part.bytes() - self.fixed.len();
                    let (head, tail) = bytes.split_at(missing.min(bytes.len()));
                    bytes = tail;
                    self.fixed.extend_from_slice(head);
                    if self.fixed.len() == part.bytes() {
                        let fixed = std::mem::take(&mut self.fixed);
                        self.state = self.fixed(part, &fixed)?;
                        self.fixed = fixed;
                        self.fixed.clear();
                    }
                }
                State::Value { left } => {
                    let (head, tail) = bytes.split_at((*left).min(bytes.len()));
                    bytes = tail;
                    if let Some(Kept::Bytes(_, value)) = self.kept.last_mut() {
                        value.extend_from_slice(head);
                    }
                    *left -= head.len();
                    if *left == 0 {
                        self.state = self.next_value();
                    }
                }
                State::Skipped { left } => {
                    let skipped = (*left).min(bytes.len());
                    bytes = &bytes[skipped..];
                    *left -= skipped;
                    if *left == 0 {
                        self.state = self.next_value();
                    }
                }
                State::Prefix => {
                    let end = bytes.iter().position(|&byte| byte == 0);
                    let text = &bytes[..end.unwrap_or(bytes.len())];
                    let room = (MAX_PREFIX_BYTES + 1).saturating_sub(self.fixed.len());
                    self.fixed.extend_from_slice(&text[..text.len().min(room)]);
                    match end {
                        None => bytes = &[],
                        Some(end) => {
                            bytes = &bytes[end + 1..];
                            if self.fixed.len() <= MAX_PREFIX_BYTES {
                                self.out.extend_from_slice(&self.fixed);
                            }
                            // Without its content, which has no length here.
                            self.out.extend_from_slice(&[0; 5]);
                            self.state = State::Rest;
                        }
                    }
                }
                State::Rest => bytes = &[],
            }
        }
        Ok(())
    }

    fn fixed(&mut self, part: Piece, bytes: &[u8]) -> Result<State, DecodeError> {
        let number = bytes.iter().fold(0_u32, |number, &byte| (number << 8) | u32::from(byte));
        let first = bytes.first().copied().unwrap_or_default();
        match part {
            Piece::ValueTag | Piece::ValueLength(_) => {}
            Piece::Image => self.image = first,
            Piece::Tag | Piece::Relation | Piece::Count | Piece::LogicalHead => self.out.extend_from_slice(bytes),
        }
        Ok(State::Fixed(match part {
            Piece::Tag => match first {
                b'I' | b'U' | b'D' => Piece::Relation,
                b'M' => Piece::LogicalHead,
                // None of the others is ever as long; without its rest it is no message.
                _ => return Ok(State::Rest),
            },
            Piece::Relation => Piece::Image,
            Piece::Image => {
                self.out.push(first);
                Piece::Count
            }
            Piece::Count => {
                self.values = u16::try_from(number).unwrap_or(u16::MAX);
                return Ok(self.next_value());
            }
            Piece::ValueTag => match first {
                b't' | b'b' => Piece::ValueLength(first),
                b'n' | b'u' => {
                    self.kept.push(Kept::Tag(first));
                    return Ok(self.next_value());
                }
                tag => return Err(DecodeError::UnknownTag(tag)),
            },
            Piece::ValueLength(tag) => {
                let length = usize::try_from(number.cast_signed()).map_err(|_| DecodeError::NegativeLength)?;
                if length > MAX_ROW_BYTES {
                    self.kept.push(Kept::Tag(TOO_LARGE));
                    return Ok(State::Skipped { left: length });
                }
                self.make_room(length);
                self.kept_bytes += length;
                self.kept.push(Kept::Bytes(tag, Vec::with_capacity(length)));
                if length == 0 {
                    return Ok(self.next_value());
                }
                return Ok(State::Value { left: length });
            }
            Piece::LogicalHead => return Ok(State::Prefix),
        }))
    }

    /// Leaves out the largest values until one of `length` bytes fits: keys and scopes are short. Of the image that a row
    /// had, a value may be asked for that did not change; it counts as not sent.
    fn make_room(&mut self, length: usize) {
        while self.kept_bytes + length > MAX_IMAGE_BYTES {
            let largest = self.kept.iter_mut().max_by_key(|kept| match kept {
                Kept::Tag(_) => 0,
                Kept::Bytes(_, bytes) => bytes.len(),
            });
            let Some(kept @ Kept::Bytes(..)) = largest else { return };
            let left_out = Kept::Tag(if self.image == b'O' { b'u' } else { TOO_LARGE });
            if let Kept::Bytes(_, bytes) = std::mem::replace(kept, left_out) {
                self.kept_bytes -= bytes.len();
            }
        }
    }

    fn next_value(&mut self) -> State {
        if let Some(left) = self.values.checked_sub(1) {
            self.values = left;
            return State::Fixed(Piece::ValueTag);
        }
        self.kept_bytes = 0;
        for kept in self.kept.drain(..) {
            match kept {
                Kept::Tag(tag) => self.out.push(tag),
                Kept::Bytes(tag, bytes) => {
                    self.out.push(tag);
                    // At most `MAX_IMAGE_BYTES`.
                    self.out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
                    self.out.extend_from_slice(&bytes);
                }
            }
        }
        State::Fixed(Piece::Image)
    }

    /// The shorter message, once the longer one is complete. Whether it is one shows when it is decoded.
    pub fn finish(self) -> Vec<u8> {
        self.out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pgoutput::{Message, Old, Value, decode};

    fn value(out: &mut Vec<u8>, bytes: &[u8]) {
        out.push(b't');
        out.extend_from_slice(&(bytes.len() as u32).to_be_bytes());
        out.extend_from_slice(bytes);
    }

    /// An image of a row; `None` is an unchanged value.
    fn image(kind: u8, values: &[Option<&[u8]>]) -> Vec<u8> {
        let mut out = vec![kind];
        out.extend_from_slice(&(values.len() as u16).to_be_bytes());
        for bytes in values {
            match bytes {
                Some(bytes) => value(&mut out, bytes),
                None => out.push(b'u'),
            }
        }
        out
    }

    fn row(tag: u8, images: &[Vec<u8>]) -> Vec<u8> {
        let mut out = vec![tag, 0, 0, 0, 9];
        images.iter().for_each(|image| out.extend_from_slice(image));
        out
    }

    fn logical(prefix: &str, content: &[u8]) -> Vec<u8> {
        let mut out = vec![b'M', 1, 0, 0, 0, 0, 0, 0, 0, 4];
        out.extend_from_slice(prefix.as_bytes());
        out.push(0);
        out.extend_from_slice(&(content.len() as u32).to_be_bytes());
        out.extend_from_slice(content);
        out
    }

    fn abridge(bytes: &[u8], piece: usize) -> Vec<u8> {
        let mut abridge = Abridge::default();
        for piece in bytes.chunks(piece) {
            abridge.feed(piece).unwrap();
        }
        abridge.finish()
    }

    #[test]
    fn what_fits_comes_out_as_it_was() {
        let messages = [
            row(b'I', &[image(b'N', &[Some(b"1"), None, Some(b"")])]),
            row(b'U', &[image(b'N', &[])]),
            row(b'U', &[image(b'O', &[Some(b"old"), Some(b"x")]), image(b'N', &[Some(b"new"), None])]),
            row(b'U', &[image(b'K', &[Some(b"k"), None]), image(b'N', &[Some(b"new"), None])]),
            row(b'D', &[image(b'K', &[Some(b"k")])]),
            logical("other", b""),
        ];
        for bytes in messages {
            for piece in 1..=bytes.len() {
                assert_eq!(abridge(&bytes, piece), bytes, "{piece}");
            }
        }
    }

    #[test]
    fn large_values_are_left_out_of_any_image() {
        let large = vec![b'x'; MAX_ROW_BYTES + 1];
        let fits = vec![b'y'; MAX_ROW_BYTES];
        let bytes = row(
            b'U',
            &[
                image(b'O', &[Some(b"1"), Some(&large), Some(&fits)]),
                image(b'N', &[Some(b"1"), Some(&fits), Some(&large)]),
            ],
        );
        for piece in [7, 4096, 1 << 20, bytes.len()] {
            let short = abridge(&bytes, piece);
            let Ok(Message::Update { old: Some(Old::Full(old)), new, .. }) = decode(&short) else { panic!() };
            assert_eq!(old, [Value::Text(b"1"), Value::TooLarge, Value::Text(&fits)]);
            assert_eq!(new, [Value::Text(b"1"), Value::Text(&fits), Value::TooLarge]);
        }
    }

    #[test]
    fn the_largest_go_until_the_rest_fits() {
        let values: Vec<Vec<u8>> = (0..40).map(|n| vec![b'v'; MAX_ROW_BYTES - n]).collect();
        let mut columns: Vec<Option<&[u8]>> = values.iter().map(|value| Some(value.as_slice())).collect();
        columns.push(Some(b"key"));
        let bytes = row(b'I', &[image(b'N', &columns)]);
        let short = abridge(&bytes, 1 << 16);
        assert!(short.len() <= MAX_IMAGE_BYTES + 6 * columns.len() + 16, "{}", short.len());
        let Ok(Message::Insert { new, .. }) = decode(&short) else { panic!() };
        assert_eq!(new.last(), Some(&Value::Text(b"key")));
        assert!(new.contains(&Value::TooLarge));
        // What a row had may still be read where it did not change.
        let short = abridge(&row(b'D', &[image(b'O', &columns)]), 1 << 16);
        let Ok(Message::Delete { old: Old::Full(old), .. }) = decode(&short) else { panic!() };
        assert!(old.contains(&Value::Unchanged) && !old.contains(&Value::TooLarge));
    }

    #[test]
    fn logical_messages_keep_their_prefix() {
        for (prefix, kept) in
            [("other.tool", "other.tool"), (&"p".repeat(1 << 20), ""), ("millstream.origin", "millstream.origin")]
        {
            let short = abridge(&logical(prefix, &vec![b'c'; MAX_WHOLE_BYTES]), 100_000);
            assert!(short.len() < 100);
            let expected = Message::Logical { transactional: true, prefix: kept, content: b"" };
            assert_eq!(decode(&short), Ok(expected));
        }
    }

    #[test]
    fn what_is_no_message_is_none_afterwards() {
        assert!(decode(&abridge(&[b'R'; 100], 10)).is_err());
        let mut cut = row(b'I', &[image(b'N', &[Some(b"1"), Some(b"2")])]);
        cut.pop();
        assert!(decode(&abridge(&cut, 3)).is_err());
        assert_eq!(Abridge::default().feed(b"I\0\0\0\x01N\0\x01z"), Err(DecodeError::UnknownTag(b'z')));
        assert_eq!(Abridge::default().feed(b"I\0\0\0\x01N\0\x01t\xff\xff\xff\xff"), Err(DecodeError::NegativeLength));
    }
}
