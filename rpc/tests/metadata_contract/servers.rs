//! Real servers for the contract, each in its own process on loopback with a directory of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;
use torus_rpc::metadata::embedded_server::EmbeddedServer;

const DIRECTORY: &str = "TORUS_TEST_METADATA_DIRECTORY";
const LISTEN: &str = "TORUS_TEST_METADATA_LISTEN";
const ANNOUNCEMENT: &str = "serving at ";

pub trait Server {
    fn url(&self) -> String;
    /// With SIGKILL: nothing is said goodbye to.
    fn kill(&mut self);
    /// At the same address, on the same directory.
    fn start_again(&mut self);
    /// Where it keeps everything.
    fn directory(&self) -> &Path;

    /// It must not run, here and in `restore`.
    fn back_up(&self) {
        copy(self.directory(), &self.directory().with_extension("backup"));
    }

    fn restore(&self) {
        std::fs::remove_dir_all(self.directory()).expect("it ran before");
        std::fs::rename(self.directory().with_extension("backup"), self.directory()).expect("there is a backup");
    }
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").arg(from).arg(to).status().expect("every machine has it");
    assert!(copied.success(), "{} was not copied", from.display());
}

/// Killed when it is dropped, however the test ends.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub struct EmbeddedProcess {
    directory: TempDir,
    address: SocketAddr,
    process: Option<Process>,
}

impl EmbeddedProcess {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (process, address) = serve_in_child(directory.path(), any);
        Self { directory, address, process: Some(process) }
    }
}

impl Server for EmbeddedProcess {
    fn directory(&self) -> &Path {
        self.directory.path()
    }
    fn url(&self) -> String {
        format!("torus://{}", self.address)
    }
    fn kill(&mut self) {
        self.process = None;
    }
    fn start_again(&mut self) {
        let (process, address) = serve_in_child(self.directory.path(), self.address);
        assert_eq!(address, self.address);
        self.process = Some(process);
    }
}

/// This very test binary, told to be a server.
fn serve_in_child(directory: &Path, listen: SocketAddr) -> (Process, SocketAddr) {
    let mut child = Command::new(std::env::current_exe().expect("the test binary knows its path"))
        .args(["--exact", "embedded_server_process", "--ignored", "--nocapture"])
        .env(DIRECTORY, directory)
        .env(LISTEN, listen.to_string())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the test binary starts again");
    let stdout = child.stdout.take().expect("it was piped");
    let process = Process(child);
    for line in BufReader::new(stdout).lines() {
        let line = line.expect("the server's output is text");
        if let Some((_, address)) = line.split_once(ANNOUNCEMENT) {
            return (process, address.parse().expect("it announces an address"));
        }
    }
    panic!("the embedded server ended before it announced its address (see its message above)");
}

/// In the child: serves until it is killed, or its parent is gone.
pub fn serve_embedded_if_asked() {
    let (Ok(directory), Ok(listen)) = (std::env::var(DIRECTORY), std::env::var(LISTEN)) else { return };
    let listen = listen.parse().expect("the parent gives an address");
    let server = EmbeddedServer::start(Path::new(&directory), listen).expect("the server starts");
    let announced = writeln!(std::io::stdout(), "{ANNOUNCEMENT}{}", server.address());
    announced.expect("the parent listens");
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    server.stop().expect("the server stops");
}

pub struct Etcd {
    directory: TempDir,
    client_port: u16,
    peer_port: u16,
    process: Option<Process>,
}

impl Etcd {
    pub fn start() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let (client_port, peer_port) = (free_port(), free_port());
        let mut etcd = Self { directory, client_port, peer_port, process: None };
        etcd.start_again();
        etcd
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }
}

impl Server for Etcd {
    fn directory(&self) -> &Path {
        self.directory.path()
    }
    fn url(&self) -> String {
        format!("etcd://{}", self.address())
    }
    fn kill(&mut self) {
        self.process = None;
    }
    /// It answers some seconds later; clients wait for that.
    fn start_again(&mut self) {
        let client = format!("http://{}", self.address());
        let peer = format!("http://127.0.0.1:{}", self.peer_port);
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(self.directory.path())
            .args(["--name", "one", "--initial-cluster", &format!("one={peer}")])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--logger", "zap", "--log-level", "error"])
            .stdin(Stdio::null())
            .spawn()
            .expect("these tests need `etcd` on the PATH (Debian package etcd-server; `make setup` installs it)");
        self.process = Some(Process(child));
    }
}

/// Of loopback. Somebody else may take it before we do; the server's message would say so.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    listener.local_addr().expect("it is bound").port()
}
