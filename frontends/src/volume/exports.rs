//! The volumes of a cluster, by name: attached at first use, shared by all who use them, released when nobody has
//! used them for a while.

use super::attach::{Attacher, Surroundings, attach, find, metadata_error};
use super::counters::{Counters, Held, Number};
use super::guard;
use super::lease::{LeaseTerms, ProcessLease};
use super::links::Links;
use super::own::give_up;
use super::places::Places;
use super::replay::{Budget, ReplayLimits};
use super::session::Session;
use super::share::Share;
use super::sizes::Sizes;
use super::writer::Begun;
use crate::device::{Device, ExportInfo, Exports, Piece, Run, VolumeError};
use bytes::Bytes;
use futures::channel::oneshot;
use futures::future::{Either, select};
use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use torus_rpc::metadata::{Compare, Metadata, Transaction, Write};
use torus_rpc::notify::Notify;
use torus_rpc::runtime::{Class, Clock, Runtime, Spawn};
use torus_schema::hash::Map;
use torus_schema::ids::{Epoch, VolumeId};
use torus_schema::limits::MARKS_IN_FLIGHT_MAX;
use torus_schema::records::{EpochRecord, VolumeRecord, VolumeState, decode, encode, keys};

/// A client that reconnects within this finds its volume still attached.
const RELEASE_AFTER: Duration = Duration::from_secs(5);
/// A request that waits for replicas longer than this, and whose client has gone, is given up.
const RELEASE_WITHIN: Duration = Duration::from_secs(10);

/// What holds for all volumes of a process.
#[derive(Clone, Copy, Debug, Default)]
pub struct VolumeSettings {
    /// A request that waits longer than this for replicas fails; `None`: it waits for ever.
    pub io_timeout: Option<Duration>,
    pub replay: ReplayLimits,
    pub lease: LeaseTerms,
    /// No read is asked of a second replica because the first is slow.
    pub never_hedge: bool,
}

pub struct VolumeExports<R: Runtime> {
    shared: Rc<Shared<R>>,
}

impl<R: Runtime> Clone for VolumeExports<R> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

struct Shared<R: Runtime> {
    runtime: R,
    attacher: Attacher,
    io_timeout: Option<Duration>,
    terms: LeaseTerms,
    never_hedge: bool,
    links: Rc<Links<R>>,
    budget: Rc<Budget>,
    counters: Arc<Counters>,
    marking: Rc<Share>,
    lease: RefCell<Option<Rc<ProcessLease<R>>>>,
    volumes: RefCell<Map<VolumeId, Entry<R>>>,
    changed: Notify,
    places: Places<R>,
    sizes: Sizes<R>,
}

enum Entry<R: Runtime> {
    /// Somebody attaches or releases it; wait.
    Busy,
    Attached {
        session: Rc<Session<R>>,
        users: Rc<Users>,
        _counted: Held,
    },
}

#[derive(Default)]
struct Users {
    count: Cell<usize>,
    /// Counts how often it became unused, so that only the last timer releases.
    idle: Cell<u64>,
}

impl<R: Runtime> VolumeExports<R> {
    pub fn new(runtime: R, attacher: Attacher) -> Self {
        Self::with_settings(runtime, attacher, VolumeSettings::default())
    }

    pub fn with_settings(runtime: R, attacher: Attacher, settings: VolumeSettings) -> Self {
        let links = Links::new(runtime.clone());
        let places = Places::new(runtime.clone());
        let sizes = Sizes::new(runtime.clone());
        let shared = Shared {
            runtime,
            attacher,
            io_timeout: settings.io_timeout,
            places,
            sizes,
            terms: settings.lease,
            never_hedge: settings.never_hedge,
            links,
            budget: Budget::new(settings.replay),
            counters: Arc::default(),
            marking: Share::new(MARKS_IN_FLIGHT_MAX, 0),
            lease: RefCell::default(),
            volumes: RefCell::default(),
            changed: Notify::default(),
        };
        Self { shared: Rc::new(shared) }
    }

    pub fn counters(&self) -> Arc<Counters> {
        self.shared.counters.clone()
    }

    /// Flushes and lets go of every volume: for an orderly end.
    pub async fn release_all(&self) {
        let volumes: Vec<_> = self.shared.volumes.borrow().keys().copied().collect();
        for volume in volumes {
            let taken = self.shared.take(volume, |_| true).await;
            if let Some(session) = taken {
                self.shared.release(session).await;
            }
        }
        let lease = self.shared.lease.take();
        if let Some(lease) = lease
            && let Err(error) = self.shared.runtime.metadata().revoke_lease(lease.id()).await
        {
            tracing::warn!(%error, "the process's lease ends by itself");
        }
    }

    async fn attach_volume(&self, name: &str) -> Result<AttachedVolume<R>, VolumeError> {
        let shared = &self.shared;
        let volume = match shared.attached_as(name) {
            Some(session) => session.record.id,
            None => find(&shared.runtime, name).await?,
        };
        let found = shared
            .changed
            .until(|| match shared.volumes.borrow().get(&volume) {
                Some(Entry::Busy) => None,
                Some(Entry::Attached { session, users, .. }) => Some(Some((session.clone(), users.clone()))),
                None => Some(None),
            })
            .await;
        let ended = match found {
            Some((session, users)) if session.ended.borrow().is_none() => {
                return Ok(AttachedVolume::new(shared.clone(), session, users));
            }
            Some((session, _)) => Some(session),
            None => None,
        };
        shared.volumes.borrow_mut().insert(volume, Entry::Busy);
        if let Some(session) = ended {
            give_up(&shared.runtime, volume, session.status.owner_revision.get()).await;
        }
        let attached = shared.attach(name).await;
        let result = match attached {
            Ok(session) => {
                let users = Rc::new(Users::default());
                let _counted = Number::hold(&shared.counters, |counters| &counters.volumes_attached);
                let entry = Entry::Attached { session: session.clone(), users: users.clone(), _counted };
                shared.volumes.borrow_mut().insert(volume, entry);
                Ok(AttachedVolume::new(shared.clone(), session, users))
            }
            Err(error) => {
                shared.volumes.borrow_mut().remove(&volume);
                Err(error)
            }
        };
        shared.changed.notify();
        result
    }
}

impl<R: Runtime> Shared<R> {
    async fn attach(self: &Rc<Self>, name: &str) -> Result<Rc<Session<R>>, VolumeError> {
        let lease = self.lease.borrow().clone();
        let lease = match lease {
            Some(lease) => lease,
            None => {
                let lease = ProcessLease::grant(self.runtime.clone(), self.terms).await.map_err(metadata_error)?;
                self.keep_lease(lease)
            }
        };
        let (runtime, links, budget) = (self.runtime.clone(), self.links.clone(), self.budget.clone());
        let around = Surroundings {
            runtime,
            links,
            lease,
            budget,
            counters: self.counters.clone(),
            marking: self.marking.clone(),
            never_hedge: self.never_hedge,
        };
        let session = attach(around, name, &self.attacher).await?;
        self.places.follow(&session);
        self.sizes.follow(&session);
        Ok(session)
    }

    /// The first one counts, and with it begins the look at what is owned by it.
    fn keep_lease(self: &Rc<Self>, granted: Rc<ProcessLease<R>>) -> Rc<ProcessLease<R>> {
        let mut kept = self.lease.borrow_mut();
        if let Some(lease) = &*kept {
            return lease.clone();
        }
        *kept = Some(granted.clone());
        let (shared, lease) = (Rc::downgrade(self), Rc::downgrade(&granted));
        let sessions = move || Some(shared.upgrade()?.sessions());
        let watching = guard::watch(self.runtime.clone(), lease, sessions);
        self.runtime.spawn().spawn(Class::Background, watching);
        granted
    }

    /// What we own keeps its name: a client that connects again needs no metadata store.
    fn attached_as(&self, name: &str) -> Option<Rc<Session<R>>> {
        self.sessions().into_iter().find(|session| session.record.name == name)
    }

    fn sessions(&self) -> Vec<Rc<Session<R>>> {
        let volumes = self.volumes.borrow();
        let attached = volumes.values().filter_map(|entry| match entry {
            Entry::Attached { session, .. } => Some(session.clone()),
            Entry::Busy => None,
        });
        attached.filter(|session| session.ended.borrow().is_none()).collect()
    }

    /// Takes an attached volume out if `wanted`, leaving it busy; whoever takes it releases it.
    async fn take(&self, volume: VolumeId, wanted: impl Fn(&Users) -> bool) -> Option<Rc<Session<R>>> {
        self.changed
            .until(|| {
                let mut volumes = self.volumes.borrow_mut();
                match volumes.get(&volume) {
                    Some(Entry::Busy) => None,
                    Some(Entry::Attached { session, users, .. }) if wanted(users) => {
                        let session = session.clone();
                        volumes.insert(volume, Entry::Busy);
                        Some(Some(session))
                    }
                    _ => Some(None),
                }
            })
            .await
    }

    async fn release(&self, session: Rc<Session<R>>) {
        let volume = session.record.id;
        {
            let settled = std::pin::pin!(settle(&session));
            let too_long = std::pin::pin!(self.runtime.clock().sleep(RELEASE_WITHIN));
            if let Either::Right(_) = select(settled, too_long).await {
                session.end(format!("it was released while requests waited for more than {RELEASE_WITHIN:?}"));
            }
        }
        session.detach();
        give_up(&self.runtime, volume, session.status.owner_revision.get()).await;
        self.volumes.borrow_mut().remove(&volume);
        self.changed.notify();
    }
}

/// Behind everything that was submitted, even by clients that have gone: flush, and say how far.
async fn settle<R: Runtime>(session: &Rc<Session<R>>) {
    let all = session.locks.lock(0..u64::MAX).await;
    if session.ended.borrow().is_none() {
        match session.flush().await {
            Ok(()) => publish_flush_point(session).await,
            Err(error) => tracing::warn!(volume = %session.record.name, %error, "released without a flush"),
        }
    }
    drop(all);
}

/// So that the next attach has less to look at. A lower bound is always safe, so a failure is no more than a pity.
async fn publish_flush_point<R: Runtime>(session: &Session<R>) {
    let (owner, key) = (keys::owner(session.record.id), keys::epoch(session.record.id));
    let flush_point = session.flush_point.get().into();
    let record = EpochRecord { epoch: session.epoch, flush_point, ..EpochRecord::default() };
    let transaction = Transaction {
        compares: vec![
            Compare::CreateRevision(owner, session.status.owner_revision.get()),
            // Whoever takes over moves the epoch first; it must not be set back.
            Compare::ModRevision(key.clone(), session.status.epoch_revision),
        ],
        writes: vec![Write::Put { key, value: encode(&record), lease: None }],
        reads: vec![],
    };
    if let Err(error) = session.runtime.metadata().transact(transaction).await {
        tracing::warn!(volume = %session.record.name, %error, "cannot store the flush point");
    }
}

impl<R: Runtime> Exports for VolumeExports<R> {
    type Device = AttachedVolume<R>;

    async fn list(&self) -> Result<Vec<ExportInfo>, VolumeError> {
        let range = self.shared.runtime.metadata().range(&keys::volumes()).await.map_err(metadata_error)?;
        let mut exports = Vec::new();
        for entry in range.entries {
            let record: VolumeRecord = decode(&entry.key, &entry.value)
                .map_err(|error| VolumeError::Metadata { because: error.to_string() })?;
            if record.state == VolumeState::Ready {
                exports.push(info(&record));
            }
        }
        exports.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(exports)
    }

    async fn describe(&self, name: &str) -> Result<ExportInfo, VolumeError> {
        if let Some(session) = self.shared.attached_as(name) {
            return Ok(ExportInfo { size_bytes: session.size_bytes.get(), ..info(&session.record) });
        }
        let volume = find(&self.shared.runtime, name).await?;
        let key = keys::volume(volume);
        let entry = self.shared.runtime.metadata().get(&key).await.map_err(metadata_error)?;
        let entry = entry.ok_or_else(|| VolumeError::NotFound { name: name.to_string() })?;
        let record: VolumeRecord =
            decode(&key, &entry.value).map_err(|error| VolumeError::Metadata { because: error.to_string() })?;
        Ok(info(&record))
    }

    async fn attach(&self, name: &str) -> Result<AttachedVolume<R>, VolumeError> {
        // In a task of its own: a client that goes away must not leave the entry busy.
        let (attached, result) = oneshot::channel();
        let (exports, name) = (self.clone(), name.to_string());
        self.shared.runtime.spawn().spawn(Class::Foreground, async move {
            let _ = attached.send(exports.attach_volume(&name).await);
        });
        result.await.unwrap_or_else(|_| Err(ended("the process ends")))
    }
}

fn info(record: &VolumeRecord) -> ExportInfo {
    ExportInfo {
        name: record.name.clone(),
        size_bytes: record.size_bytes,
        read_only: false,
        description: format!("Torus volume, {} replicas", record.replicas),
    }
}

fn ended(because: &str) -> VolumeError {
    VolumeError::SessionEnded { because: because.to_string() }
}

/// One user of an attached volume.
pub struct AttachedVolume<R: Runtime> {
    shared: Rc<Shared<R>>,
    session: Rc<Session<R>>,
    users: Rc<Users>,
}

impl<R: Runtime> AttachedVolume<R> {
    pub fn name(&self) -> &str {
        &self.session.record.name
    }

    /// Whether everything that was answered in the epoch before is there, flushed or not.
    pub fn keeps_all(&self) -> bool {
        self.session.keeps_all.get()
    }

    fn new(shared: Rc<Shared<R>>, session: Rc<Session<R>>, users: Rc<Users>) -> Self {
        users.count.set(users.count.get() + 1);
        Self { shared, session, users }
    }

    /// In which it is written; later than that of every writer before.
    pub fn epoch(&self) -> Epoch {
        self.session.epoch
    }

    /// Runs in a task of its own: a caller that goes away abandons the waiting, never what was sent. What has sent
    /// nothing yet when its time is over is given up, so that requests which were answered do not pile up.
    async fn detached<F: Future<Output = Result<(), VolumeError>> + 'static>(
        &self,
        work: impl FnOnce(Rc<Session<R>>, Rc<Begun>) -> F,
    ) -> Result<(), VolumeError> {
        let (done, result) = oneshot::channel();
        let begun = Rc::new(Begun::default());
        let work = work(self.session.clone(), begun.clone());
        let deadline = self.deadline();
        self.session.runtime.spawn().spawn(Class::Foreground, async move {
            let Some(deadline) = deadline else {
                let _ = done.send(work.await);
                return;
            };
            match select(Box::pin(work), Box::pin(deadline)).await {
                Either::Left((result, _)) => _ = done.send(result),
                Either::Right((timed_out, work)) => {
                    let _ = done.send(Err(timed_out));
                    if begun.get() {
                        let _ = work.await;
                    }
                }
            }
        });
        result.await.unwrap_or_else(|_| Err(ended("the process ends")))
    }

    /// What only looks may be given up at any time.
    async fn timed<T>(&self, looking: impl Future<Output = Result<T, VolumeError>>) -> Result<T, VolumeError> {
        let Some(deadline) = self.deadline() else {
            return looking.await;
        };
        match select(pin!(looking), pin!(deadline)).await {
            Either::Left((found, _)) => found,
            Either::Right((timed_out, _)) => Err(timed_out),
        }
    }

    /// Ready when a request that starts now has waited long enough; `None`: there is no such time.
    fn deadline(&self) -> Option<impl Future<Output = VolumeError> + 'static> {
        let timeout = self.shared.io_timeout?;
        let sleep = self.shared.runtime.clock().sleep(timeout);
        let counters = self.shared.counters.clone();
        Some(async move {
            sleep.await;
            counters.io_timeouts.add(1);
            VolumeError::TimedOut { waited_ms: timeout.as_millis() as u64 }
        })
    }
}

impl<R: Runtime> Clone for AttachedVolume<R> {
    fn clone(&self) -> Self {
        Self::new(self.shared.clone(), self.session.clone(), self.users.clone())
    }
}

impl<R: Runtime> Drop for AttachedVolume<R> {
    fn drop(&mut self) {
        self.users.count.set(self.users.count.get() - 1);
        if self.users.count.get() > 0 {
            return;
        }
        let idle = self.users.idle.get() + 1;
        self.users.idle.set(idle);
        let (shared, volume, users) = (self.shared.clone(), self.session.record.id, self.users.clone());
        self.shared.runtime.spawn().spawn(Class::Foreground, async move {
            shared.runtime.clock().sleep(RELEASE_AFTER).await;
            let unused =
                |those: &Users| std::ptr::eq(those, &*users) && those.count.get() == 0 && those.idle.get() == idle;
            let taken = shared.take(volume, unused).await;
            if let Some(session) = taken {
                shared.release(session).await;
            }
        });
    }
}

impl<R: Runtime> Device for AttachedVolume<R> {
    fn size_bytes(&self) -> u64 {
        self.session.size_bytes.get()
    }

    fn read_only(&self) -> bool {
        false
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Vec<Piece>, VolumeError> {
        self.timed(async {
            let _part = self.session.part(&self.session.reading, length).await;
            self.session.read(offset, length).await
        })
        .await
    }

    async fn write(&self, offset: u64, data: Bytes, durable: bool) -> Result<(), VolumeError> {
        let write = |session: Rc<Session<R>>, begun: Rc<Begun>| async move {
            let _part = session.part(&session.writing, data.len() as u64).await;
            session.write(offset, data, durable, &begun).await
        };
        self.detached(write).await
    }

    async fn clear(&self, offset: u64, length: u64, durable: bool, advisory: bool) -> Result<(), VolumeError> {
        let clear = |session: Rc<Session<R>>, begun: Rc<Begun>| async move {
            let _part = session.part(&session.writing, 0).await;
            session.clear(offset, length, durable, advisory, &begun).await
        };
        self.detached(clear).await
    }

    async fn map(&self, offset: u64, length: u64) -> Result<Vec<Run>, VolumeError> {
        self.timed(async {
            let _part = self.session.part(&self.session.reading, 0).await;
            self.session.map(offset, length).await
        })
        .await
    }

    async fn ended(&self) -> String {
        self.session.changed.until(|| self.session.ended.borrow().clone()).await
    }

    async fn flush(&self) -> Result<(), VolumeError> {
        self.detached(|session, _| async move { session.flush().await }).await
    }
}
