//! A second connection of a worker, for transactions that others are not to wait for: large ones, and those of clients whose
//! transactions take long. One at a time, beside the worker's batches.
//!
//! It moves no position, so it needs no fence: that a transaction is taken once, and in its client's order, is what the ledger
//! sees to, which is compared and set within the transaction.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::decide::plan::Condemned;
use crate::decide::results::Results;
use crate::item::{Item, Mode};
use crate::transaction::executor::Executor;
use crate::transaction::failed::Failed;

/// The connection, and what it is at.
pub(crate) struct Aside {
    executor: Option<Executor>,
    running: Option<JoinHandle<(Executor, Done)>>,
}

/// What became of a transaction.
pub(crate) struct Done {
    pub item: Item,
    /// Under which its partition was owned.
    pub term: i64,
    pub mode: Mode,
    pub outcome: Result<Results, Failed>,
    /// None where that says nothing: it was not applied, or the connection and the catalog were new.
    pub took: Option<Duration>,
}

impl Aside {
    /// Connects when first used.
    pub fn new(executor: Executor) -> Aside {
        Aside { executor: Some(executor), running: None }
    }

    /// Whether another transaction can be started.
    pub fn is_free(&self) -> bool {
        self.executor.is_some()
    }

    /// Starts a transaction, if free; `condemned` is what is known of it.
    pub fn start(&mut self, item: Item, term: i64, mode: Mode, condemned: Condemned) {
        let Some(mut executor) = self.executor.take() else { return };
        self.running = Some(tokio::spawn(async move {
            let (start, warm) = (Instant::now(), executor.is_warm());
            let items = [item];
            let outcome = executor.execute(&items, &[], mode, &condemned).await;
            let [item] = items;
            let took = outcome.is_ok().then(|| start.elapsed()).filter(|_| warm);
            (executor, Done { item, term, mode, outcome, took })
        }));
    }

    /// Waits for the transaction at hand; for ever if there is none. May be dropped and called again.
    pub async fn done(&mut self) -> Done {
        let Some(running) = &mut self.running else { return std::future::pending().await };
        match running.await {
            Ok((executor, done)) => {
                (self.executor, self.running) = (Some(executor), None);
                done
            }
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => std::future::pending().await,
            },
        }
    }

    /// The same, of one that has ended.
    pub async fn ended(&mut self) -> Option<Done> {
        if self.running.as_ref().is_some_and(JoinHandle::is_finished) { Some(self.done().await) } else { None }
    }

    /// Gives a transaction at hand a moment to end, and closes the connection.
    pub async fn close(&mut self) {
        const MOMENT: Duration = Duration::from_secs(1);
        if self.running.is_some() {
            let _ = tokio::time::timeout(MOMENT, self.done()).await;
        }
        if let Some(running) = self.running.take() {
            running.abort();
        }
        if let Some(executor) = &mut self.executor {
            executor.close().await;
        }
    }
}
