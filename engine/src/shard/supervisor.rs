//! Keeps a shard open on a disk that may fail. After an error of a write or a sync the shard answers nothing any more
//! (protocol rule 16); here it is given up, and opened anew from what the disk really holds: no sync is tried again, the
//! index is read from the disk, and the new incarnation tells every writer that what was not durable may be gone.
//!
//! ```text
//!            a write or sync failed            nothing of it is in flight            it opens
//!   Open ────────────────────────► Failing ───────────────────────► Down ───────────────────► Open
//!                                                                     ▲ │ it does not: a longer pause
//!                                                                     └─┘
//! ```
//! Why it waits until nothing is in flight: a write of the old shard that reached the disk after the new one had read
//! it could overwrite what the new one put there. A disk that hangs for good is therefore never opened again, which is
//! what it deserves.
//!
//! A disk that has vanished is looked for again and again, ever less often; requests are refused meanwhile, so that
//! the writers go on with the other replicas.

use super::course::Measured;
use super::{Chunk, Shard, ShardError, ShardIdentity, ShardStatistics};
use super::{Chunks, DamageReport, PeerTable, ScrubPass, ScrubReport};
use bytes::Bytes;
use futures::future::{Either, select};
use std::cell::{Cell, RefCell};
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use torus_rpc::control::HeldVolume;
use torus_rpc::message::{Answer, Envelope, Operation, Refusal, Reply};
use torus_rpc::notify::Notify;
use torus_rpc::runtime::{Class, Clock, Disk, Instant, Runtime, Spawn};
use torus_rpc::server::{Handled, Request};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::VolumeId;
use torus_schema::limits::{DISK_REOPEN_PAUSE_MAX, DISK_REOPEN_PAUSE_MIN, RESYNC_BYTES_S};

/// Where a shard's disk comes from, again after each failure.
pub trait Media<R: Runtime>: 'static {
    fn open(&self) -> impl Future<Output = Result<R::Disk, String>>;
}

pub struct Supervisor<R: Runtime, M> {
    runtime: R,
    media: M,
    identity: ShardIdentity,
    key: ClusterKey,
    current: RefCell<Current<R>>,
    peers: RefCell<Arc<PeerTable>>,
    /// Told after every change of `current` and when it shall close.
    changed: Notify,
    closing: Cell<bool>,
    failures: Cell<u32>,
    resync_bytes_s: Cell<u64>,
    measured: Measured,
}

enum Current<R: Runtime> {
    Open(Rc<Shard<R>>),
    Down { because: String, last: ShardStatistics },
}

/// A shard's numbers, and how its disk is.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Health {
    /// The last known ones while the disk is away.
    pub statistics: ShardStatistics,
    /// Why nothing is answered; `None`: all is well.
    pub failed: Option<String>,
    /// How often the disk failed since the node was started.
    pub failures: u32,
}

impl<R: Runtime, M: Media<R>> Supervisor<R, M> {
    /// What is wrong at the start is for the operator to see at once: only later failures are waited out.
    pub async fn start(
        runtime: R,
        media: M,
        identity: ShardIdentity,
        key: ClusterKey,
    ) -> Result<Rc<Self>, SupervisorError> {
        let shard = open(&runtime, &media, identity, &key).await?;
        let supervisor = Rc::new(Self {
            runtime,
            media,
            identity,
            key,
            current: RefCell::new(Current::Open(shard)),
            peers: RefCell::default(),
            changed: Notify::default(),
            closing: Cell::new(false),
            failures: Cell::new(0),
            resync_bytes_s: Cell::new(RESYNC_BYTES_S),
            measured: Measured::default(),
        });
        supervisor.runtime.spawn().spawn(Class::Foreground, supervisor.clone().supervise());
        Ok(supervisor)
    }

    /// `None` while the disk is away.
    pub fn shard(&self) -> Option<Rc<Shard<R>>> {
        match &*self.current.borrow() {
            Current::Open(shard) => Some(shard.clone()),
            Current::Down { .. } => None,
        }
    }

    fn open_shard(&self) -> Result<Rc<Shard<R>>, Refusal> {
        match &*self.current.borrow() {
            Current::Open(shard) => Ok(shard.clone()),
            Current::Down { because, .. } => Err(Refusal::Disk { because: because.clone() }),
        }
    }

    pub async fn handle(&self, envelope: Envelope, operation: Operation, payload: Bytes) -> (Reply, Chunks<R>) {
        let arrived = self.runtime.clock().now();
        let handled = self.handle_arrived(&mut Request { arrived, envelope, operation, payload }).await;
        (handled.reply, handled.chunks)
    }

    /// A request that came some time ago; when its answer is sent, `measured` wants to be told.
    pub async fn handle_arrived(&self, request: &mut Request) -> Handled<Chunk<<R::Disk as Disk>::Bytes>> {
        let shard = match self.open_shard() {
            Ok(shard) => shard,
            Err(refusal) => return Reply::of(Answer::Refused(refusal)).into(),
        };
        let (reply, chunks, course) = shard.handle_arrived(request).await;
        let finished = course.map(|course| self.measured.answered(request.envelope.volume, course));
        Handled { reply, chunks, finished }
    }

    /// How long the stages of its requests took, since the process was started.
    pub fn measured(&self) -> &Measured {
        &self.measured
    }

    /// Refused while the disk is away: a volume is gone only when its disk knows.
    pub async fn drop_volume(&self, volume: VolumeId) -> Result<(), ShardError> {
        self.open_shard().map_err(ShardError::Refused)?.drop_volume(volume).await
    }

    pub fn health(&self) -> Health {
        let failures = self.failures.get();
        match &*self.current.borrow() {
            Current::Open(shard) => {
                let failed = shard.failure().map(|refusal| refusal.to_string());
                Health { statistics: shard.statistics(), failed, failures }
            }
            Current::Down { because, last } => {
                let statistics = ShardStatistics { failed: true, ..*last };
                Health { statistics, failed: Some(because.clone()), failures }
            }
        }
    }

    /// Nothing while the disk is away.
    pub fn start_scrub(&self, pass: ScrubPass, rate_bytes_s: u64) {
        self.shard().into_iter().for_each(|shard| shard.start_scrub(pass, rate_bytes_s));
    }

    pub fn stop_scrub(&self) -> Option<ScrubPass> {
        self.shard()?.stop_scrub()
    }

    pub fn scrub_report(&self) -> ScrubReport {
        self.shard().map(|shard| shard.scrub_report()).unwrap_or_default()
    }

    /// At most `limit` of each list.
    pub fn damage(&self, limit: usize) -> DamageReport {
        self.shard().map(|shard| shard.damage(limit)).unwrap_or_default()
    }

    /// An error: the disk is away.
    pub fn held(&self, only: Option<VolumeId>) -> Result<Vec<HeldVolume>, Refusal> {
        Ok(self.open_shard()?.held(only))
    }

    /// Bytes a second that resyncs write at most.
    pub fn set_resync_limit(&self, bytes_s: u64) {
        self.resync_bytes_s.set(bytes_s);
        self.shard().into_iter().for_each(|shard| shard.set_resync_limit(bytes_s));
    }

    pub fn set_peers(&self, table: Arc<PeerTable>) {
        *self.peers.borrow_mut() = table.clone();
        if let Some(shard) = self.shard() {
            shard.set_peers(table);
        }
    }

    /// See `Shard::close`. A disk that is away is not waited for.
    pub async fn close(&self) {
        self.closing.set(true);
        self.changed.notify();
        if let Some(shard) = self.shard() {
            shard.close().await;
        }
    }

    async fn supervise(self: Rc<Self>) {
        let mut pause = DISK_REOPEN_PAUSE_MIN;
        loop {
            let opened = self.runtime.clock().now();
            let Some(because) = self.wait_for_failure().await else { return };
            self.failures.set(self.failures.get().saturating_add(1));
            self.let_go(&because).await;
            // A disk that fails again as soon as it is used is not opened as fast as it fails.
            if self.since(opened) > DISK_REOPEN_PAUSE_MAX {
                pause = DISK_REOPEN_PAUSE_MIN;
            }
            let Some(shard) = self.reopen(&mut pause).await else { return };
            shard.set_peers(self.peers.borrow().clone());
            shard.set_resync_limit(self.resync_bytes_s.get());
            *self.current.borrow_mut() = Current::Open(shard);
            self.changed.notify();
        }
    }

    fn since(&self, earlier: Instant) -> Duration {
        self.runtime.clock().now().since(earlier)
    }

    /// Why; `None`: it was closed.
    async fn wait_for_failure(&self) -> Option<String> {
        let shard = self.shard()?;
        let failed = shard.wait_for_failure();
        let closed = self.changed.until(|| self.closing.get().then_some(()));
        futures::pin_mut!(failed, closed);
        match select(failed, closed).await {
            Either::Left((refusal, _)) => Some(refusal.to_string()),
            Either::Right(_) => None,
        }
    }

    /// Until the failed shard has nothing in flight any more.
    async fn let_go(&self, because: &str) {
        let last = self.health().statistics;
        let down = Current::Down { because: because.to_string(), last };
        let Current::Open(shard) = std::mem::replace(&mut *self.current.borrow_mut(), down) else { return };
        self.changed.notify();
        let gone = shard.gone();
        drop(shard);
        // Ends by being dropped, with the shard.
        let _ = gone.await;
    }

    /// `None`: it is to be closed instead.
    async fn reopen(&self, pause: &mut Duration) -> Option<Rc<Shard<R>>> {
        loop {
            let sleep = self.runtime.clock().sleep(*pause);
            let closed = self.changed.until(|| self.closing.get().then_some(()));
            futures::pin_mut!(sleep, closed);
            if let Either::Right(_) = select(sleep, closed).await {
                return None;
            }
            *pause = (*pause * 2).min(DISK_REOPEN_PAUSE_MAX);
            match open(&self.runtime, &self.media, self.identity, &self.key).await {
                Ok(shard) => {
                    tracing::warn!(shard = %self.identity.shard, "the disk works again; opened from what it holds");
                    return Some(shard);
                }
                Err(error) => {
                    let (shard, next_s) = (self.identity.shard, pause.as_secs());
                    tracing::error!(%shard, %error, next_s, "the disk cannot be opened; trying again");
                    if let Current::Down { because, .. } = &mut *self.current.borrow_mut() {
                        *because = error.to_string();
                    }
                }
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    #[error("{because}")]
    Media { because: String },
    #[error(transparent)]
    Shard(#[from] ShardError),
}

async fn open<R: Runtime, M: Media<R>>(
    runtime: &R,
    media: &M,
    identity: ShardIdentity,
    key: &ClusterKey,
) -> Result<Rc<Shard<R>>, SupervisorError> {
    let disk = media.open().await.map_err(|because| SupervisorError::Media { because })?;
    Ok(Shard::open(runtime.clone(), disk, identity, key.clone()).await?)
}
