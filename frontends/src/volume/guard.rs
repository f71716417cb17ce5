//! Notices that a volume is no longer ours though nobody uses it: a session that was fenced ends by itself, with a line
//! in the log and with its clients' connections, instead of looking healthy until the next write.
//!
//! One task per process, as often as the lease is kept alive. The owner keys of all volumes are read in few
//! transactions (127 volumes in each). While the metadata store does not answer, the replicas are asked instead: one
//! that knows a later epoch says so. So a fenced owner ends within a third of its TTL of the moment at which it can
//! reach the store, or one replica which the new owner has opened.

use super::lease::ProcessLease;
use super::own::own_again;
use super::session::{Session, Verdict, verdict};
use bytes::Bytes;
use futures::{StreamExt, stream};
use std::rc::{Rc, Weak};
use torus_rpc::message::Operation;
use torus_rpc::metadata::{Entry, Metadata, MetadataError, Revision, Transaction};
use torus_rpc::runtime::{Class, Clock, Runtime, Spawn};
use torus_schema::ids::BlockIndex;
use torus_schema::limits::{METADATA_OPERATIONS_MAX, OWNER_PROBES_IN_FLIGHT_MAX};
use torus_schema::records::{OwnerRecord, decode, keys};

/// Until the lease, or what gives the sessions, is gone.
pub(super) async fn watch<R: Runtime>(
    runtime: R,
    lease: Weak<ProcessLease<R>>,
    sessions: impl Fn() -> Option<Vec<Rc<Session<R>>>>,
) {
    loop {
        let Some(interval) = lease.upgrade().map(|lease| lease.terms().keepalive_interval()) else { return };
        runtime.clock().sleep(interval).await;
        let Some(attached) = sessions() else { return };
        for some in attached.chunks(METADATA_OPERATIONS_MAX - 1) {
            if let Err(error) = look(&runtime, some).await {
                tracing::debug!(%error, volumes = some.len(), "cannot look at our owner keys; asking the replicas");
                stream::iter(some).for_each_concurrent(OWNER_PROBES_IN_FLIGHT_MAX, |session| probe(session)).await;
            }
        }
    }
}

async fn look<R: Runtime>(runtime: &R, sessions: &[Rc<Session<R>>]) -> Result<(), MetadataError> {
    let before: Vec<Revision> = sessions.iter().map(|session| session.status.owner_revision.get()).collect();
    let reads = sessions.iter().map(|session| keys::owner(session.record.id)).collect();
    let result = runtime.metadata().transact(Transaction { reads, ..Transaction::default() }).await?;
    for ((session, before), entry) in sessions.iter().zip(before).zip(&result.reads) {
        // What changed meanwhile is looked at the next time; a lease that was replaced is `keep_owning`'s to mend.
        let ours = session.status.owner_revision.get();
        if ours != before || session.lease.generation() != session.status.owner_lease.get() {
            continue;
        }
        match entry {
            Some(entry) if entry.create_revision == ours => {}
            Some(entry) => session.end(format!("another writer owns the volume: {}", owner_of(entry))),
            None => {
                tracing::warn!(volume = %session.record.name, epoch = %session.epoch, "our owner key is gone");
                let session = session.clone();
                runtime.spawn().spawn(Class::Foreground, async move { own_again(&session).await });
            }
        }
    }
    Ok(())
}

fn owner_of(entry: &Entry) -> String {
    match decode::<OwnerRecord>(&entry.key, &entry.value) {
        Ok(owner) => format!("{} (pid {}) on {}, epoch {}", owner.process, owner.pid, owner.host, owner.epoch),
        Err(error) => error.to_string(),
    }
}

/// Whether a replica of the first slot knows a later epoch. What else it answers is not looked at.
async fn probe<R: Runtime>(session: &Rc<Session<R>>) {
    let slot = session.placement.slot_of(BlockIndex(0).extent());
    let replicas: Vec<_> = session.replicas.borrow().in_sync(slot).collect();
    let map = Operation::Map { first: BlockIndex(0), count: 1 };
    let asked = replicas.into_iter().map(|position| {
        let (map, shard) = (&map, &session.shards[position]);
        async move { (shard, session.ask(shard, map, &Bytes::new()).await) }
    });
    for (shard, answer) in futures::future::join_all(asked).await {
        if let Err(failure) = answer
            && verdict(&failure) == Verdict::Fenced
        {
            session.end(format!("shard {} says: {failure}", shard.id));
        }
    }
}
