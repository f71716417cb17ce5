//! What a node's control port tells of scrub and damage, as Rust types; `control.capnp` ⇄ these. `client` asks,
//! `instances` is what it holds, `stages` how long its requests take.
//!
//! Status has types of its own where it is served (`torus_engine::control`).

mod client;
mod instances;
mod stages;

pub use client::{ControlError, ask_damage, ask_instances, ask_scrub, ask_stages};
pub use instances::{HeldSlices, HeldVolume, ShardInstances, set_instances};
pub use stages::{ShardStages, set_stages};

use torus_schema::control_capnp::{
    self, ScrubOrder as WireOrder, conflicting_block, damaged_block, scrub_pass, scrub_status, shard_damage,
};
use torus_schema::ids::{BlockIndex, Epoch, NodeId, ShardIndex, Version, VolumeId};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScrubOrder {
    /// Only tell.
    Status,
    Start,
    Stop,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    /// Of the whole node; 0: passes start only when told.
    pub rate_bytes_s: u64,
    /// When the next pass starts by itself, in seconds since the epoch of Unix by the node's clock; 0: never.
    pub next_s: u64,
    pub shards: Vec<ShardScrub>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ShardScrub {
    pub index: ShardIndex,
    pub segments: u32,
    /// The pass that runs, or was stopped or cut off.
    pub current: Option<Pass>,
    pub running: bool,
    pub last: Option<Pass>,
}

/// Times in seconds since the epoch of Unix, by the node's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pass {
    pub started_s: u64,
    /// 0: it has not ended.
    pub finished_s: u64,
    pub segment: u32,
    pub blocks_read: u64,
    pub blocks_compared: u64,
    pub damaged: u64,
    pub conflicts: u64,
    pub segments_unread: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardDamage {
    pub index: ShardIndex,
    /// All there are; the lists may hold fewer.
    pub damaged: u64,
    pub conflicts: u64,
    pub blocks: Vec<DamagedBlock>,
    pub conflict_list: Vec<ConflictingBlock>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedBlock {
    pub volume: VolumeId,
    pub block: BlockIndex,
    pub version: Version,
    /// Block of the shard's disk.
    pub position: u32,
    /// Who came across it: read, scrub, start, cleaner.
    pub found_by: String,
    pub age_s: u64,
    pub attempts: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConflictingBlock {
    pub volume: VolumeId,
    pub block: BlockIndex,
    pub version: Version,
    pub checksum_here: u32,
    pub checksum_there: u32,
    pub peer_node: NodeId,
    pub peer_shard: ShardIndex,
    pub age_s: u64,
}

impl From<WireOrder> for ScrubOrder {
    fn from(order: WireOrder) -> Self {
        match order {
            WireOrder::Status => Self::Status,
            WireOrder::Start => Self::Start,
            WireOrder::Stop => Self::Stop,
        }
    }
}

impl From<ScrubOrder> for WireOrder {
    fn from(order: ScrubOrder) -> Self {
        match order {
            ScrubOrder::Status => Self::Status,
            ScrubOrder::Start => Self::Start,
            ScrubOrder::Stop => Self::Stop,
        }
    }
}

/// Lists are as long as the node made them: all lengths below are bounded there.
fn length(list: usize) -> u32 {
    u32::try_from(list).unwrap_or(u32::MAX)
}

pub fn set_scrub_status(mut to: scrub_status::Builder<'_>, status: &ScrubStatus) {
    to.set_rate_bytes_s(status.rate_bytes_s);
    to.set_next_s(status.next_s);
    let mut shards = to.init_shards(length(status.shards.len()));
    for (position, shard) in (0u32..).zip(&status.shards) {
        let mut to = shards.reborrow().get(position);
        to.set_index(shard.index.0);
        to.set_segments(shard.segments);
        to.set_running(shard.running);
        set_pass(to.reborrow().init_current(), &shard.current.unwrap_or_default());
        set_pass(to.init_last(), &shard.last.unwrap_or_default());
    }
}

fn set_pass(mut to: scrub_pass::Builder<'_>, pass: &Pass) {
    to.set_started_s(pass.started_s);
    to.set_finished_s(pass.finished_s);
    to.set_segment(pass.segment);
    to.set_blocks_read(pass.blocks_read);
    to.set_blocks_compared(pass.blocks_compared);
    to.set_damaged(pass.damaged);
    to.set_conflicts(pass.conflicts);
    to.set_segments_unread(pass.segments_unread);
}

fn get_scrub_status(from: scrub_status::Reader<'_>) -> Result<ScrubStatus, capnp::Error> {
    let shard = |shard: control_capnp::shard_scrub::Reader<'_>| -> Result<ShardScrub, capnp::Error> {
        Ok(ShardScrub {
            index: ShardIndex(shard.get_index()),
            segments: shard.get_segments(),
            current: get_pass(shard.get_current()?),
            running: shard.get_running(),
            last: get_pass(shard.get_last()?),
        })
    };
    let shards = from.get_shards()?.iter().map(shard).collect::<Result<_, _>>()?;
    Ok(ScrubStatus { rate_bytes_s: from.get_rate_bytes_s(), next_s: from.get_next_s(), shards })
}

fn get_pass(from: scrub_pass::Reader<'_>) -> Option<Pass> {
    let pass = Pass {
        started_s: from.get_started_s(),
        finished_s: from.get_finished_s(),
        segment: from.get_segment(),
        blocks_read: from.get_blocks_read(),
        blocks_compared: from.get_blocks_compared(),
        damaged: from.get_damaged(),
        conflicts: from.get_conflicts(),
        segments_unread: from.get_segments_unread(),
    };
    (pass.started_s > 0).then_some(pass)
}

pub fn set_damage(mut to: shard_damage::Builder<'_>, damage: &ShardDamage) {
    to.set_index(damage.index.0);
    to.set_damaged(damage.damaged);
    to.set_conflicts(damage.conflicts);
    let mut blocks = to.reborrow().init_blocks(length(damage.blocks.len()));
    for (position, block) in (0u32..).zip(&damage.blocks) {
        let mut to = blocks.reborrow().get(position);
        to.set_volume(block.volume.to_string());
        to.set_block(block.block.0);
        to.set_epoch(block.version.epoch.0);
        to.set_sequence(block.version.sequence);
        to.set_position(block.position);
        to.set_found_by(&block.found_by);
        to.set_age_s(block.age_s);
        to.set_attempts(block.attempts);
    }
    let mut conflicts = to.init_conflict_list(length(damage.conflict_list.len()));
    for (position, conflict) in (0u32..).zip(&damage.conflict_list) {
        let mut to = conflicts.reborrow().get(position);
        to.set_volume(conflict.volume.to_string());
        to.set_block(conflict.block.0);
        to.set_epoch(conflict.version.epoch.0);
        to.set_sequence(conflict.version.sequence);
        to.set_checksum_here(conflict.checksum_here);
        to.set_checksum_there(conflict.checksum_there);
        to.set_peer_node(conflict.peer_node.to_string());
        to.set_peer_shard(conflict.peer_shard.0);
        to.set_age_s(conflict.age_s);
    }
}

fn get_damage(from: shard_damage::Reader<'_>) -> Result<ShardDamage, capnp::Error> {
    Ok(ShardDamage {
        index: ShardIndex(from.get_index()),
        damaged: from.get_damaged(),
        conflicts: from.get_conflicts(),
        blocks: from.get_blocks()?.iter().map(get_damaged_block).collect::<Result<_, _>>()?,
        conflict_list: from.get_conflict_list()?.iter().map(get_conflict).collect::<Result<_, _>>()?,
    })
}

fn get_damaged_block(from: damaged_block::Reader<'_>) -> Result<DamagedBlock, capnp::Error> {
    Ok(DamagedBlock {
        volume: parse(from.get_volume()?.to_str()?, "volume")?,
        block: BlockIndex(from.get_block()),
        version: Version::new(Epoch(from.get_epoch()), from.get_sequence()),
        position: from.get_position(),
        found_by: from.get_found_by()?.to_string()?,
        age_s: from.get_age_s(),
        attempts: from.get_attempts(),
    })
}

fn get_conflict(from: conflicting_block::Reader<'_>) -> Result<ConflictingBlock, capnp::Error> {
    Ok(ConflictingBlock {
        volume: parse(from.get_volume()?.to_str()?, "volume")?,
        block: BlockIndex(from.get_block()),
        version: Version::new(Epoch(from.get_epoch()), from.get_sequence()),
        checksum_here: from.get_checksum_here(),
        checksum_there: from.get_checksum_there(),
        peer_node: parse(from.get_peer_node()?.to_str()?, "node")?,
        peer_shard: ShardIndex(from.get_peer_shard()),
        age_s: from.get_age_s(),
    })
}

fn parse<T: std::str::FromStr>(text: &str, what: &str) -> Result<T, capnp::Error> {
    text.parse().map_err(|_| capnp::Error::failed(format!("found {text:?}, expected the uuid of a {what}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use capnp::message::Builder;

    #[test]
    fn a_scrub_status_arrives_as_it_was_sent() {
        let pass =
            Pass { started_s: 5, finished_s: 9, segment: 3, blocks_read: u64::MAX, damaged: 2, ..Pass::default() };
        let (index, segments) = (ShardIndex(2), 7);
        let shard = ShardScrub { index, segments, current: None, running: true, last: Some(pass) };
        let status = ScrubStatus { rate_bytes_s: 1 << 40, next_s: 12, shards: vec![shard] };
        let mut message = Builder::new_default();
        set_scrub_status(message.init_root(), &status);
        assert_eq!(get_scrub_status(message.get_root_as_reader().unwrap()).unwrap(), status);
    }

    #[test]
    fn damage_arrives_as_it_was_sent_and_what_is_no_uuid_is_refused() {
        let (volume, block, version) = (VolumeId::from_bytes([3; 16]), BlockIndex(9), Version::new(Epoch(2), 77));
        let found_by = "scrub".to_string();
        let damaged = DamagedBlock { volume, block, version, position: 8, found_by, age_s: 1, attempts: 4 };
        let (peer_node, peer_shard) = (NodeId::from_bytes([4; 16]), ShardIndex(1));
        let (checksum_here, checksum_there, age_s) = (1, u32::MAX, 6);
        let conflict =
            ConflictingBlock { volume, block, version, checksum_here, checksum_there, peer_node, peer_shard, age_s };
        let (blocks, conflict_list) = (vec![damaged], vec![conflict]);
        let damage = ShardDamage { index: ShardIndex(0), damaged: 10, conflicts: 20, blocks, conflict_list };
        let mut message = Builder::new_default();
        set_damage(message.init_root(), &damage);
        assert_eq!(get_damage(message.get_root_as_reader().unwrap()).unwrap(), damage);
        let mut bad = Builder::new_default();
        bad.init_root::<shard_damage::Builder<'_>>().init_blocks(1).get(0).set_volume("no uuid");
        assert!(get_damage(bad.get_root_as_reader().unwrap()).is_err());
    }
}
