//! `volume set`: what can be changed of a volume that is there.

use super::unowned::without_owner;
use super::{AdminError, Report};
use clap::Args;
use torus_rpc::metadata::{Compare, Metadata, Transaction, Write};
use torus_rpc::runtime::Runtime;
use torus_schema::records::{VolumeRecord, encode, keys};

#[derive(Args, Clone, Debug)]
pub struct SetArguments {
    pub name: String,
    /// Replicas in sync below which nothing is written. Fewer let it be attached while nodes are away, and bear fewer
    /// losses
    #[arg(long)]
    pub min_replicas: u8,
}

/// A writer reads it when it attaches: nobody may be attached meanwhile.
pub async fn set<R: Runtime>(runtime: &R, arguments: &SetArguments) -> Result<Report, AdminError> {
    let SetArguments { name, min_replicas } = arguments;
    let (found, unowned) = without_owner(runtime, name).await?;
    let (min_replicas, replicas) = (*min_replicas, found.record.replicas);
    let key = keys::volume(found.record.id);
    let next = VolumeRecord { min_replicas, ..found.record.clone() };
    let transaction = Transaction {
        compares: vec![
            Compare::ModRevision(key.clone(), found.entry.mod_revision),
            Compare::Absent(keys::owner(next.id)),
            Compare::Absent(keys::deleting(next.id)),
        ],
        writes: vec![Write::Put { key, value: encode(&next), lease: None }],
        reads: vec![],
    };
    let result = match min_replicas {
        min if min == 0 || min > replicas => Err(AdminError::MinReplicas { found: min, replicas }),
        _ => runtime.metadata().transact(transaction).await.map_err(AdminError::from),
    };
    unowned.release(runtime).await;
    if !result?.applied {
        return Err(AdminError::ChangedMeanwhile { name: name.clone() });
    }
    let sentence = format!("volume {name}: at least {min_replicas} of {replicas} replicas in sync");
    Ok(Report::said(sentence, &next))
}
