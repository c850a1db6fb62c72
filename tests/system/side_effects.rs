//! What triggers and foreign keys write within a client's change carries that change's clock: an author never loses to what
//! their own earlier change set off, and others lose to it only where their change is older. What a trigger writes instead of a
//! change counts as the change, what it leaves out is refused.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use millstream_client::{Outcome, State};
use millstream_tests::board::{Board, PATIENCE};
use sqlx::{Connection as _, PgConnection};

const SCHEMA: &str = "
CREATE TABLE folders (id text PRIMARY KEY, name text NOT NULL);
CREATE TABLE tasks (
    id text PRIMARY KEY, title text NOT NULL, slug text, comments int NOT NULL DEFAULT 0,
    folder text REFERENCES folders ON DELETE SET NULL, shelf text DEFAULT 'none' REFERENCES folders ON DELETE SET DEFAULT
);
CREATE TABLE comments (id text PRIMARY KEY, task text NOT NULL, text text NOT NULL);
CREATE TABLE posts (id text PRIMARY KEY, title text NOT NULL, slug text, seen int NOT NULL DEFAULT 0);
CREATE FUNCTION count_comments() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    UPDATE tasks SET comments = comments + 1 WHERE id = NEW.task;
    UPDATE posts SET seen = seen + 1 WHERE id = NEW.task;
    RETURN NULL;
END $$;
CREATE TRIGGER count_comments AFTER INSERT ON comments FOR EACH ROW EXECUTE FUNCTION count_comments();
CREATE FUNCTION fill_slug() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('UPDATE %I SET slug = $1 WHERE id = $2', TG_TABLE_NAME) USING lower(NEW.title), NEW.id;
    RETURN NULL;
END $$;
CREATE TRIGGER fill_slug AFTER INSERT OR UPDATE OF title ON tasks FOR EACH ROW EXECUTE FUNCTION fill_slug();
CREATE TRIGGER fill_slug AFTER INSERT OR UPDATE OF title ON posts FOR EACH ROW EXECUTE FUNCTION fill_slug();
";
/// What a client may write. Tasks and comments merge by column, posts by row.
const TABLES: [(&str, &str, &str); 4] = [
    ("folders", "\"id\", \"name\"", "column"),
    ("tasks", "\"id\", \"title\", \"slug\", \"folder\", \"shelf\"", "column"),
    ("comments", "\"id\", \"task\", \"text\"", "column"),
    ("posts", "\"id\", \"title\", \"slug\"", "row"),
];
const SEED: &str = "INSERT INTO folders VALUES ('none', 'none'), ('a', 'a'), ('b', 'b')";

/// Triggers that leave rows out: one writes something instead.
const LEFT_OUT: &str = "
CREATE TABLE docs (id text PRIMARY KEY, title text NOT NULL, deleted_at timestamptz);
CREATE TABLE frozen (id text PRIMARY KEY, title text NOT NULL);
CREATE TABLE kept (id text PRIMARY KEY, title text NOT NULL);
CREATE TABLE names (id text PRIMARY KEY, title text NOT NULL);
CREATE TABLE trail (what text NOT NULL);
CREATE FUNCTION leave_out() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF TG_OP = 'INSERT' AND NOT EXISTS (SELECT FROM names WHERE title = NEW.title) THEN RETURN NEW; END IF;
    INSERT INTO trail VALUES (TG_TABLE_NAME);
    IF TG_TABLE_NAME = 'docs' THEN UPDATE docs SET deleted_at = now() WHERE id = OLD.id; END IF;
    RETURN NULL;
END $$;
CREATE TRIGGER leave_out BEFORE DELETE ON docs FOR EACH ROW EXECUTE FUNCTION leave_out();
CREATE TRIGGER leave_out BEFORE UPDATE OR DELETE ON frozen FOR EACH ROW EXECUTE FUNCTION leave_out();
CREATE TRIGGER leave_out BEFORE DELETE ON kept FOR EACH ROW EXECUTE FUNCTION leave_out();
CREATE TRIGGER leave_out BEFORE INSERT ON names FOR EACH ROW EXECUTE FUNCTION leave_out();
";

struct Scene {
    board: Board,
    sql: PgConnection,
    _folder: tempfile::TempDir,
}

impl Scene {
    async fn start(schema: &str, seed: &str, tables: &[(&str, &str, &str)]) -> Result<Scene> {
        let folder = tempfile::tempdir()?;
        let file = folder.path().join("millstream.toml");
        let (mut schema, mut config) = (schema.to_owned(), String::new());
        for (table, writable, conflict) in tables {
            let clocks =
                if *conflict == "column" { "ADD COLUMN field_clocks jsonb NOT NULL DEFAULT '{}'," } else { "" };
            schema += &format!(
                "ALTER TABLE {table} {clocks} ADD COLUMN updated_at timestamptz NOT NULL DEFAULT now(), ADD COLUMN client_id uuid;
                 ALTER TABLE {table} REPLICA IDENTITY FULL;\n"
            );
            config += &format!(
                "[tables.{table}]\nscope = {{ kind = \"global\" }}\nwritable = [{writable}]\nconflict = \"{conflict}\"\n\
                 write.insert = \"true\"\nwrite.update = \"true\"\nwrite.delete = \"true\"\n"
            );
        }
        std::fs::write(&file, config)?;
        let board = Board::with(|builder| builder.app_schema(schema).seed(seed).config(&file)).await?;
        let sql = PgConnection::connect(&board.stack.postgres_url()).await?;
        Ok(Scene { board, sql, _folder: folder })
    }

    async fn text(&mut self, query: &'static str) -> Result<String> {
        Ok(sqlx::query_scalar::<_, Option<String>>(query).fetch_one(&mut self.sql).await?.unwrap_or_default())
    }
}

/// Every transaction of one client is applied whole, and what it wrote last is what Postgres holds.
#[tokio::test(flavor = "multi_thread")]
async fn an_author_alone_never_loses_to_side_effects() -> Result<()> {
    let mut scene = Scene::start(SCHEMA, SEED, &TABLES).await?;
    let result = async {
        let client = scene.board.client("a", "alice").await?;
        client.execute("INSERT INTO tasks (id, title, folder, shelf) VALUES ('t', 'T', 'a', 'a')", ()).await?;
        client.settled(PATIENCE).await?;
        client.pause();
        client.status().wait_for(|status| status.state == State::Offline).await?;
        // Each line is a transaction, recorded offline.
        let mut writes = Vec::new();
        for transaction in [
            // A trigger counts the comment on the task, which then goes.
            &["INSERT INTO tasks (id, title) VALUES ('gone', 'Gone')"][..],
            &["INSERT INTO comments (id, task, text) VALUES ('c', 'gone', 'hello')"],
            &["DELETE FROM tasks WHERE id = 'gone'"],
            // A trigger writes the new row itself.
            &["INSERT INTO posts (id, title) VALUES ('gone', 'Gone')"],
            &["DELETE FROM posts WHERE id = 'gone'"],
            // A column that the trigger writes as well.
            &["UPDATE tasks SET title = 'Two' WHERE id = 't'"],
            &["UPDATE tasks SET slug = 'mine' WHERE id = 't'"],
            // What a foreign key sets.
            &["DELETE FROM folders WHERE id = 'a'"],
            &["UPDATE tasks SET folder = 'b', shelf = 'b' WHERE id = 't'"],
            // By row.
            &["INSERT INTO posts (id, title) VALUES ('p', 'First')"],
            &["INSERT INTO comments (id, task, text) VALUES ('d', 'p', 'hello')"],
            &["UPDATE posts SET title = 'Second' WHERE id = 'p'"],
            // All in one.
            &[
                "INSERT INTO folders (id, name) VALUES ('c', 'c')",
                "INSERT INTO tasks (id, title, folder) VALUES ('u', 'U', 'c')",
                "INSERT INTO comments (id, task, text) VALUES ('e', 'u', 'hello')",
                "DELETE FROM folders WHERE id = 'c'",
                "UPDATE tasks SET folder = 'b', slug = 'last of all' WHERE id = 'u'",
            ],
        ] {
            let write =
                client.tx(move |tx| transaction.iter().try_for_each(|sql| tx.execute(sql, ()).map(drop))).await?;
            writes.push((transaction, write));
        }
        client.resume();
        for (transaction, write) in writes {
            let outcome = write.confirmed().await?;
            ensure!(outcome == Outcome::Applied, "{outcome:?}: {transaction:?}");
        }
        let rows = scene
            .text(
                "SELECT string_agg(concat_ws(' ', id, title, slug, comments, folder, shelf), ', ' ORDER BY id)
                 || ' | ' || (SELECT string_agg(concat_ws(' ', id, title, slug, seen), ', ' ORDER BY id) FROM posts) FROM tasks",
            )
            .await?;
        ensure!(rows == "t Two mine 0 b b, u U last of all 1 b none | p Second second 1", "{rows}");
        // Whose they are: side effects name the client as well.
        let authors = "SELECT string_agg(DISTINCT coalesce(client_id::text, 'nobody'), ' ') FROM
                       (SELECT client_id FROM tasks UNION ALL SELECT client_id FROM posts) AS t";
        ensure!(scene.text(authors).await? == client.client_id().to_string());
        Ok(())
    }
    .await;
    scene.board.explain(result)
}

/// What another client wrote before the cause loses to its side effect, what it wrote after wins.
#[tokio::test(flavor = "multi_thread")]
async fn side_effects_are_as_new_as_their_cause() -> Result<()> {
    let mut scene = Scene::start(SCHEMA, SEED, &TABLES).await?;
    let result = async {
        let (a, b) = (scene.board.client("a", "alice").await?, scene.board.client("b", "bob").await?);
        for id in ['x', 'y'] {
            let insert = "INSERT INTO tasks (id, title, folder) VALUES (?, 'T', 'a')";
            a.execute(insert, (id.to_string(),)).await?.confirmed().await?;
        }
        let arrived = async {
            while b.query("SELECT id FROM tasks", ()).await?.rows.len() < 2 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            anyhow::Ok(())
        };
        tokio::time::timeout(PATIENCE, arrived).await.context("the rows do not arrive")??;
        for client in [&a, &b] {
            client.pause();
            client.status().wait_for(|status| status.state == State::Offline).await?;
        }
        let older = b.execute("UPDATE tasks SET folder = 'b' WHERE id = 'x'", ()).await?;
        let cause = a.execute("DELETE FROM folders WHERE id = 'a'", ()).await?;
        let newer = b.execute("UPDATE tasks SET folder = 'b' WHERE id = 'y'", ()).await?;
        a.resume();
        ensure!(cause.confirmed().await? == Outcome::Applied);
        b.resume();
        let (older, newer) = (older.confirmed().await?, newer.confirmed().await?);
        ensure!(older == Outcome::Superseded && newer == Outcome::Applied, "{older:?}, {newer:?}");
        let rows =
            scene.text("SELECT string_agg(id || coalesce(folder, ' nowhere'), ', ' ORDER BY id) FROM tasks").await?;
        ensure!(rows == "x nowhere, yb", "{rows}");
        // Plain SQL is newer than all that a row holds, as ever.
        let clock = "UPDATE tasks SET title = 'by hand' WHERE id = 'y' RETURNING field_clocks->>'title' > field_clocks->>'folder' AND client_id IS NULL";
        let newest: bool = sqlx::query_scalar(clock).fetch_one(&mut scene.sql).await?;
        ensure!(newest);
        Ok(())
    }
    .await;
    scene.board.explain(result)
}

/// A delete that a trigger made a soft one is applied, once; what triggers leave out without a word is refused, with all that they
/// did meanwhile. None of it keeps anybody waiting.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_triggers_leave_out_have_a_stated_outcome() -> Result<()> {
    let seed = "INSERT INTO docs SELECT 'd' || n, 'doc' FROM generate_series(1, 12) AS n;
                INSERT INTO frozen VALUES ('f', 'first'); INSERT INTO kept VALUES ('g', 'first'); INSERT INTO names VALUES ('n', 'taken')";
    // Row security that lets everything through changes nothing of it.
    let secure =
        "ALTER TABLE frozen ENABLE ROW LEVEL SECURITY; CREATE POLICY all_ ON frozen USING (true) WITH CHECK (true);";
    for (conflict, more) in [("column", ""), ("row", ""), ("column", secure)] {
        let schema = format!("{LEFT_OUT}{more}");
        let tables = ["docs", "frozen", "kept", "names"].map(|table| (table, "\"id\", \"title\"", conflict));
        let mut scene = Scene::start(&schema, seed, &tables).await?;
        let result = async {
            let client = scene.board.client("a", "alice").await?;
            client.ready().await?;
            let begun = Instant::now();
            let mut deletes = Vec::new();
            for n in 1..=10 {
                deletes.push(client.execute("DELETE FROM docs WHERE id = ?", (format!("d{n}"),)).await?);
            }
            for delete in deletes {
                ensure!(delete.confirmed().await? == Outcome::Applied);
            }
            ensure!(begun.elapsed() < Duration::from_secs(5), "ten soft deletes took {:?}", begun.elapsed());
            // Written before in the same transaction, once deleted and once only written.
            let both = client
                .tx(|tx| {
                    tx.execute("UPDATE docs SET title = 'last words' WHERE id = 'd11'", ())?;
                    tx.execute("DELETE FROM docs WHERE id = 'd11'", ())
                })
                .await?;
            ensure!(both.confirmed().await? == Outcome::Applied);
            let deleted = "SELECT count(*) FILTER (WHERE deleted_at IS NOT NULL) || ' of ' || count(*) FROM docs";
            ensure!(scene.text(deleted).await? == "11 of 12");
            ensure!(scene.text("SELECT count(*)::text FROM trail").await? == "11", "each delete has its effects once");
            for transaction in [
                &["UPDATE frozen SET title = 'second' WHERE id = 'f'"][..],
                &["DELETE FROM frozen WHERE id = 'f'"],
                &["UPDATE kept SET title = 'second' WHERE id = 'g'", "DELETE FROM kept WHERE id = 'g'"],
                &["INSERT INTO names (id, title) VALUES ('m', 'taken')"],
            ] {
                let write =
                    client.tx(move |tx| transaction.iter().try_for_each(|sql| tx.execute(sql, ()).map(drop))).await?;
                let code = write.confirmed().await.err().map(|error| error.code());
                let expected =
                    if more.is_empty() || !transaction[0].contains("frozen") && !transaction[0].contains("'f'") {
                        "not_written"
                    } else {
                        "permission_denied"
                    };
                ensure!(code == Some(expected), "{transaction:?}: {code:?}");
                let tx = write.tx().context("recorded")?;
                client.discard(tx).await?;
            }
            ensure!(scene.text("SELECT count(*)::text FROM trail").await? == "11", "what is refused has no effects");
            // The store shows what there is.
            let shown = async {
                loop {
                    let live = client.query("SELECT id FROM docs WHERE deleted_at IS NULL", ()).await?.rows.len();
                    let others =
                        "SELECT id FROM frozen WHERE title = 'first' UNION SELECT id FROM kept WHERE title = 'first'
                                  UNION SELECT id FROM names";
                    if (live, client.query(others, ()).await?.rows.len()) == (1, 3) {
                        return anyhow::Ok(());
                    }
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            };
            tokio::time::timeout(PATIENCE, shown).await.context("the store does not show what there is")?
        }
        .await;
        scene.board.explain(result)?;
    }
    Ok(())
}
