//! What waits to be appended, and the batch that is made of it: pure, no I/O.
//!
//! Concurrent appends gather here while batches are in flight; the next batch takes what fits. A record of data is cut
//! where the segment ends, so that no segment is left with a hole at its end.

mod piece;

pub use piece::{Piece, Waiting};

use super::course::Span;
use crate::log::batch::{Heading, header_blocks};
use crate::log::footer::bytes_in_footer;
use crate::log::record::{Data, Record};
use crate::log::recovery::footer_room;
use crate::log::space::{CLEANER_SEGMENTS, NOTE_SEGMENTS, SyncNumber};
use crate::log::{BatchNumber, Geometry, Position, SegmentIdentity};
use bytes::Bytes;
use piece::Spare;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, VecDeque};
use std::rc::Rc;
use torus_schema::hash::Set;
use torus_schema::ids::{BlockIndex, VolumeId};
use torus_schema::limits::{BLOCK_BYTES, PAYLOAD_BYTES_MAX};

/// Payload of one batch at most, in blocks: two frames of the largest size, so that a batch does not hold up the next
/// for longer than the disk takes anyway.
const BATCH_BLOCKS_MAX: u32 = (2 * PAYLOAD_BYTES_MAX / BLOCK_BYTES) as u32;

/// What an append may use the last free segments for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// Instances, opens, clears, drops: small, and they free space.
    Note,
    /// The cleaner's copies.
    Move,
    Data,
}

impl Need {
    /// Admitted while more segments than this are free.
    fn floor(self) -> Option<u32> {
        match self {
            Need::Note => Some(CLEANER_SEGMENTS),
            Need::Move => None,
            Need::Data => Some(NOTE_SEGMENTS),
        }
    }

    fn is_admitted(self, free: u32) -> bool {
        self.floor().is_none_or(|floor| free > floor)
    }
}

/// Tells when all that was under way at some moment has come to its end.
#[derive(Default)]
pub struct Eras {
    now: Cell<u64>,
    /// Each era of which something may be under way, and how much; in order, and of the first it is some.
    open: RefCell<VecDeque<(u64, usize)>>,
}

impl Eras {
    /// What begins from now on belongs to a later era than the one that comes back.
    pub fn begin(&self) -> u64 {
        let era = self.now.get();
        self.now.set(era + 1);
        era
    }

    /// Nothing of that era or an earlier one is under way.
    pub fn passed(&self, era: u64) -> bool {
        self.open.borrow().front().is_none_or(|(open, _)| *open > era)
    }

    pub fn enter(self: &Rc<Self>) -> UnderWay {
        let era = self.now.get();
        let mut open = self.open.borrow_mut();
        match open.back_mut().filter(|(last, _)| *last == era) {
            Some((_, count)) => *count += 1,
            None => open.push_back((era, 1)),
        }
        UnderWay { eras: self.clone(), era }
    }
}

/// Something of an era, until it is dropped.
pub struct UnderWay {
    eras: Rc<Eras>,
    era: u64,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut open = self.eras.open.borrow_mut();
        let at = open.binary_search_by_key(&self.era, |(era, _)| *era).expect("it was counted when it began");
        open[at].1 -= 1;
        while open.front().is_some_and(|(_, count)| *count == 0) {
            open.pop_front();
        }
    }
}

pub struct Append {
    pub record: Record,
    pub payload: Bytes,
    /// Of a copy: where each block lay.
    pub origins: Option<Vec<Position>>,
    /// It is answered when it is durable.
    pub durable: bool,
    pub piece: Piece,
}

impl Append {
    /// Cuts off the first `count` blocks of data.
    fn split(&mut self, count: usize) -> Append {
        let Record::Data(data) = &mut self.record else { unreachable!("only data is cut") };
        let rest = data.checksums[count..].into();
        let mut checksums = std::mem::replace(&mut data.checksums, rest);
        checksums.truncate(count);
        let first = data.first;
        data.first = BlockIndex(first.0 + count as u64);
        let head = Data { first, checksums, ..data.clone() };
        let origins = self.origins.as_mut().map(|origins| {
            let rest = origins.split_off(count);
            std::mem::replace(origins, rest)
        });
        let payload = self.payload.split_to(count * BLOCK_BYTES as usize);
        Append { record: Record::Data(head), payload, origins, durable: self.durable, piece: self.piece.another() }
    }
}

/// One write to the log, on its way.
pub struct Batch {
    pub heading: Heading,
    pub appends: Vec<Append>,
    pub bytes: usize,
    /// It is to be durable when it is written: somebody waits for that, and all before it are durable, so that no sync
    /// is needed. Not behind one that a crash may take: what is durable is told as one number, and a start would count
    /// that one among what was durable and is lost.
    pub durable: bool,
}

/// A segment that is being filled, or waits for its footer.
pub struct Filling {
    pub identity: SegmentIdentity,
    pub first_batch: BatchNumber,
    pub end_batch: BatchNumber,
    /// Within the segment.
    next_block: u32,
    /// Of volumes, data and notes in the footer.
    footer_bytes: usize,
    volumes: Set<VolumeId>,
    /// Batches that are not applied yet; the footer waits for them.
    pub in_flight: u32,
    /// For the footer.
    pub records: Vec<Record>,
}

impl Filling {
    pub fn new(identity: SegmentIdentity, first_batch: BatchNumber) -> Self {
        Self {
            identity,
            first_batch,
            end_batch: first_batch,
            next_block: 1,
            footer_bytes: 0,
            volumes: Set::default(),
            in_flight: 0,
            records: Vec::new(),
        }
    }

    /// Room for a batch of these records and so many blocks, and for the footer after it.
    fn fits(&self, geometry: Geometry, record_bytes: usize, payload: u32) -> bool {
        // No record takes more room in a footer than in a header.
        let footer = footer_room(self.footer_bytes + record_bytes);
        self.next_block + header_blocks(record_bytes) + payload + footer <= geometry.blocks
    }
}

/// A segment whose opening is being made.
pub struct Ahead {
    pub identity: SegmentIdentity,
    /// The sync that makes the opening durable; `None` while it is being written.
    pub needs: Option<SyncNumber>,
}

/// A segment that a start might find without a footer.
pub struct Unsealed {
    pub sequence: u64,
    pub first_batch: BatchNumber,
    /// The sync that makes the footer durable; `None` until it is written.
    pub needs: Option<SyncNumber>,
}

pub enum Next {
    /// Nothing waits that may be written now.
    Nothing,
    /// The open segment is full, or there is none.
    NeedSegment,
    Batch(Batch),
}

#[derive(Default)]
pub struct Queue {
    notes: VecDeque<Append>,
    moves: VecDeque<Append>,
    data: VecDeque<Append>,
    /// Lists of batches that are applied, to be used again; as many as there were in flight.
    spare: Vec<Vec<Append>>,
    pub head: Option<Filling>,
    pub sealing: Vec<Filling>,
    /// The segment to go on with; its opening is made while the one before it fills.
    pub ahead: Option<Ahead>,
    /// Something waits for a segment to be written to.
    pub wants_segment: bool,
    /// Whose footers are not durable: by sequence, without a gap.
    pub unsealed: VecDeque<Unsealed>,
    pub in_flight: usize,
    pub next_batch: BatchNumber,
    pub next_sequence: u64,
    /// Applied out of order, above `applied`.
    applied_early: BTreeSet<BatchNumber>,
    /// Every batch up to it is applied.
    pub applied: BatchNumber,
    pub durable: BatchNumber,
    pub eras: Rc<Eras>,
    spare_groups: Rc<Spare>,
}

impl Queue {
    pub fn new(next_batch: BatchNumber, next_sequence: u64) -> Self {
        let before = BatchNumber(next_batch.0 - 1);
        // All that is on the disk at a start was synced or decided upon.
        Self { next_batch, next_sequence, applied: before, durable: before, ..Self::default() }
    }

    pub fn push(&mut self, need: Need, record: Record, payload: Bytes, origins: Option<Vec<Position>>) -> Waiting {
        let (piece, waiting) = Piece::new(&self.eras, &self.spare_groups);
        self.class(need).push_back(Append { record, payload, origins, durable: false, piece });
        waiting
    }

    /// Data whose writer waits until it is durable.
    pub fn push_durable(&mut self, record: Record, payload: Bytes) -> Waiting {
        let waiting = self.push(Need::Data, record, payload, None);
        self.data.back_mut().expect("it was just pushed").durable = true;
        waiting
    }

    /// Nothing that is applied could be lost.
    pub fn is_all_durable(&self) -> bool {
        self.durable >= self.applied && self.applied_early.is_empty()
    }

    fn class(&mut self, need: Need) -> &mut VecDeque<Append> {
        match need {
            Need::Note => &mut self.notes,
            Need::Move => &mut self.moves,
            Need::Data => &mut self.data,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.notes.is_empty() && self.moves.is_empty() && self.data.is_empty()
    }

    /// Data waits for space.
    pub fn waits_for_space(&self, free: u32) -> bool {
        (!self.data.is_empty() && !Need::Data.is_admitted(free))
            || (!self.notes.is_empty() && !Need::Note.is_admitted(free))
    }

    /// Takes what is not admitted out of the queue, because no space will come.
    pub fn take_waiting_for_space(&mut self, free: u32) -> Vec<Append> {
        let mut taken = Vec::new();
        for need in [Need::Data, Need::Note] {
            if !need.is_admitted(free) {
                taken.extend(self.class(need).drain(..));
            }
        }
        taken
    }

    pub fn take_all(&mut self) -> Vec<Append> {
        self.notes.drain(..).chain(self.moves.drain(..)).chain(self.data.drain(..)).collect()
    }

    /// The next batch of what is admitted with so many segments free.
    pub fn next(&mut self, geometry: Geometry, free: u32) -> Next {
        let needs = [Need::Note, Need::Move, Need::Data];
        let admitted = needs.map(|need| need.is_admitted(free) && !self.class(need).is_empty());
        if !admitted.contains(&true) {
            return Next::Nothing;
        }
        let Some(mut head) = self.head.take() else { return Next::NeedSegment };
        let mut batch = self.spare.pop().unwrap_or_default();
        let (mut record_bytes, mut payload) = (0, 0);
        for (need, _) in needs.into_iter().zip(admitted).filter(|(_, admitted)| *admitted) {
            self.gather(need, geometry, &head, &mut batch, (&mut record_bytes, &mut payload));
        }
        if batch.is_empty() {
            self.head = Some(head);
            self.spare.push(batch);
            return Next::NeedSegment;
        }
        let made = self.make_batch(geometry, &mut head, batch, (record_bytes, payload));
        self.head = Some(head);
        Next::Batch(made)
    }

    fn gather(
        &mut self,
        need: Need,
        geometry: Geometry,
        head: &Filling,
        batch: &mut Vec<Append>,
        (record_bytes, payload): (&mut usize, &mut u32),
    ) {
        let class = self.class(need);
        while let Some(append) = class.front_mut() {
            let blocks = append.record.payload_blocks();
            let bytes_without = append.record.bytes() - 4 * blocks as usize;
            let fits = |count: u32| {
                let bytes = *record_bytes + bytes_without + 4 * count as usize;
                (*payload + count <= BATCH_BLOCKS_MAX || *payload == 0) && head.fits(geometry, bytes, *payload + count)
            };
            // Without payload it fits or not; of data at least one block has to.
            let least = blocks.min(1);
            if !fits(least) {
                return;
            }
            let (mut low, mut high) = (least, blocks);
            while low < high {
                let middle = (low + high).div_ceil(2);
                if fits(middle) { low = middle } else { high = middle - 1 }
            }
            let taken =
                if low == blocks { class.pop_front().expect("it is at the front") } else { append.split(low as usize) };
            *record_bytes += taken.record.bytes();
            *payload += low;
            batch.push(taken);
        }
    }

    fn make_batch(
        &mut self,
        geometry: Geometry,
        head: &mut Filling,
        mut appends: Vec<Append>,
        (record_bytes, payload): (usize, u32),
    ) -> Batch {
        let position = Position(geometry.first(head.identity.segment).0 + head.next_block);
        let header = header_blocks(record_bytes);
        let mut at = position.0 + header;
        for append in &mut appends {
            if let Record::Data(data) = &mut append.record {
                data.position = Position(at);
                at += data.checksums.len() as u32;
            }
        }
        let number = self.next_batch;
        self.next_batch = BatchNumber(number.0 + 1);
        head.next_block += header + payload;
        for Append { record, .. } in &appends {
            let is_first = record.payload_blocks() > 0 && head.volumes.insert(record.volume());
            head.footer_bytes += bytes_in_footer(record, is_first);
            head.records.push(record.clone());
        }
        head.end_batch = self.next_batch;
        head.in_flight += 1;
        let is_first_in_doubt = self.in_flight == 0 && self.durable.0 + 1 == number.0;
        let is_durable = is_first_in_doubt && appends.iter().any(|append| append.durable);
        self.in_flight += 1;
        let (identity, durable, first_batch) = (head.identity, self.durable, head.first_batch);
        let heading = Heading { identity, number, durable, first_batch, position };
        Batch { heading, appends, bytes: ((header + payload) as u64 * BLOCK_BYTES) as usize, durable: is_durable }
    }

    /// The batch is applied; gives its segment if that is now ready for its footer.
    pub fn batch_done(&mut self, batch: Batch) -> Option<Filling> {
        let Batch { heading: Heading { identity, number, .. }, mut appends, durable, .. } = batch;
        appends.clear();
        self.spare.push(appends);
        self.in_flight -= 1;
        if durable {
            assert_eq!(self.durable.0 + 1, number.0, "all before it were durable, and nothing behind it can be yet");
            self.durable = number;
        }
        if number.0 == self.applied.0 + 1 {
            self.applied = number;
        } else {
            self.applied_early.insert(number);
        }
        while self.applied_early.remove(&BatchNumber(self.applied.0 + 1)) {
            self.applied.0 += 1;
        }
        if let Some(head) = self.head.as_mut().filter(|head| head.identity == identity) {
            head.in_flight -= 1;
            return None;
        }
        let filling = self.sealing.iter_mut().find(|filling| filling.identity == identity);
        filling.expect("a segment stays until its batches are done").in_flight -= 1;
        self.take_ready()
    }

    /// Batches wait for a segment that is on its way.
    pub fn is_opening(&self) -> bool {
        self.wants_segment && self.ahead.is_some()
    }

    /// The open segment is half full, or there is none, and nothing is made ready yet to follow it.
    pub fn wants_ahead(&self, geometry: Geometry) -> bool {
        let soon = self.head.as_ref().map_or(self.wants_segment, |head| 2 * head.next_block >= geometry.blocks);
        self.ahead.is_none() && soon
    }

    /// The segment that is ready, if one is: batches go there from now on.
    pub fn begin_ahead(&mut self, completed: SyncNumber) -> Option<SegmentIdentity> {
        let ready = |ahead: &&mut Ahead| ahead.needs.is_some_and(|needs| needs <= completed);
        let identity = self.ahead.as_mut().filter(ready)?.identity;
        self.ahead = None;
        self.wants_segment = false;
        let first_batch = self.next_batch;
        self.unsealed.push_back(Unsealed { sequence: identity.sequence, first_batch, needs: None });
        self.head = Some(Filling::new(identity, first_batch));
        Some(identity)
    }

    /// It gets a footer that says it holds nothing.
    pub fn retire_ahead(&mut self) -> Option<SegmentIdentity> {
        let identity = self.ahead.take()?.identity;
        self.sealing.push(Filling::new(identity, self.next_batch));
        Some(identity)
    }

    /// Its footer is written.
    pub fn footer_written(&mut self, identity: SegmentIdentity, needs: SyncNumber) {
        let unsealed = self.unsealed.iter_mut().find(|unsealed| unsealed.sequence == identity.sequence);
        unsealed.into_iter().for_each(|unsealed| unsealed.needs = Some(needs));
    }

    /// In order: where one without a footer ends is known by where the next begins.
    pub fn forget_sealed(&mut self, completed: SyncNumber) {
        while self.unsealed.front().is_some_and(|first| first.needs.is_some_and(|needs| needs <= completed)) {
            self.unsealed.pop_front();
        }
    }

    /// Nothing more is appended to the open segment; gives it if it is ready for its footer.
    pub fn retire_head(&mut self) -> Option<SegmentIdentity> {
        let head = self.head.take()?;
        let identity = head.identity;
        self.sealing.push(head);
        Some(identity)
    }

    pub fn take_ready(&mut self) -> Option<Filling> {
        let at = self.sealing.iter().position(|filling| filling.in_flight == 0)?;
        Some(self.sealing.swap_remove(at))
    }
}

/// One sync at a time, shared by all who asked before it started.
#[derive(Default)]
pub struct Syncs {
    pub started: SyncNumber,
    pub completed: SyncNumber,
    pub wanted: SyncNumber,
    pub running: bool,
    /// The last one that was completed.
    pub last: Span,
}

#[cfg(test)]
mod tests;
