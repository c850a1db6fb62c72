//! What the application's triggers and policies find around them when a client's change sets them off: names without a schema, and
//! settings, are as they are for the application itself.

use anyhow::{Result, ensure};
use millstream_schemas::Code;
use millstream_schemas::Operation::{Insert, Update};
use millstream_schemas::stream::{TransactionResult, Verdict};
use sqlx::Executor as _;
use uuid::Uuid;

use crate::executor::database::{Client, Database, change};

const SCHEMA: &str = "
CREATE SCHEMA app; CREATE SCHEMA late;
ALTER DATABASE app SET search_path = app, public;
CREATE TYPE app.mood AS ENUM ('fine'); CREATE TYPE public.mood AS ENUM ('other');
CREATE TABLE notes (id int PRIMARY KEY, v text, m app.mood);
CREATE TABLE app.audit (what text); CREATE TABLE late.audit (what text); CREATE TABLE public.audit (what text);
CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO audit VALUES (NEW.v); RETURN NEW; END $$;
CREATE TRIGGER note BEFORE INSERT ON notes FOR EACH ROW EXECUTE FUNCTION note();
CREATE TABLE staff (user_id text PRIMARY KEY, org text NOT NULL);
CREATE TABLE docs (id int PRIMARY KEY, org text NOT NULL, v text);
ALTER TABLE docs ENABLE ROW LEVEL SECURITY;
CREATE POLICY tenant ON docs USING (org = current_setting('app.tenant')) WITH CHECK (org = current_setting('app.tenant'));
INSERT INTO staff VALUES ('ann', 'acme'), ('bob', 'bolt');
INSERT INTO docs VALUES (1, 'acme', ''), (2, 'bolt', '');
";

const CONFIG: &str = r#"
[session]
settings = { "app.tenant" = "(SELECT org FROM staff WHERE user_id = auth.user_id)", "app.by" = "'clients'" }

[tables.notes]
scope = { kind = "global" }
writable = ["id", "v", "m"]
write.insert = "true"

[tables.staff]
scope = { kind = "global" }

[tables.docs]
scope = { kind = "global" }
writable = ["id", "org", "v"]
write.insert = "true"
write.update = "true"
"#;

fn verdicts(results: &[(Uuid, TransactionResult)]) -> Vec<Result<(), Code>> {
    let told = |result: &TransactionResult| match (&result.failure, result.verdict) {
        (None, Verdict::Applied) => Ok(()),
        (failure, _) => Err(failure.as_ref().map_or(Code::Internal, |failure| failure.code)),
    };
    results.iter().map(|(_, result)| told(result)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn triggers_and_policies_find_what_they_find_for_the_application() -> Result<()> {
    let mut database = Database::with(SCHEMA, CONFIG).await;
    let [mut ann, mut bob, mut nobody] =
        [(1, "ann"), (2, "bob"), (3, "nobody")].map(|(id, user)| Client::new(id, user));
    let note = |id: &str, v: &str| change("notes", Insert, &[("id", id)], &[("v", Some(v)), ("m", Some("fine"))], 1);

    // Rights that the trigger needs, and that it is told of.
    let results = database.each(vec![ann.submit(vec![note("1", "too early")])]).await;
    ensure!(verdicts(&results) == [Err(Code::PermissionDenied)], "{results:?}");
    let grant = "GRANT USAGE ON SCHEMA app, late TO millstream_changes; \
        GRANT INSERT ON app.audit, late.audit, public.audit TO millstream_changes";
    database.sql.execute(grant).await?;

    // The database's own path, in its order; then the one that is declared.
    let results = database.batch(vec![ann.submit(vec![note("1", "by the database")])]).await;
    ensure!(verdicts(&results) == [Ok(())], "{results:?}");
    let declared = CONFIG.replace("[session]", "[session]\nsearch_path = \"late, public\"");
    std::fs::write(&database.config, declared)?;
    let mut other = database.another().await;
    let results = other.execute(vec![bob.submit(vec![note("2", "as declared")])], false).await?;
    ensure!(verdicts(&results) == [Ok(())], "{results:?}");
    for (table, found) in [("app", "by the database"), ("late", "as declared"), ("public", "")] {
        let rows = format!("SELECT coalesce(string_agg(what, ',' ), '') FROM {table}.audit");
        let rows: String = sqlx::query_scalar(sqlx::AssertSqlSafe(rows)).fetch_one(&mut database.sql).await?;
        ensure!(rows == found, "{table}.audit: {rows}");
    }

    // Row security by a setting of the application's, for each author in one batch.
    let doc = |id: &str, v: &str| change("docs", Update, &[("id", id)], &[("v", Some(v))], 1);
    let new = |id: &str, org: &str| change("docs", Insert, &[("id", id)], &[("org", Some(org)), ("v", None)], 1);
    for one_by_one in [false, true] {
        let id = if one_by_one { ["11", "12", "13"] } else { ["21", "22", "23"] };
        let submissions = vec![
            ann.submit(vec![doc("1", "ann's")]),
            bob.submit(vec![doc("2", "bob's")]),
            ann.submit(vec![doc("2", "not ann's")]),
            nobody.submit(vec![doc("1", "nobody's")]),
            ann.submit(vec![new(id[0], "acme")]),
            bob.submit(vec![new(id[1], "acme")]),
            bob.submit(vec![new(id[2], "bolt"), doc("2", "bob's again")]),
        ];
        let mut results = if one_by_one { database.each(submissions).await } else { database.batch(submissions).await };
        results.sort_by_key(|(client, result)| (*client, result.client_seq));
        let (missing, denied) = (Err(Code::EntityMissing), Err(Code::PermissionDenied));
        let expected = [Ok(()), missing, Ok(()), Ok(()), denied, Ok(()), missing];
        ensure!(verdicts(&results) == expected, "{one_by_one}: {results:?}");
    }
    let rows = database.json("SELECT string_agg(id || v, ' ' ORDER BY id) FROM docs WHERE v <> ''").await;
    ensure!(rows == "1ann's 2bob's again", "{rows}");
    database.stack.stop().await;
    Ok(())
}
