//! Ceph from Debian's packages, to be compared with: a monitor, a manager, three OSDs on files of the disk that is measured,
//! a pool of three replicas, an RBD image. All that it has is in a folder of its own, and is gone with it.

use super::guard::Guard;
use crate::error::{BenchError, Result};
use crate::fio::{self, Rbd, Target};
use crate::processes::{Watched, children_cpu};
use crate::stand::written_file_of;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use torus_schema::limits::{GIB, MIB};
use torus_tests::store::free_address;
use torus_tests::{Process, process, wait};

pub const NAME: &str = "Ceph RBD ×3, librbd";
const OSDS: usize = 3;
/// Few, as its manual says for three OSDs with one pool.
const PGS: u64 = 32;
const POOL: &str = "bench";
const IMAGE: &str = "region";
/// For whatever a healthy cluster does while it starts, on a machine that does something else too.
const SOON: Duration = Duration::from_secs(120);
/// Beyond the files of the OSDs: the monitor's store, and what everybody says.
const ROOM_BESIDE: u64 = GIB;
/// So often starting and attaching is measured.
const STARTS: usize = 3;
const PROGRAMS: [&str; 6] = ["ceph-mon", "ceph-mgr", "ceph-osd", "monmaptool", "ceph", "rbd"];
const INSTALL: &str = "apt-get install --no-install-recommends ceph-mon ceph-mgr ceph-osd ceph-common librbd1 fio";

/// Before anything is set up: whether all of it is installed.
pub fn check() -> Result<()> {
    let folders: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).collect();
    let mut missing = missing(&|program| folders.iter().any(|folder| folder.join(program).exists()));
    let fio = Command::new("fio").arg("--enghelp=rbd").stderr(Stdio::null()).output();
    if !fio.is_ok_and(|said| String::from_utf8_lossy(&said.stdout).contains("rbdname")) {
        missing.push("rbd among fio's engines");
    }
    if missing.is_empty() {
        return Ok(());
    }
    let because =
        format!("found no {}; expected Debian's packages of Ceph; install them with\n{INSTALL}", missing.join(", no "));
    Err(BenchError::Failed { what: "--peers ceph".to_string(), because })
}

fn missing(is_there: &dyn Fn(&str) -> bool) -> Vec<&'static str> {
    PROGRAMS.into_iter().filter(|program| !is_there(program)).collect()
}

/// How large it is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Of the image, which is written `passes` times.
    pub region_bytes: u64,
    pub passes: u32,
    /// Of each OSD's file.
    pub osd_bytes: u64,
    /// What the files of others will take that are not made yet.
    pub others_bytes: u64,
}

pub struct Ceph {
    /// Gone before their files are.
    daemons: Vec<(String, Process)>,
    pub target: Target,
    /// CPU time of a fio that attaches the image and ends: in each measurement of a whole fio process.
    pub client_start: Duration,
    version: String,
    size: Size,
    folder: TempDir,
    /// Last: it looks whether the folder is gone.
    _guard: Guard,
}

impl Ceph {
    pub fn start(size: Size, say: &dyn Fn(&str)) -> Result<Self> {
        let folder = process::temporary_dir("bench-ceph");
        let guard = Guard::of(folder.path())?;
        let config = folder.path().join("ceph.conf");
        let target = Target::Rbd(Rbd { config, pool: POOL.to_string(), image: IMAGE.to_string() });
        let (daemons, version, client_start) = (vec![], String::new(), Duration::ZERO);
        let mut ceph = Self { daemons, target, client_start, version, size, folder, _guard: guard };
        let started = ceph.set_up(&|text| say(&format!("Ceph: {text}")));
        match started {
            Ok(()) => Ok(ceph),
            Err(error) => Err(ceph.with_logs(error)),
        }
    }

    fn set_up(&mut self, say: &dyn Fn(&str)) -> Result<()> {
        self.check_room()?;
        let osds = (0..OSDS).map(|osd| self.path(&format!("osd.{osd}")));
        for folder in osds.chain(["mon", "mgr"].map(|name| self.path(name))) {
            std::fs::create_dir(&folder).map_err(BenchError::wrap(format!("Ceph's folder {}", folder.display())))?;
        }
        say(&format!("writing the files of {OSDS} OSDs, {} MiB each", self.size.osd_bytes / MIB));
        for osd in 0..OSDS {
            written_file_of(&self.path(&format!("osd.{osd}")), "block", self.size.osd_bytes)?;
        }
        let told = self.tool("ceph-osd", &["--version"])?;
        let unknown = || failed("version", format!("found {told:?}, expected `ceph version NUMBER`"));
        self.version = version_of(&told).ok_or_else(unknown)?.to_string();
        say(&format!("version {}: starting the monitor and the manager", self.version));
        self.start_monitor()?;
        self.start_daemon("ceph-mgr", "x")?;
        for osd in 0..OSDS {
            say(&format!("starting OSD {} of {OSDS}", osd + 1));
            self.start_osd(osd)?;
        }
        say("making the pool");
        let pgs = PGS.to_string();
        self.tool("ceph", &["osd", "pool", "create", POOL, &pgs, &pgs, "replicated"])?;
        self.await_clean(say)?;
        self.tool("rbd", &["pool", "init", POOL])?;
        let image = format!("{POOL}/{IMAGE}");
        let mib = (self.size.region_bytes / MIB).to_string();
        self.tool("rbd", &["create", "--size", &mib, "--image-feature", "layering", &image])?;
        say("writing the region of the image");
        fio::fill(&self.target, self.size.region_bytes, self.size.passes)?;
        say("measuring what its client costs to start");
        self.client_start = self.measure_start()?;
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A disk that runs full in the middle fails everybody.
    fn check_room(&self) -> Result<()> {
        let place = self.folder.path();
        let wrap = BenchError::wrap(format!("free space of {}", place.display()));
        let found = nix::sys::statvfs::statvfs(place).map_err(wrap)?;
        let found = found.blocks_available() * found.fragment_size();
        let expected = self.size.osd_bytes * OSDS as u64 + self.size.others_bytes + ROOM_BESIDE;
        if found >= expected {
            return Ok(());
        }
        let [found, expected] = [found, expected].map(|bytes| bytes / MIB);
        let because =
            format!("found {found} MiB free, expected {expected} MiB; free some, or leave systems out by --system");
        Err(failed(&format!("room in {}", place.display()), because))
    }

    fn start_monitor(&mut self) -> Result<()> {
        let (id, port) = (new_id()?, free_address().port());
        let text = config(self.folder.path(), &id, port);
        let file = self.path("ceph.conf");
        std::fs::write(&file, text).map_err(BenchError::wrap(format!("Ceph's {}", file.display())))?;
        let map = self.path("monmap").display().to_string();
        let address = monitor_address(port);
        self.tool("monmaptool", &["--create", "--fsid", &id, "--addv", "a", &address, &map])?;
        self.tool("ceph-mon", &["--mkfs", "-i", "a", "--monmap", &map])?;
        self.start_daemon("ceph-mon", "a")?;
        // It answers only when there is a quorum.
        self.tool("ceph", &["mon", "stat"]).map(drop)
    }

    fn start_osd(&mut self, osd: usize) -> Result<()> {
        let (name, id) = (osd.to_string(), new_id()?);
        let told = self.tool("ceph", &["osd", "new", &id])?;
        if told.lines().last().map(str::trim) != Some(&name) {
            let because = format!("found {told:?}, expected {name}, since it is new");
            return Err(failed("number of an OSD", because));
        }
        self.tool("ceph-osd", &["--mkfs", "-i", &name, "--osd-uuid", &id])?;
        self.start_daemon("ceph-osd", &name)
    }

    /// In the foreground, so that it is our child and ends with us.
    fn start_daemon(&mut self, program: &str, id: &str) -> Result<()> {
        let name = format!("{program} {id}");
        let mut command = self.command(program);
        let process = Process::spawn(&name, command.args(["-f", "-i", id]), self.folder.path());
        self.daemons.push((name, process));
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("CEPH_CONF", self.path("ceph.conf"));
        command
    }

    /// Runs to its end. What it said on either way.
    fn tool(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(program);
        let mut process = Process::spawn("tool", command.args(arguments), self.folder.path());
        let ended = process.ends_within(SOON);
        let because = match ended {
            Some(status) if status.success() => return Ok(process.log()),
            Some(status) => format!("found {status}, expected success"),
            None => format!("found it running, expected its end within {SOON:?}"),
        };
        let log = process.log();
        Err(failed(&format!("`{program} {}`", arguments.join(" ")), format!("{because}; it said:\n  {}", tail(&log))))
    }

    /// Until every placement group has its three replicas.
    fn await_clean(&mut self, say: &dyn Fn(&str)) -> Result<()> {
        let mut last = "nothing told of them".to_string();
        let found = wait::within(SOON, || match self.look_at_groups() {
            Ok((told, is_clean)) => {
                if told != last {
                    say(&told);
                    last = told;
                }
                is_clean.then_some(Ok(()))
            }
            Err(error) => Some(Err(error)),
        });
        found.unwrap_or_else(|| {
            let because = format!("found {last:?} after {SOON:?}, expected all of them");
            Err(failed("placement groups", because))
        })
    }

    /// How far they are, and whether that is the end.
    fn look_at_groups(&mut self) -> Result<(String, bool)> {
        let ended = self.daemons.iter_mut().filter_map(|(name, process)| (!process.is_running()).then_some(name));
        if let Some(name) = ended.last() {
            return Err(failed(name, "found it ended, expected it to run".to_string()));
        }
        let told = self.tool("ceph", &["pg", "stat", "--format", "json"])?;
        let groups = clean_groups(&told).ok_or_else(|| {
            failed("placement groups", format!("found {told:?}, expected JSON with pg_summary, as Ceph 16 has it"))
        })?;
        let Some((clean, all)) = groups else { return Ok(("the manager knows of none yet".to_string(), false)) };
        let told = format!("{clean} of {} placement groups have their {OSDS} replicas", all.max(PGS));
        Ok((told, clean == all && all >= PGS))
    }

    /// The middle of a few.
    fn measure_start(&self) -> Result<Duration> {
        let mut times = Vec::new();
        for _ in 0..STARTS {
            let before = children_cpu()?;
            fio::attach(&self.target)?;
            times.push(children_cpu()?.saturating_sub(before));
        }
        times.sort_unstable();
        Ok(times[STARTS / 2])
    }

    /// Without the client.
    pub fn watched(&self) -> Vec<Watched> {
        self.daemons.iter().map(|(name, process)| Watched::new(name.clone(), process.pid())).collect()
    }

    /// Name and process of each.
    pub fn daemons(&mut self) -> impl Iterator<Item = (&str, &mut Process)> {
        self.daemons.iter_mut().map(|(name, process)| (name.as_str(), process))
    }

    fn with_logs(&mut self, error: BenchError) -> BenchError {
        let mut because = String::new();
        for (name, process) in self.daemons() {
            let ended = if process.is_running() { "" } else { ", which has ended" };
            because += &format!("\n{name}{ended}, said last:\n  {}", tail(&process.log()));
        }
        match error {
            BenchError::Failed { what, because: first } => BenchError::Failed { what, because: first + &because },
            other => other,
        }
    }

    /// What is said of it beside its figures.
    pub fn note(&self) -> String {
        format!(
            "{NAME}: Debian's Ceph {} on loopback, one monitor, one manager, {OSDS} OSDs (BlueStore, each on a preallocated and written \
             file of {} MiB on the same disk), a pool with size=3, min_size=2, failure domain osd and {PGS} placement groups. \
             Authentication none, checksums of messages on (the default), RBD cache off, image with layering only, BlueStore's and \
             the OSDs' settings for an SSD; all else as Ceph has it, so osd_memory_target is 4 GiB and what \
             was read before comes from the OSDs' own caches. Its client is librbd inside fio, so its client CPU is all of fio's threads, without the {} ms \
             for starting and attaching; IOPS per core counts it, as it counts our library's. A write is durable when it is answered, \
             so the flush of write-fsync costs it nothing.",
            self.version,
            self.size.osd_bytes / MIB,
            self.client_start.as_millis(),
        )
    }
}

fn failed(what: &str, because: String) -> BenchError {
    BenchError::Failed { what: format!("Ceph: {what}"), because }
}

/// Of a cluster or an OSD.
fn new_id() -> Result<String> {
    const PLACE: &str = "/proc/sys/kernel/random/uuid";
    let id = std::fs::read_to_string(PLACE).map_err(BenchError::wrap(format!("Ceph: an id from {PLACE}")))?;
    Ok(id.trim().to_string())
}

/// Enough to see why something failed.
fn tail(log: &str) -> String {
    const LINES: usize = 8;
    let lines: Vec<&str> = log.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n  ")
}

fn monitor_address(port: u16) -> String {
    format!("[v2:127.0.0.1:{port}/0]")
}

/// Everything in `folder`: nothing of /etc/ceph, /var/lib/ceph, /var/log/ceph or /run/ceph is read or written.
fn config(folder: &Path, id: &str, port: u16) -> String {
    let (folder, monitor) = (folder.display(), monitor_address(port));
    format!(
        "\
[global]
fsid = {id}
mon_host = {monitor}
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = none
auth_service_required = none
auth_client_required = none
keyring = {folder}/none
run_dir = {folder}
crash_dir = {folder}
# Nobody asks there, and its path may be longer than a socket's can be.
admin_socket =
log_file =
log_to_file = false
mon_cluster_log_to_file = false
osd_pool_default_size = {OSDS}
osd_pool_default_min_size = 2
osd_pool_default_pg_autoscale_mode = off
# Failure domain osd: there is one host.
osd_crush_chooseleaf_type = 0

[mon]
log_to_stderr = true
mon_data = {folder}/mon
# A monitor does not start where the bench leaves less than some percent of the disk.
mon_data_avail_warn = 0
mon_data_avail_crit = -1

[mgr]
log_to_stderr = true
mgr_data = {folder}/mgr

[osd]
log_to_stderr = true
osd_data = {folder}/osd.$id
osd_journal =
# The kernel says of a virtual disk that it rotates.
bluestore_debug_enforce_settings = ssd
osd_op_num_shards = 8
osd_op_num_threads_per_shard = 2

[client]
# A write is answered when it is on three disks, as direct I/O is.
rbd_cache = false
"
    )
}

/// Of `ceph version 16.2.15 (…) pacific (stable)`.
fn version_of(told: &str) -> Option<&str> {
    told.lines().find_map(|line| line.strip_prefix("ceph version "))?.split_whitespace().next()
}

/// How many placement groups are active and clean, and how many there are; `None` inside while the manager is not ready,
/// `None` where it is something else.
fn clean_groups(told: &str) -> Option<Option<(u64, u64)>> {
    // Warnings may stand before it.
    let start = if told.starts_with('{') { 0 } else { told.find("\n{")? };
    let json: Value = serde_json::Deserializer::from_str(&told[start..]).into_iter().next()?.ok()?;
    if json["pg_ready"] == Value::Bool(false) {
        return Some(None);
    }
    let summary = &json["pg_summary"];
    let states = summary["num_pg_by_state"].as_array()?;
    let is_clean = |state: &&Value| state["name"].as_str().is_some_and(|name| name.starts_with("active+clean"));
    let clean = states.iter().filter(is_clean).filter_map(|state| state["num"].as_u64()).sum();
    Some(Some((clean, summary["num_pgs"].as_u64()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_is_in_the_folder() {
        let text = config(Path::new("/somewhere/of its own"), "id", 1234);
        let paths: Vec<&str> = text.lines().filter_map(|line| line.split_once(" = ")).map(|(_, value)| value).collect();
        let paths: Vec<&&str> = paths.iter().filter(|value| value.starts_with('/')).collect();
        assert_eq!(paths.len(), 6, "{paths:?}");
        assert!(paths.iter().all(|path| path.starts_with("/somewhere/of its own")), "{paths:?}");
        assert!(!text.contains("/etc/") && !text.contains("/var/") && !text.contains("/run/"));
    }

    #[test]
    fn what_decides_about_figures_is_said_in_the_configuration() {
        let text = config(Path::new("/f"), "6f4e-id", 1234);
        for line in [
            "fsid = 6f4e-id",
            "mon_host = [v2:127.0.0.1:1234/0]",
            "osd_pool_default_size = 3",
            "osd_pool_default_min_size = 2",
            "osd_crush_chooseleaf_type = 0",
            "auth_client_required = none",
            "rbd_cache = false",
            "osd_data = /f/osd.$id",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is not in\n{text}");
        }
        // A checksum is Ceph's default: who switches it off compares something else.
        assert!(!text.contains("crc"));
    }

    #[test]
    fn the_version_is_found_behind_what_else_is_said() {
        let told = "a warning\nceph version 16.2.15 (618f440892089921c3e944a991122ddc44e60516) pacific (stable)\n";
        assert_eq!(version_of(told), Some("16.2.15"));
        assert_eq!(version_of("bash: ceph-osd: not found"), None);
    }

    #[test]
    fn groups_are_clean_when_all_their_replicas_are_there() {
        let of = |states: &str| {
            clean_groups(&format!(
                "a warning\n\n{{\"pg_ready\":true,\"pg_summary\":{{\"num_pg_by_state\":[{states}],\"num_pgs\":33,\"num_bytes\":0}}\n}}\n"
            ))
        };
        assert_eq!(of(r#"{"name":"active+clean","num":33}"#), Some(Some((33, 33))));
        assert_eq!(
            of(r#"{"name":"active+clean+scrubbing","num":1},{"name":"active+clean","num":32}"#),
            Some(Some((33, 33)))
        );
        assert_eq!(
            of(r#"{"name":"active+undersized","num":30},{"name":"unknown","num":2},{"name":"active+clean","num":1}"#),
            Some(Some((1, 33)))
        );
        assert_eq!(clean_groups("{\"pg_ready\":false,\"pg_summary\":{}}\n"), Some(None));
        assert_eq!(clean_groups("Error ETIMEDOUT: no manager"), None);
    }

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing(&|_| true), Vec::<&str>::new());
        assert_eq!(missing(&|program| program != "ceph-osd" && program != "rbd"), ["ceph-osd", "rbd"]);
    }

    #[test]
    fn the_end_of_a_long_log_is_told() {
        let log: String = (0..100).map(|line| format!("{line}\n")).collect();
        assert!(tail(&log).starts_with("92\n") && tail(&log).ends_with("99"));
        assert_eq!(tail("one"), "one");
    }
}
