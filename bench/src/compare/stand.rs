//! The systems that are compared, set up side by side on one disk, each holding the same written region.

use super::ceph::{self, Ceph};
use super::measure::fill_by;
use crate::client::remote::Client;
use crate::error::{BenchError, Result};
use crate::fio::{self, Target};
use crate::options::Peer;
use crate::processes::Watched;
use crate::stand::{NODES, create_volume, watch, written_file_of};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use torus_schema::limits::{GIB, MIB};
use torus_tests::cluster::{Cluster, ClusterOptions, NbdServer};
use torus_tests::{Process, process, wait};

/// Of a log, to tell why something failed.
const LOG_LINES: usize = 12;

/// How large everything is.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Of each volume and file, all of it written before anything is measured.
    pub region_bytes: u64,
    /// So often: the nodes' preallocated files then have few extents left that were never written, whose first write
    /// costs the file system a journal commit. That is how a node is after its first hours.
    passes: u32,
    /// Of each of three. Less than half of it is live with all volumes in it, so that cleaning is cheap but not absent.
    node_size: &'static str,
    /// Of the node that serves its own volume, for the same share.
    single_size: &'static str,
    /// Of each of Ceph's OSDs: a replica of the region, up to 1 GiB of RocksDB's log, and what BlueStore keeps for itself,
    /// below the 85 % at which Ceph calls a disk nearly full.
    osd_bytes: u64,
}

/// A region larger than any cache on the way, small enough to be written in a few seconds.
pub const FULL: Scale =
    Scale { region_bytes: GIB, passes: 3, node_size: "6GiB", single_size: "3GiB", osd_bytes: 4 * GIB };
/// To see that it works.
pub const SMALL: Scale =
    Scale { region_bytes: 128 * MIB, passes: 1, node_size: "1GiB", single_size: "1GiB", osd_bytes: GIB };

impl Scale {
    /// Of the files of all our nodes that are wanted.
    fn bytes_of_nodes(&self, wants: &dyn Fn(&str) -> bool) -> u64 {
        let three = if OURS.iter().any(|name| wants(name)) { NODES as u64 * bytes(self.node_size) } else { 0 };
        three + if wants(ALONE) { bytes(self.single_size) } else { 0 }
    }
}

/// Of `6GiB`, as the sizes above are written.
fn bytes(size: &str) -> u64 {
    size.trim_end_matches("GiB").parse::<u64>().map_or(0, |gib| gib * GIB)
}

/// Where a system's client meets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Transport {
    File,
    Unix,
    Tcp,
    Library,
}

/// What is told of a system beside its figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Described {
    pub name: String,
    pub transport: Transport,
    /// `None` of somebody else's.
    pub replicas: Option<u32>,
    /// Without the client.
    pub processes: Vec<String>,
}

pub enum Driver {
    Fio(Target),
    /// fio with threads of a library beside its job's, and the CPU time that it takes to start them and end.
    FioThreads {
        target: Target,
        start: Duration,
    },
    Library(Client),
}

pub struct System {
    pub described: Described,
    pub driver: Driver,
    /// Without the client.
    pub processes: Vec<Watched>,
}

/// What all others are divided by.
pub const RAW: &str = "raw file";
const QEMU: &str = "qemu-nbd, file";
const NBDKIT: &str = "nbdkit, file";
/// The volumes that are served by `torusblk`, those that the library has, and the one a node serves itself.
const SERVED: [(&str, u32); 2] = [("three", 3), ("one", 1)];
const DIRECT: [(&str, u32); 2] = [("three-direct", 3), ("one-direct", 1)];
const INSIDE: &str = "inside";

/// Keeps everything running that the systems consist of.
pub struct Stand {
    /// First, so that clients release their volumes while there is who hears it.
    pub systems: Vec<System>,
    /// All of them, for what they cost when idle.
    pub processes: Vec<Watched>,
    ours: Vec<(Cluster, Option<NbdServer>)>,
    peers: Vec<Process>,
    ceph: Option<Ceph>,
    /// Last, so that the processes are gone before it is.
    folder: TempDir,
}

impl Stand {
    /// `wants`: the systems by name. The raw file is always there, and so is a peer that was named.
    pub fn build(scale: Scale, wants: &dyn Fn(&str) -> bool, peer: Option<Peer>, say: &dyn Fn(&str)) -> Result<Self> {
        let folder = process::temporary_dir("bench-stand");
        let (ours, peers, ceph) = (vec![], vec![], None);
        let mut stand = Self { systems: vec![], processes: vec![], ours, peers, ceph, folder };
        say("writing the file");
        // One for all who have a file: only one of them is at work at a time.
        let file = written_file_of(stand.folder.path(), "file", scale.region_bytes)?;
        stand.push(RAW, Transport::File, None, Driver::Fio(Target::File(file.clone())), &[]);
        stand.add_peers(&file, wants, say)?;
        if peer == Some(Peer::Ceph) {
            stand.add_ceph(scale, scale.bytes_of_nodes(wants), say)?;
        }
        if OURS.iter().any(|name| wants(name)) {
            stand.add_cluster(scale, wants, say)?;
        }
        if wants(ALONE) {
            stand.add_node(scale, say)?;
        }
        Ok(stand)
    }

    /// `result`; where it is an error, with what our processes said last, which is gone when the stand is.
    pub fn explain<T>(&mut self, result: Result<T>) -> Result<T> {
        let (ours, ceph) = (&mut self.ours, &mut self.ceph);
        result.map_err(|error| {
            let mut because = error.to_string();
            let mut add = |name: &str, process: &mut Process| {
                let (ended, log) = (if process.is_running() { "" } else { ", which has ended" }, process.log());
                let lines: Vec<&str> = log.lines().collect();
                let tail = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n  ");
                because += &format!("\n{name}{ended}, said last:\n  {tail}");
            };
            for (cluster, server) in ours {
                let nodes = if server.is_some() { NODES } else { 1 };
                if let Some(server) = server {
                    add("torusblk", &mut server.process);
                }
                for node in 0..nodes {
                    add(&format!("node {}", node + 1), cluster.node(node));
                }
            }
            for (name, process) in ceph.iter_mut().flat_map(Ceph::daemons) {
                add(name, process);
            }
            BenchError::Failed { what: "a measurement".to_string(), because }
        })
    }

    fn push(&mut self, name: &str, transport: Transport, replicas: Option<u32>, driver: Driver, processes: &[Watched]) {
        let names = processes.iter().map(|process| process.name.clone()).collect();
        let described = Described { name: name.to_string(), transport, replicas, processes: names };
        self.systems.push(System { described, driver, processes: processes.to_vec() });
    }

    fn add_peers(&mut self, file: &Path, wants: &dyn Fn(&str) -> bool, say: &dyn Fn(&str)) -> Result<()> {
        let socket = self.folder.path().join("qemu.sock");
        let mut qemu = Command::new("qemu-nbd");
        // Unlocked: others have the file open too.
        let image = format!(
            "driver=raw,cache.direct=on,file.driver=file,file.filename={},file.locking=off,file.aio=io_uring,\
             file.cache.direct=on",
            file.display()
        );
        qemu.args(["--persistent", "--shared=0", "--image-opts", &image]).arg("--socket").arg(&socket);
        let mut nbdkit = Command::new("nbdkit");
        let kit_socket = self.folder.path().join("nbdkit.sock");
        nbdkit.args(["--foreground", "--exit-with-parent", "--unix"]).arg(&kit_socket);
        nbdkit.args(["file", &format!("file={}", file.display()), "cache=none"]);
        for (name, process, mut command, socket) in
            [(QEMU, "qemu-nbd", qemu, socket), (NBDKIT, "nbdkit", nbdkit, kit_socket)]
        {
            if wants(name) {
                self.add_peer((name, process), &mut command, &socket, say);
            }
        }
        Ok(())
    }

    /// Left out, and said so, where it is not installed: it is a peer, not a part.
    fn add_peer(&mut self, (name, short): (&str, &str), command: &mut Command, socket: &Path, say: &dyn Fn(&str)) {
        if Command::new(command.get_program()).arg("--version").stdout(Stdio::null()).status().is_err() {
            return say(&format!("{short} is not installed: measuring without it"));
        }
        let mut process = Process::spawn(short, command, self.folder.path());
        wait::until(name, || {
            assert!(process.is_running(), "{name} ended:\n{}", process.log());
            socket.exists().then_some(())
        });
        let watched = [Watched::new(short, process.pid())];
        self.push(name, Transport::Unix, None, Driver::Fio(Target::unix(socket, "")), &watched);
        self.processes.extend(watched);
        self.peers.push(process);
    }

    fn add_ceph(&mut self, scale: Scale, others_bytes: u64, say: &dyn Fn(&str)) -> Result<()> {
        let Scale { region_bytes, passes, osd_bytes, .. } = scale;
        let ceph = Ceph::start(ceph::Size { region_bytes, passes, osd_bytes, others_bytes }, say)?;
        let (driver, watched) =
            (Driver::FioThreads { target: ceph.target.clone(), start: ceph.client_start }, ceph.watched());
        self.push(ceph::NAME, Transport::Library, None, driver, &watched);
        self.processes.extend(watched);
        self.ceph = Some(ceph);
        Ok(())
    }

    /// What is to be said of these systems beside their figures.
    pub fn notes(&self) -> Vec<String> {
        self.ceph.iter().map(Ceph::note).collect()
    }

    /// Three nodes; two volumes behind an NBD server, two with clients of their own.
    fn add_cluster(&mut self, scale: Scale, wants: &dyn Fn(&str) -> bool, say: &dyn Fn(&str)) -> Result<()> {
        say("starting metadata, three nodes, the NBD server and the clients");
        let options = ClusterOptions { size: scale.node_size, ..ClusterOptions::new("bench", NODES) };
        let mut cluster = Cluster::start(options);
        for (volume, replicas) in SERVED.into_iter().chain(DIRECT) {
            create_volume(&cluster, volume, replicas);
        }
        let socket = self.folder.path().join("torus.sock");
        let listen = format!("unix:{}", socket.display());
        let server = cluster.serve_with(&["--listen", &listen, "--volume", "three", "--volume", "one"]);
        wait::until("the NBD server's unix socket", || socket.exists().then_some(()));
        let nodes = watch(&mut cluster, None);
        let torusblk = Watched::new("torusblk", server.process.pid());
        let with_server: Vec<Watched> = nodes.iter().cloned().chain([torusblk]).collect();
        self.processes.extend(with_server.clone());
        for ((volume, replicas), names) in SERVED.into_iter().zip([&OURS[..2], &OURS[3..5]]) {
            let unix = Target::unix(&socket, volume);
            if names.iter().any(|name| wants(name)) {
                say(&format!("writing the region of volume {volume}"));
                fio::fill(&unix, scale.region_bytes, scale.passes)?;
            }
            let targets = [(Transport::Unix, unix), (Transport::Tcp, Target::Nbd(server.url(volume)))];
            for ((transport, target), name) in targets.into_iter().zip(names).filter(|(_, name)| wants(name)) {
                self.push(name, transport, Some(replicas), Driver::Fio(target), &with_server);
            }
        }
        for ((volume, replicas), name) in DIRECT.into_iter().zip([OURS[2], OURS[5]]).filter(|(_, name)| wants(name)) {
            let client = Client::start(&cluster.url(), volume)?;
            say(&format!("writing the region of volume {volume}"));
            fill_by(&client, scale.region_bytes, scale.passes)?;
            self.processes.push(client.watched());
            self.push(name, Transport::Library, Some(replicas), Driver::Library(client), &nodes);
        }
        // Those of one number of replicas beside each other.
        self.systems.sort_by_key(|system| OURS.iter().position(|name| *name == system.described.name));
        self.ours.push((cluster, Some(server)));
        Ok(())
    }

    /// One that serves its one volume itself.
    fn add_node(&mut self, scale: Scale, say: &dyn Fn(&str)) -> Result<()> {
        say("starting torus-engine --nbd");
        let socket: PathBuf = self.folder.path().join("engine.sock");
        let listen = format!("unix:{}", socket.display());
        let node_arguments = ["--nbd", &listen, "--export", INSIDE].map(str::to_string).to_vec();
        let options = ClusterOptions { size: scale.single_size, ..ClusterOptions::new("bench-inside", 1) };
        let mut cluster = Cluster::start(ClusterOptions { node_arguments, ..options });
        create_volume(&cluster, INSIDE, 1);
        cluster.node(0).await_line("attached volume");
        let metadata = Watched::new("metadata of the single node", cluster.store.pid());
        let processes = [metadata, Watched::new("torus-engine --nbd", cluster.node(0).pid())];
        let target = Target::unix(&socket, INSIDE);
        say(&format!("writing the region of volume {INSIDE}"));
        fio::fill(&target, scale.region_bytes, scale.passes)?;
        self.push(ALONE, Transport::Unix, Some(1), Driver::Fio(target), &processes);
        self.processes.extend(processes);
        self.ours.push((cluster, None));
        Ok(())
    }
}

/// In this order: three replicas, then one, each over a unix socket, TCP and without NBD.
const OURS: [&str; 6] =
    ["Torus ×3, unix", "Torus ×3, TCP", "Torus ×3, library", "Torus ×1, unix", "Torus ×1, TCP", "Torus ×1, library"];
const ALONE: &str = "torus-engine --nbd ×1, unix";

/// Whether `text` is in the name of a system.
pub fn check(text: &str, peer: Option<Peer>) -> Result<()> {
    let names: Vec<&str> = [RAW, QEMU, NBDKIT].into_iter().chain(OURS).chain([ALONE]).collect();
    let has_it = |name: &str| name.to_lowercase().contains(&text.to_lowercase());
    if names.iter().any(|name| has_it(name)) || (peer.is_some() && has_it(ceph::NAME)) {
        return Ok(());
    }
    let also = if peer.is_some() { "; " } else { "; with --peers ceph also " };
    let because = format!("no system has that in its name; there are {}{also}{}", names.join("; "), ceph::NAME);
    Err(BenchError::Failed { what: format!("--system {text:?}"), because })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_asked_for_the_nodes_that_will_be_there() {
        assert_eq!(FULL.bytes_of_nodes(&|_| true), (3 * 6 + 3) * GIB);
        assert_eq!(SMALL.bytes_of_nodes(&|name| name == ALONE), GIB);
        assert_eq!(FULL.bytes_of_nodes(&|name| name == RAW), 0);
    }

    #[test]
    fn a_peer_has_a_name_when_it_is_there() {
        assert!(check("ceph", Some(Peer::Ceph)).is_ok() && check("torus ×3", None).is_ok());
        assert!(check("ceph", None).unwrap_err().to_string().contains("with --peers ceph also Ceph RBD ×3"));
    }
}
