//! The data port of one shard, on glommio: a task per connection receives, requests run beside each other, and
//! answers leave in the order in which they are ready.
//!
//! A client that floods is not read from until its requests are answered; one that sends garbage is disconnected;
//! neither touches another connection.

use crate::admission::{Admission, Admitted, Entrance, cost};
use crate::client::duplicate;
use crate::error::FrameError;
use crate::frame::{decode_request, encode_reply};
use crate::local::{self, Via};
use crate::message::{Answer, Envelope, Few, Operation, PROTOCOL, Refusal, Reply};
use crate::outbox::{Batch, Outbox};
use crate::receive::ReceiveBuffer;
use crate::runtime::Instant;
use crate::runtime::glommio::now;
use crate::send::Sender;
use bytes::Bytes;
use glommio::net::{TcpListener, TcpStream};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::net::SocketAddr;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::rc::Rc;
use std::time::Duration;
use thiserror::Error;
use torus_schema::ids::{ClusterId, NodeId, ShardIndex, VolumeId};
use torus_schema::latency::OperationKind;
use torus_schema::limits::{CONNECTION_BYTES_MAX, LINK_DEAD_AFTER};

/// Who answers on this port; a hello that looks for another is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub shard: ShardIndex,
}

/// What a connection hands its requests to; hello and ping it answers itself.
pub trait Handler: Clone + 'static {
    type Chunk: Deref<Target = [u8]> + 'static;

    fn handle(&self, request: &mut Request) -> impl Future<Output = Handled<Self::Chunk>>;

    /// The answer was handed to the socket, so long after the disk was done with it.
    fn sent(&self, _what: Finished, _after: Duration) {}
}

/// It stays in one place until it is answered, so that no future that works on it has to hold it too. Who carries it out
/// takes from it what it keeps.
pub struct Request {
    pub arrived: Instant,
    pub envelope: Envelope,
    pub operation: Operation,
    pub payload: Bytes,
}

pub struct Handled<C> {
    pub reply: Reply,
    pub chunks: Few<C>,
    /// What `sent` is to be told of.
    pub finished: Option<Finished>,
}

impl<C> From<Reply> for Handled<C> {
    fn from(reply: Reply) -> Self {
        Self { reply, chunks: Few::new(), finished: None }
    }
}

/// A user's operation, with which the disk is done.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    pub volume: VolumeId,
    pub kind: OperationKind,
    pub at: Instant,
}

/// How many connections there are and were, for the node's status.
#[derive(Default)]
pub struct ConnectionCounts {
    pub open: Cell<u32>,
    pub refused: Cell<u64>,
}

/// Where a shard is reached: by TCP, and within its host also by a unix socket.
pub struct Listener {
    tcp: std::net::TcpListener,
    unix: Option<UnixListener>,
}

impl Listener {
    pub fn new(tcp: std::net::TcpListener) -> Self {
        Self { tcp, unix: None }
    }

    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.tcp.local_addr()
    }

    /// `address`: what clients are told. Without a unix socket all come by TCP. Waits for its name until then.
    pub fn advertised_as(self, address: &str, until: std::time::Instant) -> Self {
        let unix = local::listen(address, until).inspect_err(|error| {
            tracing::warn!(address, %error, "no unix socket for who is on this host; it connects by TCP");
        });
        Self { unix: unix.ok(), ..self }
    }
}

/// Accepts until dropped.
pub async fn serve<H: Handler>(
    listener: Listener,
    identity: Identity,
    handler: H,
    shared: (Rc<ConnectionCounts>, Rc<Admission>),
) {
    let accepting = |socket: OwnedFd, via| {
        // SAFETY: the descriptor is a listening stream socket that nobody else holds. It was bound elsewhere because
        // glommio binds with SO_REUSEPORT: two nodes on one port would then share its connections unnoticed.
        let listener = unsafe { TcpListener::from_raw_fd(socket.into_raw_fd()) };
        accept((listener, via), identity, handler.clone(), shared.clone())
    };
    let tcp = accepting(listener.tcp.into(), Via::Tcp);
    match listener.unix {
        Some(unix) => futures::future::join(tcp, accepting(unix.into(), Via::Unix)).await.0,
        None => tcp.await,
    }
}

async fn accept<H: Handler>(
    (listener, via): (TcpListener, Via),
    identity: Identity,
    handler: H,
    (counts, admission): (Rc<ConnectionCounts>, Rc<Admission>),
) {
    loop {
        match listener.accept().await {
            Ok(stream) => {
                let (handler, counts) = (handler.clone(), counts.clone());
                let entrance = Entrance::new(admission.clone());
                glommio::spawn_local(async move {
                    counts.open.set(counts.open.get() + 1);
                    serve_connection((stream, via), identity, handler, &counts, entrance).await;
                    counts.open.set(counts.open.get() - 1);
                })
                .detach();
            }
            Err(error) => {
                // Out of descriptors, say: the connections there are go on, and closing one makes room.
                tracing::warn!(%error, "cannot accept a connection");
                glommio::timer::sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

#[derive(Debug, Error)]
enum ConnectionError {
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("{0}")]
    Hello(Refusal),
}

async fn serve_connection<H: Handler>(
    (stream, via): (TcpStream, Via),
    identity: Identity,
    handler: H,
    counts: &ConnectionCounts,
    entrance: Rc<Entrance>,
) {
    let peer = match via {
        Via::Tcp => stream.peer_addr().map(|address| address.to_string()).unwrap_or_default(),
        Via::Unix => "this host".to_string(),
    };
    let connection = Rc::new(Connection { outbox: Rc::default(), unsent: RefCell::default(), entrance });
    let receiving = prepare(&stream, via).and_then(|()| duplicate(&stream));
    let receiving = match receiving {
        Ok(receiving) => receiving,
        Err(error) => return tracing::warn!(peer, %error, "cannot set up a connection"),
    };
    glommio::spawn_local(send(connection.clone(), Sender::new(stream, via), handler.clone())).detach();
    match receive(&connection, receiving, identity, handler).await {
        Ok(()) => tracing::debug!(peer, "connection closed"),
        Err(error) => {
            counts.refused.set(counts.refused.get() + 1);
            tracing::info!(peer, %error, "connection ended");
        }
    }
    // What was accepted is carried out; its answers go nowhere, unless all are ready already.
    connection.entrance.idle().await;
    let sent = std::pin::pin!(connection.outbox.at_most(0));
    let too_long = std::pin::pin!(glommio::timer::sleep(LINK_DEAD_AFTER));
    futures::future::select(sent, too_long).await;
    connection.outbox.close();
}

fn prepare(stream: &TcpStream, via: Via) -> std::io::Result<()> {
    match via {
        Via::Tcp => stream.set_nodelay(true)?,
        // SAFETY: the stream owns the descriptor for longer than this borrow of it.
        Via::Unix => local::set_buffer(&unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) }),
    }
    Ok(())
}

struct Connection<P> {
    outbox: Rc<Outbox<P>>,
    /// Whose answers wait in the outbox.
    unsent: RefCell<Vec<Finished>>,
    entrance: Rc<Entrance>,
}

async fn receive<H: Handler>(
    connection: &Rc<Connection<H::Chunk>>,
    mut stream: TcpStream,
    identity: Identity,
    handler: H,
) -> Result<(), ConnectionError> {
    let mut buffer = ReceiveBuffer::default();
    let mut greeted = false;
    loop {
        if buffer.fill(&mut stream).await? == 0 {
            return Ok(());
        }
        // Also of what waits to be let in: those are in the shard's queue.
        let arrived = now();
        while let Some(frame) = buffer.next_frame()? {
            let (envelope, operation) = decode_request(&frame.prefix, &frame.header)?;
            // Who does not take the answers gets no more of them; pings are no exception.
            connection.outbox.at_most(CONNECTION_BYTES_MAX as usize).await;
            if !greeted || matches!(operation, Operation::Hello { .. } | Operation::Ping) {
                let answer = greet(identity, &operation, greeted);
                let refused = match &answer {
                    Answer::Refused(refusal) => Some(refusal.clone()),
                    _ => None,
                };
                let reply = Reply::of(answer);
                connection.outbox.push(|out| encode_reply(out, frame.prefix.request_id, &reply, 0), []);
                if let Some(refusal) = refused {
                    return Err(ConnectionError::Hello(refusal));
                }
                greeted = true;
                continue;
            }
            let admitted = connection.entrance.enter(&operation, cost(frame.prefix.frame_bytes(), &operation)).await;
            let request = Request { arrived, envelope, operation, payload: frame.payload };
            start(connection.clone(), handler.clone(), frame.prefix.request_id, request, admitted);
        }
    }
}

/// Hello and ping. Before the hello nothing else is answered.
fn greet(identity: Identity, operation: &Operation, greeted: bool) -> Answer {
    match *operation {
        Operation::Ping if greeted => Answer::Pong,
        Operation::Hello { protocol, cluster, node, shard } => {
            let found = Identity { cluster, node, shard };
            if protocol != PROTOCOL {
                let because = format!("protocol {protocol} asked for, this is {PROTOCOL}");
                Answer::Refused(Refusal::WrongPeer { because })
            } else if found != identity {
                Answer::Refused(Refusal::WrongPeer { because: format!("{found:?} asked for, this is {identity:?}") })
            } else {
                Answer::Hello { protocol: PROTOCOL }
            }
        }
        _ => Answer::Refused(Refusal::WrongPeer { because: "no hello came first".to_string() }),
    }
}

fn start<H: Handler>(
    connection: Rc<Connection<H::Chunk>>,
    handler: H,
    id: u64,
    mut request: Request,
    admitted: Admitted,
) {
    glommio::spawn_local(async move {
        let Handled { reply, chunks, finished } = handler.handle(&mut request).await;
        let payload_bytes = chunks.iter().map(|chunk| chunk.len()).sum();
        connection.unsent.borrow_mut().extend(finished);
        connection.outbox.push(|out| encode_reply(out, id, &reply, payload_bytes), chunks);
        drop(admitted);
    })
    .detach();
}

async fn send<H: Handler>(connection: Rc<Connection<H::Chunk>>, mut sender: Sender, handler: H) {
    let (mut sending, mut batch) = (Vec::new(), Batch::default());
    while connection.outbox.take(&mut batch).await {
        // Just those whose answers were taken. The two lists are used in turn.
        std::mem::swap(&mut sending, &mut *connection.unsent.borrow_mut());
        if let Err(error) = sender.send(&mut batch, &connection.outbox).await {
            tracing::debug!(%error, "cannot send an answer");
            connection.outbox.close();
        }
        if !sending.is_empty() {
            let now = now();
            sending.drain(..).for_each(|finished: Finished| handler.sent(finished, now.since(finished.at)));
        }
    }
    sender.shut_down().await;
}
