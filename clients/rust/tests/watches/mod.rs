//! Watches see every change of what they read, whatever kind of table it is and whoever changes it.

use std::time::Duration;

use futures_util::StreamExt;
use millstream_client::{Client, Rows, Watch};

use super::edge::Edge;
use super::{PATIENCE, builder, directory, insert, ready};

/// Of each kind of table that SQLite has: how it is made, what is asked of it, and statements that each change the answer.
const KINDS: [(&str, &[&str], &str, &[&str]); 10] = [
    (
        "rowid",
        &["CREATE TABLE k (a, b)"],
        "SELECT a, b FROM k",
        &[
            "INSERT INTO k VALUES (1, 1), (2, 2)",
            "UPDATE k SET b = b + 1",
            "DELETE FROM k WHERE a = 1",
            "DELETE FROM k",
        ],
    ),
    (
        "without rowid",
        &["CREATE TABLE k (a PRIMARY KEY, b) WITHOUT ROWID"],
        "SELECT count(*), sum(b) FROM k",
        &[
            "INSERT INTO k VALUES (1, 1), (2, 2)",
            "UPDATE k SET b = b + 1",
            "REPLACE INTO k VALUES (2, 9)",
            "DELETE FROM k WHERE a = 1",
            "DELETE FROM k",
        ],
    ),
    (
        "behind a view",
        &["CREATE TABLE k (a PRIMARY KEY, b) WITHOUT ROWID", "CREATE VIEW v AS SELECT b FROM k WHERE a > 0"],
        "WITH w AS (SELECT b FROM v) SELECT sum(b) FROM w",
        &["INSERT INTO k VALUES (1, 1), (2, 2)", "UPDATE k SET b = b + 1", "DELETE FROM k"],
    ),
    (
        "fts5",
        &["CREATE VIRTUAL TABLE k USING fts5(b)"],
        "SELECT b FROM k WHERE k MATCH 'zebra*' ORDER BY rowid",
        &[
            "INSERT INTO k VALUES ('zebra'), ('zebras')",
            "UPDATE k SET b = b || ' too'",
            "DELETE FROM k WHERE rowid = 1",
            "DELETE FROM k",
        ],
    ),
    (
        "fts5 of another table, which its index is not told of",
        &[
            "CREATE TABLE c (b)",
            "CREATE VIRTUAL TABLE k USING fts5(b, content='c')",
            "INSERT INTO c VALUES ('zebra')",
            "INSERT INTO k (k) VALUES ('rebuild')",
        ],
        "SELECT b FROM k WHERE k MATCH 'zebra'",
        &["UPDATE c SET b = b || '!'", "INSERT INTO k (k) VALUES ('delete-all')"],
    ),
    (
        "fts5vocab",
        &["CREATE VIRTUAL TABLE k USING fts5(b)", "CREATE VIRTUAL TABLE v USING fts5vocab(k, 'row')"],
        "SELECT term, cnt FROM v",
        &["INSERT INTO k VALUES ('zebra')", "INSERT INTO k VALUES ('zebra')", "DELETE FROM k"],
    ),
    (
        "a shadow table",
        &["CREATE VIRTUAL TABLE k USING fts5(b)"],
        "SELECT count(*) FROM k_docsize",
        &["INSERT INTO k VALUES ('zebra')", "DELETE FROM k"],
    ),
    (
        "fts4",
        &["CREATE VIRTUAL TABLE k USING fts4(b)"],
        "SELECT count(*) FROM k WHERE k MATCH 'zebra'",
        &[
            "INSERT INTO k VALUES ('zebra')",
            "UPDATE k SET b = 'horse'",
            "INSERT INTO k VALUES ('zebra')",
            "DELETE FROM k",
        ],
    ),
    (
        "rtree",
        &["CREATE VIRTUAL TABLE k USING rtree(id, x0, x1)"],
        "SELECT count(*), max(x1) FROM k WHERE x0 > 0",
        &["INSERT INTO k VALUES (1, 1, 2)", "UPDATE k SET x1 = 9", "DELETE FROM k"],
    ),
    (
        "the tables themselves",
        &[],
        "SELECT name FROM sqlite_schema ORDER BY 1",
        &[
            "CREATE TABLE k (a)",
            "CREATE INDEX i ON k (a)",
            "ALTER TABLE k ADD COLUMN b",
            "ALTER TABLE k RENAME TO l",
            "DROP TABLE l",
        ],
    ),
];

/// A watch, and what it shows.
struct Shown(Watch<Rows>, Option<Rows>);

/// The watch comes to show what a query shows.
async fn follows(client: &Client, Shown(watch, shown): &mut Shown, sql: &str, what: &str) {
    let now = client.query(sql, ()).await.unwrap();
    let shows = async {
        while shown.as_ref() != Some(&now) {
            *shown = Some(watch.next().await.unwrap().unwrap());
        }
    };
    let shows = tokio::time::timeout(Duration::from_secs(5), shows).await;
    assert!(shows.is_ok(), "{what}: the watch does not show {now:?}");
}

async fn run(client: &Client, statements: &[&'static str]) {
    for sql in statements {
        client.execute(sql, ()).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }
}

#[tokio::test]
async fn of_every_kind_of_table() {
    let (edge, directory) = (Edge::start().await, directory());
    for (n, (kind, setup, sql, writes)) in KINDS.into_iter().enumerate() {
        let name = format!("s{n}");
        let client = ready(builder(&directory, &name, &edge)).await;
        // Another process with the same store.
        let other = ready(builder(&directory, &name, &edge)).await;
        run(&client, setup).await;
        let mut watch = Shown(client.watch(sql, ()), None);
        let mut elsewhere = Shown(other.watch(sql, ()), None);
        follows(&client, &mut watch, sql, kind).await;
        // The second time the statements are compiled already.
        for round in 0..2 {
            for write in writes {
                let before = client.query(sql, ()).await.unwrap();
                client.execute(write, ()).await.unwrap_or_else(|error| panic!("{write}: {error:?}"));
                if round == 0 && !kind.starts_with("the tables") {
                    assert_ne!(client.query(sql, ()).await.unwrap(), before, "{kind}: {write}");
                }
                follows(&client, &mut watch, sql, &format!("{kind}, round {round}: {write}")).await;
                follows(&client, &mut elsewhere, sql, &format!("{kind}, elsewhere: {write}")).await;
            }
        }
    }
}

/// Triggers of the app's fire on what others write, too.
#[tokio::test]
async fn of_tables_that_triggers_fill() {
    let (edge, directory) = (Edge::start().await, directory());
    let (a, b) = (ready(builder(&directory, "a", &edge)).await, ready(builder(&directory, "b", &edge)).await);
    run(
        &b,
        &[
            "CREATE TABLE seen (id PRIMARY KEY) WITHOUT ROWID",
            "CREATE TABLE deep (n PRIMARY KEY) WITHOUT ROWID",
            "CREATE TABLE recent (id)",
            "CREATE VIRTUAL TABLE found USING fts5(title)",
            "CREATE TRIGGER seen_i AFTER INSERT ON tasks BEGIN INSERT INTO seen VALUES (NEW.id); END",
            "CREATE TRIGGER deep_i AFTER INSERT ON seen BEGIN INSERT INTO deep SELECT count(*) FROM seen; END",
            "CREATE TRIGGER recent_i AFTER INSERT ON tasks BEGIN DELETE FROM recent; END",
            "CREATE TRIGGER found_i AFTER INSERT ON tasks BEGIN INSERT INTO found VALUES (NEW.title); END",
        ],
    )
    .await;
    let queries = [
        "SELECT count(*) FROM tasks",
        "SELECT count(*) FROM seen",
        "SELECT max(n) FROM deep",
        "SELECT count(*) FROM recent",
        "SELECT count(*) FROM found WHERE found MATCH 'zebra'",
    ];
    let mut watches: Vec<_> = queries.iter().map(|sql| Shown(b.watch(sql, ()), None)).collect();
    for round in 0..4 {
        b.execute("INSERT INTO recent VALUES (1), (2)", ()).await.unwrap();
        for (watch, sql) in watches.iter_mut().zip(queries) {
            follows(&b, watch, sql, sql).await;
        }
        // In turn by another client and by this one.
        let (client, id) = (if round % 2 == 0 { &a } else { &b }, round.to_string());
        insert(client, &id, "zebra").await.confirmed().await.unwrap();
        let mut status = b.status();
        tokio::time::timeout(
            PATIENCE,
            status.wait_for(|status| status.position.is_some_and(|at| at.stream_seq > round)),
        )
        .await
        .unwrap()
        .unwrap();
        for (watch, sql) in watches.iter_mut().zip(queries) {
            follows(&b, watch, sql, &format!("round {round}: {sql}")).await;
        }
        assert_eq!(b.query_as::<i64>("SELECT count(*) FROM seen", ()).await.unwrap(), [round as i64 + 1]);
    }
}
