//! Volumes that are owned only for repair: a client that wants one says so under `wanted/<volume>`, and the repair
//! owner lets go at once (protocol rule 11).

use super::attach::{Attacher, metadata_error};
use super::lease::ProcessLease;
use crate::device::VolumeError;
use torus_rpc::metadata::{Metadata, MetadataError, Revision, Transaction, Watch, Write};
use torus_rpc::runtime::Runtime;
use torus_schema::ids::VolumeId;
use torus_schema::records::{WantedRecord, encode, keys};

/// Goes with the client's lease, so that a client that died keeps nobody from repairing.
pub(super) async fn want<R: Runtime>(
    runtime: &R,
    lease: &ProcessLease<R>,
    volume: VolumeId,
    attacher: &Attacher,
) -> Result<(), VolumeError> {
    let Attacher { host, process, pid, .. } = attacher.clone();
    let value = encode(&WantedRecord { host, process, pid });
    let writes = vec![Write::Put { key: keys::wanted(volume), value, lease: Some(lease.id()) }];
    match runtime.metadata().transact(Transaction { writes, ..Transaction::default() }).await {
        // It is said again with the next attempt.
        Ok(_) | Err(MetadataError::Unknown { .. } | MetadataError::LeaseGone(_)) => Ok(()),
        Err(error) => Err(metadata_error(error)),
    }
}

/// Another client that waits loses its word by this; it finds the volume attached, or says it again.
pub(super) async fn want_no_more<R: Runtime>(runtime: &R, volume: VolumeId) {
    let writes = vec![Write::Delete { key: keys::wanted(volume) }];
    if let Err(error) = runtime.metadata().transact(Transaction { writes, ..Transaction::default() }).await {
        tracing::warn!(%volume, %error, "the volume is not repaired by others until this process's lease ends");
    }
}

/// Whether somebody waits for the volume; if not, also a watch that ends when somebody does.
pub(super) async fn watch_wanted<R: Runtime>(
    runtime: &R,
    volume: VolumeId,
) -> Result<Option<Wanting<R>>, MetadataError> {
    let key = keys::wanted(volume);
    let now = runtime.metadata().range(&key).await?;
    if !now.entries.is_empty() {
        return Ok(None);
    }
    let watch = runtime.metadata().watch(&key, Revision(now.revision.0 + 1)).await?;
    Ok(Some(Wanting(watch)))
}

pub(super) struct Wanting<R: Runtime>(<R::Metadata as Metadata>::Watch);

impl<R: Runtime> Wanting<R> {
    /// Ready when somebody wants the volume, or when that can no longer be seen.
    pub async fn wanted(&mut self) {
        // The key is only put while it is absent or by another client: whatever happens to it means that somebody is there.
        if let Err(error) = self.0.next().await {
            tracing::debug!(%error, "cannot see whether somebody wants the volume");
        }
    }
}
