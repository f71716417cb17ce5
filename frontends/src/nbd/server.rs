//! The connections of one executor: counts them, and stops them in order: what is in flight is answered, what still
//! comes is refused, who does not take their replies is cut off.

use crate::device::{ExportInfo, Exports};
use crate::nbd::connection::{Client, End, Outcome, Settled};
use crate::nbd::handshake::TlsMode;
use crate::nbd::listener::Listener;
use crate::nbd::reception::{Arrivals, ConnectionCounts, Counted, Newcomer, Reception, Via};
use crate::nbd::stream::{Input, Output, StreamError};
use crate::nbd::tls::TlsOffer;
use futures::StreamExt;
use futures::future::{Either, FutureExt, OptionFuture, join, select};
use glommio::net::TcpStream;
use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Poll, Waker};
use torus_schema::limits::{NBD_CONNECTIONS_MAX, NBD_STOP_GRACE};

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
    /// Of one executor. When there are as many, the oldest that is still shaking hands makes room; without one, who
    /// comes is turned away.
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
    let (reception, arrivals) = Reception::new(1);
    let stop = stop.shared();
    let accepting = reception.accept(&listener, stop.clone())?;
    let serving = arrivals.into_iter().next().map(|arrivals| arrivals.serve(exports, offer, stop));
    join(accepting, OptionFuture::from(serving)).await;
    Ok(())
}

impl Arrivals {
    /// On the executor that these are for: serves until `stop`, like `serve`.
    pub async fn serve<E: Exports>(mut self, exports: E, offer: Offer, stop: impl Future<Output = ()>) {
        // Under TLS a connection cannot move on to its volume, which lives with the first executor more often than elsewhere.
        if offer.tls.mode() == TlsMode::Off {
            self.counts.tell_core();
        }
        let connections = Rc::new(Connections::new(offer, self.counts.clone()));
        {
            let mut stop = pin!(stop);
            while let Either::Left((Some(newcomer), _)) = select(self.newcomers.next(), stop.as_mut()).await {
                self.begin(newcomer, &exports, &connections);
            }
        }
        tracing::info!(executor = self.counts.executor, connections = connections.count(), "stopping NBD");
        connections.stop().await;
    }

    fn begin<E: Exports>(&self, newcomer: Newcomer, exports: &E, connections: &Rc<Connections>) {
        let Newcomer { socket, via, counted, turned_away, settled } = newcomer;
        let (mut client, open) = match connections.begin(&socket, counted, &via) {
            Ok(Some(begun)) => begun,
            Ok(None) => return self.turn_away((socket, via, settled), turned_away, connections.offer.connections_max),
            Err(error) => return tracing::warn!(address = via.address, %error, "a connection could not be served"),
        };
        let (exports, reception, here) = (exports.clone(), self.reception.clone(), self.counts.executor);
        glommio::spawn_local(async move {
            let peer = client.peer.clone();
            let outcome = match settled {
                Some(Settled { export, terms, received }) => {
                    client.input.resume(received);
                    Outcome::Over(client.go_on(exports, &export, terms).await)
                }
                None => client.serve(exports, &open.connections.offer, |home| reception.may_move(here, home)).await,
            };
            match outcome {
                Outcome::Over(end) => log_end(&peer, &end),
                Outcome::Moves { home, settled } => match open.socket() {
                    Ok(socket) => {
                        tracing::debug!(peer, from = here, to = home, "moves to where its export lives");
                        open.connections.counts.served.fetch_sub(1, Ordering::Relaxed);
                        reception.send(home, socket, via, 0, Some(settled));
                    }
                    Err(error) => tracing::warn!(peer, %error, "a connection could not move to where its export lives"),
                },
            }
            drop(open);
        })
        .detach();
    }

    /// There may be room on another executor.
    fn turn_away(
        &self,
        (socket, via, settled): (OwnedFd, Arc<Via>, Option<Settled>),
        turned_away: usize,
        limit: usize,
    ) {
        let executors = self.reception.executors.len();
        if turned_away + 1 == executors {
            return tracing::warn!(limit, executors, "a connection too many was closed");
        }
        let next = (self.counts.executor + 1) % executors;
        self.reception.send(next, socket, via, turned_away + 1, settled);
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
    counts: Arc<ConnectionCounts>,
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
    _counted: Counted,
}

impl Open {
    fn socket(&self) -> io::Result<OwnedFd> {
        self.connections.open.borrow()[&self.id].descriptor.try_clone()
    }
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
    fn new(offer: Offer, counts: Arc<ConnectionCounts>) -> Self {
        Self {
            offer,
            counts,
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
    fn begin(self: &Rc<Self>, accepted: &OwnedFd, counted: Counted, via: &Via) -> io::Result<Option<(Client, Open)>> {
        if !self.has_room() {
            return Ok(None);
        }
        let id = self.next.get();
        self.next.set(id + 1);
        let stream = stream_of(accepted)?;
        let peer = if via.is_tcp {
            tune(accepted)?;
            stream.peer_addr().map_err(io::Error::from)?.to_string()
        } else {
            format!("{}#{}.{id}", via.address, self.counts.executor)
        };
        let writer = stream_of(accepted)?;
        tracing::debug!(peer, executor = self.counts.executor, "connected");
        self.counts.served.fetch_add(1, Ordering::Relaxed);
        let transmitting = Rc::new(Cell::new(false));
        let descriptor = accepted.try_clone()?;
        let entry = Socket { descriptor, transmitting: transmitting.clone(), shut: Cell::new(false) };
        self.open.borrow_mut().insert(id, entry);
        let stopping = self.stopping.clone();
        let client = Client { input: Input::new(stream), output: Output::new(writer), peer, stopping, transmitting };
        Ok(Some((client, Open { connections: self.clone(), id, _counted: counted })))
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

/// A glommio stream is exclusive to whoever reads from it or writes to it: each gets one.
fn stream_of(socket: &OwnedFd) -> io::Result<TcpStream> {
    let copy = socket.try_clone()?;
    // SAFETY: the descriptor was duplicated for this and is owned by nobody else.
    Ok(unsafe { TcpStream::from_raw_fd(copy.into_raw_fd()) })
}

fn tune(socket: &OwnedFd) -> io::Result<()> {
    setsockopt(socket, sockopt::TcpNoDelay, &true)?;
    setsockopt(socket, sockopt::KeepAlive, &true)?;
    setsockopt(socket, sockopt::TcpKeepIdle, &KEEPALIVE_IDLE_S)?;
    setsockopt(socket, sockopt::TcpKeepInterval, &KEEPALIVE_INTERVAL_S)?;
    setsockopt(socket, sockopt::TcpKeepCount, &KEEPALIVE_COUNT)?;
    Ok(())
}
