//! The thread that talks to the kernel, and may block there for as long as the device's requests take: those are
//! answered by the executor, which must not wait for the kernel in turn.

use super::control::Control;
use super::handshake::{Negotiated, negotiate};
use super::memo::{self, Memo};
use super::wire::Connect;
use super::{KernelError, backend_of, io, sysfs};
use crate::nbd::wire::{
    EXPORT_CAN_MULTI_CONN, EXPORT_HAS_FLAGS, EXPORT_READ_ONLY, EXPORT_SEND_FLUSH, EXPORT_SEND_FUA, EXPORT_SEND_TRIM,
    EXPORT_SEND_WRITE_ZEROES,
};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;
use torus_schema::ids::{Epoch, VolumeId};

/// How often it is looked whether the device is still there, or its users still are.
pub const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// With one socket and no timeout the kernel never takes a socket for dead while we live, however long we wait for
/// replicas. With several, or with a timeout, it would at some time, and send the requests again on another while the
/// first may yet be carried out, behind a later write of the same block.
const NO_TIMEOUT: u64 = 0;
/// How often it looks at each request instead. Only then does it notice that the socket it was sent on is not the present
/// one, and sends it again.
const LOOK_AT_REQUESTS: Duration = Duration::from_secs(5);
/// What the kernel's client makes use of; the rest is for clients that negotiate.
const FLAGS: u16 = EXPORT_HAS_FLAGS
    | EXPORT_READ_ONLY
    | EXPORT_SEND_FLUSH
    | EXPORT_SEND_FUA
    | EXPORT_SEND_TRIM
    | EXPORT_SEND_WRITE_ZEROES
    | EXPORT_CAN_MULTI_CONN;

/// What the thread hears of.
pub enum Event {
    /// A signal.
    Stop,
    /// The volume is no longer ours.
    Ended(String),
    /// Nobody else uses the device, and what was written to it is on disk, or not.
    Flushed(File, std::io::Result<()>),
    Resized(u64),
}

/// The device as it was asked for.
pub struct Order {
    pub volume: VolumeId,
    pub name: String,
    pub epoch: Epoch,
    /// `None`: the first free one.
    pub index: Option<u32>,
    pub block_bytes: u64,
    pub read_only: bool,
    pub reconnect_s: u64,
}

/// A device that a predecessor left behind.
pub struct Former {
    pub index: u32,
    pub memo: Option<Memo>,
    /// Or why it has to fail.
    pub keeps_all: Result<(), String>,
}

pub struct Kernel {
    control: Control,
    order: Order,
    former: Option<Former>,
    socket: PathBuf,
}

impl Kernel {
    pub fn new(control: Control, order: Order, former: Option<Former>) -> Result<Self, KernelError> {
        let socket = memo::folder()?.join(format!("nbd-{}.sock", std::process::id()));
        Ok(Self { control, order, former, socket })
    }

    /// Where the server has to listen.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Until the device is detached. `flushed` is where a flush that has ended is told.
    pub fn drive(mut self, heard: &Receiver<Event>, flushed: &Sender<Event>) -> Result<(), KernelError> {
        let index = match self.former.take() {
            Some(former) => self.serve_on(former)?,
            None => self.attach()?,
        };
        let device = sysfs::device_path(index);
        tracing::info!(volume = %self.order.name, device = %device.display(), epoch = %self.order.epoch, "attached");
        let mut stdout = std::io::stdout();
        writeln!(stdout, "attached {}", device.display()).and_then(|()| stdout.flush()).map_err(io("stdout"))?;
        let ended = self.wait(index, heard, flushed);
        memo::remove(index);
        ended
    }

    fn negotiate(&self) -> Result<Negotiated, KernelError> {
        negotiate(&self.socket, &self.order.name).map_err(io("connecting the kernel to this process"))
    }

    fn attach(&mut self) -> Result<u32, KernelError> {
        let connection = self.negotiate()?;
        let (size_bytes, flags) = (connection.size_bytes, connection.flags & FLAGS);
        let writes = EXPORT_SEND_TRIM | EXPORT_SEND_WRITE_ZEROES;
        let flags = if self.order.read_only { (flags & !writes) | EXPORT_READ_ONLY } else { flags };
        let index = self.control.connect(Connect {
            index: self.order.index,
            size_bytes,
            block_bytes: self.order.block_bytes,
            timeout_s: NO_TIMEOUT,
            dead_connection_timeout_s: self.order.reconnect_s,
            server_flags: u64::from(flags),
            sockets: vec![connection.socket.as_raw_fd()],
            backend: backend_of(self.order.volume),
        })?;
        if let Err(error) = sysfs::look_at_requests_every(index, LOOK_AT_REQUESTS) {
            tracing::debug!(%error, "requests under way when this process dies wait up to 30 s for the next");
        }
        self.note().write(index)?;
        Ok(index)
    }

    fn note(&self) -> Memo {
        let Order { volume, name, epoch, .. } = &self.order;
        Memo { volume: *volume, name: name.clone(), epoch: *epoch, pid: std::process::id() }
    }

    fn serve_on(&mut self, former: Former) -> Result<u32, KernelError> {
        let index = former.index;
        if let Err(because) = former.keeps_all {
            return Err(self.fail(index, because));
        }
        self.note().write(index)?;
        let connection = self.negotiate()?;
        let size_bytes = connection.size_bytes;
        let resized = (sysfs::size_bytes(index) != Some(size_bytes)).then_some(size_bytes);
        let backend = backend_of(self.order.volume);
        self.control.reconfigure(index, &backend, vec![connection.socket.as_raw_fd()], resized)?;
        Ok(index)
    }

    /// Its users see I/O errors from now on.
    fn fail(&mut self, index: u32, because: String) -> KernelError {
        let device = sysfs::device_path(index);
        memo::remove(index);
        match self.control.disconnect(index) {
            Ok(()) => KernelError::Failed { device, because },
            Err(error) => error,
        }
    }

    fn wait(&mut self, index: u32, heard: &Receiver<Event>, flushed: &Sender<Event>) -> Result<(), KernelError> {
        let mut signals = 0;
        let mut flushing = false;
        loop {
            match heard.recv_timeout(LOOK_AGAIN) {
                Ok(Event::Stop) => {
                    signals += 1;
                    if signals > 1 {
                        tracing::warn!(device = index, "detached without a flush, by a second signal");
                        return self.control.disconnect(index);
                    }
                }
                Ok(Event::Ended(because)) => return Err(self.fail(index, because)),
                Ok(Event::Flushed(alone, Ok(()))) => {
                    let detached = self.control.disconnect(index);
                    drop(alone);
                    return detached;
                }
                Ok(Event::Flushed(alone, Err(because))) => {
                    drop(alone);
                    self.control.disconnect(index)?;
                    let device = sysfs::device_path(index).display().to_string();
                    return Err(KernelError::Refused { what: "flush", device, because });
                }
                Ok(Event::Resized(size_bytes)) => self.resize(index, size_bytes),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("we hold a sender ourselves"),
            }
            if sysfs::backend(index).as_deref() != Some(&*backend_of(self.order.volume)) || !sysfs::is_attached(index) {
                tracing::info!(device = index, "detached by somebody else");
                return Ok(());
            }
            if signals > 0 && !flushing {
                flushing = flush_if_unused(index, flushed)?;
            }
        }
    }

    fn resize(&mut self, index: u32, size_bytes: u64) {
        match self.control.reconfigure(index, &backend_of(self.order.volume), vec![], Some(size_bytes)) {
            Ok(()) => tracing::info!(device = index, size_bytes, "the device has a new size"),
            Err(error) => tracing::warn!(device = index, size_bytes, %error, "the device keeps its old size"),
        }
    }
}

/// Whether it was begun. In a thread of its own: it may wait for replicas, and a second signal does not.
fn flush_if_unused(index: u32, flushed: &Sender<Event>) -> Result<bool, KernelError> {
    let alone = match sysfs::open_alone(index) {
        Ok(alone) => alone,
        Err(KernelError::InUse { device }) => {
            let device = device.display();
            tracing::warn!(%device, "in use (mounted?); detached once it is not, or by a second signal");
            return Ok(false);
        }
        Err(error) => return Err(error),
    };
    let flushed = flushed.clone();
    let flush = move || {
        let synced = alone.sync_all();
        let _ = flushed.send(Event::Flushed(alone, synced));
    };
    std::thread::Builder::new().name("flush".to_string()).spawn(flush).map_err(io("a thread"))?;
    Ok(true)
}
