//! The links of one executor: one to each shard, opened on first use and shared by all its volumes.
//!
//! A connection that breaks is made again and the request sent again: requests are idempotent (a write carries its
//! version, and every request the incarnation it means). Only when the peer cannot be reached for `LINK_DEAD_AFTER`,
//! or nobody listens there, does the caller hear of it (protocol rule 10).

use ahash::AHashMap;
use bytes::Bytes;
use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::error::LinkError;
use torus_rpc::message::{Envelope, Operation, Reply};
use torus_rpc::notify::Notify;
use torus_rpc::runtime::{Clock, Connect, Link, Peer, Runtime};
use torus_schema::limits::LINK_DEAD_AFTER;

/// Between two attempts to connect.
const RETRY_AFTER: Duration = Duration::from_millis(50);

pub struct Links<R: Runtime> {
    runtime: R,
    links: RefCell<AHashMap<Peer, Entry<R::Link>>>,
    changed: Notify,
    generations: std::cell::Cell<u64>,
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
            links: RefCell::default(),
            changed: Notify::default(),
            generations: Default::default(),
        })
    }

    pub async fn call(
        &self,
        peer: &Peer,
        envelope: &Envelope,
        operation: &Operation,
        payload: &Bytes,
    ) -> Result<(Reply, Bytes), LinkError> {
        let mut started = None;
        loop {
            let error = match self.link(peer).await {
                Ok((link, generation)) => match link.call(envelope, operation, payload).await {
                    Ok(answer) => return Ok(answer),
                    Err(error) => {
                        if !matches!(error, LinkError::Overdue { .. }) {
                            self.discard(peer, generation);
                        }
                        error
                    }
                },
                Err(error) => error,
            };
            let now = self.runtime.clock().now();
            let started = *started.get_or_insert(now);
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

    /// The link to `peer`, connected by the first who asks.
    async fn link(&self, peer: &Peer) -> Result<(R::Link, u64), LinkError> {
        let mut awaited = None;
        let found = self
            .changed
            .until(|| match self.links.borrow().get(peer) {
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
        self.links.borrow_mut().insert(peer.clone(), Entry::Connecting { attempt });
        // If this caller is dropped while it connects, the others have to be able to go on.
        let abandoned = Abandoned { links: self, peer };
        let connected = self.runtime.connect().connect(peer).await;
        std::mem::forget(abandoned);
        let (entry, result) = match connected {
            Ok(link) => (Entry::Open { link: link.clone(), generation: attempt }, Ok((link, attempt))),
            Err(error) => (Entry::Failed { attempt, error: error.clone() }, Err(error)),
        };
        self.links.borrow_mut().insert(peer.clone(), entry);
        self.changed.notify();
        result
    }

    /// A failed link is not used again; one that was made since stays.
    fn discard(&self, peer: &Peer, failed: u64) {
        let mut links = self.links.borrow_mut();
        if matches!(links.get(peer), Some(Entry::Open { generation, .. }) if *generation == failed) {
            links.remove(peer);
        }
    }
}

struct Abandoned<'a, R: Runtime> {
    links: &'a Links<R>,
    peer: &'a Peer,
}

impl<R: Runtime> Drop for Abandoned<'_, R> {
    fn drop(&mut self) {
        self.links.links.borrow_mut().remove(self.peer);
        self.links.changed.notify();
    }
}
