//! What the last writer left unflushed: the union of it, by highest version per block, is copied to every in-sync
//! replica and made durable before anything is served (protocol rule 4). Without the fdatasync adopted records would
//! escape the next flush (interleaving 10).

use super::attach::{lose, opens_again};
use super::replicas::ShardPosition;
use super::session::{Failure, Session};
use crate::device::VolumeError;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::message::{Answer, Descriptor, Operation, Refusal, Revoked};
use torus_rpc::runtime::{Clock, Runtime};
use torus_schema::ids::{BlockIndex, ExtentIndex, Version};
use torus_schema::limits::BLOCKS_PER_EXTENT;

type ByShard = BTreeMap<ShardPosition, Vec<Descriptor>>;

/// Nobody who has the newest version of a block can read it.
struct Unreadable {
    shards: Vec<ShardPosition>,
    version: Revoked,
}

enum Failed {
    /// A replica failed while it was needed; the rest goes on without it.
    Replica { shard: ShardPosition, failure: Failure },
    /// Two valid, different copies of one version: for the operator, never a vote (interleaving 23).
    Conflict { block: BlockIndex, version: Version, shards: [ShardPosition; 2] },
}

/// So often one replica may fail on the way and open again.
const ATTEMPTS_MAX: u32 = 4;
/// So often a block is read that is damaged wherever it is: a stale replica may have it for a repair, and a disk may do
/// better the next time.
const READS_MAX: u32 = 10;
const READ_AGAIN_AFTER: Duration = Duration::from_millis(300);

/// Repeats itself, without the replicas that fail on the way and do not open again.
pub(super) async fn reconcile<R: Runtime>(session: &Rc<Session<R>>) -> Result<(), VolumeError> {
    let mut attempts: BTreeMap<ShardPosition, u32> = BTreeMap::new();
    let mut reads = 0;
    loop {
        session.check()?;
        match attempt(session).await {
            Ok(unreadable) if unreadable.is_empty() => {
                session.flush_point.set(Version::new(session.epoch, 0));
                return Ok(());
            }
            Ok(_) if reads < READS_MAX => {
                reads += 1;
                session.runtime.clock().sleep(READ_AGAIN_AFTER).await;
            }
            // All else that those who have it had is with the others now.
            Ok(unreadable) => {
                for Unreadable { shards, version } in unreadable {
                    for shard in shards {
                        do_without(session, shard, version).await?;
                    }
                }
            }
            Err(Failed::Replica { shard, failure }) => {
                let attempts = attempts.entry(shard).or_insert(1);
                *attempts += 1;
                if *attempts > ATTEMPTS_MAX || !opens_again(session, shard, &failure).await? {
                    lose(session, shard, &failure).await?;
                }
            }
            Err(Failed::Conflict { block, version, shards: [a, b] }) => {
                let (a, b) = (session.shards[a].id, session.shards[b].id);
                let because = format!(
                    "block {block} has two different contents under version {version}, on shards {a} and {b}; \
                     nothing was changed, decide which one is right"
                );
                tracing::error!(volume = %session.record.name, %because);
                return Err(VolumeError::NotReady { because });
            }
        }
    }
}

/// A version above F that no replica in sync can read. The replica goes stale if others are left; its resync takes the
/// version back. If none can go, the version is taken back here: it is lost, flushed it never was, and nobody could attach the
/// volume any more.
async fn do_without<R: Runtime>(
    session: &Rc<Session<R>>,
    shard: ShardPosition,
    version: Revoked,
) -> Result<(), VolumeError> {
    let failure = Failure::Refused(Refusal::Damaged { block: version.block });
    match lose(session, shard, &failure).await {
        Err(VolumeError::NotReady { .. }) => {}
        result => return result,
    }
    let (name, id) = (&session.record.name, session.shards[shard].id);
    tracing::error!(volume = %name, shard = %id, block = %version.block, version = %version.version,
        "the last writer left this unflushed, it is damaged and nobody else has it: what it replaced counts again");
    let revoke = Operation::Revoke { revoked: vec![version] };
    match session.ask(&session.shards[shard], &revoke, &Bytes::new()).await {
        Ok(_) => Ok(()),
        Err(failure) => lose(session, shard, &failure).await,
    }
}

/// What could not be brought to everybody, since it cannot be read; everything else is, durably.
async fn attempt<R: Runtime>(session: &Session<R>) -> Result<Vec<Unreadable>, Failed> {
    let shards: Vec<_> =
        (0..session.shards.len()).filter(|shard| session.replicas.borrow().holds_in_sync(*shard)).collect();
    let described = futures::future::join_all(shards.iter().map(|shard| describe(session, *shard))).await;
    let mut extents: BTreeMap<ExtentIndex, ByShard> = BTreeMap::new();
    for (shard, descriptors) in shards.iter().zip(described) {
        for descriptor in descriptors.map_err(|failure| Failed::Replica { shard: *shard, failure })? {
            let of_shard = extents.entry(descriptor.first.extent()).or_default();
            of_shard.entry(*shard).or_default().push(descriptor);
        }
    }
    let (mut copied, mut unreadable) = (0, Vec::new());
    for (extent, by_shard) in extents {
        copied += level(session, extent, by_shard, &mut unreadable).await?;
    }
    let flushes = shards.iter().map(|shard| async move {
        let flushed = session.ask(&session.shards[*shard], &Operation::Flush, &Bytes::new()).await;
        flushed.map_err(|failure| Failed::Replica { shard: *shard, failure })
    });
    for flushed in futures::future::join_all(flushes).await {
        flushed?;
    }
    let blocks_unreadable = unreadable.len();
    tracing::info!(volume = %session.record.name, epoch = %session.epoch, blocks_copied = copied, blocks_unreadable, "reconciled");
    Ok(unreadable)
}

/// All of the shard's records above the flush point.
async fn describe<R: Runtime>(session: &Session<R>, shard: ShardPosition) -> Result<Vec<Descriptor>, Failure> {
    let mut all = Vec::new();
    let mut from = BlockIndex(0);
    loop {
        let operation = Operation::Describe { above: session.flush_point.get(), from, slice: None };
        match session.ask(&session.shards[shard], &operation, &Bytes::new()).await?.0 {
            Answer::Described { descriptors, next } => {
                all.extend(descriptors);
                match next {
                    Some(next) if next > from => from = next,
                    Some(next) => return Err(malformed(format!("a description goes on at {next} from {from}"))),
                    None => return Ok(all),
                }
            }
            other => return Err(malformed(format!("a describe was answered by {other:?}"))),
        }
    }
}

fn malformed(because: String) -> Failure {
    Failure::Refused(Refusal::Malformed { because })
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Newest {
    version: Version,
    checksum: Option<u32>,
}

/// Brings one extent to the same records on all its in-sync replicas; returns the blocks copied.
async fn level<R: Runtime>(
    session: &Session<R>,
    extent: ExtentIndex,
    by_shard: ByShard,
    unreadable: &mut Vec<Unreadable>,
) -> Result<u64, Failed> {
    let slot = session.placement.slot_of(extent);
    let replicas: Vec<_> = session.replicas.borrow().in_sync(slot).collect();
    let nothing = Vec::new();
    let lists: Vec<_> = replicas.iter().map(|shard| by_shard.get(shard).unwrap_or(&nothing)).collect();
    if lists.windows(2).all(|pair| pair[0] == pair[1]) {
        return Ok(0);
    }
    let held: Vec<_> = lists.iter().map(|list| by_block(extent, list)).collect();
    let mut copied = 0;
    for block in 0..BLOCKS_PER_EXTENT as usize {
        let Some((newest, source)) = newest(&held, block) else { continue };
        if let Some(other) = conflict(&held, block, newest) {
            let block = BlockIndex(extent.first_block().0 + block as u64);
            let shards = [replicas[source], replicas[other]];
            return Err(Failed::Conflict { block, version: newest.version, shards });
        }
        let first = BlockIndex(extent.first_block().0 + block as u64);
        let (having, lacking): (Vec<_>, Vec<_>) =
            (0..replicas.len()).partition(|replica| held[*replica][block] == Some(newest));
        let having: Vec<_> = having.into_iter().map(|replica| replicas[replica]).collect();
        for replica in lacking {
            if !copy(session, first, newest, &having, replicas[replica]).await? {
                let version = Revoked { block: first, version: newest.version };
                unreadable.push(Unreadable { shards: having, version });
                break;
            }
            copied += 1;
        }
    }
    Ok(copied)
}

fn by_block(extent: ExtentIndex, descriptors: &[Descriptor]) -> Vec<Option<Newest>> {
    let mut blocks = vec![None; BLOCKS_PER_EXTENT as usize];
    for descriptor in descriptors {
        let first = (descriptor.first.0 - extent.first_block().0) as usize;
        let end = (first + descriptor.count as usize).min(blocks.len());
        for block in &mut blocks[first..end] {
            let other = Newest { version: descriptor.version, checksum: descriptor.checksum };
            if block.is_none_or(|newest: Newest| newest.version < other.version) {
                *block = Some(other);
            }
        }
    }
    blocks
}

fn newest(held: &[Vec<Option<Newest>>], block: usize) -> Option<(Newest, usize)> {
    let versions =
        held.iter().enumerate().filter_map(|(replica, blocks)| blocks[block].map(|newest| (newest, replica)));
    versions.max_by_key(|(newest, replica)| (newest.version, std::cmp::Reverse(*replica)))
}

fn conflict(held: &[Vec<Option<Newest>>], block: usize, newest: Newest) -> Option<usize> {
    held.iter().position(|blocks| {
        blocks[block].is_some_and(|other| other.version == newest.version && other.checksum != newest.checksum)
    })
}

/// Under its original version: the same record, not a new write. False: it cannot be read anywhere.
async fn copy<R: Runtime>(
    session: &Session<R>,
    first: BlockIndex,
    newest: Newest,
    sources: &[ShardPosition],
    target: ShardPosition,
) -> Result<bool, Failed> {
    let of_target = |failure| Failed::Replica { shard: target, failure };
    let Some(checksum) = newest.checksum else {
        let slice = session.placement.slice_of(first.extent());
        let clear = Operation::Clear { first, count: 1, slice, version: newest.version, durable: false };
        session.ask(&session.shards[target], &clear, &Bytes::new()).await.map_err(of_target)?;
        return Ok(true);
    };
    for source in sources {
        let Some(payload) = read(session, first, newest.version, checksum, *source).await? else { continue };
        let write = Operation::Write {
            first,
            version: newest.version,
            durable: false,
            checksums: [checksum].as_slice().into(),
        };
        session.ask(&session.shards[target], &write, &payload).await.map_err(of_target)?;
        return Ok(true);
    }
    Ok(false)
}

/// `None`: it is damaged there.
async fn read<R: Runtime>(
    session: &Session<R>,
    first: BlockIndex,
    version: Version,
    checksum: u32,
    source: ShardPosition,
) -> Result<Option<Bytes>, Failed> {
    let of_source = |failure| Failed::Replica { shard: source, failure };
    let read = Operation::Read { first, count: 1 };
    let (answer, payload) = match session.ask(&session.shards[source], &read, &Bytes::new()).await {
        Err(Failure::Refused(Refusal::Damaged { .. })) => return Ok(None),
        answered => answered.map_err(of_source)?,
    };
    let Answer::Read { runs, .. } = &answer else {
        return Err(of_source(malformed(format!("a read was answered by {answer:?}"))));
    };
    let same = matches!(&runs[..], [run] if run.version == version && run.data);
    if !same || crc32c::crc32c(&payload) != checksum {
        let because =
            format!("block {first} was described as version {version} with checksum {checksum:08x}, read as {runs:?}");
        return Err(of_source(malformed(because)));
    }
    Ok(Some(payload))
}
