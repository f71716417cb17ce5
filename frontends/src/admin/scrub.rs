//! `torusadm scrub start`, `status`, `stop`: nodes read all they hold and verify it; what is damaged, and what two
//! replicas disagree on. Asked of the nodes themselves, at their control ports.

use super::output::ago;
use super::peer::select;
use super::snapshot::Nodes;
use super::{AdminError, Report, now_s};
use clap::{Args, Subcommand};
use futures::future::join_all;
use serde_json::{Value, json};
use std::time::Duration;
use torus_rpc::control::{
    self, ConflictingBlock, ControlError, DamagedBlock, Pass, ScrubOrder, ScrubStatus, ShardDamage, ShardScrub,
};
use torus_rpc::metadata::Metadata;
use torus_schema::ids::NodeId;
use torus_schema::limits::{BLOCK_BYTES, DAMAGE_TOLD_MAX};
use torus_schema::size;

#[derive(Subcommand, Clone, Debug)]
pub enum ScrubCommand {
    /// Begin a pass now, or go on with one that was stopped
    Start(NodeSelection),
    /// How far the passes are, and how the last ones ended
    Status(StatusArguments),
    /// Stop the pass that runs; `start` goes on with it
    Stop(NodeSelection),
}

#[derive(Args, Clone, Debug)]
pub struct NodeSelection {
    /// Uuid or address of a node, as `peer list` shows them. Default: every node that is up
    #[arg(value_name = "UUID|ADDRESS")]
    pub nodes: Vec<String>,
}

#[derive(Args, Clone, Debug)]
pub struct StatusArguments {
    #[command(flatten)]
    pub nodes: NodeSelection,
    /// List the blocks that cannot be read as they were written, and those of which two replicas hold different
    /// content under one version
    #[arg(long)]
    pub damaged: bool,
}

/// Nodes get most of the deadline, so that what they did not answer can still be told.
pub async fn run<M: Metadata>(metadata: &M, command: &ScrubCommand, deadline: Duration) -> Result<Report, AdminError> {
    let patience = deadline / 2;
    match command {
        ScrubCommand::Start(chosen) => order(metadata, &chosen.nodes, ScrubOrder::Start, patience).await,
        ScrubCommand::Stop(chosen) => order(metadata, &chosen.nodes, ScrubOrder::Stop, patience).await,
        ScrubCommand::Status(arguments) if arguments.damaged => {
            damaged(metadata, &arguments.nodes.nodes, patience).await
        }
        ScrubCommand::Status(arguments) => order(metadata, &arguments.nodes.nodes, ScrubOrder::Status, patience).await,
    }
}

struct Chosen {
    id: NodeId,
    address: String,
}

async fn choose<M: Metadata>(metadata: &M, wanted: &[String]) -> Result<Vec<Chosen>, AdminError> {
    let nodes = Nodes::read(metadata).await?;
    let ids: Vec<NodeId> = if wanted.is_empty() {
        nodes.heartbeats.keys().copied().collect()
    } else {
        select(&nodes, wanted)?.into_iter().collect()
    };
    let known = ids.into_iter().filter_map(|id| nodes.records.get(&id));
    Ok(known.map(|record| Chosen { id: record.id, address: record.control.clone() }).collect())
}

/// What the nodes answered, and a warning for each that did not.
type Told<'a, T> = (Vec<(&'a Chosen, T)>, Vec<String>);

/// A node that does not answer is a warning beside those that do; an order that reached nobody is an error.
fn split<T>(chosen: &[Chosen], answers: Vec<Result<T, ControlError>>) -> Result<Told<'_, T>, AdminError> {
    let (mut told, mut warnings) = (Vec::new(), Vec::new());
    let mut first = None;
    for (node, answer) in chosen.iter().zip(answers) {
        match answer {
            Ok(answer) => told.push((node, answer)),
            Err(error) => {
                warnings.push(error.to_string());
                first.get_or_insert(error);
            }
        }
    }
    match first {
        Some(error) if told.is_empty() => Err(AdminError::Control(error)),
        _ => Ok((told, warnings)),
    }
}

async fn order<M: Metadata>(
    metadata: &M,
    wanted: &[String],
    order: ScrubOrder,
    patience: Duration,
) -> Result<Report, AdminError> {
    let chosen = choose(metadata, wanted).await?;
    let asked = chosen.iter().map(|node| control::ask_scrub(&node.address, order, patience));
    let (told, warnings) = split(&chosen, join_all(asked).await)?;
    let (mut rows, mut documents) = (Vec::new(), Vec::new());
    for (node, status) in &told {
        rows.extend(status.shards.iter().map(|shard| row(node, shard)));
        documents.push(document(node, status));
    }
    let found: u64 =
        told.iter().flat_map(|(_, status)| &status.shards).filter_map(latest).map(|pass| pass.damaged).sum();
    let summary = vec![format!("{found} damaged blocks found; `scrub status --damaged` lists those not repaired yet")];
    Ok(Report {
        header: vec!["ADDRESS", "SHARD", "STATE", "STARTED", "DONE", "READ", "DAMAGED", "CONFLICTS", "LAST FINISHED"],
        rows,
        summary,
        json: json!({ "nodes": documents }),
        warnings,
        failed: false,
    })
}

fn latest(shard: &ShardScrub) -> Option<Pass> {
    shard.current.or(shard.last)
}

fn row(node: &Chosen, shard: &ShardScrub) -> Vec<String> {
    let state = match (shard.running, shard.current) {
        (true, _) => "running",
        (false, Some(_)) => "stopped",
        (false, None) => "idle",
    };
    let pass = latest(shard);
    let shown = |value: fn(&Pass) -> String| pass.as_ref().map_or("-".to_string(), value);
    vec![
        node.address.clone(),
        shard.index.to_string(),
        state.to_string(),
        shown(|pass| since(pass.started_s)),
        pass.map_or("-".to_string(), |pass| done(&pass, shard.segments)),
        shown(|pass| size::format(pass.blocks_read * BLOCK_BYTES)),
        shown(|pass| pass.damaged.to_string()),
        shown(|pass| pass.conflicts.to_string()),
        shard.last.map_or("-".to_string(), |last| since(last.finished_s)),
    ]
}

fn since(time_s: u64) -> String {
    ago(now_s().saturating_sub(time_s))
}

/// Comparing with the peers comes after the last segment, and is not counted.
fn done(pass: &Pass, segments: u32) -> String {
    let segment = if pass.finished_s > 0 { segments } else { pass.segment };
    format!("{segment}/{segments} segments")
}

fn document(node: &Chosen, status: &ScrubStatus) -> Value {
    let pass = |pass: Option<Pass>| {
        pass.map(|pass| {
            json!({
                "started_s": pass.started_s,
                "finished_s": (pass.finished_s > 0).then_some(pass.finished_s),
                "segment": pass.segment,
                "blocks_read": pass.blocks_read.to_string(),
                "blocks_compared": pass.blocks_compared.to_string(),
                "damaged": pass.damaged,
                "conflicts": pass.conflicts,
                "segments_unread": pass.segments_unread,
            })
        })
    };
    let shard = |shard: &ShardScrub| {
        json!({
            "shard": shard.index,
            "segments": shard.segments,
            "running": shard.running,
            "current": pass(shard.current),
            "last": pass(shard.last),
        })
    };
    json!({
        "uuid": node.id,
        "address": node.address,
        "rate_bytes_s": status.rate_bytes_s.to_string(),
        "next_s": (status.next_s > 0).then_some(status.next_s),
        "shards": status.shards.iter().map(shard).collect::<Vec<_>>(),
    })
}

async fn damaged<M: Metadata>(metadata: &M, wanted: &[String], patience: Duration) -> Result<Report, AdminError> {
    let chosen = choose(metadata, wanted).await?;
    let asked = chosen.iter().map(|node| control::ask_damage(&node.address, DAMAGE_TOLD_MAX, patience));
    let (told, mut warnings) = split(&chosen, join_all(asked).await)?;
    let (mut rows, mut documents) = (Vec::new(), Vec::new());
    let (mut damaged, mut conflicts) = (0, 0);
    for (node, shards) in &told {
        for shard in shards {
            rows.extend(shard.blocks.iter().map(|block| damaged_row(node, shard, block)));
            rows.extend(shard.conflict_list.iter().map(|conflict| conflict_row(node, shard, conflict)));
            documents.push(damage_document(node, shard));
            damaged += shard.damaged;
            conflicts += shard.conflicts;
        }
    }
    if conflicts > 0 {
        warnings.push(
            "two replicas hold different content under one version, and both are whole: none was touched; compare \
             them with what the application knows, and write those blocks anew"
                .to_string(),
        );
    }
    Ok(Report {
        header: vec!["ADDRESS", "SHARD", "VOLUME", "BLOCK", "VERSION", "WHAT", "FOUND"],
        rows,
        summary: vec![format!("{damaged} damaged blocks, {conflicts} conflicts")],
        json: json!({ "shards": documents, "damaged": damaged, "conflicts": conflicts }),
        warnings,
        failed: false,
    })
}

fn damaged_row(node: &Chosen, shard: &ShardDamage, block: &DamagedBlock) -> Vec<String> {
    let what = format!("damaged, {} repairs tried", block.attempts);
    let found = format!("by {}, {}", block.found_by, ago(block.age_s));
    let (volume, number, version) = (block.volume.to_string(), block.block.to_string(), block.version.to_string());
    vec![node.address.clone(), shard.index.to_string(), volume, number, version, what, found]
}

fn conflict_row(node: &Chosen, shard: &ShardDamage, conflict: &ConflictingBlock) -> Vec<String> {
    let ConflictingBlock { checksum_here, checksum_there, peer_node, peer_shard, .. } = conflict;
    let what = format!("{checksum_here:08x} here, {checksum_there:08x} on {peer_node} shard {peer_shard}");
    let (volume, number, version) =
        (conflict.volume.to_string(), conflict.block.to_string(), conflict.version.to_string());
    vec![node.address.clone(), shard.index.to_string(), volume, number, version, what, ago(conflict.age_s)]
}

fn damage_document(node: &Chosen, shard: &ShardDamage) -> Value {
    let block = |block: &DamagedBlock| {
        json!({
            "volume": block.volume,
            "block": block.block,
            "version": block.version.to_string(),
            "position": block.position,
            "found_by": block.found_by,
            "age_s": block.age_s,
            "attempts": block.attempts,
        })
    };
    let conflict = |conflict: &ConflictingBlock| {
        json!({
            "volume": conflict.volume,
            "block": conflict.block,
            "version": conflict.version.to_string(),
            "checksum_here": format!("{:08x}", conflict.checksum_here),
            "checksum_there": format!("{:08x}", conflict.checksum_there),
            "peer_node": conflict.peer_node,
            "peer_shard": conflict.peer_shard,
            "age_s": conflict.age_s,
        })
    };
    json!({
        "uuid": node.id,
        "address": node.address,
        "shard": shard.index,
        "damaged": shard.damaged,
        "conflicts": shard.conflicts,
        "blocks": shard.blocks.iter().map(block).collect::<Vec<_>>(),
        "conflict_list": shard.conflict_list.iter().map(conflict).collect::<Vec<_>>(),
    })
}
