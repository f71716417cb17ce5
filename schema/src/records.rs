//! What stands in the metadata store: one JSON value per key, exact keys under one versioned prefix.
//!
//! | key                          | value             | written by                      | lease |
//! |------------------------------|-------------------|---------------------------------|-------|
//! | `/torus/v1/cluster`          | [`ClusterRecord`] | `torusadm init`                 |       |
//! | `/torus/v1/ring`             | `ring::RingRecord`| `torusadm init`, `peer add`     |       |
//! | `/torus/v1/nodes/<uuid>`     | [`NodeRecord`]    | the node, at every start        |       |
//! | `/torus/v1/heartbeats/<uuid>`| [`HeartbeatRecord`]| the node                       | node  |
//! | `/torus/v1/names/<name>`     | [`NameRecord`]    | `volume create`, `delete`       |       |
//! | `/torus/v1/volumes/<uuid>`   | [`VolumeRecord`]  | `volume create`, `delete`       |       |
//! | `/torus/v1/status/<uuid>`    | [`StatusRecord`]  | the volume's writer             |       |
//! | `/torus/v1/epochs/<uuid>`    | [`EpochRecord`]   | the volume's writer             |       |
//! | `/torus/v1/owners/<uuid>`    | [`OwnerRecord`]   | the volume's writer             | writer|
//! | `/torus/v1/wanted/<uuid>`    | [`WantedRecord`]  | a client that waits for a repair to let go | client |
//! | `/torus/v1/resyncs/<uuid>`   | [`ResyncRecord`]  | the volume's writer, while it resyncs | writer |
//! | `/torus/v1/deleting/<uuid>`  | [`DeletingRecord`]| `volume delete`, then the nodes |       |
//! | `/torus/v1/placements`       | [`PlacementsRecord`]| `volume create`               |       |
//! | `/torus/v1/aoe/<shelf>.<slot>`| [`AoeRecord`]    | `torusblk aoe`, and its clients |       |
//!
//! Volume ids are never reused and keys are only ever deleted one by one: the original deleted by prefix, and
//! deleting volume 2 wiped 20 to 2f. Numbers that can pass 2^53 are strings, since JSON readers round them.

use crate::ids::NodeNumber;
use crate::ids::{ClusterId, Epoch, NodeId, RingGeneration, ShardIndex, SliceId, Version, VolumeId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use thiserror::Error;

pub const PREFIX: &str = "/torus/v1/";
/// Layout of the records; a program that finds another refuses.
pub const FORMAT_VERSION: u32 = 1;

pub mod keys {
    use super::PREFIX;
    use crate::ids::{NodeId, VolumeId};

    pub fn cluster() -> String {
        format!("{PREFIX}cluster")
    }
    pub fn ring() -> String {
        format!("{PREFIX}ring")
    }
    /// Written with every new volume and compared by every change of the ring, so that neither overlooks the other.
    pub fn placements() -> String {
        format!("{PREFIX}placements")
    }
    pub fn nodes() -> String {
        format!("{PREFIX}nodes/")
    }
    pub fn node(node: NodeId) -> String {
        format!("{PREFIX}nodes/{node}")
    }
    pub fn heartbeats() -> String {
        format!("{PREFIX}heartbeats/")
    }
    pub fn heartbeat(node: NodeId) -> String {
        format!("{PREFIX}heartbeats/{node}")
    }
    pub fn names() -> String {
        format!("{PREFIX}names/")
    }
    pub fn name(name: &str) -> String {
        format!("{PREFIX}names/{name}")
    }
    pub fn volumes() -> String {
        format!("{PREFIX}volumes/")
    }
    pub fn volume(volume: VolumeId) -> String {
        format!("{PREFIX}volumes/{volume}")
    }
    pub fn statuses() -> String {
        format!("{PREFIX}status/")
    }
    pub fn status(volume: VolumeId) -> String {
        format!("{PREFIX}status/{volume}")
    }
    pub fn epoch(volume: VolumeId) -> String {
        format!("{PREFIX}epochs/{volume}")
    }
    pub fn owners() -> String {
        format!("{PREFIX}owners/")
    }
    pub fn owner(volume: VolumeId) -> String {
        format!("{PREFIX}owners/{volume}")
    }
    pub fn wanteds() -> String {
        format!("{PREFIX}wanted/")
    }
    pub fn wanted(volume: VolumeId) -> String {
        format!("{PREFIX}wanted/{volume}")
    }
    pub fn resyncs() -> String {
        format!("{PREFIX}resyncs/")
    }
    pub fn resync(volume: VolumeId) -> String {
        format!("{PREFIX}resyncs/{volume}")
    }
    pub fn deletings() -> String {
        format!("{PREFIX}deleting/")
    }
    pub fn deleting(volume: VolumeId) -> String {
        format!("{PREFIX}deleting/{volume}")
    }
    pub fn aoes() -> String {
        format!("{PREFIX}aoe/")
    }
    pub fn aoe(shelf: u16, slot: u8) -> String {
        format!("{PREFIX}aoe/{shelf}.{slot}")
    }
}

#[derive(Debug, Error)]
#[error("the metadata record {key} cannot be read ({because}); it was written by another version or damaged")]
pub struct RecordError {
    pub key: String,
    pub because: String,
}

/// Every record is JSON; `key` only names the place in the error.
pub fn decode<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, RecordError> {
    serde_json::from_slice(value).map_err(|error| RecordError { key: key.to_string(), because: error.to_string() })
}

pub fn encode<T: Serialize>(record: &T) -> Vec<u8> {
    serde_json::to_vec(record).expect("records hold only strings, numbers and lists, which JSON can always express")
}

/// Numbers that can pass 2^53, as decimal strings.
pub mod decimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(number: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(number)
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(|_| D::Error::custom(format!("found {text:?}, expected a decimal number")))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterRecord {
    pub id: ClusterId,
    pub format_version: u32,
    /// Positions of the ring, a power of two.
    pub slices: u32,
    /// Replicas of a volume that does not say otherwise.
    pub replicas: u8,
    /// 32 random bytes in hex: signs the tokens by which a shard knows a writer that attached through the store.
    pub key: String,
    /// Seconds since the epoch of Unix.
    pub created_s: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    pub id: NodeId,
    pub cluster: ClusterId,
    /// Host name, a failure domain: two nodes of one host fall together.
    pub host: String,
    #[serde(default)]
    pub zone: String,
    #[serde(default)]
    pub rack: String,
    /// Where the control port is reached, `host:port`.
    pub control: String,
    pub shards: Vec<ShardRecord>,
    /// Version of the program that runs it.
    pub program: String,
}

impl NodeRecord {
    pub fn size_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.size_bytes).sum()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardRecord {
    pub index: ShardIndex,
    /// Where the data port is reached, `host:port`.
    pub address: String,
    #[serde(with = "decimal")]
    pub size_bytes: u64,
}

/// Bound to the node's lease: its absence is how the cluster knows that a node is down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatRecord {
    pub node: NodeId,
    /// Seconds since the epoch of Unix, by the node's clock.
    pub updated_s: u64,
    pub started_s: u64,
    pub shards: Vec<ShardUsage>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardUsage {
    pub index: ShardIndex,
    /// Bytes of blocks that can be read, or are kept for a version that can.
    #[serde(with = "decimal")]
    pub used_bytes: u64,
    /// Bytes of segments that hold nothing.
    #[serde(with = "decimal")]
    pub free_bytes: u64,
    /// Why the shard answers nothing: its disk failed. `None`: all is well.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NameRecord {
    pub volume: VolumeId,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// Its instances are being created; it cannot be attached yet, and can be deleted.
    Creating,
    Ready,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRecord {
    pub id: VolumeId,
    pub name: String,
    /// A multiple of the block size.
    #[serde(with = "decimal")]
    pub size_bytes: u64,
    pub replicas: u8,
    /// In-sync replicas below which a slice is not written.
    pub min_replicas: u8,
    /// Slices the volume is spread over, a power of two.
    pub width: u32,
    /// What the permutation of its slices is drawn from: its own id, or a clone's parent's.
    pub placement: VolumeId,
    /// The ring generation it is placed by.
    pub generation: RingGeneration,
    pub state: VolumeState,
    /// Every write is durable before it is acknowledged.
    #[serde(default)]
    pub write_through: bool,
    pub created_s: u64,
}

/// Lists exceptions only: a replica that is not listed is in sync.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusRecord {
    /// How often it was changed; never falls. The replicas remember it: who finds less here than they know has a
    /// metadata store that was restored from an older backup.
    #[serde(default)]
    pub changes: u64,
    pub stale: Vec<StaleReplica>,
}

/// One node's replicas of `slices` lack, or may lack, what is above `since`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StaleReplica {
    pub node: NodeNumber,
    pub since: VersionRecord,
    /// Seconds since the epoch of Unix when the node's first replica of the volume became stale; 0: not known. Only for
    /// people to read.
    #[serde(default)]
    pub stale_s: u64,
    pub slices: Vec<SliceId>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct VersionRecord {
    pub epoch: Epoch,
    #[serde(with = "decimal")]
    pub sequence: u64,
}

impl From<Version> for VersionRecord {
    fn from(version: Version) -> Self {
        Self { epoch: version.epoch, sequence: version.sequence }
    }
}

impl From<VersionRecord> for Version {
    fn from(record: VersionRecord) -> Self {
        Version { epoch: record.epoch, sequence: record.sequence }
    }
}

/// Outlives its owner: the next attach is one above.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpochRecord {
    pub epoch: Epoch,
    /// A lower bound of the flush point: everything up to it is durable on every in-sync replica.
    pub flush_point: VersionRecord,
    /// The last owner was forced out: the next one first waits so long, in milliseconds, since the forced one may read
    /// until then by its own clock. 0: nobody was.
    #[serde(default)]
    pub wait_out_ms: u64,
    /// A replica was found to know more than the store: the store was restored from an older backup, and what it says of
    /// the volume cannot be trusted. No attach until the operator has decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub regressed: Option<RegressedRecord>,
}

/// What replicas knew of a volume that the store did not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegressedRecord {
    /// The highest epoch, and the highest count of changes of the status. Whoever sets the volume right again writes an
    /// epoch and a status that are at least as high.
    pub epoch: Epoch,
    pub status_changes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerRecord {
    pub host: String,
    pub process: String,
    pub pid: u32,
    pub epoch: Epoch,
    /// The lease this key is bound to, as a decimal string: `--force` revokes it.
    pub lease: String,
    /// Seconds since the epoch of Unix.
    pub attached_s: u64,
    /// How its lease was granted: who forces it out has to wait for the sum of both, whatever the own settings are.
    pub lease_ttl_ms: u64,
    pub clock_drift_ms: u64,
    /// A storage node that only brings stale replicas up to date: it lets go as soon as anybody wants the volume.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub repair: bool,
}

/// Which volume an AoE address stands for, and what its target keeps for its clients.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AoeRecord {
    pub volume: VolumeId,
    /// The config string, in hexadecimal: its bytes are any.
    #[serde(default)]
    pub config: String,
    /// MAC addresses that are heard; none: all.
    #[serde(default)]
    pub masks: Vec<String>,
    /// MAC addresses that have the target to themselves; none: it is everybody's.
    #[serde(default)]
    pub reserved: Vec<String>,
}

/// Somebody waits to attach a volume that is owned only for repair.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WantedRecord {
    pub host: String,
    pub process: String,
    pub pid: u32,
}

/// How far the resyncs of a volume are, as its writer last said. Only for people to read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncRecord {
    /// Seconds since the epoch of Unix.
    pub updated_s: u64,
    pub nodes: Vec<ResyncingNode>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResyncingNode {
    pub node: NodeNumber,
    /// Seconds since the epoch of Unix.
    pub started_s: u64,
    /// Of the slices that are being brought up to date: those that are compared, and all of them.
    pub slices_done: u32,
    pub slices: u32,
    #[serde(with = "decimal")]
    pub pulled_bytes: u64,
    /// Of late.
    #[serde(with = "decimal")]
    pub rate_bytes_s: u64,
    /// What is left at this pace, in seconds; `None`: it cannot be told yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left_s: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletingRecord {
    pub volume: VolumeId,
    /// Nodes that have not yet confirmed that they dropped its instances.
    pub holders: Vec<NodeId>,
}

/// Only its revision matters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementsRecord {
    pub last: VolumeId,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_that_is_not_ours_is_an_error_that_names_its_key() {
        let error = decode::<ClusterRecord>("/torus/v1/cluster", b"{\"id\":7}").unwrap_err();
        assert!(error.to_string().contains("/torus/v1/cluster"), "{error}");
    }

    #[test]
    fn sizes_beyond_the_exact_range_of_json_numbers_survive() {
        let usage = ShardUsage { index: ShardIndex(3), used_bytes: (1 << 53) + 1, free_bytes: u64::MAX, failed: None };
        assert_eq!(decode::<ShardUsage>("k", &encode(&usage)).unwrap(), usage);
    }

    #[test]
    fn the_status_of_a_volume_with_a_dead_node_stays_below_a_kibibyte() {
        let slices = (0..64).map(|i| SliceId(4000 + i)).collect();
        let since = VersionRecord { epoch: Epoch(u32::MAX), sequence: crate::limits::SEQUENCE_MAX };
        let status = StatusRecord {
            changes: 1_000_000,
            stale: vec![StaleReplica { node: NodeNumber(299), since, stale_s: u64::from(u32::MAX), slices }],
        };
        assert!(encode(&status).len() <= 1024, "{}", encode(&status).len());
    }
}
