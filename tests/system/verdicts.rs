//! What becomes of changes that meet others, rules or the limits of what their author may do; through the whole system.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use futures_util::StreamExt;
use millstream_client::testing::Host;
use millstream_client::{EntryState, Error, Outcome, State};
use millstream_provision::keys::Role;
use millstream_schemas::frame::{Confirmed, ServerFrame};
use millstream_schemas::stream::{OriginEntry, header};
use millstream_schemas::{Clock, Clocks};
use millstream_stack::Service;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::oracle::converged;
use millstream_tests::raw::Raw;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use uuid::Uuid;

/// A client that speaks the wire by hand, with stamps of the test's choosing.
struct Hand {
    raw: Raw,
    url: String,
    token: String,
    id: Uuid,
    run_id: Uuid,
    client_seq: u64,
}

impl Hand {
    async fn connect(board: &Board, user: &str) -> Result<Hand> {
        let (url, token, id) = (board.stack.edge_url(), board.stack.token(user), Uuid::now_v7());
        let mut raw = Raw::connect(&url).await?;
        raw.hello(id, &token).await?;
        Ok(Hand { raw, url, token, id, run_id: Uuid::new_v4(), client_seq: 0 })
    }

    /// Submits one change and waits for what becomes of it: a verdict's word, or a code.
    async fn change(
        &mut self,
        op: &str,
        table: &str,
        key: &[&str],
        set: &[(&str, &str)],
        stamp: u64,
    ) -> Result<String> {
        let (columns, values): (Vec<&str>, Vec<&str>) = set.iter().copied().unzip();
        let change = json!({"change_id": Uuid::now_v7(), "table": table, "op": op, "key": key, "columns": columns,
            "values": values, "stamp": stamp});
        let confirmed = self.submit(json!([change])).await?;
        if let Some(failure) = confirmed.failed.iter().find(|failure| failure.client_seq == self.client_seq) {
            return Ok(failure.code.to_string());
        }
        let lost = confirmed.lost.iter().find(|loss| loss.client_seq == self.client_seq);
        Ok(lost
            .map_or("applied".into(), |loss| serde_json::json!(loss.verdict).as_str().unwrap_or_default().to_owned()))
    }

    async fn submit(&mut self, changes: Value) -> Result<Confirmed> {
        self.client_seq += 1;
        let (client_seq, run_id) = (self.client_seq, self.run_id);
        let submit =
            json!({"type": "submit", "client_seq": client_seq, "attempt": 1, "run_id": run_id, "changes": changes});
        let settled = |frame| match frame {
            ServerFrame::Confirmed(confirmed) if confirmed.client_seq >= client_seq => Some(confirmed),
            _ => None,
        };
        self.raw.frame(submit.clone()).await?;
        match self.raw.wait(settled).await {
            Ok(confirmed) => Ok(confirmed),
            // An edge may end a session at any time, such as when memberships move during a snapshot: any client connects again.
            Err(_) => {
                self.raw = Raw::connect(&self.url).await?;
                self.raw.hello(self.id, &self.token).await?;
                self.raw.frame(submit).await?;
                self.raw.wait(settled).await
            }
        }
    }
}

/// A project with alice as owner and bob as member, by plain SQL.
async fn project(sql: &mut PgConnection) -> Result<Uuid> {
    let id = Uuid::now_v7();
    let statement = format!(
        "INSERT INTO projects (id, name) VALUES ('{id}', 'p');
         INSERT INTO members (project_id, user_id, role) VALUES ('{id}', 'alice', 'owner'), ('{id}', 'bob', 'member')"
    );
    sql.execute(sqlx::raw_sql(AssertSqlSafe(statement))).await?;
    Ok(id)
}

async fn task(sql: &mut PgConnection, project: Uuid) -> Result<String> {
    let id = Uuid::now_v7().to_string();
    // From before there were clocks: older than any change.
    let statement = format!(
        "INSERT INTO tasks (id, project_id, title) VALUES ('{id}', '{project}', 'first');
         UPDATE tasks SET field_clocks = '{{\"\": \"{}\"}}' WHERE id = '{id}'",
        Clock::default()
    );
    sql.execute(sqlx::raw_sql(AssertSqlSafe(statement))).await?;
    Ok(id)
}

async fn scalar(sql: &mut PgConnection, query: String) -> Result<String> {
    Ok(sqlx::query_scalar::<_, Option<String>>(AssertSqlSafe(query)).fetch_one(sql).await?.unwrap_or_default())
}

fn micros() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_micros() as u64)
}

/// Items 7d, 8b, 16, 25, 28: older, equal and newer stamps in both orders of arrival; losing is success and writes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn the_newer_edit_wins_in_whatever_order_it_arrives() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut sql = board.postgres().await?;
        let project = project(&mut sql).await?;
        let watcher = board.client("w", "alice").await?;
        let (mut a, mut b) = (Hand::connect(&board, "alice").await?, Hand::connect(&board, "bob").await?);
        let now = micros();
        for (case, stamp_a, stamp_b) in [("older", now - 10, now), ("equal", now, now), ("newer", now, now - 10)] {
            let mut titles = Vec::new();
            for a_first in [true, false] {
                let id = task(&mut sql, project).await?;
                let before = board.audit().await?.len();
                let mut verdicts = BTreeMap::new();
                for a_now in [a_first, !a_first] {
                    let (hand, who, stamp) = if a_now { (&mut a, "a", stamp_a) } else { (&mut b, "b", stamp_b) };
                    verdicts.insert(who, hand.change("update", "tasks", &[&id], &[("title", who)], stamp).await?);
                }
                let title = scalar(&mut sql, format!("SELECT title FROM tasks WHERE id = '{id}'")).await?;
                let winner_first = (title == "a") == a_first;
                let loser = if title == "a" { "b" } else { "a" };
                let expected = if winner_first { "superseded" } else { "applied" };
                let right = verdicts[loser] == expected && verdicts[title.as_str()] == "applied";
                ensure!(right, "{case}, a first: {a_first}: {verdicts:?}, and the title is {title}");
                // One row change for each change that took effect, none for the one that lost.
                let effects = board.audit().await?.len() - before;
                ensure!(effects == if winner_first { 1 } else { 2 }, "{case}: {effects} effects");
                titles.push(title);
            }
            ensure!(titles[0] == titles[1], "{case}: the order of arrival decided: {titles:?}");
            let wins = if case == "equal" {
                if a.id > b.id { "a" } else { "b" }
            } else if case == "newer" {
                "a"
            } else {
                "b"
            };
            ensure!(titles[0] == wins, "{case}: {titles:?}");
        }
        converged(&board, &watcher, "alice").await?;
        ensure!(scalar(&mut sql, "SELECT count(*)::text FROM millstream.changes_history".into()).await? == "0");
        // The loss is told in the log: which change, its stamp and the winner's clock.
        let log = std::fs::read_to_string(board.stack.log_path(Service::Changes))?;
        let told = log
            .lines()
            .filter(|line| line.contains("lost to") && line.contains("change.id") && line.contains("winner"));
        ensure!(told.clone().count() == 3, "{} losses in the log", told.count());
        let stamp = (now - 10).to_string();
        ensure!(told.clone().any(|line| line.contains(&stamp)), "no stamp in the log");
        Ok(())
    };
    board.explain(result.await)
}

/// Two edits of one row, each of other columns, both stand; of an edit that lost in part, the rest stands.
#[tokio::test(flavor = "multi_thread")]
async fn concurrent_edits_merge_by_column() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut sql = board.postgres().await?;
        let project = project(&mut sql).await?;
        let id = task(&mut sql, project).await?;
        let (a, b) = (board.client("a", "alice").await?, board.client("b", "bob").await?);
        for client in [&a, &b] {
            client.pause();
            client.status().wait_for(|status| status.state == State::Offline).await?;
        }
        // Both offline: b later, on one column of a's two.
        let first = a.execute("UPDATE tasks SET title = 'from a', done = 1 WHERE id = ?", (&id,)).await?;
        let second = b.execute("UPDATE tasks SET title = 'from b' WHERE id = ?", (&id,)).await?;
        b.resume();
        ensure!(second.confirmed().await? == Outcome::Applied);
        a.resume();
        ensure!(first.confirmed().await? == Outcome::Merged, "a's title lost, its tick did not");
        let row = format!(
            "SELECT title || ' ' || done || ' ' || (client_id = '{}') FROM tasks WHERE id = '{id}'",
            b.client_id()
        );
        ensure!(scalar(&mut sql, row.clone()).await? == "from b true true", "{}", scalar(&mut sql, row).await?);
        for (client, user) in [(&a, "alice"), (&b, "bob")] {
            converged(&board, client, user).await?;
            ensure!(client.failed().await?.is_empty() && client.status().borrow().pending.count == 0);
        }
        ensure!(a.queue(10).await?[0].outcome == Some(Outcome::Merged));
        // SQL that knows nothing of clocks is newer than what it sees.
        sqlx::query("UPDATE tasks SET title = 'by hand'").execute(&mut sql).await?;
        converged(&board, &a, "alice").await?;
        ensure!(a.execute("UPDATE tasks SET title = 'after'", ()).await?.confirmed().await? == Outcome::Applied);
        converged(&board, &b, "bob").await?;
        Ok(())
    };
    board.explain(result.await)
}

/// Item 58: a delete and an update meet in both orders, with either the newer; all replicas agree, nothing resurrects.
#[tokio::test(flavor = "multi_thread")]
async fn a_delete_and_an_update_agree_everywhere() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut sql = board.postgres().await?;
        let project = project(&mut sql).await?;
        let (watch_a, watch_b) = (board.client("wa", "alice").await?, board.client("wb", "bob").await?);
        let (mut a, mut b) = (Hand::connect(&board, "alice").await?, Hand::connect(&board, "bob").await?);
        let now = micros();
        for (delete, update, delete_first, verdicts, remains) in [
            (now, now - 10, true, ("applied", "entity_missing"), "0"),
            (now, now - 10, false, ("applied", "applied"), "0"),
            (now - 10, now, true, ("applied", "entity_missing"), "0"),
            (now - 10, now, false, ("superseded", "applied"), "1"),
        ] {
            let id = task(&mut sql, project).await?;
            let (mut deleted, mut updated) = (String::new(), String::new());
            for delete_now in [delete_first, !delete_first] {
                if delete_now {
                    deleted = a.change("delete", "tasks", &[&id], &[], delete).await?;
                } else {
                    updated = b.change("update", "tasks", &[&id], &[("title", "edited")], update).await?;
                }
            }
            ensure!((deleted.as_str(), updated.as_str()) == verdicts, "{delete_first}: {deleted}, {updated}");
            ensure!(scalar(&mut sql, format!("SELECT count(*)::text FROM tasks WHERE id = '{id}'")).await? == remains);
            converged(&board, &watch_a, "alice").await?;
            converged(&board, &watch_b, "bob").await?;
        }
        // The delete of what another change of the same client has deleted: stated, nothing more.
        let id = task(&mut sql, project).await?;
        ensure!(a.change("delete", "tasks", &[&id], &[], now).await? == "applied");
        ensure!(a.change("delete", "tasks", &[&id], &[], now + 1).await? == "entity_missing");
        Ok(())
    };
    board.explain(result.await)
}

/// Item 59: clocks a day off in both directions: none pins a row beyond the bound, and whoever has seen a row can edit it.
#[tokio::test(flavor = "multi_thread")]
async fn no_clock_pins_a_row_in_the_future() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut sql = board.postgres().await?;
        let project = project(&mut sql).await?;
        let id = task(&mut sql, project).await?;
        let watcher = board.client("w", "bob").await?;
        let mut a = Hand::connect(&board, "alice").await?;
        let day = 24 * 3_600 * 1_000_000;
        ensure!(a.change("update", "tasks", &[&id], &[("title", "now")], micros()).await? == "applied");
        ensure!(a.change("update", "tasks", &[&id], &[("title", "yesterday")], micros() - day).await? == "superseded");
        ensure!(a.change("update", "tasks", &[&id], &[("title", "tomorrow")], micros() + day).await? == "applied");
        let clocks = scalar(&mut sql, format!("SELECT field_clocks::text FROM tasks WHERE id = '{id}'")).await?;
        let ahead = Clocks::parse(&clocks).of("title").stamp.saturating_sub(micros());
        ensure!(ahead <= 60_000_000, "{ahead} us ahead");
        // Two of them in one transaction keep their order, though both are cut to the bound.
        let change = |title: &str, stamp: u64| {
            json!({"change_id": Uuid::now_v7(), "table": "tasks", "op": "update", "key": [id], "columns": ["title"],
                "values": [title], "stamp": stamp})
        };
        a.submit(json!([change("first", micros() + day), change("second", micros() + day + 1)])).await?;
        ensure!(scalar(&mut sql, format!("SELECT title FROM tasks WHERE id = '{id}'")).await? == "second");
        // One with a true clock who has seen it.
        converged(&board, &watcher, "bob").await?;
        let edit = watcher.execute("UPDATE tasks SET title = 'seen' WHERE id = ?", (&id,)).await?;
        ensure!(edit.confirmed().await? == Outcome::Applied);
        converged(&board, &watcher, "bob").await?;
        ensure!(scalar(&mut sql, format!("SELECT title FROM tasks WHERE id = '{id}'")).await? == "seen");
        Ok(())
    };
    board.explain(result.await)
}

/// Items 7a, 7b, 8a: every operation on every table by an owner, a member and a stranger, to whom a row that is there is told of
/// as one that is not; what is forged changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn each_may_do_what_the_rules_allow() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut sql = board.postgres().await?;
        let (ok, no, gone) = ("applied", "permission_denied", "entity_missing");
        // Table, operation, and what becomes of it for alice (owner), bob (member), mallory (stranger).
        let cases = [
            ("projects", "insert", [ok, ok, ok]),
            ("projects", "update", [ok, ok, gone]),
            ("projects", "delete", [ok, no, gone]),
            ("members", "insert", [ok, no, no]),
            ("members", "update", [ok, no, gone]),
            ("members", "delete", [ok, no, gone]),
            ("tasks", "insert", [ok, ok, no]),
            ("tasks", "update", [ok, ok, gone]),
            ("tasks", "delete", [ok, ok, gone]),
            ("comments", "insert", [ok, ok, no]),
            ("comments", "update", [no, ok, gone]),
            ("comments", "delete", [ok, ok, gone]),
        ];
        let mut hands = Vec::new();
        for user in ["alice", "bob", "mallory"] {
            hands.push(Hand::connect(&board, user).await?);
        }
        for (table, op, expected) in cases {
            for (hand, expected) in hands.iter_mut().zip(expected) {
                let project = project(&mut sql).await?;
                let (task, new) = (task(&mut sql, project).await?, Uuid::now_v7().to_string());
                let comment = Uuid::now_v7().to_string();
                let made = format!(
                    "INSERT INTO comments (id, project_id, task_id, author_id, body) VALUES ('{comment}', '{project}', '{task}', 'bob', 'x');
                     INSERT INTO members (project_id, user_id) VALUES ('{project}', 'carol')"
                );
                sql.execute(sqlx::raw_sql(AssertSqlSafe(made))).await?;
                let project = project.to_string();
                let (key, set): (Vec<&str>, Vec<(&str, &str)>) = match (table, op) {
                    ("projects", "insert") => (vec![&new], vec![("id", &new), ("name", "n")]),
                    ("projects", "update") => (vec![&project], vec![("name", "n")]),
                    ("projects", _) => (vec![&project], vec![]),
                    ("members", "insert") => {
                        (vec![&project, "dave"], vec![("project_id", &project), ("user_id", "dave")])
                    }
                    ("members", "update") => (vec![&project, "carol"], vec![("role", "owner")]),
                    ("members", _) => (vec![&project, "carol"], vec![]),
                    ("tasks", "insert") => (vec![&new], vec![("id", &new), ("project_id", &project), ("title", "t")]),
                    ("tasks", "update") => (vec![&task], vec![("title", "t")]),
                    ("tasks", _) => (vec![&task], vec![]),
                    ("comments", "insert") => {
                        (vec![&new], vec![("id", &new), ("project_id", &project), ("task_id", &task), ("body", "b")])
                    }
                    ("comments", "update") => (vec![&comment], vec![("body", "b")]),
                    (_, _) => (vec![&comment], vec![]),
                };
                let before = board.audit().await?.len();
                let found = hand.change(op, table, &key, &set, micros()).await?;
                ensure!(found == expected, "{op} {table}: {found} instead of {expected}");
                ensure!(expected == ok || board.audit().await?.len() == before, "{op} {table}: something was written");
            }
        }
        // Rows that are not there.
        for op in ["update", "delete"] {
            let set: &[(&str, &str)] = if op == "update" { &[("title", "t")] } else { &[] };
            let missing = Uuid::now_v7().to_string();
            ensure!(hands[0].change(op, "tasks", &[&missing], set, micros()).await? == "entity_missing");
            ensure!(scalar(&mut sql, format!("SELECT count(*)::text FROM tasks WHERE id = '{missing}'")).await? == "0");
        }
        // Who one is comes from the token: columns that say otherwise cannot be set.
        let project = project(&mut sql).await?;
        let (task, project) = (task(&mut sql, project).await?, project.to_string());
        let alice = Uuid::nil().to_string();
        for (column, value) in [("client_id", alice.as_str()), ("updated_at", "2000-01-01"), ("field_clocks", "{}")] {
            let found = hands[1].change("update", "tasks", &[&task], &[(column, value)], micros()).await?;
            ensure!(found == "column_not_writable", "{column}: {found}");
        }
        let id = Uuid::now_v7().to_string();
        let set =
            [("id", id.as_str()), ("project_id", &project), ("task_id", &task), ("body", "b"), ("author_id", "alice")];
        ensure!(hands[1].change("insert", "comments", &[&id], &set, micros()).await? == "column_not_writable");
        ensure!(hands[1].change("insert", "comments", &[&id], &set[..4], micros()).await? == "applied");
        ensure!(scalar(&mut sql, format!("SELECT author_id FROM comments WHERE id = '{id}'")).await? == "bob");
        // Values are values, whatever they contain.
        let rude = "'; DROP TABLE tasks; -- \" \\ $1 é\u{2028}";
        ensure!(hands[0].change("update", "tasks", &[&task], &[("title", rude)], micros()).await? == "applied");
        ensure!(scalar(&mut sql, format!("SELECT title FROM tasks WHERE id = '{task}'")).await? == rude);
        Ok(())
    };
    board.explain(result.await)
}

/// A row does not get to where its author may not write: by being moved, or by what it refers to.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_moves_a_row_into_a_project_of_others() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut sql = board.postgres().await?;
        let (own, foreign) = (project(&mut sql).await?, Uuid::now_v7());
        let insert = format!("INSERT INTO projects (id, name) VALUES ('{foreign}', 'foreign')");
        sql.execute(sqlx::raw_sql(AssertSqlSafe(insert))).await?;
        let (task, other, theirs) =
            (task(&mut sql, own).await?, task(&mut sql, own).await?, task(&mut sql, foreign).await?);
        let (own, foreign) = (own.to_string(), foreign.to_string());
        let mut bob = Hand::connect(&board, "bob").await?;
        let comment = Uuid::now_v7().to_string();
        let insert = |id: &str, project: &str, task: &str| {
            [("id", id), ("project_id", project), ("task_id", task), ("body", "b")].map(|(n, v)| (n, v.to_owned()))
        };
        for (project, task, expected) in [
            (&own, &theirs, "business_rule"),
            (&foreign, &theirs, "permission_denied"),
            (&foreign, &task, "permission_denied"),
            (&own, &Uuid::now_v7().to_string(), "business_rule"),
            (&own, &task, "applied"),
        ] {
            let set = insert(&comment, project, task);
            let set: Vec<(&str, &str)> = set.iter().map(|(name, value)| (*name, value.as_str())).collect();
            let found = bob.change("insert", "comments", &[&comment], &set, micros()).await?;
            ensure!(found == expected, "a comment in {project} on {task}: {found}");
        }
        for (table, id, set, expected) in [
            ("comments", &comment, vec![("project_id", &foreign)], "permission_denied"),
            ("comments", &comment, vec![("project_id", &foreign), ("task_id", &theirs)], "permission_denied"),
            ("comments", &comment, vec![("task_id", &theirs)], "permission_denied"),
            ("comments", &comment, vec![("task_id", &other)], "permission_denied"),
            ("comments", &comment, vec![("body", &other)], "applied"),
            ("tasks", &task, vec![("project_id", &foreign)], "permission_denied"),
            ("tasks", &theirs, vec![("project_id", &own)], "entity_missing"),
        ] {
            let set: Vec<(&str, &str)> = set.iter().map(|(name, value)| (*name, value.as_str())).collect();
            let found = bob.change("update", table, &[id], &set, micros()).await?;
            ensure!(found == expected, "update {table} {set:?}: {found}");
        }
        // Nor does what was one's own stay so.
        sqlx::query("DELETE FROM members WHERE user_id = 'bob'").execute(&mut sql).await?;
        let found = bob.change("update", "comments", &[&comment], &[("body", "late")], micros()).await?;
        ensure!(found == "entity_missing", "{found}");
        ensure!(
            scalar(&mut sql, "SELECT string_agg(project_id::text, ',') FROM comments".into()).await?.contains(&own)
        );
        Ok(())
    };
    board.explain(result.await)
}

/// Items 7c, 9a, 9b, 9c: a declared rule and a constraint, by their names; the rest of the batch is unaffected; only the
/// author hears of it, also when it was away.
#[tokio::test(flavor = "multi_thread")]
async fn a_rejection_names_its_rule_and_reaches_its_author_only() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut sql = board.postgres().await?;
        let project = project(&mut sql).await?;
        let (a, mut other) =
            (board.builder("a", "alice").max_attempts(1).open().await?, Hand::connect(&board, "bob").await?);
        a.ready().await?;
        let mut writes = Vec::new();
        for n in 0..30 {
            let title = match n {
                7 => " ".to_owned(),
                11 => "x".repeat(501),
                n => format!("t{n}"),
            };
            let insert = "INSERT INTO tasks (id, project_id, title) VALUES (?, ?, ?)";
            writes.push(a.execute(insert, (Uuid::now_v7(), project, title)).await?);
        }
        for (n, write) in writes.iter().enumerate() {
            let expected = match n {
                7 => Some("blank_title"),
                11 => Some("tasks_title_check"),
                _ => None,
            };
            match (write.confirmed().await, expected) {
                (Ok(_), None) => {}
                (Err(Error::Rejected { code, rule, .. }), Some(expected)) => {
                    ensure!((code.as_str(), rule.as_deref()) == ("business_rule", Some(expected)), "{code} {rule:?}");
                }
                (verdict, _) => anyhow::bail!("{n}: {verdict:?}"),
            }
        }
        let failed = a.failed().await?;
        ensure!(failed.len() == 2 && failed.iter().all(|failed| failed.state == EntryState::Error), "{failed:?}");
        ensure!(failed[0].message == "a task needs a title, not only white space", "{:?}", failed[0].message);
        let history = "SELECT count(*)::text || ' ' || min(user_id) FROM millstream.changes_history";
        ensure!(scalar(&mut sql, history.into()).await? == "2 alice");
        // While it is away.
        a.pause();
        a.status().wait_for(|status| status.state == State::Offline).await?;
        let late =
            a.execute("INSERT INTO tasks (id, project_id, title) VALUES (?, ?, '')", (Uuid::now_v7(), project)).await?;
        a.close().await?;
        let a = board.client("a", "alice").await?;
        let tx = late.tx().context("nothing was recorded")?;
        a.settled(PATIENCE).await?;
        ensure!(a.failed().await?.iter().any(|failed| failed.tx == tx));
        // Bob's session saw rows, and nothing about alice's failures.
        let task = Uuid::now_v7().to_string();
        let project = project.to_string();
        let set = [("id", task.as_str()), ("project_id", project.as_str()), ("title", "bob's")];
        let confirmed = {
            let (columns, values): (Vec<&str>, Vec<&str>) = set.iter().copied().unzip();
            let change = json!({"change_id": Uuid::now_v7(), "table": "tasks", "op": "insert", "key": [task],
                "columns": columns, "values": values, "stamp": micros()});
            other.submit(json!([change])).await?
        };
        ensure!(confirmed.failed.is_empty() && confirmed.client_seq == 1, "{confirmed:?}");
        Ok(())
    };
    board.explain(result.await)
}

/// Item 12: a business rule that comes to hold is got over by the automatic retry; a fault of the server costs no attempt.
#[tokio::test(flavor = "multi_thread")]
async fn what_fails_for_now_is_tried_again_until_it_holds() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut sql = board.postgres().await?;
        let project = project(&mut sql).await?;
        let a = board.builder("a", "alice").max_attempts(20).open().await?;
        a.ready().await?;
        sqlx::query("ALTER TABLE tasks ADD CONSTRAINT no_ducks CHECK (title <> 'duck')").execute(&mut sql).await?;
        let id = Uuid::now_v7();
        let write = a.execute("INSERT INTO tasks (id, project_id, title) VALUES (?, ?, 'duck')", (id, project)).await?;
        ensure!(write.confirmed().await.is_err_and(|error| error.code() == "business_rule"));
        let history = "SELECT count(*)::text FROM millstream.changes_history";
        let patience = tokio::time::Instant::now() + Duration::from_secs(60);
        while scalar(&mut sql, history.into()).await?.parse::<u32>()? < 3 {
            ensure!(tokio::time::Instant::now() < patience, "it is not tried again");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        sqlx::query("ALTER TABLE tasks DROP CONSTRAINT no_ducks").execute(&mut sql).await?;
        let entry = loop {
            let entry = a.queue(1).await?.remove(0);
            if entry.state == EntryState::Confirmed {
                break entry;
            }
            ensure!(tokio::time::Instant::now() < patience, "{entry:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        ensure!(entry.attempts >= 3 && entry.error.is_none() && entry.error_code.is_none(), "{entry:?}");
        let audit = board.audit().await?;
        ensure!(audit.iter().filter(|entry| entry.2 == id.to_string()).count() == 1, "{audit:?}");

        // A lock that outlasts the executor's patience, twice: no verdict, no attempt, applied once.
        let mut lock = PgConnection::connect(&board.stack.postgres_url()).await?;
        lock.execute("BEGIN; LOCK TABLE tasks IN ACCESS EXCLUSIVE MODE").await?;
        let (rows, id) = (scalar(&mut sql, history.into()).await?, Uuid::now_v7());
        let write =
            a.execute("INSERT INTO tasks (id, project_id, title) VALUES (?, ?, 'goose')", (id, project)).await?;
        ensure!(tokio::time::timeout(Duration::from_secs(12), write.confirmed()).await.is_err(), "it was not held up");
        lock.execute("COMMIT").await?;
        ensure!(tokio::time::timeout(PATIENCE, write.confirmed()).await?? == Outcome::Applied);
        ensure!(a.queue(1).await?[0].attempts == 0 && scalar(&mut sql, history.into()).await? == rows);
        ensure!(board.audit().await?.iter().filter(|entry| entry.2 == id.to_string()).count() == 1);
        converged(&board, &a, "alice").await?;
        Ok(())
    };
    board.explain(result.await)
}

/// Item 37: after an insert, two updates and a delete by one client, the log names it each time, and the row meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn the_log_names_the_client_of_each_change() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let mut sql = board.postgres().await?;
        let project = project(&mut sql).await?;
        let nats = millstream_runtime::nats::connect(&board.stack.nats_args(Role::Admin), "admin").await?;
        let mut log = nats.client.subscribe("ms.wal.>").await?;
        nats.client.flush().await?;
        let a = board.client("a", "alice").await?;
        let id = Uuid::now_v7();
        for statement in [
            "INSERT INTO tasks (id, project_id, title) VALUES (?1, ?2, 't')",
            "UPDATE tasks SET title = 'u' WHERE id = ?1 AND ?2 <> ''",
            "UPDATE tasks SET done = 1 WHERE id = ?1 AND ?2 <> ''",
            "DELETE FROM tasks WHERE id = ?1 AND ?2 <> ''",
        ] {
            a.execute(statement, (id, project)).await?.confirmed().await?;
            let origin = loop {
                let message = tokio::time::timeout(PATIENCE, log.next()).await?.context("the log ended")?;
                if let Some(origin) = message.headers.as_ref().and_then(|headers| headers.get(header::ORIGIN)) {
                    break serde_json::from_str::<Vec<OriginEntry>>(origin.as_str())?;
                }
            };
            ensure!(origin.len() == 1 && origin[0].client_id == a.client_id(), "{statement}: {origin:?}");
            let row = format!("SELECT bool_and(client_id = '{}')::text FROM tasks WHERE id = '{id}'", a.client_id());
            ensure!(["true", ""].contains(&scalar(&mut sql, row).await?.as_str()), "{statement}");
        }
        Ok(())
    };
    board.explain(result.await)
}

/// A clock that is off by so many microseconds.
struct Skewed(i64);

impl Host for Skewed {
    fn now_micros(&self) -> u64 {
        micros().saturating_add_signed(self.0)
    }

    fn uuid(&self) -> Uuid {
        Uuid::now_v7()
    }
}

/// The heart of merging: clients with clocks a day off, offline and online by chance, edit the columns of the same rows.
/// Afterwards all replicas equal Postgres, and each column has the value of the newest edit.
#[tokio::test(flavor = "multi_thread")]
async fn columns_converge_to_the_newest_edit_whatever_the_clocks_and_the_network_do() -> Result<()> {
    const ROUNDS: usize = 6;
    const EDITS: usize = 60;
    let board = Board::start().await?;
    let result = async {
        let mut sql = board.postgres().await?;
        let project = project(&mut sql).await?;
        let mut random = StdRng::seed_from_u64(
            std::env::var("MILLSTREAM_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1),
        );
        let mut ids = Vec::new();
        for _ in 0..4 {
            ids.push(task(&mut sql, project).await?);
        }
        let day = 24 * 3_600 * 1_000_000;
        let mut clients = Vec::new();
        for (n, skew) in [0, -day, day, 30_000_000, -1_000_000].into_iter().enumerate() {
            let user = ["alice", "bob"][n % 2];
            let client = board.builder(&n.to_string(), user).host(Skewed(skew)).open().await?;
            client.ready().await?;
            clients.push((client, user, skew));
        }
        let mut total = 0;
        for round in 0..ROUNDS {
            for (client, _, _) in &clients {
                if random.random_bool(0.6) { client.pause() } else { client.resume() }
            }
            for n in 0..EDITS {
                let (client, _, _) = &clients[random.random_range(0..clients.len())];
                let id = &ids[random.random_range(0..ids.len())];
                let value = format!("{round}.{n}");
                let set = match random.random_range(0..3) {
                    0 => "title = ?1 || ' t'",
                    1 => "position = ?3",
                    _ => "title = ?1 || ' tp', position = ?3",
                };
                let statement = format!("UPDATE tasks SET {set} WHERE id = ?2 AND ?1 <> '' AND ?3 >= 0");
                client.execute(&statement, (value, id, (round * EDITS + n) as f64)).await?;
                total += 1;
            }
            for (client, _, _) in &clients {
                client.resume();
                client.settled(PATIENCE).await?;
            }
            for (client, user, _) in &clients {
                converged(&board, client, user).await?;
            }
        }
        let mut edits = Vec::new();
        let mut outcomes = BTreeMap::new();
        for (client, _, skew) in &clients {
            for entry in client.queue(10_000).await? {
                ensure!(entry.state == EntryState::Confirmed, "{entry:?}");
                *outcomes.entry(format!("{:?}", entry.outcome)).or_insert(0) += 1;
                let client_seq = entry.client_seq.context("a confirmed entry has a number")?;
                let clock = Clock { stamp: entry.change.stamp, client_id: client.client_id(), client_seq, index: 0 };
                edits.push((entry.change, clock, *skew));
            }
        }
        ensure!(edits.len() == total, "{} of {total} edits", edits.len());
        for id in &ids {
            let clocks = Clocks::parse(
                &scalar(&mut sql, format!("SELECT field_clocks::text FROM tasks WHERE id = '{id}'")).await?,
            );
            for column in ["title", "position"] {
                let value = scalar(&mut sql, format!("SELECT {column}::text FROM tasks WHERE id = '{id}'")).await?;
                let winner = clocks.of(column);
                let of_column = |change: &millstream_client::Change| {
                    let place = change.columns.iter().position(|name| name == column)?;
                    (change.key[0].as_ref() == Some(id)).then(|| change.values[place].clone().unwrap_or_default())
                };
                let written = edits
                    .iter()
                    .find(|(change, clock, _)| {
                        of_column(change).is_some()
                            && (clock.client_id, clock.client_seq) == (winner.client_id, winner.client_seq)
                    })
                    .and_then(|(change, _, _)| of_column(change));
                ensure!(
                    written.as_deref() == Some(&value),
                    "{column} of {id} is {value}, its clock's edit wrote {written:?}"
                );
                // Those that were not cut to the bound compare as they were made.
                for (change, clock, _) in edits.iter().filter(|(_, _, skew)| *skew <= 30_000_000) {
                    ensure!(
                        of_column(change).is_none() || *clock <= winner,
                        "{column} of {id}: {clock} is newer than {winner}"
                    );
                }
            }
        }
        ensure!(outcomes.len() >= 2, "nothing ever lost: {outcomes:?}");
        println!("{total} edits by {} clients: {outcomes:?}", clients.len());
        Ok(())
    };
    board.explain(result.await)
}
