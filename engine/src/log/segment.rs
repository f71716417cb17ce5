//! The opening of a segment, its first block, which names this use of it.
//!
//! It is written and synced before any batch of the segment is submitted: so an old opening and a footer that fits it
//! are never seen above newer batches. It may be written while batches go to another segment yet, so that these never
//! wait for it: then the number of its first batch is not known, only that it is not below the next one.
//!
//! Such a segment may take the place of one from which that number would follow. So the opening says too where those
//! began whose footers may not be there after a crash, and where those behind them.
//!
//! All of it lies in one sector: it is old or new, never torn.
//!
//! | offset | bytes | what                                                                             |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 0      | 8     | `TORUSSEG`                                                                       |
//! | 8      | 4     | format version                                                                   |
//! | 12     | 4     | segment index                                                                    |
//! | 16     | 8     | nonce                                                                            |
//! | 24     | 8     | sequence                                                                         |
//! | 32     | 8     | number of the first batch in it, at least                                        |
//! | 40     | 8     | durable: every batch up to this number was synced when this was written          |
//! | 48     | 8     | second, since 1970, in which this was written                                    |
//! | 56     | 4     | count of segments from the first without a durable footer on                     |
//! | 60     | 4     | bit 2^i: that number i of them has one                                           |
//! | 64     | 256   | of each of them: sequence (8), number of its first batch (8); zeros behind       |
//! | 320    | 4     | CRC32C of the bytes before                                                       |

use super::bytes::{Reader, check_seal, put_u32, put_u64, seal};
use super::{BLOCK, BatchNumber, FormatError, SegmentIdentity, SegmentIndex};

const MAGIC: &[u8; 8] = b"TORUSSEG";
const WHAT: &str = "segment opening";
const BYTES: usize = 324;
/// From the first segment without a durable footer on; no other is opened while there are so many.
pub const RECENT_MAX: usize = 16;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opening {
    pub identity: SegmentIdentity,
    /// The first batch is not below it.
    pub first_batch: BatchNumber,
    pub durable: BatchNumber,
    /// Since 1970.
    pub opened_s: u64,
    /// From the first without a durable footer on.
    pub recent: Vec<Recent>,
}

/// A segment that was in use when another was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recent {
    pub sequence: u64,
    pub first_batch: BatchNumber,
    /// It has a durable footer, and its place may be taken.
    pub sealed: bool,
}

impl Opening {
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.recent.len() <= RECENT_MAX, "no segment is opened while there are so many");
        let mut out = Vec::with_capacity(BLOCK);
        out.extend_from_slice(MAGIC);
        put_u32(&mut out, super::FORMAT_VERSION);
        put_identity(&mut out, self.identity);
        put_u64(&mut out, self.first_batch.0);
        put_u64(&mut out, self.durable.0);
        put_u64(&mut out, self.opened_s);
        put_u32(&mut out, self.recent.len() as u32);
        put_u32(&mut out, (0..).zip(&self.recent).map(|(place, recent)| u32::from(recent.sealed) << place).sum());
        for recent in &self.recent {
            put_u64(&mut out, recent.sequence);
            put_u64(&mut out, recent.first_batch.0);
        }
        out.resize(BYTES - 4, 0);
        seal(&mut out);
        out.resize(BLOCK, 0);
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(WHAT, bytes);
        reader.magic_and_version(MAGIC)?;
        check_seal(WHAT, bytes, BYTES)?;
        let identity = identity(&mut reader)?;
        let first_batch = BatchNumber(reader.counter("first batch")?);
        let durable = BatchNumber(reader.counter("durable")?);
        let (opened_s, count) = (reader.counter("second")?, reader.u32()?);
        reader.expect("count of segments beyond the most", u64::from(count as usize > RECENT_MAX), 0)?;
        let sealed = reader.u32()?;
        let mut recent = Vec::with_capacity(count as usize);
        for place in 0..count {
            let sequence = reader.counter("sequence")?;
            let first_batch = BatchNumber(reader.counter("first batch")?);
            recent.push(Recent { sequence, first_batch, sealed: sealed >> place & 1 == 1 });
        }
        Ok(Self { identity, first_batch, durable, opened_s, recent })
    }
}

pub(super) fn put_identity(out: &mut Vec<u8>, identity: SegmentIdentity) {
    put_u32(out, identity.segment.0);
    put_u64(out, identity.nonce);
    put_u64(out, identity.sequence);
}

pub(super) fn identity(reader: &mut Reader) -> Result<SegmentIdentity, FormatError> {
    let (segment, nonce) = (SegmentIndex(reader.u32()?), reader.u64()?);
    Ok(SegmentIdentity { segment, nonce, sequence: reader.counter("sequence")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Opening {
        let identity = SegmentIdentity { segment: SegmentIndex(2), nonce: 0xabcdef, sequence: 9 };
        let recent = vec![
            Recent { sequence: 7, first_batch: BatchNumber(1), sealed: false },
            Recent { sequence: 8, first_batch: BatchNumber(2), sealed: true },
        ];
        Opening { identity, first_batch: BatchNumber(4), durable: BatchNumber(3), opened_s: 5, recent }
    }

    #[test]
    fn the_bytes_of_an_opening_never_change() {
        let mut golden = [
            &b"TORUSSEG\x03\0\0\0\x02\0\0\0\xef\xcd\xab\0\0\0\0\0\x09\0\0\0\0\0\0\0"[..],
            b"\x04\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x02\0\0\0\x02\0\0\0",
            b"\x07\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0",
        ]
        .concat();
        golden.resize(320, 0);
        assert_eq!(example().encode()[..320], golden);
        assert_eq!(example().encode()[320..324], crc32c::crc32c(&golden).to_le_bytes());
        assert_eq!(Opening::decode(&example().encode()), Ok(example()));
    }

    #[test]
    fn an_opening_lies_in_one_sector_and_with_any_bit_of_it_inverted_is_refused() {
        let bytes = example().encode();
        assert!(BYTES <= 512 && bytes.len() == BLOCK);
        for at in 0..BYTES {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(Opening::decode(&bad).is_err(), "byte {at}");
        }
    }
}
