//! One connection: handshake, then a reader that starts a task for every request, and a writer that sends the
//! replies in the order in which they get ready.
//!
//! A request runs to its end whatever becomes of the connection; the device is released when the last one has ended.
//!
//! After the handshake it is known where the export lives. A connection that would have to hand over every request may
//! move there instead (`Outcome::Moves`), with what it has agreed on and received.

use crate::device::{Device, ExportInfo, Exports, VolumeError};
use crate::nbd::execute::{Failures, execute};
use crate::nbd::handshake::{Handshake, Step};
use crate::nbd::outbox::Outbox;
use crate::nbd::receive::{CHUNK_BYTES, SMALL_CHUNK_BYTES};
use crate::nbd::reply::{Gather, Reply};
use crate::nbd::server::Offer;
use crate::nbd::session::{Command, Next, Session, Terms};
use crate::nbd::stream::{Input, Output, StreamError, secure};
use crate::nbd::wire::{Style, Violation};
use bytes::BytesMut;
use futures::future::{Either, select};
use nix::sys::socket::Shutdown;
use std::cell::Cell;
use std::pin::pin;
use std::rc::Rc;
use thiserror::Error;
use torus_schema::limits::NBD_HANDSHAKE_DEADLINE;

/// A client and what is held for it; a glommio stream is exclusive to whoever reads from it, so there are two.
pub(crate) struct Client {
    pub input: Input,
    pub output: Output,
    /// For the log.
    pub peer: String,
    /// The server is stopping: what comes now is refused.
    pub stopping: Rc<Cell<bool>>,
    /// The handshake is over.
    pub transmitting: Rc<Cell<bool>>,
}

/// What a client has agreed on, on its way to the executor where its export lives.
pub(crate) struct Settled {
    pub export: String,
    pub terms: Terms,
    /// And not understood yet.
    pub received: BytesMut,
}

/// What becomes of a connection.
pub(crate) enum Outcome {
    Over(End),
    Moves { home: usize, settled: Settled },
}

/// Why a connection is over.
#[derive(Debug, Error)]
pub(crate) enum End {
    #[error("the client disconnected as the protocol has it")]
    Disconnected,
    #[error("the client sent what is not NBD: {0}")]
    Violation(#[from] Violation),
    #[error("the handshake took longer than {} s", NBD_HANDSHAKE_DEADLINE.as_secs())]
    Slow,
    #[error("the volume is no longer served here: {0}")]
    Ended(String),
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl Client {
    /// `may_move`: to that executor.
    pub async fn serve<E: Exports>(mut self, exports: E, offer: &Offer, may_move: impl Fn(usize) -> bool) -> Outcome {
        let negotiated = {
            let negotiate = pin!(self.negotiate(&exports, offer));
            let deadline = pin!(glommio::timer::sleep(NBD_HANDSHAKE_DEADLINE));
            match select(negotiate, deadline).await {
                Either::Left((negotiated, _)) => negotiated,
                Either::Right(_) => Err(End::Slow),
            }
        };
        match negotiated {
            Ok((device, export, terms)) => match device.home() {
                Some(home) if !self.input.is_encrypted() && may_move(home) => {
                    let received = std::mem::take(self.input.filled());
                    Outcome::Moves { home, settled: Settled { export, terms, received } }
                }
                _ => {
                    self.transmitting.set(true);
                    Outcome::Over(self.transmit(device, terms).await)
                }
            },
            Err(end) => {
                if matches!(end, End::Disconnected)
                    && let Err(error) = self.output.finish().await
                {
                    tracing::debug!(peer = %self.peer, %error, "not closed in order");
                }
                Outcome::Over(end)
            }
        }
    }

    /// From where another executor's `serve` left it.
    pub async fn go_on<E: Exports>(self, exports: E, export: &str, terms: Terms) -> End {
        self.transmitting.set(true);
        match exports.attach(export).await {
            Ok(device) => self.transmit(device, terms).await,
            Err(error) => End::Ended(error.to_string()),
        }
    }

    async fn negotiate<E: Exports>(&mut self, exports: &E, offer: &Offer) -> Result<(E::Device, String, Terms), End> {
        let mut out = BytesMut::new();
        let mut handshake = Handshake::start(offer.tls.mode(), &mut out);
        let mut device = None;
        loop {
            if self.stopping.get() {
                handshake.stop();
            }
            match handshake.next(self.input.filled(), &mut out)? {
                Step::Receive(wanted) => {
                    self.output.write(&out.split()).await?;
                    self.input.receive(wanted, SMALL_CHUNK_BYTES).await?;
                }
                Step::List => {
                    handshake.listed(exports.list().await, &mut out)?;
                    self.output.write(&out.split()).await?;
                }
                Step::Describe { name } => {
                    let described = exports.describe(offer.meant(&name)).await;
                    handshake.described(described.map(|info| offer.offered(info)), &mut out)?;
                }
                Step::Attach { name } => {
                    let attached = self.attach(exports, offer, &name).await;
                    let info = attached.map(|(info, attached)| {
                        device = Some((attached, info.clone()));
                        info
                    });
                    handshake.attached(info, &mut out)?;
                }
                Step::StartTls => {
                    self.output.write(&out.split()).await?;
                    let tls = offer.tls.begin().map_err(StreamError::from)?;
                    secure(&mut self.input, &mut self.output, tls).await?;
                    handshake.secured(&mut out)?;
                }
                Step::Transmission { style, allocation } => {
                    self.output.write(&out.split()).await?;
                    let (device, info) = device.expect("transmission is entered by attaching");
                    let ExportInfo { name, size_bytes, read_only, .. } = info;
                    return Ok((device, name, Terms { size_bytes, read_only, style, allocation }));
                }
                Step::End => {
                    self.output.write(&out.split()).await?;
                    return Err(End::Disconnected);
                }
            }
        }
    }

    /// The export, and how it is offered.
    async fn attach<E: Exports>(
        &self,
        exports: &E,
        offer: &Offer,
        name: &str,
    ) -> Result<(ExportInfo, E::Device), VolumeError> {
        match attach(exports, offer.meant(name)).await {
            Ok((info, device)) => {
                tracing::info!(peer = %self.peer, export = %info.name, "attached");
                Ok((offer.offered(info), device))
            }
            Err(error) => {
                tracing::info!(peer = %self.peer, export = %name, %error, "not attached");
                Err(error)
            }
        }
    }

    async fn transmit<D: Device>(self, device: D, terms: Terms) -> End {
        let outbox = Rc::new(Outbox::default());
        let writer = glommio::spawn_local(write_replies(self.output, terms.style, outbox.clone()));
        let session = Session::new(terms);
        let failures = Rc::new(Failures::new(self.peer));
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
            Err(error) => End::Stream(error),
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
        self.session.grown(self.device.size_bytes());
        match self.session.next_command(self.input.filled())? {
            Next::Receive(wanted) => {
                // Memory for a large payload is taken only when there is room for it.
                if wanted > CHUNK_BYTES {
                    self.outbox.room(wanted as u64).await;
                }
                Ok(self.input.receive(wanted, CHUNK_BYTES).await?)
            }
            Next::Disconnect => Err(End::Disconnected),
            Next::Command(command) => {
                self.begin(command).await;
                Ok(())
            }
        }
    }

    async fn begin(&self, command: Command) {
        let payload_bytes = command.action.payload_bytes();
        self.outbox.room(payload_bytes).await;
        self.outbox.begin(payload_bytes);
        let (device, outbox, failures) = (self.device.clone(), self.outbox.clone(), self.failures.clone());
        glommio::spawn_local(async move {
            let (cookie, offset) = (command.cookie, command.offset);
            let result = execute(&device, command, &failures).await;
            // Before the reply can be sent: who has seen the last reply may count on the device's release.
            drop(device);
            outbox.push(Reply { cookie, offset, result, payload_bytes });
        })
        .detach();
    }
}

/// Sends replies until there will be no more. When the socket fails, the reader is stopped and the rest is dropped.
async fn write_replies(mut output: Output, style: Style, outbox: Rc<Outbox>) -> Result<(), StreamError> {
    let mut gather = Gather::new(style);
    let mut result = Ok(());
    let mut replies = Vec::new();
    while outbox.take(&mut replies).await {
        let requests = replies.len();
        let payload_bytes = replies.iter().map(|reply: &Reply| reply.payload_bytes).sum();
        if result.is_ok() {
            replies.drain(..).for_each(|reply| gather.put(reply));
            result = output.send(&mut gather).await;
            if result.is_err() {
                output.shut(Shutdown::Both);
            }
        }
        replies.clear();
        outbox.release(requests, payload_bytes);
    }
    match result {
        Ok(()) => output.finish().await,
        failed => failed,
    }
}
