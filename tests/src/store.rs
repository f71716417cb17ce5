//! A metadata store in a process of its own, which can be stopped and started under a running cluster.

use crate::network::{Host, Network};
use crate::process::{self, Outcome, Process};
use crate::wait;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// `torus-engine metadata`
    Embedded,
    /// The machine's own etcd.
    Etcd,
    /// Three members of it, which elect a leader.
    EtcdOfThree,
}

impl StoreKind {
    pub fn members(self) -> usize {
        if self == Self::EtcdOfThree { 3 } else { 1 }
    }
}

/// Those of etcd, where they are certainly free.
const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;

pub struct Store {
    kind: StoreKind,
    folder: PathBuf,
    members: Vec<Member>,
}

/// One process of the store. Its addresses are the same for every start, since the others and the nodes were told them.
struct Member {
    address: SocketAddr,
    peer: SocketAddr,
    place: Option<(Network, Host)>,
    process: Option<Process>,
}

impl Store {
    pub fn start(kind: StoreKind, folder: &Path) -> Self {
        Self::start_at(kind, folder, None)
    }

    /// Each member on a host of its own, or all on this one.
    pub fn start_at(kind: StoreKind, folder: &Path, place: Option<(Network, &[Host])>) -> Self {
        let folder = folder.to_path_buf();
        let members =
            (0..kind.members()).map(|member| Member::new(place.as_ref().map(|(n, h)| (n.clone(), h[member]))));
        let mut store = Self { kind, folder, members: members.collect() };
        store.start_again();
        store
    }

    pub fn url(&self) -> String {
        let scheme = if self.kind == StoreKind::Embedded { "torus" } else { "etcd" };
        format!("{scheme}://{}", self.endpoints())
    }

    fn endpoints(&self) -> String {
        let addresses: Vec<String> = self.members.iter().map(|member| member.address.to_string()).collect();
        addresses.join(",")
    }

    /// Every member that does not run. Returns when they take connections.
    pub fn start_again(&mut self) {
        let stopped: Vec<usize> = (0..self.members.len()).filter(|at| self.members[*at].process.is_none()).collect();
        assert!(!stopped.is_empty(), "the store runs already");
        for at in &stopped {
            let mut command = if self.kind == StoreKind::Embedded { self.embedded() } else { self.etcd(*at) };
            let member = &mut self.members[*at];
            if let Some((network, host)) = &member.place {
                network.place(*host, &mut command);
            }
            member.process = Some(Process::spawn(&name(*at), &mut command, &self.folder));
        }
        for member in stopped {
            let Member { address, process, .. } = &mut self.members[member];
            let process = process.as_mut().expect("it was just started");
            wait::until("the metadata store's port", || {
                assert!(process.is_running(), "the metadata store ended:\n{}", process.log());
                TcpStream::connect(*address).ok()
            });
        }
    }

    fn embedded(&self) -> Command {
        let mut command = process::program("torus-engine");
        command.arg("metadata").arg("--dir").arg(self.data(0));
        command.arg("--listen").arg(self.endpoints());
        // As people have it who use the tools: it is a node's setting, and none of this command's.
        command.env("TORUS_METADATA", "torus://127.0.0.1:1");
        command
    }

    fn etcd(&self, member: usize) -> Command {
        let client = format!("http://{}", self.members[member].address);
        let mut command = process::tool("etcd");
        command.arg("--data-dir").arg(self.data(member)).args(self.membership(member));
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &self.members[member].peer_url(), "--log-level", "warn"]);
        command
    }

    /// What a member and its restored data have to be told alike.
    fn membership(&self, member: usize) -> [String; 6] {
        let all: Vec<String> =
            self.members.iter().enumerate().map(|(at, member)| format!("{}={}", name(at), member.peer_url())).collect();
        let [of_name, of_cluster, of_peer] = ["--name", "--initial-cluster", "--initial-advertise-peer-urls"];
        let own = self.members[member].peer_url();
        [of_name.into(), name(member), of_cluster.into(), all.join(","), of_peer.into(), own]
    }

    pub fn pid(&self) -> u32 {
        self.members[0].running().pid()
    }

    /// All that run.
    pub fn kill(&mut self) {
        self.members.iter_mut().filter_map(|member| member.process.take()).for_each(|mut process| process.kill());
    }

    pub fn kill_member(&mut self, member: usize) {
        self.members[member].process.take().expect("the store runs").kill();
    }

    /// The members are there and answer nobody.
    pub fn freeze(&self) {
        (0..self.members.len()).for_each(|member| self.freeze_member(member));
    }

    pub fn freeze_member(&self, member: usize) {
        self.members[member].running().signal(Signal::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.members.iter().for_each(|member| member.running().signal(Signal::SIGCONT));
    }

    fn etcdctl(&self) -> Command {
        let mut command = process::tool("etcdctl");
        command.env("ETCDCTL_API", "3");
        command
    }

    /// Which member of etcd leads, once one does.
    pub fn leader(&self) -> usize {
        wait::until("a leader of etcd", || {
            let mut command = self.etcdctl();
            command.args(["--endpoints", &self.endpoints(), "endpoint", "status", "--write-out", "json"]);
            let told: Value = serde_json::from_str(&Outcome::of(&mut command).stdout).ok()?;
            let told = told.as_array()?;
            let leads = |at: &Value| at["Status"]["leader"] == at["Status"]["header"]["member_id"];
            let leader = told.iter().find(|at| leads(at))?["Endpoint"].as_str()?;
            self.members.iter().position(|member| member.address.to_string() == leader)
        })
    }

    /// All that a running etcd knows, to `restore` later.
    pub fn back_up(&self, name: &str) {
        let copy = self.folder.join(name);
        let _ = std::fs::remove_file(&copy);
        let mut command = self.etcdctl();
        command.args(["--endpoints", &self.members[0].address.to_string(), "snapshot", "save"]);
        Outcome::of(command.arg(copy)).ok();
    }

    /// All members know what was known then, and nothing since. None may run.
    pub fn restore(&self, backup: &str) {
        for (at, member) in self.members.iter().enumerate() {
            assert!(member.process.is_none(), "a store is restored while it does not run");
            std::fs::remove_dir_all(self.data(at)).expect("the store ran before");
            let mut command = self.etcdctl();
            command.args(["snapshot", "restore"]).arg(self.folder.join(backup));
            Outcome::of(command.arg("--data-dir").arg(self.data(at)).args(self.membership(at))).ok();
        }
    }

    fn data(&self, member: usize) -> PathBuf {
        self.folder.join(format!("{}-data", name(member)))
    }
}

/// Of a member's process and its folder.
fn name(member: usize) -> String {
    if member == 0 { "metadata".to_string() } else { format!("metadata-{}", member + 1) }
}

impl Member {
    fn new(place: Option<(Network, Host)>) -> Self {
        let (address, peer) = match &place {
            // Nobody else is there.
            Some((network, host)) => {
                let on = |port: u16| SocketAddr::from((network.address(*host), port));
                (on(CLIENT_PORT), on(PEER_PORT))
            }
            None => (free_address(), free_address()),
        };
        Self { address, peer, place, process: None }
    }

    fn peer_url(&self) -> String {
        format!("http://{}", self.peer)
    }

    fn running(&self) -> &Process {
        self.process.as_ref().expect("the store runs")
    }
}

/// Nobody listened there a moment ago. For programs that cannot be told port 0 because others are told their port
/// before they start.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    listener.local_addr().expect("a bound socket has an address")
}
