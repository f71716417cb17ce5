//! Gives space back: takes the segment that is worth cleaning most (`Space::victim`), copies its needed blocks and notes
//! elsewhere, and lets the segment go when the copies are durable. One segment at a time, in the background class.
//!
//! Nothing is decided from what the segment holds alone: a block is needed if the index says that it lies here, or if
//! it is kept for a version above F. Whatever changes while a copy is on its way is settled when the copy is applied
//! (`Contents::moved`). Versions and checksums stay as they were.

use super::damage::FoundBy;
use super::ledger::Openings;
use super::queue::{Need, Waiting};
use super::{Shard, State};
use crate::log::record::{Data, Record};
use crate::log::recovery::footer_of;
use crate::log::{BLOCK, Geometry, Position, SegmentIndex};
use bytes::Bytes;
use std::rc::Rc;
use torus_rpc::message::{Checksums, Refusal};
use torus_rpc::runtime::{Disk, Runtime};
use torus_schema::hash::Set;
use torus_schema::ids::{BlockIndex, VolumeId};

/// Copies waited for at once, in blocks: foreground appends get in between.
const MOVE_BLOCKS_MAX: usize = 256;

enum Chore {
    /// A segment needs nothing but a sync to be free.
    Sync,
    /// Some F is known that no record says yet: saying it frees something.
    Settle,
    /// Notes may have become garbage.
    Review,
    Clean(SegmentIndex),
    /// What waits for space waits in vain.
    Refuse,
    Stop,
}

/// A needed part of a record, read and verified.
struct Copy {
    data: Data,
    payload: Bytes,
    /// Where each block lay.
    origins: Vec<Position>,
}

/// Why a segment could not be cleaned.
enum Trouble {
    /// Something in it cannot be read: it stays as it is.
    Unreadable,
    /// What could not be read together can be read block by block: the next try may do better.
    Passing,
    /// The shard fails or is full; somebody else says so.
    Refused,
}

impl From<Refusal> for Trouble {
    fn from(_: Refusal) -> Self {
        Trouble::Refused
    }
}

impl<R: Runtime> Shard<R> {
    pub(super) async fn clean_forever(self: Rc<Self>) {
        loop {
            let chore = self.changed.until(|| self.state.borrow().chore()).await;
            match chore {
                Chore::Stop => {
                    self.state.borrow_mut().cleaner_stopped = true;
                    self.changed.notify();
                    return;
                }
                Chore::Refuse => self.refuse_waiting(),
                Chore::Settle => self.settle_flush_points(),
                Chore::Review => self.state.borrow_mut().review_notes(),
                Chore::Sync => {
                    // Only fails with the shard, which ends the loop.
                    let _ = self.sync_after_now().await;
                }
                Chore::Clean(victim) => self.clean(victim).await,
            }
            self.pump();
        }
    }

    /// Says F in the log where that frees something. Nobody waits for it: it is seen when it is applied.
    fn settle_flush_points(self: &Rc<Self>) {
        let notes: Vec<Record> = {
            let volumes = &mut self.state.borrow_mut().contents.volumes;
            let worth = volumes.iter_mut().filter(|(_, volume)| volume.is_worth_settling());
            worth
                .filter_map(|(id, volume)| {
                    volume.settling = volume.flush_point;
                    volume.open(*id).map(Record::Open)
                })
                .collect()
        };
        for note in notes {
            // Refused only if the shard failed, which ends the cleaner.
            let _ = self.submit(Need::Move, note, Bytes::new(), None);
        }
    }

    fn refuse_waiting(&self) {
        let refused = {
            let state = &mut *self.state.borrow_mut();
            let free = state.contents.space.free();
            let refused = state.queue.take_waiting_for_space(free);
            for append in &refused {
                state.no_longer_in_flight(&append.record);
            }
            refused
        };
        refused.iter().for_each(|append| append.piece.answer(Err(Refusal::NoSpace)));
        self.changed.notify();
    }

    async fn clean(self: &Rc<Self>, victim: SegmentIndex) {
        // Copies in our hands are on their way too; see `ledger`.
        let under_way = {
            let state = &mut *self.state.borrow_mut();
            state.review_notes();
            // As a reader, so that the segment is not reused under our hands when all in it is overwritten meanwhile.
            state.contents.space.add_reader(victim);
            state.queue.eras.enter()
        };
        let result = self.move_all(victim).await;
        drop(under_way);
        {
            let state = &mut *self.state.borrow_mut();
            state.statistics.segments_cleaned += 1;
            match result {
                Ok(notes) => notes.iter().for_each(|note| state.contents.strike_in(victim, note)),
                Err(Trouble::Unreadable) => {
                    tracing::warn!(segment = victim.0, "a segment cannot be cleaned: not all of it can be read");
                    state.contents.space.set_stuck(victim);
                }
                Err(Trouble::Refused | Trouble::Passing) => {}
            }
            state.contents.space.remove_reader(victim);
        }
        self.changed.notify();
    }

    /// Gives the notes that stand in the segment: those that still say anything do so elsewhere too.
    async fn move_all(self: &Rc<Self>, victim: SegmentIndex) -> Result<Vec<Record>, Trouble> {
        let sequence = self.state.borrow().contents.space.sequence(victim);
        let footer = footer_of(&self.disk, self.geometry, victim, sequence).await.map_err(|_| Trouble::Unreadable)?;
        let records = footer.ok_or(Trouble::Unreadable)?.records;
        let mut waiting = Vec::new();
        self.carry_notes(victim, &records, &mut waiting)?;
        // What is superseded from now on stays counted in the victim, which is then cleaned once more.
        let pinned = self.state.borrow().contents.pinned_in(victim);
        // Read first, then submitted together: the copies share their headers, which is what makes room for them all.
        let mut copies = Vec::new();
        let mut blocks = 0;
        for record in &records {
            let Record::Data(data) = record else { continue };
            for run in self.needed_runs(&pinned, data) {
                blocks += run.len();
                copies.push(self.read_run(data, run).await?);
                if blocks >= MOVE_BLOCKS_MAX {
                    self.submit_copies(&mut copies, &mut waiting)?;
                    wait_for(&mut waiting).await?;
                    blocks = 0;
                }
            }
        }
        self.submit_copies(&mut copies, &mut waiting)?;
        wait_for(&mut waiting).await?;
        Ok(records.into_iter().filter(|record| record.payload_blocks() == 0).collect())
    }

    fn submit_copies(self: &Rc<Self>, copies: &mut Vec<Copy>, waiting: &mut Vec<Waiting>) -> Result<(), Refusal> {
        for Copy { data, payload, origins } in copies.drain(..) {
            waiting.push(self.submit(Need::Move, Record::Data(data), payload, Some(origins))?);
        }
        Ok(())
    }

    /// What is known of a volume is said once more, as it is now; other notes as they are.
    fn carry_notes(
        self: &Rc<Self>,
        victim: SegmentIndex,
        records: &[Record],
        waiting: &mut Vec<Waiting>,
    ) -> Result<(), Refusal> {
        let mut carried: Vec<&Record> = Vec::new();
        for record in records.iter().filter(|record| record.payload_blocks() == 0) {
            let note = self.state.borrow().note_to_carry(victim, record);
            let Some(note) = note else { continue };
            // The same may stand in it twice.
            if !matches!(note, Record::Clear(_)) && carried.contains(&record) {
                continue;
            }
            carried.push(record);
            waiting.push(self.submit(Need::Move, note, Bytes::new(), None)?);
        }
        Ok(())
    }

    /// Neighbouring blocks of the record that are needed, as places within it.
    fn needed_runs(&self, pinned: &Set<Position>, data: &Data) -> Vec<std::ops::Range<usize>> {
        let state = self.state.borrow();
        let needed = |number: &usize| state.contents.needs(data, *number, pinned);
        let mut runs: Vec<std::ops::Range<usize>> = Vec::new();
        for number in (0..data.checksums.len()).filter(needed) {
            match runs.last_mut() {
                Some(run) if run.end == number => run.end += 1,
                _ => runs.push(number..number + 1),
            }
        }
        runs
    }

    async fn read_run(self: &Rc<Self>, data: &Data, run: std::ops::Range<usize>) -> Result<Copy, Trouble> {
        let from = Position(data.position.0 + run.start as u32);
        let bytes = self.disk.read(Geometry::offset(from), run.len() * BLOCK).await;
        let checksums: Checksums = data.checksums[run.clone()].into();
        // A damaged block must not be copied: at a start the copy could be taken for a torn tail and dropped, and an
        // older version would show.
        let whole = |bytes: &<R::Disk as Disk>::Bytes| {
            bytes.chunks(BLOCK).zip(&checksums).all(|(block, checksum)| crc32c::crc32c(block) == *checksum)
        };
        let Some(bytes) = bytes.ok().filter(whole) else {
            // Repaired first; then the segment is a victim again.
            let damaged = self.note_damage_in(data, run, FoundBy::Cleaner).await;
            return Err(if damaged > 0 { Trouble::Unreadable } else { Trouble::Passing });
        };
        let origins = (0..run.len() as u32).map(|number| Position(from.0 + number)).collect();
        let first = BlockIndex(data.first.0 + run.start as u64);
        let flush_point = self.state.borrow().flush_point(data.volume).max(data.flush_point);
        let data = Data { first, checksums, flush_point, ..data.clone() };
        Ok(Copy { data, payload: Bytes::copy_from_slice(&bytes), origins })
    }
}

async fn wait_for(waiting: &mut Vec<Waiting>) -> Result<(), Refusal> {
    for copy in waiting.drain(..) {
        copy.done().await?;
    }
    Ok(())
}

impl State {
    /// What the cleaner should do now; `None`: wait.
    fn chore(&self) -> Option<Chore> {
        if self.failed.is_some() || self.closing {
            return Some(Chore::Stop);
        }
        let space = &self.contents.space;
        let waits = self.queue.waits_for_space(space.free());
        if !space.wants_cleaning() && !space.is_full() && !waits {
            return None;
        }
        if space.sync_would_free() {
            return Some(Chore::Sync);
        }
        if self.contents.ledger.is_due {
            return Some(Chore::Review);
        }
        if self.contents.volumes.values().any(|volume| volume.is_worth_settling()) {
            return Some(Chore::Settle);
        }
        if (space.wants_cleaning() || waits)
            && let Some(victim) = space.victim()
        {
            return Some(Chore::Clean(victim));
        }
        // A segment on its way to its footer may be the next victim, and a reader may be all that holds one back.
        let hope =
            self.seals_in_flight > 0 || self.queue.in_flight > 0 || self.queue.is_opening() || space.reader_holds_one();
        (waits && !hope).then_some(Chore::Refuse)
    }

    fn review_notes(&mut self) {
        let State { contents, queue, .. } = self;
        contents.review(&Openings { eras: &queue.eras, last: queue.next_sequence - 1 });
    }

    /// What has to be said elsewhere before the segment with this note can go.
    fn note_to_carry(&self, segment: SegmentIndex, note: &Record) -> Option<Record> {
        if !self.contents.is_entered(segment, note) {
            return None;
        }
        let id = note.volume();
        let volume = self.contents.volumes.get(&id);
        match note {
            Record::Data(_) => None,
            Record::Drop(_) | Record::Clear(_) | Record::Revoke(_) => Some(note.clone()),
            Record::Instances(instances) => volume?.still_of(instances).map(Record::Instances),
            Record::Open(_) => volume?.open(id).map(Record::Open),
            Record::Retain(_) => volume?.retain(id).map(Record::Retain),
        }
    }

    pub(super) fn flush_point(&self, volume: VolumeId) -> torus_schema::ids::Version {
        self.contents.volumes.get(&volume).map(|volume| volume.flush_point).unwrap_or_default()
    }
}
