//! One shard on one file, without network, and the writer of its one volume, who numbers his writes and tells F as the
//! protocol says.

use crate::error::{BenchError, Result};
use crate::processes::Watched;
use crate::stand::written_file_of;
use bytes::Bytes;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use torus_engine::disk::direct::DirectDisk;
use torus_engine::node::no_metadata::NoMetadata;
use torus_engine::shard::{Shard, ShardIdentity, ShardStatistics};
use torus_rpc::message::{Answer, Checksums, Envelope, Operation, Refusal, Retention};
use torus_rpc::runtime::glommio::GlommioRuntime;
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{BlockIndex, ClusterId, Epoch, NodeId, RingGeneration, ShardIndex, SliceId, Version, VolumeId};
use torus_schema::limits::{BLOCK_BYTES, SEQUENCE_MAX};

pub type BenchRuntime = GlommioRuntime<NoMetadata, DirectDisk>;
pub type BenchShard = Shard<BenchRuntime>;

pub const BLOCK: usize = BLOCK_BYTES as usize;
pub const GENERATION: RingGeneration = RingGeneration(1);
const EPOCH: Epoch = Epoch(1);

pub fn identity() -> ShardIdentity {
    let (cluster, node) = (ClusterId::from_bytes([1; 16]), NodeId::from_bytes([2; 16]));
    ShardIdentity { cluster, node, shard: ShardIndex(0) }
}

pub fn volume() -> VolumeId {
    VolumeId::from_bytes([3; 16])
}

/// Of a cluster that exists nowhere else.
pub fn key() -> ClusterKey {
    ClusterKey::from_hex(&"07".repeat(32)).expect("64 hexadecimal digits are a key")
}

pub fn failed<E: ToString>(what: &str, path: &Path) -> impl FnOnce(E) -> BenchError {
    BenchError::wrap(format!("{what} of the shard on {}", path.display()))
}

pub struct Bed {
    pub path: PathBuf,
    pub shard: Rc<BenchShard>,
    pub writer: Writer,
}

impl Bed {
    /// A new file in `folder`, each of its blocks written once before; an empty shard on it, open.
    pub async fn make(folder: &Path, name: &str, bytes: u64, segment_bytes: u64, flush_bytes: u64) -> Result<Self> {
        let path = written_file_of(folder, name, bytes)?;
        let runtime = BenchRuntime::new(NoMetadata);
        let disk = DirectDisk::open(&path).await.map_err(failed("opening", &path))?;
        BenchShard::format(&runtime, &disk, identity(), segment_bytes).await.map_err(failed("format", &path))?;
        let shard = BenchShard::open(runtime, disk, identity(), key()).await.map_err(failed("start", &path))?;
        let writer = Writer::open(shard.clone(), flush_bytes).await?;
        Ok(Self { path, shard, writer })
    }

    pub async fn close(self) -> Result<()> {
        self.shard.close().await;
        std::fs::remove_file(&self.path).map_err(failed("removal", &self.path))
    }
}

struct Numbers {
    envelope: Envelope,
    last: u64,
    in_flight: BTreeSet<u64>,
    unflushed_bytes: u64,
}

/// Clones are the same writer.
#[derive(Clone)]
pub struct Writer {
    shard: Rc<BenchShard>,
    numbers: Rc<RefCell<Numbers>>,
    /// It flushes by itself after so much, as the volume library does: what is not flushed is kept for a rollback.
    flush_bytes: u64,
}

/// What is written again and again, with its checksums: making both is a client's work and not the shard's.
#[derive(Clone)]
pub struct Content {
    pub payload: Bytes,
    pub checksums: Checksums,
}

impl Content {
    pub fn of_blocks(blocks: usize) -> Self {
        let payload = vec![0xa5; blocks * BLOCK];
        let checksums = payload.chunks(BLOCK).map(crc32c::crc32c).collect();
        Self { payload: payload.into(), checksums }
    }
}

impl Writer {
    async fn open(shard: Rc<BenchShard>, flush_bytes: u64) -> Result<Self> {
        let envelope = Envelope { volume: volume(), generation: GENERATION, ..Envelope::NONE };
        let numbers = Numbers { envelope, last: 0, in_flight: BTreeSet::new(), unflushed_bytes: 0 };
        let writer = Self { shard, numbers: Rc::new(RefCell::new(numbers)), flush_bytes };
        let slices = vec![SliceId(0)];
        let token = key().sign(volume(), Epoch(0), "create");
        let (placement, width, ring_slices) = (volume(), 1, 1);
        let create = Operation::CreateInstances { token, placement, width, ring_slices, slices: slices.clone() };
        writer.call(create, Bytes::new()).await?;
        writer.numbers.borrow_mut().envelope.epoch = EPOCH;
        let owner = "bench".to_string();
        let token = key().sign(volume(), EPOCH, &owner);
        match writer.call(Operation::Open { token, owner, slices }, Bytes::new()).await? {
            Answer::Opened(opened) => writer.numbers.borrow_mut().envelope.incarnation = opened.incarnation,
            other => return Err(unexpected("an Open", &other)),
        }
        // No snapshots, no stale replica; until this is said the shard frees nothing.
        let horizon = Version::new(EPOCH, SEQUENCE_MAX);
        writer.call(Operation::Retain(Retention { horizon, ..Retention::default() }), Bytes::new()).await?;
        Ok(writer)
    }

    async fn call(&self, operation: Operation, payload: Bytes) -> Result<Answer> {
        let envelope = self.numbers.borrow().envelope;
        let name = format!("{operation:?}").chars().take(60).collect::<String>();
        let (reply, _) = self.shard.handle(envelope, operation, payload).await;
        match reply.answer {
            Answer::Refused(refusal) => Err(BenchError::Failed { what: name, because: refusal.to_string() }),
            answer => Ok(answer),
        }
    }

    /// Answered when it can be read.
    pub async fn write(&self, first: u64, content: &Content) -> Result<()> {
        if self.write_if_room(first, content).await? {
            return Ok(());
        }
        let because = "the shard is full".to_string();
        Err(BenchError::Failed { what: format!("a write at block {first}"), because })
    }

    /// False: refused, because the shard is full.
    pub async fn write_if_room(&self, first: u64, content: &Content) -> Result<bool> {
        let (version, must_flush) = {
            let numbers = &mut *self.numbers.borrow_mut();
            numbers.last += 1;
            numbers.in_flight.insert(numbers.last);
            numbers.unflushed_bytes += content.payload.len() as u64;
            let must_flush = numbers.unflushed_bytes >= self.flush_bytes;
            if must_flush {
                numbers.unflushed_bytes = 0;
            }
            (Version::new(EPOCH, numbers.last), must_flush)
        };
        let checksums = content.checksums.clone();
        let operation = Operation::Write { first: BlockIndex(first), version, durable: false, checksums };
        let envelope = self.numbers.borrow().envelope;
        let (reply, _) = self.shard.handle(envelope, operation, content.payload.clone()).await;
        self.numbers.borrow_mut().in_flight.remove(&version.sequence);
        match reply.answer {
            Answer::Written => {}
            Answer::Refused(Refusal::NoSpace) => return Ok(false),
            other => return Err(unexpected("a write", &other)),
        }
        if must_flush {
            self.flush().await?;
        }
        Ok(true)
    }

    /// F moves to what had been answered before.
    pub async fn flush(&self) -> Result<()> {
        let (envelope, flush_point) = {
            let numbers = self.numbers.borrow();
            let answered = numbers.in_flight.first().map_or(numbers.last, |first| first - 1);
            (numbers.envelope, Version::new(EPOCH, answered))
        };
        let (reply, _) = self.shard.handle(envelope, Operation::Flush, Bytes::new()).await;
        match reply.answer {
            Answer::Flushed => {}
            other => return Err(unexpected("a flush", &other)),
        }
        let numbers = &mut *self.numbers.borrow_mut();
        numbers.envelope.flush_point = numbers.envelope.flush_point.max(flush_point);
        Ok(())
    }

    /// The blocks must have been written.
    pub async fn read(&self, first: u64, count: u32) -> Result<()> {
        let envelope = self.numbers.borrow().envelope;
        let operation = Operation::Read { first: BlockIndex(first), count };
        let (reply, chunks) = self.shard.handle(envelope, operation, Bytes::new()).await;
        match reply.answer {
            Answer::Read { .. } => {}
            other => return Err(unexpected("a read", &other)),
        }
        let (found, expected) = (chunks.iter().map(|chunk| chunk.len()).sum::<usize>(), count as usize * BLOCK);
        if found != expected {
            let because = format!("{found} bytes of data, expected {expected}");
            return Err(BenchError::Failed { what: format!("a read at block {first}"), because });
        }
        Ok(())
    }
}

fn unexpected(what: &str, answer: &Answer) -> BenchError {
    BenchError::Failed { what: what.to_string(), because: format!("answered by {answer:?}") }
}

/// What happened between two looks at a shard, and what this process gave the disk meanwhile.
#[derive(Clone, Copy, Debug)]
pub struct Counters {
    pub shard: ShardStatistics,
    /// By /proc/self/io: everything, headers, footers and openings too.
    pub disk_bytes: u64,
}

impl Counters {
    pub fn now(shard: &BenchShard) -> Result<Self> {
        let disk_bytes = Watched::new("the bench", std::process::id()).written_bytes()?;
        Ok(Self { shard: shard.statistics(), disk_bytes })
    }
}

/// Sequentially, by frames of the largest size, eight at once. Returns the blocks written: fewer if the shard refused
/// some.
pub async fn fill(writer: &Writer, blocks: u64) -> Result<u64> {
    const FRAME_BLOCKS: u64 = 256;
    const AT_ONCE: usize = 8;
    let content = Content::of_blocks(FRAME_BLOCKS as usize);
    let starts: Vec<u64> = (0..blocks / FRAME_BLOCKS).map(|frame| frame * FRAME_BLOCKS).collect();
    let mut written = 0;
    for together in starts.chunks(AT_ONCE) {
        let writes = together.iter().map(|first| writer.write_if_room(*first, &content));
        let taken = futures::future::try_join_all(writes).await?;
        written += taken.iter().filter(|taken| **taken).count() as u64 * FRAME_BLOCKS;
        if taken.contains(&false) {
            return Ok(written);
        }
    }
    let rest = Content::of_blocks(1);
    for block in blocks / FRAME_BLOCKS * FRAME_BLOCKS..blocks {
        if !writer.write_if_room(block, &rest).await? {
            return Ok(written);
        }
        written += 1;
    }
    writer.flush().await?;
    Ok(written)
}

pub fn require_room(taken: u64, asked: u64) -> Result<()> {
    if taken == asked {
        return Ok(());
    }
    let because = format!("it is full after {taken} blocks, expected room for {asked}");
    Err(BenchError::Failed { what: "filling the shard".to_string(), because })
}
