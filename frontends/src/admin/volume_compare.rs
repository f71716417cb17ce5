//! `volume compare`: whether all replicas in sync hold the same, block by block, by version and checksum. Nothing is
//! transferred but these; that the data is what its checksum says is what a scrub is for.
//!
//! While a volume is written, replicas differ for as long as a write is under way: what differs is looked at again.
//! Blocks without data are all alike: one replica may know the clear that emptied a block, and another have forgotten it.

use super::snapshot::{Cluster, Found, Nodes};
use super::{AdminError, Report};
use bytes::Bytes;
use futures::StreamExt;
use futures::stream;
use serde_json::json as object;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use torus_rpc::message::{Answer, Envelope, Operation, Run};
use torus_rpc::runtime::{Clock, Connect, Link, Peer, Runtime};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{BlockIndex, Epoch, ExtentIndex, ShardId, Version};
use torus_schema::limits::{BLOCK_BYTES, BLOCKS_PER_EXTENT, BLOCKS_PER_FRAME_MAX};
use torus_schema::records::{StatusRecord, VolumeRecord};
use torus_schema::ring::placement::Placement;

/// Whose token reads from a shard in no epoch.
const TOKEN_OWNER: &str = "peer";
const EXTENTS_AT_ONCE: usize = 16;
const LOOKS: u32 = 5;
const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(200);
/// Listed at most; all are counted.
const LISTED_MAX: usize = 100;

/// Of a block: `None` without data.
type Content = Option<(Version, u32)>;

struct Difference {
    block: BlockIndex,
    held: Vec<(ShardId, Content)>,
}

struct Comparing<'a, R: Runtime> {
    runtime: &'a R,
    deadline: Duration,
    cluster: &'a Cluster,
    nodes: &'a Nodes,
    key: ClusterKey,
    volume: &'a VolumeRecord,
    status: &'a StatusRecord,
    placement: Placement,
    links: RefCell<BTreeMap<ShardId, R::Link>>,
    /// Why each that could not be asked could not.
    unasked: RefCell<BTreeMap<ShardId, String>>,
    stale: RefCell<BTreeSet<ShardId>>,
    compared: Cell<u64>,
    with_data: Cell<u64>,
    differing: Cell<u64>,
    differences: RefCell<Vec<Difference>>,
}

/// `deadline`: of each question. `progress` hears now and then how far it is.
pub async fn compare<R: Runtime>(
    runtime: &R,
    name: &str,
    deadline: Duration,
    mut progress: impl FnMut(&[String]),
) -> Result<Report, AdminError> {
    let cluster = Cluster::read(runtime.metadata()).await?;
    let nodes = Nodes::read(runtime.metadata()).await?;
    let found = Found::read(runtime.metadata(), name).await?;
    let volume = &found.record;
    if usize::from(volume.replicas) > cluster.ring.replicas_max() {
        let nodes = cluster.ring.nodes().len();
        return Err(AdminError::Misplaced { name: name.to_string(), replicas: volume.replicas, nodes });
    }
    let comparing = Comparing {
        runtime,
        deadline,
        key: ClusterKey::from_hex(&cluster.record.key)?,
        placement: Placement::new(volume.placement, volume.width, cluster.ring.slices()),
        cluster: &cluster,
        nodes: &nodes,
        volume,
        status: &found.status,
        links: RefCell::default(),
        unasked: RefCell::default(),
        stale: RefCell::default(),
        compared: Cell::new(0),
        with_data: Cell::new(0),
        differing: Cell::new(0),
        differences: RefCell::default(),
    };
    let extents = volume.size_bytes.div_ceil(BLOCK_BYTES * BLOCKS_PER_EXTENT);
    let mut done = 0;
    let mut told = runtime.clock().now();
    let mut all = stream::iter(0..extents)
        .map(|extent| comparing.compare_extent(ExtentIndex(extent)))
        .buffer_unordered(EXTENTS_AT_ONCE);
    while all.next().await.is_some() {
        done += 1;
        if runtime.clock().now().since(told) > Duration::from_secs(2) {
            told = runtime.clock().now();
            progress(&[format!("the comparison of {name}: {done} of {extents} extents")]);
        }
    }
    drop(all);
    Ok(comparing.report())
}

impl<R: Runtime> Comparing<'_, R> {
    async fn compare_extent(&self, extent: ExtentIndex) {
        let slice = self.placement.slice_of(extent);
        let stale = |shard: &ShardId| {
            self.status.stale.iter().any(|stale| stale.node == shard.node && stale.slices.contains(&slice))
        };
        let (stale, shards): (Vec<ShardId>, Vec<ShardId>) =
            self.cluster.ring.replicas(slice, self.volume.replicas).iter().copied().partition(stale);
        self.stale.borrow_mut().extend(stale);
        let blocks = self.volume.size_bytes / BLOCK_BYTES;
        let mut first = extent.first_block().0;
        let end = blocks.min(first + BLOCKS_PER_EXTENT);
        while first < end {
            let count = (end - first).min(BLOCKS_PER_FRAME_MAX);
            self.compare_range(&shards, BlockIndex(first), count as u32).await;
            first += count;
        }
    }

    async fn compare_range(&self, shards: &[ShardId], first: BlockIndex, count: u32) {
        let mut look = 1;
        loop {
            let held = futures::future::join_all(shards.iter().map(|shard| self.contents(*shard, first, count))).await;
            let held: Vec<(ShardId, Vec<Content>)> =
                shards.iter().copied().zip(held).filter_map(|(shard, held)| Some((shard, held?))).collect();
            let differ = |number: &usize| held.windows(2).any(|pair| pair[0].1[*number] != pair[1].1[*number]);
            let differing: Vec<usize> = (0..count as usize).filter(differ).collect();
            if !differing.is_empty() && look < LOOKS {
                look += 1;
                self.runtime.clock().sleep(LOOK_AGAIN_AFTER).await;
                continue;
            }
            let with_data = held.first().map_or(0, |(_, held)| held.iter().flatten().count());
            self.compared.set(self.compared.get() + u64::from(count));
            self.with_data.set(self.with_data.get() + with_data as u64);
            self.differing.set(self.differing.get() + differing.len() as u64);
            let listed = &mut *self.differences.borrow_mut();
            for number in differing.into_iter().take(LISTED_MAX.saturating_sub(listed.len())) {
                let block = BlockIndex(first.0 + number as u64);
                listed
                    .push(Difference { block, held: held.iter().map(|(shard, all)| (*shard, all[number])).collect() });
            }
            return;
        }
    }

    /// `None`: it could not be asked, and is not again.
    async fn contents(&self, shard: ShardId, first: BlockIndex, count: u32) -> Option<Vec<Content>> {
        if self.unasked.borrow().contains_key(&shard) {
            return None;
        }
        match self.ask(shard, first, count).await {
            Ok(contents) => Some(contents),
            Err(because) => {
                self.unasked.borrow_mut().insert(shard, because);
                None
            }
        }
    }

    async fn ask(&self, shard: ShardId, first: BlockIndex, count: u32) -> Result<Vec<Content>, String> {
        let link = self.link(shard).await?;
        let token = self.key.sign(self.volume.id, Epoch(0), TOKEN_OWNER);
        let operation = Operation::PeerRead { token, first, count, data: false };
        let envelope = Envelope { volume: self.volume.id, ..Envelope::NONE };
        let nothing = Bytes::new();
        let asked = std::pin::pin!(link.call(&envelope, &operation, &nothing));
        let limit = std::pin::pin!(self.runtime.clock().sleep(self.deadline));
        let answered = match futures::future::select(asked, limit).await {
            futures::future::Either::Left((answered, _)) => answered.map_err(|error| error.to_string())?,
            futures::future::Either::Right(_) => return Err(format!("no answer within {:?}", self.deadline)),
        };
        match answered.0.answer {
            Answer::Read { runs, checksums } => contents_of(&runs, &checksums, count),
            Answer::Refused(refusal) => Err(refusal.to_string()),
            other => Err(format!("a read was answered by {other:?}")),
        }
    }

    async fn link(&self, id: ShardId) -> Result<R::Link, String> {
        if let Some(link) = self.links.borrow().get(&id) {
            return Ok(link.clone());
        }
        let node = self.cluster.ring.node(id.node).ok_or_else(|| format!("the ring lacks node {}", id.node))?.id;
        let record = self.nodes.records.get(&node).ok_or_else(|| format!("node {node} has no record"))?;
        let shard = record.shards.iter().find(|shard| shard.index == id.shard);
        let address = shard.ok_or_else(|| format!("node {node} has no shard {}", id.shard))?.address.clone();
        let peer = Peer { cluster: self.cluster.record.id, node, shard: id.shard, address };
        let link = self.runtime.connect().connect(&peer).await.map_err(|error| error.to_string())?;
        self.links.borrow_mut().insert(id, link.clone());
        Ok(link)
    }

    fn name(&self, shard: ShardId) -> String {
        match self.cluster.ring.node(shard.node) {
            Some(node) => format!("{} shard {}", self.nodes.name(node.id), shard.shard),
            None => shard.to_string(),
        }
    }

    fn report(&self) -> Report {
        let (unasked, stale) = (self.unasked.borrow(), self.stale.borrow());
        let mut rows = Vec::new();
        let mut documents = Vec::new();
        for Difference { block, held } in &*self.differences.borrow() {
            for (shard, content) in held {
                let text = content.map_or("no data".to_string(), |(version, sum)| format!("{version} {sum:08x}"));
                rows.push(vec![(block.0 * BLOCK_BYTES).to_string(), self.name(*shard), text]);
                let (version, checksum) = content.unzip();
                let version = version.map(|version| version.to_string());
                documents.push(
                    object!({"block": block.0, "shard": shard.to_string(), "version": version, "checksum": checksum}),
                );
            }
        }
        let (compared, differing) = (self.compared.get(), self.differing.get());
        let mut summary = vec![format!(
            "{compared} blocks compared, {} with data: {differing} differ between replicas in sync",
            self.with_data.get()
        )];
        summary.extend(stale.iter().map(|shard| format!("not compared, stale: {}", self.name(*shard))));
        let unasked: Vec<String> =
            unasked.iter().map(|(shard, because)| format!("{}: {because}", self.name(*shard))).collect();
        let warnings = unasked.iter().map(|sentence| format!("not compared, could not be asked: {sentence}")).collect();
        let failed = differing > 0 || !unasked.is_empty();
        let json = object!({
            "volume": self.volume.id,
            "blocks": compared,
            "with_data": self.with_data.get(),
            "differing": differing,
            "differences": documents,
            "stale": stale.iter().map(ShardId::to_string).collect::<Vec<_>>(),
            "unasked": unasked,
        });
        // A table of nothing would only puzzle.
        let header = if rows.is_empty() { vec![] } else { vec!["OFFSET", "ON", "HOLDS"] };
        Report { header, rows, summary, json, warnings, failed }
    }
}

fn contents_of(runs: &[Run], checksums: &[u32], count: u32) -> Result<Vec<Content>, String> {
    let told: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
    if told != u64::from(count) {
        return Err(format!("{told} blocks were answered, asked for {count}"));
    }
    let mut checksums = checksums.iter();
    let mut contents = Vec::with_capacity(count as usize);
    for run in runs {
        for _ in 0..run.count {
            let content = if run.data {
                let checksum = checksums.next().ok_or("fewer checksums than blocks with data")?;
                Some((run.version, *checksum))
            } else {
                None
            };
            contents.push(content);
        }
    }
    Ok(contents)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_one_content_for_each_block_or_refused() {
        let version = Version::new(Epoch(2), 7);
        let runs = [Run { count: 2, version, data: true }, Run { count: 1, version: Version::ZERO, data: false }];
        assert_eq!(contents_of(&runs, &[5, 6], 3), Ok(vec![Some((version, 5)), Some((version, 6)), None]));
        assert!(contents_of(&runs, &[5], 3).unwrap_err().contains("fewer checksums"));
        assert!(contents_of(&runs, &[5, 6], 4).unwrap_err().contains("3 blocks were answered, asked for 4"));
    }
}
