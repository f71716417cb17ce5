//! `torusadm peer replace OLD NEW`: a node that is there takes the places of one that is gone.
//!
//! One transaction on the ring: NEW takes OLD's number, and with it its slices, in a generation of its own. No volume
//! has to change with it. An attach opens NEW, finds no instances of that generation and marks it stale since zero before
//! it serves; sessions that live do the same when they see the ring change; and a status that already lists the number as
//! stale since some version meets the missing instances at the resync, which lowers it to zero first.
//!
//! So that volumes nobody has attached are filled too, the command then lists NEW as stale since zero in their statuses,
//! where as many replicas as the minimum are in sync without it: storage nodes repair what is listed. That changes nothing
//! about what may be read. If the command ends before it is through, the same command goes on with that.

use super::output::json;
use super::snapshot::{self, Cluster, Nodes, Statuses};
use super::standing::{holder, slices_of, with_stale};
use super::volume_delete::wait_no_longer;
use super::{AdminError, Report, now_s};
use clap::Args;
use serde_json::json as object;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use torus_rpc::control::{self, ShardInstances};
use torus_rpc::metadata::{Compare, Metadata, Revision, Transaction, Write};
use torus_rpc::runtime::{Clock, Runtime};
use torus_schema::ids::{NodeId, NodeNumber, ShardIndex, SliceId, VolumeId};
use torus_schema::limits::RING_BYTES_MAX;
use torus_schema::records::{NodeRecord, OwnerRecord, StatusRecord, VersionRecord, VolumeRecord, VolumeState};
use torus_schema::records::{encode, keys};
use torus_schema::ring::{Ring, RingNode, RingShard};
use torus_schema::size;

/// Changes that lose the race against another this often are given up.
const ATTEMPTS: u32 = 8;
/// How often the new node is asked what it holds.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
const NODE_PATIENCE: Duration = Duration::from_secs(3);

#[derive(Args, Clone, Debug)]
pub struct ReplaceArguments {
    /// The node that is gone: its uuid or address, as `peer list` shows them
    pub old: String,
    /// The node that takes its places: up, not in the ring, with the same number of shards
    pub new: String,
    /// Go on though volumes stay below their minimum of replicas in sync, or though the new node may be too small
    #[arg(long)]
    pub force: bool,
    /// Do not wait until the new node is filled; it is filled all the same
    #[arg(long)]
    pub no_wait: bool,
}

/// What the ring says now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replaced {
    pub number: NodeNumber,
    pub new: NodeId,
    pub said: String,
    pub warnings: Vec<String>,
}

/// `tell` hears how far the new node is, whenever that changes.
pub async fn run<R: Runtime>(
    runtime: &R,
    arguments: &ReplaceArguments,
    mut tell: impl FnMut(&str),
) -> Result<Report, AdminError> {
    let replaced = replace(runtime.metadata(), arguments).await?;
    replaced.warnings.iter().for_each(|warning| tell(&format!("warning: {warning}")));
    tell(&replaced.said);
    let mut last = None;
    loop {
        let left = look(runtime.metadata(), &replaced).await?;
        mark(runtime.metadata(), &left.unmarked).await?;
        if last.as_ref() != Some(&left.sentence) {
            tell(&left.sentence);
            last = Some(left.sentence.clone());
        }
        if left.slices == 0 || arguments.no_wait {
            let document = object!({
                "number": replaced.number, "node": replaced.new,
                "volumes_left": left.volumes, "slices_left": left.slices, "below_minimum": left.stuck,
            });
            let summary = vec![replaced.said, left.sentence];
            return Ok(Report { summary, json: json(document), ..Report::default() });
        }
        runtime.clock().sleep(LOOK_AGAIN).await;
    }
}

/// The change of the ring, or what stands in its way. Said again after it was done, it changes nothing.
pub async fn replace<M: Metadata>(metadata: &M, arguments: &ReplaceArguments) -> Result<Replaced, AdminError> {
    for _ in 0..ATTEMPTS {
        let cluster = Cluster::read(metadata).await?;
        let nodes = Nodes::read(metadata).await?;
        let old = pick(&nodes, &arguments.old, |id| cluster.ring.node_by_id(id).is_some())?;
        let new = pick(&nodes, &arguments.new, |id| id != old && nodes.heartbeats.contains_key(&id))?;
        if let Some(node) = cluster.ring.node_by_id(new).filter(|node| node.instead_of == Some(old)) {
            let said = format!("{} has its places in the ring; going on with what was begun", nodes.name(new));
            wait_no_longer(metadata).await?;
            return Ok(Replaced { number: node.number, new, said, warnings: vec![] });
        }
        let (gone, node) = check(&cluster, &nodes, old, new)?;
        let mut warnings = domain_warnings(&cluster.ring, gone, &node);
        let too_small = check_room(&cluster, &nodes, gone, &node);
        let (statuses, at) = snapshot::statuses_at(metadata).await?;
        let below = below_minimum(&cluster, &snapshot::volumes(metadata).await?, &statuses, gone.number);
        for refusal in too_small.into_iter().chain(below) {
            if !arguments.force {
                return Err(refusal);
            }
            warnings.push(refusal.to_string());
        }
        let number = gone.number;
        let lacking = || AdminError::Record(format!("{} lacks a shard that has slices", nodes.name(new)));
        let record = cluster.ring.with_replaced(number, node).ok_or_else(lacking)?;
        let (value, generation) = (encode(&record), record.generation);
        if value.len() > RING_BYTES_MAX {
            return Err(AdminError::RingTooLarge { found: value.len(), limit: RING_BYTES_MAX });
        }
        Ring::from_record(record)?;
        // An answer that was lost shows at the next attempt: the new node is in the ring then.
        if metadata.transact(transaction(&cluster, value, (old, new), at)).await?.applied {
            let said = format!("{} has the places of {} (generation {generation})", nodes.name(new), nodes.name(old));
            wait_no_longer(metadata).await?;
            return Ok(Replaced { number, new, said, warnings });
        }
    }
    Err(AdminError::Contended { attempts: ATTEMPTS })
}

/// Guarded by all that was checked: neither was a replica marked stale since, or a minimum raised (a status or a volume
/// written after `at`), nor did the old node come or the new one go.
fn transaction(cluster: &Cluster, value: Vec<u8>, (old, new): (NodeId, NodeId), at: Revision) -> Transaction {
    let key = keys::placements();
    let no_volume_meanwhile = match cluster.placements {
        Some(revision) => Compare::ModRevision(key, revision),
        None => Compare::Absent(key),
    };
    Transaction {
        compares: vec![
            Compare::ModRevision(keys::ring(), cluster.ring_entry.mod_revision),
            no_volume_meanwhile,
            Compare::PrefixUnchanged(keys::statuses(), at),
            Compare::PrefixUnchanged(keys::volumes(), at),
            Compare::Absent(keys::heartbeat(old)),
            Compare::Present(keys::heartbeat(new)),
        ],
        writes: vec![Write::Put { key: keys::ring(), value, lease: None }],
        reads: vec![],
    }
}

/// A node by uuid or address; of several that name the address, the one that is `likely`.
fn pick(nodes: &Nodes, wanted: &str, likely: impl Fn(NodeId) -> bool) -> Result<NodeId, AdminError> {
    let is_meant = |record: &&NodeRecord| {
        record.id.to_string().eq_ignore_ascii_case(wanted)
            || record.control == wanted
            || record.shards.iter().any(|shard| shard.address == wanted)
    };
    let mut meant: Vec<NodeId> = nodes.records.values().filter(is_meant).map(|record| record.id).collect();
    if meant.len() > 1 && meant.iter().filter(|id| likely(**id)).count() == 1 {
        meant.retain(|id| likely(*id));
    }
    match meant.as_slice() {
        [id] => Ok(*id),
        [] => Err(AdminError::UnknownPeer { wanted: wanted.to_string() }),
        several => {
            let uuids = several.iter().map(NodeId::to_string).collect::<Vec<_>>().join(", ");
            Err(AdminError::AmbiguousPeer { wanted: wanted.to_string(), uuids })
        }
    }
}

/// The place that is to be taken, and the node as it would stand there.
fn check<'a>(
    cluster: &'a Cluster,
    nodes: &Nodes,
    old: NodeId,
    new: NodeId,
) -> Result<(&'a RingNode, RingNode), AdminError> {
    let gone = cluster.ring.node_by_id(old).ok_or_else(|| AdminError::NotMember { node: nodes.name(old) })?;
    if nodes.heartbeats.contains_key(&old) {
        return Err(AdminError::PeerUp { node: nodes.name(old) });
    }
    if cluster.ring.node_by_id(new).is_some() {
        return Err(AdminError::AlreadyMember { node: nodes.name(new) });
    }
    if !nodes.heartbeats.contains_key(&new) {
        return Err(AdminError::PeerDown { node: nodes.name(new) });
    }
    let record = nodes.records.get(&new).ok_or_else(|| AdminError::UnknownPeer { wanted: nodes.name(new) })?;
    let shards: Vec<RingShard> =
        record.shards.iter().map(|shard| RingShard { index: shard.index, weight_bytes: shard.size_bytes }).collect();
    let has: BTreeSet<ShardIndex> = shards.iter().map(|shard| shard.index).collect();
    let lacks: Vec<String> =
        gone.shards.iter().filter(|shard| !has.contains(&shard.index)).map(|shard| shard.index.to_string()).collect();
    if !lacks.is_empty() {
        let (node, lacks) = (nodes.name(new), lacks.join(", "));
        return Err(AdminError::LacksShards { node, found: has.len(), expected: gone.shards.len(), lacks });
    }
    let NodeRecord { id, host, zone, rack, .. } = record.clone();
    Ok((gone, RingNode { number: gone.number, id, given: gone.given, instead_of: None, host, zone, rack, shards }))
}

/// Two replicas of a slice in one failure domain fall together.
fn domain_warnings(ring: &Ring, gone: &RingNode, node: &RingNode) -> Vec<String> {
    type Domain = fn(&RingNode) -> &str;
    let levels: [(&str, Domain); 3] =
        [("host", |node| &node.host), ("rack", |node| &node.rack), ("zone", |node| &node.zone)];
    let shared = levels.into_iter().filter(|(_, domain)| {
        let others = ring.nodes().iter().filter(|other| other.number != gone.number);
        let mine = domain(node);
        !mine.is_empty() && mine != domain(gone) && others.into_iter().any(|other| domain(other) == mine)
    });
    let warning = |(level, domain): (&str, fn(&RingNode) -> &str)| {
        format!("its {level} {} is another node's of the ring already: both fall together", domain(node))
    };
    shared.map(warning).collect()
}

/// How much the node held is not known any more; as full as the others are now, it held its share.
fn check_room(cluster: &Cluster, nodes: &Nodes, gone: &RingNode, node: &RingNode) -> Option<AdminError> {
    let (mut used, mut sizes) = (0u128, 0u128);
    for member in cluster.ring.nodes().iter().filter(|member| member.number != gone.number) {
        if let Some(beat) = nodes.heartbeats.get(&member.id) {
            used += beat.shards.iter().map(|shard| u128::from(shard.used_bytes)).sum::<u128>();
            sizes += u128::from(member.weight_bytes());
        }
    }
    for shard in &gone.shards {
        let expected = (u128::from(shard.weight_bytes) * used).checked_div(sizes).unwrap_or(0) as u64;
        let found = node.shards.iter().find(|new| new.index == shard.index).map_or(0, |new| new.weight_bytes);
        if found < expected {
            let shard = shard.index.to_string();
            return Some(AdminError::TooSmall { shard, found: size::format(found), expected: size::format(expected) });
        }
    }
    None
}

/// Volumes that have fewer replicas in sync than their minimum once nothing of `gone` counts.
fn below_minimum(
    cluster: &Cluster,
    volumes: &[VolumeRecord],
    statuses: &Statuses,
    gone: NodeNumber,
) -> Option<AdminError> {
    let mut affected = Vec::new();
    for volume in volumes.iter().filter(|volume| volume.state == VolumeState::Ready) {
        let status = statuses.get(&volume.id).map(|(status, _)| status.clone()).unwrap_or_default();
        let slices = slices_of(cluster, volume, &status);
        let count = slices
            .iter()
            .filter(|slice| slice.is_in_sync_on(gone) && slice.in_sync().count() <= usize::from(volume.min_replicas));
        match count.count() {
            0 => {}
            count => affected.push(format!("{} ({count} of {} slices)", volume.name, slices.len())),
        }
    }
    let volumes = affected.len();
    let more = if volumes > 5 { ", …" } else { "" };
    let examples = affected.into_iter().take(5).collect::<Vec<_>>().join(", ") + more;
    (volumes > 0).then_some(AdminError::ReplaceBelowMinimum { volumes, examples })
}

/// What is not filled yet.
struct Left {
    volumes: usize,
    slices: usize,
    /// Below their minimum without the node: they are not filled until other replicas are back.
    stuck: Vec<String>,
    sentence: String,
    unmarked: Vec<Unmarked>,
}

/// A volume without an owner whose status does not say yet that the node has nothing.
struct Unmarked {
    volume: VolumeRecord,
    node: NodeNumber,
    slices: Vec<SliceId>,
    status: StatusRecord,
    revision: Option<Revision>,
    ring: Revision,
}

/// What the node holds is asked of itself: a status lists exceptions only, and does not know of it before an attach.
async fn look<M: Metadata>(metadata: &M, replaced: &Replaced) -> Result<Left, AdminError> {
    let cluster = Cluster::read(metadata).await?;
    let nodes = Nodes::read(metadata).await?;
    let record = nodes.records.get(&replaced.new);
    let record = record.ok_or_else(|| AdminError::UnknownPeer { wanted: replaced.new.to_string() })?;
    // In this order: what the node holds when it is asked can only grow until the statuses are read.
    let (told, silent) = match control::ask_instances(&record.control, None, NODE_PATIENCE).await {
        Ok(told) => (told, None),
        Err(error) => (Vec::new(), Some(error.to_string())),
    };
    let held = held_slices(&cluster, &told, replaced.number);
    let statuses = snapshot::statuses(metadata).await?;
    let owners = snapshot::by_volume::<_, OwnerRecord>(metadata, &keys::owners()).await?;
    let volumes = snapshot::volumes(metadata).await?;
    let mut left = Left { volumes: 0, slices: 0, stuck: vec![], sentence: String::new(), unmarked: vec![] };
    let mut all = 0;
    for volume in volumes.into_iter().filter(|volume| volume.state == VolumeState::Ready) {
        let (status, revision) = statuses.get(&volume.id).cloned().map_or_else(Default::default, |(s, r)| (s, Some(r)));
        let slices = slices_of(&cluster, &volume, &status);
        let placed = slices.iter().filter(|slice| slice.replicas.iter().any(|(s, _)| s.node == replaced.number));
        let generation = holder(&cluster, replaced.number, &volume).map(|(_, generation)| generation);
        let is_held = |slice: SliceId| held.get(&(volume.id, slice)).copied() == generation;
        let (mut open, mut unmarked, mut stuck) = (0, Vec::new(), false);
        for slice in placed {
            all += 1;
            let counts = slice.is_in_sync_on(replaced.number);
            if counts && is_held(slice.slice) {
                continue;
            }
            open += 1;
            let others = slice.in_sync().filter(|shard| shard.node != replaced.number).count();
            stuck |= others == 0;
            if counts && silent.is_none() {
                unmarked.push(slice.slice);
            }
        }
        left.slices += open;
        left.volumes += usize::from(open > 0);
        if stuck {
            left.stuck.push(volume.name.clone());
        } else if !unmarked.is_empty() && !owners.contains_key(&volume.id) {
            let (node, slices, ring) = (replaced.number, unmarked, cluster.ring_entry.mod_revision);
            left.unmarked.push(Unmarked { volume, node, slices, status, revision, ring });
        }
    }
    left.sentence = sentence(&left, all, silent);
    Ok(left)
}

fn sentence(left: &Left, all: usize, silent: Option<String>) -> String {
    let mut said = match left.slices {
        0 => format!("in sync: all {all} slices"),
        open => format!("{open} of {all} slices of {} volumes are still to be filled", left.volumes),
    };
    if !left.stuck.is_empty() {
        said +=
            &format!("; with no other replica in sync, and not filled until one is back: {}", left.stuck.join(", "));
    }
    if let Some(error) = silent {
        said += &format!("; {error}");
    }
    said
}

type Held = BTreeMap<(VolumeId, SliceId), torus_schema::ids::RingGeneration>;

/// The generations of the instances that are whole, each on the shard where the ring has the slice.
fn held_slices(cluster: &Cluster, told: &[ShardInstances], number: NodeNumber) -> Held {
    let mut held = BTreeMap::new();
    let ring = &cluster.ring;
    let most = ring.replicas_max() as u8;
    for shard in told {
        for volume in &shard.volumes {
            for group in volume.slices.iter().filter(|group| group.valid) {
                for slice in group.slices.iter().filter(|slice| slice.0 < ring.slices()) {
                    let is_here = |id: &&torus_schema::ids::ShardId| id.node == number && id.shard == shard.index;
                    if ring.replicas(*slice, most).iter().any(|id| is_here(&id)) {
                        held.insert((volume.volume, *slice), group.generation);
                    }
                }
            }
        }
    }
    held
}

/// Only where nobody owns the volume and nothing changed since it was looked at; a volume that is left out is attached,
/// or looked at again.
async fn mark<M: Metadata>(metadata: &M, unmarked: &[Unmarked]) -> Result<(), AdminError> {
    for Unmarked { volume, node, slices, status, revision, ring } in unmarked {
        let key = keys::status(volume.id);
        let next = with_stale(status, *node, slices, VersionRecord::default(), now_s());
        let unchanged = match revision {
            Some(revision) => Compare::ModRevision(key.clone(), *revision),
            None => Compare::Absent(key.clone()),
        };
        let transaction = Transaction {
            compares: vec![
                unchanged,
                Compare::Absent(keys::owner(volume.id)),
                Compare::Present(keys::volume(volume.id)),
                Compare::ModRevision(keys::ring(), *ring),
            ],
            writes: vec![Write::Put { key, value: encode(&next), lease: None }],
            reads: vec![],
        };
        metadata.transact(transaction).await?;
    }
    Ok(())
}
