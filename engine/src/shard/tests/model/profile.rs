//! What a seed draws first: how large the disk and its segments are, and what the disk does wrong.

use crate::disk::simulated::{Damage, Faults, SimulatedDisk};
use crate::log::SEGMENTS_START_BLOCK;
use torus_rpc::runtime::simulated::{Here, World};
use torus_schema::limits::BLOCK_BYTES;

/// A batch, as `log::batch` has it.
const HEADER_BEGINS_WITH: &[u8] = b"TORUSBAT";

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// Crashes, and nothing else.
    None,
    /// Now and then a page of the disk is damaged while the shard runs or is down.
    Damage,
    /// The same, where a start looks: headers in each other's places, together with the footer that knows better; what
    /// was written last.
    Aimed,
    /// Reads that give something else, once.
    Misread,
    /// Writes that rot, are lost or stand elsewhere.
    Miswrite,
    /// Places that cannot be read, writes and syncs that fail, a disk that is gone for a while.
    Errors,
}

#[derive(Clone, Copy, Debug)]
pub struct Profile {
    pub segments: u64,
    pub segment_blocks: u64,
    pub trouble: Trouble,
    /// There is a peer that can mend what is damaged.
    pub has_replica: bool,
    /// How often, as one in so many rounds or operations.
    rate: u64,
    slow_one_in: u64,
}

impl Profile {
    pub fn draw(world: &World, damaged: bool) -> Self {
        let (segments, segment_blocks) = [(14, 48), (24, 28), (18, 36), (40, 20)][world.random_below(4) as usize];
        let troubles = [Trouble::Damage, Trouble::Aimed, Trouble::Misread, Trouble::Miswrite, Trouble::Errors];
        let trouble = if damaged { troubles[world.random_below(5) as usize] } else { Trouble::None };
        let rate = [3, 10, 30][world.random_below(3) as usize];
        let slow_one_in = [0, 10, 50][world.random_below(3) as usize];
        let has_replica = world.one_in(if damaged { 2 } else { 4 });
        Self { segments, segment_blocks, trouble, has_replica, rate, slow_one_in }
    }

    /// After the shard was made: a disk that is damaged before it holds anything is simply not taken.
    pub fn begin(&self, disk: &SimulatedDisk<Here>) {
        disk.set_faults(self.faults());
    }

    fn faults(&self) -> Faults {
        let slow = Faults { slow_one_in: self.slow_one_in, ..Faults::default() };
        let one_in = self.rate * 20;
        match self.trouble {
            Trouble::Misread => {
                Faults { read_rot_one_in: one_in, read_old_one_in: one_in, read_elsewhere_one_in: one_in, ..slow }
            }
            Trouble::Miswrite => {
                Faults { write_rot_one_in: one_in, write_lost_one_in: one_in, write_elsewhere_one_in: one_in, ..slow }
            }
            Trouble::None | Trouble::Damage | Trouble::Aimed | Trouble::Errors => slow,
        }
    }

    /// No more of what is transient, so that a start that failed may succeed.
    pub fn calm(&self, disk: &SimulatedDisk<Here>) {
        disk.set_faults(Faults::default());
        disk.fail_reads(0);
        disk.fail_writes(0);
        disk.fail_syncs(0);
        disk.reappear();
    }

    /// While the shard runs, or between a crash and the start.
    pub fn hurt(&self, world: &World, disk: &SimulatedDisk<Here>) {
        let hurts = matches!(self.trouble, Trouble::Damage | Trouble::Aimed | Trouble::Errors);
        if !hurts || !world.one_in(self.rate) {
            return;
        }
        match self.trouble {
            Trouble::Damage => {
                for _ in 0..1 + world.random_below(2) {
                    disk.damage(draw_damage(world));
                }
            }
            Trouble::Aimed => self.aim(world, disk),
            _ => self.fail(world, disk),
        }
    }

    fn fail(&self, world: &World, disk: &SimulatedDisk<Here>) {
        match world.random_below(5) {
            0 => disk.fail_reads(1 + world.random_below(3)),
            1 => disk.fail_writes(1),
            2 => disk.fail_syncs(1),
            3 => disk.vanish(),
            _ => {
                let blocks = self.segments * self.segment_blocks;
                let block = SEGMENTS_START_BLOCK + world.random_below(blocks);
                disk.make_bad(block * BLOCK_BYTES, BLOCK_BYTES as usize);
            }
        }
    }

    /// One segment: the last that was written to, or any.
    fn aim(&self, world: &World, disk: &SimulatedDisk<Here>) {
        let newest = (disk.last_written() / BLOCK_BYTES).saturating_sub(SEGMENTS_START_BLOCK) / self.segment_blocks;
        let segment = if world.one_in(2) { newest } else { world.random_below(self.segments) };
        let first = (SEGMENTS_START_BLOCK + segment * self.segment_blocks) * BLOCK_BYTES;
        let end = first + self.segment_blocks * BLOCK_BYTES;
        if world.one_in(2) {
            disk.damage_at(draw_damage(world), end - BLOCK_BYTES);
        }
        let headers = disk.beginning_with(HEADER_BEGINS_WITH, first..end);
        let damage = if world.one_in(2) { Damage::Twin } else { draw_damage(world) };
        // Of the headers those written last tell most.
        let back = world.random_below(headers.len().max(1) as u64) as usize;
        let back = if world.one_in(2) { back } else { back.min(2) };
        if let Some(header) = headers.iter().rev().nth(back) {
            let behind = if world.one_in(4) { BLOCK_BYTES } else { 0 };
            disk.damage_at(damage, header + behind);
        }
    }

    /// Of an opening: the first block of a segment.
    pub fn is_opening(&self, offset: u64) -> bool {
        let block = offset / BLOCK_BYTES;
        block >= SEGMENTS_START_BLOCK && (block - SEGMENTS_START_BLOCK).is_multiple_of(self.segment_blocks)
    }
}

fn draw_damage(world: &World) -> Damage {
    [Damage::Rot, Damage::Old, Damage::Elsewhere][world.random_below(3) as usize]
}
