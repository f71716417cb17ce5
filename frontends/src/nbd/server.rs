//! Accepts connections, counts them, and stops them in order: what is in flight is answered, what still comes is
//! refused, who does not take their replies is cut off.

use crate::device::Exports;
use crate::nbd::connection::{Client, End, Input};
use crate::nbd::listener::Listener;
use futures::future::{Either, select};
use glommio::net::{TcpListener, TcpStream};
use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use std::cell::{Cell, RefCell};
use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;
use torus_schema::hash::Map;
use torus_schema::limits::{NBD_CONNECTIONS_MAX, NBD_STOP_GRACE};

/// How long accepting rests when it failed (no file descriptor is left): clients wait in the backlog meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A peer that vanished without a word is noticed after idle + count × interval, in seconds.
const KEEPALIVE_IDLE_S: u32 = 60;
const KEEPALIVE_INTERVAL_S: u32 = 10;
const KEEPALIVE_COUNT: u32 = 6;

/// On an executor of `torus_rpc::runtime::glommio::run`. Serves until `stop`, then ends the connections and returns: at most `NBD_STOP_GRACE` later.
pub async fn serve<E: Exports>(listener: Listener, exports: E, stop: impl Future<Output = ()>) -> io::Result<()> {
    let socket = listener.socket()?;
    // SAFETY: the descriptor was duplicated for this and is owned by nobody else.
    let acceptor = unsafe { TcpListener::from_raw_fd(socket.into_raw_fd()) };
    let connections = Rc::new(Connections::default());
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
                    let end = client.serve(exports).await;
                    log_end(&peer, &end);
                    drop(open);
                })
                .detach();
            }
            Ok(None) => tracing::warn!(limit = NBD_CONNECTIONS_MAX, "a connection too many was closed"),
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
        End::Closed | End::Disconnected | End::Socket(_) => tracing::info!(peer, %end, "connection ended"),
    }
}

#[derive(Default)]
struct Connections {
    open: RefCell<Map<u64, OwnedFd>>,
    next: Cell<u64>,
    stopping: Rc<Cell<bool>>,
    idle: RefCell<Option<Waker>>,
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

impl Connections {
    fn count(&self) -> usize {
        self.open.borrow().len()
    }

    /// Registers a connection, unless there are too many.
    fn begin(self: &Rc<Self>, stream: TcpStream, listener: &Listener) -> io::Result<Option<(Client, Open)>> {
        if self.count() >= NBD_CONNECTIONS_MAX {
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
        self.open.borrow_mut().insert(id, socket);
        let client = Client { input: Input::new(stream), writer, peer, stopping: self.stopping.clone() };
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
        for socket in self.open.borrow().values() {
            if let Err(error) = shutdown(socket.as_raw_fd(), how) {
                tracing::debug!(%error, "a connection was gone already");
            }
        }
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
