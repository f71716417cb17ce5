//! The node's place in the cluster: its record, and a heartbeat bound to a lease, so that its absence shows that the
//! node is down.
//!
//! One process per node, though a data dir can be copied: the heartbeat's key is taken only where there is none, and
//! later written only while it is the one that was taken. What stands there at a start is either the remains of our
//! predecessor or somebody else:
//!
//! | lease note in the data dir            | the heartbeat found | then                                            |
//! |---------------------------------------|---------------------|-------------------------------------------------|
//! | written in this directory, on this machine | any            | its process is dead (we hold the lock it held): its lease is revoked, the key taken |
//! | none, or of another place (a copy)    | vanishes in time    | it was the remains of a process: taken          |
//! | none, or of another place (a copy)    | is renewed          | somebody runs as this node: refused             |

use crate::datadir::{DataDir, DataDirError};
use serde::{Deserialize, Serialize};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use thiserror::Error;
use torus_rpc::metadata::{Compare, Entry, LeaseId, Metadata, MetadataError, Revision, Transaction, Write};
use torus_schema::ids::NodeId;
use torus_schema::limits::{HEARTBEAT_LEASE_TTL, LEASE_DRIFT};
use torus_schema::records::{self, HeartbeatRecord, NodeRecord, ShardUsage, decimal, keys};

/// How often a heartbeat that is in the way is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

#[derive(Debug, Error)]
pub enum MembershipError {
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(
        "another process runs as node {node} (its heartbeat is renewed at revision {found:?}); was the data dir {place} copied? stop one of them, and give a new node an empty data dir"
    )]
    AnotherProcess { node: NodeId, found: Revision, place: String },
}

/// Who wrote the lease note: a copied directory differs in one of these.
#[derive(Serialize, Deserialize, PartialEq, Eq, Debug)]
struct LeaseNote {
    lease: String,
    machine: String,
    #[serde(with = "decimal")]
    inode: u64,
}

/// The heartbeat's key as we took it.
#[derive(Clone, Copy)]
struct Held {
    lease: LeaseId,
    created: Revision,
}

pub struct Membership<'a, M> {
    metadata: M,
    dir: &'a DataDir,
    record: NodeRecord,
    started_s: u64,
    held: Option<Held>,
}

impl<'a, M: Metadata> Membership<'a, M> {
    pub fn new(metadata: M, dir: &'a DataDir, record: NodeRecord) -> Self {
        Self { metadata, dir, record, started_s: now_s(), held: None }
    }

    /// Announces the node: its record and heartbeat stand in the store afterwards.
    pub async fn join(&mut self, usage: Vec<ShardUsage>) -> Result<(), MembershipError> {
        self.revoke_predecessor().await?;
        self.take(usage).await
    }

    /// Renews what `join` made, and joins again where the lease was lost meanwhile.
    pub async fn renew(&mut self, usage: Vec<ShardUsage>) -> Result<(), MembershipError> {
        let Some(held) = self.held else {
            return self.take(usage).await;
        };
        match self.write_heartbeat(held, &usage).await {
            Ok(true) => Ok(()),
            Ok(false) | Err(MetadataError::LeaseGone(_)) => {
                tracing::warn!(node = %self.record.id, lease = held.lease.0, "the heartbeat's lease was lost; joining again");
                self.held = None;
                self.take(usage).await
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The node is down from now on, without waiting for the lease to end.
    pub async fn leave(&mut self) -> Result<(), MembershipError> {
        match self.held.take() {
            Some(held) => Ok(self.metadata.revoke_lease(held.lease).await?),
            None => Ok(()),
        }
    }

    /// Seconds since the epoch of Unix.
    pub fn started_s(&self) -> u64 {
        self.started_s
    }

    fn heartbeat(&self, shards: Vec<ShardUsage>) -> HeartbeatRecord {
        HeartbeatRecord { node: self.record.id, updated_s: now_s(), started_s: self.started_s, shards }
    }

    async fn write_heartbeat(&self, held: Held, usage: &[ShardUsage]) -> Result<bool, MetadataError> {
        self.metadata.keep_alive(held.lease).await?;
        let key = keys::heartbeat(self.record.id);
        let value = records::encode(&self.heartbeat(usage.to_vec()));
        let transaction = Transaction {
            compares: vec![Compare::CreateRevision(key.clone(), held.created)],
            writes: vec![Write::Put { key, value, lease: Some(held.lease) }],
            reads: vec![],
        };
        Ok(self.metadata.transact(transaction).await?.applied)
    }

    async fn revoke_predecessor(&self) -> Result<(), MembershipError> {
        let Some(text) = self.dir.read_lease_note()? else { return Ok(()) };
        // A note that cannot be read only costs the wait for its lease.
        let Ok(note) = serde_json::from_str::<LeaseNote>(&text) else { return Ok(()) };
        if let Ok(lease) = note.lease.parse()
            && note == self.note(LeaseId(lease))?
        {
            self.metadata.revoke_lease(LeaseId(lease)).await?;
        }
        Ok(())
    }

    fn note(&self, lease: LeaseId) -> Result<LeaseNote, DataDirError> {
        let path = self.dir.path();
        let inode = std::fs::metadata(path).map(|metadata| metadata.ino()).map_err(|error| DataDirError::Io {
            path: path.to_path_buf(),
            operation: "find the directory",
            because: error.to_string(),
        })?;
        let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default().trim().to_string();
        Ok(LeaseNote { lease: lease.0.to_string(), machine, inode })
    }

    /// Takes the heartbeat's key, once whoever holds it lets it lapse.
    async fn take(&mut self, usage: Vec<ShardUsage>) -> Result<(), MembershipError> {
        let mut waited = Duration::ZERO;
        let mut first_found: Option<Revision> = None;
        loop {
            let Some(found) = self.try_take(&usage).await? else { return Ok(()) };
            if first_found.is_none() {
                tracing::info!(node = %self.record.id, "waiting for the heartbeat of an earlier process to end");
            }
            let first = *first_found.get_or_insert(found.mod_revision);
            if first != found.mod_revision || waited > HEARTBEAT_LEASE_TTL + LEASE_DRIFT * 2 {
                let place = self.dir.path().display().to_string();
                return Err(MembershipError::AnotherProcess { node: self.record.id, found: found.mod_revision, place });
            }
            tokio::time::sleep(LOOK_AGAIN).await;
            waited += LOOK_AGAIN;
        }
    }

    /// `None`: taken. Otherwise the heartbeat that is in the way.
    async fn try_take(&mut self, usage: &[ShardUsage]) -> Result<Option<Entry>, MembershipError> {
        let key = keys::heartbeat(self.record.id);
        if let Some(found) = self.metadata.get(&key).await? {
            return Ok(Some(found));
        }
        let lease = self.metadata.grant_lease(HEARTBEAT_LEASE_TTL).await?;
        // Noted before the key exists: a process that dies in between leaves a lease without a key, and no puzzle.
        self.dir.write_lease_note(
            &serde_json::to_string(&self.note(lease)?).expect("a lease note is strings and a number"),
        )?;
        let heartbeat = records::encode(&self.heartbeat(usage.to_vec()));
        let node = Write::Put { key: keys::node(self.record.id), value: records::encode(&self.record), lease: None };
        let transaction = Transaction {
            compares: vec![Compare::Absent(key.clone())],
            writes: vec![Write::Put { key: key.clone(), value: heartbeat, lease: Some(lease) }, node],
            reads: vec![key],
        };
        let result = match self.metadata.transact(transaction).await {
            Ok(result) => result,
            Err(error) => {
                // Whether it took place may be unknown: without its lease the key cannot stand in our own way.
                let _ = self.metadata.revoke_lease(lease).await;
                return Err(error.into());
            }
        };
        let found = result.reads.into_iter().next().flatten();
        if result.applied {
            self.held = Some(Held { lease, created: result.revision });
            return Ok(None);
        }
        self.metadata.revoke_lease(lease).await?;
        Ok(found)
    }
}

pub fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
