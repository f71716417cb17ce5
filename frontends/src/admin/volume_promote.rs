//! `torusadm volume promote NAME NODE`: the replicas in sync of some slices are lost for good, and a stale one is to count
//! instead. It loses writes, so it says first which, and acts only on a repeated word (protocol rule 16).
//!
//! For each of these slices NODE's replica becomes the one in sync, and every other is stale since the mark that NODE's
//! had, or since its own if that is lower. What they got after that mark is taken back when they return (rule 11): the
//! promoted state replaces it, even where it is older.
//!
//! Why the flush point F may stay above what the promoted replica has: F says that everything up to it is durable on
//! every replica in sync. An attach uses it in two places. Reconcile compares the records above F among the replicas in sync
//! of a slice; a promoted slice has only one, so there is nothing to compare, and all of it is fdatasynced before
//! F = (epoch, 0) is said. And a replica that goes stale later is stale since F: one of a promoted slice got in sync only by
//! a resync from the promoted one, and so has what that has up to any F.
//! Epochs go on from the one that is stored, so no version is used twice.
//!
//! A replica that kept its data from an earlier stay in its place (another node replaced it, and it has come back) is of an
//! earlier generation, and nothing says what it missed meanwhile. It is promoted as stale since zero, in three steps: it is listed
//! as stale since zero; its instances are created in this generation, which keeps their data; and only then it counts.

use super::snapshot::{Cluster, Found, Nodes};
use super::standing::{SliceStanding, name_of, slices_of, stale_in, with_stale, without_stale};
use super::unowned::without_owner;
use super::volume_create::create_instances_on;
use super::volume_regressed;
use super::{AdminError, Report, now_s};
use clap::Args;
use futures::future::join_all;
use serde_json::json as object;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use torus_rpc::control::{self, ShardInstances};
use torus_rpc::metadata::{Compare, Metadata, Revision, Transaction, Write};
use torus_rpc::runtime::Runtime;
use torus_schema::ids::{Epoch, NodeId, NodeNumber, RingGeneration, ShardId, SliceId, Version, VolumeId};
use torus_schema::records::{EpochRecord, StatusRecord, VersionRecord, encode, keys};

#[derive(Args, Clone, Debug)]
pub struct PromoteArguments {
    pub name: String,
    /// Uuid or address of the node whose stale replicas are to count
    pub node: String,
    /// Further nodes, for slices of which those before have nothing; only after the metadata store was restored from a backup
    pub others: Vec<String>,
    /// Do it: what was written after this version, which the command shows without this option, is lost
    #[arg(long, value_name = "VERSION")]
    pub yes_lose_writes_since: Option<String>,
}

/// What the nodes with a heartbeat hold of the volume; those that did not answer are missing.
pub type Told = BTreeMap<NodeId, Vec<ShardInstances>>;

/// Nodes get half of `deadline`.
pub async fn run<R: Runtime>(
    runtime: &R,
    arguments: &PromoteArguments,
    deadline: Duration,
) -> Result<Report, AdminError> {
    let found = Found::read(runtime.metadata(), &arguments.name).await?;
    let nodes = Nodes::read(runtime.metadata()).await?;
    let told = ask(&nodes, found.record.id, deadline / 2).await;
    promote(runtime, arguments, &told, deadline).await
}

async fn ask(nodes: &Nodes, volume: VolumeId, patience: Duration) -> Told {
    let up = nodes.records.values().filter(|record| nodes.heartbeats.contains_key(&record.id));
    let asked = up.map(|record| async move {
        let answer = control::ask_instances(&record.control, Some(volume), patience).await;
        answer.ok().map(|instances| (record.id, instances))
    });
    join_all(asked).await.into_iter().flatten().collect()
}

/// One slice that is to be promoted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Promoted {
    slice: SliceId,
    shard: ShardId,
    since: VersionRecord,
    stale_s: u64,
    /// Its instance is of an earlier generation.
    is_earlier: bool,
    /// The other replicas, which go stale since then, and whether each was in sync.
    others: Vec<(ShardId, bool)>,
}

struct Plan {
    promoted: Vec<Promoted>,
    /// Slices without any replica in sync that can be reached, for which the node cannot stand in either.
    left: Vec<SliceId>,
}

impl Plan {
    fn lowest(&self) -> VersionRecord {
        self.promoted.iter().map(|promoted| promoted.since).min().unwrap_or_default()
    }
}

pub async fn promote<R: Runtime>(
    runtime: &R,
    arguments: &PromoteArguments,
    told: &Told,
    deadline: Duration,
) -> Result<Report, AdminError> {
    let metadata = runtime.metadata();
    let cluster = Cluster::read(metadata).await?;
    let nodes = Nodes::read(metadata).await?;
    let found = Found::read(metadata, &arguments.name).await?;
    if found.epoch.is_some_and(|epoch| epoch.regressed.is_some()) {
        return volume_regressed::promote(runtime, arguments, told).await;
    }
    if !arguments.others.is_empty() {
        return Err(AdminError::OneNode { name: arguments.name.clone() });
    }
    let id = *super::peer::select(&nodes, std::slice::from_ref(&arguments.node))?.first().ok_or(AdminError::NoPeers)?;
    let member = cluster.ring.node_by_id(id).ok_or_else(|| AdminError::NotMember { node: nodes.name(id) })?;
    let number = member.number;
    let Some(confirmed) = &arguments.yes_lose_writes_since else {
        let plan = plan(&cluster, &nodes, &found, told, number)?;
        return Ok(describe(&cluster, &nodes, &found, &plan, number, false));
    };
    let (found, unowned) = without_owner(runtime, &arguments.name).await?;
    let result = async {
        let plan = plan(&cluster, &nodes, &found, told, number)?;
        let expected = Version::from(plan.lowest()).to_string();
        if *confirmed != expected {
            return Err(AdminError::OtherLoss { found: confirmed.clone(), expected });
        }
        apply(runtime, &cluster, &nodes, &found, &plan, deadline).await?;
        Ok(describe(&cluster, &nodes, &found, &plan, number, true))
    };
    let result = result.await;
    unowned.release(runtime).await;
    result
}

/// Which slices have nobody else, and what of them the node has.
fn plan(cluster: &Cluster, nodes: &Nodes, found: &Found, told: &Told, number: NodeNumber) -> Result<Plan, AdminError> {
    let mut plan = Plan { promoted: vec![], left: vec![] };
    let instances = Instances { cluster, nodes, told, found };
    let slices = slices_of(cluster, &found.record, &found.status);
    let lacking = slices.iter().filter(|slice| !slice.in_sync().any(|shard| instances.may_serve(shard, slice.slice)));
    for standing in lacking {
        match instances.promoted(standing, number) {
            Some(promoted) => plan.promoted.push(promoted),
            None => plan.left.push(standing.slice),
        }
    }
    if plan.promoted.is_empty() {
        let (name, node) = (found.record.name.clone(), name_of(cluster, nodes, number));
        let because = match plan.left.len() {
            0 => "every slice has a replica in sync whose node is up: wait for it, or if there are fewer than the minimum, \
                  `volume set --min-replicas`"
                .to_string(),
            left => format!("{left} slices have no replica in sync that is up, but this node has nothing of them either"),
        };
        return Err(AdminError::NothingToPromote { name, node, because });
    }
    Ok(plan)
}

struct Instances<'a> {
    cluster: &'a Cluster,
    nodes: &'a Nodes,
    told: &'a Told,
    found: &'a Found,
}

impl Instances<'_> {
    /// Of the slice on that shard: the generation, if it is there and whole.
    fn held(&self, shard: ShardId, slice: SliceId) -> Option<RingGeneration> {
        let node = self.cluster.ring.node(shard.node)?.id;
        let told = self.told.get(&node)?.iter().find(|told| told.index == shard.shard && told.failed.is_none())?;
        let volume = told.volumes.iter().find(|held| held.volume == self.found.record.id)?;
        volume.slice(slice).filter(|(_, valid)| *valid).map(|(generation, _)| generation)
    }

    fn expected(&self, node: NodeNumber) -> RingGeneration {
        self.cluster.ring.instance_generation(node, self.found.record.generation)
    }

    /// A replica in sync that an attach may find. One that is up and did not say what it holds may be one.
    fn may_serve(&self, shard: ShardId, slice: SliceId) -> bool {
        let Some(node) = self.cluster.ring.node(shard.node) else { return false };
        match self.told.contains_key(&node.id) {
            true => self.held(shard, slice) == Some(self.expected(shard.node)),
            false => self.nodes.heartbeats.contains_key(&node.id),
        }
    }

    fn promoted(&self, standing: &SliceStanding, number: NodeNumber) -> Option<Promoted> {
        let (shard, stale) = *standing.replicas.iter().find(|(shard, _)| shard.node == number)?;
        let held = self.held(shard, standing.slice)?;
        let is_earlier = held != self.expected(number);
        let since = match stale {
            Some(stale) if !is_earlier => stale.since,
            _ => VersionRecord::default(),
        };
        let others = standing.replicas.iter().filter(|(other, _)| *other != shard);
        Some(Promoted {
            slice: standing.slice,
            shard,
            since,
            stale_s: stale.map_or(0, |stale| stale.stale_s),
            is_earlier,
            others: others.map(|(other, stale)| (*other, stale.is_none())).collect(),
        })
    }
}

async fn apply<R: Runtime>(
    runtime: &R,
    cluster: &Cluster,
    nodes: &Nodes,
    found: &Found,
    plan: &Plan,
    deadline: Duration,
) -> Result<(), AdminError> {
    let metadata = runtime.metadata();
    let (mut status, mut revision) = (found.status.clone(), found.status_revision);
    let earlier: Vec<&Promoted> = plan.promoted.iter().filter(|promoted| promoted.is_earlier).collect();
    if let Some(first) = earlier.first() {
        let slices: Vec<SliceId> = earlier.iter().map(|promoted| promoted.slice).collect();
        status = with_stale(&status, first.shard.node, &slices, VersionRecord::default(), now_s());
        revision = Some(store(metadata, cluster, found, &status, revision, false).await?);
        let mut by_shard: BTreeMap<ShardId, Vec<SliceId>> = BTreeMap::new();
        for promoted in &earlier {
            by_shard.entry(promoted.shard).or_default().push(promoted.slice);
        }
        for (shard, slices) in by_shard {
            create_instances_on(runtime, cluster, nodes, &found.record, shard, slices, deadline / 2).await?;
        }
    }
    let next = plan.promoted.iter().fold(status, |status, promoted| promoted_status(&status, promoted));
    store(metadata, cluster, found, &next, revision, true).await.map(drop)
}

fn promoted_status(status: &StatusRecord, promoted: &Promoted) -> StatusRecord {
    let mut next = without_stale(status, promoted.shard.node, &[promoted.slice]);
    for (other, _) in &promoted.others {
        let listed = stale_in(status, other.node, promoted.slice).map(|stale| stale.since);
        let since = listed.map_or(promoted.since, |listed| listed.min(promoted.since));
        next = with_stale(&next, other.node, &[promoted.slice], since, now_s());
    }
    next
}

/// Nobody attached, and nothing that was looked at has changed.
async fn store<M: Metadata>(
    metadata: &M,
    cluster: &Cluster,
    found: &Found,
    status: &StatusRecord,
    revision: Option<Revision>,
    is_last: bool,
) -> Result<Revision, AdminError> {
    let volume = found.record.id;
    let (key, value) = (keys::status(volume), encode(status));
    let unchanged = |key: &str, revision: Option<Revision>| match revision {
        Some(revision) => Compare::ModRevision(key.to_string(), revision),
        None => Compare::Absent(key.to_string()),
    };
    // A writer that lost its key, and was cut off with the replicas it knew, must not take the volume again with them.
    let epoch_key = keys::epoch(volume);
    let epoch = found.epoch.unwrap_or_default();
    let epoch = EpochRecord { epoch: Epoch(epoch.epoch.0 + 1), ..epoch };
    let mut transaction = Transaction {
        compares: vec![
            unchanged(&key, revision),
            unchanged(&epoch_key, found.epoch_revision),
            Compare::Absent(keys::owner(volume)),
            Compare::ModRevision(keys::volume(volume), found.entry.mod_revision),
            Compare::ModRevision(keys::ring(), cluster.ring_entry.mod_revision),
        ],
        writes: vec![Write::Put { key, value, lease: None }],
        reads: vec![],
    };
    if is_last {
        transaction.writes.push(Write::Put { key: epoch_key, value: encode(&epoch), lease: None });
    }
    match metadata.transact(transaction).await? {
        result if result.applied => Ok(result.revision),
        _ => Err(AdminError::ChangedMeanwhile { name: found.record.name.clone() }),
    }
}

fn describe(cluster: &Cluster, nodes: &Nodes, found: &Found, plan: &Plan, number: NodeNumber, is_done: bool) -> Report {
    let node = name_of(cluster, nodes, number);
    let (name, lowest) = (&found.record.name, Version::from(plan.lowest()));
    let mut marks: BTreeMap<(VersionRecord, u64, bool), Vec<&Promoted>> = BTreeMap::new();
    for promoted in &plan.promoted {
        marks.entry((promoted.since, promoted.stale_s, promoted.is_earlier)).or_default().push(promoted);
    }
    let (verb, will) = if is_done { ("was promoted", "is") } else { ("would be promoted", "would be") };
    let mut summary = vec![format!(
        "{name}: {} of {} slices have no replica in sync that is up; there {node} {verb}",
        plan.promoted.len(),
        found.record.width
    )];
    for ((since, stale_s, is_earlier), slices) in &marks {
        let when = match (is_earlier, stale_s) {
            (true, _) => "it held the place before another node did, and what it missed since is not known".to_string(),
            (false, 0) => "when is not known".to_string(),
            (false, at) => format!("stale {}", super::output::ago(now_s().saturating_sub(*at))),
        };
        let since = Version::from(*since);
        summary.push(format!(
            "LOST: {} slices: everything written after version {since} ({when}); some of it may be there in part",
            slices.len()
        ));
    }
    let newer: BTreeSet<ShardId> = plan
        .promoted
        .iter()
        .flat_map(|promoted| &promoted.others)
        .filter(|(_, in_sync)| *in_sync)
        .map(|(s, _)| *s)
        .collect();
    for number in newer.iter().map(|shard| shard.node).collect::<BTreeSet<_>>() {
        let node = name_of(cluster, nodes, number);
        summary.push(format!("{node} may have newer data; it {will} overwritten if that node comes back"));
    }
    if !plan.left.is_empty() {
        summary.push(format!(
            "{} more slices have no replica in sync that is up, and {node} has nothing of them",
            plan.left.len()
        ));
    }
    match is_done {
        false => summary.push(format!(
            "nothing was changed. To do it: torusadm volume promote {name} {} --yes-lose-writes-since {lowest}",
            cluster.ring.node(number).map_or_else(String::new, |node| node.id.to_string())
        )),
        true if found.record.min_replicas > 1 => summary.push(format!(
            "next: with one replica in sync of at least {} it cannot be attached: `torusadm volume set {name} --min-replicas 1`, \
             then `torusadm peer replace` for the nodes that are lost",
            found.record.min_replicas
        )),
        true => summary.push("next: `torusadm peer replace` for the nodes that are lost".to_string()),
    }
    let slice = |promoted: &Promoted| {
        object!({"slice": promoted.slice, "since": promoted.since, "stale_s": promoted.stale_s,
                 "earlier_generation": promoted.is_earlier})
    };
    let document = object!({
        "volume": name, "uuid": found.record.id, "node": number, "done": is_done, "lost_since": lowest.to_string(),
        "slices": plan.promoted.iter().map(slice).collect::<Vec<_>>(), "left": plan.left,
    });
    Report { summary, json: document, ..Report::default() }
}
