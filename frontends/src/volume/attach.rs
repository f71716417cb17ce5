//! Becoming the writer of a volume: own it in one transaction, open it on every in-sync replica, reconcile what the
//! last writer left unflushed, and only then serve (protocol rules 2 to 4).

use super::counters::Counters;
use super::hedge::Hedging;
use super::lease::ProcessLease;
use super::links::Links;
use super::own::{Owned, give_up, keep_owning, own};
use super::reconcile::reconcile;
use super::regress::{check_not_regressed, contradicted};
use super::replay::{Budget, ReplayBuffer};
use super::replicas::{BelowMinimum, Replicas, ShardPosition};
use super::resync::keep_in_sync;
use super::resync_told::keep_telling;
use super::session::{Failure, Open, Session, Shard, Verdict, verdict};
use super::share::Share;
use super::status::{Loss, StatusKeeper, times_in};
use super::window::Window;
use crate::device::VolumeError;
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;
use torus_rpc::message::{Answer, Opened, Operation, Refusal};
use torus_rpc::metadata::{Entry, Metadata, MetadataError, Revision};
use torus_rpc::runtime::{Class, Clock, Peer, Random, Runtime, Spawn};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{Epoch, Incarnation, NodeId, ShardId, SliceId, VolumeId};
use torus_schema::limits::{LINK_DEAD_AFTER, VOLUME_OPERATIONS_MAX, VOLUME_OUTSTANDING_BYTES_MAX};
use torus_schema::records::{
    ClusterRecord, NameRecord, NodeRecord, OwnerRecord, StatusRecord, VolumeRecord, VolumeState, decode, keys,
};
use torus_schema::ring::placement::Placement;
use torus_schema::ring::table::Ring;

const RETRY_AFTER: Duration = Duration::from_millis(100);
/// However long each of them took: who is done without may be the last to have what was answered.
const OPEN_ATTEMPTS_MIN: u32 = 2;
/// Whose token creates instances: no writer, and no epoch.
const CREATOR: &str = "create";

/// Who attaches, as others will read it.
#[derive(Clone, Debug)]
pub struct Attacher {
    pub host: String,
    pub process: String,
    pub pid: u32,
    /// Take the volume over from a live owner.
    pub force: bool,
    /// Only to bring stale replicas up to date: it lets go as soon as anybody wants the volume.
    pub repair: bool,
}

/// What all volumes of a process share.
#[derive(Clone)]
pub(super) struct Surroundings<R: Runtime> {
    pub runtime: R,
    pub links: Rc<Links<R>>,
    pub lease: Rc<ProcessLease<R>>,
    pub budget: Rc<Budget>,
    pub counters: Arc<Counters>,
    /// Turns of those that mark replicas stale.
    pub marking: Rc<Share>,
    pub never_hedge: bool,
}

pub(super) fn metadata_error(error: MetadataError) -> VolumeError {
    VolumeError::Metadata { because: error.to_string() }
}

pub(super) fn record_error(error: impl std::fmt::Display) -> VolumeError {
    VolumeError::Metadata { because: error.to_string() }
}

/// The volume's id, by its name.
pub async fn find<R: Runtime>(runtime: &R, name: &str) -> Result<VolumeId, VolumeError> {
    let key = keys::name(name);
    let entry = runtime.metadata().get(&key).await.map_err(metadata_error)?;
    let entry = entry.ok_or_else(|| VolumeError::NotFound { name: name.to_string() })?;
    Ok(decode::<NameRecord>(&key, &entry.value).map_err(record_error)?.volume)
}

pub(super) async fn attach<R: Runtime>(
    around: Surroundings<R>,
    name: &str,
    attacher: &Attacher,
) -> Result<Rc<Session<R>>, VolumeError> {
    let runtime = around.runtime.clone();
    let volume = find(&runtime, name).await?;
    let session = begin(around, (volume, name), attacher).await?;
    if let Err(error) = open_and_reconcile(&session).await {
        session.end(format!("attach failed: {error}"));
        give_up(&runtime, volume, session.status.owner_revision.get()).await;
        return Err(error);
    }
    session.serve();
    Ok(session)
}

impl<R: Runtime> Session<R> {
    /// It is open: from now on it brings back by itself what is stale, and says how far it is.
    pub fn serve(self: &Rc<Self>) {
        self.runtime.spawn().spawn(Class::Background, keep_in_sync(self.clone()));
        self.runtime.spawn().spawn(Class::Background, keep_telling(self.clone()));
    }
}

/// Owned, and nothing asked of its replicas yet.
pub(super) async fn begin<R: Runtime>(
    around: Surroundings<R>,
    (volume, name): (VolumeId, &str),
    attacher: &Attacher,
) -> Result<Rc<Session<R>>, VolumeError> {
    let Surroundings { runtime, lease, .. } = around.clone();
    let owned = own(&runtime, &lease, volume, name, attacher).await?;
    let epoch = owned.epoch;
    tracing::info!(volume = name, %epoch, "attached; opening its replicas");
    let owner_revision = owned.owner_revision;
    let session = match build(around, owned).await {
        Ok(built) => built,
        Err(error) => {
            give_up(&runtime, volume, owner_revision).await;
            return Err(error);
        }
    };
    // Before anything that may take long: the lease may end meanwhile.
    runtime.spawn().spawn(Class::Foreground, keep_owning(session.clone()));
    Ok(session)
}

pub(super) fn decoded<T: serde::de::DeserializeOwned>(entry: &Entry) -> Result<T, VolumeError> {
    decode(&entry.key, &entry.value).map_err(record_error)
}

async fn build<R: Runtime>(around: Surroundings<R>, owned: Owned) -> Result<Rc<Session<R>>, VolumeError> {
    let Surroundings { runtime, links, lease, budget, counters, marking, never_hedge } = around;
    let (record, volume_revision) = owned.volume.clone();
    if record.state != VolumeState::Ready {
        let because = "its creation was not finished; delete it and create it again".to_string();
        return Err(VolumeError::NotReady { because });
    }
    let cluster_key = keys::cluster();
    let cluster = runtime.metadata().get(&cluster_key).await.map_err(metadata_error)?;
    let cluster: ClusterRecord =
        decoded(&cluster.ok_or_else(|| record_error("there is no cluster; `torusadm init` makes one"))?)?;
    let key = ClusterKey::from_hex(&cluster.key).map_err(record_error)?;
    let placement = placement_of(&record, &owned.ring)?;
    let replicas = replicas_of(&record, &owned.ring, &owned.status.0)?;
    let replicas = if owned.owner.repair { replicas.for_repair() } else { replicas };
    let mut shards = Vec::new();
    for id in replicas.shards() {
        shards.push(shard(&runtime, &owned, &cluster, &record, *id).await?);
    }
    // A lease's number may come again after the metadata store was restored: the name has to be of this session alone.
    let owner = format!("{}/{:016x}", owner_name(&owned.owner), runtime.random().u64());
    let keeper = status_keeper(&owned, volume_revision);
    let open = Open::new(&key, record.id, (owned.epoch, owner), owned.ring.slices());
    let session = |this: &Weak<Session<R>>| Session {
        lots: Cell::new(runtime.random().u64() | 1),
        together: Cell::default(),
        runtime,
        links,
        lease,
        counters,
        marking,
        reading: Share::new(VOLUME_OPERATIONS_MAX, VOLUME_OUTSTANDING_BYTES_MAX),
        writing: Share::new(VOLUME_OPERATIONS_MAX, VOLUME_OUTSTANDING_BYTES_MAX),
        hedging: RefCell::new(Hedging::new(never_hedge)),
        slow_reads: Rc::default(),
        habit: RefCell::default(),
        size_bytes: Cell::new(record.size_bytes),
        record,
        owner: owned.owner,
        epoch: owned.epoch,
        placement,
        shards,
        replicas: RefCell::new(replicas),
        status: keeper,
        window: RefCell::new(Window::default()),
        locks: Default::default(),
        retaining: Default::default(),
        resyncing: Default::default(),
        flush_point: Cell::new(owned.flush_point),
        replay: RefCell::new(ReplayBuffer::new(budget, this.clone())),
        short_of_room: Cell::new(0),
        flushing_itself: Cell::new(false),
        keeps_all: Cell::new(false),
        open,
        waiting: Cell::new(0),
        ended: RefCell::default(),
        changed: Default::default(),
    };
    Ok(Rc::new_cyclic(session))
}

fn status_keeper(owned: &Owned, volume_revision: Revision) -> StatusKeeper {
    StatusKeeper {
        owner_revision: Cell::new(owned.owner_revision),
        owning_again: Cell::new(false),
        epoch_revision: owned.epoch_revision,
        owner_lease: Cell::new(owned.owner_lease),
        changes: Cell::new(owned.status.0.changes),
        told: Cell::new(0),
        volume_revision: Cell::new(volume_revision),
        status_revision: Cell::new(owned.status.1),
        failed: RefCell::default(),
        refused: RefCell::default(),
        withdrawn: RefCell::default(),
        running: Cell::new(false),
        stale_s: RefCell::new(times_in(&owned.status.0)),
        finished: RefCell::default(),
        distrusted: RefCell::default(),
        pending_since: Cell::new(None),
    }
}

fn placement_of(record: &VolumeRecord, ring: &Ring) -> Result<Placement, VolumeError> {
    check_record(record, ring)?;
    Ok(Placement::new(record.placement, record.width, ring.slices()))
}

/// Which shards hold each slice of the volume, and which of them are in sync.
pub(super) fn replicas_of(record: &VolumeRecord, ring: &Ring, status: &StatusRecord) -> Result<Replicas, VolumeError> {
    let placement = placement_of(record, ring)?;
    let placed = placement.slices().iter().map(|slice| (*slice, ring.replicas(*slice, record.replicas).to_vec()));
    Ok(Replicas::new(placed.collect(), usize::from(record.min_replicas), status))
}

/// Records come from a store that others write to.
fn check_record(record: &VolumeRecord, ring: &Ring) -> Result<(), VolumeError> {
    let (width, slices) = (record.width, ring.slices());
    if !width.is_power_of_two() || width > slices {
        return Err(record_error(format!("volume {} has width {width}, the ring {slices} slices", record.name)));
    }
    let (replicas, most) = (usize::from(record.replicas), ring.replicas_max());
    if replicas == 0 || replicas > most || record.min_replicas == 0 || record.min_replicas > record.replicas {
        let because = format!(
            "volume {} asks for {replicas} replicas, at least {} in sync; the ring has {most} for a slice",
            record.name, record.min_replicas
        );
        return Err(record_error(because));
    }
    Ok(())
}

impl Open {
    fn new(key: &ClusterKey, volume: VolumeId, (epoch, owner): (Epoch, String), ring_slices: u32) -> Self {
        let (token, creation) = (key.sign(volume, epoch, &owner), key.sign(volume, Epoch(0), CREATOR));
        Self { token, owner, creation, ring_slices }
    }
}

fn owner_name(owner: &OwnerRecord) -> String {
    format!("{}/{}/{}", owner.host, owner.pid, owner.lease)
}

async fn shard<R: Runtime>(
    runtime: &R,
    owned: &Owned,
    cluster: &ClusterRecord,
    record: &VolumeRecord,
    id: ShardId,
) -> Result<Shard, VolumeError> {
    let ring = &owned.ring;
    let node =
        ring.node(id.node).ok_or_else(|| record_error(format!("shard {id} is of a node that the ring lacks")))?;
    let (host, address) = place_of(runtime, node.id, id).await?;
    let peer = Peer { cluster: cluster.id, node: node.id, shard: id.shard, address };
    Ok(Shard {
        id,
        peer: RefCell::new(Rc::new(peer)),
        local: host == owned.owner.host,
        generation: Cell::new(ring.instance_generation(id.node, record.generation)),
        incarnation: Cell::new(Incarnation(0)),
        full: Cell::new(false),
        recovering: Cell::new(false),
        restarted: Cell::new(false),
        flush_point_held: Cell::new(None),
        written: Cell::new(0),
        synced: Cell::new(0),
        outstanding: Cell::new(0),
        service_us: Cell::new(0),
    })
}

/// Where the shard listens, as its node last said.
pub(super) async fn address_of<R: Runtime>(runtime: &R, node: NodeId, id: ShardId) -> Result<String, VolumeError> {
    Ok(place_of(runtime, node, id).await?.1)
}

/// Host and address.
async fn place_of<R: Runtime>(runtime: &R, node: NodeId, id: ShardId) -> Result<(String, String), VolumeError> {
    let key = keys::node(node);
    let entry = runtime.metadata().get(&key).await.map_err(metadata_error)?;
    let entry = entry.ok_or_else(|| record_error(format!("{key}, a node of the ring, is missing")))?;
    let record: NodeRecord = decoded(&entry)?;
    let found = record.shards.iter().find(|shard| shard.index == id.shard);
    let found = found.ok_or_else(|| record_error(format!("node {node} has no shard {}", id.shard)))?;
    Ok((record.host.clone(), found.address.clone()))
}

pub(super) fn too_few(below: BelowMinimum) -> VolumeError {
    let because = format!(
        "slice {} has {} replicas in sync, at least {} are needed; bring back the nodes that hold them, or wait until \
         they are filled (`torusadm status` tells how far that is)",
        below.slice, below.remaining, below.min
    );
    VolumeError::NotReady { because }
}

pub(super) async fn open_and_reconcile<R: Runtime>(session: &Rc<Session<R>>) -> Result<(), VolumeError> {
    if let Some(below) = session.replicas.borrow().below_minimum() {
        return Err(too_few(below));
    }
    let asked: Vec<_> =
        (0..session.shards.len()).filter(|shard| session.replicas.borrow().holds_in_sync(*shard)).collect();
    let answers = futures::future::join_all(asked.iter().map(|shard| open_shard(session, *shard))).await;
    let mut flush_point = session.flush_point.get();
    for (shard, answer) in asked.iter().zip(&answers) {
        if let Ok(opened) = answer {
            session.shards[*shard].incarnation.set(opened.incarnation);
            flush_point = flush_point.max(opened.flush_point);
        }
    }
    session.flush_point.set(flush_point);
    check_not_regressed(session, &answers).await?;
    let kept = |answer: &Result<Opened, Failure>| answer.as_ref().is_ok_and(|opened| opened.open_in_previous_epoch);
    let keepers = asked.iter().zip(&answers).filter(|(_, answer)| kept(answer));
    let mut keepers: Vec<_> = keepers.map(|(at, _)| (*at, session.shards[*at].incarnation.get())).collect();
    // Before anything is written by the word of a store that may be wrong.
    for (shard, answer) in asked.iter().zip(&answers) {
        match answer {
            Err(Failure::Refused(Refusal::StaleEpoch { replica })) => {
                return Err(contradicted(session, session.shards[*shard].id, *replica).await);
            }
            Err(Failure::Refused(Refusal::BadToken)) => {
                let because = format!("shard {} has another cluster key", session.shards[*shard].id);
                return Err(VolumeError::NotReady { because });
            }
            _ => {}
        }
    }
    for (shard, answer) in asked.iter().zip(&answers) {
        if let Ok(opened) = answer
            && !opened.missing.is_empty()
        {
            drop_missing(session, *shard, &opened.missing).await?;
        }
    }
    let failed = asked.iter().zip(answers).filter_map(|(shard, answer)| Some((*shard, answer.err()?)));
    lose_all(session, failed.collect()).await?;
    reconcile(session).await?;
    // Those that failed while it was reconciled, or restarted and opened again, may have been the only ones that had something.
    keepers.retain(|(shard, incarnation)| session.shards[*shard].incarnation.get() == *incarnation);
    let keepers: Vec<_> = keepers.into_iter().map(|(shard, _)| shard).collect();
    session.keeps_all.set(every_slice_has_one_of(&session.replicas.borrow(), &keepers));
    // Until they hear of it the shards free nothing.
    session.tell_retention().await
}

fn every_slice_has_one_of(replicas: &Replicas, keepers: &[usize]) -> bool {
    (0..replicas.slot_count()).all(|slot| keepers.iter().any(|shard| replicas.is_in_sync(slot, *shard)))
}

/// All of them or none: were one marked before it turns out that not all can be done without, it would be stale for
/// nothing, and whoever comes next would wait for the other alone.
async fn lose_all<R: Runtime>(
    session: &Rc<Session<R>>,
    failed: Vec<(ShardPosition, Failure)>,
) -> Result<(), VolumeError> {
    let shards = failed.iter().map(|(shard, _)| *shard).collect();
    let without = session.replicas.borrow().clone().lose(&shards, session.flush_point.get());
    without.map_err(|below| {
        let named = failed.iter().map(|(shard, failure)| format!("shard {} ({failure})", session.shards[*shard].id));
        let named = named.collect::<Vec<_>>().join(", ");
        let (slice, remaining, min) = (below.slice, below.remaining, below.min);
        let because = format!(
            "{named} cannot be opened, and without it slice {slice} has {remaining} replicas in sync, at least {min} are \
             needed; bring back the nodes that hold them"
        );
        VolumeError::NotReady { because }
    })?;
    for (shard, failure) in &failed {
        lose(session, *shard, failure).await?;
    }
    Ok(())
}

pub(super) async fn lose<R: Runtime>(
    session: &Rc<Session<R>>,
    shard: usize,
    failure: &Failure,
) -> Result<(), VolumeError> {
    let id = session.shards[shard].id;
    let loss = match verdict(failure) {
        Verdict::Fenced => {
            session.end(format!("shard {id} says: {failure}"));
            return session.check();
        }
        Verdict::Local => {
            let because = format!("this host cannot connect to shard {id}, which may be well: {failure}");
            return Err(VolumeError::NotReady { because });
        }
        Verdict::Lost => Loss::Lost,
        // A repair that cannot reach a replica in sync must not make it stale: clients may reach it.
        _ if session.owner.repair => {
            let because = format!("shard {id}, in sync, cannot be opened from here: {failure}");
            return Err(VolumeError::NotReady { because });
        }
        Verdict::Restarted => Loss::Lost,
        Verdict::Unreachable | Verdict::Busy | Verdict::Full => Loss::Unreachable,
    };
    tracing::warn!(volume = %session.record.name, shard = %id, %failure, "replica failed");
    session.mark_stale(shard, loss).await.map_err(|below| VolumeError::NotReady {
        because: format!(
            "shard {id} does not answer ({failure}), and without it slice {} has {} replicas in sync, at least {} are needed",
            below.slice, below.remaining, below.min
        ),
    })?;
    session.check()
}

/// A node that was just started gets a moment to listen, a disk that failed one to be opened anew; and one answer that
/// is lost, for which as long was waited, is no replica that is.
async fn open_shard<R: Runtime>(session: &Session<R>, shard: usize) -> Result<Opened, Failure> {
    let started = session.runtime.clock().now();
    let mut attempts = 0;
    loop {
        attempts += 1;
        let slices = session.replicas.borrow().slices_in_sync_on(shard);
        let answered = ask_open(session, shard, slices).await;
        let patient = attempts < OPEN_ATTEMPTS_MIN || session.runtime.clock().now().since(started) < LINK_DEAD_AFTER;
        match answered {
            Err(Failure::Link(_) | Failure::Refused(Refusal::Disk { .. })) if patient => {
                session.runtime.clock().sleep(RETRY_AFTER).await;
            }
            answered => return answered,
        }
    }
}

/// A replica that failed while it was asked for what the last writer left may alone have some of that: true if it is open
/// again and is to be asked once more.
pub(super) async fn opens_again<R: Runtime>(
    session: &Rc<Session<R>>,
    shard: usize,
    failure: &Failure,
) -> Result<bool, VolumeError> {
    if !matches!(verdict(failure), Verdict::Unreachable | Verdict::Restarted | Verdict::Busy) {
        return Ok(false);
    }
    let Ok(opened) = open_shard(session, shard).await else { return Ok(false) };
    tracing::info!(volume = %session.record.name, shard = %session.shards[shard].id, %failure, "asked once more");
    session.shards[shard].incarnation.set(opened.incarnation);
    session.flush_point.set(session.flush_point.get().max(opened.flush_point));
    if !opened.missing.is_empty() {
        drop_missing(session, shard, &opened.missing).await?;
    }
    Ok(true)
}

pub(super) async fn ask_open<R: Runtime>(
    session: &Session<R>,
    shard: usize,
    slices: Vec<SliceId>,
) -> Result<Opened, Failure> {
    let Open { token, owner, .. } = &session.open;
    let operation = Operation::Open { token: *token, owner: owner.clone(), slices };
    match session.ask(&session.shards[shard], &operation, &Bytes::new()).await?.0 {
        Answer::Opened(opened) => Ok(opened),
        other => {
            let because = format!("an open was answered by {other:?}");
            Err(Failure::Refused(Refusal::Malformed { because }))
        }
    }
}

/// Interleaving 14: a shard that knows nothing of a slice must not count as having it.
async fn drop_missing<R: Runtime>(
    session: &Rc<Session<R>>,
    shard: usize,
    missing: &[SliceId],
) -> Result<(), VolumeError> {
    let mut next = session.replicas.borrow().clone();
    next.find_missing(shard, missing).map_err(|below| VolumeError::NotReady {
        because: format!(
            "shard {} has lost its data, and no other replica of slice {} is in sync",
            session.shards[shard].id, below.slice
        ),
    })?;
    super::marking::replace(session, next).await;
    session.check()?;
    // It is listed now, so that those that are left can fill it.
    session.replicas.borrow().below_minimum().map_or(Ok(()), |below| Err(too_few(below)))
}
