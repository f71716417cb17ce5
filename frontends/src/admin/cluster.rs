//! The cluster as a whole: `torusadm init` and `torusadm status`.

use super::output::{json, percent};
use super::snapshot::{self, Cluster, Nodes};
use super::{AdminError, Report, draw_uuid, now_s};
use clap::Args;
use serde_json::json as object;
use torus_rpc::metadata::{Compare, Metadata, Transaction, Write};
use torus_rpc::runtime::{Random, Runtime};
use torus_schema::ids::ClusterId;
use torus_schema::limits::{REPLICAS_DEFAULT, REPLICAS_MAX, SLICES_DEFAULT, SLICES_MAX};
use torus_schema::records::{
    ClusterRecord, DeletingRecord, FORMAT_VERSION, OwnerRecord, StatusRecord, VolumeState, decode, encode, keys,
};
use torus_schema::ring::Ring;
use torus_schema::size;

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

/// Nodes, volumes and what is under way, in a few lines.
pub async fn status<M: Metadata>(metadata: &M) -> Result<Report, AdminError> {
    let cluster = Cluster::read(metadata).await?;
    let nodes = Nodes::read(metadata).await?;
    let volumes = snapshot::volumes(metadata).await?;
    let statuses = snapshot::by_volume::<_, StatusRecord>(metadata, &keys::statuses()).await?;
    let owners = snapshot::by_volume::<_, OwnerRecord>(metadata, &keys::owners()).await?;
    let deleting = snapshot::by_volume::<_, DeletingRecord>(metadata, &keys::deletings()).await?;

    let up = nodes.records.keys().filter(|node| nodes.heartbeats.contains_key(node)).count();
    let down: Vec<String> = nodes
        .records
        .keys()
        .filter(|node| !nodes.heartbeats.contains_key(node))
        .map(|node| nodes.name(*node))
        .collect();
    let stale: usize = statuses.values().flat_map(|status| &status.stale).map(|stale| stale.slices.len()).sum();
    let degraded = statuses.values().filter(|status| !status.stale.is_empty()).count();
    let creating = volumes.iter().filter(|volume| volume.state == VolumeState::Creating).count();
    let ring_bytes: u64 = cluster.ring.nodes().iter().map(|node| node.weight_bytes()).sum();
    let used_bytes: u64 =
        nodes.heartbeats.values().flat_map(|heartbeat| &heartbeat.shards).map(|shard| shard.used_bytes).sum();
    let mut rows = Vec::new();
    let mut row = |what: &str, value: String| rows.push(vec![what.to_string(), value]);
    row("cluster", cluster.record.id.to_string());
    row(
        "ring",
        format!(
            "generation {}, {} nodes, {} slices",
            cluster.ring.generation(),
            cluster.ring.nodes().len(),
            cluster.ring.slices()
        ),
    );
    row("nodes", format!("{up} up, {} down", down.len()));
    row("capacity", format!("{} in the ring, {} used", size::format(ring_bytes), percent(used_bytes, ring_bytes)));
    row("volumes", format!("{} ready, {creating} being created, {} attached", volumes.len() - creating, owners.len()));
    row("stale replicas", format!("{stale} slices of {degraded} volumes"));
    row("deleting", format!("{} volumes", deleting.len()));
    let awaited = deleting.iter().flat_map(|(volume, record)| record.holders.iter().map(move |node| (volume, node)));
    let summary = down.iter().map(|node| format!("down: {node}"));
    let waiting = awaited.map(|(volume, node)| format!("deleting {volume}: waits for {}", nodes.name(*node)));
    let document = object!({
        "cluster": cluster.record.id,
        "ring": {"generation": cluster.ring.generation(), "nodes": cluster.ring.nodes().len(), "slices": cluster.ring.slices()},
        "nodes": {"up": up, "down": down.len()},
        "capacity_bytes": ring_bytes.to_string(),
        "used_bytes": used_bytes.to_string(),
        "volumes": {"ready": volumes.len() - creating, "creating": creating, "attached": owners.len()},
        "stale": {"slices": stale, "volumes": degraded},
        "deleting": deleting.values().collect::<Vec<_>>(),
    });
    let summary = summary.chain(waiting).collect();
    Ok(Report { header: vec!["WHAT", "STATE"], rows, summary, json: json(document), ..Report::default() })
}
