//! A cluster of real processes on this machine: a metadata store, nodes, and the commands to administer them.
//! Everything is started on free ports in a folder of its own, and killed by pid when it is dropped.

use crate::network::{Host, Network};
use crate::process::{self, Outcome, Process};
use crate::store::{Store, StoreKind, free_address};
use crate::wait;
use futures::executor::block_on;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;
use tempfile::TempDir;
use torus_engine::datadir::Identity;
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::metadata::{Entry, Metadata, Transaction, Write};
use torus_schema::ids::NodeId;
use torus_schema::records::{self, HeartbeatRecord, NodeRecord, StatusRecord, keys};

/// The smallest node there is.
pub const NODE_SIZE: &str = "512MiB";
/// Where Debian puts it.
const FAKETIME: [&str; 2] =
    ["/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1", "/usr/lib/aarch64-linux-gnu/faketime/libfaketimeMT.so.1"];
/// Of the first NBD server of a host of its own.
const NBD_PORT: u16 = 10809;
const DEADLINE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct ClusterOptions {
    pub name: &'static str,
    pub nodes: usize,
    pub store: StoreKind,
    /// Of each node.
    pub size: &'static str,
    /// Added to the command line of every node.
    pub node_arguments: Vec<String>,
    /// Make the nodes members of the ring.
    pub is_joined: bool,
    /// Store, nodes and clients on hosts of their own (`hosts_for`), and the test on another; loopback otherwise.
    pub network: Option<Network>,
}

/// Where the test itself and its commands are.
pub const TEST_HOST: Host = 0;
const STORE_HOST: Host = 1;

/// Of each member of the metadata store.
pub fn store_hosts(nodes: usize) -> [Host; 3] {
    [STORE_HOST, 3 + nodes, 4 + nodes]
}

pub fn node_host(node: usize) -> Host {
    2 + node
}

/// Where NBD servers are.
pub fn client_host(nodes: usize) -> Host {
    2 + nodes
}

/// Hosts that a cluster of so many nodes needs.
pub fn hosts_for(nodes: usize) -> usize {
    5 + nodes
}

impl ClusterOptions {
    pub fn new(name: &'static str, nodes: usize) -> Self {
        let store = StoreKind::Embedded;
        Self { name, nodes, store, size: NODE_SIZE, node_arguments: vec![], is_joined: true, network: None }
    }
}

pub struct Cluster {
    options: ClusterOptions,
    /// Gone before their store is, so that the last they say when a test fails is not about that.
    nodes: Vec<Option<Process>>,
    pub store: Store,
    servers: u16,
    /// Last, so that the processes are gone before it is.
    folder: TempDir,
}

impl Cluster {
    /// Initialised, every node up, and all of them members if asked for.
    pub fn start(options: ClusterOptions) -> Self {
        let folder = process::temporary_dir(options.name);
        if let Some(network) = &options.network {
            network.enter(TEST_HOST);
        }
        let hosts = store_hosts(options.nodes);
        let place = options.network.clone().map(|network| (network, &hosts[..]));
        let store = Store::start_at(options.store, folder.path(), place);
        let nodes = (0..options.nodes).map(|_| None).collect();
        let mut cluster = Self { options, store, nodes, servers: 0, folder };
        cluster.torusadm(&["init"]).ok();
        for node in 0..cluster.nodes.len() {
            cluster.spawn_node(node);
        }
        for node in 0..cluster.nodes.len() {
            cluster.await_node(node);
        }
        if cluster.options.is_joined && !cluster.nodes.is_empty() {
            cluster.torusadm(&["peer", "add", "--all-peers"]).ok();
        }
        cluster
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn url(&self) -> String {
        self.store.url()
    }

    pub fn data_dir(&self, node: usize) -> PathBuf {
        self.folder.path().join(format!("node-{}", node + 1))
    }

    /// As node `node` is started, for tests that want it otherwise.
    pub fn node_command(&self, node: usize) -> Command {
        let mut command = process::program("torus-engine");
        let listen = match &self.options.network {
            Some(network) => {
                network.place(node_host(node), &mut command);
                network.address(node_host(node))
            }
            None => Ipv4Addr::LOCALHOST,
        };
        command.args(["--metadata", &self.url(), "--listen", &format!("{listen}:0")]);
        command.arg("--data-dir").arg(self.data_dir(node));
        if !self.data_dir(node).join("torus.json").exists() {
            command.args(["--size", self.options.size]);
        }
        command.args(&self.options.node_arguments);
        command
    }

    fn spawn_node(&mut self, node: usize) {
        assert!(self.nodes[node].is_none(), "node {node} runs already");
        let mut command = self.node_command(node);
        self.nodes[node] = Some(Process::spawn(&format!("node-{}", node + 1), &mut command, self.folder.path()));
    }

    fn await_node(&mut self, node: usize) {
        self.node(node).await_line("serving node");
    }

    /// Returns when it has joined the cluster.
    pub fn start_node(&mut self, node: usize) {
        self.spawn_node(node);
        self.await_node(node);
    }

    /// With more on its command line.
    pub fn start_node_with(&mut self, node: usize, arguments: &[&str]) {
        assert!(self.nodes[node].is_none(), "node {node} runs already");
        let mut command = self.node_command(node);
        command.args(arguments);
        self.nodes[node] = Some(Process::spawn(&format!("node-{}", node + 1), &mut command, self.folder.path()));
        self.await_node(node);
    }

    /// Its wall clock is off by so many seconds, and its time since boot is as many ahead as that has without a sign.
    /// Where the kernel has no time namespaces, or libfaketime is missing, that clock stays as it is, which is said.
    pub fn start_node_shifted(&mut self, node: usize, seconds: i64) {
        assert!(self.nodes[node].is_none(), "node {node} runs already");
        let mut command = self.node_command(node);
        if !process::shift_time_since_boot(&mut command, seconds.unsigned_abs()) {
            eprintln!("SKIPPED: no time namespaces here, the time since boot stays as it is");
        }
        match FAKETIME.iter().find(|path| Path::new(path).exists()) {
            Some(library) => {
                command.env("LD_PRELOAD", library).env("FAKETIME", format!("{seconds:+}s"));
                command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1");
            }
            None => eprintln!("SKIPPED: no libfaketime here, the wall clock stays as it is"),
        }
        self.nodes[node] = Some(Process::spawn(&format!("node-{}", node + 1), &mut command, self.folder.path()));
        self.await_node(node);
    }

    /// Several at once, as after a power cut.
    pub fn start_nodes(&mut self, nodes: &[usize]) {
        nodes.iter().for_each(|node| self.spawn_node(*node));
        nodes.iter().for_each(|node| self.await_node(*node));
    }

    /// kill -9
    pub fn kill_node(&mut self, node: usize) {
        self.nodes[node].take().expect("the node runs").kill();
    }

    /// SIGTERM
    pub fn stop_node(&mut self, node: usize) -> ExitStatus {
        self.nodes[node].take().expect("the node runs").stop()
    }

    pub fn node(&mut self, node: usize) -> &mut Process {
        self.nodes[node].as_mut().expect("the node runs")
    }

    pub fn node_id(&self, node: usize) -> NodeId {
        self.identity(node).node
    }

    /// What stands in the node's data dir.
    pub fn identity(&self, node: usize) -> Identity {
        let text = std::fs::read(self.data_dir(node).join("torus.json")).expect("the node is formatted");
        serde_json::from_slice(&text).expect("a node writes its own identity")
    }

    /// Takes from the data dir of a node that does not run what is written after the last moment at which a format can
    /// be cut off.
    pub fn unformat(&self, node: usize) {
        let dir = self.data_dir(node);
        std::fs::remove_file(dir.join("torus.json")).expect("the node is formatted");
        for later in ["lease.json", "lease.json.new", "scrub.json", "scrub.json.new"] {
            let _ = std::fs::remove_file(dir.join(later));
        }
    }

    pub fn metadata(&self) -> AnyMetadata {
        AnyMetadata::connect(&self.url(), DEADLINE).expect("our own URL is understood")
    }

    pub fn node_record(&self, node: usize) -> NodeRecord {
        let key = keys::node(self.node_id(node));
        let entry = block_on(self.metadata().get(&key)).expect("the store answers").expect("the node has joined");
        records::decode(&key, &entry.value).expect("a node's record can be read")
    }

    pub fn heartbeat(&self, node: usize) -> Option<HeartbeatRecord> {
        let key = keys::heartbeat(self.node_id(node));
        let entry = block_on(self.metadata().get(&key)).expect("the store answers")?;
        Some(records::decode(&key, &entry.value).expect("a heartbeat can be read"))
    }

    /// A server that was killed holds its volumes until its lease ends. That it is dead is certain, so they are taken
    /// away by hand: to wait for it each time shows nothing more.
    pub fn free_volumes(&self) {
        let metadata = self.metadata();
        let owners = block_on(metadata.range(&keys::owners())).expect("the store answers").entries;
        let writes = owners.into_iter().map(|owner| Write::Delete { key: owner.key }).collect();
        block_on(metadata.transact(Transaction { writes, ..Default::default() })).expect("the store answers");
    }

    /// What stands in the store of every volume's replicas, and when it was written.
    pub fn statuses(&self) -> Vec<Entry> {
        block_on(self.metadata().range(&keys::statuses())).expect("the store answers").entries
    }

    /// Whether every replica of every volume is in sync within `deadline`, without anybody's help.
    pub fn await_in_sync(&self, deadline: Duration) -> bool {
        let metadata = self.metadata();
        let in_sync = wait::within(deadline, || {
            let entries = block_on(metadata.range(&keys::statuses())).ok()?.entries;
            let mut statuses =
                entries.iter().map(|entry| records::decode::<StatusRecord>(&entry.key, &entry.value).expect("ours"));
            statuses.all(|status| status.stale.is_empty()).then_some(())
        });
        in_sync.is_some()
    }

    /// With the cluster's URL.
    pub fn torusadm(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(process::program("torusadm").args(["--metadata", &self.url()]).args(arguments))
    }

    pub fn torusblk(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(process::program("torusblk").args(["--metadata", &self.url()]).args(arguments))
    }

    /// An NBD server for all volumes. It ends with the cluster's test, or when it is dropped.
    pub fn serve(&mut self) -> NbdServer {
        self.serve_with(&[])
    }

    /// `torusblk aoe` on that host of the network, with `arguments` behind it.
    pub fn aoe_on(&mut self, host: Host, arguments: &[&str]) -> Process {
        self.servers += 1;
        let mut command = process::program("torusblk");
        let network = self.options.network.as_ref().expect("a cluster with AoE has a network");
        network.place(host, &mut command);
        command.args(["--metadata", &self.url(), "aoe"]).args(arguments);
        Process::spawn(&format!("aoe-{}", self.servers), &mut command, self.folder.path())
    }

    pub fn serve_with(&mut self, arguments: &[&str]) -> NbdServer {
        self.servers += 1;
        let mut command = process::program("torusblk");
        let address = match &self.options.network {
            Some(network) => {
                let host = client_host(self.options.nodes);
                network.place(host, &mut command);
                SocketAddr::from((network.address(host), NBD_PORT + self.servers))
            }
            None => free_address(),
        };
        command.args(["--metadata", &self.url(), "serve", "--insecure", "--listen", &address.to_string()]);
        command.args(arguments);
        let mut process = Process::spawn(&format!("nbd-{}", self.servers), &mut command, self.folder.path());
        wait::until("the NBD server's port", || {
            assert!(process.is_running(), "the NBD server ended:\n{}", process.log());
            std::net::TcpStream::connect(address).ok()
        });
        NbdServer { process, address }
    }
}

pub struct NbdServer {
    pub process: Process,
    pub address: SocketAddr,
}

impl NbdServer {
    pub fn url(&self, volume: &str) -> String {
        format!("nbd://{}/{volume}", self.address)
    }
}
