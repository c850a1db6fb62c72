//! A store that is damaged before it is opened, and under a client.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::StreamExt;
use millstream_client::{Client, Damage, Error, ImportOutcome, Saved, State, StoreError};

use crate::edge::Edge;
use crate::{PATIENCE, assert_equal, builder, directory, insert, ready, titles, until};

#[track_caller]
fn lost(error: Error) -> Arc<Damage> {
    assert_eq!(error.code(), "store_damaged", "{error}");
    match error {
        Error::Store(StoreError::Damaged(damage)) => damage,
        error => panic!("{error}"),
    }
}

fn saved(damage: &Damage) -> PathBuf {
    damage.aside.as_ref().unwrap().saved.clone().expect("nothing was saved")
}

async fn is_taken_again(client: &Client, edge: &Edge, file: &Path, expected: usize) {
    let imported = client.import(Saved::read(file).unwrap()).await.unwrap();
    let recorded = imported.iter().filter(|i| matches!(i.outcome, ImportOutcome::Recorded { .. })).count();
    assert_eq!(recorded, expected, "{imported:?}");
    client.settled(PATIENCE).await.unwrap();
    assert_equal(client, edge).await;
}

#[tokio::test]
async fn a_store_that_is_found_damaged_starts_again_and_takes_what_was_saved() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    for n in 0..5 {
        insert(&client, &format!("sent {n}"), "x").await.confirmed().await.unwrap();
    }
    client.pause();
    until(&client, State::Offline).await;
    for n in 0..5 {
        insert(&client, &format!("unsent {n}"), "x").await;
    }
    let old = client.client_id();
    client.close().await.unwrap();
    let path = directory.path().join("a");
    std::fs::File::options().write(true).open(&path).unwrap().write_all_at(&[0; 100], 0).unwrap();

    let damage = lost(builder(&directory, "a", &edge).open().await.err().unwrap());
    let text = damage.to_string();
    for part in ["a.damaged-", "a.unsent-", "5 transactions", "queue import", "Open the store again", "not a database"]
    {
        assert!(text.contains(part), "{text}");
    }
    let client = ready(builder(&directory, "a", &edge)).await;
    assert_ne!(client.client_id(), old);
    assert_eq!(titles(&client).await.len(), 5, "the rows came from the server");
    is_taken_again(&client, &edge, &saved(&damage), 5).await;
    is_taken_again(&client, &edge, &saved(&damage), 0).await;
    assert_eq!(edge.state().tasks.len(), 10);
}

#[tokio::test]
async fn damage_under_a_client_ends_it_and_everybody_hears_why() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    insert(&client, "0", "x").await.confirmed().await.unwrap();
    let follower = ready(builder(&directory, "a", &edge)).await;
    edge.kill().await;
    let mut writes = Vec::new();
    for n in 1..=20 {
        // Several pages of rows: a write makes the page whole that it writes.
        writes.push(insert(&client, &format!("{n:02}"), &"x".repeat(800)).await);
    }
    let mut watch = client.watch("SELECT count(*) FROM tasks", ());
    watch.next().await.unwrap().unwrap();
    // The rows' page, in the log and in the file; not the queue's.
    let path = directory.path().join("a");
    hurt_table(&path, "tasks");
    insert_or_lose(&client).await;
    let read = client.query("SELECT id, title FROM tasks WHERE title <> 'y'", ()).await;
    let damage = lost(read.err().unwrap());
    let again = [
        client.execute("DELETE FROM tasks", ()).await.err().unwrap(),
        client.failed().await.err().unwrap(),
        client.settled(PATIENCE).await.err().unwrap(),
        writes[19].confirmed().await.err().unwrap(),
        client.query("SELECT 1", ()).await.err().unwrap(),
    ];
    for error in again {
        assert_eq!(lost(error).to_string(), damage.to_string());
    }
    let ended = tokio::time::timeout(PATIENCE, async {
        while let Some(rows) = watch.next().await {
            if let Err(error) = rows {
                return error.code();
            }
        }
        "ended"
    });
    assert_eq!(ended.await.unwrap(), "store_damaged");
    let status = client.status().borrow().clone();
    assert_eq!((status.state, status.last_error.unwrap().code), (State::Damaged, "store_damaged".to_owned()));
    // The other process's client finds the file gone.
    let mut states = follower.status();
    let gone = states.wait_for(|status| status.state == State::Damaged);
    tokio::time::timeout(PATIENCE, gone).await.unwrap().unwrap();
    assert_eq!(follower.execute("DELETE FROM tasks", ()).await.err().unwrap().code(), "store_moved");
    client.close().await.unwrap();
    follower.close().await.unwrap();

    edge.revive().await;
    let client = ready(builder(&directory, "a", &edge)).await;
    let expected = Saved::read(saved(&damage)).unwrap().transactions.len();
    assert!((20..=21).contains(&expected), "{expected}");
    is_taken_again(&client, &edge, &saved(&damage), expected).await;
    assert_eq!(edge.state().tasks.len(), 1 + expected);
}

/// A write, so that readers read the file again; it may meet the damage itself.
async fn insert_or_lose(client: &Client) {
    if let Err(error) = client.execute("INSERT INTO tasks (id, title) VALUES ('last', 'x')", ()).await {
        lost(error);
    }
}

/// Makes noise of all versions of a table's pages, in the file and in the log.
fn hurt_table(path: &Path, table: &str) {
    const PAGE: usize = 4096;
    let connection = rusqlite::Connection::open(path).unwrap();
    let mut statement = connection.prepare("SELECT pageno FROM dbstat WHERE name = ?1").unwrap();
    let pages: Vec<u32> = statement.query_map([table], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    let log_path = PathBuf::from(format!("{}-wal", path.display()));
    let log = std::fs::read(&log_path).unwrap();
    let file = std::fs::File::options().write(true).open(&log_path).unwrap();
    for (n, frame) in log[32..].chunks_exact(PAGE + 24).enumerate() {
        if pages.contains(&u32::from_be_bytes(frame[..4].try_into().unwrap())) {
            file.write_all_at(&[0xa5; PAGE], (32 + n * (PAGE + 24) + 24) as u64).unwrap();
        }
    }
    let file = std::fs::File::options().write(true).open(path).unwrap();
    for page in pages {
        if page > 1 {
            file.write_all_at(&[0xa5; PAGE], u64::from(page - 1) * PAGE as u64).unwrap();
        }
    }
}

/// What shows only in rows that nobody reads is found in the background, where the process before ended without closing the store.
#[tokio::test]
async fn a_store_that_was_not_closed_is_looked_through() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    let rows: Vec<String> = (0..200).map(|n| format!("('{n:03}', '{}')", "x".repeat(300))).collect();
    client.execute(&format!("INSERT INTO tasks (id, title) VALUES {}", rows.join(", ")), ()).await.unwrap();
    client.settled(PATIENCE).await.unwrap();
    client.pause();
    until(&client, State::Offline).await;
    insert(&client, "unsent", "x").await;
    client.close().await.unwrap();
    let path = directory.path().join("a");
    // As after a kill: a log is there.
    let connection = rusqlite::Connection::open(&path).unwrap();
    let mut statement =
        connection.prepare("SELECT pageno FROM dbstat WHERE name = 'tasks' AND pagetype = 'leaf'").unwrap();
    let pages: Vec<u32> = statement.query_map([], |row| row.get(0)).unwrap().collect::<Result<_, _>>().unwrap();
    drop(statement);
    connection.execute_batch("CREATE TABLE mine (a)").unwrap();
    std::mem::forget(connection);
    damage_page(&path, pages[pages.len() / 2]);
    let client = builder(&directory, "a", &edge).paused().open().await.unwrap();
    let mut status = client.status();
    let found = status.wait_for(|status| status.state == State::Damaged);
    let message = tokio::time::timeout(PATIENCE, found).await.unwrap().unwrap().reason.clone().unwrap();
    assert!(message.contains("1 transactions"), "{message}");
    let damage = lost(client.ready().await.err().unwrap());
    client.close().await.unwrap();
    let client = ready(builder(&directory, "a", &edge)).await;
    is_taken_again(&client, &edge, &saved(&damage), 1).await;
}

fn damage_page(path: &Path, page: u32) {
    let file = std::fs::File::options().write(true).open(path).unwrap();
    file.write_all_at(&[0xa5; 4096], u64::from(page - 1) * 4096).unwrap();
}
