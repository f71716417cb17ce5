//! The volumes of a cluster, by name: attached at first use, shared by all who use them, released when nobody has
//! used them for a while.

use super::attach::{Attacher, Surroundings, attach, find, metadata_error};
use super::attached::AttachedVolume;
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
use crate::device::{ExportInfo, Exports, VolumeError};
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
use torus_schema::ids::VolumeId;
use torus_schema::latency::Stages;
use torus_schema::limits::MARKS_IN_FLIGHT_MAX;
use torus_schema::records::{EpochRecord, VolumeRecord, VolumeState, decode, encode, keys};

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

pub(super) struct Shared<R: Runtime> {
    pub runtime: R,
    attacher: Attacher,
    pub io_timeout: Option<Duration>,
    terms: LeaseTerms,
    never_hedge: bool,
    links: Rc<Links<R>>,
    budget: Rc<Budget>,
    pub counters: Arc<Counters>,
    /// Of requests to the volumes of this executor.
    pub stages: Arc<Stages>,
    marking: Rc<Share>,
    lease: RefCell<Option<Rc<ProcessLease<R>>>>,
    volumes: RefCell<Map<VolumeId, Entry<R>>>,
    /// Under way.
    attaches: Cell<usize>,
    /// Nothing is attached any more.
    closing: Cell<bool>,
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
pub(super) struct Users {
    pub count: Cell<usize>,
    /// Counts how often it became unused, so that only the last timer releases.
    pub idle: Cell<u64>,
}

impl<R: Runtime> VolumeExports<R> {
    pub fn new(runtime: R, attacher: Attacher) -> Self {
        Self::with_settings(runtime, attacher, VolumeSettings::default())
    }

    pub fn with_settings(runtime: R, attacher: Attacher, settings: VolumeSettings) -> Self {
        Self::counting(runtime, attacher, settings, Arc::default())
    }

    /// What happens is added to `counters`, which other executors may share.
    pub fn counting(runtime: R, attacher: Attacher, settings: VolumeSettings, counters: Arc<Counters>) -> Self {
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
            stages: counters.stages_of_executor(),
            counters,
            marking: Share::new(MARKS_IN_FLIGHT_MAX, 0),
            lease: RefCell::default(),
            volumes: RefCell::default(),
            attaches: Cell::new(0),
            closing: Cell::new(false),
            changed: Notify::default(),
        };
        Self { shared: Rc::new(shared) }
    }

    pub fn counters(&self) -> Arc<Counters> {
        self.shared.counters.clone()
    }

    /// For the orderly end of a process: none is attached any more, and those that are, or are about to be, are released.
    pub async fn end(&self) {
        self.shared.close().await;
        // Nobody knows when one that is still busy comes to its end; the lease takes it.
        let attached =
            |(volume, entry): (&VolumeId, &Entry<R>)| matches!(entry, Entry::Attached { .. }).then_some(*volume);
        let volumes = self.shared.volumes.borrow().iter().filter_map(attached).collect();
        self.release(volumes).await;
    }

    /// Flushes and lets go of every volume.
    pub async fn release_all(&self) {
        let volumes = self.shared.volumes.borrow().keys().copied().collect();
        self.release(volumes).await;
    }

    async fn release(&self, volumes: Vec<VolumeId>) {
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
        shared.check_open()?;
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
    fn check_open(&self) -> Result<(), VolumeError> {
        if self.closing.get() { Err(ended("the server is stopping")) } else { Ok(()) }
    }

    /// From now on nothing is attached. Who attaches is waited for, so that what they get is released; but not for ever:
    /// the end of the process's lease takes their volumes from them, and gives them none.
    async fn close(&self) {
        self.closing.set(true);
        let is_busy =
            || self.attaches.get() > 0 || self.volumes.borrow().values().any(|entry| matches!(entry, Entry::Busy));
        let settled = pin!(self.changed.until(|| (!is_busy()).then_some(())));
        let too_long = pin!(self.runtime.clock().sleep(RELEASE_WITHIN));
        if let Either::Right(_) = select(settled, too_long).await {
            tracing::warn!(attaches = self.attaches.get(), "still attaching; the volumes are free with the lease");
        }
    }

    async fn attach(self: &Rc<Self>, name: &str) -> Result<Rc<Session<R>>, VolumeError> {
        let lease = self.lease.borrow().clone();
        let lease = match lease {
            Some(lease) => lease,
            None => {
                let lease = ProcessLease::grant(self.runtime.clone(), self.terms).await.map_err(metadata_error)?;
                if let Err(closing) = self.check_open() {
                    // Nobody would give it back.
                    if let Err(error) = self.runtime.metadata().revoke_lease(lease.id()).await {
                        tracing::debug!(%error, "a lease nobody uses ends by itself");
                    }
                    return Err(closing);
                }
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
    pub async fn take(&self, volume: VolumeId, wanted: impl Fn(&Users) -> bool) -> Option<Rc<Session<R>>> {
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

    pub async fn release(&self, session: Rc<Session<R>>) {
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
        self.shared.check_open()?;
        self.shared.attaches.set(self.shared.attaches.get() + 1);
        self.shared.runtime.spawn().spawn(Class::Foreground, async move {
            let result = exports.attach_volume(&name).await;
            exports.shared.attaches.set(exports.shared.attaches.get() - 1);
            exports.shared.changed.notify();
            let _ = attached.send(result);
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
