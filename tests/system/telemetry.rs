//! One trace from click to click, through the write-ahead log; and the metrics of who leads replication.

use std::sync::{Arc, Mutex, PoisonError};
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

/// A collector on this machine.
struct Collector {
    endpoint: String,
    /// Each an OTLP request of one process.
    bodies: Arc<Mutex<Vec<Bytes>>>,
}

impl Collector {
    /// Of the requests to a path.
    async fn start(path: &str) -> Result<Collector> {
        let bodies: Arc<Mutex<Vec<Bytes>>> = Arc::default();
        let kept = bodies.clone();
        let receive = move |body: Bytes| {
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(body);
            std::future::ready(())
        };
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let endpoint = format!("http://{}", listener.local_addr()?);
        let router = Router::new().route(path, post(receive));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(Collector { endpoint, bodies })
    }

    /// Waits for a request with all these parts.
    async fn receives(&self, parts: &[&[u8]]) -> Result<()> {
        let bodies = || self.bodies.lock().unwrap_or_else(PoisonError::into_inner);
        let found = || bodies().iter().any(|body| parts.iter().all(|part| contains(body, part)));
        let waited = async {
            while !found() {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let waited = tokio::time::timeout(Duration::from_secs(10), waited).await;
        waited.with_context(|| {
            format!("no request with {:?}", parts.iter().map(|p| String::from_utf8_lossy(p)).collect::<Vec<_>>())
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_tells_how_far_the_stream_is_behind() -> Result<()> {
    let collector = Collector::start("/v1/metrics").await?;
    let endpoint = collector.endpoint.clone();
    let board = Board::with(|builder| {
        builder.service_env("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint).service_env("OTEL_METRIC_EXPORT_INTERVAL", "200")
    })
    .await?;
    let names = ["lag_seconds", "lag_bytes", "retained_bytes"].map(|name| format!("millstream.replication.{name}"));
    let mut parts: Vec<&[u8]> = names.iter().map(|name| name.as_bytes()).collect();
    parts.push(b"millstream-replication");
    board.explain(collector.receives(&parts).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn one_trace_from_click_to_click() -> Result<()> {
    let collector = Collector::start("/v1/traces").await?;
    let endpoint = collector.endpoint.clone();
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
        a.settled(PATIENCE).await?;
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
            // The trace's id is in it as 16 raw bytes.
            collector.receives(&[service.as_bytes(), span.as_bytes(), &id]).await?;
        }
        Ok(())
    };
    board.explain(result.await)
}
