//! What a replica that restarts may have lost: every record above the flush point, kept by the writer until it is
//! flushed (protocol rule 9). Payloads are shared with the requests they came with, never copied. Pure.
//!
//! Bounded twice: by volume and by process. At half of either bound the volume flushes by itself (for the process: the
//! one with the oldest record that can be flushed); at the whole, writes wait until there is room.

use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::{Rc, Weak};
use torus_rpc::message::Operation;
use torus_rpc::notify::Notify;
use torus_schema::limits::{
    BLOCK_BYTES, PAYLOAD_BYTES_MAX, REPLAY_BYTES_PER_PROCESS_MAX, REPLAY_BYTES_PER_VOLUME_MAX, REPLAY_FLUSHES_MAX,
};

/// Records that were released are used again: as many as volumes at half of their bound release at once, with 4 KiB each.
const SPARE_MAX: usize = 8192;

/// Of a record without payload: what the operation, its places in the buffer and the allocator take.
const RECORD_BYTES: u64 = 256;

/// One write or clear, as it is sent to every replica of its slot.
#[derive(Debug)]
pub struct Kept {
    pub sequence: u64,
    pub slot: usize,
    pub operation: Operation,
    pub payload: Bytes,
}

/// Memory of a record with so many bytes of payload, its checksums included.
pub fn cost(payload_bytes: u64) -> u64 {
    RECORD_BYTES + payload_bytes + payload_bytes / BLOCK_BYTES * 4
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplayLimits {
    pub volume_bytes: u64,
    pub process_bytes: u64,
}

impl Default for ReplayLimits {
    fn default() -> Self {
        Self { volume_bytes: REPLAY_BYTES_PER_VOLUME_MAX, process_bytes: REPLAY_BYTES_PER_PROCESS_MAX }
    }
}

/// A volume that can be told to flush.
pub trait Flushable {
    /// When its oldest record was made that a flush would release, as `Budget` counts; `None`: a flush would release
    /// nothing, or one is under way.
    fn oldest_releasable(&self) -> Option<u64>;
    fn flush_by_itself(self: Rc<Self>);
}

/// What all volumes of a process share.
pub struct Budget {
    limits: ReplayLimits,
    used: Cell<u64>,
    /// Records made so far: their order over all volumes.
    made: Cell<u64>,
    volumes: RefCell<BTreeMap<u64, Weak<dyn Flushable>>>,
    next_volume: Cell<u64>,
    /// Flushes that volumes make by themselves.
    pub flushing: Cell<usize>,
    /// Something was released.
    pub released: Notify,
    spare: RefCell<Vec<Rc<Kept>>>,
}

impl Budget {
    pub fn new(limits: ReplayLimits) -> Rc<Self> {
        Rc::new(Self {
            limits,
            used: Cell::new(0),
            made: Cell::new(0),
            volumes: RefCell::default(),
            next_volume: Cell::new(0),
            flushing: Cell::new(0),
            released: Notify::default(),
            spare: RefCell::default(),
        })
    }

    fn record(&self, new: Kept) -> Rc<Kept> {
        let mut spare = self.spare.borrow_mut().pop();
        match spare.as_mut().and_then(Rc::get_mut) {
            Some(record) => *record = new,
            None => return Rc::new(new),
        }
        spare.expect("it was just filled")
    }

    /// To be used again, if nobody else has it. What it held goes now.
    fn reuse(&self, mut record: Rc<Kept>) {
        if let Some(kept) = Rc::get_mut(&mut record) {
            (kept.operation, kept.payload) = (Operation::Flush, Bytes::new());
            let mut spare = self.spare.borrow_mut();
            if spare.len() < SPARE_MAX {
                spare.push(record);
            }
        }
    }

    /// If the process keeps too much, the volume with the oldest record flushes.
    pub fn relieve(&self) {
        if self.used.get() * 2 < self.limits.process_bytes || self.flushing.get() >= REPLAY_FLUSHES_MAX {
            return;
        }
        let volumes: Vec<_> = self.volumes.borrow().values().filter_map(Weak::upgrade).collect();
        let releasable = volumes.into_iter().filter_map(|volume| Some((volume.oldest_releasable()?, volume)));
        if let Some((_, volume)) = releasable.min_by_key(|(oldest, _)| *oldest) {
            volume.flush_by_itself();
        }
    }
}

/// The records of one volume above its flush point, in the order of their sequences.
pub struct ReplayBuffer {
    budget: Rc<Budget>,
    volume: u64,
    records: VecDeque<(u64, Rc<Kept>)>,
    bytes: u64,
}

impl ReplayBuffer {
    pub fn new(budget: Rc<Budget>, flushable: Weak<dyn Flushable>) -> Self {
        let volume = budget.next_volume.replace(budget.next_volume.get() + 1);
        budget.volumes.borrow_mut().insert(volume, flushable);
        Self { budget, volume, records: VecDeque::new(), bytes: 0 }
    }

    /// What is kept, in memory.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn budget(&self) -> Rc<Budget> {
        self.budget.clone()
    }

    /// Whether a record that costs so much may be made now.
    pub fn has_room(&self, cost: u64) -> bool {
        let (bytes, limits) = (self.bytes + cost, self.budget.limits);
        let in_volume = self.records.is_empty() || bytes <= limits.volume_bytes;
        // However much the others keep: they may be stuck for long.
        let frame = self.records.is_empty() || bytes <= PAYLOAD_BYTES_MAX.min(limits.volume_bytes);
        in_volume && (frame || self.budget.used.get() + cost <= limits.process_bytes)
    }

    pub fn is_half_full(&self) -> bool {
        self.bytes * 2 >= self.budget.limits.volume_bytes
    }

    /// It comes back for who sends it.
    pub fn keep(&mut self, record: Kept) -> Rc<Kept> {
        assert!(self.records.back().is_none_or(|(_, last)| last.sequence < record.sequence));
        let made = self.budget.made.get();
        self.budget.made.set(made + 1);
        self.count(cost(record.payload.len() as u64) as i64);
        let record = self.budget.record(record);
        self.records.push_back((made, record.clone()));
        record
    }

    /// Everything up to and including `sequence` is durable on all replicas that have to have it.
    pub fn release_through(&mut self, sequence: u64) {
        while let Some((_, record)) = self.records.front()
            && record.sequence <= sequence
        {
            self.count(-(cost(record.payload.len() as u64) as i64));
            let released = self.records.pop_front();
            released.into_iter().for_each(|(_, record)| self.budget.reuse(record));
        }
        self.budget.released.notify();
    }

    /// When the oldest record was made, if a flush up to `sequence` would release it.
    pub fn oldest_releasable(&self, sequence: u64) -> Option<u64> {
        self.records.front().filter(|(_, record)| record.sequence <= sequence).map(|(made, _)| *made)
    }

    /// What a replica of these slots has to have, oldest first.
    pub fn of_slots(&self, holds: impl Fn(usize) -> bool) -> Vec<Rc<Kept>> {
        self.records.iter().filter(|(_, record)| holds(record.slot)).map(|(_, record)| record.clone()).collect()
    }

    fn count(&mut self, bytes: i64) {
        self.bytes = self.bytes.checked_add_signed(bytes).expect("what is released was counted");
        let used = self.budget.used.get().checked_add_signed(bytes);
        self.budget.used.set(used.expect("what is released was counted"));
    }
}

impl Drop for ReplayBuffer {
    fn drop(&mut self) {
        self.release_through(u64::MAX);
        self.budget.volumes.borrow_mut().remove(&self.volume);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(sequence: u64, slot: usize, bytes: usize) -> Kept {
        Kept { sequence, slot, operation: Operation::Flush, payload: Bytes::from(vec![0; bytes]) }
    }

    /// Remembers what it was told.
    #[derive(Default)]
    struct Volume {
        oldest: Cell<Option<u64>>,
        told: Cell<usize>,
    }

    impl Flushable for Volume {
        fn oldest_releasable(&self) -> Option<u64> {
            self.oldest.get()
        }
        fn flush_by_itself(self: Rc<Self>) {
            self.told.set(self.told.get() + 1);
        }
    }

    fn volume(budget: &Rc<Budget>) -> (Rc<Volume>, ReplayBuffer) {
        let volume = Rc::new(Volume::default());
        let weak: Weak<Volume> = Rc::downgrade(&volume);
        (volume, ReplayBuffer::new(budget.clone(), weak))
    }

    fn budget(volume_blocks: u64, process_blocks: u64) -> Rc<Budget> {
        let (volume_bytes, process_bytes) = (volume_blocks * cost(BLOCK_BYTES), process_blocks * cost(BLOCK_BYTES));
        Budget::new(ReplayLimits { volume_bytes, process_bytes })
    }

    #[test]
    fn what_is_above_the_flush_point_is_kept_and_nothing_else() {
        let (_volume, mut buffer) = volume(&budget(100, 100));
        (1..=5).for_each(|sequence| drop(buffer.keep(record(sequence, sequence as usize % 2, 4096))));
        buffer.release_through(2);
        let kept: Vec<_> = buffer.of_slots(|_| true).iter().map(|record| record.sequence).collect();
        assert_eq!(kept, [3, 4, 5]);
        let odd: Vec<_> = buffer.of_slots(|slot| slot == 1).iter().map(|record| record.sequence).collect();
        assert_eq!(odd, [3, 5]);
    }

    #[test]
    fn a_payload_is_shared_not_copied() {
        let (_volume, mut buffer) = volume(&budget(100, 100));
        let payload = Bytes::from(vec![7; 4096]);
        let operation = Operation::Flush;
        buffer.keep(Kept { sequence: 1, slot: 0, operation, payload: payload.clone() });
        assert_eq!(buffer.of_slots(|_| true)[0].payload.as_ptr(), payload.as_ptr());
    }

    #[test]
    fn what_is_released_is_used_again_unless_somebody_still_sends_it() {
        let (_volume, mut buffer) = volume(&budget(100, 100));
        let sent = buffer.keep(record(1, 0, 4096));
        let first = Rc::as_ptr(&buffer.keep(record(2, 0, 4096)));
        buffer.release_through(2);
        assert_eq!((sent.sequence, sent.payload.len()), (1, 4096), "it is still sent");
        let next = buffer.keep(record(3, 1, 8192));
        assert_eq!(Rc::as_ptr(&next), first);
        assert_eq!((next.sequence, next.slot, next.payload.len()), (3, 1, 8192));
        assert_ne!(Rc::as_ptr(&buffer.keep(record(4, 0, 0))), Rc::as_ptr(&sent));
    }

    #[test]
    fn a_volume_at_its_bound_has_no_room_until_something_is_released() {
        let (_volume, mut buffer) = volume(&budget(4, 100));
        for sequence in 1..=4 {
            assert!(buffer.has_room(cost(4096)));
            buffer.keep(record(sequence, 0, 4096));
        }
        assert!(buffer.is_half_full() && !buffer.has_room(cost(4096)));
        buffer.release_through(1);
        assert!(buffer.has_room(cost(4096)));
    }

    #[test]
    fn a_record_larger_than_the_bound_is_kept_alone() {
        let (_volume, mut buffer) = volume(&budget(4, 4));
        assert!(buffer.has_room(cost(1 << 20)));
        buffer.keep(record(1, 0, 1 << 20));
        assert!(!buffer.has_room(cost(0)));
    }

    #[test]
    fn the_process_is_bounded_and_leaves_every_volume_a_frame() {
        let budget = budget(2000, 3000);
        let ((_a, mut first), (_b, mut second)) = (volume(&budget), volume(&budget));
        (1..=2000).for_each(|sequence| drop(first.keep(record(sequence, 0, 4096))));
        assert!(!first.has_room(cost(4096)));
        let mut kept = 0;
        while second.has_room(cost(4096)) {
            kept += 1;
            second.keep(record(kept, 0, 4096));
        }
        assert_eq!(kept, 1000);
        first.release_through(1);
        assert!(second.has_room(cost(4096)));
        drop(second);
        let (_c, mut third) = volume(&budget);
        (1..=1001).for_each(|sequence| drop(third.keep(record(sequence, 0, 4096))));
        let (_d, mut last) = volume(&budget);
        (1..=200).for_each(|sequence| drop(last.keep(record(sequence, 0, 4096))));
        assert!(last.has_room(cost(4096)), "less than a frame, though the process is full");
    }

    #[test]
    fn the_volume_with_the_oldest_record_that_can_be_flushed_flushes_first() {
        let budget = budget(100, 8);
        let ((first, mut a), (second, mut b), (stuck, mut c)) = (volume(&budget), volume(&budget), volume(&budget));
        first.oldest.set(Some(7));
        second.oldest.set(Some(3));
        a.keep(record(1, 0, 4096));
        budget.relieve();
        assert_eq!(second.told.get(), 0, "below half");
        b.keep(record(1, 0, 4096));
        c.keep(record(1, 0, 4096));
        c.keep(record(2, 0, 4096));
        budget.relieve();
        assert_eq!((first.told.get(), second.told.get(), stuck.told.get()), (0, 1, 0));
        budget.flushing.set(REPLAY_FLUSHES_MAX);
        budget.relieve();
        assert_eq!(second.told.get(), 1, "enough of them flush");
    }

    proptest! {
        #[test]
        fn every_byte_counted_is_given_back(steps in prop::collection::vec((0u64..3, 0usize..20_000), 0..60)) {
            let budget = budget(1000, 1000);
            let (_volume, mut buffer) = volume(&budget);
            let mut next = 1;
            for (release, bytes) in steps {
                buffer.keep(record(next, 0, bytes));
                next += 1;
                buffer.release_through(next.saturating_sub(release * 5));
                let kept: u64 = buffer.of_slots(|_| true).iter().map(|record| cost(record.payload.len() as u64)).sum();
                prop_assert_eq!((buffer.bytes, budget.used.get()), (kept, kept));
            }
            drop(buffer);
            prop_assert_eq!(budget.used.get(), 0);
            prop_assert!(budget.volumes.borrow().is_empty());
        }
    }
}
