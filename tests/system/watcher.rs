//! A client in a process of its own, that can be stopped and whose memory can be measured.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use millstream_tests::board::Board;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// A client in a process of its own, which says how many rows it shows whenever that changes.
pub struct Watcher {
    pub process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Watcher {
    /// Starts it.
    pub fn start(board: &Board, user: &str, query: &str) -> Result<Watcher> {
        let mut process = Command::new(env!("CARGO_BIN_EXE_watcher"))
            .env("WATCHER_STORE", board.store(user))
            .env("WATCHER_EDGE", board.stack.edge_url())
            .env("WATCHER_TOKEN", board.stack.token(user))
            .env("WATCHER_QUERY", query)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let lines = BufReader::new(process.stdout.take().context("its output")?).lines();
        Ok(Watcher { process, lines })
    }

    /// The next number that it shows.
    pub async fn next(&mut self) -> Result<u64> {
        Ok(self.lines.next_line().await?.context("the client ended")?.parse()?)
    }

    /// Waits until it shows a number; until then it may only show whole steps.
    pub async fn shows(&mut self, wanted: u64, step: u64, limit: Duration) -> Result<()> {
        let shown = async {
            loop {
                let number = self.next().await?;
                if number == wanted {
                    return Ok(());
                }
                ensure!(number.is_multiple_of(step), "{number} rows are visible, which is no multiple of {step}");
            }
        };
        tokio::time::timeout(limit, shown).await.with_context(|| format!("{wanted} rows do not arrive"))?
    }
}
