//! Any batch, any mix of tables, operations, clients and failures: set-wise execution comes to the same rows and verdicts
//! as executing one by one. A failing case names its seed; `MILLSTREAM_SEED` runs it alone, `MILLSTREAM_CASES` how many.

mod support;

use std::collections::BTreeMap;

use millstream_schemas::stream::{Submission, TransactionResult};
use millstream_schemas::{Change, Operation};
use sqlx::Executor as _;
use support::{Client, Database, change};
use uuid::Uuid;

/// SplitMix64. Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn one<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len() as u64) as usize]
    }
}

const RESET: &str = "\
TRUNCATE members, projects, tasks, notes, logs, days, ordered, secure,
    millstream.clients, millstream.instances, millstream.changes_history;
INSERT INTO members VALUES (1, 'ann'), (1, 'bob'), (2, 'ann'), (3, 'bob');
INSERT INTO projects VALUES (1, 'one', NULL), (2, 'two', 1), (3, 'three', 1);
INSERT INTO tasks (id, project_id, title, slug, updated_at, field_clocks) VALUES
    (1, 1, 'a', 's1', 'epoch', '{\"\": \"0000000000000005-00000000000000000000000000000000-000000000000-0000\"}'),
    (2, 2, 'b', 's2', 'epoch', '{\"\": \"0000000000000005-00000000000000000000000000000000-000000000000-0000\"}'),
    (3, 3, 'kept', 's3', 'epoch', '{\"\": \"0000000000000005-00000000000000000000000000000000-000000000000-0000\"}');
INSERT INTO notes (id, task_id, body, updated_at) VALUES
    ('00000000-0000-0000-0000-000000000001', 1, 'x', timestamptz 'epoch' + interval '5 microseconds');
INSERT INTO logs (id, task_id, kind) VALUES (1, 1, 'good'), (2, 1, 'good');
INSERT INTO days VALUES ('2026-01-01', 1, 1);
INSERT INTO ordered VALUES (1, 1), (2, 2);
INSERT INTO secure VALUES (1, 'ann', 'x'), (2, 'bob', 'x'), (3, 'bob', 'public');";

/// All rows, but for what counts attempts or reads the time.
const ROWS: &str = "\
SELECT jsonb_pretty(jsonb_build_object(
    'members', (SELECT jsonb_agg(t ORDER BY project_id, user_id) FROM members t),
    'projects', (SELECT jsonb_agg(t ORDER BY id) FROM projects t),
    'tasks', (SELECT jsonb_agg(to_jsonb(t) ORDER BY id) FROM tasks t),
    'notes', (SELECT jsonb_agg(to_jsonb(t) - 'updated_at' ORDER BY id) FROM notes t),
    'logs', (SELECT jsonb_agg(to_jsonb(t) - 'number' ORDER BY id) FROM logs t),
    'numbering', (SELECT jsonb_agg(id ORDER BY number) FROM logs),
    'days', (SELECT jsonb_agg(t ORDER BY day) FROM days t),
    'ordered', (SELECT jsonb_agg(t ORDER BY id) FROM ordered t),
    'secure', (SELECT jsonb_agg(t ORDER BY id) FROM secure t),
    'clients', (SELECT jsonb_agg(to_jsonb(t) - 'last_seen' ORDER BY client_id) FROM millstream.clients t),
    'instances', (SELECT jsonb_agg(t ORDER BY client_id, first_seq) FROM millstream.instances t),
    'history', (SELECT jsonb_agg(to_jsonb(t) - 'id' - 'at' ORDER BY client_id, seq) FROM millstream.changes_history t)))";

fn random_change(random: &mut Random) -> Change {
    let op = random.one(&[
        &Operation::Insert,
        &Operation::Insert,
        &Operation::Update,
        &Operation::Update,
        &Operation::Delete,
    ]);
    let op = *op;
    let stamp = random.below(12);
    let numbers = ["1", "2", "3", "4", "5", "6"];
    let id = random.one(&numbers);
    let other = random.one(&numbers);
    let project = random.one(&["1", "1", "2", "3", "4"]);
    // Mostly good values.
    let mut bad = |good: &'static str, bad: &'static str| if random.below(20) == 0 { bad } else { good };
    let (title, rank, number) = (bad("t", "much longer than twenty characters"), bad("5", "-5"), bad("7", "x7"));
    let mut choose = |from: &[&'static str]| random.one(from);
    match choose(&[
        "tasks", "tasks", "tasks", "notes", "notes", "logs", "projects", "members", "days", "ordered", "secure",
    ]) {
        "tasks" => {
            let slug = choose(&["s1", "s2", "s3", "s4", "s5", "s6", "s7", "s8"]);
            let set: &[(&str, Option<&str>)] = match (op, choose(&["0", "1", "2", "3", "4"])) {
                (Operation::Insert, "0") => {
                    &[("project_id", Some(project)), ("title", Some(title)), ("slug", Some(slug))]
                }
                (Operation::Insert, "1") => &[("project_id", Some(project)), ("title", Some("kept"))],
                (Operation::Insert, _) => {
                    &[("project_id", Some(project)), ("title", Some(title)), ("rank", Some(rank))]
                }
                (Operation::Update, "0") => &[("title", Some(title))],
                (Operation::Update, "1") => &[("rank", Some(rank)), ("title", Some("ranked"))],
                (Operation::Update, "2") => &[("slug", Some(slug))],
                (Operation::Update, "3") => &[("project_id", Some(project)), ("rank", None)],
                (Operation::Update, _) => &[("rank", Some(rank)), ("title", Some(title))],
                (Operation::Delete, _) => &[],
            };
            change("tasks", op, &[("id", id)], set, stamp)
        }
        "notes" => {
            let id = choose(&[
                "00000000-0000-0000-0000-000000000001",
                "00000000-0000-0000-0000-00000000000a",
                "{00000000-0000-0000-0000-00000000000A}",
                "00000000-0000-0000-0000-00000000000b",
            ]);
            let set: &[(&str, Option<&str>)] = match op {
                Operation::Delete => &[],
                _ => match choose(&["0", "1", "2"]) {
                    "0" => &[("body", Some("y"))],
                    "1" => &[("body", Some("denied")), ("n", Some("1.5"))],
                    _ => &[("task_id", Some(other)), ("n", Some(number))],
                },
            };
            change("notes", op, &[("id", id)], set, stamp)
        }
        "logs" => {
            let kind = choose(&["good", "good", "bad", "worse"]);
            let set: &[(&str, Option<&str>)] = match op {
                Operation::Delete => &[],
                Operation::Insert => &[("task_id", Some(other)), ("kind", Some(kind))],
                Operation::Update if kind == "good" => &[("task_id", Some(other))],
                Operation::Update => &[("kind", Some(kind))],
            };
            change("logs", op, &[("id", id)], set, stamp)
        }
        "projects" => {
            let name = choose(&["p", "q", "forbidden", ""]);
            let set: &[(&str, Option<&str>)] = match op {
                Operation::Delete => &[],
                Operation::Update => &[("name", Some(name))],
                Operation::Insert if name == "p" => &[("name", Some(name)), ("parent", Some(other))],
                Operation::Insert => &[("name", Some(name))],
            };
            change("projects", op, &[("id", id)], set, stamp)
        }
        "members" => {
            let op = if op == Operation::Update { Operation::Delete } else { op };
            change("members", op, &[("project_id", project), ("user_id", choose(&["ann", "bob"]))], &[], stamp)
        }
        "days" => {
            let day = choose(&["2026-01-01", "2026-1-1", "January 2, 2026"]);
            let set: &[(&str, Option<&str>)] = match op {
                Operation::Delete => &[],
                _ => &[("n", Some(number)), ("task_id", Some(other))],
            };
            change("days", op, &[("day", day)], set, stamp)
        }
        "ordered" => {
            let set: &[(&str, Option<&str>)] = if op == Operation::Delete { &[] } else { &[("place", Some(other))] };
            change("ordered", op, &[("id", id)], set, stamp)
        }
        _ => {
            let owner = choose(&["ann", "bob"]);
            let set: &[(&str, Option<&str>)] = match op {
                Operation::Delete => &[],
                Operation::Insert => &[("owner", Some(owner)), ("body", Some("x"))],
                Operation::Update => &[("owner", Some(owner))],
            };
            change("secure", op, &[("id", id)], set, stamp)
        }
    }
}

fn random_batch(random: &mut Random) -> Vec<Submission> {
    let mut clients = [Client::new(1, "ann"), Client::new(2, "bob"), Client::new(3, "ann")];
    let count = 1 + random.below(40);
    let mut batch: Vec<Submission> = Vec::new();
    for _ in 0..count {
        // One in thirty is said again.
        if random.below(30) == 0 && !batch.is_empty() {
            batch.push(batch[random.below(batch.len() as u64) as usize].clone());
            continue;
        }
        let client = &mut clients[random.below(3) as usize];
        let changes = if random.below(4) == 0 { 2 + random.below(3) } else { 1 };
        let mut submission = client.submit((0..changes).map(|_| random_change(random)).collect());
        if random.below(5) == 0 && submission.seq > 1 {
            submission.after = vec![1 + random.below(submission.seq - 1)];
        }
        batch.push(submission);
    }
    batch
}

/// The first verdict of each transaction.
fn verdicts(results: Vec<(Uuid, TransactionResult)>) -> BTreeMap<(Uuid, u64), TransactionResult> {
    let mut first = BTreeMap::new();
    for (client, result) in results {
        first.entry((client, result.seq)).or_insert(result);
    }
    first
}

#[tokio::test]
async fn batches_come_to_the_same_as_one_by_one() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match number("MILLSTREAM_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("MILLSTREAM_CASES").unwrap_or(300),
    };
    let mut database = Database::start().await;
    let (mut merged, mut superseded, mut rejected, mut applied) = (0, 0, 0, 0);
    for seed in seeds {
        let batch = random_batch(&mut Random(seed));
        database.sql.execute(RESET).await.unwrap();
        let together = verdicts(database.batch(batch.clone()).await);
        let rows = database.json(ROWS).await;
        database.sql.execute(RESET).await.unwrap();
        let apart = verdicts(database.each(batch.clone()).await);
        let rows_apart = database.json(ROWS).await;
        for ((client, seq), expected) in &apart {
            let submission = batch.iter().find(|s| s.client_id == *client && s.seq == *seq);
            let found = together.get(&(*client, *seq));
            assert_eq!(found, Some(expected), "MILLSTREAM_SEED={seed}\n{submission:#?}");
        }
        assert_eq!(together.len(), apart.len(), "MILLSTREAM_SEED={seed}");
        if let Some((found, expected)) = rows.lines().zip(rows_apart.lines()).find(|(a, b)| a != b) {
            panic!("MILLSTREAM_SEED={seed}\n{found}\n{expected}\n--- together\n{rows}\n--- one by one\n{rows_apart}");
        }
        for result in apart.values() {
            match result.verdict {
                millstream_schemas::stream::Verdict::Applied => applied += 1,
                millstream_schemas::stream::Verdict::Merged => merged += 1,
                millstream_schemas::stream::Verdict::Superseded => superseded += 1,
                millstream_schemas::stream::Verdict::Rejected => rejected += 1,
            }
        }
    }
    eprintln!("applied {applied}, merged {merged}, superseded {superseded}, rejected {rejected}");
    database.stack.stop().await;
}
