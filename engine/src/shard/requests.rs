//! What a client asks: checked in full, then carried out. The rules are those of the replication protocol: a request
//! shows epoch, incarnation and generation, and anything that does not match is refused, reads too (rule 5).

use super::course::{Done, Span};
use super::queue::{Need, Waiting};
use super::volumes::Session;
use super::{Shard, State};
use crate::index::Place;
use crate::log::record::{self, Clear, Data, Instances, Record};
use crate::log::{BLOCK, Position};
use bytes::Bytes;
use std::rc::Rc;
use torus_rpc::message::{Answer, Checksums, Envelope, Few, Opened, Operation, Refusal, Token};
use torus_rpc::runtime::{Instant, Runtime};
use torus_rpc::server::Request;
use torus_schema::ids::{BlockIndex, Epoch, SliceId, Version, VolumeId};
use torus_schema::limits::{
    BLOCK_BYTES, BLOCKS_PER_FRAME_MAX, DESCRIPTORS_PER_REPLY_MAX, SEQUENCE_MAX, SLICES_MAX, VOLUME_BYTES_MAX,
};

pub(super) const VOLUME_BLOCKS_MAX: u64 = VOLUME_BYTES_MAX / BLOCK_BYTES;
/// Whose token creates instances: no writer, and no epoch.
const CREATOR: &str = "create";

pub(super) fn malformed(because: impl Into<String>) -> Refusal {
    Refusal::Malformed { because: because.into() }
}

impl<R: Runtime> Shard<R> {
    /// `began`: when it was begun with.
    pub(super) async fn answer(self: &Rc<Self>, request: &mut Request, began: Instant) -> Result<Done<R>, Refusal> {
        self.state.borrow().check_alive()?;
        let envelope = &request.envelope;
        match request.operation {
            Operation::Read { first, count } => {
                check_range(first, u64::from(count))?;
                let slice = self.check_block(envelope, first)?;
                self.read(Place { volume: envelope.volume, slice, block: first }, count, began).await
            }
            Operation::Write { first, version, durable, ref mut checksums } => {
                let checksums = std::mem::take(checksums);
                // Of the payload only what waits to be appended is kept, and not until a sync is over.
                let payload = std::mem::take(&mut request.payload);
                let written = self.write(envelope, (first, version), checksums, &payload, durable)?;
                drop(payload);
                let written = all_done(written).await?;
                let needs_sync = durable && !self.is_all_durable()?;
                self.with_sync_if(needs_sync, Answer::Written, written).await
            }
            Operation::Flush => {
                self.check(envelope, None)?;
                self.state.borrow_mut().statistics.flushes += 1;
                // The writer may have been fenced meanwhile; what is synced is synced, and it may know.
                self.with_sync_if(true, Answer::Flushed, None).await
            }
            // Apart, or the future of each read would be as large as the largest of these.
            _ => Box::pin(self.answer_rare(request)).await,
        }
    }

    async fn answer_rare(self: &Rc<Self>, request: &mut Request) -> Result<Done<R>, Refusal> {
        let envelope = &request.envelope;
        let answer = match std::mem::replace(&mut request.operation, Operation::Ping) {
            Operation::Read { .. } | Operation::Write { .. } | Operation::Flush => {
                unreachable!("it is answered above")
            }
            Operation::Hello { .. } | Operation::Ping => return Err(malformed("hello and ping are for the server")),
            Operation::CreateInstances { token, placement, width, ring_slices, slices } => {
                let record = new_instances(envelope, placement, width, ring_slices, slices)?;
                self.create_instances(record, &token).await?
            }
            Operation::Open { token, owner, slices } => self.open_volume(envelope, token, &owner, &slices).await?,
            Operation::Clear { first, count, slice, version, durable } => {
                let cleared = self.clear(envelope, first, count, slice, version).await?;
                return self.with_sync_if(durable, Answer::Cleared, Some(cleared)).await;
            }
            Operation::Describe { above, from, slice } => self.describe(envelope, above, from, slice)?,
            Operation::Retain(retention) => self.retain(envelope, retention).await?,
            Operation::Revoke { revoked } => self.revoke(envelope, revoked).await?,
            Operation::Map { first, count } => self.map(envelope, first, count)?,
            Operation::PeerRead { token, first, count, data } => {
                return self.peer_read(envelope.volume, &token, (first, count), data).await;
            }
            Operation::Resync(asked) => self.resync(envelope, &asked).await?,
        };
        Ok(answer.into())
    }

    /// `written`: what the disk did before.
    async fn with_sync_if(
        self: &Rc<Self>,
        durable: bool,
        answer: Answer,
        written: Option<Span>,
    ) -> Result<Done<R>, Refusal> {
        let disk = if durable { Some(self.sync_after_now().await?.and(written)) } else { written };
        Ok(Done { disk, ..answer.into() })
    }

    /// Rule 5, and F taken note of.
    pub(super) fn check(&self, envelope: &Envelope, slice: Option<SliceId>) -> Result<(), Refusal> {
        let state = &mut *self.state.borrow_mut();
        let volume = state.contents.volumes.get_mut(&envelope.volume).ok_or(Refusal::NotOpen)?;
        if envelope.epoch < volume.epoch {
            return Err(Refusal::StaleEpoch { replica: volume.epoch });
        }
        if envelope.incarnation != state.incarnation {
            return Err(Refusal::OtherIncarnation);
        }
        volume.check(envelope, slice, state.lost_below)?;
        let flush_point = envelope.flush_point;
        if flush_point.epoch > envelope.epoch || flush_point.sequence > SEQUENCE_MAX {
            return Err(malformed(format!("flush point {flush_point} in epoch {}", envelope.epoch)));
        }
        volume.flush_point = volume.flush_point.max(flush_point);
        Ok(())
    }

    pub(super) fn check_block(&self, envelope: &Envelope, block: BlockIndex) -> Result<SliceId, Refusal> {
        let slice = {
            let state = self.state.borrow();
            let layout = state.contents.volumes.get(&envelope.volume).and_then(|volume| volume.layout.as_ref());
            layout.ok_or(Refusal::NotOpen)?.placement.slice_of(block.extent())
        };
        self.check(envelope, Some(slice))?;
        Ok(slice)
    }

    async fn create_instances(self: &Rc<Self>, record: Instances, token: &Token) -> Result<Answer, Refusal> {
        let volume = record.volume;
        if !self.key.verify(volume, Epoch(0), CREATOR, token) {
            return Err(Refusal::BadToken);
        }
        let record = {
            let state = self.state.borrow();
            if state.contents.dropped.contains(&volume) {
                return Err(malformed(format!("volume {volume} was deleted; ids are never used again")));
            }
            let record = Instances { created: state.queue.next_batch, ..record };
            // A quarter of a segment, so that a record of instances always fits behind others.
            let limit = (u64::from(self.geometry.blocks) * BLOCK_BYTES / 4) as usize;
            let bytes = Record::Instances(record.clone()).bytes();
            if bytes > limit {
                return Err(malformed(format!("{bytes} bytes of slices, at most {limit} fit into a segment here")));
            }
            state.missing_of(&record)?
        };
        if let Some(record) = record {
            self.append(Need::Note, Record::Instances(record), Bytes::new()).await?;
        }
        // Also if there was nothing to do: whoever created them may still wait for his sync.
        self.sync_after_now().await?;
        Ok(Answer::Created)
    }

    /// Rule 3. The epoch is raised at once, so that the previous writer gets nothing more in, and answered when it is
    /// durable and everything that writer had got in is applied: the new one describes it next.
    async fn open_volume(
        self: &Rc<Self>,
        envelope: &Envelope,
        token: Token,
        owner: &str,
        slices: &[SliceId],
    ) -> Result<Answer, Refusal> {
        let (id, epoch) = (envelope.volume, envelope.epoch);
        if !self.key.verify(id, epoch, owner, &token) {
            return Err(Refusal::BadToken);
        }
        let begun = self.state.borrow_mut().begin_open(envelope, token)?;
        let Some(session) = begun else {
            let incarnation = self.state.borrow().incarnation;
            return Ok(Answer::Opened(Opened {
                incarnation,
                open_in_previous_epoch: false,
                flush_point: Version::ZERO,
                missing: slices.to_vec(),
                status_changes: 0,
            }));
        };
        let flush_point = self.state.borrow().flush_point(id);
        let record = record::Open { volume: id, flush_point, epoch, token };
        self.append(Need::Note, Record::Open(record), Bytes::new()).await?;
        let quiet = || {
            let state = self.state.borrow();
            let volume = state.contents.volumes.get(&id);
            let same_writer = |session: Option<Session>| session.is_some_and(|session| session.epoch == epoch);
            let quiet = volume.is_none_or(|volume| volume.in_flight == 0 || same_writer(volume.session));
            (quiet || state.failed.is_some()).then_some(())
        };
        self.changed.until(quiet).await;
        self.sync_after_now().await?;
        let state = &mut *self.state.borrow_mut();
        let (incarnation, lost_below) = (state.incarnation, state.lost_below);
        let volume = state.contents.volumes.get_mut(&id).ok_or(Refusal::NotOpen)?;
        if volume.epoch != epoch {
            return Err(Refusal::StaleEpoch { replica: volume.epoch });
        }
        volume.session = Some(session);
        let missing = slices.iter().copied().filter(|slice| !volume.holds(*slice, envelope.generation, lost_below));
        Ok(Answer::Opened(Opened {
            incarnation,
            open_in_previous_epoch: session.open_in_previous_epoch,
            flush_point: volume.flush_point,
            missing: missing.collect(),
            status_changes: volume.status_changes,
        }))
    }

    /// In the queue before it returns; nothing of it, if what is there already supersedes all of it.
    fn write(
        self: &Rc<Self>,
        envelope: &Envelope,
        (first, version): (BlockIndex, Version),
        checksums: Checksums,
        payload: &Bytes,
        durable: bool,
    ) -> Result<Few<Waiting>, Refusal> {
        check_range(first, checksums.len() as u64)?;
        let expected = checksums.len() as u64 * BLOCK_BYTES;
        if payload.len() as u64 != expected {
            return Err(malformed(format!("payload of {} bytes, expected {expected}", payload.len())));
        }
        check_version(envelope, version)?;
        self.check_block(envelope, first)?;
        for ((block, bytes), expected) in (first.0..).zip(payload.chunks(BLOCK_BYTES as usize)).zip(&checksums) {
            let found = crc32c::crc32c(bytes);
            if found != *expected {
                self.state.borrow_mut().statistics.checksum_errors += 1;
                return Err(Refusal::Corrupt { block: BlockIndex(block), found, expected: *expected });
            }
        }
        let blocks = first.0..first.0 + checksums.len() as u64;
        self.state.borrow().check_not_revoked(envelope.volume, blocks.clone(), version)?;
        let flush_point = self.state.borrow().flush_point(envelope.volume);
        // Its place is known when its batch is made.
        let position = Position(0);
        let data = Data { volume: envelope.volume, first, version, flush_point, position, checksums };
        self.state.borrow_mut().statistics.writes += 1;
        let alive = self.state.borrow().alive_runs(envelope.volume, blocks.clone(), version);
        if alive.len() == 1 && alive[0] == (0..data.checksums.len()) {
            return Ok([self.submit_data(data, payload.clone(), durable)?].into());
        }
        let parts = alive.into_iter().map(|run| {
            let (first, checksums) = (BlockIndex(first.0 + run.start as u64), data.checksums[run.clone()].into());
            let part = Data { first, checksums, ..data.clone() };
            let payload = payload.slice(run.start * BLOCK..run.end * BLOCK);
            self.submit_data(part, payload, durable)
        });
        parts.collect()
    }

    /// Batches may have been written so, or a sync have come along. Refused by a shard that has failed: what a sync
    /// did not get to the disk may be gone for a write beside it too.
    fn is_all_durable(&self) -> Result<bool, Refusal> {
        let state = self.state.borrow();
        state.check_alive()?;
        Ok(state.queue.is_all_durable())
    }

    fn submit_data(self: &Rc<Self>, data: Data, payload: Bytes, durable: bool) -> Result<Waiting, Refusal> {
        match durable {
            true => self.submit_durable(Record::Data(data), payload),
            false => self.submit(Need::Data, Record::Data(data), payload, None),
        }
    }

    async fn clear(
        self: &Rc<Self>,
        envelope: &Envelope,
        first: BlockIndex,
        count: u64,
        slice: SliceId,
        version: Version,
    ) -> Result<Span, Refusal> {
        if count == 0 || first.0.checked_add(count).is_none_or(|end| end > VOLUME_BLOCKS_MAX) {
            return Err(malformed(format!("{count} blocks from {first}, a volume has at most {VOLUME_BLOCKS_MAX}")));
        }
        check_version(envelope, version)?;
        self.check(envelope, Some(slice))?;
        self.state.borrow().check_not_revoked(envelope.volume, first.0..first.0 + count, version)?;
        let flush_point = self.state.borrow().flush_point(envelope.volume);
        let clear = Clear { volume: envelope.volume, first, version, flush_point, slice, count };
        self.state.borrow_mut().statistics.clears += 1;
        self.append(Need::Note, Record::Clear(clear), Bytes::new()).await
    }

    fn describe(
        &self,
        envelope: &Envelope,
        above: Version,
        from: BlockIndex,
        slice: Option<SliceId>,
    ) -> Result<Answer, Refusal> {
        self.check(envelope, slice)?;
        if from.0 > VOLUME_BLOCKS_MAX {
            return Err(malformed(format!("from block {from}, a volume has at most {VOLUME_BLOCKS_MAX}")));
        }
        let state = self.state.borrow();
        let contents = &state.contents;
        let layout = contents.volumes.get(&envelope.volume).and_then(|volume| volume.layout.as_ref());
        let placement = &layout.ok_or(Refusal::NotOpen)?.placement;
        let limit = DESCRIPTORS_PER_REPLY_MAX;
        let (descriptors, next) = contents.index.describe(envelope.volume, above, from, (placement, slice), limit);
        Ok(Answer::Described { descriptors, next })
    }
}

impl State {
    /// Those of the record's instances that are not there yet; `None`: all are.
    fn missing_of(&self, record: &Instances) -> Result<Option<Instances>, Refusal> {
        let Some(volume) = self.contents.volumes.get(&record.volume) else { return Ok(Some(record.clone())) };
        if let Some(layout) = &volume.layout {
            let (found, expected) =
                ((record.placement, record.width, record.ring_slices), (layout.id, layout.width, layout.ring_slices));
            if found != expected {
                return Err(malformed(format!("placement, width and slices are {found:?}, known as {expected:?}")));
            }
        }
        let missing = |slice: &SliceId| !volume.holds(*slice, record.generation, self.lost_below);
        let slices: Vec<SliceId> = record.slices.iter().copied().filter(missing).collect();
        Ok((!slices.is_empty()).then(|| Instances { slices, ..record.clone() }))
    }

    /// `None`: the shard holds nothing of the volume, so there is nothing to open.
    fn begin_open(&mut self, envelope: &Envelope, token: Token) -> Result<Option<Session>, Refusal> {
        let epoch = envelope.epoch;
        let volume = self.contents.volumes.get_mut(&envelope.volume).filter(|volume| volume.layout.is_some());
        let Some(volume) = volume else { return Ok(None) };
        let same_writer = epoch == volume.epoch && volume.token.is_some_and(|known| known == token);
        if epoch < volume.epoch || (epoch == volume.epoch && !same_writer) {
            return Err(Refusal::StaleEpoch { replica: volume.epoch });
        }
        // Its writer opened it in this epoch already, in another incarnation: whether what that lost was replayed by
        // the time somebody asks is not known here.
        let restarted = match volume.session {
            Some(session) => session.epoch == epoch && session.restarted,
            None => volume.epoch == epoch,
        };
        let open_in_previous_epoch = match volume.session {
            Some(session) if session.epoch == epoch => session.open_in_previous_epoch,
            Some(session) => session.epoch.0.checked_add(1) == Some(epoch.0) && !session.restarted,
            None => false,
        };
        volume.epoch = epoch;
        volume.token = Some(token);
        Ok(Some(Session { epoch, generation: envelope.generation, open_in_previous_epoch, restarted }))
    }
}

/// From when the disk began with the first of them until it was done with the last.
async fn all_done(parts: Few<Waiting>) -> Result<Option<Span>, Refusal> {
    let mut disk: Option<Span> = None;
    for part in parts {
        disk = Some(part.done().await?.and(disk));
    }
    Ok(disk)
}

fn new_instances(
    envelope: &Envelope,
    placement: VolumeId,
    width: u32,
    ring_slices: u32,
    slices: Vec<SliceId>,
) -> Result<Instances, Refusal> {
    let (volume, generation) = (envelope.volume, envelope.generation);
    let fits = width.is_power_of_two() && ring_slices.is_power_of_two() && width <= ring_slices;
    if !fits || ring_slices > SLICES_MAX {
        return Err(malformed(format!(
            "width {width} of {ring_slices} slices, expected powers of two up to {SLICES_MAX}"
        )));
    }
    if slices.is_empty() || slices.iter().any(|slice| slice.0 >= ring_slices) {
        return Err(malformed(format!("slices {slices:?}, expected some below {ring_slices}")));
    }
    let created = crate::log::BatchNumber(0);
    Ok(Instances { volume, placement, generation, created, width, ring_slices, slices })
}

/// At least one block, at most a frame of them, all in one extent.
pub(super) fn check_range(first: BlockIndex, count: u64) -> Result<(), Refusal> {
    check_range_of(first, count, BLOCKS_PER_FRAME_MAX)
}

/// `limit`: blocks at most.
pub(super) fn check_range_of(first: BlockIndex, count: u64, limit: u64) -> Result<(), Refusal> {
    let sized = (1..=limit).contains(&count) && first.0 < VOLUME_BLOCKS_MAX;
    if sized && first.extent() == BlockIndex(first.0 + count - 1).extent() {
        return Ok(());
    }
    Err(malformed(format!(
        "{count} blocks from {first}, expected 1 to {limit} within one extent below {VOLUME_BLOCKS_MAX}"
    )))
}

/// Of this epoch or, when a new writer reconciles, an earlier one.
fn check_version(envelope: &Envelope, version: Version) -> Result<(), Refusal> {
    let known = version > Version::ZERO && version.epoch <= envelope.epoch && version.sequence <= SEQUENCE_MAX;
    let refusal = || malformed(format!("version {version} in epoch {}", envelope.epoch));
    if known { Ok(()) } else { Err(refusal()) }
}
