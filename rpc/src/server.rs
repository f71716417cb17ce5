//! The data port of one shard, on glommio: a task per connection receives, requests run beside each other, and
//! answers leave in the order in which they are ready.
//!
//! A client that floods is not read from until its requests are answered; one that sends garbage is disconnected;
//! neither touches another connection.

use crate::client::duplicate;
use crate::error::FrameError;
use crate::frame::{decode_request, encode_reply};
use crate::message::{Answer, Envelope, Operation, PROTOCOL, Refusal, Reply};
use crate::notify::Notify;
use crate::outbox::Outbox;
use crate::receive::{Frame, ReceiveBuffer};
use crate::runtime::glommio::stay_awake;
use bytes::Bytes;
use futures::AsyncWriteExt;
use glommio::net::{TcpListener, TcpStream};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::ops::Deref;
use std::rc::Rc;
use std::task::{Poll, Waker};
use thiserror::Error;
use torus_schema::ids::{ClusterId, NodeId, ShardIndex};
use torus_schema::limits::{
    BLOCK_BYTES, BLOCKS_PER_FRAME_MAX, CONNECTION_BYTES_MAX, CONNECTION_REQUESTS_MAX, LINK_DEAD_AFTER,
    SHARD_OUTSTANDING_BYTES_MAX, SHARD_REQUESTS_MAX,
};

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

    fn handle(
        self,
        envelope: Envelope,
        operation: Operation,
        payload: Bytes,
    ) -> impl Future<Output = (Reply, Vec<Self::Chunk>)> + 'static;
}

/// How many connections there are and were, for the node's status.
#[derive(Default)]
pub struct ConnectionCounts {
    pub open: Cell<u32>,
    pub refused: Cell<u64>,
}

/// What all connections of a shard have under way, reads and the rest apart.
#[derive(Default)]
struct ShardLoad {
    lanes: [LaneLoad; 2],
}

#[derive(Default)]
struct LaneLoad {
    requests: Cell<usize>,
    bytes: Cell<usize>,
    released: Notify,
}

impl ShardLoad {
    fn lane(&self, operation: &Operation) -> &LaneLoad {
        &self.lanes[usize::from(matches!(operation, Operation::Read { .. } | Operation::Map { .. }))]
    }
}

impl LaneLoad {
    fn has_room(&self, bytes: usize) -> bool {
        self.requests.get() < SHARD_REQUESTS_MAX && self.bytes.get() + bytes <= SHARD_OUTSTANDING_BYTES_MAX as usize
    }

    fn add(&self, bytes: usize) {
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
    }

    fn release(&self, bytes: usize) {
        self.requests.set(self.requests.get() - 1);
        self.bytes.set(self.bytes.get() - bytes);
        self.released.notify();
    }
}

/// Accepts until dropped.
pub async fn serve<H: Handler>(listener: TcpListener, identity: Identity, handler: H, counts: Rc<ConnectionCounts>) {
    let shard = Rc::new(ShardLoad::default());
    loop {
        match listener.accept().await {
            Ok(stream) => {
                let (handler, counts, shard) = (handler.clone(), counts.clone(), shard.clone());
                glommio::spawn_local(async move {
                    counts.open.set(counts.open.get() + 1);
                    serve_connection(stream, identity, handler, &counts, shard).await;
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
    stream: TcpStream,
    identity: Identity,
    handler: H,
    counts: &ConnectionCounts,
    shard: Rc<ShardLoad>,
) {
    let peer = stream.peer_addr().map(|address| address.to_string()).unwrap_or_default();
    let connection = Rc::new(Connection { outbox: Outbox::default(), load: Load::default(), shard });
    let receiving = stream.set_nodelay(true).map_err(std::io::Error::from).and_then(|()| duplicate(&stream));
    let receiving = match receiving {
        Ok(receiving) => receiving,
        Err(error) => return tracing::warn!(peer, %error, "cannot set up a connection"),
    };
    glommio::spawn_local(send(connection.clone(), stream)).detach();
    match receive(&connection, receiving, identity, handler).await {
        Ok(()) => tracing::debug!(peer, "connection closed"),
        Err(error) => {
            counts.refused.set(counts.refused.get() + 1);
            tracing::info!(peer, %error, "connection ended");
        }
    }
    // What was accepted is carried out; its answers go nowhere, unless all are ready already.
    connection.load.idle().await;
    let sent = std::pin::pin!(connection.outbox.at_most(0));
    let too_long = std::pin::pin!(glommio::timer::sleep(LINK_DEAD_AFTER));
    futures::future::select(sent, too_long).await;
    connection.outbox.close();
}

struct Connection<P> {
    outbox: Outbox<P>,
    load: Load,
    shard: Rc<ShardLoad>,
}

impl<P> Connection<P> {
    /// A connection with nothing else under way may always have one: it cannot be kept out by others.
    async fn enter_shard(&self, operation: &Operation, bytes: usize) {
        let lane = self.shard.lane(operation);
        if !lane.has_room(bytes) {
            lane.released.until(|| (lane.has_room(bytes) || self.load.requests.get() <= 1).then_some(())).await;
        }
        lane.add(bytes);
    }
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
        stay_awake();
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
                let reply = Reply { full: false, answer };
                connection.outbox.push(|out| encode_reply(out, frame.prefix.request_id, &reply, 0), []);
                if let Some(refusal) = refused {
                    return Err(ConnectionError::Hello(refusal));
                }
                greeted = true;
                continue;
            }
            let cost = cost(&frame, &operation);
            connection.load.admit(cost).await;
            connection.enter_shard(&operation, cost).await;
            start(connection.clone(), handler.clone(), envelope, operation, frame, cost);
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

/// Bytes of memory the request may take until it is answered.
fn cost(frame: &Frame, operation: &Operation) -> usize {
    let answered_blocks = match operation {
        Operation::Read { count, .. } => u64::from(*count).min(BLOCKS_PER_FRAME_MAX),
        _ => 0,
    };
    frame.prefix.frame_bytes() + (answered_blocks * BLOCK_BYTES) as usize
}

fn start<H: Handler>(
    connection: Rc<Connection<H::Chunk>>,
    handler: H,
    envelope: Envelope,
    operation: Operation,
    frame: Frame,
    cost: usize,
) {
    let reads = matches!(operation, Operation::Read { .. } | Operation::Map { .. });
    let work = handler.handle(envelope, operation, frame.payload);
    glommio::spawn_local(async move {
        let (reply, payload) = work.await;
        let payload_bytes = payload.iter().map(|chunk| chunk.len()).sum();
        connection.outbox.push(|out| encode_reply(out, frame.prefix.request_id, &reply, payload_bytes), payload);
        connection.load.release(cost);
        connection.shard.lanes[usize::from(reads)].release(cost);
    })
    .detach();
}

async fn send<P: Deref<Target = [u8]>>(connection: Rc<Connection<P>>, mut stream: TcpStream) {
    while let Some(chunks) = connection.outbox.take().await {
        for chunk in chunks {
            if let Err(error) = stream.write_all(chunk.bytes()).await {
                tracing::debug!(%error, "cannot send an answer");
                connection.outbox.close();
                break;
            }
            connection.outbox.sent(chunk);
        }
    }
    // The receiver has its own descriptor of the socket and ends by this.
    let _ = stream.shutdown(std::net::Shutdown::Both).await;
}

/// What one connection has under way.
#[derive(Default)]
struct Load {
    requests: Cell<usize>,
    bytes: Cell<usize>,
    waiting: RefCell<Option<Waker>>,
}

impl Load {
    /// Waits until there is room, which is always so when nothing is under way.
    async fn admit(&self, bytes: usize) {
        self.wait(|load| {
            load.requests.get() == 0
                || load.requests.get() < CONNECTION_REQUESTS_MAX
                    && load.bytes.get() + bytes <= CONNECTION_BYTES_MAX as usize
        })
        .await;
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
    }

    async fn idle(&self) {
        self.wait(|load| load.requests.get() == 0).await;
    }

    async fn wait(&self, until: impl Fn(&Load) -> bool) {
        std::future::poll_fn(|context| {
            if until(self) {
                return Poll::Ready(());
            }
            *self.waiting.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    fn release(&self, bytes: usize) {
        self.requests.set(self.requests.get() - 1);
        self.bytes.set(self.bytes.get() - bytes);
        if let Some(waker) = self.waiting.take() {
            waker.wake();
        }
    }
}
