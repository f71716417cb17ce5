//! Marking replicas stale: one compare-and-set of one value for all that failed by then, before any write they missed
//! is acknowledged (protocol rule 10).
//!
//! `since` is the volume's flush point, never a mark of the replica's own progress (interleaving 2). While the outcome
//! of the transaction is unknown it counts as not happened for acknowledgements.

use super::replicas::{BelowMinimum, Replicas, ShardPosition};
use super::session::{Failure, Session};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::metadata::{Compare, Entry, Metadata, MetadataError, Revision, Transaction, Write};
use torus_rpc::runtime::{Class, Clock, Runtime, Spawn};
use torus_schema::ids::Version;
use torus_schema::records::{StatusRecord, encode, keys};

const RETRY_AFTER: Duration = Duration::from_millis(200);

/// What this session knows of its keys in the metadata store.
pub(super) struct StatusKeeper {
    /// Of the owner key: it is ours as long as it was created by this.
    pub owner_revision: Cell<Revision>,
    /// The lease our owner key hangs on, as `ProcessLease` counts them.
    pub owner_lease: Cell<u64>,
    /// Of the epoch, as our attach wrote it.
    pub epoch_revision: Revision,
    /// Of the volume's record.
    pub volume_revision: Revision,
    /// Of the status, if there is one.
    pub status_revision: Cell<Option<Revision>>,
    pub failed: RefCell<BTreeSet<ShardPosition>>,
    /// Those that could not be marked, and why.
    pub refused: RefCell<Vec<(ShardPosition, BelowMinimum)>>,
    pub running: Cell<bool>,
    /// The mark of replicas that are being made stale, not yet listed; see `retain`.
    pub pending_since: Cell<Option<Version>>,
}

impl<R: Runtime> Session<R> {
    /// Returns once the shard has no in-sync replica left (or the session ended); an error if it must keep them.
    pub async fn mark_stale(self: &Rc<Self>, position: ShardPosition, failure: &Failure) -> Result<(), BelowMinimum> {
        let shard = &self.shards[position];
        if !shard.suspect.replace(true) {
            tracing::warn!(volume = %self.record.name, shard = %shard.id, %failure, "replica failed");
        }
        self.status.refused.borrow_mut().retain(|(refused, _)| *refused != position);
        self.status.failed.borrow_mut().insert(position);
        if !self.status.running.replace(true) {
            self.runtime.spawn().spawn(Class::Foreground, keep_status(self.clone()));
        }
        self.changed
            .until(|| {
                if self.ended.borrow().is_some() || !self.replicas.borrow().holds_in_sync(position) {
                    return Some(Ok(()));
                }
                let refused = self.status.refused.borrow();
                refused.iter().find(|(refused, _)| *refused == position).map(|(_, below)| Err(*below))
            })
            .await
    }
}

/// Runs as long as there are failed replicas to be marked.
async fn keep_status<R: Runtime>(session: Rc<Session<R>>) {
    loop {
        let failed = session.status.failed.take();
        if failed.is_empty() || session.ended.borrow().is_some() {
            break;
        }
        session.status.pending_since.set(Some(session.flush_point.get()));
        let (next, lost) = without(&session, failed);
        if !lost.is_empty() && store_status(&session, &next.to_status()).await {
            for shard in &lost {
                tracing::warn!(volume = %session.record.name, shard = %session.shards[*shard].id,
                    since = %session.flush_point.get(), "replica marked stale");
            }
            *session.replicas.borrow_mut() = next;
            session.tell_retention_soon();
        }
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
fn without<R: Runtime>(session: &Session<R>, failed: BTreeSet<ShardPosition>) -> (Replicas, BTreeSet<ShardPosition>) {
    let mut next = session.replicas.borrow().clone();
    let mut lost = BTreeSet::new();
    for shard in failed.into_iter().filter(|shard| session.replicas.borrow().holds_in_sync(*shard)) {
        match next.lose(&BTreeSet::from([shard]), session.flush_point.get()) {
            Ok(()) => _ = lost.insert(shard),
            Err(below) => session.status.refused.borrow_mut().push((shard, below)),
        }
    }
    (next, lost)
}

/// Tries until the outcome is known; false: the session ended.
async fn store_status<R: Runtime>(session: &Rc<Session<R>>, status: &StatusRecord) -> bool {
    let (owner, key) = (keys::owner(session.record.id), keys::status(session.record.id));
    let value = encode(status);
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
                Compare::ModRevision(keys::volume(session.record.id), session.status.volume_revision),
                unchanged,
            ],
            writes: vec![Write::Put { key: key.clone(), value: value.clone(), lease: None }],
            reads: vec![owner.clone(), key.clone()],
        };
        match session.runtime.metadata().transact(transaction).await {
            Ok(result) if result.applied => {
                session.status.status_revision.set(Some(result.revision));
                return true;
            }
            Ok(result) => match settle(session, &value, &result.reads) {
                Settled::Applied => return true,
                Settled::Ended => return false,
                Settled::Again => {}
            },
            Err(error) => log_retry(session, &error),
        }
        session.runtime.clock().sleep(RETRY_AFTER).await;
    }
}

fn log_retry<R: Runtime>(session: &Session<R>, error: &MetadataError) {
    tracing::warn!(volume = %session.record.name, %error, "cannot mark replicas stale yet; writes wait");
}

enum Settled {
    Applied,
    Again,
    Ended,
}

/// A transaction that was not applied, or whose predecessor's outcome was unknown: look at what is there.
fn settle<R: Runtime>(session: &Session<R>, value: &[u8], reads: &[Option<Entry>]) -> Settled {
    let (owner, status) = (&reads[0], &reads[1]);
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
        Some(_) => {
            session.end("the volume's record or status was changed by somebody else".to_string());
            Settled::Ended
        }
    }
}
