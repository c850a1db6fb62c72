//! kill -9 of each part in the middle of a stream of writes: nothing lost, nothing doubled, order kept, converged soon.

use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millstream_client::Client;
use millstream_stack::Service;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::oracle::converged;
use millstream_tests::workload::{JournalEntry, Workload, audit_of, write};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::task::JoinHandle;

/// Kills a test.
const KILLS: u64 = 20;
/// Everything is in order this long after the last restart.
const HEALED: Duration = Duration::from_secs(10);

/// Clients that write until told to stop.
pub struct Load {
    stop: Arc<AtomicBool>,
    writers: Vec<Writer>,
}

/// A client, its user, and the task that writes and returns its journal.
type Writer = (Client, &'static str, JoinHandle<Result<Vec<JournalEntry>>>);

impl Load {
    /// Three clients, each of which shares its projects with the next.
    pub async fn start(board: &Board) -> Result<Load> {
        let stop = Arc::new(AtomicBool::new(false));
        let users = ["alice", "bob", "carol"];
        let mut writers = Vec::new();
        for (index, user) in users.into_iter().enumerate() {
            let client = board.client(user, user).await?;
            let mut workload = Workload::new(user, index as u64, Some(users[(index + 1) % 3]));
            let (writer, stop) = (client.clone(), stop.clone());
            let task = tokio::spawn(async move {
                let mut journal = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    journal.extend(write(&writer, workload.transaction()).await?);
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                Ok(journal)
            });
            writers.push((client, user, task));
        }
        Ok(Load { stop, writers })
    }

    /// Stops writing, waits for everything to settle, and checks every promise.
    pub async fn check(self, board: &Board) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let healing = Instant::now();
        let mut clients = Vec::new();
        for (client, user, task) in self.writers {
            clients.push((client, user, task.await??));
        }
        for (client, user, _) in &clients {
            client.settled(PATIENCE).await.with_context(|| format!("{user}'s queue did not drain"))?;
        }
        for (client, user, _) in &clients {
            converged(board, client, user).await?;
        }
        let healed = healing.elapsed();
        let audit = board.audit().await?;
        let mut total = 0;
        for (client, user, journal) in &clients {
            let effects = audit_of(&audit, journal);
            ensure!(effects.len() == journal.len(), "{user}: {} changes had {} effects", journal.len(), effects.len());
            ensure!(effects == *journal, "{user}: the effects are not in the order of the changes");
            ensure!(client.failed().await?.is_empty(), "{user}: {:?}", client.failed().await?);
            total += journal.len();
        }
        println!("{total} changes, each applied once and in order; healed in {healed:.1?}");
        ensure!(healed < HEALED, "healing took {healed:?}");
        Ok(())
    }
}

async fn killed(service: Service) -> Result<()> {
    let mut board = Board::start().await?;
    let result = async {
        let load = Load::start(&board).await?;
        for round in 0..KILLS {
            // At changing moments of the writers' rhythm.
            tokio::time::sleep(Duration::from_millis(150 + round * 13)).await;
            board.kill_and_restart(service).await?;
        }
        load.check(&board).await
    }
    .await;
    board.explain(result)
}

#[tokio::test(flavor = "multi_thread")]
async fn edge_killed() -> Result<()> {
    killed(Service::Edge).await
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_killed_after_commit() -> Result<()> {
    killed(Service::Changes).await
}

#[tokio::test(flavor = "multi_thread")]
async fn replication_killed_before_confirm() -> Result<()> {
    killed(Service::Replication).await
}

/// The client is a process of its own, which prints what it has written after each local commit.
#[tokio::test(flavor = "multi_thread")]
async fn client_killed() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let b = board.client("b", "bob").await?;
        let mut acked: Vec<String> = Vec::new();
        for round in 0..KILLS {
            let mut writer = tokio::process::Command::new(env!("CARGO_BIN_EXE_writer"))
                .env("WRITER_STORE", board.store("a"))
                .env("WRITER_EDGE", board.stack.edge_url())
                .env("WRITER_TOKEN", board.stack.token("alice"))
                .env("WRITER_ROUND", round.to_string())
                .stdout(Stdio::piped())
                .kill_on_drop(true)
                .spawn()?;
            let mut lines = BufReader::new(writer.stdout.take().context("no stdout")?).lines();
            let until = tokio::time::Instant::now() + Duration::from_millis(400 + round * 37);
            while let Ok(Ok(Some(line))) = tokio::time::timeout_at(until, lines.next_line()).await {
                acked.push(line);
            }
            writer.kill().await?;
            // What it had printed before it died counts too.
            while let Ok(Some(line)) = lines.next_line().await {
                acked.push(line);
            }
        }
        ensure!(acked.len() as u64 > KILLS, "only {} writes", acked.len());
        let healing = Instant::now();
        let a = board.client("a", "alice").await?;
        a.settled(PATIENCE).await?;
        converged(&board, &a, "alice").await?;
        converged(&board, &b, "bob").await?;
        ensure!(healing.elapsed() < HEALED, "healing took {:?}", healing.elapsed());
        let markers: Vec<String> = board.audit().await?.into_iter().map(|entry| entry.3).collect();
        let mut unique = markers.clone();
        unique.sort_unstable();
        unique.dedup();
        ensure!(unique.len() == markers.len(), "something was applied twice");
        let kept: Vec<&String> = markers.iter().filter(|marker| acked.contains(marker)).collect();
        ensure!(
            kept.len() == acked.len(),
            "{} of {} acknowledged writes were lost",
            acked.len() - kept.len(),
            acked.len()
        );
        ensure!(kept.iter().zip(&acked).all(|(kept, acked)| *kept == acked), "the order is not kept");
        println!("{} acknowledged writes over {KILLS} kills: each applied once and in order", acked.len());
        Ok(())
    };
    board.explain(result.await)
}
