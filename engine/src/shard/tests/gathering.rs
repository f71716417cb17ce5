//! What a start gathers by extent (`gather`), against the same records applied one after the other: random histories with
//! ties, versions out of order, clears, pins, revocations, copies and volumes that were dropped or have no layout.

use crate::index::AtTie;
use crate::log::footer::{Footer, Tail, Trailer};
use crate::log::record::{Clear, Data, Instances, Record, Retain, Revoke};
use crate::log::space::Space;
use crate::log::{BatchNumber, Geometry, Position, SegmentIdentity, SegmentIndex};
use crate::shard::gather::Gathering;
use crate::shard::state::Contents;
use torus_rpc::message::{Retention, Revoked};
use torus_schema::ids::{BlockIndex, Epoch, RingGeneration, SliceId, Version, VolumeId};

const GEOMETRY: Geometry = Geometry { segments: 24, blocks: 2048 };
const HISTORIES: u64 = 100;

/// Numbers that look random, the same for a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}

fn volume(number: u64) -> VolumeId {
    VolumeId::from_bytes([number as u8 + 1; 16])
}

/// Of all volumes together, so that none is ever given to two records that are not copies.
fn version(sequence: u64) -> Version {
    Version::new(Epoch(1 + (sequence / 400) as u32), sequence)
}

struct History {
    dice: Dice,
    /// Of each volume.
    blocks: u64,
    longest: u64,
    sequence: u64,
    written: Vec<Data>,
    has_notes: bool,
}

impl History {
    fn new(seed: u64) -> Self {
        let mut dice = Dice(seed);
        let extents = [1, 2, 5, 40][dice.below(4) as usize];
        let (blocks, longest) = (extents * 1024 - 100, [1, 3, 60, 1500][dice.below(4) as usize]);
        let has_notes = !dice.one_in(4);
        Self { dice, blocks, longest, sequence: 10, written: Vec::new(), has_notes }
    }

    /// Older than some that came before now and then.
    fn version(&mut self) -> Version {
        self.sequence += 1 + self.dice.below(3);
        let back = if self.dice.one_in(5) { self.dice.below(self.sequence.min(300)) / 3 * 3 } else { 0 };
        // Those that come late are of a kind of their own: no version is given twice.
        version(2 * (self.sequence - back).max(1) + u64::from(back > 0))
    }

    fn data(&mut self, position: Position, room: u64) -> Data {
        if !self.written.is_empty() && self.dice.one_in(4) {
            return self.copy(position, room);
        }
        let first = self.dice.below(self.blocks);
        let count = (1 + self.dice.below(self.longest)).min(room).min(self.blocks - first);
        let id = volume(self.dice.below(4));
        let version = self.version();
        let checksums = (0..count).map(|_| self.dice.below(1 << 32) as u32).collect();
        let first = BlockIndex(first);
        let data = Data { volume: id, first, version, flush_point: Version::ZERO, position, checksums };
        self.written.push(data.clone());
        data
    }

    /// Of a part of what was written before, under its version.
    fn copy(&mut self, position: Position, room: u64) -> Data {
        let from = self.dice.below(self.written.len() as u64) as usize;
        let original = self.written[from].clone();
        let skipped = self.dice.below(original.checksums.len() as u64);
        let left = (original.checksums.len() as u64 - skipped).min(room);
        let count = 1 + self.dice.below(left);
        let checksums = original.checksums[skipped as usize..(skipped + count) as usize].into();
        Data { first: BlockIndex(original.first.0 + skipped), position, checksums, ..original }
    }

    fn note(&mut self) -> Record {
        let id = volume(self.dice.below(4));
        let said = version(2 * self.dice.below(self.sequence));
        match self.dice.below(8) {
            0..3 => {
                let first = BlockIndex(self.dice.below(self.blocks));
                let slice = SliceId(self.dice.below(2) as u32);
                let (count, version) = (1 + self.dice.below(3000), self.version());
                Record::Clear(Clear { volume: id, first, version, flush_point: Version::ZERO, slice, count })
            }
            3..6 if !self.written.is_empty() => {
                let of = &self.written[self.dice.below(self.written.len() as u64) as usize];
                let block = BlockIndex(of.first.0 + self.dice.below(of.checksums.len() as u64));
                let revoked = vec![Revoked { block, version: of.version }];
                Record::Revoke(Revoke { volume: of.volume, revoked })
            }
            6 if self.dice.one_in(10) => Record::Drop(volume(3)),
            _ => {
                let mut pins = vec![said, version(2 * self.dice.below(self.sequence))];
                pins.sort();
                let retention = Retention {
                    horizon: version(2 * self.sequence),
                    pins,
                    stale_since: None,
                    status_changes: self.sequence,
                };
                let (epoch, order) = (Epoch(1), self.sequence);
                Record::Retain(Retain { volume: id, flush_point: said, epoch, order, retention })
            }
        }
    }

    /// The footer of a segment, as it stands on the disk.
    fn footer(&mut self, segment: SegmentIndex) -> Vec<u8> {
        let end = GEOMETRY.first(segment).0 + GEOMETRY.blocks;
        let (mut at, mut records) = (GEOMETRY.first(segment).0 + 1, Vec::new());
        for _ in 0..self.dice.below(200) {
            let room = u64::from(end - at);
            if room < 2 {
                break;
            }
            let data = self.data(Position(at), room - 1);
            at += data.checksums.len() as u32;
            records.push(Record::Data(data));
        }
        if segment.0 == 0 {
            // Of the third nobody knows the layout.
            records.extend([0, 1, 3].map(|number| Record::Instances(instances(volume(number)))));
        }
        let notes = if self.has_notes { self.dice.below(4) } else { 0 };
        records.extend((0..notes).map(|_| self.note()));
        let sequence = 1 + u64::from(segment.0);
        let identity = SegmentIdentity { segment, nonce: 5, sequence };
        let (first_batch, end_batch) = (BatchNumber(sequence), BatchNumber(sequence + 1));
        Footer { identity, first_batch, end_batch, durable: first_batch, batches: 1, sealed_s: 0, records }.encode()
    }
}

fn instances(volume: VolumeId) -> Instances {
    let (generation, created, slices) = (RingGeneration(1), BatchNumber(1), vec![SliceId(0), SliceId(1)]);
    Instances { volume, placement: volume, generation, created, width: 2, ring_slices: 2, slices }
}

struct Segment {
    trailer: Trailer,
    tail: Tail,
    bytes: Vec<u8>,
}

impl Segment {
    fn new(bytes: Vec<u8>) -> Self {
        let trailer = Trailer::decode_last(&bytes).unwrap();
        Self { tail: trailer.tail(&bytes).unwrap(), trailer, bytes }
    }
}

/// As a start is before it reads the data of footers.
fn foreseen(segments: &[Segment]) -> Contents {
    let mut contents = Contents::new(Space::new(GEOMETRY));
    for Segment { trailer, tail, .. } in segments {
        tail.volumes.iter().for_each(|said| contents.foresee_flush_point(said.volume, said.flush_point));
        tail.notes.iter().for_each(|note| contents.foresee(note));
        contents.space.found(trailer.identity.segment, trailer.identity.sequence);
    }
    contents
}

/// Of each segment first all notes, then all data.
fn one_by_one(segments: &[Segment], contents: &mut Contents) {
    for Segment { trailer, tail, bytes } in segments {
        tail.notes.iter().for_each(|note| contents.replay(note, AtTie::NewcomerWins));
        let records = trailer.clone().finalize(GEOMETRY, bytes).unwrap().records;
        let data = records.iter().filter(|record| matches!(record, Record::Data(_)));
        data.for_each(|record| contents.replay(record, AtTie::NewcomerWins));
    }
}

/// All that is gathered is applied after so many segments.
fn gathered(segments: &[Segment], together: usize, contents: &mut Contents) {
    let mut gathering = Gathering::default();
    for part in segments.chunks(together) {
        for Segment { trailer, tail, bytes } in part {
            for note in &tail.notes {
                gathering.replay_note(note, contents);
            }
            gathering.take(&tail.volumes, trailer.entries(GEOMETRY, bytes).unwrap(), contents);
        }
        gathering.apply(contents);
    }
}

#[test]
fn what_is_gathered_by_extent_comes_to_the_same_as_record_by_record() {
    for seed in 0..HISTORIES {
        let mut history = History::new(seed);
        let segments: Vec<Segment> =
            (0..GEOMETRY.segments).map(|segment| Segment::new(history.footer(SegmentIndex(segment)))).collect();
        let together = 1 + history.dice.below(u64::from(GEOMETRY.segments)) as usize;
        let (mut expected, mut found) = (foreseen(&segments), foreseen(&segments));
        one_by_one(&segments, &mut expected);
        gathered(&segments, together, &mut found);
        compare(seed, history.blocks, &expected, &found);
    }
}

fn compare(seed: u64, blocks: u64, expected: &Contents, found: &Contents) {
    for id in (0..4).map(volume) {
        for block in (0..blocks).map(BlockIndex) {
            let place = expected.place_of(id, block);
            assert_eq!(found.index.find(place), expected.index.find(place), "seed {seed}, {place:?}");
        }
        let pins = |contents: &'_ Contents| contents.volumes.get(&id).map(|volume| format!("{:?}", volume.pins));
        assert_eq!(pins(found), pins(expected), "seed {seed}, {id}");
        assert_eq!(found.index.extents_of(id), expected.index.extents_of(id), "seed {seed}, {id}");
    }
    assert_eq!(found.index.blocks(), expected.index.blocks(), "seed {seed}");
    assert_eq!(found.space.live(), expected.space.live(), "seed {seed}");
    for segment in (0..GEOMETRY.segments).map(SegmentIndex) {
        assert_eq!(found.space.needed(segment), expected.space.needed(segment), "seed {seed}, {segment:?}");
        assert_eq!(found.space.usage(segment), expected.space.usage(segment), "seed {seed}, {segment:?}");
    }
}
