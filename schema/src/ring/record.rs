//! The ring as it stands in the metadata store: one JSON document under `keys::ring()`, changed only by comparing
//! its revision, untrusted until `Ring::from_record` has checked it.
//!
//! | field            | meaning                                                                              |
//! |------------------|--------------------------------------------------------------------------------------|
//! | `format_version` | [`RING_FORMAT_VERSION`]                                                              |
//! | `generation`     | counts changes of the document, from 1                                               |
//! | `kind`           | `empty` (no nodes, no table) or `table`                                              |
//! | `slices`         | positions of the ring, a power of two, the same for ever                             |
//! | `next_number`    | above every node number ever given: numbers are not reused, statuses refer to them   |
//! | `nodes`          | in the order of their numbers                                                        |
//! | `table`          | one string per slice: its replicas in order, `node.shard` separated by commas        |
//!
//! A replica list is as long as the largest replica count possible, min(nodes, `REPLICAS_MAX`); a volume with fewer
//! replicas uses its beginning. Small numbers instead of uuids keep the value within what etcd takes at once.

use crate::ids::{NodeId, NodeNumber, RingGeneration, ShardId, ShardIndex};
use serde::{Deserialize, Serialize};

pub const RING_FORMAT_VERSION: u32 = 2;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingRecord {
    pub format_version: u32,
    pub generation: RingGeneration,
    pub kind: RingKind,
    pub slices: u32,
    pub next_number: u32,
    pub nodes: Vec<RingNode>,
    pub table: Vec<ReplicaList>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RingKind {
    Empty,
    Table,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingNode {
    pub number: NodeNumber,
    pub id: NodeId,
    /// The generation of the ring in which this node was given its places. What it kept of an earlier stay is of an
    /// earlier generation, and never taken for what it should hold now (interleaving 16).
    pub given: RingGeneration,
    pub host: String,
    #[serde(default)]
    pub zone: String,
    #[serde(default)]
    pub rack: String,
    pub shards: Vec<RingShard>,
}

impl RingNode {
    pub fn weight_bytes(&self) -> u64 {
        self.shards.iter().fold(0, |sum, shard| sum.saturating_add(shard.weight_bytes))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingShard {
    pub index: ShardIndex,
    /// Capacity: a shard gets slices in proportion to it.
    #[serde(with = "crate::records::decimal")]
    pub weight_bytes: u64,
}

/// The replicas of one slice, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReplicaList(pub Vec<ShardId>);

impl Serialize for ReplicaList {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let parts: Vec<String> = self.0.iter().map(ShardId::to_string).collect();
        serializer.serialize_str(&parts.join(","))
    }
}

impl<'de> Deserialize<'de> for ReplicaList {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let parse = |part: &str| {
            let (node, shard) = part.split_once('.')?;
            Some(ShardId { node: NodeNumber(node.parse().ok()?), shard: ShardIndex(shard.parse().ok()?) })
        };
        text.split(',').map(parse).collect::<Option<Vec<_>>>().map(ReplicaList).ok_or_else(|| {
            serde::de::Error::custom(format!("replica list {text:?}, expected node.shard numbers separated by commas"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::{decode, encode};

    #[test]
    fn the_document_is_exactly_this_json() {
        let shard = |node, shard| ShardId { node: NodeNumber(node), shard: ShardIndex(shard) };
        let record = RingRecord {
            format_version: RING_FORMAT_VERSION,
            generation: RingGeneration(2),
            kind: RingKind::Table,
            slices: 1,
            next_number: 8,
            nodes: vec![RingNode {
                number: NodeNumber(7),
                id: NodeId::from_bytes([1; 16]),
                given: RingGeneration(2),
                host: "a".into(),
                zone: String::new(),
                rack: "r".into(),
                shards: vec![RingShard { index: ShardIndex(3), weight_bytes: 1 << 60 }],
            }],
            table: vec![ReplicaList(vec![shard(7, 3), shard(9, 0)])],
        };
        let json = concat!(
            r#"{"format_version":2,"generation":2,"kind":"table","slices":1,"next_number":8,"nodes":[{"number":7,"#,
            r#""id":"01010101-0101-0101-0101-010101010101","given":2,"host":"a","zone":"","rack":"r","#,
            r#""shards":[{"index":3,"weight_bytes":"1152921504606846976"}]}],"table":["7.3,9.0"]}"#
        );
        assert_eq!(String::from_utf8(encode(&record)).unwrap(), json);
        assert_eq!(decode::<RingRecord>("k", json.as_bytes()).unwrap(), record);
    }

    #[test]
    fn a_replica_list_that_is_no_list_of_shards_is_refused_with_what_was_found() {
        for text in ["", "1", "1.2.3", "a.b", "1.2,", "1.99999"] {
            let error = serde_json::from_value::<ReplicaList>(text.into()).unwrap_err();
            assert!(error.to_string().contains(&format!("{text:?}")), "{error}");
        }
    }
}
