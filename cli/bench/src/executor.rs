//! `millstream bench executor`: the real executor beside the floor, the same batches by plain SQL from one connection on
//! tables without permissions, clocks, triggers, ledger and origin. On a private Postgres with production durability.
//!
//! The two take turns in short slices, so that what else the machine does hits both alike.

mod plain;
mod workload;

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use millstream_changes::direct::Direct;
use millstream_provision::keys::Role;
use millstream_schemas::stream::{TransactionResult, Verdict};
use millstream_stack::Stack;
use serde::Serialize;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Connection as _};
use uuid::Uuid;

use self::plain::Way;
use self::workload::{Batch, Workload};
use crate::cpu;
use crate::error::Error;
use crate::figures::round;
use crate::rig::{finish, folder};

const CONFIG: &str = include_str!("executor/millstream.toml");
const SCHEMA: &str = include_str!("executor/schema.sql");
/// Changes in a slice: a fraction of a second.
const SLICE_CHANGES: usize = 2_000;
/// Slices before the measurement, in which each way of plain SQL is tried.
const WARM_UP_ROUNDS: usize = 12;
/// Names of the two connections.
const EXECUTOR: &str = "bench-executor";
const FLOOR: &str = "bench-floor";

/// Flags of `millstream bench executor`.
#[derive(clap::Args, Clone, Debug)]
pub struct ExecutorArgs {
    /// Print one JSON object instead of text
    #[arg(long)]
    pub json: bool,
    /// Transactions a batch, each of one change
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub batch: u64,
    /// Length of the measurement in seconds
    #[arg(long, default_value_t = 30)]
    pub seconds: u64,
    /// Clients that the changes are of, each with a user of its own
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub clients: u64,
    /// Percent of changes that violate something, in the slices with bad changes
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub bad: u8,
    /// Folder for the data, to choose the disk; removed afterwards. Default: a temporary one
    #[arg(long)]
    pub dir: Option<std::path::PathBuf>,
}

/// The figures that the bench prints.
#[derive(Debug, Serialize)]
struct ExecutorReport {
    changes_per_s: f64,
    floor_changes_per_s: f64,
    ratio: f64,
    batch: u64,
    bad: Bad,
    batches: u64,
    /// The fastest way of plain SQL, and what each did in the warm-up.
    floor: Way,
    floor_ways: BTreeMap<Way, f64>,
    wal_bytes_per_change: Pair,
    server_us_per_change: Pair,
    other_cores: f64,
}

/// With a share of changes that are rejected.
#[derive(Debug, Serialize)]
struct Bad {
    share: f64,
    /// Rejected ones are counted too.
    changes_per_s: f64,
    /// To the floor.
    ratio: f64,
    /// To the executor without bad changes.
    of_clean: f64,
}

#[derive(Debug, Serialize)]
struct Pair {
    executor: f64,
    floor: f64,
}

/// What one side did in all its slices.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    changes: u64,
    batches: u64,
    time: Duration,
    wal_bytes: u64,
    cpu_us: u64,
}

impl Sum {
    fn changes_per_s(&self) -> f64 {
        self.changes as f64 / self.time.as_secs_f64().max(1e-9)
    }

    fn per_change(&self, amount: u64) -> f64 {
        round(amount as f64 / self.changes.max(1) as f64)
    }
}

/// Runs it.
pub async fn run(args: ExecutorArgs) -> Result<(), Error> {
    if args.seconds == 0 {
        return Err(Error::Flag("--seconds must be at least 1"));
    }
    let folder = folder(args.dir.as_deref(), CONFIG)?;
    let config = folder.path().join("millstream.toml");
    eprintln!("starting a private Postgres …");
    let stack = Stack::builder()
        .dir(folder.path().join("stack"))
        .app_schema(SCHEMA)
        .config(&config)
        .database_only()
        .start()
        .await
        .map_err(Error::Stack)?;
    let outcome = measure(&stack, &config, &args).await;
    finish(stack, outcome, args.json, print).await
}

async fn measure(stack: &Stack, config: &Path, args: &ExecutorArgs) -> Result<ExecutorReport, Error> {
    let mut bench = Bench::new(stack, config, args).await?;
    eprintln!("warm-up: {WARM_UP_ROUNDS} rounds …");
    let mut ways: BTreeMap<Way, Sum> = BTreeMap::new();
    for number in 0..WARM_UP_ROUNDS {
        let way = Way::ALL[number % Way::ALL.len()];
        let mut ignored = Sum::default();
        let batches = bench.batches(0.0);
        bench.plain(way, &batches, ways.entry(way).or_default()).await?;
        bench.execute(batches, &mut ignored).await?;
        bench.bad(way, &mut ignored).await?;
    }
    // As autovacuum does before long: until then the plans of the ledger's statements are those of an empty table.
    sqlx::raw_sql("ANALYZE").execute(&mut bench.watch).await.map_err(Error::postgres("prepare the tables"))?;
    let floor_ways: BTreeMap<Way, f64> = ways.iter().map(|(way, sum)| (*way, round(sum.changes_per_s()))).collect();
    let fastest = floor_ways.iter().max_by(|a, b| a.1.total_cmp(b.1)).map_or(Way::Unnest, |(way, _)| *way);

    eprintln!("measuring for {} s …", args.seconds);
    let watch = cpu::Watch::start();
    let (mut executor, mut floor, mut bad) = (Sum::default(), Sum::default(), Sum::default());
    let deadline = Instant::now() + Duration::from_secs(args.seconds);
    let mut executor_first = true;
    while Instant::now() < deadline {
        let batches = bench.batches(0.0);
        // The one that comes first finds the caches as the bad slice left them.
        if executor_first {
            let goods: Vec<_> = batches.iter().map(|batch| batch.good.clone()).collect();
            bench.execute(batches, &mut executor).await?;
            bench.plain_goods(fastest, &goods, &mut floor).await?;
        } else {
            bench.plain(fastest, &batches, &mut floor).await?;
            bench.execute(batches, &mut executor).await?;
        }
        bench.bad(fastest, &mut bad).await?;
        executor_first = !executor_first;
    }
    let other_cores = round(watch.other_cores());
    eprintln!("comparing the tables …");
    bench.verify().await?;
    let ratio = |sum: &Sum, to: &Sum| round(sum.changes_per_s() / to.changes_per_s().max(1e-9));
    Ok(ExecutorReport {
        changes_per_s: round(executor.changes_per_s()),
        floor_changes_per_s: round(floor.changes_per_s()),
        ratio: ratio(&executor, &floor),
        batch: args.batch,
        bad: Bad {
            share: bench.bad_share,
            changes_per_s: round(bad.changes_per_s()),
            ratio: ratio(&bad, &floor),
            of_clean: ratio(&bad, &executor),
        },
        batches: executor.batches,
        floor: fastest,
        floor_ways,
        wal_bytes_per_change: Pair {
            executor: executor.per_change(executor.wal_bytes),
            floor: floor.per_change(floor.wal_bytes),
        },
        server_us_per_change: Pair {
            executor: executor.per_change(executor.cpu_us),
            floor: floor.per_change(floor.cpu_us),
        },
        other_cores,
    })
}

struct Bench {
    executor: Direct,
    floor: PgConnection,
    /// Looks on.
    watch: PgConnection,
    workload: Workload,
    batch: usize,
    bad_share: f64,
}

impl Bench {
    async fn new(stack: &Stack, config: &Path, args: &ExecutorArgs) -> Result<Bench, Error> {
        let connect = Error::postgres("connect");
        let mut watch = PgConnection::connect(&stack.postgres_url()).await.map_err(connect)?;
        let seed = workload::seed(args.clients as usize);
        for sql in [seed.as_str(), "VACUUM ANALYZE", "CHECKPOINT"] {
            sqlx::raw_sql(AssertSqlSafe(sql.to_owned()))
                .execute(&mut watch)
                .await
                .map_err(Error::postgres("prepare the tables"))?;
        }
        let options = |url: String, name: &str| {
            let args = millstream_runtime::postgres::Args { database_url: url };
            millstream_runtime::postgres::options(&args, "bench")
                .map(|options| options.application_name(name))
                .map_err(Error::postgres("connect"))
        };
        let executor = Direct::connect(options(stack.postgres_url_of(Role::Changes), EXECUTOR)?, config.to_path_buf())
            .await
            .map_err(|error| Error::Executor(Box::new(error)))?;
        // Planned once: the plans are plain, and planning is a good part of such short statements.
        let planned_once = [("plan_cache_mode", "force_generic_plan")];
        let floor = PgConnection::connect_with(&options(stack.postgres_url(), FLOOR)?.options(planned_once))
            .await
            .map_err(Error::postgres("connect"))?;
        let workload = Workload::new(args.clients as usize);
        Ok(Bench {
            executor,
            floor,
            watch,
            workload,
            batch: args.batch as usize,
            bad_share: f64::from(args.bad) / 100.0,
        })
    }

    /// The batches of a slice.
    fn batches(&mut self, bad_share: f64) -> Vec<Batch> {
        let count = (SLICE_CHANGES / self.batch).max(1);
        (0..count).map(|_| self.workload.batch(self.batch, bad_share)).collect()
    }

    /// A slice of the executor.
    async fn execute(&mut self, batches: Vec<Batch>, sum: &mut Sum) -> Result<(), Error> {
        let before = self.sample(EXECUTOR).await?;
        sum.batches += batches.len() as u64;
        for batch in batches {
            let (count, bad) = (batch.submissions.len(), batch.bad);
            let began = Instant::now();
            let results = self.executor.execute(batch.submissions, false).await;
            sum.time += began.elapsed();
            sum.changes += count as u64;
            let results = results.map_err(|error| Error::Executor(Box::new(error)))?;
            expect(&results, count, bad)?;
        }
        self.add(EXECUTOR, before, sum).await
    }

    /// A slice of plain SQL.
    async fn plain(&mut self, way: Way, batches: &[Batch], sum: &mut Sum) -> Result<(), Error> {
        let goods: Vec<_> = batches.iter().map(|batch| batch.good.clone()).collect();
        self.plain_goods(way, &goods, sum).await
    }

    async fn plain_goods(
        &mut self,
        way: Way,
        batches: &[Vec<millstream_schemas::Change>],
        sum: &mut Sum,
    ) -> Result<(), Error> {
        let before = self.sample(FLOOR).await?;
        sum.batches += batches.len() as u64;
        for batch in batches {
            let began = Instant::now();
            plain::apply(&mut self.floor, way, batch).await?;
            sum.time += began.elapsed();
            sum.changes += batch.len() as u64;
        }
        self.add(FLOOR, before, sum).await
    }

    /// A slice of the executor with bad changes; plain SQL gets the others, not measured.
    async fn bad(&mut self, way: Way, sum: &mut Sum) -> Result<(), Error> {
        let batches = self.batches(self.bad_share);
        self.plain(way, &batches, &mut Sum::default()).await?;
        self.execute(batches, sum).await
    }

    /// CPU time of a connection's backend in microseconds, and the end of the WAL in bytes.
    async fn sample(&mut self, name: &str) -> Result<(u64, u64), Error> {
        let (pid, wal): (Option<i32>, i64) = sqlx::query_as(
            "SELECT (SELECT min(pid) FROM pg_stat_activity WHERE application_name = $1), (pg_current_wal_insert_lsn() - '0/0')::int8",
        )
        .bind(name)
        .fetch_one(&mut self.watch)
        .await
        .map_err(Error::postgres("look on"))?;
        Ok((pid.map_or(0, |pid| cpu::micros(pid as u32)), wal as u64))
    }

    async fn add(&mut self, name: &str, before: (u64, u64), sum: &mut Sum) -> Result<(), Error> {
        let after = self.sample(name).await?;
        sum.cpu_us += after.0.saturating_sub(before.0);
        sum.wal_bytes += after.1.saturating_sub(before.1);
        Ok(())
    }

    /// Both sides hold the same rows; else the numbers mean nothing.
    async fn verify(&mut self) -> Result<(), Error> {
        const COLUMNS: &str = "id, project_id, title, done, position";
        let differ: i64 = sqlx::query_scalar(AssertSqlSafe(format!(
            "SELECT (SELECT count(*) FROM (SELECT {COLUMNS} FROM public.tasks EXCEPT SELECT {COLUMNS} FROM plain.tasks) a)
                  + (SELECT count(*) FROM (SELECT {COLUMNS} FROM plain.tasks EXCEPT SELECT {COLUMNS} FROM public.tasks) b)",
        )))
        .fetch_one(&mut self.watch)
        .await
        .map_err(Error::postgres("compare the tables"))?;
        if differ == 0 {
            return Ok(());
        }
        Err(Error::NotConverged(format!("{differ} rows of the executor and of plain SQL differ")))
    }
}

/// As many rejections as there were bad changes, and nothing else but success.
fn expect(results: &[(Uuid, TransactionResult)], count: usize, bad: usize) -> Result<(), Error> {
    let rejected = results.iter().filter(|(_, result)| result.verdict == Verdict::Rejected).count();
    let applied = results.iter().filter(|(_, result)| result.verdict == Verdict::Applied).count();
    if (rejected, applied) == (bad, count - bad) {
        return Ok(());
    }
    let first = results.iter().find_map(|(_, result)| result.failure.as_ref());
    Err(Error::NotConverged(format!(
        "{applied} applied, {rejected} rejected of {count} with {bad} bad changes; first failure {first:?}"
    )))
}

fn print(report: &ExecutorReport) {
    let ExecutorReport { bad, wal_bytes_per_change: wal, server_us_per_change: cpu, .. } = report;
    println!("executor   {} changes/s in batches of {}", report.changes_per_s, report.batch);
    println!("floor      {} changes/s ({:?} of {:?})", report.floor_changes_per_s, report.floor, report.floor_ways);
    println!("ratio      {}", report.ratio);
    println!(
        "{} % bad    {} changes/s, {} of the floor, {} of clean batches",
        round(bad.share * 100.0),
        bad.changes_per_s,
        bad.ratio,
        bad.of_clean
    );
    println!("a change   executor {} us in Postgres, {} bytes of WAL", cpu.executor, wal.executor);
    println!("           floor {} us, {} bytes", cpu.floor, wal.floor);
    println!("cores used by other programs {}", report.other_cores);
}
