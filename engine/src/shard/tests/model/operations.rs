//! What a client does in a round, and what it makes of the answers.

use super::*;
use crate::log::space::RESERVE_SEGMENTS_MIN;
use torus_rpc::message::Operation;

/// What a read found: version, and whether it is data; `None`: damaged.
pub type Found = Vec<Option<(Version, bool)>>;

/// The shard answers nothing any more.
pub struct Down;

impl Test {
    fn blocks_of(&self, first: u64, end: u64) -> Vec<u64> {
        (0..EXTENTS * BLOCKS_USED).map(block_at).filter(|block| *block >= first && *block < end).collect()
    }

    /// False: it was not carried out, or in part, for a reason that this disk gave.
    pub fn is_answered<T>(&self, result: Result<T, Refusal>) -> bool {
        match result {
            Ok(_) => true,
            Err(Refusal::Disk { .. }) if self.profile.trouble == Trouble::Errors => {
                self.failed.set(true);
                false
            }
            // Segments that cannot be read cannot be cleaned either.
            Err(Refusal::NoSpace) if self.damages() > 0 || self.is_needed_to_the_brim() => {
                self.was_full.set(true);
                false
            }
            Err(refusal) => panic!("seed {}: {refusal}", self.seed()),
        }
    }

    /// Snapshots and what may be taken back are as much as the disk holds beside the reserve and the headers.
    fn is_needed_to_the_brim(&self) -> bool {
        let statistics = self.machine.shard().statistics();
        let segments = u64::from(statistics.segments.saturating_sub(RESERVE_SEGMENTS_MIN));
        statistics.live_bytes * 10 > segments * statistics.segment_bytes * 8
    }

    pub async fn write(self: Rc<Self>) {
        let world = &self.world;
        let start = world.random_below(BLOCKS_USED - 1);
        let count = 1 + world.random_below((BLOCKS_USED - start).min(if world.one_in(4) { 24 } else { 3 }));
        let first = world.random_below(EXTENTS) * 1024 + start;
        let client = self.client();
        let (version, durable) = (client.next_version(), world.one_in(8));
        let blocks: Vec<u64> = (first..first + count).collect();
        // Some arrive late, behind others with higher versions.
        world.sleep(Duration::from_micros(world.random_below(300))).await;
        let sent_at = self.blocks_now().sent(&blocks, version, true);
        if let Some(replica) = &self.replica {
            replica.write(world, first, count, version);
        }
        tracing::trace!(first, end = first + count, %version, durable, "write");
        let (operation, payload) = Client::write_operation(first, count, version, durable);
        let answered = client.call_with(operation, payload).await;
        if self.is_answered(answered) {
            self.blocks_now().answered(&blocks, version, sent_at, durable);
        }
    }

    pub async fn clear(self: Rc<Self>) {
        let world = &self.world;
        let (a, b) = (world.random_below(EXTENTS * 1024), world.random_below(EXTENTS * 1024));
        let (first, end) = if world.one_in(3) { (0, 8 * 1024) } else { (a.min(b), a.max(b) + 1) };
        let client = self.client();
        let placement = placement(client.volume);
        let slices = placement.slices();
        let slice = slices[world.random_below(slices.len() as u64) as usize];
        let inside = |block: &u64| placement.slice_of(BlockIndex(*block).extent()) == slice;
        let blocks: Vec<u64> = self.blocks_of(first, end).into_iter().filter(inside).collect();
        let (version, durable) = (client.next_version(), world.one_in(8));
        world.sleep(Duration::from_micros(world.random_below(300))).await;
        tracing::trace!(first, end, %version, durable, "clear");
        let sent_at = self.blocks_now().sent(&blocks, version, false);
        let first = BlockIndex(first);
        let operation = Operation::Clear { first, count: end - first.0, slice, version, durable };
        if let Some(replica) = &self.replica {
            replica.clear(world, operation.clone());
        }
        let answered = client.call(operation).await;
        if self.is_answered(answered) {
            self.blocks_now().answered(&blocks, version, sent_at, durable);
        }
    }

    pub async fn flush(self: Rc<Self>) {
        let covered = self.blocks.borrow().covered();
        let answered = self.client().call(Operation::Flush).await;
        if self.is_answered(answered) {
            self.blocks_now().flushed(covered);
        }
    }

    pub async fn read(self: Rc<Self>) {
        let first = self.world.random_below(EXTENTS) * 1024;
        let least: Vec<Version> = {
            let blocks = self.blocks.borrow();
            (first..first + BLOCKS_USED).map(|block| blocks.acknowledged(block)).collect()
        };
        let Ok(found) = self.read_extent(first).await else { return };
        for ((block, found), least) in (first..).zip(found).zip(least) {
            found.into_iter().for_each(|found| self.check(block, found, least));
        }
    }

    /// All blocks used of an extent; if one of them is damaged, one by one.
    pub async fn read_extent(&self, first: u64) -> Result<Found, Down> {
        let client = self.client();
        match client.read(first, BLOCKS_USED as u32).await {
            Ok(found) => return Ok(found.into_iter().map(Some).collect()),
            Err(Refusal::Damaged { .. }) => {}
            refused => return self.is_answered(refused).then(Vec::new).ok_or(Down),
        }
        let mut all = Vec::new();
        for block in first..first + BLOCKS_USED {
            match client.read(block, 1).await {
                Ok(found) => all.push(Some(found[0])),
                Err(Refusal::Damaged { block }) if self.may_be_damaged() => {
                    tracing::debug!(%block, "damaged");
                    all.push(None);
                }
                refused => return self.is_answered(refused).then(Vec::new).ok_or(Down),
            }
        }
        Ok(all)
    }

    /// A place that could not be read twice is as good as damaged.
    pub fn may_be_damaged(&self) -> bool {
        self.damages() > 0 || self.profile.trouble == Trouble::Errors
    }

    /// Nothing older, nothing that was not written, no zeros where there was data.
    pub fn check(&self, block: u64, (version, data): (Version, bool), least: Version) {
        let (seed, damages) = (self.seed(), self.damages());
        // A clear goes when nothing is left that it hid, and no replica may have that yet.
        let kept = damages == 0 && self.stale_since.get().is_some_and(|since| least > since);
        let may_be = |version| self.blocks.borrow().may_be(block, version, damages);
        let forgotten = !kept && version == Version::ZERO && may_be(least) == Some(false);
        assert!(version >= least || forgotten, "seed {seed}: block {block} is at {version}, {least} was there before");
        assert_eq!(may_be(version), Some(data), "seed {seed}: block {block} at {version}");
    }
}
