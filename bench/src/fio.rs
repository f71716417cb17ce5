//! Runs one of `fio-profiles/` against a target, and reads what fio says of it.

use crate::error::{BenchError, Result};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Profile {
    pub name: &'static str,
    file: &'static str,
    section: Option<&'static str>,
}

const fn whole(name: &'static str, file: &'static str) -> Profile {
    Profile { name, file, section: None }
}

/// The six files; the sequential one has two parts.
pub const PROFILES: [Profile; 7] = [
    whole("randread-qd1", "randread-qd1.fio"),
    whole("randread-qd32", "randread-qd32.fio"),
    whole("randwrite-qd1", "randwrite-qd1.fio"),
    whole("randwrite-qd32", "randwrite-qd32.fio"),
    whole("write-fsync", "write-fsync.fio"),
    Profile { name: "sequential-1m-read", file: "sequential-1m.fio", section: Some("read") },
    Profile { name: "sequential-1m-write", file: "sequential-1m.fio", section: Some("write") },
];

/// What fio is pointed at.
#[derive(Clone, Debug)]
pub enum Target {
    File(PathBuf),
    Nbd(String),
}

impl Target {
    pub fn unix(socket: &Path, export: &str) -> Self {
        Self::Nbd(format!("nbd+unix:///{export}?socket={}", socket.display()))
    }

    /// ENGINE, TARGET and SYNC of the profiles.
    fn settings(&self) -> [(&'static str, String); 3] {
        let (engine, target, sync) = match self {
            // What a flush of a block device is on a file; fsync would also commit a time stamp.
            Self::File(path) => ("io_uring", format!("filename={}", path.display()), "fdatasync=1"),
            Self::Nbd(uri) => ("nbd", format!("uri={uri}"), "fsync=1"),
        };
        [("ENGINE", engine.to_string()), ("TARGET", target), ("SYNC", sync.to_string())]
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub bytes: u64,
    pub run: Duration,
}

/// One round of one profile on one target.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    pub operations: u64,
    pub iops: f64,
    pub mean_us: f64,
    pub p99_us: f64,
    /// Of fio itself.
    pub client_cpu_us: f64,
}

fn profiles_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the bench is a folder of the repository")
        .join("fio-profiles")
}

/// fio on `profile`, not yet started; `before` is put in front of it (a program that watches others while fio runs).
pub fn command(profile: Profile, target: &Target, size: Size, before: &[String]) -> Command {
    let mut words: Vec<String> = before.to_vec();
    words.extend(["fio".to_string(), "--output-format=json".to_string()]);
    words.extend(profile.section.map(|section| format!("--section={section}")));
    words.push(profiles_folder().join(profile.file).display().to_string());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).envs(target.settings());
    command.env("SIZE", size.bytes.to_string()).env("SECONDS", format!("{}ms", size.run.as_millis()));
    command.stdin(Stdio::null());
    command
}

pub fn run(profile: Profile, target: &Target, size: Size) -> Result<Measured> {
    measure(command(profile, target, size, &[]), profile.name)
}

/// Runs a command of [`command`] to its end.
pub fn measure(command: Command, name: &str) -> Result<Measured> {
    let text = run_to_end(command, name)?;
    parse(&text).map_err(|because| BenchError::Failed { what: format!("what fio {name} printed"), because })
}

/// 4 KiB at random on a file, without a profile: `clients` of them side by side, each with `depth` requests in flight.
#[derive(Clone, Copy, Debug)]
pub struct Plain {
    pub is_write: bool,
    pub clients: usize,
    pub depth: usize,
    /// fdatasync behind each write, by the client that wrote.
    pub flushes: bool,
    pub size: Size,
}

pub fn run_plain(plain: Plain, file: &Path) -> Result<Measured> {
    let mut command = Command::new("fio");
    command.args(["--output-format=json", "--name=plain", "--ioengine=io_uring", "--bs=4k", "--direct=1", "--thread"]);
    command.args(["--norandommap", "--randrepeat=0", "--time_based", "--group_reporting", "--lat_percentiles=1"]);
    command.args(["--clat_percentiles=0", "--percentile_list=50:99:99.9"]);
    command.arg(format!("--rw={}", if plain.is_write { "randwrite" } else { "randread" }));
    command.arg(format!("--iodepth={}", plain.depth)).arg(format!("--numjobs={}", plain.clients));
    command.arg(format!("--size={}", plain.size.bytes)).arg(format!("--runtime={}ms", plain.size.run.as_millis()));
    command.arg(format!("--filename={}", file.display())).stdin(Stdio::null());
    if plain.flushes {
        command.arg("--fdatasync=1");
    }
    measure(command, "plain")
}

fn run_to_end(mut command: Command, name: &str) -> Result<String> {
    let output = command.output().map_err(|because| BenchError::Missing { program: "fio", package: "fio", because })?;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        // What follows the first brace is the report of a job that ended early.
        let said = stdout.split("{\n").next().unwrap_or_default();
        let because = format!("{}; it said:\n{stderr}{said}", output.status);
        return Err(BenchError::Failed { what: format!("fio {name} ({command:?})"), because });
    }
    Ok(stdout.into_owned())
}

/// fio may print warnings before its JSON.
fn parse(text: &str) -> std::result::Result<Measured, String> {
    let start = text.find("{\n").ok_or_else(|| format!("no JSON in {text:?}"))?;
    let json: Value = serde_json::from_str(&text[start..]).map_err(|error| error.to_string())?;
    let job = &json["jobs"][0];
    if job["error"] != 0 {
        return Err(format!("its job ended with error {}", job["error"]));
    }
    let number = |value: &Value, what: &str| value.as_f64().ok_or_else(|| format!("{what} is missing"));
    let side = if job["read"]["total_ios"].as_u64() > Some(0) { &job["read"] } else { &job["write"] };
    let operations = side["total_ios"].as_u64().filter(|count| *count > 0).ok_or("no operation completed")?;
    let (mut mean_us, mut p99_us) = (0.0, 0.0);
    // A write with a flush behind it is one operation to who waits for it. The sum of two 99th percentiles is an
    // upper bound of the sum's.
    for part in [side, &job["sync"]] {
        if part["lat_ns"]["N"].as_u64() > Some(0) {
            mean_us += number(&part["lat_ns"]["mean"], "mean latency")? / 1000.0;
            p99_us += number(&part["lat_ns"]["percentile"]["99.000000"], "99th percentile")? / 1000.0;
        }
    }
    let busy = number(&job["usr_cpu"], "usr_cpu")? + number(&job["sys_cpu"], "sys_cpu")?;
    let run_us = number(&job["job_runtime"], "job_runtime")? * 1000.0;
    let client_cpu_us = busy / 100.0 * run_us / operations as f64;
    Ok(Measured { operations, iops: number(&side["iops"], "iops")?, mean_us, p99_us, client_cpu_us })
}

/// Writes the whole target, `passes` times over, and makes it durable.
pub fn fill(target: &Target, bytes: u64, passes: u32) -> Result<()> {
    let [(_, engine), (_, place), _] = target.settings();
    let mut command = Command::new("fio");
    command.args(["--name=fill", "--rw=write", "--bs=1m", "--iodepth=8", "--direct=1", "--thread", "--end_fsync=1"]);
    command.arg(format!("--ioengine={engine}")).arg(format!("--{place}"));
    command.arg(format!("--size={bytes}")).arg(format!("--loops={passes}")).stdin(Stdio::null());
    run_to_end(command, "fill").map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(sync: &str) -> String {
        format!(
            r#"fio: a warning
{{
 "jobs": [{{"error": 0, "usr_cpu": 10.0, "sys_cpu": 30.0, "job_runtime": 1000,
  "read": {{"total_ios": 0, "iops": 0.0, "lat_ns": {{"N": 0}}}},
  "write": {{"total_ios": 4000, "iops": 4000.5,
            "lat_ns": {{"N": 4000, "mean": 200000.0, "percentile": {{"99.000000": 400000}}}}}},
  "sync": {sync}}}]}}"#
        )
    }

    #[test]
    fn cpu_of_fio_is_told_per_operation() {
        let measured = parse(&report(r#"{"lat_ns": {"N": 0}}"#)).unwrap();
        assert_eq!((measured.operations, measured.iops), (4000, 4000.5));
        assert_eq!((measured.mean_us, measured.p99_us), (200.0, 400.0));
        assert!((measured.client_cpu_us - 100.0).abs() < 1e-9, "{measured:?}");
    }

    #[test]
    fn a_flush_belongs_to_the_write_before_it() {
        let sync = r#"{"lat_ns": {"N": 4000, "mean": 50000.0, "percentile": {"99.000000": 60000}}}"#;
        let measured = parse(&report(sync)).unwrap();
        assert_eq!((measured.mean_us, measured.p99_us), (250.0, 460.0));
    }

    #[test]
    fn a_failed_job_is_no_result() {
        let failed = report("{}").replace("\"error\": 0", "\"error\": 5");
        assert!(parse(&failed).unwrap_err().contains("error 5"));
        assert!(parse("no such file").unwrap_err().contains("no such file"));
    }

    #[test]
    fn every_profile_has_its_file() {
        for profile in PROFILES {
            assert!(profiles_folder().join(profile.file).exists(), "{profile:?}");
        }
    }
}
