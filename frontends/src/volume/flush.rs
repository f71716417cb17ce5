//! Flush: an fdatasync on every shard with replicas in sync or on their way back that has answered a write since its last one, then the flush point moves
//! (protocol rule 8).

use super::course::Course;
use super::replay::Flushable;
use super::replicas::{ShardPosition, Shards};
use super::session::Session;
use super::writer::all;
use crate::device::VolumeError;
use bytes::Bytes;
use std::rc::Rc;
use torus_rpc::message::Operation;
use torus_rpc::runtime::{Class, Runtime, Spawn};
use torus_schema::ids::Version;

impl<R: Runtime> Session<R> {
    /// Everything answered before the call is durable after it.
    pub async fn flush(self: &Rc<Self>) -> Result<(), VolumeError> {
        self.flush_for(&Course::default()).await
    }

    pub async fn flush_for(self: &Rc<Self>, course: &Course) -> Result<(), VolumeError> {
        self.check()?;
        // Taken now: what is settled later may not be covered by what follows (interleaving 4).
        let settled = self.window.borrow().settled_through();
        let dirty: Shards = (0..self.shards.len()).filter(|shard| self.is_dirty(*shard)).collect();
        all(dirty.into_iter().map(|shard| self.flush_shard(shard, course))).await?;
        self.status_told().await?;
        self.check()?;
        let flushed = Version::new(self.epoch, settled);
        self.flush_point.set(self.flush_point.get().max(flushed));
        self.replay.borrow_mut().release_through(settled);
        self.tell_retention_if_due();
        Ok(())
    }

    /// In the background, one at a time.
    pub fn flush_soon(self: &Rc<Self>) {
        self.clone().flush_by_itself();
    }

    /// Flushes if that would make room which this volume, or all of them together, should soon have.
    pub fn relieve(self: &Rc<Self>) {
        let budget = {
            let replay = self.replay.borrow();
            // However many others are stuck in a flush: who waits for room here needs this one.
            let needed = replay.is_half_full() || self.short_of_room.get() > 0;
            if needed && self.oldest_releasable().is_some() {
                drop(replay);
                return self.clone().flush_by_itself();
            }
            replay.budget()
        };
        budget.relieve();
    }

    /// A flush would ask no shard.
    pub fn is_flushed(&self) -> bool {
        !(0..self.shards.len()).any(|shard| self.is_dirty(shard))
    }

    fn is_dirty(&self, shard: ShardPosition) -> bool {
        let state = &self.shards[shard];
        state.written.get() != state.synced.get() && self.replicas.borrow().requires(shard)
    }

    async fn flush_shard(self: &Rc<Self>, position: ShardPosition, course: &Course) -> Result<(), VolumeError> {
        let shard = &self.shards[position];
        // A write that is answered meanwhile leaves the shard dirty (interleaving 9).
        let covered = shard.written.get();
        let required = || self.replicas.borrow().requires(position);
        if self.require(position, required, &Operation::Flush, &Bytes::new(), course).await? {
            shard.synced.set(shard.synced.get().max(covered));
        }
        Ok(())
    }
}

impl<R: Runtime> Flushable for Session<R> {
    fn oldest_releasable(&self) -> Option<u64> {
        if self.flushing_itself.get() {
            return None;
        }
        self.replay.borrow().oldest_releasable(self.window.borrow().settled_through())
    }

    fn flush_by_itself(self: Rc<Self>) {
        if self.flushing_itself.replace(true) {
            return;
        }
        let budget = self.replay.borrow().budget();
        budget.flushing.set(budget.flushing.get() + 1);
        let spawn = self.runtime.spawn().clone();
        spawn.spawn(Class::Background, async move {
            let flushed = self.flush().await;
            self.flushing_itself.set(false);
            budget.flushing.set(budget.flushing.get() - 1);
            if let Err(error) = flushed {
                tracing::warn!(volume = %self.record.name, %error, "flush of its own failed");
            }
            // What was written meanwhile, here or elsewhere, may be too much again.
            self.relieve();
        });
    }
}
