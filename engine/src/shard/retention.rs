//! What a writer says of the past of its volume: what of it has to be kept (protocol rule 14), what of it never was
//! (rule 11), and, of the present, where it has data at all.

use super::queue::Need;
use super::reads::runs_of;
use super::requests::{VOLUME_BLOCKS_MAX, check_range_of, malformed};
use super::{Shard, State};
use crate::index::Place;
use crate::log::record::{self, Record};
use bytes::Bytes;
use std::ops::Range;
use std::rc::Rc;
use torus_rpc::message::{Answer, Envelope, Few, Refusal, Retention, Revoked};
use torus_rpc::runtime::Runtime;
use torus_schema::ids::{BlockIndex, Version, VolumeId};
use torus_schema::limits::{BLOCKS_PER_EXTENT, PINS_MAX, REVOKED_PER_RECORD_MAX, SEQUENCE_MAX};

impl<R: Runtime> Shard<R> {
    /// Durable before it is answered: whoever marks a replica stale next counts on it.
    pub(super) async fn retain(self: &Rc<Self>, envelope: &Envelope, retention: Retention) -> Result<Answer, Refusal> {
        self.check(envelope, None)?;
        check_retention(envelope, &retention)?;
        let retain = {
            let state = &mut *self.state.borrow_mut();
            let volume = state.contents.volumes.get_mut(&envelope.volume).ok_or(Refusal::NotOpen)?;
            // A message that was long under way must not take back what a later one said.
            volume.status_changes = volume.status_changes.max(retention.status_changes);
            let retention = Retention { status_changes: volume.status_changes, ..retention };
            let known = volume.retained.as_ref().map_or(0, |retained| retained.order);
            volume.order_drawn = volume.order_drawn.max(known) + 1;
            let (order, flush_point) = (volume.order_drawn, volume.flush_point);
            record::Retain { volume: envelope.volume, flush_point, epoch: envelope.epoch, order, retention }
        };
        self.append(Need::Note, Record::Retain(retain), Bytes::new()).await?;
        self.sync_after_now().await?;
        Ok(Answer::Retained)
    }

    pub(super) async fn revoke(self: &Rc<Self>, envelope: &Envelope, revoked: Vec<Revoked>) -> Result<Answer, Refusal> {
        self.check(envelope, None)?;
        for Revoked { block, version } in &revoked {
            if block.0 >= VOLUME_BLOCKS_MAX {
                return Err(malformed(format!("block {block}, a volume has at most {VOLUME_BLOCKS_MAX}")));
            }
            check_known(envelope, *version, "revoked version")?;
            self.check_block(envelope, *block)?;
        }
        let new: Vec<Revoked> = {
            let contents = &self.state.borrow().contents;
            let known = |revoked: &Revoked| contents.is_revoked(envelope.volume, revoked.block, revoked.version);
            revoked.into_iter().filter(|revoked| !known(revoked)).collect()
        };
        let mut waiting = Vec::new();
        for revoked in new.chunks(REVOKED_PER_RECORD_MAX) {
            let revoke = record::Revoke { volume: envelope.volume, revoked: revoked.to_vec() };
            waiting.push(self.submit(Need::Note, Record::Revoke(revoke), Bytes::new(), None)?);
        }
        for waiting in waiting {
            waiting.done().await?;
        }
        self.sync_after_now().await?;
        Ok(Answer::Revoked)
    }

    pub(super) fn map(&self, envelope: &Envelope, first: BlockIndex, count: u32) -> Result<Answer, Refusal> {
        // Without payload, so that the frame's limit does not hold.
        check_range_of(first, u64::from(count), BLOCKS_PER_EXTENT)?;
        let slice = self.check_block(envelope, first)?;
        let place = Place { volume: envelope.volume, slice, block: first };
        let found = self.state.borrow().contents.index.find_range(place, count);
        Ok(Answer::Mapped { runs: runs_of(&found) })
    }
}

impl State {
    /// A version that was taken back never comes again.
    pub(super) fn check_not_revoked(
        &self,
        volume: VolumeId,
        blocks: Range<u64>,
        version: Version,
    ) -> Result<(), Refusal> {
        match self.contents.first_revoked(volume, blocks, version) {
            Some(block) => Err(malformed(format!("version {version} of block {block} was revoked"))),
            None => Ok(()),
        }
    }

    /// Of a write: the parts that would not be garbage from the start. What a flushed clear hides is not appended any
    /// more, so that the clear can go when all that was appended before it is gone.
    pub(super) fn alive_runs(&self, volume: VolumeId, blocks: Range<u64>, version: Version) -> Few<Range<usize>> {
        let mut runs = Few::<Range<usize>>::new();
        for (at, block) in blocks.map(BlockIndex).enumerate() {
            if self.contents.is_dead_on_arrival(self.contents.place_of(volume, block), version) {
                continue;
            }
            match runs.last_mut() {
                Some(run) if run.end == at => run.end += 1,
                _ => runs.push(at..at + 1),
            }
        }
        runs
    }
}

fn check_retention(envelope: &Envelope, retention: &Retention) -> Result<(), Refusal> {
    let Retention { horizon, pins, stale_since, .. } = retention;
    if pins.len() > PINS_MAX {
        return Err(malformed(format!("{} pins, expected at most {PINS_MAX}", pins.len())));
    }
    if !pins.is_sorted() {
        return Err(malformed("pins that do not ascend"));
    }
    check_known(envelope, *horizon, "horizon")?;
    pins.iter().chain(stale_since).try_for_each(|version| check_known(envelope, *version, "pin or stale mark"))
}

fn check_known(envelope: &Envelope, version: Version, what: &str) -> Result<(), Refusal> {
    if version.epoch <= envelope.epoch && version.sequence <= SEQUENCE_MAX {
        return Ok(());
    }
    Err(malformed(format!("{what} {version} in epoch {}", envelope.epoch)))
}
