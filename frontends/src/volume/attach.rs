//! Becoming the writer of a volume: own it in one transaction, open it on every in-sync replica, reconcile what the
//! last writer left unflushed, and only then serve (protocol rules 2 to 4).

use super::lease::ProcessLease;
use super::links::Links;
use super::reconcile::reconcile;
use super::replicas::Replicas;
use super::session::{Failure, Session, Shard};
use super::status::StatusKeeper;
use super::window::Window;
use crate::device::VolumeError;
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use torus_rpc::message::{Answer, Opened, Operation, Refusal};
use torus_rpc::metadata::{Compare, Entry, Metadata, MetadataError, Revision, Transaction, Write};
use torus_rpc::runtime::{Class, Clock, Peer, Random, Runtime, Spawn};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{Epoch, Incarnation, SliceId, Version, VolumeId};
use torus_schema::limits::{LEASE_DRIFT, LINK_DEAD_AFTER, OWNER_LEASE_TTL};
use torus_schema::records::{
    ClusterRecord, EpochRecord, NameRecord, NodeRecord, OwnerRecord, StatusRecord, VolumeRecord, VolumeState, decode,
    encode, keys,
};
use torus_schema::ring::placement::Placement;
use torus_schema::ring::record::RingRecord;
use torus_schema::ring::table::Ring;

const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Who attaches, as others will read it.
#[derive(Clone, Debug)]
pub struct Attacher {
    pub host: String,
    pub process: String,
    pub pid: u32,
    /// Take the volume over from a live owner.
    pub force: bool,
}

pub(super) fn metadata_error(error: MetadataError) -> VolumeError {
    VolumeError::Metadata { because: error.to_string() }
}

fn record_error(error: impl std::fmt::Display) -> VolumeError {
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
    runtime: R,
    links: Rc<Links<R>>,
    lease: Rc<ProcessLease<R>>,
    name: &str,
    attacher: &Attacher,
) -> Result<Rc<Session<R>>, VolumeError> {
    let volume = find(&runtime, name).await?;
    let owned = own(&runtime, &lease, volume, name, attacher).await?;
    let epoch = owned.epoch;
    tracing::info!(volume = name, %epoch, "attached; opening its replicas");
    let session = match prepare(runtime.clone(), links, lease, owned).await {
        Ok((session, open)) => match open_and_reconcile(&session, &open).await {
            Ok(()) => Ok(session),
            Err(error) => {
                session.end(format!("attach failed: {error}"));
                Err((error, session.status.owner_revision.get()))
            }
        },
        Err(failed) => Err(failed),
    };
    match session {
        Ok(session) => {
            runtime.spawn().spawn(Class::Foreground, keep_owning(session.clone()));
            Ok(session)
        }
        Err((error, owner)) => {
            give_up(&runtime, volume, owner).await;
            Err(error)
        }
    }
}

/// The owner key goes only if it is still the one created by `owner`.
pub(super) async fn give_up<R: Runtime>(runtime: &R, volume: VolumeId, owner: Revision) {
    let key = keys::owner(volume);
    let transaction = Transaction {
        compares: vec![Compare::CreateRevision(key.clone(), owner)],
        writes: vec![Write::Delete { key }],
        reads: vec![],
    };
    if let Err(error) = runtime.metadata().transact(transaction).await {
        tracing::warn!(%volume, %error, "the volume stays owned until this process's lease ends");
    }
}

/// Everything read in the transaction that made us the owner.
struct Owned {
    epoch: Epoch,
    owner: OwnerRecord,
    owner_revision: Revision,
    owner_lease: u64,
    volume: (VolumeRecord, Revision),
    status: (StatusRecord, Option<Revision>),
    ring: Ring,
    /// As the metadata store has it: a lower bound.
    flush_point: Version,
}

fn decoded<T: serde::de::DeserializeOwned>(entry: &Entry) -> Result<T, VolumeError> {
    decode(&entry.key, &entry.value).map_err(record_error)
}

async fn own<R: Runtime>(
    runtime: &R,
    lease: &Rc<ProcessLease<R>>,
    volume: VolumeId,
    name: &str,
    attacher: &Attacher,
) -> Result<Owned, VolumeError> {
    let mut forced = false;
    loop {
        let epoch_key = keys::epoch(volume);
        let before = runtime.metadata().get(&epoch_key).await.map_err(metadata_error)?;
        let record: EpochRecord = before.as_ref().map(decoded).transpose()?.unwrap_or_default();
        let next = Epoch(record.epoch.0 + 1);
        let owner = OwnerRecord {
            host: attacher.host.clone(),
            process: attacher.process.clone(),
            pid: attacher.pid,
            epoch: next,
            lease: lease.id().0.to_string(),
            attached_s: unix_seconds(),
        };
        let owner_lease = lease.generation();
        let transaction = attach_transaction(volume, before.as_ref(), record, &owner, lease.id());
        let result = match runtime.metadata().transact(transaction).await {
            Ok(result) => result,
            // Known only by looking again: an owner with our lease and this epoch is ourselves.
            Err(MetadataError::Unknown { .. }) => look(runtime, volume).await?,
            Err(error) => return Err(metadata_error(error)),
        };
        let [owner_entry, volume_entry, status_entry, ring_entry, _] = &result.reads[..] else {
            unreachable!("as many reads are answered as were asked for");
        };
        let Some(volume_entry) = volume_entry else {
            return Err(VolumeError::NotFound { name: name.to_string() });
        };
        match owner_entry {
            Some(entry) if decoded::<OwnerRecord>(entry)? == owner => {
                let ring = ring_entry.as_ref().ok_or_else(|| record_error("there is no ring"))?;
                return Ok(Owned {
                    epoch: next,
                    owner,
                    owner_revision: entry.create_revision,
                    owner_lease,
                    volume: (decoded(volume_entry)?, volume_entry.mod_revision),
                    status: status_of(status_entry.as_ref())?,
                    ring: Ring::from_record(decoded::<RingRecord>(ring)?).map_err(record_error)?,
                    flush_point: record.flush_point.into(),
                });
            }
            Some(entry) => {
                let other: OwnerRecord = decoded(entry)?;
                if other.lease == owner.lease {
                    // An earlier attempt of this process whose outcome was unknown then.
                    give_up(runtime, volume, entry.create_revision).await;
                    continue;
                }
                if !attacher.force || forced {
                    return Err(attached_by(name, &other));
                }
                take_over(runtime, volume, &other).await?;
                forced = true;
            }
            // Somebody attached and left in between.
            None => {}
        }
    }
}

fn status_of(entry: Option<&Entry>) -> Result<(StatusRecord, Option<Revision>), VolumeError> {
    let status = entry.map(decoded).transpose()?.unwrap_or_default();
    Ok((status, entry.map(|entry| entry.mod_revision)))
}

fn attached_by(name: &str, owner: &OwnerRecord) -> VolumeError {
    let age_s = unix_seconds().saturating_sub(owner.attached_s);
    let owner = format!("{} (pid {}) on {} since {age_s} s", owner.process, owner.pid, owner.host);
    VolumeError::Attached { name: name.to_string(), owner }
}

/// Owner absent → epoch + 1 and own the key; status and ring are read in the same transaction (interleaving 13).
fn attach_transaction(
    volume: VolumeId,
    before: Option<&Entry>,
    record: EpochRecord,
    owner: &OwnerRecord,
    lease: torus_rpc::metadata::LeaseId,
) -> Transaction {
    let epoch_key = keys::epoch(volume);
    let unchanged = match before {
        Some(entry) => Compare::ModRevision(epoch_key.clone(), entry.mod_revision),
        None => Compare::Absent(epoch_key.clone()),
    };
    let next = EpochRecord { epoch: owner.epoch, flush_point: record.flush_point };
    Transaction {
        compares: vec![
            Compare::Absent(keys::owner(volume)),
            Compare::Present(keys::volume(volume)),
            Compare::Absent(keys::deleting(volume)),
            unchanged,
        ],
        writes: vec![
            Write::Put { key: epoch_key.clone(), value: encode(&next), lease: None },
            Write::Put { key: keys::owner(volume), value: encode(owner), lease: Some(lease) },
        ],
        reads: attach_reads(volume),
    }
}

fn attach_reads(volume: VolumeId) -> Vec<String> {
    vec![keys::owner(volume), keys::volume(volume), keys::status(volume), keys::ring(), keys::epoch(volume)]
}

async fn look<R: Runtime>(
    runtime: &R,
    volume: VolumeId,
) -> Result<torus_rpc::metadata::TransactionResult, VolumeError> {
    let transaction = Transaction { reads: attach_reads(volume), ..Transaction::default() };
    runtime.metadata().transact(transaction).await.map_err(metadata_error)
}

/// Rule 2: the epoch moves first, so that the old owner cannot take its key again when its lease is revoked; then its
/// reads are waited out.
async fn take_over<R: Runtime>(runtime: &R, volume: VolumeId, owner: &OwnerRecord) -> Result<(), VolumeError> {
    let key = keys::epoch(volume);
    let entry = runtime.metadata().get(&key).await.map_err(metadata_error)?;
    let entry = entry.ok_or_else(|| record_error(format!("{key} is missing although the volume is owned")))?;
    let record: EpochRecord = decoded(&entry)?;
    let next = EpochRecord { epoch: Epoch(record.epoch.0 + 1), flush_point: record.flush_point };
    let transaction = Transaction {
        compares: vec![Compare::ModRevision(key.clone(), entry.mod_revision)],
        writes: vec![Write::Put { key, value: encode(&next), lease: None }, Write::Delete { key: keys::owner(volume) }],
        reads: vec![],
    };
    let result = runtime.metadata().transact(transaction).await.map_err(metadata_error)?;
    if !result.applied {
        return Ok(());
    }
    if let Ok(lease) = owner.lease.parse() {
        let lease = torus_rpc::metadata::LeaseId(lease);
        runtime.metadata().revoke_lease(lease).await.map_err(metadata_error)?;
    }
    tracing::warn!(host = %owner.host, process = %owner.process, pid = owner.pid,
        wait_ms = (OWNER_LEASE_TTL + LEASE_DRIFT).as_millis() as u64, "taking the volume over");
    runtime.clock().sleep(OWNER_LEASE_TTL + LEASE_DRIFT).await;
    Ok(())
}

/// How each shard is asked to open.
struct Open {
    token: torus_rpc::message::Token,
    owner: String,
}

type Prepared<R> = (Rc<Session<R>>, Open);

async fn prepare<R: Runtime>(
    runtime: R,
    links: Rc<Links<R>>,
    lease: Rc<ProcessLease<R>>,
    owned: Owned,
) -> Result<Prepared<R>, (VolumeError, Revision)> {
    let owner_revision = owned.owner_revision;
    build(runtime, links, lease, owned).await.map_err(|error| (error, owner_revision))
}

async fn build<R: Runtime>(
    runtime: R,
    links: Rc<Links<R>>,
    lease: Rc<ProcessLease<R>>,
    owned: Owned,
) -> Result<Prepared<R>, VolumeError> {
    let (record, volume_revision) = owned.volume;
    if record.state != VolumeState::Ready {
        let because = "its creation was not finished; delete it and create it again".to_string();
        return Err(VolumeError::NotReady { because });
    }
    let cluster_key = keys::cluster();
    let cluster = runtime.metadata().get(&cluster_key).await.map_err(metadata_error)?;
    let cluster: ClusterRecord =
        decoded(&cluster.ok_or_else(|| record_error("there is no cluster; `torusadm init` makes one"))?)?;
    let key = ClusterKey::from_hex(&cluster.key).map_err(record_error)?;
    check_record(&record, &owned.ring)?;
    let placement = Placement::new(record.placement, record.width, owned.ring.slices());
    let placed = placement.slices().iter().map(|slice| (*slice, owned.ring.replicas(*slice, record.replicas).to_vec()));
    let replicas = Replicas::new(placed.collect(), usize::from(record.min_replicas), &owned.status.0);
    let mut shards = Vec::new();
    for id in replicas.shards() {
        shards.push(shard(&runtime, &owned.ring, &cluster, *id).await?);
    }
    let open =
        Open { token: key.sign(record.id, owned.epoch, &owner_name(&owned.owner)), owner: owner_name(&owned.owner) };
    let session = Session {
        lots: Cell::new(runtime.random().u64() | 1),
        runtime,
        links,
        lease,
        record,
        owner: owned.owner,
        epoch: owned.epoch,
        placement,
        shards,
        replicas: RefCell::new(replicas),
        status: StatusKeeper {
            owner_revision: Cell::new(owned.owner_revision),
            owner_lease: Cell::new(owned.owner_lease),
            volume_revision,
            status_revision: Cell::new(owned.status.1),
            failed: RefCell::default(),
            refused: RefCell::default(),
            running: Cell::new(false),
        },
        window: RefCell::new(Window::default()),
        locks: Default::default(),
        flush_point: Cell::new(owned.flush_point),
        unflushed_bytes: Cell::new(0),
        ended: RefCell::default(),
        changed: Default::default(),
    };
    Ok((Rc::new(session), open))
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

fn owner_name(owner: &OwnerRecord) -> String {
    format!("{}/{}/{}", owner.host, owner.pid, owner.lease)
}

async fn shard<R: Runtime>(
    runtime: &R,
    ring: &Ring,
    cluster: &ClusterRecord,
    id: torus_schema::ids::ShardId,
) -> Result<Shard, VolumeError> {
    let node =
        ring.node(id.node).ok_or_else(|| record_error(format!("shard {id} is of a node that the ring lacks")))?;
    let key = keys::node(node.id);
    let entry = runtime.metadata().get(&key).await.map_err(metadata_error)?;
    let entry = entry.ok_or_else(|| record_error(format!("{key}, a node of the ring, is missing")))?;
    let record: NodeRecord = decoded(&entry)?;
    let found = record.shards.iter().find(|shard| shard.index == id.shard);
    let found = found.ok_or_else(|| record_error(format!("node {} has no shard {}", node.id, id.shard)))?;
    let peer = Peer { cluster: cluster.id, node: node.id, shard: id.shard, address: found.address.clone() };
    Ok(Shard {
        id,
        peer,
        incarnation: Cell::new(Incarnation(0)),
        full: Cell::new(false),
        suspect: Cell::new(false),
        written: Cell::new(0),
        synced: Cell::new(0),
        outstanding: Cell::new(0),
        service_us: Cell::new(0),
    })
}

async fn open_and_reconcile<R: Runtime>(session: &Rc<Session<R>>, open: &Open) -> Result<(), VolumeError> {
    if let Some(below) = session.replicas.borrow().below_minimum() {
        let because = format!(
            "slice {} has {} replicas in sync, at least {} are needed; bring back the nodes that hold them",
            below.slice, below.remaining, below.min
        );
        return Err(VolumeError::NotReady { because });
    }
    let asked: Vec<_> =
        (0..session.shards.len()).filter(|shard| session.replicas.borrow().holds_in_sync(*shard)).collect();
    let answers = futures::future::join_all(asked.iter().map(|shard| open_shard(session, *shard, open))).await;
    let mut flush_point = session.flush_point.get();
    for (shard, answer) in asked.iter().zip(&answers) {
        if let Ok(opened) = answer {
            session.shards[*shard].incarnation.set(opened.incarnation);
            flush_point = flush_point.max(opened.flush_point);
        }
    }
    session.flush_point.set(flush_point);
    for (shard, answer) in asked.iter().zip(answers) {
        match answer {
            Ok(opened) if opened.missing.is_empty() => {}
            Ok(opened) => drop_missing(session, *shard, &opened.missing).await?,
            Err(Failure::Refused(Refusal::StaleEpoch { replica })) => {
                let because = format!(
                    "shard {} knows epoch {replica}, the metadata store gave {}: another writer attached since, or the \
                     store was restored from an older backup",
                    session.shards[*shard].id, session.epoch
                );
                return Err(VolumeError::NotReady { because });
            }
            Err(Failure::Refused(Refusal::BadToken)) => {
                let because = format!("shard {} has another cluster key", session.shards[*shard].id);
                return Err(VolumeError::NotReady { because });
            }
            Err(failure) => lose(session, *shard, &failure).await?,
        }
    }
    reconcile(session).await
}

pub(super) async fn lose<R: Runtime>(
    session: &Rc<Session<R>>,
    shard: usize,
    failure: &Failure,
) -> Result<(), VolumeError> {
    session.mark_stale(shard, failure).await.map_err(|below| VolumeError::NotReady {
        because: format!(
            "shard {} does not answer ({failure}), and without it slice {} has {} replicas in sync, at least {} are needed",
            session.shards[shard].id, below.slice, below.remaining, below.min
        ),
    })?;
    session.check()
}

/// A node that was just started gets a moment to listen.
async fn open_shard<R: Runtime>(session: &Session<R>, shard: usize, open: &Open) -> Result<Opened, Failure> {
    let slices = session.replicas.borrow().slices_in_sync_on(shard);
    let operation = Operation::Open { token: open.token, owner: open.owner.clone(), slices };
    let started = session.runtime.clock().now();
    loop {
        match session.ask(&session.shards[shard], &operation, &Bytes::new()).await {
            Ok((Answer::Opened(opened), _)) => return Ok(opened),
            Ok((other, _)) => {
                let because = format!("an open was answered by {other:?}");
                return Err(Failure::Refused(Refusal::Malformed { because }));
            }
            Err(Failure::Link(_)) if session.runtime.clock().now().since(started) < LINK_DEAD_AFTER => {
                session.runtime.clock().sleep(RETRY_AFTER).await;
            }
            Err(failure) => return Err(failure),
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
    next.lose_slices(shard, missing).map_err(|below| VolumeError::NotReady {
        because: format!(
            "shard {} has lost its data; without it slice {} has {} replicas in sync, at least {} are needed",
            session.shards[shard].id, below.slice, below.remaining, below.min
        ),
    })?;
    super::status::replace(session, next).await;
    session.check()
}

/// Rule 2: when the lease was lost, the key is taken again if nobody attached meanwhile; otherwise the session ends.
async fn keep_owning<R: Runtime>(session: Rc<Session<R>>) {
    loop {
        let lost = session.status.owner_lease.get();
        let session_ended = session.changed.until(|| session.ended.borrow().is_some().then_some(()));
        let replaced = session.lease.replaced(lost);
        futures::pin_mut!(session_ended, replaced);
        match futures::future::select(session_ended, replaced).await {
            futures::future::Either::Left(_) => return,
            futures::future::Either::Right(_) => own_again(&session).await,
        }
    }
}

async fn own_again<R: Runtime>(session: &Rc<Session<R>>) {
    let volume = session.record.id;
    while session.ended.borrow().is_none() {
        let generation = session.lease.generation();
        match try_own_again(session, volume).await {
            Ok(Some(owner_revision)) => {
                tracing::warn!(volume = %session.record.name, epoch = %session.epoch, "owned again under another lease");
                session.status.owner_revision.set(owner_revision);
                session.status.owner_lease.set(generation);
                return;
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(volume = %session.record.name, %error, "cannot own the volume again yet"),
        }
        session.runtime.clock().sleep(RETRY_AFTER).await;
    }
}

async fn try_own_again<R: Runtime>(
    session: &Rc<Session<R>>,
    volume: VolumeId,
) -> Result<Option<Revision>, VolumeError> {
    let lease = session.lease.id();
    let (epoch_key, owner_key) = (keys::epoch(volume), keys::owner(volume));
    let reads = vec![epoch_key.clone(), owner_key.clone()];
    let now = session.runtime.metadata().transact(Transaction { reads, ..Transaction::default() }).await;
    let now = now.map_err(metadata_error)?;
    let Some(epoch_entry) = &now.reads[0] else {
        session.end("the volume's epoch is gone from the metadata store".to_string());
        return Ok(None);
    };
    let record: EpochRecord = decoded(epoch_entry)?;
    if record.epoch != session.epoch {
        session.end(format!("another writer attached the volume: epoch {}, ours {}", record.epoch, session.epoch));
        return Ok(None);
    }
    if let Some(entry) = &now.reads[1] {
        let owner: OwnerRecord = decoded(entry)?;
        // Ours, by a transaction whose outcome was unknown; or not yet gone with its lease.
        return Ok((owner.lease == lease.0.to_string()).then_some(entry.create_revision));
    }
    let owner = OwnerRecord { lease: lease.0.to_string(), ..session.owner.clone() };
    let transaction = Transaction {
        compares: vec![Compare::Absent(owner_key.clone()), Compare::ModRevision(epoch_key, epoch_entry.mod_revision)],
        writes: vec![Write::Put { key: owner_key.clone(), value: encode(&owner), lease: Some(lease) }],
        reads: vec![],
    };
    let result = session.runtime.metadata().transact(transaction).await.map_err(metadata_error)?;
    Ok(result.applied.then_some(result.revision))
}

/// Only for people to read, in records; nothing is decided by it.
fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
