//! The NBD servers that are compared, each over a unix socket and TCP: those of others on one written file, since only one
//! is at work at a time; ours on a node's two volumes, one served by the node itself and one by `torusblk serve`; and all of
//! them with nothing behind.

use crate::error::Result;
use crate::fio::{self, Target};
use crate::options::NbdOptions;
use crate::processes::Watched;
use crate::stand::{NODE_SIZE, REGION_BYTES, create_volume, written_file};
use serde::Serialize;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use tempfile::TempDir;
use torus_tests::cluster::{Cluster, ClusterOptions, NbdServer};
use torus_tests::store::free_address;
use torus_tests::{Process, process, wait};

/// So often our volumes are written before anything is measured: as in `crate::stand`.
const PASSES: u32 = 3;
/// Served by the node, and by torusblk.
const INSIDE: &str = "inside";
const BESIDE: &str = "beside";

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Transport {
    /// No server at all.
    None,
    Unix,
    Tcp,
}

impl Transport {
    /// Behind a server's name.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Unix => ", unix",
            Self::Tcp => ", TCP",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// What the disk gives.
    Raw,
    /// Others, and ours, with a disk behind it.
    Peer,
    Ours,
    /// With nothing behind it.
    PeerNull,
    OurNull,
}

pub struct Served {
    pub name: &'static str,
    pub transport: Transport,
    pub kind: Kind,
    pub target: Target,
    pub processes: Vec<Watched>,
}

/// Keeps all servers running.
pub struct Stand {
    pub served: Vec<Served>,
    others: Vec<Process>,
    ours: Option<(Cluster, NbdServer)>,
    spin: String,
    folder: TempDir,
}

impl Stand {
    pub fn build(options: &NbdOptions, say: &dyn Fn(&str)) -> Result<Self> {
        let folder = process::temporary_dir("bench-nbd");
        let spin = options.spin.to_string();
        let mut stand = Self { served: Vec::new(), others: Vec::new(), ours: None, spin, folder };
        let mut file = None;
        if !options.null {
            say("writing the file");
            let path = written_file(stand.folder.path(), "file")?;
            let (name, transport, target) = ("raw file", Transport::None, Target::File(path.clone()));
            stand.served.push(Served { name, transport, kind: Kind::Raw, target, processes: vec![] });
            file = Some(path);
        }
        let transports = [Transport::Unix, Transport::Tcp];
        for transport in transports.into_iter().take(if options.unix { 1 } else { 2 }) {
            stand.add_nulls(transport, say)?;
            if let Some(file) = &file {
                stand.add_files(transport, file, say)?;
            }
        }
        if !options.null {
            stand.add_ours(say)?;
        }
        stand.served.retain(|served| !(options.unix && served.transport == Transport::Tcp));
        // Those of one transport beside each other.
        stand.served.sort_by_key(|served| (served.transport as u8, served.kind as u8));
        Ok(stand)
    }

    /// `result`; where it is an error, with what our processes said last, which is gone when the stand is.
    pub fn explain<T>(&mut self, result: Result<T>) -> Result<T> {
        if result.is_err()
            && let Some((cluster, server)) = &mut self.ours
        {
            eprintln!("the node said:\n{}\ntorusblk said:\n{}", cluster.node(0).log(), server.process.log());
        }
        result
    }

    fn add_nulls(&mut self, transport: Transport, say: &dyn Fn(&str)) -> Result<()> {
        let bytes = REGION_BYTES.to_string();
        let null = format!("driver=null-co,read-zeroes=on,size={bytes}");
        self.add_other("qemu-nbd, null-co", transport, Kind::PeerNull, say, &|place: &Place| {
            let mut command = Command::new("qemu-nbd");
            command.args(["--persistent", "--shared=0", "--image-opts", &null]).args(place.qemu());
            command
        })?;
        self.add_other("nbdkit null", transport, Kind::PeerNull, say, &|place: &Place| {
            let mut command = Command::new("nbdkit");
            command.args(["--foreground", "--exit-with-parent"]).args(place.nbdkit()).args(["null", &bytes]);
            command
        })?;
        let spin = self.spin.clone();
        self.add_other("torus, null", transport, Kind::OurNull, say, &|place: &Place| {
            let mut command = process::program("torus-bench");
            command.args(["null-server", &place.ours(), &bytes, "--spin", &spin]);
            command
        })
    }

    fn add_files(&mut self, transport: Transport, file: &Path, say: &dyn Fn(&str)) -> Result<()> {
        let file = file.display();
        // Unlocked: there is one for each transport.
        let image = format!(
            "driver=raw,cache.direct=on,file.driver=file,file.filename={file},file.locking=off,file.aio=io_uring,\
             file.cache.direct=on"
        );
        self.add_other("qemu-nbd, file", transport, Kind::Peer, say, &|place: &Place| {
            let mut command = Command::new("qemu-nbd");
            command.args(["--persistent", "--shared=0", "--image-opts", &image]).args(place.qemu());
            command
        })?;
        let file = format!("file={file}");
        self.add_other("nbdkit file", transport, Kind::Peer, say, &|place: &Place| {
            let mut command = Command::new("nbdkit");
            command.args(["--foreground", "--exit-with-parent"]).args(place.nbdkit());
            command.args(["file", &file, "cache=none"]);
            command
        })
    }

    /// Left out, and said so, where it is not installed: it is a peer, not a part.
    fn add_other(
        &mut self,
        name: &'static str,
        transport: Transport,
        kind: Kind,
        say: &dyn Fn(&str),
        command: &dyn Fn(&Place) -> Command,
    ) -> Result<()> {
        let place = Place::new(transport, self.folder.path(), self.others.len());
        let mut command = command(&place);
        let program = command.get_program().to_owned();
        if Command::new(&program).arg("--version").stdout(Stdio::null()).status().is_err() {
            say(&format!("{} is not installed: measuring without it", program.display()));
            return Ok(());
        }
        let mut process = Process::spawn(name, &mut command, self.folder.path());
        wait::until(name, || {
            assert!(process.is_running(), "{name} ended:\n{}", process.log());
            place.answers().then_some(())
        });
        let processes = vec![Watched::new(name, process.pid())];
        self.others.push(process);
        self.served.push(Served { name, transport, kind, target: place.target(""), processes });
        Ok(())
    }

    fn add_ours(&mut self, say: &dyn Fn(&str)) -> Result<()> {
        say("starting torus-engine --nbd, and torusblk serve beside it");
        let folder = self.folder.path();
        let inside = [Place::new(Transport::Unix, folder, 1000), Place::new(Transport::Tcp, folder, 1001)];
        let [unix, tcp] = &inside;
        let arguments =
            ["--nbd", &unix.ours(), "--nbd", &tcp.ours(), "--export", INSIDE, "--spin", &self.spin].map(str::to_string);
        let options = ClusterOptions { size: NODE_SIZE, ..ClusterOptions::new("bench-nbd-node", 1) };
        let mut cluster = Cluster::start(ClusterOptions { node_arguments: arguments.to_vec(), ..options });
        for volume in [INSIDE, BESIDE] {
            create_volume(&cluster, volume, 1);
        }
        cluster.node(0).await_line("attached volume");
        let unix = Place::new(Transport::Unix, folder, 1002);
        let server = cluster.serve_with(&["--listen", &unix.ours(), "--volume", BESIDE, "--spin", &self.spin]);
        let beside = [unix, Place { transport: Transport::Tcp, socket: String::new(), address: server.address }];
        let node = Watched::new("engine", cluster.node(0).pid());
        let torusblk = Watched::new("torusblk", server.process.pid());
        self.add_volume("torus-engine --nbd", INSIDE, &inside, std::slice::from_ref(&node), say)?;
        self.add_volume("torusblk and a node", BESIDE, &beside, &[node, torusblk], say)?;
        self.ours = Some((cluster, server));
        Ok(())
    }

    fn add_volume(
        &mut self,
        name: &'static str,
        volume: &str,
        places: &[Place],
        processes: &[Watched],
        say: &dyn Fn(&str),
    ) -> Result<()> {
        say(&format!("writing the region of {name}"));
        fio::fill(&places[0].target(volume), REGION_BYTES, PASSES)?;
        for place in places {
            let (transport, target, processes) = (place.transport, place.target(volume), processes.to_vec());
            self.served.push(Served { name, transport, kind: Kind::Ours, target, processes });
        }
        Ok(())
    }
}

/// Where a server listens.
struct Place {
    transport: Transport,
    socket: String,
    address: SocketAddr,
}

impl Place {
    fn new(transport: Transport, folder: &Path, number: usize) -> Self {
        let socket = folder.join(format!("{number}.sock")).display().to_string();
        Self { transport, socket, address: free_address() }
    }

    fn target(&self, export: &str) -> Target {
        match self.transport {
            Transport::Unix => Target::unix(Path::new(&self.socket), export),
            _ => Target::Nbd(format!("nbd://{}/{export}", self.address)),
        }
    }

    fn answers(&self) -> bool {
        match self.transport {
            Transport::Unix => Path::new(&self.socket).exists(),
            _ => std::net::TcpStream::connect(self.address).is_ok(),
        }
    }

    fn qemu(&self) -> Vec<String> {
        match self.transport {
            Transport::Unix => vec![format!("--socket={}", self.socket)],
            _ => vec![format!("--bind={}", self.address.ip()), format!("--port={}", self.address.port())],
        }
    }

    fn nbdkit(&self) -> Vec<String> {
        match self.transport {
            Transport::Unix => vec!["--unix".to_string(), self.socket.clone()],
            _ => vec![format!("--ipaddr={}", self.address.ip()), format!("--port={}", self.address.port())],
        }
    }

    fn ours(&self) -> String {
        match self.transport {
            Transport::Unix => format!("unix:{}", self.socket),
            _ => self.address.to_string(),
        }
    }
}
