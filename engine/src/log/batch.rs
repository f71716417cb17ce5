//! Header of one write to the log: what is in it, and which use of which segment it belongs to.
//!
//! | offset | bytes | what                                                                             |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 0      | 8     | `TORUSBAT`                                                                       |
//! | 8      | 4     | format version                                                                   |
//! | 12     | 4     | segment index                                                                    |
//! | 16     | 8     | nonce of this opening of the segment                                             |
//! | 24     | 8     | sequence of this opening                                                         |
//! | 32     | 8     | batch number                                                                     |
//! | 40     | 8     | durable: every batch up to this number was synced when this one was written      |
//! | 48     | 4     | position of this header on the disk, in blocks                                   |
//! | 52     | 4     | count of records                                                                 |
//! | 56     | 4     | bytes of records                                                                 |
//! | 60     | 4     | payload blocks                                                                   |
//! | 64     | 4     | CRC32C of the records                                                            |
//! | 68     | 8     | number of the first batch in this segment                                        |
//! | 76     | 4     | CRC32C of bytes 0 to 75: before a length is believed                             |
//! | 80     | …     | records (`record`), zeros up to the next block, then the payload                 |
//!
//! The payload is covered by the checksums in the records.

use super::bytes::{Reader, check_seal, put_u32, put_u64};
use super::record::{Record, decode_all};
use super::{BLOCK, BatchNumber, FormatError, Position, SegmentIdentity, SegmentIndex};

pub const FIXED_BYTES: usize = 80;
const RECORDS_CHECKSUM_AT: usize = 64;
const MAGIC: &[u8; 8] = b"TORUSBAT";
const WHAT: &str = "batch header";

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchHeader {
    pub identity: SegmentIdentity,
    pub number: BatchNumber,
    pub durable: BatchNumber,
    /// Of the segment: an opening that is made ahead does not know it yet.
    pub first_batch: BatchNumber,
    pub position: Position,
    pub records: Vec<Record>,
}

/// What a header says beside its records.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heading {
    pub identity: SegmentIdentity,
    pub number: BatchNumber,
    pub durable: BatchNumber,
    pub first_batch: BatchNumber,
    pub position: Position,
}

pub fn header_blocks(record_bytes: usize) -> u32 {
    (FIXED_BYTES + record_bytes).div_ceil(BLOCK) as u32
}

impl BatchHeader {
    /// Whole blocks.
    pub fn encode(&self) -> Vec<u8> {
        let Self { identity, number, durable, first_batch, position, ref records } = *self;
        let mut out = Vec::new();
        Heading { identity, number, durable, first_batch, position }.encode(records.iter(), &mut out);
        out
    }
}

impl Heading {
    /// The whole header, in whole blocks, instead of what is in `out`.
    pub fn encode<'a>(&self, records: impl Iterator<Item = &'a Record> + Clone, out: &mut Vec<u8>) {
        let record_bytes = records.clone().map(Record::bytes).sum::<usize>();
        out.clear();
        out.reserve(header_blocks(record_bytes) as usize * BLOCK);
        out.extend_from_slice(MAGIC);
        put_u32(out, super::FORMAT_VERSION);
        put_u32(out, self.identity.segment.0);
        put_u64(out, self.identity.nonce);
        put_u64(out, self.identity.sequence);
        put_u64(out, self.number.0);
        put_u64(out, self.durable.0);
        put_u32(out, self.position.0);
        put_u32(out, records.clone().count() as u32);
        put_u32(out, record_bytes as u32);
        put_u32(out, records.clone().map(Record::payload_blocks).sum());
        // The two checksums, known when the records stand behind them.
        put_u32(out, 0);
        put_u64(out, self.first_batch.0);
        put_u32(out, 0);
        assert_eq!(out.len(), FIXED_BYTES);
        records.for_each(|record| record.encode(out));
        let of_records = crc32c::crc32c(&out[FIXED_BYTES..]);
        out[RECORDS_CHECKSUM_AT..][..4].copy_from_slice(&of_records.to_le_bytes());
        let of_fixed = crc32c::crc32c(&out[..FIXED_BYTES - 4]);
        out[FIXED_BYTES - 4..FIXED_BYTES].copy_from_slice(&of_fixed.to_le_bytes());
        out.resize(header_blocks(record_bytes) as usize * BLOCK, 0);
    }
}

/// The fixed part; its checksum holds, the records are not looked at yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UncheckedHeader {
    pub identity: SegmentIdentity,
    pub number: BatchNumber,
    pub durable: BatchNumber,
    pub first_batch: BatchNumber,
    pub position: Position,
    pub payload_blocks: u32,
    record_count: u32,
    record_bytes: u32,
    record_checksum: u32,
}

impl UncheckedHeader {
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(WHAT, bytes);
        reader.magic_and_version(MAGIC)?;
        check_seal(WHAT, bytes, FIXED_BYTES)?;
        let segment = SegmentIndex(reader.u32()?);
        let identity = SegmentIdentity { segment, nonce: reader.u64()?, sequence: reader.counter("sequence")? };
        let number = BatchNumber(reader.counter("number")?);
        let durable = BatchNumber(reader.counter("durable")?);
        let position = Position(reader.u32()?);
        let (record_count, record_bytes) = (reader.u32()?, reader.u32()?);
        let (payload_blocks, record_checksum) = (reader.u32()?, reader.u32()?);
        let first_batch = BatchNumber(reader.counter("first batch")?);
        Ok(Self {
            identity,
            number,
            durable,
            first_batch,
            position,
            payload_blocks,
            record_count,
            record_bytes,
            record_checksum,
        })
    }

    pub fn header_blocks(&self) -> u32 {
        header_blocks(self.record_bytes as usize)
    }

    /// `bytes` starts with the header and holds at least its blocks.
    pub fn finalize(self, bytes: &[u8]) -> Result<BatchHeader, FormatError> {
        let length = self.record_bytes as usize;
        let body = bytes.get(FIXED_BYTES..).and_then(|body| body.get(..length));
        let short = FormatError::Short { what: WHAT, found: bytes.len(), expected: FIXED_BYTES.saturating_add(length) };
        let body = body.ok_or(short)?;
        let expected = crc32c::crc32c(body);
        if self.record_checksum != expected {
            return Err(FormatError::Checksum { what: WHAT, found: self.record_checksum, expected });
        }
        let records = decode_all(body, self.record_count)?;
        let blocks: u64 = records.iter().map(|record| u64::from(record.payload_blocks())).sum();
        Reader::new(WHAT, &[]).expect("payload blocks", u64::from(self.payload_blocks), blocks)?;
        let Self { identity, number, durable, first_batch, position, .. } = self;
        Ok(BatchHeader { identity, number, durable, first_batch, position, records })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::record::tests::examples;

    fn example() -> BatchHeader {
        let identity = SegmentIdentity { segment: SegmentIndex(2), nonce: 0x0102030405060708, sequence: 9 };
        let (number, durable, first_batch) = (BatchNumber(11), BatchNumber(10), BatchNumber(8));
        BatchHeader { identity, number, durable, first_batch, position: Position(33), records: examples() }
    }

    #[test]
    fn the_bytes_of_a_batch_header_never_change() {
        let bytes = example().encode();
        let mut records = Vec::new();
        examples().iter().for_each(|record| record.encode(&mut records));
        let mut golden = [
            &b"TORUSBAT\x03\0\0\0\x02\0\0\0\x08\x07\x06\x05\x04\x03\x02\x01\x09\0\0\0\0\0\0\0"[..],
            b"\x0b\0\0\0\0\0\0\0\x0a\0\0\0\0\0\0\0\x21\0\0\0\x08\0\0\0\x30\x02\0\0\x02\0\0\0",
            &crc32c::crc32c(&records).to_le_bytes(),
            b"\x08\0\0\0\0\0\0\0",
        ]
        .concat();
        golden.extend_from_slice(&crc32c::crc32c(&golden).to_le_bytes());
        assert_eq!(bytes[..FIXED_BYTES], golden);
        assert_eq!(bytes[FIXED_BYTES..][..records.len()], records);
        assert_eq!(UncheckedHeader::decode(&bytes).unwrap().finalize(&bytes), Ok(example()));
    }

    #[test]
    fn a_header_with_any_bit_of_its_used_bytes_inverted_is_refused() {
        let bytes = example().encode();
        for at in 0..FIXED_BYTES + 560 {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            assert!(UncheckedHeader::decode(&bad).and_then(|header| header.finalize(&bad)).is_err(), "byte {at}");
        }
    }
}
