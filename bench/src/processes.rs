//! What a process has used so far, by /proc.

use crate::error::{BenchError, Result};
use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

/// A process of a measured system.
#[derive(Clone, Debug)]
pub struct Watched {
    pub name: String,
    pub pid: u32,
}

impl Watched {
    pub fn new(name: impl Into<String>, pid: u32) -> Self {
        Self { name: name.into(), pid }
    }

    /// User and system time of all its threads, ended ones included. What the kernel does for it in threads of its
    /// own (writeback, network interrupts) is in nobody's account.
    pub fn cpu(&self) -> Result<Duration> {
        let path = format!("/proc/{}/stat", self.pid);
        let failed = |because: &str| BenchError::Failed {
            what: format!("CPU time of {} from {path}", self.name),
            because: because.to_string(),
        };
        let text = fs::read_to_string(&path).map_err(|error| failed(&error.to_string()))?;
        if is_ended(&text) {
            return Err(failed("found it ended, expected it to run for as long as it is measured"));
        }
        let ticks = cpu_ticks(&text).ok_or_else(|| failed("fields 14 and 15 are not there"))?;
        // SAFETY: sysconf reads a constant.
        let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
        Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
    }

    /// What it had the disk write so far.
    pub fn written_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/io", self.pid);
        let wrap = BenchError::wrap(format!("bytes written by {} from {path}", self.name));
        let text = fs::read_to_string(path).map_err(|error| error.to_string());
        let found = text.and_then(|text| io_written(&text).ok_or_else(|| "no write_bytes line".to_string()));
        found.map_err(wrap)
    }

    pub fn resident_bytes(&self) -> Result<u64> {
        let path = format!("/proc/{}/status", self.pid);
        let wrap = BenchError::wrap(format!("memory of {} from {path}", self.name));
        let text = fs::read_to_string(path).map_err(|error| error.to_string());
        let kib = text.and_then(|text| resident_kib(&text).ok_or_else(|| "no VmRSS line".to_string()));
        Ok(kib.map_err(wrap)? * 1024)
    }
}

/// The name in field 2 may hold anything, so what counts begins behind its last bracket.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user + system)
}

/// A child that nobody has waited for is still listed.
fn is_ended(stat: &str) -> bool {
    stat.rsplit_once(')').is_some_and(|(_, fields)| fields.trim_start().starts_with('Z'))
}

fn io_written(io: &str) -> Option<u64> {
    io.lines().find_map(|line| line.strip_prefix("write_bytes: "))?.trim().parse().ok()
}

fn resident_kib(status: &str) -> Option<u64> {
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

/// CPU time of each of `processes`, in order.
pub fn cpu_of(processes: &[Watched]) -> Result<Vec<Duration>> {
    processes.iter().map(Watched::cpu).collect()
}

/// Of this process.
pub fn own_cpu() -> Result<Duration> {
    cpu_by_usage(UsageWho::RUSAGE_SELF)
}

/// Of all the threads of all our children that have ended and were waited for.
pub fn children_cpu() -> Result<Duration> {
    cpu_by_usage(UsageWho::RUSAGE_CHILDREN)
}

/// Whatever ends us ends it too.
pub fn end_with_us(command: &mut Command) {
    use nix::sys::{prctl, signal::Signal};
    // SAFETY: between fork and exec only one system call is made, which allocates nothing.
    unsafe {
        command.pre_exec(|| prctl::set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from));
    }
}

fn cpu_by_usage(who: UsageWho) -> Result<Duration> {
    let usage = getrusage(who).map_err(BenchError::wrap("getrusage"))?;
    let duration = |time: nix::sys::time::TimeVal| {
        use nix::sys::time::TimeValLike;
        Duration::from_micros(u64::try_from(time.num_microseconds()).unwrap_or(0))
    };
    Ok(duration(usage.user_time()) + duration(usage.system_time()))
}

/// What a process costs while nothing is asked of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Idle {
    pub process: String,
    pub percent_of_a_core: f64,
    pub resident_bytes: u64,
}

pub fn idle(processes: &[Watched], window: Duration) -> Result<Vec<Idle>> {
    let before = cpu_of(processes)?;
    std::thread::sleep(window);
    let after = cpu_of(processes)?;
    let used = before.iter().zip(&after).map(|(before, after)| after.saturating_sub(*before));
    processes
        .iter()
        .zip(used)
        .map(|(process, used)| {
            Ok(Idle {
                process: process.name.clone(),
                percent_of_a_core: used.as_secs_f64() / window.as_secs_f64() * 100.0,
                resident_bytes: process.resident_bytes()?,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_blanks_does_not_shift_the_fields() {
        let line = "7 (a ) b) S 1 7 7 0 -1 4194560 1 2 3 4 250 50 9 9 20 0 3";
        assert_eq!(cpu_ticks(line), Some(300));
        assert_eq!(cpu_ticks("nonsense"), None);
        assert!(!is_ended(line) && is_ended("7 (a ) S b) Z 1 7 7 0"));
    }

    #[test]
    fn our_own_numbers_can_be_read() {
        let own = Watched::new("this test", std::process::id());
        assert!(own.resident_bytes().unwrap() > 100 * 1024);
        own.written_bytes().unwrap();
        own.cpu().unwrap();
    }

    #[test]
    fn a_child_counts_when_it_has_ended() {
        let before = children_cpu().unwrap();
        let mut command = Command::new("sh");
        end_with_us(&mut command);
        let status = command.args(["-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"]).status().unwrap();
        assert!(status.success() && children_cpu().unwrap() > before);
    }
}
