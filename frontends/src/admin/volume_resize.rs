//! `volume resize`: a volume grows while it is used; it shrinks only while nobody has it attached.
//!
//! Growing changes the record and nothing else: nothing was ever stored beyond the end. So that this stays true,
//! shrinking clears what lies beyond the new end on the replicas, as the volume's writer, before the record is changed.
//! After a crash between the two the volume has its old size, and zeros where its user gave the data up.

use super::snapshot::Found;
use super::unowned::without_owner;
use super::volume::parse_size;
use super::volume_create::check_size;
use super::{AdminError, Report};
use crate::device::{Device, Exports};
use crate::volume::{Attacher, VolumeExports};
use clap::Args;
use torus_rpc::metadata::{Compare, Metadata, Transaction, Write};
use torus_rpc::runtime::Runtime;
use torus_schema::records::{VolumeRecord, VolumeState, encode, keys};
use torus_schema::size;

#[derive(Args, Clone, Debug)]
pub struct ResizeArguments {
    pub name: String,
    /// The size from now on, such as 20GiB
    #[arg(value_parser = parse_size)]
    pub size: u64,
    /// Let it become smaller: what lies beyond the new end is LOST. Nobody may have it attached
    #[arg(long)]
    pub allow_shrink: bool,
}

pub async fn resize<R: Runtime>(runtime: &R, arguments: &ResizeArguments) -> Result<Report, AdminError> {
    let ResizeArguments { name, size, allow_shrink } = arguments;
    check_size(*size)?;
    let found = Found::read(runtime.metadata(), name).await?;
    let old = found.record.size_bytes;
    if found.record.state != VolumeState::Ready {
        return Err(AdminError::NotReady { name: name.clone() });
    }
    if *size < old && !allow_shrink {
        return Err(AdminError::Shrinks { name: name.clone(), from: old, to: *size });
    }
    let next = if *size < old { shrink(runtime, name, *size).await? } else { grow(runtime, &found, *size).await? };
    let (from, to) = (size::format(old), size::format(next.size_bytes));
    Ok(Report::said(format!("volume {name}: {from} before, {to} now"), &next))
}

async fn grow<R: Runtime>(runtime: &R, found: &Found, size_bytes: u64) -> Result<VolumeRecord, AdminError> {
    let next = VolumeRecord { size_bytes, ..found.record.clone() };
    store(runtime, found, &next, vec![]).await?;
    Ok(next)
}

async fn shrink<R: Runtime>(runtime: &R, name: &str, size_bytes: u64) -> Result<VolumeRecord, AdminError> {
    // Named with its owner, if it has one.
    let (found, unowned) = without_owner(runtime, name).await?;
    unowned.release(runtime).await;
    let beyond = found.record.size_bytes.saturating_sub(size_bytes);
    let attacher = Attacher {
        host: nix::unistd::gethostname().map_or_else(|_| "?".to_string(), |name| name.to_string_lossy().into_owned()),
        process: "volume resize".to_string(),
        pid: std::process::id(),
        force: false,
        repair: false,
    };
    let exports = VolumeExports::new(runtime.clone(), attacher);
    let cleared = async {
        let volume = exports.attach(name).await?;
        volume.clear(size_bytes, beyond, true, false).await?;
        volume.flush().await
    };
    let cleared = cleared.await;
    exports.release_all().await;
    cleared.map_err(|error| AdminError::NotCleared { name: name.to_string(), because: error.to_string() })?;
    let (found, unowned) = without_owner(runtime, name).await?;
    let next = VolumeRecord { size_bytes, ..found.record.clone() };
    let stored = store(runtime, &found, &next, vec![Compare::Absent(keys::owner(next.id))]).await;
    unowned.release(runtime).await;
    stored.map(|()| next)
}

async fn store<R: Runtime>(
    runtime: &R,
    found: &Found,
    next: &VolumeRecord,
    also: Vec<Compare>,
) -> Result<(), AdminError> {
    let key = keys::volume(next.id);
    let mut compares =
        vec![Compare::ModRevision(key.clone(), found.entry.mod_revision), Compare::Absent(keys::deleting(next.id))];
    compares.extend(also);
    let writes = vec![Write::Put { key, value: encode(next), lease: None }];
    let result = runtime.metadata().transact(Transaction { compares, writes, reads: vec![] }).await?;
    match result.applied {
        true => Ok(()),
        false => Err(AdminError::ChangedMeanwhile { name: next.name.clone() }),
    }
}
