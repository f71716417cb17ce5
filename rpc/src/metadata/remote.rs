//! What the clients of `etcd` and of the embedded store have in common: a thread of their own with tokio on it,
//! requests that reach it by a channel from any executor, one policy for deadlines, retries and reconnecting.
//!
//! A call is tried again until its deadline while that cannot do harm: reads always, and what changes something only
//! when it certainly was not sent. So `Unreachable` means that nothing took place, and `Unknown` that it may have.
//! An idle client waits on its channel and its sockets, and nothing else.

use super::{
    Entry, Event, LeaseId, Metadata, MetadataError, Range, Result, Revision, Transaction, TransactionResult, Watch,
    store,
};
use futures::StreamExt;
use futures::channel::{mpsc, oneshot};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};
use torus_schema::limits::{METADATA_RETRY_PAUSE_MAX, METADATA_RETRY_PAUSE_MIN};

/// Batches of events that wait for a watcher before the server is made to wait.
const BATCHES_AHEAD: usize = 4;

/// Why an attempt gave nothing.
#[derive(Debug)]
pub(super) enum Failure {
    /// It certainly never reached a server.
    NotSent(String),
    /// It may have been carried out.
    Unanswered(String),
    /// The server said no; trying again would not help.
    Definite(MetadataError),
}

pub(super) type Attempt<T> = std::result::Result<T, Failure>;

/// How to get a connection; `connect` tries every address once.
pub(super) trait Backend: 'static {
    type Connection: Connection;

    fn connect(&self) -> impl Future<Output = std::result::Result<Self::Connection, String>>;
}

/// One live connection; clones share it.
pub(super) trait Connection: Clone + 'static {
    type Events: Events;

    /// Known to be of no use any more.
    fn is_closed(&self) -> bool;
    fn range(&self, key: &str, is_prefix: bool) -> impl Future<Output = Attempt<Range>>;
    fn transact(&self, transaction: &Transaction) -> impl Future<Output = Attempt<TransactionResult>>;
    fn watch(&self, prefix: &str, from: Revision) -> impl Future<Output = Attempt<Self::Events>>;
    fn grant_lease(&self, ttl_seconds: u32) -> impl Future<Output = Attempt<LeaseId>>;
    fn keep_alive(&self, lease: LeaseId) -> impl Future<Output = Attempt<()>>;
    fn revoke_lease(&self, lease: LeaseId) -> impl Future<Output = Attempt<()>>;
}

/// A watch on one connection.
pub(super) trait Events: 'static {
    /// Events of whole revisions, perhaps none, and the revision to go on from if this connection is lost.
    fn next(&mut self) -> impl Future<Output = Attempt<(Vec<Event>, Revision)>>;
}

type Answer<T> = oneshot::Sender<Result<T>>;
type EventSender = tokio::sync::mpsc::Sender<Result<Vec<Event>>>;
type EventReceiver = tokio::sync::mpsc::Receiver<Result<Vec<Event>>>;

enum Request {
    Range { key: String, is_prefix: bool, answer: Answer<Range> },
    Transact { transaction: Transaction, answer: Answer<TransactionResult> },
    Watch { prefix: String, from: Revision, answer: Answer<EventReceiver> },
    GrantLease { ttl_seconds: u32, answer: Answer<LeaseId> },
    KeepAlive { lease: LeaseId, answer: Answer<()> },
    RevokeLease { lease: LeaseId, answer: Answer<()> },
}

/// Whom we talk to and for how long, for every error.
#[derive(Clone)]
struct Place {
    tried: Arc<str>,
    deadline: Duration,
}

/// A client of a metadata server; clones share its thread and connection, and the last one ends them.
#[derive(Clone)]
pub struct Remote {
    requests: mpsc::UnboundedSender<Request>,
    place: Place,
}

impl Remote {
    /// `backend` is made on the new thread. Nothing is connected yet: the first call says what is wrong.
    pub(super) fn start<B: Backend>(
        tried: String,
        deadline: Duration,
        backend: impl FnOnce() -> B + Send + 'static,
    ) -> Result<Self> {
        let refused = |error: std::io::Error| MetadataError::Refused {
            tried: tried.clone(),
            operation: "connect",
            because: format!("its client cannot be started: {error}"),
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(refused)?;
        let place = Place { tried: tried.as_str().into(), deadline };
        let (requests, incoming) = mpsc::unbounded();
        let on_thread = place.clone();
        std::thread::Builder::new()
            .name("torus-metadata".to_owned())
            .spawn(move || {
                let local = tokio::task::LocalSet::new();
                local.block_on(&runtime, serve(Client::new(backend(), on_thread), incoming));
            })
            .map_err(refused)?;
        Ok(Self { requests, place })
    }

    async fn ask<T>(&self, operation: &'static str, request: impl FnOnce(Answer<T>) -> Request) -> Result<T> {
        let (answer, answered) = oneshot::channel();
        let sent = self.requests.unbounded_send(request(answer)).is_ok();
        if let (true, Ok(answer)) = (sent, answered.await) {
            return answer;
        }
        // Only a panic on the client's thread leads here.
        let because = "the client's thread has ended; this is a bug, see its panic in the log".to_owned();
        let tried = self.place.tried.to_string();
        Err(MetadataError::Unknown { tried, operation, waited: Duration::ZERO, because })
    }
}

impl Metadata for Remote {
    type Watch = RemoteWatch;

    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        let key = key.to_owned();
        let mut range = self.ask("get", |answer| Request::Range { key, is_prefix: false, answer }).await?;
        Ok(range.entries.pop())
    }

    async fn range(&self, prefix: &str) -> Result<Range> {
        let key = prefix.to_owned();
        self.ask("range", |answer| Request::Range { key, is_prefix: true, answer }).await
    }

    async fn transact(&self, transaction: Transaction) -> Result<TransactionResult> {
        if let Err(because) = store::check(&transaction) {
            let tried = self.place.tried.to_string();
            return Err(MetadataError::Refused { tried, operation: "transact", because });
        }
        self.ask("transact", |answer| Request::Transact { transaction, answer }).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Self::Watch> {
        let (prefix, from) = (prefix.to_owned(), from.max(Revision(1)));
        let events = self.ask("watch", |answer| Request::Watch { prefix, from, answer }).await?;
        Ok(RemoteWatch { events, client: self.clone() })
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId> {
        let ttl_seconds = store::whole_seconds(ttl);
        self.ask("grant lease", |answer| Request::GrantLease { ttl_seconds, answer }).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.ask("keep lease alive", |answer| Request::KeepAlive { lease, answer }).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<()> {
        self.ask("revoke lease", |answer| Request::RevokeLease { lease, answer }).await
    }
}

/// Ends with its last error, or when it is dropped.
pub struct RemoteWatch {
    events: EventReceiver,
    /// The watch lives on the client's thread, which lives as long as one of these.
    client: Remote,
}

impl Watch for RemoteWatch {
    async fn next(&mut self) -> Result<Vec<Event>> {
        self.events.recv().await.unwrap_or_else(|| {
            let because = "the watch has ended with an error before".to_owned();
            Err(MetadataError::Refused { tried: self.client.place.tried.to_string(), operation: "watch", because })
        })
    }
}

/// The other side of the channel, on the client's thread.
struct Client<B: Backend> {
    backend: B,
    place: Place,
    current: RefCell<Option<(u64, B::Connection)>>,
    connections: Cell<u64>,
    /// Held while connecting: callers in a hurry wait for one connection instead of making ten.
    connecting: tokio::sync::Mutex<()>,
}

/// What an operation that was not answered may have done.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Effect {
    /// Nothing.
    None,
    /// Something, and the same if it is done twice.
    Repeatable,
    Once,
}

async fn serve<B: Backend>(client: Client<B>, mut incoming: mpsc::UnboundedReceiver<Request>) {
    let client = Rc::new(client);
    while let Some(request) = incoming.next().await {
        tokio::task::spawn_local(client.clone().answer(request));
    }
}

impl<B: Backend> Client<B> {
    fn new(backend: B, place: Place) -> Self {
        let connecting = tokio::sync::Mutex::new(());
        Self { backend, place, current: RefCell::new(None), connections: Cell::new(0), connecting }
    }

    /// An answer nobody waits for any more is dropped; the work is done all the same.
    async fn answer(self: Rc<Self>, request: Request) {
        use Effect::{Once, Repeatable};
        match request {
            Request::Range { key, is_prefix, answer } => {
                let range = async |connection: B::Connection| connection.range(&key, is_prefix).await;
                let _ = answer.send(self.call("range", Effect::None, range).await);
            }
            Request::Transact { transaction, answer } => {
                let transact = async |connection: B::Connection| connection.transact(&transaction).await;
                let _ = answer.send(self.call("transact", Once, transact).await);
            }
            Request::Watch { prefix, from, answer } => self.answer_watch(prefix, from, answer).await,
            Request::GrantLease { ttl_seconds, answer } => {
                // A lease granted unheard holds no key and ends by itself.
                let grant = async |connection: B::Connection| connection.grant_lease(ttl_seconds).await;
                let _ = answer.send(self.call("grant lease", Repeatable, grant).await);
            }
            Request::KeepAlive { lease, answer } => {
                let keep = async |connection: B::Connection| connection.keep_alive(lease).await;
                let _ = answer.send(self.call("keep lease alive", Repeatable, keep).await);
            }
            Request::RevokeLease { lease, answer } => {
                let revoke = async |connection: B::Connection| connection.revoke_lease(lease).await;
                let _ = answer.send(self.call("revoke lease", Repeatable, revoke).await);
            }
        }
    }

    async fn call<T>(
        &self,
        operation: &'static str,
        effect: Effect,
        attempt: impl AsyncFn(B::Connection) -> Attempt<T>,
    ) -> Result<T> {
        let end = Instant::now() + self.place.deadline;
        let mut because = "no connection yet".to_owned();
        let mut sent = false;
        let mut pause = METADATA_RETRY_PAUSE_MIN;
        loop {
            let Ok(connected) = timeout_at(end, self.connection()).await else { break };
            match connected {
                Ok((number, connection)) => match timeout_at(end, attempt(connection)).await {
                    Ok(Ok(done)) => return Ok(done),
                    Ok(Err(Failure::Definite(error))) => return Err(error),
                    Ok(Err(Failure::NotSent(why))) => {
                        self.forget(number);
                        because = why;
                    }
                    Ok(Err(Failure::Unanswered(why))) => {
                        self.forget(number);
                        (sent, because) = (true, why);
                    }
                    Err(_elapsed) => {
                        self.forget(number);
                        (sent, because) = (true, "connected, but no answer came".to_owned());
                    }
                },
                Err(why) => because = why,
            }
            if sent && effect == Effect::Once || timeout_at(end, sleep(pause)).await.is_err() {
                break;
            }
            pause = (pause * 2).min(METADATA_RETRY_PAUSE_MAX);
        }
        let tried = self.place.tried.to_string();
        let waited = self.place.deadline.saturating_sub(end.saturating_duration_since(Instant::now()));
        if sent && effect != Effect::None {
            return Err(MetadataError::Unknown { tried, operation, waited, because });
        }
        Err(MetadataError::Unreachable { tried, waited, because })
    }

    /// The connection there is, or a new one; its number is for `forget`.
    async fn connection(&self) -> std::result::Result<(u64, B::Connection), String> {
        if let Some(current) = self.usable() {
            return Ok(current);
        }
        let _guard = self.connecting.lock().await;
        if let Some(current) = self.usable() {
            return Ok(current);
        }
        let connection = self.backend.connect().await?;
        let number = self.connections.get() + 1;
        self.connections.set(number);
        *self.current.borrow_mut() = Some((number, connection.clone()));
        Ok((number, connection))
    }

    fn usable(&self) -> Option<(u64, B::Connection)> {
        self.current.borrow().clone().filter(|(_, connection)| !connection.is_closed())
    }

    /// Somebody may have made a newer connection meanwhile, which stays.
    fn forget(&self, number: u64) {
        let mut current = self.current.borrow_mut();
        if current.as_ref().is_some_and(|(held, _)| *held == number) {
            *current = None;
        }
    }

    async fn answer_watch(&self, prefix: String, from: Revision, answer: Answer<EventReceiver>) {
        let opened = self
            .call("watch", Effect::None, async |connection: B::Connection| connection.watch(&prefix, from).await)
            .await;
        let events = match opened {
            Ok(events) => events,
            Err(error) => {
                let _ = answer.send(Err(error));
                return;
            }
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(BATCHES_AHEAD);
        if answer.send(Ok(receiver)).is_ok() {
            self.pump(&prefix, from, events, sender).await;
        }
    }

    /// Passes events on until the watcher is gone or the store says that it cannot go on.
    async fn pump(
        &self,
        prefix: &str,
        mut from: Revision,
        mut events: <B::Connection as Connection>::Events,
        to: EventSender,
    ) {
        loop {
            let lost = loop {
                let arrived = tokio::select! {
                    () = to.closed() => return,
                    arrived = events.next() => arrived,
                };
                match arrived {
                    Ok((batch, next)) => {
                        from = from.max(next);
                        if !batch.is_empty() && to.send(Ok(batch)).await.is_err() {
                            return;
                        }
                    }
                    Err(Failure::Definite(error)) => return drop(to.send(Err(error)).await),
                    Err(Failure::NotSent(why) | Failure::Unanswered(why)) => break why,
                }
            };
            tracing::info!(store = %self.place.tried, prefix, from = from.0, because = lost, "metadata watch lost; resuming");
            drop(events);
            events = tokio::select! {
                () = to.closed() => return,
                reopened = self.reopen(prefix, from) => match reopened {
                    Ok(events) => events,
                    Err(error) => return drop(to.send(Err(error)).await),
                },
            };
        }
    }

    /// However long it takes: a watch has no deadline.
    async fn reopen(&self, prefix: &str, from: Revision) -> Result<<B::Connection as Connection>::Events> {
        let mut pause = METADATA_RETRY_PAUSE_MIN;
        loop {
            if let Ok((number, connection)) = self.connection().await {
                match timeout_at(Instant::now() + self.place.deadline, connection.watch(prefix, from)).await {
                    Ok(Ok(events)) => return Ok(events),
                    Ok(Err(Failure::Definite(error))) => return Err(error),
                    Ok(Err(_)) | Err(_) => self.forget(number),
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(METADATA_RETRY_PAUSE_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;
    use std::sync::Mutex;

    const DEADLINE: Duration = Duration::from_secs(1);

    /// Each attempt takes the next of these; after them, everything succeeds.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    enum Fate {
        CannotConnect,
        NotSent,
        Unanswered,
        NeverEnds,
    }

    /// Shared with the test: what is still to come, and how many attempts were made.
    #[derive(Clone)]
    struct Script(Arc<Mutex<(Vec<Fate>, usize)>>);

    impl Script {
        fn next(&self) -> Option<Fate> {
            let mut script = self.0.lock().expect("no test panics with it");
            (!script.0.is_empty()).then(|| script.0.remove(0))
        }

        async fn attempt<T>(&self, done: T) -> Attempt<T> {
            self.0.lock().expect("no test panics with it").1 += 1;
            match self.next() {
                None => Ok(done),
                Some(Fate::NeverEnds) => std::future::pending().await,
                Some(Fate::Unanswered) => Err(Failure::Unanswered("cut".to_owned())),
                Some(Fate::NotSent | Fate::CannotConnect) => Err(Failure::NotSent("not sent".to_owned())),
            }
        }
    }

    impl Backend for Script {
        type Connection = Self;

        async fn connect(&self) -> std::result::Result<Self, String> {
            let first = self.0.lock().expect("no test panics with it").0.first().copied();
            match first {
                Some(Fate::CannotConnect) => Err(self.next().map(|fate| format!("{fate:?}")).unwrap_or_default()),
                _ => Ok(self.clone()),
            }
        }
    }

    impl Connection for Script {
        type Events = NoEvents;

        fn is_closed(&self) -> bool {
            false
        }
        async fn range(&self, _: &str, _: bool) -> Attempt<Range> {
            self.attempt(Range { entries: Vec::new(), revision: Revision(1) }).await
        }
        async fn transact(&self, _: &Transaction) -> Attempt<TransactionResult> {
            self.attempt(TransactionResult { applied: true, revision: Revision(2), reads: Vec::new() }).await
        }
        async fn watch(&self, _: &str, _: Revision) -> Attempt<NoEvents> {
            self.attempt(NoEvents).await
        }
        async fn grant_lease(&self, _: u32) -> Attempt<LeaseId> {
            self.attempt(LeaseId(1)).await
        }
        async fn keep_alive(&self, _: LeaseId) -> Attempt<()> {
            self.attempt(()).await
        }
        async fn revoke_lease(&self, _: LeaseId) -> Attempt<()> {
            self.attempt(()).await
        }
    }

    struct NoEvents;

    impl Events for NoEvents {
        async fn next(&mut self) -> Attempt<(Vec<Event>, Revision)> {
            std::future::pending().await
        }
    }

    /// How a call ended, and after how many attempts.
    fn ended<T>(fates: &[Fate], call: impl AsyncFn(Remote) -> Result<T>) -> (&'static str, usize) {
        let script = Script(Arc::new(Mutex::new((fates.to_vec(), 0))));
        let backend = script.clone();
        let remote = Remote::start("script".to_owned(), DEADLINE, move || backend).expect("a thread");
        let ended = match block_on(call(remote)) {
            Ok(_) => "done",
            Err(MetadataError::Unreachable { .. }) => "unreachable",
            Err(MetadataError::Unknown { .. }) => "unknown",
            Err(other) => panic!("{other}"),
        };
        (ended, script.0.lock().expect("no test panics with it").1)
    }

    #[test]
    fn a_transaction_that_may_have_been_sent_is_never_sent_again() {
        use Fate::*;
        let transact = async |remote: Remote| remote.transact(Transaction::default()).await;
        assert_eq!(ended(&[], transact), ("done", 1));
        assert_eq!(ended(&[CannotConnect, CannotConnect], transact), ("done", 1));
        assert_eq!(ended(&[NotSent, CannotConnect, NotSent], transact), ("done", 3));
        assert_eq!(ended(&[Unanswered], transact), ("unknown", 1));
        assert_eq!(ended(&[NotSent, Unanswered], transact), ("unknown", 2));
        assert_eq!(ended(&[NeverEnds], transact), ("unknown", 1));
        assert_eq!(ended(&[CannotConnect; 100], transact), ("unreachable", 0));
    }

    #[test]
    fn what_may_be_repeated_is_and_the_end_says_whether_it_may_have_taken_place() {
        use Fate::*;
        let read = async |remote: Remote| remote.get("key").await;
        assert_eq!(ended(&[Unanswered, Unanswered], read), ("done", 3));
        assert_eq!(ended(&[NeverEnds], read), ("unreachable", 1));
        let revoke = async |remote: Remote| remote.revoke_lease(LeaseId(1)).await;
        assert_eq!(ended(&[Unanswered, NotSent], revoke), ("done", 3));
        assert_eq!(ended(&[Unanswered, NeverEnds], revoke), ("unknown", 2));
        assert_eq!(ended(&[CannotConnect; 100], revoke), ("unreachable", 0));
    }

    #[test]
    fn the_last_handle_ends_the_thread_and_a_watch_is_one() {
        let script = Script(Arc::new(Mutex::new((Vec::new(), 0))));
        let alive = Arc::downgrade(&script.0);
        let remote = Remote::start("script".to_owned(), DEADLINE, move || script).expect("a thread");
        let watch = block_on(remote.watch("", Revision(1))).expect("a watch");
        drop(remote);
        block_on(watch.client.get("key")).expect("the watch's client still answers");
        drop(watch);
        let begun = std::time::Instant::now();
        while alive.upgrade().is_some() {
            assert!(begun.elapsed() < 30 * DEADLINE, "the thread is still there");
            std::thread::yield_now();
        }
    }
}
