//! Transactions that cannot be applied now.

use millstream_client::{Rows, SqlValue};
use millstream_provision::exit::Exit;
use sqlx::{PgConnection, Row as _};
use uuid::Uuid;

use super::error::Error;
use crate::output::{self, Output, print};

/// Of which an executor has spoken lately: the pauses between tries are short, but a try may wait for a lock.
const LIST: &str = "\
SELECT to_char(p.since AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), p.user_id, p.client_id::text, p.seq, p.table_name, p.tries, p.reason
FROM millstream.parked p WHERE p.seen_at > now() - interval '1 minute' ORDER BY p.since, p.client_id, p.seq";

pub(super) async fn list(connection: &mut PgConnection, output: Output) -> Result<Exit, Error> {
    const COLUMNS: [&str; 7] = ["since", "user_id", "client_id", "client_seq", "table_name", "tries", "reason"];
    let found = sqlx::query(LIST).fetch_all(connection).await.map_err(Error::Query)?;
    let mut rows = Vec::with_capacity(found.len());
    for row in &found {
        let text = |index: usize| -> Result<SqlValue, Error> {
            let text: Option<String> = row.try_get(index).map_err(Error::Query)?;
            Ok(text.map_or(SqlValue::Null, SqlValue::Text))
        };
        let (client_seq, tries): (i64, i32) =
            (row.try_get(3).map_err(Error::Query)?, row.try_get(5).map_err(Error::Query)?);
        let (client_seq, tries) = (SqlValue::Integer(client_seq), SqlValue::Integer(tries.into()));
        rows.push(vec![text(0)?, text(1)?, text(2)?, client_seq, text(4)?, tries, text(6)?]);
    }
    output::rows(&Rows { columns: COLUMNS.map(str::to_owned).to_vec(), rows }, output);
    Ok(Exit::Ok)
}

pub(super) async fn reject(
    connection: &mut PgConnection,
    client_id: Uuid,
    client_seq: i64,
    message: &str,
) -> Result<Exit, Error> {
    let sql = "UPDATE millstream.parked SET rejection = $3 WHERE client_id = $1 AND seq = $2 \
               AND seen_at > now() - interval '1 minute'";
    let done = sqlx::query(sql).bind(client_id).bind(client_seq).bind(message).execute(connection).await;
    if done.map_err(Error::Query)?.rows_affected() == 0 {
        return Err(Error::NotParked { client_id, client_seq });
    }
    print(&format!("transaction {client_seq} of client {client_id} is rejected at its next try, within seconds"));
    Ok(Exit::Ok)
}
