//! `millstream dev`: everything on one machine, private to one folder.

use std::fs;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use millstream_provision::exit::{Exit, HasExit};
use millstream_runtime::shutdown::Shutdown;
use millstream_stack::data::DEV_DATA;
use millstream_stack::logs::{Tail, prefixed};
use millstream_stack::{Service, Stack};

/// Port of the edge unless told otherwise.
pub const DEFAULT_PORT: u16 = 4800;
/// How often logs are looked at, and whether everything still runs.
const TICK: Duration = Duration::from_millis(100);
/// A part that ended by itself is started again after this time.
const RESTART_DELAY: Duration = Duration::from_secs(1);
/// The example that runs unless told otherwise.
const BOARD: &str = "examples/board/millstream.toml";
/// The same, for a program that runs elsewhere than in Millstream's sources.
const BOARD_FILES: [(&str, &str); 3] = [
    ("millstream.toml", include_str!("../../../examples/board/millstream.toml")),
    ("schema.sql", include_str!("../../../examples/board/schema.sql")),
    ("seed.sql", include_str!("../../../examples/board/seed.sql")),
];

/// Flags of `millstream dev`.
#[derive(clap::Args, Debug)]
#[command(before_help = "Examples:
  millstream dev                                       the board example, on ws://127.0.0.1:4800
  millstream dev --config app/millstream.toml          your own tables, from app/schema.sql and app/seed.sql
  millstream dev --data /tmp/a --port 4801             a second one beside the first")]
pub struct Args {
    /// Folder for everything that is kept: database, streams, keys, logs. Delete it to begin anew
    #[arg(long, env = "MILLSTREAM_DEV_DATA", default_value = DEV_DATA)]
    pub data: PathBuf,
    /// Your millstream.toml; without it, the board example
    #[arg(long, env = "MILLSTREAM_CONFIG")]
    pub config: Option<PathBuf>,
    /// SQL that makes the tables, run once; by default schema.sql beside the configuration. May be a dump with data, as
    /// `pg_dump` writes it without --format
    #[arg(long, env = "MILLSTREAM_DEV_SCHEMA")]
    pub schema: Option<PathBuf>,
    /// SQL that makes the first rows, run once; by default seed.sql beside the configuration, if there is one
    #[arg(long, env = "MILLSTREAM_DEV_SEED")]
    pub seed: Option<PathBuf>,
    /// Port of the edge
    #[arg(long, env = "MILLSTREAM_DEV_PORT", default_value_t = DEFAULT_PORT)]
    pub port: u16,
}

/// Dev mode failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file that was named.
    #[error("cannot read {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A dump in a format of its own.
    #[error("{0} is a dump in pg_dump's own format: make SQL of it (pg_restore --file=dump.sql {0})")]
    Dump(PathBuf),
    /// The stack.
    #[error("dev mode did not start")]
    Stack(#[source] millstream_stack::Error),
    /// Signals cannot be awaited.
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
}

impl HasExit for Error {
    fn exit(&self) -> Exit {
        match self {
            Error::File { .. } | Error::Signals(_) => Exit::Config,
            Error::Stack(error) => error.exit(),
            Error::Dump(_) => Exit::Failed,
        }
    }
}

/// What the application is made of.
struct Application {
    config: PathBuf,
    schema: String,
    seed: Option<String>,
}

/// Runs `millstream dev` until Ctrl-C.
pub async fn run(args: Args) -> Result<(), Error> {
    let (began, now) = (Instant::now(), SystemTime::now());
    let colour = io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let say = move |line: &str| eprintln!("{}", prefixed("millstream", 1, line, colour));
    let shutdown = Shutdown::on_signals().map_err(Error::Signals)?;
    let application = application(&args)?;
    say("starting …");
    let mut builder = Stack::builder()
        .dir(&args.data)
        .edge_port(args.port)
        .app_schema(application.schema)
        .config(application.config)
        .deployed_keys_only()
        .progress(say);
    if let Some(seed) = application.seed {
        builder = builder.seed(seed);
    }
    if let Ok(own) = std::env::current_exe() {
        builder = builder.executable(own);
    }
    let logs = args.data.join("logs");
    let mut tails =
        Service::ALL.map(|service| Tail::new(service, logs.join(format!("{}.log", service.name()))).since(now));
    let mut stack = tokio::select! {
        started = showing(builder.start(), &mut tails, colour) => started.map_err(Error::Stack)?,
        // What was started already is killed by being dropped.
        () = shutdown.requested() => {
            say("stopped before it was ready");
            return Ok(());
        }
    };
    let ready = ready_block(&stack, &args, began.elapsed());
    let mut out = io::stdout().lock();
    // Nobody may be reading; the stack is up all the same.
    let _unread = out.write_all(ready.as_bytes()).and_then(|()| out.flush());
    drop(out);

    let mut tick = tokio::time::interval(TICK);
    let mut restart_at = Instant::now();
    while !shutdown.is_requested() {
        tokio::select! {
            _ = tick.tick() => {}
            () = shutdown.requested() => break,
        }
        show(&mut tails, colour);
        if Instant::now() < restart_at {
            continue;
        }
        for (instance, status) in stack.ended() {
            restart_at = Instant::now() + RESTART_DELAY;
            say(&format!("{} ended ({status}); starting it again", instance.0.name()));
            let started = tokio::select! {
                started = showing(stack.start_instance(instance), &mut tails, colour) => started,
                () = shutdown.requested() => break,
            };
            if let Err(error) = started {
                say(&error.to_string());
            }
        }
    }
    say("stopping …");
    // A second Ctrl-C ends us at once; the kernel or the next start then ends the rest.
    tokio::select! {
        () = stack.stop() => {}
        _ = second_interrupt() => std::process::exit(1),
    }
    show(&mut tails, colour);
    say("stopped");
    Ok(())
}

/// Waits for something, and shows meanwhile what the parts write: why one of them is not ready, for instance.
async fn showing<T>(waited_for: impl Future<Output = T>, tails: &mut [Tail], colour: bool) -> T {
    let mut waited_for = std::pin::pin!(waited_for);
    let mut tick = tokio::time::interval(TICK);
    let done = loop {
        tokio::select! {
            done = &mut waited_for => break done,
            _ = tick.tick() => show(tails, colour),
        }
    };
    show(tails, colour);
    done
}

async fn second_interrupt() {
    if tokio::signal::ctrl_c().await.is_err() {
        std::future::pending::<()>().await;
    }
}

fn show(tails: &mut [Tail], colour: bool) {
    for tail in tails {
        match tail.lines(colour) {
            Ok(lines) => lines.iter().for_each(|line| eprintln!("{line}")),
            Err(error) => eprintln!("{}", prefixed("millstream", 1, &format!("cannot read a log: {error}"), colour)),
        }
    }
}

fn application(args: &Args) -> Result<Application, Error> {
    let read = |path: &Path| {
        let bytes = fs::read(path).map_err(|source| Error::File { path: path.into(), source })?;
        if bytes.starts_with(b"PGDMP") {
            return Err(Error::Dump(path.into()));
        }
        String::from_utf8(bytes).map_err(|error| Error::File {
            path: path.into(),
            source: io::Error::new(io::ErrorKind::InvalidData, error),
        })
    };
    let config = match &args.config {
        Some(config) => config.clone(),
        None if Path::new(BOARD).is_file() => BOARD.into(),
        None => unpack_board(&args.data.join("board"))?,
    };
    let beside = |name: &str| config.parent().unwrap_or(Path::new("")).join(name);
    let schema = read(args.schema.as_deref().unwrap_or(&beside("schema.sql")))?;
    let seed = match &args.seed {
        Some(path) => Some(read(path)?),
        None => Some(beside("seed.sql")).filter(|path| path.is_file()).map(|path| read(&path)).transpose()?,
    };
    Ok(Application { config, schema, seed })
}

fn unpack_board(dir: &Path) -> Result<PathBuf, Error> {
    let failed = |source| Error::File { path: dir.into(), source };
    fs::create_dir_all(dir).map_err(failed)?;
    for (name, text) in BOARD_FILES {
        fs::write(dir.join(name), text).map_err(failed)?;
    }
    Ok(dir.join("millstream.toml"))
}

/// What there is and what to do with it.
fn ready_block(stack: &Stack, args: &Args, took: Duration) -> String {
    let program = own_command();
    let mut client = format!("{program} client");
    if args.port != DEFAULT_PORT {
        client.push_str(&format!(" --edge {}", stack.edge_url()));
    }
    if args.data != Path::new(DEV_DATA) {
        client.push_str(&format!(" --data {}", args.data.display()));
    }
    let watch = "watch \"SELECT title, done FROM tasks ORDER BY title\"";
    let write = "sql \"UPDATE tasks SET done = NOT done WHERE title = 'Buy milk'\"";
    let mut text = format!("\nready in {:.1} s\n\n", took.as_secs_f64());
    for (name, value) in [
        ("edge", stack.edge_url()),
        ("postgres", stack.postgres_url()),
        ("nats", format!("{}  (monitoring: {})", stack.nats_url(), stack.nats_monitor_url())),
        ("data", stack.dir().display().to_string()),
        ("alice", stack.token("alice")),
        ("bob", stack.token("bob")),
    ] {
        text.push_str(&format!("  {name:<9} {value}\n"));
    }
    if args.config.is_none() {
        text.push_str(&format!(
            "\nTry it in two terminals:\n  {client} --store bob.db --user bob {watch}\n  {client} --store alice.db --user alice {write}\n"
        ));
    }
    text.push_str("\nCtrl-C stops everything.\n\n");
    text
}

/// How to call this program again from the working folder.
fn own_command() -> String {
    let Ok(program) = std::env::current_exe() else { return "millstream".into() };
    match std::env::current_dir().ok().and_then(|dir| program.strip_prefix(dir).ok().map(Path::to_path_buf)) {
        Some(below) => below.display().to_string(),
        None => program.display().to_string(),
    }
}
