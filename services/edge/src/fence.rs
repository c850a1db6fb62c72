//! What a Postgres snapshot sees, and the LSN behind which everything that it sees has been published.
//!
//! Visibility order is not commit order, so a snapshot is never joined to the stream by an LSN alone: a published
//! transaction may be invisible to it. Source: PostgreSQL documentation, "System Information Functions",
//! `pg_current_snapshot`.

use std::str::FromStr;

use millstream_schemas::Lsn;

/// A WAL page, in bytes; an insert position just behind a page's header lies after a flush position at the page's start.
const WAL_PAGE: u64 = 8192;
/// Longest WAL page header, in bytes.
const WAL_PAGE_HEADER: u64 = 40;

/// A snapshot (`pg_current_snapshot`) with its fence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fence {
    xmin: u64,
    xmax: u64,
    in_progress: Vec<u64>,
    /// Every transaction that the snapshot sees committed before this LSN.
    pub lsn: Lsn,
}

/// Postgres sent something else than a snapshot and an LSN.
#[derive(Debug, thiserror::Error)]
#[error("Postgres' snapshot cannot be read: {0}")]
pub struct InvalidFence(String);

impl Fence {
    /// From the texts of `pg_current_snapshot()` (`xmin:xmax:xid,xid,…`) and `pg_current_wal_insert_lsn()`.
    ///
    /// # Errors
    /// The texts are something else.
    pub fn parse(snapshot: &str, lsn: &str) -> Result<Fence, InvalidFence> {
        let invalid = || InvalidFence(format!("{snapshot} at {lsn}"));
        let mut parts = snapshot.split(':');
        let number = |text: Option<&str>| text.and_then(|text| text.parse::<u64>().ok()).ok_or_else(invalid);
        let (xmin, xmax) = (number(parts.next())?, number(parts.next())?);
        let in_progress = match parts.next() {
            None => return Err(invalid()),
            Some("") => Vec::new(),
            Some(list) => list.split(',').map(|xid| number(Some(xid))).collect::<Result<_, _>>()?,
        };
        let Lsn(lsn) = Lsn::from_str(lsn).map_err(|_| invalid())?;
        let behind_header = lsn % WAL_PAGE;
        let lsn = Lsn(if behind_header <= WAL_PAGE_HEADER { lsn - behind_header } else { lsn });
        Ok(Fence { xmin, xmax, in_progress, lsn })
    }

    /// As [`Fence::parse`] takes it.
    pub fn visible(&self) -> String {
        let in_progress: Vec<String> = self.in_progress.iter().map(u64::to_string).collect();
        format!("{}:{}:{}", self.xmin, self.xmax, in_progress.join(","))
    }

    /// Whether the snapshot sees the transaction of a message: 32 bits of its id, and its commit LSN.
    pub fn sees(&self, xid: u32, commit: Lsn) -> bool {
        if commit >= self.lsn {
            return false;
        }
        let xid = self.widen(xid);
        xid < self.xmin || (xid < self.xmax && !self.in_progress.contains(&xid))
    }

    /// The 64-bit id nearest to the snapshot's that ends in these 32 bits.
    fn widen(&self, xid: u32) -> u64 {
        let near = (self.xmax & !0xFFFF_FFFF) | u64::from(xid);
        let half = 1 << 31;
        if near > self.xmax.saturating_add(half) {
            near.saturating_sub(1 << 32)
        } else if near.saturating_add(half) < self.xmax {
            near.saturating_add(1 << 32)
        } else {
            near
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn visibility_follows_the_snapshot() {
        let fence = Fence::parse("100:105:101,103", "0/5000").unwrap();
        let seen: Vec<u32> = (98..107).filter(|&xid| fence.sees(xid, Lsn(0x4000))).collect();
        assert_eq!(seen, [98, 99, 100, 102, 104]);
        assert!(!fence.sees(99, Lsn(0x5000)), "nothing behind the fence is visible");
        assert_eq!(Fence::parse("7:7:", "0/9000").unwrap().in_progress, Vec::<u64>::new());
        for bad in ["", "1", "1:2", "a:b:", "1:2:x"] {
            assert!(Fence::parse(bad, "0/1").is_err(), "{bad}");
        }
    }

    #[test]
    fn xids_wrap() {
        let wrapped = (7_u64 << 32) + 10;
        let fence = Fence::parse(&format!("{}:{}:", wrapped - 5, wrapped), "1/0").unwrap();
        assert!(fence.sees(u32::MAX, Lsn(1)), "just before the wrap");
        assert!(fence.sees(9, Lsn(1)));
        assert!(!fence.sees(10, Lsn(1)));
        assert!(!fence.sees(1 << 30, Lsn(1)), "far ahead, not far behind");
        let largest = Fence::parse(&format!("1:{}:", u64::MAX), "1/0").unwrap();
        assert!(largest.sees(u32::MAX - 1, Lsn(1)) && !largest.sees(u32::MAX, Lsn(1)));
    }

    #[test]
    fn fences_just_behind_a_page_header_move_to_the_page() {
        assert_eq!(Fence::parse("1:1:", "0/2018").unwrap().lsn, Lsn(0x2000));
        assert_eq!(Fence::parse("1:1:", "0/2028").unwrap().lsn, Lsn(0x2000));
        assert_eq!(Fence::parse("1:1:", "0/2030").unwrap().lsn, Lsn(0x2030));
    }
}
