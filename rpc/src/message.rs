//! What is asked of a shard and what it answers, as Rust types; `frame` turns them into bytes and back.

use torus_schema::ids::{BlockIndex, ClusterId, Epoch, Incarnation, NodeId, RingGeneration, ShardIndex, SliceId};
use torus_schema::ids::{Version, VolumeId};

/// Version of the data plane; the hello compares it.
pub const PROTOCOL: u32 = 1;

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
        checksums: Vec<u32>,
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
    /// Newest records above a version, from a block on.
    Describe {
        above: Version,
        from: BlockIndex,
    },
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
    pub answer: Answer,
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
        runs: Vec<Run>,
        checksums: Vec<u32>,
    },
    Written,
    Cleared,
    Flushed,
    Described {
        descriptors: Vec<Descriptor>,
        next: Option<BlockIndex>,
    },
    Refused(Refusal),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    pub incarnation: Incarnation,
    pub open_in_previous_epoch: bool,
    pub flush_point: Version,
    /// Slices asked for of which the shard has no instance of this generation.
    pub missing: Vec<SliceId>,
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
}
