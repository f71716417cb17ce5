//! Owning a volume in the metadata store: taking it in one transaction, by force if asked to, keeping it, and giving
//! it up (protocol rule 2).

use super::attach::{Attacher, decoded, metadata_error, record_error, replicas_of, too_few};
use super::lease::ProcessLease;
use super::regress::refuse_regressed;
use super::replicas::BelowMinimum;
use super::session::Session;
use super::wanted::{want, want_no_more};
use crate::device::VolumeError;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::metadata::{Compare, Entry, LeaseId, Metadata, MetadataError, Revision, Transaction, Write};
use torus_rpc::runtime::{Clock, Instant, Runtime};
use torus_schema::ids::{Epoch, Version, VolumeId};
use torus_schema::limits::REPAIR_LETS_GO_WITHIN;
use torus_schema::records::{EpochRecord, OwnerRecord, StatusRecord, VolumeRecord, encode, keys};
use torus_schema::ring::record::RingRecord;
use torus_schema::ring::table::Ring;

const RETRY_AFTER: Duration = Duration::from_millis(100);

/// Everything read in the transaction that made us the owner.
pub(super) struct Owned {
    pub epoch: Epoch,
    pub owner: OwnerRecord,
    pub owner_revision: Revision,
    pub epoch_revision: Revision,
    pub owner_lease: u64,
    pub volume: (VolumeRecord, Revision),
    pub status: (StatusRecord, Option<Revision>),
    pub ring: Ring,
    /// As the metadata store has it: a lower bound.
    pub flush_point: Version,
}

pub(super) async fn own<R: Runtime>(
    runtime: &R,
    lease: &Rc<ProcessLease<R>>,
    volume: VolumeId,
    name: &str,
    attacher: &Attacher,
) -> Result<Owned, VolumeError> {
    let mut wanting = None;
    let owned = own_in_turn(runtime, lease, volume, name, attacher, &mut wanting).await;
    if wanting.is_some() {
        want_no_more(runtime, volume).await;
    }
    owned
}

/// `wanting`: since when we wait for a repair to let go.
async fn own_in_turn<R: Runtime>(
    runtime: &R,
    lease: &Rc<ProcessLease<R>>,
    volume: VolumeId,
    name: &str,
    attacher: &Attacher,
    wanting: &mut Option<Instant>,
) -> Result<Owned, VolumeError> {
    let mut forced = false;
    let mut waited_for = None;
    loop {
        let epoch = epoch_of(runtime, volume).await?;
        let unowned = runtime.metadata().get(&keys::owner(volume)).await.map_err(metadata_error)?.is_none();
        refuse_regressed(name, &epoch.record)?;
        // Nobody can be served before a repair has got on; interrupted by each attempt it never would.
        if !attacher.repair
            && let Some(below) = too_few_in(&look(runtime, volume).await?.reads)?
        {
            return Err(too_few(below));
        }
        let wait_ms = epoch.record.wait_out_ms;
        if wait_ms > 0 && waited_for != Some(epoch.record.epoch) && unowned {
            tracing::warn!(name, wait_ms, "waiting out the last owner");
            // Its reads are valid by its own clock until then.
            runtime.clock().sleep(Duration::from_millis(wait_ms)).await;
            waited_for = Some(epoch.record.epoch);
            continue;
        }
        let may_own = wait_ms == 0 || waited_for == Some(epoch.record.epoch);
        match try_own(runtime, lease, volume, name, attacher, &epoch, may_own).await? {
            Attempt::Owned(owned) => return Ok(*owned),
            Attempt::Again => {}
            // It serves nobody, so nobody has to be asked; one that hangs is taken over.
            Attempt::Other(entry) if !attacher.repair && !forced && decoded::<OwnerRecord>(&entry)?.repair => {
                let now = runtime.clock().now();
                let theirs = Duration::from_millis(decoded::<OwnerRecord>(&entry)?.lease_ttl_ms);
                if now.since(*wanting.get_or_insert(now)) > theirs + REPAIR_LETS_GO_WITHIN {
                    take_over(runtime, lease, volume, &entry).await?;
                    forced = true;
                } else {
                    want(runtime, lease, volume, attacher).await?;
                    runtime.clock().sleep(RETRY_AFTER).await;
                }
            }
            Attempt::Other(entry) if attacher.force && !forced => {
                take_over(runtime, lease, volume, &entry).await?;
                forced = true;
            }
            Attempt::Other(entry) => return Err(attached_by(runtime, name, &decoded(&entry)?)),
        }
    }
}

/// The epoch as it stands, and the entry it stands in, if there is one.
struct EpochNow {
    record: EpochRecord,
    revision: Option<Revision>,
}

async fn epoch_of<R: Runtime>(runtime: &R, volume: VolumeId) -> Result<EpochNow, VolumeError> {
    let entry = runtime.metadata().get(&keys::epoch(volume)).await.map_err(metadata_error)?;
    let record = entry.as_ref().map(decoded).transpose()?.unwrap_or_default();
    Ok(EpochNow { record, revision: entry.map(|entry| entry.mod_revision) })
}

enum Attempt {
    Owned(Box<Owned>),
    /// Somebody attached and left in between, or what stood there was ours.
    Again,
    Other(Entry),
}

async fn try_own<R: Runtime>(
    runtime: &R,
    lease: &Rc<ProcessLease<R>>,
    volume: VolumeId,
    name: &str,
    attacher: &Attacher,
    epoch: &EpochNow,
    may_own: bool,
) -> Result<Attempt, VolumeError> {
    let owner = OwnerRecord {
        host: attacher.host.clone(),
        process: attacher.process.clone(),
        pid: attacher.pid,
        epoch: Epoch(epoch.record.epoch.0 + 1),
        lease: lease.id().0.to_string(),
        attached_s: runtime.clock().unix_seconds(),
        lease_ttl_ms: lease.terms().ttl().as_millis() as u64,
        clock_drift_ms: lease.terms().drift().as_millis() as u64,
        repair: attacher.repair,
    };
    let owner_lease = lease.generation();
    let transaction = match may_own {
        true => attach_transaction(volume, epoch, &owner, lease.id()),
        false => Transaction { reads: attach_reads(volume), ..Transaction::default() },
    };
    let result = match runtime.metadata().transact(transaction).await {
        Ok(result) => result,
        // Known only by looking again: an owner with our lease and this epoch is ourselves.
        Err(MetadataError::Unknown { .. }) => look(runtime, volume).await?,
        Err(error) => return Err(metadata_error(error)),
    };
    let Some(entry) = &result.reads[0] else {
        if result.reads[1].is_none() {
            return Err(VolumeError::NotFound { name: name.to_string() });
        }
        return Ok(Attempt::Again);
    };
    let found: OwnerRecord = decoded(entry)?;
    if found != owner {
        if found.lease != owner.lease {
            return Ok(Attempt::Other(entry.clone()));
        }
        // An earlier attempt of this process whose outcome was unknown then.
        give_up(runtime, volume, entry.create_revision).await;
        return Ok(Attempt::Again);
    }
    match owned(owner, owner_lease, epoch, &result.reads) {
        Ok(owned) => Ok(Attempt::Owned(Box::new(owned))),
        Err(error) => {
            give_up(runtime, volume, entry.create_revision).await;
            Err(error)
        }
    }
}

/// What was read in the transaction that made `owner` the owner.
fn owned(
    owner: OwnerRecord,
    owner_lease: u64,
    epoch: &EpochNow,
    reads: &[Option<Entry>],
) -> Result<Owned, VolumeError> {
    let [Some(owner_entry), Some(volume), status, Some(ring), Some(epoch_entry)] = reads else {
        return Err(record_error("the volume's record, the ring or the epoch is missing"));
    };
    Ok(Owned {
        epoch: owner.epoch,
        owner,
        owner_revision: owner_entry.create_revision,
        owner_lease,
        epoch_revision: epoch_entry.mod_revision,
        volume: (decoded(volume)?, volume.mod_revision),
        status: status_of(status.as_ref())?,
        ring: Ring::from_record(decoded::<RingRecord>(ring)?).map_err(record_error)?,
        flush_point: epoch.record.flush_point.into(),
    })
}

/// In what `attach_reads` names.
fn too_few_in(reads: &[Option<Entry>]) -> Result<Option<BelowMinimum>, VolumeError> {
    let [_, Some(volume), status, Some(ring), _] = reads else { return Ok(None) };
    let ring = Ring::from_record(decoded::<RingRecord>(ring)?).map_err(record_error)?;
    Ok(replicas_of(&decoded(volume)?, &ring, &status_of(status.as_ref())?.0)?.below_minimum())
}

fn status_of(entry: Option<&Entry>) -> Result<(StatusRecord, Option<Revision>), VolumeError> {
    let status = entry.map(decoded).transpose()?.unwrap_or_default();
    Ok((status, entry.map(|entry| entry.mod_revision)))
}

fn attached_by<R: Runtime>(runtime: &R, name: &str, owner: &OwnerRecord) -> VolumeError {
    let age_s = runtime.clock().unix_seconds().saturating_sub(owner.attached_s);
    let owner = format!("{} (pid {}) on {} since {age_s} s", owner.process, owner.pid, owner.host);
    VolumeError::Attached { name: name.to_string(), owner }
}

/// Owner absent → epoch + 1 and own the key; status and ring are read in the same transaction (interleaving 13).
fn attach_transaction(volume: VolumeId, epoch: &EpochNow, owner: &OwnerRecord, lease: LeaseId) -> Transaction {
    let epoch_key = keys::epoch(volume);
    let unchanged = match epoch.revision {
        Some(revision) => Compare::ModRevision(epoch_key.clone(), revision),
        None => Compare::Absent(epoch_key.clone()),
    };
    let next = EpochRecord { epoch: owner.epoch, wait_out_ms: 0, ..epoch.record };
    Transaction {
        compares: vec![
            Compare::Absent(keys::owner(volume)),
            Compare::Present(keys::volume(volume)),
            Compare::Absent(keys::deleting(volume)),
            unchanged,
        ],
        writes: vec![
            Write::Put { key: epoch_key, value: encode(&next), lease: None },
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

/// Rule 2: the epoch moves first, so that the old owner cannot take its key again when its lease is revoked. The key
/// goes with the lease: as long as the old owner may read, nobody can attach. `wait_out_ms` makes whoever is next wait
/// for what it may still read by the clock, also if we do not live to.
async fn take_over<R: Runtime>(
    runtime: &R,
    lease: &ProcessLease<R>,
    volume: VolumeId,
    seen: &Entry,
) -> Result<(), VolumeError> {
    let owner: OwnerRecord = decoded(seen)?;
    let key = keys::epoch(volume);
    let entry = runtime.metadata().get(&key).await.map_err(metadata_error)?;
    let entry = entry.ok_or_else(|| record_error(format!("{key} is missing although the volume is owned")))?;
    let record: EpochRecord = decoded(&entry)?;
    // One that was forced out before it, and not waited for yet, may still read too.
    let wait_out_ms = record.wait_out_ms.max(lease.terms().wait_out(&owner).as_millis() as u64);
    let next = EpochRecord { epoch: Epoch(record.epoch.0 + 1), wait_out_ms, ..record };
    let transaction = Transaction {
        compares: vec![
            Compare::ModRevision(key.clone(), entry.mod_revision),
            Compare::CreateRevision(keys::owner(volume), seen.create_revision),
        ],
        writes: vec![Write::Put { key, value: encode(&next), lease: None }],
        reads: vec![],
    };
    let result = runtime.metadata().transact(transaction).await.map_err(metadata_error)?;
    if result.applied
        && let Ok(lease) = owner.lease.parse()
    {
        tracing::warn!(host = %owner.host, process = %owner.process, pid = owner.pid, "taking the volume over");
        runtime.metadata().revoke_lease(LeaseId(lease)).await.map_err(metadata_error)?;
    }
    Ok(())
}

/// Rule 2: when the lease was lost, the key is taken again if nobody attached meanwhile; otherwise the session ends.
pub(super) async fn keep_owning<R: Runtime>(session: Rc<Session<R>>) {
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

pub(super) async fn own_again<R: Runtime>(session: &Rc<Session<R>>) {
    if session.status.owning_again.replace(true) {
        // Somebody is at it; the caller looks again.
        return session.runtime.clock().sleep(RETRY_AFTER).await;
    }
    let volume = session.record.id;
    while session.ended.borrow().is_none() {
        let generation = session.lease.generation();
        match try_own_again(session, volume).await {
            Ok(Some(owner_revision)) => {
                tracing::warn!(volume = %session.record.name, epoch = %session.epoch, "owned again under another lease");
                session.status.owner_revision.set(owner_revision);
                session.status.owner_lease.set(generation);
                if session.ended.borrow().is_some() {
                    // It was released while this was under way.
                    give_up(&session.runtime, volume, owner_revision).await;
                }
                break;
            }
            Ok(None) => {}
            Err(error) => tracing::warn!(volume = %session.record.name, %error, "cannot own the volume again yet"),
        }
        session.runtime.clock().sleep(RETRY_AFTER).await;
    }
    session.status.owning_again.set(false);
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
    if record.epoch < session.epoch {
        session.end(format!(
            "the metadata store knows epoch {} of the volume and gave us {}: it was restored from an older backup",
            record.epoch, session.epoch
        ));
        return Ok(None);
    }
    if record.epoch != session.epoch {
        session.end(format!("another writer attached the volume: epoch {}, ours {}", record.epoch, session.epoch));
        return Ok(None);
    }
    if let Some(entry) = &now.reads[1] {
        let owner: OwnerRecord = decoded(entry)?;
        let is_ours = OwnerRecord { lease: session.owner.lease.clone(), ..owner.clone() } == session.owner;
        if !is_ours {
            session.end(format!("{} on {} owns the volume in our epoch", owner.process, owner.host));
            return Ok(None);
        }
        // By a transaction whose outcome was unknown; or not yet gone with its lease.
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
