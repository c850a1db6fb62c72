//! Child processes that do not outlive us.
//!
//! Three nets, since unsafe code (`prctl` between fork and exec) is not an option here:
//! 1. an orderly stop: SIGTERM, and SIGKILL after a grace time;
//! 2. where util-linux' `setpriv` exists, children are started through it with a parent-death signal, so that the
//!    kernel ends them even when we are killed with `kill -9`;
//! 3. every child is noted in a file with its start time, and the next start in the same folder ends what is left
//!    (see [`Registry`]).

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use millstream_provision::files::write_atomically;
pub use nix::sys::signal::Signal;
use nix::sys::signal::{kill, killpg};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// How often a wait looks whether the process is gone.
const POLL: Duration = Duration::from_millis(5);
/// How long a process with children has to end them when it is dropped or found left over.
const QUIT_GRACE: Duration = Duration::from_secs(2);
/// How long a killed process may take to be gone: it may hang in a disk access.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What to start.
#[derive(Clone, Debug)]
pub struct Spec {
    /// Name in messages and log file names.
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub arguments: Vec<String>,
    /// Environment variables to set.
    pub env: Vec<(String, String)>,
    /// Environment variables to remove.
    pub without_env: Vec<&'static str>,
    /// Working folder.
    pub dir: Option<PathBuf>,
    /// Where stdout and stderr go, appended.
    pub log: PathBuf,
    /// Run as this user.
    pub user: Option<User>,
    /// Whether it has children of its own, which it ends at SIGQUIT: then that is how it is told of our death.
    pub has_children: bool,
}

impl Spec {
    /// What the kernel sends the child when we die.
    fn death_signal(&self) -> Signal {
        if self.has_children { Signal::SIGQUIT } else { Signal::SIGKILL }
    }
}

/// The user that a child runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Whether the user must be let through folders that only root may enter.
    pub through_folders: bool,
}

/// A running (or ended) child.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    has_children: bool,
    status: Option<ExitStatus>,
}

impl Process {
    /// Starts it.
    pub fn spawn(spec: &Spec) -> io::Result<Process> {
        let log = File::options().create(true).append(true).open(&spec.log)?;
        let mut command = command(spec.user.as_ref(), spec.death_signal(), &spec.program);
        command.args(&spec.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // A group of its own: Ctrl-C in the terminal reaches only us, and we stop the children in order.
        command.process_group(0);
        for name in &spec.without_env {
            command.env_remove(name);
        }
        command.envs(spec.env.iter().map(|(name, value)| (name, value)));
        if let Some(dir) = &spec.dir {
            command.current_dir(dir);
        }
        let child = spawn_from_lasting_thread(command)?;
        Ok(Process { name: spec.name.clone(), child, has_children: spec.has_children, status: None })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.exit_status().is_none()
    }

    /// How it ended, if it did.
    pub fn exit_status(&mut self) -> Option<ExitStatus> {
        if self.status.is_none() {
            self.status = self.child.try_wait().ok().flatten();
        }
        self.status
    }

    /// Sends a signal to the process.
    pub fn signal(&mut self, signal: Signal) {
        if self.is_running() {
            // It may end in between: then there is nothing to tell it.
            let _ended = kill(pid(self.pid()), signal);
        }
    }

    /// Waits until it ended; false when it runs on after that time.
    pub async fn wait(&mut self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.is_running() {
            if Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(POLL).await;
        }
        true
    }

    /// Asks it to stop, waits, and kills it when it does not. True when it stopped by itself.
    pub async fn stop(&mut self, signal: Signal, grace: Duration) -> bool {
        // A stopped process (SIGSTOP) could not react.
        self.signal(Signal::SIGCONT);
        self.signal(signal);
        let by_itself = self.wait(grace).await;
        self.kill();
        by_itself
    }

    /// Kills it and its process group, and waits for its end.
    pub fn kill(&mut self) {
        if self.is_running() {
            let _ended = killpg(pid(self.pid()), Signal::SIGKILL);
            let _ended = self.child.kill();
            self.status = self.child.wait().ok();
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.has_children && self.is_running() {
            // So that its children and its shared memory go with it.
            self.signal(Signal::SIGCONT);
            self.signal(Signal::SIGQUIT);
            let deadline = Instant::now() + QUIT_GRACE;
            while self.is_running() && Instant::now() < deadline {
                pause();
            }
        }
        self.kill();
    }
}

/// A command that runs as the user and dies with us, as far as the system offers it.
pub(crate) fn command(user: Option<&User>, death_signal: Signal, program: &Path) -> Command {
    let through_folders = user.is_some_and(|user| user.through_folders);
    let mut command = match setpriv() {
        Some(setpriv) => {
            let mut command = Command::new(setpriv);
            command.arg("--pdeathsig").arg(death_signal.as_str().trim_start_matches("SIG"));
            if let (Some(user), true) = (user, through_folders) {
                // Changing the user inside setpriv keeps this one capability.
                command.args(["--reuid", &user.uid.to_string(), "--regid", &user.gid.to_string(), "--clear-groups"]);
                command.args(["--inh-caps", "+dac_override", "--ambient-caps", "+dac_override"]);
            }
            command.arg("--").arg(program);
            command
        }
        None => Command::new(program),
    };
    if let (Some(user), false) = (user, through_folders && setpriv().is_some()) {
        // The standard library drops supplementary groups when root changes the user.
        command.uid(user.uid).gid(user.gid);
    }
    command
}

/// util-linux' setpriv, if it is there and knows `--pdeathsig`.
fn setpriv() -> Option<&'static Path> {
    static SETPRIV: OnceLock<Option<PathBuf>> = OnceLock::new();
    SETPRIV
        .get_or_init(|| {
            ["/usr/bin/setpriv", "/bin/setpriv"].map(PathBuf::from).into_iter().find(|path| {
                Command::new(path)
                    .args(["--pdeathsig", "KILL", "--", "true"])
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .status()
                    .is_ok_and(|status| status.success())
            })
        })
        .as_deref()
}

/// The parent-death signal is sent when the *thread* that started the child ends. Runtime threads come and go, so one
/// thread that lasts as long as the process starts all children.
fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    type Request = (Command, SyncSender<io::Result<Child>>);
    static SPAWNER: OnceLock<Mutex<SyncSender<Request>>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (requests, inbox) = sync_channel::<Request>(1);
        std::thread::spawn(move || {
            for (mut command, reply) in inbox {
                // The asker may be gone; the child is then dropped by the channel, which leaves it running: it is
                // noted nowhere, but dies with us.
                let _unheard = reply.send(command.spawn());
            }
        });
        Mutex::new(requests)
    });
    let (reply, answer) = sync_channel(1);
    spawner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, reply))
        .map_err(|_| io::Error::other("the thread that starts processes is gone"))?;
    answer.recv().map_err(|_| io::Error::other("the thread that starts processes is gone"))?
}

fn pid(id: u32) -> Pid {
    Pid::from_raw(id as i32)
}

/// The children of a folder, in a file that outlives us.
#[derive(Debug)]
pub struct Registry {
    path: PathBuf,
    entries: Vec<ProcessMark>,
}

/// What tells a process from a later one with the same id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ProcessMark {
    name: String,
    pid: u32,
    /// Start time in clock ticks since boot; absent where the system does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    started: Option<u64>,
    /// Whether it has children of its own, which it ends at SIGQUIT.
    #[serde(default)]
    has_children: bool,
}

impl Registry {
    /// Ends what an earlier run left, and begins anew. Returns the names of the ended processes.
    pub fn open(path: PathBuf) -> io::Result<(Registry, Vec<String>)> {
        let left: Vec<ProcessMark> = match fs::read(&path) {
            // A damaged file names nobody that we could safely end.
            Ok(text) => serde_json::from_slice(&text).unwrap_or_default(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(error),
        };
        let mut ended = Vec::new();
        for entry in left {
            let first = if entry.has_children { Signal::SIGQUIT } else { Signal::SIGKILL };
            let still_there = entry.started.filter(|_| entry.started == started(entry.pid));
            if still_there.is_some_and(|birth| end_stranger(entry.pid, birth, first)) {
                ended.push(entry.name);
            }
        }
        let registry = Registry { path, entries: Vec::new() };
        registry.write()?;
        Ok((registry, ended))
    }

    /// Notes a child.
    pub fn add(&mut self, process: &Process) -> io::Result<()> {
        self.entries.retain(|entry| entry.name != process.name);
        self.entries.push(ProcessMark {
            name: process.name.clone(),
            pid: process.pid(),
            started: started(process.pid()),
            has_children: process.has_children,
        });
        self.write()
    }

    fn write(&self) -> io::Result<()> {
        let text = serde_json::to_string_pretty(&self.entries).map_err(io::Error::other)?;
        write_atomically(&self.path, &text)
    }
}

/// Ends a process that is not our child; `first` gives it the chance to take its own children along.
fn end_stranger(id: u32, birth: u64, first: Signal) -> bool {
    for signal in [Signal::SIGCONT, first] {
        if kill(pid(id), signal).is_err() {
            return false;
        }
    }
    let gone_within = |limit: Duration| {
        let deadline = Instant::now() + limit;
        while started(id) == Some(birth) {
            if Instant::now() >= deadline {
                return false;
            }
            pause();
        }
        true
    };
    if !gone_within(QUIT_GRACE) {
        let _ended = killpg(pid(id), Signal::SIGKILL);
        let _ended = kill(pid(id), Signal::SIGKILL);
        gone_within(KILL_LIMIT);
    }
    true
}

#[expect(
    clippy::disallowed_methods,
    reason = "for drops and for before anything else runs: nothing can be awaited there"
)]
fn pause() {
    std::thread::sleep(POLL);
}

/// When a process started, in clock ticks since boot (Linux; see proc_pid_stat(5)). None once it has ended, even if its
/// parent has not taken notice yet.
fn started(id: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    let fields = stat_fields(&stat)?;
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// The fields of `/proc/PID/stat` from `state` on. The program's name before them may hold blanks and parentheses.
pub fn stat_fields(stat: &str) -> Option<Vec<&str>> {
    Some(stat.rsplit_once(')')?.1.split_ascii_whitespace().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sleeper(dir: &Path) -> Spec {
        Spec {
            name: "sleeper".into(),
            program: "/bin/sleep".into(),
            arguments: vec!["100".into()],
            env: Vec::new(),
            without_env: Vec::new(),
            dir: None,
            log: dir.join("log"),
            user: None,
            has_children: false,
        }
    }

    #[test]
    fn stat_names_with_parentheses() {
        let stat = "42 (a) b (c)) S 1 42 42 0 -1";
        assert_eq!(stat_fields(stat).unwrap()[..2], ["S", "1"]);
    }

    #[tokio::test]
    async fn stop_is_by_itself_or_by_force() {
        let dir = tempfile::tempdir().unwrap();
        let mut process = Process::spawn(&sleeper(dir.path())).unwrap();
        assert!(process.is_running());
        assert!(process.stop(Signal::SIGTERM, Duration::from_secs(5)).await);
        assert!(started(process.pid()).is_none());

        let mut deaf = sleeper(dir.path());
        deaf.program = "/bin/sh".into();
        deaf.arguments = vec!["-c".into(), "trap '' TERM; echo deaf; while :; do sleep 0.05; done".into()];
        let mut process = Process::spawn(&deaf).unwrap();
        while !fs::read_to_string(&deaf.log).unwrap().contains("deaf") {
            tokio::time::sleep(POLL).await;
        }
        assert!(!process.stop(Signal::SIGTERM, Duration::from_millis(100)).await);
        assert!(started(process.pid()).is_none());
    }

    #[tokio::test]
    async fn the_next_start_ends_what_was_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        let (mut registry, ended) = Registry::open(path.clone()).unwrap();
        assert!(ended.is_empty());
        let mut process = Process::spawn(&sleeper(dir.path())).unwrap();
        registry.add(&process).unwrap();
        let reopened = tokio::task::spawn_blocking(move || Registry::open(path));
        assert!(process.wait(Duration::from_secs(5)).await, "it was ended");
        assert_eq!(reopened.await.unwrap().unwrap().1, ["sleeper"]);
    }

    #[test]
    fn another_process_with_the_same_id_is_spared() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.json");
        let mut process = Process::spawn(&sleeper(dir.path())).unwrap();
        let entry = ProcessMark { name: "other".into(), pid: process.pid(), started: Some(1), has_children: false };
        fs::write(&path, serde_json::to_vec(&[entry]).unwrap()).unwrap();
        assert!(Registry::open(path).unwrap().1.is_empty());
        assert!(process.is_running());
    }
}
