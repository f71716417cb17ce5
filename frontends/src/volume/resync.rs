//! Stale replicas are brought back by whoever owns the volume (protocol rule 11): one task per shard, as long as it has
//! any, and again from `since` after each failure.
//!
//! 1. It is opened. Slices it has no instance of are listed as stale since zero, and only then created: a mark above
//!    zero must not hide that nothing is there.
//! 2. From one moment on every new write has to be done there too; everything before, up to d0, is waited for.
//! 3. It takes back what nobody else ever had, and makes that durable. Until then it hears of no F above `since`: with a
//!    higher one it would free what lies below a version that is to be taken back, or that version's own predecessors.
//! 4. It takes everything above `since` from replicas in sync.
//! 5. Everything drawn by then (d1) is settled, then flushed: what the sources had of it and did not hold durably is
//!    durable everywhere now, and what it hides on this replica can never come to light again (interleaving 6).
//! 6. It is in sync as soon as the metadata store says so.
//!
//! A replica that misses anything on the way is stale as before, at once, and nobody waits for it any more.

use super::attach::ask_open;
use super::replicas::ShardPosition;
use super::session::{Failure, Session, Verdict, verdict};
use bytes::Bytes;
use futures::future::select;
use futures::{StreamExt, TryStreamExt, stream};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use thiserror::Error;
use torus_rpc::message::{Answer, Opened, Operation, Refusal, Resync, Resynced, Source};
use torus_rpc::runtime::{Class, Clock, Instant, Runtime, Spawn};
use torus_schema::ids::{BlockIndex, Incarnation, SliceId, Version};
use torus_schema::limits::{
    RESYNC_BLOCKS_PER_REQUEST, RESYNC_LOG_INTERVAL, RESYNC_PAUSE_MAX, RESYNC_PAUSE_MIN, RESYNC_SLICES_AT_ONCE,
};

/// Between two attempts where another source is all that can be tried.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// Sources of one slice that may fail in a row before all of it is begun again.
const SOURCE_FAILURES_MAX: u32 = 20;

#[derive(Default)]
pub(super) struct Resyncing {
    /// Shards that a task looks after.
    running: RefCell<BTreeSet<ShardPosition>>,
    /// Those that wait for writes to be settled.
    pub awaiting: Cell<usize>,
    pub progress: RefCell<BTreeMap<ShardPosition, Progress>>,
}

/// How far the resync of one shard came.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    pub slices: usize,
    pub slices_done: usize,
    /// Blocks compared, taken from the sources, and versions taken back.
    pub examined: u64,
    pub pulled: u64,
    pub revoked: u64,
    pub started: Instant,
    logged: Instant,
}

/// Why a resync did not come to its end.
#[derive(Debug, Error)]
enum Stopped {
    #[error("the session ended")]
    Ended,
    #[error("{0}")]
    Target(Failure),
    #[error("a write to it failed")]
    Aborted,
    #[error("the shard is being recovered for other slices")]
    Recovering,
    #[error("it says that it lacks slices {0:?}, which were just created")]
    StillMissing(Vec<SliceId>),
    #[error("no source of slice {slice} answers; the last one: {because}")]
    NoSource { slice: SliceId, because: String },
    #[error("it answered {0}")]
    Odd(String),
}

/// One slice on its way.
#[derive(Clone, Copy)]
struct Slice {
    slot: usize,
    id: SliceId,
    since: Version,
    through: Version,
}

/// Until the session ends.
pub(super) async fn keep_in_sync<R: Runtime>(session: Rc<Session<R>>) {
    loop {
        let waiting = || {
            let (replicas, running) = (session.replicas.borrow(), session.resyncing.running.borrow());
            let shards = 0..session.shards.len();
            let stale: Vec<_> = shards.filter(|at| !running.contains(at) && !replicas.listed(*at).is_empty()).collect();
            (session.ended.borrow().is_some() || !stale.is_empty()).then_some(stale)
        };
        let stale = session.changed.until(waiting).await;
        if session.ended.borrow().is_some() {
            return;
        }
        for position in stale {
            session.resyncing.running.borrow_mut().insert(position);
            let session = session.clone();
            let spawn = session.runtime.spawn().clone();
            spawn.spawn(Class::Background, async move {
                session.bring_back(position).await;
                session.resyncing.running.borrow_mut().remove(&position);
                session.changed.notify();
            });
        }
    }
}

impl<R: Runtime> Session<R> {
    /// Until nothing on the shard is stale any more.
    async fn bring_back(self: &Rc<Self>, position: ShardPosition) {
        let (shard, mut pause) = (self.shards[position].id, RESYNC_PAUSE_MIN);
        while self.ended.borrow().is_none() && !self.replicas.borrow().listed(position).is_empty() {
            let result = self.resync(position).await;
            self.resyncing.progress.borrow_mut().remove(&position);
            match result {
                Ok(()) => {
                    pause = RESYNC_PAUSE_MIN;
                    continue;
                }
                Err(Stopped::Ended) => return,
                Err(because) => {
                    self.abort_sync(position, &because);
                    tracing::debug!(volume = %self.record.name, %shard, %because, "the replica stays stale");
                }
            }
            // Volumes that lost the same replica do not all come at once.
            let jittered = pause / 2 + pause * self.lot(1024) as u32 / 2048;
            let ended = pin!(self.changed.until(|| self.ended.borrow().is_some().then_some(())));
            select(ended, pin!(self.runtime.clock().sleep(jittered))).await;
            pause = (pause * 2).min(RESYNC_PAUSE_MAX);
        }
    }

    async fn resync(self: &Rc<Self>, position: ShardPosition) -> Result<(), Stopped> {
        let slices: Vec<SliceId> = self.replicas.borrow().listed(position).iter().map(|(_, id, _)| *id).collect();
        let incarnation = self.open_stale(position, slices.clone()).await?;
        let slices = self.begin_sync(position, incarnation, &slices)?;
        self.settled(position, slices[0].through.sequence).await?;
        self.pass(position, &slices, false).await?;
        self.tell(position, &Operation::Flush).await?;
        // What is taken back now stays so: F may be told again.
        self.shards[position].flush_point_held.set(None);
        // Covers what is to be pulled, so that what it replaces there gives its space back at once.
        self.flush().await.map_err(|_| Stopped::Ended)?;
        self.pass(position, &slices, true).await?;
        let drawn = self.window.borrow().drawn();
        self.settled(position, drawn).await?;
        let shard = &self.shards[position];
        shard.written.set(shard.written.get() + 1);
        self.flush().await.map_err(|_| Stopped::Ended)?;
        self.still_syncing(position)?;
        self.report(position, "the replica has everything");
        if self.mark_in_sync(position).await { Ok(()) } else { Err(Stopped::Aborted) }
    }

    fn still_syncing(&self, position: ShardPosition) -> Result<(), Stopped> {
        match self.replicas.borrow().is_syncing(position) {
            _ if self.ended.borrow().is_some() => Err(Stopped::Ended),
            true => Ok(()),
            false => Err(Stopped::Aborted),
        }
    }

    /// With instances of all of them; gives its incarnation.
    async fn open_stale(
        self: &Rc<Self>,
        position: ShardPosition,
        slices: Vec<SliceId>,
    ) -> Result<Incarnation, Stopped> {
        self.look_up(position).await;
        let Opened { incarnation, missing, .. } = self.ask_open_stale(position, slices.clone()).await?;
        if missing.is_empty() {
            return Ok(incarnation);
        }
        tracing::warn!(volume = %self.record.name, shard = %self.shards[position].id, slices = ?missing,
            "the replica has no instances of these slices; it is filled from nothing");
        if !self.distrust(position, missing.clone()).await {
            return Err(Stopped::Ended);
        }
        self.create_instances(position, missing).await?;
        let Opened { incarnation, missing, .. } = self.ask_open_stale(position, slices).await?;
        if missing.is_empty() { Ok(incarnation) } else { Err(Stopped::StillMissing(missing)) }
    }

    async fn ask_open_stale(self: &Rc<Self>, position: ShardPosition, slices: Vec<SliceId>) -> Result<Opened, Stopped> {
        let opened = ask_open(self, position, slices).await.map_err(Stopped::Target)?;
        let shard = &self.shards[position];
        // Other slices are in sync there: its new life has to get first what the last one lost of those.
        if self.replicas.borrow().holds_in_sync(position) {
            let known = shard.incarnation.get();
            if opened.incarnation != known {
                let failure = Failure::Refused(Refusal::OtherIncarnation);
                self.recover(position, known, failure, Verdict::Restarted);
            }
            if opened.incarnation != known || shard.recovering.get() {
                return Err(Stopped::Recovering);
            }
        }
        Ok(opened)
    }

    async fn create_instances(&self, position: ShardPosition, slices: Vec<SliceId>) -> Result<(), Stopped> {
        let (token, ring_slices) = (self.open.creation, self.open.ring_slices);
        let (placement, width) = (self.record.placement, self.record.width);
        let operation = Operation::CreateInstances { token, placement, width, ring_slices, slices };
        let shard = &self.shards[position];
        match self.ask(shard, &operation, &Bytes::new()).await.map_err(Stopped::Target)?.0 {
            Answer::Created => Ok(()),
            other => Err(Stopped::Odd(format!("{other:?} to the creation of instances"))),
        }
    }

    /// One moment: what draws its sequence later goes there too, and what drew it before is at most d0.
    fn begin_sync(
        self: &Rc<Self>,
        position: ShardPosition,
        incarnation: Incarnation,
        opened: &[SliceId],
    ) -> Result<Vec<Slice>, Stopped> {
        let shard = &self.shards[position];
        if self.ended.borrow().is_some() {
            return Err(Stopped::Ended);
        }
        if self.replicas.borrow().holds_in_sync(position) {
            if shard.recovering.get() || shard.incarnation.get() != incarnation {
                return Err(Stopped::Recovering);
            }
        } else {
            shard.incarnation.set(incarnation);
        }
        let mut listed = self.replicas.borrow().listed(position);
        listed.retain(|(_, id, _)| opened.contains(id));
        let slots: Vec<usize> = listed.iter().map(|(slot, ..)| *slot).collect();
        let Some(lowest) = listed.iter().map(|(.., since)| *since).min() else { return Err(Stopped::Aborted) };
        let through = Version::new(self.epoch, self.window.borrow().drawn());
        self.status.finished.borrow_mut().remove(&position);
        shard.flush_point_held.set(Some(lowest));
        shard.full.set(false);
        // Flushes go there too from now on.
        shard.written.set(shard.written.get() + 1);
        self.replicas.borrow_mut().begin_sync(position, &slots);
        self.changed.notify();
        let now = self.runtime.clock().now();
        let progress = Progress {
            slices: slots.len(),
            slices_done: 0,
            examined: 0,
            pulled: 0,
            revoked: 0,
            started: now,
            logged: now,
        };
        self.resyncing.progress.borrow_mut().insert(position, progress);
        tracing::info!(volume = %self.record.name, shard = %shard.id, slices = slots.len(), since = %lowest, %through,
            "resync begins");
        Ok(listed.into_iter().map(|(slot, id, since)| Slice { slot, id, since, through }).collect())
    }

    /// Until every write up to that sequence is done wherever it has to be.
    async fn settled(&self, position: ShardPosition, sequence: u64) -> Result<(), Stopped> {
        self.resyncing.awaiting.set(self.resyncing.awaiting.get() + 1);
        let settled = || self.window.borrow().settled_through() >= sequence;
        let result = self.changed.until(|| match self.still_syncing(position) {
            Err(stopped) => Some(Err(stopped)),
            Ok(()) => settled().then_some(Ok(())),
        });
        let result = result.await;
        self.resyncing.awaiting.set(self.resyncing.awaiting.get() - 1);
        result
    }

    async fn pass(self: &Rc<Self>, position: ShardPosition, slices: &[Slice], pull: bool) -> Result<(), Stopped> {
        let synced = stream::iter(slices).map(|slice| self.sync_slice(position, *slice, pull));
        synced.buffer_unordered(RESYNC_SLICES_AT_ONCE).try_collect::<()>().await?;
        self.still_syncing(position)
    }

    async fn sync_slice(self: &Rc<Self>, position: ShardPosition, slice: Slice, pull: bool) -> Result<(), Stopped> {
        let Slice { id, since, through, .. } = slice;
        let (mut from, mut failures, mut tried) = (BlockIndex(0), 0, Vec::new());
        loop {
            self.still_syncing(position)?;
            let (chosen, source) = self.choose_source(position, slice, &tried).await?;
            let asked_of = source.incarnation;
            let blocks_max = RESYNC_BLOCKS_PER_REQUEST;
            let asked = Operation::Resync(Resync { slice: id, since, through, source, from, blocks_max, pull });
            match self.tell(position, &asked).await {
                Ok(Answer::Resynced(done)) if done.next.is_none_or(|next| next >= from) => {
                    self.count(position, &done, pull);
                    (failures, tried) = (0, Vec::new());
                    match done.next {
                        Some(next) => from = next,
                        None => return Ok(()),
                    }
                }
                Ok(other) => return Err(Stopped::Odd(format!("{other:?} to a resync from {from}"))),
                Err(Stopped::Target(Failure::Refused(Refusal::Source { because, restarted }))) => {
                    tracing::warn!(volume = %self.record.name, slice = %id, source = %self.shards[chosen].id, because,
                        "a source of a resync failed");
                    failures += 1;
                    if failures >= SOURCE_FAILURES_MAX {
                        return Err(Stopped::NoSource { slice: id, because });
                    }
                    if restarted {
                        // Nobody may have noticed yet. Its new life is a source when it has everything again.
                        let failure = Failure::Refused(Refusal::OtherIncarnation);
                        self.recover(chosen, asked_of, failure, Verdict::Restarted);
                    }
                    tried.push(chosen);
                    self.runtime.clock().sleep(RETRY_AFTER).await;
                }
                Err(stopped) => return Err(stopped),
            }
        }
    }

    /// In sync and well, the least busy of two; those that failed are tried again when there is no other.
    async fn choose_source(
        &self,
        position: ShardPosition,
        slice: Slice,
        tried: &[ShardPosition],
    ) -> Result<(ShardPosition, Source), Stopped> {
        loop {
            self.still_syncing(position)?;
            let in_sync: Vec<_> = self.replicas.borrow().in_sync(slice.slot).collect();
            let well = in_sync.into_iter().filter(|shard| !self.shards[*shard].recovering.get());
            let (again, fresh): (Vec<_>, Vec<_>) = well.partition(|shard| tried.contains(shard));
            let candidates = if fresh.is_empty() { again } else { fresh };
            if candidates.is_empty() {
                self.runtime.clock().sleep(RETRY_AFTER).await;
                continue;
            }
            let (a, b) = (self.lot(candidates.len()), self.lot(candidates.len()));
            let busy = |at: usize| self.shards[candidates[at]].outstanding.get();
            let chosen = candidates[if busy(a) <= busy(b) { a } else { b }];
            let shard = &self.shards[chosen];
            let peer = shard.peer.borrow();
            let (node, address) = (peer.node, peer.address.clone());
            let (incarnation, generation) = (shard.incarnation.get(), shard.generation.get());
            return Ok((chosen, Source { node, shard: peer.shard, address, incarnation, generation }));
        }
    }

    /// A request of the resync itself to its target. A failure that concerns the shard's other slices too is theirs to
    /// hear of.
    async fn tell(self: &Rc<Self>, position: ShardPosition, operation: &Operation) -> Result<Answer, Stopped> {
        let shard = &self.shards[position];
        let asked_of = shard.incarnation.get();
        match self.ask(shard, operation, &Bytes::new()).await {
            Ok((answer, _)) => Ok(answer),
            Err(failure) => {
                let verdict = verdict(&failure);
                if matches!(verdict, Verdict::Unreachable | Verdict::Restarted)
                    && self.replicas.borrow().holds_in_sync(position)
                {
                    let again = Failure::Refused(Refusal::OtherIncarnation);
                    self.recover(position, asked_of, again, verdict);
                }
                Err(Stopped::Target(failure))
            }
        }
    }

    fn count(&self, position: ShardPosition, done: &Resynced, pull: bool) {
        let now = self.runtime.clock().now();
        let due = {
            let mut all = self.resyncing.progress.borrow_mut();
            let Some(progress) = all.get_mut(&position) else { return };
            progress.examined += done.examined;
            progress.pulled += done.pulled;
            progress.revoked += done.revoked;
            progress.slices_done += usize::from(pull && done.next.is_none());
            let due = now.since(progress.logged) >= RESYNC_LOG_INTERVAL;
            if due {
                progress.logged = now;
            }
            due
        };
        if due {
            self.report(position, "resync");
        }
    }

    fn report(&self, position: ShardPosition, what: &str) {
        let all = self.resyncing.progress.borrow();
        let Some(Progress { slices, slices_done, examined, pulled, revoked, started, .. }) = all.get(&position) else {
            return;
        };
        let (name, shard) = (&self.record.name, self.shards[position].id);
        let seconds = self.runtime.clock().now().since(*started).as_secs_f64();
        tracing::info!(volume = %name, %shard, slices_done, slices, examined, pulled, revoked, seconds, "{what}");
    }

    /// What is syncing there is stale as before, and nobody waits for it any more.
    pub(super) fn abort_sync(&self, position: ShardPosition, because: &dyn std::fmt::Display) {
        self.status.finished.borrow_mut().remove(&position);
        if !self.replicas.borrow().is_syncing(position) {
            return;
        }
        let shard = &self.shards[position];
        self.replicas.borrow_mut().abort_sync(position);
        shard.flush_point_held.set(None);
        tracing::warn!(volume = %self.record.name, shard = %shard.id, %because, "resync failed; it will be tried again");
        self.changed.notify();
    }

    /// A request to a replica on its way back failed: it is given up, or, if it may be in sync already, that is waited
    /// for. True: that was all there is to do; the request looks again whether it is needed.
    pub(super) async fn failed_on_its_way_back(&self, position: ShardPosition, failure: &Failure) -> bool {
        self.abort_sync(position, failure);
        if self.replicas.borrow().holds_in_sync(position) {
            return false;
        }
        let settled = || {
            let known = self.ended.borrow().is_some() || !self.replicas.borrow().is_finishing(position);
            known.then_some(())
        };
        self.changed.until(settled).await;
        true
    }
}
