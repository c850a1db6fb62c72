//! Opening a client.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::FutureExt;
use millstream_client_core::backoff;
use millstream_client_core::status::Status;
use millstream_client_store::{Host, Store};
use millstream_schemas::Schema;
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval};

use crate::bus::{self, Control, Copies, Link, Progress, Supervised, WorkerEnd, WriterCommand};
use crate::changes::{ChangesWorker, closed};
use crate::client::{Client, Inner};
use crate::host::SystemHost;
use crate::spans::{ApplySpan, Traceparent};
use crate::sync::{Auth, SyncWorker};
use crate::token::{self, Tokens};
use crate::watch::Readers;
use crate::writer::{Order, Writer};
use crate::{BoxError, Error, Result};

/// How long settled entries stay in the queue, unless the app says otherwise. If the server is restored to an earlier
/// point, what it lost of them is submitted again.
const RETENTION: Duration = Duration::from_secs(7 * 24 * 3600);
/// Time between looks for other processes' commits.
const POLL: Duration = Duration::from_millis(100);

/// Before a worker that ended is started anew.
const RESTART_PAUSE: Duration = Duration::from_millis(100);

/// Settings of a client. [`Client::builder`] makes one.
#[must_use = "`open` opens the client"]
pub struct Builder {
    path: PathBuf,
    edge: Option<String>,
    tokens: Tokens,
    schema: Option<Schema>,
    traceparent: Option<Traceparent>,
    apply_span: Option<ApplySpan>,
    retention: Duration,
    max_attempts: u32,
    pub(crate) copies: Option<Copies>,
    pub(crate) host: Arc<dyn Host>,
    paused: bool,
}

impl Client {
    /// Settings of a client whose store is the file at `path`, which [`Builder::open`] creates if need be. Beside it lie SQLite's own
    /// files and `<path>-lock`.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example(token: String) -> Result<()> {
    /// let client = Client::builder("app.db").edge("wss://sync.example.org").token(token).open().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn builder(path: impl Into<PathBuf>) -> Builder {
        Builder {
            path: path.into(),
            edge: None,
            tokens: Tokens::default(),
            schema: None,
            traceparent: None,
            apply_span: None,
            retention: RETENTION,
            max_attempts: backoff::MAX_ATTEMPTS,
            copies: None,
            host: Arc::new(SystemHost),
            paused: false,
        }
    }
}

impl Builder {
    /// URL of the edge's WebSocket, `ws://…` or `wss://…`. Without one the client only records.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example() -> Result<Client> {
    /// Client::builder("app.db").edge("wss://sync.example.org").token("…").open().await
    /// # }
    /// ```
    pub fn edge(mut self, url: impl Into<String>) -> Self {
        self.edge = Some(url.into());
        self
    }

    /// The session token. When it runs out, the status says [`NeedsAuth`](crate::State::NeedsAuth) until
    /// [`Client::set_token`] brings another, unless [`Builder::token_fn`] does.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example() -> Result<Client> {
    /// let token = std::env::var("MILLSTREAM_TOKEN").unwrap_or_default();
    /// Client::builder("app.db").edge("ws://127.0.0.1:4800").token(token).open().await
    /// # }
    /// ```
    pub fn token(self, token: impl Into<String>) -> Self {
        self.tokens.set(token.into());
        self
    }

    /// Asked for a token before each attempt to connect; with [`Builder::token`], once that one is refused.
    ///
    /// When the edge ends a session because its token ran out, or because an operator ended the user's sessions, the app is
    /// asked at once and the client connects again. If that gives the same token, or an error, or is refused too, the status
    /// says [`NeedsAuth`](crate::State::NeedsAuth), and the app is asked again with back-off. Writes are recorded meanwhile.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn log_in(user: &str) -> std::result::Result<String, std::io::Error> { Ok(user.to_owned()) }
    /// # async fn example() -> Result<Client> {
    /// Client::builder("app.db")
    ///     .edge("wss://sync.example.org")
    ///     .token_fn(|| async { Ok(log_in("alice").await?) })
    ///     .open()
    ///     .await
    /// # }
    /// ```
    pub fn token_fn<F, Fut>(mut self, ask: F) -> Self
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<String, BoxError>> + Send + 'static,
    {
        self.tokens.ask_with(ask);
        self
    }

    /// The schema to begin with, so that the tables exist before the first connection. A store that has one keeps it.
    ///
    /// Ship the JSON of [`Client::schema`] with the app, or use it in tests.
    ///
    /// ```
    /// # mod local { include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/local/mod.rs")); }
    /// # local::run(async |synced| {
    /// # use millstream_client::{Client, Schema};
    /// # let directory = tempfile::tempdir()?;
    /// # let store = directory.path().join("app.db");
    /// # let json = serde_json::to_string(&synced.schema().await?)?;
    /// let schema: Schema = serde_json::from_str(&json)?;
    /// let client = Client::builder(store).schema(schema).open().await?;
    /// assert!(client.query("SELECT * FROM tasks", ()).await?.is_empty());
    /// # Ok(())
    /// # })
    /// ```
    pub fn schema(mut self, schema: Schema) -> Self {
        self.schema = Some(schema);
        self
    }

    /// Gives the W3C trace context of a local write; called within the write's span.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example() -> Result<Client> {
    /// let current = || Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".to_owned());
    /// Client::builder("app.db").traceparent_fn(current).open().await
    /// # }
    /// ```
    pub fn traceparent_fn(mut self, get: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        self.traceparent = Some(Arc::new(get));
        self
    }

    /// Makes a span that lasts while server transactions are applied, given their trace context.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example() -> Result<Client> {
    /// let span = |parent: Option<&str>| tracing::info_span!("apply", parent);
    /// Client::builder("app.db").apply_span_fn(span).open().await
    /// # }
    /// ```
    pub fn apply_span_fn(mut self, make: impl Fn(Option<&str>) -> tracing::Span + Send + Sync + 'static) -> Self {
        self.apply_span = Some(Arc::new(make));
        self
    }

    /// How long settled entries stay in the queue, by default seven days. If the server is restored to an earlier point, the ones
    /// that it lost are submitted again.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example() -> Result<Client> {
    /// let a_month = std::time::Duration::from_secs(30 * 24 * 3600);
    /// Client::builder("app.db").retention(a_month).open().await
    /// # }
    /// ```
    pub fn retention(mut self, retention: Duration) -> Self {
        self.retention = retention;
        self
    }

    /// After how many rejections by business rules a transaction waits for a person; before that it is tried again by
    /// itself. By default five.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example() -> Result<Client> {
    /// // Every rejection waits for a person.
    /// Client::builder("app.db").max_attempts(1).open().await
    /// # }
    /// ```
    pub fn max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = attempts;
        self
    }

    /// Does not connect before [`Client::resume`].
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example() -> Result<Client> {
    /// let client = Client::builder("app.db").edge("ws://127.0.0.1:4800").token("…").paused().open().await?;
    /// client.resume();
    /// # Ok(client)
    /// # }
    /// ```
    pub fn paused(mut self) -> Self {
        self.paused = true;
        self
    }

    /// Opens the store, creating it if need be, and starts the workers.
    ///
    /// A store belongs to one user: the first whose token it is given. What it holds, and what waits in it, is theirs.
    ///
    /// Does not wait for a connection: a store that was synced before is of use at once.
    ///
    /// ```no_run
    /// # use millstream_client::{Client, Result};
    /// # async fn example() -> Result<Client> {
    /// let client = Client::builder("app.db").edge("ws://127.0.0.1:4800").token("…").open().await?;
    /// client.ready().await?;
    /// # Ok(client)
    /// # }
    /// ```
    ///
    /// # Errors
    /// - [`Error::Store`] with [`StoreError::Foreign`](crate::StoreError::Foreign): the store belongs to another user than the token's.
    ///   Nothing in it is changed.
    /// - [`Error::Store`] with [`StoreError::Damaged`](crate::StoreError::Damaged): the store was damaged, and is put aside. Opening it
    ///   again makes a new one; [`Client::import`] saves the unsent changes.
    /// - [`Error::Store`] otherwise: the store cannot be used.
    /// - [`Error::Start`]: the system gives no thread.
    pub async fn open(self) -> Result<Client> {
        let path = self.path.clone();
        let schema = self.schema.clone();
        let (max_attempts, host) = (self.max_attempts, Arc::clone(&self.host));
        let user = self.tokens.given().and_then(|token| token::subject(&token));
        let open = move || -> Result<Store> {
            let mut store = Store::open(&path.to_string_lossy(), host)?;
            store.set_max_attempts(max_attempts);
            if let Some(user) = user {
                store.claim(&user)?;
            }
            if let Some(schema) = schema
                && store.schema().is_none()
            {
                store.install(&schema)?;
            }
            Ok(store)
        };
        let mut store = tokio::task::spawn_blocking(open).await.map_err(|_| Error::Closed)??;
        let info = match store.info() {
            Ok(info) => info,
            Err(error) if error.is_damage() => return Err(store.put_aside(error).into()),
            Err(error) => return Err(error.into()),
        };
        let check_due = store.is_check_due();

        let (commands, command_queue) = mpsc::channel(bus::WRITER_QUEUE);
        let (changes, change_queue) = mpsc::channel(bus::CHANGES_QUEUE);
        let changes = bus::Sender::new(changes, self.copies.clone());
        let (frames, frame_queue) = mpsc::channel(bus::SYNC_QUEUE);
        let frames = bus::Sender::new(frames, self.copies);
        let (notices, _) = broadcast::channel(bus::NOTICES);
        let mut initial = Status::default();
        initial.client_id = info.client_id;
        initial.has_synced = info.position.is_some();
        initial.schema = info.schema.clone();
        // A store holds the rows of one user.
        initial.user_id = store.owner()?;
        let (status, _) = watch::channel(initial);
        let tokens = Arc::new(self.tokens);
        let (control, control_receiver) = watch::channel(Control { paused: self.paused, ..Control::default() });
        let progress = Arc::new(Progress::default());
        let readers = Arc::new(Readers::new(self.path.clone(), commands.downgrade()));

        let writer = Writer {
            store,
            commands: command_queue,
            changes: changes.clone(),
            notices: notices.clone(),
            status: status.clone(),
            progress: Arc::clone(&progress),
            retention: self.retention,
            waiting: HashMap::new(),
            waiting_for_all: BTreeMap::new(),
            last_seq: info.last_seq,
            polls: 0,
            readers: Arc::clone(&readers),
            lost: None,
            order: Order::default(),
        };
        std::thread::Builder::new()
            .name("millstream-writer".into())
            .spawn(move || writer.run())
            .map_err(Error::Start)?;

        let changes_worker = ChangesWorker {
            events: change_queue,
            writer: commands.clone(),
            sync: frames,
            status: status.clone(),
            progress,
            control: control_receiver.clone(),
        };
        let sync_worker = SyncWorker {
            path: self.path.clone(),
            edge: self.edge,
            tokens: Arc::clone(&tokens),
            auth: Auth::default(),
            apply_span: self.apply_span,
            writer: commands.clone(),
            changes,
            frames: frame_queue,
            status: status.clone(),
            control: control_receiver.clone(),
            link: Link::default(),
            gap: false,
            welcomed: None,
            cut: 0,
            stuck: (0, tokio::time::Instant::now()),
        };
        if check_due {
            // Ends by itself when the client is closed.
            tokio::spawn(Arc::clone(&readers).check());
        }
        let tasks: Vec<JoinHandle<()>> = vec![
            tokio::spawn(supervise("changes", changes_worker)),
            tokio::spawn(supervise("sync", sync_worker)),
            tokio::spawn(poll(commands.clone(), control_receiver)),
        ];
        Ok(Client {
            inner: Arc::new(Inner {
                writer: commands,
                readers,
                notices,
                status,
                control,
                tokens,
                traceparent: self.traceparent,
                tasks: Mutex::new(tasks),
            }),
        })
    }
}

/// Runs a worker, and starts it again when it asks for that or panics.
async fn supervise(name: &str, mut part: impl Supervised) {
    loop {
        match AssertUnwindSafe(part.run()).catch_unwind().await {
            Ok(WorkerEnd::Closed) => return,
            Ok(WorkerEnd::Restart) => tracing::info!(worker = name, "starting the worker anew"),
            Err(_) => tracing::error!(worker = name, "the worker panicked; starting it anew"),
        }
        tokio::time::sleep(RESTART_PAUSE).await;
    }
}

/// Asks the writer to look around.
async fn poll(writer: mpsc::Sender<WriterCommand>, mut control: watch::Receiver<Control>) {
    let mut ticks = interval(POLL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = closed(&mut control) => return,
            _ = ticks.tick() => {
                // A busy writer looks around at the next tick.
                let _ = writer.try_send(WriterCommand::Poll);
            }
        }
    }
}
