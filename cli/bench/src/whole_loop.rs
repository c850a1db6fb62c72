//! `millstream bench loop`: from a write on one client to the applied row on another.

use std::path::Path;

use millstream_stack::{Service, Stack};
use serde::Serialize;

use crate::error::Error;
use crate::figures::{Percentiles, round};
use crate::load::LoopArgs;
use crate::rig::{CONFIG, finish, folder, start};
use crate::{cpu, floor, load, verify};

/// The figures that the bench prints.
#[derive(Debug, Serialize)]
struct LoopReport {
    latency_ms: Percentiles,
    changes_per_s: f64,
    clients: usize,
    changes_per_transaction: u32,
    floor: floor::Floor,
    cpu_us_per_change: cpu::PerChange,
    other_cores: f64,
}

/// Runs it.
pub async fn run(args: LoopArgs) -> Result<(), Error> {
    if args.clients < 2 || !args.clients.is_multiple_of(2) {
        return Err(Error::Flag("--clients must be an even number from 2 on"));
    }
    if args.rate == 0 || args.latency_seconds == 0 || args.throughput_seconds == 0 || args.changes_per_transaction == 0
    {
        return Err(Error::Flag("--rate, the seconds and --changes-per-transaction must be at least 1"));
    }
    let folder = folder(args.dir.as_deref(), CONFIG)?;
    let mut stack = start(&folder).await?;
    let outcome = measure(&mut stack, &args, folder.path()).await;
    finish(stack, outcome, args.json, print).await
}

async fn measure(stack: &mut Stack, args: &LoopArgs, folder: &Path) -> Result<LoopReport, Error> {
    eprintln!("measuring the floor …");
    let floor = floor::measure(stack).await?;
    load::prepare(stack, args.clients).await?;
    let pids: Vec<(Service, u32)> =
        Service::ALL.into_iter().filter_map(|service| stack.pid(service).map(|pid| (service, pid))).collect();
    let watch = cpu::Watch::start();

    eprintln!("latency: {}/s for {} s …", args.rate, args.latency_seconds);
    let clients = load::open(stack, folder, args.clients).await?;
    let latency = load::latency(&clients, args).await?;

    eprintln!("throughput: {} clients for {} s …", args.clients, args.throughput_seconds);
    let throughput = load::throughput(&clients, args, &pids).await?;
    let other_cores = watch.other_cores();

    eprintln!("comparing every client with Postgres …");
    verify::converged(stack, &clients, load::SETTLE_LIMIT).await?;
    for client in clients {
        client.client.close().await.map_err(Error::client("close"))?;
    }
    let ms = |quantile: f64| round(latency.value_at_quantile(quantile) as f64 / 1000.0);
    Ok(LoopReport {
        latency_ms: Percentiles { p50: ms(0.50), p95: ms(0.95), p99: ms(0.99) },
        changes_per_s: round(throughput.changes_per_s()),
        clients: args.clients,
        changes_per_transaction: args.changes_per_transaction,
        floor,
        cpu_us_per_change: throughput.cpu_us_per_change(),
        other_cores: round(other_cores),
    })
}

fn print(report: &LoopReport) {
    let LoopReport { latency_ms, floor, cpu_us_per_change: cpu, .. } = report;
    println!(
        "write on A -> applied on B   p50 {} ms   p95 {} ms   p99 {} ms",
        latency_ms.p50, latency_ms.p95, latency_ms.p99
    );
    println!(
        "whole loop                   {} changes/s with {} clients, {} change(s) a transaction",
        report.changes_per_s, report.clients, report.changes_per_transaction
    );
    println!(
        "floor                        Postgres {} commits/s with {} connections, {} ms for a single one; JetStream {} acks/s one at a time",
        floor.postgres_commits_per_s,
        floor::CONNECTIONS,
        floor.postgres_commit_ms,
        floor.jetstream_acks_per_s
    );
    println!(
        "CPU per change (us)          edge {}  changes {}  replication {}  postgres {}  nats {}  clients {}",
        cpu.edge, cpu.changes, cpu.replication, cpu.postgres, cpu.nats, cpu.clients
    );
    println!("cores used by other programs {}", report.other_cores);
}
