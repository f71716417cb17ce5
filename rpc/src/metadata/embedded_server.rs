//! The embedded metadata store for one machine: the state machine of `store`, made durable by `embedded_database`,
//! served by capnp-rpc on a thread of its own.
//!
//! A commit is durable before anybody sees it, and everything happens on one thread, so what the state machine says
//! is what clients see. If the file fails, the outcome of that commit is unknown until it is read again: the server
//! ends, its clients see the connection break, and whoever started it hears why.

use super::embedded_database::Database;
use super::embedded_wire::{count, read_transaction, request_options, write_entry, write_events, write_maybe};
use super::store::{Commit, Rejection, Store};
use super::{LeaseId, Range, Revision};
use crate::runtime::Instant;
use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{RpcSystem, twoparty::VatNetwork};
use futures::AsyncReadExt;
use std::cell::RefCell;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::{AbortHandle, LocalSet, spawn_local};
use tokio_util::compat::TokioAsyncReadCompatExt;
use torus_schema::limits::{METADATA_HISTORY_REVISIONS_MAX, METADATA_PROBE_AFTER, METADATA_RETRY_PAUSE_MAX};
use torus_schema::metadata_capnp::{metadata_store, watch_handle, watcher};

/// A watch without matching events still moves on in front of the history, this many revisions at a time, so that
/// it need not start over after a reconnection.
const REVISIONS_UNREPORTED_MAX: i64 = METADATA_HISTORY_REVISIONS_MAX as i64 / 4;

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum EmbeddedError {
    #[error("the metadata store {file:?} is in use by another process; stop that one or give another --dir")]
    InUse { file: PathBuf },
    #[error("{file:?} is not a metadata store this program can use: {because}; it was left as it is")]
    Format { file: PathBuf, because: String },
    #[error("the metadata store {file:?} failed: {because}")]
    File { file: PathBuf, because: String },
    #[error("the metadata store cannot listen on {address}: {because}")]
    Listen { address: SocketAddr, because: String },
    #[error("the thread of the metadata store could not be started or ended by a panic: {because}")]
    Thread { because: String },
}

/// A running server; dropped, it stops.
pub struct EmbeddedServer {
    address: SocketAddr,
    stopper: Stopper,
    thread: Option<JoinHandle<Result<(), EmbeddedError>>>,
}

/// Stops a server from another thread, a signal handler's for example.
#[derive(Clone)]
pub struct Stopper(Arc<Notify>);

impl Stopper {
    pub fn stop(&self) {
        self.0.notify_one();
    }
}

impl EmbeddedServer {
    /// Opens or makes the store in this directory and answers from when this returns.
    pub fn start(directory: &Path, listen: SocketAddr) -> Result<Self, EmbeddedError> {
        let (database, saved) = Database::open(directory)?;
        let refused =
            move |error: std::io::Error| EmbeddedError::Listen { address: listen, because: error.to_string() };
        let listener = std::net::TcpListener::bind(listen).map_err(refused)?;
        listener.set_nonblocking(true).map_err(refused)?;
        let address = listener.local_addr().map_err(refused)?;
        let not_started = |error: std::io::Error| EmbeddedError::Thread { because: error.to_string() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(not_started)?;
        let stopper = Stopper(Arc::new(Notify::new()));
        let stop = stopper.clone();
        let serve = move || {
            LocalSet::new().block_on(&runtime, async move {
                let listener = TcpListener::from_std(listener).map_err(refused)?;
                let service = Rc::new(Service::new(database, Store::restore(saved, now())));
                tokio::select! {
                    () = stop.0.notified() => Ok(()),
                    error = service.failure() => Err(error),
                    () = accept(&listener, &service) => Ok(()),
                    () = end_leases(&service) => Ok(()),
                }
            })
        };
        let thread = std::thread::Builder::new().name("torus-mds".to_owned()).spawn(serve).map_err(not_started)?;
        tracing::info!(%address, directory = %directory.display(), "embedded metadata store is serving");
        Ok(Self { address, stopper, thread: Some(thread) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Serves until somebody stops it, or its file fails.
    pub fn wait(mut self) -> Result<(), EmbeddedError> {
        self.join()
    }

    pub fn stop(mut self) -> Result<(), EmbeddedError> {
        self.stopper.stop();
        self.join()
    }

    fn join(&mut self) -> Result<(), EmbeddedError> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().unwrap_or_else(|panic| {
            let said = panic.downcast_ref::<&str>().map(|said| (*said).to_owned());
            let because = said.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
            Err(EmbeddedError::Thread { because })
        })
    }
}

impl Drop for EmbeddedServer {
    fn drop(&mut self) {
        self.stopper.stop();
        if let Err(error) = self.join() {
            tracing::error!(%error, "embedded metadata store ended");
        }
    }
}

async fn accept(listener: &TcpListener, service: &Rc<Service>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                spawn_local(converse(stream, service.clone()));
            }
            Err(error) => {
                // Out of descriptors, most likely: clients leave, so it passes.
                tracing::warn!(%error, "embedded metadata store cannot accept a connection");
                tokio::time::sleep(METADATA_RETRY_PAUSE_MAX).await;
            }
        }
    }
}

async fn converse(stream: TcpStream, service: Rc<Service>) {
    if let Err(error) = prepare(&stream) {
        tracing::warn!(%error, "embedded metadata store cannot set up a connection");
        return;
    }
    let (reader, writer) = stream.compat().split();
    let network = VatNetwork::new(reader, writer, Side::Server, request_options());
    let store: metadata_store::Client = capnp_rpc::new_client_from_rc(service);
    if let Err(error) = RpcSystem::new(Box::new(network), Some(store.client)).await {
        tracing::debug!(%error, "a connection to the embedded metadata store broke");
    }
}

/// Small messages leave at once, and a peer whose host is gone is noticed by the kernel.
pub(super) fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(stream);
    let probes = socket2::TcpKeepalive::new().with_time(METADATA_PROBE_AFTER).with_interval(METADATA_PROBE_AFTER / 5);
    socket.set_tcp_keepalive(&probes)?;
    socket.set_tcp_user_timeout(Some(METADATA_PROBE_AFTER))
}

/// Ends leases when their time is over, though nobody asks. Sleeps until the next one may be.
async fn end_leases(service: &Service) {
    loop {
        let changed = service.changed.notified();
        if service.expire().is_err() {
            return std::future::pending().await;
        }
        let next = service.store.borrow().next_expiry();
        match next {
            Some(expiry) => {
                tokio::select! {
                    () = tokio::time::sleep(expiry.since(now())) => {}
                    () = changed => {}
                }
            }
            None => changed.await,
        }
    }
}

/// Time since boot; a store that was suspended lets leases end as if it had not been.
fn now() -> Instant {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .expect("CLOCK_BOOTTIME exists on every kernel since 2.6.39");
    Instant(Duration::from(time))
}

struct Service {
    database: Database,
    store: RefCell<Store>,
    /// After every commit: watches and the end of leases wait for it.
    changed: Notify,
    failed: RefCell<Option<EmbeddedError>>,
    failure: Notify,
}

impl Service {
    fn new(database: Database, store: Store) -> Self {
        let failed = RefCell::new(None);
        Self { database, store: RefCell::new(store), changed: Notify::new(), failed, failure: Notify::new() }
    }

    async fn failure(&self) -> EmbeddedError {
        loop {
            if let Some(error) = self.failed.borrow().clone() {
                return error;
            }
            self.failure.notified().await;
        }
    }

    /// The only way anything changes: durable first, then visible.
    fn commit(&self, commit: Commit) -> capnp::Result<()> {
        let mut store = self.store.borrow_mut();
        if let Some(error) = self.failed.borrow().as_ref() {
            return Err(capnp::Error::disconnected(error.to_string()));
        }
        let is_empty = commit.changes.is_empty() && commit.lease.is_none();
        if !is_empty && let Err(error) = self.database.commit(&commit, store.last_lease(), store.oldest()) {
            // Whether it is durable is not known, so nothing more may be answered from this state.
            let answer = capnp::Error::disconnected(error.to_string());
            *self.failed.borrow_mut() = Some(error);
            self.failure.notify_one();
            return Err(answer);
        }
        store.apply(commit, now());
        drop(store);
        self.changed.notify_waiters();
        Ok(())
    }

    fn expire(&self) -> capnp::Result<()> {
        loop {
            let store = self.store.borrow();
            let Some(commit) = store.expired(now()).and_then(|lease| store.prepare_end(lease)) else { return Ok(()) };
            drop(store);
            self.commit(commit)?;
        }
    }
}

impl metadata_store::Server for Service {
    async fn range(
        self: Rc<Self>,
        params: metadata_store::RangeParams,
        mut results: metadata_store::RangeResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let key = params.get_key()?.to_str()?;
        self.expire()?;
        let store = self.store.borrow();
        let range = match params.get_is_prefix() {
            true => store.range(key),
            false => Range { entries: store.get(key).into_iter().collect(), revision: store.revision() },
        };
        let mut to = results.get();
        to.set_revision(range.revision.0);
        let mut entries = to.init_entries(count(range.entries.len()));
        for (index, entry) in (0..).zip(&range.entries) {
            write_entry(entries.reborrow().get(index), entry);
        }
        Ok(())
    }

    async fn transact(
        self: Rc<Self>,
        params: metadata_store::TransactParams,
        mut results: metadata_store::TransactResults,
    ) -> capnp::Result<()> {
        let transaction = read_transaction(params.get()?)?;
        self.expire()?;
        let prepared = self.store.borrow().prepare(&transaction);
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(Rejection::LeaseGone(lease)) => {
                results.get().set_lease_gone(lease.0);
                return Ok(());
            }
            Err(Rejection::Malformed(because)) => return Err(capnp::Error::failed(because)),
        };
        let mut to = results.get();
        to.set_applied(prepared.is_some());
        if let Some(commit) = prepared {
            self.commit(commit)?;
        }
        let store = self.store.borrow();
        to.set_revision(store.revision().0);
        let mut reads = to.init_reads(count(transaction.reads.len()));
        for (index, key) in (0..).zip(&transaction.reads) {
            write_maybe(reads.reborrow().get(index), store.get(key).as_ref());
        }
        Ok(())
    }

    async fn watch(
        self: Rc<Self>,
        params: metadata_store::WatchParams,
        mut results: metadata_store::WatchResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let (prefix, watcher) = (params.get_prefix()?.to_string()?, params.get_watcher()?);
        let from = Revision(params.get_from_revision());
        let feeding = spawn_local(feed(self, prefix, from, watcher));
        results.get().set_handle(capnp_rpc::new_client(Handle(feeding.abort_handle())));
        Ok(())
    }

    async fn grant_lease(
        self: Rc<Self>,
        params: metadata_store::GrantLeaseParams,
        mut results: metadata_store::GrantLeaseResults,
    ) -> capnp::Result<()> {
        let ttl = Duration::from_secs(u64::from(params.get()?.get_ttl_seconds()));
        let (lease, commit) = self.store.borrow().prepare_grant(ttl);
        self.commit(commit)?;
        results.get().set_lease(lease.0);
        Ok(())
    }

    async fn keep_alive(
        self: Rc<Self>,
        params: metadata_store::KeepAliveParams,
        mut results: metadata_store::KeepAliveResults,
    ) -> capnp::Result<()> {
        let lease = LeaseId(params.get()?.get_lease());
        self.expire()?;
        // Not written to the file: after a restart every lease has its full time anyway.
        let there = self.store.borrow_mut().keep_alive(lease, now());
        results.get().set_gone(!there);
        Ok(())
    }

    async fn revoke_lease(
        self: Rc<Self>,
        params: metadata_store::RevokeLeaseParams,
        _results: metadata_store::RevokeLeaseResults,
    ) -> capnp::Result<()> {
        let lease = LeaseId(params.get()?.get_lease());
        let commit = self.store.borrow().prepare_end(lease);
        commit.map_or(Ok(()), |commit| self.commit(commit))
    }
}

/// The watcher's hold on its watch: gone with the connection, or before.
struct Handle(AbortHandle);

impl watch_handle::Server for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Sends a watcher what it has not seen, the next batch when it has taken the last; the history is the only buffer.
async fn feed(service: Rc<Service>, prefix: String, mut from: Revision, watcher: watcher::Client) {
    let mut reported = from;
    loop {
        let changed = service.changed.notified();
        let batch = service.store.borrow().events(&prefix, from);
        let batch = match batch {
            Ok(batch) => batch,
            Err(oldest) => {
                let mut request = watcher.compacted_request();
                request.get().set_oldest_revision(oldest.0);
                // A watcher that is gone needs no answer.
                let _ = request.send().promise.await;
                return;
            }
        };
        from = batch.next;
        if batch.events.is_empty() && from.0 - reported.0 < REVISIONS_UNREPORTED_MAX {
            changed.await;
            continue;
        }
        let mut request = watcher.events_request();
        request.get().set_next(from.0);
        write_events(request.get().init_events(count(batch.events.len())), &batch.events);
        if request.send().promise.await.is_err() {
            return;
        }
        reported = from;
    }
}
