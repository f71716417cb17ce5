//! Accepts connections and hands each to the executor that has the fewest of them: of those to the one pinned to the
//! core on which the kernel receives the connection's packets (where the network card's queue puts them), else to the
//! first, so that a lone connection is served where the accepting is done. When it turns out that its export lives
//! elsewhere it may move there, if that leaves the executors as evenly loaded: from each of those with the fewest it may,
//! so the choice among them costs no connection its volume's core.

use crate::nbd::connection::Settled;
use crate::nbd::listener::Listener;
use futures::channel::mpsc;
use futures::future::{Either, select};
use glommio::net::{TcpListener, TcpStream};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::sys::socket::getsockopt;
use nix::unistd::Pid;
use nix::{getsockopt_impl, libc, sockopt_impl};
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
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
    /// For which connections are chosen: that of an executor pinned to one, from when it serves.
    pub core: OnceLock<usize>,
}

impl ConnectionCounts {
    /// On its executor.
    pub(crate) fn tell_core(&self) {
        if let Some(core) = pinned_core() {
            self.core.get_or_init(|| core);
        }
    }
}

fn pinned_core() -> Option<usize> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).ok()?;
    let mut cores = (0..CpuSet::count()).filter(|core| allowed.is_set(*core).unwrap_or(false));
    cores.next().filter(|_| cores.next().is_none())
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
                Ok(socket) => {
                    let incoming = via.is_tcp.then(|| incoming_core(&socket)).flatten();
                    self.send(self.least_loaded(incoming), socket, via.clone(), 0, None);
                }
                Err(error) => {
                    tracing::warn!(address = via.address, %error, "a connection could not be accepted");
                    glommio::timer::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    /// `incoming`: the core that its packets come in on.
    fn least_loaded(&self, incoming: Option<usize>) -> usize {
        let load = |Executor { counts, .. }: &Executor| {
            let is_there = incoming.is_some() && counts.core.get().copied() == incoming;
            (counts.open.load(Ordering::Relaxed), !is_there)
        };
        let least = self.executors.iter().enumerate().min_by_key(|(_, executor)| load(executor));
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

sockopt_impl!(
    /// The core that handled the last packet of a connection; -1 is unknown.
    IncomingCpu,
    GetOnly,
    libc::SOL_SOCKET,
    libc::SO_INCOMING_CPU,
    i32
);

fn incoming_core(socket: &OwnedFd) -> Option<usize> {
    getsockopt(socket, IncomingCpu).ok().and_then(|core| core.try_into().ok())
}

/// Of its own: what glommio accepted belongs to this executor.
fn descriptor(stream: &TcpStream) -> io::Result<OwnedFd> {
    // SAFETY: the stream is borrowed, so its descriptor stays open while it is duplicated.
    unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) }.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_those_with_the_fewest_connections_it_is_the_one_where_its_packets_come_in() {
        let (reception, _arrivals) = Reception::new(4);
        let counts = reception.counts();
        let choose = |open: [usize; 4], incoming| {
            counts.iter().zip(open).for_each(|(counts, open)| counts.open.store(open, Ordering::Relaxed));
            reception.least_loaded(incoming)
        };
        assert_eq!(choose([1, 0, 0, 0], Some(7)), 1, "no executor is known to be pinned");
        // The last one is not pinned.
        [5, 6, 7].into_iter().zip(&counts).for_each(|(core, counts)| counts.core.set(core).expect("the first time"));
        assert_eq!(choose([0, 0, 0, 0], Some(7)), 2);
        assert_eq!(choose([0, 0, 1, 0], Some(7)), 0, "it has more");
        assert_eq!(choose([1, 0, 0, 0], Some(3)), 1, "a core of nobody");
        assert_eq!(choose([1, 1, 1, 0], Some(5)), 3);
        assert_eq!(choose([1, 1, 0, 0], None), 2);
    }
}
