//! A metadata store that was restored from an older backup: its epochs, and what it says of replicas, are those of then
//! (interleaving 27). Replicas remember more: the highest epoch, and how often the status had changed. A volume on
//! which they contradict the store is not attached, and that is written down: otherwise every attempt would raise the
//! epoch by one, until it is as high as the replicas' and the old status is believed.

use super::attach::{decoded, metadata_error, record_error};
use super::session::{Failure, Session};
use crate::device::VolumeError;
use torus_rpc::message::Opened;
use torus_rpc::metadata::{Compare, Metadata, Transaction, Write};
use torus_rpc::runtime::Runtime;
use torus_schema::ids::{Epoch, ShardId};
use torus_schema::records::{EpochRecord, RegressedRecord, encode, keys};

pub(super) fn refuse_regressed(name: &str, record: &EpochRecord) -> Result<(), VolumeError> {
    match record.regressed {
        Some(known) => Err(VolumeError::NotReady { because: advice(name, record.epoch, known) }),
        None => Ok(()),
    }
}

fn advice(name: &str, found: Epoch, known: RegressedRecord) -> String {
    let RegressedRecord { epoch, status_changes } = known;
    format!(
        "the metadata store is older than the volume's replicas (epoch {found} there; a replica knows epoch {epoch} and \
         {status_changes} changes of the status): it was restored from a backup, and does not know which replicas are \
         current. Restore a newer state of it if there is one; otherwise choose the replica to go on from: `torusadm why \
         {name} 0` shows what each has, `torusadm volume promote {name} NODE` goes on from one"
    )
}

/// What the replicas heard of changes of the status, against what the store has.
pub(super) async fn check_not_regressed<R: Runtime>(
    session: &Session<R>,
    answers: &[Result<Opened, Failure>],
) -> Result<(), VolumeError> {
    let known = answers.iter().flatten().map(|opened| opened.status_changes).max().unwrap_or_default();
    let found = session.status.changes.get();
    if known <= found {
        return Ok(());
    }
    tracing::error!(volume = %session.record.name, known, found, "replicas know of more changes of the status");
    match note(session, RegressedRecord { epoch: session.epoch, status_changes: known }).await? {
        Some(because) => Err(VolumeError::NotReady { because }),
        None => Err(VolumeError::NotReady { because: "another writer attached meanwhile".to_string() }),
    }
}

/// The shard knows `replica`, an epoch as high as the one we were given. Another writer may have attached since, and
/// then the store says so; or else the store has gone back, which is written down.
pub(super) async fn contradicted<R: Runtime>(session: &Session<R>, shard: ShardId, replica: Epoch) -> VolumeError {
    match note(session, RegressedRecord { epoch: replica, status_changes: 0 }).await {
        Ok(Some(because)) => VolumeError::NotReady { because },
        Ok(None) => {
            let because =
                format!("shard {shard} knows epoch {replica}, ours is {}: another writer attached", session.epoch);
            VolumeError::NotReady { because }
        }
        Err(error) => error,
    }
}

/// Gives what to do; `None`: the store knows of a later writer too.
async fn note<R: Runtime>(session: &Session<R>, found: RegressedRecord) -> Result<Option<String>, VolumeError> {
    let metadata = session.runtime.metadata();
    let key = keys::epoch(session.record.id);
    loop {
        let entry = metadata.get(&key).await.map_err(metadata_error)?;
        let entry = entry.ok_or_else(|| record_error(format!("{key} is missing although the volume is owned")))?;
        let record: EpochRecord = decoded(&entry)?;
        if record.epoch > session.epoch {
            return Ok(None);
        }
        let before = record.regressed.unwrap_or_default();
        let known = RegressedRecord {
            epoch: found.epoch.max(before.epoch),
            status_changes: found.status_changes.max(before.status_changes),
        };
        let because = advice(&session.record.name, record.epoch, known);
        let next = EpochRecord { regressed: Some(known), ..record };
        let transaction = Transaction {
            compares: vec![Compare::ModRevision(key.clone(), entry.mod_revision)],
            writes: vec![Write::Put { key: key.clone(), value: encode(&next), lease: None }],
            reads: vec![],
        };
        if metadata.transact(transaction).await.map_err(metadata_error)?.applied {
            tracing::error!(volume = %session.record.name, %because);
            return Ok(Some(because));
        }
    }
}
