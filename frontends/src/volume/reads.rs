//! Reads: from one in-sync replica while nobody else can own the volume, else from as many as prove that nobody does
//! (protocol rule 7); from another replica when one fails.

use super::course::Course;
use super::plan::{Piece, blocks_touched, only_piece, pieces};
use super::replicas::{ShardPosition, Shards};
use super::session::{Failure, Session, Verdict, verdict};
use super::together::Together;
use crate::device::{Piece as DevicePiece, Pieces, VolumeError};
use bytes::Bytes;
use futures::future::{Either, select};
use smallvec::SmallVec;
use std::ops::Range;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::message::{Answer, Operation, Refusal, Run};
use torus_rpc::runtime::{Clock, Instant, Runtime};
use torus_schema::ids::Incarnation;
use torus_schema::limits::{BLOCK_BYTES, LOCAL_READ_ADVANTAGE, READS_TOGETHER_SLOWNESS_MAX};

const RETRY_AFTER: Duration = Duration::from_millis(100);

/// What was found, in order; mostly it is of one kind.
pub(super) type Found<T> = SmallVec<[T; 1]>;

/// What a reader wants to know of a piece.
pub(super) trait Look {
    type Found;
    /// How long it takes says how long a read takes.
    const TELLS_SERVICE_TIME: bool;
    fn operation(piece: Piece) -> Operation;
    /// The answer, if it is one about the whole piece.
    fn take(piece: Piece, answer: Answer, payload: Bytes) -> Result<Found<Self::Found>, Failure>;
}

/// Its content.
struct Data;

impl Look for Data {
    type Found = DevicePiece;
    const TELLS_SERVICE_TIME: bool = true;

    fn operation(piece: Piece) -> Operation {
        Operation::Read { first: piece.first, count: piece.count }
    }

    fn take(piece: Piece, answer: Answer, payload: Bytes) -> Result<Pieces, Failure> {
        match answer {
            Answer::Read { runs, checksums } => assemble(piece, &runs, &checksums, payload),
            other => Err(malformed(format!("a read was answered by {other:?}"))),
        }
    }
}

impl<R: Runtime> Session<R> {
    pub async fn read(self: &Rc<Self>, offset: u64, length: u64, course: &Course) -> Result<Pieces, VolumeError> {
        self.check_range(offset, length)?;
        let touched = blocks_touched(offset, length);
        self.locks.passed(touched.clone()).await;
        let found = match only_piece(&touched) {
            Some(piece) => self.look::<Data>(piece, course).await?,
            None => Box::pin(self.read_pieces(touched.clone(), course)).await?,
        };
        // What was found may be of a write that began meanwhile. Until that is answered no flush covers it, and what was read
        // before a flush has to outlive it.
        self.locks.passed(touched.clone()).await;
        self.check()?;
        let skip = offset - touched.start * BLOCK_BYTES;
        Ok(trim(found, skip, length))
    }

    async fn read_pieces(self: &Rc<Self>, blocks: Range<u64>, course: &Course) -> Result<Pieces, VolumeError> {
        let reads = pieces(blocks).map(|piece| self.look::<Data>(piece, course));
        let mut found = Pieces::new();
        for read in futures::future::join_all(reads).await {
            found.extend(read?);
        }
        Ok(found)
    }

    /// For a writer, which holds the lock of these blocks.
    pub(super) async fn read_into(
        self: &Rc<Self>,
        offset: u64,
        into: &mut [u8],
        course: &Course,
    ) -> Result<(), VolumeError> {
        let mut at = 0;
        for piece in pieces(blocks_touched(offset, into.len() as u64)) {
            for part in self.look::<Data>(piece, course).await? {
                match part {
                    DevicePiece::Data(data) => {
                        into[at..at + data.len()].copy_from_slice(&data);
                        at += data.len();
                    }
                    DevicePiece::Zeros(length) => {
                        into[at..at + length as usize].fill(0);
                        at += length as usize;
                    }
                }
            }
        }
        assert_eq!(at, into.len());
        Ok(())
    }

    /// At one piece, as a reader: what is found is no older than what was acknowledged before.
    pub(super) async fn look<L: Look>(
        self: &Rc<Self>,
        piece: Piece,
        course: &Course,
    ) -> Result<Found<L::Found>, VolumeError> {
        let slot = self.placement.slot_of(piece.first.extent());
        // Replicas where the range is damaged: what they lack another one has.
        let mut damaged = Vec::new();
        loop {
            self.check()?;
            let now = self.runtime.clock().now();
            let (candidates, confirmations) = self.candidates(slot, &damaged, (piece.bytes() as u64, now));
            let found = match confirmations == 1 && !self.shards[candidates[0]].recovering.get() {
                true => self.read_hedged::<L>(&candidates, (piece, course), now, &mut damaged).await,
                // Apart, since every read would be as large as the rarest of its parts.
                false => {
                    let chosen = &candidates[..confirmations];
                    Box::pin(self.read_confirmed::<L>(slot, chosen, (piece, course), &mut damaged)).await?
                }
            };
            if let Some(found) = found {
                return Ok(found);
            }
        }
    }

    /// From all of these, or none if they have to be waited for.
    async fn read_confirmed<L: Look>(
        self: &Rc<Self>,
        slot: usize,
        chosen: &[ShardPosition],
        (piece, course): (Piece, &Course),
        damaged: &mut Vec<ShardPosition>,
    ) -> Result<Option<Found<L::Found>>, VolumeError> {
        if chosen.is_empty() && !damaged.is_empty() {
            let because = format!("all {} in-sync replicas are damaged there", damaged.len());
            return Err(VolumeError::Unreadable { block: piece.first.0, because });
        }
        if chosen.is_empty() {
            // None is in sync just now: what becomes of one is being decided.
            self.runtime.clock().sleep(RETRY_AFTER).await;
            return Ok(None);
        }
        if chosen.iter().any(|shard| self.shards[*shard].recovering.get()) {
            self.recovered(slot).await;
            return Ok(None);
        }
        self.counters.reads_confirmed.add(1);
        let now = self.runtime.clock().now();
        let reads = chosen.iter().map(|shard| self.read_from::<L>(*shard, piece, course, now));
        let mut found = None;
        let mut failed = false;
        for (shard, read) in chosen.iter().zip(futures::future::join_all(reads).await) {
            match read {
                Ok(data) => found = found.or(Some(data)),
                Err((asked_of, failure)) => {
                    failed = true;
                    self.read_failed(*shard, asked_of, failure, damaged).await;
                }
            }
        }
        Ok(found.filter(|_| !failed))
    }

    /// In-sync replicas in the order in which to try them, and how many have to answer.
    fn candidates(&self, slot: usize, without: &[ShardPosition], (bytes, now): (u64, Instant)) -> (Shards, usize) {
        let replicas = self.replicas.borrow();
        let mut candidates: Shards = replicas.in_sync(slot).filter(|shard| !without.contains(shard)).collect();
        if candidates.len() > 1 {
            // Those whose fate is being decided come last.
            candidates.sort_by_key(|shard| (self.is_doubtful(*shard), !self.shards[*shard].local));
            let sound = candidates.iter().filter(|shard| !self.is_doubtful(**shard)).count();
            let first = self.chosen(if sound > 0 { &candidates[..sound] } else { &candidates }, bytes, now);
            candidates.swap(0, first);
        }
        // A new owner of the volume has opened one of the in-sync replicas at least, which will not confirm: all are asked.
        // The minimum does not tell how many it was: that can be changed, and who repairs may have found one alone. Those
        // `without` have confirmed when they said that they are damaged.
        let asked = if self.may_read_alone(now) { candidates.len().min(1) } else { candidates.len() };
        (candidates, asked)
    }

    /// Which of the candidates a read of so many bytes is asked of: with those just before it, or by lot.
    fn chosen(&self, candidates: &[ShardPosition], bytes: u64, now: Instant) -> usize {
        let last = self.together.get().and_then(|last| last.joined(bytes, now));
        let is_last = |shard: &ShardPosition| last.is_some_and(|last| last.replica() == *shard);
        let joined = candidates.iter().position(is_last).filter(|at| self.may_be_joined(candidates[*at], candidates));
        let at = joined.unwrap_or_else(|| self.better_of_two(candidates));
        let together = last.filter(|_| joined.is_some());
        self.together.set(Some(together.unwrap_or_else(|| Together::first(candidates[at], bytes, now))));
        at
    }

    /// How many requests it has does not count: those that were just asked of it are among them.
    fn may_be_joined(&self, replica: ShardPosition, candidates: &[ShardPosition]) -> bool {
        let slowness = |shard: &ShardPosition| {
            let shard = &self.shards[*shard];
            u64::from(shard.service_us.get()) * if shard.local { 1 } else { LOCAL_READ_ADVANTAGE }
        };
        // 0: not known yet.
        let fastest = candidates.iter().map(slowness).filter(|slowness| *slowness > 0).min();
        fastest.is_none_or(|fastest| slowness(&replica) <= READS_TOGETHER_SLOWNESS_MAX * fastest)
    }

    /// By lot, of those on this host, which come first, if they are not much slower.
    fn better_of_two(&self, candidates: &[ShardPosition]) -> usize {
        let local = candidates.iter().filter(|shard| self.shards[**shard].local).count();
        let cost = |at: usize| self.cost(candidates[at]);
        let better_of_two = |first: usize| {
            let (a, b) = (self.lot(first), self.lot(first));
            if cost(a) <= cost(b) { a } else { b }
        };
        let better = better_of_two(candidates.len());
        if !(1..candidates.len()).contains(&local) {
            return better;
        }
        let near = better_of_two(local);
        if cost(near) <= LOCAL_READ_ADVANTAGE * cost(better) { near } else { better }
    }

    /// By the clock, nobody else can own the volume.
    fn may_read_alone(&self, now: Instant) -> bool {
        self.lease.is_valid(now) && self.lease.generation() == self.status.owner_lease.get()
    }

    fn is_doubtful(&self, position: ShardPosition) -> bool {
        let shard = &self.shards[position];
        shard.recovering.get() || self.links.down_since(&shard.peer.borrow()).is_some()
    }

    /// From the first, and if that takes too long, also from the second: the first good answer counts. `None`: none was
    /// good, and what becomes of who gave it is being decided.
    async fn read_hedged<L: Look>(
        self: &Rc<Self>,
        candidates: &[ShardPosition],
        (piece, course): (Piece, &Course),
        now: Instant,
        damaged: &mut Vec<ShardPosition>,
    ) -> Option<Found<L::Found>> {
        let first = candidates[0];
        let after = {
            let mut hedging = self.hedging.borrow_mut();
            hedging.earn();
            hedging.after()
        };
        let mut asked = pin!(self.read_from::<L>(first, piece, course, now));
        let second = candidates.get(1).copied().filter(|second| !self.is_doubtful(*second));
        let Some(second) = second else { return self.taken(first, asked.await, damaged).await };
        let slow = self.slow_reads.set(&self.runtime, now.after(after));
        if let Either::Left((answer, _)) = select(asked.as_mut(), slow).await {
            return self.taken(first, answer, damaged).await;
        }
        Box::pin(self.hedge::<L>(asked, (first, second), (piece, course), now, damaged)).await
    }

    /// The first has been asked since `began`.
    async fn hedge<L: Look>(
        self: &Rc<Self>,
        asked: Pin<&mut impl Future<Output = Result<Found<L::Found>, (Incarnation, Failure)>>>,
        (first, second): (ShardPosition, ShardPosition),
        (piece, course): (Piece, &Course),
        began: Instant,
        damaged: &mut Vec<ShardPosition>,
    ) -> Option<Found<L::Found>> {
        // Meanwhile it may have lost everything, and be open again to be filled.
        let slot = self.placement.slot_of(piece.first.extent());
        let is_second = self.replicas.borrow().is_in_sync(slot, second) && !self.is_doubtful(second);
        if !is_second || !self.hedging.borrow_mut().pay() {
            return self.taken(first, asked.await, damaged).await;
        }
        self.counters.reads_hedged.add(1);
        let also = pin!(self.read_from::<L>(second, piece, course, self.runtime.clock().now()));
        let (answered, answer, other, rest) = match select(asked, also).await {
            Either::Left((answer, rest)) => (first, answer, second, Either::Left(rest)),
            Either::Right((answer, rest)) => (second, answer, first, Either::Right(rest)),
        };
        if answer.is_ok() && answered == second {
            self.counters.reads_hedged_won.add(1);
            self.note_service(first, self.runtime.clock().now().since(began));
        }
        match self.taken(answered, answer, damaged).await {
            Some(data) => Some(data),
            None => self.taken(other, rest.await, damaged).await,
        }
    }

    /// What was read, or `None` after a failure, of which the rest is seen to.
    async fn taken<T>(
        self: &Rc<Self>,
        position: ShardPosition,
        answer: Result<T, (Incarnation, Failure)>,
        damaged: &mut Vec<ShardPosition>,
    ) -> Option<T> {
        match answer {
            Ok(data) => Some(data),
            Err((asked_of, failure)) => {
                Box::pin(self.read_failed(position, asked_of, failure, damaged)).await;
                None
            }
        }
    }

    fn note_service(&self, position: ShardPosition, took: Duration) {
        let (shard, took_us) = (&self.shards[position], took.as_micros() as u32);
        shard.service_us.set((shard.service_us.get() / 8).saturating_mul(7).saturating_add(took_us / 8));
        self.hedging.borrow_mut().note(took);
    }

    fn cost(&self, shard: ShardPosition) -> u64 {
        let shard = &self.shards[shard];
        u64::from(shard.outstanding.get() + 1) * u64::from(shard.service_us.get() + 1)
    }

    /// A failure comes with the life of the shard that was asked.
    async fn read_from<L: Look>(
        &self,
        position: ShardPosition,
        piece: Piece,
        course: &Course,
        now: Instant,
    ) -> Result<Found<L::Found>, (Incarnation, Failure)> {
        let shard = &self.shards[position];
        self.counters.reads.add(1);
        let asked_of = shard.incarnation.get();
        let failed = |failure| (asked_of, failure);
        let (operation, nothing) = (L::operation(piece), Bytes::new());
        let asked = self.ask_measured(shard, asked_of, &operation, &nothing, now);
        let (answer, payload, leg) = asked.await.map_err(failed)?;
        course.heard(leg);
        if L::TELLS_SERVICE_TIME {
            self.note_service(position, leg.answered.since(leg.sent));
        }
        L::take(piece, answer, payload).map_err(failed)
    }

    /// What becomes of the replica is decided beside the read, which goes on with another one.
    async fn read_failed(
        self: &Rc<Self>,
        position: ShardPosition,
        asked_of: Incarnation,
        failure: Failure,
        damaged: &mut Vec<ShardPosition>,
    ) {
        let shard = &self.shards[position];
        match (&failure, verdict(&failure)) {
            (Failure::Refused(Refusal::Damaged { .. } | Refusal::Corrupt { .. }), _) => {
                tracing::error!(volume = %self.record.name, shard = %shard.id, %failure, "reading another replica");
                damaged.push(position);
            }
            (_, Verdict::Local | Verdict::Busy | Verdict::Full) => self.runtime.clock().sleep(RETRY_AFTER).await,
            (_, verdict) => self.recover(position, asked_of, failure, verdict),
        }
    }

    /// Until more replicas can be asked than now, or for a moment: with time the lease may be valid again.
    async fn recovered(&self, slot: usize) {
        let recovering = || {
            let replicas = self.replicas.borrow();
            replicas.in_sync(slot).filter(|shard| self.shards[*shard].recovering.get()).count()
        };
        let now = recovering();
        let changed = pin!(self.changed.until(|| (self.ended.borrow().is_some() || recovering() < now).then_some(())));
        select(changed, pin!(self.runtime.clock().sleep(RETRY_AFTER))).await;
    }
}

pub(super) fn malformed(because: String) -> Failure {
    Failure::Refused(Refusal::Malformed { because })
}

/// Checks that the answer is the whole range with the data its checksums were made of.
fn assemble(piece: Piece, runs: &[Run], checksums: &[u32], payload: Bytes) -> Result<Pieces, Failure> {
    let total: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
    let with_data: usize = runs.iter().filter(|run| run.data).map(|run| run.count as usize).sum();
    let block_bytes = BLOCK_BYTES as usize;
    if total != u64::from(piece.count) || with_data != checksums.len() || with_data * block_bytes != payload.len() {
        return Err(malformed(format!(
            "a read of {} blocks was answered by {total}, {with_data} with data, {} checksums and {} bytes",
            piece.count,
            checksums.len(),
            payload.len()
        )));
    }
    for (index, (block, expected)) in payload.chunks_exact(block_bytes).zip(checksums).enumerate() {
        let found = crc32c::crc32c(block);
        if found != *expected {
            let block = torus_schema::ids::BlockIndex(piece.first.0 + index as u64);
            return Err(Failure::Refused(Refusal::Corrupt { block, found, expected: *expected }));
        }
    }
    let mut at = 0;
    // Runs differ by their versions too, which nobody asked for here.
    let pieces = runs.chunk_by(|run, next| run.data == next.data).map(|alike| {
        let length = alike.iter().map(|run| run.count as usize).sum::<usize>() * block_bytes;
        if !alike[0].data {
            return DevicePiece::Zeros(length as u64);
        }
        at += length;
        DevicePiece::Data(payload.slice(at - length..at))
    });
    Ok(pieces.collect())
}

/// Drops `skip` bytes in front and everything behind `length`.
fn trim(pieces: Pieces, mut skip: u64, mut length: u64) -> Pieces {
    let kept = pieces.into_iter().filter_map(|piece| {
        let bytes = match &piece {
            DevicePiece::Data(data) => data.len() as u64,
            DevicePiece::Zeros(bytes) => *bytes,
        };
        let (start, end) = (skip.min(bytes), (skip + length).min(bytes));
        skip -= start;
        length -= end - start;
        match piece {
            _ if start == end => None,
            whole if end - start == bytes => Some(whole),
            DevicePiece::Data(data) => Some(DevicePiece::Data(data.slice(start as usize..end as usize))),
            DevicePiece::Zeros(_) => Some(DevicePiece::Zeros(end - start)),
        }
    });
    kept.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use smallvec::smallvec;
    use torus_schema::ids::{BlockIndex, Epoch, Version};

    fn piece(count: u32) -> Piece {
        Piece { first: BlockIndex(7), count }
    }

    #[test]
    fn an_answer_with_other_bytes_than_its_checksums_say_is_refused() {
        let run = Run { count: 1, version: Version::ZERO, data: true };
        let payload = Bytes::from(vec![5; 4096]);
        let checksum = crc32c::crc32c(&payload);
        assert!(assemble(piece(1), &[run], &[checksum], payload.clone()).is_ok());
        let refused = assemble(piece(1), &[run], &[checksum ^ 1], payload.clone());
        assert!(matches!(refused, Err(Failure::Refused(Refusal::Corrupt { .. }))));
        assert!(assemble(piece(2), &[run], &[checksum], payload).is_err(), "one block short");
    }

    #[test]
    fn blocks_that_were_written_one_by_one_are_one_piece() {
        let run = |sequence, data| Run { count: 1, version: Version::new(Epoch(1), sequence), data };
        let payload = Bytes::from_iter((0..3u8).flat_map(|block| [block; 4096]));
        let checksums: Vec<u32> = payload.chunks_exact(4096).map(crc32c::crc32c).collect();
        let runs = [run(9, true), run(5, true), run(0, false), run(7, false), run(3, true)];
        let pieces = assemble(piece(5), &runs, &checksums, payload.clone()).unwrap();
        let data = |range| DevicePiece::Data(payload.slice(range));
        assert_eq!(pieces[..], [data(0..8192), DevicePiece::Zeros(8192), data(8192..12288)]);
    }

    #[test]
    fn a_range_inside_blocks_is_cut_out_of_them() {
        let data = Bytes::from_iter((0..200u8).cycle().take(4096));
        let pieces = smallvec![DevicePiece::Zeros(4096), DevicePiece::Data(data.clone())];
        let kept = trim(pieces, 4000, 100);
        assert_eq!(kept[..], [DevicePiece::Zeros(96), DevicePiece::Data(data.slice(0..4))]);
    }
}
