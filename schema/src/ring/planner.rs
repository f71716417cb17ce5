//! Makes the table of the ring: which shards hold which slice, for every number of replicas at once.
//!
//! Promises, for each number p of replicas up to min(nodes, `REPLICAS_MAX`), i.e. for the first p columns:
//! 1. the p replicas of a slice are on p different nodes;
//! 2. and on different zones, racks and hosts, on each of these levels that has at least p of them;
//! 3. shards, nodes and domains hold slices in proportion to capacity, as far as 1 and 2 allow; with equal weights
//!    and domains of equal size each is within one slice of the others;
//! 4. the same nodes give the same table; with equal weights a node that comes moves exactly its own share, a node
//!    that goes at most a twentieth more than it held. Between the shards of a node a few more may move, since each
//!    number of replicas is balanced there too (measured: a tenth on average, below a quarter).
//!
//! Method: column by column. `quota` says how many entries every shard should have in the first p columns; a maximal
//! matching keeps as many slices as possible where they already are, a second one places the rest, drawn by
//! weighted rendezvous hashing so that each node shares slices with all others. Should the quotas contradict the
//! domains (a cluster of very unequal domains), the domains win.

use super::matching::{Edge, Matching};
use super::quota::{HOST, Tree, ZONE};
use super::record::{RING_FORMAT_VERSION, ReplicaList, RingKind, RingNode, RingRecord, RingShard};
use super::table::Ring;
use crate::ids::{NodeId, NodeNumber, RingGeneration, ShardId, SliceId};
use crate::limits::REPLICAS_MAX;
use std::collections::BTreeMap;
use xxhash_rust::xxh3::xxh3_64;

/// A node that is to be in the ring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanNode {
    pub id: NodeId,
    pub host: String,
    pub zone: String,
    pub rack: String,
    /// At least one.
    pub shards: Vec<RingShard>,
}

impl From<&RingNode> for PlanNode {
    fn from(node: &RingNode) -> Self {
        Self {
            id: node.id,
            host: node.host.clone(),
            zone: node.zone.clone(),
            rack: node.rack.clone(),
            shards: node.shards.clone(),
        }
    }
}

/// The next generation of the ring, on exactly these nodes. A node that was in the ring keeps its number; the order
/// of `nodes` says nothing.
pub fn plan(previous: &Ring, nodes: &[PlanNode]) -> RingRecord {
    assert!(nodes.iter().all(|node| !node.shards.is_empty()), "a node without shards cannot hold slices");
    let before = previous.record();
    let mut next_number = before.next_number;
    let mut numbered: BTreeMap<NodeNumber, PlanNode> = BTreeMap::new();
    let mut nodes = nodes.to_vec();
    nodes.sort_by_key(|node| node.id);
    for node in nodes {
        let number = previous.node_by_id(node.id).map_or_else(
            || {
                next_number += 1;
                NodeNumber(next_number - 1)
            },
            |known| known.number,
        );
        assert!(numbered.insert(number, node).is_none(), "a node is listed twice");
    }
    let (numbers, nodes): (Vec<NodeNumber>, Vec<PlanNode>) = numbered.into_iter().unzip();
    let table = if nodes.is_empty() { Vec::new() } else { Planner::new(previous, &numbers, &nodes).table() };
    let generation = RingGeneration(before.generation.0 + 1);
    let number = |(number, node): (NodeNumber, PlanNode)| RingNode {
        number,
        id: node.id,
        given: previous.node_by_id(node.id).map_or(generation, |known| known.given),
        host: node.host,
        zone: node.zone,
        rack: node.rack,
        shards: node.shards,
    };
    RingRecord {
        format_version: RING_FORMAT_VERSION,
        generation,
        kind: if nodes.is_empty() { RingKind::Empty } else { RingKind::Table },
        slices: before.slices,
        next_number,
        nodes: numbers.into_iter().zip(nodes).map(number).collect(),
        table,
    }
}

struct Planner {
    tree: Tree,
    slices: u32,
    /// Nodes and shards are counted from 0 in here.
    numbers: Vec<NodeNumber>,
    shards: Vec<ShardId>,
    node_of: Vec<usize>,
    /// For each slice the shards that held it, by column; `None` where they are no longer there.
    previous: Vec<Vec<Option<usize>>>,
    /// What has been decided, column by column.
    rows: Vec<Vec<usize>>,
    held: Vec<u32>,
}

impl Planner {
    fn new(previous: &Ring, numbers: &[NodeNumber], nodes: &[PlanNode]) -> Self {
        let mut shards = Vec::new();
        let mut node_of = Vec::new();
        for (node, (number, plan)) in numbers.iter().zip(nodes).enumerate() {
            shards.extend(plan.shards.iter().map(|shard| ShardId { node: *number, shard: shard.index }));
            node_of.resize(shards.len(), node);
        }
        let index: BTreeMap<ShardId, usize> = shards.iter().enumerate().map(|(index, shard)| (*shard, index)).collect();
        let columns = previous.replicas_max() as u8;
        let before = |slice| previous.replicas(SliceId(slice), columns).iter().map(|shard| index.get(shard).copied());
        let before = |slice| if columns == 0 { Vec::new() } else { before(slice).collect() };
        let slices = previous.slices();
        Self {
            tree: Tree::new(nodes),
            slices,
            numbers: numbers.to_vec(),
            held: vec![0; shards.len()],
            shards,
            node_of,
            previous: (0..slices).map(before).collect(),
            rows: vec![Vec::new(); slices as usize],
        }
    }

    fn table(mut self) -> Vec<ReplicaList> {
        for column in 0..self.numbers.len().min(usize::from(REPLICAS_MAX)) {
            self.fill(column);
        }
        let list = |row: Vec<usize>| ReplicaList(row.into_iter().map(|shard| self.shards[shard]).collect());
        self.rows.into_iter().map(list).collect()
    }

    fn fill(&mut self, column: usize) {
        let targets = self.tree.targets(self.slices, column + 1, &self.held, &self.held_before(column + 1));
        let need: Vec<u32> =
            self.tree.shards.iter().zip(&self.held).map(|(&vertex, held)| targets[vertex] - held).collect();
        let candidates: Vec<Candidates> = (0..self.rows.len()).map(|row| self.candidates(row, &targets)).collect();
        let mut order: Vec<usize> = (0..self.rows.len()).collect();
        order.sort_by_key(|&row| hash(row as u64, column as u64, 0));

        let kept = self.keep(column, &need, &candidates, &order);
        let nodes = self.place(column, &need, &candidates, &order, &kept);
        self.choose_shards(need, &order, &nodes);
    }

    /// Slices by shard in the first columns of the ring before.
    fn held_before(&self, columns: usize) -> Vec<u32> {
        let mut held = vec![0; self.shards.len()];
        for shard in self.previous.iter().flat_map(|row| row.iter().take(columns).flatten()) {
            held[*shard] += 1;
        }
        held
    }

    /// The nodes that may take the row's next column.
    fn candidates(&self, row: usize, targets: &[u32]) -> Candidates {
        let chosen: Vec<usize> = self.rows[row].iter().map(|&shard| self.node_of[shard]).collect();
        let mut best = u8::MAX;
        let mut candidates = Candidates::default();
        for node in (0..self.numbers.len()).filter(|node| !chosen.contains(node)) {
            let path = &self.tree.paths[node];
            // One bit for each level whose domain is used already, the widest level first: smaller is farther away.
            let mut shared = 0;
            let mut within_quota = true;
            for level in 0..=(HOST - ZONE) {
                let uses = chosen.iter().filter(|&&other| self.tree.paths[other][level] == path[level]).count();
                shared = shared << 1 | u8::from(uses > 0);
                within_quota &= uses < (targets[path[level]] as usize).div_ceil(self.slices as usize);
            }
            if shared < best {
                best = shared;
                candidates = Candidates::default();
            }
            if shared == best {
                candidates.farthest.push(node);
                if within_quota {
                    candidates.balanced.push(node);
                }
            }
        }
        candidates
    }

    /// As many rows as the quotas allow stay on a shard that holds them already.
    fn keep(&self, column: usize, need: &[u32], candidates: &[Candidates], order: &[usize]) -> Vec<Option<usize>> {
        let edges: Vec<Vec<Edge>> = (0..self.rows.len())
            .map(|row| {
                let before = &self.previous[row];
                // Its own column first, so that an unchanged cluster gives an unchanged table.
                let columns = (0..before.len().min(column + 1)).rev();
                let held = columns.filter_map(|column| before[column]);
                let free = held.filter(|&shard| candidates[row].balanced.contains(&self.node_of[shard]));
                free.map(|target| Edge { target, free: true }).collect()
            })
            .collect();
        let mut matching = Matching::new(self.rows.len(), need.to_vec());
        for &row in order {
            matching.augment(row, &edges);
        }
        matching.assigned
    }

    /// A node for every row.
    fn place(
        &self,
        column: usize,
        need: &[u32],
        candidates: &[Candidates],
        order: &[usize],
        kept: &[Option<usize>],
    ) -> Vec<usize> {
        let mut spare = vec![0; self.numbers.len()];
        for (shard, need) in need.iter().enumerate() {
            spare[self.node_of[shard]] += need;
        }
        let mut matching = Matching::new(self.rows.len(), spare);
        for (row, shard) in kept.iter().enumerate() {
            if let Some(shard) = shard {
                matching.assign(row, self.node_of[*shard]);
            }
        }
        let edges: Vec<Vec<Edge>> = (0..self.rows.len())
            .map(|row| {
                let nodes = candidates[row].balanced.iter();
                nodes.map(|&target| Edge { target, free: self.held_by(row, column, target) }).collect()
            })
            .collect();
        for &row in order.iter().filter(|&&row| kept[row].is_none()) {
            match self.draw(row, column, &candidates[row].balanced, &matching.spare) {
                Some(node) => matching.assign(row, node),
                None => _ = matching.augment(row, &edges),
            }
        }
        let mut over = vec![0_u32; self.numbers.len()];
        let mut nodes = Vec::with_capacity(self.rows.len());
        for (row, node) in matching.assigned.iter().enumerate() {
            nodes.push(node.unwrap_or_else(|| {
                let farthest = candidates[row].farthest.iter().copied();
                let node = farthest.min_by_key(|&node| (over[node], hash(row as u64, node as u64, 1)));
                let node = node.expect("there are at least as many nodes as columns, so one is not used yet");
                over[node] += 1;
                node
            }));
        }
        nodes
    }

    /// One of the nodes with room, each as likely as it has room (weighted rendezvous hashing).
    fn draw(&self, row: usize, column: usize, nodes: &[usize], spare: &[u32]) -> Option<usize> {
        let score = |node: usize| {
            let uniform =
                (hash(row as u64, column as u64, u64::from(self.numbers[node].0) + 2) as f64 + 1.0) / 2f64.powi(64);
            -uniform.ln() / f64::from(spare[node])
        };
        let open = nodes.iter().copied().filter(|&node| spare[node] > 0);
        // Who holds the slice in an earlier column of the ring before costs nothing.
        open.min_by(|&a, &b| {
            let moves = |node| !self.held_by(row, column, node);
            moves(a).cmp(&moves(b)).then(score(a).total_cmp(&score(b)))
        })
    }

    fn held_by(&self, row: usize, column: usize, node: usize) -> bool {
        self.previous[row].iter().take(column + 1).flatten().any(|&shard| self.node_of[shard] == node)
    }

    /// Within each node, the shard that has the slice if its quota allows, otherwise the one that lacks most.
    fn choose_shards(&mut self, mut need: Vec<u32>, order: &[usize], nodes: &[usize]) {
        let mut of_node = vec![Vec::new(); self.numbers.len()];
        for (shard, &node) in self.node_of.iter().enumerate() {
            of_node[node].push(shard);
        }
        let mut rest = Vec::new();
        for &row in order {
            // Later columns too: a volume with more replicas has the slice there.
            let before = self.previous[row].iter().flatten();
            match before.copied().find(|&shard| self.node_of[shard] == nodes[row] && need[shard] > 0) {
                Some(shard) => self.take(row, shard, &mut need),
                None => rest.push(row),
            }
        }
        for row in rest {
            let shards = of_node[nodes[row]].iter().copied();
            let shard = shards.max_by_key(|&shard| (need[shard], hash(row as u64, shard as u64, 1)));
            self.take(row, shard.expect("every node has a shard"), &mut need);
        }
    }

    fn take(&mut self, row: usize, shard: usize, need: &mut [u32]) {
        need[shard] = need[shard].saturating_sub(1);
        self.held[shard] += 1;
        self.rows[row].push(shard);
    }
}

#[derive(Default)]
struct Candidates {
    /// Share as few failure domains with the columns before as possible.
    farthest: Vec<usize>,
    /// Those of them whose domains' quotas leave room in the row.
    balanced: Vec<usize>,
}

/// Decides ties and draws; nothing stored depends on it, since the table itself is stored.
fn hash(a: u64, b: u64, c: u64) -> u64 {
    let mut bytes = [0; 24];
    bytes[..8].copy_from_slice(&a.to_le_bytes());
    bytes[8..16].copy_from_slice(&b.to_le_bytes());
    bytes[16..].copy_from_slice(&c.to_le_bytes());
    xxh3_64(&bytes)
}

#[cfg(test)]
#[path = "planner_tests.rs"]
pub(super) mod tests;
