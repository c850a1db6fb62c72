//! The floor: the same batches by plain SQL, as fast as one connection does it. One transaction a batch, in it a prepared
//! statement for each (operation, set of columns), for all its rows at once.

use std::collections::BTreeMap;

use millstream_schemas::{Change, Operation};
use serde::Serialize;
use serde_json::{Map, Value};
use sqlx::postgres::{PgArguments, PgConnection};
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Postgres};

use crate::error::Error;

/// How rows reach a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// As one JSON text, by `jsonb_to_recordset`.
    Recordset,
    /// As an array a column, by `unnest`.
    Unnest,
    /// As arrays, and all statements as one (`WITH … INSERT, … UPDATE, …`): a single round trip, without BEGIN and COMMIT.
    OneStatement,
}

impl Way {
    pub const ALL: [Way; 3] = [Way::Recordset, Way::Unnest, Way::OneStatement];
}

/// Changes of one shape.
struct ShapeGroup<'a> {
    op: Operation,
    columns: &'a [String],
    rows: Vec<&'a Change>,
}

/// Applies a batch.
pub async fn apply(connection: &mut PgConnection, way: Way, changes: &[Change]) -> Result<(), Error> {
    let mut groups: BTreeMap<(&str, &[String]), ShapeGroup<'_>> = BTreeMap::new();
    for change in changes {
        groups
            .entry((change.op.as_str(), &change.columns))
            .or_insert_with(|| ShapeGroup { op: change.op, columns: &change.columns, rows: Vec::new() })
            .rows
            .push(change);
    }
    let groups: Vec<ShapeGroup<'_>> = groups.into_values().collect();
    let affected = match way {
        Way::OneStatement => together(connection, &groups).await,
        _ => one_by_one(connection, way, &groups).await,
    };
    match affected.map_err(Error::postgres("plain SQL"))? {
        affected if affected == changes.len() as u64 => Ok(()),
        affected => Err(Error::NotConverged(format!("plain SQL changed {affected} rows of {}", changes.len()))),
    }
}

async fn one_by_one(connection: &mut PgConnection, way: Way, groups: &[ShapeGroup<'_>]) -> Result<u64, sqlx::Error> {
    sqlx::raw_sql("BEGIN").execute(&mut *connection).await?;
    let mut affected = 0;
    for group in groups {
        let columns = group.input();
        let done = if way == Way::Unnest {
            let query = sqlx::query(AssertSqlSafe(group.sql(&unnest(&columns, 1))));
            bind(query, group, &columns)?.execute(&mut *connection).await?
        } else {
            let types: Vec<String> = columns.iter().map(|column| format!("{column} {}", type_of(column))).collect();
            let source = format!("jsonb_to_recordset($1::jsonb) AS n({})", types.join(", "));
            let rows: Vec<Map<String, Value>> = group
                .rows
                .iter()
                .map(|change| {
                    columns.iter().map(|column| ((*column).to_owned(), value(change, column).into())).collect()
                })
                .collect();
            let rows = serde_json::to_string(&rows).map_err(|error| sqlx::Error::Encode(Box::new(error)))?;
            sqlx::query(AssertSqlSafe(group.sql(&source))).bind(rows).execute(&mut *connection).await?
        };
        affected += done.rows_affected();
    }
    sqlx::raw_sql("COMMIT").execute(&mut *connection).await?;
    Ok(affected)
}

async fn together(connection: &mut PgConnection, groups: &[ShapeGroup<'_>]) -> Result<u64, sqlx::Error> {
    let (mut parts, mut counts, mut parameter) = (Vec::new(), Vec::new(), 1);
    for (number, group) in groups.iter().enumerate() {
        let columns = group.input();
        parts.push(format!("s{number} AS ({} RETURNING 1)", group.sql(&unnest(&columns, parameter))));
        counts.push(format!("(SELECT count(*) FROM s{number})"));
        parameter += columns.len();
    }
    let mut query = sqlx::query(AssertSqlSafe(format!("WITH {} SELECT {}", parts.join(", "), counts.join(" + "))));
    for group in groups {
        query = bind(query, group, &group.input())?;
    }
    let row = query.fetch_one(connection).await?;
    let affected: i64 = sqlx::Row::try_get(&row, 0)?;
    Ok(affected as u64)
}

impl ShapeGroup<'_> {
    /// The columns that a statement needs of each row.
    fn input(&self) -> Vec<&str> {
        let key = (self.op != Operation::Insert).then_some("id");
        key.into_iter().chain(self.columns.iter().map(String::as_str)).collect()
    }

    /// The statement, with rows from `source`.
    fn sql(&self, source: &str) -> String {
        let set = |form: fn(&str) -> String| self.columns.iter().map(|c| form(c)).collect::<Vec<_>>().join(", ");
        match self.op {
            Operation::Insert => {
                let columns = set(str::to_owned);
                format!("INSERT INTO plain.tasks ({columns}) SELECT {columns} FROM {source}")
            }
            Operation::Update => {
                let columns = set(|column| format!("{column} = n.{column}"));
                format!("UPDATE plain.tasks t SET {columns} FROM {source} WHERE t.id = n.id")
            }
            Operation::Delete => format!("DELETE FROM plain.tasks t USING {source} WHERE t.id = n.id"),
        }
    }
}

fn unnest(columns: &[&str], first: usize) -> String {
    let parameters: Vec<String> = columns
        .iter()
        .enumerate()
        .map(|(index, column)| format!("${}::{}[]", first + index, type_of(column)))
        .collect();
    format!("unnest({}) AS n({})", parameters.join(", "), columns.join(", "))
}

fn type_of(column: &str) -> &'static str {
    match column {
        "id" | "project_id" => "uuid",
        "done" => "boolean",
        "position" => "double precision",
        _ => "text",
    }
}

fn value<'a>(change: &'a Change, column: &str) -> Option<&'a str> {
    let place = change.columns.iter().position(|name| name == column);
    place.map_or(change.key.first(), |place| change.values.get(place))?.as_deref()
}

type Bound<'q> = Query<'q, Postgres, PgArguments>;

/// Binds an array a column.
fn bind<'q>(mut query: Bound<'q>, group: &ShapeGroup<'_>, columns: &[&str]) -> Result<Bound<'q>, sqlx::Error> {
    fn parsed<T: std::str::FromStr<Err: std::error::Error + Send + Sync + 'static>>(
        text: Option<&str>,
    ) -> Result<Option<T>, sqlx::Error> {
        text.map(str::parse).transpose().map_err(|error| sqlx::Error::Encode(Box::new(error)))
    }
    for column in columns {
        let texts = group.rows.iter().map(|change| value(change, column));
        query = match type_of(column) {
            "uuid" => query.bind(texts.map(parsed::<uuid::Uuid>).collect::<Result<Vec<_>, _>>()?),
            "boolean" => query.bind(texts.map(|text| text.map(|text| text == "t")).collect::<Vec<_>>()),
            "double precision" => query.bind(texts.map(parsed::<f64>).collect::<Result<Vec<_>, _>>()?),
            _ => query.bind(texts.map(|text| text.map(str::to_owned)).collect::<Vec<_>>()),
        };
    }
    Ok(query)
}
