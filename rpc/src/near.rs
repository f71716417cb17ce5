//! A shard on the client's own executor: its requests are calls, with no socket between. Any other shard is reached by
//! TCP.
//!
//! A near shard keeps to what holds for one that is far: a request that was submitted is carried out whoever waits for
//! it, and one that stays unanswered fails alone, so that a disk that hangs makes its replica stale (protocol rule 10). And
//! it is one of the shard's connections to its admission: what finds no room waits its turn.

use crate::admission::{Admission, Admitted, Entrance, cost};
use crate::answers::{self, Answers};
use crate::client::{TcpConnect, TcpLink};
use crate::error::LinkError;
use crate::message::{Answer, Envelope, Operation, Reply};
use crate::runtime::{Class, Clock, Connect, Instant, Link, Peer, Spawn};
use crate::server::{Handled, Handler, Identity, Request};
use bytes::{Bytes, BytesMut};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use torus_schema::limits::{LINK_PROBE_AFTER, REQUEST_DEADLINE};

/// Connects to the shard that `handler` is, and to all others.
#[derive(Clone)]
pub struct NearConnect<H, S> {
    identity: Identity,
    handler: H,
    admission: Rc<Admission>,
    /// Of this executor.
    here: S,
    far: TcpConnect,
}

impl<H, S> NearConnect<H, S> {
    pub fn new(identity: Identity, handler: H, admission: Rc<Admission>, here: S) -> Self {
        Self { identity, handler, admission, here, far: TcpConnect }
    }
}

impl<H: Handler, S: Spawn + Clock> Connect for NearConnect<H, S> {
    type Link = NearLink<H, S>;

    async fn connect(&self, peer: &Peer) -> Result<NearLink<H, S>, LinkError> {
        let Identity { cluster, node, shard } = self.identity;
        if (peer.cluster, peer.node, peer.shard) != (cluster, node, shard) {
            return self.far.connect(peer).await.map(NearLink::Far);
        }
        let near = Near {
            address: peer.address.clone(),
            handler: self.handler.clone(),
            here: self.here.clone(),
            entrance: Entrance::new(self.admission.clone()),
            queue: RefCell::default(),
            admitting: Cell::new(false),
            answers: Rc::default(),
            ticks: Cell::new(0),
            watching: Cell::new(false),
        };
        Ok(NearLink::Near(Rc::new(near)))
    }
}

#[derive(Clone)]
pub enum NearLink<H, S> {
    Near(Rc<Near<H, S>>),
    Far(TcpLink),
}

impl<H: Handler, S: Spawn + Clock> Link for NearLink<H, S> {
    async fn call(
        &self,
        envelope: &Envelope,
        operation: &Operation,
        payload: &Bytes,
    ) -> Result<(Reply, Bytes), LinkError> {
        match self {
            // What a server answers for its shard: this executor lives.
            Self::Near(_) if matches!(operation, Operation::Ping) => Ok((Reply::of(Answer::Pong), Bytes::new())),
            Self::Near(near) => near.submit(envelope, operation, payload).await,
            Self::Far(link) => link.call(envelope, operation, payload).await,
        }
    }
}

pub struct Near<H, S> {
    /// For errors, where it would be reached by others.
    address: String,
    handler: H,
    here: S,
    entrance: Rc<Entrance>,
    /// Not let in yet, in order; bounded by what volumes have under way.
    queue: RefCell<VecDeque<Waiting>>,
    admitting: Cell<bool>,
    answers: Rc<Answers>,
    /// Ticks of the watch so far; a tick is `LINK_PROBE_AFTER`.
    ticks: Cell<u32>,
    watching: Cell<bool>,
}

struct Waiting {
    id: u64,
    arrived: Instant,
    envelope: Envelope,
    operation: Operation,
    payload: Bytes,
}

impl<H: Handler, S: Spawn + Clock> Near<H, S> {
    fn submit(self: &Rc<Self>, envelope: &Envelope, operation: &Operation, payload: &Bytes) -> answers::Waiting {
        let id = self.answers.expect(self.ticks.get());
        let (arrived, operation, payload) = (self.here.now(), operation.clone(), payload.clone());
        let waiting = Waiting { id, arrived, envelope: *envelope, operation, payload };
        match self.enter_now(&waiting) {
            Some(admitted) => self.start(waiting, admitted),
            None => {
                self.queue.borrow_mut().push_back(waiting);
                if !self.admitting.replace(true) {
                    self.here.spawn(Class::Foreground, admit(self.clone()));
                }
            }
        }
        if !self.watching.replace(true) {
            self.here.spawn(Class::Foreground, watch(self.clone()));
        }
        self.answers.wait(id)
    }

    /// Nobody overtakes who waits.
    fn enter_now(&self, waiting: &Waiting) -> Option<Admitted> {
        match self.admitting.get() {
            true => None,
            false => self.entrance.enter_now(&waiting.operation, waiting.cost()),
        }
    }

    fn start(self: &Rc<Self>, waiting: Waiting, admitted: Admitted) {
        let Waiting { id, arrived, envelope, operation, payload } = waiting;
        let mut request = Request { arrived, envelope, operation, payload };
        let near = self.clone();
        self.here.spawn(Class::Foreground, async move {
            let Handled { reply, chunks, finished } = near.handler.handle(&mut request).await;
            near.answers.answer(id, Ok((reply, gathered(&chunks))));
            if let Some(finished) = finished {
                near.handler.sent(finished, near.here.now().since(finished.at));
            }
            drop(admitted);
        });
    }

    fn end_overdue(&self, tick: u32) {
        let deadline_ticks = REQUEST_DEADLINE.as_millis().div_ceil(LINK_PROBE_AFTER.as_millis()) as u32;
        self.answers.fail_overdue(tick, deadline_ticks, |ticks| {
            let waited_ms = u64::from(ticks) * LINK_PROBE_AFTER.as_millis() as u64;
            LinkError::Overdue { address: self.address.clone(), waited_ms }
        });
    }
}

impl Waiting {
    fn cost(&self) -> usize {
        cost(self.payload.len(), &self.operation)
    }
}

/// Lets in those that wait, one after the other; ends when nobody does.
async fn admit<H: Handler, S: Spawn + Clock>(near: Rc<Near<H, S>>) {
    loop {
        let Some(waiting) = near.queue.borrow_mut().pop_front() else {
            return near.admitting.set(false);
        };
        let admitted = near.entrance.enter(&waiting.operation, waiting.cost()).await;
        near.start(waiting, admitted);
    }
}

/// As one piece, like what comes by TCP: the disk's buffers stay on the disk's side.
fn gathered<C: std::ops::Deref<Target = [u8]>>(chunks: &[C]) -> Bytes {
    match chunks {
        [] => Bytes::new(),
        [only] => Bytes::copy_from_slice(only),
        chunks => {
            let mut bytes = BytesMut::with_capacity(chunks.iter().map(|chunk| chunk.len()).sum());
            chunks.iter().for_each(|chunk| bytes.extend_from_slice(chunk));
            bytes.freeze()
        }
    }
}

/// Ends when nothing is outstanding.
async fn watch<H: Handler, S: Spawn + Clock>(near: Rc<Near<H, S>>) {
    loop {
        near.here.sleep(LINK_PROBE_AFTER).await;
        let tick = near.ticks.get() + 1;
        near.ticks.set(tick);
        near.end_overdue(tick);
        if near.answers.outstanding() == 0 {
            return near.watching.set(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answers::Answered;
    use crate::message::Few;
    use crate::runtime::simulated::{Here, World};
    use std::future::pending;
    use torus_schema::ids::{BlockIndex, ClusterId, NodeId, ShardIndex};
    use torus_schema::limits::CONNECTION_REQUESTS_MAX;

    /// Counts what it carries out; a map it never answers.
    #[derive(Clone, Default)]
    struct Shard(Rc<Cell<u32>>);

    impl Handler for Shard {
        type Chunk = Vec<u8>;

        async fn handle(&self, request: &mut Request) -> Handled<Vec<u8>> {
            if matches!(request.operation, Operation::Map { .. }) {
                pending::<()>().await;
            }
            self.0.set(self.0.get() + 1);
            let (reply, chunks) =
                (Reply::of(Answer::Written), Few::from_vec(vec![request.payload.to_vec(), b"!".to_vec()]));
            Handled { reply, chunks, finished: None }
        }
    }

    fn connected() -> (World, Shard, NearLink<Shard, Here>) {
        let world = World::new(7);
        let here = Here { world: world.clone(), process: world.start_process() };
        let identity = Identity { cluster: ClusterId::random(), node: NodeId::random(), shard: ShardIndex(0) };
        let peer = Peer {
            cluster: identity.cluster,
            node: identity.node,
            shard: identity.shard,
            address: "nobody listens there:1".to_string(),
        };
        let shard = Shard::default();
        let connect = NearConnect::new(identity, shard.clone(), Rc::default(), here);
        let link = world.block_on(async move { connect.connect(&peer).await });
        (world, shard, link.expect("it is here"))
    }

    fn call(world: &World, link: &NearLink<Shard, Here>, operation: Operation, payload: &'static [u8]) -> Answered {
        let link = link.clone();
        world.block_on(async move { link.call(&Envelope::NONE, &operation, &Bytes::from_static(payload)).await })
    }

    fn read() -> Operation {
        Operation::Read { first: BlockIndex(0), count: 1 }
    }

    #[test]
    fn a_shard_on_this_executor_is_called_without_a_connection() {
        let (world, _, link) = connected();
        let (reply, payload) = call(&world, &link, read(), b"abc").expect("answered");
        assert_eq!((reply.answer, &payload[..]), (Answer::Written, &b"abc!"[..]));
        let (reply, _) = call(&world, &link, Operation::Ping, b"").expect("answered");
        assert_eq!(reply.answer, Answer::Pong);
    }

    #[test]
    fn what_was_submitted_is_carried_out_though_nobody_waits() {
        let (world, shard, link) = connected();
        let NearLink::Near(near) = &link else { panic!("it is here") };
        drop(near.submit(&Envelope::NONE, &read(), &Bytes::new()));
        call(&world, &link, read(), b"").expect("answered");
        call(&world, &link, read(), b"").expect("answered");
        let waiting = link.clone();
        world.block_on(async move {
            let NearLink::Near(near) = waiting else { panic!("it is here") };
            near.here.sleep(REQUEST_DEADLINE).await;
        });
        assert_eq!(shard.0.get(), 3);
    }

    #[test]
    fn what_finds_no_room_waits_its_turn() {
        let (world, shard, link) = connected();
        let NearLink::Near(near) = &link else { panic!("it is here") };
        let hanging = Operation::Map { first: BlockIndex(0), count: 1 };
        let mut answers: Vec<_> =
            (0..CONNECTION_REQUESTS_MAX - 1).map(|_| near.submit(&Envelope::NONE, &hanging, &Bytes::new())).collect();
        assert_eq!(near.entrance.enter_now(&read(), 0).map(drop), Some(()), "there is room for one");
        answers.extend((0..3).map(|_| near.submit(&Envelope::NONE, &Operation::Flush, &Bytes::new())));
        assert_eq!((near.queue.borrow().len(), near.admitting.get()), (2, true));
        assert!(near.entrance.enter_now(&read(), 0).is_none());
        let last = answers.pop().expect("three flushes");
        let answered = world.block_on(last).expect("answered in its turn");
        assert_eq!((answered.0.answer, shard.0.get()), (Answer::Written, 3));
        assert!(near.queue.borrow().is_empty() && !near.admitting.get());
    }

    #[test]
    fn a_request_that_stays_unanswered_fails_alone() {
        let (world, _, link) = connected();
        let hanging = Operation::Map { first: BlockIndex(0), count: 1 };
        let error = call(&world, &link, hanging, b"").expect_err("its disk hangs");
        assert!(matches!(error, LinkError::Overdue { waited_ms, .. } if waited_ms >= 5000), "{error}");
        call(&world, &link, read(), b"").expect("the others are answered");
    }
}
