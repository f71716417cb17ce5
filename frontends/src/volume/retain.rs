//! What the shards are told to keep though something newer stands above it (protocol rule 14). Until they are told, they
//! free nothing.
//!
//! What was superseded at or below F may go, since there are no snapshots. A clear may go only if no replica lacks it:
//! one that missed it would bring back what it hid. Replicas become stale at `since` = F as it is then, and the others
//! hear of it later, while F moves on and reaches them with every frame. So what they are told bounds clears by F as it
//! was when it was said (or the lowest `since` there is): F never falls, so whatever `since` a replica gets later is at
//! or above all that was ever said, and the others have thrown away only clears at or below it. That holds for any two
//! of these messages in any order, and for one that is lost. While a replica is being marked, `since` is decided and
//! not yet listed; then it bounds what is said like one that is (`StatusKeeper::pending_since`).

use super::course::Course;
use super::session::Session;
use crate::device::VolumeError;
use bytes::Bytes;
use std::cell::Cell;
use std::rc::Rc;
use torus_rpc::message::{Operation, Retention};
use torus_rpc::runtime::{Class, Clock, Instant, Runtime, Spawn};
use torus_schema::ids::Version;
use torus_schema::limits::{RETAIN_INTERVAL, SEQUENCE_MAX};

#[derive(Default)]
pub(super) struct Retaining {
    /// Cleared something since the shards were last told.
    pub cleared: Cell<bool>,
    told: Cell<Instant>,
    running: Cell<bool>,
    again: Cell<bool>,
}

impl<R: Runtime> Session<R> {
    fn retention(&self) -> Retention {
        let listed = self.replicas.borrow().lowest_since();
        let pending = self.status.pending_since.get();
        let since = [listed, pending].into_iter().flatten().fold(self.flush_point.get(), Version::min);
        Retention {
            horizon: Version::new(self.epoch, SEQUENCE_MAX),
            pins: Vec::new(),
            stale_since: Some(since),
            status_changes: self.status.changes.get(),
        }
    }

    /// Durable on every shard that is required when it returns.
    pub async fn tell_retention(self: &Rc<Self>) -> Result<(), VolumeError> {
        self.retaining.cleared.set(false);
        self.retaining.told.set(self.runtime.clock().now());
        let retention = self.retention();
        let changes = retention.status_changes;
        let operation = Operation::Retain(retention);
        let told = (0..self.shards.len()).map(|position| {
            let operation = &operation;
            async move {
                let required = || self.replicas.borrow().requires(position);
                self.require(position, required, operation, &Bytes::new(), &Course::default()).await
            }
        });
        for told in futures::future::join_all(told).await {
            told?;
        }
        self.status.told.set(self.status.told.get().max(changes));
        self.changed.notify();
        Ok(())
    }

    /// One at a time. What is to be acknowledged may wait for it, so it has a foreground's share.
    ///
    /// An attach that is not yet done with what the last writer left tells them itself at its end. It must be alone until
    /// then: to be told, a shard that restarted would be opened again beside it, which knows nothing of the last
    /// writer's records and would let it count as one that still has those it was asked for in its former life.
    pub fn tell_retention_soon(self: &Rc<Self>) {
        if self.flush_point.get().epoch != self.epoch {
            return;
        }
        self.retaining.again.set(true);
        if self.retaining.running.replace(true) {
            return;
        }
        let session = self.clone();
        self.runtime.spawn().spawn(Class::Foreground, async move {
            while session.retaining.again.replace(false) && session.check().is_ok() {
                if let Err(error) = session.tell_retention().await {
                    tracing::warn!(volume = %session.record.name, %error, "the shards keep more than they need");
                }
            }
            session.retaining.running.set(false);
        });
    }

    /// F has moved: clears that it covers can go.
    pub fn tell_retention_if_due(self: &Rc<Self>) {
        let full = self.shards.iter().any(|shard| shard.full.get());
        let waited = self.runtime.clock().now().since(self.retaining.told.get());
        if self.retaining.cleared.get() && (full || waited >= RETAIN_INTERVAL) {
            self.tell_retention_soon();
        }
    }
}
