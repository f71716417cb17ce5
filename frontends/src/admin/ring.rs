//! The ring document: `torusadm ring get` and `ring inspect`.

use super::output::percent;
use super::snapshot::{Cluster, Nodes};
use super::{AdminError, Report};
use clap::{Args, Subcommand};
use serde_json::json as object;
use torus_rpc::metadata::Metadata;
use torus_schema::ids::{ShardId, SliceId};
use torus_schema::ring::Ring;
use torus_schema::size;

#[derive(Subcommand, Clone, Debug)]
pub enum RingCommand {
    /// Print the ring document as it stands in the metadata store
    Get,
    /// Show how many slices each node and shard holds, or who holds one slice
    Inspect(InspectArguments),
}

#[derive(Args, Clone, Debug, Default)]
pub struct InspectArguments {
    /// Show the replicas of this slice instead, in order
    #[arg(long)]
    pub slice: Option<u32>,
    /// Count for volumes of this many replicas [default: the cluster's]
    #[arg(long)]
    pub replicas: Option<u8>,
}

pub async fn run<M: Metadata>(metadata: &M, command: &RingCommand) -> Result<Report, AdminError> {
    match command {
        RingCommand::Get => get(metadata).await,
        RingCommand::Inspect(arguments) => inspect(metadata, arguments).await,
    }
}

async fn get<M: Metadata>(metadata: &M) -> Result<Report, AdminError> {
    let cluster = Cluster::read(metadata).await?;
    let text = String::from_utf8_lossy(&cluster.ring_entry.value).into_owned();
    Ok(Report::said(text, cluster.ring.record()))
}

async fn inspect<M: Metadata>(metadata: &M, arguments: &InspectArguments) -> Result<Report, AdminError> {
    let cluster = Cluster::read(metadata).await?;
    let nodes = Nodes::read(metadata).await?;
    let ring = &cluster.ring;
    let most = ring.replicas_max() as u8;
    let replicas = match arguments.replicas {
        Some(wanted) if wanted == 0 || wanted > most => {
            return Err(AdminError::TooFewNodes { replicas: wanted, nodes: ring.nodes().len() });
        }
        Some(wanted) => wanted,
        None => cluster.record.replicas.min(most),
    };
    match arguments.slice {
        Some(slice) => inspect_slice(ring, &nodes, SliceId(slice)),
        None => Ok(inspect_shards(ring, &nodes, replicas)),
    }
}

fn inspect_shards(ring: &Ring, nodes: &Nodes, replicas: u8) -> Report {
    let counts = ring.slices_per_shard(replicas);
    let total = u64::from(ring.slices()) * u64::from(replicas);
    let (mut rows, mut documents) = (Vec::new(), Vec::new());
    for node in ring.nodes() {
        let held = |index| counts.get(&ShardId { node: node.number, shard: index }).copied().unwrap_or(0);
        let slices: u32 = node.shards.iter().map(|shard| held(shard.index)).sum();
        let place = [&node.zone, &node.rack, &node.host].map(String::as_str).join("/");
        let mut row = |shard: String, slices: u32, bytes: u64| {
            let share = percent(u64::from(slices), total);
            rows.push(vec![
                node.number.to_string(),
                shard,
                slices.to_string(),
                share,
                size::format(bytes),
                place.clone(),
            ]);
        };
        row("all".to_string(), slices, node.weight_bytes());
        node.shards.iter().for_each(|shard| row(shard.index.to_string(), held(shard.index), shard.weight_bytes));
        let shards: Vec<_> = node
            .shards
            .iter()
            .map(|shard| object!({"index": shard.index, "slices": held(shard.index), "bytes": shard.weight_bytes.to_string()}))
            .collect();
        documents.push(object!({
            "number": node.number,
            "uuid": node.id,
            "address": nodes.records.get(&node.id).map(|record| &record.control),
            "host": node.host,
            "zone": node.zone,
            "rack": node.rack,
            "slices": slices,
            "bytes": node.weight_bytes().to_string(),
            "shards": shards,
        }));
    }
    let summary = format!(
        "generation {}, {} slices, counted for {replicas} replicas; {} nodes, {} shards",
        ring.generation(),
        ring.slices(),
        ring.nodes().len(),
        counts.len()
    );
    Report {
        header: vec!["NODE", "SHARD", "SLICES", "SHARE", "SIZE", "ZONE/RACK/HOST"],
        rows,
        summary: vec![summary],
        json: object!({
            "generation": ring.generation(),
            "slices": ring.slices(),
            "replicas": replicas,
            "nodes": documents,
        }),
        warnings: vec![],
        failed: false,
    }
}

fn inspect_slice(ring: &Ring, nodes: &Nodes, slice: SliceId) -> Result<Report, AdminError> {
    if slice.0 >= ring.slices() {
        return Err(AdminError::NoSlice { found: slice, slices: ring.slices() });
    }
    let replicas = ring.replicas(slice, ring.replicas_max() as u8);
    let (mut rows, mut documents) = (Vec::new(), Vec::new());
    for (position, shard) in replicas.iter().enumerate() {
        let id = ring.node(shard.node).map(|node| node.id);
        let record = id.and_then(|id| nodes.records.get(&id));
        let address = record.and_then(|record| record.shards.iter().find(|known| known.index == shard.shard));
        let address = address.map(|shard| shard.address.as_str());
        rows.push(vec![
            (position + 1).to_string(),
            shard.to_string(),
            id.map_or("-".to_string(), |id| id.to_string()),
            address.unwrap_or("-").to_string(),
        ]);
        documents.push(object!({"node": shard.node, "shard": shard.shard, "uuid": id, "address": address}));
    }
    Ok(Report {
        header: vec!["REPLICA", "SHARD", "UUID", "ADDRESS"],
        rows,
        summary: vec![format!("slice {slice}: a volume of n replicas uses the first n")],
        json: object!({"slice": slice, "replicas": documents}),
        warnings: vec![],
        failed: false,
    })
}
