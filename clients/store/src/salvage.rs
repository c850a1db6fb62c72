//! Reads what is left of the queue in a damaged store: page by page and without SQLite, which gives up at the first page that
//! does not fit.
//!
//! Rows that the table's tree still leads to come first; then every other page that looks like one of its leaves is looked through,
//! for a tree whose inner pages, root or schema are gone. Nothing is believed that does not read as an entry.
//!
//! Source: <https://www.sqlite.org/fileformat2.html>.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use millstream_client_core::format::LOCAL_CHANGES;
use millstream_schemas::{Change, Operation};
use rusqlite::types::Value;
use uuid::Uuid;

use crate::states::EntryState;
use crate::wal::{self, PAGE_SIZE, Wal, is_page_size, u32_at};

/// Largest row that is put together from overflow pages, in bytes: more than a transaction may have.
const MAX_ROW_BYTES: usize = 16 * 1024 * 1024;
const MAGIC: &[u8] = b"SQLite format 3\0";
/// The file's header, in bytes.
const FILE_HEADER: usize = 100;
const LEAF: u8 = 0x0d;
const INTERIOR: u8 = 0x05;
const INDEX_LEAF: u8 = 0x0a;
const INDEX_INTERIOR: u8 = 0x02;
/// Where a row names the columns whose values are amounts to add; stores of versions up to 3 have no such column.
const ADDS: usize = 22;
/// Where it says that a delete's row was taken along; as above.
const GONE: usize = 23;
/// Where a row has its change's id, its number and its time: in this version's tables, and in those that were upgraded from each
/// earlier one. What lies between the change's id and the state is the same in all.
const LAYOUTS: [(usize, usize, usize); 3] = [(5, 2, 21), (4, 2, 20), (2, 17, 16)];

/// An entry of the queue.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct SalvagedEntry {
    pub tx: u64,
    pub client_seq: Option<u64>,
    pub state: EntryState,
    pub recorded_at: u64,
    pub change: Change,
}

/// What was left.
#[derive(Debug, Default)]
pub(crate) struct Salvage {
    /// Entries by their `id`, settled ones included.
    pub entries: BTreeMap<i64, SalvagedEntry>,
    pub client_id: Option<Uuid>,
    pub confirmed_seq: Option<u64>,
    /// Rows of the queue that do not read as entries.
    pub unreadable: u64,
    /// The file holds something of a store.
    pub is_store: bool,
    /// Highest `id` that the queue ever gave out, if that is known.
    pub last_id: Option<i64>,
}

/// Reads the files of a store.
pub(crate) fn read(database: &Path, log: &Path) -> io::Result<Salvage> {
    let open = |path: &Path| match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    };
    Ok(salvage(&mut open(database)?, &mut open(log)?))
}

fn salvage<F: Read + Seek>(database: &mut Option<F>, log: &mut Option<F>) -> Salvage {
    let mut found = Salvage::default();
    // The header may be damaged and tell a wrong size.
    for trusted in [true, false] {
        found = Reader::new(database.as_mut(), log.as_mut(), trusted).salvage();
        if !found.entries.is_empty() {
            break;
        }
    }
    found
}

struct Reader<'a, F> {
    database: Option<&'a mut F>,
    log: Option<&'a mut F>,
    wal: Wal,
    page_size: usize,
    count: u32,
    visited: BTreeSet<u32>,
}

impl<'a, F: Read + Seek> Reader<'a, F> {
    /// `trusted`: the page size is as the header says, else as every store has it.
    fn new(mut database: Option<&'a mut F>, mut log: Option<&'a mut F>, trusted: bool) -> Self {
        let header = read_at(&mut database, 0, FILE_HEADER).unwrap_or_default();
        let named = match header.get(16..18) {
            Some([0, 1]) => 65_536,
            Some(&[high, low]) => usize::from(u16::from_be_bytes([high, low])),
            _ => 0,
        };
        let trusted = trusted && header.starts_with(MAGIC) && is_page_size(named);
        let wal = log.as_mut().and_then(|log| wal::read(log, PAGE_SIZE).ok().flatten()).unwrap_or_default();
        let page_size = match (trusted, wal.page_size) {
            (true, _) => named,
            (false, 0) => PAGE_SIZE,
            (false, size) => size,
        };
        let length = database.as_mut().and_then(|file| file.seek(SeekFrom::End(0)).ok()).unwrap_or(0);
        let count = u32::try_from(length.div_ceil(page_size as u64)).unwrap_or(u32::MAX);
        let count = wal.pages.keys().copied().max().unwrap_or(0).max(count);
        Reader { database, log, wal, page_size, count, visited: BTreeSet::new() }
    }

    fn salvage(mut self) -> Salvage {
        let mut found = Salvage::default();
        let schema = self.table(1);
        let root = |name: &str| {
            let row = schema.iter().find(|(_, row)| text(row, 1) == Some(name));
            row.and_then(|(_, row)| integer(row, 3)).and_then(|page| u32::try_from(page).ok())
        };
        if let Some(root) = root(LOCAL_CHANGES) {
            found.is_store = true;
            for (id, row) in self.table(root) {
                match entry(&row) {
                    Some(entry) => drop(found.entries.insert(id, entry)),
                    None => found.unreadable += 1,
                }
            }
        }
        if let Some(root) = root("sqlite_sequence") {
            let rows = self.table(root);
            let last = rows.iter().find(|(_, row)| text(row, 0) == Some(LOCAL_CHANGES));
            found.last_id = last.and_then(|(_, row)| integer(row, 1));
        }
        if let Some(root) = root("millstream_meta") {
            for row in self.index(root) {
                meta(&row, &mut found);
            }
        }
        self.carve(&mut found);
        found
    }

    /// The newest version of a page; `None`: the files do not have it whole.
    fn page(&mut self, number: u32) -> Option<Vec<u8>> {
        match self.wal.pages.get(&number) {
            Some(&at) if self.wal.page_size == self.page_size => read_at(&mut self.log, at, self.page_size),
            _ if number == 0 => None,
            _ => read_at(&mut self.database, u64::from(number - 1) * self.page_size as u64, self.page_size),
        }
    }

    /// Rows of a table, as far as its tree leads to them, with their rowids.
    fn table(&mut self, root: u32) -> Vec<(i64, Vec<Value>)> {
        let mut rows = Vec::new();
        let mut next = vec![root];
        while let Some(number) = next.pop() {
            if !self.visited.insert(number) {
                continue;
            }
            let Some(page) = self.page(number) else { continue };
            next.extend(children(&page, header_at(number), INTERIOR));
            rows.extend(self.rows(&page, number));
        }
        rows
    }

    /// Rows of a table without rowids.
    fn index(&mut self, root: u32) -> Vec<Vec<Value>> {
        let mut rows = Vec::new();
        let mut next = vec![root];
        while let Some(number) = next.pop() {
            if !self.visited.insert(number) {
                continue;
            }
            let Some(page) = self.page(number) else { continue };
            next.extend(children(&page, header_at(number), INDEX_INTERIOR));
            rows.extend(self.index_rows(&page, number));
        }
        rows
    }

    /// Rows of a leaf; none of any other page.
    fn rows(&mut self, page: &[u8], number: u32) -> Vec<(i64, Vec<Value>)> {
        let mut rows = Vec::new();
        for at in cells(page, header_at(number), LEAF) {
            let Some((size, at)) = varint(page, at) else { continue };
            let Some((rowid, at)) = varint(page, at) else { continue };
            if let Some(payload) = self.payload(page, at, size, self.page_size - 35)
                && let Some(row) = record(&payload)
            {
                rows.push((rowid, row));
            }
        }
        rows
    }

    fn index_rows(&mut self, page: &[u8], number: u32) -> Vec<Vec<Value>> {
        let mut rows = Vec::new();
        let header = header_at(number);
        let own = cells(page, header, INDEX_LEAF).into_iter();
        let inner = cells(page, header, INDEX_INTERIOR).into_iter().map(|at| at + 4);
        for at in own.chain(inner) {
            let Some((size, at)) = varint(page, at) else { continue };
            if let Some(payload) = self.payload(page, at, size, (self.page_size - 12) * 64 / 255 - 23)
                && let Some(row) = record(&payload)
            {
                rows.push(row);
            }
        }
        rows
    }

    /// A row's bytes: what is on the page, of which it takes at most `most`, and on the overflow pages behind it.
    fn payload(&mut self, page: &[u8], at: usize, size: i64, most: usize) -> Option<Vec<u8>> {
        let size = match usize::try_from(size) {
            Ok(size) if size <= MAX_ROW_BYTES => size,
            _ => return None,
        };
        let least = (self.page_size - 12) * 32 / 255 - 23;
        let local = match size {
            _ if size <= most => size,
            _ => {
                let rest = least + (size - least) % (self.page_size - 4);
                if rest <= most { rest } else { least }
            }
        };
        let bytes = page.get(at..at + local)?;
        let mut payload = bytes.to_vec();
        let mut next = if size > local { u32_at(page, at + local) } else { None };
        while payload.len() < size {
            let number = next.filter(|number| *number > 0)?;
            let overflow = self.page(number)?;
            next = u32_at(&overflow, 0);
            let taken = (size - payload.len()).min(self.page_size - 4);
            payload.extend(&overflow[4..4 + taken]);
        }
        Some(payload)
    }

    /// Pages that hold nothing: what they held is history.
    fn free_pages(&mut self) -> BTreeSet<u32> {
        let mut free = BTreeSet::new();
        let first = self.page(1).filter(|page| page.starts_with(MAGIC));
        let mut next = first.and_then(|page| u32_at(&page, 32)).unwrap_or(0);
        while next > 0 && free.insert(next) {
            let Some(trunk) = self.page(next) else { break };
            let leaves = u32_at(&trunk, 4).unwrap_or(0) as usize;
            if leaves > self.page_size / 4 - 2 {
                break;
            }
            free.extend((0..leaves).filter_map(|leaf| u32_at(&trunk, 8 + leaf * 4)));
            next = u32_at(&trunk, 0).unwrap_or(0);
        }
        free
    }

    /// Looks through all pages that nothing led to.
    fn carve(&mut self, found: &mut Salvage) {
        let free = self.free_pages();
        let mut pages = Vec::new();
        for number in (1..=self.count).filter(|number| !free.contains(number)) {
            if !self.visited.contains(&number)
                && let Some(page) = self.page(number)
            {
                found.is_store = found.is_store || holds(&page, LOCAL_CHANGES.as_bytes());
                pages.push(self.carve_page(&page, number, found));
            }
        }
        // Frames that do not verify: the newest first. The page's number is as doubtful as the rest.
        for (number, at) in std::mem::take(&mut self.wal.doubtful).into_iter().rev() {
            if let Some(page) = read_at(&mut self.log, at, self.wal.page_size) {
                pages.push(self.carve_page(&page, number.max(1), found));
            }
        }
        let mut carved: HashMap<i64, SalvagedEntry> = HashMap::new();
        for (id, entry) in pages.into_iter().flatten() {
            // Of several versions one that is settled is the latest.
            if entry.state == EntryState::Confirmed || !carved.contains_key(&id) {
                carved.insert(id, entry);
            }
        }
        found.is_store |= !carved.is_empty();
        for (id, entry) in carved {
            found.entries.entry(id).or_insert(entry);
        }
    }

    fn carve_page(&mut self, page: &[u8], number: u32, found: &mut Salvage) -> Vec<(i64, SalvagedEntry)> {
        if found.client_id.is_none() || found.confirmed_seq.is_none() {
            for row in self.index_rows(page, number) {
                meta(&row, found);
            }
        }
        let rows = self.rows(page, number);
        rows.into_iter().filter_map(|(id, row)| Some((id, entry(&row)?))).collect()
    }
}

/// `None`: there is nothing, or the disk does not give it.
fn read_at<F: Read + Seek>(file: &mut Option<&mut F>, at: u64, size: usize) -> Option<Vec<u8>> {
    let file = file.as_mut()?;
    file.seek(SeekFrom::Start(at)).ok()?;
    let mut page = Vec::with_capacity(size);
    file.by_ref().take(size as u64).read_to_end(&mut page).ok()?;
    // A file that was cut within its last page still has the first part of it.
    (!page.is_empty()).then(|| {
        page.resize(size, 0);
        page
    })
}

fn header_at(number: u32) -> usize {
    if number == 1 { FILE_HEADER } else { 0 }
}

/// Where the cells of a page are; none if it is of another kind.
fn cells(page: &[u8], header: usize, kind: u8) -> Vec<usize> {
    if page.get(header) != Some(&kind) {
        return Vec::new();
    }
    let pointers = header + if matches!(kind, INTERIOR | INDEX_INTERIOR) { 12 } else { 8 };
    let short = |at: usize| Some(usize::from(u16::from_be_bytes([*page.get(at)?, *page.get(at + 1)?])));
    let count = short(header + 3).unwrap_or(0).min(page.len() / 2);
    (0..count).filter_map(|cell| short(pointers + 2 * cell)).collect()
}

/// The pages below an inner page.
fn children(page: &[u8], header: usize, kind: u8) -> Vec<u32> {
    if page.get(header) != Some(&kind) {
        return Vec::new();
    }
    let left = cells(page, header, kind).into_iter().filter_map(|at| u32_at(page, at));
    left.chain(u32_at(page, header + 8)).collect()
}

/// SQLite's integer of 1 to 9 bytes, and what follows it.
fn varint(bytes: &[u8], at: usize) -> Option<(i64, usize)> {
    let mut value = 0_u64;
    for place in 0..9 {
        let byte = *bytes.get(at + place)?;
        if place == 8 {
            return Some(((value << 8 | u64::from(byte)) as i64, at + 9));
        }
        value = value << 7 | u64::from(byte & 0x7f);
        if byte < 0x80 {
            return Some((value as i64, at + place + 1));
        }
    }
    None
}

/// The values of a row.
fn record(payload: &[u8]) -> Option<Vec<Value>> {
    let (header, mut at) = varint(payload, 0)?;
    let header = usize::try_from(header).ok().filter(|header| *header <= payload.len())?;
    let mut body = header;
    let mut values = Vec::new();
    while at < header {
        let (kind, next) = varint(payload, at)?;
        at = next;
        let size = match kind {
            0 | 8 | 9 => 0,
            1..=4 => kind as usize,
            5 => 6,
            6 | 7 => 8,
            _ => usize::try_from(kind.checked_sub(12)?).ok()? / 2,
        };
        let bytes = payload.get(body..body.checked_add(size)?)?;
        body += size;
        values.push(match kind {
            0 => Value::Null,
            8 | 9 => Value::Integer(kind - 8),
            7 => Value::Real(f64::from_be_bytes(bytes.try_into().ok()?)),
            1..=6 => {
                let negative = bytes[0] >= 0x80;
                let start = if negative { -1 } else { 0 };
                Value::Integer(bytes.iter().fold(start, |value: i64, byte| value << 8 | i64::from(*byte)))
            }
            _ if kind % 2 == 0 => Value::Blob(bytes.to_vec()),
            _ => Value::Text(String::from_utf8(bytes.to_vec()).ok()?),
        });
    }
    Some(values)
}

fn text(row: &[Value], column: usize) -> Option<&str> {
    match row.get(column) {
        Some(Value::Text(text)) => Some(text),
        _ => None,
    }
}

fn integer(row: &[Value], column: usize) -> Option<i64> {
    match row.get(column) {
        Some(Value::Integer(value)) => Some(*value),
        _ => None,
    }
}

/// A row of `local_changes`; `None`: it is not one, or does not read.
fn entry(row: &[Value]) -> Option<SalvagedEntry> {
    LAYOUTS.into_iter().find_map(|(first, client_seq, recorded_at)| {
        // `id` is the rowid, which the row itself does not repeat.
        if row.first() != Some(&Value::Null) {
            return None;
        }
        let op = match text(row, first + 3)? {
            "insert" => Operation::Insert,
            "update" => Operation::Update,
            "delete" => Operation::Delete,
            _ => return None,
        };
        let change = Change {
            change_id: text(row, first)?.parse().ok()?,
            table: text(row, first + 1)?.to_owned(),
            op,
            key: serde_json::from_str(text(row, first + 2)?).ok()?,
            columns: serde_json::from_str(text(row, first + 4)?).ok()?,
            values: serde_json::from_str(text(row, first + 5)?).ok()?,
            adds: text(row, ADDS).map_or(Ok(Vec::new()), serde_json::from_str).ok()?,
            gone: integer(row, GONE).is_some(),
            stamp: u64::try_from(integer(row, first + 7)?).ok()?,
        };
        let state = EntryState::parse(text(row, first + 8)?)?;
        let fits = change.columns.len() == change.values.len() && !change.key.is_empty();
        fits.then_some(SalvagedEntry {
            tx: u64::try_from(integer(row, 1)?).ok()?,
            client_seq: integer(row, client_seq).and_then(|client_seq| u64::try_from(client_seq).ok()),
            state,
            recorded_at: u64::try_from(integer(row, recorded_at)?).ok()?,
            change,
        })
    })
}

/// A row of `millstream_meta`, if it is one of those that matter.
fn meta(row: &[Value], found: &mut Salvage) {
    match (text(row, 0), row.get(1), row.len()) {
        (Some("client_id"), Some(Value::Text(id)), 2) => found.client_id = id.parse().ok().or(found.client_id),
        (Some("confirmed_seq"), Some(Value::Integer(client_seq)), 2) => {
            found.confirmed_seq = u64::try_from(*client_seq).ok().max(found.confirmed_seq);
        }
        _ => {}
    }
}

fn holds(page: &[u8], text: &[u8]) -> bool {
    page.windows(text.len()).any(|window| window == text)
}
