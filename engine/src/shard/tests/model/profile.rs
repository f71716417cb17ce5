//! What a seed draws first: how large the disk and its segments are, and what the disk does wrong.

use crate::disk::simulated::{Damage, Faults, SimulatedDisk};
use crate::log::SEGMENTS_START_BLOCK;
use torus_rpc::runtime::simulated::{Here, World};
use torus_schema::limits::BLOCK_BYTES;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trouble {
    /// Crashes, and nothing else.
    None,
    /// Now and then a page of the disk is damaged while the shard runs or is down.
    Damage,
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
    /// How often, as one in so many rounds or operations.
    rate: u64,
    slow_one_in: u64,
}

impl Profile {
    pub fn draw(world: &World, damaged: bool) -> Self {
        let (segments, segment_blocks) = [(14, 48), (24, 28), (18, 36), (40, 20)][world.random_below(4) as usize];
        let troubles = [Trouble::Damage, Trouble::Misread, Trouble::Miswrite, Trouble::Errors];
        let trouble = if damaged { troubles[world.random_below(4) as usize] } else { Trouble::None };
        let rate = [3, 10, 30][world.random_below(3) as usize];
        let slow_one_in = [0, 10, 50][world.random_below(3) as usize];
        Self { segments, segment_blocks, trouble, rate, slow_one_in }
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
            Trouble::None | Trouble::Damage | Trouble::Errors => slow,
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
        if !matches!(self.trouble, Trouble::Damage | Trouble::Errors) || !world.one_in(self.rate) {
            return;
        }
        if self.trouble == Trouble::Damage {
            let kinds = [Damage::Rot, Damage::Old, Damage::Elsewhere];
            for _ in 0..1 + world.random_below(2) {
                disk.damage(kinds[world.random_below(3) as usize]);
            }
            return;
        }
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

    /// Of an opening: the first block of a segment.
    pub fn is_opening(&self, offset: u64) -> bool {
        let block = offset / BLOCK_BYTES;
        block >= SEGMENTS_START_BLOCK && (block - SEGMENTS_START_BLOCK).is_multiple_of(self.segment_blocks)
    }
}
