//! Trace contexts that are none: whatever a client sends as one, replication goes on, now and after restarts of everything.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millstream_stack::Service;
use uuid::Uuid;

use super::peer::Peer;
use super::{Allow, HEALED, Scene, every, insert, scaled, submit, verdict};

/// The broker takes headers of 64 KB: with what else is in them, these are around it and beyond.
fn forms() -> Vec<(&'static str, String)> {
    let hex = |count: usize| "0123456789abcdef".repeat(count / 16);
    vec![
        ("66,000 letters", "x".repeat(66_000)),
        ("60,000 hexadecimal digits", hex(60_000)),
        ("a version and 65,500 hexadecimal digits", format!("00-{}", hex(65_500))),
        ("66,000 dashes", "-".repeat(66_000)),
        ("control characters", "00-\r\nMs-Last: 1\r\n\r\n\u{1}\u{7f}\u{2028}-01".to_owned()),
        ("40,000 characters of three bytes", "\u{20ac}".repeat(40_000)),
        ("a context in upper case, twice", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00F067AA0BA902B7-01".repeat(2)),
        ("one of zeros", format!("00-{}-{}-01", "0".repeat(32), "0".repeat(16))),
        ("400,000 hexadecimal digits", hex(400_000)),
        ("nothing", String::new()),
    ]
}

/// In changes that are applied, and in refused ones, which leave only a word of their failure in the stream.
async fn send(scene: &Scene, (user, table, form): (&str, &str, String)) -> Result<()> {
    let mut peer = scene.open(user).await?;
    for client_seq in 1..=3 {
        let id = Uuid::now_v7().to_string();
        let row = insert(table, &[("id", &id), ("project_id", "neighbours"), (second(table), "x")]);
        let mut frame = submit(client_seq, Uuid::nil(), vec![row]);
        frame["traceparent"] = form.clone().into();
        peer.say(frame).await?;
    }
    // A verdict, or a refusal of the frame: nothing else is asked for here.
    let _ = verdict(&mut peer, 3, Duration::from_secs(1)).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    Ok(())
}

fn second(table: &str) -> &'static str {
    if table == "docs" { "note" } else { "title" }
}

#[tokio::test(flavor = "multi_thread")]
async fn trace_contexts_that_are_none_stop_nobody() -> Result<()> {
    // By a stranger, whose changes are refused, and by a member, whose changes are applied.
    let mut variants = Vec::new();
    for (user, table) in [("stranger", "tasks"), ("neighbour-0", "docs")] {
        for forms in forms().chunks(scaled(usize::MAX, 1)) {
            let names: Vec<&str> = forms.iter().map(|(name, _)| *name).collect();
            variants.push((format!("traceparent of a {user}: {}", names.join(", ")), (user, table, forms.to_vec())));
        }
    }
    every(
        "",
        Allow::Nothing,
        variants,
        async |scene: &Scene, (user, table, forms): (&str, &str, Vec<(&str, String)>)| {
            for (_, form) in forms {
                send(scene, (user, table, form)).await?;
            }
            Ok(())
        },
    )
    .await
}

/// What a poisoned log does at the next start.
#[tokio::test(flavor = "multi_thread")]
async fn trace_contexts_that_are_none_stop_no_restart() -> Result<()> {
    let mut scene = Scene::start("").await?;
    let result = async {
        for (_, form) in forms() {
            send(&scene, ("stranger", "tasks", form)).await?;
        }
        // Also in what the services find on the broker when they come back.
        for service in Service::OWN.into_iter().rev() {
            scene.board.kill_and_restart(service).await?;
        }
        scene.healed(Instant::now(), HEALED).await.context("after restarts of all services")?;
        scene.board.kill_and_restart(Service::Nats).await?;
        // Killed, its children would still hold what the next one needs.
        scene.board.stack.stop_postgres().await;
        scene.board.stack.start_postgres().await?;
        scene.healed(Instant::now(), 2 * HEALED).await.context("after restarts of broker and database")?;
        Ok(())
    };
    let result = result.await;
    scene.board.explain(result)
}

/// What others are sent of a trace context that somebody made up is nothing, and never large.
#[tokio::test(flavor = "multi_thread")]
async fn trace_contexts_reach_others_whole_or_not_at_all() -> Result<()> {
    let scene = Scene::start("").await?;
    let result = async {
        let mut witness = scene.open("newcomer").await?;
        // What was there before. (Neighbours write all the time: it is never silent.)
        let start = Instant::now();
        while !matches!(witness.next(Duration::from_secs(1)).await, super::peer::Heard::Text(text) if text.contains("\"snapshot_end\""))
        {
            ensure!(start.elapsed() < HEALED, "the witness gets no snapshot");
        }
        let mut author: Peer = scene.open("neighbour-0").await?;
        for (client_seq, (name, form)) in (1..).zip(forms()) {
            let id = format!("text-trace-{client_seq}");
            let mut frame =
                submit(client_seq, Uuid::nil(), vec![insert("docs", &[("id", &id), ("project_id", "neighbours")])]);
            frame["traceparent"] = form.clone().into();
            author.say(frame).await?;
            let refused = verdict(&mut author, client_seq, Duration::from_secs(5)).await.context(name)?;
            ensure!(refused == "applied", "{name}: {refused}: a hint is no reason to refuse a change");
            let end = Instant::now() + Duration::from_secs(5);
            loop {
                let super::peer::Heard::Text(text) = witness.next(Duration::from_millis(100)).await else {
                    ensure!(Instant::now() < end, "{name}: its rows do not arrive");
                    continue;
                };
                if text.contains(&id) {
                    ensure!(text.len() < 2_000, "{name}: {} bytes are sent to others", text.len());
                    ensure!(!text.contains("traceparent"), "{name}: it is sent to others");
                    break;
                }
            }
        }
        Ok(())
    };
    let result = result.await;
    scene.board.explain(result)
}
