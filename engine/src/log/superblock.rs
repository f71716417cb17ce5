//! Whose disk it is, how it is divided, and what it once lost. Stands in block 0 and, the same, in block 1.
//!
//! | offset | bytes | what                                                                             |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 0      | 8     | `TORUSSUP`                                                                       |
//! | 8      | 4     | format version                                                                   |
//! | 12     | 4     | shard index                                                                      |
//! | 16     | 16    | cluster id                                                                       |
//! | 32     | 16    | node id                                                                          |
//! | 48     | 8     | size of the disk in bytes                                                        |
//! | 56     | 8     | size of a segment in bytes                                                       |
//! | 64     | 8     | revision: the copy with the higher one counts                                    |
//! | 72     | 8     | lost below: instances created in batches below this number may lack records      |
//! | 80     | 4     | CRC32C of the bytes before; in this place in every version                       |
//! | 84     | rest  | zero                                                                             |
//!
//! All of it lies in the first sector, so that a copy is never torn. The copies are written one after the other with a
//! sync between them, so that one is always good.

use super::bytes::{Reader, check_seal, put_u32, put_u64, seal};
use super::{BLOCK, BatchNumber, FormatError};
use torus_schema::ids::{ClusterId, NodeId, ShardIndex};
use torus_schema::limits::{BLOCK_BYTES, SHARD_BYTES_MAX};

/// Opening, header, footer, and blocks to speak of.
pub const SEGMENT_BLOCKS_MIN: u64 = 16;
const SEGMENT_BYTES_MIN: u64 = SEGMENT_BLOCKS_MIN * BLOCK_BYTES;
pub const SUPERBLOCK_BLOCKS: u64 = 2;
const MAGIC: &[u8; 8] = b"TORUSSUP";
const WHAT: &str = "superblock";
const BYTES: usize = 84;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub shard: ShardIndex,
    pub size_bytes: u64,
    pub segment_bytes: u64,
    pub revision: u64,
    /// 0: nothing was ever lost.
    pub lost_below: BatchNumber,
}

impl Superblock {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BLOCK);
        out.extend_from_slice(MAGIC);
        put_u32(&mut out, super::FORMAT_VERSION);
        put_u32(&mut out, u32::from(self.shard.0));
        out.extend_from_slice(&self.cluster.to_bytes());
        out.extend_from_slice(&self.node.to_bytes());
        put_u64(&mut out, self.size_bytes);
        put_u64(&mut out, self.segment_bytes);
        put_u64(&mut out, self.revision);
        put_u64(&mut out, self.lost_below.0);
        seal(&mut out);
        assert_eq!(out.len(), BYTES);
        out.resize(BLOCK, 0);
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(WHAT, bytes);
        // All versions have the checksum in this place, so that one flipped bit is not taken for another program's work.
        reader.magic(MAGIC)?;
        check_seal(WHAT, bytes, BYTES)?;
        reader.version()?;
        let shard = reader.u32()?;
        reader.expect("shard index", u64::from(shard), u64::from(shard & 0xffff))?;
        let cluster = ClusterId::from_bytes(reader.array()?);
        let node = NodeId::from_bytes(reader.array()?);
        let (size_bytes, segment_bytes) = (reader.u64()?, reader.u64()?);
        let revision = reader.counter("revision")?;
        let lost_below = BatchNumber(reader.counter("lost below")?);
        reader.expect("size beyond the largest", size_bytes.max(SHARD_BYTES_MAX), SHARD_BYTES_MAX)?;
        let segment_fits =
            (SEGMENT_BYTES_MIN..=size_bytes).contains(&segment_bytes) && segment_bytes.is_multiple_of(BLOCK_BYTES);
        let expected = if segment_fits { segment_bytes } else { SEGMENT_BYTES_MIN };
        reader.expect("size of a segment", segment_bytes, expected)?;
        Ok(Self { cluster, node, shard: ShardIndex(shard as u16), size_bytes, segment_bytes, revision, lost_below })
    }
}

/// The newer of the two copies that can be read, or why the first cannot. If one is of another format version, a
/// program that knows that version was at work here: it is not ours to say that the other copy counts.
pub fn decode_either(bytes: &[u8]) -> Result<Superblock, FormatError> {
    let first = Superblock::decode(bytes);
    let second = Superblock::decode(bytes.get(BLOCK..).unwrap_or_default());
    match (first, second) {
        (Err(other @ FormatError::Version { .. }), _) | (_, Err(other @ FormatError::Version { .. })) => Err(other),
        (Ok(first), Ok(second)) => Ok(if second.revision > first.revision { second } else { first }),
        (Ok(good), Err(_)) | (Err(_), Ok(good)) => Ok(good),
        (Err(because), Err(_)) => Err(because),
    }
}

#[cfg(test)]
pub fn example(size_bytes: u64) -> Superblock {
    Superblock {
        cluster: ClusterId::from_bytes([1; 16]),
        node: NodeId::from_bytes([2; 16]),
        shard: ShardIndex(3),
        size_bytes,
        segment_bytes: 65536,
        revision: 4,
        lost_below: BatchNumber(5),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_of_a_superblock_never_change() {
        let bytes = example(1 << 20).encode();
        let golden = [
            &b"TORUSSUP\x03\0\0\0\x03\0\0\0"[..],
            &[1; 16],
            &[2; 16],
            b"\0\0\x10\0\0\0\0\0\0\0\x01\0\0\0\0\0\x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0",
        ]
        .concat();
        assert_eq!(&bytes[..80], &golden);
        assert_eq!(bytes[80..84], crc32c::crc32c(&golden).to_le_bytes());
        assert!(bytes[84..].iter().all(|byte| *byte == 0) && bytes.len() == BLOCK);
        assert_eq!(Superblock::decode(&bytes), Ok(example(1 << 20)));
    }

    #[test]
    fn one_damaged_copy_is_made_up_for_by_the_other() {
        let good = example(1 << 20).encode();
        let mut bad = good.clone();
        bad[50] ^= 1;
        assert_eq!(decode_either(&[good.clone(), bad.clone()].concat()), Ok(example(1 << 20)));
        assert_eq!(decode_either(&[bad.clone(), good].concat()), Ok(example(1 << 20)));
        assert!(matches!(decode_either(&[bad.clone(), bad].concat()), Err(FormatError::Checksum { .. })));
    }

    #[test]
    fn a_copy_of_another_format_version_is_not_passed_over() {
        let good = example(1 << 20).encode();
        let mut newer = good.clone();
        newer[8] += 1;
        let rotten = newer.clone();
        let checksum = crc32c::crc32c(&newer[..BYTES - 4]);
        newer[BYTES - 4..BYTES].copy_from_slice(&checksum.to_le_bytes());
        for bytes in [[good.clone(), newer.clone()], [newer, good.clone()]] {
            assert!(matches!(decode_either(&bytes.concat()), Err(FormatError::Version { .. })));
        }
        for bytes in [[good.clone(), rotten.clone()], [rotten, good]] {
            assert_eq!(decode_either(&bytes.concat()), Ok(example(1 << 20)), "a flipped bit is no other version");
        }
    }

    #[test]
    fn a_disk_that_holds_something_else_is_not_a_superblock() {
        assert!(matches!(decode_either(&[0; 2 * BLOCK]), Err(FormatError::Magic { .. })));
        assert!(matches!(decode_either(b"short"), Err(FormatError::Short { .. })));
    }
}
