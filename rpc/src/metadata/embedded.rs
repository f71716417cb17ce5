//! The client of the embedded metadata store (`torus://host:port`).

use super::embedded_server::prepare;
use super::embedded_wire::{answer_options, read_entry, read_events, read_maybe, write_transaction};
use super::remote::{Attempt, Backend, Connection, Events, Failure, Remote};
use super::{Event, LeaseId, MetadataError, Range, Result, Revision, Transaction, TransactionResult};
use capnp_rpc::rpc_twoparty_capnp::Side;
use capnp_rpc::{RpcSystem, twoparty::VatNetwork};
use futures::AsyncReadExt;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_local};
use tokio_util::compat::TokioAsyncReadCompatExt;
use torus_schema::metadata_capnp::{metadata_store, watch_handle, watcher};

/// A client of the store at this `host:port`; connects at its first call.
pub fn connect(address: String, deadline: Duration) -> Result<Remote> {
    let tried = format!("torus://{address}");
    let place: Arc<str> = tried.as_str().into();
    Remote::start(tried, deadline, move || Server { address, place })
}

struct Server {
    address: String,
    place: Arc<str>,
}

impl Backend for Server {
    type Connection = Rc<Conversation>;

    async fn connect(&self) -> std::result::Result<Rc<Conversation>, String> {
        let stream = TcpStream::connect(&self.address).await.map_err(|error| error.to_string())?;
        prepare(&stream).map_err(|error| error.to_string())?;
        let (reader, writer) = stream.compat().split();
        let network = VatNetwork::new(reader, writer, Side::Client, answer_options());
        let mut system = RpcSystem::new(Box::new(network), None);
        let store = system.bootstrap(Side::Server);
        let driver = spawn_local(async {
            if let Err(error) = system.await {
                tracing::debug!(%error, "the connection to the embedded metadata store broke");
            }
        });
        Ok(Rc::new(Conversation { store, driver, place: self.place.clone() }))
    }
}

/// One TCP connection; closed when its last user is gone.
struct Conversation {
    store: metadata_store::Client,
    /// Ends when the server closes the connection.
    driver: JoinHandle<()>,
    place: Arc<str>,
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Conversation {
    fn failure(&self, operation: &'static str, error: &capnp::Error) -> Failure {
        match error.kind {
            // What the server said no to. Everything else is between us and it.
            capnp::ErrorKind::Failed | capnp::ErrorKind::Unimplemented => {
                let because = error.extra.trim_start_matches("remote exception: ").to_owned();
                Failure::Definite(MetadataError::Refused { tried: self.place.to_string(), operation, because })
            }
            _ => Failure::Unanswered(error.to_string()),
        }
    }
}

impl Connection for Rc<Conversation> {
    type Events = EmbeddedEvents;

    fn is_closed(&self) -> bool {
        self.driver.is_finished()
    }

    async fn range(&self, key: &str, is_prefix: bool) -> Attempt<Range> {
        let mut request = self.store.range_request();
        request.get().set_key(key);
        request.get().set_is_prefix(is_prefix);
        let answered = async {
            let answer = request.send().promise.await?;
            let answer = answer.get()?;
            let entries = answer.get_entries()?.iter().map(read_entry).collect::<capnp::Result<_>>()?;
            Ok(Range { entries, revision: Revision(answer.get_revision()) })
        };
        answered.await.map_err(|error| self.failure("range", &error))
    }

    async fn transact(&self, transaction: &Transaction) -> Attempt<TransactionResult> {
        let mut request = self.store.transact_request();
        write_transaction(request.get(), transaction);
        let answered = async {
            let answer = request.send().promise.await?;
            let answer = answer.get()?;
            let reads = answer.get_reads()?.iter().map(read_maybe).collect::<capnp::Result<_>>()?;
            let result =
                TransactionResult { applied: answer.get_applied(), revision: Revision(answer.get_revision()), reads };
            Ok((answer.get_lease_gone(), result))
        };
        match answered.await.map_err(|error| self.failure("transact", &error))? {
            (0, result) => Ok(result),
            (lease, _) => Err(Failure::Definite(MetadataError::LeaseGone(LeaseId(lease)))),
        }
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Attempt<EmbeddedEvents> {
        // One batch ahead: the next is answered to when this one was taken.
        let (to, news) = mpsc::channel(1);
        let mut request = self.store.watch_request();
        request.get().set_prefix(prefix);
        request.get().set_from_revision(from.0);
        request.get().set_watcher(capnp_rpc::new_client(Watcher { to }));
        let answered = async { request.send().promise.await?.get()?.get_handle() };
        let handle = answered.await.map_err(|error| self.failure("watch", &error))?;
        Ok(EmbeddedEvents { news, from, _handle: handle, _conversation: self.clone() })
    }

    async fn grant_lease(&self, ttl_seconds: u32) -> Attempt<LeaseId> {
        let mut request = self.store.grant_lease_request();
        request.get().set_ttl_seconds(ttl_seconds);
        let answered = async { Ok(request.send().promise.await?.get()?.get_lease()) };
        answered.await.map(LeaseId).map_err(|error| self.failure("grant lease", &error))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Attempt<()> {
        let mut request = self.store.keep_alive_request();
        request.get().set_lease(lease.0);
        let answered = async { Ok(request.send().promise.await?.get()?.get_gone()) };
        match answered.await.map_err(|error| self.failure("keep lease alive", &error))? {
            true => Err(Failure::Definite(MetadataError::LeaseGone(lease))),
            false => Ok(()),
        }
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Attempt<()> {
        let mut request = self.store.revoke_lease_request();
        request.get().set_lease(lease.0);
        let answered = request.send().promise.await;
        answered.map(drop).map_err(|error| self.failure("revoke lease", &error))
    }
}

/// What the server tells a watcher.
enum News {
    Events(Vec<Event>, Revision),
    Compacted(Revision),
}

/// Dropped with its connection, which ends the channel.
struct Watcher {
    to: mpsc::Sender<News>,
}

impl Watcher {
    async fn pass_on(&self, news: News) -> capnp::Result<()> {
        self.to.send(news).await.map_err(|_| capnp::Error::failed("nobody watches any more".to_owned()))
    }
}

impl watcher::Server for Watcher {
    async fn events(
        self: Rc<Self>,
        params: watcher::EventsParams,
        _results: watcher::EventsResults,
    ) -> capnp::Result<()> {
        let params = params.get()?;
        let events = read_events(params.get_events()?)?;
        self.pass_on(News::Events(events, Revision(params.get_next()))).await
    }

    async fn compacted(
        self: Rc<Self>,
        params: watcher::CompactedParams,
        _results: watcher::CompactedResults,
    ) -> capnp::Result<()> {
        self.pass_on(News::Compacted(Revision(params.get()?.get_oldest_revision()))).await
    }
}

/// A watch on one connection.
struct EmbeddedEvents {
    news: mpsc::Receiver<News>,
    from: Revision,
    /// Before the connection in order: the server hears that the watch is over while it still can.
    _handle: watch_handle::Client,
    _conversation: Rc<Conversation>,
}

impl Events for EmbeddedEvents {
    async fn next(&mut self) -> Attempt<(Vec<Event>, Revision)> {
        match self.news.recv().await {
            Some(News::Events(events, next)) => {
                self.from = next;
                Ok((events, next))
            }
            Some(News::Compacted(oldest)) => {
                Err(Failure::Definite(MetadataError::Compacted { from: self.from, oldest }))
            }
            None => Err(Failure::Unanswered("the connection broke".to_owned())),
        }
    }
}
