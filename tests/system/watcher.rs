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
        let token = board.store(&format!("{user}.token"));
        std::fs::write(&token, board.stack.token(user))?;
        let mut process = Command::new(env!("CARGO_BIN_EXE_services"))
            .args(["client", "--edge", &board.stack.edge_url(), "--store"])
            .arg(board.store(user))
            .arg("--token-file")
            .arg(token)
            .args(["watch", "--output", "json", query])
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let lines = BufReader::new(process.stdout.take().context("its output")?).lines();
        Ok(Watcher { process, lines })
    }

    /// The next number that it shows.
    pub async fn next(&mut self) -> Result<u64> {
        loop {
            let line = self.lines.next_line().await?.context("the client ended")?;
            let digits: String = line.chars().filter(char::is_ascii_digit).collect();
            if let Ok(number) = digits.parse() {
                return Ok(number);
            }
        }
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
