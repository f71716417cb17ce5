//! One round of the status after the other: what is to be listed of replicas, and the transaction that says so, tried
//! until its outcome is known.
//!
//! ```text
//!   take what failed, finished, ... ─► propose ─► transaction ─┬─ applied ──────────────► adopt it
//!                                         ▲                    ├─ an earlier one was ───► adopt that one
//!                                         │                    ├─ not ours any more ────► the session has ended
//!                                         └── after a moment ──┴─ no answer, or none that tells
//! ```
//! Each attempt says what is right *then*: a replica that is back meanwhile is no longer among those that are lost. An
//! attempt of which nothing is known may have been carried out, or may be yet, until another has changed the revision it
//! was guarded by. So where nothing is left to be changed while one such is about, what is listed is stored as it is:
//! either that is applied, and the earlier can never be, or the earlier is found.

use super::own::own_again;
use super::replicas::{BelowMinimum, Replicas, ShardPosition};
use super::session::Session;
use super::status::Loss;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::metadata::{Compare, Entry, Metadata, MetadataError, Transaction, Write};
use torus_rpc::runtime::{Clock, Random, Runtime};
use torus_schema::ids::{SliceId, Version};
use torus_schema::limits::MARK_JITTER;
use torus_schema::records::{StatusRecord, encode, keys};

const RETRY_AFTER: Duration = Duration::from_millis(200);

/// What one attempt would make of the replicas.
#[derive(Clone)]
struct Proposal {
    next: Replicas,
    lost: BTreeSet<ShardPosition>,
}

/// What a round is about.
struct Round {
    failed: BTreeSet<(ShardPosition, Loss)>,
    finished: BTreeSet<ShardPosition>,
    distrusted: BTreeMap<ShardPosition, Vec<SliceId>>,
    /// Of all that it loses: F as the round began.
    since: Version,
}

/// Runs as long as there is something about replicas to be stored.
pub(super) async fn keep_status<R: Runtime>(session: Rc<Session<R>>) {
    loop {
        // Of a thousand volumes that lost the same node, some at a time; what fails meanwhile goes with it.
        if session.marking.is_taken(0) {
            // Before the turn: whoever waits in it keeps the next one waiting, thirty times over for a thousand.
            let jitter_us = session.runtime.random().u64() % MARK_JITTER.as_micros() as u64;
            session.runtime.clock().sleep(Duration::from_micros(jitter_us)).await;
        }
        let turn = session.marking.take(0).await;
        let failed = session.status.failed.take();
        let finished = finishing(&session, &failed);
        let distrusted = session.status.distrusted.take();
        let nothing = failed.is_empty() && finished.is_empty() && distrusted.is_empty();
        if nothing || session.ended.borrow().is_some() {
            break;
        }
        let since = session.flush_point.get();
        session.status.withdrawn.borrow_mut().clear();
        session.status.pending_since.set(Some(since));
        let mut round = Round { failed, finished, distrusted, since };
        if let Some(stored) = store(&session, || round.propose(&session)).await {
            adopt(&session, &round, stored);
        }
        drop(turn);
        session.status.pending_since.set(None);
        session.changed.notify();
    }
    session.status.running.set(false);
}

fn adopt<R: Runtime>(session: &Rc<Session<R>>, round: &Round, stored: Proposal) {
    for shard in &stored.lost {
        tracing::warn!(volume = %session.record.name, shard = %session.shards[*shard].id, since = %round.since,
            "replica marked stale");
    }
    session.counters.replicas_marked_stale.add(stored.lost.len() as u64);
    for shard in &round.finished {
        tracing::info!(volume = %session.record.name, shard = %session.shards[*shard].id, "replica in sync");
    }
    session.replicas.borrow_mut().adopt(&stored.next);
    session.tell_retention_soon();
}

/// Replicas whose resync is over and that did not fail since. From here on they are no longer given up in silence.
fn finishing<R: Runtime>(session: &Session<R>, failed: &BTreeSet<(ShardPosition, Loss)>) -> BTreeSet<ShardPosition> {
    let has_failed = |position: &ShardPosition| failed.iter().any(|(failed, _)| failed == position);
    let mut finished = session.status.finished.take();
    let mut replicas = session.replicas.borrow_mut();
    finished.retain(|position| replicas.is_syncing(*position));
    for position in &finished {
        match has_failed(position) {
            true => replicas.abort_sync(*position),
            false => replicas.finish_sync(*position),
        }
    }
    finished.retain(|position| !has_failed(position));
    finished
}

impl Round {
    /// `None`: nothing is to be changed (any more).
    fn propose<R: Runtime>(&mut self, session: &Session<R>) -> Option<Proposal> {
        let withdrawn = session.status.withdrawn.borrow();
        self.failed.retain(|(shard, loss)| !(loss.may_be_mended() && withdrawn.contains(shard)));
        let in_doubt = |shard: &ShardPosition| session.shards[*shard].recovering.get();
        let in_doubt: BTreeSet<_> = (0..session.shards.len()).filter(in_doubt).collect();
        let replicas = session.replicas.borrow().clone();
        let (mut next, lost, refused) = lose_in_order(&replicas, &self.failed, &in_doubt, self.since);
        if !refused.is_empty() {
            // Each is told once, and comes again by itself.
            self.failed.retain(|(shard, loss)| !refused.iter().any(|(other, why, _)| other == shard && why == loss));
            session.status.refused.borrow_mut().extend(refused);
            session.changed.notify();
        }
        next.sync_finishing();
        self.distrusted.iter().for_each(|(shard, slices)| next.distrust(*shard, slices));
        let changes = !lost.is_empty() || !self.finished.is_empty() || !self.distrusted.is_empty();
        changes.then_some(Proposal { next, lost })
    }
}

/// For attach, which has nothing else under way: these are the replicas from now on, unless the session ended.
pub(super) async fn replace<R: Runtime>(session: &Rc<Session<R>>, next: Replicas) {
    let proposal = Proposal { next, lost: BTreeSet::new() };
    if let Some(stored) = store(session, || Some(proposal.clone())).await {
        *session.replicas.borrow_mut() = stored.next;
    }
}

/// `in_doubt`: shards of which it is being found out what became of them, which may have to be given up yet. One that is
/// merely unreachable is kept as long as the volume cannot do without both: it may be the only one that has what was
/// answered and not flushed, if the other turns out to have lost its power.
fn lose_in_order(
    replicas: &Replicas,
    failed: &BTreeSet<(ShardPosition, Loss)>,
    in_doubt: &BTreeSet<ShardPosition>,
    since: Version,
) -> (Replicas, BTreeSet<ShardPosition>, Vec<(ShardPosition, Loss, BelowMinimum)>) {
    let (mut next, mut lost, mut refused) = (replicas.clone(), BTreeSet::new(), Vec::new());
    let mut failed: Vec<_> = failed.iter().filter(|(shard, _)| replicas.holds_in_sync(*shard)).collect();
    failed.sort_by(|(_, a), (_, b)| a.cmp(b));
    for (shard, loss) in failed {
        let mut without = next.clone();
        let losing = match loss {
            Loss::Missing(slices) => without.lose_slices(*shard, slices),
            Loss::Lost | Loss::Restarted => without.lose(&BTreeSet::from([*shard]), since),
            Loss::Unreachable => {
                let spared = next.can_spare(*shard, in_doubt);
                spared.and_then(|()| without.lose(&BTreeSet::from([*shard]), since))
            }
        };
        match losing {
            Ok(()) => {
                lost.insert(*shard);
                next = without;
            }
            Err(below) => refused.push((*shard, loss.clone(), below)),
        }
    }
    (next, lost, refused)
}

/// An attempt whose outcome is not known: the value it would have stored.
struct Attempt {
    value: Vec<u8>,
    proposal: Proposal,
}

/// Tries until the outcome is known, with what `propose` says at each attempt. `None`: nothing was changed, since nothing
/// is to be changed any more or the session ended.
async fn store<R: Runtime>(
    session: &Rc<Session<R>>,
    mut propose: impl FnMut() -> Option<Proposal>,
) -> Option<Proposal> {
    let changes = session.status.changes.get() + 1;
    let mut unknown: Vec<Attempt> = Vec::new();
    loop {
        if session.ended.borrow().is_some() {
            return None;
        }
        let proposal = match propose() {
            Some(proposal) => proposal,
            None if unknown.is_empty() => return None,
            None => Proposal { next: session.replicas.borrow().clone(), lost: BTreeSet::new() },
        };
        let value = encode(&StatusRecord { changes, ..dated(session, &proposal.next.to_status()) });
        let transaction = transaction(session, &value);
        unknown.push(Attempt { value, proposal });
        session.counters.status_transactions.add(1);
        match session.runtime.metadata().transact(transaction).await {
            Ok(result) if result.applied => {
                session.status.status_revision.set(Some(result.revision));
                session.status.changes.set(changes);
                return unknown.pop().map(|applied| applied.proposal);
            }
            Ok(result) => {
                let this = unknown.pop();
                match settle(session, unknown.iter().chain(&this), &result.reads) {
                    Settled::Applied(proposal) => {
                        session.status.changes.set(changes);
                        return Some(proposal);
                    }
                    Settled::Ended => return None,
                    // Who would find that out, if not we: an attach has nobody else who looks at the key.
                    Settled::Unowned => own_again(session).await,
                    Settled::Again => {}
                }
            }
            Err(error) => {
                if let MetadataError::Unreachable { .. } = error {
                    // It was not sent.
                    unknown.pop();
                }
                tracing::warn!(volume = %session.record.name, %error,
                    "cannot store which replicas are stale yet; what depends on it waits");
            }
        }
        session.runtime.clock().sleep(RETRY_AFTER).await;
    }
}

/// As long as we own the volume and the status is as we know it.
fn transaction<R: Runtime>(session: &Session<R>, value: &[u8]) -> Transaction {
    let id = session.record.id;
    let (owner, key, volume) = (keys::owner(id), keys::status(id), keys::volume(id));
    let unchanged = match session.status.status_revision.get() {
        Some(revision) => Compare::ModRevision(key.clone(), revision),
        None => Compare::Absent(key.clone()),
    };
    Transaction {
        compares: vec![
            Compare::CreateRevision(owner.clone(), session.status.owner_revision.get()),
            Compare::ModRevision(volume.clone(), session.status.volume_revision.get()),
            unchanged,
        ],
        writes: vec![Write::Put { key: key.clone(), value: value.to_vec(), lease: None }],
        reads: vec![owner, key, volume],
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

enum Settled {
    Applied(Proposal),
    /// There is no owner key: it went with its lease, or the metadata store was restored from a backup.
    Unowned,
    Again,
    Ended,
}

/// A transaction that was not applied, or whose predecessor's outcome was unknown: look at what is there.
fn settle<'a, R: Runtime>(
    session: &Session<R>,
    attempts: impl Iterator<Item = &'a Attempt>,
    reads: &[Option<Entry>],
) -> Settled {
    let (owner, status, volume) = (&reads[0], &reads[1], &reads[2]);
    if let Some(status) = status
        && let Some(applied) = attempts.into_iter().find(|attempt| attempt.value == status.value)
    {
        session.status.status_revision.set(Some(status.mod_revision));
        return Settled::Applied(applied.proposal.clone());
    }
    let ours = session.status.owner_revision.get();
    match owner {
        None => Settled::Unowned,
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
    use torus_schema::ids::{Epoch, NodeNumber, ShardId, ShardIndex};

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
        let failed = BTreeSet::from([(0, Loss::Unreachable), (1, Loss::Restarted), (2, Loss::Lost)]);
        let (_, lost, refused) = lose_in_order(&three_nodes(1), &failed, &BTreeSet::new(), since());
        assert_eq!(lost, BTreeSet::from([1, 2]));
        assert_eq!(refused.iter().map(|(shard, _, _)| *shard).collect::<Vec<_>>(), [0]);
        let (_, lost, _) = lose_in_order(&three_nodes(2), &failed, &BTreeSet::new(), since());
        assert_eq!(lost, BTreeSet::from([2]));
    }

    #[test]
    fn who_is_away_is_kept_while_it_may_be_needed_for_one_that_restarted() {
        let failed = BTreeSet::from([(0, Loss::Unreachable)]);
        let restarted = BTreeSet::from([1]);
        let (_, lost, refused) = lose_in_order(&three_nodes(2), &failed, &restarted, since());
        assert!(lost.is_empty() && refused.len() == 1);
        let (_, lost, _) = lose_in_order(&three_nodes(1), &failed, &restarted, since());
        assert_eq!(lost, BTreeSet::from([0]), "both could go");
    }

    #[test]
    fn of_two_that_are_away_neither_goes_if_both_cannot() {
        let failed = BTreeSet::from([(0, Loss::Unreachable), (1, Loss::Unreachable)]);
        let in_doubt = BTreeSet::from([0, 1]);
        let (_, lost, refused) = lose_in_order(&three_nodes(2), &failed, &in_doubt, since());
        assert!(lost.is_empty() && refused.len() == 2);
        let (_, lost, _) = lose_in_order(&three_nodes(1), &failed, &in_doubt, since());
        assert_eq!(lost, failed.iter().map(|(shard, _)| *shard).collect());
    }

    #[test]
    fn slices_that_are_missing_are_stale_since_zero_and_the_others_stay() {
        let failed = BTreeSet::from([(1, Loss::Missing(vec![SliceId(3)]))]);
        let (next, lost, _) = lose_in_order(&three_nodes(2), &failed, &BTreeSet::from([1]), since());
        assert_eq!(lost, BTreeSet::from([1]));
        assert_eq!(next.slices_in_sync_on(1), [SliceId(0), SliceId(1), SliceId(2)]);
        let stale = &next.to_status().stale;
        assert_eq!((stale.len(), stale[0].since.sequence), (1, 0));
    }
}
