//! What an app adds does not end its sync; what ends it all the same is told with its cause.

use std::time::Duration;

use millstream_client::{Client, Error, SetAsideKind, State, StoreError};
use millstream_schemas::ColumnSchema;

use super::edge::{Edge, schema};
use super::{PATIENCE, builder, directory, insert, ready, titles, until};

/// The server has another schema from now on.
async fn reconnect(edge: &Edge, client: &Client, version: &str, drop: &str, add: &str) {
    let mut schema = schema();
    schema.version = version.into();
    let table = &mut schema.tables[0];
    let place = table.column(drop).unwrap();
    let column = ColumnSchema { name: add.into(), r#type: "text".into(), ..table.columns[place].clone() };
    table.columns[place] = column;
    edge.state().schema = Some(schema);
    client.drop_connection();
    client.connect_now();
    let mut status = client.status();
    let installed =
        status.wait_for(|status| status.schema.as_deref() == Some(version) && status.state == State::Connected);
    tokio::time::timeout(PATIENCE, installed).await.unwrap().unwrap();
}

#[tokio::test]
async fn what_does_not_fit_a_new_schema_is_in_the_status_while_sync_goes_on() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    let index = "CREATE INDEX by_done ON tasks (done)";
    for sql in
        [index, "CREATE INDEX by_title ON tasks (title)", "CREATE VIEW open AS SELECT title FROM tasks WHERE NOT done"]
    {
        client.execute(sql, ()).await.unwrap();
    }
    assert!(client.status().borrow().set_aside.is_empty());
    reconnect(&edge, &client, "v2", "done", "finished").await;
    let aside = client.status().borrow().set_aside.clone();
    let found: Vec<_> = aside.iter().map(|aside| (aside.kind, aside.name.as_str())).collect();
    assert_eq!(found, [(SetAsideKind::Index, "by_done"), (SetAsideKind::View, "open")]);
    assert_eq!((aside[0].sql.as_deref(), aside[0].table.as_deref()), (Some(index), Some("tasks")));
    assert!(aside[0].reason.contains("done"), "{aside:?}");
    insert(&client, "1", "one").await.confirmed().await.unwrap();
    assert_eq!(titles(&client).await.len(), 1);
    // The app makes up its mind.
    client.execute("DROP INDEX by_done", ()).await.unwrap();
    client.execute("CREATE VIEW open AS SELECT title FROM tasks WHERE finished IS NULL", ()).await.unwrap();
    assert!(client.status().borrow().set_aside.is_empty());
    let error = client.execute("CREATE UNIQUE INDEX u ON tasks (title)", ()).await.err().unwrap();
    assert_eq!(error.code(), "not_allowed");
    assert!(matches!(error, Error::Store(StoreError::NotAllowed(_))));
}

#[tokio::test]
async fn a_schema_that_sqlite_cannot_have_is_an_error_with_what_to_do() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    let mut twice = schema();
    twice.version = "v2".into();
    let column = ColumnSchema { name: "TITLE".into(), ..twice.tables[0].columns[1].clone() };
    twice.tables[0].columns.push(column);
    edge.state().schema = Some(twice);
    client.drop_connection();
    until(&client, State::Error).await;
    let status = client.status().borrow().clone();
    let error = status.last_error.unwrap();
    assert_eq!(error.code, "schema");
    assert!(error.message.contains("\"title\" and \"TITLE\"") && error.message.contains("rename"), "{error:?}");
    // The app's writes are recorded meanwhile, and go when the server is mended.
    let write = insert(&client, "1", "one").await;
    edge.state().schema = None;
    client.connect_now();
    tokio::time::timeout(PATIENCE, write.confirmed()).await.unwrap().unwrap();
}

#[tokio::test]
async fn rows_that_never_apply_are_an_error_with_its_cause_and_cost_few_snapshots() {
    let (edge, directory) = (Edge::start().await, directory());
    // A row with too few values.
    edge.state().tasks.insert("bad".into(), vec![Some("bad".into())]);
    let client = builder(&directory, "a", &edge).open().await.unwrap();
    until(&client, State::Error).await;
    let status = client.status().borrow().clone();
    let error = status.last_error.unwrap();
    assert_eq!(error.code, "store");
    for part in ["a row of \"tasks\" that does not fit the schema", "Nothing is lost", "Client::connect_now"] {
        assert!(error.message.contains(part), "{error:?}");
    }
    assert!(status.retry_at.is_some());
    // Half a second, a second, two.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!((3..=4).contains(&edge.state().connections), "{}: the waits grow", edge.state().connections);
    let write = insert(&client, "1", "one").await;
    edge.state().tasks.remove("bad");
    client.connect_now();
    tokio::time::timeout(PATIENCE, write.confirmed()).await.unwrap().unwrap();
}
