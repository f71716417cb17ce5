//! `torusadm status`: the cluster's health in its first line, then what is behind it, in one screen. `--output json` has
//! all of it.

use super::facts::{Facts, gather};
use super::output::percent;
use super::standing::{name_of, slices_of};
use super::{AdminError, Report, now_s};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use torus_rpc::metadata::Metadata;
use torus_schema::ids::{NodeId, NodeNumber, SliceId, VolumeId};
use torus_schema::limits::BLOCK_BYTES;
use torus_schema::records::{StatusRecord, VolumeRecord, VolumeState};
use torus_schema::size;

/// Lines of one kind that a screen has room for.
const LINES_MAX: usize = 8;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Health {
    Healthy,
    Degraded,
    Unavailable,
}

impl Health {
    fn word(self) -> &'static str {
        match self {
            Health::Healthy => "HEALTHY",
            Health::Degraded => "DEGRADED",
            Health::Unavailable => "UNAVAILABLE",
        }
    }
}

/// Ends within `deadline`; nodes get half of it.
pub async fn status<M: Metadata>(metadata: &M, deadline: Duration) -> Result<Report, AdminError> {
    Ok(assess(&gather(metadata, deadline / 2).await?, now_s()))
}

/// One kind of thing that somebody should know of.
struct Finding {
    health: Health,
    /// For the first line; empty: it is not worth a place there.
    headline: String,
    lines: Vec<String>,
}

pub(super) fn assess(facts: &Facts, now_s: u64) -> Report {
    let volumes = Volumes::assess(facts, now_s);
    let orphans = orphans(facts);
    let findings = [
        volumes.unavailable(),
        volumes.degraded(),
        nodes_down(facts),
        nodes_silent(facts),
        disks(facts),
        damage(facts),
        unfinished(facts),
        deletions(facts),
        orphan_finding(facts, &orphans),
    ];
    let health = findings.iter().filter(|finding| !finding.lines.is_empty()).map(|finding| finding.health).max();
    let health = health.unwrap_or(Health::Healthy);
    let headlines: Vec<&str> =
        findings.iter().map(|finding| finding.headline.as_str()).filter(|headline| !headline.is_empty()).collect();
    let title = match headlines.is_empty() {
        true => health.word().to_string(),
        false => format!("{}: {}", health.word(), headlines.join("; ")),
    };
    let mut summary = Vec::new();
    for finding in &findings {
        summary.extend(finding.lines.iter().take(LINES_MAX).cloned());
        if finding.lines.len() > LINES_MAX {
            summary.push(format!("  and {} more of these; --output json has all", finding.lines.len() - LINES_MAX));
        }
    }
    let rows = rows(facts, volumes.stale_slices());
    let document = document(facts, health, &volumes, &orphans);
    Report { title, header: vec!["WHAT", "STATE"], rows, summary, json: document, ..Report::default() }
}

fn rows(facts: &Facts, stale_slices: usize) -> Vec<Vec<String>> {
    let ring = &facts.cluster.ring;
    let (up, down) = up_and_down(facts);
    let creating = facts.volumes.iter().filter(|volume| volume.state == VolumeState::Creating).count();
    let ring_bytes: u64 = ring.nodes().iter().map(|node| node.weight_bytes()).sum();
    let repairs = facts.owners.values().filter(|owner| owner.repair).count();
    let row = |what: &str, value: String| vec![what.to_string(), value];
    vec![
        row("cluster", facts.cluster.record.id.to_string()),
        row(
            "ring",
            format!("generation {}, {} nodes, {} slices", ring.generation(), ring.nodes().len(), ring.slices()),
        ),
        row("nodes", format!("{up} up, {} down", down.len())),
        row(
            "capacity",
            format!("{} in the ring, {} used", size::format(ring_bytes), percent(used_bytes(facts), ring_bytes)),
        ),
        row(
            "volumes",
            format!(
                "{} ready, {creating} being created, {} attached, {repairs} being repaired unattached",
                facts.volumes.len() - creating,
                facts.owners.len() - repairs
            ),
        ),
        row("stale replicas", format!("{stale_slices} slices of {} volumes", degraded_count(facts))),
        row("deleting", format!("{} volumes", facts.deleting.len())),
    ]
}

fn degraded_count(facts: &Facts) -> usize {
    facts.statuses.values().filter(|(status, _)| !status.stale.is_empty()).count()
}

fn used_bytes(facts: &Facts) -> u64 {
    facts.nodes.heartbeats.values().flat_map(|beat| &beat.shards).map(|shard| shard.used_bytes).sum()
}

fn up_and_down(facts: &Facts) -> (usize, Vec<NodeId>) {
    let down = facts.nodes.records.keys().filter(|node| !facts.nodes.heartbeats.contains_key(node));
    let down: Vec<NodeId> = down.copied().collect();
    (facts.nodes.records.len() - down.len(), down)
}

/// One node's stale replicas of one volume.
struct Behind {
    node: NodeNumber,
    slices: usize,
    /// What is being done about it.
    sentence: String,
    document: Value,
}

struct Volumes {
    /// Slices that have too few replicas in sync on nodes that are up.
    too_few: Vec<(String, usize)>,
    behind: Vec<(String, Behind)>,
    names: BTreeMap<NodeNumber, String>,
}

impl Volumes {
    fn assess(facts: &Facts, now_s: u64) -> Self {
        let mut found = Self { too_few: vec![], behind: vec![], names: BTreeMap::new() };
        for node in facts.cluster.ring.nodes() {
            found.names.insert(node.number, name_of(&facts.cluster, &facts.nodes, node.number));
        }
        let none = StatusRecord::default();
        for volume in facts.volumes.iter().filter(|volume| volume.state == VolumeState::Ready) {
            let status = facts.statuses.get(&volume.id).map_or(&none, |(status, _)| status);
            let serving = |slice: &super::standing::SliceStanding| {
                slice.in_sync().filter(|shard| is_serving(facts, *shard)).count() >= usize::from(volume.min_replicas)
            };
            let too_few = slices_of(&facts.cluster, volume, status).iter().filter(|slice| !serving(slice)).count();
            if too_few > 0 {
                found.too_few.push((volume.name.clone(), too_few));
            }
            let nodes: BTreeSet<NodeNumber> = status.stale.iter().map(|stale| stale.node).collect();
            for node in nodes {
                found.behind.push((volume.name.clone(), behind(facts, volume, status, node, now_s)));
            }
        }
        found
    }

    fn stale_slices(&self) -> usize {
        self.behind.iter().map(|(_, behind)| behind.slices).sum()
    }

    fn unavailable(&self) -> Finding {
        let line = |(name, slices): &(String, usize)| {
            format!("unavailable: {name}: {slices} slices have fewer replicas in sync and up than its minimum")
        };
        let count = self.too_few.len();
        let headline = if count > 0 { format!("{count} volumes cannot be written") } else { String::new() };
        Finding { health: Health::Unavailable, headline, lines: self.too_few.iter().map(line).collect() }
    }

    fn degraded(&self) -> Finding {
        let line = |(name, behind): &(String, Behind)| {
            let unknown = "a node of no ring".to_string();
            let node = self.names.get(&behind.node).unwrap_or(&unknown);
            format!("degraded: {name}: {} slices on {node} stale {}", behind.slices, behind.sentence)
        };
        let volumes: BTreeSet<&str> = self.behind.iter().map(|(name, _)| name.as_str()).collect();
        let count = volumes.len();
        let headline = if count > 0 { format!("{count} volumes have stale replicas") } else { String::new() };
        Finding { health: Health::Degraded, headline, lines: self.behind.iter().map(line).collect() }
    }
}

/// Its node is up, and its disk too.
fn is_serving(facts: &Facts, shard: torus_schema::ids::ShardId) -> bool {
    let beat = facts.cluster.ring.node(shard.node).and_then(|node| facts.nodes.heartbeats.get(&node.id));
    beat.is_some_and(|beat| beat.shards.iter().all(|usage| usage.index != shard.shard || usage.failed.is_none()))
}

fn behind(facts: &Facts, volume: &VolumeRecord, status: &StatusRecord, node: NodeNumber, now_s: u64) -> Behind {
    let entries: Vec<_> = status.stale.iter().filter(|stale| stale.node == node).collect();
    let slices = entries.iter().map(|stale| stale.slices.len()).sum();
    let stale_s = entries.iter().map(|stale| stale.stale_s).min().unwrap_or(0);
    let resync = facts.resyncs.get(&volume.id);
    let resync = resync.and_then(|record| record.nodes.iter().find(|told| told.node == node).map(|t| (record, t)));
    let owner = facts.owners.get(&volume.id);
    let is_up = facts.cluster.ring.node(node).is_some_and(|node| facts.nodes.heartbeats.contains_key(&node.id));
    let for_s = if stale_s > 0 { format!("for {}", lasting(now_s.saturating_sub(stale_s))) } else { String::new() };
    let doing = match (resync, owner, is_up) {
        (Some((_, told)), ..) => {
            let left = told.left_s.map_or("time left not known yet".to_string(), |s| format!("{} left", lasting(s)));
            let (done, all) = (told.slices_done, told.slices);
            let (moved, rate) = (size::format(told.pulled_bytes), size::format(told.rate_bytes_s));
            format!("resync: {done} of {all} slices, {moved} copied, {rate}/s, {left}")
        }
        (None, _, false) => "its node is down".to_string(),
        (None, Some(owner), true) if owner.repair => format!("{} is about to repair it", owner.host),
        (None, Some(owner), true) => format!("{} is about to bring it up to date", owner.host),
        (None, None, true) => "not attached; a storage node repairs it soon".to_string(),
    };
    let document = json!({
        "volume": volume.name,
        "uuid": volume.id,
        "node": node,
        "slices": slices,
        "stale_s": stale_s,
        "node_up": is_up,
        "owner": owner.map(|owner| &owner.host),
        "repair": owner.is_some_and(|owner| owner.repair),
        "resync": resync.map(|(record, told)| json!({"updated_s": record.updated_s, "progress": told})),
    });
    Behind { node, slices, sentence: format!("{for_s}: {doing}").trim_start().to_string(), document }
}

/// `5 seconds`
fn lasting(seconds: u64) -> String {
    super::output::ago(seconds).trim_end_matches(" ago").to_string()
}

fn nodes_down(facts: &Facts) -> Finding {
    let (_, down) = up_and_down(facts);
    let members = down.iter().filter(|node| facts.cluster.ring.node_by_id(**node).is_some()).count();
    let line = |node: &NodeId| match facts.cluster.ring.node_by_id(*node) {
        Some(_) => format!("down: {}; start it again, or `torusadm peer replace` it", facts.nodes.name(*node)),
        None => format!("down: {}, not in the ring", facts.nodes.name(*node)),
    };
    let headline = if members > 0 { format!("{members} nodes are down") } else { String::new() };
    let health = if members > 0 { Health::Degraded } else { Health::Healthy };
    Finding { health, headline, lines: down.iter().map(line).collect() }
}

fn nodes_silent(facts: &Facts) -> Finding {
    let line = |(_, because): (&NodeId, &String)| format!("silent: {because}");
    let lines: Vec<String> = facts.told.silent.iter().map(line).collect();
    let headline = if lines.is_empty() { String::new() } else { format!("{} nodes do not answer", lines.len()) };
    Finding { health: Health::Degraded, headline, lines }
}

fn disks(facts: &Facts) -> Finding {
    let beats = facts.nodes.heartbeats.values();
    let failed = beats.flat_map(|beat| beat.shards.iter().map(move |shard| (beat.node, shard)));
    let line = |(node, shard): (NodeId, &torus_schema::records::ShardUsage)| {
        let because = shard.failed.as_ref()?;
        Some(format!("disk: shard {} of {} answers nothing: {because}", shard.index, facts.nodes.name(node)))
    };
    let lines: Vec<String> = failed.filter_map(line).collect();
    let headline = if lines.is_empty() { String::new() } else { format!("{} disks failed", lines.len()) };
    Finding { health: Health::Degraded, headline, lines }
}

fn damage(facts: &Facts) -> Finding {
    let (mut lines, mut total) = (Vec::new(), 0);
    for (node, shards) in &facts.told.damage {
        for shard in shards.iter().filter(|shard| shard.damaged + shard.conflicts > 0) {
            let (index, damaged, conflicts) = (shard.index, shard.damaged, shard.conflicts);
            let name = facts.nodes.name(*node);
            lines.push(format!(
                "damage: shard {index} of {name}: {damaged} blocks cannot be read, {conflicts} differ from a peer's; see `torusadm scrub status --damaged`"
            ));
            total += damaged + conflicts;
        }
    }
    let headline = if lines.is_empty() { String::new() } else { format!("{total} blocks are damaged") };
    Finding { health: Health::Degraded, headline, lines }
}

fn unfinished(facts: &Facts) -> Finding {
    let creating = facts.volumes.iter().filter(|volume| volume.state == VolumeState::Creating);
    let line = |volume: &VolumeRecord| {
        format!("unfinished: {} is being created, or was cut off: `volume delete` it then", volume.name)
    };
    Finding { health: Health::Healthy, headline: String::new(), lines: creating.map(line).collect() }
}

fn deletions(facts: &Facts) -> Finding {
    let awaited = facts.deleting.iter().flat_map(|(volume, record)| record.holders.iter().map(move |n| (volume, n)));
    let line =
        |(volume, node): (&VolumeId, &NodeId)| format!("deleting {volume}: waits for {}", facts.nodes.name(*node));
    Finding { health: Health::Healthy, headline: String::new(), lines: awaited.map(line).collect() }
}

/// Data that nothing in the metadata store accounts for. Nothing is freed because of it: the store may have been
/// restored from a backup.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Orphan {
    pub node: NodeId,
    pub volume: VolumeId,
    /// The volume's name, if it is there: then the node holds places of it that it no longer has.
    pub of: Option<String>,
    pub slices: usize,
    /// Of the volume on this node, those that are in place included.
    pub blocks: u64,
}

pub(super) fn orphans(facts: &Facts) -> Vec<Orphan> {
    let volumes: BTreeMap<VolumeId, &VolumeRecord> = facts.volumes.iter().map(|volume| (volume.id, volume)).collect();
    let mut found = Vec::new();
    for (node, shards) in &facts.told.instances {
        for shard in shards {
            for held in &shard.volumes {
                let record = volumes.get(&held.volume).copied();
                if record.is_none() && facts.known.contains(&held.volume) {
                    continue;
                }
                let number = facts.cluster.ring.node_by_id(*node).map(|member| member.number);
                let is_in_place = |slice: SliceId, generation| {
                    let (Some(volume), Some(number)) = (record, number) else { return false };
                    let ring = &facts.cluster.ring;
                    let placed = usize::from(volume.replicas) <= ring.replicas_max() && slice.0 < ring.slices();
                    let here = |id: &torus_schema::ids::ShardId| id.node == number && id.shard == shard.index;
                    placed
                        && ring.replicas(slice, volume.replicas).iter().any(here)
                        && generation == ring.instance_generation(number, volume.generation)
                };
                let misplaced =
                    held.slices.iter().flat_map(|group| group.slices.iter().map(|s| (*s, group.generation)));
                let slices = misplaced.filter(|(slice, generation)| !is_in_place(*slice, *generation)).count();
                if slices > 0 {
                    let of = record.map(|volume| volume.name.clone());
                    found.push(Orphan { node: *node, volume: held.volume, of, slices, blocks: held.blocks });
                }
            }
        }
    }
    found
}

fn orphan_finding(facts: &Facts, orphans: &[Orphan]) -> Finding {
    let line = |orphan: &Orphan| {
        let (slices, bytes) = (orphan.slices, size::format(orphan.blocks * BLOCK_BYTES));
        let node = facts.nodes.name(orphan.node);
        match &orphan.of {
            None => format!(
                "orphan: {node} holds {slices} slices ({bytes}) of {}, of which there is no record",
                orphan.volume
            ),
            Some(name) => format!(
                "left over: {node} holds {slices} slices of {name} that are not its place any more ({bytes} of the volume there)"
            ),
        }
    };
    Finding { health: Health::Healthy, headline: String::new(), lines: orphans.iter().map(line).collect() }
}

fn document(facts: &Facts, health: Health, volumes: &Volumes, orphans: &[Orphan]) -> Value {
    let ring = &facts.cluster.ring;
    let (up, down) = up_and_down(facts);
    let creating = facts.volumes.iter().filter(|volume| volume.state == VolumeState::Creating).count();
    let failed = facts.nodes.heartbeats.values().flat_map(|beat| {
        let failed = beat.shards.iter().filter(|shard| shard.failed.is_some());
        failed.map(|shard| json!({"node": beat.node, "shard": shard.index, "because": shard.failed}))
    });
    let damaged = facts.told.damage.iter().flat_map(|(node, shards)| {
        let damaged = shards.iter().filter(|shard| shard.damaged + shard.conflicts > 0);
        damaged.map(move |shard| {
            json!({"node": node, "shard": shard.index, "damaged": shard.damaged, "conflicts": shard.conflicts})
        })
    });
    let orphan = |orphan: &Orphan| {
        json!({"node": orphan.node, "volume": orphan.volume, "of": orphan.of, "slices": orphan.slices,
               "bytes": (orphan.blocks * BLOCK_BYTES).to_string()})
    };
    json!({
        "health": health.word(),
        "cluster": facts.cluster.record.id,
        "ring": {"generation": ring.generation(), "nodes": ring.nodes().len(), "slices": ring.slices()},
        "nodes": {"up": up, "down": down.len(), "down_nodes": down, "silent": facts.told.silent},
        "capacity_bytes": ring.nodes().iter().map(|node| node.weight_bytes()).sum::<u64>().to_string(),
        "used_bytes": used_bytes(facts).to_string(),
        "volumes": {"ready": facts.volumes.len() - creating, "creating": creating, "attached": facts.owners.len()},
        "unavailable": volumes.too_few.iter().map(|(name, slices)| json!({"volume": name, "slices": slices})).collect::<Vec<_>>(),
        "stale": {"slices": volumes.stale_slices(), "volumes": degraded_count(facts)},
        "degraded": volumes.behind.iter().map(|(_, behind)| &behind.document).collect::<Vec<_>>(),
        "disks_failed": failed.collect::<Vec<_>>(),
        "damaged": damaged.collect::<Vec<_>>(),
        "deleting": facts.deleting.values().collect::<Vec<_>>(),
        "orphans": orphans.iter().map(orphan).collect::<Vec<_>>(),
    })
}
