//! Reads SQLite's write-ahead log without SQLite, which takes everything behind the first bad frame for never written.
//!
//! Source: <https://www.sqlite.org/fileformat2.html#walformat>. Each frame carries a checksum over itself and all before it, so a
//! damaged frame is told from the end of the log by committed frames that follow it.

use std::collections::HashMap;
use std::io::{self, Read, Seek, SeekFrom};

/// The page size of every store that the library made, in bytes; for files whose header does not tell.
pub(crate) const PAGE_SIZE: usize = 4096;
const HEADER: usize = 32;
const FRAME_HEADER: usize = 24;
const MAGIC: u32 = 0x377f_0682;

/// What a log holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Wal {
    pub page_size: usize,
    /// Where the newest committed version of each page is, in bytes.
    pub pages: HashMap<u32, u64>,
    /// Pages of frames before the last commit that do not verify, oldest first: number, and where it is.
    pub doubtful: Vec<(u32, u64)>,
    /// Pages of the database after the last commit.
    pub size: u32,
    /// Committed frames follow one that does not verify, or a header that does not.
    pub damaged: bool,
}

/// Page sizes that SQLite knows.
pub(crate) fn is_page_size(size: usize) -> bool {
    (512..=65_536).contains(&size) && size.is_power_of_two()
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

/// Reads a log; `None`: it is empty.
pub(crate) fn read(mut file: impl Read + Seek, default_page_size: usize) -> io::Result<Option<Wal>> {
    let length = file.seek(SeekFrom::End(0))?;
    if length < (HEADER + FRAME_HEADER) as u64 {
        return Ok(None);
    }
    file.seek(SeekFrom::Start(0))?;
    let mut file = io::BufReader::new(file);
    let mut header = [0; HEADER];
    file.read_exact(&mut header)?;
    let field = |index: usize| u32_at(&header, index * 4).unwrap_or_default();
    let big_endian = match field(0) {
        MAGIC => false,
        magic if magic == MAGIC | 1 => true,
        _ => cfg!(target_endian = "big"),
    };
    let sum = checksum((0, 0), &header[..24], big_endian);
    // What the next frame may go on from: what the one before says, and what it ought to say.
    let mut sums = [sum; 2];
    let named = field(2) as usize;
    let sound = field(0) & !1 == MAGIC && is_page_size(named) && sum == (field(6), field(7));
    let page_size = if is_page_size(named) { named } else { default_page_size };

    let mut wal = Wal { page_size, ..Wal::default() };
    let mut salts = sound.then_some((field(4), field(5)));
    // Whether everything so far verified.
    let mut whole = sound;
    let (mut pages, mut doubtful) = (Vec::new(), Vec::new());
    let mut frame = vec![0; FRAME_HEADER + page_size];
    let mut at = HEADER as u64;
    while at + frame.len() as u64 <= length {
        file.read_exact(&mut frame)?;
        let field = |index: usize| u32_at(&frame, index * 4).unwrap_or_default();
        let (page, size, stored) = (field(0), field(1), (field(4), field(5)));
        let own = *salts.get_or_insert((field(2), field(3))) == (field(2), field(3));
        let behind = |sum| checksum(checksum(sum, &frame[..8], big_endian), &frame[FRAME_HEADER..], big_endian);
        let found = behind(sums[0]);
        let verified = found == stored || sums[1] != sums[0] && behind(sums[1]) == stored;
        sums = [stored, found];
        let data = at + FRAME_HEADER as u64;
        at += frame.len() as u64;
        if !own || !verified || page == 0 {
            // The first difference of salts is where an older log's frames begin, or damage: what follows tells.
            whole = false;
            doubtful.push((page, data));
            continue;
        }
        pages.push((page, data));
        if size > 0 {
            wal.pages.extend(pages.drain(..));
            wal.doubtful.append(&mut doubtful);
            wal.size = size;
            wal.damaged |= !whole;
        }
    }
    Ok(Some(wal))
}

/// SQLite's rolling checksum; `data` is a multiple of 8 bytes.
fn checksum((mut first, mut second): (u32, u32), data: &[u8], big_endian: bool) -> (u32, u32) {
    let word = |bytes: &[u8]| {
        let bytes = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }
    };
    for pair in data.chunks_exact(8) {
        first = first.wrapping_add(word(&pair[..4])).wrapping_add(second);
        second = second.wrapping_add(word(&pair[4..])).wrapping_add(first);
    }
    (first, second)
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use rusqlite::Connection;

    use super::*;

    /// The log of a table with five transactions, each a frame or two, and a rolled back one that left frames behind.
    fn log() -> Vec<u8> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("db");
        let connection = Connection::open(&path).unwrap();
        connection
            .execute_batch(
                "PRAGMA journal_mode = WAL; PRAGMA cache_size = 10; CREATE TABLE t (a); PRAGMA wal_checkpoint;",
            )
            .unwrap();
        for n in 0..5 {
            connection.execute("INSERT INTO t VALUES (?1)", [n]).unwrap();
        }
        connection
            .execute_batch("BEGIN; INSERT INTO t SELECT randomblob(4000) FROM json_each('[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18]'); ROLLBACK")
            .unwrap();
        std::fs::read(directory.path().join("db-wal")).unwrap()
    }

    #[test]
    fn a_sound_log_is_read_as_sqlite_reads_it_and_each_damage_is_seen_or_is_an_end() {
        let sound = log();
        let frame = FRAME_HEADER + 4096;
        let read = |bytes: &[u8]| super::read(Cursor::new(bytes), 4096).unwrap();
        let whole = read(&sound).unwrap();
        assert!(!whole.damaged && whole.doubtful.is_empty() && whole.size == 2, "{whole:?}");
        assert!(sound.len() > HEADER + 8 * frame, "frames of what was rolled back");
        let frames = whole.pages.values().max().unwrap() / frame as u64 + 1;
        assert_eq!(frames, 5);
        for at in [0, 5, 9, 17, 25] {
            let mut bytes = sound.clone();
            bytes[at] ^= 0x40;
            let wal = read(&bytes).unwrap();
            assert!(wal.damaged, "header, byte {at}");
        }
        for n in 0..frames as usize {
            for at in [2, 9, 17, FRAME_HEADER + 1000] {
                let mut bytes = sound.clone();
                bytes[HEADER + n * frame + at] ^= 0x40;
                let wal = read(&bytes).unwrap();
                // What happens to the last frame looks like a power cut before it was written.
                assert_eq!(wal.damaged, n + 1 < frames as usize, "frame {n}, byte {at}: {wal:?}");
            }
        }
        for length in [0, 10, HEADER] {
            assert_eq!(read(&sound[..length]), None);
        }
        assert!(read(&sound[..HEADER + 100]).is_some_and(|wal| wal.pages.is_empty() && !wal.damaged));
        assert!(read(&sound[..HEADER + 3 * frame]).unwrap().pages.values().all(|at| *at < (HEADER + 3 * frame) as u64));
    }
}
