//! One epoch of one volume: who its replicas are, and the loop that gets a request to one of them until it is done or
//! no longer required.

use super::alarms::Alarms;
use super::counters::Counters;
use super::course::{Course, Leg};
use super::habit::Habit;
use super::hedge::Hedging;
use super::lease::ProcessLease;
use super::links::Links;
use super::locks::RangeLocks;
use super::replay::ReplayBuffer;
use super::replicas::{Replicas, ShardPosition};
use super::resync::Resyncing;
use super::retain::Retaining;
use super::share::{Share, Taken};
use super::status::StatusKeeper;
use super::together::Together;
use super::window::Window;
use crate::device::VolumeError;
use bytes::Bytes;
use futures::future::{Either, select};
use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use torus_rpc::error::LinkError;
use torus_rpc::message::{Answer, Envelope, Operation, Refusal, Token};
use torus_rpc::notify::Notify;
use torus_rpc::runtime::{Clock, Instant, Peer, Runtime};
use torus_schema::ids::{Epoch, Incarnation, RingGeneration, ShardId, Version};
use torus_schema::records::{OwnerRecord, VolumeRecord};
use torus_schema::ring::placement::Placement;

/// Between two attempts where waiting is all that can be done.
const RETRY_AFTER: Duration = Duration::from_millis(100);
/// A payload that arrives corrupt this often is not the network's bad luck.
const BUSY_ATTEMPTS: u32 = 30;

pub(super) struct Session<R: Runtime> {
    pub runtime: R,
    pub links: Rc<Links<R>>,
    pub lease: Rc<ProcessLease<R>>,
    pub counters: Arc<Counters>,
    pub marking: Rc<Share>,
    /// What its reads, and its writes, may take at once.
    pub reading: Rc<Share>,
    pub writing: Rc<Share>,
    pub hedging: RefCell<Hedging>,
    pub slow_reads: Rc<Alarms>,
    pub habit: RefCell<Habit>,
    /// As it was when it was attached: its size is below.
    pub record: VolumeRecord,
    pub size_bytes: Cell<u64>,
    /// As it stands in the metadata store, but for a lease that was replaced.
    pub owner: OwnerRecord,
    pub epoch: Epoch,
    pub placement: Placement,
    pub shards: Vec<Shard>,
    pub replicas: RefCell<Replicas>,
    pub status: StatusKeeper,
    pub window: RefCell<Window>,
    pub locks: RangeLocks,
    pub retaining: Retaining,
    pub resyncing: Resyncing,
    /// F: everything up to it is durable on every in-sync replica.
    pub flush_point: Cell<Version>,
    /// Every record above F (protocol rule 9).
    pub replay: RefCell<ReplayBuffer>,
    /// Records that wait for room among what is kept.
    pub short_of_room: Cell<usize>,
    /// A flush of its own accord is under way.
    pub flushing_itself: Cell<bool>,
    /// For every slice there is a replica in sync that has been up since the attach before this one: everything that was
    /// answered then is there, flushed or not.
    pub keeps_all: Cell<bool>,
    /// How each shard is asked to open, at the attach and when it restarted.
    pub open: Open,
    /// Recoveries that wait for a replica which can neither answer nor be done without.
    pub waiting: Cell<usize>,
    pub ended: RefCell<Option<String>>,
    /// Replicas, window, `ended`, the size or what is recovering changed.
    pub changed: Notify,
    /// State of the lots by which reads choose a replica.
    pub lots: Cell<u64>,
    /// The last reads that went to one replica together.
    pub together: Cell<Option<Together>>,
}

pub(super) struct Open {
    pub token: Token,
    pub owner: String,
    /// For instances of slices that a replica lost.
    pub creation: Token,
    pub ring_slices: u32,
}

/// A shard with slices of the volume, as this session knows it.
pub(super) struct Shard {
    pub id: ShardId,
    /// A node that was started anew may listen elsewhere.
    pub peer: RefCell<Rc<Peer>>,
    /// Of the instances it is to hold: those of an earlier one are not what this volume means.
    pub generation: Cell<RingGeneration>,
    /// Its life that has everything this session has acknowledged. A later one is named here only when all it may lack
    /// has been replayed to it: until then every request of ours is refused there.
    pub incarnation: Cell<Incarnation>,
    /// It takes no new data, by its last answer.
    pub full: Cell<bool>,
    /// A request to it failed, and what becomes of it is being found out: requests wait, or go elsewhere.
    pub recovering: Cell<bool>,
    /// It lost what it held unflushed, and that has not been replayed to it yet.
    pub restarted: Cell<bool>,
    /// F as it is told, at most; see `resync`.
    pub flush_point_held: Cell<Option<Version>>,
    /// On our own host.
    pub local: bool,
    /// Writes it has answered, and how many of them are known to be durable there.
    pub written: Cell<u64>,
    pub synced: Cell<u64>,
    pub outstanding: Cell<u32>,
    /// Recent service time of reads, a moving average.
    pub service_us: Cell<u32>,
}

impl Shard {
    fn flush_point_told(&self, flush_point: Version) -> Version {
        self.flush_point_held.get().map_or(flush_point, |held| held.min(flush_point))
    }
}

/// Why one attempt did not succeed.
#[derive(Debug)]
pub(super) enum Failure {
    Refused(Refusal),
    Link(LinkError),
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Refused(refusal) => refusal.fmt(f),
            Failure::Link(error) => error.fmt(f),
        }
    }
}

/// What has to become of a replica that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Another writer owns the volume.
    Fenced,
    /// What it holds cannot be trusted: it can only go on as a stale replica.
    Lost,
    /// What it held unflushed is gone: it can go on when it has got that again.
    Restarted,
    /// It may come back as it was.
    Unreachable,
    /// Try again soon.
    Busy,
    /// This host is at fault, not the replica.
    Local,
    /// Making a replica stale would make no room; there is some again when something is deleted or cleaned.
    Full,
}

pub(super) fn verdict(failure: &Failure) -> Verdict {
    match failure {
        Failure::Refused(Refusal::StaleEpoch { .. } | Refusal::BadToken) => Verdict::Fenced,
        Failure::Refused(Refusal::NoSpace) => Verdict::Full,
        Failure::Refused(Refusal::Corrupt { .. }) => Verdict::Busy,
        Failure::Refused(Refusal::OtherIncarnation | Refusal::NotOpen | Refusal::Disk { .. }) => Verdict::Restarted,
        Failure::Refused(
            Refusal::NotOwner { .. }
            | Refusal::Damaged { .. }
            | Refusal::Malformed { .. }
            | Refusal::WrongPeer { .. }
            | Refusal::Source { .. },
        ) => Verdict::Lost,
        Failure::Link(LinkError::Local { .. }) => Verdict::Local,
        Failure::Link(_) => Verdict::Unreachable,
    }
}

impl<R: Runtime> Session<R> {
    pub fn check(&self) -> Result<(), VolumeError> {
        match &*self.ended.borrow() {
            Some(because) => Err(VolumeError::SessionEnded { because: because.clone() }),
            None => Ok(()),
        }
    }

    /// Every request that waits, and every later one, fails.
    pub fn end(&self, because: String) {
        let mut ended = self.ended.borrow_mut();
        if ended.is_none() {
            tracing::error!(volume = %self.record.name, epoch = %self.epoch, %because, "session ended");
            self.counters.sessions_ended.add(1);
            *ended = Some(because);
        }
        drop(ended);
        // Nothing is replayed any more, and whoever waits for room has to hear.
        self.replay.borrow_mut().release_through(u64::MAX);
        self.changed.notify();
    }

    /// The orderly end.
    pub fn detach(&self) {
        let because = "the volume was detached".to_string();
        self.ended.borrow_mut().get_or_insert(because);
        self.replay.borrow_mut().release_through(u64::MAX);
        self.changed.notify();
    }

    /// One attempt (the link makes its own to reconnect), for the shard's life that is up to date.
    pub async fn ask(&self, shard: &Shard, operation: &Operation, payload: &Bytes) -> Result<(Answer, Bytes), Failure> {
        self.ask_incarnation(shard, shard.incarnation.get(), operation, payload).await
    }

    pub async fn ask_incarnation(
        &self,
        shard: &Shard,
        incarnation: Incarnation,
        operation: &Operation,
        payload: &Bytes,
    ) -> Result<(Answer, Bytes), Failure> {
        let now = self.runtime.clock().now();
        let (answer, payload, _) = self.ask_measured(shard, incarnation, operation, payload, now).await?;
        Ok((answer, payload))
    }

    /// `now`: the clock, read just before.
    pub async fn ask_measured(
        &self,
        shard: &Shard,
        incarnation: Incarnation,
        operation: &Operation,
        payload: &Bytes,
        now: Instant,
    ) -> Result<(Answer, Bytes, Leg), Failure> {
        let envelope = Envelope {
            volume: self.record.id,
            epoch: self.epoch,
            incarnation,
            generation: shard.generation.get(),
            flush_point: shard.flush_point_told(self.flush_point.get()),
        };
        let peer = shard.peer.borrow().clone();
        shard.outstanding.set(shard.outstanding.get() + 1);
        let outstanding = Outstanding(&shard.outstanding);
        let answered = self.links.call(&peer, &envelope, operation, payload, now).await;
        drop(outstanding);
        let (reply, payload, sent) = answered.map_err(Failure::Link)?;
        shard.full.set(reply.full);
        match reply.answer {
            Answer::Refused(refusal) => Err(Failure::Refused(refusal)),
            answer => Ok((answer, payload, Leg { sent, answered: self.runtime.clock().now(), took: reply.took })),
        }
    }

    /// Until the shard has done it, or is no longer required to: then it is marked stale in the metadata store, or the
    /// session has ended with an error. True: it was done.
    pub async fn require(
        self: &Rc<Self>,
        position: ShardPosition,
        required: impl Fn() -> bool,
        operation: &Operation,
        payload: &Bytes,
        course: &Course,
    ) -> Result<bool, VolumeError> {
        let shard = &self.shards[position];
        let mut refused = 0;
        loop {
            self.check()?;
            if !required() {
                return Ok(false);
            }
            let needless = || self.ended.borrow().is_some() || !required();
            if shard.recovering.get() {
                self.changed.until(|| (!shard.recovering.get() || needless()).then_some(())).await;
                continue;
            }
            let asked_of = shard.incarnation.get();
            // Waiting ends when nobody needs the answer any more; what was sent is carried out or not.
            let now = self.runtime.clock().now();
            let asked = pin!(self.ask_measured(shard, asked_of, operation, payload, now));
            let released = pin!(self.changed.until(|| needless().then_some(())));
            let failure = match select(asked, released).await {
                Either::Left((Ok((_, _, leg)), _)) => {
                    course.heard(leg);
                    return Ok(true);
                }
                Either::Left((Err(failure), _)) => failure,
                Either::Right(_) => continue,
            };
            // Apart, since every request would be as large as the rarest of its parts.
            Box::pin(self.attempt_failed(position, asked_of, failure, &mut refused)).await;
        }
    }

    /// Sees to it; returns when another attempt may be made. `refused`: how often there was nothing to do but to wait.
    async fn attempt_failed(
        self: &Rc<Self>,
        position: ShardPosition,
        asked_of: Incarnation,
        failure: Failure,
        refused: &mut u32,
    ) {
        let (shard, verdict) = (&self.shards[position], verdict(&failure));
        // Nobody waits for a replica that can be done without.
        let patient = verdict == Verdict::Fenced || (verdict == Verdict::Busy && *refused < BUSY_ATTEMPTS);
        if !patient && shard.incarnation.get() == asked_of && self.failed_on_its_way_back(position, &failure).await {
            return;
        }
        match verdict {
            Verdict::Busy if *refused >= BUSY_ATTEMPTS => {
                self.recover(position, asked_of, failure, Verdict::Unreachable);
            }
            Verdict::Busy | Verdict::Full | Verdict::Local => {
                if *refused == BUSY_ATTEMPTS {
                    tracing::warn!(volume = %self.record.name, shard = %shard.id, %failure, "waiting");
                }
                *refused += 1;
                if verdict == Verdict::Full {
                    // What was overwritten counts until F says that nothing takes the newer back; the next attempt
                    // carries it.
                    self.flush_soon();
                }
                self.runtime.clock().sleep(RETRY_AFTER).await;
            }
            verdict => self.recover(position, asked_of, failure, verdict),
        }
    }

    /// Room for one more request among those of this volume.
    pub async fn part(&self, share: &Rc<Share>, bytes: u64) -> Taken {
        if share.is_taken(bytes) {
            self.counters.requests_queued.add(1);
        }
        share.take(bytes).await
    }

    /// A number below `bound`, good enough to spread reads.
    pub fn lot(&self, bound: usize) -> usize {
        let mut x = self.lots.get();
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.lots.set(x);
        (x % bound as u64) as usize
    }
}

/// Counts down however the caller ends.
struct Outstanding<'a>(&'a Cell<u32>);

impl Drop for Outstanding<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
