//! `volume promote` of a volume whose metadata store was restored from a backup (interleaving 27). What the store says of
//! its replicas is of then, and the volume is not attached until somebody says what to go on from.
//!
//! Nothing in the store tells who became stale since the backup, or is only half filled. So the operator names nodes, and
//! of each slice the first of them that has it whole becomes the one replica in sync. All others are stale since *zero*:
//! any later mark would be the store's word. Rule 11 then makes them what the chosen one is.
//!
//! One transaction writes that, takes the mark `regressed` away, and raises the epoch and the count of changes beyond all
//! that any replica told of, by `REGRESSED_MARGIN` more: a replica that did not answer may know later ones. Were an
//! epoch given twice, two different writes could bear one version; were a count, an attach would take its replica's for the
//! later word. Guarded by every record it was decided by.
//!
//! An owner that attached before the restore may still live. It ends as soon as it looks at its key (`volume::guard`), and
//! the next attach waits out a lease first.

use super::snapshot::{Cluster, Found, Nodes};
use super::standing::{name_of, slices_of, with_stale, without_stale};
use super::unowned::without_owner;
use super::volume_promote::{PromoteArguments, Told};
use super::{AdminError, Report, now_s};
use serde_json::json as object;
use std::collections::{BTreeMap, BTreeSet};
use torus_rpc::control::{HeldVolume, ShardInstances};
use torus_rpc::metadata::{Compare, Metadata, Transaction, Write};
use torus_rpc::runtime::Runtime;
use torus_schema::ids::{Epoch, NodeId, NodeNumber, ShardId, ShardIndex, SliceId, Version};
use torus_schema::limits::{LEASE_DRIFT_PARTS_MIN, OWNER_LEASE_TTL_MAX, REGRESSED_MARGIN};
use torus_schema::records::{EpochRecord, StatusRecord, VersionRecord, encode, keys};

/// What a node's shards know of the volume, taken together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Knowledge {
    status_changes: u64,
    epoch: Epoch,
    flush_point: Version,
    blocks: u64,
}

struct Plan {
    chosen: Vec<(SliceId, ShardId)>,
    known: BTreeMap<NodeId, Knowledge>,
    /// Nodes with replicas that did not tell what they have.
    silent: BTreeSet<NodeNumber>,
    epoch: EpochRecord,
    /// The nodes as they were named.
    order: Vec<NodeNumber>,
}

impl Plan {
    /// What each chosen node says is durable: the lowest.
    fn lowest(&self, cluster: &Cluster) -> Version {
        let numbers: BTreeSet<NodeNumber> = self.chosen.iter().map(|(_, shard)| shard.node).collect();
        let ids = numbers.iter().filter_map(|number| Some(cluster.ring.node(*number)?.id));
        ids.map(|id| self.known.get(&id).map_or(Version::ZERO, |known| known.flush_point))
            .min()
            .unwrap_or(Version::ZERO)
    }

    /// The highest that anybody told of.
    fn most(&self) -> (Epoch, u64) {
        let noted = self.epoch.regressed.unwrap_or_default();
        let epochs = self.known.values().map(|known| known.epoch).chain([noted.epoch, self.epoch.epoch]);
        let changes = self.known.values().map(|known| known.status_changes).chain([noted.status_changes]);
        (epochs.max().unwrap_or_default(), changes.max().unwrap_or_default())
    }
}

pub(super) async fn promote<R: Runtime>(
    runtime: &R,
    arguments: &PromoteArguments,
    told: &Told,
) -> Result<Report, AdminError> {
    let metadata = runtime.metadata();
    let (cluster, nodes) = (Cluster::read(metadata).await?, Nodes::read(metadata).await?);
    let mut order = Vec::new();
    for named in [&arguments.node].into_iter().chain(&arguments.others) {
        let selected = super::peer::select(&nodes, std::slice::from_ref(named))?;
        let id = *selected.first().ok_or(AdminError::NoPeers)?;
        let member = cluster.ring.node_by_id(id).ok_or_else(|| AdminError::NotMember { node: nodes.name(id) })?;
        order.push(member.number);
    }
    let Some(confirmed) = &arguments.yes_lose_writes_since else {
        let found = Found::read(metadata, &arguments.name).await?;
        let plan = plan(&cluster, &nodes, &found, told, &order)?;
        return Ok(describe(&cluster, &nodes, &found, &plan, false));
    };
    let (found, unowned) = without_owner(runtime, &arguments.name).await?;
    let result = async {
        let plan = plan(&cluster, &nodes, &found, told, &order)?;
        let expected = plan.lowest(&cluster).to_string();
        if *confirmed != expected {
            return Err(AdminError::OtherLoss { found: confirmed.clone(), expected });
        }
        apply(metadata, &cluster, &found, &plan).await?;
        Ok(describe(&cluster, &nodes, &found, &plan, true))
    };
    let result = result.await;
    unowned.release(runtime).await;
    result
}

fn plan(
    cluster: &Cluster,
    nodes: &Nodes,
    found: &Found,
    told: &Told,
    order: &[NodeNumber],
) -> Result<Plan, AdminError> {
    let epoch = found.epoch.filter(|epoch| epoch.regressed.is_some());
    let epoch = epoch.ok_or_else(|| AdminError::ChangedMeanwhile { name: found.record.name.clone() })?;
    let mut plan =
        Plan { chosen: vec![], known: BTreeMap::new(), silent: BTreeSet::new(), epoch, order: order.to_vec() };
    let (mut uncovered, mut holders) = (0, BTreeSet::new());
    for standing in slices_of(cluster, &found.record, &found.status) {
        let whole = |number: NodeNumber| {
            let mut shards = standing.replicas.iter().map(|(shard, _)| *shard);
            shards.find(|shard| shard.node == number && is_whole(cluster, found, told, *shard, standing.slice))
        };
        match order.iter().find_map(|number| whole(*number)) {
            Some(shard) => plan.chosen.push((standing.slice, shard)),
            None => {
                uncovered += 1;
                let having = standing.replicas.iter().filter_map(|(shard, _)| whole(shard.node));
                holders.extend(having.map(|shard| name_of(cluster, nodes, shard.node)));
            }
        }
        for (shard, _) in &standing.replicas {
            let Some(node) = cluster.ring.node(shard.node) else { continue };
            match told.get(&node.id) {
                Some(_) => drop(plan.known.insert(node.id, knowledge(found, told, node.id))),
                None => drop(plan.silent.insert(shard.node)),
            }
        }
    }
    // Nothing is chosen where the ring has no place for the volume.
    if uncovered > 0 || plan.chosen.is_empty() {
        let holders = match holders.is_empty() {
            true => "none that answers has one; bring back the nodes that hold them".to_string(),
            false => holders.into_iter().collect::<Vec<_>>().join(", "),
        };
        return Err(AdminError::NotCovered { name: found.record.name.clone(), slices: uncovered, holders });
    }
    Ok(plan)
}

/// What the node's shards hold of the volume.
fn held_by<'a>(found: &'a Found, told: &'a Told, node: NodeId) -> impl Iterator<Item = (ShardIndex, &'a HeldVolume)> {
    let shards = told.get(&node).into_iter().flatten().filter(|shard| shard.failed.is_none());
    let of_volume = |shard: &'a ShardInstances| {
        let volumes = shard.volumes.iter().filter(|held| held.volume == found.record.id);
        volumes.map(|held| (shard.index, held))
    };
    shards.flat_map(of_volume)
}

fn is_whole(cluster: &Cluster, found: &Found, told: &Told, shard: ShardId, slice: SliceId) -> bool {
    let Some(node) = cluster.ring.node(shard.node) else { return false };
    let expected = cluster.ring.instance_generation(shard.node, found.record.generation);
    let mut held = held_by(found, told, node.id).filter(|(index, _)| *index == shard.shard);
    held.any(|(_, held)| held.slice(slice) == Some((expected, true)))
}

fn knowledge(found: &Found, told: &Told, node: NodeId) -> Knowledge {
    held_by(found, told, node).fold(Knowledge::default(), |known, (_, held)| Knowledge {
        status_changes: known.status_changes.max(held.status_changes),
        epoch: known.epoch.max(held.epoch),
        flush_point: known.flush_point.max(held.flush_point),
        blocks: known.blocks + held.blocks,
    })
}

async fn apply<M: Metadata>(metadata: &M, cluster: &Cluster, found: &Found, plan: &Plan) -> Result<(), AdminError> {
    let volume = found.record.id;
    let (epoch, changes) = plan.most();
    // The store that was restored does not know the last owner's lease.
    let wait_out = (OWNER_LEASE_TTL_MAX + OWNER_LEASE_TTL_MAX / LEASE_DRIFT_PARTS_MIN).as_millis() as u64;
    let next = EpochRecord {
        epoch: Epoch(epoch.0.saturating_add(REGRESSED_MARGIN)),
        wait_out_ms: plan.epoch.wait_out_ms.max(wait_out),
        regressed: None,
        ..plan.epoch
    };
    let status = StatusRecord {
        changes: changes.max(found.status.changes) + u64::from(REGRESSED_MARGIN),
        ..promoted_status(cluster, found, plan)
    };
    let (status_key, epoch_key) = (keys::status(volume), keys::epoch(volume));
    let unchanged = |key: &str, revision| match revision {
        Some(revision) => Compare::ModRevision(key.to_string(), revision),
        None => Compare::Absent(key.to_string()),
    };
    let transaction = Transaction {
        compares: vec![
            unchanged(&status_key, found.status_revision),
            unchanged(&epoch_key, found.epoch_revision),
            Compare::Absent(keys::owner(volume)),
            Compare::ModRevision(keys::volume(volume), found.entry.mod_revision),
            Compare::ModRevision(keys::ring(), cluster.ring_entry.mod_revision),
        ],
        writes: vec![
            Write::Put { key: status_key, value: encode(&status), lease: None },
            Write::Put { key: epoch_key, value: encode(&next), lease: None },
        ],
        reads: vec![],
    };
    match metadata.transact(transaction).await? {
        result if result.applied => Ok(()),
        _ => Err(AdminError::ChangedMeanwhile { name: found.record.name.clone() }),
    }
}

fn promoted_status(cluster: &Cluster, found: &Found, plan: &Plan) -> StatusRecord {
    let mut stale: BTreeMap<NodeNumber, Vec<SliceId>> = BTreeMap::new();
    let mut in_sync: BTreeMap<NodeNumber, Vec<SliceId>> = BTreeMap::new();
    let chosen: BTreeMap<SliceId, ShardId> = plan.chosen.iter().copied().collect();
    for standing in slices_of(cluster, &found.record, &found.status) {
        for (shard, _) in &standing.replicas {
            let list = if chosen.get(&standing.slice) == Some(shard) { &mut in_sync } else { &mut stale };
            list.entry(shard.node).or_default().push(standing.slice);
        }
    }
    let mut status = found.status.clone();
    for (node, slices) in in_sync {
        status = without_stale(&status, node, &slices);
    }
    for (node, slices) in stale {
        status = with_stale(&status, node, &slices, VersionRecord::default(), now_s());
    }
    status
}

fn describe(cluster: &Cluster, nodes: &Nodes, found: &Found, plan: &Plan, is_done: bool) -> Report {
    let (name, lowest) = (&found.record.name, plan.lowest(cluster));
    let mut by_node: BTreeMap<NodeNumber, usize> = BTreeMap::new();
    plan.chosen.iter().for_each(|(_, shard)| *by_node.entry(shard.node).or_default() += 1);
    let most = plan.most();
    let mut summary = vec![format!(
        "{name}: the metadata store was restored from a backup: it has epoch {} and {} changes of the status, replicas know \
         {} and {}",
        plan.epoch.epoch, found.status.changes, most.0, most.1
    )];
    let best = plan.known.values().map(|known| known.status_changes).max().unwrap_or_default();
    for (id, known) in &plan.known {
        let knows = match known.status_changes == best {
            true => "as much as any".to_string(),
            false => format!("LESS than others, which know {best}: it was stale then, or a new replica"),
        };
        summary.push(format!(
            "{}: opened in epoch {}, durable up to {}, {} blocks; knows {} changes, {knows}",
            nodes.name(*id),
            known.epoch,
            known.flush_point,
            known.blocks,
            known.status_changes
        ));
    }
    for number in &plan.silent {
        summary.push(format!("{} did not answer; it may have newer data", name_of(cluster, nodes, *number)));
    }
    for (number, slices) in &by_node {
        let node = name_of(cluster, nodes, *number);
        let durable =
            cluster.ring.node(*number).and_then(|node| plan.known.get(&node.id)).map(|known| known.flush_point);
        summary.push(format!(
            "LOST: on {slices} slices, what others have and {node} has not: everything written after {} that did not reach it; \
             older writes too if it was stale or being filled, of which the store no longer tells",
            durable.unwrap_or(Version::ZERO)
        ));
    }
    let named: Vec<String> =
        plan.order.iter().filter_map(|n| cluster.ring.node(*n)).map(|n| n.id.to_string()).collect();
    summary.push(match is_done {
        false => format!(
            "nothing was changed. To do it: torusadm volume promote {name} {} --yes-lose-writes-since {lowest}",
            named.join(" ")
        ),
        true if found.record.min_replicas > 1 => format!(
            "next: with one replica in sync of at least {} it cannot be attached: `torusadm volume set {name} --min-replicas 1` \
             until the others are filled",
            found.record.min_replicas
        ),
        true => "all other replicas are filled from it, whole, once a node or a client has the volume".to_string(),
    });
    let known = |(id, known): (&NodeId, &Knowledge)| {
        object!({"node": id, "epoch": known.epoch, "durable": known.flush_point.to_string(), "blocks": known.blocks,
                 "status_changes": known.status_changes})
    };
    let document = object!({
        "volume": name, "uuid": found.record.id, "nodes": named, "done": is_done, "lost_since": lowest.to_string(),
        "slices": plan.chosen.iter().map(|(slice, shard)| object!({"slice": slice, "node": shard.node})).collect::<Vec<_>>(),
        "replicas": plan.known.iter().map(known).collect::<Vec<_>>(), "silent": plan.silent,
    });
    Report { summary, json: document, ..Report::default() }
}
