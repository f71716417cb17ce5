//! What is asked of a shard and what it answers, as Rust types; `frame` turns them into bytes and back.

use smallvec::SmallVec;
use std::time::Duration;
use torus_schema::ids::{BlockIndex, ClusterId, Epoch, Incarnation, NodeId, RingGeneration, ShardIndex, SliceId};
use torus_schema::ids::{Version, VolumeId};
use torus_schema::latency::OperationKind;

/// A list that is usually of one, which then stands in place: an operation of one block takes no memory for it.
pub type Few<T> = SmallVec<[T; 1]>;

/// CRC32C of each block, in place up to 16 KiB of data.
pub type Checksums = SmallVec<[u32; 4]>;

/// Version of the data plane; the hello compares it.
pub const PROTOCOL: u32 = 2;

/// What every request on a volume carries; any mismatch is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    pub volume: VolumeId,
    pub epoch: Epoch,
    pub incarnation: Incarnation,
    pub generation: RingGeneration,
    /// F: everything up to it is durable on every in-sync replica of the volume.
    pub flush_point: Version,
}

impl Envelope {
    /// For requests that concern no volume.
    pub const NONE: Envelope = Envelope {
        volume: VolumeId(uuid::Uuid::nil()),
        epoch: Epoch(0),
        incarnation: Incarnation(0),
        generation: RingGeneration(0),
        flush_point: Version::ZERO,
    };
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    /// First on every connection.
    Hello {
        protocol: u32,
        cluster: ClusterId,
        node: NodeId,
        shard: ShardIndex,
    },
    Ping,
    /// Makes the shard a replica of `slices`, durably. Envelope: volume, generation; epoch and incarnation are zero.
    CreateInstances {
        token: Token,
        placement: VolumeId,
        width: u32,
        ring_slices: u32,
        slices: Vec<SliceId>,
    },
    /// Envelope: volume, epoch, generation; incarnation is what the answer gives.
    Open {
        token: Token,
        owner: String,
        slices: Vec<SliceId>,
    },
    /// Within one extent.
    Read {
        first: BlockIndex,
        count: u32,
    },
    /// Within one extent; one checksum and one block of payload each. The version may be of an earlier epoch
    /// (reconcile), never of a later one.
    Write {
        first: BlockIndex,
        version: Version,
        durable: bool,
        checksums: Checksums,
    },
    /// All blocks of the range that lie in the slice, over any number of extents, read as zeros.
    Clear {
        first: BlockIndex,
        count: u64,
        slice: SliceId,
        version: Version,
        durable: bool,
    },
    /// Answered by an fdatasync that started after it arrived.
    Flush,
    /// Newest records above a version, from a block on; of one slice or of all.
    Describe {
        above: Version,
        from: BlockIndex,
        slice: Option<SliceId>,
    },
    /// What the writer needs kept of the volume (protocol rule 14); durable before it is answered. F is in the envelope.
    Retain(Retention),
    /// Exactly these records are taken back, wherever they stand in the log (protocol rule 11).
    Revoke {
        revoked: Vec<Revoked>,
    },
    /// Which blocks of the range have data, without the data. Within one extent, all of it at most.
    Map {
        first: BlockIndex,
        count: u32,
    },
    /// From shard to shard, within one extent. Envelope: the volume alone. It needs no epoch: a record is named by its
    /// version and never changes, so who knows version and checksum of what he lost takes nothing stale for it.
    PeerRead {
        /// Signed with epoch 0 and the owner `peer`.
        token: Token,
        first: BlockIndex,
        count: u32,
        /// The blocks too; otherwise only versions and checksums.
        data: bool,
    },
    /// To a stale replica, which takes from the source what it lacks (protocol rule 11).
    Resync(Resync),
}

impl Operation {
    /// As what latencies of users' operations are told; `None`: no user asked for it.
    pub fn kind(&self) -> Option<OperationKind> {
        match self {
            Operation::Read { .. } => Some(OperationKind::Read),
            Operation::Write { .. } | Operation::Clear { .. } => Some(OperationKind::Write),
            Operation::Flush => Some(OperationKind::Flush),
            _ => None,
        }
    }
}

/// One step of a resync: the envelope is the target's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resync {
    pub slice: SliceId,
    /// The target may lack what is above it, and may have what nobody else has.
    pub since: Version,
    /// What the source has up to here is final, and later writes are sent to the target too.
    pub through: Version,
    pub source: Source,
    pub from: BlockIndex,
    /// Moved at most; the answer says where to go on.
    pub blocks_max: u32,
    /// Otherwise only what never was is taken back. First that for all slices, made durable: until then the target must
    /// not hear of an F above `since`, or it frees what stands below a version that is to be taken back.
    pub pull: bool,
}

/// A replica in sync, in the life of it that has everything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    pub node: NodeId,
    pub shard: ShardIndex,
    pub address: String,
    pub incarnation: Incarnation,
    /// Of its place in the ring.
    pub generation: RingGeneration,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resynced {
    pub next: Option<BlockIndex>,
    /// Blocks compared, blocks taken from the source, versions taken back.
    pub examined: u64,
    pub pulled: u64,
    pub revoked: u64,
}

/// What has to be kept of a volume though something newer stands above it (protocol rules 13, 14).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// All snapshots below it are in `pins`; what was superseded above it is kept.
    pub horizon: Version,
    /// Ascending. The newest record of each block at or below each of them is kept.
    pub pins: Vec<Version>,
    /// The lowest mark of a stale replica: clears and revocations above it are kept. `None`: no replica is stale.
    pub stale_since: Option<Version>,
    /// How often the volume's status has changed so far. A shard remembers the highest it heard, so that a metadata
    /// store which was restored from an older backup is found out (interleaving 27).
    pub status_changes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revoked {
    pub block: BlockIndex,
    pub version: Version,
}

/// HMAC-SHA-256 by the cluster key over volume, epoch and owner: shows that the metadata store let this writer in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Token(pub [u8; 32]);

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

/// An answer, and whether the shard takes new data from clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub full: bool,
    pub took: Took,
    pub answer: Answer,
}

impl Reply {
    /// Of a shard that takes new data, at once.
    pub fn of(answer: Answer) -> Self {
        Self { full: false, took: Took::default(), answer }
    }
}

/// How long the shard had the request, in microseconds; at most an hour and eleven minutes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Took {
    /// From its arrival until its disk operation began.
    pub queue_us: u32,
    /// From then on until it was answered.
    pub service_us: u32,
}

impl Took {
    pub fn new(queue: Duration, service: Duration) -> Self {
        let us = |time: Duration| u32::try_from(time.as_micros()).unwrap_or(u32::MAX);
        Self { queue_us: us(queue), service_us: us(service) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Hello {
        protocol: u32,
    },
    Pong,
    Created,
    Opened(Opened),
    /// The payload holds the blocks of the runs with data, in order, one checksum each.
    Read {
        runs: Few<Run>,
        checksums: Checksums,
    },
    Written,
    Cleared,
    Flushed,
    Described {
        descriptors: Vec<Descriptor>,
        next: Option<BlockIndex>,
    },
    Retained,
    Revoked,
    Mapped {
        runs: Few<Run>,
    },
    Resynced(Resynced),
    Refused(Refusal),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    pub incarnation: Incarnation,
    pub open_in_previous_epoch: bool,
    pub flush_point: Version,
    /// Slices asked for of which the shard has no instance of this generation.
    pub missing: Vec<SliceId>,
    /// The highest that a retain ever said.
    pub status_changes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub count: u32,
    /// Zero: never written.
    pub version: Version,
    /// Otherwise the blocks read as zeros.
    pub data: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub first: BlockIndex,
    /// Above 1 only for cleared blocks; never past the end of an extent.
    pub count: u32,
    pub version: Version,
    /// `None`: cleared.
    pub checksum: Option<u32>,
}

/// Why a shard does not do what it was asked. None of these loses anything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("the replica knows epoch {replica} of the volume, which is later: another writer has attached it")]
    StaleEpoch { replica: Epoch },
    #[error("the shard restarted since it was opened")]
    OtherIncarnation,
    #[error("the shard holds no instance of slice {slice} in this ring generation")]
    NotOwner { slice: SliceId },
    #[error("the volume is not open on the shard in this epoch")]
    NotOpen,
    #[error("the token was not made with this cluster's key")]
    BadToken,
    #[error("the shard is full")]
    NoSpace,
    #[error("block {block} is damaged on this replica")]
    Damaged { block: BlockIndex },
    #[error("block {block} arrived with checksum {found:08x}, expected {expected:08x}")]
    Corrupt { block: BlockIndex, found: u32, expected: u32 },
    #[error("disk: {because}")]
    Disk { because: String },
    #[error("malformed request: {because}")]
    Malformed { because: String },
    #[error("wrong peer: {because}")]
    WrongPeer { because: String },
    /// `restarted`: it is not the incarnation it was said to be, or no longer open.
    #[error("the source of the resync: {because}")]
    Source { because: String, restarted: bool },
}
