//! The SDK against an edge in miniature, over real sockets and real files.

#![expect(clippy::unwrap_used, reason = "tests panic on what must not happen")]

mod auth;
mod damage;
mod edge;
mod territory;
mod watches;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use edge::{Edge, TOKEN, schema};
use futures_util::StreamExt;
use millstream_client::testing::{Faults, Worker};
use millstream_client::{Builder, Client, Code, Edit, EntryState, Error, Outcome, Role, State, Status, params};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

fn directory() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn builder(directory: &TempDir, name: &str, edge: &Edge) -> Builder {
    Client::builder(directory.path().join(name)).edge(&edge.url).token(TOKEN)
}

async fn ready(builder: Builder) -> Client {
    let client = builder.open().await.unwrap();
    tokio::time::timeout(PATIENCE, client.ready()).await.unwrap().unwrap();
    client
}

async fn insert(client: &Client, id: &str, title: &str) -> millstream_client::Write<usize> {
    client.execute("INSERT INTO tasks (id, title) VALUES (?, ?)", [id, title]).await.unwrap()
}

async fn until(client: &Client, state: State) {
    let mut status = client.status();
    tokio::time::timeout(PATIENCE, status.wait_for(|status| status.state == state)).await.unwrap().unwrap();
}

async fn titles(client: &Client) -> Vec<(String, Option<String>)> {
    client.query_as("SELECT id, title FROM tasks ORDER BY id", ()).await.unwrap()
}

/// The client's rows are the server's.
async fn assert_equal(client: &Client, edge: &Edge) {
    let server: Vec<_> = edge.state().tasks.values().map(|row| (row[0].clone().unwrap(), row[1].clone())).collect();
    assert_eq!(titles(client).await, server);
}

#[tokio::test]
async fn writes_arrive_in_order_and_are_confirmed() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    for n in 0..100 {
        let write = insert(&client, &format!("{n:03}"), "x").await;
        assert_eq!((*write.value(), write.tx()), (1, Some(n + 1)));
        if n % 10 == 0 {
            tokio::time::timeout(PATIENCE, write.confirmed()).await.unwrap().unwrap();
        }
    }
    client.settled(PATIENCE).await.unwrap();
    assert_eq!(edge.state().received, (1..=100).collect::<Vec<u64>>());
    assert_equal(&client, &edge).await;
    // The status is told after the writes are.
    let mut statuses = client.status();
    let settled = statuses.wait_for(|status| (status.pending.count, status.confirmed_seq) == (0, 100));
    let status = tokio::time::timeout(PATIENCE, settled).await.unwrap().unwrap().clone();
    assert_eq!(status.failed, 0);
    assert_eq!((status.state, status.role, status.user_id.as_deref()), (State::Connected, Role::Leader, Some("ann")));
    assert!(status.position.is_some_and(|position| position.stream_seq == 100), "{status:?}");
    let queue = client.queue(1_000).await.unwrap();
    assert!(queue.len() == 100 && queue.iter().all(|entry| entry.state == EntryState::Confirmed));
    // The server filled a column that the client may not set.
    let filled = client.query_as::<String>("SELECT DISTINCT created_at FROM tasks", ()).await.unwrap();
    assert_eq!(filled, ["2026-01-01 00:00:00+00"]);
    client.close().await.unwrap();
}

#[tokio::test]
async fn after_a_cut_what_was_not_taken_is_sent_again() {
    let (edge, directory) = (Edge::start().await, directory());
    edge.state().cut_after = Some(7);
    let client = ready(builder(&directory, "a", &edge)).await;
    let writes: Vec<_> = futures_util::stream::iter(0..200)
        .map(|n| {
            let client = client.clone();
            async move {
                client.execute("INSERT INTO tasks (id, title) VALUES (?, 'x')", [format!("{n:03}")]).await.unwrap()
            }
        })
        .buffered(8)
        .collect()
        .await;
    assert!(writes.iter().map(|write| write.tx().unwrap()).is_sorted());
    let kick = async {
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            client.connect_now();
        }
    };
    tokio::select! {
        settled = client.settled(Duration::from_secs(60)) => settled.unwrap(),
        () = kick => {}
    }
    assert!(edge.state().connections > 10);
    assert_eq!(edge.state().ledger[&client.client_id()], 200);
    assert_eq!(edge.state().log.len(), 200, "each took effect once");
    assert_equal(&client, &edge).await;
}

/// What was sent before the cut takes effect after the welcome, and is confirmed before it is sent again, since the bus
/// loses messages.
#[tokio::test]
async fn what_is_confirmed_before_it_is_sent_again_leaves_no_gap() {
    let (edge, directory) = (Edge::start().await, directory());
    edge.state().late_ledger = true;
    let faults = Faults { drop: 0.4, duplicate: 0.0, seed: 3 };
    let client = ready(builder(&directory, "a", &edge).bus_faults(faults)).await;
    for n in 0..4 {
        let sessions = client.status().borrow().reconnects;
        edge.state().cut_after = Some(0);
        let cut = insert(&client, &format!("{n:02} cut"), "x").await;
        let taken = |edge: &Edge| edge.state().ledger.get(&client.client_id()) == cut.tx().as_ref();
        while !taken(&edge) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        edge.state().cut_after = None;
        while client.status().borrow().reconnects == sessions {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        client.connect_now();
        let next = insert(&client, &format!("{n:02} next"), "x").await;
        tokio::time::timeout(Duration::from_secs(10), next.confirmed()).await.expect("stuck behind a gap").unwrap();
        cut.confirmed().await.unwrap();
    }
    assert_eq!(edge.state().log.len(), 8, "each took effect once");
}

#[tokio::test]
async fn every_frame_twice_changes_nothing() {
    let (edge, directory) = (Edge::start().await, directory());
    edge.state().twice = true;
    let client = ready(builder(&directory, "a", &edge)).await;
    for n in 0..20 {
        insert(&client, &format!("{n:03}"), if n % 5 == 4 { "bad" } else { "x" }).await;
    }
    client.settled(PATIENCE).await.unwrap();
    assert_eq!(client.failed().await.unwrap().len(), 4);
    assert_equal(&client, &edge).await;
}

#[tokio::test]
async fn overload_waits_and_keeps_the_order() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    edge.state().overloaded = 5;
    for n in 0..20 {
        insert(&client, &format!("{n:03}"), "x").await;
    }
    client.settled(PATIENCE).await.unwrap();
    assert_eq!(edge.state().connections, 1, "the socket stayed");
    assert_equal(&client, &edge).await;
}

/// Nothing of what is refused is sent again before the time that the edge names, over a cut too; then all of it, in order.
#[tokio::test]
async fn an_overloaded_edge_is_left_alone_as_long_as_it_asks() {
    const WAIT: Duration = Duration::from_millis(1_200);
    for cut in [false, true] {
        let (edge, directory) = (Edge::start().await, directory());
        let client = builder(&directory, "a", &edge).schema(schema()).paused().open().await.unwrap();
        (edge.state().overloaded, edge.state().retry_after_ms) = (1, WAIT.as_millis() as u64);
        for n in 0..5 {
            insert(&client, &n.to_string(), "x").await;
        }
        client.resume();
        while edge.state().arrivals.len() < 5 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // The refusals have arrived.
        tokio::time::sleep(Duration::from_millis(200)).await;
        if cut {
            client.drop_connection();
        }
        insert(&client, "meanwhile", "x").await;
        client.settled(PATIENCE).await.unwrap();
        let arrivals = edge.state().arrivals.clone();
        let waited = arrivals[5].0 - arrivals[0].0;
        assert!(waited >= WAIT, "cut: {cut}: again after {waited:?}");
        assert!(waited < WAIT + Duration::from_secs(1), "cut: {cut}: again after {waited:?}");
        let again: Vec<u64> = arrivals[5..].iter().map(|(_, client_seq)| *client_seq).collect();
        assert_eq!(again, [1, 2, 3, 4, 5, 6], "cut: {cut}");
        assert_eq!(edge.state().connections, 1 + usize::from(cut));
    }
}

#[tokio::test]
async fn a_rejection_reaches_its_author_and_the_row_is_back() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    insert(&client, "1", "good").await.confirmed().await.unwrap();
    let write = client.execute("UPDATE tasks SET title = 'bad'", ()).await.unwrap();
    let error = write.confirmed().await.unwrap_err();
    assert!(
        matches!(&error, Error::Rejected { tx: 2, code: Code::PermissionDenied, message, .. } if message == "bad title")
    );
    assert_eq!((error.code(), error.is_retryable()), ("permission_denied", false));
    assert_eq!(titles(&client).await, [("1".into(), Some("good".into()))]);
    insert(&client, "2", "later").await.confirmed().await.unwrap();
    let failed = client.failed().await.unwrap();
    assert_eq!((failed.len(), failed[0].tx, client.status().borrow().failed), (1, 2, 1));
    let retried = client.retry(2).await.unwrap();
    assert_eq!((retried.tx(), retried.confirmed().await.unwrap_err().code()), (Some(2), "permission_denied"));
    client.discard(2).await.unwrap();
    assert_eq!((client.failed().await.unwrap().len(), client.status().borrow().failed), (0, 0));
    assert_equal(&client, &edge).await;
}

#[tokio::test]
async fn clients_see_each_other_and_watches_follow() {
    let (edge, directory) = (Edge::start().await, directory());
    let (a, b) = (ready(builder(&directory, "a", &edge)).await, ready(builder(&directory, "b", &edge)).await);
    let mut watch = b.watch_as::<(String, bool)>("SELECT id, done FROM tasks ORDER BY id", ());
    assert_eq!(watch.next().await.unwrap().unwrap(), []);
    insert(&a, "1", "x").await;
    assert_eq!(watch.next().await.unwrap().unwrap(), [("1".to_owned(), false)]);
    a.execute("UPDATE tasks SET done = ?", [true]).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap(), [("1".to_owned(), true)]);
    let write = a
        .tx(|tx| {
            tx.execute("INSERT INTO tasks (id, title) VALUES (?, ?)", ("2", tx.uuid()))?;
            let refused: Result<(), Error> = tx.savepoint(|tx| {
                tx.execute("DELETE FROM tasks", ())?;
                Err(Error::app("changed my mind"))
            });
            assert!(refused.is_err());
            Ok(tx.query_as::<i64>("SELECT count(*) FROM tasks", ())?[0])
        })
        .await
        .unwrap();
    assert_eq!(write.into_value(), 2);
    assert_eq!(watch.next().await.unwrap().unwrap().len(), 2);
    a.execute("DELETE FROM tasks WHERE id = ?", params!["1"]).await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap().len(), 1);
    b.close().await.unwrap();
    assert!(watch.next().await.is_none());
}

#[tokio::test]
async fn status_tells_when_the_first_load_of_a_connection_is_complete() {
    let (edge, directory) = (Edge::start().await, directory());
    let (a, b) = (ready(builder(&directory, "a", &edge)).await, ready(builder(&directory, "b", &edge)).await);
    let mut status = b.status();
    for round in 0..20 {
        tokio::time::timeout(PATIENCE, status.wait_for(|status| status.caught_up)).await.unwrap().unwrap();
        // At once: nothing that was there before is still on the way into the store.
        assert_equal(&b, &edge).await;
        b.pause();
        until(&b, State::Offline).await;
        assert!(!status.borrow_and_update().caught_up);
        for n in 0..20 {
            insert(&a, &format!("{round:02}-{n:02}"), "x").await;
        }
        a.settled(PATIENCE).await.unwrap();
        b.resume();
    }
}

#[tokio::test]
async fn what_was_recorded_offline_survives_and_is_sent_later() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = builder(&directory, "a", &edge).schema(schema()).paused().open().await.unwrap();
    for n in 0..50 {
        insert(&client, &format!("{n:02}"), "offline").await;
    }
    assert_eq!(titles(&client).await.len(), 50);
    assert_eq!((client.status().borrow().pending.count, edge.state().connections), (50, 0));
    client.close().await.unwrap();

    let client = ready(builder(&directory, "a", &edge)).await;
    insert(&client, "99", "last").await;
    client.settled(PATIENCE).await.unwrap();
    assert_eq!(edge.state().received, (1..=51).collect::<Vec<u64>>(), "new changes go to the end");
    assert_equal(&client, &edge).await;
}

#[tokio::test]
async fn an_edge_that_dies_is_found_again() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    insert(&client, "1", "x").await.confirmed().await.unwrap();
    edge.kill().await;
    until(&client, State::Offline).await;
    let write = insert(&client, "2", "meanwhile").await;
    edge.revive().await;
    client.connect_now();
    tokio::time::timeout(PATIENCE, write.confirmed()).await.unwrap().unwrap();
    assert_equal(&client, &edge).await;
    assert!(client.status().borrow().reconnects >= 1);
}

#[tokio::test]
async fn a_restored_server_and_a_new_epoch_lose_nothing() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    for n in 0..10 {
        insert(&client, &format!("{n:02}"), "x").await;
    }
    client.settled(PATIENCE).await.unwrap();
    {
        let mut state = edge.state();
        state.ledger.insert(client.client_id(), 6);
        for n in 6..10 {
            state.tasks.remove(&format!("{n:02}"));
        }
        state.epoch = millstream_client::Uuid::now_v7();
        state.log.clear();
    }
    client.drop_connection();
    let mut status = client.status();
    tokio::time::timeout(PATIENCE, status.wait_for(|s| s.reconnects == 1 && s.state == State::Connected))
        .await
        .unwrap()
        .unwrap();
    client.settled(PATIENCE).await.unwrap();
    assert_eq!(edge.state().tasks.len(), 10);
    assert_equal(&client, &edge).await;
}

#[tokio::test]
async fn connect_now_leaves_a_pause_alone_and_resume_ends_it() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = builder(&directory, "a", &edge).schema(schema()).paused().open().await.unwrap();
    let write = insert(&client, "1", "x").await;
    client.connect_now();
    assert!(tokio::time::timeout(Duration::from_millis(200), write.confirmed()).await.is_err());
    assert_eq!(edge.state().connections, 0);
    client.resume();
    tokio::time::timeout(PATIENCE, write.confirmed()).await.unwrap().unwrap();
    // Neither does anything to a connection.
    client.resume();
    client.connect_now();
    insert(&client, "2", "x").await.confirmed().await.unwrap();
    assert_eq!((edge.state().connections, client.status().borrow().reconnects), (1, 0));
}

#[tokio::test]
async fn too_far_behind_means_a_snapshot_with_the_queue_kept() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    insert(&client, "1", "x").await.confirmed().await.unwrap();
    client.pause();
    until(&client, State::Offline).await;
    insert(&client, "2", "mine").await;
    {
        let mut state = edge.state();
        state.too_far_behind = true;
        state.tasks.clear();
    }
    client.resume();
    client.settled(PATIENCE).await.unwrap();
    assert_eq!(edge.state().positions, [None, Some(1), None]);
    assert_eq!(titles(&client).await, [("2".into(), Some("mine".into()))]);
    assert_equal(&client, &edge).await;
}

#[tokio::test]
async fn a_refused_token_asks_for_another() {
    let (edge, directory) = (Edge::start().await, directory());
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let client = Client::builder(directory.path().join("a"))
        .edge(&edge.url)
        .token_fn(move || {
            let first = count.fetch_add(1, Ordering::Relaxed) == 0;
            async move { Ok(if first { "stale" } else { TOKEN }.to_owned()) }
        })
        .open()
        .await
        .unwrap();
    tokio::time::timeout(PATIENCE, client.ready()).await.unwrap().unwrap();
    assert_eq!(edge.state().tokens, ["stale", TOKEN]);
    assert_eq!(asked.load(Ordering::Relaxed), 2);
    assert_eq!(client.status().borrow().last_error, None);
}

#[tokio::test]
async fn of_two_processes_one_sends_and_the_other_takes_over() {
    let (edge, directory) = (Edge::start().await, directory());
    let first = ready(builder(&directory, "a", &edge)).await;
    let second = ready(builder(&directory, "a", &edge)).await;
    assert_eq!((first.status().borrow().role, second.status().borrow().role), (Role::Leader, Role::Follower));
    let mut watch = second.watch_as::<String>("SELECT id FROM tasks ORDER BY id", ());
    assert_eq!(watch.next().await.unwrap().unwrap().len(), 0);
    insert(&first, "1", "x").await.confirmed().await.unwrap();
    assert_eq!(watch.next().await.unwrap().unwrap(), ["1"]);
    let write = insert(&second, "2", "y").await;
    assert_eq!(write.tx(), Some(2));
    tokio::time::timeout(PATIENCE, write.confirmed()).await.unwrap().unwrap();
    assert_eq!(edge.state().connections, 1, "one socket");
    let rejected = insert(&second, "3", "bad").await;
    assert_eq!(rejected.confirmed().await.unwrap_err().code(), "permission_denied");
    let started = Instant::now();
    first.close().await.unwrap();
    let write = insert(&second, "4", "z").await;
    tokio::time::timeout(PATIENCE, write.confirmed()).await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(5), "took over after {:?}", started.elapsed());
    assert_equal(&second, &edge).await;
}

#[tokio::test]
async fn refusals_and_traces() {
    let (edge, directory) = (Edge::start().await, directory());
    let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let applied = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&applied);
    let builder =
        builder(&directory, "a", &edge).traceparent_fn(move || Some(parent.to_owned())).apply_span_fn(move |found| {
            assert_eq!(found, Some(parent));
            count.fetch_add(1, Ordering::Relaxed);
            tracing::Span::none()
        });
    let client = ready(builder).await;
    insert(&client, "1", "x").await.confirmed().await.unwrap();
    assert_eq!(edge.state().traceparents, [Some(parent.to_owned())]);
    assert_eq!(applied.load(Ordering::Relaxed), 1);

    let error = client.execute("UPDATE tasks SET created_at = 'x'", ()).await.err().unwrap();
    assert_eq!((error.code(), error.is_retryable()), ("not_writable", false));
    assert_eq!(client.execute("SELEC", ()).await.err().unwrap().code(), "statement");
    assert_eq!(client.query("SELECT * FROM nope", ()).await.err().unwrap().code(), "statement");
    let big = "x".repeat(600_000);
    assert_eq!(client.execute("UPDATE tasks SET title = ?", [big]).await.err().unwrap().code(), "too_large");
    assert_eq!(titles(&client).await, [("1".into(), Some("x".into()))]);
    assert_eq!(client.execute("UPDATE tasks SET title = title", ()).await.unwrap().tx(), None);
    let clone = client.clone();
    client.close().await.unwrap();
    assert_eq!(clone.execute("DELETE FROM tasks", ()).await.err().unwrap().code(), "closed");
    assert_eq!(clone.status().borrow().state, State::Closed);
}

#[tokio::test]
async fn without_an_edge_the_client_records() {
    let directory = directory();
    let client = Client::builder(directory.path().join("a")).schema(schema()).open().await.unwrap();
    insert(&client, "1", "x").await;
    assert!(matches!(client.settled(Duration::from_millis(50)).await, Err(Error::Timeout)));
}

/// Items 3, 4, 17: messages between the workers are lost and repeated; every change takes effect once, in order.
/// A token of the right form, with nothing that an edge would look at.
fn token(user: &str) -> String {
    let part = |text: &str| data_encoding::BASE64URL_NOPAD.encode(text.as_bytes());
    format!("{}.{}.x", part(r#"{"alg":"none"}"#), part(&format!(r#"{{"sub":"{user}"}}"#)))
}

/// Changes that the first user recorded before any upload stay theirs, also when another user signs in next.
#[tokio::test]
async fn a_store_belongs_to_the_first_user_of_whom_it_was_told() {
    let directory = directory();
    let edge = Edge::start().await;
    let open = |user: &str| Client::builder(directory.path().join("one.db")).schema(schema()).token(token(user)).open();
    // Nothing is in it yet: a token by mistake does no harm.
    drop(open("nobody").await.unwrap());
    let alice = open("alice").await.unwrap();
    insert(&alice, "a", "mine").await;
    alice.close().await.unwrap();
    let error = open("bob").await.err().unwrap();
    assert_eq!(error.code(), "identity_mismatch");
    assert!(error.to_string().contains("belongs to alice, not to bob"), "{error}");
    // A token that comes later is no way around it: nothing is sent.
    let asked =
        Client::builder(directory.path().join("one.db")).edge(&edge.url).token_fn(|| async { Ok(token("bob")) });
    let bob = asked.open().await.unwrap();
    until(&bob, State::Error).await;
    let reason = bob.status().borrow().reason.clone();
    assert!(reason.as_ref().is_some_and(|reason| reason.contains("Sign in as alice")), "{reason:?}");
    bob.close().await.unwrap();
    assert_eq!(edge.state().connections, 0);
    let alice = open("alice").await.unwrap();
    assert_eq!(titles(&alice).await.len(), 1);
    assert_eq!(alice.queue(9).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_lossy_bus_loses_nothing() {
    for seed in 1..=3 {
        let (edge, directory) = (Edge::start().await, directory());
        let faults = Faults { drop: 0.2, duplicate: 0.2, seed };
        let client = ready(builder(&directory, "a", &edge).bus_faults(faults)).await;
        for n in 0..300 {
            insert(&client, &format!("{n:03}"), if n % 50 == 7 { "bad" } else { "x" }).await;
        }
        client.settled(Duration::from_secs(60)).await.unwrap();
        assert_eq!(edge.state().ledger[&client.client_id()], 300, "seed {seed}");
        assert_eq!(edge.state().log.iter().filter(|rows| !rows.changes.is_empty()).count(), 294, "seed {seed}");
        assert_eq!(client.failed().await.unwrap().len(), 6, "seed {seed}");
        assert_equal(&client, &edge).await;
    }
}

/// Items 4, 64: each worker is started anew in the middle of the work, alone; nothing is lost.
#[tokio::test]
async fn workers_restart_alone() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    for n in 0..200 {
        insert(&client, &format!("{n:03}"), "x").await;
        if n % 40 == 20 {
            client.restart(if n % 80 == 20 { Worker::Changes } else { Worker::Sync });
        }
    }
    client.settled(Duration::from_secs(60)).await.unwrap();
    assert_eq!(edge.state().ledger[&client.client_id()], 200);
    assert_eq!(edge.state().log.len(), 200, "each took effect once");
    assert_equal(&client, &edge).await;
    // Each works without the other: without the sync worker the changes worker's side records on.
    client.pause();
    until(&client, State::Offline).await;
    client.restart(Worker::Changes);
    insert(&client, "later", "x").await;
    assert_eq!(client.status().borrow().pending.count, 1);
    client.resume();
    client.settled(PATIENCE).await.unwrap();
    assert_equal(&client, &edge).await;
}

#[tokio::test]
async fn failed_changes_are_watched_edited_and_what_follows_them_waits() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    insert(&client, "1", "good").await.confirmed().await.unwrap();
    let mut failed = client.watch_failed();
    assert_eq!(failed.next().await.unwrap().unwrap(), []);
    let bad = client.execute("UPDATE tasks SET title = 'bad'", ()).await.unwrap();
    assert_eq!(bad.confirmed().await.unwrap_err().code(), "permission_denied");
    let listed = failed.next().await.unwrap().unwrap();
    assert_eq!((listed.len(), listed[0].tx, listed[0].state), (1, 2, EntryState::Error));
    // What follows on the same row waits, visibly; other rows do not.
    let behind = client.execute("UPDATE tasks SET done = 1", ()).await.unwrap();
    insert(&client, "2", "other").await.confirmed().await.unwrap();
    assert_eq!(client.status().borrow().held, 1);
    assert_eq!(client.query_as::<bool>("SELECT done FROM tasks WHERE id = '1'", ()).await.unwrap(), [true]);
    client.settled(PATIENCE).await.unwrap();

    let edit = |value: &str| vec![Edit { change_id: None, column: "title".into(), value: Some(value.into()) }];
    let error = client.edit(2, vec![Edit { column: "nope".into(), ..edit("x").remove(0) }]).await.err().unwrap();
    assert_eq!(error.code(), "edit");
    let retried = client.edit(2, edit("better")).await.unwrap();
    assert_eq!(retried.confirmed().await.unwrap(), Outcome::Applied);
    assert_eq!(failed.next().await.unwrap().unwrap(), []);
    tokio::time::timeout(PATIENCE, behind.confirmed()).await.unwrap().unwrap();
    assert_eq!(titles(&client).await[0].1.as_deref(), Some("better"));
    assert_equal(&client, &edge).await;
}

/// Both are in flight when the first is refused: the server refuses the second for it, and the client sends it again.
#[tokio::test]
async fn what_was_sent_behind_a_rejected_change_comes_after_it() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = builder(&directory, "a", &edge).schema(schema()).paused().open().await.unwrap();
    insert(&client, "1", "bad").await;
    let behind = client.execute("UPDATE tasks SET done = 1", ()).await.unwrap();
    client.resume();
    tokio::time::timeout(PATIENCE, client.ready()).await.unwrap().unwrap();
    client.settled(PATIENCE).await.unwrap();
    assert_eq!((client.status().borrow().failed, client.status().borrow().held), (1, 1));
    assert_eq!(edge.state().tasks.len(), 0);
    let edit = Edit { change_id: None, column: "title".into(), value: Some("good".into()) };
    client.edit(1, vec![edit]).await.unwrap().confirmed().await.unwrap();
    tokio::time::timeout(PATIENCE, behind.confirmed()).await.unwrap().unwrap();
    assert_equal(&client, &edge).await;
    assert_eq!(client.query_as::<bool>("SELECT done FROM tasks", ()).await.unwrap(), [true]);
}

#[tokio::test]
async fn settled_waits_for_what_gets_another_number() {
    let (edge, directory) = (Edge::start().await, directory());
    edge.state().overloaded_from = Some(2);
    let client = builder(&directory, "a", &edge).schema(schema()).paused().open().await.unwrap();
    insert(&client, "1", "bad").await;
    client.execute("UPDATE tasks SET done = 1", ()).await.unwrap();
    client.resume();
    let rejected = |status: &Status| status.failed == 1;
    tokio::time::timeout(PATIENCE, client.status().wait_for(rejected)).await.unwrap().unwrap();
    client.discard(1).await.unwrap();
    // The second is refused for the first, which is not there any more: it is sent again at once, as number 3.
    let mut settled = std::pin::pin!(client.settled(PATIENCE));
    assert!(tokio::time::timeout(Duration::from_millis(50), &mut settled).await.is_err());
    edge.state().overloaded_from = Some(3);
    while edge.state().arrivals.last().unwrap().1 < 3 {
        let finished = tokio::time::timeout(Duration::from_millis(5), &mut settled).await;
        assert!(finished.is_err(), "{finished:?} with {:?}", client.queue(2).await);
    }
    edge.state().overloaded_from = None;
    settled.await.unwrap();
    assert_eq!((client.status().borrow().confirmed_seq, edge.state().tasks.len()), (3, 1));
}

#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct Task {
    id: String,
    title: String,
    done: bool,
    #[serde(default)]
    created_at: Option<String>,
}

#[tokio::test]
async fn tables_hold_values_of_the_apps_own_types() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    let tasks = client.table::<Task>("tasks");
    let mut open = tasks.filter("NOT done ORDER BY id", ()).watch();
    assert_eq!(open.next().await.unwrap().unwrap(), []);
    let task = Task { id: "1".into(), title: "buy milk".into(), done: false, created_at: None };
    tasks.insert(&task).await.unwrap().confirmed().await.unwrap();
    assert_eq!(open.next().await.unwrap().unwrap()[0].title, "buy milk");
    let patch = serde_json::json!({"title": "buy oat milk", "done": true});
    assert_eq!(*tasks.update(["1"], &patch).await.unwrap().value(), 1);
    let found = tasks.get(["1"]).await.unwrap().unwrap();
    assert_eq!((found.title.as_str(), found.done, found.created_at.is_some()), ("buy oat milk", true, true));
    assert_eq!(*tasks.update(["2"], &patch).await.unwrap().value(), 0);
    for (error, what) in [
        (tasks.update(["1"], &serde_json::json!({"tilte": "x"})).await.err().unwrap(), "no column tilte"),
        (tasks.update(["1", "2"], &patch).await.err().unwrap(), "1 parts, 2 were given"),
        (client.table::<Task>("nope").get(["1"]).await.err().unwrap(), "no table"),
    ] {
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(error.code() == "encode" && cause.contains(what), "{cause}");
    }
    assert_eq!(*tasks.delete(["1"]).await.unwrap().value(), 1);
    assert_eq!(tasks.all().rows().await.unwrap(), []);
}

#[tokio::test]
async fn errors_keep_their_causes() {
    let directory = directory();
    let client = Client::builder(directory.path().join("a")).schema(schema()).open().await.unwrap();
    let error = client.tx(|_| Err::<(), _>(Error::app("x".parse::<u8>().unwrap_err()))).await.err().unwrap();
    let Error::App(cause) = &error else { panic!("{error:?}") };
    assert!(cause.is::<std::num::ParseIntError>() && error.to_string() == cause.to_string(), "{error:?}");
    insert(&client, "1", "x").await;
    let error = client.query_as::<i64>("SELECT title FROM tasks", ()).await.unwrap_err();
    assert_eq!(error.to_string(), "a row does not fit the type");
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("expected i64"), "{error:?}");
    let tasks = client.table::<serde_json::Value>("tasks");
    // A map whose keys are no text.
    let error = tasks.update(["1"], &std::collections::BTreeMap::from([((1, 2), 3)])).await.err().unwrap();
    let cause = std::error::Error::source(&error).unwrap();
    assert!(cause.is::<serde_json::Error>(), "{error:?}");
}

#[tokio::test]
async fn a_panic_in_a_transaction_ends_that_transaction_only() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    let panicked = client.tx(|tx| {
        tx.execute("INSERT INTO tasks (id) VALUES ('1')", ())?;
        if tx.uuid().is_nil() { Ok(()) } else { panic!("a fault of the app's") }
    });
    assert_eq!(panicked.await.err().unwrap().code(), "panicked");
    insert(&client, "2", "x").await.confirmed().await.unwrap();
    assert_eq!(titles(&client).await.len(), 1);
    assert_equal(&client, &edge).await;
}

/// Two processes of one device each had a copy of the store (a cloned machine): both go on, nothing is lost or doubled.
#[tokio::test]
async fn a_cloned_store_goes_on_under_an_id_of_its_own() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    insert(&client, "1", "x").await.confirmed().await.unwrap();
    client.close().await.unwrap();
    std::fs::copy(directory.path().join("a"), directory.path().join("b")).unwrap();
    let (a, b) = (builder(&directory, "a", &edge).paused(), builder(&directory, "b", &edge).paused());
    let (a, b) = (a.open().await.unwrap(), b.open().await.unwrap());
    assert_eq!(a.client_id(), b.client_id());
    let mut writes = Vec::new();
    for n in 0..5 {
        writes.push(insert(&a, &format!("a{n}"), "x").await);
        writes.push(insert(&b, &format!("b{n}"), "x").await);
    }
    a.resume();
    b.resume();
    for write in &writes {
        assert_eq!(tokio::time::timeout(PATIENCE, write.confirmed()).await.unwrap().unwrap(), Outcome::Applied);
    }
    assert_ne!(a.client_id(), b.client_id());
    assert_eq!(edge.state().tasks.len(), 11);
    assert_eq!(edge.state().log.len(), 11, "each took effect once");
    for client in [&a, &b] {
        let all = client.status();
        tokio::time::timeout(PATIENCE, all.clone().wait_for(|s| s.position.is_some_and(|p| p.stream_seq == 11)))
            .await
            .unwrap()
            .unwrap();
        assert_equal(client, &edge).await;
    }
}

/// Item 30: a connection that is open on our side only is noticed within the heartbeat's time, and nothing is lost.
#[tokio::test]
async fn a_half_open_connection_is_noticed() {
    let (edge, directory) = (Edge::start().await, directory());
    edge.state().heartbeat_ms = 1_500;
    let client = ready(builder(&directory, "a", &edge)).await;
    insert(&client, "1", "x").await.confirmed().await.unwrap();
    edge.state().deaf = true;
    let started = Instant::now();
    insert(&client, "2", "into the void").await;
    until(&client, State::Offline).await;
    assert!(started.elapsed() < Duration::from_secs(8), "noticed after {:?}", started.elapsed());
    edge.state().deaf = false;
    client.connect_now();
    client.settled(PATIENCE).await.unwrap();
    assert_equal(&client, &edge).await;
}

/// Item 31: however politely the edge closes, the client comes back.
#[tokio::test]
async fn clean_closes_are_followed_by_new_connections() {
    let (edge, directory) = (Edge::start().await, directory());
    let client = ready(builder(&directory, "a", &edge)).await;
    for (n, code) in [Some(1000), None, Some(1012), Some(1001)].into_iter().enumerate() {
        edge.state().close_with = Some(code);
        let write = insert(&client, &n.to_string(), "x").await;
        let mut status = client.status();
        let again = status.wait_for(|status| status.reconnects == n as u64 + 1);
        tokio::time::timeout(PATIENCE, again).await.unwrap().unwrap();
        client.connect_now();
        tokio::time::timeout(PATIENCE, write.confirmed()).await.unwrap().unwrap();
    }
    assert_equal(&client, &edge).await;
}

/// The longest that a call of the app waited until the status is as wanted.
async fn longest_wait(client: &Client, mut wanted: impl FnMut(&Status) -> bool) -> Duration {
    let mut longest = Duration::ZERO;
    for n in 0.. {
        let before = Instant::now();
        if n % 2 == 0 {
            client.execute("INSERT INTO tasks (id, title) VALUES (millstream_uuid(), 'mine')", ()).await.unwrap();
        } else {
            client.failed().await.unwrap();
        }
        longest = longest.max(before.elapsed());
        if wanted(&client.status().borrow()) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    longest
}

/// 100 ms is what is meant; the machine may have other things to do.
const LONGEST_WAIT: Duration = Duration::from_millis(400);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_a_snapshot() {
    let (edge, directory) = (Edge::start().await, directory());
    let row = |n: usize, title: &str| {
        let text = |text: &str| Some(text.to_owned());
        vec![text(&format!("{n:06}")), text(title), text("f"), text("2026-01-01 00:00:00+00")]
    };
    edge.state().tasks =
        (0..50_000).map(|n| (format!("{n:06}"), row(n, "a task with a title of some length"))).collect();
    let client = builder(&directory, "a", &edge).open().await.unwrap();
    let mut status = client.status();
    tokio::time::timeout(PATIENCE, status.wait_for(|status| status.schema.is_some())).await.unwrap().unwrap();
    let first = longest_wait(&client, |status| status.has_synced).await;
    client.settled(PATIENCE).await.unwrap();
    assert_equal(&client, &edge).await;

    // Another history: everything comes again, and some of it is different.
    edge.kill().await;
    let epoch = millstream_client::Uuid::now_v7();
    edge.state().epoch = epoch;
    for n in (0..50_000).step_by(1_000) {
        edge.state().tasks.remove(&format!("{:06}", n + 1));
        edge.state().tasks.insert(format!("{n:06}"), row(n, "another"));
    }
    edge.revive().await;
    client.connect_now();
    let later = longest_wait(&client, |status| status.position.is_some_and(|position| position.epoch == epoch)).await;
    client.settled(PATIENCE).await.unwrap();
    assert_equal(&client, &edge).await;
    println!("the longest wait: {first:?} during a first snapshot of 50,000 rows, {later:?} during a later one");
    assert!(first < LONGEST_WAIT && later < LONGEST_WAIT, "{first:?}, {later:?}");
    client.close().await.unwrap();
}
