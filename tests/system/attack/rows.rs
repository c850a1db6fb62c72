//! What is too large to carry, by whoever wrote it: it is withdrawn from clients, or refused, and everything else goes on.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use uuid::Uuid;

use super::peer::{Heard, Peer};
use super::{Allow, Scene, every, insert, submit, verdict};

/// Somebody's project, with a witness who holds it.
const SEED: &str =
    "INSERT INTO members VALUES ('author', 'large', 'author', 'owner'), ('witness', 'large', 'witness', 'reader');";
/// What a witness is told of a transaction of a client's may be larger than what the client sent, up to this many bytes: twice
/// the largest row.
const TOLD: u64 = 2 * millstream_schemas::stream::MAX_ROW_BYTES as u64;

/// A later row of the same project still reaches those who hold it.
async fn still_told(scene: &Scene, witness: &mut Peer) -> Result<()> {
    let id = Uuid::now_v7().to_string();
    scene.sql(format!("INSERT INTO tasks VALUES ('{id}', 'large', 'small')")).await?;
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match witness.next(Duration::from_millis(200)).await {
            Heard::Text(text) if text.contains(&id) => return Ok(()),
            Heard::Closed => *witness = scene.open("witness").await?,
            _ => ensure!(Instant::now() < end, "a later row of the same project does not arrive within 10 s"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_too_large_to_carry_stop_nobody() -> Result<()> {
    let text = |id: &str, bytes: u32| {
        format!("INSERT INTO docs (id, project_id, note) VALUES ('{id}', 'large', repeat('x', {bytes}))")
    };
    let update = "UPDATE docs SET odd = 'changed' WHERE id = 'a'".to_owned();
    let moved = "UPDATE docs SET id = 'b', project_id = 'elsewhere' WHERE id = 'a'".to_owned();
    let delete = |id: &str| format!("DELETE FROM docs WHERE id = '{id}'");
    let full = |on: bool| {
        format!("ALTER TABLE docs REPLICA IDENTITY {}", if on { "FULL" } else { "USING INDEX docs_identity" })
    };
    let bytes = |bytes: u32| {
        format!("INSERT INTO docs (id, project_id, raw) VALUES ('a', 'large', decode(repeat('ab', {bytes}), 'hex'))")
    };
    let numbers = |column: &str, value: &str| {
        format!("INSERT INTO docs (id, project_id, {column}) VALUES ('a', 'large', {value})")
    };
    let quotes = "INSERT INTO docs (id, project_id, note) VALUES ('a', 'large', repeat(chr(1), 15000000))".to_owned();
    let message = |prefix: &str, transactional: bool, content: &str| {
        format!("SELECT pg_logical_emit_message({transactional}, '{prefix}', {content})")
    };
    let variants: Vec<(&str, Vec<String>)> = vec![
        ("a text of 70 MB, changed, moved and deleted", vec![text("a", 70_000_000), update.clone(), moved, delete("b")]),
        ("a text of 20 MiB, changed and deleted", vec![text("a", 20 << 20), update.clone(), delete("a")]),
        ("a bytea of 35 MB, changed and deleted", vec![bytes(35_000_000), update.clone(), delete("a")]),
        ("two texts of 40 MB in one row", vec![
            "INSERT INTO docs (id, project_id, note, odd) VALUES ('a', 'large', repeat('x', 40000000), repeat('y', 40000000))".to_owned(),
            delete("a"),
        ]),
        ("70 MB with its old image", vec![text("a", 36_000_000), full(true), update, delete("a"), full(false)]),
        ("15 million control characters, six times as long in JSON", vec![quotes, delete("a")]),
        ("a document of 78 MB written as 6 KB", vec![
            numbers("wide", "('[' || repeat('1e131071,', 599) || '1e131071]')::jsonb"),
            delete("a"),
        ]),
        ("another's messages of 80 MB", vec![
            message("other.tool", true, "repeat('x', 80000000)"),
            message("other.tool", false, "repeat('x', 80000000)"),
        ]),
        ("another's messages in our name", vec![
            message("millstream.origin", true, "'not json'"),
            message("millstream.origin", true, "'{\"clients\": 5}'"),
            message("millstream.origin", true, "'{\"clients\": [{\"client_id\": \"x\"}], \"traceparent\": 7}'"),
            message("millstream.origin", false, "'[]'"),
            message("millstream.origin", true, "repeat('[', 3000000)"),
            message("millstream.origin", true, "'\\xff00fe'::bytea"),
            message("millstream", true, "''"),
        ]),
        ("a trace context of 70,000 letters in our name", vec![
            message("millstream.origin", true, "'{\"clients\": [], \"traceparent\": \"' || repeat('x', 70000) || '\"}'"),
        ]),
        ("80 MB in our name", vec![message("millstream.origin", true, "repeat('x', 80000000)")]),
    ];
    // One log carries everything: a transaction of 70 MB takes its time to pass, and nothing more.
    every(SEED, Allow::Pause, variants, async |scene: &Scene, statements: Vec<String>| {
        let mut witness = scene.open("witness").await?;
        for sql in statements {
            scene.sql(sql).await?;
        }
        still_told(scene, &mut witness).await
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_grow_in_the_database_are_refused() -> Result<()> {
    let number = "1e131071";
    let many = |count: usize| vec![number; count].join(",");
    let document = format!("[{}]", many(600));
    let doubly = document.replace('"', "\"\"");
    let one = |column: &'static str, value: String| vec![(column, value)];
    #[expect(clippy::type_complexity, reason = "a table of cases")]
    let variants: Vec<(&str, usize, Vec<(&'static str, String)>)> = vec![
        ("a plain numeric of 500 rows", 500, one("n", number.to_owned())),
        ("a numeric of 900 rows, with a fraction and a sign", 900, one("n", "-1.5E+131070".to_owned())),
        ("a document of a domain", 1, one("wide", document.clone())),
        ("a document of a domain of a domain", 1, one("wider", document.clone())),
        ("a document within a composite", 1, one("both_", format!("(x,\"{doubly}\")"))),
        ("an array of a domain", 1, one("listed", format!("{{{}}}", many(600)))),
        ("an array of documents of a domain", 1, one("bodies", format!("{{\"{}\"}}", doubly))),
        ("documents of 30 numbers, 100 rows", 100, one("body", format!("[{}]", many(30)))),
        (
            "a document, a domain and an array, each just within",
            1,
            vec![
                ("body", format!("[{}]", many(30))),
                ("wide", format!("[{}]", many(30))),
                ("wider", format!("[{}]", many(30))),
                ("listed", format!("{{{}}}", many(30))),
            ],
        ),
    ];
    let variants = variants.into_iter().map(|(name, rows, set)| (name, (rows, set)));
    every(SEED, Allow::Pause, variants, async |scene: &Scene, (rows, set): (usize, Vec<(&str, String)>)| {
        let mut witness = scene.open("witness").await?;
        while !matches!(witness.next(Duration::from_millis(500)).await, Heard::Silence) {}
        let told = witness.bytes;
        let mut author = scene.open("author").await?;
        let ids: Vec<String> = (0..rows).map(|_| Uuid::now_v7().to_string()).collect();
        let changes = ids.iter().map(|id| {
            let mut columns = vec![("id", id.as_str()), ("project_id", "large")];
            columns.extend(set.iter().map(|(column, value)| (*column, value.as_str())));
            insert("docs", &columns)
        });
        author.say(submit(1, Uuid::nil(), changes.collect())).await?;
        let word = verdict(&mut author, 1, Duration::from_secs(30)).await.context("no verdict")?;
        still_told(scene, &mut witness).await?;
        let told = witness.bytes - told;
        println!("  {rows} rows: {word}; a witness was sent {} KiB", told >> 10);
        ensure!(told <= TOLD, "a witness was sent {told} bytes of one small transaction ({word})");
        // Where the database has taken it, it must not come with the next snapshot either.
        let mut newcomer = scene.open("witness").await?;
        while !matches!(newcomer.next(Duration::from_millis(500)).await, Heard::Silence | Heard::Closed) {}
        ensure!(newcomer.bytes <= TOLD, "a snapshot after it has {} bytes ({word})", newcomer.bytes);
        scene.sql("DELETE FROM docs").await
    })
    .await
}
