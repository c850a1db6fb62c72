//! `/livez` (the process answers) and `/readyz` (all that it needs is there), and an HTTP server with header timeouts.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::StatusCode;
use axum::routing::get;
use axum::{Extension, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket};

use crate::error::chain;
use crate::shutdown::Shutdown;

/// A connection must have sent its request's headers within this time.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// What the kernel keeps for a client that reads slowly, in bytes (Linux doubles it). What is there cannot be taken back when a
/// right ends, so it is not left to grow to megabytes.
const SEND_BUFFER: u32 = 256 * 1024;
/// Connections that wait to be accepted.
const BACKLOG: u32 = 1024;

/// Where the process answers about its health.
#[derive(Clone, Debug, clap::Args)]
// Several structs of this name meet in one command; a group is named after its struct.
#[group(skip)]
pub struct Args {
    /// Address of /livez and /readyz
    #[arg(long = "health-listen", env = "MILLSTREAM_HEALTH_LISTEN", default_value = "127.0.0.1:0")]
    pub listen: SocketAddr,
}

/// Where a request comes from: an extension of each request.
#[derive(Clone, Copy, Debug)]
pub struct Peer(pub SocketAddr);

/// What the process needs, and which of it is there. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Health(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    parts: BTreeMap<&'static str, bool>,
    notes: BTreeMap<String, String>,
}

/// Tells of tables that are set aside: a note each, and an error in the log when one is new.
#[derive(Debug)]
pub struct Asides {
    health: Health,
    told: Mutex<BTreeMap<String, String>>,
}

impl Asides {
    /// None so far.
    pub fn new(health: Health) -> Asides {
        Asides { health, told: Mutex::default() }
    }

    /// These are set aside, each with the reason; others no longer.
    pub fn tell<'a>(&self, aside: impl Iterator<Item = (&'a str, &'a str)>) {
        let mut found: BTreeMap<String, String> = BTreeMap::new();
        for (table, why) in aside {
            let all = found.entry(table.to_owned()).or_default();
            all.push_str(if all.is_empty() { "" } else { "; " });
            all.push_str(why);
        }
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        for table in told.keys().filter(|table| !found.contains_key(*table)) {
            self.health.set_note(&format!("table {table}"), None);
            tracing::info!(table.name = table, "the table is synced again");
        }
        for (table, why) in found.iter().filter(|(table, why)| told.get(*table) != Some(*why)) {
            self.health.set_note(&format!("table {table}"), Some(&format!("set aside, clients do not have it: {why}")));
            tracing::error!(
                table.name = table,
                reason = why,
                "the table is set aside: clients do not have it; all others go on"
            );
        }
        *told = found;
    }
}

impl Health {
    /// Nothing needed yet.
    pub fn new() -> Self {
        Health::default()
    }

    /// Says that `part` is there, or not. A part counts from its first mention.
    pub fn set_ready(&self, part: &'static str, ready: bool) {
        let before = self.state().parts.insert(part, ready);
        if before != Some(ready) {
            tracing::debug!(part, ready, "readiness");
        }
    }

    /// Says, or takes back, what an operator should know although the process as a whole does its work.
    pub fn set_note(&self, about: &str, note: Option<&str>) {
        let mut state = self.state();
        match note {
            Some(note) => state.notes.insert(about.to_owned(), note.to_owned()),
            None => state.notes.remove(about),
        };
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether every part is there.
    pub fn is_ready(&self) -> bool {
        let state = self.state();
        !state.parts.is_empty() && state.parts.values().all(|ready| *ready)
    }

    /// A line for each part, then for each note.
    pub fn text(&self) -> String {
        let state = self.state();
        let parts = state.parts.iter().map(|(part, ready)| (*part, if *ready { "ok" } else { "not ready" }));
        let notes = state.notes.iter().map(|(about, note)| (about.as_str(), note.as_str()));
        parts.chain(notes).map(|(about, says)| format!("{about}: {says}\n")).collect()
    }

    /// A line for each note.
    pub fn notes(&self) -> String {
        self.state().notes.iter().map(|(about, note)| format!("{about}: {note}\n")).collect()
    }

    /// Routes `/livez` and `/readyz`; the latter names each part, and the notes.
    pub fn router(&self) -> Router {
        let health = self.clone();
        let ready = move || {
            let health = health.clone();
            async move {
                let status = if health.is_ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                (status, health.text())
            }
        };
        Router::new().route("/livez", get(|| async { "ok\n" })).route("/readyz", get(ready))
    }
}

/// Binds and serves a router in the background until shutdown; returns the bound address.
///
/// # Errors
/// The address cannot be bound.
pub async fn serve(listen: SocketAddr, router: Router, shutdown: Shutdown) -> std::io::Result<SocketAddr> {
    let socket = if listen.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.set_send_buffer_size(SEND_BUFFER)?;
    socket.bind(listen)?;
    let listener = socket.listen(BACKLOG)?;
    let address = listener.local_addr()?;
    tokio::spawn(accept(listener, router, shutdown));
    Ok(address)
}

/// An accept loop of our own, since `axum::serve` has no header timeout: silent and dribbling connections would stay for ever.
async fn accept(listener: TcpListener, router: Router, shutdown: Shutdown) {
    loop {
        let (stream, peer) = tokio::select! {
            () = shutdown.requested() => return,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of file descriptors, most likely: others may close meanwhile.
                    tracing::warn!(error = chain(&error), "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        // A frame is one small write: waiting to fill a packet only adds latency.
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(router.clone().layer(Extension(Peer(peer))));
        let mut server = hyper::server::conn::http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
        let connection = server.serve_connection(TokioIo::new(stream), service).with_upgrades();
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(error = chain(&error), "connection ended");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_told_but_do_not_make_unready() {
        let health = Health::new();
        health.set_ready("nats", true);
        health.set_note("validators of tasks", Some("no verdict"));
        assert!(health.is_ready());
        assert_eq!(health.text(), "nats: ok\nvalidators of tasks: no verdict\n");
        health.set_note("validators of tasks", None);
        health.set_ready("nats", false);
        assert!(!health.is_ready());
        assert_eq!(health.text(), "nats: not ready\n");
    }
}
