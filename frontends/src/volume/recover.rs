//! What becomes of a replica that failed. One task per shard finds out; requests to it wait meanwhile.
//!
//! | it is | and can be done without | otherwise |
//! |---|---|---|
//! | another life of the shard | opened again, everything above F replayed to it, in sync as before | the same |
//! | unreachable for 2 s | stale since F | waited for: opened again when it is back, and replayed to if it restarted |
//! | not to be trusted | stale since F | the session ends: what was acknowledged may be gone |
//! | without slices it should have | those are stale since zero | the session ends |
//!
//! While records are replayed the session still names the shard's former life, so that no request of ours can reach
//! the new one before it has everything we acknowledged: a read would go back, a flush would cover what is not there
//! (protocol rule 9, interleavings 5 and 12).

use super::attach::{address_of, ask_open};
use super::replay::Kept;
use super::replicas::{BelowMinimum, ShardPosition};
use super::session::{Failure, Session, Verdict, verdict};
use super::status::Loss;
use bytes::Bytes;
use futures::future::{Either, select};
use futures::{StreamExt, TryStreamExt, stream};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::error::LinkError;
use torus_rpc::message::{Opened, Operation, Refusal};
use torus_rpc::runtime::{Class, Clock, Peer, Runtime, Spawn};
use torus_schema::ids::Incarnation;
use torus_schema::limits::{LINK_DEAD_AFTER, REPLAYS_IN_FLIGHT_MAX, SIBLING_ANSWERS_WITHIN};

/// Between two attempts where waiting is all that can be done.
const RETRY_AFTER: Duration = Duration::from_millis(100);

impl<R: Runtime> Session<R> {
    /// A request to the life `asked_of` of the shard failed.
    pub fn recover(
        self: &Rc<Self>,
        position: ShardPosition,
        asked_of: Incarnation,
        failure: Failure,
        verdict: Verdict,
    ) {
        let shard = &self.shards[position];
        if verdict == Verdict::Fenced {
            return self.end(format!("shard {} says: {failure}", shard.id));
        }
        // It has recovered since: the request is to be made again.
        if shard.incarnation.get() != asked_of || shard.recovering.replace(true) {
            return;
        }
        self.abort_sync(position, &failure);
        tracing::warn!(volume = %self.record.name, shard = %shard.id, %failure, "replica failed");
        let session = self.clone();
        self.runtime.spawn().spawn(Class::Foreground, async move {
            session.find_out(position, failure, verdict).await;
            let shard = &session.shards[position];
            shard.restarted.set(false);
            shard.recovering.set(false);
            session.changed.notify();
        });
    }

    async fn find_out(self: &Rc<Self>, position: ShardPosition, mut failure: Failure, mut verdict: Verdict) {
        let shard = &self.shards[position];
        let peer = shard.peer.borrow().clone();
        let started = self.links.down_since(&peer).unwrap_or_else(|| self.runtime.clock().now());
        let mut waiting = None;
        let mut attempts = 0;
        while self.is_needed(position) {
            let patient = self.runtime.clock().now().since(started) < LINK_DEAD_AFTER;
            match verdict {
                Verdict::Fenced => return self.end(format!("shard {} says: {failure}", shard.id)),
                Verdict::Lost => {
                    if let Err(below) = self.mark_stale(position, Loss::Lost).await {
                        self.end_for_loss(position, &failure, below);
                    }
                    return;
                }
                // A shard whose disk failed soon opens it anew, or never.
                Verdict::Unreachable | Verdict::Restarted if !patient || is_gone(verdict, &failure) => {
                    if self.owner.repair {
                        // Clients may reach it: a repair must not make it stale.
                        return self
                            .end(format!("shard {}, in sync, cannot be reached from here: {failure}", shard.id));
                    }
                    let loss = if shard.restarted.get() { Loss::Restarted } else { Loss::Unreachable };
                    if waiting.is_none() {
                        self.others_too(position, &failure).await;
                    }
                    let below = match self.marked_or_back(position, loss).await {
                        Outcome::Settled => return,
                        Outcome::Kept(below) => below,
                        Outcome::Failed(found) => {
                            verdict = super::session::verdict(&found);
                            failure = found;
                            continue;
                        }
                    };
                    waiting.get_or_insert_with(|| Waiting::begin(self, position, &failure, below));
                    self.runtime.clock().sleep(RETRY_AFTER).await;
                    self.look_up(position).await;
                }
                Verdict::Restarted if attempts == 0 => {}
                // A node that is started anew is back within a second, maybe at another address.
                Verdict::Unreachable => {
                    self.runtime.clock().sleep(RETRY_AFTER).await;
                    self.look_up(position).await;
                }
                _ => self.runtime.clock().sleep(RETRY_AFTER).await,
            }
            attempts += 1;
            match self.open_again(position).await {
                Ok(()) => return,
                Err(found) => {
                    verdict = super::session::verdict(&found);
                    failure = found;
                }
            }
        }
    }

    /// What else is to be known before the shard is given up.
    ///
    /// Of a node that is gone all shards are: those that do not answer now are marked in the same transaction, instead of
    /// one by one, each after 2 s of its own, as requests come to them.
    async fn others_too(self: &Rc<Self>, position: ShardPosition, failure: &Failure) {
        let silent = match failure {
            Failure::Link(error) => self.silent_siblings(position).await.into_iter().map(|of| (of, error)).collect(),
            Failure::Refused(_) => vec![],
        };
        let gone: Vec<_> = silent.iter().map(|((sibling, _), _)| *sibling).chain([position]).collect();
        self.ask_who_stays(&gone).await;
        for ((sibling, asked_of), error) in silent {
            let shard = &self.shards[sibling];
            if self.is_needed(sibling) && shard.incarnation.get() == asked_of && !shard.recovering.get() {
                self.status.failed.borrow_mut().insert((sibling, Loss::Unreachable));
                self.recover(sibling, asked_of, Failure::Link(error.clone()), Verdict::Unreachable);
            }
        }
    }

    /// Other shards of its node that do not answer, with the lives that were asked.
    async fn silent_siblings(self: &Rc<Self>, position: ShardPosition) -> Vec<(ShardPosition, Incarnation)> {
        let node = self.shards[position].id.node;
        let is_asked = |other: &ShardPosition| {
            let shard = &self.shards[*other];
            *other != position && shard.id.node == node && !shard.recovering.get() && self.is_needed(*other)
        };
        let siblings: Vec<_> = (0..self.shards.len()).filter(is_asked).collect();
        let asked = siblings.into_iter().map(|sibling| async move {
            let asked_of = self.shards[sibling].incarnation.get();
            let answer = self.answer_soon(sibling, &Operation::Ping).await;
            let is_silent =
                answer.is_none_or(|answer| answer.is_err_and(|found| verdict(&found) == Verdict::Unreachable));
            is_silent.then_some((sibling, asked_of))
        });
        futures::future::join_all(asked).await.into_iter().flatten().collect()
    }

    /// What was answered and not flushed stays with those that hold the same slices, if they are what they were and their
    /// power does not fail either: they are asked to flush it. One that does not is in doubt, and who is merely away is not
    /// given up for it (`marking`), since he may be the only one who has it.
    async fn ask_who_stays(self: &Rc<Self>, gone: &[ShardPosition]) {
        let staying = {
            let replicas = self.replicas.borrow();
            let holds_with = |other: &ShardPosition| gone.iter().any(|gone| replicas.share_in_sync(*gone, *other));
            let is_asked = |other: &ShardPosition| {
                !gone.contains(other) && !self.shards[*other].recovering.get() && holds_with(other)
            };
            (0..self.shards.len()).filter(is_asked).collect::<Vec<_>>()
        };
        let asked = staying.into_iter().map(|other| async move {
            let shard = &self.shards[other];
            let asked_of = shard.incarnation.get();
            match self.answer_soon(other, &Operation::Flush).await {
                Some(Ok(_)) => {}
                Some(Err(found)) => match verdict(&found) {
                    // Not of the shard, or not for long.
                    Verdict::Busy | Verdict::Full | Verdict::Local => {}
                    verdict => self.recover(other, asked_of, found, verdict),
                },
                None => {
                    let address = shard.peer.borrow().address.clone();
                    let waited_ms = SIBLING_ANSWERS_WITHIN.as_millis() as u64;
                    let silent = Failure::Link(LinkError::Overdue { address, waited_ms });
                    // It is asked what it is before anything else becomes of it: a flush may take its time.
                    self.recover(other, asked_of, silent, Verdict::Restarted);
                }
            }
        });
        futures::future::join_all(asked).await;
    }

    /// `None`: not soon.
    async fn answer_soon(&self, position: ShardPosition, operation: &Operation) -> Option<Result<(), Failure>> {
        let none = Bytes::new();
        let answer = pin!(self.ask(&self.shards[position], operation, &none));
        match select(answer, pin!(self.runtime.clock().sleep(SIBLING_ANSWERS_WITHIN))).await {
            Either::Left((answer, _)) => Some(answer.map(drop)),
            Either::Right(_) => None,
        }
    }

    /// Marking waits for the metadata store, which may be away for long: a replica that is back before it is marked is
    /// in sync as before, and nothing waits any longer.
    async fn marked_or_back(self: &Rc<Self>, position: ShardPosition, loss: Loss) -> Outcome {
        let marked = pin!(self.mark_stale(position, loss));
        // A store that hangs must not keep the replica from being asked where it was.
        let looking = pin!(async {
            loop {
                self.runtime.clock().sleep(RETRY_AFTER).await;
                self.look_up(position).await;
            }
        });
        let asked = pin!(self.asked_until_back(position));
        let back = pin!(select(asked, looking));
        match select(marked, back).await {
            Either::Left((Ok(()), _)) => Outcome::Settled,
            Either::Left((Err(below), _)) => Outcome::Kept(below),
            Either::Right((Either::Left((Ok(()), _)), _)) => {
                self.withdraw(position);
                tracing::info!(volume = %self.record.name, shard = %self.shards[position].id,
                    "the replica is back before it was marked stale");
                Outcome::Settled
            }
            Either::Right((Either::Left((Err(failure), _)), _)) => Outcome::Failed(failure),
            Either::Right((Either::Right((never, _)), _)) => never,
        }
    }

    /// An error is none that time mends.
    async fn asked_until_back(self: &Rc<Self>, position: ShardPosition) -> Result<(), Failure> {
        loop {
            self.runtime.clock().sleep(RETRY_AFTER).await;
            match self.open_again(position).await {
                Ok(()) => return Ok(()),
                Err(failure) => match verdict(&failure) {
                    Verdict::Fenced | Verdict::Lost => return Err(failure),
                    _ => {}
                },
            }
        }
    }

    fn is_needed(&self, position: ShardPosition) -> bool {
        self.ended.borrow().is_none() && self.replicas.borrow().holds_in_sync(position)
    }

    fn end_for_loss(&self, position: ShardPosition, why: &dyn std::fmt::Display, below: BelowMinimum) {
        self.end(format!(
            "shard {} lost data ({why}) and slice {} would keep {} of at least {} replicas",
            self.shards[position].id, below.slice, below.remaining, below.min
        ));
    }

    /// Its node may have been started on another port.
    pub(super) async fn look_up(&self, position: ShardPosition) {
        let shard = &self.shards[position];
        let peer = shard.peer.borrow().clone();
        if !self.links.may_look_up(peer.node) {
            return;
        }
        match address_of(&self.runtime, peer.node, shard.id).await {
            Ok(address) if address != peer.address => {
                tracing::info!(shard = %shard.id, from = %peer.address, to = %address, "the shard listens elsewhere");
                *shard.peer.borrow_mut() = Rc::new(Peer { address, ..(*peer).clone() });
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(shard = %shard.id, %error, "cannot look up where the shard listens"),
        }
    }

    /// In sync as before when it returns, or no longer required.
    async fn open_again(self: &Rc<Self>, position: ShardPosition) -> Result<(), Failure> {
        let shard = &self.shards[position];
        while self.is_needed(position) {
            let slices = self.replicas.borrow().slices_held_to(position);
            let opened = ask_open(self, position, slices).await?;
            let Opened { incarnation, flush_point, missing, .. } = opened;
            if flush_point > self.flush_point.get() {
                let ours = self.flush_point.get();
                let because = format!("the shard says everything up to {flush_point} is flushed, the writer {ours}");
                return Err(Failure::Refused(Refusal::Malformed { because }));
            }
            shard.restarted.set(incarnation != shard.incarnation.get());
            if !missing.is_empty() {
                let why = format!("it has no instances of slices {missing:?}");
                tracing::error!(volume = %self.record.name, shard = %shard.id, %why, "replica lost data");
                if let Err(below) = self.mark_stale(position, Loss::Missing(missing)).await {
                    self.end_for_loss(position, &why, below);
                }
                continue;
            }
            if shard.restarted.get() {
                self.replay(position, incarnation).await?;
                // Nothing of it is durable there; a flush that begins now, or is under way, has to ask.
                shard.written.set(shard.written.get() + 1);
                shard.incarnation.set(incarnation);
            }
            return Ok(());
        }
        Ok(())
    }

    /// Everything it was sent in its former life and did not make durable. What is begun from now on is not among it:
    /// its former life can have answered none of that.
    async fn replay(self: &Rc<Self>, position: ShardPosition, incarnation: Incarnation) -> Result<(), Failure> {
        let shard = &self.shards[position];
        let records = self.replay.borrow().of_slots(|slot| self.replicas.borrow().is_held_to(slot, position));
        let (count, bytes) = (records.len(), records.iter().map(|record| record.payload.len()).sum::<usize>());
        tracing::warn!(volume = %self.record.name, shard = %shard.id, records = count, bytes, "replica restarted; replaying");
        let replays = stream::iter(records).map(|record| self.replay_one(position, incarnation, record));
        replays.buffer_unordered(REPLAYS_IN_FLIGHT_MAX).try_collect::<()>().await?;
        tracing::info!(volume = %self.record.name, shard = %shard.id, records = count, "replayed");
        Ok(())
    }

    async fn replay_one(
        self: &Rc<Self>,
        position: ShardPosition,
        incarnation: Incarnation,
        record: Rc<Kept>,
    ) -> Result<(), Failure> {
        let operation = undurable(&record.operation);
        let operation = operation.as_ref().unwrap_or(&record.operation);
        while self.ended.borrow().is_none() && self.replicas.borrow().is_held_to(record.slot, position) {
            let shard = &self.shards[position];
            match self.ask_incarnation(shard, incarnation, operation, &record.payload).await {
                Ok(_) => return Ok(()),
                Err(failure) => match verdict(&failure) {
                    Verdict::Busy | Verdict::Full | Verdict::Local => self.runtime.clock().sleep(RETRY_AFTER).await,
                    _ => return Err(failure),
                },
            }
        }
        Ok(())
    }
}

/// What became of a replica that was to be marked as away.
enum Outcome {
    /// It is no longer required, or in sync as before.
    Settled,
    /// It cannot be done without.
    Kept(BelowMinimum),
    /// It is back, and worse than away.
    Failed(Failure),
}

/// Nothing was heard of it for as long as it gets anyway; who refuses a connection may be starting.
fn is_gone(verdict: Verdict, failure: &Failure) -> bool {
    let starting = matches!(failure, Failure::Link(LinkError::ConnectionRefused { .. } | LinkError::Closed { .. }));
    verdict == Verdict::Unreachable && !starting
}

/// What was answered as durable was not lost, and what was not answered is sent again by whoever waits for it: an
/// fdatasync for each record would only make it slow.
fn undurable(operation: &Operation) -> Option<Operation> {
    let mut changed = match operation {
        Operation::Write { durable: true, .. } | Operation::Clear { durable: true, .. } => operation.clone(),
        _ => return None,
    };
    if let Operation::Write { durable, .. } | Operation::Clear { durable, .. } = &mut changed {
        *durable = false;
    }
    Some(changed)
}

/// As long as one of these is there, requests of the volume wait for a replica: one line when that begins, and one
/// when it ends.
struct Waiting<R: Runtime>(Rc<Session<R>>);

impl<R: Runtime> Waiting<R> {
    fn begin(session: &Rc<Session<R>>, position: ShardPosition, failure: &Failure, below: BelowMinimum) -> Self {
        let shard = session.shards[position].id;
        if session.waiting.replace(session.waiting.get() + 1) == 0 {
            session.counters.waits.add(1);
            session.counters.volumes_waiting.add(1);
            tracing::warn!(volume = %session.record.name, %shard, %failure, slice = %below.slice,
                would_remain = below.remaining, at_least = below.min, "too few replicas; I/O waits");
        }
        Self(session.clone())
    }
}

impl<R: Runtime> Drop for Waiting<R> {
    fn drop(&mut self) {
        self.0.waiting.set(self.0.waiting.get() - 1);
        if self.0.waiting.get() > 0 {
            return;
        }
        self.0.counters.volumes_waiting.sub(1);
        if self.0.ended.borrow().is_none() {
            tracing::warn!(volume = %self.0.record.name, "enough replicas again; I/O goes on");
        }
    }
}
