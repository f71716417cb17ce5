//! Marking replicas stale: one compare-and-set of one value for all that failed by then, before any write they missed
//! is acknowledged (protocol rule 10). `marking` carries it out.
//!
//! `since` is the volume's flush point, never a mark of the replica's own progress (interleaving 2). While the outcome
//! of the transaction is unknown it counts as not happened for acknowledgements, and as happened for a replica that is
//! to be in sync: it is still required, and not read from.
//!
//! A replica that was merely away, and is back with all it should have before the transaction took place, is taken off
//! again (`withdraw`): until then it is required, so that it has everything that was answered, and whoever else may
//! have been let in by a transaction of unknown outcome finds what was answered on the others too. The reads that have
//! to be confirmed ask all that are in sync, so that one of them is of those that whoever was let in has opened.

use super::marking;
use super::replicas::{BelowMinimum, ShardPosition};
use super::session::Session;
use crate::device::VolumeError;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use torus_rpc::metadata::Revision;
use torus_rpc::runtime::{Class, Runtime, Spawn};
use torus_schema::ids::{NodeNumber, SliceId, Version};
use torus_schema::records::StatusRecord;

/// What this session knows of its keys in the metadata store.
pub(super) struct StatusKeeper {
    /// Of the owner key: it is ours as long as it was created by this.
    pub owner_revision: Cell<Revision>,
    /// The lease our owner key hangs on, as `ProcessLease` counts them.
    pub owner_lease: Cell<u64>,
    /// Our owner key is gone and is being taken again, or found to be another's.
    pub owning_again: Cell<bool>,
    /// Of the epoch, as our attach wrote it.
    pub epoch_revision: Revision,
    /// How often the status was changed, as far as we know, and as far as every in-sync replica was told.
    pub changes: Cell<u64>,
    pub told: Cell<u64>,
    /// Of the volume's record.
    pub volume_revision: Cell<Revision>,
    /// Of the status, if there is one.
    pub status_revision: Cell<Option<Revision>>,
    pub failed: RefCell<BTreeSet<(ShardPosition, Loss)>>,
    /// Those that could not be marked, and why.
    pub refused: RefCell<Vec<(ShardPosition, Loss, BelowMinimum)>>,
    /// Those that were away and are back before they were marked.
    pub withdrawn: RefCell<BTreeSet<ShardPosition>>,
    pub running: Cell<bool>,
    /// Whose resync has come to its end.
    pub finished: RefCell<BTreeSet<ShardPosition>>,
    /// Stale replicas that turned out to have nothing of these slices.
    pub distrusted: RefCell<BTreeMap<ShardPosition, Vec<SliceId>>>,
    /// When each node's replicas began to be stale, as the status says.
    pub stale_s: RefCell<BTreeMap<NodeNumber, u64>>,
    /// The mark of replicas that are being made stale, not yet listed; see `retain`.
    pub pending_since: Cell<Option<Version>>,
}

/// Why a replica has to go stale, those that lose least by it first: when not all may, who has lost something goes
/// before who is merely away and may alone have what the others lost.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Loss {
    /// It never had these slices, or lost them whole: stale since zero (interleaving 14). Others it keeps.
    Missing(Vec<SliceId>),
    /// What it holds cannot be trusted.
    Lost,
    /// It restarted, and cannot be reached to replay to it what it lost.
    Restarted,
    Unreachable,
}

impl Loss {
    /// It may turn out to lack nothing, so that it need not go stale.
    pub(super) fn may_be_mended(&self) -> bool {
        matches!(self, Loss::Restarted | Loss::Unreachable)
    }
}

impl<R: Runtime> Session<R> {
    /// Returns once the shard has no in-sync replica left (or the session ended); an error if it must keep them.
    pub async fn mark_stale(self: &Rc<Self>, position: ShardPosition, loss: Loss) -> Result<(), BelowMinimum> {
        let missing = match &loss {
            Loss::Missing(slices) => Some(slices.clone()),
            _ => None,
        };
        let ours = |(refused, why, _): &&(ShardPosition, Loss, BelowMinimum)| *refused == position && *why == loss;
        self.status.refused.borrow_mut().retain(|refused| !ours(&refused));
        self.status.withdrawn.borrow_mut().remove(&position);
        self.status.failed.borrow_mut().insert((position, loss.clone()));
        self.status_soon();
        let still_in_sync = || {
            let in_sync = self.replicas.borrow().slices_in_sync_on(position);
            in_sync.iter().any(|slice| missing.as_ref().is_none_or(|missing| missing.contains(slice)))
        };
        self.changed
            .until(|| {
                if self.ended.borrow().is_some() || !still_in_sync() {
                    return Some(Ok(()));
                }
                self.status.refused.borrow().iter().find(ours).map(|(_, _, below)| Err(*below))
            })
            .await
    }

    /// The shard is back, with everything that was answered: what only said that it was away no longer holds.
    pub fn withdraw(&self, position: ShardPosition) {
        let mends = |(failed, loss): &(ShardPosition, Loss)| *failed == position && loss.may_be_mended();
        self.status.failed.borrow_mut().retain(|failed| !mends(failed));
        self.status.withdrawn.borrow_mut().insert(position);
        self.changed.notify();
    }

    /// What is syncing there is in sync when it returns, or was given up before that was stored (false).
    pub async fn mark_in_sync(self: &Rc<Self>, position: ShardPosition) -> bool {
        self.status.finished.borrow_mut().insert(position);
        self.status_soon();
        let done = || {
            let replicas = self.replicas.borrow();
            let over = !replicas.is_syncing(position) && !replicas.is_finishing(position);
            (over || self.ended.borrow().is_some()).then(|| replicas.holds_in_sync(position))
        };
        self.changed.until(done).await
    }

    /// These slices of the shard, stale already, are so since zero when it returns; false: the session ended.
    pub async fn distrust(self: &Rc<Self>, position: ShardPosition, slices: Vec<SliceId>) -> bool {
        self.status.distrusted.borrow_mut().insert(position, slices.clone());
        self.status_soon();
        let done = || {
            let listed = self.replicas.borrow().listed(position);
            let mut all = listed.iter().filter(|(_, slice, _)| slices.contains(slice));
            let ended = self.ended.borrow().is_some();
            (ended || all.all(|(_, _, since)| *since == Version::ZERO)).then_some(!ended)
        };
        self.changed.until(done).await
    }

    fn status_soon(self: &Rc<Self>) {
        if !self.status.running.replace(true) {
            self.runtime.spawn().spawn(Class::Foreground, marking::keep_status(self.clone()));
        }
    }

    /// Before anything is acknowledged that a replica lacks, the others have to remember that there was a change: a
    /// metadata store restored from an older backup knows nothing of it (interleaving 27).
    pub async fn status_told(&self) -> Result<(), VolumeError> {
        let told = || self.status.told.get() >= self.status.changes.get();
        if told() {
            return Ok(());
        }
        self.changed.until(|| (self.ended.borrow().is_some() || told()).then_some(())).await;
        self.check()
    }
}

/// The times in a status that was read.
pub(super) fn times_in(status: &StatusRecord) -> BTreeMap<NodeNumber, u64> {
    status.stale.iter().map(|stale| (stale.node, stale.stale_s)).collect()
}
