//! A metadata store in a process of its own, which can be stopped and started under a running cluster.

use crate::process::{self, Process};
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

pub struct Store {
    kind: StoreKind,
    folder: PathBuf,
    /// The same for every start, since the nodes were told it.
    address: SocketAddr,
    process: Option<Process>,
}

impl Store {
    pub fn start(kind: StoreKind, folder: &Path) -> Self {
        let folder = folder.to_path_buf();
        let mut store = Self { kind, folder, address: free_address(), process: None };
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
        let mut process = Process::spawn("metadata", &mut command, &self.folder);
        wait::until("the metadata store's port", || {
            assert!(process.is_running(), "the metadata store ended:\n{}", process.log());
            TcpStream::connect(self.address).ok()
        });
        self.process = Some(process);
    }

    fn embedded(&self) -> std::process::Command {
        let mut command = process::program("torus-engine");
        command.arg("metadata").arg("--dir").arg(self.folder.join("metadata"));
        command.arg("--listen").arg(self.address.to_string());
        command
    }

    fn etcd(&self) -> std::process::Command {
        let client = format!("http://{}", self.address);
        let peer = format!("http://{}", free_address());
        let mut command = process::tool("etcd");
        command.arg("--data-dir").arg(self.folder.join("etcd"));
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

    /// A copy of all that a stopped store has on its disk.
    pub fn back_up(&self) -> PathBuf {
        assert!(self.process.is_none(), "a running store's files are not of one moment");
        let copy = self.folder.join("backup");
        copy_folder(&self.data(), &copy);
        copy
    }

    /// The stopped store has again what it had then.
    pub fn restore(&self, backup: &Path) {
        assert!(self.process.is_none(), "the store runs");
        std::fs::remove_dir_all(self.data()).expect("our own folder");
        copy_folder(backup, &self.data());
    }

    fn data(&self) -> PathBuf {
        match self.kind {
            StoreKind::Embedded => self.folder.join("metadata"),
            StoreKind::Etcd => self.folder.join("etcd"),
        }
    }

    /// It is there and answers nobody.
    pub fn freeze(&self) {
        self.process.as_ref().expect("the store runs").signal(Signal::SIGSTOP);
    }

    pub fn thaw(&self) {
        self.process.as_ref().expect("the store runs").signal(Signal::SIGCONT);
    }
}

fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("the test's folder can be written");
    for entry in std::fs::read_dir(from).expect("the folder is there") {
        let entry = entry.expect("the folder can be read");
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).expect("the test's folder can be written");
        }
    }
}

/// Nobody listened there a moment ago. For programs that cannot be told port 0 because others are told their port
/// before they start.
pub fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has free ports");
    listener.local_addr().expect("a bound socket has an address")
}
