//! Marking replicas stale: one compare-and-set of one value for all that failed by then, before any write they missed
//! is acknowledged (protocol rule 10).
//!
//! `since` is the volume's flush point, never a mark of the replica's own progress (interleaving 2). While the outcome
//! of the transaction is unknown it counts as not happened for acknowledgements, and as happened for a replica that is
//! to be in sync: it is still required, and not read from.

use super::replicas::{BelowMinimum, Replicas, ShardPosition};
use super::session::Session;
use crate::device::VolumeError;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::metadata::{Compare, Entry, Metadata, MetadataError, Revision, Transaction, Write};
use torus_rpc::runtime::{Class, Clock, Random, Runtime, Spawn};
use torus_schema::ids::{NodeNumber, SliceId, Version};
use torus_schema::limits::MARK_JITTER;
use torus_schema::records::{StatusRecord, encode, keys};

const RETRY_AFTER: Duration = Duration::from_millis(200);

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
    pub failed: RefCell<BTreeMap<ShardPosition, Loss>>,
    /// Those that could not be marked, and why.
    pub refused: RefCell<Vec<(ShardPosition, BelowMinimum)>>,
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

impl<R: Runtime> Session<R> {
    /// Returns once the shard has no in-sync replica left (or the session ended); an error if it must keep them.
    pub async fn mark_stale(self: &Rc<Self>, position: ShardPosition, loss: Loss) -> Result<(), BelowMinimum> {
        let missing = match &loss {
            Loss::Missing(slices) => Some(slices.clone()),
            _ => None,
        };
        self.status.refused.borrow_mut().retain(|(refused, _)| *refused != position);
        self.status.failed.borrow_mut().insert(position, loss);
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
                let refused = self.status.refused.borrow();
                refused.iter().find(|(refused, _)| *refused == position).map(|(_, below)| Err(*below))
            })
            .await
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
            self.runtime.spawn().spawn(Class::Foreground, keep_status(self.clone()));
        }
    }

    /// Replicas whose resync is over and that did not fail since. From here on they are no longer given up in silence.
    fn finishing(&self, failed: &BTreeMap<ShardPosition, Loss>) -> BTreeSet<ShardPosition> {
        let mut finished = self.status.finished.take();
        let mut replicas = self.replicas.borrow_mut();
        finished.retain(|position| replicas.is_syncing(*position));
        for position in &finished {
            match failed.contains_key(position) {
                true => replicas.abort_sync(*position),
                false => replicas.finish_sync(*position),
            }
        }
        finished.retain(|position| !failed.contains_key(position));
        finished
    }
}

impl<R: Runtime> Session<R> {
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

/// Runs as long as there is something about replicas to be stored.
async fn keep_status<R: Runtime>(session: Rc<Session<R>>) {
    loop {
        // Of a thousand volumes that lost the same node, some at a time; what fails meanwhile goes with it.
        let crowded = session.marking.is_taken(0);
        let turn = session.marking.take(0).await;
        if crowded {
            let jitter_us = session.runtime.random().u64() % MARK_JITTER.as_micros() as u64;
            session.runtime.clock().sleep(Duration::from_micros(jitter_us)).await;
        }
        let failed = session.status.failed.take();
        let finished = session.finishing(&failed);
        let distrusted = session.status.distrusted.take();
        let nothing = failed.is_empty() && finished.is_empty() && distrusted.is_empty();
        if nothing || session.ended.borrow().is_some() {
            break;
        }
        session.status.pending_since.set(Some(session.flush_point.get()));
        let (mut next, lost) = without(&session, failed);
        next.sync_finishing();
        distrusted.iter().for_each(|(shard, slices)| next.distrust(*shard, slices));
        let changes = !lost.is_empty() || !finished.is_empty() || !distrusted.is_empty();
        if changes && store_status(&session, &next.to_status()).await {
            for shard in &lost {
                tracing::warn!(volume = %session.record.name, shard = %session.shards[*shard].id,
                    since = %session.flush_point.get(), "replica marked stale");
            }
            session.counters.replicas_marked_stale.add(lost.len() as u64);
            for shard in &finished {
                tracing::info!(volume = %session.record.name, shard = %session.shards[*shard].id, "replica in sync");
            }
            session.replicas.borrow_mut().adopt(&next);
            session.tell_retention_soon();
        }
        drop(turn);
        session.status.pending_since.set(None);
        session.changed.notify();
    }
    session.status.running.set(false);
}

/// For attach, which has nothing else under way: these are the replicas from now on, unless the session ended.
pub(super) async fn replace<R: Runtime>(session: &Rc<Session<R>>, next: Replicas) {
    if store_status(session, &next.to_status()).await {
        *session.replicas.borrow_mut() = next;
    }
}

/// The replicas without as many of the failed shards as the minimum allows.
fn without<R: Runtime>(
    session: &Session<R>,
    failed: BTreeMap<ShardPosition, Loss>,
) -> (Replicas, BTreeSet<ShardPosition>) {
    let restarted = |shard: &ShardPosition| session.shards[*shard].restarted.get();
    let restarted: BTreeSet<_> = (0..session.shards.len()).filter(restarted).collect();
    let since = session.flush_point.get();
    let (next, lost, refused) = lose_in_order(&session.replicas.borrow(), failed, &restarted, since);
    session.status.refused.borrow_mut().extend(refused);
    (next, lost)
}

/// `restarted`: shards that may have to be given up yet. One that is merely unreachable is kept as long as they could
/// not both go.
fn lose_in_order(
    replicas: &Replicas,
    failed: BTreeMap<ShardPosition, Loss>,
    restarted: &BTreeSet<ShardPosition>,
    since: Version,
) -> (Replicas, BTreeSet<ShardPosition>, Vec<(ShardPosition, BelowMinimum)>) {
    let (mut next, mut lost, mut refused) = (replicas.clone(), BTreeSet::new(), Vec::new());
    let mut failed: Vec<_> = failed.into_iter().filter(|(shard, _)| replicas.holds_in_sync(*shard)).collect();
    failed.sort_by(|(_, a), (_, b)| a.cmp(b));
    for (shard, loss) in failed {
        let mut without = next.clone();
        let losing = match &loss {
            Loss::Missing(slices) => without.lose_slices(shard, slices),
            Loss::Lost | Loss::Restarted => without.lose(&BTreeSet::from([shard]), since),
            Loss::Unreachable => {
                let with_restarted = restarted.iter().copied().chain([shard]).collect();
                let both = next.clone().lose(&with_restarted, since);
                both.and_then(|()| without.lose(&BTreeSet::from([shard]), since))
            }
        };
        match losing {
            Ok(()) => {
                lost.insert(shard);
                next = without;
            }
            Err(below) => refused.push((shard, below)),
        }
    }
    (next, lost, refused)
}

/// Tries until the outcome is known; false: the session ended.
async fn store_status<R: Runtime>(session: &Rc<Session<R>>, status: &StatusRecord) -> bool {
    let id = session.record.id;
    let (owner, key, volume) = (keys::owner(id), keys::status(id), keys::volume(id));
    let changes = session.status.changes.get() + 1;
    let value = encode(&StatusRecord { changes, ..dated(session, status) });
    loop {
        if session.ended.borrow().is_some() {
            return false;
        }
        let revision = session.status.status_revision.get();
        let unchanged = match revision {
            Some(revision) => Compare::ModRevision(key.clone(), revision),
            None => Compare::Absent(key.clone()),
        };
        let transaction = Transaction {
            compares: vec![
                Compare::CreateRevision(owner.clone(), session.status.owner_revision.get()),
                Compare::ModRevision(volume.clone(), session.status.volume_revision.get()),
                unchanged,
            ],
            writes: vec![Write::Put { key: key.clone(), value: value.clone(), lease: None }],
            reads: vec![owner.clone(), key.clone(), volume.clone()],
        };
        session.counters.status_transactions.add(1);
        match session.runtime.metadata().transact(transaction).await {
            Ok(result) if result.applied => {
                session.status.status_revision.set(Some(result.revision));
                session.status.changes.set(changes);
                return true;
            }
            Ok(result) => match settle(session, &value, &result.reads) {
                Settled::Applied => {
                    session.status.changes.set(changes);
                    return true;
                }
                Settled::Ended => return false,
                Settled::Again => {}
            },
            Err(error) => log_retry(session, &error),
        }
        session.runtime.clock().sleep(RETRY_AFTER).await;
    }
}

/// A node that was stale already keeps its time.
fn dated<R: Runtime>(session: &Session<R>, status: &StatusRecord) -> StatusRecord {
    let now_s = session.runtime.clock().unix_seconds();
    let mut times = session.status.stale_s.borrow_mut();
    times.retain(|node, _| status.stale.iter().any(|stale| stale.node == *node));
    let mut status = status.clone();
    for stale in &mut status.stale {
        stale.stale_s = *times.entry(stale.node).or_insert(now_s);
    }
    status
}

/// The times in a status that was read.
pub(super) fn times_in(status: &StatusRecord) -> BTreeMap<NodeNumber, u64> {
    status.stale.iter().map(|stale| (stale.node, stale.stale_s)).collect()
}

fn log_retry<R: Runtime>(session: &Session<R>, error: &MetadataError) {
    tracing::warn!(volume = %session.record.name, %error, "cannot store which replicas are stale yet; what depends on it waits");
}

enum Settled {
    Applied,
    Again,
    Ended,
}

/// A transaction that was not applied, or whose predecessor's outcome was unknown: look at what is there.
fn settle<R: Runtime>(session: &Session<R>, value: &[u8], reads: &[Option<Entry>]) -> Settled {
    let (owner, status, volume) = (&reads[0], &reads[1], &reads[2]);
    if let Some(status) = status.as_ref().filter(|status| status.value == value) {
        session.status.status_revision.set(Some(status.mod_revision));
        return Settled::Applied;
    }
    let ours = session.status.owner_revision.get();
    match owner {
        // The lease ran out; `own` takes it again, or ends the session.
        None => Settled::Again,
        Some(owner)
            if owner.create_revision != ours && session.lease.generation() != session.status.owner_lease.get() =>
        {
            Settled::Again
        }
        Some(owner) if owner.create_revision != ours => {
            session.end("another writer owns the volume".to_string());
            Settled::Ended
        }
        Some(_) if volume.as_ref().is_some_and(|volume| session.take_record(volume)) => Settled::Again,
        Some(_) => {
            session.end("the volume's record or status was changed by somebody else".to_string());
            Settled::Ended
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::ids::{Epoch, ShardId, ShardIndex};

    fn three_nodes(min: usize) -> Replicas {
        let shard = |node| ShardId { node: NodeNumber(node), shard: ShardIndex(0) };
        let placed = (0..4).map(|slice| (SliceId(slice), (1..=3).map(shard).collect()));
        Replicas::new(placed.collect(), min, &StatusRecord::default())
    }

    fn since() -> Version {
        Version::new(Epoch(2), 9)
    }

    #[test]
    fn who_lost_something_goes_stale_before_who_is_merely_away() {
        let failed = BTreeMap::from([(0, Loss::Unreachable), (1, Loss::Restarted), (2, Loss::Lost)]);
        let (_, lost, refused) = lose_in_order(&three_nodes(1), failed.clone(), &BTreeSet::new(), since());
        assert_eq!(lost, BTreeSet::from([1, 2]));
        assert_eq!(refused.iter().map(|(shard, _)| *shard).collect::<Vec<_>>(), [0]);
        let (_, lost, _) = lose_in_order(&three_nodes(2), failed, &BTreeSet::new(), since());
        assert_eq!(lost, BTreeSet::from([2]));
    }

    #[test]
    fn who_is_away_is_kept_while_it_may_be_needed_for_one_that_restarted() {
        let failed = BTreeMap::from([(0, Loss::Unreachable)]);
        let restarted = BTreeSet::from([1]);
        let (_, lost, refused) = lose_in_order(&three_nodes(2), failed.clone(), &restarted, since());
        assert!(lost.is_empty() && refused.len() == 1);
        let (_, lost, _) = lose_in_order(&three_nodes(1), failed, &restarted, since());
        assert_eq!(lost, BTreeSet::from([0]), "both could go");
    }

    #[test]
    fn slices_that_are_missing_are_stale_since_zero_and_the_others_stay() {
        let failed = BTreeMap::from([(1, Loss::Missing(vec![SliceId(3)]))]);
        let (next, lost, _) = lose_in_order(&three_nodes(2), failed, &BTreeSet::from([1]), since());
        assert_eq!(lost, BTreeSet::from([1]));
        assert_eq!(next.slices_in_sync_on(1), [SliceId(0), SliceId(1), SliceId(2)]);
        let stale = &next.to_status().stale;
        assert_eq!((stale.len(), stale[0].since.sequence), (1, 0));
    }
}
