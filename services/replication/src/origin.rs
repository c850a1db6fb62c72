//! What a transaction settles for clients, on its way into one header. Pure.
//!
//! There is room for so much only. A client that is not told all finds out by [`OriginEntry::first_seq`]: an entry that begins
//! behind what it was told makes its edge read the ledger, which tells of every verdict.

use millstream_schemas::stream::{MAX_HEADER_BYTES, OriginEntry};

/// Largest header of entries, in bytes. The broker takes [`MAX_HEADER_BYTES`] of all headers together, the others take less
/// than the rest.
pub const MAX_ORIGIN_BYTES: usize = MAX_HEADER_BYTES - 8 * 1024;
/// Most bytes of entries that are kept until the transaction's end; beyond, only what asks for the ledger is kept.
const MAX_KEPT_BYTES: usize = 1024 * 1024;
/// Most entries that are kept: more would not fit into the header at all.
const MAX_ENTRIES: usize = MAX_ORIGIN_BYTES / 100;

/// The entries of a transaction.
#[derive(Debug, Default)]
pub struct Origins {
    entries: Vec<OriginEntry>,
    bytes: usize,
    added: usize,
}

impl Origins {
    /// Whether nobody is told anything.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Adds an entry.
    pub fn add(&mut self, mut entry: OriginEntry) {
        self.added += 1;
        if self.entries.len() >= MAX_ENTRIES {
            return;
        }
        if self.bytes + bytes(&entry) > MAX_KEPT_BYTES {
            shorten(&mut entry);
        }
        self.bytes += bytes(&entry);
        self.entries.push(entry);
    }

    /// The header, if there is something to tell, and how many entries do not tell all.
    pub fn into_header(self) -> (Option<String>, usize) {
        let Origins { mut entries, bytes: mut total, added } = self;
        // Those with the most to tell first: the others are as short as can be.
        let mut by_size: Vec<usize> = (0..entries.len()).filter(|&index| has_more(&entries[index])).collect();
        by_size.sort_by_cached_key(|&index| bytes(&entries[index]));
        while total > MAX_ORIGIN_BYTES
            && let Some(index) = by_size.pop()
        {
            total -= bytes(&entries[index]);
            shorten(&mut entries[index]);
            total += bytes(&entries[index]);
        }
        while total > MAX_ORIGIN_BYTES
            && let Some(last) = entries.pop()
        {
            total -= bytes(&last);
        }
        let shortened = entries.iter().filter(|entry| entry.first_seq > entry.client_seq).count();
        let left_out = added - entries.len() + shortened;
        // An error is impossible: the entries came out of JSON.
        ((!entries.is_empty()).then(|| serde_json::to_string(&entries).ok()).flatten(), left_out)
    }
}

fn has_more(entry: &OriginEntry) -> bool {
    !entry.failed.is_empty() || !entry.lost.is_empty()
}

/// Makes the client's edge read the ledger instead of believing that nothing failed.
fn shorten(entry: &mut OriginEntry) {
    entry.first_seq = entry.client_seq.saturating_add(1);
    entry.failed.clear();
    entry.lost.clear();
}

/// Its share of the header: as JSON, and what is around it.
fn bytes(entry: &OriginEntry) -> usize {
    const AROUND: usize = 2;
    serde_json::to_string(entry).map_or(0, |text| text.len()) + AROUND
}

#[cfg(test)]
mod tests {
    use millstream_schemas::Code;
    use millstream_schemas::stream::Failure;
    use uuid::Uuid;

    use super::*;

    fn entry(client: usize, failures: usize) -> OriginEntry {
        let failure = Failure {
            client_seq: 5,
            change_id: Uuid::nil(),
            code: Code::EntityMissing,
            rule: None,
            message: "m".repeat(400),
        };
        OriginEntry {
            client_id: Uuid::from_u128(client as u128),
            first_seq: 4,
            client_seq: 5,
            run_id: Uuid::nil(),
            failed: vec![failure; failures],
            lost: Vec::new(),
        }
    }

    fn header(entries: impl IntoIterator<Item = OriginEntry>) -> (Vec<OriginEntry>, usize) {
        let mut origins = Origins::default();
        entries.into_iter().for_each(|entry| origins.add(entry));
        assert!(origins.bytes <= MAX_KEPT_BYTES + MAX_ORIGIN_BYTES * 2 && origins.entries.len() <= MAX_ENTRIES);
        let (header, left_out) = origins.into_header();
        let header = header.unwrap();
        assert!(header.len() <= MAX_ORIGIN_BYTES, "{}", header.len());
        (serde_json::from_str(&header).unwrap(), left_out)
    }

    #[test]
    fn what_fits_is_told() {
        assert_eq!(Origins::default().into_header(), (None, 0));
        let entries: Vec<OriginEntry> = (0..50).map(|client| entry(client, 1)).collect();
        assert_eq!(header(entries.clone()), (entries, 0));
    }

    #[test]
    fn who_is_not_told_all_reads_the_ledger() {
        let mut entries: Vec<OriginEntry> =
            (0..200).map(|client| entry(client, usize::from(client % 2 == 0))).collect();
        entries[7] = entry(7, 1000);
        let (told, left_out) = header(entries.clone());
        assert_eq!(told.len(), entries.len());
        let differs = told.iter().zip(&entries).filter(|(told, entry)| told != entry);
        assert_eq!(differs.clone().count(), left_out);
        for (told, entry) in differs {
            assert_eq!((told.client_id, told.client_seq, told.first_seq), (entry.client_id, 5, 6));
            assert!(!entry.failed.is_empty() && !has_more(told));
        }
        assert_eq!(told[7].first_seq, 6);
        assert_eq!(told[1], entries[1]);
    }

    #[test]
    fn any_number_of_entries_is_bounded() {
        let (told, left_out) = header((0..100_000).map(|client| entry(client, client % 7)));
        assert_eq!(told.len() + left_out - told.iter().filter(|entry| entry.first_seq == 6).count(), 100_000);
        assert!(told.iter().all(|entry| !has_more(entry)));
        assert!(told.len() > 300, "{}", told.len());
    }
}
