//! A metadata store in a process of its own, which can be stopped and started under a running cluster.

use crate::network::{Host, Network};
use crate::process::{self, Outcome, Process};
use crate::wait;
use nix::sys::signal::Signal;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreKind {
    /// `torus-engine metadata`
    Embedded,
    /// The machine's own etcd.
    Etcd,
}

/// Those of etcd, where they are certainly free.
const CLIENT_PORT: u16 = 2379;
const PEER_PORT: u16 = 2380;

pub struct Store {
    kind: StoreKind,
    folder: PathBuf,
    /// The same for every start, since the nodes were told it.
    address: SocketAddr,
    place: Option<(Network, Host)>,
    process: Option<Process>,
}

impl Store {
    pub fn start(kind: StoreKind, folder: &Path) -> Self {
        Self::start_at(kind, folder, None)
    }

    /// On a host of its own, or on this one.
    pub fn start_at(kind: StoreKind, folder: &Path, place: Option<(Network, Host)>) -> Self {
        let folder = folder.to_path_buf();
        let address = match &place {
            // Nobody else is there.
            Some((network, host)) => SocketAddr::from((network.address(*host), CLIENT_PORT)),
            None => free_address(),
        };
        let mut store = Self { kind, folder, address, place, process: None };
        store.start_again();
        store
    }

    pub fn url(&self) -> String {
        match self.kind {
            StoreKind::Embedded => format!("torus://{}", self.address),
            StoreKind::Etcd => format!("etcd://{}", self.address),
        }
    }

    /// Returns when it takes connections.
    pub fn start_again(&mut self) {
        assert!(self.process.is_none(), "the store runs already");
        let mut command = match self.kind {
            StoreKind::Embedded => self.embedded(),
            StoreKind::Etcd => self.etcd(),
        };
        if let Some((network, host)) = &self.place {
            network.place(*host, &mut command);
        }
        let mut process = Process::spawn("metadata", &mut command, &self.folder);
        wait::until("the metadata store's port", || {
            assert!(process.is_running(), "the metadata store ended:\n{}", process.log());
            TcpStream::connect(self.address).ok()
        });
        self.process = Some(process);
    }

    fn embedded(&self) -> std::process::Command {
        let mut command = process::program("torus-engine");
        command.arg("metadata").arg("--dir").arg(self.data());
        command.arg("--listen").arg(self.address.to_string());
        command
    }

    fn etcd(&self) -> std::process::Command {
        let client = format!("http://{}", self.address);
        let peer = match &self.place {
            Some((network, host)) => format!("http://{}:{PEER_PORT}", network.address(*host)),
            None => format!("http://{}", free_address()),
        };
        let mut command = process::tool("etcd");
        command.arg("--data-dir").arg(self.data());
        command.args(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
        command.args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
        command.args(["--initial-cluster", &format!("default={peer}"), "--log-level", "warn"]);
        command
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the store runs").pid()
    }

    pub fn kill(&mut self) {
        self.process.take().expect("the store runs").kill();
    }

    /// All it knows, as a copy to `restore` later. It must not run.
    pub fn back_up(&self, name: &str) {
        assert!(self.process.is_none(), "a store is copied while it does not run");
        let copy = self.folder.join(name);
        let _ = std::fs::remove_dir_all(&copy);
        Outcome::of(process::tool("cp").arg("-a").arg(self.data()).arg(&copy)).ok();
    }

    /// It knows what it knew then, and nothing since. It must not run.
    pub fn restore(&self, name: &str) {
        assert!(self.process.is_none(), "a store is restored while it does not run");
        std::fs::remove_dir_all(self.data()).expect("the store ran before");
        Outcome::of(process::tool("cp").arg("-a").arg(self.folder.join(name)).arg(self.data())).ok();
    }

    fn data(&self) -> PathBuf {
        self.folder.join(match self.kind {
            StoreKind::Embedded => "metadata",
            StoreKind::Etcd => "etcd",
        })
    }

    /// It is there and answers nobody.
    pub fn freeze(&self) {
        self.process.as_ref().expect("the store runs").signal(Signal::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.process.as_ref().expect("the store runs").signal(Signal::SIGCONT);
    }
}

/// Nobody listened there a moment ago. For programs that cannot be told port 0 because others are told their port
/// before they start.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    listener.local_addr().expect("a bound socket has an address")
}
