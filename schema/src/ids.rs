//! The names of things: one newtype per id and counter, so that the compiler keeps them apart.

use serde::{Deserialize, Serialize};
use std::fmt;
use uuid::Uuid;

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl $name {
            pub fn random() -> Self {
                Self(Uuid::new_v4())
            }
            pub fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
            pub fn to_bytes(self) -> [u8; 16] {
                *self.0.as_bytes()
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl std::str::FromStr for $name {
            type Err = uuid::Error;
            fn from_str(text: &str) -> Result<Self, Self::Err> {
                Uuid::parse_str(text).map(Self)
            }
        }
    };
}

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

uuid_id!(
    /// One cluster, drawn by `torusadm init`; a data dir and a connection belong to exactly one.
    ClusterId
);
uuid_id!(
    /// One storage node, drawn when its data dir is formatted.
    NodeId
);
uuid_id!(
    /// One volume; never reused, so that a late message or a forgotten record can never hit another volume.
    VolumeId
);

counter!(
    /// The short name of a node inside the ring document; a node's uuid is looked up there.
    NodeNumber(u32)
);
counter!(
    /// A shard within its node: its executor, block file and port are numbered by it.
    ShardIndex(u16)
);
counter!(
    /// A position of the ring; their number is a power of two fixed at `torusadm init`.
    SliceId(u32)
);
counter!(
    /// Counts attaches of one volume; the higher epoch fences the lower.
    Epoch(u32)
);
counter!(
    /// Counts changes of the ring document.
    RingGeneration(u64)
);
counter!(
    /// A 4 KiB block of a volume, counted from its start.
    BlockIndex(u64)
);
counter!(
    /// A 4 MiB extent of a volume, counted from its start: the unit of placement.
    ExtentIndex(u64)
);

impl BlockIndex {
    pub fn extent(self) -> ExtentIndex {
        ExtentIndex(self.0 / crate::limits::BLOCKS_PER_EXTENT)
    }
    /// Position of the block inside its extent, below `BLOCKS_PER_EXTENT`.
    pub fn in_extent(self) -> u64 {
        self.0 % crate::limits::BLOCKS_PER_EXTENT
    }
}

impl ExtentIndex {
    pub fn first_block(self) -> BlockIndex {
        BlockIndex(self.0 * crate::limits::BLOCKS_PER_EXTENT)
    }
}

/// A shard anywhere in the cluster: the target of placement.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ShardId {
    pub node: NodeNumber,
    pub shard: ShardIndex,
}

impl fmt::Display for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.node, self.shard)
    }
}

impl fmt::Debug for ShardId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The order of all writes to a volume: later attaches first, then the writer's own count.
/// `Version::ZERO` means never written.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Version {
    pub epoch: Epoch,
    /// Below `limits::SEQUENCE_MAX`.
    pub sequence: u64,
}

impl Version {
    pub const ZERO: Version = Version { epoch: Epoch(0), sequence: 0 };

    pub fn new(epoch: Epoch, sequence: u64) -> Self {
        assert!(sequence <= crate::limits::SEQUENCE_MAX);
        Self { epoch, sequence }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.sequence)
    }
}

impl fmt::Debug for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Drawn by a shard at each start and after each disk error, and given only to a valid Open:
/// the capability that every later request has to show (a restart in between is then noticed).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Incarnation(pub u128);

impl fmt::Debug for Incarnation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_epoch_is_a_later_version_whatever_the_sequence() {
        assert!(Version::new(Epoch(2), 0) > Version::new(Epoch(1), crate::limits::SEQUENCE_MAX));
        assert!(Version::new(Epoch(1), 2) > Version::new(Epoch(1), 1));
    }

    #[test]
    fn a_block_lies_in_the_extent_that_starts_at_or_before_it() {
        let block = BlockIndex(5 * crate::limits::BLOCKS_PER_EXTENT + 7);
        assert_eq!(block.extent(), ExtentIndex(5));
        assert_eq!(block.in_extent(), 7);
        assert_eq!(block.extent().first_block().0 + 7, block.0);
    }
}
