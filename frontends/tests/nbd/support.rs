//! What the NBD tests share: a server on memory in a thread of its own, and a client that may say anything.

use bytes::{BufMut, BytesMut};
use futures::channel::oneshot;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Command, Output};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use torus_frontends::nbd::memory::{MemoryDevice, MemoryExports};
use torus_frontends::nbd::wire::{Cookie, Request, Style};
use torus_frontends::nbd::{Listener, Offer, serve};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

pub const MIB: u64 = 1 << 20;

pub struct Server {
    pub device: MemoryDevice,
    pub uri: String,
    /// Without an export: for `--list`.
    pub base_uri: String,
    pub address: Option<SocketAddr>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
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
        let device = MemoryDevice::new(size_bytes, false);
        let exports = MemoryExports::default().with("disk", "memory of a test", device.clone()).with(
            "frozen",
            "cannot be written",
            MemoryDevice::new(MIB, true),
        );
        let (uri, base_uri, address) = (listener.uri("disk"), listener.uri(""), listener.tcp_address());
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::spawn(move || {
            let served = torus_rpc::runtime::glommio::run(
                "nbd",
                None,
                serve(listener, exports, offer, async { stopped.await.unwrap_or_default() }),
            );
            served.expect("an executor").expect("the listener is good");
        });
        Self { device, uri, base_uri, address, stop: Some(stop), thread: Some(thread) }
    }

    pub fn begin_stop(&mut self) {
        drop(self.stop.take());
    }

    pub fn join(&mut self) {
        self.begin_stop();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the server does not panic");
        }
    }

    pub fn connect(&self) -> Raw {
        let stream = TcpStream::connect(self.address.expect("a TCP server")).expect("the server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a valid time");
        Raw { stream }
    }

    /// A connection in the transmission phase of `disk`.
    pub fn attached(&self) -> Raw {
        let mut raw = self.negotiating();
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

/// A client that sends any bytes.
pub struct Raw {
    pub stream: TcpStream,
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
            .put(Style::Simple, &mut bytes);
        self.send(&bytes);
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
