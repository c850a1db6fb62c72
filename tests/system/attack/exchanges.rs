//! Exchanges with the database that break off, by forged marks or by bad luck: the next sessions on the same connections are
//! told what is theirs, and nothing else.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use futures_util::future::join_all;
use millstream_schemas::Scope;
use millstream_schemas::frame::SnapshotMark;
use serde_json::{Value, json};
use sqlx::Executor;
use uuid::Uuid;

use super::peer::{Heard, Held, Peer};
use super::{Allow, HEALED, Scene, every};

/// Honest users, each with two projects of their own.
const HONEST: usize = 10;
/// Their sessions after an attack.
const SESSIONS: usize = 100;
/// Of those at a time.
const AT_A_TIME: usize = 10;

fn seed() -> String {
    let mut sql = String::new();
    for user in 0..HONEST {
        for project in ["a", "b"] {
            sql += &format!(
                "INSERT INTO members VALUES ('{user}{project}', 'honest-{user}{project}', 'honest-{user}');
                 INSERT INTO tasks VALUES ('honest-{user}{project}', 'honest-{user}{project}', 'x');
                 INSERT INTO events VALUES ('2026-01-01', {user}{}, 'honest-{user}{project}', 'x');",
                project.len() + usize::from(project == "b")
            );
        }
    }
    // Enough rows for snapshots of several frames, in several tables.
    sql + "INSERT INTO members VALUES ('forger', 'large', 'forger'), ('other', 'large', 'other');
           INSERT INTO events SELECT DATE '2026-01-01' + n % 100, n, 'large', repeat('x', 100) FROM generate_series(1000, 4000) AS n;
           INSERT INTO tasks SELECT 'large-' || n, 'large', repeat('y', 100) FROM generate_series(1, 2000) AS n;"
}

/// Sessions of honest users: each is welcomed, and told of its scopes and rows, and of no others.
async fn honest(scene: &Scene) -> Result<()> {
    let one = async |session: usize| {
        let user = session % HONEST;
        let held = scene.snapshot(&format!("honest-{user}")).await.with_context(|| format!("session {session}"))?;
        let mut scopes = BTreeSet::from([Scope::global(), Scope::user(format!("honest-{user}"))]);
        scopes.extend(["a", "b"].map(|project| Scope::new("project", format!("honest-{user}{project}"))));
        ensure!(held.scopes == scopes, "WRONG: honest-{user} got scopes {:?}", held.scopes);
        let tasks: Vec<&str> = held.tasks.keys().map(String::as_str).collect();
        ensure!(
            tasks == [format!("honest-{user}a"), format!("honest-{user}b")],
            "WRONG: honest-{user} holds {tasks:?}"
        );
        Ok(())
    };
    let mut failures = Vec::new();
    for first in (0..SESSIONS).step_by(AT_A_TIME) {
        let results = join_all((first..first + AT_A_TIME).map(&one)).await;
        failures.extend(results.into_iter().filter_map(Result::err).map(|error| format!("{error:#}")));
    }
    failures.sort_by_key(|failure| !failure.contains("WRONG"));
    ensure!(
        failures.is_empty(),
        "{} of {SESSIONS} honest sessions fail afterwards, such as {:?}",
        failures.len(),
        failures[0]
    );
    Ok(())
}

/// The marks of a snapshot of a user's own, one for each of its frames; and the schema's version.
async fn marks(scene: &Scene, user: &str) -> Result<(Vec<SnapshotMark>, String)> {
    let mut peer = Peer::connect(&scene.url()).await?;
    let mut held = Held::default();
    peer.say(held.hello(Uuid::now_v7(), &scene.token(user))).await?;
    let mut marks: Vec<SnapshotMark> = Vec::new();
    while held.position.is_none() {
        let frame = peer.frame(Duration::from_secs(10)).await?.context("closed")?;
        ensure!(held.take(frame).is_none(), "refused");
        marks.extend(held.cut.clone().filter(|cut| !cut.mark.is_empty() && marks.last() != Some(cut)));
    }
    Ok((marks, held.schema.context("no schema")?))
}

/// What can be made of true marks.
fn forged(own: &[SnapshotMark], other: &[SnapshotMark]) -> Vec<SnapshotMark> {
    let mut all = Vec::new();
    for (index, true_one) in own.iter().enumerate() {
        let with_mark = |mark: String| SnapshotMark { token: true_one.token.clone(), mark };
        let with_token = |token: String| SnapshotMark { token, mark: true_one.mark.clone() };
        // As texts, whatever is in them.
        for text in [
            "",
            "null",
            "[]",
            "{}",
            "not json",
            "\u{0}",
            "AAAA",
            "{\"pass\":1}",
            &"x".repeat(100_000),
            &"[".repeat(100_000),
        ] {
            all.push(with_mark(text.to_owned()));
            all.push(with_token(text.to_owned()));
        }
        for at in [0, true_one.mark.len() / 3, true_one.mark.len() / 2, true_one.mark.len().saturating_sub(2)] {
            let flip = |text: &str| -> String {
                text.char_indices().map(|(i, c)| if i == at { if c == 'x' { 'y' } else { 'x' } } else { c }).collect()
            };
            all.push(with_mark(flip(&true_one.mark)));
            all.push(with_token(flip(&true_one.token)));
            all.push(with_mark(true_one.mark.chars().take(at).collect()));
        }
        // Another moment's, another user's, another table's.
        for foreign in other.iter().chain(own).take(4) {
            all.push(with_mark(foreign.mark.clone()));
            all.push(with_token(foreign.token.clone()));
            all.push(foreign.clone());
        }
        all.push(SnapshotMark { token: true_one.mark.clone(), mark: true_one.token.clone() });
        // As the documents that they may be.
        let Ok(mark) = serde_json::from_str::<Value>(&true_one.mark) else { continue };
        let keys = [
            json!(["zzz"]),
            json!(["zzz", "1"]),
            json!(["2026-01-01", "zzz"]),
            json!(["2026-13-77", "1"]),
            json!([]),
            json!(["a", "b", "c", "d"]),
            json!([""]),
            json!(["", ""]),
            json!([null]),
            json!(["1e999999", "1"]),
            json!(["\u{1}'\"\\{},", "NULL"]),
            json!(["x".repeat(50_000), "1"]),
            json!([{"a": 1}]),
            json!("zzz"),
            json!(7),
        ];
        for key in keys {
            for pass in 0..12 {
                let mut forged = mark.clone();
                forged["key"] = key.clone();
                forged["pass"] = pass.into();
                // Those of all passes for a few keys, those of its own for all.
                if pass < 3 || index == 0 {
                    all.push(with_mark(forged.to_string()));
                }
            }
        }
        for (name, value) in [
            ("pass", json!(u64::MAX)),
            ("pass", json!(-1)),
            ("pass", json!(1.5)),
            ("scope", Value::Null),
            ("scope", json!("project:neighbours")),
            ("scope", json!("zzz")),
            ("scope", json!(["project:large"])),
            ("mac", json!("")),
            ("mac", json!("00")),
            ("user", json!("other")),
        ] {
            let mut forged = mark.clone();
            forged[name] = value;
            all.push(with_mark(forged.to_string()));
        }
        let Ok(token) = serde_json::from_str::<Value>(&true_one.token) else { continue };
        for (name, value) in [
            ("visible", json!("1:2:")),
            ("visible", json!("zzz")),
            ("visible", json!("18446744073709551615:18446744073709551615:1,1,1")),
            ("lsn", json!("FFFFFFFF/FFFFFFFF")),
            ("lsn", json!("0/0")),
            ("scopes", json!(0)),
            ("apart", json!(false)),
            ("apart", json!(true)),
            ("layout", json!("")),
            ("mac", json!("")),
            ("from", json!({"epoch": Uuid::nil(), "stream_seq": 1, "lsn": "0/1"})),
        ] {
            let mut forged = token.clone();
            forged[name] = value;
            all.push(with_token(forged.to_string()));
        }
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn exchanges_with_forged_marks_break_no_other() -> Result<()> {
    let one = [("forged marks", ())];
    every(&seed(), Allow::Nothing, one, async |scene: &Scene, (): ()| {
        let (own, schema) = marks(scene, "forger").await?;
        let (other, _) = marks(scene, "other").await?;
        ensure!(own.len() >= 2, "only {} marks", own.len());
        let first_and_last = [own[0].clone(), own[own.len() - 1].clone()];
        let all = forged(&first_and_last, &other);
        let count = all.len();
        let (url, token, start) = (scene.url(), scene.token("forger"), Instant::now());
        for (n, some) in all.chunks(4).enumerate() {
            let tried = some.iter().map(async |mark| {
                let mut peer = Peer::connect(&url).await?;
                let mut frame = millstream_tests::raw::hello(Uuid::now_v7(), &token);
                frame["schema"] = json!(schema);
                frame["snapshot"] = json!(mark);
                peer.say(frame).await?;
                // To its end, or cut short.
                let limit = if n % 3 == 0 { Duration::from_secs(10) } else { Duration::from_millis(50) };
                let end = Instant::now() + limit;
                while Instant::now() < end {
                    match peer.next(end.saturating_duration_since(Instant::now())).await {
                        Heard::Text(text) if text.contains("\"snapshot_end\"") => break,
                        Heard::Text(_) => {}
                        _ => break,
                    }
                }
                anyhow::Ok(())
            });
            for result in join_all(tried).await {
                result?;
            }
        }
        println!("  {count} forged marks in {:.1} s", start.elapsed().as_secs_f64());
        honest(scene).await
    })
    .await
}

/// Somebody comes and goes for the large snapshot, and takes a part of it, until the other thing is done.
async fn coming_and_going(scene: &Scene, meanwhile: impl Future<Output = Result<()>>) -> Result<()> {
    let (url, token) = (scene.url(), scene.token("forger"));
    let come_and_go = async |n: usize| -> Result<()> {
        loop {
            // A refusal while it lasts is fine.
            if let Ok(mut peer) = Peer::connect(&url).await {
                let _ = peer.say(millstream_tests::raw::hello(Uuid::now_v7(), &token)).await;
                for _ in 0..(n * 4) {
                    if !matches!(peer.next(Duration::from_millis(500)).await, Heard::Text(_)) {
                        break;
                    }
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        done = meanwhile => done,
        result = futures_util::future::try_join_all((1..=4).map(come_and_go)) => result.map(drop),
    }
}

/// Statements, each followed by a pause in milliseconds, round after round.
type Rounds = (u32, Vec<(&'static str, u64)>);

#[tokio::test(flavor = "multi_thread")]
async fn exchanges_broken_by_bad_luck_break_no_other() -> Result<()> {
    const BACKENDS: &str = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'millstream_edge'";
    const CANCEL: &str =
        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE usename = 'millstream_edge' AND query LIKE 'COPY%'";
    let variants: Vec<(&str, Rounds)> = vec![
        (
            "a column comes and goes",
            (
                2,
                vec![
                    ("ALTER TABLE events ADD COLUMN extra text", 2_500),
                    ("ALTER TABLE events DROP COLUMN extra", 700),
                ],
            ),
        ),
        (
            "a column's right is missing",
            (
                1,
                vec![
                    (
                        "REVOKE SELECT ON events FROM millstream_edge; GRANT SELECT (day, id, project_id) ON events TO millstream_edge",
                        2_000,
                    ),
                    ("GRANT SELECT ON events TO millstream_edge", 0),
                ],
            ),
        ),
        ("connections are ended", (12, vec![(BACKENDS, 150)])),
        ("reads are cancelled", (60, vec![(CANCEL, 30)])),
        ("a table is locked for 3 s", (1, vec![("LOCK TABLE events IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(3)", 0)])),
        (
            "a table is locked again and again",
            (20, vec![("LOCK TABLE events IN ACCESS EXCLUSIVE MODE; SELECT pg_sleep(0.12)", 15)]),
        ),
    ];
    let setup = format!("{}; ALTER DATABASE app SET lock_timeout = '100ms'", seed().trim_end().trim_end_matches(';'));
    every(&setup, Allow::Pause, variants, async |scene: &Scene, (rounds, statements): Rounds| {
        let mut postgres = scene.board.postgres().await?;
        postgres.execute("SET lock_timeout = 0").await?;
        coming_and_going(scene, async {
            for _ in 0..rounds {
                for (sql, pause) in &statements {
                    super::commit(&mut postgres, (*sql).to_owned()).await?;
                    tokio::time::sleep(Duration::from_millis(*pause)).await;
                }
            }
            Ok(())
        })
        .await?;
        // What heals in time counts.
        let end = Instant::now() + HEALED;
        loop {
            match honest(scene).await {
                Ok(()) => return Ok(()),
                Err(error) if Instant::now() > end || error.to_string().contains("WRONG") => bail!(error),
                Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
            }
        }
    })
    .await
}
