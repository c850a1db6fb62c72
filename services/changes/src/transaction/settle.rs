//! The first and the last statement of a batch's transaction: what stands, and what stands from then on.

use millstream_schemas::stream::{ORIGIN_PREFIX, OriginEntry, OriginRecord};
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use crate::decide::ledger::{Ledger, LedgerEntry};
use crate::decide::origin::origin;
use crate::decide::plan::{Action, Planned};
use crate::item::{Item, PositionMove};
use crate::sql::fenced::{bind_fences, fenced};
use crate::transaction::failed::Failed;
use crate::transaction::history::Record;

/// Newest losses that the ledger keeps a client.
pub(crate) const MAX_LOST: usize = 100;
/// Largest origin record of several transactions: it travels in a header, and the broker takes 64 KiB of those.
const MAX_ORIGIN_BYTES: usize = 40 * 1024;
/// Newest runs kept a client.
const MAX_RUNS: i64 = 1_000;

/// Moves the positions of all partitions and reads the ledger of all clients, in one round trip. The two read the same snapshot: had
/// another owner changed the ledger meanwhile, it would have moved the position or the term too, and the fence fails.
const FENCE: &str = concat!(
    "WITH ",
    fenced!(),
    "
SELECT (SELECT count(*) FROM millstream_fenced) AS fenced, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now,
       c.client_id, c.user_id, c.last_seq, c.instance
FROM (SELECT) AS one LEFT JOIN millstream.clients c ON c.client_id = ANY ($6::uuid[])"
);

/// Ledger, history and origin in one round trip, the last before COMMIT. The ledger is compared and set, so that even
/// an owner of another incarnation of the stream cannot take a transaction twice.
const SETTLE: &str = "\
WITH n AS (
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::uuid[], $5::bigint[], $6::text[])
        AS n(client_id, user_id, last_seq, instance, stored, lost)),
known AS (
    UPDATE millstream.clients AS c SET last_seq = n.last_seq, instance = n.instance, last_seen = now(),
        lost = CASE WHEN n.lost IS NULL THEN c.lost ELSE (
            SELECT jsonb_agg(l.loss ORDER BY l.i) FROM (
                SELECT loss, i FROM jsonb_array_elements(c.lost || n.lost::jsonb) WITH ORDINALITY AS l(loss, i)
                ORDER BY i DESC LIMIT $10) AS l) END
    FROM n WHERE c.client_id = n.client_id AND c.last_seq = n.stored AND c.user_id = n.user_id
    RETURNING 1),
fresh AS (
    INSERT INTO millstream.clients (client_id, user_id, last_seq, instance, lost)
    SELECT client_id, user_id, last_seq, instance, coalesce(lost::jsonb, '[]') FROM n WHERE stored IS NULL
    ON CONFLICT (client_id) DO NOTHING
    RETURNING 1),
failed AS (
    INSERT INTO millstream.changes_history
        (client_id, user_id, seq, attempt, change_id, table_name, key, operation, payload, code, rule, message, trace_id)
    SELECT client_id, user_id, seq, attempt, change_id, table_name, key, operation, payload, code, rule, message, trace_id
    FROM jsonb_to_recordset($7::jsonb) AS h(client_id uuid, user_id text, seq bigint, attempt int, change_id uuid,
        table_name text, key jsonb, operation text, payload jsonb, code text, rule text, message text, trace_id text)
    ON CONFLICT (client_id, seq) DO NOTHING)
SELECT (SELECT count(*) FROM known) + (SELECT count(*) FROM fresh) AS settled,
       pg_logical_emit_message(true, $8, $9)::text AS lsn";

/// Where runs of stores begin; rare, so in a round trip of its own.
const RUNS: &str = "\
WITH n AS (SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::uuid[]) AS n(client_id, first_seq, instance)),
old AS (
    DELETE FROM millstream.instances i USING (SELECT DISTINCT client_id FROM n) AS c
    WHERE i.client_id = c.client_id AND i.first_seq <= (
        SELECT o.first_seq FROM millstream.instances o WHERE o.client_id = c.client_id
        ORDER BY o.first_seq DESC OFFSET $4 - 1 LIMIT 1))
INSERT INTO millstream.instances (client_id, first_seq, instance) SELECT * FROM n
ON CONFLICT (client_id, first_seq) DO UPDATE SET instance = excluded.instance";

/// Moves the positions; gives the ledger of the batch's clients, and the database's time in microseconds since 1970.
pub(crate) async fn fence(
    connection: &mut PgConnection,
    incarnation: &str,
    items: &[Item],
    fences: &[PositionMove],
) -> Result<(Ledger, u64), Failed> {
    let mut clients: Vec<Uuid> = items.iter().filter_map(|item| Some(item.submission.as_ref()?.client_id)).collect();
    clients.sort_unstable();
    clients.dedup();
    let rows = bind_fences(sqlx::query(FENCE), incarnation, fences)
        .bind(clients)
        .fetch_all(connection)
        .await
        .map_err(Failed::Server)?;
    let (mut ledger, mut now) = (Ledger::default(), 0);
    for row in &rows {
        let fenced: i64 = row.try_get("fenced").map_err(Failed::Server)?;
        if fenced != fences.len() as i64 {
            return Err(Failed::Fenced);
        }
        now = row.try_get::<i64, _>("now").map_err(Failed::Server)? as u64;
        if let Some(client_id) = row.try_get::<Option<Uuid>, _>("client_id").map_err(Failed::Server)? {
            let last: i64 = row.try_get("last_seq").map_err(Failed::Server)?;
            let run_id = row.try_get("instance").map_err(Failed::Server)?;
            let user_id = row.try_get("user_id").map_err(Failed::Server)?;
            ledger.load(client_id, LedgerEntry::stored(user_id, last as u64, run_id));
        }
    }
    Ok((ledger, now))
}

/// Stores the ledger and the failures, and writes the origin.
pub(crate) async fn settle(
    connection: &mut PgConnection,
    plan: &[Planned<'_>],
    ledger: &Ledger,
    traceparent: Option<String>,
) -> Result<(), Failed> {
    let mut records = Vec::new();
    for planned in plan {
        let Action::Reject(rejection) = &planned.action else { continue };
        records.push(Record::new(planned.submission, rejection).map_err(unencodable)?);
    }
    let changed: Vec<_> = ledger.changed().collect();
    if changed.is_empty() {
        return Ok(());
    }
    if !ledger.spans().is_empty() {
        let spans = ledger.spans();
        sqlx::query(RUNS)
            .bind(spans.iter().map(|(id, _)| *id).collect::<Vec<_>>())
            .bind(spans.iter().map(|(_, span)| span.first_seq as i64).collect::<Vec<_>>())
            .bind(spans.iter().map(|(_, span)| span.run_id).collect::<Vec<_>>())
            .bind(MAX_RUNS)
            .execute(&mut *connection)
            .await
            .map_err(Failed::at_work)?;
    }
    let clients = origin(plan, ledger);
    let mut lost: Vec<Option<String>> = Vec::with_capacity(changed.len());
    for entry in &clients {
        lost.push(match entry.lost.as_slice() {
            [] => None,
            all => Some(encode(&all[all.len().saturating_sub(MAX_LOST)..])?),
        });
    }
    let origin = encoded_origin(clients, traceparent, plan.len())?;
    let row = sqlx::query(SETTLE)
        .bind(changed.iter().map(|(id, _)| *id).collect::<Vec<_>>())
        .bind(changed.iter().map(|(_, client)| client.user_id.clone()).collect::<Vec<_>>())
        .bind(changed.iter().map(|(_, client)| client.last as i64).collect::<Vec<_>>())
        .bind(changed.iter().map(|(_, client)| client.run_id).collect::<Vec<_>>())
        .bind(changed.iter().map(|(_, client)| client.stored.map(|stored| stored as i64)).collect::<Vec<_>>())
        .bind(lost)
        .bind(encode(&records)?)
        .bind(ORIGIN_PREFIX)
        .bind(origin)
        .bind(MAX_LOST as i64)
        .fetch_one(connection)
        .await
        .map_err(Failed::at_work)?;
    let settled: i64 = row.try_get("settled").map_err(Failed::Server)?;
    if settled == changed.len() as i64 { Ok(()) } else { Err(Failed::Ledger) }
}

/// The origin record of a batch of so many submissions. Both ways of committing a batch make it here, within its bound.
pub(crate) fn encoded_origin(
    clients: Vec<OriginEntry>,
    traceparent: Option<String>,
    submissions: usize,
) -> Result<String, Failed> {
    let encoded = encode(&OriginRecord { clients, traceparent })?;
    if encoded.len() > MAX_ORIGIN_BYTES && submissions > 1 {
        return Err(Failed::isolate_at(submissions / 2, "it has too much to tell its clients"));
    }
    Ok(encoded)
}

fn encode<T: serde::Serialize + ?Sized>(value: &T) -> Result<String, Failed> {
    serde_json::to_string(value).map_err(unencodable)
}

fn unencodable(error: serde_json::Error) -> Failed {
    Failed::Server(sqlx::Error::Encode(Box::new(error)))
}
