//! `millstream client`: reads, writes and watches as a client, online and offline.

mod args;
mod error;
mod statement;

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::StreamExt as _;
use millstream_client::{
    Client, Download, Edit, EntryState, Error as SdkError, ImportOutcome, Outcome, QueueEntry, Saved, State, Status,
    Write,
};
use millstream_provision::exit::Exit;
use millstream_provision::token::{DEFAULT_LIFE, mint};
use tokio::time::{Instant, timeout, timeout_at};

pub use self::args::Args;
use self::args::{Command, Queue};
use self::error::Error;
use self::statement::{begins_with, is_name, may_read, may_return};
use crate::output::{self, Output};
use crate::token;

/// Status events are quiet for this long once what was queued has been settled.
const QUIET: Duration = Duration::from_millis(150);
/// Transactions in `error` that `status` shows.
const MAX_FAILED_SHOWN: usize = 20;

/// What to do when the edge refuses the token.
const NEEDS_AUTH: &str = "the edge wants another token: put it into the file of --token-file, or give it by MILLSTREAM_TOKEN \
(`millstream token` makes one); what is queued here is kept and sent then";

/// Runs `millstream client`.
pub async fn run(args: Args) -> Result<Exit, Error> {
    let wait = Duration::try_from_secs_f64(args.wait).map_err(|_| Error::Flag("--wait must be a number of seconds"))?;
    let mut builder = Client::builder(args.store.clone());
    if !args.offline {
        let source = TokenSource::of(&args)?;
        builder = builder.edge(args.edge.clone()).token(source.token()?).token_fn(move || {
            let token = source.token();
            async move { Ok(token?) }
        });
    }
    let client = builder.open().await.map_err(Error::client("cannot open the store"))?;
    let session = OpenStore { client: &client, args: &args, deadline: Instant::now() + wait, wait };
    let outcome = session.run().await;
    if client.status().borrow().state == State::NeedsAuth {
        eprintln!("{NEEDS_AUTH}");
    }
    let closed = client.close().await.map_err(Error::client("cannot close the store"));
    let exit = outcome?;
    closed?;
    Ok(exit)
}

/// Where the session token comes from; asked again when the edge wants another.
enum TokenSource {
    /// Made with dev mode's secret.
    Dev {
        user: String,
        data: PathBuf,
    },
    File(PathBuf),
    Given(String),
}

impl TokenSource {
    fn of(args: &Args) -> Result<TokenSource, Error> {
        if let Some(user) = args.user.clone() {
            return Ok(TokenSource::Dev { user, data: args.data.clone() });
        }
        if let Some(path) = args.token_file.clone() {
            return Ok(TokenSource::File(path));
        }
        args.token.clone().filter(|token| !token.is_empty()).map(TokenSource::Given).ok_or(Error::NoUser)
    }

    fn token(&self) -> Result<String, Error> {
        match self {
            TokenSource::Dev { user, data } => {
                let secret = token::Secret { secret_file: None, secret: None, data: data.clone() };
                let secret = secret.read().map_err(Error::Token)?;
                mint(&secret, user, DEFAULT_LIFE).map_err(|error| Error::Token(error.into()))
            }
            TokenSource::File(path) => {
                let file = |source| Error::TokenFile { path: path.clone(), source };
                Ok(std::fs::read_to_string(path).map_err(file)?.trim().to_owned())
            }
            TokenSource::Given(token) => Ok(token.clone()),
        }
    }
}

struct OpenStore<'a> {
    client: &'a Client,
    args: &'a Args,
    /// For the connection.
    deadline: Instant,
    /// For verdicts, from the write on.
    wait: Duration,
}

impl OpenStore<'_> {
    async fn run(&self) -> Result<Exit, Error> {
        match &self.args.command {
            Command::Sql { statements } => match statements.as_slice() {
                [statement] if may_read(statement) => self.read(statement).await,
                statements => self.write(statements.to_vec()).await,
            },
            Command::Watch { query, times } => self.watch(query, *times).await,
            Command::Status => self.status().await,
            Command::Queue(queue) => self.queue(queue).await,
        }
    }

    async fn read(&self, statement: &str) -> Result<Exit, Error> {
        let deadline = self.tables().await?;
        self.caught_up(deadline).await;
        match self.client.query(statement, ()).await {
            Ok(rows) => {
                output::rows(&rows, self.args.output);
                Ok(Exit::Ok)
            }
            // Behind WITH there may be either, and what triggers call is not there for a reader.
            Err(error) if error.is_write() || begins_with(statement, &["with"]) => {
                self.write(vec![statement.to_owned()]).await
            }
            Err(error) => Err(Error::client("the query failed")(error)),
        }
    }

    async fn write(&self, statements: Vec<String>) -> Result<Exit, Error> {
        self.tables().await?;
        let write = self
            .client
            .tx(move |transaction| {
                let (mut count, mut shown) = (0, None);
                for statement in &statements {
                    if !may_return(statement) {
                        count += transaction.execute(statement, ())?;
                        continue;
                    }
                    let rows = transaction.query(statement, ())?;
                    if rows.columns.is_empty() {
                        let changed: Vec<(usize,)> = transaction.query_as("SELECT changes()", ())?;
                        count += changed.first().map_or(0, |(changed,)| *changed);
                    } else {
                        count += rows.rows.len();
                        shown = Some(rows);
                    }
                }
                Ok((count, shown))
            })
            .await
            .map_err(Error::client("the write failed"))?;
        let (count, shown) = write.value();
        // Of the last statement that has any. As JSON, one document is printed, which holds them.
        let mut returned = None;
        match (shown, self.args.output) {
            (Some(rows), Output::Text) => output::rows(rows, Output::Text),
            (Some(rows), Output::Json) => returned = Some(output::objects(rows)),
            (None, _) => {}
        }
        self.verdict(&write, Some(*count), returned).await
    }

    /// Waits for what becomes of a write, while that is of use, and prints it.
    async fn verdict<T>(
        &self,
        write: &Write<T>,
        rows: Option<usize>,
        returned: Option<Vec<serde_json::Value>>,
    ) -> Result<Exit, Error> {
        let mut written = output::Written { rows, returned, tx: write.tx(), ..output::Written::default() };
        if let Some(tx) = write.tx() {
            written.state = output::WriteState::Queued;
            if let Some(entry) = self.entry(tx).await?.filter(|entry| entry.state == EntryState::Held) {
                (written.state, written.waits_for) = (output::WriteState::Held, entry.waits_for);
                output::written(&written, self.args.output);
                return Ok(Exit::Ok);
            }
            let verdict = tokio::select! {
                biased;
                verdict = timeout(self.wait, write.confirmed()) => verdict.ok(),
                () = self.unreachable() => None,
            };
            match verdict {
                Some(Ok(Outcome::Applied)) => written.state = output::WriteState::Applied,
                Some(Ok(Outcome::Merged)) => written.state = output::WriteState::Merged,
                Some(Ok(Outcome::Superseded)) => written.state = output::WriteState::Superseded,
                Some(Err(SdkError::Rejected { code, rule, message, .. })) => {
                    written.state = output::WriteState::Rejected;
                    written.code = Some(code.to_string());
                    written.rule = rule;
                    written.message = Some(message);
                    written.next_attempt = self.entry(tx).await?.and_then(|entry| entry.next_attempt);
                }
                Some(Err(error)) => return Err(Error::client("the verdict is not known")(error)),
                None => {}
            }
        }
        output::written(&written, self.args.output);
        Ok(if written.state == output::WriteState::Rejected { Exit::Failed } else { Exit::Ok })
    }

    async fn watch(&self, query: &str, times: Option<u64>) -> Result<Exit, Error> {
        self.tables().await?;
        let sql = match is_name(query) {
            true => format!("SELECT * FROM \"{query}\""),
            false => query.to_owned(),
        };
        let mut rows = self.client.watch(&sql, ());
        let mut shown = 0;
        while times.is_none_or(|times| shown < times) {
            let next = tokio::select! {
                next = rows.next() => next,
                _ = tokio::signal::ctrl_c() => break,
            };
            let Some(next) = next else { break };
            let next = next.map_err(Error::client("the query failed"))?;
            if shown > 0 && self.args.output == Output::Text {
                println!();
            }
            output::rows(&next, self.args.output);
            shown += 1;
        }
        Ok(Exit::Ok)
    }

    async fn status(&self) -> Result<Exit, Error> {
        self.caught_up(self.deadline).await;
        let failed = self.client.failed().await.map_err(Error::client("cannot read the queue"))?;
        let status = self.client.status().borrow().clone();
        output::status(&status, &failed, MAX_FAILED_SHOWN, self.args.output);
        Ok(if matches!(status.state, State::Error | State::NeedsAuth | State::Damaged) {
            Exit::Failed
        } else {
            Exit::Ok
        })
    }

    /// The first entry of a transaction.
    async fn entry(&self, tx: u64) -> Result<Option<QueueEntry>, Error> {
        let entries = self.client.queue_entries(tx).await.map_err(Error::client("cannot read the queue"))?;
        Ok(entries.into_iter().next())
    }

    async fn queue(&self, queue: &Queue) -> Result<Exit, Error> {
        let failed = Error::client("the queue refused");
        let write = match queue {
            Queue::List { limit, failed } => {
                let mut entries = self.client.queue(*limit).await.map_err(Error::client("cannot read the queue"))?;
                entries.retain(|entry| !failed || output::needs_attention(entry.state));
                output::queue(&entries, self.args.output);
                return Ok(Exit::Ok);
            }
            Queue::Show { transaction } => {
                let entries =
                    self.client.queue_entries(*transaction).await.map_err(Error::client("cannot read the queue"))?;
                if entries.is_empty() {
                    return Err(Error::NoTransaction(*transaction));
                }
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                output::transaction(&entries, now.as_micros() as u64, self.args.output);
                return Ok(Exit::Ok);
            }
            Queue::Retry { transaction } => self.client.retry(*transaction).await.map_err(failed)?,
            Queue::Edit { transaction, set, set_null, change } => {
                let edit = |column: &String, value| Edit { change_id: *change, column: column.clone(), value };
                let values = set.iter().map(|(column, value)| edit(column, Some(value.clone())));
                let nulls = set_null.iter().map(|column| edit(column, None));
                self.client.edit(*transaction, values.chain(nulls).collect()).await.map_err(failed)?
            }
            Queue::Import { file, incomplete } => return self.import(file, *incomplete).await,
            Queue::Discard { transaction } => {
                self.client.discard(*transaction).await.map_err(failed)?;
                output::discarded(*transaction, self.args.output);
                return Ok(Exit::Ok);
            }
        };
        self.verdict(&write, None, None).await
    }

    async fn import(&self, file: &Path, incomplete: bool) -> Result<Exit, Error> {
        let action = "cannot record the saved changes";
        let mut saved = Saved::read(file).map_err(|error| Error::client(action)(error.into()))?;
        for transaction in &mut saved.transactions {
            transaction.complete |= incomplete;
        }
        let deadline = self.tables().await?;
        self.caught_up(deadline).await;
        let imported = self.client.import(saved).await.map_err(Error::client(action))?;
        tokio::select! {
            biased;
            // The queue keeps the changes that are not confirmed in time, and a later session sends them.
            _ = self.client.settled(self.wait) => {}
            () = self.unreachable() => {}
        }
        output::imported(&imported, self.args.output);
        let kept = imported.iter().any(|imported| matches!(imported.outcome, ImportOutcome::Kept { .. }));
        Ok(if kept { Exit::Failed } else { Exit::Ok })
    }

    /// A new store has no tables before its first connection, and not all rows before its first snapshot is complete. Gives the end of
    /// the time for what else has to come first.
    async fn tables(&self) -> Result<Instant, Error> {
        let status = self.client.status();
        let (mut deadline, mut before) = (self.deadline, None);
        let why_not = loop {
            let now = status.borrow().clone();
            if now.schema.is_some() && (now.has_synced || self.args.offline) {
                return Ok(deadline);
            }
            if self.args.offline {
                break "--offline".to_owned();
            }
            tokio::select! {
                biased;
                ready = timeout_at(deadline, self.client.ready()) => {
                    if let Ok(ready) = ready {
                        ready.map_err(Error::client("the first snapshot failed"))?;
                        return Ok(deadline.max(Instant::now() + QUIET));
                    }
                }
                () = self.unreachable() => break why(&status.borrow()),
            }
            let now = status.borrow().clone();
            if now.state != State::Connected {
                break why(&now);
            }
            // Waiting is of use while it moves.
            let moved = before.replace((now.downloading, now.download)) != Some((now.downloading, now.download));
            let so_far = match now.download {
                Some(Download { rows, total }) => format!("{rows} of {total} rows"),
                None if now.downloading => "its rows have not begun to come".into(),
                None => "its rows are being written".into(),
            };
            if !moved {
                return Err(Error::Arriving { edge: self.args.edge.clone(), so_far });
            }
            eprintln!("the first snapshot is arriving: {so_far}");
            deadline = Instant::now() + self.wait;
        };
        if status.borrow().schema.is_none() {
            return Err(Error::Empty { edge: self.args.edge.clone(), reason: why_not });
        }
        eprintln!("the first snapshot is not complete ({why_not}): rows may be missing");
        Ok(deadline)
    }

    /// Waits until the edge's news are in, or until that is of no use.
    async fn caught_up(&self, deadline: Instant) {
        let mut status = self.client.status();
        let settled = |status: &Status| status.caught_up || unreachable(status);
        if self.args.offline || !matches!(timeout_at(deadline, status.wait_for(settled)).await, Ok(Ok(_))) {
            return;
        }
        // What is queued goes out right after the welcome.
        while status.borrow_and_update().state == State::Connected && Instant::now() < deadline {
            if timeout(QUIET, status.changed()).await.is_err() {
                return;
            }
        }
    }

    /// Resolves when waiting for the edge has become pointless.
    async fn unreachable(&self) {
        if !self.args.offline && self.client.status().wait_for(unreachable).await.is_err() {
            // The client is closed; whoever waits with us hears of it.
            std::future::pending::<()>().await;
        }
    }
}

/// Whether the last attempt to connect failed. A client that has not tried yet, or lets another process do it, may still
/// get through.
fn unreachable(status: &Status) -> bool {
    match status.state {
        State::Offline => status.retry_at.is_some() || status.last_error.is_some(),
        State::NeedsAuth | State::Error | State::Damaged | State::Closed => true,
        _ => false,
    }
}

fn why(status: &Status) -> String {
    match (&status.last_error, &status.reason) {
        (Some(error), _) => format!("{}: {}", error.code, error.message),
        (None, Some(reason)) => reason.clone(),
        (None, None) => "no answer".into(),
    }
}
