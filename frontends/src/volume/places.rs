//! Nodes that were replaced by others (`torusadm peer replace`) while volumes are attached: one watch of the ring for
//! all volumes of an executor (protocol rule 12).
//!
//! A replacement moves a number of the ring from one node to another and touches no volume. Whoever attaches afterwards
//! opens the new node, finds no instances and marks it stale since zero (rule 3). A session that lives has to notice:
//! what it knows of that number is about the old node. Until it has noticed it goes on with the old one, if that can be
//! reached, and nothing is lost by it: what it acknowledges is on all its other replicas too, at least as many as the
//! minimum, and whoever attaches after it opens those. Then, in this order:
//!
//! 1. the number is listed as stale since zero, and no request requires the old node any more;
//! 2. the session takes the new node's address and generation, under which the new node knows nothing yet;
//! 3. the resync creates the instances there and fills them.
//!
//! A crash between two steps leaves a number that is stale since zero, or an attach that finds no instances.

use super::attach::address_of;
use super::replicas::ShardPosition;
use super::session::Session;
use super::status::Loss;
use crate::device::VolumeError;
use futures::channel::oneshot;
use futures::future::select;
use std::cell::RefCell;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::time::Duration;
use torus_rpc::metadata::{Event, Metadata, MetadataError, Revision, Watch};
use torus_rpc::runtime::{Class, Clock, Peer, Runtime, Spawn};
use torus_schema::ids::{Incarnation, NodeId, RingGeneration};
use torus_schema::limits::METADATA_RETRY_AFTER;
use torus_schema::records::{decode, keys};
use torus_schema::ring::{Ring, RingRecord};

/// A replacement that cannot be followed yet, since too few replicas would be left in sync, is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// The sessions that are told, and the ring as it was last seen.
pub(super) struct Places<R: Runtime> {
    shared: Rc<Shared<R>>,
    /// Whoever follows ends with this.
    following: RefCell<Option<oneshot::Sender<()>>>,
}

struct Shared<R: Runtime> {
    runtime: R,
    sessions: RefCell<Vec<Weak<Session<R>>>>,
    ring: RefCell<Option<Rc<Ring>>>,
}

impl<R: Runtime> Places<R> {
    pub fn new(runtime: R) -> Self {
        let shared = Rc::new(Shared { runtime, sessions: RefCell::default(), ring: RefCell::default() });
        Self { shared, following: RefCell::default() }
    }

    /// From now on, until the session ends. A change since its attach that was seen already is told at once.
    pub fn follow(&self, session: &Rc<Session<R>>) {
        self.shared.sessions.borrow_mut().push(Rc::downgrade(session));
        let seen = self.shared.ring.borrow().clone();
        if let Some(ring) = seen {
            session.follow_ring(&ring);
        }
        if self.following.borrow().is_none() {
            let (alive, over) = oneshot::channel();
            self.following.replace(Some(alive));
            let watching = follow(self.shared.runtime.clone(), Rc::downgrade(&self.shared));
            let following = async move { drop(select(pin!(watching), over).await) };
            self.shared.runtime.spawn().spawn(Class::Foreground, following);
        }
    }
}

/// As long as somebody may attach.
async fn follow<R: Runtime>(runtime: R, shared: Weak<Shared<R>>) {
    while let Err(error) = watch_ring(&runtime, &shared).await {
        tracing::warn!(%error, "the ring cannot be followed; trying again");
        runtime.clock().sleep(METADATA_RETRY_AFTER).await;
    }
}

async fn watch_ring<R: Runtime>(runtime: &R, shared: &Weak<Shared<R>>) -> Result<(), MetadataError> {
    let key = keys::ring();
    let now = runtime.metadata().range(&key).await?;
    let mut watch = runtime.metadata().watch(&key, Revision(now.revision.0 + 1)).await?;
    let mut entry = now.entries.into_iter().next();
    loop {
        let Some(shared) = shared.upgrade() else { return Ok(()) };
        if let Some(entry) = entry.take() {
            match decode::<RingRecord>(&entry.key, &entry.value).map(Ring::from_record) {
                Ok(Ok(ring)) => shared.tell(Rc::new(ring)),
                Ok(Err(error)) => tracing::error!(%error, "the ring document is not valid; the last one is kept to"),
                Err(error) => tracing::error!(%error, "the ring document cannot be read; the last one is kept to"),
            }
        }
        drop(shared);
        let events = watch.next().await?;
        let put = |event| if let Event::Put(entry) = event { Some(entry) } else { None };
        entry = events.into_iter().filter_map(put).next_back();
    }
}

impl<R: Runtime> Shared<R> {
    fn tell(&self, ring: Rc<Ring>) {
        *self.ring.borrow_mut() = Some(ring.clone());
        let mut living = Vec::new();
        self.sessions.borrow_mut().retain(|session| match session.upgrade() {
            Some(session) if session.ended.borrow().is_none() => {
                living.push(session);
                true
            }
            _ => false,
        });
        living.iter().for_each(|session| session.follow_ring(&ring));
    }
}

/// Who has a place now.
#[derive(Clone, Copy)]
struct Given {
    node: NodeId,
    generation: RingGeneration,
}

impl<R: Runtime> Session<R> {
    /// Each shard whose number belongs to another node now is followed there, in a task of its own.
    pub fn follow_ring(self: &Rc<Self>, ring: &Ring) {
        for (position, shard) in self.shards.iter().enumerate() {
            let Some(node) = ring.node(shard.id.node) else { continue };
            let generation = ring.instance_generation(shard.id.node, self.record.generation);
            // What was seen may be older than what the attach read.
            if generation <= shard.generation.get() || node.id == shard.peer.borrow().node {
                continue;
            }
            let (session, given) = (self.clone(), Given { node: node.id, generation });
            self.runtime.spawn().spawn(Class::Foreground, async move { session.follow_node(position, given).await });
        }
    }

    async fn follow_node(self: &Rc<Self>, position: ShardPosition, given: Given) {
        let id = self.shards[position].id;
        while self.ended.borrow().is_none() && self.shards[position].generation.get() < given.generation {
            match self.try_follow(position, given).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::warn!(volume = %self.record.name, shard = %id, node = %given.node, %error,
                        "the node was replaced; going on with the old one");
                    self.runtime.clock().sleep(RETRY_AFTER).await;
                }
            }
        }
    }

    async fn try_follow(self: &Rc<Self>, position: ShardPosition, given: Given) -> Result<(), VolumeError> {
        let shard = &self.shards[position];
        let address = address_of(&self.runtime, given.node, shard.id).await?;
        loop {
            self.abort_sync(position, &"its node was replaced");
            let settled = || self.ended.borrow().is_some() || !self.replicas.borrow().is_finishing(position);
            self.changed.until(|| settled().then_some(())).await;
            let slices = self.replicas.borrow().slices_in_sync_on(position);
            let is_syncing = self.replicas.borrow().is_syncing(position);
            if (slices.is_empty() && !is_syncing) || self.ended.borrow().is_some() {
                break;
            }
            let marked = self.mark_stale(position, Loss::Missing(slices)).await;
            marked.map_err(|below| VolumeError::NotReady {
                because: format!(
                    "without it slice {} has {} replicas in sync, at least {} are needed",
                    below.slice, below.remaining, below.min
                ),
            })?;
        }
        // From here to the end of the block nothing else runs: nobody sees the new node as one that is in sync.
        if self.ended.borrow().is_none() && shard.generation.get() < given.generation {
            let old = shard.peer.borrow().clone();
            tracing::warn!(volume = %self.record.name, shard = %shard.id, old = %old.node, new = %given.node, %address,
                "the node was replaced by another, which is filled");
            *shard.peer.borrow_mut() = Rc::new(Peer { node: given.node, address, ..(*old).clone() });
            shard.generation.set(given.generation);
            shard.incarnation.set(Incarnation(0));
            shard.full.set(false);
            self.changed.notify();
        }
        Ok(())
    }
}
