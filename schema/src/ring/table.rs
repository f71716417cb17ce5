//! The ring in use: what `RingRecord` says, checked once, so that looking up a slice needs no checks.

use super::record::{RING_FORMAT_VERSION, RingKind, RingNode, RingRecord};
use crate::ids::{NodeId, NodeNumber, RingGeneration, ShardId, ShardIndex, SliceId};
use crate::limits::{REPLICAS_MAX, SLICES_MAX};
use std::collections::{BTreeMap, BTreeSet};
use thiserror::Error;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ring {
    record: RingRecord,
    replicas_max: usize,
    /// `replicas_max` shards for each slice, in one piece.
    table: Vec<ShardId>,
    by_number: BTreeMap<NodeNumber, usize>,
}

impl Ring {
    /// The ring of a new cluster: nothing is placed by it.
    pub fn empty(slices: u32) -> Self {
        assert!(slices.is_power_of_two() && slices <= SLICES_MAX);
        let record = RingRecord {
            format_version: RING_FORMAT_VERSION,
            generation: RingGeneration(1),
            kind: RingKind::Empty,
            slices,
            next_number: 0,
            nodes: Vec::new(),
            table: Vec::new(),
        };
        Self { record, replicas_max: 0, table: Vec::new(), by_number: BTreeMap::new() }
    }

    pub fn from_record(record: RingRecord) -> Result<Self, RingError> {
        if record.format_version != RING_FORMAT_VERSION {
            return Err(RingError::Format { found: record.format_version, expected: RING_FORMAT_VERSION });
        }
        if !record.slices.is_power_of_two() || record.slices > SLICES_MAX {
            return Err(RingError::Slices { found: record.slices, limit: SLICES_MAX });
        }
        let by_number = check_nodes(&record)?;
        let (replicas_max, rows) = match record.kind {
            RingKind::Empty => (0, 0),
            RingKind::Table => (record.nodes.len().min(usize::from(REPLICAS_MAX)), record.slices as usize),
        };
        if record.table.len() != rows {
            return Err(RingError::TableLength { found: record.table.len(), expected: rows });
        }
        check_table(&record, &by_number, replicas_max)?;
        let table = record.table.iter().flat_map(|list| list.0.iter().copied()).collect();
        Ok(Self { record, replicas_max, table, by_number })
    }

    pub fn record(&self) -> &RingRecord {
        &self.record
    }

    pub fn generation(&self) -> RingGeneration {
        self.record.generation
    }

    pub fn slices(&self) -> u32 {
        self.record.slices
    }

    pub fn nodes(&self) -> &[RingNode] {
        &self.record.nodes
    }

    pub fn node(&self, number: NodeNumber) -> Option<&RingNode> {
        self.by_number.get(&number).map(|&index| &self.record.nodes[index])
    }

    pub fn node_by_id(&self, id: NodeId) -> Option<&RingNode> {
        self.record.nodes.iter().find(|node| node.id == id)
    }

    /// Of the instances that the node holds of a volume placed by `volume`: since the volume was made, or since the
    /// node got the places it has now.
    pub fn instance_generation(&self, node: NodeNumber, volume: RingGeneration) -> RingGeneration {
        self.node(node).map_or(volume, |node| node.given.max(volume))
    }

    /// The next generation, in which `node` has the places (and so the number and the slices) that the node of that
    /// number had. `None`: there is no such node, `node` has a place already, or lacks a shard that has slices.
    pub fn with_replaced(&self, number: NodeNumber, mut node: RingNode) -> Option<RingRecord> {
        let index = *self.by_number.get(&number)?;
        let has = |wanted: &ShardIndex| node.shards.iter().any(|shard| shard.index == *wanted);
        let used = self.table.iter().filter(|shard| shard.node == number).map(|shard| shard.shard);
        if self.node_by_id(node.id).is_some() || !used.collect::<BTreeSet<_>>().iter().all(has) {
            return None;
        }
        let mut record = self.record.clone();
        record.generation = RingGeneration(record.generation.0 + 1);
        (node.number, node.given) = (number, record.generation);
        record.nodes[index] = node;
        Some(record)
    }

    /// Replicas that a volume can have at most: one per node.
    pub fn replicas_max(&self) -> usize {
        self.replicas_max
    }

    /// The shards that hold the slice for a volume of `count` replicas, all on different nodes; `count` is at most
    /// `replicas_max` (whoever reads a volume's record checks that first).
    pub fn replicas(&self, slice: SliceId, count: u8) -> &[ShardId] {
        assert!(slice.0 < self.record.slices, "slice {slice} of {}", self.record.slices);
        assert!(usize::from(count) <= self.replicas_max, "{count} replicas of {}", self.replicas_max);
        let first = slice.0 as usize * self.replicas_max;
        &self.table[first..first + usize::from(count)]
    }

    /// Slices of each shard for volumes of `count` replicas, shards without any included.
    pub fn slices_per_shard(&self, count: u8) -> BTreeMap<ShardId, u32> {
        let shards =
            self.record.nodes.iter().flat_map(|node| {
                node.shards.iter().map(|shard| (ShardId { node: node.number, shard: shard.index }, 0))
            });
        let mut counts: BTreeMap<ShardId, u32> = shards.collect();
        if self.record.kind == RingKind::Table {
            for slice in 0..self.record.slices {
                for shard in self.replicas(SliceId(slice), count) {
                    *counts.entry(*shard).or_default() += 1;
                }
            }
        }
        counts
    }
}

fn check_nodes(record: &RingRecord) -> Result<BTreeMap<NodeNumber, usize>, RingError> {
    let mut by_number = BTreeMap::new();
    let mut ids = BTreeSet::new();
    for (index, node) in record.nodes.iter().enumerate() {
        let bad = |because: &str| RingError::Node { number: node.number, because: because.to_string() };
        if by_number.insert(node.number, index).is_some() {
            return Err(bad("its number is given twice"));
        }
        if !ids.insert(node.id) {
            return Err(bad("its uuid is given twice"));
        }
        if node.number.0 >= record.next_number {
            return Err(bad("its number is not below next_number"));
        }
        if node.given > record.generation {
            return Err(bad("it was given its places by a later generation"));
        }
        if node.shards.is_empty() {
            return Err(bad("it has no shards"));
        }
        let shards: BTreeSet<_> = node.shards.iter().map(|shard| shard.index).collect();
        if shards.len() != node.shards.len() {
            return Err(bad("one of its shards is listed twice"));
        }
    }
    if (record.kind == RingKind::Empty) != record.nodes.is_empty() {
        return Err(RingError::Kind { kind: record.kind, nodes: record.nodes.len() });
    }
    Ok(by_number)
}

fn check_table(
    record: &RingRecord,
    by_number: &BTreeMap<NodeNumber, usize>,
    replicas_max: usize,
) -> Result<(), RingError> {
    for (slice, list) in record.table.iter().enumerate() {
        let bad = |because: String| RingError::Slice { slice: SliceId(slice as u32), because };
        if list.0.len() != replicas_max {
            return Err(bad(format!("{} replicas, expected {replicas_max}", list.0.len())));
        }
        for (position, shard) in list.0.iter().enumerate() {
            let node = by_number.get(&shard.node).map(|&index| &record.nodes[index]);
            if !node.is_some_and(|node| node.shards.iter().any(|known| known.index == shard.shard)) {
                return Err(bad(format!("shard {shard} is not among the ring's nodes")));
            }
            if list.0[..position].iter().any(|earlier| earlier.node == shard.node) {
                return Err(bad(format!("two replicas on node {}", shard.node)));
            }
        }
    }
    Ok(())
}

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum RingError {
    #[error("ring format version {found}, this program knows {expected}; use the version that wrote it")]
    Format { found: u32, expected: u32 },
    #[error("ring of {found} slices, expected a power of two up to {limit}")]
    Slices { found: u32, limit: u32 },
    #[error("ring of kind {kind:?} with {nodes} nodes; a table has nodes and an empty ring has none")]
    Kind { kind: RingKind, nodes: usize },
    #[error("ring node {number}: {because}")]
    Node { number: NodeNumber, because: String },
    #[error("ring table of {found} rows, expected {expected}")]
    TableLength { found: usize, expected: usize },
    #[error("ring slice {slice}: {because}")]
    Slice { slice: SliceId, because: String },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::record::{ReplicaList, RingShard};

    fn two_nodes() -> RingRecord {
        let node = |number: u32| RingNode {
            number: NodeNumber(number),
            id: NodeId::from_bytes([number as u8; 16]),
            given: RingGeneration(2),
            host: "host".into(),
            zone: String::new(),
            rack: String::new(),
            shards: vec![RingShard { index: ShardIndex(0), weight_bytes: 1 }],
        };
        let shard = |number| ShardId { node: NodeNumber(number), shard: ShardIndex(0) };
        RingRecord {
            format_version: RING_FORMAT_VERSION,
            generation: RingGeneration(2),
            kind: RingKind::Table,
            slices: 2,
            next_number: 6,
            nodes: vec![node(3), node(5)],
            table: vec![ReplicaList(vec![shard(3), shard(5)]), ReplicaList(vec![shard(5), shard(3)])],
        }
    }

    #[test]
    fn a_slice_has_the_replicas_of_its_row_in_order() {
        let ring = Ring::from_record(two_nodes()).unwrap();
        assert_eq!(ring.replicas_max(), 2);
        assert_eq!(ring.replicas(SliceId(1), 1), [ShardId { node: NodeNumber(5), shard: ShardIndex(0) }]);
        assert_eq!(ring.replicas(SliceId(0), 2).len(), 2);
        assert_eq!(ring.node(NodeNumber(5)).unwrap().id, NodeId::from_bytes([5; 16]));
        assert_eq!(ring.node(NodeNumber(4)), None);
    }

    #[test]
    fn a_node_that_replaces_another_has_its_slices_in_a_generation_of_its_own() {
        let ring = Ring::from_record(two_nodes()).unwrap();
        let new = RingNode { id: NodeId::from_bytes([9; 16]), ..ring.nodes()[1].clone() };
        let next = Ring::from_record(ring.with_replaced(NodeNumber(5), new.clone()).unwrap()).unwrap();
        assert_eq!(next.replicas(SliceId(0), 2), ring.replicas(SliceId(0), 2));
        assert_eq!(next.node(NodeNumber(5)).unwrap().id, new.id);
        let generation = |ring: &Ring, number| ring.instance_generation(NodeNumber(number), RingGeneration(2)).0;
        assert_eq!((generation(&ring, 5), generation(&next, 5), generation(&next, 3)), (2, 3, 2));
        // It comes back: what it held before was of generation 2, now it is to hold generation 4.
        let back = next.with_replaced(NodeNumber(5), ring.nodes()[1].clone()).unwrap();
        assert_eq!(generation(&Ring::from_record(back).unwrap(), 5), 4);
        let shards = vec![RingShard { index: ShardIndex(7), weight_bytes: 1 }];
        assert_eq!(ring.with_replaced(NodeNumber(5), RingNode { shards, ..new }), None, "it lacks shard 0");
        assert_eq!(ring.with_replaced(NodeNumber(5), ring.nodes()[0].clone()), None, "it has a place");
    }

    #[test]
    fn an_empty_ring_survives_being_stored() {
        let ring = Ring::empty(4096);
        assert_eq!(Ring::from_record(ring.record().clone()), Ok(ring));
    }

    #[test]
    fn a_document_that_contradicts_itself_is_refused_and_says_where() {
        type Damage = fn(&mut RingRecord);
        let cases: [(Damage, &str); 11] = [
            (|r| r.format_version = 9, "format version 9"),
            (|r| r.slices = 3, "3 slices"),
            (|r| r.slices = 4, "table of 2 rows, expected 4"),
            (|r| r.kind = RingKind::Empty, "kind Empty with 2 nodes"),
            (|r| r.nodes[1].number = NodeNumber(3), "node 3: its number is given twice"),
            (|r| r.nodes[1].id = r.nodes[0].id, "node 5: its uuid is given twice"),
            (|r| r.next_number = 5, "node 5: its number is not below"),
            (|r| r.nodes[1].given = RingGeneration(3), "node 5: it was given its places by a later generation"),
            (|r| r.nodes[0].shards.clear(), "node 3: it has no shards"),
            (|r| r.table[1].0[0].node = NodeNumber(3), "slice 1: two replicas on node 3"),
            (|r| r.table[0].0[1].shard = ShardIndex(7), "slice 0: shard 5.7 is not among"),
        ];
        for (damage, expected) in cases {
            let mut record = two_nodes();
            damage(&mut record);
            let error = Ring::from_record(record).unwrap_err().to_string();
            assert!(error.contains(expected), "{error:?} should contain {expected:?}");
        }
    }
}
