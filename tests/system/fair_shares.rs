//! One client's changes hold up nobody else, whatever they are: a flood of large ones, one that waits for a lock, one that
//! fails in ways that nobody understands. Neighbours are on the same worker of the executor, and some in the same partition.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use millstream_schemas::frame::ServerFrame;
use millstream_schemas::stream::Verdict;
use millstream_schemas::subject::partition;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::raw::Raw;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tokio::task::JoinHandle;
use uuid::Uuid;

const SCHEMA: &str = "
CREATE TABLE notes (id uuid PRIMARY KEY, owner text NOT NULL, body text NOT NULL);
ALTER TABLE notes REPLICA IDENTITY FULL;
CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF NEW.body = 'poison' THEN PERFORM pg_cancel_backend(pg_backend_pid()), pg_sleep(30); END IF;
    IF NEW.body = 'sleep' THEN PERFORM pg_sleep(60); END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER poison BEFORE INSERT OR UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION poison();
";
const CONFIG: &str = "\
[tables.notes]
scope = { kind = \"user\", column = \"owner\" }
writable = [\"id\", \"owner\", \"body\"]
write.insert = \"new.owner = auth.user_id\"
write.update = \"old.owner = auth.user_id\"
";
/// Workers of an executor.
const WORKERS: u16 = 4;
/// Clients beside the one that is the trouble.
const NEIGHBOURS: usize = 3;
/// Pause of a neighbour between its changes.
const RHYTHM: Duration = Duration::from_millis(20);

async fn board() -> Result<(Board, tempfile::TempDir)> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("millstream.toml");
    std::fs::write(&file, CONFIG)?;
    Ok((Board::with(|builder| builder.app_schema(SCHEMA).seed("").config(&file)).await?, folder))
}

/// A client id whose partition fits.
fn client_id(fits: impl Fn(u16) -> bool) -> Uuid {
    std::iter::repeat_with(Uuid::now_v7).find(|id| fits(partition(*id))).unwrap_or_default()
}

/// A client that speaks the wire, and waits for verdicts as the executor tells them.
struct Speaker {
    raw: Raw,
    user: String,
    client_seq: u64,
}

impl Speaker {
    async fn connect(board: &Board, user: &str, client_id: Uuid) -> Result<Speaker> {
        let mut raw = Raw::connect(&board.stack.edge_url()).await?;
        raw.hello(client_id, &board.stack.token(user)).await?;
        Ok(Speaker { raw, user: user.to_owned(), client_seq: 0 })
    }

    async fn submit(&mut self, changes: Vec<Value>) -> Result<u64> {
        self.client_seq += 1;
        let frame = json!({"type": "submit", "client_seq": self.client_seq, "attempt": 1, "run_id": Uuid::nil(), "changes": changes});
        self.raw.frame(frame).await?;
        Ok(self.client_seq)
    }

    fn insert(&self, body: &str) -> Value {
        let id = Uuid::now_v7();
        json!({"change_id": Uuid::now_v7(), "table": "notes", "op": "insert", "key": [id], "columns": ["id", "owner", "body"],
            "values": [id, self.user, body], "stamp": 1})
    }

    fn update(&self, id: Uuid, body: &str) -> Value {
        json!({"change_id": Uuid::now_v7(), "table": "notes", "op": "update", "key": [id], "columns": ["body"], "values": [body],
            "stamp": 2})
    }

    /// Waits for the verdict on a transaction.
    async fn verdict(&mut self, client_seq: u64) -> Result<Verdict> {
        let of = |frame| match frame {
            ServerFrame::Results { results } => {
                results.into_iter().find(|r| r.client_seq == client_seq).map(|r| r.verdict)
            }
            _ => None,
        };
        self.raw.wait(of).await.with_context(|| format!("no verdict on {} of {}", client_seq, self.user))
    }
}

/// A writer, and how long each of its changes took.
type Written = (Speaker, Vec<Duration>);

/// Neighbours that write single changes, one after the other.
struct Neighbours {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<Result<Written>>>,
}

impl Neighbours {
    async fn start(board: &Board, trouble: Uuid) -> Result<Neighbours> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut writers = Vec::new();
        for number in 0..NEIGHBOURS {
            let own = partition(trouble);
            // The first in the same partition, the others in others of the same worker.
            let id = client_id(|found| (found == own) == (number == 0) && found % WORKERS == own % WORKERS);
            let mut speaker = Speaker::connect(board, &format!("neighbour-{number}"), id).await?;
            let stop = stop.clone();
            writers.push(tokio::spawn(async move {
                let mut times = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let change = speaker.insert("x");
                    let start = Instant::now();
                    let client_seq = speaker.submit(vec![change]).await?;
                    ensure!(speaker.verdict(client_seq).await? == Verdict::Applied, "a neighbour's change is refused");
                    times.push(start.elapsed());
                    tokio::time::sleep(RHYTHM).await;
                }
                Ok((speaker, times))
            }));
        }
        Ok(Neighbours { stop, writers })
    }

    /// For so long; gives the median, the 99th percentile and the longest time of a change.
    async fn measure(board: &Board, trouble: Uuid, time: Duration) -> Result<[Duration; 3]> {
        let neighbours = Neighbours::start(board, trouble).await?;
        tokio::time::sleep(time).await;
        neighbours.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for writer in neighbours.writers {
            all.extend(writer.await??.1);
        }
        all.sort_unstable();
        let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize];
        ensure!(!all.is_empty(), "no change of a neighbour was applied");
        println!("{} changes of neighbours: {:.1?}, {:.1?}, {:.1?}", all.len(), at(0.5), at(0.99), at(1.0));
        Ok([at(0.5), at(0.99), at(1.0)])
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_large_transactions_holds_up_nobody_else() -> Result<()> {
    let (board, _folder) = board().await?;
    let result = async {
        let id = client_id(|_| true);
        let mut flood = Speaker::connect(&board, "flood", id).await?;
        let changes = |speaker: &Speaker| (0..900).map(|_| speaker.insert("0123456789")).collect::<Vec<_>>();
        // How long one of them takes.
        let mut alone = Duration::ZERO;
        for _ in 0..3 {
            let changes = changes(&flood);
            let start = Instant::now();
            let client_seq = flood.submit(changes).await?;
            ensure!(flood.verdict(client_seq).await? == Verdict::Applied);
            alone = start.elapsed();
        }
        let [_, before, _] = Neighbours::measure(&board, id, Duration::from_secs(3)).await?;
        // As much as the edge lets through before any of it is settled, at once.
        let mut last = 0;
        for _ in 0..11 {
            let changes = changes(&flood);
            last = flood.submit(changes).await?;
        }
        let [_, p99, longest] = Neighbours::measure(&board, id, Duration::from_secs(4)).await?;
        println!(
            "one large transaction: {alone:.1?}; neighbours' p99: {before:.1?} before, {p99:.1?} during the flood"
        );
        // Nobody waits for them; but what the processes share costs time.
        let bound = before * 2 + Duration::from_millis(100);
        ensure!(p99 <= bound && longest <= bound * 3, "{p99:?}, at most {longest:?}; expected {bound:?}");
        // And the flood goes on, in order.
        let applied: i64 = sqlx::query_scalar("SELECT last_seq FROM millstream.clients WHERE client_id = $1")
            .bind(id)
            .fetch_one(&mut board.postgres().await?)
            .await?;
        println!("{applied} of {last} large transactions were applied meanwhile");
        ensure!(applied > 3, "the flood stands still");
        settled(&board, id, last).await
    }
    .await;
    board.explain(result)
}

/// Waits until the ledger has taken a client's transaction.
async fn settled(board: &Board, id: Uuid, client_seq: u64) -> Result<()> {
    let mut postgres = board.postgres().await?;
    let start = Instant::now();
    loop {
        let applied: Option<i64> = sqlx::query_scalar("SELECT last_seq FROM millstream.clients WHERE client_id = $1")
            .bind(id)
            .fetch_optional(&mut postgres)
            .await?;
        if applied == Some(client_seq as i64) {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE * 4, "{applied:?} of {client_seq}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// On a quiet stack nothing else happens that could get it going.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_transaction_behind_a_small_one_starts_at_once() -> Result<()> {
    let (board, _folder) = board().await?;
    let result = async {
        let mut speaker = Speaker::connect(&board, "alone", client_id(|_| true)).await?;
        for sizes in [[1, 900, 1], [900, 1, 900], [1, 1, 900], [900, 900, 1]] {
            let start = Instant::now();
            let mut last = 0;
            for size in sizes {
                let changes = (0..size).map(|_| speaker.insert("x")).collect();
                last = speaker.submit(changes).await?;
            }
            ensure!(speaker.verdict(last).await? == Verdict::Applied, "{sizes:?}");
            println!("{sizes:?}: {:.1?}", start.elapsed());
            ensure!(start.elapsed() < Duration::from_secs(4), "{sizes:?}: {:?}", start.elapsed());
        }
        Ok(())
    }
    .await;
    board.explain(result)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_that_waits_for_a_lock_holds_up_its_client_only() -> Result<()> {
    let (board, _folder) = board().await?;
    let result = async {
        let id = client_id(|_| true);
        let mut speaker = Speaker::connect(&board, "locked", id).await?;
        let row = speaker.insert("mine");
        let key: Uuid = row["key"][0].as_str().context("a key")?.parse()?;
        let client_seq = speaker.submit(vec![row]).await?;
        ensure!(speaker.verdict(client_seq).await? == Verdict::Applied);
        let [_, before, _] = Neighbours::measure(&board, id, Duration::from_secs(3)).await?;
        let mut admin = PgConnection::connect(&board.stack.postgres_url()).await?;
        sqlx::raw_sql("BEGIN").execute(&mut admin).await?;
        sqlx::raw_sql(AssertSqlSafe(format!("SELECT FROM notes WHERE id = '{key}' FOR UPDATE")))
            .execute(&mut admin)
            .await?;
        // What comes behind it waits with it.
        let change = speaker.update(key, "new");
        speaker.submit(vec![change]).await?;
        let change = speaker.insert("behind");
        let last = speaker.submit(vec![change]).await?;
        let [_, p99, longest] = Neighbours::measure(&board, id, Duration::from_secs(12)).await?;
        println!("neighbours' p99: {before:.1?} before, {p99:.1?} while a row is locked");
        let bound = before * 2 + Duration::from_millis(150);
        ensure!(p99 <= bound && longest < Duration::from_secs(1), "{p99:?}, at most {longest:?}; expected {bound:?}");
        ensure!(board.stack.logs().contains("cannot be applied now"), "the log does not tell of it");
        sqlx::raw_sql("COMMIT").execute(&mut admin).await?;
        let start = Instant::now();
        ensure!(speaker.verdict(last).await? == Verdict::Applied);
        println!("applied {:.1?} after the lock was gone", start.elapsed());
        let body: String =
            sqlx::query_scalar("SELECT body FROM notes WHERE id = $1").bind(key).fetch_one(&mut admin).await?;
        ensure!(body == "new", "{body}");
        Ok(())
    }
    .await;
    board.explain(result)
}

/// Its first try takes what a statement may take where others wait; from then on it is tried aside.
#[tokio::test(flavor = "multi_thread")]
async fn changes_that_do_not_end_hold_up_their_client_only() -> Result<()> {
    let (board, _folder) = board().await?;
    let result = async {
        let id = client_id(|_| true);
        let mut speaker = Speaker::connect(&board, "asleep", id).await?;
        let [_, before, _] = Neighbours::measure(&board, id, Duration::from_secs(3)).await?;
        for _ in 0..3 {
            let change = speaker.insert("sleep");
            speaker.submit(vec![change]).await?;
        }
        let [_, _, longest] = Neighbours::measure(&board, id, Duration::from_secs(6)).await?;
        ensure!(longest < Duration::from_secs(4), "at first, at most {longest:?}");
        // Also when the first try aside has ended, after 30 s.
        let [_, p99, longest] = Neighbours::measure(&board, id, Duration::from_secs(35)).await?;
        println!("neighbours' p99: {before:.1?} before, {p99:.1?} beside changes that do not end");
        let bound = before * 2 + Duration::from_millis(50);
        ensure!(p99 <= bound && longest < Duration::from_secs(1), "{p99:?}, at most {longest:?}; expected {bound:?}");
        Ok(())
    }
    .await;
    board.explain(result)
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_that_nobody_understands_hold_up_their_client_only() -> Result<()> {
    let (board, _folder) = board().await?;
    let result = async {
        let id = client_id(|_| true);
        let mut speaker = Speaker::connect(&board, "poison", id).await?;
        let [_, before, _] = Neighbours::measure(&board, id, Duration::from_secs(3)).await?;
        for _ in 0..5 {
            let change = speaker.insert("poison");
            speaker.submit(vec![change]).await?;
        }
        let change = speaker.insert("good");
        let last = speaker.submit(vec![change]).await?;
        let [_, p99, longest] = Neighbours::measure(&board, id, Duration::from_secs(8)).await?;
        println!("neighbours' p99: {before:.1?} before, {p99:.1?} beside the poison");
        let bound = before * 2 + Duration::from_millis(50);
        ensure!(p99 <= bound && longest < Duration::from_secs(1), "{p99:?}, at most {longest:?}; expected {bound:?}");
        ensure!(speaker.verdict(last).await? == Verdict::Applied, "what comes behind the poison");
        let refused: i64 = sqlx::query_scalar("SELECT count(*) FROM millstream.changes_history WHERE client_id = $1")
            .bind(id)
            .fetch_one(&mut board.postgres().await?)
            .await?;
        ensure!(refused == 5, "{refused}");
        Ok(())
    }
    .await;
    board.explain(result)
}
