//! A stale replica takes what it lacks from one that is in sync, a stretch of a slice at a time, as the volume's writer
//! asks it to (protocol rule 11). The writer sees to the order of things; here a request is checked like any other, and
//! carried out against the source named in it, under the writer's epoch and the source's incarnation, so that a source
//! that was fenced or has restarted refuses.
//!
//! Two passes, each over all slices. The first takes back what only this replica ever got (`compare` says what that
//! is); the writer makes that durable before it tells F again. The second takes what the source has above `since`.
//! Nothing is durable when it is answered: the writer's flush at the end sees to that.
//!
//! Between a look at the source and the append here the writer may have been fenced. What the source had of the old
//! epoch and lost since must not come in then: so each append is preceded, in the same breath, by the same check as the
//! request, and a new writer's open waits for what was appended before it.
//!
//! * `compare` what to do about a block (pure)
//! * `pace`    how fast (pure)

mod compare;
mod pace;

use super::queue::{Need, Waiting};
use super::requests::{VOLUME_BLOCKS_MAX, malformed};
use super::{Shard, State};
use crate::index::{Found, Place};
use crate::log::record::{Clear, Data, Record, Revoke};
use crate::log::{BLOCK, Position};
use crate::shard::damage::Damaged;
use bytes::Bytes;
use compare::{Job, Step, Theirs, add_job, beginning_of, frames, step, theirs_of};
use futures::channel::oneshot;
use futures::future::{Either, join_all, select};
use pace::Pacer;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::Range;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::message::{
    Answer, Checksums, Descriptor, Envelope, Operation, Refusal, Resync, Resynced, Revoked, Run, Source,
};
use torus_rpc::runtime::{Clock, Instant, Peer, Runtime};
use torus_schema::ids::{BlockIndex, Version};
use torus_schema::limits::{
    BLOCK_BYTES, BLOCKS_PER_EXTENT, DESCRIPTORS_PER_REPLY_MAX, RESYNC_BLOCKS_PER_REQUEST, RESYNC_BYTES_S,
    RESYNC_READ_BLOCKS, RESYNC_READS_IN_FLIGHT, RESYNC_REQUEST_TIME, RESYNC_SOURCE_DEADLINE, RESYNC_TURN_WAIT,
    RESYNCS_AT_ONCE, REVOKED_PER_RECORD_MAX,
};

/// What all resyncs into one shard share.
pub(super) struct Resyncs {
    pub pacer: RefCell<Pacer>,
    running: Cell<usize>,
    waiting: RefCell<VecDeque<oneshot::Sender<()>>>,
}

impl Default for Resyncs {
    fn default() -> Self {
        let pacer = RefCell::new(Pacer::new(RESYNC_BYTES_S));
        Self { pacer, running: Cell::new(0), waiting: RefCell::default() }
    }
}

/// One of those that are carried out, until it is dropped.
struct Turn<R: Runtime>(Rc<Shard<R>>);

impl<R: Runtime> Drop for Turn<R> {
    fn drop(&mut self) {
        let resyncs = &self.0.resyncs;
        while let Some(next) = resyncs.waiting.borrow_mut().pop_front() {
            if next.send(()).is_ok() {
                return;
            }
        }
        resyncs.running.set(resyncs.running.get() - 1);
    }
}

/// One request.
struct Work<'a, R: Runtime> {
    shard: &'a Rc<Shard<R>>,
    envelope: &'a Envelope,
    asked: &'a Resync,
    peer: Peer,
    started: Instant,
    done: Resynced,
}

impl<R: Runtime> Shard<R> {
    /// Bytes a second that resyncs write here at most, all together.
    pub fn set_resync_limit(&self, bytes_s: u64) {
        self.resyncs.pacer.borrow_mut().set_limit(bytes_s);
    }

    pub(super) async fn resync(self: &Rc<Self>, envelope: &Envelope, asked: &Resync) -> Result<Answer, Refusal> {
        self.check(envelope, Some(asked.slice))?;
        check_asked(envelope, asked)?;
        let Some(_turn) = self.turn().await else {
            return Ok(Answer::Resynced(Resynced { next: Some(asked.from), ..Resynced::default() }));
        };
        let peer = self.peers.at(asked.source.node, asked.source.shard, &asked.source.address);
        let (started, done) = (self.runtime.clock().now(), Resynced::default());
        let mut work = Work { shard: self, envelope, asked, peer, started, done };
        let worked = async { if asked.pull { work.pull().await } else { work.take_back().await } };
        match self.unless_ending(worked).await {
            Some(next) => {
                work.done.next = next?;
                Ok(Answer::Resynced(work.done))
            }
            None => Err(Refusal::Disk { because: "the shard is being closed, or its disk failed".to_string() }),
        }
    }

    /// In the order of asking; `None` after a while, and then the writer asks again, behind the others.
    async fn turn(self: &Rc<Self>) -> Option<Turn<R>> {
        let resyncs = &self.resyncs;
        if resyncs.running.get() < RESYNCS_AT_ONCE {
            resyncs.running.set(resyncs.running.get() + 1);
            return Some(Turn(self.clone()));
        }
        let (sender, receiver) = oneshot::channel();
        resyncs.waiting.borrow_mut().push_back(sender);
        match select(pin!(self.runtime.clock().sleep(RESYNC_TURN_WAIT)), receiver).await {
            Either::Right((Ok(()), _)) => Some(Turn(self.clone())),
            Either::Right((Err(_), _)) => None,
            // It may have been given in this very moment.
            Either::Left((_, mut receiver)) => {
                receiver.close();
                matches!(receiver.try_recv(), Ok(Some(()))).then(|| Turn(self.clone()))
            }
        }
    }
}

impl<R: Runtime> Work<'_, R> {
    fn is_over(&self) -> bool {
        let took = self.shard.runtime.clock().now().since(self.started);
        took >= RESYNC_REQUEST_TIME || self.done.pulled >= u64::from(self.asked.blocks_max)
    }

    fn place(&self, block: BlockIndex) -> Place {
        Place { volume: self.envelope.volume, slice: self.asked.slice, block }
    }

    fn ours(&self, block: BlockIndex) -> Found {
        self.shard.state.borrow().contents.index.find(self.place(block))
    }

    async fn ask(&self, operation: &Operation) -> Result<(Answer, Bytes), Refusal> {
        let Source { incarnation, generation, .. } = self.asked.source;
        let envelope = Envelope { incarnation, generation, ..*self.envelope };
        let clock = self.shard.runtime.clock();
        let asked = pin!(self.shard.ask_peer(&self.peer, &envelope, operation));
        let too_long = pin!(clock.sleep(RESYNC_SOURCE_DEADLINE));
        let source = |because: String, restarted| Refusal::Source { because, restarted };
        match select(asked, too_long).await {
            Either::Left((Ok((Answer::Refused(refusal), _)), _)) => {
                let life = [Refusal::OtherIncarnation, Refusal::NotOpen];
                let restarted = life.contains(&refusal) || matches!(refusal, Refusal::Disk { .. });
                Err(source(refusal.to_string(), restarted))
            }
            Either::Left((Ok(answered), _)) => Ok(answered),
            Either::Left((Err(error), _)) => Err(source(error.to_string(), false)),
            Either::Right(_) => {
                let (address, waited) = (&self.peer.address, RESYNC_SOURCE_DEADLINE.as_millis());
                Err(source(format!("{address} has not answered for {waited} ms"), false))
            }
        }
    }

    fn odd(&self, because: String) -> Refusal {
        let because = format!("{} answered {because}", self.peer.address);
        Refusal::Source { because, restarted: false }
    }

    /// First pass: versions above `since` that the source never had. Gives where to go on.
    async fn take_back(&mut self) -> Result<Option<BlockIndex>, Refusal> {
        let mut from = self.asked.from;
        loop {
            let (ours, next) = self.shard.state.borrow().above(self.envelope, self.asked, from)?;
            for (first, count) in frames(&ours) {
                if self.is_over() {
                    return Ok(Some(first));
                }
                let theirs = self.map(first, count).await?;
                self.settle_frame(first, &theirs).await?;
                self.done.examined += u64::from(count);
            }
            match next {
                Some(next) if next > from => from = next,
                _ => return Ok(None),
            }
        }
    }

    async fn map(&self, first: BlockIndex, count: u32) -> Result<Vec<Theirs>, Refusal> {
        let (answer, _) = self.ask(&Operation::Map { first, count }).await?;
        let Answer::Mapped { runs } = answer else { return Err(self.odd(format!("a map with {answer:?}"))) };
        theirs_of(&runs, count).ok_or_else(|| self.odd(format!("a map of {count} blocks with {runs:?}")))
    }

    async fn settle_frame(&mut self, first: BlockIndex, theirs: &[Theirs]) -> Result<(), Refusal> {
        let blocks = || (first.0..).map(BlockIndex).zip(theirs.iter().copied());
        let (mut zeros, mut revoked, mut looked_at) = (Vec::new(), Vec::new(), Vec::new());
        for (block, theirs) in blocks() {
            let ours = self.ours(block);
            if ours.version() <= self.asked.since {
                continue;
            }
            match step(ours, theirs, self.asked.through) {
                // Not left to the second pass, which may have another source: such zeros can be of the source's own making
                // (below), and who never had what they hide has nothing to be pulled.
                Step::Pull if !theirs.data && matches!(ours, Found::Data(_)) => looked_at.push((block, theirs)),
                // What else the source has above `since` the second pass takes.
                Step::Nothing | Step::Pull => {}
                Step::Conflict => return Err(self.conflict(block, ours, theirs)),
                Step::Zeros => {
                    let version = beginning_of(self.asked.through.epoch);
                    add_job(&mut zeros, block, Theirs { version, data: false, checksum: None }, 1);
                    looked_at.push((block, theirs));
                }
                Step::TakeBack => {
                    let above = theirs.version.max(self.asked.since);
                    let state = self.shard.state.borrow();
                    let versions = state.contents.versions_of(self.place(block), above, self.asked.through);
                    revoked.extend(versions.into_iter().map(|version| Revoked { block, version }));
                    looked_at.push((block, theirs));
                }
            }
        }
        self.done.revoked += revoked.len() as u64;
        self.revoke(&revoked).await?;
        let clears = zeros.iter().map(|job| self.submit_clear(job)).collect::<Result<Vec<_>, _>>()?;
        self.done.revoked += zeros.iter().map(Job::cleared).sum::<u64>();
        all_done(clears.into_iter().flatten()).await?;
        self.check_settled(&looked_at).await
    }

    async fn revoke(&self, revoked: &[Revoked]) -> Result<(), Refusal> {
        if revoked.is_empty() {
            return Ok(());
        }
        self.shard.check(self.envelope, Some(self.asked.slice))?;
        let volume = self.envelope.volume;
        for Revoked { block, version } in revoked {
            tracing::info!(%volume, %block, %version, "taken back: no other replica ever had it");
        }
        let append = |revoked: &[Revoked]| {
            let record = Record::Revoke(Revoke { volume, revoked: revoked.to_vec() });
            self.shard.submit(Need::Note, record, Bytes::new(), None)
        };
        let waiting: Vec<_> = revoked.chunks(REVOKED_PER_RECORD_MAX).map(append).collect::<Result<_, _>>()?;
        all_done(waiting).await
    }

    /// What came to light is what the source has, or older; older than the source's it cannot be, and is mended.
    async fn check_settled(&mut self, blocks: &[(BlockIndex, Theirs)]) -> Result<(), Refusal> {
        let mut jobs = Vec::new();
        for (block, theirs) in blocks {
            let ours = self.ours(*block);
            match step(ours, *theirs, self.asked.through) {
                Step::Nothing => {}
                Step::Pull => add_job(&mut jobs, *block, *theirs, RESYNC_READ_BLOCKS),
                Step::Conflict => return Err(self.conflict(*block, ours, *theirs)),
                Step::TakeBack | Step::Zeros => return Err(self.too_new(*block, ours, *theirs)),
            }
        }
        self.carry_out(&jobs).await
    }

    /// Second pass: everything the source has above `since`. Gives where to go on.
    async fn pull(&mut self) -> Result<Option<BlockIndex>, Refusal> {
        let mut from = self.asked.from;
        loop {
            let (above, slice) = (self.asked.since, Some(self.asked.slice));
            let (answer, _) = self.ask(&Operation::Describe { above, from, slice }).await?;
            let Answer::Described { descriptors, next } = answer else {
                return Err(self.odd(format!("a describe with {answer:?}")));
            };
            self.check_described(&descriptors, from)?;
            let jobs = self.jobs(&descriptors)?;
            self.done.examined += descriptors.iter().map(|described| u64::from(described.count)).sum::<u64>();
            for some in jobs.chunks(RESYNC_READS_IN_FLIGHT) {
                if self.is_over() {
                    return Ok(Some(some[0].first()));
                }
                self.carry_out(some).await?;
            }
            match next {
                None => return Ok(None),
                Some(next) if next <= from => return Err(self.odd(format!("a describe from {from} goes on at {next}"))),
                Some(next) if self.is_over() => return Ok(Some(next)),
                Some(next) => from = next,
            }
        }
    }

    fn check_described(&self, descriptors: &[Descriptor], from: BlockIndex) -> Result<(), Refusal> {
        let state = self.shard.state.borrow();
        let mut at = from.0;
        for described in descriptors {
            let (first, count) = (described.first.0, u64::from(described.count));
            let sized = (1..=BLOCKS_PER_EXTENT).contains(&count) && first < VOLUME_BLOCKS_MAX;
            let one_extent = sized && described.first.extent() == BlockIndex(first + count - 1).extent();
            let slice = state.contents.slice_of(self.envelope.volume, described.first.extent());
            if first < at || !one_extent || slice != self.asked.slice || (count > 1 && described.checksum.is_some()) {
                return Err(self.odd(format!("{described:?} from block {at} of slice {}", self.asked.slice)));
            }
            at = first + count;
        }
        Ok(())
    }

    fn jobs(&self, descriptors: &[Descriptor]) -> Result<Vec<Job>, Refusal> {
        let mut jobs = Vec::new();
        for described in descriptors {
            let &Descriptor { first, count, version, checksum } = described;
            let theirs = Theirs { version, data: checksum.is_some(), checksum };
            let found = self.shard.state.borrow().contents.index.find_range(self.place(first), count);
            for (block, ours) in (first.0..).map(BlockIndex).zip(found) {
                match step(ours, theirs, self.asked.through) {
                    Step::Nothing => {}
                    Step::Pull => add_job(&mut jobs, block, theirs, RESYNC_READ_BLOCKS),
                    Step::Conflict => return Err(self.conflict(block, ours, theirs)),
                    // The first pass would have taken it back.
                    Step::TakeBack | Step::Zeros => return Err(self.too_new(block, ours, theirs)),
                }
            }
        }
        Ok(jobs)
    }

    /// At once.
    async fn carry_out(&mut self, jobs: &[Job]) -> Result<(), Refusal> {
        let carried_out = join_all(jobs.iter().map(|job| async {
            match job {
                Job::Read { first, count } => self.fetch(*first, *count).await,
                Job::Clear { .. } => all_done(self.submit_clear(job)?).await,
            }
        }));
        carried_out.await.into_iter().collect::<Result<(), _>>()?;
        self.done.pulled += jobs.iter().map(|job| u64::from(job.blocks())).sum::<u64>();
        Ok(())
    }

    async fn fetch(&self, first: BlockIndex, count: u32) -> Result<(), Refusal> {
        let (clock, pacer) = (self.shard.runtime.clock(), &self.shard.resyncs.pacer);
        let wait = pacer.borrow_mut().take(clock.now(), u64::from(count) * BLOCK_BYTES);
        if wait > Duration::ZERO {
            clock.sleep(wait).await;
        }
        let asked = clock.now();
        let (answer, payload) = self.ask(&Operation::Read { first, count }).await?;
        pacer.borrow_mut().source_answered(clock.now().since(asked));
        let Answer::Read { runs, checksums } = answer else { return Err(self.odd(format!("a read with {answer:?}"))) };
        self.check_read(first, count, (&runs, &checksums), &payload)?;
        all_done(self.submit_read(first, &runs, &checksums, &payload)?).await
    }

    fn check_read(
        &self,
        first: BlockIndex,
        count: u32,
        (runs, checksums): (&[Run], &[u32]),
        payload: &[u8],
    ) -> Result<(), Refusal> {
        let total: u64 = runs.iter().map(|run| u64::from(run.count)).sum();
        let with_data: u64 = runs.iter().filter(|run| run.data).map(|run| u64::from(run.count)).sum();
        let sized = checksums.len() as u64 == with_data && payload.len() as u64 == with_data * BLOCK_BYTES;
        if total != u64::from(count) || !sized {
            let (sums, bytes) = (checksums.len(), payload.len());
            return Err(self.odd(format!("a read of {count} blocks with {runs:?}, {sums} checksums, {bytes} bytes")));
        }
        for (block, expected) in payload.chunks(BLOCK_BYTES as usize).zip(checksums) {
            let found = crc32c::crc32c(block);
            if found != *expected {
                return Err(self.odd(format!("a read from {first} with checksum {found:08x}, not {expected:08x}")));
            }
        }
        Ok(())
    }

    /// What of it is newer than ours, under the version it has there: that may be newer than was described.
    fn submit_read(
        &self,
        first: BlockIndex,
        runs: &[Run],
        checksums: &[u32],
        payload: &Bytes,
    ) -> Result<Vec<Waiting>, Refusal> {
        self.shard.check(self.envelope, Some(self.asked.slice))?;
        let (mut waiting, mut at, mut of_data) = (Vec::new(), first.0, 0);
        for run in runs {
            let count = u64::from(run.count);
            let newer = (at..at + count).filter(|block| self.ours(BlockIndex(*block)).version() < run.version);
            for blocks in neighbours(newer) {
                let (first, count) = (BlockIndex(blocks.start), (blocks.end - blocks.start) as u32);
                if !run.data {
                    waiting.extend(self.submit_clear(&Job::Clear { first, count, version: run.version })?);
                    continue;
                }
                let start = of_data + (blocks.start - at) as usize;
                let numbers = start..start + count as usize;
                let payload = payload.slice(numbers.start * BLOCK..numbers.end * BLOCK);
                waiting.push(self.submit_data(first, run.version, checksums[numbers].into(), payload)?);
            }
            at += count;
            of_data += if run.data { run.count as usize } else { 0 };
        }
        Ok(waiting)
    }

    fn submit_data(
        &self,
        first: BlockIndex,
        version: Version,
        checksums: Checksums,
        payload: Bytes,
    ) -> Result<Waiting, Refusal> {
        let volume = self.envelope.volume;
        let flush_point = {
            let state = self.shard.state.borrow();
            state.check_not_revoked(volume, first.0..first.0 + checksums.len() as u64, version)?;
            state.flush_point(volume)
        };
        let data = Data { volume, first, version, flush_point, position: Position(0), checksums };
        self.shard.submit(Need::Data, Record::Data(data), payload, None)
    }

    /// Nothing for a job that is none.
    fn submit_clear(&self, job: &Job) -> Result<Option<Waiting>, Refusal> {
        let &Job::Clear { first, count, version } = job else { return Ok(None) };
        self.shard.check(self.envelope, Some(self.asked.slice))?;
        let (volume, slice, count) = (self.envelope.volume, self.asked.slice, u64::from(count));
        let flush_point = {
            let state = self.shard.state.borrow();
            state.check_not_revoked(volume, first.0..first.0 + count, version)?;
            state.flush_point(volume)
        };
        let clear = Clear { volume, first, version, flush_point, slice, count };
        self.shard.submit(Need::Note, Record::Clear(clear), Bytes::new(), None).map(Some)
    }

    fn conflict(&self, block: BlockIndex, ours: Found, theirs: Theirs) -> Refusal {
        let version = theirs.version;
        if let (Found::Data(entry), Some(there)) = (ours, theirs.checksum) {
            let (volume, checksum, position) = (self.envelope.volume, entry.checksum, entry.position);
            self.shard.note_conflict(&Damaged { volume, block, version, checksum, position }, there, &self.peer);
        }
        malformed(format!(
            "block {block} is one thing here and another at {} under version {version}: neither is touched; compare \
             them with the application's data",
            self.peer.address
        ))
    }

    fn too_new(&self, block: BlockIndex, ours: Found, theirs: Theirs) -> Refusal {
        malformed(format!(
            "block {block} has version {} here, {} at {}, which ought to have all up to {}: neither is touched; look \
             for what {} lost",
            ours.version(),
            theirs.version,
            self.peer.address,
            self.asked.through,
            self.peer.address
        ))
    }
}

impl State {
    /// Newest records of the slice above `since`, from `from` on.
    fn above(
        &self,
        envelope: &Envelope,
        asked: &Resync,
        from: BlockIndex,
    ) -> Result<(Vec<Descriptor>, Option<BlockIndex>), Refusal> {
        let layout = self.contents.volumes.get(&envelope.volume).and_then(|volume| volume.layout.as_ref());
        let of = (&layout.ok_or(Refusal::NotOpen)?.placement, Some(asked.slice));
        Ok(self.contents.index.describe(envelope.volume, asked.since, from, of, DESCRIPTORS_PER_REPLY_MAX))
    }
}

/// Ascending numbers as ranges.
fn neighbours(numbers: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for number in numbers {
        match ranges.last_mut() {
            Some(last) if last.end == number => last.end += 1,
            _ => ranges.push(number..number + 1),
        }
    }
    ranges
}

async fn all_done(waiting: impl IntoIterator<Item = Waiting>) -> Result<(), Refusal> {
    for waiting in waiting {
        waiting.done().await?;
    }
    Ok(())
}

fn check_asked(envelope: &Envelope, asked: &Resync) -> Result<(), Refusal> {
    let Resync { since, through, from, blocks_max, .. } = asked;
    if through.epoch != envelope.epoch || since > through {
        return Err(malformed(format!("a resync from {since} through {through} in epoch {}", envelope.epoch)));
    }
    if from.0 > VOLUME_BLOCKS_MAX || !(1..=RESYNC_BLOCKS_PER_REQUEST).contains(blocks_max) {
        let most = RESYNC_BLOCKS_PER_REQUEST;
        return Err(malformed(format!("a resync of {blocks_max} blocks from {from}, expected 1 to {most}")));
    }
    Ok(())
}
