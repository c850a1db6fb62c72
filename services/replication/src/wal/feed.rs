//! The task that owns the socket: reads the change stream, answers keep-alives, and reports what is confirmed, also while
//! nobody takes what was read.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf as _, Bytes, BytesMut};
use millstream_schemas::Lsn;
use pgwire_replication::PgWireError;
use pgwire_replication::protocol::framing::write_copy_data;
use pgwire_replication::protocol::{encode_standby_status_update, unix_to_pg_timestamp};
use tokio::io::AsyncReadExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::Instant;

use super::socket::Socket;
use super::source::WAL_SENDER_TIMEOUT;
use crate::abridge::{Abridge, MAX_WHOLE_BYTES};
use crate::assemble::AssembleError;
use crate::error::{Error, ServerError};

/// A confirmed position reaches the server within this time. On a silent connection nothing is reported of our own accord:
/// the server would never have a reason to speak, and a dead connection would go unnoticed.
const STATUS_INTERVAL: Duration = Duration::from_secs(1);
/// Silence after which the connection counts as dead. The server speaks at least every half [`WAL_SENDER_TIMEOUT`].
const MAX_SILENCE: Duration = Duration::from_secs(2 * WAL_SENDER_TIMEOUT.as_secs());
/// Bytes that are asked for at once.
const READ_BYTES: usize = 128 * 1024;
/// Most bytes of messages between this task and the reader; a longer one goes alone.
const BUFFERED_BYTES: usize = 32 * 1024 * 1024;
/// Tag, and length of the rest without the tag.
const HEADER_BYTES: usize = 5;
/// What comes before the message in a `CopyData` of the change stream: its kind, two LSNs and a time.
const WAL_DATA_HEAD_BYTES: usize = 25;

/// What the server sends.
#[derive(Debug)]
pub enum Event {
    /// A message of the change stream, for [`crate::pgoutput::decode`].
    Message(Bytes),
    /// The server has come so far.
    KeepAlive(Lsn),
}

/// An event on its way.
#[derive(Debug)]
pub struct Received {
    /// The event.
    pub event: Event,
    /// Its share of the bytes in between; free again when it is dropped.
    _room: OwnedSemaphorePermit,
}

/// The task.
pub struct Feed {
    stream: Box<dyn Socket>,
    events: mpsc::Sender<Result<Received, Error>>,
    room: Arc<Semaphore>,
    confirmed: watch::Receiver<Lsn>,
    /// What the server was told last.
    reported: Lsn,
    reported_at: Instant,
    heard_at: Instant,
    max_silence: Duration,
    buffer: BytesMut,
    /// A message that is too long to be held, and how much of it is still to come.
    long: Option<(Abridge, usize)>,
}

/// What is in the buffer.
enum Parsed {
    Event(Event),
    /// A keep-alive that asks for an answer.
    Asked(Lsn),
    /// A message that means nothing to us.
    Nothing,
    /// Too little.
    More,
}

impl Feed {
    /// Goes on with a connection on which the change stream has begun.
    pub fn new(
        stream: Box<dyn Socket>,
        events: mpsc::Sender<Result<Received, Error>>,
        confirmed: watch::Receiver<Lsn>,
    ) -> Feed {
        let now = Instant::now();
        Feed {
            stream,
            events,
            room: Arc::new(Semaphore::new(BUFFERED_BYTES)),
            confirmed,
            reported: Lsn::ZERO,
            reported_at: now.checked_sub(STATUS_INTERVAL).unwrap_or(now),
            heard_at: now,
            max_silence: MAX_SILENCE,
            buffer: BytesMut::new(),
            long: None,
        }
    }

    /// Runs until something fails or nobody listens any more; the last thing that it hands over is why.
    pub async fn run(mut self) {
        let error = loop {
            let handed_over = match self.event().await {
                Ok(event) => self.hand_over(event).await,
                Err(error) => break error,
            };
            match handed_over {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => break error,
            }
        };
        let _ = self.events.send(Err(error)).await;
    }

    /// The next event.
    async fn event(&mut self) -> Result<Event, Error> {
        loop {
            match self.parse()? {
                Parsed::Event(event) => return Ok(event),
                Parsed::Asked(lsn) => {
                    self.report().await?;
                    return Ok(Event::KeepAlive(lsn));
                }
                Parsed::Nothing => {}
                Parsed::More => self.read().await?,
            }
        }
    }

    /// Reads what there is, and reports while there is nothing.
    async fn read(&mut self) -> Result<(), Error> {
        self.buffer.reserve(READ_BYTES);
        loop {
            let pending = *self.confirmed.borrow_and_update() > self.reported;
            tokio::select! {
                read = self.stream.read_buf(&mut self.buffer) => {
                    if read.map_err(failed)? == 0 {
                        return Err(Error::WalEnded);
                    }
                    break;
                }
                () = tokio::time::sleep_until(self.reported_at + STATUS_INTERVAL), if pending => self.report().await?,
                // The other end is gone with the reader; then nobody listens either.
                changed = self.confirmed.changed(), if !pending => changed.map_err(|_| Error::WalEnded)?,
                () = tokio::time::sleep_until(self.heard_at + self.max_silence) => return Err(Error::WalSilent(self.max_silence)),
            }
        }
        self.heard_at = Instant::now();
        if self.reported_at.elapsed() >= STATUS_INTERVAL {
            self.report().await?;
        }
        Ok(())
    }

    fn parse(&mut self) -> Result<Parsed, Error> {
        if let Some((abridge, left)) = &mut self.long {
            let piece = self.buffer.split_to(self.buffer.len().min(*left));
            *left -= piece.len();
            abridge.feed(&piece).map_err(AssembleError::Decode)?;
            if *left > 0 {
                return Ok(Parsed::More);
            }
            let short = self.long.take().map(|(abridge, _)| abridge.finish()).unwrap_or_default();
            return Ok(Parsed::Event(Event::Message(short.into())));
        }
        let Some((&[tag, a, b, c, d], rest)) = self.buffer.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(Parsed::More);
        };
        let length = i32::from_be_bytes([a, b, c, d]);
        let Some(length) = usize::try_from(length).ok().and_then(|length| length.checked_sub(4)) else {
            return Err(protocol("a message of negative length"));
        };
        if length > MAX_WHOLE_BYTES {
            if tag != b'd' {
                return Err(protocol("a message that is too long"));
            }
            if rest.len() < WAL_DATA_HEAD_BYTES {
                return Ok(Parsed::More);
            }
            if rest[0] != b'w' {
                return Err(protocol("an unknown kind of message"));
            }
            self.buffer.advance(HEADER_BYTES + WAL_DATA_HEAD_BYTES);
            self.long = Some((Abridge::default(), length - WAL_DATA_HEAD_BYTES));
            return Ok(Parsed::Nothing);
        }
        if rest.len() < length {
            self.buffer.reserve(length);
            return Ok(Parsed::More);
        }
        self.buffer.advance(HEADER_BYTES);
        let mut payload = self.buffer.split_to(length).freeze();
        match (tag, payload.first()) {
            (b'd', Some(b'w')) if length >= WAL_DATA_HEAD_BYTES => {
                payload.advance(WAL_DATA_HEAD_BYTES);
                Ok(Parsed::Event(Event::Message(payload)))
            }
            // Kind, LSN, time, whether an answer is asked for.
            (b'd', Some(b'k')) if length >= 18 => {
                payload.advance(1);
                let lsn = Lsn(payload.get_u64());
                payload.advance(8);
                Ok(if payload.get_u8() == 0 { Parsed::Event(Event::KeepAlive(lsn)) } else { Parsed::Asked(lsn) })
            }
            (b'd', _) => Err(protocol("an unknown kind of message")),
            (b'E', _) => {
                Err(Error::Server { operation: "read the change stream", source: ServerError::parse(&payload) })
            }
            (b'c', _) => Err(Error::WalEnded),
            _ => Ok(Parsed::Nothing),
        }
    }

    /// Hands an event over, and goes on reporting until it is taken. `false` if nobody listens any more.
    async fn hand_over(&mut self, event: Event) -> Result<bool, Error> {
        let bytes = match &event {
            Event::Message(bytes) => bytes.len().min(BUFFERED_BYTES),
            Event::KeepAlive(_) => 0,
        };
        let share = u32::try_from(bytes).unwrap_or(u32::MAX);
        let (room, events) = (self.room.clone(), self.events.clone());
        let free = async move {
            let room = room.acquire_many_owned(share).await.ok()?;
            Some((room, events.reserve_owned().await.ok()?))
        };
        tokio::pin!(free);
        let mut waited = false;
        loop {
            tokio::select! {
                biased;
                free = &mut free => {
                    let Some((room, slot)) = free else { return Ok(false) };
                    slot.send(Ok(Received { event, _room: room }));
                    if waited {
                        // Not the server's silence.
                        self.heard_at = Instant::now();
                    }
                    return Ok(true);
                }
                () = tokio::time::sleep_until(self.reported_at + STATUS_INTERVAL) => {
                    waited = true;
                    self.report().await?;
                }
            }
        }
    }

    async fn report(&mut self) -> Result<(), Error> {
        let confirmed = *self.confirmed.borrow_and_update();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = unix_to_pg_timestamp(i64::try_from(now.as_micros()).unwrap_or(i64::MAX));
        let status = encode_standby_status_update(pgwire_replication::Lsn(confirmed.0), now, false);
        let written = write_copy_data(&mut self.stream, &status);
        tokio::time::timeout(self.max_silence, written)
            .await
            .map_err(|_| Error::WalSilent(self.max_silence))?
            .map_err(|source| Error::Wal { operation: "confirm", source })?;
        (self.reported, self.reported_at) = (confirmed, Instant::now());
        Ok(())
    }
}

fn failed(error: std::io::Error) -> Error {
    Error::Wal { operation: "read", source: error.into() }
}

fn protocol(what: &str) -> Error {
    Error::Wal { operation: "read", source: PgWireError::Protocol(what.into()) }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt as _, DuplexStream};

    use super::*;
    use crate::pgoutput::{Message, Value, decode};

    struct Bench {
        server: DuplexStream,
        received: mpsc::Receiver<Result<Received, Error>>,
        confirmed: watch::Sender<Lsn>,
    }

    /// As [`MAX_SILENCE`] to [`STATUS_INTERVAL`], and short enough to be waited for.
    const SILENCE: Duration = Duration::from_secs(3);

    fn bench(buffered: usize) -> Bench {
        let (ours, server) = tokio::io::duplex(1 << 16);
        let (events, received) = mpsc::channel(buffered);
        let (confirmed, seen) = watch::channel(Lsn::ZERO);
        let feed = Feed::new(Box::new(ours), events, seen);
        tokio::spawn(Feed { max_silence: SILENCE, ..feed }.run());
        Bench { server, received, confirmed }
    }

    fn copy_data(payload: &[u8]) -> Vec<u8> {
        let mut out = vec![b'd'];
        out.extend_from_slice(&(payload.len() as u32 + 4).to_be_bytes());
        out.extend_from_slice(payload);
        out
    }

    fn wal_data(message: &[u8]) -> Vec<u8> {
        let mut payload = vec![b'w'];
        payload.extend_from_slice(&[0; 24]);
        payload.extend_from_slice(message);
        copy_data(&payload)
    }

    fn keep_alive(lsn: u64, asks: bool) -> Vec<u8> {
        let mut payload = vec![b'k'];
        payload.extend_from_slice(&lsn.to_be_bytes());
        payload.extend_from_slice(&[0; 8]);
        payload.push(u8::from(asks));
        copy_data(&payload)
    }

    impl Bench {
        async fn send(&mut self, bytes: &[u8]) {
            self.server.write_all(bytes).await.unwrap();
        }

        async fn message(&mut self) -> Bytes {
            match self.received.recv().await.unwrap().unwrap().event {
                Event::Message(bytes) => bytes,
                other => panic!("{other:?}"),
            }
        }

        async fn keep_alive(&mut self) -> Lsn {
            match self.received.recv().await.unwrap().unwrap().event {
                Event::KeepAlive(lsn) => lsn,
                other => panic!("{other:?}"),
            }
        }

        /// The position of the next report.
        async fn report(&mut self) -> Lsn {
            let mut report = [0; 39];
            self.server.read_exact(&mut report).await.unwrap();
            assert_eq!((report[0], report[5]), (b'd', b'r'));
            Lsn(u64::from_be_bytes(report[6..14].try_into().unwrap()))
        }
    }

    #[tokio::test]
    async fn messages_come_whole_however_they_are_cut() {
        let mut bench = bench(16);
        let bytes = [wal_data(b"one"), keep_alive(7, false), wal_data(&vec![b'x'; 300_000])].concat();
        let Bench { server, .. } = &mut bench;
        for piece in bytes.chunks(9_999) {
            server.write_all(piece).await.unwrap();
        }
        assert_eq!(&bench.message().await[..], b"one");
        assert_eq!(bench.keep_alive().await, Lsn(7));
        assert_eq!(bench.message().await.len(), 300_000);
    }

    #[tokio::test]
    async fn a_message_of_any_length_passes() {
        let bench = bench(16);
        let mut row = b"I\0\0\0\x01N\0\x02t\0\0\0\x01kt".to_vec();
        let long = 2 * MAX_WHOLE_BYTES;
        row.extend_from_slice(&(long as u32).to_be_bytes());
        row.resize(row.len() + long, b'x');
        let bytes = [wal_data(&row), wal_data(b"behind")].concat();
        let Bench { mut server, mut received, .. } = bench;
        tokio::spawn(async move {
            server.write_all(&bytes).await.unwrap();
            std::future::pending::<()>().await;
        });
        let Event::Message(short) = received.recv().await.unwrap().unwrap().event else { panic!() };
        let expected = Message::Insert { relation: 1, new: vec![Value::Text(b"k"), Value::TooLarge] };
        assert_eq!(decode(&short), Ok(expected));
        let Event::Message(behind) = received.recv().await.unwrap().unwrap().event else { panic!() };
        assert_eq!(&behind[..], b"behind");
    }

    #[tokio::test]
    async fn the_server_is_answered_and_told_what_is_confirmed() {
        let mut bench = bench(16);
        let begin = Instant::now();
        bench.confirmed.send_replace(Lsn(5));
        assert_eq!(bench.report().await, Lsn(5));
        bench.confirmed.send_replace(Lsn(6));
        assert_eq!(bench.report().await, Lsn(6));
        assert!(begin.elapsed() <= 3 * STATUS_INTERVAL);
        bench.send(&keep_alive(9, true)).await;
        assert_eq!(bench.report().await, Lsn(6));
        assert_eq!(bench.keep_alive().await, Lsn(9));
        // Nothing of our own accord.
        let silent = tokio::time::timeout(2 * STATUS_INTERVAL, bench.report()).await;
        assert!(silent.is_err());
    }

    #[tokio::test]
    async fn reports_go_on_while_nobody_takes_what_was_read() {
        let mut bench = bench(1);
        for _ in 0..4 {
            bench.send(&wal_data(b"x")).await;
        }
        // For longer than the server may be silent.
        let begin = Instant::now();
        let mut lsn = 0;
        while begin.elapsed() < SILENCE + STATUS_INTERVAL {
            lsn += 1;
            bench.confirmed.send_replace(Lsn(lsn));
            let reported = tokio::time::timeout(2 * STATUS_INTERVAL, bench.report()).await.unwrap();
            assert!(reported >= Lsn(lsn - 1), "{reported}");
        }
        for _ in 0..4 {
            assert_eq!(&bench.message().await[..], b"x");
        }
    }

    #[tokio::test]
    async fn a_silent_connection_is_dead() {
        let mut bench = bench(16);
        let begin = Instant::now();
        let error = bench.received.recv().await.unwrap().unwrap_err();
        assert!(matches!(error, Error::WalSilent(_)), "{error}");
        assert!(begin.elapsed() >= SILENCE);
    }

    #[tokio::test]
    async fn nonsense_ends_it() {
        for bytes in [&b"d\0\0\0\x03"[..], b"d\0\0\0\x05z", b"C\x7f\xff\xff\xff", b"c\0\0\0\x04", b"d\xff\xff\xff\xff"]
        {
            let mut bench = bench(16);
            bench.send(bytes).await;
            assert!(bench.received.recv().await.unwrap().is_err(), "{bytes:?}");
        }
    }
}
