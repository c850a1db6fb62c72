//! `millstream.changes_history`: the failed changes, and only those; also the memory that answers a resent failure.

use std::borrow::Cow;
use std::collections::HashSet;

use millstream_schemas::stream::{Failure, Submission, TransactionResult, Verdict};
use millstream_schemas::{Code, Value};
use serde::Serialize;
use serde_json::value::RawValue;
use sqlx::{PgConnection, Row};
use uuid::Uuid;

use crate::decide::validator::Rejection;

/// One row, as `jsonb_to_recordset` reads it.
#[derive(Debug, Serialize)]
pub(crate) struct Record {
    client_id: Uuid,
    user_id: String,
    seq: u64,
    attempt: i32,
    change_id: Uuid,
    table_name: Option<String>,
    key: Option<Vec<Value>>,
    operation: Option<&'static str>,
    payload: Box<RawValue>,
    code: Code,
    rule: Option<String>,
    message: String,
    trace_id: Option<String>,
}

impl Record {
    /// The record of a rejected transaction.
    ///
    /// # Errors
    /// The submission cannot be written as JSON; none is known.
    pub fn new(submission: &Submission, rejection: &Rejection) -> Result<Record, serde_json::Error> {
        let submission = storable(submission);
        let change = submission.changes.get(rejection.index);
        Ok(Record {
            client_id: submission.client_id,
            user_id: submission.user_id.clone(),
            seq: submission.client_seq,
            attempt: i32::try_from(submission.attempt).unwrap_or(i32::MAX),
            change_id: rejection.change_id,
            table_name: change.map(|change| change.table.clone()),
            key: change.map(|change| change.key.clone()),
            operation: change.map(|change| change.op.as_str()),
            payload: serde_json::value::to_raw_value(&submission)?,
            code: rejection.code,
            rule: rejection.rule.clone(),
            message: rejection.message.clone(),
            trace_id: submission.traceparent.as_deref().and_then(|text| text.split('-').nth(1)).map(str::to_owned),
        })
    }
}

/// `jsonb` cannot hold U+0000; in the record (not in the change, which is refused for it) it becomes U+FFFD.
fn storable(submission: &Submission) -> Cow<'_, Submission> {
    let nul = |text: &str| text.contains('\0');
    let any = nul(&submission.user_id)
        || submission.traceparent.as_deref().is_some_and(nul)
        || submission.changes.iter().any(|change| {
            nul(&change.table)
                || change.columns.iter().chain(&change.adds).any(|name| nul(name))
                || change.key.iter().chain(&change.values).flatten().any(|value| nul(value))
        });
    if !any {
        return Cow::Borrowed(submission);
    }
    let mut copy = submission.clone();
    let mend = |text: &mut String| *text = text.replace('\0', "\u{fffd}");
    mend(&mut copy.user_id);
    copy.traceparent.iter_mut().for_each(mend);
    for change in &mut copy.changes {
        mend(&mut change.table);
        change.columns.iter_mut().chain(&mut change.adds).for_each(mend);
        change.key.iter_mut().chain(&mut change.values).flatten().for_each(mend);
    }
    Cow::Owned(copy)
}

/// The verdicts of transactions that were taken before: rejected if the history says so, merged or superseded while the
/// ledger remembers that, otherwise applied.
pub(crate) async fn known(
    connection: &mut PgConnection,
    taken: &[(Uuid, u64)],
) -> Result<Vec<(Uuid, TransactionResult)>, sqlx::Error> {
    // Sequences of the ledger fit into a bigint, and these are not above it.
    let (clients, seqs): (Vec<Uuid>, Vec<i64>) =
        taken.iter().map(|(client, client_seq)| (*client, *client_seq as i64)).unzip();
    let rows = sqlx::query(
        "SELECT t.client_id, t.seq, h.change_id, h.code, h.rule, h.message, \
                (SELECT l->>'verdict' FROM millstream.clients c, jsonb_array_elements(c.lost) AS l \
                 WHERE c.client_id = t.client_id AND (l->>'client_seq')::bigint = t.seq LIMIT 1) AS lost \
         FROM unnest($1::uuid[], $2::bigint[]) WITH ORDINALITY AS t(client_id, seq, i) \
         LEFT JOIN millstream.changes_history h ON h.client_id = t.client_id AND h.seq = t.seq ORDER BY t.i",
    )
    .bind(clients)
    .bind(seqs)
    .fetch_all(connection)
    .await?;
    rows.iter()
        .map(|row| {
            let client_seq = row.try_get::<i64, _>("seq")? as u64;
            let failure = match row.try_get::<Option<String>, _>("code")? {
                Some(code) => Some(Failure {
                    client_seq,
                    change_id: row.try_get("change_id")?,
                    code: code.parse().unwrap_or(Code::Internal),
                    rule: row.try_get("rule")?,
                    message: row.try_get("message")?,
                }),
                None => None,
            };
            let verdict = match row.try_get::<Option<&str>, _>("lost")? {
                _ if failure.is_some() => Verdict::Rejected,
                Some("merged") => Verdict::Merged,
                Some("superseded") => Verdict::Superseded,
                _ => Verdict::Applied,
            };
            Ok((row.try_get("client_id")?, TransactionResult { client_seq, verdict, failure }))
        })
        .collect()
}

/// Which of these transactions were rejected.
pub(crate) async fn rejected(
    connection: &mut PgConnection,
    named: &[(Uuid, u64)],
) -> Result<HashSet<(Uuid, u64)>, sqlx::Error> {
    let (clients, seqs): (Vec<Uuid>, Vec<i64>) =
        named.iter().map(|(client, client_seq)| (*client, *client_seq as i64)).unzip();
    let rows = sqlx::query(
        "SELECT h.client_id, h.seq FROM unnest($1::uuid[], $2::bigint[]) AS n(client_id, seq) \
         JOIN millstream.changes_history h ON h.client_id = n.client_id AND h.seq = n.seq",
    )
    .bind(clients)
    .bind(seqs)
    .fetch_all(connection)
    .await?;
    rows.iter().map(|row| Ok((row.try_get("client_id")?, row.try_get::<i64, _>("seq")? as u64))).collect()
}

#[cfg(test)]
mod tests {
    use millstream_schemas::Change;

    use super::*;
    use crate::decide::validator::tests::change;

    #[test]
    fn records_can_be_stored_whatever_the_client_sent() {
        let submission = Submission {
            client_id: Uuid::nil(),
            user_id: "u".into(),
            run_id: Uuid::nil(),
            previous: None,
            after: Vec::new(),
            client_seq: 1,
            attempt: u32::MAX,
            changes: vec![Change {
                adds: vec!["\0".into()],
                ..change(millstream_schemas::Operation::Update, "a\0", &[("x\0", Some("\0\\u0000"))])
            }],
            traceparent: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".into()),
        };
        let rejection =
            Rejection { index: 0, change_id: Uuid::nil(), code: Code::InvalidValue, rule: None, message: "m".into() };
        let record = Record::new(&submission, &rejection).unwrap();
        assert_eq!(record.trace_id.as_deref(), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
        let text = serde_json::to_string(&record).unwrap();
        // The text that looks like an escape is the client's own and stays; the character is gone.
        assert!(!text.replace("\\\\u0000", "").contains("\\u0000"), "{text}");
        let empty = Submission { changes: vec![], ..submission };
        assert!(Record::new(&empty, &rejection).unwrap().table_name.is_none());
    }
}
