//! One trace from click to click, through the write-ahead log.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use axum::Router;
use axum::body::Bytes;
use axum::routing::post;
use millstream_tests::board::{Board, PATIENCE};
use millstream_tests::oracle::converged;
use uuid::Uuid;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

fn contains(body: &[u8], part: &[u8]) -> bool {
    body.windows(part.len()).any(|window| window == part)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_from_click_to_click() -> Result<()> {
    // A collector: each body is an OTLP request of one process, with the trace id as 16 raw bytes.
    let bodies: Arc<Mutex<Vec<Bytes>>> = Arc::default();
    let kept = bodies.clone();
    let receive = move |body: Bytes| {
        kept.lock().unwrap().push(body);
        std::future::ready(())
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let endpoint = format!("http://{}", listener.local_addr()?);
    tokio::spawn(async move { axum::serve(listener, Router::new().route("/v1/traces", post(receive))).await });

    let board = Board::with(|builder| {
        builder.service_env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint).service_env("OTEL_BSP_SCHEDULE_DELAY", "100")
    })
    .await?;
    let result = async {
        let arrived: Arc<Mutex<Vec<String>>> = Arc::default();
        let seen = arrived.clone();
        let a = board
            .builder("a", "alice")
            .traceparent_fn(|| Some(format!("00-{TRACE}-00f067aa0ba902b7-01")))
            .open()
            .await?;
        a.ready().await?;
        let project = Uuid::now_v7();
        let write = a
            .tx(move |tx| {
                tx.execute("INSERT INTO projects (id, name) VALUES (?, 'p')", (project,))?;
                tx.execute("INSERT INTO members (project_id, user_id) VALUES (?, 'bob')", (project,))
            })
            .await?;
        write.confirmed().await?;
        let b = board
            .builder("b", "bob")
            .apply_span_fn(move |traceparent| {
                seen.lock().unwrap().extend(traceparent.map(str::to_owned));
                tracing::Span::none()
            })
            .open()
            .await?;
        b.ready().await?;
        a.execute("INSERT INTO tasks (id, project_id, title) VALUES (?, ?, 't')", (Uuid::now_v7(), project)).await?;
        a.flush(PATIENCE).await?;
        converged(&board, &b, "bob").await?;
        ensure!(arrived.lock().unwrap().iter().any(|text| text.contains(TRACE)), "the trace did not reach bob");

        let id: Vec<u8> =
            (0..16).map(|n| u8::from_str_radix(&TRACE[2 * n..2 * n + 2], 16)).collect::<Result<_, _>>()?;
        for (service, span) in [
            ("millstream-edge", "submit"),
            ("millstream-changes", "apply"),
            ("millstream-replication", "replicate"),
            ("millstream-edge", "deliver"),
        ] {
            let found = || {
                bodies.lock().unwrap().iter().any(|body| {
                    contains(body, service.as_bytes()) && contains(body, span.as_bytes()) && contains(body, &id)
                })
            };
            let waited = async {
                while !found() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            };
            let waited = tokio::time::timeout(Duration::from_secs(10), waited).await;
            waited.with_context(|| format!("no span {span} of {service} in the trace"))?;
        }
        Ok(())
    };
    board.explain(result.await)
}
