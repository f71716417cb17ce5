//! Volumes that grow while they are attached (`volume resize`): one watch of the volumes' records for all of an
//! executor.
//!
//! The record is changed first: what is written beyond the old end was promised to whoever attaches next. A session that
//! has not noticed refuses such requests for a moment longer, which loses nothing. It notices by the watch, or when it
//! stores something itself and finds the record at another revision (`Session::take_record`), whichever is first.

use super::session::Session;
use futures::channel::oneshot;
use futures::future::select;
use std::cell::RefCell;
use std::pin::pin;
use std::rc::{Rc, Weak};
use torus_rpc::metadata::{Entry, Event, Metadata, MetadataError, Revision, Watch};
use torus_rpc::runtime::{Class, Clock, Runtime, Spawn};
use torus_schema::limits::METADATA_RETRY_AFTER;
use torus_schema::records::{VolumeRecord, decode, keys};

/// The sessions that are told.
pub(super) struct Sizes<R: Runtime> {
    shared: Rc<Shared<R>>,
    /// Whoever follows ends with this.
    following: RefCell<Option<oneshot::Sender<()>>>,
}

struct Shared<R: Runtime> {
    runtime: R,
    sessions: RefCell<Vec<Weak<Session<R>>>>,
}

impl<R: Runtime> Sizes<R> {
    pub fn new(runtime: R) -> Self {
        Self { shared: Rc::new(Shared { runtime, sessions: RefCell::default() }), following: RefCell::default() }
    }

    /// From now on, until the session ends.
    pub fn follow(&self, session: &Rc<Session<R>>) {
        self.shared.sessions.borrow_mut().push(Rc::downgrade(session));
        let runtime = self.shared.runtime.clone();
        if self.following.borrow().is_none() {
            let (alive, over) = oneshot::channel();
            self.following.replace(Some(alive));
            let watching = follow(runtime.clone(), Rc::downgrade(&self.shared));
            runtime.spawn().spawn(Class::Foreground, async move { drop(select(pin!(watching), over).await) });
        }
        // The watch may have told of a change since the attach before this session was among those it tells.
        let session = Rc::downgrade(session);
        self.shared.runtime.spawn().spawn(Class::Foreground, async move { look_once(&runtime, &session).await });
    }
}

async fn look_once<R: Runtime>(runtime: &R, session: &Weak<Session<R>>) {
    while let Some(key) = session.upgrade().map(|session| keys::volume(session.record.id)) {
        match runtime.metadata().get(&key).await {
            Ok(entry) => {
                if let (Some(session), Some(entry)) = (session.upgrade(), entry) {
                    session.take_record(&entry);
                }
                return;
            }
            Err(error) => tracing::debug!(%error, "cannot look at a volume's record; trying again"),
        }
        runtime.clock().sleep(METADATA_RETRY_AFTER).await;
    }
}

/// As long as somebody may attach.
async fn follow<R: Runtime>(runtime: R, shared: Weak<Shared<R>>) {
    while let Err(error) = watch(&runtime, &shared).await {
        tracing::warn!(%error, "the volumes' records cannot be followed; trying again");
        runtime.clock().sleep(METADATA_RETRY_AFTER).await;
    }
}

async fn watch<R: Runtime>(runtime: &R, shared: &Weak<Shared<R>>) -> Result<(), MetadataError> {
    let prefix = keys::volumes();
    let now = runtime.metadata().range(&prefix).await?;
    let mut watch = runtime.metadata().watch(&prefix, Revision(now.revision.0 + 1)).await?;
    let mut entries = now.entries;
    loop {
        let Some(shared) = shared.upgrade() else { return Ok(()) };
        entries.iter().for_each(|entry| shared.tell(entry));
        drop(shared);
        let put = |event| if let Event::Put(entry) = event { Some(entry) } else { None };
        entries = watch.next().await?.into_iter().filter_map(put).collect();
    }
}

impl<R: Runtime> Shared<R> {
    fn tell(&self, entry: &Entry) {
        self.sessions.borrow_mut().retain(|session| session.strong_count() > 0);
        for session in self.sessions.borrow().iter().filter_map(Weak::upgrade) {
            if entry.key == keys::volume(session.record.id) {
                session.take_record(entry);
            }
        }
    }
}

impl<R: Runtime> Session<R> {
    /// The record as it stands now: true if it is a later one of this volume that has only grown, and what was known of
    /// it is brought up to date. Anything else is not for a session that lives.
    pub fn take_record(&self, entry: &Entry) -> bool {
        let later = entry.mod_revision > self.status.volume_revision.get();
        let record: VolumeRecord = match decode(&entry.key, &entry.value) {
            Ok(record) => record,
            Err(error) => {
                tracing::error!(%error, "a volume's record cannot be read; the last one is kept to");
                return false;
            }
        };
        let size_bytes = record.size_bytes;
        let known = VolumeRecord { size_bytes, ..self.record.clone() };
        if !later || record != known || size_bytes < self.size_bytes.get() {
            return false;
        }
        if size_bytes > self.size_bytes.get() {
            tracing::info!(volume = %self.record.name, from = self.size_bytes.get(), to = size_bytes, "the volume has grown");
        }
        self.size_bytes.set(size_bytes);
        self.status.volume_revision.set(entry.mod_revision);
        self.changed.notify();
        true
    }
}
