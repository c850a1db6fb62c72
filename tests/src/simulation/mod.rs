//! Requirements 40 to 50 and the promises G1 to G4, by simulation: clients with the real outbox, staging and store, the
//! real rules of ledger, batch and session, and models of what lies between, under a network, a broker, a database and
//! processes that fail at every step. A seed decides everything, so a failure is replayed by its seed:
//!
//! ```text
//! MILLSTREAM_SEED=123 cargo test -p millstream-tests --lib simulation     (with a trace on stderr)
//! MILLSTREAM_SEEDS=100000 cargo test -p millstream-tests --lib simulation
//! ```

mod broker;
mod checker;
mod client;
mod device;
mod drive;
mod edge;
mod event;
mod parts;
mod postgres;
mod record;
mod trace;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use trace::say;
use world::{POINTS, Points, World};

/// Seeds of an ordinary run.
const SEEDS: u64 = 2_000;
/// Every crash point is hit at least once in so many seeds, on average.
const SEEDS_A_HIT: u64 = 20;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number, not {text:?}")))
}

fn run(seed: u64, trace: bool) -> Result<Points, String> {
    let directory = device::directory();
    let run = || {
        let mut world = World::new(seed, directory.path(), trace);
        world.set_up();
        world.run();
        world.points
    };
    catch_unwind(AssertUnwindSafe(run)).map_err(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast_ref::<&str>().map_or_else(|| "panicked".to_owned(), |text| (*text).to_owned()),
    })
}

#[test]
fn simulation() {
    if let Some(seed) = number("MILLSTREAM_SEED") {
        let result = run(seed, true);
        assert!(result.is_ok(), "seed {seed}: {}", result.err().unwrap_or_default());
        return;
    }
    let seeds = number("MILLSTREAM_SEEDS").unwrap_or(SEEDS);
    let (next, start) = (AtomicU64::new(0), Instant::now());
    let (failed, points) = (Mutex::new(Vec::new()), Mutex::new(Points::default()));
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds || failed.lock().is_ok_and(|failed| failed.len() >= 5) {
                        return;
                    }
                    match run(seed, false) {
                        Ok(hits) => points.lock().expect("points").add(&hits),
                        Err(why) => {
                            say(format_args!("seed {seed} fails"));
                            failed.lock().expect("failures").push((seed, why));
                        }
                    }
                }
            });
        }
    });
    let elapsed = start.elapsed().as_secs_f64();
    let points = points.into_inner().expect("points");
    say(format_args!("simulation: {seeds} seeds in {elapsed:.1} s, {:.0} a second", seeds as f64 / elapsed));
    say(format_args!("crashes by step: {points}"));
    let mut failed = failed.into_inner().expect("failures");
    failed.sort();
    for (seed, why) in &failed {
        say(format_args!("\nseed {seed}: {why}"));
        say(format_args!("replay: MILLSTREAM_SEED={seed} cargo test -p millstream-tests --lib simulation"));
    }
    assert!(failed.is_empty(), "failing seeds: {:?}", failed.iter().map(|(seed, _)| seed).collect::<Vec<_>>());
    for point in POINTS {
        let hits = points.of(point);
        assert!(seeds < SEEDS || hits * SEEDS_A_HIT >= seeds, "step {point} was hit {hits} times only");
    }
}
