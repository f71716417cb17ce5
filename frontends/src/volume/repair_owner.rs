//! Volumes with stale replicas and no writer are brought up to date by storage nodes: one of them attaches the volume for
//! that purpose alone, and lets go at once when a client wants it (protocol rule 11).
//!
//! Every storage node runs this. Which one acts is not agreed upon: each waits the longer the lower its rank is for the
//! volume, and the transaction of the attach decides. An idle cluster costs three watches per node; only as long as there
//! is something to repair that nobody owns, the heartbeats are looked at.

use super::attach::{Attacher, Surroundings, begin, metadata_error, open_and_reconcile, record_error};
use super::counters::Counters;
use super::lease::{LeaseTerms, ProcessLease};
use super::links::Links;
use super::own::give_up;
use super::places::Places;
use super::replay::{Budget, ReplayLimits};
use super::session::Session;
use super::share::Share;
use super::wanted::watch_wanted;
use crate::device::VolumeError;
use futures::future::{Either, select};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;
use torus_rpc::metadata::{Event, Metadata, MetadataError, Range, Revision, Watch};
use torus_rpc::notify::Notify;
use torus_rpc::runtime::{Class, Clock, Instant, Random, Runtime, Spawn};
use torus_schema::ids::{NodeId, NodeNumber, VolumeId};
use torus_schema::limits::{
    MARKS_IN_FLIGHT_MAX, METADATA_RETRY_AFTER, REPAIR_BACKOFF_MAX, REPAIR_BACKOFF_MIN, REPAIR_OWNER_AFTER,
    REPAIR_STUCK_AFTER, REPAIRS_OWNED_MAX,
};
use torus_schema::records::{HeartbeatRecord, StatusRecord, VolumeRecord, VolumeState, decode, keys};
use torus_schema::ring::rank::rank;
use torus_schema::ring::{Ring, RingRecord};

/// How often what is unowned is looked at, as long as there is any.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The same when nothing was due at the last look.
const LOOK_LATER: Duration = REPAIR_OWNER_AFTER;

/// Repairs by one storage node; a clone is the same one.
pub struct RepairOwner<R: Runtime> {
    shared: Rc<Shared<R>>,
}

impl<R: Runtime> Clone for RepairOwner<R> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

struct Shared<R: Runtime> {
    runtime: R,
    node: NodeId,
    attacher: Attacher,
    links: Rc<Links<R>>,
    budget: Rc<Budget>,
    counters: Arc<Counters>,
    marking: Rc<Share>,
    places: Places<R>,
    /// Held only while something is repaired.
    lease: RefCell<Weak<ProcessLease<R>>>,
    repairing: RefCell<BTreeSet<VolumeId>>,
    backoff: RefCell<BTreeMap<VolumeId, Backoff>>,
    stopping: Cell<bool>,
    changed: Notify,
}

/// After an attempt that did not get to the end.
struct Backoff {
    until: Instant,
    attempts: u32,
    /// The nodes that were up then: when another comes, it is worth trying at once.
    up: BTreeSet<NodeId>,
}

/// Why a repair ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    InSync,
    /// A client wants the volume.
    Wanted,
    Stopping,
    /// Nothing moved for a while.
    Stuck,
    Ended,
}

impl<R: Runtime> RepairOwner<R> {
    /// `host`: as others read who owns a volume.
    pub fn new(runtime: R, node: NodeId, host: String) -> Self {
        let process = format!("torus-engine, node {node}, repair");
        let attacher = Attacher { host, process, pid: std::process::id(), force: false, repair: true };
        let shared = Shared {
            links: Links::new(runtime.clone()),
            budget: Budget::new(ReplayLimits::default()),
            counters: Arc::default(),
            marking: Share::new(MARKS_IN_FLIGHT_MAX, 0),
            places: Places::new(runtime.clone()),
            runtime,
            node,
            attacher,
            lease: RefCell::default(),
            repairing: RefCell::default(),
            backoff: RefCell::default(),
            stopping: Cell::new(false),
            changed: Notify::default(),
        };
        Self { shared: Rc::new(shared) }
    }

    /// Until `stop`.
    pub async fn run(&self) {
        let shared = &self.shared;
        let stopped = pin!(shared.changed.until(|| shared.stopping.get().then_some(())));
        let following = pin!(async {
            loop {
                if let Err(error) = shared.follow().await {
                    tracing::warn!(%error, "volumes that need repair cannot be followed; trying again");
                }
                shared.runtime.clock().sleep(METADATA_RETRY_AFTER).await;
            }
        });
        let _: Either<((), _), ((), _)> = select(stopped, following).await;
    }

    /// Lets go of every volume; returns when that is done.
    pub async fn stop(&self) {
        self.shared.stopping.set(true);
        self.shared.changed.notify();
        self.shared.changed.until(|| self.shared.repairing.borrow().is_empty().then_some(())).await;
        let lease = self.shared.lease.borrow().upgrade();
        if let Some(lease) = lease {
            let _ = self.shared.runtime.metadata().revoke_lease(lease.id()).await;
        }
    }

    /// Volumes that are being repaired here.
    pub fn repairing(&self) -> usize {
        self.shared.repairing.borrow().len()
    }
}

/// What the metadata store says, kept up to date by its watches.
#[derive(Default)]
struct View {
    stale: BTreeMap<VolumeId, BTreeSet<NodeNumber>>,
    owned: BTreeSet<VolumeId>,
    ring: Option<Ring>,
    /// Since when each volume with stale replicas is seen without an owner, and how much longer than others it waits.
    unowned: BTreeMap<VolumeId, (Instant, Duration)>,
}

impl View {
    fn status(&mut self, key: &str, value: Option<&[u8]>) {
        let Some(volume) = volume_of(key, &keys::statuses()) else { return };
        let status = value.and_then(|value| decode::<StatusRecord>(key, value).ok()).unwrap_or_default();
        let nodes: BTreeSet<NodeNumber> = status.stale.iter().map(|stale| stale.node).collect();
        match nodes.is_empty() {
            true => _ = self.stale.remove(&volume),
            false => _ = self.stale.insert(volume, nodes),
        }
    }

    fn owner(&mut self, key: &str, is_there: bool) {
        let Some(volume) = volume_of(key, &keys::owners()) else { return };
        match is_there {
            true => _ = self.owned.insert(volume),
            false => _ = self.owned.remove(&volume),
        }
    }

    fn ring(&mut self, key: &str, value: &[u8]) {
        match decode::<RingRecord>(key, value).map(Ring::from_record) {
            Ok(Ok(ring)) => self.ring = Some(ring),
            _ => tracing::error!("the ring document is not valid; the last one is kept to"),
        }
    }

    /// Those without an owner are timed from when that was first seen.
    fn note_unowned(&mut self, now: Instant, mut jitter: impl FnMut() -> Duration) {
        let (stale, owned) = (&self.stale, &self.owned);
        self.unowned.retain(|volume, _| stale.contains_key(volume) && !owned.contains(volume));
        for volume in stale.keys().filter(|volume| !owned.contains(volume)) {
            self.unowned.entry(*volume).or_insert_with(|| (now, jitter()));
        }
    }

    fn ids(&self, numbers: &BTreeSet<NodeNumber>) -> BTreeSet<NodeId> {
        let ring = self.ring.iter();
        ring.flat_map(|ring| numbers.iter().filter_map(|number| ring.node(*number))).map(|node| node.id).collect()
    }
}

fn volume_of(key: &str, prefix: &str) -> Option<VolumeId> {
    key.strip_prefix(prefix)?.parse().ok()
}

impl<R: Runtime> Shared<R> {
    async fn follow(self: &Rc<Self>) -> Result<(), MetadataError> {
        let metadata = self.runtime.metadata();
        let mut view = View::default();
        let statuses = metadata.range(&keys::statuses()).await?;
        let mut status_changes = metadata.watch(&keys::statuses(), after(&statuses)).await?;
        let owners = metadata.range(&keys::owners()).await?;
        let mut owner_changes = metadata.watch(&keys::owners(), after(&owners)).await?;
        let ring = metadata.range(&keys::ring()).await?;
        let mut ring_changes = metadata.watch(&keys::ring(), after(&ring)).await?;
        statuses.entries.iter().for_each(|entry| view.status(&entry.key, Some(&entry.value)));
        owners.entries.iter().for_each(|entry| view.owner(&entry.key, true));
        ring.entries.iter().for_each(|entry| view.ring(&entry.key, &entry.value));
        loop {
            let now = self.runtime.clock().now();
            view.note_unowned(now, || REPAIR_OWNER_AFTER * (self.runtime.random().u64() % 512) as u32 / 1024);
            let pause = if view.unowned.is_empty() { None } else { Some(self.look(&view, now).await?) };
            let (status, owner) = (pin!(status_changes.next()), pin!(owner_changes.next()));
            let (ring, pause) = (pin!(ring_changes.next()), pin!(self.pause(pause)));
            match select(select(status, owner), select(ring, pause)).await {
                Either::Left((Either::Left((events, _)), _)) => {
                    each(events?, |key, value| view.status(key, value));
                }
                Either::Left((Either::Right((events, _)), _)) => {
                    each(events?, |key, value| view.owner(key, value.is_some()));
                }
                Either::Right((Either::Left((events, _)), _)) => {
                    each(events?, |key, value| value.into_iter().for_each(|value| view.ring(key, value)));
                }
                Either::Right((Either::Right(_), _)) => {}
            }
        }
    }

    async fn pause(&self, pause: Option<Duration>) {
        match pause {
            Some(pause) => self.runtime.clock().sleep(pause).await,
            None => std::future::pending().await,
        }
    }

    /// Begins what is due; returns when to look again.
    async fn look(self: &Rc<Self>, view: &View, now: Instant) -> Result<Duration, MetadataError> {
        let ripe = view.unowned.values().any(|(since, jitter)| now.since(*since) >= REPAIR_OWNER_AFTER + *jitter);
        if !ripe {
            return Ok(LOOK_AGAIN);
        }
        let up = self.up().await?;
        let mut begun = false;
        for (volume, (since, jitter)) in &view.unowned {
            let is_full = self.repairing.borrow().len() >= REPAIRS_OWNED_MAX;
            if is_full || self.repairing.borrow().contains(volume) {
                continue;
            }
            let stale = view.ids(&view.stale[volume]);
            let with: BTreeSet<NodeId> = stale.intersection(&up).copied().collect();
            let rank = rank(*volume, self.node, up.iter().copied()) as u32;
            let due = now.since(*since) >= REPAIR_OWNER_AFTER * (1 + rank) + *jitter;
            if with.is_empty() || !due || self.is_held_back(*volume, &up, now) {
                continue;
            }
            begun = true;
            self.repairing.borrow_mut().insert(*volume);
            let (shared, volume, up) = (self.clone(), *volume, up.clone());
            self.runtime.spawn().spawn(Class::Background, async move {
                shared.repair(volume, up).await;
                shared.repairing.borrow_mut().remove(&volume);
                shared.changed.notify();
            });
        }
        Ok(if begun { LOOK_AGAIN } else { LOOK_LATER })
    }

    /// Who failed waits, unless a node is up now that was not then: it may be what was lacking, stale or not.
    fn is_held_back(&self, volume: VolumeId, up: &BTreeSet<NodeId>, now: Instant) -> bool {
        let backoff = self.backoff.borrow();
        backoff.get(&volume).is_some_and(|backoff| now < backoff.until && up.is_subset(&backoff.up))
    }

    async fn up(&self) -> Result<BTreeSet<NodeId>, MetadataError> {
        let beats = self.runtime.metadata().range(&keys::heartbeats()).await?.entries;
        let beats = beats.iter().filter_map(|entry| decode::<HeartbeatRecord>(&entry.key, &entry.value).ok());
        Ok(beats.map(|beat| beat.node).collect())
    }

    async fn repair(self: &Rc<Self>, volume: VolumeId, up: BTreeSet<NodeId>) {
        let result = self.try_repair(volume).await;
        match &result {
            Ok(Outcome::InSync) => {
                tracing::info!(%volume, "repaired: all its replicas are in sync");
                self.backoff.borrow_mut().remove(&volume);
                return;
            }
            Ok(outcome) => tracing::info!(%volume, ?outcome, "the repair let go of the volume"),
            // Somebody was faster, or it was deleted.
            Err(VolumeError::Attached { .. } | VolumeError::NotFound { .. }) => return,
            Err(error) => tracing::info!(%volume, %error, "the volume cannot be repaired from here now"),
        }
        let now = self.runtime.clock().now();
        let mut backoff = self.backoff.borrow_mut();
        let attempts = backoff.get(&volume).map_or(0, |backoff| backoff.attempts);
        let attempts = if matches!(result, Ok(Outcome::Wanted)) { 0 } else { attempts.min(16) };
        let until = now.after((REPAIR_BACKOFF_MIN * 2u32.pow(attempts)).min(REPAIR_BACKOFF_MAX));
        backoff.insert(volume, Backoff { until, attempts: attempts + 1, up });
    }

    async fn try_repair(self: &Rc<Self>, volume: VolumeId) -> Result<Outcome, VolumeError> {
        let key = keys::volume(volume);
        let entry = self.runtime.metadata().get(&key).await.map_err(metadata_error)?;
        let entry = entry.ok_or_else(|| VolumeError::NotFound { name: volume.to_string() })?;
        let record: VolumeRecord = decode(&key, &entry.value).map_err(record_error)?;
        if record.state != VolumeState::Ready {
            return Err(VolumeError::NotFound { name: record.name });
        }
        // Before the attach: whoever begins to wait from now on is seen.
        let Some(mut wanting) = watch_wanted(&self.runtime, volume).await.map_err(metadata_error)? else {
            return Ok(Outcome::Wanted);
        };
        let lease = self.lease().await?;
        let session = begin(self.around(lease), (volume, &record.name), &self.attacher).await?;
        tracing::info!(volume = %record.name, "owned for repair");
        let result = {
            let work = pin!(work(&session, &self.places));
            let stopping = pin!(self.changed.until(|| self.stopping.get().then_some(())));
            let wanted = pin!(wanting.wanted());
            match select(work, select(wanted, stopping)).await {
                Either::Left((result, _)) => result,
                Either::Right((Either::Left(_), _)) => Ok(Outcome::Wanted),
                Either::Right((Either::Right(_), _)) => Ok(Outcome::Stopping),
            }
        };
        // Nothing of it writes any more from here on, and what is on its way was meant: it is fenced by the next epoch.
        session.detach();
        give_up(&self.runtime, volume, session.status.owner_revision.get()).await;
        result
    }

    fn around(&self, lease: Rc<ProcessLease<R>>) -> Surroundings<R> {
        Surroundings {
            runtime: self.runtime.clone(),
            links: self.links.clone(),
            lease,
            budget: self.budget.clone(),
            counters: self.counters.clone(),
            marking: self.marking.clone(),
            never_hedge: true,
        }
    }

    async fn lease(&self) -> Result<Rc<ProcessLease<R>>, VolumeError> {
        let held = self.lease.borrow().upgrade();
        if let Some(lease) = held {
            return Ok(lease);
        }
        let lease = ProcessLease::grant(self.runtime.clone(), LeaseTerms::default()).await.map_err(metadata_error)?;
        *self.lease.borrow_mut() = Rc::downgrade(&lease);
        Ok(lease)
    }
}

fn after(range: &Range) -> Revision {
    Revision(range.revision.0 + 1)
}

fn each(events: Vec<Event>, mut tell: impl FnMut(&str, Option<&[u8]>)) {
    for event in events {
        match event {
            Event::Put(entry) => tell(&entry.key, Some(&entry.value)),
            Event::Deleted { key, .. } => tell(&key, None),
        }
    }
}

/// Opens the volume; its session brings back what is stale by itself, and here it is watched.
async fn work<R: Runtime>(session: &Rc<Session<R>>, places: &Places<R>) -> Result<Outcome, VolumeError> {
    open_and_reconcile(session).await?;
    // Not before: a place that is given to another node must not change hands beside it.
    places.follow(session);
    session.serve();
    let mut moved = (session.runtime.clock().now(), session.resync_mark());
    loop {
        if session.ended.borrow().is_some() {
            return Ok(Outcome::Ended);
        }
        if session.replicas.borrow().to_status().stale.is_empty() {
            return Ok(Outcome::InSync);
        }
        let (now, mark) = (session.runtime.clock().now(), session.resync_mark());
        if mark != moved.1 {
            moved = (now, mark);
        }
        if now.since(moved.0) >= REPAIR_STUCK_AFTER {
            return Ok(Outcome::Stuck);
        }
        let done = || session.ended.borrow().is_some() || session.replicas.borrow().to_status().stale.is_empty();
        let waiting = pin!(session.changed.until(|| done().then_some(())));
        select(waiting, pin!(session.runtime.clock().sleep(LOOK_AGAIN))).await;
    }
}
