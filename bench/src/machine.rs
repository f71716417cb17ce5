//! What the figures were taken on: without it they say nothing.

use serde::{Deserialize, Serialize};
use std::fs;
use std::path::Path;
use std::process::Command;

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    pub processor: String,
    pub cores: usize,
    pub memory_bytes: u64,
    pub kernel: String,
    pub file_system: String,
    pub fio: String,
    pub commit: String,
    /// `release`, or what is not worth comparing.
    pub build: String,
    /// Before the run: work of others makes every figure worse and some ratios wrong.
    pub load_average: String,
}

const UNKNOWN: &str = "unknown";

impl Machine {
    /// What cannot be found out is `unknown`; no measurement fails for it.
    pub fn describe(folder: &Path) -> Self {
        let folder = folder.display().to_string();
        Self {
            processor: field("/proc/cpuinfo", "model name"),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: field("/proc/meminfo", "MemTotal").split(' ').next().and_then(kib).unwrap_or(0),
            kernel: said("uname", &["-r"]),
            file_system: said("stat", &["--file-system", "--format=%T", &folder]),
            fio: said("fio", &["--version"]),
            commit: said("git", &["-C", env!("CARGO_MANIFEST_DIR"), "describe", "--always", "--dirty"]),
            build: if cfg!(debug_assertions) { "debug" } else { "release" }.to_string(),
            load_average: load_average(),
        }
    }
}

pub fn load_average() -> String {
    fs::read_to_string("/proc/loadavg").map_or(UNKNOWN.to_string(), |text| text.trim().to_string())
}

fn kib(text: &str) -> Option<u64> {
    text.parse::<u64>().ok().map(|kib| kib * 1024)
}

fn field(path: &str, name: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with(name));
    line.and_then(|line| line.split_once(':')).map_or(UNKNOWN.to_string(), |(_, value)| value.trim().to_string())
}

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let text = output.ok().filter(|output| output.status.success());
    text.map_or(UNKNOWN.to_string(), |output| String::from_utf8_lossy(&output.stdout).trim().to_string())
}
