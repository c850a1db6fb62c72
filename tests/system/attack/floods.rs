//! Too much of everything, from one user or from nobody: submissions, snapshots, catch-ups, hellos, sessions, sockets. Everybody
//! else gets their share, and the edge does not grow.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::future::{join_all, try_join_all};
use millstream_stack::{Builder, Service};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use uuid::Uuid;

use super::peer::{Heard, Held, Peer};
use super::{Allow, Scene, client_in, every, full, insert, scaled, submit};

/// How long a flood goes on.
fn long() -> Duration {
    scaled(Duration::from_secs(8), Duration::from_secs(20))
}

/// A new membership's few rows come within this time, whatever others read: on a quiet stack it is some 50 ms.
const SMALL_SNAPSHOT: Duration = Duration::from_secs(2);
/// A ping is answered within this time.
const PONG: Duration = Duration::from_secs(5);

/// Runs something over and over until the time is up.
async fn until(end: Instant, mut each: impl AsyncFnMut() -> Result<()>) -> Result<()> {
    while Instant::now() < end {
        if each().await.is_err() {
            // Cut, or refused: it comes again.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    Ok(())
}

/// Clients of one user that send transactions without waiting for anything.
async fn submissions(scene: &Scene, (clients, changes): (u16, usize)) -> Result<()> {
    let end = Instant::now() + long();
    let flood = (0..clients).map(async |client| -> Result<u64> {
        let (id, url, token) = (client_in(client * 21), scene.url(), scene.token("flooder"));
        let mut sent = 0;
        until(end, async || {
            let mut peer = Peer::connect(&url).await?;
            peer.say(millstream_tests::raw::hello(id, &token)).await?;
            let mut client_seq = peer.welcome().await?.last_seq;
            while Instant::now() < end {
                client_seq += 1;
                let change = |_| {
                    let id = Uuid::now_v7().to_string();
                    insert("tasks", &[("id", &id), ("project_id", "flood"), ("title", "flood")])
                };
                let frame = submit(client_seq, Uuid::nil(), (0..changes).map(change).collect()).to_string();
                let left = end.saturating_duration_since(Instant::now());
                match tokio::time::timeout(left, peer.text(frame)).await {
                    Ok(result) => result?,
                    Err(_) => break,
                }
                sent += 1;
                while let Heard::Text(text) = peer.next(Duration::ZERO).await {
                    // Only where it is told that it left a gap: it has nothing else to go by.
                    if let Some(gap) = text.contains(r#""code":"gap""#).then(|| serde_json::from_str::<Value>(&text)) {
                        client_seq = gap?["client_seq"].as_u64().unwrap_or(client_seq) - 1;
                    }
                }
            }
            Ok(())
        })
        .await?;
        Ok(sent)
    });
    let sent: u64 = try_join_all(flood).await?.into_iter().sum();
    println!("  {sent} transactions of {changes} inserts");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_submissions_take_nothing_from_others() -> Result<()> {
    let seed = "INSERT INTO members VALUES ('flood', 'flood', 'flooder', 'owner');";
    let mut variants =
        vec![("900 inserts at a time, by one client", (1, 900)), ("one insert at a time, by three clients", (3, 1))];
    if full() {
        variants.push(("900 inserts at a time, by three clients", (3, 900)));
    }
    let variants = variants.into_iter().map(|(name, variant)| (format!("submissions: {name}"), variant));
    every(seed, Allow::Nothing, variants, submissions).await
}

/// What many read slowly.
const ROWS: u32 = 150_000;
/// Bytes a second of each.
const TRICKLE: usize = 15_000;

/// A new membership of somebody else: how long its rows take.
async fn joins(scene: &Scene, user: &str, project: &str) -> Result<Duration> {
    scene.sql(format!("INSERT INTO tasks VALUES ('{project}', '{project}', 'x')")).await?;
    let mut peer = Peer::connect(&scene.url()).await?;
    let mut held = Held::default();
    peer.say(held.hello(Uuid::now_v7(), &scene.token(user))).await?;
    let start = Instant::now();
    let mut granted = None;
    while !held.tasks.contains_key(project) {
        let waited = granted.unwrap_or(start).elapsed();
        ensure!(waited < long(), "{}: a new project's rows do not come within {waited:.0?}", user);
        if held.position.is_some() && granted.is_none() {
            ensure!(start.elapsed() < SMALL_SNAPSHOT, "a new client waits {:.1?} for its few rows", start.elapsed());
            scene.sql(format!("INSERT INTO members VALUES ('{project}', '{project}', '{user}')")).await?;
            granted = Some(Instant::now());
        }
        match peer.next(Duration::from_millis(200)).await {
            Heard::Text(text) => drop(held.take(serde_json::from_str(&text)?)),
            Heard::Silence => {}
            Heard::Closed => anyhow::bail!("{user}: closed"),
        }
    }
    Ok(granted.context("never granted")?.elapsed())
}

/// Readers of one user who trickle, and come again when they are cut.
async fn slow_snapshots(scene: &Scene, readers: usize) -> Result<()> {
    let end = Instant::now() + long();
    let read = join_all((0..readers).map(async |_| {
        until(end, async || {
            let mut peer = Peer::narrow(&scene.url(), 4_096).await?;
            peer.say(millstream_tests::raw::hello(Uuid::now_v7(), &scene.token("hoarder"))).await?;
            while Instant::now() < end {
                let tick = tokio::time::sleep(Duration::from_millis(100));
                let (open, ()) = tokio::join!(peer.drain(TRICKLE / 10, Duration::from_millis(100)), tick);
                ensure!(open, "cut");
            }
            Ok(())
        })
        .await
    }));
    let others = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (mut worst, mut n) = (Duration::ZERO, 0);
        while Instant::now() + SMALL_SNAPSHOT < end {
            n += 1;
            let (user, project) = (format!("joiner-{readers}-{n}"), format!("joined-{readers}-{n}"));
            worst = worst.max(joins(scene, &user, &project).await?);
        }
        println!("  {n} new memberships of others: {worst:.1?} at most");
        ensure!(worst <= SMALL_SNAPSHOT, "a new project's own rows took {worst:.1?}");
        Ok(())
    };
    // In a snapshot of the same kind, or waiting for its turn: a ping is answered.
    let pings = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        pinged(scene).await
    };
    let (_, others, pings) = tokio::join!(read, others, pings);
    let wrong: Vec<String> =
        [others, pings].into_iter().filter_map(Result::err).map(|error| format!("{error:#}")).collect();
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// A client that takes the large snapshot at 3 MB a second, as on a good line, pings, and is answered.
async fn pinged(scene: &Scene) -> Result<()> {
    let mut peer = Peer::narrow(&scene.url(), 16_384).await?;
    peer.say(millstream_tests::raw::hello(Uuid::now_v7(), &scene.token("pinger"))).await?;
    let (mut start, mut asked) = (Instant::now(), false);
    loop {
        let due = start + Duration::from_micros(peer.bytes / 3);
        tokio::time::sleep_until(due.into()).await;
        match peer.next(Duration::from_millis(200)).await {
            Heard::Closed => return Ok(()),
            Heard::Text(text) if !asked && (text.contains("welcome") || text.contains("snapshot")) => {
                peer.ping(b"are you there".to_vec()).await?;
                (start, asked) = (start + start.elapsed(), true);
                peer.bytes = 0;
            }
            Heard::Text(text) if text.contains("\"snapshot_end\"") => return Ok(()),
            _ => {}
        }
        if peer.pong.is_some() {
            return Ok(());
        }
        ensure!(!asked || start.elapsed() < PONG, "a ping during a snapshot is not answered within {PONG:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_slow_snapshots_take_nothing_from_others() -> Result<()> {
    let seed = format!(
        "INSERT INTO members VALUES ('hoarder', 'hoard', 'hoarder'), ('pinger', 'hoard', 'pinger');
         INSERT INTO tasks SELECT 'hoard-' || n, 'hoard', repeat('x', 490) FROM generate_series(1, {ROWS}) AS n;"
    );
    let mut variants = vec![("40 slow snapshots of one user", 40)];
    if full() {
        variants.push(("9 slow snapshots of one user", 9));
    }
    every(&seed, Allow::Nothing, variants, slow_snapshots).await
}

/// Clients of one user far behind, who take next to nothing of what they missed.
#[tokio::test(flavor = "multi_thread")]
async fn floods_of_slow_catch_ups_pin_no_memory() -> Result<()> {
    const TRANSACTIONS: u32 = 56;
    const READERS: usize = 12;
    let scene = Scene::start("INSERT INTO members VALUES ('behind', 'behind', 'behind');").await?;
    let result = async {
        let held = scene.snapshot("behind").await?;
        let write = async |project: &str, transactions: u32, rows: u32| {
            for _ in 0..transactions {
                let sql = format!(
                    "INSERT INTO docs (id, project_id, note) SELECT gen_random_uuid(), '{project}', repeat('x', 90000) FROM generate_series(1, {rows})"
                );
                scene.sql(sql).await?;
            }
            Ok::<_, anyhow::Error>(())
        };
        write("behind", TRANSACTIONS, 3).await?;
        // Beyond the ring.
        write("elsewhere", 25, 26).await?;
        scene.healed(Instant::now(), Duration::from_secs(60)).await?;
        scene
            .check("12 slow catch-ups of one user", Allow::Nothing, async {
                let mut peers = Vec::new();
                for _ in 0..READERS {
                    let mut peer = Peer::narrow(&scene.url(), 4_096).await?;
                    peer.say(held.hello(Uuid::now_v7(), &scene.token("behind"))).await?;
                    peers.push(peer);
                }
                let end = Instant::now() + long();
                while Instant::now() < end {
                    for peer in &mut peers {
                        peer.drain(100, Duration::from_millis(5)).await;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Ok(())
            })
            .await
    };
    let result = result.await;
    scene.board.explain(result)
}

/// Statements that the edge has sent to the database by now, as the database's log has them.
fn statements(scene: &Scene) -> Result<usize> {
    let log = std::fs::read(scene.board.stack.log_path(Service::Postgres))?;
    let log = String::from_utf8_lossy(&log);
    Ok(log
        .lines()
        .filter(|line| {
            line.starts_with("millstream_edge") && (line.contains("statement: ") || line.contains("execute "))
        })
        .count())
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_hellos_cost_no_more_than_honest_ones() -> Result<()> {
    const HELLOS: usize = 60;
    let seed = "INSERT INTO members VALUES ('caller', 'calls', 'caller');";
    let logged =
        |builder: Builder| builder.postgres_setting("log_statement", "all").postgres_setting("log_line_prefix", "%u ");
    let scene = Scene::with(seed, logged).await?;
    let result = async {
        let held = scene.snapshot("caller").await?;
        let token = scene.token("caller");
        let count = async |claim: &Value| -> Result<f64> {
            let before = statements(&scene)?;
            for _ in 0..HELLOS / 10 {
                let calls = (0..10).map(async |_| {
                    let mut peer = Peer::connect(&scene.url()).await?;
                    let mut hello = held.hello(Uuid::now_v7(), &token);
                    for (name, value) in claim.as_object().context("a claim")? {
                        hello[name] = value.clone();
                    }
                    peer.say(hello).await?;
                    // Its answer, whatever that is.
                    let _ = peer.next(Duration::from_secs(10)).await;
                    anyhow::Ok(())
                });
                try_join_all(calls).await?;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            Ok((statements(&scene)? - before) as f64 / HELLOS as f64)
        };
        // With rows to be sent, and without: the dearer of both.
        let honest = count(&json!({})).await?.max(count(&json!({"position": null})).await?);
        println!("  an honest hello costs {honest:.1} statements");
        ensure!(honest >= 1.0, "the log tells of {honest} statements for each hello: it is not read right");
        let position = |stream_seq: u64, lsn: &str| {
            let mut position = json!(held.position);
            (position["stream_seq"], position["lsn"]) = (stream_seq.into(), lsn.into());
            json!({ "position": position })
        };
        let scopes: Vec<String> = (0..4_000).map(|n| format!("project:not-mine-{n:030}")).collect();
        let claims = [
            ("confirmed_seq 2^40", json!({"confirmed_seq": 1_u64 << 40})),
            ("confirmed_seq 2^64 - 1", json!({"confirmed_seq": u64::MAX})),
            ("confirmed_seq 1", json!({"confirmed_seq": 1})),
            ("a position far ahead", position(1 << 50, "FFFFFFF/0")),
            ("a position with another LSN", position(1, "0/1")),
            ("another epoch", json!({"position": {"epoch": Uuid::nil(), "stream_seq": 1, "lsn": "0/1"}})),
            ("4,000 scopes", json!({ "scopes": scopes })),
            ("a layout of its own", json!({"schema": "zzz"})),
            (
                "all of them",
                json!({"confirmed_seq": u64::MAX, "scopes": scopes, "schema": "zzz", "position": position(1 << 50, "0/1")["position"]}),
            ),
            ("a token of nobody", json!({"token": "zzz", "confirmed_seq": 1_u64 << 40})),
        ];
        let mut wrong = Vec::new();
        scene
            .check("hellos with forged claims", Allow::Nothing, async {
                for (name, claim) in &claims {
                    let cost = count(claim).await?;
                    println!("  {name}: {cost:.1} statements a hello");
                    let limit = if name.contains("nobody") { 0.2 } else { 2.0 * honest };
                    if cost > limit {
                        wrong.push(format!("{name}: {cost:.1} statements a hello, an honest one {honest:.1}"));
                    }
                }
                ensure!(wrong.is_empty(), "{}", wrong.join("; "));
                Ok(())
            })
            .await
    };
    let result = result.await;
    scene.board.explain(result)
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_sessions_take_nothing_from_others() -> Result<()> {
    const SESSIONS: usize = 500;
    let seed = "INSERT INTO members VALUES ('many', 'many', 'many'); INSERT INTO tasks SELECT 'many-' || n, 'many', 'x' FROM generate_series(1, 20) AS n;";
    let one = [("500 sessions of one user", ())];
    every(seed, Allow::Nothing, one, async |scene: &Scene, (): ()| {
        let mut peers = Vec::new();
        let (mut welcome, mut refused) = (0, std::collections::BTreeMap::new());
        for _ in 0..SESSIONS / 20 {
            let some = (0..20).map(async |_| {
                let mut peer = Peer::connect(&scene.url()).await?;
                peer.say(millstream_tests::raw::hello(Uuid::now_v7(), &scene.token("many"))).await?;
                let word = match peer.next(Duration::from_secs(10)).await {
                    Heard::Text(text) if text.contains("\"welcome\"") => "welcome".to_owned(),
                    Heard::Text(text) => {
                        serde_json::from_str::<Value>(&text)?["code"].as_str().unwrap_or("?").to_owned()
                    }
                    _ => "closed".to_owned(),
                };
                anyhow::Ok((peer, word))
            });
            // Also where no socket is given: a limit of them is a way out.
            for (peer, word) in join_all(some).await.into_iter().flatten() {
                if word == "welcome" {
                    welcome += 1;
                    peers.push(peer);
                } else {
                    *refused.entry(word).or_insert(0) += 1;
                }
            }
        }
        println!("  {welcome} of {SESSIONS} were welcome; the others: {refused:?}");
        // A new project of theirs, for all at once; and one of somebody else's meanwhile.
        scene
            .sql("INSERT INTO tasks VALUES ('more', 'more', 'x'); INSERT INTO members VALUES ('more', 'more', 'many')")
            .await?;
        let took = joins(scene, "somebody-else", "somebody-elses").await?;
        println!("  another's new project: {took:.1?}");
        ensure!(took <= SMALL_SNAPSHOT, "another's new project took {took:.1?} beside {welcome} sessions of one user");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_sockets_without_a_token_take_nothing_from_others() -> Result<()> {
    const SOCKETS: usize = 400;
    const BYTES: usize = 1 << 20;
    // A text of a length, of which the last byte never comes; as one frame, and in fragments.
    let variants = [("as one frame", BYTES), ("in fragments of 64 KiB", 64 << 10)];
    let variants = variants.map(|(name, fragment)| (format!("400 sockets with 1 MiB {name} and no token"), fragment));
    every("", Allow::Nothing, variants, async |scene: &Scene, fragment: usize| {
        let send = (0..SOCKETS).map(async |_| {
            let Ok(mut peer) = Peer::connect(&scene.url()).await else { return None };
            let stream = peer.stream();
            let (mut sent, mut first) = (0, true);
            while sent < BYTES {
                let last = sent + fragment >= BYTES;
                let opcode = u8::from(first) | if last { 0x80 } else { 0 };
                let mut frame = vec![opcode, 0x80 | 127];
                frame.extend((fragment as u64).to_be_bytes());
                frame.extend([0; 4]);
                frame.resize(frame.len() + fragment - usize::from(last), b'x');
                let written = tokio::time::timeout(Duration::from_secs(3), stream.write_all(&frame)).await;
                if !matches!(written, Ok(Ok(()))) {
                    break;
                }
                (sent, first) = (sent + fragment, false);
            }
            Some(peer)
        });
        let peers: Vec<Peer> = join_all(send).await.into_iter().flatten().collect();
        println!("  {} sockets were given", peers.len());
        tokio::time::sleep(Duration::from_secs(5)).await;
        Ok(())
    })
    .await
}
