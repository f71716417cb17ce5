//! One connection: handshake, then a reader that starts a task for every request, and a writer that sends the
//! replies in the order in which they get ready.
//!
//! A request runs to its end whatever becomes of the connection; the device is released when the last one has ended.

use crate::device::{Device, ExportInfo, Exports, Piece, VolumeError};
use crate::nbd::handshake::{Handshake, Step};
use crate::nbd::outbox::Outbox;
use crate::nbd::receive::{CHUNK_BYTES, Receive, SMALL_CHUNK_BYTES, released};
use crate::nbd::reply::{Gather, Reply};
use crate::nbd::session::{Command, Next, Session, errno};
use crate::nbd::wire::{Cookie, Errno, Violation};
use bytes::BytesMut;
use futures::future::{Either, select};
use futures::{AsyncReadExt, AsyncWriteExt};
use glommio::net::TcpStream;
use nix::errno::Errno as SystemErrno;
use nix::sys::socket::{MsgFlags, Shutdown, sendmsg, shutdown};
use std::cell::Cell;
use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::pin::pin;
use std::rc::Rc;
use thiserror::Error;
use torus_rpc::runtime::glommio::stay_awake;
use torus_schema::limits::NBD_HANDSHAKE_DEADLINE;

/// Entries of one send; the kernel takes 1024, and a socket's buffer is full well before.
const SEND_SEGMENTS_MAX: usize = 64;

/// Both directions of a socket; a glommio stream is exclusive to whoever reads from it, so there are two.
pub(crate) struct Client {
    pub input: Input,
    pub writer: TcpStream,
    /// For the log.
    pub peer: String,
    /// The server is stopping: what comes now is refused.
    pub stopping: Rc<Cell<bool>>,
}

/// The receiving direction, and what was received but not understood yet.
pub(crate) struct Input {
    stream: TcpStream,
    bytes: Receive,
}

impl Input {
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, bytes: Receive::default() }
    }

    async fn receive(&mut self, wanted: usize, chunk_bytes: usize) -> Result<(), End> {
        match self.stream.read(self.bytes.spare(wanted, chunk_bytes)).await? {
            0 => Err(End::Closed),
            count => {
                stay_awake();
                self.bytes.received(count);
                Ok(())
            }
        }
    }
}

/// Why a connection is over.
#[derive(Debug, Error)]
pub(crate) enum End {
    #[error("the client closed it")]
    Closed,
    #[error("the client disconnected as the protocol has it")]
    Disconnected,
    #[error("the client sent what is not NBD: {0}")]
    Violation(#[from] Violation),
    #[error("the handshake took longer than {} s", NBD_HANDSHAKE_DEADLINE.as_secs())]
    Slow,
    #[error("the volume is no longer served here: {0}")]
    Ended(String),
    #[error("the socket failed: {0}")]
    Socket(#[from] io::Error),
}

impl Client {
    pub async fn serve<E: Exports>(mut self, exports: E) -> End {
        let negotiated = {
            let negotiate = pin!(self.negotiate(&exports));
            let deadline = pin!(glommio::timer::sleep(NBD_HANDSHAKE_DEADLINE));
            match select(negotiate, deadline).await {
                Either::Left((negotiated, _)) => negotiated,
                Either::Right(_) => Err(End::Slow),
            }
        };
        match negotiated {
            Ok(device) => self.transmit(device).await,
            Err(end) => end,
        }
    }

    async fn negotiate<E: Exports>(&mut self, exports: &E) -> Result<E::Device, End> {
        let mut out = BytesMut::new();
        let mut handshake = Handshake::start(&mut out);
        let mut device = None;
        loop {
            if self.stopping.get() {
                handshake.stop();
            }
            match handshake.next(&mut self.input.bytes.filled, &mut out)? {
                Step::Receive(wanted) => {
                    self.writer.write_all(&out.split()).await?;
                    self.input.receive(wanted, SMALL_CHUNK_BYTES).await?;
                }
                Step::List => {
                    handshake.listed(exports.list().await, &mut out)?;
                    self.writer.write_all(&out.split()).await?;
                }
                Step::Describe { name } => handshake.described(exports.describe(&name).await, &mut out)?,
                Step::Attach { name } => match attach(exports, &name).await {
                    Ok((info, attached)) => {
                        tracing::info!(peer = %self.peer, export = %name, "attached");
                        device = Some(attached);
                        handshake.attached(Ok(info), &mut out)?;
                    }
                    Err(error) => {
                        tracing::info!(peer = %self.peer, export = %name, %error, "not attached");
                        handshake.attached(Err(error), &mut out)?;
                    }
                },
                Step::Transmission => {
                    self.writer.write_all(&out.split()).await?;
                    return Ok(device.expect("transmission is entered by attaching"));
                }
                Step::End => {
                    self.writer.write_all(&out.split()).await?;
                    return Err(End::Disconnected);
                }
            }
        }
    }

    async fn transmit<D: Device>(self, device: D) -> End {
        let outbox = Rc::new(Outbox::default());
        let writer = glommio::spawn_local(write_replies(self.writer, outbox.clone()));
        let session = Session::new(device.size_bytes(), device.read_only());
        let failures = Rc::new(Failures { peer: self.peer, count: Cell::new(0) });
        let mut requests =
            Requests { input: self.input, session, device, outbox: outbox.clone(), failures, stopping: self.stopping };
        let end = {
            let device = requests.device.clone();
            // Answered with errors are what is under way and what comes before this is noticed; then the connection
            // ends, so that its client does not take a device for alive that answers nothing but errors.
            match select(pin!(requests.run()), pin!(device.ended())).await {
                Either::Left((end, _)) => end,
                Either::Right((because, _)) => End::Ended(because),
            }
        };
        // What follows the client's last good word is not looked at; the replies it waits for are still sent.
        drop(requests);
        outbox.finish();
        match writer.await {
            Ok(()) => end,
            Err(error) => End::Socket(error),
        }
    }
}

/// An export attached, as it then is.
async fn attach<E: Exports>(exports: &E, name: &str) -> Result<(ExportInfo, E::Device), VolumeError> {
    let described = exports.describe(name).await?;
    let device = exports.attach(name).await?;
    let info = ExportInfo { size_bytes: device.size_bytes(), read_only: device.read_only(), ..described };
    Ok((info, device))
}

/// The reader of the transmission phase.
struct Requests<D> {
    input: Input,
    session: Session,
    device: D,
    outbox: Rc<Outbox>,
    failures: Rc<Failures>,
    stopping: Rc<Cell<bool>>,
}

impl<D: Device> Requests<D> {
    async fn run(&mut self) -> End {
        loop {
            if let Err(end) = self.step().await {
                return end;
            }
        }
    }

    async fn step(&mut self) -> Result<(), End> {
        if self.stopping.get() {
            self.session.stop();
        }
        match self.session.next_command(&mut self.input.bytes.filled)? {
            Next::Receive(wanted) => {
                // Memory for a large payload is taken only when there is room for it.
                if wanted > CHUNK_BYTES {
                    self.outbox.room(wanted as u64).await;
                }
                self.input.receive(wanted, CHUNK_BYTES).await
            }
            Next::Command(Command::Disconnect) => Err(End::Disconnected),
            Next::Command(command) => {
                self.begin(command).await;
                Ok(())
            }
        }
    }

    async fn begin(&self, command: Command) {
        let payload_bytes = command.payload_bytes();
        self.outbox.room(payload_bytes).await;
        self.outbox.begin(payload_bytes);
        let (device, outbox, failures) = (self.device.clone(), self.outbox.clone(), self.failures.clone());
        glommio::spawn_local(async move {
            let (cookie, result) = carry_out(&device, command, &failures).await;
            // Before the reply can be sent: who has seen the last reply may count on the device's release.
            drop(device);
            outbox.push(Reply { cookie, result, payload_bytes });
        })
        .detach();
    }
}

async fn carry_out<D: Device>(
    device: &D,
    command: Command,
    failures: &Failures,
) -> (Cookie, Result<Vec<Piece>, Errno>) {
    let failed = |cookie, request: &str, writes, error: VolumeError| {
        failures.log(request, &error);
        (cookie, Err(errno(&error, writes)))
    };
    match command {
        Command::Read { cookie, offset, length } => match device.read(offset, length).await {
            Ok(pieces) if bytes_of(&pieces) == length => (cookie, Ok(pieces)),
            Ok(pieces) => {
                // One byte more or less and the client would take data for the next reply.
                tracing::error!(offset, length, read = bytes_of(&pieces), "the device read another length; a bug");
                (cookie, Err(Errno::InputOutput))
            }
            Err(error) => failed(cookie, "read", false, error),
        },
        Command::Write { cookie, offset, data, durable } => match device.write(offset, released(data), durable).await {
            Ok(()) => (cookie, Ok(Vec::new())),
            Err(error) => failed(cookie, "write", true, error),
        },
        Command::Clear { cookie, offset, length, durable, advisory } => {
            match device.clear(offset, length, durable, advisory).await {
                Ok(()) => (cookie, Ok(Vec::new())),
                Err(error) => failed(cookie, if advisory { "trim" } else { "write zeroes" }, !advisory, error),
            }
        }
        Command::Flush { cookie } => match device.flush().await {
            Ok(()) => (cookie, Ok(Vec::new())),
            Err(error) => failed(cookie, "flush", false, error),
        },
        Command::Answer { cookie, error } => (cookie, error.map_or(Ok(Vec::new()), Err)),
        Command::Disconnect => unreachable!("the reader ends with it"),
    }
}

fn bytes_of(pieces: &[Piece]) -> u64 {
    pieces
        .iter()
        .map(|piece| match piece {
            Piece::Data(data) => data.len() as u64,
            Piece::Zeros(count) => *count,
        })
        .sum()
}

/// A device that fails fails thousands of requests: the 1st, 2nd, 4th, 8th … is logged.
struct Failures {
    peer: String,
    count: Cell<u64>,
}

impl Failures {
    fn log(&self, request: &str, error: &VolumeError) {
        let count = self.count.get() + 1;
        self.count.set(count);
        if count.is_power_of_two() {
            tracing::warn!(peer = %self.peer, request, %error, count, "a request failed");
        }
    }
}

/// Sends replies until there will be no more. When the socket fails, the reader is stopped and the rest is dropped.
async fn write_replies(mut stream: TcpStream, outbox: Rc<Outbox>) -> io::Result<()> {
    let mut gather = Gather::default();
    let mut result = Ok(());
    while let Some(replies) = outbox.take().await {
        let requests = replies.len();
        let payload_bytes = replies.iter().map(|reply| reply.payload_bytes).sum();
        if result.is_ok() {
            replies.into_iter().for_each(|reply| gather.put(reply));
            result = send(&mut stream, &mut gather).await;
            if result.is_err() {
                close_socket(&stream, Shutdown::Both);
            }
        }
        outbox.release(requests, payload_bytes);
    }
    close_socket(&stream, Shutdown::Write);
    result
}

fn close_socket(stream: &TcpStream, how: Shutdown) {
    if let Err(error) = shutdown(stream.as_raw_fd(), how) {
        tracing::debug!(%error, "the connection was gone already");
    }
}

/// glommio has no gathering send: ours is tried first, its own waits when the socket's buffer is full.
async fn send(stream: &mut TcpStream, gather: &mut Gather) -> io::Result<()> {
    while !gather.is_empty() {
        let segments = gather.segments();
        let slices: Vec<IoSlice<'_>> =
            segments.iter().take(SEND_SEGMENTS_MAX).map(|segment| IoSlice::new(segment)).collect();
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let sent = match sendmsg::<()>(stream.as_raw_fd(), &slices, &[], flags, None) {
            Ok(sent) => sent,
            Err(SystemErrno::EINTR) => 0,
            Err(SystemErrno::EAGAIN) => stream.write(&slices[0]).await?,
            Err(error) => return Err(error.into()),
        };
        gather.sent(sent);
    }
    Ok(())
}
