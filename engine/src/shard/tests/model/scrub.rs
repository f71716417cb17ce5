//! Whole passes over everything amid writes. What a pass reports has to be damaged, and what is damaged has to be
//! reported; what the other replica has is mended, and nothing else.

use super::*;
use crate::index::Entry;
use crate::log::Geometry;
use crate::shard::{ListedDamage, ScrubPass};
use std::collections::BTreeSet;
use torus_schema::limits::{BLOCK_BYTES, MIB, REPAIR_PAUSE_MAX};

/// More than are ever listed here.
const ALL: usize = 100_000;

/// What the passes of some seeds came across.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    pub passes: u64,
    pub found: u64,
    pub mended: u64,
    /// Left listed, since the other replica does not have them so.
    pub not_mended: u64,
    pub conflicts: u64,
    /// Passes that could not read a list of records.
    pub unread: u64,
}

impl Reached {
    pub fn add(&mut self, other: Reached) {
        self.passes += other.passes;
        self.found += other.found;
        self.mended += other.mended;
        self.not_mended += other.not_mended;
        self.conflicts += other.conflicts;
        self.unread += other.unread;
    }

    /// By so many seeds that each of it comes: else what is checked above is not checked at all.
    pub fn check(&self, damaged: bool) {
        let Reached { passes, found, mended, not_mended, conflicts, .. } = *self;
        assert!(passes > SEEDS / 2 && conflicts > 0, "{self:?}");
        assert!(!damaged || (found > 0 && mended > 0 && not_mended > 0), "{self:?}");
    }
}

impl Test {
    /// Before the shard goes: what was mended since it was opened.
    pub fn count_mended(&self) {
        if self.machine.is_up() {
            self.reached.borrow_mut().mended += self.machine.shard().statistics().repaired;
        }
    }

    /// One that nobody waits for, however it ends.
    pub fn begin_scrub(&self) {
        let rate = [MIB, 30 * MIB, 300 * MIB][self.world.random_below(3) as usize];
        let pass = ScrubPass { started_s: self.world.now().0.as_secs(), ..ScrubPass::default() };
        self.machine.shard().start_scrub(pass, rate);
    }

    /// Nothing is damaged meanwhile.
    pub async fn scrub(self: &Rc<Self>) {
        let shard = self.machine.shard();
        shard.stop_scrub();
        for _ in 0..self.world.random_below(4) {
            self.profile.hurt(&self.world, &self.machine.disk);
        }
        self.profile.calm(&self.machine.disk);
        let before = shard.statistics();
        let written_before = self.client().last_version();
        self.begin_scrub();
        let mut bursts = self.world.random_below(3);
        let pass = loop {
            let report = shard.scrub_report();
            match report.finished.filter(|_| report.running.is_none()) {
                Some(pass) => break pass,
                None if bursts > 0 => {
                    bursts -= 1;
                    self.flush_all().await;
                    self.operations_done(self.start_operations()).await;
                }
                None => self.world.sleep(Duration::from_millis(1)).await,
            }
            if self.failed.get() {
                return;
            }
        };
        if let Some(replica) = &self.replica {
            replica.is_idle(&self.world).await;
        }
        self.check_pass(&pass);
        if shard.statistics().damaged > 0 {
            // By then each was tried once more, and a read that failed for the moment is none any more.
            self.world.sleep(REPAIR_PAUSE_MAX + Duration::from_secs(1)).await;
        }
        let listed = self.check_listed();
        self.check_needed(&pass, &listed);
        self.check_conflicts(written_before);
        self.check_what_is_read(&pass, &listed).await;
        let after = shard.statistics();
        self.reached.borrow_mut().add(Reached {
            passes: 1,
            found: pass.damaged,
            mended: 0,
            not_mended: listed.len() as u64,
            conflicts: after.conflicts - before.conflicts,
            unread: u64::from(pass.segments_unread > 0),
        });
        self.profile.begin(&self.machine.disk);
    }

    fn check_pass(&self, pass: &ScrubPass) {
        let (seed, statistics) = (self.seed(), self.machine.shard().statistics());
        if !self.may_be_damaged() {
            let found = (pass.damaged, pass.segments_unread, statistics.damaged_found);
            assert_eq!(found, (0, 0, 0), "seed {seed}: on a sound disk: {pass:?}");
        }
        let may_differ = self.replica.as_ref().is_some_and(|replica| !replica.differing().is_empty());
        assert!(may_differ || pass.conflicts == 0, "seed {seed}: nobody was given anything else: {pass:?}");
    }

    /// What is listed is needed, damaged, and nowhere to be had. Gives what it is.
    fn check_listed(&self) -> Vec<ListedDamage> {
        let (seed, shard) = (self.seed(), self.machine.shard());
        let listed = shard.damage(ALL).blocks;
        for ListedDamage { damaged, .. } in &listed {
            let place = format!("seed {seed}: block {} at {}", damaged.block, damaged.version);
            let position = shard.state.borrow().standing(damaged);
            let Some(position) = position else { panic!("{place} is listed, and nobody needs it") };
            let good = self.is_good(&Entry { position, checksum: damaged.checksum, version: damaged.version });
            assert!(!good, "{place} is listed, and is whole");
            let there = self.replica.as_ref().and_then(|replica| replica.current(damaged.block.0));
            let same =
                there.is_some_and(|there| (there.version, there.checksum) == (damaged.version, damaged.checksum));
            assert!(!same || shard.statistics().full, "{place} is not mended, and the other replica has it");
        }
        listed
    }

    /// What is needed is whole or listed.
    fn check_needed(&self, pass: &ScrubPass, listed: &[ListedDamage]) {
        let (seed, shard, client) = (self.seed(), self.machine.shard(), self.client());
        let listed: BTreeSet<(BlockIndex, Version)> =
            listed.iter().map(|listed| (listed.damaged.block, listed.damaged.version)).collect();
        let current = (0..EXTENTS * BLOCKS_USED).map(block_at).filter_map(|block| match client.found(block) {
            crate::index::Found::Data(entry) => Some((BlockIndex(block), entry)),
            _ => None,
        });
        let mut needed: Vec<(BlockIndex, Entry)> = current.collect();
        let state = shard.state.borrow();
        needed.extend(state.contents.volumes.get(&client.volume).into_iter().flat_map(|volume| volume.pins.all()));
        for (block, entry) in needed {
            let known = self.is_good(&entry) || listed.contains(&(block, entry.version));
            let version = entry.version;
            assert!(known || pass.segments_unread > 0, "seed {seed}: block {block} at {version} is damaged: {pass:?}");
        }
    }

    /// What differs is told, if it did when the pass began, and nothing else.
    fn check_conflicts(&self, written_before: Version) {
        let (seed, shard, client) = (self.seed(), self.machine.shard(), self.client());
        let Some(replica) = &self.replica else { return };
        let told: BTreeSet<(u64, Version)> =
            shard.damage(ALL).conflicts.iter().map(|conflict| (conflict.block.0, conflict.version)).collect();
        for (block, version) in &told {
            assert!(replica.differs(*block, *version), "seed {seed}: block {block} at {version} differs nowhere");
        }
        for (block, version) in replica.differing() {
            let there = replica.current(block).is_some_and(|there| there.version == version);
            let here = client.found(block).version() == version;
            let is_told = told.contains(&(block, version));
            assert!(!here || !there || version > written_before || is_told, "seed {seed}: block {block} at {version}");
        }
    }

    /// What was mended reads right, and what is listed is answered as damaged.
    async fn check_what_is_read(self: &Rc<Self>, pass: &ScrubPass, listed: &[ListedDamage]) {
        for extent in 0..EXTENTS {
            let Ok(found) = self.read_extent(extent * 1024).await else { return };
            for (block, found) in (extent * 1024..).zip(found) {
                let highest = self.blocks.borrow().acknowledged(block);
                match found {
                    Some(found) => self.check(block, found, highest),
                    None => {
                        let is_listed = listed.iter().any(|listed| listed.damaged.block.0 == block);
                        let known = is_listed || pass.segments_unread > 0;
                        assert!(known, "seed {}: block {block} is damaged, and not listed", self.seed());
                    }
                }
            }
        }
    }

    fn is_good(&self, entry: &Entry) -> bool {
        let (offset, bytes) = (Geometry::offset(entry.position), BLOCK_BYTES as usize);
        let disk = &self.machine.disk;
        disk.is_readable(offset, bytes) && crc32c::crc32c(&disk.peek(offset, bytes)) == entry.checksum
    }
}
