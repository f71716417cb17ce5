//! A program that ends with its test, and what it said.

use crate::wait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{File, OpenOptions};
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
    tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(parent).expect("the build folder can be written")
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
