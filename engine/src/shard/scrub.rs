//! Scrub: reads everything that is needed, at a given rate, and verifies it, so that rot is found while a peer still has
//! the block. What is damaged is noted; `repair` mends it.
//!
//! A pass goes through the segments in order: of each, what the index or a pin still needs is read, neighbours
//! together. It holds a segment only while it reads from it, so cleaning and overwriting go on underneath; what was
//! moved meanwhile is verified where it went, or was by the cleaner that moved it.
//! Then it compares: every version that is current here is asked of the peers, without the data. Equal versions with
//! different checksums are a conflict, which is told and left alone; different versions are none of its business.
//!
//! When a pass starts, what is remembered of it and how fast it goes is decided by the node (`node::scrub`).

use super::damage::{Conflict, Damaged, FoundBy};
use super::repair::{block_of, versions_of};
use super::{Shard, State};
use crate::index::{Found, Place};
use crate::log::record::Record;
use crate::log::recovery::footer_of;
use crate::log::search::search;
use crate::log::space::Usage;
use crate::log::{BLOCK, Geometry, Position, SegmentIndex};
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::message::Answer;
use torus_rpc::runtime::{Clock, Disk, Peer, Runtime};
use torus_schema::ids::{BlockIndex, VolumeId};
use torus_schema::limits::{BLOCKS_PER_EXTENT, BLOCKS_PER_FRAME_MAX};

/// Read at once: long enough to be cheap, short enough not to hold up a client's read.
const READ_BLOCKS_MAX: usize = 64;
/// What a question to a peer counts as, in bytes: it costs about as much as reading a block.
const QUESTION_BYTES: usize = BLOCK;

/// One pass, as far as it came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubPass {
    /// Names it: seconds since the epoch of Unix at its start, by the node's clock.
    pub started_s: u64,
    /// The next segment to read; all of them: it compares.
    pub segment: u32,
    pub blocks_read: u64,
    /// Versions that a peer has too.
    pub blocks_compared: u64,
    pub damaged: u64,
    pub conflicts: u64,
    /// Segments whose footer cannot be read. What their headers list was verified nevertheless.
    pub segments_unread: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ScrubReport {
    pub running: Option<ScrubPass>,
    /// The last that came to its end since the shard was opened.
    pub finished: Option<ScrubPass>,
}

#[derive(Default)]
pub(super) struct Scrub {
    running: Option<Running>,
    finished: Option<ScrubPass>,
    /// Starts so far.
    starts: Start,
    pub stopped: bool,
}

/// Tells a pass from one that was stopped, of which a turn is still under way when the next is started: what that turn
/// still finds is not the next one's.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Start(u64);

struct Running {
    start: Start,
    pass: ScrubPass,
    rate_bytes_s: u64,
}

enum Turn {
    Segment(Start, SegmentIndex),
    Compare(Start),
    Stop,
}

impl Scrub {
    /// Bytes a second; `None`: that pass was stopped.
    fn rate_of(&self, start: Start) -> Option<u64> {
        self.running.as_ref().filter(|running| running.start == start).map(|running| running.rate_bytes_s)
    }
}

/// Where the records of a segment are listed.
enum List {
    Here(Vec<Record>),
    /// Of the use of that sequence.
    InFooter(Option<u64>),
}

impl<R: Runtime> Shard<R> {
    /// Goes on with a pass where it was, or begins it. Nothing happens while one runs.
    pub fn start_scrub(&self, pass: ScrubPass, rate_bytes_s: u64) {
        assert!(rate_bytes_s > 0, "a rate of zero means that there is no scrub");
        let scrub = &mut self.state.borrow_mut().scrub;
        if scrub.running.is_none() {
            scrub.starts.0 += 1;
            scrub.running = Some(Running { start: scrub.starts, pass, rate_bytes_s });
        }
        self.background.notify();
    }

    /// Gives the pass as far as it came.
    pub fn stop_scrub(&self) -> Option<ScrubPass> {
        let running = self.state.borrow_mut().scrub.running.take();
        self.background.notify();
        running.map(|running| running.pass)
    }

    pub fn scrub_report(&self) -> ScrubReport {
        let scrub = &self.state.borrow().scrub;
        ScrubReport { running: scrub.running.as_ref().map(|running| running.pass), finished: scrub.finished }
    }

    pub(super) async fn scrub_forever(self: Rc<Self>) {
        loop {
            let turn = self.background.until(|| self.state.borrow().scrub_turn(self.geometry)).await;
            match turn {
                Turn::Stop => break,
                Turn::Segment(start, segment) => {
                    if self.scrub_segment(start, segment).await.is_some() {
                        self.count(start, |pass| pass.segment += 1);
                    }
                }
                Turn::Compare(start) => {
                    if self.compare_all(start).await.is_some() {
                        let state = &mut *self.state.borrow_mut();
                        state.forget_settled_conflicts();
                        state.scrub.finished = state.scrub.running.take().map(|running| running.pass);
                    }
                    self.peers.close_links();
                }
            }
        }
        self.state.borrow_mut().scrub.stopped = true;
        self.changed.notify();
    }

    fn count(&self, start: Start, change: impl FnOnce(&mut ScrubPass)) {
        let scrub = &mut self.state.borrow_mut().scrub;
        if let Some(running) = scrub.running.as_mut().filter(|running| running.start == start) {
            change(&mut running.pass);
        }
    }

    /// `None`: told to stop meanwhile.
    async fn scrub_segment(self: &Rc<Self>, start: Start, segment: SegmentIndex) -> Option<()> {
        let held = self.hold(segment);
        let list = self.changed.until(|| self.state.borrow().list_of(segment)).await;
        let records = match list {
            List::Here(records) => records,
            List::InFooter(sequence) => {
                match footer_of(&self.disk, self.geometry, segment, sequence).await.ok().flatten() {
                    Some(footer) => footer.records,
                    None => self.records_in_headers(start, segment, sequence).await?,
                }
            }
        };
        drop(held);
        for group in neighbours(&self.needed_blocks(&records)) {
            let read = self.scrub_group(start, segment, group).await;
            self.pace(start, read * BLOCK).await?;
        }
        Some(())
    }

    /// The footer is damaged; the next start makes another, and until then the segment is not cleaned either.
    async fn records_in_headers(
        &self,
        start: Start,
        segment: SegmentIndex,
        sequence: Option<u64>,
    ) -> Option<Vec<Record>> {
        self.count(start, |pass| pass.segments_unread += 1);
        tracing::error!(segment = segment.0, "scrub: a footer cannot be read; its segment is read batch by batch");
        let found = search(&self.disk, self.geometry, segment, |identity| Some(identity.sequence) == sequence).await;
        self.pace(start, self.geometry.blocks as usize * BLOCK).await?;
        Some(found.batches.into_iter().flat_map(|batch| batch.header.records).collect())
    }

    /// In the order they lie.
    fn needed_blocks(&self, records: &[Record]) -> Vec<Damaged> {
        let state = self.state.borrow();
        let data = records.iter().filter_map(|record| if let Record::Data(data) = record { Some(data) } else { None });
        let blocks = data.flat_map(|data| (0..data.checksums.len()).map(|number| block_of(data, number)));
        let mut needed: Vec<Damaged> = blocks.filter(|block| state.is_needed_there(block)).collect();
        needed.sort_unstable_by_key(|block| block.position);
        needed
    }

    /// Gives how many blocks were read.
    async fn scrub_group(self: &Rc<Self>, start: Start, segment: SegmentIndex, group: &[Damaged]) -> usize {
        let _held = self.hold(segment);
        // From here on the segment is not used anew: what is needed of it now stays what it is.
        let needed: Vec<&Damaged> = {
            let state = self.state.borrow();
            group.iter().filter(|block| state.is_needed_there(block)).collect()
        };
        let (Some(first), Some(last)) = (needed.first(), needed.last()) else { return 0 };
        let blocks = (last.position.0 - first.position.0 + 1) as usize;
        let bytes = self.disk.read(Geometry::offset(first.position), blocks * BLOCK).await.ok();
        let mut damaged = 0;
        for block in &needed {
            let at = (block.position.0 - first.position.0) as usize * BLOCK;
            let is_good = |bytes: &<R::Disk as Disk>::Bytes| crc32c::crc32c(&bytes[at..at + BLOCK]) == block.checksum;
            let good = bytes.as_ref().is_some_and(is_good);
            // Once more and alone: it may have been the transfer, or its neighbour.
            if !good && self.read_verified(block.position, &[block.checksum]).await.is_none() {
                self.note_damaged(**block, FoundBy::Scrub);
                damaged += 1;
            }
        }
        self.count(start, |pass| {
            pass.blocks_read += needed.len() as u64;
            pass.damaged += damaged;
        });
        blocks
    }

    /// Sleeps for as long as that many bytes may take. `None`: told to stop.
    async fn pace(&self, start: Start, bytes: usize) -> Option<()> {
        let rate = self.state.borrow().scrub.rate_of(start)?;
        let nanoseconds = bytes as u128 * 1_000_000_000 / u128::from(rate);
        let sleep = self.runtime.clock().sleep(Duration::from_nanos(nanoseconds as u64));
        let is_over = || {
            let state = self.state.borrow();
            (state.is_ending() || state.scrub.rate_of(start).is_none()).then_some(())
        };
        let over = self.background.until(is_over);
        futures::pin_mut!(sleep, over);
        match futures::future::select(sleep, over).await {
            futures::future::Either::Left(_) => is_over().is_none().then_some(()),
            futures::future::Either::Right(_) => None,
        }
    }

    async fn compare_all(self: &Rc<Self>, start: Start) -> Option<()> {
        let volumes: Vec<VolumeId> = self.state.borrow().contents.volumes.keys().copied().collect();
        for volume in volumes {
            let extents = self.state.borrow().contents.index.extents_of(volume);
            for extent in extents {
                let first = extent.first_block();
                for peer in self.other_holders(volume, first) {
                    for offset in (0..BLOCKS_PER_EXTENT).step_by(BLOCKS_PER_FRAME_MAX as usize) {
                        let asked = self.compare(start, &peer, volume, BlockIndex(first.0 + offset)).await;
                        self.pace(start, if asked { QUESTION_BYTES } else { 0 }).await?;
                    }
                }
            }
        }
        Some(())
    }

    /// One frame of blocks. False if there was nothing to ask.
    async fn compare(&self, start: Start, peer: &Peer, volume: VolumeId, first: BlockIndex) -> bool {
        let count = BLOCKS_PER_FRAME_MAX as u32;
        let here = {
            let contents = &self.state.borrow().contents;
            let place = Place { volume, slice: contents.slice_of(volume, first.extent()), block: first };
            contents.index.find_range(place, count)
        };
        let last = here.iter().rposition(|found| matches!(found, Found::Data(_)));
        let Some(last) = last else { return false };
        let (envelope, operation) = self.peer_request(volume, first, last as u32 + 1, false);
        let answer = self.unless_ending(self.ask_peer(peer, &envelope, &operation)).await;
        let Some(Ok((Answer::Read { runs, checksums }, _))) = answer else { return true };
        let Some(there) = versions_of(&runs, &checksums) else { return true };
        for ((block, found), (version, checksum)) in (first.0..).map(BlockIndex).zip(&here).zip(there) {
            let (Found::Data(entry), Some(checksum)) = (found, checksum) else { continue };
            if entry.version != version {
                continue;
            }
            self.count(start, |pass| pass.blocks_compared += 1);
            if entry.checksum != checksum {
                self.count(start, |pass| pass.conflicts += 1);
                let (position, version) = (entry.position, entry.version);
                let ours = Damaged { volume, block, version, checksum: entry.checksum, position };
                self.note_conflict(&ours, checksum, peer);
            }
        }
        true
    }
}

/// Blocks that lie together, cut to what is read at once.
fn neighbours(blocks: &[Damaged]) -> impl Iterator<Item = &[Damaged]> {
    let together = |a: &Damaged, b: &Damaged| b.position == Position(a.position.0 + 1);
    blocks.chunk_by(together).flat_map(|chunk| chunk.chunks(READ_BLOCKS_MAX))
}

impl State {
    /// `None`: there is nothing to do.
    fn scrub_turn(&self, geometry: Geometry) -> Option<Turn> {
        if self.is_ending() {
            return Some(Turn::Stop);
        }
        let Running { start, pass, .. } = *self.scrub.running.as_ref()?;
        let reads = pass.segment < geometry.segments;
        Some(if reads { Turn::Segment(start, SegmentIndex(pass.segment)) } else { Turn::Compare(start) })
    }

    /// What was written anew since is a conflict no more.
    fn forget_settled_conflicts(&mut self) {
        let settled: Vec<Conflict> =
            self.contents.damage.conflicts().filter(|found| !self.stands(found)).cloned().collect();
        settled.iter().for_each(|conflict| self.contents.damage.settled(conflict));
    }

    fn stands(&self, conflict: &Conflict) -> bool {
        let &Conflict { volume, block, version, checksum_here: checksum, .. } = conflict;
        self.standing(&Damaged { volume, block, version, checksum, position: Position(0) }).is_some()
    }

    fn is_needed_there(&self, block: &Damaged) -> bool {
        self.standing(block) == Some(block.position)
    }

    /// `None`: its footer is being written, or is about to be.
    fn list_of(&self, segment: SegmentIndex) -> Option<List> {
        let fillings = self.queue.head.iter().chain(&self.queue.sealing);
        let mut filling = fillings.filter(|filling| filling.identity.segment == segment);
        match (filling.next(), self.contents.space.usage(segment)) {
            (Some(filling), _) => Some(List::Here(filling.records.clone())),
            (None, Usage::Sealed) => Some(List::InFooter(self.contents.space.sequence(segment))),
            (None, Usage::Open | Usage::Sealing) if !self.is_ending() => None,
            // Nothing in it is needed.
            (None, _) => Some(List::Here(Vec::new())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::ids::{Epoch, Version};

    #[test]
    fn blocks_that_lie_together_are_read_together_up_to_a_bound() {
        let block = |position: u32| Damaged {
            volume: VolumeId::from_bytes([1; 16]),
            block: BlockIndex(0),
            version: Version::new(Epoch(1), 1),
            checksum: 0,
            position: Position(position),
        };
        let blocks: Vec<Damaged> =
            [3, 4, 5, 9].into_iter().chain(20..20 + 2 * READ_BLOCKS_MAX as u32 + 1).map(block).collect();
        let lengths: Vec<usize> = neighbours(&blocks).map(<[Damaged]>::len).collect();
        assert_eq!(lengths, vec![3, 1, READ_BLOCKS_MAX, READ_BLOCKS_MAX, 1]);
    }
}
