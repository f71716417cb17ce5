//! Storage nodes: `torusadm peer list`, `add`, `remove`. A node joins the cluster by starting; it holds data once it is
//! in the ring.

use super::output::{ago, json, percent};
use super::peer_replace::{self, ReplaceArguments};
use super::snapshot::{self, Cluster, Nodes};
use super::volume_delete::wait_no_longer;
use super::{AdminError, Report, now_s};
use clap::{Args, Subcommand};
use serde_json::json as object;
use std::collections::BTreeSet;
use torus_rpc::metadata::{Compare, Metadata, Transaction, Write};
use torus_rpc::runtime::Runtime;
use torus_schema::ids::{NodeId, ShardId};
use torus_schema::limits::RING_BYTES_MAX;
use torus_schema::records::{NodeRecord, StatusRecord, VolumeRecord, encode, keys};
use torus_schema::ring::placement::Placement;
use torus_schema::ring::{PlanNode, Ring, RingShard, plan};
use torus_schema::size;

/// Changes that lose the race against another this often are given up.
const ATTEMPTS: u32 = 8;

#[derive(Subcommand, Clone, Debug)]
pub enum PeerCommand {
    /// Show every node: OK (in the ring and up), Avail (up, not in the ring), DOWN (no heartbeat)
    List,
    /// Put nodes into the ring, so that they hold data
    Add(Selection),
    /// Take nodes out of the ring
    Remove(Selection),
    /// Give the places of a node that is gone to one that is up and not in the ring, and have it filled
    #[command(
        after_help = "Example: node 10.0.0.7 died for good, 10.0.0.9 was started\n  peer replace 10.0.0.7:7000 10.0.0.9:7000"
    )]
    Replace(ReplaceArguments),
}

#[derive(Args, Clone, Debug)]
pub struct Selection {
    /// Uuid or address of a node, as `peer list` shows them
    #[arg(value_name = "UUID|ADDRESS")]
    pub nodes: Vec<String>,
    /// Every node that is up and not in the ring yet (add), or every node of the ring (remove)
    #[arg(long, conflicts_with = "nodes")]
    pub all_peers: bool,
}

/// `tell` hears how far a replacement is.
pub async fn run<R: Runtime>(runtime: &R, command: &PeerCommand, tell: impl FnMut(&str)) -> Result<Report, AdminError> {
    let metadata = runtime.metadata();
    match command {
        PeerCommand::Replace(arguments) => peer_replace::run(runtime, arguments, tell).await,
        PeerCommand::List => list(metadata).await,
        PeerCommand::Add(selection) => change(metadata, selection, add).await,
        PeerCommand::Remove(selection) => change(metadata, selection, remove).await,
    }
}

pub async fn list<M: Metadata>(metadata: &M) -> Result<Report, AdminError> {
    let ring = Cluster::read(metadata).await?.ring;
    let nodes = Nodes::read(metadata).await?;
    let statuses = snapshot::by_volume::<_, StatusRecord>(metadata, &keys::statuses()).await?;
    let stale: Vec<_> = statuses.values().flat_map(|status| &status.stale).collect();
    let known: BTreeSet<NodeId> =
        nodes.records.keys().copied().chain(ring.nodes().iter().map(|node| node.id)).collect();
    let (mut rows, mut documents, mut warnings) = (Vec::new(), Vec::new(), Vec::new());
    let (mut size_total, mut used_total) = (0, 0);
    for id in known {
        let (record, heartbeat, member) = (nodes.records.get(&id), nodes.heartbeats.get(&id), ring.node_by_id(id));
        let size_bytes = record.map_or_else(|| member.map_or(0, |node| node.weight_bytes()), NodeRecord::size_bytes);
        let used_bytes: Option<u64> = heartbeat.map(|beat| beat.shards.iter().map(|shard| shard.used_bytes).sum());
        for shard in heartbeat.iter().flat_map(|beat| &beat.shards) {
            if let Some(because) = &shard.failed {
                warnings.push(format!("{}: shard {} answers nothing: {because}", nodes.name(id), shard.index));
            }
        }
        let state = match (heartbeat, member) {
            (None, _) => "DOWN",
            (Some(_), Some(_)) => "OK",
            (Some(_), None) => "Avail",
        };
        if member.is_some() {
            size_total += size_bytes;
            used_total += used_bytes.unwrap_or(0);
        }
        let behind: usize = stale
            .iter()
            .filter(|stale| member.is_some_and(|node| node.number == stale.node))
            .map(|stale| stale.slices.len())
            .sum();
        let address = record.map_or("-", |record| record.control.as_str());
        rows.push(vec![
            address.to_string(),
            id.to_string(),
            size::format(size_bytes),
            used_bytes.map_or("-".to_string(), size::format),
            state.to_string(),
            heartbeat.map_or("-".to_string(), |beat| ago(now_s().saturating_sub(beat.updated_s))),
            if behind == 0 { "-".to_string() } else { format!("{behind} stale slices") },
        ]);
        documents.push(object!({
            "address": address,
            "uuid": id,
            "host": record.map(|record| &record.host),
            "zone": record.map(|record| &record.zone),
            "rack": record.map(|record| &record.rack),
            "shards": record.map(|record| record.shards.len()),
            "size_bytes": size_bytes.to_string(),
            "used_bytes": used_bytes.map(|bytes| bytes.to_string()),
            "member": state,
            "in_ring": member.is_some(),
            "updated_s": heartbeat.map(|beat| beat.updated_s),
            "stale_slices": behind,
        }));
    }
    let (balanced, usage) = (stale.is_empty(), percent(used_total, size_total));
    Ok(Report {
        header: vec!["ADDRESS", "UUID", "SIZE", "USED", "MEMBER", "UPDATED", "REB/REP DATA"],
        rows,
        summary: vec![format!("Balanced: {balanced} Usage: {usage}")],
        json: object!({"peers": documents, "balanced": balanced, "usage": usage}),
        warnings,
        ..Report::default()
    })
}

type Change = fn(&Ring, &Nodes, &Selection) -> Result<Changed, AdminError>;

struct Changed {
    nodes: Vec<PlanNode>,
    /// What was done to whom.
    said: Vec<String>,
}

/// Plans the ring on other nodes and stores it, if nobody changed it and no volume appeared meanwhile.
async fn change<M: Metadata>(metadata: &M, selection: &Selection, change: Change) -> Result<Report, AdminError> {
    if selection.nodes.is_empty() && !selection.all_peers {
        return Err(AdminError::NoPeers);
    }
    for _ in 0..ATTEMPTS {
        let cluster = Cluster::read(metadata).await?;
        let nodes = Nodes::read(metadata).await?;
        let changed = change(&cluster.ring, &nodes, selection)?;
        if changed.said.is_empty() {
            return Ok(Report::said("nothing to do: the ring is so already".to_string(), ring_document(&cluster.ring)));
        }
        let record = plan(&cluster.ring, &changed.nodes);
        let value = encode(&record);
        if value.len() > RING_BYTES_MAX {
            return Err(AdminError::RingTooLarge { found: value.len(), limit: RING_BYTES_MAX });
        }
        let ring = Ring::from_record(record)?;
        refuse_to_move(&cluster.ring, &ring, &snapshot::volumes(metadata).await?)?;
        let key = keys::placements();
        let no_volume_meanwhile = match cluster.placements {
            Some(revision) => Compare::ModRevision(key, revision),
            None => Compare::Absent(key),
        };
        let transaction = Transaction {
            compares: vec![Compare::ModRevision(keys::ring(), cluster.ring_entry.mod_revision), no_volume_meanwhile],
            writes: vec![Write::Put { key: keys::ring(), value, lease: None }],
            reads: vec![],
        };
        if metadata.transact(transaction).await?.applied {
            wait_no_longer(metadata).await?;
            let summary = format!("ring generation {}: {} nodes", ring.generation(), ring.nodes().len());
            let summary = changed.said.into_iter().chain([summary]).collect();
            return Ok(Report { summary, json: ring_document(&ring), ..Report::default() });
        }
    }
    Err(AdminError::Contended { attempts: ATTEMPTS })
}

fn ring_document(ring: &Ring) -> serde_json::Value {
    let nodes: Vec<NodeId> = ring.nodes().iter().map(|node| node.id).collect();
    json(object!({"generation": ring.generation(), "nodes": nodes}))
}

fn add(ring: &Ring, nodes: &Nodes, selection: &Selection) -> Result<Changed, AdminError> {
    let mut changed = Changed { nodes: ring.nodes().iter().map(PlanNode::from).collect(), said: Vec::new() };
    let wanted = if selection.all_peers {
        let up = nodes.records.keys().filter(|id| nodes.heartbeats.contains_key(id));
        up.copied().filter(|id| ring.node_by_id(*id).is_none()).collect()
    } else {
        select(nodes, &selection.nodes)?
    };
    for id in wanted {
        let node = nodes.name(id);
        let record = nodes.records.get(&id).ok_or_else(|| AdminError::UnknownPeer { wanted: node.clone() })?;
        if ring.node_by_id(id).is_some() {
            return Err(AdminError::AlreadyMember { node });
        }
        if !nodes.heartbeats.contains_key(&id) {
            return Err(AdminError::PeerDown { node });
        }
        changed.nodes.push(plan_node(record));
        changed.said.push(format!("added {node}, {}", size::format(record.size_bytes())));
    }
    Ok(changed)
}

fn remove(ring: &Ring, nodes: &Nodes, selection: &Selection) -> Result<Changed, AdminError> {
    let wanted: BTreeSet<NodeId> = if selection.all_peers {
        ring.nodes().iter().map(|node| node.id).collect()
    } else {
        select(nodes, &selection.nodes)?
    };
    if let Some(id) = wanted.iter().find(|id| ring.node_by_id(**id).is_none()) {
        return Err(AdminError::NotMember { node: nodes.name(*id) });
    }
    let rest = ring.nodes().iter().filter(|node| !wanted.contains(&node.id));
    let said = wanted.iter().map(|id| format!("removed {}", nodes.name(*id)));
    Ok(Changed { nodes: rest.map(PlanNode::from).collect(), said: said.collect() })
}

fn plan_node(record: &NodeRecord) -> PlanNode {
    let shard =
        |shard: &torus_schema::records::ShardRecord| RingShard { index: shard.index, weight_bytes: shard.size_bytes };
    PlanNode {
        id: record.id,
        host: record.host.clone(),
        zone: record.zone.clone(),
        rack: record.rack.clone(),
        shards: record.shards.iter().map(shard).collect(),
    }
}

/// Nodes by uuid, control address or the address of one of their shards.
pub(super) fn select(nodes: &Nodes, wanted: &[String]) -> Result<BTreeSet<NodeId>, AdminError> {
    let mut selected = BTreeSet::new();
    for wanted in wanted {
        let is_meant = |record: &&NodeRecord| {
            record.id.to_string().eq_ignore_ascii_case(wanted)
                || record.control == *wanted
                || record.shards.iter().any(|shard| shard.address == *wanted)
        };
        let mut meant: Vec<NodeId> = nodes.records.values().filter(is_meant).map(|record| record.id).collect();
        // A port can be used again: of several records that name it, the one of a node that is up is meant.
        if meant.len() > 1 && meant.iter().filter(|id| nodes.heartbeats.contains_key(id)).count() == 1 {
            meant.retain(|id| nodes.heartbeats.contains_key(id));
        }
        match meant.as_slice() {
            [id] => _ = selected.insert(*id),
            [] => return Err(AdminError::UnknownPeer { wanted: wanted.clone() }),
            several => {
                let uuids = several.iter().map(NodeId::to_string).collect::<Vec<_>>().join(", ");
                return Err(AdminError::AmbiguousPeer { wanted: wanted.clone(), uuids });
            }
        }
    }
    Ok(selected)
}

/// Data stays where it is until a volume can follow the ring.
fn refuse_to_move(old: &Ring, new: &Ring, volumes: &[VolumeRecord]) -> Result<(), AdminError> {
    let moves = |volume: &&VolumeRecord| {
        let count = volume.replicas;
        if usize::from(count) > old.replicas_max().min(new.replicas_max()) {
            return true;
        }
        let placement = Placement::new(volume.placement, volume.width, old.slices());
        let replicas = |ring: &Ring, slice| ring.replicas(slice, count).iter().copied().collect::<BTreeSet<ShardId>>();
        placement.slices().iter().any(|slice| replicas(old, *slice) != replicas(new, *slice))
    };
    let affected: Vec<&str> = volumes.iter().filter(moves).map(|volume| volume.name.as_str()).collect();
    if affected.is_empty() {
        return Ok(());
    }
    let more = if affected.len() > 3 { ", …" } else { "" };
    let examples = affected[..affected.len().min(3)].join(", ") + more;
    Err(AdminError::WouldMoveData { affected: affected.len(), volumes: volumes.len(), examples })
}
