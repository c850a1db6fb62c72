//! The floor of `millstream bench fanout`: a server that sends each text it receives to all its sockets, and does nothing else.

use std::path::{Path, PathBuf};

use axum::Router;
use axum::extract::State;
use axum::extract::ws::{Message, Utf8Bytes, WebSocket, WebSocketUpgrade};
use axum::response::Response;
use axum::routing::get;
use millstream_stack::process::{Process, Spec};
use tokio::net::TcpListener;
use tokio::sync::broadcast;

use crate::error::Error;

/// Texts that may wait for a socket.
const QUEUE: usize = 1_024;

/// Flags of the hidden `millstream bench broadcast`.
#[derive(clap::Args, Clone, Debug)]
pub struct BroadcastArgs {
    /// Where to write the address that it listens on
    pub address: PathBuf,
}

/// Serves for ever.
pub async fn serve(args: BroadcastArgs) -> Result<(), Error> {
    let failed = |source| Error::Folder { path: args.address.clone(), source };
    let listener = TcpListener::bind("127.0.0.1:0").await.map_err(failed)?;
    let address = format!("ws://{}", listener.local_addr().map_err(failed)?);
    millstream_provision::files::write_atomically(&args.address, &address).map_err(failed)?;
    let (texts, _) = broadcast::channel::<Utf8Bytes>(QUEUE);
    let upgrade = async |State(texts): State<broadcast::Sender<Utf8Bytes>>, upgrade: WebSocketUpgrade| -> Response {
        // As the edge has its sockets.
        upgrade.read_buffer_size(4096).write_buffer_size(0).on_upgrade(move |socket| relay(socket, texts))
    };
    axum::serve(listener, Router::new().route("/", get(upgrade)).with_state(texts)).await.map_err(failed)
}

async fn relay(mut socket: WebSocket, texts: broadcast::Sender<Utf8Bytes>) {
    let mut heard = texts.subscribe();
    loop {
        tokio::select! {
            text = heard.recv() => {
                let Ok(text) = text else { return };
                if socket.send(Message::Text(text)).await.is_err() {
                    return;
                }
            }
            message = socket.recv() => match message {
                Some(Ok(Message::Text(text))) => drop(texts.send(text)),
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return,
            },
        }
    }
}

/// Starts it as a process of its own; returns its URL, too.
pub async fn start(folder: &Path) -> Result<(Process, String), Error> {
    let failed = |source| Error::Folder { path: folder.into(), source };
    let address = folder.join("broadcast.address");
    let spec = Spec {
        name: "broadcast".into(),
        program: std::env::current_exe().map_err(failed)?,
        arguments: vec!["bench".into(), "broadcast".into(), address.display().to_string()],
        env: Vec::new(),
        without_env: Vec::new(),
        dir: None,
        log: folder.join("broadcast.log"),
        user: None,
        has_children: false,
    };
    let mut process = Process::spawn(&spec).map_err(failed)?;
    loop {
        if let Ok(url) = std::fs::read_to_string(&address) {
            return Ok((process, url));
        }
        if !process.is_running() {
            return Err(Error::Late("the floor's server ended".into()));
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}
