//! Accepts connections and hands each to the executor that has the fewest of them, the first one of those: a lone
//! connection is served where the accepting is done. When it turns out that its export lives elsewhere it may move there,
//! if that leaves the executors as evenly loaded.

use crate::nbd::connection::Settled;
use crate::nbd::listener::Listener;
use futures::channel::mpsc;
use futures::future::{Either, select};
use glommio::net::{TcpListener, TcpStream};
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// How long accepting rests when it failed (no file descriptor is left): clients wait in the backlog meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Of one executor; read by any thread.
#[derive(Debug, Default)]
pub struct ConnectionCounts {
    pub executor: usize,
    /// Handed over and not ended yet.
    pub open: AtomicUsize,
    /// Since the start.
    pub served: AtomicU64,
}

/// One of the open connections, until it is dropped.
pub(crate) struct Counted(Arc<ConnectionCounts>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What a connection was accepted on.
pub(crate) struct Via {
    pub address: String,
    pub is_tcp: bool,
}

/// A connection on its way to an executor.
pub(crate) struct Newcomer {
    pub socket: OwnedFd,
    pub via: Arc<Via>,
    pub counted: Counted,
    /// Executors that had no room for it.
    pub turned_away: usize,
    /// What it agreed on with another executor.
    pub settled: Option<Settled>,
}

/// Hands connections to executors.
#[derive(Clone)]
pub struct Reception {
    pub(crate) executors: Arc<Vec<Executor>>,
}

pub(crate) struct Executor {
    counts: Arc<ConnectionCounts>,
    newcomers: mpsc::UnboundedSender<Newcomer>,
}

/// The connections that come to one executor.
pub struct Arrivals {
    pub(crate) counts: Arc<ConnectionCounts>,
    pub(crate) newcomers: mpsc::UnboundedReceiver<Newcomer>,
    pub(crate) reception: Reception,
}

impl Reception {
    /// With the arrivals of each executor.
    pub fn new(executors: usize) -> (Self, Vec<Arrivals>) {
        let (executors, receivers): (Vec<_>, Vec<_>) = (0..executors)
            .map(|executor| {
                let (newcomers, receiver) = mpsc::unbounded();
                let counts = Arc::new(ConnectionCounts { executor, ..ConnectionCounts::default() });
                (Executor { counts, newcomers }, receiver)
            })
            .unzip();
        let reception = Self { executors: Arc::new(executors) };
        let arrivals = |(executor, newcomers): (&Executor, _)| Arrivals {
            counts: executor.counts.clone(),
            newcomers,
            reception: reception.clone(),
        };
        let arrivals = reception.executors.iter().zip(receivers).map(arrivals).collect();
        (reception, arrivals)
    }

    pub fn counts(&self) -> Vec<Arc<ConnectionCounts>> {
        self.executors.iter().map(|executor| executor.counts.clone()).collect()
    }

    /// On one executor: what is given accepts until `stop`.
    pub fn accept<S: Future<Output = ()>>(
        &self,
        listener: &Listener,
        stop: S,
    ) -> io::Result<impl Future<Output = ()> + use<S>> {
        let socket = listener.socket()?;
        // SAFETY: the descriptor was duplicated for this and is owned by nobody else.
        let acceptor = unsafe { TcpListener::from_raw_fd(socket.into_raw_fd()) };
        let via = Via { address: listener.address().to_string(), is_tcp: listener.tcp_address().is_some() };
        tracing::info!(address = via.address, executors = self.executors.len(), "serving NBD");
        let reception = self.clone();
        Ok(async move {
            match select(pin!(stop), pin!(reception.accept_all(&acceptor, &Arc::new(via)))).await {
                Either::Left(((), _)) => {}
                Either::Right((never, _)) => match never {},
            }
        })
    }

    async fn accept_all(&self, acceptor: &TcpListener, via: &Arc<Via>) -> Infallible {
        loop {
            let accepted = acceptor.accept().await.map_err(io::Error::from).and_then(|stream| descriptor(&stream));
            match accepted {
                Ok(socket) => self.send(self.least_loaded(), socket, via.clone(), 0, None),
                Err(error) => {
                    tracing::warn!(address = via.address, %error, "a connection could not be accepted");
                    glommio::timer::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn least_loaded(&self) -> usize {
        let open = |executor: &Executor| executor.counts.open.load(Ordering::Relaxed);
        let least = self.executors.iter().enumerate().min_by_key(|(_, executor)| open(executor));
        least.map_or(0, |(executor, _)| executor)
    }

    /// Whether a connection that `from` has may go to `to`: no executor gets more than another that way.
    pub(crate) fn may_move(&self, from: usize, to: usize) -> bool {
        let open = |executor: usize| self.executors[executor].counts.open.load(Ordering::Relaxed);
        open(to) < open(from)
    }

    pub(crate) fn send(&self, to: usize, socket: OwnedFd, via: Arc<Via>, turned_away: usize, settled: Option<Settled>) {
        let executor = &self.executors[to];
        executor.counts.open.fetch_add(1, Ordering::Relaxed);
        let counted = Counted(executor.counts.clone());
        // An executor that serves no more is stopping, and so are all; the connection closes.
        let _ = executor.newcomers.unbounded_send(Newcomer { socket, via, counted, turned_away, settled });
    }
}

/// Of its own: what glommio accepted belongs to this executor.
fn descriptor(stream: &TcpStream) -> io::Result<OwnedFd> {
    // SAFETY: the stream is borrowed, so its descriptor stays open while it is duplicated.
    unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) }.try_clone_to_owned()
}
