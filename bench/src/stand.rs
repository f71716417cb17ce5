//! The systems that are compared, set up side by side on one disk, each holding the same written region.

use crate::error::{BenchError, Result};
use crate::fio::{self, Target};
use crate::processes::Watched;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tempfile::TempDir;
use torus_schema::limits::GIB;
use torus_tests::cluster::{Cluster, ClusterOptions, NbdServer};
use torus_tests::store::StoreKind;
use torus_tests::{Process, process, wait};

/// Larger than any cache on the way, small enough to be written in a few seconds.
pub const REGION_BYTES: u64 = GIB;
const REGION: &str = "1GiB";
/// Of each of three: a third of it is live with both volumes in it, so that cleaning is cheap but not absent.
pub const NODE_SIZE: &str = "4GiB";
/// So often the region is written before anything is measured: the nodes' preallocated files then have few extents
/// left that were never written, whose first write costs the file system a journal commit. That is how a node is after
/// its first hours.
const PASSES: u32 = 3;
pub const NODES: usize = 3;
/// Of a log, to tell why something failed.
const LOG_LINES: usize = 12;

/// What fio is pointed at, and whose work that makes.
pub struct System {
    pub name: &'static str,
    pub target: Target,
    pub processes: Vec<Watched>,
}

pub const RAW: &str = "raw file";
pub const QEMU: &str = "qemu-nbd, local file";

/// Volumes of the cluster: name of the system, of the volume, replicas.
const VOLUMES: [(&str, &str, u32); 2] = [("torus, 3 replicas", "three", 3), ("torus, 1 replica", "one", 1)];

/// Keeps everything running that the systems consist of.
pub struct Stand {
    pub systems: Vec<System>,
    /// All of them, for what they cost when idle.
    pub processes: Vec<Watched>,
    server: NbdServer,
    cluster: Cluster,
    _qemu: Option<Process>,
    /// Last, so that the processes are gone before it is.
    _folder: TempDir,
}

impl Stand {
    /// `over_tcp`: our NBD server by TCP instead of a unix socket (qemu-nbd is always on a unix socket).
    pub fn build(over_tcp: bool, say: &dyn Fn(&str)) -> Result<Self> {
        let folder = process::temporary_dir("bench-stand");
        let mut systems = Vec::new();
        say("writing the raw file");
        systems.push(raw(folder.path())?);
        let qemu = start_qemu(folder.path(), say)?;
        let mut processes = Vec::new();
        if let Some((process, system)) = &qemu {
            processes.push(Watched::new("qemu-nbd", process.pid()));
            systems.push(System { target: system.clone(), name: QEMU, processes: processes.clone() });
        }
        say("starting metadata, three nodes and the NBD server");
        let mut cluster = start_cluster("bench", NODES);
        for (_, volume, replicas) in VOLUMES {
            create_volume(&cluster, volume, replicas);
        }
        let socket = folder.path().join("torus.sock");
        let listen = format!("unix:{}", socket.display());
        let server = cluster.serve_with(&["--listen", &listen, "--volume", "three", "--volume", "one"]);
        wait::until("the NBD server's unix socket", || socket.exists().then_some(()));
        let ours = watch(&mut cluster, Some(&server));
        for (name, volume, _) in VOLUMES {
            let target = if over_tcp { Target::Nbd(server.url(volume)) } else { Target::unix(&socket, volume) };
            say(&format!("writing the region of {name}"));
            fio::fill(&target, REGION_BYTES, PASSES)?;
            systems.push(System { name, target, processes: ours.clone() });
        }
        processes.extend(ours);
        let qemu = qemu.map(|(process, _)| process);
        Ok(Self { systems, processes, server, cluster, _qemu: qemu, _folder: folder })
    }

    /// `result`; where it is an error, with what our processes said last, which is gone when the stand is.
    pub fn explain<T>(&mut self, result: Result<T>) -> Result<T> {
        result.map_err(|error| {
            let mut because = error.to_string();
            let mut add = |name: &str, process: &mut Process| {
                let (ended, log) = (if process.is_running() { "" } else { ", which has ended" }, process.log());
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n  ");
                because += &format!("\n{name}{ended}, said last:\n  {tail}");
            };
            add("torusblk", &mut self.server.process);
            for node in 0..NODES {
                add(&format!("node {}", node + 1), self.cluster.node(node));
            }
            BenchError::Failed { what: "a measurement".to_string(), because }
        })
    }
}

/// Nodes on free ports, in the build folder, joined to a ring.
pub fn start_cluster(name: &'static str, nodes: usize) -> Cluster {
    let store = StoreKind::Embedded;
    Cluster::start(ClusterOptions { store, size: NODE_SIZE, ..ClusterOptions::new(name, nodes) })
}

pub fn create_volume(cluster: &Cluster, name: &str, replicas: u32) {
    cluster.torusblk(&["volume", "create", name, REGION, "--replicas", &replicas.to_string()]).ok();
}

/// Every process of the cluster.
pub fn watch(cluster: &mut Cluster, server: Option<&NbdServer>) -> Vec<Watched> {
    let mut processes = vec![Watched::new("metadata", cluster.store.pid())];
    for node in 0..NODES {
        processes.push(Watched::new(format!("node {}", node + 1), cluster.node(node).pid()));
    }
    processes.extend(server.map(|server| Watched::new("torusblk", server.process.pid())));
    processes
}

fn raw(folder: &Path) -> Result<System> {
    let path = written_file(folder, "raw")?;
    Ok(System { name: RAW, target: Target::File(path), processes: vec![] })
}

pub fn written_file(folder: &Path, name: &str) -> Result<PathBuf> {
    written_file_of(folder, name, REGION_BYTES)
}

/// Preallocated in one piece, and every block of it really written: a read of an extent that was never written needs
/// no disk, and the first write to one is not like the others.
pub fn written_file_of(folder: &Path, name: &str, bytes: u64) -> Result<PathBuf> {
    let path = folder.join(name);
    let wrap = |because: String| BenchError::Failed { what: format!("preallocation of {}", path.display()), because };
    let file = File::create_new(&path).map_err(|error| wrap(error.to_string()))?;
    nix::fcntl::posix_fallocate(&file, 0, bytes as i64).map_err(|error| wrap(error.to_string()))?;
    drop(file);
    fio::fill(&Target::File(path.clone()), bytes, 1)?;
    Ok(path)
}

/// `None`, and said so, where it is not installed: it is a peer, not a part.
fn start_qemu(folder: &Path, say: &dyn Fn(&str)) -> Result<Option<(Process, Target)>> {
    let known = Command::new("qemu-nbd").arg("--version").stdout(Stdio::null()).status();
    if known.is_err() {
        say("qemu-nbd is not installed (apt-get install qemu-utils): measuring without it");
        return Ok(None);
    }
    say("writing the file of qemu-nbd");
    let path = written_file(folder, "qemu")?;
    let socket = folder.join("qemu.sock");
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--shared=0", "--format=raw", "--cache=none", "--aio=io_uring"]);
    command.arg("--socket").arg(&socket).arg(&path);
    let mut process = Process::spawn("qemu-nbd", &mut command, folder);
    wait::until("the socket of qemu-nbd", || {
        assert!(process.is_running(), "qemu-nbd ended:\n{}", process.log());
        socket.exists().then_some(())
    });
    Ok(Some((process, Target::unix(&socket, ""))))
}
