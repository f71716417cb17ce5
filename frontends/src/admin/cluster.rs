//! The beginning of a cluster: `torusadm init`.

use super::{AdminError, Report, draw_uuid, now_s};
use clap::Args;
use serde_json::json as object;
use torus_rpc::metadata::{Compare, Metadata, Transaction, Write};
use torus_rpc::runtime::{Random, Runtime};
use torus_schema::ids::ClusterId;
use torus_schema::limits::{REPLICAS_DEFAULT, REPLICAS_MAX, SLICES_DEFAULT, SLICES_MAX};
use torus_schema::records::{ClusterRecord, FORMAT_VERSION, decode, encode, keys};
use torus_schema::ring::Ring;

#[derive(Args, Clone, Debug)]
pub struct InitArguments {
    /// Positions of the ring, a power of two, for ever: data is balanced in units of 1/SLICES of the cluster.
    /// The default suits up to some hundred shards; more make the ring document larger.
    #[arg(long, default_value_t = SLICES_DEFAULT)]
    pub slices: u32,
    /// Copies of every block of a volume that does not say otherwise (`volume create --replicas`), each on another
    /// node. With 3, two nodes can be lost without losing data.
    #[arg(long, default_value_t = REPLICAS_DEFAULT)]
    pub replicas: u8,
}

/// Writes the cluster's record, with a key nobody else knows, and a ring without nodes.
pub async fn init<R: Runtime>(runtime: &R, arguments: &InitArguments) -> Result<Report, AdminError> {
    let InitArguments { slices, replicas } = *arguments;
    if !slices.is_power_of_two() || slices > SLICES_MAX {
        return Err(AdminError::Slices { found: slices });
    }
    if replicas == 0 || replicas > REPLICAS_MAX {
        return Err(AdminError::Replicas { found: replicas });
    }
    let random = runtime.random();
    let record = ClusterRecord {
        id: ClusterId(draw_uuid(runtime)),
        format_version: FORMAT_VERSION,
        slices,
        replicas,
        key: format!("{:032x}{:032x}", random.u128(), random.u128()),
        created_s: now_s(),
    };
    let put = |key, value| Write::Put { key, value, lease: None };
    let transaction = Transaction {
        compares: vec![Compare::Absent(keys::cluster()), Compare::Absent(keys::ring())],
        writes: vec![put(keys::cluster(), encode(&record)), put(keys::ring(), encode(Ring::empty(slices).record()))],
        reads: vec![keys::cluster()],
    };
    let result = runtime.metadata().transact(transaction).await?;
    if !result.applied {
        let there = result.reads.into_iter().next().flatten();
        let there = there.ok_or_else(|| AdminError::Record(format!("there is a ring but no {}", keys::cluster())))?;
        return Err(AdminError::AlreadyInitialised { id: decode::<ClusterRecord>(&there.key, &there.value)?.id });
    }
    let next = "next: start nodes with `torus-engine`, then `torusadm peer add --all-peers`";
    let sentence = format!("cluster {} made: {slices} slices, {replicas} replicas by default; {next}", record.id);
    Ok(Report::said(sentence, object!({"cluster": record.id, "slices": slices, "replicas": replicas})))
}
