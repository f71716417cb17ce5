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
use futures::stream::{self, StreamExt};
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::Poll;
use torus_rpc::message::{Checksums, Refusal};
use torus_rpc::runtime::{Disk, Runtime};
use torus_schema::hash::Set;
use torus_schema::ids::{BlockIndex, VolumeId};

/// Copies waited for at once, in blocks: foreground appends get in between.
const MOVE_BLOCKS_MAX: usize = 256;
/// What lies between two needed runs is read with them up to here: reading it takes less than another read.
const GAP_BLOCKS_MAX: u32 = 8;
/// Of such a read, unless a run alone is longer. With as many as are made at once, a foreground read waits behind half
/// a MiB at most.
const WINDOW_BLOCKS_MAX: u32 = 32;
const READS_AT_ONCE: usize = 4;
/// Records looked at before others have their turn: some hundred microseconds.
const RECORDS_AT_ONCE: usize = 1024;

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
        let mut wanted = Vec::new();
        let mut blocks = 0;
        for (number, record) in records.iter().enumerate() {
            if number % RECORDS_AT_ONCE == RECORDS_AT_ONCE - 1 {
                let_others_run().await;
            }
            let Record::Data(data) = record else { continue };
            for run in self.needed_runs(&pinned, data) {
                blocks += run.len();
                wanted.push((data, run));
                if blocks >= MOVE_BLOCKS_MAX {
                    self.copy(&mut wanted, &mut waiting).await?;
                    wait_for(&mut waiting).await?;
                    blocks = 0;
                }
            }
        }
        self.copy(&mut wanted, &mut waiting).await?;
        wait_for(&mut waiting).await?;
        Ok(records.into_iter().filter(|record| record.payload_blocks() == 0).collect())
    }

    /// Read first, then submitted together: the copies share their headers, which is what makes room for them all.
    async fn copy(
        self: &Rc<Self>,
        wanted: &mut Vec<(&Data, Range<usize>)>,
        waiting: &mut Vec<Waiting>,
    ) -> Result<(), Trouble> {
        let places: Vec<Range<u32>> = wanted.iter().map(|(data, run)| place_of(data, run)).collect();
        let reads = windows(&places).into_iter().map(|window| async move {
            let offset = Geometry::offset(Position(window.place.start));
            // What cannot be read together is read run by run.
            let bytes = self.disk.read(offset, window.place.len() * BLOCK).await.ok();
            (window, bytes)
        });
        let mut reads = std::pin::pin!(stream::iter(reads).buffered(READS_AT_ONCE));
        let mut copies: Vec<Option<Copy>> = Vec::new();
        // To their end, whatever comes of them: no read is left behind in the segment.
        while let Some((window, bytes)) = reads.next().await {
            copies.extend(window.runs.map(|number| {
                let ((data, run), place) = (&wanted[number], &places[number]);
                let at = (place.start - window.place.start) as usize * BLOCK;
                let bytes = bytes.as_ref().map(|bytes| &bytes[at..at + place.len() * BLOCK]);
                bytes.and_then(|bytes| self.copy_of(data, run, bytes))
            }));
        }
        for ((data, run), copy) in wanted.iter().zip(&mut copies).filter(|(_, copy)| copy.is_none()) {
            *copy = Some(self.read_run(data, run).await?);
        }
        wanted.clear();
        for Copy { data, payload, origins } in copies.into_iter().flatten() {
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
    fn needed_runs(&self, pinned: &Set<Position>, data: &Data) -> Vec<Range<usize>> {
        let state = self.state.borrow();
        let needed = |number: &usize| state.contents.needs(data, *number, pinned);
        let mut runs: Vec<Range<usize>> = Vec::new();
        for number in (0..data.checksums.len()).filter(needed) {
            match runs.last_mut() {
                Some(run) if run.end == number => run.end += 1,
                _ => runs.push(number..number + 1),
            }
        }
        runs
    }

    /// Alone, so that damage beside it is not taken for its own.
    async fn read_run(self: &Rc<Self>, data: &Data, run: &Range<usize>) -> Result<Copy, Trouble> {
        let place = place_of(data, run);
        let bytes = self.disk.read(Geometry::offset(Position(place.start)), place.len() * BLOCK).await.ok();
        if let Some(copy) = bytes.and_then(|bytes| self.copy_of(data, run, &bytes)) {
            return Ok(copy);
        }
        // Repaired first; then the segment is a victim again.
        let damaged = self.note_damage_in(data, run.clone(), FoundBy::Cleaner).await;
        Err(if damaged > 0 { Trouble::Unreadable } else { Trouble::Passing })
    }

    /// `None` if any of it is damaged. That must not be copied: at a start the copy could be taken for a torn tail and
    /// dropped, and an older version would show.
    fn copy_of(&self, data: &Data, run: &Range<usize>, bytes: &[u8]) -> Option<Copy> {
        let checksums: Checksums = data.checksums[run.clone()].into();
        let mut blocks = bytes.chunks(BLOCK).zip(&checksums);
        if !blocks.all(|(block, checksum)| crc32c::crc32c(block) == *checksum) {
            return None;
        }
        let origins = place_of(data, run).map(Position).collect();
        let first = BlockIndex(data.first.0 + run.start as u64);
        let flush_point = self.state.borrow().flush_point(data.volume).max(data.flush_point);
        let data = Data { first, checksums, flush_point, ..data.clone() };
        Some(Copy { data, payload: Bytes::copy_from_slice(bytes), origins })
    }
}

/// Where the blocks of a run lie.
fn place_of(data: &Data, run: &Range<usize>) -> Range<u32> {
    data.position.0 + run.start as u32..data.position.0 + run.end as u32
}

/// What is read at once: some runs, and what lies between them.
#[derive(Debug, PartialEq, Eq)]
struct Window {
    place: Range<u32>,
    /// By their numbers in the list.
    runs: Range<usize>,
}

/// Runs in the order in which they lie, near ones together. A longer one is a window of its own.
fn windows(places: &[Range<u32>]) -> Vec<Window> {
    let mut windows: Vec<Window> = Vec::new();
    for (number, place) in places.iter().enumerate() {
        let joins = |window: &&mut Window| {
            let follows = window.place.end <= place.start;
            follows
                && place.start - window.place.end <= GAP_BLOCKS_MAX
                && place.end - window.place.start <= WINDOW_BLOCKS_MAX
        };
        match windows.last_mut().filter(joins) {
            Some(window) => (window.place.end, window.runs.end) = (place.end, number + 1),
            None => windows.push(Window { place: place.clone(), runs: number..number + 1 }),
        }
    }
    windows
}

/// A turn for every other task that is ready.
async fn let_others_run() {
    let mut waited = false;
    poll_fn(|context| {
        if std::mem::replace(&mut waited, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await
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

#[cfg(test)]
mod tests {
    use super::*;

    fn places_and_runs(places: &[Range<u32>]) -> Vec<(Range<u32>, Range<usize>)> {
        windows(places).into_iter().map(|window| (window.place, window.runs)).collect()
    }

    #[test]
    fn near_runs_are_read_together_and_distant_ones_apart() {
        let near = 10 + GAP_BLOCKS_MAX;
        assert_eq!(places_and_runs(&[9..10, near..near + 1]), [(9..near + 1, 0..2)]);
        assert_eq!(places_and_runs(&[9..10, near + 1..near + 2]), [(9..10, 0..1), (near + 1..near + 2, 1..2)]);
        assert_eq!(places_and_runs(&[]), []);
    }

    #[test]
    fn no_window_is_longer_than_its_bound_but_a_run_stays_whole() {
        let runs: Vec<Range<u32>> = (0..100).map(|number| 2 * number..2 * number + 1).collect();
        let windows = places_and_runs(&runs);
        assert!(windows.iter().all(|(place, _)| place.len() as u32 <= WINDOW_BLOCKS_MAX), "{windows:?}");
        assert!(windows.windows(2).all(|pair| pair[0].1.end == pair[1].1.start));
        let long = 5..5 + 4 * WINDOW_BLOCKS_MAX;
        assert_eq!(places_and_runs(&[3..4, long.clone()]), [(3..4, 0..1), (long, 1..2)]);
    }

    #[test]
    fn runs_that_lie_in_another_order_are_never_joined() {
        assert_eq!(places_and_runs(&[20..22, 10..11]), [(20..22, 0..1), (10..11, 1..2)]);
    }
}
