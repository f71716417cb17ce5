//! The links of one executor: one to each shard, opened on first use and shared by all its volumes.
//!
//! A connection that breaks is made again and the request sent again: requests are idempotent (a write carries its
//! version, and every request the incarnation it means). Only when the peer cannot be reached for `LINK_DEAD_AFTER`,
//! or nobody listens there, does the caller hear of it (protocol rule 10).
//!
//! Reads have a connection of their own: behind a burst of writes one would wait for megabytes in the socket, and for
//! its turn among those the shard lets in from one connection.
//!
//! That a peer does not answer is noted here once for all volumes, and so is where its node listens now.

use bytes::Bytes;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::error::LinkError;
use torus_rpc::message::{Envelope, Operation, Reply};
use torus_rpc::notify::Notify;
use torus_rpc::runtime::{Clock, Connect, Instant, Link, Peer, Runtime};
use torus_schema::hash::Map;
use torus_schema::ids::NodeId;
use torus_schema::limits::{LINK_DEAD_AFTER, NODE_LOOKUP_INTERVAL};

/// Between two attempts to connect.
const RETRY_AFTER: Duration = Duration::from_millis(50);

pub struct Links<R: Runtime> {
    runtime: R,
    /// By lane.
    links: [RefCell<Map<Peer, Entry<R::Link>>>; 2],
    /// Peers that do not answer, and since when.
    down: RefCell<Map<Peer, Instant>>,
    looked_up: RefCell<Map<NodeId, Instant>>,
    changed: Notify,
    generations: std::cell::Cell<u64>,
}

/// With when the request was handed to the link.
pub type Answered = (Reply, Bytes, Instant);

#[derive(Clone, Copy)]
enum Lane {
    Writes,
    Reads,
}

impl Lane {
    fn of(operation: &Operation) -> Self {
        match operation {
            Operation::Read { .. } | Operation::Map { .. } => Lane::Reads,
            _ => Lane::Writes,
        }
    }
}

enum Entry<L> {
    /// Those who wait hear of the outcome of this attempt, whatever it is.
    Connecting {
        attempt: u64,
    },
    Open {
        link: L,
        generation: u64,
    },
    Failed {
        attempt: u64,
        error: LinkError,
    },
}

impl<R: Runtime> Links<R> {
    pub fn new(runtime: R) -> Rc<Self> {
        Rc::new(Self {
            runtime,
            links: Default::default(),
            down: RefCell::default(),
            looked_up: RefCell::default(),
            changed: Notify::default(),
            generations: Default::default(),
        })
    }

    /// The answer, and when the request that was answered was handed to the link. `now`: the clock, read just before.
    pub async fn call(
        &self,
        peer: &Peer,
        envelope: &Envelope,
        operation: &Operation,
        payload: &Bytes,
        now: Instant,
    ) -> Result<Answered, LinkError> {
        let lane = Lane::of(operation);
        let failed = match self.open_link(peer, lane) {
            Some(link) => match self.attempt(peer, link, (envelope, operation, payload)).await {
                Ok((reply, payload)) => return Ok((reply, payload, now)),
                Err(error) => Some(error),
            },
            None => None,
        };
        // Apart, since every request would be as large as what it takes to connect.
        Box::pin(self.call_on(peer, envelope, operation, payload, failed)).await
    }

    /// From where the first attempt failed, or found no link.
    async fn call_on(
        &self,
        peer: &Peer,
        envelope: &Envelope,
        operation: &Operation,
        payload: &Bytes,
        mut failed: Option<LinkError>,
    ) -> Result<Answered, LinkError> {
        let mut started = None;
        let lane = Lane::of(operation);
        loop {
            let error = match failed.take() {
                Some(error) => error,
                None => match self.connect_and_attempt(peer, lane, (envelope, operation, payload)).await {
                    Ok(answered) => return Ok(answered),
                    Err(error) => error,
                },
            };
            let now = self.runtime.clock().now();
            let started = *started.get_or_insert(now);
            if !matches!(error, LinkError::Local { .. }) {
                self.down.borrow_mut().entry(peer.clone()).or_insert(now);
            }
            let hopeless = match &error {
                LinkError::ConnectionRefused { .. } | LinkError::Hello { .. } => true,
                LinkError::Silent { .. } | LinkError::Overdue { .. } => true,
                LinkError::Closed { .. } | LinkError::Protocol { .. } | LinkError::Local { .. } => false,
            };
            if hopeless || now.since(started) >= LINK_DEAD_AFTER {
                return Err(error);
            }
            if now > started {
                self.runtime.clock().sleep(RETRY_AFTER).await;
            }
        }
    }

    async fn connect_and_attempt(
        &self,
        peer: &Peer,
        lane: Lane,
        request: (&Envelope, &Operation, &Bytes),
    ) -> Result<Answered, LinkError> {
        let link = self.link(peer, lane).await?;
        let sent = self.runtime.clock().now();
        let (reply, payload) = self.attempt(peer, link, request).await?;
        Ok((reply, payload, sent))
    }

    /// A link that fails is not used again.
    async fn attempt(
        &self,
        peer: &Peer,
        (link, generation): (R::Link, u64),
        (envelope, operation, payload): (&Envelope, &Operation, &Bytes),
    ) -> Result<(Reply, Bytes), LinkError> {
        let answered = link.call(envelope, operation, payload).await;
        match &answered {
            Ok(_) => self.answered(peer),
            Err(LinkError::Overdue { .. }) => {}
            Err(_) => self.discard(peer, Lane::of(operation), generation),
        }
        answered
    }

    fn answered(&self, peer: &Peer) {
        if !self.down.borrow().is_empty() {
            self.down.borrow_mut().remove(peer);
        }
    }

    /// Since when the peer does not answer.
    pub fn down_since(&self, peer: &Peer) -> Option<Instant> {
        let down = self.down.borrow();
        if down.is_empty() { None } else { down.get(peer).copied() }
    }

    /// True for the first who asks, and then again after a while: whoever gets it reads the node's record.
    pub fn may_look_up(&self, node: NodeId) -> bool {
        let now = self.runtime.clock().now();
        let mut looked_up = self.looked_up.borrow_mut();
        let may = looked_up.get(&node).is_none_or(|last| now.since(*last) >= NODE_LOOKUP_INTERVAL);
        if may {
            looked_up.insert(node, now);
        }
        may
    }

    fn open_link(&self, peer: &Peer, lane: Lane) -> Option<(R::Link, u64)> {
        match self.links[lane as usize].borrow().get(peer) {
            Some(Entry::Open { link, generation }) => Some((link.clone(), *generation)),
            _ => None,
        }
    }

    /// The link to `peer`, connected by the first who asks.
    async fn link(&self, peer: &Peer, lane: Lane) -> Result<(R::Link, u64), LinkError> {
        let mut awaited = None;
        let links = &self.links[lane as usize];
        let found = self
            .changed
            .until(|| match links.borrow().get(peer) {
                Some(Entry::Open { link, generation }) => Some(Some(Ok((link.clone(), *generation)))),
                Some(Entry::Connecting { attempt }) => {
                    awaited.get_or_insert(*attempt);
                    None
                }
                Some(Entry::Failed { attempt, error }) if awaited.is_some_and(|awaited| awaited <= *attempt) => {
                    Some(Some(Err(error.clone())))
                }
                Some(Entry::Failed { .. }) | None => Some(None),
            })
            .await;
        if let Some(outcome) = found {
            return outcome;
        }
        let attempt = self.generations.replace(self.generations.get() + 1);
        links.borrow_mut().insert(peer.clone(), Entry::Connecting { attempt });
        // If this caller is dropped while it connects, the others have to be able to go on.
        let abandoned = Abandoned { links: self, lane, peer };
        let connected = self.runtime.connect().connect(peer).await;
        std::mem::forget(abandoned);
        let (entry, result) = match connected {
            Ok(link) => (Entry::Open { link: link.clone(), generation: attempt }, Ok((link, attempt))),
            Err(error) => (Entry::Failed { attempt, error: error.clone() }, Err(error)),
        };
        links.borrow_mut().insert(peer.clone(), entry);
        self.changed.notify();
        result
    }

    /// A failed link is not used again; one that was made since stays.
    fn discard(&self, peer: &Peer, lane: Lane, failed: u64) {
        let mut links = self.links[lane as usize].borrow_mut();
        if matches!(links.get(peer), Some(Entry::Open { generation, .. }) if *generation == failed) {
            links.remove(peer);
        }
    }
}

struct Abandoned<'a, R: Runtime> {
    links: &'a Links<R>,
    lane: Lane,
    peer: &'a Peer,
}

impl<R: Runtime> Drop for Abandoned<'_, R> {
    fn drop(&mut self) {
        self.links.links[self.lane as usize].borrow_mut().remove(self.peer);
        self.links.changed.notify();
    }
}
