//! The metadata store on a real etcd cluster. Only this file knows the etcd client.

use super::remote::{Attempt, Backend, Connection, Events, Failure, Remote};
use super::{
    Compare, Entry, Event, LeaseId, MetadataError, Range, Result, Revision, Transaction, TransactionResult, Write,
};
use etcd_client::{
    Client, CompareOp, ConnectOptions, Error, EventType, GetOptions, KeyValue, PutOptions, Txn, TxnOp, TxnOpResponse,
    WatchOptions, WatchStream,
};
use std::cell::Cell;
use std::sync::Arc;
use std::time::Duration;
use torus_schema::limits::{METADATA_ANSWER_BYTES_MAX, METADATA_PROBE_AFTER};

/// A client of the cluster with these members (`host:port` each); connects at its first call.
pub fn connect(endpoints: Vec<String>, deadline: Duration) -> Result<Remote> {
    let tried = format!("etcd://{}", endpoints.join(","));
    let place: Arc<str> = tried.as_str().into();
    Remote::start(tried, deadline, move || Cluster { endpoints, place, next: Cell::new(0), deadline })
}

struct Cluster {
    endpoints: Vec<String>,
    place: Arc<str>,
    /// The member to try first: the one after the last that was tried, so that a member that accepts connections and
    /// does not answer is left at the second attempt.
    next: Cell<usize>,
    deadline: Duration,
}

impl Backend for Cluster {
    type Connection = Member;

    async fn connect(&self) -> std::result::Result<Member, String> {
        let mut failures = Vec::new();
        for _ in &self.endpoints {
            let endpoint = &self.endpoints[self.next.get() % self.endpoints.len()];
            self.next.set(self.next.get().wrapping_add(1));
            match self.member(endpoint).await {
                Ok(client) => return Ok(Member { client, place: self.place.clone() }),
                Err(error) => failures.push(format!("{endpoint}: {}", explain(&error))),
            }
        }
        Err(failures.join("; "))
    }
}

impl Cluster {
    async fn member(&self, endpoint: &str) -> std::result::Result<Client, Error> {
        // Every member gets its turn before the caller's deadline.
        let share = self.deadline / (self.endpoints.len() as u32 + 1);
        let options = ConnectOptions::new()
            .with_connect_timeout(share)
            .with_tcp_keepalive(METADATA_PROBE_AFTER)
            // Probes only while something is outstanding, a watch for example.
            .with_keep_alive(METADATA_PROBE_AFTER, share)
            // A member cut off from the others ends its watches, which then go on elsewhere.
            .with_require_leader(true);
        let mut client = Client::connect([endpoint], Some(options)).await?;
        // The client connects lazily; we have to know whether a transaction could have been sent.
        let answered = tokio::time::timeout(share, client.status()).await;
        answered.unwrap_or_else(|_| Err(Error::EndpointError(format!("no answer within {share:?}"))))?;
        Ok(client)
    }
}

#[derive(Clone)]
struct Member {
    client: Client,
    place: Arc<str>,
}

impl Connection for Member {
    type Events = EtcdEvents;

    fn is_closed(&self) -> bool {
        // It reconnects to its member by itself; calls that fail make us forget it.
        false
    }

    async fn range(&self, key: &str, is_prefix: bool) -> Attempt<Range> {
        let options = is_prefix.then(|| GetOptions::new().with_prefix());
        let mut kv = self.client.kv_client().max_decoding_message_size(METADATA_ANSWER_BYTES_MAX as usize);
        let answer = kv.get(key, options).await.map_err(|error| self.failure("range", &error))?;
        let entries = answer.kvs().iter().map(|kv| self.entry(kv)).collect::<Attempt<_>>()?;
        Ok(Range { entries, revision: revision_of(answer.header()) })
    }

    async fn transact(&self, transaction: &Transaction) -> Attempt<TransactionResult> {
        let reads = || transaction.reads.iter().map(|key| TxnOp::get(key.as_str(), None));
        let compares: Vec<_> = transaction.compares.iter().map(compare).collect();
        let success: Vec<_> = transaction.writes.iter().map(operation).chain(reads()).collect();
        let txn = Txn::new().when(compares).and_then(success).or_else(reads().collect::<Vec<_>>());
        let mut kv = self.client.kv_client().max_decoding_message_size(METADATA_ANSWER_BYTES_MAX as usize);
        let answer = kv.txn(txn).await.map_err(|error| self.transaction_failure(transaction, &error))?;
        let applied = answer.succeeded();
        let writes = if applied { transaction.writes.len() } else { 0 };
        let reads = answer.op_responses().into_iter().skip(writes).map(|response| match response {
            TxnOpResponse::Get(get) => get.kvs().first().map(|kv| self.entry(kv)).transpose(),
            other => Err(self.refused("transact", format!("a read was answered by {other:?}"))),
        });
        let reads = reads.collect::<Attempt<Vec<_>>>()?;
        Ok(TransactionResult { applied, revision: revision_of(answer.header()), reads })
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Attempt<EtcdEvents> {
        let options = WatchOptions::new().with_prefix().with_start_revision(from.0).with_progress_notify();
        let mut watch = self.client.watch_client().max_decoding_message_size(METADATA_ANSWER_BYTES_MAX as usize);
        let stream = watch.watch(prefix, Some(options)).await.map_err(|error| self.failure("watch", &error))?;
        let mut events = EtcdEvents { stream, member: self.clone(), from };
        // The first message says that the watch stands.
        events.next().await?;
        self.has_reached(prefix, from).await?;
        Ok(events)
    }

    async fn grant_lease(&self, ttl_seconds: u32) -> Attempt<LeaseId> {
        let granted = self.client.lease_client().grant(i64::from(ttl_seconds), None).await;
        Ok(LeaseId(granted.map_err(|error| self.failure("grant lease", &error))?.id()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Attempt<()> {
        match self.client.lease_client().keep_alive(lease.0).await {
            Ok(_) => Ok(()),
            // How the client reports a TTL of zero in etcd's answer; the sender of its stream cannot be closed then.
            Err(Error::LeaseKeepAliveError(_)) => Err(Failure::Definite(MetadataError::LeaseGone(lease))),
            Err(error) if is_lease_not_found(&error) => Err(Failure::Definite(MetadataError::LeaseGone(lease))),
            Err(error) => Err(self.failure("keep lease alive", &error)),
        }
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Attempt<()> {
        match self.client.lease_client().revoke(lease.0).await {
            Ok(_) => Ok(()),
            Err(error) if is_lease_not_found(&error) => Ok(()),
            Err(error) => Err(self.failure("revoke lease", &error)),
        }
    }
}

impl Member {
    /// A cluster that was restored from a backup draws revisions again that a watch has seen before, and tells it
    /// nothing until they are passed. Asked of the cluster, not of this member, which may be behind the others.
    async fn has_reached(&self, key: &str, from: Revision) -> Attempt<()> {
        let revision = self.range(key, false).await?.revision;
        if revision.0 + 1 < from.0 {
            let oldest = Revision(revision.0 + 1);
            return Err(Failure::Definite(MetadataError::Compacted { from, oldest }));
        }
        Ok(())
    }

    fn entry(&self, kv: &KeyValue) -> Attempt<Entry> {
        let key = kv.key_str().map_err(|_| self.refused("read", format!("the key {:?} is not UTF-8", kv.key())))?;
        Ok(Entry {
            key: key.to_owned(),
            value: kv.value().to_vec(),
            create_revision: Revision(kv.create_revision()),
            mod_revision: Revision(kv.mod_revision()),
        })
    }

    fn refused(&self, operation: &'static str, because: String) -> Failure {
        Failure::Definite(MetadataError::Refused { tried: self.place.to_string(), operation, because })
    }

    fn transaction_failure(&self, transaction: &Transaction, error: &Error) -> Failure {
        let lease = transaction.writes.iter().find_map(|write| match write {
            Write::Put { lease, .. } => *lease,
            Write::Delete { .. } => None,
        });
        match lease {
            Some(lease) if is_lease_not_found(error) => Failure::Definite(MetadataError::LeaseGone(lease)),
            _ => self.failure("transact", error),
        }
    }

    fn failure(&self, operation: &'static str, error: &Error) -> Failure {
        let Error::GRpcStatus(status) = error else { return Failure::Unanswered(explain(error)) };
        use tonic::Code;
        match status.code() {
            // What etcd answers before it proposes anything to the cluster.
            Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Unauthenticated => self.refused(operation, status.message().to_owned()),
            _ if never_connected(status) => Failure::NotSent(explain(error)),
            _ => Failure::Unanswered(explain(error)),
        }
    }
}

/// A watch on one member.
struct EtcdEvents {
    stream: WatchStream,
    member: Member,
    from: Revision,
}

impl Events for EtcdEvents {
    async fn next(&mut self) -> Attempt<(Vec<Event>, Revision)> {
        let message = self.stream.message().await.map_err(|error| self.member.failure("watch", &error))?;
        let Some(message) = message else { return Err(Failure::Unanswered("etcd ended the watch".to_owned())) };
        if message.compact_revision() > 0 {
            let oldest = Revision(message.compact_revision());
            return Err(Failure::Definite(MetadataError::Compacted { from: self.from, oldest }));
        }
        if message.canceled() {
            return Err(Failure::Unanswered(format!("etcd ended the watch: {}", message.cancel_reason())));
        }
        let mut events = Vec::with_capacity(message.events().len());
        for event in message.events() {
            let Some(kv) = event.kv() else {
                return Err(self.member.refused("watch", "an event has no key".to_owned()));
            };
            let entry = self.member.entry(kv)?;
            events.push(match event.event_type() {
                EventType::Put => Event::Put(entry),
                EventType::Delete => Event::Deleted { key: entry.key, revision: entry.mod_revision },
            });
        }
        if let Some(last) = events.last() {
            self.from = Revision(last.revision().0 + 1);
        } else if !message.created() {
            // A progress report: everything up to this revision was delivered.
            self.from = self.from.max(Revision(revision_of(message.header()).0 + 1));
        }
        Ok((events, self.from))
    }
}

fn compare(compare: &Compare) -> etcd_client::Compare {
    use etcd_client::Compare as Etcd;
    match compare {
        Compare::Absent(key) => Etcd::create_revision(key.as_str(), CompareOp::Equal, 0),
        Compare::Present(key) => Etcd::create_revision(key.as_str(), CompareOp::Greater, 0),
        Compare::CreateRevision(key, revision) => Etcd::create_revision(key.as_str(), CompareOp::Equal, revision.0),
        Compare::ModRevision(key, revision) => Etcd::mod_revision(key.as_str(), CompareOp::Equal, revision.0),
        Compare::PrefixUnchanged(prefix, revision) => {
            Etcd::mod_revision(prefix.as_str(), CompareOp::Less, revision.0 + 1).with_prefix()
        }
    }
}

fn operation(write: &Write) -> TxnOp {
    match write {
        Write::Put { key, value, lease } => {
            let options = lease.map(|lease| PutOptions::new().with_lease(lease.0));
            TxnOp::put(key.as_str(), value.as_slice(), options)
        }
        Write::Delete { key } => TxnOp::delete(key.as_str(), None),
    }
}

fn revision_of(header: Option<&etcd_client::ResponseHeader>) -> Revision {
    Revision(header.map_or(0, |header| header.revision()))
}

fn is_lease_not_found(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if status.code() == tonic::Code::NotFound)
}

/// The request never left: its connection could not be made.
fn never_connected(status: &tonic::Status) -> bool {
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        if error.is::<tonic::ConnectError>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The error with its causes, which say what is wrong where the error itself says "transport error".
fn explain(error: &Error) -> String {
    let Error::GRpcStatus(status) = error else { return error.to_string() };
    let mut text = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}
