//! Writes and clears: fan-out to every replica in sync or on its way back at once, acknowledged when all have it
//! (protocol rule 6).

use super::course::Course;
use super::plan::{Piece, blocks_covered, blocks_touched, is_whole_blocks, only_piece, pieces};
use super::replay::{Kept, cost};
use super::replicas::{ShardPosition, Shards};
use super::session::Session;
use crate::device::VolumeError;
use bytes::{Bytes, BytesMut};
use futures::FutureExt;
use std::cell::Cell;
use std::ops::Range;
use std::rc::Rc;
use torus_rpc::message::{Answer, Checksums, Operation};
use torus_rpc::runtime::Runtime;
use torus_schema::ids::{BlockIndex, Version};
use torus_schema::limits::{BLOCK_BYTES, UNFLUSHED_BYTES_WHEN_FULL_MAX};

impl<R: Runtime> Session<R> {
    pub async fn write(
        self: &Rc<Self>,
        offset: u64,
        data: Bytes,
        durable: bool,
        course: &Course,
    ) -> Result<(), VolumeError> {
        self.check_range(offset, data.len() as u64)?;
        let touched = blocks_touched(offset, data.len() as u64);
        let asked = durable || self.record.write_through;
        // Several pieces would be an fdatasync each.
        let durable = asked || (self.habit.borrow_mut().writes() && only_piece(&touched).is_some());
        let guard = self.locks.lock(touched.clone()).await;
        // What is rare stands apart, in boxes, since every write would be as large as the rarest of its parts.
        if self.shards.iter().any(|shard| shard.full.get()) {
            Box::pin(self.check_space(touched.clone())).await?;
        }
        let data = match is_whole_blocks(offset, data.len() as u64) {
            true => data,
            false => Box::pin(self.whole_blocks(offset, data, touched.clone(), course)).await?,
        };
        let written = match only_piece(&touched) {
            Some(piece) => self.write_piece(piece, data, durable, course).await,
            None => Box::pin(self.write_pieces(touched, data, durable, course)).await,
        };
        drop(guard);
        written
    }

    async fn write_pieces(
        self: &Rc<Self>,
        blocks: Range<u64>,
        data: Bytes,
        durable: bool,
        course: &Course,
    ) -> Result<(), VolumeError> {
        let writes = pieces(blocks.clone()).map(|piece| {
            let start = ((piece.first.0 - blocks.start) * BLOCK_BYTES) as usize;
            self.write_piece(piece, data.slice(start..start + piece.bytes()), durable, course)
        });
        all(writes).await
    }

    /// The range reads as zeros. `advisory`: blocks at the edges that are covered in part stay as they are.
    pub async fn clear(
        self: &Rc<Self>,
        offset: u64,
        length: u64,
        durable: bool,
        advisory: bool,
        course: &Course,
    ) -> Result<(), VolumeError> {
        self.check_range(offset, length)?;
        self.habit.borrow_mut().writes();
        let durable = durable || self.record.write_through;
        let (touched, covered) = (blocks_touched(offset, length), blocks_covered(offset, length));
        if !advisory && touched != covered {
            let head = (offset + length).min(touched.start.max(covered.start) * BLOCK_BYTES).max(offset);
            let tail = (covered.end * BLOCK_BYTES).max(head);
            for edge in [offset..head, tail..offset + length] {
                if edge.start < edge.end {
                    let zeros = Bytes::from(vec![0; (edge.end - edge.start) as usize]);
                    Box::pin(self.write(edge.start, zeros, durable, course)).await?;
                }
            }
        }
        if covered.is_empty() {
            return self.check();
        }
        let guard = self.locks.lock(covered.clone()).await;
        let slots = self.slots_of(&covered).into_iter();
        let clears = slots.map(|slot| self.clear_slot(slot, covered.clone(), durable, course));
        let cleared = all(clears).await;
        drop(guard);
        cleared
    }

    pub fn check_range(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        self.check()?;
        let size = self.size_bytes.get();
        match offset.checked_add(length) {
            Some(end) if end <= size => Ok(()),
            _ => Err(VolumeError::OutOfRange { offset, length, size }),
        }
    }

    /// Some shard is full. The client hears of a full cluster before any replica has to refuse (protocol rule 16), and only if the write
    /// needs room: what replaces data gives back as much as it takes, once it is flushed. Nothing was sent yet.
    async fn check_space(self: &Rc<Self>, blocks: Range<u64>) -> Result<(), VolumeError> {
        // Both generations take room until then.
        if self.replay.borrow().bytes() >= UNFLUSHED_BYTES_WHEN_FULL_MAX {
            self.flush().await?;
        }
        if self.find_full(&blocks).await.is_none() {
            return Ok(());
        }
        // What was overwritten and cleared lately may be all that is in the way.
        self.flush().await?;
        self.tell_retention().await?;
        match self.find_full(&blocks).await {
            Some(position) => Err(VolumeError::NoSpace { shard: self.shards[position].id.to_string() }),
            None => Ok(()),
        }
    }

    /// A full shard on which the write would add blocks. One that said it is full is asked again, since what made room
    /// need not have come from us.
    async fn find_full(self: &Rc<Self>, blocks: &Range<u64>) -> Option<ShardPosition> {
        for piece in pieces(blocks.clone()) {
            let slot = self.placement.slot_of(piece.first.extent());
            let replicas: Shards = self.replicas.borrow().in_sync(slot).collect();
            for position in replicas.into_iter().filter(|position| self.shards[*position].full.get()) {
                let shard = &self.shards[position];
                let map = Operation::Map { first: piece.first, count: piece.count };
                // Whatever it answers, `ask` notes whether it is still full; a failure is the write's to handle.
                let adds = match self.ask(shard, &map, &Bytes::new()).await {
                    Ok((Answer::Mapped { runs }, _)) => runs.iter().any(|run| !run.data),
                    _ => {
                        shard.full.set(false);
                        false
                    }
                };
                if adds && shard.full.get() {
                    return Some(position);
                }
            }
        }
        None
    }

    /// The data with its first and last block completed from what is stored. The caller holds the lock.
    async fn whole_blocks(
        self: &Rc<Self>,
        offset: u64,
        data: Bytes,
        touched: Range<u64>,
        course: &Course,
    ) -> Result<Bytes, VolumeError> {
        let (start, end) = (touched.start * BLOCK_BYTES, touched.end * BLOCK_BYTES);
        let data_end = offset + data.len() as u64;
        let mut whole = BytesMut::zeroed((end - start) as usize);
        let last = end - BLOCK_BYTES;
        if start != offset || (start == last && end != data_end) {
            self.read_into(start, &mut whole[..BLOCK_BYTES as usize], course).await?;
        }
        if end != data_end && start != last {
            self.read_into(last, &mut whole[(last - start) as usize..], course).await?;
        }
        whole[(offset - start) as usize..(data_end - start) as usize].copy_from_slice(&data);
        Ok(whole.freeze())
    }

    async fn write_piece(
        self: &Rc<Self>,
        piece: Piece,
        payload: Bytes,
        durable: bool,
        course: &Course,
    ) -> Result<(), VolumeError> {
        let blocks = payload.chunks_exact(BLOCK_BYTES as usize);
        let checksums: Checksums = blocks.map(crc32c::crc32c).collect();
        assert_eq!(checksums.len(), piece.count as usize);
        let slot = self.placement.slot_of(piece.first.extent());
        let operation = |version| Operation::Write { first: piece.first, version, durable, checksums };
        let (record, replicas) = self.begin(slot, operation, payload, course).await?;
        self.replicate(&record, replicas, durable, course).await?;
        self.status_told().await?;
        self.settle(record.sequence);
        Ok(())
    }

    async fn clear_slot(
        self: &Rc<Self>,
        slot: usize,
        blocks: Range<u64>,
        durable: bool,
        course: &Course,
    ) -> Result<(), VolumeError> {
        self.retaining.cleared.set(true);
        let operation = |version| Operation::Clear {
            first: BlockIndex(blocks.start),
            count: blocks.end - blocks.start,
            slice: self.placement.slices()[slot],
            version,
            durable,
        };
        let (record, replicas) = self.begin(slot, operation, Bytes::new(), course).await?;
        self.replicate(&record, replicas, durable, course).await?;
        self.status_told().await?;
        self.settle(record.sequence);
        Ok(())
    }

    /// Waits for room among what is kept, then draws the version. The record is kept before anybody is sent it: a
    /// replica may have it, lose it and be asked for it again before the first answer arrives. Who has to have it is
    /// chosen in the same moment: a resync counts on every later version being sent to its replica too.
    async fn begin(
        self: &Rc<Self>,
        slot: usize,
        operation: impl FnOnce(Version) -> Operation,
        payload: Bytes,
        course: &Course,
    ) -> Result<(Rc<Kept>, Shards), VolumeError> {
        let cost = cost(payload.len() as u64);
        if !self.replay.borrow().has_room(cost) {
            Box::pin(self.room(cost)).await;
        }
        self.check()?;
        let Some(sequence) = self.window.borrow_mut().begin() else {
            self.end("the epoch has no sequence left; attach the volume again".to_string());
            return Err(VolumeError::SessionEnded { because: "no sequence left".to_string() });
        };
        course.begun.set(true);
        let operation = operation(Version::new(self.epoch, sequence));
        let record = self.replay.borrow_mut().keep(Kept { sequence, slot, operation, payload });
        Ok((record, self.replicas.borrow().required(slot).collect()))
    }

    /// There is some at once when it returns, or the session has ended.
    async fn room(self: &Rc<Self>, cost: u64) {
        let _short = CountedDown::count(&self.short_of_room);
        self.relieve();
        let budget = self.replay.borrow().budget();
        let ready = || (self.ended.borrow().is_some() || self.replay.borrow().has_room(cost)).then_some(());
        budget.released.until(ready).await;
    }

    /// Only what every required replica has is settled: a write that failed stays unresolved for good, and with it
    /// the flush point (protocol rule 1).
    fn settle(self: &Rc<Self>, sequence: u64) {
        self.window.borrow_mut().resolve(sequence);
        if self.resyncing.awaiting.get() > 0 {
            self.changed.notify();
        }
        self.relieve();
    }

    async fn replicate(
        self: &Rc<Self>,
        record: &Kept,
        replicas: Shards,
        durable: bool,
        course: &Course,
    ) -> Result<(), VolumeError> {
        let slot = record.slot;
        let send = async |position| {
            let required = || self.replicas.borrow().is_required(slot, position);
            let done = self.require(position, required, &record.operation, &record.payload, course).await?;
            if done && !durable {
                let shard = &self.shards[position];
                shard.written.set(shard.written.get() + 1);
            }
            Ok(())
        };
        match replicas[..] {
            [only] => send(only).await,
            _ => all(replicas.into_iter().map(send)).await,
        }
    }

    /// Slots with an extent in the range: few for a small range, all for a large one.
    fn slots_of(&self, blocks: &Range<u64>) -> Vec<usize> {
        if blocks.is_empty() {
            return Vec::new();
        }
        let extents = BlockIndex(blocks.start).extent().0..=BlockIndex(blocks.end - 1).extent().0;
        let slots = self.replicas.borrow().slot_count();
        if extents.end() - extents.start() >= 8 * slots as u64 {
            return (0..slots).collect();
        }
        let mut touched: Vec<_> =
            extents.map(|extent| self.placement.slot_of(torus_schema::ids::ExtentIndex(extent))).collect();
        touched.sort_unstable();
        touched.dedup();
        touched
    }
}

/// Counts down however the caller ends.
struct CountedDown<'a>(&'a Cell<usize>);

impl<'a> CountedDown<'a> {
    fn count(count: &'a Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for CountedDown<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

/// All of them to their end, then the first error: what was sent is never left half way.
pub(super) async fn all<F: Future<Output = Result<(), VolumeError>>>(
    futures: impl Iterator<Item = F>,
) -> Result<(), VolumeError> {
    let error = Cell::new(None);
    let note = |result: Result<(), VolumeError>| {
        if let Err(later) = result {
            error.set(error.take().or(Some(later)));
        }
    };
    // Results that are nothing take no memory.
    futures::future::join_all(futures.map(|future| future.map(note))).await;
    error.take().map_or(Ok(()), Err)
}
