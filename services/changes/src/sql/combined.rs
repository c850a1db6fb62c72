//! Statements of several groups as one: a round trip instead of several.

use std::collections::HashMap;
use std::sync::Arc;

use millstream_schemas::Operation;

use crate::decide::validator::CheckedChange;
use crate::sql::fenced::FENCED;
use crate::sql::group::Group;
use crate::sql::writer::Writer;

/// Most texts kept.
const MAX_CACHED: usize = 1_000;
/// Most statements that are sent as one.
const MAX_TOGETHER: usize = 8;
/// A combination of statements is worth a plan of its own once it has come so often before.
const WORTH_A_PLAN: u32 = 1;
/// Parameters of a batch's statement before those of the groups.
const AT_ONCE_PARAMETERS: usize = 13;
/// How far the database's time may be from what is remembered of it, microseconds.
const MAX_OFF: i64 = 1_000_000;

/// The texts made so far for several groups, by their kind and shapes.
#[derive(Debug, Default)]
pub(crate) struct Combined(HashMap<(Kind, Vec<usize>), Combination>);

/// What a text for several groups holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    /// The groups alone.
    Together,
    /// All of a batch.
    AtOnce,
}

/// What there is for a combination of shapes.
#[derive(Debug, Default)]
struct Combination {
    /// How often it came.
    seen: u32,
    text: Option<Arc<str>>,
}

/// A statement within another one.
struct Cte {
    sql: String,
    /// It gives a row for each that it wrote, with `ms_i` and `winner`; others only as many.
    tells: bool,
}

/// The parts as `millstream_0`, `millstream_1` and so on.
fn ctes(parts: &[Cte]) -> String {
    parts
        .iter()
        .enumerate()
        .map(|(n, part)| format!("millstream_{n} AS ({})", part.sql))
        .collect::<Vec<_>>()
        .join(",\n")
}

impl Combined {
    /// One text for groups that do not depend on each other: a round trip instead of several. It gives, by the place of the
    /// group, what each statement gives; of inserts how many rows there are, as `ms_i`. None: they are to be sent one by one.
    /// `groups` each have rows, and are sorted if there is a text.
    pub fn together(&mut self, groups: &mut [Group<'_>]) -> Option<Arc<str>> {
        if groups.len() < 2 {
            return None;
        }
        let text = |parts: &[Cte]| {
            let results = parts.iter().enumerate().map(|(place, part)| {
                let (ms_i, winner) = if part.tells { ("ms_i", "winner") } else { ("count(*)", "NULL::text") };
                format!("SELECT {place} AS ms_place, {ms_i} AS ms_i, {winner} AS winner FROM millstream_{place}")
            });
            let results = results.collect::<Vec<_>>().join(" UNION ALL ");
            format!("/* millstream together */ WITH {}\n{results}", ctes(parts))
        };
        self.combined(Kind::Together, groups, 1, text)
    }

    /// One text for a whole batch: see [`crate::transaction::at_once`]. None: it is to go the long way. `groups` are as above, of any
    /// number.
    pub fn at_once(&mut self, groups: &mut [Group<'_>]) -> Option<Arc<str>> {
        let text = |parts: &[Cte]| {
            let whole = |part: &Cte| if part.tells { " FILTER (WHERE winner IS NULL)" } else { "" };
            let counts = parts.iter().enumerate();
            let counts = counts.map(|(n, part)| format!("(SELECT count(*){} FROM millstream_{n})", whole(part)));
            at_once(&ctes(parts), &counts.collect::<Vec<_>>())
        };
        self.combined(Kind::AtOnce, groups, AT_ONCE_PARAMETERS + 1, text)
    }

    /// A text for groups, made when their combination is worth it. `first`: number of the first parameter of theirs.
    fn combined(
        &mut self,
        kind: Kind,
        groups: &mut [Group<'_>],
        mut first: usize,
        text: impl Fn(&[Cte]) -> String,
    ) -> Option<Arc<str>> {
        if !(1..=MAX_TOGETHER).contains(&groups.len()) {
            return None;
        }
        if self.0.len() >= MAX_CACHED {
            self.0.clear();
        }
        groups.sort_by_key(|group| group.statement.shape.id);
        let shapes: Vec<usize> = groups.iter().map(|group| group.statement.shape.id).collect();
        let combined = self.0.entry((kind, shapes)).or_default();
        combined.seen = combined.seen.saturating_add(1);
        if combined.seen <= WORTH_A_PLAN {
            return None;
        }
        if combined.text.is_none() {
            let part = |group: &Group<'_>| {
                let CheckedChange { table, op, columns, adds, .. } = group.rows[0].step;
                let writer = Writer { table, op: *op, columns, adds, first, watched: false };
                first += writer.parameters();
                let tells = *op != Operation::Insert;
                Cte { sql: format!("{}{}", writer.write(), if tells { "" } else { " RETURNING 1" }), tells }
            };
            combined.text = Some(text(&groups.iter().map(part).collect::<Vec<_>>()).into());
        }
        combined.text.clone()
    }
}

/// Makes the statement from the groups' statements and what counts the rows that each wrote as a whole.
///
/// Postgres evaluates the branches of a CASE in their order, and with them what they count: no row is written before the
/// positions and the ledger stand.
fn at_once(parts: &str, counts: &[String]) -> String {
    let wrong = |(n, count): (usize, &String)| format!("{count} <> ($12::bigint[])[{}]", n + 3);
    let wrong = counts.iter().enumerate().map(wrong).collect::<Vec<_>>().join(" OR ");
    format!(
        "/* millstream at once */ WITH {FENCED},
millstream_known AS (
    UPDATE millstream.clients AS c SET last_seq = n.last_seq, last_seen = now()
    FROM unnest($6::uuid[], $7::text[], $8::bigint[], $9::bigint[]) AS n(client_id, user_id, stored, last_seq)
    WHERE c.client_id = n.client_id AND c.last_seq = n.stored AND c.user_id = n.user_id
    RETURNING 1),
{parts}
SELECT CASE
    WHEN abs(extract(epoch FROM clock_timestamp()) * 1000000 - $13) > {MAX_OFF} THEN millstream.take_back('time')
    WHEN (SELECT count(*) FROM millstream_fenced) <> ($12::bigint[])[1] THEN millstream.take_back('positions')
    WHEN (SELECT count(*) FROM millstream_known) <> ($12::bigint[])[2] THEN millstream.take_back('ledger')
    WHEN {wrong} THEN millstream.take_back('rows')
    ELSE pg_logical_emit_message(true, $10, $11) END::text AS lsn,
    (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now"
    )
}
