//! A program that ends with its test, and what it said.

use crate::wait;
use nix::sched::CloneFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

/// The folder with the programs that `cargo build` made: a test was built into deps/ below them, the bench beside them.
pub fn programs() -> PathBuf {
    let own = std::env::current_exe().expect("a running program has a path");
    let folder = own.parent().expect("a program is in a folder");
    let is_test = folder.ends_with("deps");
    if is_test { folder.parent().expect("deps/ is in the build folder").to_path_buf() } else { folder.to_path_buf() }
}

/// Fails with what to do, rather than testing nothing.
pub fn program(name: &str) -> Command {
    let path = programs().join(name);
    assert!(path.exists(), "{} is missing: run `cargo build --workspace` first, as `make test` does", path.display());
    let mut command = Command::new(path);
    command.env("RUST_BACKTRACE", "1");
    command
}

/// A stock tool; the test fails where it is missing.
pub fn tool(name: &str) -> Command {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = std::env::split_paths(&path).collect();
    folders.extend(["/usr/sbin".into(), "/sbin".into()]);
    let found = folders.iter().map(|folder| folder.join(name)).find(|path| path.exists());
    Command::new(found.unwrap_or_else(|| panic!("{name} is missing: run `make setup`")))
}

/// On the disk of the build folder, which takes direct I/O where a tmpfs may not.
pub fn temporary_dir(name: &str) -> tempfile::TempDir {
    let parent = programs().join("tmp");
    std::fs::create_dir_all(&parent).expect("the build folder can be written");
    for left in left_behind(&parent, "pid") {
        // Another test may be at it too.
        let _ = std::fs::remove_dir_all(parent.join(left));
    }
    let prefix = format!("pid-{}-{name}-", std::process::id());
    tempfile::Builder::new().prefix(&prefix).tempdir_in(parent).expect("the build folder can be written")
}

/// What a test that was killed could not clean up: names in `folder` that begin with `prefix`, a dash and the pid of a
/// process that is gone.
pub fn left_behind(folder: &Path, prefix: &str) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(folder) else { return vec![] };
    let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let is_left = |name: &String| {
        let rest = name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
        let pid = rest.and_then(|rest| rest.split('-').next()?.parse::<u32>().ok());
        pid.is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    };
    names.filter(is_left).collect()
}

/// The clocks that leases and timers go by (CLOCK_BOOTTIME, CLOCK_MONOTONIC) are ahead in the command's process. False
/// where the kernel cannot do that.
pub fn shift_time_since_boot(command: &mut Command, seconds: u64) -> bool {
    if !Path::new("/proc/self/ns/time").exists() {
        return false;
    }
    let offsets = format!("monotonic {seconds} 0\nboottime {seconds} 0\n");
    // SAFETY: between fork and exec only system calls are made, and a path of this length is copied to the stack.
    unsafe {
        command.pre_exec(move || {
            nix::sched::unshare(CloneFlags::from_bits_retain(nix::libc::CLONE_NEWTIME))?;
            // Whoever unshares stays where he was, until he executes a program.
            OpenOptions::new().write(true).open("/proc/self/timens_offsets")?.write_all(offsets.as_bytes())
        });
    }
    true
}

/// How a command ended.
#[derive(Debug)]
pub struct Outcome {
    pub command: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    pub fn of(command: &mut Command) -> Self {
        let name = format!("{command:?}");
        let output = command.stdin(Stdio::null()).output();
        let Output { status, stdout, stderr } = output.unwrap_or_else(|error| panic!("{name}: {error}"));
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Self { command: name, status, stdout: text(stdout), stderr: text(stderr) }
    }

    /// What it printed, if it succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.status.success(), "failed: {self:#?}");
        self.stdout
    }

    /// What it said, if it refused: exit code 1, nothing on stdout to be mistaken for a result, no panic.
    #[track_caller]
    pub fn refused(self) -> String {
        assert_eq!(self.status.code(), Some(1), "expected a refusal: {self:#?}");
        assert!(!self.stderr.contains("panicked"), "panicked: {self:#?}");
        self.stderr
    }
}

/// Killed, by its own pid, when it is dropped.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    /// Where this process began to write; earlier ones of the same name wrote before.
    log_start: u64,
}

impl Process {
    /// Everything it prints goes to `folder/name.log`.
    pub fn spawn(name: &str, command: &mut Command, folder: &Path) -> Self {
        let log = folder.join(format!("{name}.log"));
        let file = OpenOptions::new().create(true).append(true).open(&log).expect("the test's folder can be written");
        let log_start = file.metadata().expect("an open file has metadata").len();
        let again = || -> File { file.try_clone().expect("there are descriptors left") };
        // SAFETY: between fork and exec only one system call is made, which allocates nothing.
        unsafe {
            command.pre_exec(|| nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from));
        }
        let child = command.stdin(Stdio::null()).stdout(again()).stderr(again()).spawn();
        let child = child.unwrap_or_else(|error| panic!("{command:?}: {error}"));
        Self { name: name.to_string(), child, log, log_start }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What this process printed so far.
    pub fn log(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        let start = usize::try_from(self.log_start).map_or(bytes.len(), |start| start.min(bytes.len()));
        String::from_utf8_lossy(&bytes[start..]).into_owned()
    }

    /// The first line with `words` on it.
    #[track_caller]
    pub fn await_line(&mut self, words: &str) -> String {
        let found = wait::within(wait::SOON, || {
            let ended = self.child.try_wait().expect("our own child can be waited for");
            let line = self.log().lines().find(|line| line.contains(words)).map(str::to_string);
            match (line, ended) {
                (Some(line), _) => Some(Ok(line)),
                (None, Some(status)) => Some(Err(status)),
                (None, None) => None,
            }
        });
        match found {
            Some(Ok(line)) => line,
            Some(Err(status)) => panic!("{} ended ({status}) before it said {words:?}:\n{}", self.name, self.log()),
            None => panic!("{} did not say {words:?} within {:?}:\n{}", self.name, wait::SOON, self.log()),
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("our own child can be waited for").is_none()
    }

    /// kill -9, and gone when this returns.
    pub fn kill(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).expect("a pid is an i32"));
        kill(pid, signal).unwrap_or_else(|error| panic!("{signal} to {}: {error}", self.name));
    }

    /// SIGTERM, and how it ended.
    #[track_caller]
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::SIGTERM);
        self.await_end()
    }

    #[track_caller]
    pub fn await_end(&mut self) -> ExitStatus {
        let ended = wait::within(wait::SOON, || self.child.try_wait().expect("our own child can be waited for"));
        ended.unwrap_or_else(|| panic!("{} did not end within {:?}:\n{}", self.name, wait::SOON, self.log()))
    }

    /// Whether it ends by itself within `deadline`.
    pub fn ends_within(&mut self, deadline: Duration) -> Option<ExitStatus> {
        wait::within(deadline, || self.child.try_wait().expect("our own child can be waited for"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(40)..];
            eprintln!("---- the last that {} said:\n{}", self.name, tail.join("\n"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_process_left_is_told_from_what_a_live_one_uses() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut gone = Command::new("true").spawn().expect("every machine has it");
        let pid = gone.id();
        gone.wait().expect("our own child");
        let own = std::process::id();
        for name in [format!("pid-{pid}-a"), format!("pid-{own}-b"), format!("other-{pid}-c"), "pid-x".to_string()] {
            std::fs::create_dir(folder.path().join(name)).expect("an empty folder takes one");
        }
        assert_eq!(left_behind(folder.path(), "pid"), [format!("pid-{pid}-a")]);
    }

    #[test]
    fn the_time_since_boot_can_be_shifted() {
        let uptime = || {
            let mut command = Command::new("cat");
            let is_shifted = shift_time_since_boot(&mut command, 1_000_000);
            let told = Outcome::of(command.arg("/proc/uptime"));
            (is_shifted && told.status.success()).then(|| told.ok().split('.').next()?.parse::<u64>().ok()).flatten()
        };
        let Some(uptime) = uptime() else { return eprintln!("SKIPPED: no time namespaces here, or not root") };
        assert!(uptime > 1_000_000, "{uptime}");
    }
}
