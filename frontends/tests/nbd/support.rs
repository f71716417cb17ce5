//! What the NBD tests share: a server on memory in a thread of its own, and a client that may say anything.

use bytes::{BufMut, BytesMut};
use futures::channel::oneshot;
use futures::future::{FutureExt, OptionFuture, join};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use torus_frontends::nbd::memory::{MemoryDevice, MemoryExports};
use torus_frontends::nbd::wire::{Cookie, Request, Style};
use torus_frontends::nbd::{ConnectionCounts, Listener, Offer, Reception, serve};
use torus_frontends::spread::{Handoffs, Place, places};
use torus_rpc::runtime::glommio::{Here, run as run_executor};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

pub const MIB: u64 = 1 << 20;

pub struct Server {
    pub device: MemoryDevice,
    pub uri: String,
    /// Without an export: for `--list`.
    pub base_uri: String,
    pub address: Option<SocketAddr>,
    /// Of each executor.
    pub connections: Vec<Arc<ConnectionCounts>>,
    pub handoffs: Vec<Arc<Handoffs>>,
    stop: Option<oneshot::Sender<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Over so many executors.
    pub fn spread(executors: usize, offer: Offer, size_bytes: u64) -> Self {
        Self::over(&vec![None; executors], offer, size_bytes)
    }

    /// Over an executor on each of these cores.
    pub fn pinned(cores: &[usize], offer: Offer, size_bytes: u64) -> Self {
        Self::over(&cores.iter().copied().map(Some).collect::<Vec<_>>(), offer, size_bytes)
    }

    /// Exports `disk`, writable, of that size, and `frozen`, read-only, of 1 MiB.
    pub fn start(size_bytes: u64) -> Self {
        Self::offering(Offer::default(), size_bytes)
    }

    pub fn offering(offer: Offer, size_bytes: u64) -> Self {
        Self::listening(Listener::tcp("127.0.0.1:0").expect("a free port"), offer, size_bytes)
    }

    pub fn unix(path: &Path, size_bytes: u64) -> Self {
        Self::listening(Listener::unix(path).expect("a new path"), Offer::default(), size_bytes)
    }

    fn listening(listener: Listener, offer: Offer, size_bytes: u64) -> Self {
        let (device, exports) = exports(size_bytes);
        let (mut server, stopped) = Self::prepared(&listener, device);
        server.threads.push(std::thread::spawn(move || {
            let serving = serve(listener, exports, offer, async { stopped.await.unwrap_or_default() });
            run_executor("nbd", None, serving).expect("an executor").expect("the listener is good");
        }));
        server
    }

    fn over(cores: &[Option<usize>], offer: Offer, size_bytes: u64) -> Self {
        let listener = Listener::tcp("127.0.0.1:0").expect("a free port");
        let (device, exports) = exports(size_bytes);
        let (mut server, stopped) = Self::prepared(&listener, device);
        let stopped = stopped.map(|_| ()).boxed().shared();
        let (reception, arrivals) = Reception::new(cores.len());
        let places = places(cores.len());
        server.connections = reception.counts();
        server.handoffs = places.iter().map(Place::handoffs).collect();
        let mut listener = Some(listener);
        for ((place, arrivals), core) in places.into_iter().zip(arrivals).zip(cores.iter().copied()) {
            let (exports, offer, stopped) = (exports.clone(), offer.clone(), stopped.clone());
            let accepting = listener.take().map(|listener| (listener, reception.clone()));
            let part = move || {
                let part = async move {
                    let spread = place.open(exports, Here::new());
                    let accepting = accepting.as_ref().map(|(listener, reception)| {
                        reception.accept(listener, stopped.clone()).expect("the listener is good")
                    });
                    join(OptionFuture::from(accepting), arrivals.serve(spread.clone(), offer, stopped.clone())).await;
                    spread.leave().await;
                };
                run_executor("nbd", core, part).expect("an executor");
            };
            server.threads.push(std::thread::spawn(part));
        }
        server
    }

    fn prepared(listener: &Listener, device: MemoryDevice) -> (Self, oneshot::Receiver<()>) {
        let (uri, base_uri, address) = (listener.uri("disk"), listener.uri(""), listener.tcp_address());
        let (stop, stopped) = oneshot::channel::<()>();
        let (connections, handoffs, threads) = (Vec::new(), Vec::new(), Vec::new());
        (Self { device, uri, base_uri, address, connections, handoffs, stop: Some(stop), threads }, stopped)
    }

    pub fn begin_stop(&mut self) {
        drop(self.stop.take());
    }

    pub fn join(&mut self) {
        self.begin_stop();
        for thread in self.threads.drain(..) {
            thread.join().expect("the server does not panic");
        }
    }

    pub fn connect(&self) -> Raw {
        let stream = TcpStream::connect(self.address.expect("a TCP server")).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a valid time");
        Raw { stream, style: Style::Simple }
    }

    /// A connection in the transmission phase of `disk`.
    pub fn attached(&self) -> Raw {
        let mut raw = self.negotiating();
        raw.go("disk");
        raw
    }

    /// A connection in the transmission phase of `disk`, with these headers, where blocks may be asked for their status.
    pub fn attached_in(&self, style: Style) -> Raw {
        let mut raw = self.negotiating();
        raw.agree(style);
        raw.select("disk", &["base:allocation"]);
        raw.go("disk");
        raw
    }

    /// A connection that may send options.
    pub fn negotiating(&self) -> Raw {
        let mut raw = self.connect();
        assert_eq!(raw.receive(18), b"NBDMAGICIHAVEOPT\0\x03");
        raw.send(&[0, 0, 0, 3]);
        raw
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.device.release();
        if !std::thread::panicking() {
            self.join();
        }
    }
}

/// `disk`, and all that is exported.
fn exports(size_bytes: u64) -> (MemoryDevice, MemoryExports) {
    let device = MemoryDevice::new(size_bytes, false);
    let exports = MemoryExports::default().with("disk", "memory of a test", device.clone()).with(
        "frozen",
        "cannot be written",
        MemoryDevice::new(MIB, true),
    );
    (device, exports)
}

/// A client that sends any bytes.
pub struct Raw {
    pub stream: TcpStream,
    pub style: Style,
}

/// A reply's chunk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub last: bool,
    pub kind: u16,
    pub cookie: u64,
    pub payload: Vec<u8>,
}

impl Chunk {
    /// Of an error: its number, and the message.
    pub fn error(&self) -> (u32, String) {
        assert!(self.last && self.kind & 0x8000 != 0, "{self:?}");
        let length = u16::from_be_bytes([self.payload[4], self.payload[5]]) as usize;
        let text = String::from_utf8(self.payload[6..6 + length].to_vec()).expect("text");
        (number_at(&self.payload, 0), text)
    }
}

fn number_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn long_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

impl Raw {
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server reads");
    }

    pub fn receive(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).expect("the server answers");
        bytes
    }

    /// The server has closed it; what it still sent is given.
    pub fn closed(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "not closed: {error}"),
        }
        rest
    }

    pub fn option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = BytesMut::from(&b"IHAVEOPT"[..]);
        bytes.put_u32(option);
        bytes.put_u32(data.len() as u32);
        bytes.put_slice(data);
        self.send(&bytes);
    }

    /// Type and data of the next reply to an option.
    pub fn option_reply(&mut self) -> (u32, Vec<u8>) {
        let header = self.receive(20);
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(header[..8], 0x0003_e889_0455_65a9_u64.to_be_bytes());
        (number(12), self.receive(number(16) as usize))
    }

    pub fn go(&mut self, name: &str) {
        let mut data = BytesMut::new();
        data.put_u32(name.len() as u32);
        data.put_slice(name.as_bytes());
        data.put_u16(0);
        self.option(7, &data);
        assert_eq!(self.option_reply().0, 3);
        assert_eq!(self.option_reply().0, 1);
    }

    pub fn request(&mut self, command: u16, flags: u16, cookie: u64, offset: u64, length: u32) {
        let mut bytes = BytesMut::new();
        Request { flags, command, cookie: Cookie(cookie), offset, length: u64::from(length) }
            .put(self.style, &mut bytes);
        self.send(&bytes);
    }

    /// Agrees on headers.
    pub fn agree(&mut self, style: Style) {
        let option = match style {
            Style::Simple => return,
            Style::Structured => 8,
            Style::Extended => 11,
        };
        self.option(option, b"");
        assert_eq!(self.option_reply().0, 1);
        self.style = style;
    }

    /// Selects metadata contexts; gives how many were found.
    pub fn select(&mut self, export: &str, queries: &[&str]) -> usize {
        let mut data = BytesMut::new();
        data.put_u32(export.len() as u32);
        data.put_slice(export.as_bytes());
        data.put_u32(queries.len() as u32);
        for query in queries {
            data.put_u32(query.len() as u32);
            data.put_slice(query.as_bytes());
        }
        self.option(10, &data);
        let replies = std::iter::repeat_with(|| self.option_reply().0).take_while(|kind| *kind == 4);
        replies.count()
    }

    /// The next chunk, of a request at `offset`.
    pub fn chunk(&mut self, offset: u64) -> Chunk {
        let extended = self.style == Style::Extended;
        let header = self.receive(if extended { 32 } else { 20 });
        let magic = if extended { 0x6e8a_278c } else { 0x668e_33ef };
        assert_eq!(number_at(&header, 0), magic, "{header:?}");
        let length = if extended {
            assert_eq!(long_at(&header, 16), offset);
            long_at(&header, 24)
        } else {
            u64::from(number_at(&header, 16))
        };
        let payload = self.receive(length as usize);
        let kind = u16::from_be_bytes([header[6], header[7]]);
        Chunk { last: header[5] == 1, kind, cookie: long_at(&header, 8), payload }
    }

    /// Cookie and error of the next reply.
    pub fn reply(&mut self) -> (u64, u32) {
        let header = self.receive(16);
        assert_eq!(header[..4], 0x6744_6698_u32.to_be_bytes());
        let error = u32::from_be_bytes(header[4..8].try_into().expect("four bytes"));
        (u64::from_be_bytes(header[8..].try_into().expect("eight bytes")), error)
    }

    /// Reads one byte: the connection works.
    pub fn works(&mut self) {
        self.request(0, 0, 0xfeed, 0, 1);
        if self.style != Style::Simple {
            let chunk = self.chunk(0);
            assert!(chunk.last && chunk.cookie == 0xfeed && [1, 2].contains(&chunk.kind), "{chunk:?}");
            return;
        }
        assert_eq!(self.reply(), (0xfeed, 0));
        self.receive(1);
    }
}

/// Runs a tool to its good end and gives what it said.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let (good, said) = run_any(program, arguments);
    assert!(good, "{program} {arguments:?} failed:\n{said}");
    said
}

pub fn run_any(program: &str, arguments: &[&str]) -> (bool, String) {
    // The system's tools, with the libraries that were installed with them: nbdsh runs whatever Python comes first.
    let path = format!("/usr/bin:{}", std::env::var("PATH").unwrap_or_default());
    let Output { status, stdout, stderr } =
        Command::new(program).args(arguments).env("PATH", path).output().unwrap_or_else(|error| {
            panic!("{program} cannot be run ({error}); install libnbd-bin, python3-libnbd, qemu-utils, fio")
        });
    let said = [stdout, stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    (status.success(), said)
}

/// Waits for what another thread brings about.
pub fn until(what: &str, mut observed: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !observed() {
        assert!(begun.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::yield_now();
    }
}
