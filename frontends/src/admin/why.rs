//! `torusadm why VOLUME OFFSET`: where a byte lies, and what each replica has there, read and verified now. For whoever
//! wonders at a block; it changes nothing, and needs no owner.

use super::snapshot::{Cluster, Found, Nodes};
use super::standing::slices_of;
use super::volume_create::peer_of;
use super::{AdminError, Report};
use bytes::Bytes;
use clap::Args;
use futures::future::{Either, select};
use serde_json::{Value, json as object};
use std::pin::pin;
use std::time::Duration;
use torus_rpc::message::{Answer, Envelope, Operation, Refusal, Token};
use torus_rpc::metadata::Metadata;
use torus_rpc::runtime::{Clock, Connect, Link, Peer, Runtime};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{BlockIndex, Epoch, ShardId, Version, VolumeId};
use torus_schema::limits::BLOCK_BYTES;
use torus_schema::records::{ResyncRecord, StaleReplica, keys};
use torus_schema::ring::placement::Placement;
use torus_schema::size::{self, SizeError};

/// Whose token reads from a shard in no epoch.
const TOKEN_OWNER: &str = "peer";

#[derive(Args, Clone, Debug)]
pub struct WhyArguments {
    pub volume: String,
    /// Such as 4096, 1GiB
    #[arg(value_parser = parse_offset)]
    pub offset: u64,
}

fn parse_offset(text: &str) -> Result<u64, SizeError> {
    size::parse(text)
}

/// What one replica has of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Content {
    Never,
    Zeros(Version),
    /// The checksum is the writing client's; what was read agrees with it.
    Data(Version, u32),
    /// It is there and cannot be read as it was written.
    Damaged(Version, u32),
    /// No such instance there.
    Missing,
    Unknown(String),
}

impl Content {
    fn version(&self) -> Option<Version> {
        match self {
            Content::Zeros(version) | Content::Data(version, _) | Content::Damaged(version, _) => Some(*version),
            _ => None,
        }
    }

    fn checksum(&self) -> Option<u32> {
        match self {
            Content::Data(_, checksum) | Content::Damaged(_, checksum) => Some(*checksum),
            _ => None,
        }
    }

    fn word(&self) -> String {
        match self {
            Content::Never => "never written: reads as zeros".to_string(),
            Content::Zeros(_) => "cleared: reads as zeros".to_string(),
            Content::Data(..) => "data, read and verified".to_string(),
            Content::Damaged(..) => "DAMAGED: cannot be read as it was written".to_string(),
            Content::Missing => "no instance of the slice".to_string(),
            Content::Unknown(because) => format!("unknown: {because}"),
        }
    }
}

/// Replicas that do not answer within half of `deadline` are shown as unreachable.
pub async fn why<R: Runtime>(runtime: &R, arguments: &WhyArguments, deadline: Duration) -> Result<Report, AdminError> {
    let metadata = runtime.metadata();
    let cluster = Cluster::read(metadata).await?;
    let nodes = Nodes::read(metadata).await?;
    let found = Found::read(metadata, &arguments.volume).await?;
    let volume = &found.record;
    if arguments.offset >= volume.size_bytes {
        let (name, offset, size) = (volume.name.clone(), arguments.offset, volume.size_bytes);
        return Err(AdminError::OffsetBeyond { name, offset, size });
    }
    let block = BlockIndex(arguments.offset / BLOCK_BYTES);
    let slices = slices_of(&cluster, volume, &found.status);
    if slices.is_empty() {
        let (name, replicas, nodes) = (volume.name.clone(), volume.replicas, cluster.ring.nodes().len());
        return Err(AdminError::Misplaced { name, replicas, nodes });
    }
    let placement = Placement::new(volume.placement, volume.width, cluster.ring.slices());
    let standing = &slices[placement.slot_of(block.extent())];
    let resync = metadata.get(&keys::resync(volume.id)).await?;
    let resync =
        resync.map(|entry| torus_schema::records::decode::<ResyncRecord>(&entry.key, &entry.value)).transpose()?;
    let token = ClusterKey::from_hex(&cluster.record.key)?.sign(volume.id, Epoch(0), TOKEN_OWNER);
    let asked = standing.replicas.iter().map(|(shard, _)| {
        let peer = peer_of(&cluster, &nodes, *shard);
        ask(runtime, peer, volume.id, block, token, deadline / 2)
    });
    let contents = futures::future::join_all(asked).await;
    let asked = standing.replicas.iter().zip(&contents);
    let (rows, documents) = asked
        .map(|((shard, stale), content)| {
            let state = state(*stale, content, resync.as_ref(), *shard);
            row(&cluster, &nodes, *shard, (state, stale.is_none()), content)
        })
        .unzip::<_, _, Vec<_>, Vec<_>>();
    let (extent, slice) = (block.extent(), standing.slice);
    let place = format!("offset {}: block {block}, extent {extent}, slice {slice}", arguments.offset);
    let in_sync = standing.replicas.iter().zip(&contents).filter(|((_, stale), _)| stale.is_none());
    let owner = found.owner.as_ref().map(|owner| {
        let what = if owner.repair { "is repaired" } else { "is attached" };
        format!(
            "the volume {what} by {} (pid {}): a write under way may be on some replicas only",
            owner.host, owner.pid
        )
    });
    let summary = [Some(agreement(in_sync.map(|(_, content)| content))), owner].into_iter().flatten().collect();
    Ok(Report {
        title: place,
        header: vec!["NODE", "SHARD", "ADDRESS", "STATE", "VERSION", "CHECKSUM", "CONTENT"],
        rows,
        summary,
        json: object!({
            "volume": volume.name, "offset": arguments.offset.to_string(), "block": block.0,
            "extent": extent.0, "slice": slice, "replicas": documents,
        }),
        ..Report::default()
    })
}

fn row(
    cluster: &Cluster,
    nodes: &Nodes,
    shard: ShardId,
    (state, is_in_sync): (String, bool),
    content: &Content,
) -> (Vec<String>, Value) {
    let peer = peer_of(cluster, nodes, shard).ok();
    let address = peer.as_ref().map_or("-", |peer| peer.address.as_str());
    let node = cluster.ring.node(shard.node).map(|node| node.id);
    let version = content.version().map(|version| version.to_string());
    let checksum = content.checksum().map(|checksum| format!("{checksum:08x}"));
    let document = object!({
        "node": node, "number": shard.node, "shard": shard.shard, "address": address, "state": state,
        "in_sync": is_in_sync, "version": version, "checksum": checksum, "content": content.word(),
    });
    let dash = || "-".to_string();
    let row = vec![
        node.map_or_else(dash, |id| id.to_string()),
        shard.shard.to_string(),
        address.to_string(),
        state,
        version.unwrap_or_else(dash),
        checksum.unwrap_or_else(dash),
        content.word(),
    ];
    (row, document)
}

fn state(stale: Option<&StaleReplica>, content: &Content, resync: Option<&ResyncRecord>, shard: ShardId) -> String {
    let is_syncing = resync.is_some_and(|record| record.nodes.iter().any(|told| told.node == shard.node));
    let standing = match stale {
        None => "in sync".to_string(),
        Some(stale) if is_syncing => format!("syncing, stale since {}", Version::from(stale.since)),
        Some(stale) => format!("stale since {}", Version::from(stale.since)),
    };
    if matches!(content, Content::Unknown(_)) { format!("{standing}, unreachable") } else { standing }
}

/// Of the replicas in sync that could be asked.
fn agreement<'a>(contents: impl Iterator<Item = &'a Content>) -> String {
    let known: Vec<_> = contents.filter(|content| !matches!(content, Content::Unknown(_))).collect();
    let same =
        known.windows(2).all(|pair| (pair[0].version(), pair[0].checksum()) == (pair[1].version(), pair[1].checksum()));
    let bad = known.iter().filter(|content| matches!(content, Content::Damaged(..) | Content::Missing)).count();
    let count = known.len();
    match (count, same, bad) {
        (0, ..) => "no replica in sync could be asked".to_string(),
        (_, true, 0) => format!("the {count} replicas in sync that answered agree"),
        (_, true, _) => {
            format!("{bad} of the {count} replicas in sync that answered cannot give the block; scrub mends it")
        }
        (_, false, _) => {
            "replicas in sync differ: a write is under way or was not flushed, or this is an alarm; ask again"
                .to_string()
        }
    }
}

async fn ask<R: Runtime>(
    runtime: &R,
    peer: Result<Peer, String>,
    volume: VolumeId,
    first: BlockIndex,
    token: Token,
    limit: Duration,
) -> Content {
    let Ok(peer) = peer else { return Content::Unknown("its node is not known".to_string()) };
    let asked = pin!(ask_shard(runtime, &peer, volume, first, token));
    match select(asked, pin!(runtime.clock().sleep(limit))).await {
        Either::Left((answered, _)) => answered.unwrap_or_else(Content::Unknown),
        Either::Right(_) => Content::Unknown(format!("no answer within {limit:?}")),
    }
}

async fn ask_shard<R: Runtime>(
    runtime: &R,
    peer: &Peer,
    volume: VolumeId,
    first: BlockIndex,
    token: Token,
) -> Result<Content, String> {
    let envelope = Envelope { volume, ..Envelope::NONE };
    let link = runtime.connect().connect(peer).await.map_err(|error| error.to_string())?;
    let question = |data| Operation::PeerRead { token, first, count: 1, data };
    let (reply, _) = link.call(&envelope, &question(false), &Bytes::new()).await.map_err(|error| error.to_string())?;
    let (runs, checksums) = match reply.answer {
        Answer::Read { runs, checksums } => (runs, checksums),
        Answer::Refused(Refusal::NotOpen | Refusal::NotOwner { .. }) => return Ok(Content::Missing),
        Answer::Refused(refusal) => return Err(refusal.to_string()),
        other => return Err(format!("{other:?} is no answer to a read")),
    };
    let run = runs.first().ok_or("an answer without blocks")?;
    let (version, checksum) = match (run.data, checksums.first()) {
        (false, _) if run.version == Version::ZERO => return Ok(Content::Never),
        (false, _) => return Ok(Content::Zeros(run.version)),
        (true, Some(checksum)) => (run.version, *checksum),
        (true, None) => return Err("an answer with data and no checksum".to_string()),
    };
    let (reply, payload) =
        link.call(&envelope, &question(true), &Bytes::new()).await.map_err(|error| error.to_string())?;
    match reply.answer {
        // Something newer may have been written in between; it is judged by its own checksum.
        Answer::Read { runs, checksums } => match (runs.first(), checksums.first()) {
            (Some(run), Some(told)) if crc32c::crc32c(&payload) == *told => Ok(Content::Data(run.version, *told)),
            (Some(run), Some(told)) => Ok(Content::Damaged(run.version, *told)),
            (Some(run), None) => Ok(Content::Zeros(run.version)),
            (None, _) => Err("an answer without blocks".to_string()),
        },
        Answer::Refused(Refusal::Damaged { .. }) => Ok(Content::Damaged(version, checksum)),
        Answer::Refused(refusal) => Err(refusal.to_string()),
        other => Err(format!("{other:?} is no answer to a read")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(sequence: u64, checksum: u32) -> Content {
        Content::Data(Version::new(Epoch(1), sequence), checksum)
    }

    #[test]
    fn replicas_agree_if_version_and_checksum_do() {
        let said = |contents: &[Content]| agreement(contents.iter());
        assert!(said(&[data(1, 7), data(1, 7)]).contains("2 replicas in sync that answered agree"));
        assert!(said(&[data(1, 7), data(2, 7)]).contains("differ"));
        assert!(said(&[data(1, 7), data(1, 8)]).contains("differ"));
        assert!(said(&[data(1, 7), Content::Unknown("away".into())]).contains("1 replicas"));
        assert!(said(&[Content::Unknown("away".into())]).contains("no replica"));
        let damaged = Content::Damaged(Version::new(Epoch(1), 1), 7);
        assert!(said(&[data(1, 7), damaged]).contains("1 of the 2"));
    }
}
