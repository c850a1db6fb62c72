//! Which partitions are this process's. A heartbeat row a member says who is alive; a rendezvous hash says who of them
//! should own which partition; raising a partition's term is what makes it so.
//!
//! Only the term matters for correctness. Everything here may be wrong for a while, at the cost of speed.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::{Duration, Instant};

use millstream_runtime::error::chain;
use millstream_runtime::health::Health;
use millstream_runtime::shutdown::Shutdown;
use millstream_schemas::subject::PARTITIONS;
use sqlx::{PgPool, Row};
use tokio::sync::{mpsc, watch};

use crate::item::Owned;
use crate::worker::Lost;

/// Time between heartbeats, and between looks at who owns what.
const TICK: Duration = Duration::from_millis(500);
/// A member whose heartbeat is older than this (seconds) is dead.
const DEAD_AFTER_SECONDS: i32 = 3;
/// A partition that its worker has not released for this long after it was told to is released over its head.
const RELEASE_PATIENCE: Duration = Duration::from_secs(15);

/// The partitions that are ours, as the consumer needs to know them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Assignment {
    /// Term and position at the time they were taken.
    pub owned: BTreeMap<u16, Owned>,
    /// Highest position of any partition, whoever owns it.
    pub highest: u64,
}

/// A row of `millstream.partitions`.
#[derive(Clone, Debug)]
struct PartitionRow {
    partition: u16,
    term: i64,
    position: u64,
    owner: Option<String>,
}

/// What to change.
#[derive(Debug, Default, PartialEq, Eq)]
struct Decision {
    /// Taken over by somebody else.
    lost: Vec<u16>,
    /// Another member should have it.
    release: Vec<u16>,
    /// Ours to take.
    take: Vec<u16>,
}

/// The member that should own a partition: the one with the highest score. Source: Thaler and Ravishankar, "Using
/// name-based mappings to increase hit rates", 1998.
fn winner(members: &BTreeSet<String>, partition: u16) -> Option<&String> {
    members.iter().max_by_key(|member| score(member, partition))
}

/// FNV-1a of the name and the partition, finished as SplitMix64 does, so that every version of the service agrees.
fn score(member: &str, partition: u16) -> u64 {
    let hash = member
        .bytes()
        .chain(partition.to_be_bytes())
        .fold(0xCBF2_9CE4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3));
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    hash ^ (hash >> 31)
}

fn decide(me: &str, live: &BTreeSet<String>, found: &[PartitionRow], owned: &BTreeMap<u16, Owned>) -> Decision {
    let mut decision = Decision::default();
    for row in found {
        let mine = winner(live, row.partition).is_some_and(|winner| winner == me);
        match owned.get(&row.partition) {
            Some(state) if state.term != row.term => decision.lost.push(row.partition),
            Some(_) if !mine => decision.release.push(row.partition),
            Some(_) => {}
            None => {
                let free = row.owner.as_ref().is_none_or(|owner| owner == me || !live.contains(owner));
                if mine && free {
                    decision.take.push(row.partition);
                }
            }
        }
    }
    decision
}

/// The ownership task of one incarnation of the stream.
pub(crate) struct Ownership {
    pub pool: PgPool,
    pub member: String,
    pub incarnation: String,
    pub assignment: watch::Sender<Assignment>,
    pub lost: mpsc::Receiver<Lost>,
    pub health: Health,
    pub shutdown: Shutdown,
}

impl Ownership {
    /// Runs until shutdown.
    pub async fn run(mut self) {
        let mut owned = BTreeMap::new();
        let mut released: HashMap<u16, Instant> = HashMap::new();
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.shutdown.requested() => return,
                lost = self.lost.recv() => match lost {
                    Some(lost) => {
                        if owned.get(&lost.partition).is_some_and(|state: &Owned| state.term == lost.term) {
                            owned.remove(&lost.partition);
                            self.announce(&owned, None);
                        }
                        continue;
                    }
                    None => return,
                },
                _ = ticks.tick() => {}
            }
            match self.tick(&mut owned, &mut released).await {
                Ok(()) => self.health.set_ready("ownership", true),
                Err(error) => {
                    tracing::warn!(error = chain(&error), "cannot look after partitions");
                    self.health.set_ready("ownership", false);
                    // It may be the connection's fault, which keeps the settings that it began with, such as read-only transactions.
                    if let Some(connection) = self.pool.try_acquire() {
                        let _closed = connection.close().await;
                    }
                }
            }
        }
    }

    async fn tick(
        &self,
        owned: &mut BTreeMap<u16, Owned>,
        released: &mut HashMap<u16, Instant>,
    ) -> Result<(), sqlx::Error> {
        sqlx::query(
            "INSERT INTO millstream.members (member, heartbeat) VALUES ($1, clock_timestamp()) \
             ON CONFLICT (member) DO UPDATE SET heartbeat = clock_timestamp()",
        )
        .bind(&self.member)
        .execute(&self.pool)
        .await?;
        let live: Vec<String> = sqlx::query_scalar(
            "SELECT member FROM millstream.members WHERE heartbeat > clock_timestamp() - make_interval(secs => $1)",
        )
        .bind(f64::from(DEAD_AFTER_SECONDS))
        .fetch_all(&self.pool)
        .await?;
        let live: BTreeSet<String> = live.into_iter().collect();
        let mut found = self.found().await?;
        if found.len() < usize::from(PARTITIONS) {
            self.create().await?;
            found = self.found().await?;
        }
        let highest = found.iter().map(|row| row.position).max().unwrap_or(0);
        let decision = decide(&self.member, &live, &found, owned);
        for partition in decision.lost.iter().chain(&decision.release) {
            owned.remove(partition);
            released.insert(*partition, Instant::now());
        }
        let mut taken = Vec::new();
        if !decision.take.is_empty() {
            taken = self.take(&decision.take).await?;
            released.retain(|partition, _| !taken.iter().any(|(taken, _)| taken == partition));
            owned.extend(taken.iter().copied());
        }
        if decision != Decision::default() {
            tracing::info!(
                partitions.owned = owned.len(),
                taken = taken.len(),
                released = decision.release.len(),
                lost = decision.lost.len(),
                members = live.len(),
                "partitions"
            );
            self.announce(owned, Some(highest));
        }
        self.release_overdue(&found, owned, released).await
    }

    fn announce(&self, owned: &BTreeMap<u16, Owned>, highest: Option<u64>) {
        self.assignment.send_if_modified(|assignment| {
            assignment.highest = highest.unwrap_or(assignment.highest);
            let changed = assignment.owned != *owned;
            assignment.owned.clone_from(owned);
            changed
        });
    }

    async fn found(&self) -> Result<Vec<PartitionRow>, sqlx::Error> {
        let rows =
            sqlx::query("SELECT partition, epoch, position, owner FROM millstream.partitions WHERE stream_epoch = $1")
                .bind(&self.incarnation)
                .fetch_all(&self.pool)
                .await?;
        rows.iter()
            .map(|row| {
                Ok(PartitionRow {
                    partition: row.try_get::<i16, _>("partition")? as u16,
                    term: row.try_get("epoch")?,
                    position: row.try_get::<i64, _>("position")? as u64,
                    owner: row.try_get("owner")?,
                })
            })
            .collect()
    }

    async fn create(&self) -> Result<(), sqlx::Error> {
        sqlx::query(
            "INSERT INTO millstream.partitions (stream_epoch, partition) \
             SELECT $1, generate_series(0, $2 - 1) ON CONFLICT DO NOTHING",
        )
        .bind(&self.incarnation)
        .bind(i32::from(PARTITIONS))
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Takes what is still free. Rows that a transaction holds are left for the next look.
    async fn take(&self, partitions: &[u16]) -> Result<Vec<(u16, Owned)>, sqlx::Error> {
        let rows = sqlx::query(
            "WITH free AS ( \
                 SELECT p.partition FROM millstream.partitions p \
                 WHERE p.stream_epoch = $1 AND p.partition = ANY ($2) \
                   AND (p.owner IS NULL OR p.owner = $3 OR NOT EXISTS ( \
                       SELECT FROM millstream.members m WHERE m.member = p.owner \
                       AND m.heartbeat > clock_timestamp() - make_interval(secs => $4))) \
                 ORDER BY p.partition FOR UPDATE OF p SKIP LOCKED) \
             UPDATE millstream.partitions p SET epoch = p.epoch + 1, owner = $3, heartbeat = clock_timestamp() \
             FROM free WHERE p.stream_epoch = $1 AND p.partition = free.partition \
             RETURNING p.partition, p.epoch, p.position",
        )
        .bind(&self.incarnation)
        .bind(partitions.iter().map(|partition| *partition as i16).collect::<Vec<_>>())
        .bind(&self.member)
        .bind(f64::from(DEAD_AFTER_SECONDS))
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                let partition: i16 = row.try_get("partition")?;
                let position: i64 = row.try_get("position")?;
                Ok((partition as u16, Owned { term: row.try_get("epoch")?, position: position as u64 }))
            })
            .collect()
    }

    /// What was given up but still stands in our name: the worker could not reach Postgres, say.
    async fn release_overdue(
        &self,
        found: &[PartitionRow],
        owned: &BTreeMap<u16, Owned>,
        released: &mut HashMap<u16, Instant>,
    ) -> Result<(), sqlx::Error> {
        released.retain(|partition, _| {
            found.iter().any(|row| row.partition == *partition && row.owner.as_ref() == Some(&self.member))
                && !owned.contains_key(partition)
        });
        let overdue: Vec<i16> = released
            .iter()
            .filter(|(_, since)| since.elapsed() > RELEASE_PATIENCE)
            .map(|(partition, _)| *partition as i16)
            .collect();
        if overdue.is_empty() {
            return Ok(());
        }
        sqlx::query(
            "UPDATE millstream.partitions SET owner = NULL WHERE stream_epoch = $1 AND partition = ANY ($2) AND owner = $3",
        )
        .bind(&self.incarnation)
        .bind(overdue)
        .bind(&self.member)
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

/// Gives up whatever stands in this member's name, so that others need not wait for its heartbeat to grow old.
pub(crate) async fn leave(pool: &PgPool, member: &str) -> Result<(), sqlx::Error> {
    sqlx::query("UPDATE millstream.partitions SET owner = NULL WHERE owner = $1").bind(member).execute(pool).await?;
    sqlx::query(
        "DELETE FROM millstream.members WHERE member = $1 OR heartbeat < clock_timestamp() - interval '1 hour'",
    )
    .bind(member)
    .execute(pool)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn partitions_are_spread_and_few_move() {
        let before = members(&["a", "b", "c"]);
        let after = members(&["a", "b", "c", "d"]);
        let mut moved = 0;
        let mut each: HashMap<&String, u32> = HashMap::new();
        for partition in 0..PARTITIONS {
            let old = winner(&before, partition).unwrap();
            let new = winner(&after, partition).unwrap();
            *each.entry(new).or_default() += 1;
            if old != new {
                assert_eq!(new, "d", "a partition moved between members that stayed");
                moved += 1;
            }
        }
        assert!((6..=28).contains(&moved), "{moved}");
        assert!(each.len() == 4 && each.values().all(|count| *count >= 6), "{each:?}");
        assert_eq!(winner(&members(&[]), 1), None);
    }

    fn found(owner: Option<&str>, term: i64) -> Vec<PartitionRow> {
        vec![PartitionRow { partition: 3, term, position: 0, owner: owner.map(str::to_owned) }]
    }

    #[test]
    fn takes_only_what_is_free() {
        let mine = BTreeMap::from([(3, Owned { term: 7, position: 0 })]);
        let (alone, both) = (members(&["a"]), members(&["a", "b"]));
        let (me, other) = match winner(&both, 3).unwrap().as_str() {
            "a" => ("a", "b"),
            _ => ("b", "a"),
        };
        let check = |me: &str, live: &BTreeSet<String>, rows: Vec<PartitionRow>, owned: &BTreeMap<u16, Owned>| {
            decide(me, live, &rows, owned)
        };
        let none = BTreeMap::new();
        let take = Decision { take: vec![3], ..Decision::default() };
        assert_eq!(check(me, &both, found(None, 7), &none), take);
        assert_eq!(check(me, &both, found(Some("dead"), 7), &none), take);
        assert_eq!(check(me, &both, found(Some(me), 7), &none), take);
        assert_eq!(check(me, &both, found(Some(other), 7), &none), Decision::default());
        assert_eq!(check(other, &both, found(None, 7), &none), Decision::default());
        assert_eq!(check(me, &both, found(Some(me), 7), &mine), Decision::default());
        assert_eq!(
            check(other, &both, found(Some(other), 7), &mine),
            Decision { release: vec![3], ..Decision::default() }
        );
        assert_eq!(check("a", &alone, found(Some("b"), 8), &mine), Decision { lost: vec![3], ..Decision::default() });
    }
}
