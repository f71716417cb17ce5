//! Who is who: the small, consistent store that is touched when somebody comes, goes or fails, never on the data
//! path. The trait, and what it promises; `tests/` runs one contract against every implementation.
//!
//! * `etcd`      a real cluster (`etcd://a:2379,b:2379`)
//! * `embedded`  one machine: redb behind capnp-rpc (`torus://host:port`), served by `torus-engine metadata`
//! * `memory`    simulation and unit tests
//! * `any`       whichever of the two servers a URL names
//! * `remote`    what their clients have in common: a thread, deadlines, retries
//! * `store`     the pure state machine of `embedded` and `memory`
//!
//! Values are bytes, keys are exact strings. Every call ends within its deadline with an answer or an error that
//! says what was tried; it may be awaited from any executor.

pub mod any;
pub mod embedded;
mod embedded_codec;
mod embedded_database;
pub mod embedded_server;
mod embedded_wire;
pub mod etcd;
pub mod memory;
pub mod remote;
pub mod store;

use std::future::Future;
use std::time::Duration;
use thiserror::Error;

/// Counts the transactions of the whole store; a key remembers the one that created and the one that last changed it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Revision(pub i64);

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct LeaseId(pub i64);

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Entry {
    pub key: String,
    pub value: Vec<u8>,
    pub create_revision: Revision,
    pub mod_revision: Revision,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Compare {
    Absent(String),
    Present(String),
    CreateRevision(String, Revision),
    ModRevision(String, Revision),
    /// No key that begins with it was written after that revision. A key that was deleted since is not noticed.
    PrefixUnchanged(String, Revision),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Write {
    Put {
        key: String,
        value: Vec<u8>,
        lease: Option<LeaseId>,
    },
    /// Deleting a key that is not there is no error.
    Delete {
        key: String,
    },
}

/// All compares hold → all writes are applied at one revision, and otherwise none is. Either way `reads` are
/// answered as of the same moment (after the writes).
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Transaction {
    pub compares: Vec<Compare>,
    pub writes: Vec<Write>,
    pub reads: Vec<String>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TransactionResult {
    pub applied: bool,
    pub revision: Revision,
    /// One for each of `Transaction::reads`, in their order.
    pub reads: Vec<Option<Entry>>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Range {
    /// In the order of their keys.
    pub entries: Vec<Entry>,
    /// The moment of the answer; a watch from `revision + 1` misses nothing.
    pub revision: Revision,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    Put(Entry),
    Deleted { key: String, revision: Revision },
}

#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum MetadataError {
    /// Nothing was applied: no server could be reached.
    #[error(
        "no metadata server answered at {tried} within {waited:?} ({because}); is it running, and is --metadata right?"
    )]
    Unreachable { tried: String, waited: Duration, because: String },
    /// A transaction was sent and no answer came: it may have been applied or not, and may yet be.
    #[error(
        "the metadata store at {tried} did not answer {operation} within {waited:?} ({because}); whether it took place is unknown"
    )]
    Unknown { tried: String, operation: &'static str, waited: Duration, because: String },
    #[error("the lease {0:?} does not exist any more: it expired or was revoked")]
    LeaseGone(LeaseId),
    /// The watch fell behind what the store keeps, or the store went back behind the watch: it was restored from a
    /// backup. Read the range again and watch from there.
    #[error(
        "there is no history from revision {from:?} on (compacted, or restored from a backup); it begins at {oldest:?}"
    )]
    Compacted { from: Revision, oldest: Revision },
    #[error(
        "the metadata URL {found:?} is not understood; expected etcd://host:port[,host:port…], torus://host:port or embedded"
    )]
    Url { found: String },
    /// Anything the store itself refuses or reports: place and text.
    #[error("the metadata store at {tried} refused {operation}: {because}")]
    Refused { tried: String, operation: &'static str, because: String },
}

pub type Result<T> = std::result::Result<T, MetadataError>;

/// A clonable handle; clones share the connection.
pub trait Metadata: Clone + 'static {
    type Watch: Watch;

    fn get(&self, key: &str) -> impl Future<Output = Result<Option<Entry>>>;

    /// Every key that starts with `prefix`.
    fn range(&self, prefix: &str) -> impl Future<Output = Result<Range>>;

    fn transact(&self, transaction: Transaction) -> impl Future<Output = Result<TransactionResult>>;

    /// Events of all keys that start with `prefix`, from `from` on, in order, none missing; reconnects by itself.
    fn watch(&self, prefix: &str, from: Revision) -> impl Future<Output = Result<Self::Watch>>;

    /// `ttl` in whole seconds at least; keys bound to the lease vanish when it ends.
    fn grant_lease(&self, ttl: Duration) -> impl Future<Output = Result<LeaseId>>;

    /// Extends the lease to its full TTL from the moment the store hears of it, or `LeaseGone`.
    fn keep_alive(&self, lease: LeaseId) -> impl Future<Output = Result<()>>;

    /// Ends the lease and deletes its keys; a lease that is gone already is no error.
    fn revoke_lease(&self, lease: LeaseId) -> impl Future<Output = Result<()>>;
}

pub trait Watch: 'static {
    /// The next events in order (at least one), or why the watch ended.
    fn next(&mut self) -> impl Future<Output = Result<Vec<Event>>>;
}
