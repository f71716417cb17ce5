//! The two ends of a segment: its opening, which names this use of it, and its footer, which lists all its records.
//!
//! Opening, the segment's first block. It is written and synced before any batch of the segment is submitted: so an old
//! opening and a footer that fits it are never seen above newer batches. All of it lies in one sector: it is old or
//! new, never torn.
//!
//! | offset | bytes | what                                                                             |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 0      | 8     | `TORUSSEG`                                                                       |
//! | 8      | 4     | format version                                                                   |
//! | 12     | 4     | segment index                                                                    |
//! | 16     | 8     | nonce                                                                            |
//! | 24     | 8     | sequence                                                                         |
//! | 32     | 8     | number of the first batch in it                                                  |
//! | 40     | 8     | durable: every batch up to this number was synced when this was written          |
//! | 48     | 4     | CRC32C of the bytes before                                                       |
//!
//! Footer: records (`record`), from the start of a block; the last bytes of the segment are its trailer. It is written
//! after a sync over all batches of the segment, so that what it lists was whole once.
//!
//! | offset | bytes | what (trailer)                                                                   |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 0      | 8     | `TORUSFTR`                                                                       |
//! | 8      | 4     | format version                                                                   |
//! | 12     | 4     | segment index                                                                    |
//! | 16     | 16    | nonce, sequence                                                                  |
//! | 32     | 16    | numbers of the first batch and of the one behind the last                        |
//! | 48     | 8     | durable: every batch up to this number was synced when this was written          |
//! | 56     | 4     | count of records                                                                 |
//! | 60     | 4     | bytes of records                                                                 |
//! | 64     | 4     | CRC32C of the records                                                            |
//! | 68     | 4     | CRC32C of the bytes before: the footer's length is believed only then            |

use super::bytes::{Reader, check_seal, put_u32, put_u64, seal};
use super::record::{Record, decode_all};
use super::{BLOCK, BatchNumber, FormatError, SegmentIdentity, SegmentIndex};

const OPENING_MAGIC: &[u8; 8] = b"TORUSSEG";
const FOOTER_MAGIC: &[u8; 8] = b"TORUSFTR";
const OPENING_BYTES: usize = 52;
pub const TRAILER_BYTES: usize = 72;
const OPENING: &str = "segment opening";
const FOOTER: &str = "segment footer";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    pub identity: SegmentIdentity,
    pub first_batch: BatchNumber,
    pub durable: BatchNumber,
}

impl Opening {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BLOCK);
        out.extend_from_slice(OPENING_MAGIC);
        put_u32(&mut out, super::FORMAT_VERSION);
        put_identity(&mut out, self.identity);
        put_u64(&mut out, self.first_batch.0);
        put_u64(&mut out, self.durable.0);
        seal(&mut out);
        assert_eq!(out.len(), OPENING_BYTES);
        out.resize(BLOCK, 0);
        out
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(OPENING, bytes);
        reader.magic_and_version(OPENING_MAGIC)?;
        check_seal(OPENING, bytes, OPENING_BYTES)?;
        let identity = identity(&mut reader)?;
        Ok(Self { identity, first_batch: BatchNumber(reader.u64()?), durable: BatchNumber(reader.u64()?) })
    }
}

fn put_identity(out: &mut Vec<u8>, identity: SegmentIdentity) {
    put_u32(out, identity.segment.0);
    put_u64(out, identity.nonce);
    put_u64(out, identity.sequence);
}

fn identity(reader: &mut Reader) -> Result<SegmentIdentity, FormatError> {
    Ok(SegmentIdentity { segment: SegmentIndex(reader.u32()?), nonce: reader.u64()?, sequence: reader.u64()? })
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    pub identity: SegmentIdentity,
    pub first_batch: BatchNumber,
    pub end_batch: BatchNumber,
    pub durable: BatchNumber,
    pub records: Vec<Record>,
}

pub fn footer_blocks(record_bytes: usize) -> usize {
    (record_bytes + TRAILER_BYTES).div_ceil(BLOCK)
}

impl Footer {
    /// Whole blocks, to be written so that they end where the segment ends.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        self.records.iter().for_each(|record| record.encode(&mut out));
        let bytes = out.len();
        let checksum = crc32c::crc32c(&out);
        let mut trailer = Vec::with_capacity(TRAILER_BYTES);
        trailer.extend_from_slice(FOOTER_MAGIC);
        put_u32(&mut trailer, super::FORMAT_VERSION);
        put_identity(&mut trailer, self.identity);
        put_u64(&mut trailer, self.first_batch.0);
        put_u64(&mut trailer, self.end_batch.0);
        put_u64(&mut trailer, self.durable.0);
        put_u32(&mut trailer, self.records.len() as u32);
        put_u32(&mut trailer, bytes as u32);
        put_u32(&mut trailer, checksum);
        seal(&mut trailer);
        assert_eq!(trailer.len(), TRAILER_BYTES);
        out.resize(footer_blocks(bytes) * BLOCK - TRAILER_BYTES, 0);
        out.extend_from_slice(&trailer);
        out
    }
}

/// A trailer whose own checksum holds; the records are not looked at yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UncheckedFooter {
    pub identity: SegmentIdentity,
    pub first_batch: BatchNumber,
    pub end_batch: BatchNumber,
    pub durable: BatchNumber,
    record_count: u32,
    record_bytes: u32,
    record_checksum: u32,
}

impl UncheckedFooter {
    /// `last_block` of the segment.
    pub fn decode(last_block: &[u8]) -> Result<Self, FormatError> {
        let start = last_block.len().saturating_sub(TRAILER_BYTES);
        let trailer = &last_block[start..];
        let mut reader = Reader::new(FOOTER, trailer);
        reader.magic_and_version(FOOTER_MAGIC)?;
        check_seal(FOOTER, trailer, TRAILER_BYTES)?;
        let identity = identity(&mut reader)?;
        let (first_batch, end_batch) = (BatchNumber(reader.u64()?), BatchNumber(reader.u64()?));
        let durable = BatchNumber(reader.u64()?);
        let (record_count, record_bytes, record_checksum) = (reader.u32()?, reader.u32()?, reader.u32()?);
        Ok(Self { identity, first_batch, end_batch, durable, record_count, record_bytes, record_checksum })
    }

    /// Of the whole footer.
    pub fn blocks(&self) -> u64 {
        footer_blocks(self.record_bytes as usize) as u64
    }

    /// `bytes` are the footer's blocks.
    pub fn finalize(self, bytes: &[u8]) -> Result<Footer, FormatError> {
        let length = self.record_bytes as usize;
        let short = FormatError::Short { what: FOOTER, found: bytes.len(), expected: length };
        let body = bytes.get(..length).ok_or(short)?;
        let expected = crc32c::crc32c(body);
        if self.record_checksum != expected {
            return Err(FormatError::Checksum { what: FOOTER, found: self.record_checksum, expected });
        }
        let records = decode_all(body, self.record_count)?;
        let Self { identity, first_batch, end_batch, durable, .. } = self;
        Ok(Footer { identity, first_batch, end_batch, durable, records })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::record::tests::examples;

    const IDENTITY: SegmentIdentity = SegmentIdentity { segment: SegmentIndex(2), nonce: 0xabcdef, sequence: 9 };
    const IDENTITY_BYTES: &[u8] = b"\x02\0\0\0\xef\xcd\xab\0\0\0\0\0\x09\0\0\0\0\0\0\0";

    #[test]
    fn the_bytes_of_an_opening_never_change() {
        let opening = Opening { identity: IDENTITY, first_batch: BatchNumber(4), durable: BatchNumber(3) };
        let golden = [b"TORUSSEG\x01\0\0\0", IDENTITY_BYTES, b"\x04\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0"].concat();
        assert_eq!(opening.encode()[..48], golden);
        assert_eq!(opening.encode()[48..52], crc32c::crc32c(&golden).to_le_bytes());
        assert_eq!(Opening::decode(&opening.encode()), Ok(opening));
    }

    #[test]
    fn the_bytes_of_a_footer_never_change() {
        let (first_batch, end_batch, durable) = (BatchNumber(4), BatchNumber(6), BatchNumber(5));
        let footer = Footer { identity: IDENTITY, first_batch, end_batch, durable, records: examples() };
        let bytes = footer.encode();
        let mut records = Vec::new();
        examples().iter().for_each(|record| record.encode(&mut records));
        let mut golden = [
            b"TORUSFTR\x01\0\0\0",
            IDENTITY_BYTES,
            b"\x04\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x08\0\0\0\x20\x02\0\0",
            &crc32c::crc32c(&records).to_le_bytes(),
        ]
        .concat();
        golden.extend_from_slice(&crc32c::crc32c(&golden).to_le_bytes());
        assert_eq!(bytes[BLOCK - TRAILER_BYTES..], golden);
        assert_eq!(bytes[..records.len()], records);
        assert_eq!(UncheckedFooter::decode(&bytes).unwrap().finalize(&bytes), Ok(footer));
    }

    #[test]
    fn a_footer_of_several_blocks_keeps_its_trailer_at_the_very_end() {
        let records: Vec<Record> = (0..40).flat_map(|_| examples()).collect();
        let (first_batch, end_batch, durable) = (BatchNumber(4), BatchNumber(6), BatchNumber(5));
        let footer = Footer { identity: IDENTITY, first_batch, end_batch, durable, records };
        let mut bytes = footer.encode();
        let trailer = UncheckedFooter::decode(&bytes[bytes.len() - BLOCK..]).unwrap();
        assert_eq!(trailer.blocks() as usize * BLOCK, bytes.len());
        assert_eq!(trailer.clone().finalize(&bytes), Ok(footer));
        bytes[0] ^= 1;
        assert!(trailer.finalize(&bytes).is_err());
    }
}
