//! The footer of a segment: all its records once more, so that a start reads footers and no data. It is written after a
//! sync over all batches of the segment: what it lists was whole once.
//!
//! It starts with a block and ends where the segment ends. First of all a start needs what stands in its tail (the
//! flush points, and the notes, without which no other record can be understood), of all segments; only then the data.
//!
//! | part    | bytes      | what                                                                              |
//! |---------|------------|-----------------------------------------------------------------------------------|
//! | copy    | 100        | the trailer once more: found by a search when the segment's last block is damaged |
//! |         | …          | zeros                                                                             |
//! | data    | 32 + 4 × n | each record of data: an entry, below                                              |
//! | volumes | 28         | each volume that has data here: id (16), and the highest F of those records (12)  |
//! | notes   | …          | the other records, as in a batch header                                           |
//! | trailer | 100        | below                                                                             |
//!
//! | offset | bytes | entry                                                                            |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 0      | 4     | position of the first payload block on the disk                                  |
//! | 4      | 4     | count of blocks                                                                  |
//! | 8      | 4     | place of its volume in the table, from 0                                         |
//! | 12     | 4     | epoch of the version                                                             |
//! | 16     | 8     | first block of the volume                                                        |
//! | 24     | 8     | sequence of the version                                                          |
//! | 32     | 4 × n | CRC32C of each block                                                             |
//!
//! | offset | bytes | trailer                                                                          |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 0      | 8     | `TORUSFTR`                                                                       |
//! | 8      | 4     | format version                                                                   |
//! | 12     | 4     | segment index                                                                    |
//! | 16     | 16    | nonce, sequence                                                                  |
//! | 32     | 16    | numbers of the first batch and of the one behind the last                        |
//! | 48     | 8     | durable: every batch up to this number was synced when this was written          |
//! | 56     | 8     | second, since 1970, in which this was written                                    |
//! | 64     | 8     | data: count of records, bytes                                                    |
//! | 72     | 4     | count of volumes                                                                 |
//! | 76     | 8     | notes: count of records, bytes                                                   |
//! | 84     | 4     | CRC32C of the data                                                               |
//! | 88     | 4     | CRC32C of volumes and notes                                                      |
//! | 92     | 4     | count of batches in the segment: after a crash some numbers may have been lost   |
//! | 96     | 4     | CRC32C of the bytes before: the footer's lengths are believed only then          |

use super::bytes::{Reader, check_seal, put_u32, put_u64, seal};
use super::record::{Data, Record, decode_all, put_version, version};
use super::segment::{identity, put_identity};
use super::{BLOCK, BatchNumber, FormatError, Geometry, Position, SegmentIdentity};
use torus_schema::hash::Map;
use torus_schema::ids::{BlockIndex, Epoch, Version, VolumeId};
use torus_schema::limits::{SEQUENCE_MAX, VOLUME_BYTES_MAX};

const MAGIC: &[u8; 8] = b"TORUSFTR";
const WHAT: &str = "segment footer";
pub const TRAILER_BYTES: usize = 100;
/// Of an entry, without its checksums.
const ENTRY_BYTES: usize = 32;
const VOLUME_BYTES: usize = 28;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footer {
    pub identity: SegmentIdentity,
    pub first_batch: BatchNumber,
    pub end_batch: BatchNumber,
    pub durable: BatchNumber,
    /// Of the numbers from the first to the end, those that are there.
    pub batches: u32,
    /// Since 1970.
    pub sealed_s: u64,
    /// Read from the disk: data before notes, and each record of data with the highest F of its volume in the segment.
    pub records: Vec<Record>,
}

/// Blocks of a footer with so many bytes of data, volumes and notes.
pub fn footer_blocks(bytes: usize) -> usize {
    (bytes + 2 * TRAILER_BYTES).div_ceil(BLOCK)
}

/// What a record takes in a footer at most, however few of its volume there are: never more than in a batch header.
pub fn bytes_in_footer(record: &Record, is_first_of_its_volume: bool) -> usize {
    match record {
        Record::Data(data) => {
            let volume = if is_first_of_its_volume { VOLUME_BYTES } else { 0 };
            ENTRY_BYTES + 4 * data.checksums.len() + volume
        }
        note => note.bytes(),
    }
}

impl Footer {
    /// Whole blocks, to be written so that they end where the segment ends.
    pub fn encode(&self) -> Vec<u8> {
        let (mut data, mut notes) = (Vec::new(), Vec::new());
        let (mut places, mut volumes) = (Map::default(), Vec::new());
        let (mut data_count, mut note_count) = (0, 0);
        for record in &self.records {
            if let Record::Data(record) = record {
                let place = *places.entry(record.volume).or_insert(volumes.len());
                if place == volumes.len() {
                    volumes.push((record.volume, record.flush_point));
                }
                volumes[place].1 = volumes[place].1.max(record.flush_point);
                put_entry(&mut data, record, place as u32);
                data_count += 1;
            } else {
                record.encode(&mut notes);
                note_count += 1;
            }
        }
        let mut tail = Vec::with_capacity(volumes.len() * VOLUME_BYTES + notes.len());
        for (volume, flush_point) in &volumes {
            tail.extend_from_slice(&volume.to_bytes());
            put_version(&mut tail, *flush_point);
        }
        tail.extend_from_slice(&notes);
        let trailer = Trailer {
            identity: self.identity,
            first_batch: self.first_batch,
            end_batch: self.end_batch,
            durable: self.durable,
            sealed_s: self.sealed_s,
            data_count,
            data_bytes: data.len() as u32,
            volume_count: volumes.len() as u32,
            note_count,
            note_bytes: notes.len() as u32,
            data_checksum: crc32c::crc32c(&data),
            tail_checksum: crc32c::crc32c(&tail),
            batches: self.batches,
        };
        let encoded = trailer.encode();
        let mut out = Vec::with_capacity(trailer.blocks() as usize * BLOCK);
        out.extend_from_slice(&encoded);
        out.resize(trailer.blocks() as usize * BLOCK - TRAILER_BYTES - tail.len() - data.len(), 0);
        out.extend_from_slice(&data);
        out.extend_from_slice(&tail);
        out.extend_from_slice(&encoded);
        out
    }
}

fn put_entry(out: &mut Vec<u8>, data: &Data, place: u32) {
    put_u32(out, data.position.0);
    put_u32(out, data.checksums.len() as u32);
    put_u32(out, place);
    put_u32(out, data.version.epoch.0);
    put_u64(out, data.first.0);
    put_u64(out, data.version.sequence);
    data.checksums.iter().for_each(|checksum| put_u32(out, *checksum));
}

/// Its own checksum holds; neither tail nor data are looked at yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trailer {
    pub identity: SegmentIdentity,
    pub first_batch: BatchNumber,
    pub end_batch: BatchNumber,
    pub durable: BatchNumber,
    pub sealed_s: u64,
    data_count: u32,
    data_bytes: u32,
    volume_count: u32,
    note_count: u32,
    note_bytes: u32,
    data_checksum: u32,
    tail_checksum: u32,
    pub batches: u32,
}

/// What stands behind the data.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Tail {
    pub volumes: Vec<FlushPoint>,
    pub notes: Vec<Record>,
}

/// The highest F that a record of data in the segment says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlushPoint {
    pub volume: VolumeId,
    pub flush_point: Version,
}

impl Trailer {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(TRAILER_BYTES);
        out.extend_from_slice(MAGIC);
        put_u32(&mut out, super::FORMAT_VERSION);
        put_identity(&mut out, self.identity);
        put_u64(&mut out, self.first_batch.0);
        put_u64(&mut out, self.end_batch.0);
        put_u64(&mut out, self.durable.0);
        put_u64(&mut out, self.sealed_s);
        put_u32(&mut out, self.data_count);
        put_u32(&mut out, self.data_bytes);
        put_u32(&mut out, self.volume_count);
        put_u32(&mut out, self.note_count);
        put_u32(&mut out, self.note_bytes);
        put_u32(&mut out, self.data_checksum);
        put_u32(&mut out, self.tail_checksum);
        put_u32(&mut out, self.batches);
        seal(&mut out);
        assert_eq!(out.len(), TRAILER_BYTES);
        out
    }

    /// Of the segment's last block, at whose end it stands.
    pub fn decode_last(block: &[u8]) -> Result<Self, FormatError> {
        Self::decode(&block[block.len().saturating_sub(TRAILER_BYTES)..])
    }

    /// Its copy at the start of the footer.
    pub fn decode_first(block: &[u8]) -> Result<Self, FormatError> {
        Self::decode(block)
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut reader = Reader::new(WHAT, bytes);
        reader.magic_and_version(MAGIC)?;
        check_seal(WHAT, bytes, TRAILER_BYTES)?;
        let identity = identity(&mut reader)?;
        let first_batch = BatchNumber(reader.counter("first batch")?);
        let end_batch = BatchNumber(reader.counter("end batch")?);
        let (durable, sealed_s) = (BatchNumber(reader.counter("durable")?), reader.counter("second")?);
        let (data_count, data_bytes) = (reader.u32()?, reader.u32()?);
        let volume_count = reader.u32()?;
        let (note_count, note_bytes) = (reader.u32()?, reader.u32()?);
        let (data_checksum, tail_checksum) = (reader.u32()?, reader.u32()?);
        let batches = reader.u32()?;
        Ok(Self {
            identity,
            first_batch,
            end_batch,
            durable,
            sealed_s,
            data_count,
            data_bytes,
            volume_count,
            note_count,
            note_bytes,
            data_checksum,
            tail_checksum,
            batches,
        })
    }

    fn behind_data(&self) -> u64 {
        u64::from(self.volume_count) * VOLUME_BYTES as u64 + u64::from(self.note_bytes) + TRAILER_BYTES as u64
    }

    /// Of the data.
    pub fn data_bytes(&self) -> usize {
        self.data_bytes as usize
    }

    /// Of the whole footer.
    pub fn blocks(&self) -> u64 {
        let bytes = TRAILER_BYTES as u64 + u64::from(self.data_bytes) + self.behind_data();
        bytes.div_ceil(BLOCK as u64)
    }

    /// At its end, in which volumes, notes and trailer stand.
    pub fn tail_blocks(&self) -> u64 {
        self.behind_data().div_ceil(BLOCK as u64)
    }

    /// At its start, in which all data stands.
    pub fn data_blocks(&self) -> u64 {
        if self.data_bytes == 0 { 0 } else { self.blocks() - (self.behind_data() / BLOCK as u64) }
    }

    /// `bytes` end where the segment ends, and hold at least the tail's blocks.
    pub fn tail(&self, bytes: &[u8]) -> Result<Tail, FormatError> {
        let length = self.behind_data() as usize;
        let start = bytes.len().checked_sub(length).ok_or(FormatError::Short {
            what: WHAT,
            found: bytes.len(),
            expected: length,
        })?;
        let body = &bytes[start..bytes.len() - TRAILER_BYTES];
        check(body, self.tail_checksum)?;
        let mut reader = Reader::new(WHAT, body);
        // As many as there are bytes for: a wrong count was seen by the subtraction above.
        let mut volumes = Vec::with_capacity(self.volume_count as usize);
        for _ in 0..self.volume_count {
            let volume = VolumeId::from_bytes(reader.array()?);
            volumes.push(FlushPoint { volume, flush_point: version(&mut reader)? });
        }
        let notes = decode_all(&body[self.volume_count as usize * VOLUME_BYTES..], self.note_count)?;
        let data = notes.iter().filter(|note| matches!(note, Record::Data(_))).count() as u64;
        reader.expect("data among the notes", data, 0)?;
        Ok(Tail { volumes, notes })
    }

    /// `bytes` are the footer's first `data_blocks`, or all of it. Every entry was looked at: it lies in its segment,
    /// and names a volume of the table.
    pub fn entries<'a>(&self, geometry: Geometry, bytes: &'a [u8]) -> Result<Entries<'a>, FormatError> {
        if self.data_bytes == 0 {
            Reader::new(WHAT, &[]).expect("records in no bytes", u64::from(self.data_count), 0)?;
            return Ok(Entries { bytes: &[] });
        }
        let end = self.blocks() as usize * BLOCK - self.behind_data() as usize;
        let start = end - self.data_bytes as usize;
        let body = bytes.get(start..end).ok_or(FormatError::Short { what: WHAT, found: bytes.len(), expected: end })?;
        check(body, self.data_checksum)?;
        let (reader, mut count) = (Reader::new(WHAT, body), 0u64);
        let mut rest = body;
        while !rest.is_empty() {
            let (entry, behind) = Entry::decode(rest)?;
            let blocks = entry.checksums.len() as u64 / 4;
            let inside = geometry.holds_payload(self.identity.segment, entry.position, blocks);
            if entry.volume >= self.volume_count || !inside || !is_in_a_volume(entry.first, blocks) {
                reader.expect("volume beyond the table", u64::from(entry.volume >= self.volume_count), 0)?;
                reader.expect("data outside of its segment", u64::from(!inside), 0)?;
                reader.expect("block outside of any volume", 1, 0)?;
            }
            (rest, count) = (behind, count + 1);
        }
        reader.expect("count of records", count, u64::from(self.data_count))?;
        Ok(Entries { bytes: body })
    }

    /// All records; `bytes` are the whole footer.
    pub fn finalize(self, geometry: Geometry, bytes: &[u8]) -> Result<Footer, FormatError> {
        let tail = self.tail(bytes)?;
        let mut records: Vec<Record> = self.entries(geometry, bytes)?.map(|entry| entry.record(&tail)).collect();
        records.extend(tail.notes);
        let Self { identity, first_batch, end_batch, durable, sealed_s, batches, .. } = self;
        Ok(Footer { identity, first_batch, end_batch, durable, batches, sealed_s, records })
    }
}

fn check(bytes: &[u8], found: u32) -> Result<(), FormatError> {
    let expected = crc32c::crc32c(bytes);
    if found == expected { Ok(()) } else { Err(FormatError::Checksum { what: WHAT, found, expected }) }
}

/// Sums of block numbers need no further care then.
pub fn is_in_a_volume(first: BlockIndex, blocks: u64) -> bool {
    first.0.saturating_add(blocks) <= VOLUME_BYTES_MAX / BLOCK as u64
}

/// A record of data as it stands in a footer: nothing is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Place in `Tail::volumes`.
    pub volume: u32,
    pub first: BlockIndex,
    pub version: Version,
    pub position: Position,
    checksums: &'a [u8],
}

impl<'a> Entry<'a> {
    /// And what stands behind it.
    #[inline]
    fn decode(bytes: &'a [u8]) -> Result<(Self, &'a [u8]), FormatError> {
        let short = |expected| FormatError::Short { what: WHAT, found: bytes.len(), expected };
        let (fixed, rest) = bytes.split_first_chunk::<ENTRY_BYTES>().ok_or_else(|| short(ENTRY_BYTES))?;
        let u32_at = |at: usize| u32::from_le_bytes(fixed[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(fixed[at..at + 8].try_into().expect("eight bytes"));
        let (position, count, volume) = (Position(u32_at(0)), u32_at(4), u32_at(8));
        let (first, sequence) = (BlockIndex(u64_at(16)), u64_at(24));
        if sequence > SEQUENCE_MAX {
            return Err(FormatError::Field { what: WHAT, field: "sequence", found: sequence, expected: SEQUENCE_MAX });
        }
        let version = Version { epoch: Epoch(u32_at(12)), sequence };
        let length = (count as usize).saturating_mul(4);
        let (checksums, behind) =
            rest.split_at_checked(length).ok_or_else(|| short(ENTRY_BYTES.saturating_add(length)))?;
        Ok((Self { volume, first, version, position, checksums }, behind))
    }

    pub fn checksums(&self) -> impl ExactSizeIterator<Item = u32> + 'a {
        self.checksums.chunks_exact(4).map(|four| u32::from_le_bytes(four.try_into().expect("chunks of four")))
    }

    fn record(&self, tail: &Tail) -> Record {
        let FlushPoint { volume, flush_point } = tail.volumes[self.volume as usize];
        let Self { first, version, position, .. } = *self;
        Record::Data(Data { volume, first, version, flush_point, position, checksums: self.checksums().collect() })
    }
}

/// Made by `Trailer::entries`, which has looked at each.
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    bytes: &'a [u8],
}

impl<'a> Iterator for Entries<'a> {
    type Item = Entry<'a>;

    #[inline]
    fn next(&mut self) -> Option<Entry<'a>> {
        if self.bytes.is_empty() {
            return None;
        }
        let (entry, behind) = Entry::decode(self.bytes).expect("it was looked at");
        self.bytes = behind;
        Some(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::SegmentIndex;
    use crate::log::record::tests::examples;

    const IDENTITY: SegmentIdentity = SegmentIdentity { segment: SegmentIndex(1), nonce: 0xabcdef, sequence: 9 };
    const GEOMETRY: Geometry = Geometry { segments: 4, blocks: 64 };

    fn example(records: Vec<Record>) -> Footer {
        let (first_batch, end_batch, durable) = (BatchNumber(4), BatchNumber(6), BatchNumber(5));
        Footer { identity: IDENTITY, first_batch, end_batch, durable, batches: 2, sealed_s: 7, records }
    }

    /// Of segment 1, whose blocks are 80 to 143.
    fn records() -> Vec<Record> {
        let mut records = examples();
        let Record::Data(data) = &mut records[0] else { panic!("data comes first") };
        data.position = Position(90);
        records
    }

    #[test]
    fn the_bytes_of_a_footer_never_change() {
        let footer = example(records());
        let bytes = footer.encode();
        let data = [
            &b"\x5a\0\0\0\x02\0\0\0\0\0\0\0\x02\0\0\0\x22\x11\0\0\0\0\0\0\x07\0\0\0\0\0\0\0"[..],
            b"\xdd\xcc\xbb\xaa\x05\0\0\0",
        ]
        .concat();
        let mut tail = [&[9u8; 16][..], b"\x01\0\0\0\x06\0\0\0\0\0\0\0"].concat();
        records()[1..].iter().for_each(|record| record.encode(&mut tail));
        let notes = tail.len() as u32 - 28;
        let mut golden = [
            &b"TORUSFTR\x03\0\0\0\x01\0\0\0\xef\xcd\xab\0\0\0\0\0\x09\0\0\0\0\0\0\0"[..],
            b"\x04\0\0\0\0\0\0\0\x06\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x07\0\0\0\0\0\0\0",
            b"\x01\0\0\0\x28\0\0\0\x01\0\0\0",
            &(records().len() as u32 - 1).to_le_bytes(),
            &notes.to_le_bytes(),
            &crc32c::crc32c(&data).to_le_bytes(),
            &crc32c::crc32c(&tail).to_le_bytes(),
            b"\x02\0\0\0",
        ]
        .concat();
        golden.extend_from_slice(&crc32c::crc32c(&golden).to_le_bytes());
        assert_eq!(golden.len(), TRAILER_BYTES);
        let end = [&data[..], &tail, &golden].concat();
        assert_eq!(bytes[..TRAILER_BYTES], golden);
        assert_eq!(bytes[bytes.len() - end.len()..], end);
        assert!(bytes[TRAILER_BYTES..bytes.len() - end.len()].iter().all(|byte| *byte == 0));
        assert_eq!(Trailer::decode_last(&bytes).unwrap().finalize(GEOMETRY, &bytes), Ok(footer));
    }

    #[test]
    fn a_footer_of_many_blocks_is_read_in_parts_that_need_no_others() {
        for repeats in [0, 1, 40, 200] {
            let footer = example((0..repeats).flat_map(|_| records()).collect());
            let bytes = footer.encode();
            let trailer = Trailer::decode_last(&bytes[bytes.len() - BLOCK..]).unwrap();
            assert_eq!(Trailer::decode_first(&bytes[..BLOCK]).as_ref(), Ok(&trailer), "its copy");
            assert_eq!(trailer.blocks() as usize * BLOCK, bytes.len());
            let tail = trailer.tail(&bytes[bytes.len() - trailer.tail_blocks() as usize * BLOCK..]).unwrap();
            assert_eq!(tail.notes.len(), repeats * (records().len() - 1));
            let entries = trailer.entries(GEOMETRY, &bytes[..trailer.data_blocks() as usize * BLOCK]).unwrap();
            let data: Vec<Record> = entries.map(|entry| entry.record(&tail)).collect();
            assert_eq!(data, vec![records()[0].clone(); repeats]);
            let bound = footer.records.iter().map(Record::bytes).sum();
            assert!(bytes.len() <= footer_blocks(bound) * BLOCK, "room is kept by the length in batch headers");
            let mut first = std::collections::BTreeSet::new();
            let kept = |record: &Record| bytes_in_footer(record, first.insert(record.volume()));
            assert_eq!(bytes.len(), footer_blocks(footer.records.iter().map(kept).sum()) * BLOCK);
        }
    }

    #[test]
    fn a_volume_stands_in_the_table_once_with_its_highest_flush_point() {
        let mut records = records();
        let Record::Data(data) = records[0].clone() else { panic!("data comes first") };
        let later = Data { flush_point: Version::new(Epoch(2), 1), version: Version::new(Epoch(2), 2), ..data.clone() };
        let other = Data { volume: VolumeId::from_bytes([3; 16]), ..data.clone() };
        records = vec![Record::Data(later.clone()), Record::Data(data), Record::Data(other)];
        let bytes = example(records).encode();
        let trailer = Trailer::decode_last(&bytes).unwrap();
        let tail = trailer.tail(&bytes).unwrap();
        assert_eq!(tail.volumes.len(), 2);
        assert_eq!(tail.volumes[0], FlushPoint { volume: later.volume, flush_point: later.flush_point });
        let found: Vec<(u32, Version)> =
            trailer.entries(GEOMETRY, &bytes).unwrap().map(|entry| (entry.volume, entry.version)).collect();
        let old = Version::new(Epoch(2), 7);
        assert_eq!(found, vec![(0, later.version), (0, old), (1, old)]);
    }

    #[test]
    fn a_footer_with_any_bit_of_its_parts_inverted_is_refused_in_that_part() {
        let bytes = example(records()).encode();
        let whole = Trailer::decode_last(&bytes).unwrap();
        let tail_from = bytes.len() - whole.behind_data() as usize;
        let data_from = tail_from - whole.data_bytes as usize;
        for at in data_from..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1 << (at % 8);
            let trailer = Trailer::decode_last(&bad);
            assert_eq!(trailer.is_err(), at >= bytes.len() - TRAILER_BYTES, "byte {at}");
            let Ok(trailer) = trailer else { continue };
            assert_eq!(trailer.tail(&bad).is_err(), at >= tail_from, "byte {at}");
            assert_eq!(trailer.entries(GEOMETRY, &bad).is_err(), at < tail_from, "byte {at}");
        }
    }

    #[test]
    fn data_outside_of_its_segment_or_of_any_volume_is_refused() {
        let Record::Data(data) = records()[0].clone() else { panic!("data comes first") };
        for position in [0, 79, 80, 143, 144, u32::MAX] {
            let bytes = example(vec![Record::Data(Data { position: Position(position), ..data.clone() })]).encode();
            let trailer = Trailer::decode_last(&bytes).unwrap();
            assert!(matches!(trailer.entries(GEOMETRY, &bytes), Err(FormatError::Field { .. })), "{position}");
        }
        let bytes = example(vec![Record::Data(Data { first: BlockIndex(u64::MAX - 1), ..data })]).encode();
        assert!(Trailer::decode_last(&bytes).unwrap().entries(GEOMETRY, &bytes).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(bytes: Vec<u8>, volumes in 0u32..4, notes in 0u32..4, count in 0u32..4) {
            let mut whole = example(records()).encode();
            let mut trailer = Trailer::decode_last(&whole).unwrap();
            let _ = Trailer::decode_last(&bytes);
            (trailer.volume_count, trailer.note_count, trailer.data_count) = (volumes, notes, count);
            trailer.note_bytes = bytes.len() as u32;
            trailer.data_bytes = bytes.len() as u32;
            trailer.data_checksum = crc32c::crc32c(&bytes);
            whole.extend_from_slice(&bytes);
            let _ = trailer.tail(&whole);
            let _ = trailer.entries(GEOMETRY, &whole);
        }
    }
}
