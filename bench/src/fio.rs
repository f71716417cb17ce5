//! Runs one of `fio-profiles/` against a target, and reads what fio says of it.

use crate::error::{BenchError, Result};
use crate::processes::end_with_us;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
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

/// The seven files; the sequential one has two parts.
pub const PROFILES: [Profile; 8] = [
    whole("randread-qd1", "randread-qd1.fio"),
    whole("randread-qd32", "randread-qd32.fio"),
    whole("randwrite-qd1", "randwrite-qd1.fio"),
    whole("randwrite-qd32", "randwrite-qd32.fio"),
    whole("mixed-qd32", "mixed-qd32.fio"),
    whole("write-fsync", "write-fsync.fio"),
    Profile { name: "sequential-1m-read", file: "sequential-1m.fio", section: Some("read") },
    Profile { name: "sequential-1m-write", file: "sequential-1m.fio", section: Some("write") },
];

/// What fio is pointed at.
#[derive(Clone, Debug)]
pub enum Target {
    File(PathBuf),
    Nbd(String),
    Rbd(Rbd),
}

/// Beyond what it should take: then nothing answers any more.
const STUCK: Duration = Duration::from_secs(120);
/// A few GiB on the slowest disk that is worth measuring.
const FILL_MAX: Duration = Duration::from_secs(900);

/// An image of a Ceph cluster.
#[derive(Clone, Debug)]
pub struct Rbd {
    /// The cluster's configuration file.
    pub config: PathBuf,
    pub pool: String,
    pub image: String,
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
            Self::Rbd(rbd) => ("rbd", format!("rbdname={}", rbd.image), "fsync=1"),
        };
        [("ENGINE", engine.to_string()), ("TARGET", target), ("SYNC", sync.to_string())]
    }

    /// What TARGET, being one setting, does not say; of the engine, so it comes behind that.
    fn pool(&self) -> Option<String> {
        let Self::Rbd(rbd) = self else { return None };
        Some(format!("--pool={}", rbd.pool))
    }

    /// For something that takes `usual`.
    pub fn limit(&self, usual: Duration) -> Option<Duration> {
        matches!(self, Self::Rbd(_)).then_some(usual + STUCK)
    }

    /// Where librados looks, which is not asked by fio.
    fn environment(&self) -> Option<(&'static str, &Path)> {
        let Self::Rbd(rbd) = self else { return None };
        Some(("CEPH_CONF", &rbd.config))
    }
}

#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub bytes: u64,
    pub run: Duration,
}

/// Percentiles that are asked of fio, here and in fio-profiles/common.inc.
pub const PERCENTILES: [f64; 5] = [50.0, 90.0, 99.0, 99.9, 99.99];
/// A percentile is told only where so many operations lay beyond it: fewer are accidents.
pub const BEYOND_MIN: f64 = 10.0;

/// Percent, and latency in µs.
pub type Percentiles = Vec<(f64, f64)>;

/// Whether `percent` of so many operations leaves enough beyond it.
pub fn is_told(percent: f64, operations: u64) -> bool {
    operations as f64 * (100.0 - percent) / 100.0 >= BEYOND_MIN
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
    // In front of the file: for all of its jobs.
    words.extend(target.pool().into_iter().flat_map(|pool| ["--ioengine=rbd".to_string(), pool]));
    words.push(profiles_folder().join(profile.file).display().to_string());
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]).envs(target.settings()).envs(target.environment());
    command.env("SIZE", size.bytes.to_string()).env("SECONDS", format!("{}ms", size.run.as_millis()));
    command.stdin(Stdio::null());
    command
}

pub fn run(profile: Profile, target: &Target, size: Size) -> Result<Measured> {
    measure(command(profile, target, size, &[]), profile.name)
}

/// Runs a command of [`command`] to its end.
pub fn measure(command: Command, name: &str) -> Result<Measured> {
    measure_all(command, name).map(|(measured, _)| measured)
}

/// With the percentiles of [`PERCENTILES`] that can be told.
pub fn measure_all(command: Command, name: &str) -> Result<(Measured, Percentiles)> {
    measure_within(command, name, None)
}

/// Where there is a limit, it fails when that is over: a library may wait for ever for servers that have ended.
pub fn measure_within(command: Command, name: &str, limit: Option<Duration>) -> Result<(Measured, Percentiles)> {
    let text = run_to_end(command, name, limit)?;
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
    command.args(["--clat_percentiles=0", "--percentile_list=50:90:99:99.9:99.99"]);
    command.arg(format!("--rw={}", if plain.is_write { "randwrite" } else { "randread" }));
    command.arg(format!("--iodepth={}", plain.depth)).arg(format!("--numjobs={}", plain.clients));
    command.arg(format!("--size={}", plain.size.bytes)).arg(format!("--runtime={}ms", plain.size.run.as_millis()));
    command.arg(format!("--filename={}", file.display())).stdin(Stdio::null());
    if plain.flushes {
        command.arg("--fdatasync=1");
    }
    measure(command, "plain")
}

/// 4 KiB at random over several NBD connections, without a profile.
#[derive(Clone, Copy, Debug)]
pub struct Connections {
    pub name: &'static str,
    pub is_write: bool,
    pub connections: usize,
    /// Requests in flight on each.
    pub depth: usize,
}

/// `before` is put in front of fio, as in [`command`].
pub fn run_connections(load: Connections, target: &Target, size: Size, before: &[String]) -> Result<Measured> {
    measure(connections_command(load, target, size, before), load.name)
}

pub fn connections_command(load: Connections, target: &Target, size: Size, before: &[String]) -> Command {
    let [(_, engine), (_, place), _] = target.settings();
    let words = [before, &["fio".to_string()]].concat();
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command.args(["--output-format=json", "--name=connections", "--bs=4k", "--direct=1", "--thread"]);
    command.args(["--norandommap", "--randrepeat=0", "--time_based", "--group_reporting", "--lat_percentiles=1"]);
    command.args(["--clat_percentiles=0", "--percentile_list=50:90:99:99.9:99.99"]);
    command.arg(format!("--ioengine={engine}")).args(target.pool()).arg(format!("--{place}"));
    command.envs(target.environment());
    command.arg(format!("--rw={}", if load.is_write { "randwrite" } else { "randread" }));
    command.arg(format!("--iodepth={}", load.depth)).arg(format!("--numjobs={}", load.connections));
    command.arg(format!("--size={}", size.bytes)).arg(format!("--runtime={}ms", size.run.as_millis()));
    command.stdin(Stdio::null());
    command
}

/// One read, and the end: what every run costs beside its operations. Not bound to a time, for which fio would go on.
pub fn attach(target: &Target) -> Result<()> {
    let [(_, engine), (_, place), _] = target.settings();
    let mut command = Command::new("fio");
    command.args(["--output-format=json", "--name=attach", "--rw=randread", "--bs=4k", "--direct=1", "--thread"]);
    command.arg(format!("--ioengine={engine}")).args(target.pool()).arg(format!("--{place}"));
    command.envs(target.environment()).arg("--size=4k").stdin(Stdio::null());
    run_to_end(command, "attach", target.limit(Duration::ZERO)).map(drop)
}

fn run_to_end(mut command: Command, name: &str, limit: Option<Duration>) -> Result<String> {
    // Its servers end with us, and it would wait for some of them for ever.
    end_with_us(&mut command);
    let output = output_within(&mut command, limit);
    let (output, is_late) =
        output.map_err(|because| BenchError::Missing { program: "fio", package: "fio", because })?;
    if is_late {
        let because = format!("found it running, expected its end within {:?}; killed it", limit.unwrap_or_default());
        return Err(BenchError::Failed { what: format!("fio {name} ({command:?})"), because });
    }
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        // What follows the first brace is the report of a job that ended early.
        let said = stdout.split("{\n").next().unwrap_or_default();
        let because = format!("{}; it said:\n{stderr}{said}", output.status);
        return Err(BenchError::Failed { what: format!("fio {name} ({command:?})"), because });
    }
    Ok(stdout.into_owned())
}

/// Whether it had to be killed, too.
fn output_within(command: &mut Command, limit: Option<Duration>) -> std::io::Result<(Output, bool)> {
    let Some(limit) = limit else { return Ok((command.output()?, false)) };
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let pid = Pid::from_raw(child.id() as i32);
    let (ended, end) = channel::<()>();
    let watch = std::thread::spawn(move || {
        let is_late = end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout);
        // Its pid is its own until we have waited for it; an error means that it has just ended.
        is_late && kill(pid, Signal::SIGKILL).is_ok()
    });
    let output = child.wait_with_output();
    drop(ended);
    // It has no way to panic.
    Ok((output?, watch.join().unwrap_or(false)))
}

/// fio may print warnings before its JSON.
fn parse(text: &str) -> std::result::Result<(Measured, Percentiles), String> {
    let start = text.find("{\n").ok_or_else(|| format!("no JSON in {text:?}"))?;
    let json: Value = serde_json::from_str(&text[start..]).map_err(|error| error.to_string())?;
    let job = &json["jobs"][0];
    if job["error"] != 0 {
        return Err(format!("its job ended with error {}", job["error"]));
    }
    let number = |value: &Value, what: &str| value.as_f64().ok_or_else(|| format!("{what} is missing"));
    // A profile of both directions has them reported as one.
    let sides = ["mixed", "read", "write"].map(|side| &job[side]);
    let side = sides.into_iter().find(|side| side["total_ios"].as_u64() > Some(0)).ok_or("no operation completed")?;
    let operations = side["total_ios"].as_u64().ok_or("the count of operations is missing")?;
    // A write with a flush behind it is one operation to who waits for it. The sum of two 99th percentiles is an
    // upper bound of the sum's.
    let parts: Vec<&Value> =
        [side, &job["sync"]].into_iter().filter(|part| part["lat_ns"]["N"].as_u64() > Some(0)).collect();
    let sum_us = |of: &dyn Fn(&Value) -> std::result::Result<f64, String>| {
        parts.iter().map(|part| of(part)).sum::<std::result::Result<f64, String>>().map(|ns| ns / 1000.0)
    };
    let percentile = |percent: f64| {
        sum_us(&|part| number(&part["lat_ns"]["percentile"][format!("{percent:.6}")], &format!("percentile {percent}")))
    };
    let told = PERCENTILES.into_iter().filter(|percent| is_told(*percent, operations));
    let percentiles = told
        .map(|percent| Ok((percent, percentile(percent)?)))
        .collect::<std::result::Result<Percentiles, String>>()?;
    let busy = number(&job["usr_cpu"], "usr_cpu")? + number(&job["sys_cpu"], "sys_cpu")?;
    let run_us = number(&job["job_runtime"], "job_runtime")? * 1000.0;
    let measured = Measured {
        operations,
        iops: number(&side["iops"], "iops")?,
        mean_us: sum_us(&|part| number(&part["lat_ns"]["mean"], "mean latency"))?,
        p99_us: percentile(99.0)?,
        client_cpu_us: busy / 100.0 * run_us / operations as f64,
    };
    Ok((measured, percentiles))
}

/// Writes the whole target, `passes` times over, and makes it durable.
pub fn fill(target: &Target, bytes: u64, passes: u32) -> Result<()> {
    let [(_, engine), (_, place), _] = target.settings();
    let mut command = Command::new("fio");
    command.args(["--name=fill", "--rw=write", "--bs=1m", "--iodepth=8", "--direct=1", "--thread", "--end_fsync=1"]);
    command.arg(format!("--ioengine={engine}")).args(target.pool()).arg(format!("--{place}"));
    command.envs(target.environment());
    command.arg(format!("--size={bytes}")).arg(format!("--loops={passes}")).stdin(Stdio::null());
    run_to_end(command, "fill", target.limit(FILL_MAX)).map(drop)
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
            "lat_ns": {{"N": 4000, "mean": 200000.0,
                       "percentile": {{"50.000000": 190000, "90.000000": 300000, "99.000000": 400000}}}}}},
  "sync": {sync}}}]}}"#
        )
    }

    #[test]
    fn cpu_of_fio_is_told_per_operation() {
        let (measured, _) = parse(&report(r#"{"lat_ns": {"N": 0}}"#)).unwrap();
        assert_eq!((measured.operations, measured.iops), (4000, 4000.5));
        assert_eq!((measured.mean_us, measured.p99_us), (200.0, 400.0));
        assert!((measured.client_cpu_us - 100.0).abs() < 1e-9, "{measured:?}");
    }

    #[test]
    fn a_flush_belongs_to_the_write_before_it() {
        let sync = r#"{"lat_ns": {"N": 4000, "mean": 50000.0,
                     "percentile": {"50.000000": 40000, "90.000000": 50000, "99.000000": 60000}}}"#;
        let (measured, percentiles) = parse(&report(sync)).unwrap();
        assert_eq!((measured.mean_us, measured.p99_us), (250.0, 460.0));
        // Four of 4,000 operations lie beyond the next percentile.
        assert_eq!(percentiles, [(50.0, 230.0), (90.0, 350.0), (99.0, 460.0)]);
    }

    #[test]
    fn both_directions_reported_as_one_are_one_result() {
        let mixed = report("{}").replace("\"write\": {", "\"mixed\": {");
        assert_eq!(parse(&mixed).unwrap().0.operations, 4000);
    }

    #[test]
    fn a_failed_job_is_no_result() {
        let failed = report("{}").replace("\"error\": 0", "\"error\": 5");
        assert!(parse(&failed).unwrap_err().contains("error 5"));
        assert!(parse("no such file").unwrap_err().contains("no such file"));
    }

    #[test]
    fn an_image_is_named_by_configuration_pool_and_name() {
        let rbd = Rbd { config: "/f/ceph.conf".into(), pool: "p".to_string(), image: "i".to_string() };
        let size = Size { bytes: 1 << 20, run: Duration::from_secs(1) };
        let command = command(PROFILES[0], &Target::Rbd(rbd), size, &[]);
        let words: Vec<String> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        // fio knows the options of an engine behind its name, and gives them to the jobs of files behind them.
        assert_eq!(words[1..3], ["--ioengine=rbd", "--pool=p"]);
        assert!(words[3].ends_with(".fio"), "{words:?}");
        let found = |name: &str| command.get_envs().find(|(found, _)| *found == name).and_then(|(_, value)| value);
        assert_eq!(found("TARGET").unwrap(), "rbdname=i");
        assert_eq!(found("CEPH_CONF").unwrap(), "/f/ceph.conf");
    }

    #[test]
    fn who_does_not_end_is_killed_when_his_time_is_up() {
        let of = |seconds: &str, limit| {
            let mut command = Command::new("sh");
            command.args(["-c", "echo said; exec sleep \"$0\"", seconds]);
            output_within(&mut command, limit).unwrap()
        };
        let (output, is_late) = of("1000", Some(Duration::from_millis(100)));
        assert!(is_late && !output.status.success());
        for limit in [None, Some(Duration::from_secs(1000))] {
            let (output, is_late) = of("0", limit);
            assert!(!is_late && output.status.success() && output.stdout == b"said\n");
        }
    }

    #[test]
    fn every_profile_has_its_file() {
        for profile in PROFILES {
            assert!(profiles_folder().join(profile.file).exists(), "{profile:?}");
        }
    }
}
