//! Changes on which the database fails in a way that nobody thought of: a word to their author, and nothing for the others.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millstream_schemas::frame::{ErrorFrame, ServerFrame};
use uuid::Uuid;

use super::peer::Peer;
use super::{Allow, HEALED, Scene, client_in, every, insert, scaled, submit};

/// A trigger that fails as it is told.
const TRIGGER: &str = "
CREATE FUNCTION odd() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.odd = 'deep' THEN PERFORM odd_depth(); END IF;
    IF NEW.odd = 'rows' THEN PERFORM (SELECT x FROM generate_series(1, 2) AS x); END IF;
    IF length(NEW.odd) = 5 THEN RAISE EXCEPTION USING ERRCODE = NEW.odd, MESSAGE = 'odd'; END IF;
    RETURN NEW;
END $$;
CREATE FUNCTION odd_depth() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM odd_depth(); END $$;
CREATE TRIGGER odd BEFORE INSERT ON docs FOR EACH ROW EXECUTE FUNCTION odd();
INSERT INTO members VALUES ('author', 'odd', 'author', 'owner');
";
/// Changes of one client in a row.
const MANY: u64 = 40;
/// For so long at least.
const LONG: Duration = Duration::from_secs(3);
/// Less than a user's share of submitted bytes.
const MOST_BYTES: usize = 12 << 20;

/// Sends a change of a client in the partition of a neighbour many times over: each gets a word.
async fn send(scene: &Scene, (column, value, neighbour): (&str, String, usize)) -> Result<()> {
    let mut peer = Peer::connect(&scene.url()).await?;
    let id = client_in(neighbour as u16 * 21);
    peer.say(millstream_tests::raw::hello(id, &scene.token("author"))).await?;
    peer.welcome().await?;
    let mut words = std::collections::BTreeMap::new();
    let (begun, mut sent, mut told, mut bytes, mut frames) = (Instant::now(), 0, 0, 0, Vec::new());
    // Again and again, so that there are enough writes of neighbours to speak of one in a hundred; but no more than a user may send
    // at once.
    while begun.elapsed() < LONG && bytes < MOST_BYTES {
        for client_seq in sent + 1..=sent + MANY {
            let id = Uuid::now_v7().to_string();
            let row = insert("docs", &[("id", &id), ("project_id", "odd"), (column, &value)]);
            let frame = submit(client_seq, Uuid::nil(), vec![row]).to_string();
            bytes += frame.len();
            peer.text(frame.clone()).await?;
            frames.push(frame);
        }
        sent += MANY;
        let end = Instant::now() + HEALED + Duration::from_secs(5);
        while told < sent && Instant::now() < end {
            let Ok(frame) = peer.frame(end.duration_since(Instant::now())).await else { break };
            match frame.context("closed")? {
                ServerFrame::Confirmed(confirmed) => {
                    told = confirmed.client_seq;
                    for failure in confirmed.failed {
                        *words.entry(failure.code.to_string()).or_insert(0) += 1;
                    }
                }
                // The broker is slow, on a busy machine: again from there, as any client does it.
                ServerFrame::Error(ErrorFrame { client_seq: Some(next), retry_after_ms, fatal: false, .. }) => {
                    tokio::time::sleep(Duration::from_millis(retry_after_ms.unwrap_or(0))).await;
                    for frame in &frames[next as usize - 1..] {
                        peer.text(frame.clone()).await?;
                    }
                }
                _ => {}
            }
        }
        ensure!(told == sent, "only {told} of {sent} changes got a word within {HEALED:?}: {words:?}");
    }
    println!("  {told} of {sent} settled: {words:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn poison_delays_only_its_author() -> Result<()> {
    let nested = |open: &str, close: &str, depth: usize| open.repeat(depth) + &close.repeat(depth);
    let variants: Vec<(String, (&str, String, usize))> = vec![
        ("json of 20,000 brackets".into(), ("plain", "[".repeat(20_000), 0)),
        ("jsonb of 20,000 brackets".into(), ("body", "[".repeat(20_000), 1)),
        ("jsonb of 20,000 arrays".into(), ("body", nested("[", "]", 20_000), 2)),
        ("a domain of 8,000 objects".into(), ("wide", nested("{\"a\":", "}", 8_000).replace(":}", ":1}"), 0)),
        ("a trigger without end".into(), ("odd", "deep".into(), 1)),
        ("a trigger's query of two rows".into(), ("odd", "rows".into(), 2)),
    ];
    let named = variants.into_iter().map(|(name, variant)| (format!("poison: {name}"), variant));
    every(TRIGGER, Allow::Nothing, named, send).await
}

/// Such changes a second, of one client, in a run in which others are measured exactly.
const A_SECOND: u64 = 10;
/// Half of that run is without them; `p99` of the others may grow by this factor, or by what is told from noise.
const FACTOR: f64 = 1.3;

#[tokio::test(flavor = "multi_thread")]
async fn poison_at_a_steady_rate_delays_only_its_author() -> Result<()> {
    let long = scaled(Duration::from_secs(5), Duration::from_secs(30));
    let mut told = Vec::new();
    // Anybody's writes take long now and then on a shared machine, but not twice in a row.
    for _ in 0..2 {
        let scene = Scene::start(TRIGGER).await?;
        let mut peer = Peer::connect(&scene.url()).await?;
        // Beside a neighbour, in the same partition.
        peer.say(millstream_tests::raw::hello(client_in(0), &scene.token("author"))).await?;
        peer.welcome().await?;
        let begun = Instant::now();
        tokio::time::sleep(long).await;
        let start = Instant::now();
        let mut ticks = tokio::time::interval(Duration::from_secs(1) / A_SECOND as u32);
        let (mut client_seq, brackets) = (0, "[".repeat(20_000));
        while start.elapsed() < long {
            ticks.tick().await;
            client_seq += 1;
            let odd = match STATES.get(client_seq as usize % (STATES.len() + 3)) {
                Some(state) => ("odd", *state),
                None => *[("odd", "deep"), ("odd", "rows"), ("plain", &brackets)]
                    .get(client_seq as usize % 3)
                    .context("one of three")?,
            };
            let id = Uuid::now_v7().to_string();
            let row = insert("docs", &[("id", &id), ("project_id", "odd"), odd]);
            peer.say(submit(client_seq, Uuid::nil(), vec![row])).await?;
        }
        let end = Instant::now();
        let last = super::verdict(&mut peer, client_seq, HEALED).await?;
        ensure!(last != "applied", "the last of {client_seq} changes was applied");
        let (before, during) = (scene.neighbours.between(begun, start), scene.neighbours.between(start, end));
        println!("poison, {A_SECOND} changes a second: before: {before}; during: {during}");
        let limit = |before: Duration| before.mul_f64(FACTOR).max(before + super::noise());
        if during.p99.0 <= limit(before.p99.0) && during.p99.1 <= limit(before.p99.1) {
            return Ok(());
        }
        told.push(format!("before: {before}; during: {during}"));
    }
    anyhow::bail!("neighbours' writes take longer: {}", told.join("; again: "))
}

/// SQLSTATEs of many classes, raised by an application's trigger: some that Postgres itself never raises, and some that it
/// raises for faults that pass. Whether their authors wait is another question; the neighbours do not.
const STATES: [&str; 16] = [
    "54001", "54023", "0A000", "21000", "55000", "ABCDE", "XX000", "25P02", "57014", "P0004", "40P01", "53200",
    "58030", "26000", "3D000", "XX001",
];

#[tokio::test(flavor = "multi_thread")]
async fn poison_of_any_sqlstate_delays_only_its_author() -> Result<()> {
    let one = [("poison: triggers that raise 16 SQLSTATEs", ())];
    every(TRIGGER, Allow::Nothing, one, async |scene: &Scene, (): ()| {
        let mut peers = Vec::new();
        for (n, state) in STATES.into_iter().enumerate() {
            let mut peer = Peer::connect(&scene.url()).await?;
            let id = client_in((n % 3) as u16 * 21);
            peer.say(millstream_tests::raw::hello(id, &scene.token("author"))).await?;
            peer.welcome().await?;
            for client_seq in 1..=5 {
                let id = Uuid::now_v7().to_string();
                let row = insert("docs", &[("id", &id), ("project_id", "odd"), ("odd", state)]);
                peer.say(submit(client_seq, Uuid::nil(), vec![row])).await?;
            }
            peers.push(peer);
        }
        tokio::time::sleep(HEALED).await;
        Ok(())
    })
    .await
}
