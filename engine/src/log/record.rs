//! What a batch header and a footer list: one record after the other, each led by its kind and length.
//!
//! | offset | bytes | all kinds                                                                        |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 0      | 4     | kind: 1 data, 2 clear, 3 instances, 4 open, 5 drop, 6 retain, 7 revoke           |
//! | 4      | 4     | length of the record in bytes, this field and the kind included                  |
//! | 8      | 16    | volume id                                                                        |
//!
//! | offset | bytes | data                                                                             |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 24     | 8     | first block of the volume                                                        |
//! | 32     | 12    | version: epoch (4), sequence (8)                                                 |
//! | 44     | 12    | F of the volume, as its writer last told: epoch (4), sequence (8)                |
//! | 56     | 4     | position of the first payload block on the disk: what lies elsewhere is not it   |
//! | 60     | 4     | count of blocks                                                                  |
//! | 64     | 4 × n | CRC32C of each block, made by the client                                         |
//!
//! | offset | bytes | clear: the blocks of the range that lie in the slice read as zeros               |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 24     | 8     | first block of the volume                                                        |
//! | 32     | 24    | version, F                                                                       |
//! | 56     | 4     | slice                                                                            |
//! | 60     | 8     | count of blocks                                                                  |
//!
//! | offset | bytes | instances: the shard is a replica of these slices                                |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 24     | 16    | placement id                                                                     |
//! | 40     | 8     | ring generation in which they were given                                         |
//! | 48     | 8     | number of the batch at their creation; kept when the record is carried forward   |
//! | 56     | 12    | width, slices of the ring, count                                                 |
//! | 68     | 4 × n | slices                                                                           |
//!
//! | offset | bytes | open: a writer attached                                                          |
//! |--------|-------|----------------------------------------------------------------------------------|
//! | 24     | 12    | F                                                                                |
//! | 36     | 4     | epoch                                                                            |
//! | 40     | 32    | token, by which the same writer is known when it opens again                     |
//!
//! A drop has nothing further: all of the volume is gone, and since ids are never reused, for good.
//!
//! | offset | bytes  | retain: what the writer of that epoch needs kept though something newer stands above it |
//! |--------|--------|----------------------------------------------------------------------------------|
//! | 24     | 12     | F                                                                                |
//! | 36     | 4      | epoch                                                                            |
//! | 40     | 8      | order: of two records of one epoch the higher counts                             |
//! | 48     | 12     | horizon                                                                          |
//! | 60     | 4      | 1 if the next field bounds anything, else 0                                      |
//! | 64     | 12     | the mark below which a replica may be stale; zero if there is none               |
//! | 76     | 8      | how often the volume's status had changed; of all the highest counts             |
//! | 84     | 4      | count of pins                                                                    |
//! | 88     | 12 × n | pins, ascending: epoch (4), sequence (8)                                         |
//!
//! | offset | bytes  | revoke: exactly these records of data and clears never were, wherever they stand |
//! |--------|--------|----------------------------------------------------------------------------------|
//! | 24     | 4      | count                                                                            |
//! | 28     | 20 × n | block (8), version: epoch (4), sequence (8)                                      |
//!
//! All of them can be applied in any order and more than once: versions, epochs and F by maximum, slices by union,
//! retains by (epoch, order), a revoke wins over what it names and a drop over all. That is what lets batches complete
//! out of order and the cleaner move records.

use super::bytes::{Reader, put_u32, put_u64};
use super::footer::is_in_a_volume;
use super::{BatchNumber, FormatError, Position};
use torus_rpc::message::{Checksums, Retention, Revoked, Token};
use torus_schema::ids::{BlockIndex, Epoch, RingGeneration, SliceId, Version, VolumeId};
use torus_schema::limits::{SEQUENCE_MAX, SLICES_MAX};

/// Of a data record, without its checksums.
pub const DATA_BYTES: usize = 64;
/// Of a retain, without its pins.
const RETAIN_BYTES: usize = 88;
/// Of a revoke, without what it lists.
const REVOKE_BYTES: usize = 28;
const WHAT: &str = "record";
/// Behind the end of any volume, and sums of such numbers need no care.
const CLEAR_END_MAX: u64 = 1 << 53;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Data {
    pub volume: VolumeId,
    pub first: BlockIndex,
    pub version: Version,
    pub flush_point: Version,
    pub position: Position,
    /// One for each block.
    pub checksums: Checksums,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Clear {
    pub volume: VolumeId,
    pub first: BlockIndex,
    pub version: Version,
    pub flush_point: Version,
    pub slice: SliceId,
    pub count: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instances {
    pub volume: VolumeId,
    pub placement: VolumeId,
    pub generation: RingGeneration,
    pub created: BatchNumber,
    pub width: u32,
    pub ring_slices: u32,
    pub slices: Vec<SliceId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    pub volume: VolumeId,
    pub flush_point: Version,
    pub epoch: Epoch,
    pub token: Token,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Retain {
    pub volume: VolumeId,
    pub flush_point: Version,
    pub epoch: Epoch,
    pub order: u64,
    pub retention: Retention,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revoke {
    pub volume: VolumeId,
    pub revoked: Vec<Revoked>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Record {
    Data(Data),
    Clear(Clear),
    Instances(Instances),
    Open(Open),
    Drop(VolumeId),
    Retain(Retain),
    Revoke(Revoke),
}

impl Record {
    pub fn volume(&self) -> VolumeId {
        match self {
            Record::Data(data) => data.volume,
            Record::Clear(clear) => clear.volume,
            Record::Instances(instances) => instances.volume,
            Record::Open(open) => open.volume,
            Record::Drop(volume) => *volume,
            Record::Retain(retain) => retain.volume,
            Record::Revoke(revoke) => revoke.volume,
        }
    }

    /// Written for a volume's writer, under its epoch.
    pub fn is_of_writer(&self) -> bool {
        matches!(self, Record::Data(_) | Record::Clear(_))
    }

    /// Length in a header or footer.
    pub fn bytes(&self) -> usize {
        match self {
            Record::Data(data) => DATA_BYTES + 4 * data.checksums.len(),
            Record::Clear(_) => 68,
            Record::Instances(instances) => 68 + 4 * instances.slices.len(),
            Record::Open(_) => 72,
            Record::Drop(_) => 24,
            Record::Retain(retain) => RETAIN_BYTES + 12 * retain.retention.pins.len(),
            Record::Revoke(revoke) => REVOKE_BYTES + 20 * revoke.revoked.len(),
        }
    }

    pub fn payload_blocks(&self) -> u32 {
        if let Record::Data(data) = self { data.checksums.len() as u32 } else { 0 }
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        let (start, kind) = (out.len(), self.kind());
        put_u32(out, kind);
        put_u32(out, self.bytes() as u32);
        out.extend_from_slice(&self.volume().to_bytes());
        match self {
            Record::Data(data) => {
                put_u64(out, data.first.0);
                put_version(out, data.version);
                put_version(out, data.flush_point);
                put_u32(out, data.position.0);
                put_u32(out, data.checksums.len() as u32);
                data.checksums.iter().for_each(|checksum| put_u32(out, *checksum));
            }
            Record::Clear(clear) => {
                put_u64(out, clear.first.0);
                put_version(out, clear.version);
                put_version(out, clear.flush_point);
                put_u32(out, clear.slice.0);
                put_u64(out, clear.count);
            }
            Record::Instances(instances) => {
                out.extend_from_slice(&instances.placement.to_bytes());
                put_u64(out, instances.generation.0);
                put_u64(out, instances.created.0);
                put_u32(out, instances.width);
                put_u32(out, instances.ring_slices);
                put_u32(out, instances.slices.len() as u32);
                instances.slices.iter().for_each(|slice| put_u32(out, slice.0));
            }
            Record::Open(open) => {
                put_version(out, open.flush_point);
                put_u32(out, open.epoch.0);
                out.extend_from_slice(&open.token.0);
            }
            Record::Drop(_) => {}
            Record::Retain(retain) => encode_retain(retain, out),
            Record::Revoke(revoke) => {
                put_u32(out, revoke.revoked.len() as u32);
                for revoked in &revoke.revoked {
                    put_u64(out, revoked.block.0);
                    put_version(out, revoked.version);
                }
            }
        }
        assert_eq!(out.len() - start, self.bytes());
    }

    fn kind(&self) -> u32 {
        match self {
            Record::Data(_) => 1,
            Record::Clear(_) => 2,
            Record::Instances(_) => 3,
            Record::Open(_) => 4,
            Record::Drop(_) => 5,
            Record::Retain(_) => 6,
            Record::Revoke(_) => 7,
        }
    }
}

fn encode_retain(retain: &Retain, out: &mut Vec<u8>) {
    let Retention { horizon, pins, stale_since, status_changes } = &retain.retention;
    put_version(out, retain.flush_point);
    put_u32(out, retain.epoch.0);
    put_u64(out, retain.order);
    put_version(out, *horizon);
    put_u32(out, u32::from(stale_since.is_some()));
    put_version(out, stale_since.unwrap_or_default());
    put_u64(out, *status_changes);
    put_u32(out, pins.len() as u32);
    pins.iter().for_each(|pin| put_version(out, *pin));
}

pub(super) fn put_version(out: &mut Vec<u8>, version: Version) {
    put_u32(out, version.epoch.0);
    put_u64(out, version.sequence);
}

pub(super) fn version(reader: &mut Reader) -> Result<Version, FormatError> {
    let (epoch, sequence) = (Epoch(reader.u32()?), reader.u64()?);
    reader.expect("sequence", sequence, sequence & SEQUENCE_MAX)?;
    Ok(Version { epoch, sequence })
}

/// `count` records that fill `bytes`; the checksum over them was checked.
pub fn decode_all(bytes: &[u8], count: u32) -> Result<Vec<Record>, FormatError> {
    let mut outer = Reader::new(WHAT, bytes);
    // The smallest record bounds what a wrong count can make us allocate.
    let mut records = Vec::with_capacity((count as usize).min(bytes.len() / 24));
    for _ in 0..count {
        let (kind, length) = (outer.u32()?, outer.u32()?);
        let body = outer.take((length as usize).saturating_sub(8))?;
        records.push(decode_body(kind, body)?);
    }
    outer.expect("bytes behind the last record", u64::from(!outer.is_empty()), 0)?;
    Ok(records)
}

fn decode_body(kind: u32, body: &[u8]) -> Result<Record, FormatError> {
    let mut reader = Reader::new(WHAT, body);
    let volume = VolumeId::from_bytes(reader.array()?);
    let record = match kind {
        1 => Record::Data(decode_data(volume, &mut reader)?),
        2 => {
            let first = BlockIndex(reader.u64()?);
            let (version, flush_point) = (version(&mut reader)?, version(&mut reader)?);
            let (slice, count) = (SliceId(reader.u32()?), reader.u64()?);
            let end = first.0.saturating_add(count);
            reader.expect("end of a clear", end, end.min(CLEAR_END_MAX))?;
            Record::Clear(Clear { volume, first, version, flush_point, slice, count })
        }
        3 => Record::Instances(decode_instances(volume, &mut reader)?),
        4 => {
            let flush_point = version(&mut reader)?;
            let (epoch, token) = (Epoch(reader.u32()?), Token(reader.array()?));
            Record::Open(Open { volume, flush_point, epoch, token })
        }
        5 => Record::Drop(volume),
        6 => Record::Retain(decode_retain(volume, &mut reader)?),
        7 => Record::Revoke(decode_revoke(volume, &mut reader)?),
        _ => return Err(FormatError::Field { what: WHAT, field: "kind", found: u64::from(kind), expected: 7 }),
    };
    reader.expect("bytes left over", u64::from(!reader.is_empty()), 0)?;
    Ok(record)
}

fn decode_data(volume: VolumeId, reader: &mut Reader) -> Result<Data, FormatError> {
    let first = BlockIndex(reader.u64()?);
    let (version, flush_point) = (version(reader)?, version(reader)?);
    let position = Position(reader.u32()?);
    let checksums: Checksums = u32s(reader)?;
    let inside = is_in_a_volume(first, checksums.len() as u64);
    reader.expect("block outside of any volume", u64::from(!inside), 0)?;
    Ok(Data { volume, first, version, flush_point, position, checksums })
}

fn decode_instances(volume: VolumeId, reader: &mut Reader) -> Result<Instances, FormatError> {
    let placement = VolumeId::from_bytes(reader.array()?);
    let generation = RingGeneration(reader.counter("generation")?);
    let created = BatchNumber(reader.counter("created")?);
    let (width, ring_slices) = (reader.u32()?, reader.u32()?);
    let fits = width.is_power_of_two() && ring_slices.is_power_of_two() && width <= ring_slices;
    let fits = fits && ring_slices <= SLICES_MAX;
    reader.expect("width and slices that do not fit", u64::from(!fits), 0)?;
    let slices = u32s::<Vec<u32>>(reader)?.into_iter().map(SliceId).collect();
    Ok(Instances { volume, placement, generation, created, width, ring_slices, slices })
}

fn decode_retain(volume: VolumeId, reader: &mut Reader) -> Result<Retain, FormatError> {
    let flush_point = version(reader)?;
    let (epoch, order) = (Epoch(reader.u32()?), reader.u64()?);
    let horizon = version(reader)?;
    let (is_bounded, bound) = (reader.u32()?, version(reader)?);
    reader.expect("whether a replica may be stale", u64::from(is_bounded), u64::from(is_bounded.min(1)))?;
    reader.expect("a mark that bounds nothing", u64::from(is_bounded == 0 && bound != Version::ZERO), 0)?;
    let status_changes = reader.u64()?;
    let pins = counted(reader, 12, version)?;
    reader.expect("pins out of order", u64::from(!pins.is_sorted()), 0)?;
    let retention = Retention { horizon, pins, stale_since: (is_bounded == 1).then_some(bound), status_changes };
    Ok(Retain { volume, flush_point, epoch, order, retention })
}

fn decode_revoke(volume: VolumeId, reader: &mut Reader) -> Result<Revoke, FormatError> {
    let one = |reader: &mut Reader| Ok(Revoked { block: BlockIndex(reader.u64()?), version: version(reader)? });
    Ok(Revoke { volume, revoked: counted(reader, 20, one)? })
}

/// A count, then as many of `bytes` each: memory is taken only for what is there.
fn counted<T>(
    reader: &mut Reader,
    bytes: usize,
    one: impl Fn(&mut Reader) -> Result<T, FormatError>,
) -> Result<Vec<T>, FormatError> {
    let count = reader.u32()? as usize;
    let mut inner = Reader::new(WHAT, reader.take(count.saturating_mul(bytes))?);
    (0..count).map(|_| one(&mut inner)).collect()
}

/// A count, then as many numbers.
fn u32s<L: FromIterator<u32>>(reader: &mut Reader) -> Result<L, FormatError> {
    let count = reader.u32()? as usize;
    let bytes = reader.take(count.saturating_mul(4))?;
    Ok(bytes.chunks_exact(4).map(|four| u32::from_le_bytes(four.try_into().expect("chunks of four"))).collect())
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn examples() -> Vec<Record> {
        let volume = VolumeId::from_bytes([9; 16]);
        let (version, flush_point) = (Version::new(Epoch(2), 7), Version::new(Epoch(1), 6));
        let first = BlockIndex(0x1122);
        let (position, checksums) = (Position(77), vec![0xaabbccdd, 5].into());
        vec![
            Record::Data(Data { volume, first, version, flush_point, position, checksums }),
            Record::Clear(Clear { volume, first, version, flush_point, slice: SliceId(3), count: 1 << 40 }),
            Record::Instances(Instances {
                volume,
                placement: VolumeId::from_bytes([8; 16]),
                generation: RingGeneration(4),
                created: BatchNumber(5),
                width: 2,
                ring_slices: 16,
                slices: vec![SliceId(1), SliceId(15)],
            }),
            Record::Open(Open { volume, flush_point, epoch: Epoch(2), token: Token([6; 32]) }),
            Record::Drop(volume),
            Record::Retain(Retain {
                volume,
                flush_point,
                epoch: Epoch(2),
                order: 3,
                retention: Retention {
                    horizon: version,
                    pins: vec![flush_point, version],
                    stale_since: None,
                    status_changes: 8,
                },
            }),
            Record::Retain(Retain {
                volume,
                flush_point,
                epoch: Epoch(2),
                order: 4,
                retention: Retention {
                    horizon: version,
                    pins: vec![],
                    stale_since: Some(flush_point),
                    status_changes: 0,
                },
            }),
            Record::Revoke(Revoke { volume, revoked: vec![Revoked { block: first, version }] }),
        ]
    }

    fn encode(records: &[Record]) -> Vec<u8> {
        let mut out = Vec::new();
        records.iter().for_each(|record| record.encode(&mut out));
        out
    }

    #[test]
    fn the_bytes_of_records_never_change() {
        let volume = [9; 16];
        let versions = b"\x02\0\0\0\x07\0\0\0\0\0\0\0\x01\0\0\0\x06\0\0\0\0\0\0\0";
        let first = b"\x22\x11\0\0\0\0\0\0";
        let golden: Vec<&[u8]> = vec![
            b"\x01\0\0\0\x48\0\0\0",
            &volume,
            first,
            versions,
            b"\x4d\0\0\0\x02\0\0\0\xdd\xcc\xbb\xaa\x05\0\0\0",
            b"\x02\0\0\0\x44\0\0\0",
            &volume,
            first,
            versions,
            b"\x03\0\0\0\0\0\0\0\0\x01\0\0",
            b"\x03\0\0\0\x4c\0\0\0",
            &volume,
            &[8; 16],
            b"\x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x02\0\0\0\x10\0\0\0\x02\0\0\0\x01\0\0\0\x0f\0\0\0",
            b"\x04\0\0\0\x48\0\0\0",
            &volume,
            b"\x01\0\0\0\x06\0\0\0\0\0\0\0\x02\0\0\0",
            &[6; 32],
            b"\x05\0\0\0\x18\0\0\0",
            &volume,
            b"\x06\0\0\0\x70\0\0\0",
            &volume,
            b"\x01\0\0\0\x06\0\0\0\0\0\0\0\x02\0\0\0\x03\0\0\0\0\0\0\0",
            b"\x02\0\0\0\x07\0\0\0\0\0\0\0",
            &[0; 16],
            b"\x08\0\0\0\0\0\0\0",
            b"\x02\0\0\0\x01\0\0\0\x06\0\0\0\0\0\0\0\x02\0\0\0\x07\0\0\0\0\0\0\0",
            b"\x06\0\0\0\x58\0\0\0",
            &volume,
            b"\x01\0\0\0\x06\0\0\0\0\0\0\0\x02\0\0\0\x04\0\0\0\0\0\0\0",
            b"\x02\0\0\0\x07\0\0\0\0\0\0\0",
            b"\x01\0\0\0\x01\0\0\0\x06\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            b"\x07\0\0\0\x30\0\0\0",
            &volume,
            b"\x01\0\0\0",
            first,
            b"\x02\0\0\0\x07\0\0\0\0\0\0\0",
        ];
        assert_eq!(encode(&examples()), golden.concat());
        assert_eq!(decode_all(&golden.concat(), 8).unwrap(), examples());
    }

    #[test]
    fn records_cut_anywhere_are_refused_and_never_panic() {
        let bytes = encode(&examples());
        for end in 0..bytes.len() {
            assert!(decode_all(&bytes[..end], 8).is_err(), "{end}");
        }
        assert!(decode_all(&bytes, 7).is_err() && decode_all(&bytes, u32::MAX).is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(bytes: Vec<u8>, count in 0u32..9, kind in 0u32..9) {
            let _ = decode_all(&bytes, count);
            let _ = decode_body(kind, &bytes);
        }
    }
}
