//! CPU time of processes with their children, and of all others (Linux: proc_pid_stat(5), proc_stat(5)); memory.

use std::collections::HashMap;
use std::fs;
use std::time::{Duration, Instant};

use millstream_stack::Service;
use millstream_stack::process::stat_fields;
use serde::Serialize;

use crate::figures::round;

/// Clock ticks per second in /proc: fixed on Linux.
const TICKS_PER_SECOND: u64 = 100;

/// Microseconds of CPU per change.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PerChange {
    pub edge: f64,
    pub changes: f64,
    pub replication: f64,
    pub postgres: f64,
    pub nats: f64,
    /// All clients together, which run in the bench's own process.
    pub clients: f64,
}

/// CPU times at one moment.
#[derive(Clone, Debug)]
pub struct Sample {
    at: Instant,
    processes: HashMap<u32, Ticks>,
    /// Of the whole machine.
    busy: u64,
}

#[derive(Clone, Copy, Debug)]
struct Ticks {
    parent: u32,
    /// Own, and of children that ended and were waited for.
    used: u64,
}

impl Sample {
    /// Now.
    pub fn take() -> Sample {
        let mut processes = HashMap::new();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            // It may end meanwhile.
            let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
            if let Some(ticks) = parse_process(&stat) {
                processes.insert(pid, ticks);
            }
        }
        let busy = fs::read_to_string("/proc/stat").ok().and_then(|stat| parse_machine(&stat)).unwrap_or(0);
        Sample { at: Instant::now(), processes, busy }
    }

    /// Microseconds that these processes, with all below them, used since an earlier sample.
    pub fn micros_since(&self, before: &Sample, roots: &[u32]) -> u64 {
        let ticks: u64 = roots.iter().map(|&root| self.tree(root).saturating_sub(before.tree(root))).sum();
        ticks * 1_000_000 / TICKS_PER_SECOND
    }

    /// Ticks of a process and all below it.
    fn tree(&self, root: u32) -> u64 {
        let below = |pid: u32| {
            let mut pid = pid;
            // A chain of parents is short; the bound only guards against a torn reading.
            for _ in 0..64 {
                if pid == root {
                    return true;
                }
                match self.processes.get(&pid) {
                    Some(ticks) if ticks.parent != 0 => pid = ticks.parent,
                    _ => return false,
                }
            }
            false
        };
        self.processes.iter().filter(|(pid, _)| below(**pid)).map(|(_, ticks)| ticks.used).sum()
    }
}

/// CPU time of one process so far in microseconds; 0 if it is gone.
pub fn micros(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok();
    stat.and_then(|stat| parse_process(&stat)).map_or(0, |ticks| ticks.used * 1_000_000 / TICKS_PER_SECOND)
}

/// Resident memory of a process in KiB (Linux: proc_pid_status(5)); 0 if it is gone.
pub fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0)
}

/// Microseconds per change between two samples.
pub fn per_change(before: &Sample, after: &Sample, services: &[(Service, u32)], changes: u64) -> PerChange {
    let micros = |ticks: u64| {
        let micros = ticks as f64 * 1_000_000.0 / TICKS_PER_SECOND as f64;
        round(micros / changes.max(1) as f64)
    };
    let tree = |root: u32| after.tree(root).saturating_sub(before.tree(root));
    let mut result = PerChange::default();
    for (service, pid) in services {
        let value = micros(tree(*pid));
        match service {
            Service::Edge => result.edge = value,
            Service::Changes => result.changes = value,
            Service::Replication => result.replication = value,
            Service::Postgres => result.postgres = value,
            Service::Nats => result.nats = value,
        }
    }
    let own = std::process::id();
    let own_only = |sample: &Sample| sample.processes.get(&own).map_or(0, |ticks| ticks.used);
    result.clients = micros(own_only(after).saturating_sub(own_only(before)));
    result
}

/// Watches what other programs use.
#[derive(Debug)]
pub struct Watch(Sample);

impl Watch {
    /// From now on.
    pub fn start() -> Watch {
        Watch(Sample::take())
    }

    /// Cores that programs other than ours used on average since.
    pub fn other_cores(&self) -> f64 {
        let (before, after) = (&self.0, Sample::take());
        let own = std::process::id();
        let ours = after.tree(own).saturating_sub(before.tree(own));
        let others = after.busy.saturating_sub(before.busy).saturating_sub(ours);
        let time = after.at.duration_since(before.at).max(Duration::from_millis(1));
        others as f64 / TICKS_PER_SECOND as f64 / time.as_secs_f64()
    }
}

/// Fields 4 (parent), 14 to 17 (user and system time, own and of waited-for children).
fn parse_process(stat: &str) -> Option<Ticks> {
    let fields = stat_fields(stat)?;
    let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
    let used = number(11)? + number(12)? + number(13)? + number(14)?;
    Some(Ticks { parent: fields.get(1)?.parse().ok()?, used })
}

/// User, nice, system, irq and softirq time; not idle, waiting for the disk, or stolen by the host.
fn parse_machine(stat: &str) -> Option<u64> {
    let fields: Vec<u64> = stat
        .lines()
        .next()?
        .strip_prefix("cpu ")?
        .split_ascii_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    [0, 1, 2, 5, 6].iter().map(|&index| fields.get(index)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_files() {
        let ticks = parse_process("7 (a b) S 3 7 7 0 -1 0 0 0 0 0 10 20 30 40 20 0 1 0 99").unwrap();
        assert_eq!((ticks.parent, ticks.used), (3, 100));
        assert_eq!(parse_machine("cpu  1 2 4 100 100 8 16 100 0 0\ncpu0 …"), Some(31));
        assert!(parse_process("").is_none());
    }

    #[test]
    fn trees_are_summed() {
        let ticks = |parent, used| Ticks { parent, used };
        let processes = HashMap::from([(1, ticks(0, 1)), (2, ticks(1, 2)), (3, ticks(2, 4)), (4, ticks(1, 8))]);
        let sample = Sample { at: Instant::now(), processes, busy: 0 };
        assert_eq!(sample.tree(2), 6);
        assert_eq!(sample.tree(1), 15);
        assert_eq!(sample.tree(9), 0);
    }
}
