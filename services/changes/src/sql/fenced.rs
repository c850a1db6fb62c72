//! The part of a batch's first statement that moves the positions of its partitions.

use sqlx::Postgres;
use sqlx::postgres::PgArguments;
use sqlx::query::Query;

use crate::item::PositionMove;

macro_rules! fenced {
    () => {
        "millstream_fenced AS (
    UPDATE millstream.partitions AS p SET position = f.new
    FROM unnest($2::smallint[], $3::bigint[], $4::bigint[], $5::bigint[]) AS f(partition, epoch, old, new)
    WHERE p.stream_epoch = $1 AND p.partition = f.partition AND p.epoch = f.epoch AND p.position = f.old
    RETURNING p.partition)"
    };
}
/// Moves the positions of those partitions that are where their owner believes. Its parameters: [`bind_fences`].
pub(crate) const FENCED: &str = fenced!();
pub(crate) use fenced;

/// The parameters `$1` to `$5` of [`FENCED`].
pub(crate) fn bind_fences<'q>(
    query: Query<'q, Postgres, PgArguments>,
    incarnation: &'q str,
    fences: &[PositionMove],
) -> Query<'q, Postgres, PgArguments> {
    let column = |value: fn(&PositionMove) -> i64| fences.iter().map(value).collect::<Vec<i64>>();
    query
        .bind(incarnation)
        .bind(fences.iter().map(|fence| fence.partition as i16).collect::<Vec<i16>>())
        .bind(column(|fence| fence.term))
        .bind(column(|fence| fence.old as i64))
        .bind(column(|fence| fence.new as i64))
}
