//! Accepts connections, counts them, and stops them in order: what is in flight is answered, what still comes is
//! refused, who does not take their replies is cut off.

use crate::device::{ExportInfo, Exports};
use crate::nbd::connection::{Client, End};
use crate::nbd::listener::Listener;
use crate::nbd::stream::{Input, Output, StreamError};
use crate::nbd::tls::TlsOffer;
use futures::future::{Either, select};
use glommio::net::{TcpListener, TcpStream};
use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;
use torus_schema::limits::{NBD_CONNECTIONS_MAX, NBD_STOP_GRACE};

/// How long accepting rests when it failed (no file descriptor is left): clients wait in the backlog meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A peer that vanished without a word is noticed after idle + count × interval, in seconds.
const KEEPALIVE_IDLE_S: u32 = 60;
const KEEPALIVE_INTERVAL_S: u32 = 10;
const KEEPALIVE_COUNT: u32 = 6;

/// What holds for all connections of a server.
#[derive(Clone)]
pub struct Offer {
    pub tls: TlsOffer,
    /// No export can be written, whatever its device allows.
    pub read_only: bool,
    /// What the empty name means: "reserved for a "default" export".
    pub default_export: Option<String>,
    /// When there are as many, the oldest that is still shaking hands makes room; without one, who comes is turned away.
    pub connections_max: usize,
}

impl Default for Offer {
    fn default() -> Self {
        let connections_max = NBD_CONNECTIONS_MAX;
        Self { tls: TlsOffer::default(), read_only: false, default_export: None, connections_max }
    }
}

impl Offer {
    /// The export that a client means.
    pub(crate) fn meant<'a>(&'a self, name: &'a str) -> &'a str {
        match &self.default_export {
            Some(default) if name.is_empty() => default,
            _ => name,
        }
    }

    pub(crate) fn offered(&self, info: ExportInfo) -> ExportInfo {
        ExportInfo { read_only: info.read_only || self.read_only, ..info }
    }
}

/// On an executor of `torus_rpc::runtime::glommio::run`. Serves until `stop`, then ends the connections and returns: at most `NBD_STOP_GRACE` later.
pub async fn serve<E: Exports>(
    listener: Listener,
    exports: E,
    offer: Offer,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let socket = listener.socket()?;
    // SAFETY: the descriptor was duplicated for this and is owned by nobody else.
    let acceptor = unsafe { TcpListener::from_raw_fd(socket.into_raw_fd()) };
    let connections = Rc::new(Connections::new(offer));
    tracing::info!(address = listener.address(), "serving NBD");
    {
        let accept = pin!(accept(&acceptor, &listener, &exports, &connections));
        match select(pin!(stop), accept).await {
            Either::Left(((), _)) => {}
            Either::Right((never, _)) => match never {},
        }
    }
    drop(acceptor);
    tracing::info!(address = listener.address(), connections = connections.count(), "stopping NBD");
    connections.stop().await;
    Ok(())
}

async fn accept<E: Exports>(
    acceptor: &TcpListener,
    listener: &Listener,
    exports: &E,
    connections: &Rc<Connections>,
) -> std::convert::Infallible {
    loop {
        let accepted = match acceptor.accept().await {
            Ok(stream) => connections.begin(stream, listener),
            Err(error) => Err(error.into()),
        };
        match accepted {
            Ok(Some((client, open))) => {
                let exports = exports.clone();
                glommio::spawn_local(async move {
                    let peer = client.peer.clone();
                    let end = client.serve(exports, &open.connections.offer).await;
                    log_end(&peer, &end);
                    drop(open);
                })
                .detach();
            }
            Ok(None) => tracing::warn!(limit = connections.offer.connections_max, "a connection too many was closed"),
            Err(error) => {
                tracing::warn!(address = listener.address(), %error, "a connection could not be accepted");
                glommio::timer::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn log_end(peer: &str, end: &End) {
    match end {
        End::Violation(_) | End::Slow | End::Ended(_) => tracing::warn!(peer, %end, "connection closed"),
        End::Stream(StreamError::Tls(_)) => tracing::warn!(peer, %end, "connection closed"),
        End::Disconnected | End::Stream(_) => tracing::info!(peer, %end, "connection ended"),
    }
}

struct Connections {
    offer: Offer,
    open: RefCell<BTreeMap<u64, Socket>>,
    next: Cell<u64>,
    stopping: Rc<Cell<bool>>,
    idle: RefCell<Option<Waker>>,
}

struct Socket {
    descriptor: OwnedFd,
    transmitting: Rc<Cell<bool>>,
    /// It was told to go.
    shut: Cell<bool>,
}

/// A connection's entry, gone with it.
struct Open {
    connections: Rc<Connections>,
    id: u64,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.connections.open.borrow_mut().remove(&self.id);
        if let Some(waker) = self.connections.idle.borrow_mut().take() {
            waker.wake();
        }
    }
}

impl Socket {
    fn shut(&self, how: Shutdown) {
        if let Err(error) = shutdown(self.descriptor.as_raw_fd(), how) {
            tracing::debug!(%error, "a connection was gone already");
        }
    }
}

impl Connections {
    fn new(offer: Offer) -> Self {
        Self {
            offer,
            open: RefCell::default(),
            next: Cell::default(),
            stopping: Rc::default(),
            idle: RefCell::default(),
        }
    }

    fn count(&self) -> usize {
        self.open.borrow().len()
    }

    /// Whether one more may come. Who says nothing, or begins a handshake for ever, keeps nobody out: the oldest of
    /// those goes.
    fn has_room(&self) -> bool {
        let open = self.open.borrow();
        let staying = open.values().filter(|socket| !socket.shut.get()).count();
        if staying < self.offer.connections_max {
            // Those on their way out still hold memory and a descriptor.
            return open.len() < 2 * self.offer.connections_max;
        }
        let idle = open.values().find(|socket| !socket.transmitting.get() && !socket.shut.get());
        if let Some(socket) = idle {
            socket.shut(Shutdown::Both);
            socket.shut.set(true);
        }
        idle.is_some()
    }

    /// Registers a connection, unless there are too many.
    fn begin(self: &Rc<Self>, stream: TcpStream, listener: &Listener) -> io::Result<Option<(Client, Open)>> {
        if !self.has_room() {
            return Ok(None);
        }
        let id = self.next.get();
        self.next.set(id + 1);
        let socket = duplicate(&stream)?;
        let peer = match listener.tcp_address() {
            Some(_) => {
                tune(&socket)?;
                stream.peer_addr().map_err(io::Error::from)?.to_string()
            }
            None => format!("{}#{id}", listener.address()),
        };
        // SAFETY: the descriptor was duplicated for this and is owned by nobody else.
        let writer = unsafe { TcpStream::from_raw_fd(duplicate(&stream)?.into_raw_fd()) };
        tracing::debug!(peer, "connected");
        let transmitting = Rc::new(Cell::new(false));
        let entry = Socket { descriptor: socket, transmitting: transmitting.clone(), shut: Cell::new(false) };
        self.open.borrow_mut().insert(id, entry);
        let stopping = self.stopping.clone();
        let client = Client { input: Input::new(stream), output: Output::new(writer), peer, stopping, transmitting };
        Ok(Some((client, Open { connections: self.clone(), id })))
    }

    /// Readers see the end of what was sent so far; the connections then end by themselves, or are cut off.
    async fn stop(&self) {
        self.stopping.set(true);
        self.shut(Shutdown::Read);
        if let Either::Right(_) = select(pin!(self.idle()), pin!(glommio::timer::sleep(NBD_STOP_GRACE))).await {
            tracing::warn!(connections = self.count(), "connections still busy are cut off");
            self.shut(Shutdown::Both);
        }
    }

    fn shut(&self, how: Shutdown) {
        self.open.borrow().values().for_each(|socket| socket.shut(how));
    }

    async fn idle(&self) {
        poll_fn(|context| {
            if self.count() == 0 {
                return Poll::Ready(());
            }
            *self.idle.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

fn duplicate(stream: &TcpStream) -> io::Result<OwnedFd> {
    // SAFETY: the stream is borrowed, so its descriptor stays open while it is duplicated.
    unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) }.try_clone_to_owned()
}

fn tune(socket: &OwnedFd) -> io::Result<()> {
    setsockopt(socket, sockopt::TcpNoDelay, &true)?;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
    setsockopt(socket, sockopt::TcpKeepCount, &KEEPALIVE_COUNT)?;
    Ok(())
}
