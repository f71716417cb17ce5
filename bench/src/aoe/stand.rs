//! The AoE targets that are compared, on one Ethernet segment of virtual links, each on a host of its own.

use crate::aoe::load::Address;
use crate::error::{BenchError, Result};
use crate::processes::Watched;
use crate::stand::{NODE_SIZE, NODES, REGION_BYTES, create_volume, written_file};
use std::fs::File;
use std::path::Path;
use tempfile::TempDir;
use torus_tests::cluster::{Cluster, ClusterOptions, hosts_for};
use torus_tests::network::Network;
use torus_tests::{Process, process};

/// In memory, since that is what it is compared with.
const MEMORY: &str = "/dev/shm";
const MEMORY_BYTES: u64 = 256 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Memory,
    Disk,
}

pub struct Target {
    pub name: &'static str,
    pub kind: Kind,
    pub is_peer: bool,
    pub address: Address,
    pub bytes: u64,
    pub processes: Vec<Watched>,
}

/// Keeps all targets running. Processes go before the folders they write to.
pub struct Stand {
    pub targets: Vec<Target>,
    _processes: Vec<Process>,
    _cluster: Option<Cluster>,
    _memory: TempDir,
    _folder: TempDir,
    /// Last: the processes are on it.
    _network: Network,
}

struct Building {
    targets: Vec<Target>,
    processes: Vec<Process>,
    network: Network,
    next_host: usize,
}

impl Building {
    fn address(&self) -> Address {
        Address { shelf: 1, slot: self.targets.len() as u8 }
    }

    fn start(&mut self, name: &'static str, command: &mut std::process::Command, folder: &Path) -> Watched {
        self.network.place(self.next_host, command);
        self.next_host += 1;
        let process = Process::spawn(&name.replace([' ', ','], "-"), command, folder);
        let watched = Watched::new(name, process.pid());
        self.processes.push(process);
        watched
    }

    fn add(&mut self, name: &'static str, kind: Kind, is_peer: bool, bytes: u64, processes: Vec<Watched>) {
        let address = self.address();
        self.targets.push(Target { name, kind, is_peer, address, bytes, processes });
    }

    fn add_vblade(&mut self, name: &'static str, kind: Kind, options: &[&str], file: &Path, folder: &Path) {
        let Address { shelf, slot } = self.address();
        let mut command = process::tool("vblade");
        command.args(options).args(["-b", "64", &shelf.to_string(), &slot.to_string(), "eth0"]).arg(file);
        let watched = self.start(name, &mut command, folder);
        let bytes = if kind == Kind::Memory { MEMORY_BYTES } else { REGION_BYTES };
        self.add(name, kind, true, bytes, vec![watched]);
    }

    fn add_volume(&mut self, name: &'static str, volume: &str, replicas: u32, cluster: &mut Cluster) {
        create_volume(cluster, volume, replicas);
        let Address { shelf, slot } = self.address();
        let mut command = process::program("torusblk");
        command.args(["--metadata", &cluster.url(), "aoe", volume, "eth0", &shelf.to_string(), &slot.to_string()]);
        let own = self.start(name, &mut command, cluster.folder());
        let mut processes = vec![Watched::new("metadata", cluster.store.pid())];
        processes.extend((0..NODES).map(|node| Watched::new(format!("node {}", node + 1), cluster.node(node).pid())));
        processes.push(own);
        self.add(name, Kind::Disk, false, REGION_BYTES, processes);
    }
}

impl Stand {
    /// On links that carry `mtu`. `None`, with the reason printed, where there can be no such links.
    pub fn build(mtu: u32, null: bool, say: &dyn Fn(&str)) -> Result<Option<Self>> {
        let Some(network) = Network::with_mtu(hosts_for(NODES) + 5, mtu) else { return Ok(None) };
        let folder = process::temporary_dir("bench-aoe");
        let memory = TempDir::new_in(MEMORY).map_err(BenchError::wrap(MEMORY))?;
        let mut building =
            Building { targets: vec![], processes: vec![], network: network.clone(), next_host: hosts_for(NODES) };
        let file = memory.path().join("file");
        let made = File::create(&file).and_then(|made| made.set_len(MEMORY_BYTES));
        made.map_err(BenchError::wrap("a file in memory"))?;
        building.add_vblade("vblade, memory", Kind::Memory, &[], &file, folder.path());
        let Address { shelf, slot } = building.address();
        let mut command = process::program("torus-bench");
        command.args(["null-target", "eth0", &shelf.to_string(), &slot.to_string(), &MEMORY_BYTES.to_string()]);
        let watched = building.start("torus, memory", &mut command, folder.path());
        building.add("torus, memory", Kind::Memory, false, MEMORY_BYTES, vec![watched]);
        let mut cluster = None;
        if !null {
            say("writing the file of vblade");
            let file = written_file(folder.path(), "vblade")?;
            building.add_vblade("vblade -d -s", Kind::Disk, &["-d", "-s"], &file, folder.path());
            say("starting a cluster of three");
            let options = ClusterOptions {
                size: NODE_SIZE,
                network: Some(network.clone()),
                ..ClusterOptions::new("bench", NODES)
            };
            let mut started = Cluster::start(options);
            building.add_volume("torus, 1 replica", "one", 1, &mut started);
            building.add_volume("torus, 3 replicas", "three", 3, &mut started);
            cluster = Some(started);
        } else {
            network.enter(0);
        }
        let Building { targets, processes, .. } = building;
        let (_processes, _cluster, _memory, _folder) = (processes, cluster, memory, folder);
        Ok(Some(Self { targets, _processes, _cluster, _memory, _folder, _network: network }))
    }
}
