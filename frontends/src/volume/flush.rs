//! Flush: an fdatasync on every in-sync shard that has answered a write since its last one, then the flush point moves
//! (protocol rule 8).

use super::replicas::ShardPosition;
use super::session::Session;
use crate::device::VolumeError;
use bytes::Bytes;
use std::rc::Rc;
use torus_rpc::message::Operation;
use torus_rpc::runtime::{Class, Runtime, Spawn};
use torus_schema::ids::Version;

impl<R: Runtime> Session<R> {
    /// Everything answered before the call is durable after it.
    pub async fn flush(self: &Rc<Self>) -> Result<(), VolumeError> {
        self.check()?;
        // Taken now: what is settled later may not be covered by what follows (interleaving 4).
        let settled = self.window.borrow().settled_through();
        self.unflushed_bytes.set(0);
        let dirty: Vec<_> = (0..self.shards.len()).filter(|shard| self.is_dirty(*shard)).collect();
        let flushes = dirty.into_iter().map(|shard| self.flush_shard(shard));
        for flushed in futures::future::join_all(flushes).await {
            flushed?;
        }
        self.check()?;
        let flushed = Version::new(self.epoch, settled);
        self.flush_point.set(self.flush_point.get().max(flushed));
        self.tell_retention_if_due();
        Ok(())
    }

    /// In the background, one at a time.
    pub fn flush_soon(self: &Rc<Self>) {
        if self.flushing.replace(true) {
            return;
        }
        let session = self.clone();
        self.runtime.spawn().spawn(Class::Background, async move {
            if let Err(error) = session.flush().await {
                tracing::warn!(volume = %session.record.name, %error, "flush of its own failed");
            }
            session.flushing.set(false);
        });
    }

    fn is_dirty(&self, shard: ShardPosition) -> bool {
        let state = &self.shards[shard];
        state.written.get() != state.synced.get() && self.replicas.borrow().holds_in_sync(shard)
    }

    async fn flush_shard(self: &Rc<Self>, position: ShardPosition) -> Result<(), VolumeError> {
        let shard = &self.shards[position];
        // A write that is answered meanwhile leaves the shard dirty (interleaving 9).
        let covered = shard.written.get();
        let required = || self.replicas.borrow().holds_in_sync(position);
        if self.require(position, required, &Operation::Flush, &Bytes::new()).await?.is_some() {
            shard.synced.set(shard.synced.get().max(covered));
        }
        Ok(())
    }
}
