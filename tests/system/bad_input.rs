//! What an edge says to input that it cannot use. Other sessions never notice.

use anyhow::{Result, ensure};
use millstream_schemas::frame::{MAX_FRAME_BYTES, ServerFrame};
use millstream_tests::board::Board;
use millstream_tests::raw::{Raw, hello, submit};
use serde_json::json;
use uuid::Uuid;

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_gets_a_code_and_harms_nobody() -> Result<()> {
    let board = Board::start().await?;
    let result = async {
        let url = board.stack.edge_url();
        let neighbour = board.client("n", "nora").await?;
        let (token, client_id) = (board.stack.token("alice"), Uuid::now_v7());

        // Before the session: each of these ends it.
        let good = hello(client_id, &token);
        let with = |key: &str, value: serde_json::Value| {
            let mut frame = good.clone();
            frame[key] = value;
            frame.to_string()
        };
        for (sent, code) in [
            ("not json".to_owned(), "bad_frame"),
            (json!({"type": "nonsense"}).to_string(), "bad_frame"),
            (with("surprise", 1.into()), "bad_frame"),
            (submit(1, "tasks", &["id"], &["x"]).to_string(), "out_of_order"),
            (with("protocol", 99.into()), "upgrade_required"),
            (with("token", "rubbish".into()), "bad_token"),
            (with("token", "x".repeat(300_000).into()), "too_large"),
        ] {
            let mut raw = Raw::connect(&url).await?;
            raw.text(sent.clone()).await?;
            let found = raw.error().await?;
            ensure!(found == code, "{found} instead of {code} for {:.80}", sent);
            ensure!(raw.next_text().await?.is_none(), "the session went on after {code}");
        }

        // In the session: the frame is refused, the session goes on.
        let mut raw = Raw::connect(&url).await?;
        raw.hello(client_id, &token).await?;
        for (sent, code) in [
            ("{".to_owned(), "bad_frame"),
            (json!({"type": "drop_everything"}).to_string(), "bad_frame"),
            (json!({"type": "submit", "client_seq": 1}).to_string(), "bad_frame"),
            (submit(0, "projects", &["id", "name"], &["x", "y"]).to_string(), "bad_frame"),
            (
                json!({"type": "submit", "client_seq": 1, "attempt": 1, "run_id": Uuid::nil(), "changes": []})
                    .to_string(),
                "too_large",
            ),
            (submit(7, "projects", &["id", "name"], &["x", "y"]).to_string(), "gap"),
            (format!("\"{}\"", "x".repeat(MAX_FRAME_BYTES)), "too_large"),
        ] {
            raw.text(sent.clone()).await?;
            let found = raw.error().await?;
            ensure!(found == code, "{found} instead of {code} for {:.80}", sent);
        }
        raw.binary(vec![0; 10]).await?;
        ensure!(raw.error().await? == "bad_frame");

        // Well-formed changes that cannot be executed: a verdict each, with its code.
        let id = Uuid::now_v7().to_string();
        let changes = [
            (submit(1, "pg_class", &["relname"], &["x"]), "unknown_table"),
            (submit(2, "tasks\"; DROP TABLE tasks; --", &["id"], &[&id]), "unknown_table"),
            (submit(3, "projects", &["id", "nam"], &[&id, "x"]), "unknown_column"),
            (submit(4, "projects", &["id", "created_at"], &[&id, "now"]), "column_not_writable"),
            (submit(5, "projects", &["id", "name"], &["not-a-uuid", "x"]), "invalid_value"),
            (submit(6, "projects", &["id", "name"], &[&id]), "invalid_change"),
            (submit(7, "projects", &["id", "name"], &[&id, "a\u{0}b"]), "invalid_value"),
        ];
        for (frame, code) in changes {
            let client_seq = frame["client_seq"].as_u64();
            raw.frame(frame).await?;
            let failure = raw
                .wait(|frame| match frame {
                    ServerFrame::Confirmed(confirmed) => {
                        confirmed.failed.into_iter().find(|f| Some(f.client_seq) == client_seq)
                    }
                    _ => None,
                })
                .await?;
            ensure!(failure.code.as_str() == code, "{} instead of {code}: {}", failure.code, failure.message);
        }
        let rows: i64 =
            sqlx::query_scalar("SELECT count(*) FROM projects").fetch_one(&mut board.postgres().await?).await?;
        ensure!(rows == 0 && board.audit().await?.is_empty(), "something was executed");

        // Another user's client id.
        let mut raw = Raw::connect(&url).await?;
        raw.frame(hello(client_id, &board.stack.token("mallory"))).await?;
        ensure!(raw.error().await? == "identity_mismatch");

        // `hello` comes once.
        let mut raw = Raw::connect(&url).await?;
        raw.hello(client_id, &token).await?;
        raw.frame(good.clone()).await?;
        ensure!(raw.error().await? == "out_of_order");
        ensure!(raw.next_text().await?.is_none(), "the session went on after a second hello");

        // Far over the limit: cut.
        let mut raw = Raw::connect(&url).await?;
        raw.hello(Uuid::now_v7(), &token).await?;
        // The edge may close before everything is written.
        let _ = raw.text("x".repeat(4 * MAX_FRAME_BYTES)).await;
        let closed = raw.error().await;
        ensure!(closed.is_err() || closed.as_ref().is_ok_and(|code| code == "too_large"), "{closed:?}");

        // The neighbour never noticed.
        let sql = "INSERT INTO projects (id, name) VALUES (?, 'fine')";
        neighbour.execute(sql, (Uuid::now_v7(),)).await?.confirmed().await?;
        ensure!(neighbour.status().borrow().reconnects == 0, "the neighbour was cut");
        Ok(())
    };
    board.explain(result.await)
}
