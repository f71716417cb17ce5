//! Looking at volumes: `volume list` and `volume show`.

use super::output::ago;
use super::snapshot::{self, Cluster, Found, Nodes};
use super::volume_create::slices_by_shard;
use super::{AdminError, Report, now_s};
use serde_json::json as object;
use std::collections::BTreeMap;
use torus_rpc::metadata::Metadata;
use torus_schema::ids::NodeNumber;
use torus_schema::records::{OwnerRecord, StatusRecord, VolumeState, keys};
use torus_schema::size;

pub async fn list<M: Metadata>(metadata: &M) -> Result<Report, AdminError> {
    Cluster::read(metadata).await?;
    let volumes = snapshot::volumes(metadata).await?;
    let owners = snapshot::by_volume::<_, OwnerRecord>(metadata, &keys::owners()).await?;
    let statuses = snapshot::by_volume::<_, StatusRecord>(metadata, &keys::statuses()).await?;
    let (mut rows, mut documents) = (Vec::new(), Vec::new());
    for volume in volumes {
        let owner = owners.get(&volume.id);
        let stale = statuses.get(&volume.id).map_or(0, stale_slices);
        rows.push(vec![
            volume.name.clone(),
            size::format(volume.size_bytes),
            format!("{} (min {})", volume.replicas, volume.min_replicas),
            state(volume.state).to_string(),
            owner.map_or("-".to_string(), |owner| format!("{} {}", owner.host, owner.process)),
            stale.to_string(),
            volume.id.to_string(),
        ]);
        documents.push(object!({
            "name": volume.name,
            "uuid": volume.id,
            "size_bytes": volume.size_bytes.to_string(),
            "replicas": volume.replicas,
            "min_replicas": volume.min_replicas,
            "state": volume.state,
            "owner": owner,
            "stale_slices": stale,
        }));
    }
    let header = vec!["NAME", "SIZE", "REPLICAS", "STATE", "ATTACHED BY", "STALE", "UUID"];
    Ok(Report { header, rows, json: documents.into(), ..Report::default() })
}

pub async fn show<M: Metadata>(metadata: &M, name: &str) -> Result<Report, AdminError> {
    let cluster = Cluster::read(metadata).await?;
    let nodes = Nodes::read(metadata).await?;
    let found = Found::read(metadata, name).await?;
    let volume = &found.record;
    let mut slices: BTreeMap<NodeNumber, usize> = BTreeMap::new();
    if usize::from(volume.replicas) <= cluster.ring.replicas_max() {
        for (shard, held) in slices_by_shard(&cluster.ring, volume) {
            *slices.entry(shard.node).or_default() += held.len();
        }
    }
    let node_name = |number: NodeNumber| match cluster.ring.node(number) {
        Some(node) => nodes.name(node.id),
        None => format!("node {number}"),
    };
    let mut rows = Vec::new();
    let mut row = |what: &str, value: String| rows.push(vec![what.to_string(), value]);
    row("name", volume.name.clone());
    row("uuid", volume.id.to_string());
    row("size", format!("{} ({} bytes)", size::format(volume.size_bytes), volume.size_bytes));
    row("state", state(volume.state).to_string());
    row("replicas", format!("{}, at least {} in sync", volume.replicas, volume.min_replicas));
    row("width", format!("{} slices", volume.width));
    row("ring generation", volume.generation.to_string());
    row("write-through", if volume.write_through { "yes" } else { "no" }.to_string());
    row("created", ago(now_s().saturating_sub(volume.created_s)));
    let epoch = found.epoch.unwrap_or_default();
    row(
        "epoch",
        format!("{}, flushed at least up to {}", epoch.epoch, torus_schema::ids::Version::from(epoch.flush_point)),
    );
    row("attached by", found.owner.as_ref().map_or("nobody".to_string(), owner_sentence));
    for (number, count) in &slices {
        row("held by", format!("{}: {count} slices", node_name(*number)));
    }
    for stale in &found.status.stale {
        let since = torus_schema::ids::Version::from(stale.since);
        let when = if stale.stale_s > 0 { ago(now_s().saturating_sub(stale.stale_s)) } else { "?".to_string() };
        row("stale", format!("{}: {} slices since {since}, {when}", node_name(stale.node), stale.slices.len()));
    }
    let held = slices.iter().map(|(number, count)| {
        object!({"node": number, "uuid": cluster.ring.node(*number).map(|node| node.id), "slices": count})
    });
    let document = object!({
        "volume": volume,
        "epoch": epoch,
        "owner": found.owner,
        "stale": found.status.stale,
        "nodes": held.collect::<Vec<_>>(),
    });
    Ok(Report { header: vec!["WHAT", "VALUE"], rows, json: document, ..Report::default() })
}

fn stale_slices(status: &StatusRecord) -> usize {
    status.stale.iter().map(|stale| stale.slices.len()).sum()
}

fn state(state: VolumeState) -> &'static str {
    match state {
        VolumeState::Creating => "creating",
        VolumeState::Ready => "ready",
    }
}

fn owner_sentence(owner: &OwnerRecord) -> String {
    let age = ago(now_s().saturating_sub(owner.attached_s));
    let why = if owner.repair { ", only to repair it" } else { "" };
    format!("{}, process {} (pid {}), epoch {}, {age}{why}", owner.host, owner.process, owner.pid, owner.epoch)
}
