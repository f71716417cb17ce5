//! What a record does to the shard once it stands in the log: synchronous, the same at run time and at a start.

use super::damage::Damage;
use super::ledger::{Ledger, clear_range};
use super::pins::Kept;
use super::volumes::Volume;
use crate::index::{Applied, AtTie, Entry, Found, Index, Place, Run};
use crate::log::record::{Clear, Data, Instances, Record, Retain};
use crate::log::space::Space;
use crate::log::{Position, SegmentIndex};
use torus_rpc::message::Few;
use torus_schema::hash::{Map, Set};
use torus_schema::ids::{BlockIndex, ExtentIndex, SliceId, Version, VolumeId};
use torus_schema::limits::BLOCKS_PER_EXTENT;

/// Of an extent of a volume whose layout is not known (its instance record was lost): nobody can ask for it.
const UNKNOWN_SLICE: SliceId = SliceId(u32::MAX);

pub struct Contents {
    pub index: Index,
    pub space: Space,
    pub volumes: Map<VolumeId, Volume>,
    pub dropped: Set<VolumeId>,
    pub damage: Damage,
    pub ledger: Ledger,
}

impl Contents {
    pub fn new(space: Space) -> Self {
        let (index, damage, ledger) = (Index::default(), Damage::default(), Ledger::default());
        Self { index, space, volumes: Map::default(), dropped: Set::default(), damage, ledger }
    }

    /// Applies a record that stands in `segment`. `origins`: it is the cleaner's copy of blocks that lay there.
    pub fn apply(&mut self, record: &Record, segment: SegmentIndex, origins: Option<&[Position]>) {
        match (record, origins) {
            (Record::Data(data), Some(origins)) => self.moved(data, origins),
            (Record::Data(data), None) => self.data(data, AtTie::NewcomerWins),
            (note, _) => {
                self.note(note);
                self.enter(segment, note);
            }
        }
    }

    /// At a start. Notes are counted apart (`start`), when it is known which of them still say anything.
    pub fn replay(&mut self, record: &Record, at_tie: AtTie) {
        match record {
            Record::Data(data) => self.data(data, at_tie),
            note => self.note(note),
        }
    }

    fn note(&mut self, record: &Record) {
        match record {
            Record::Drop(volume) => self.drop_volume(*volume),
            record if self.dropped.contains(&record.volume()) => {}
            Record::Clear(clear) => self.clear(clear),
            Record::Instances(instances) => self.instances(instances),
            Record::Open(open) => {
                self.volumes.entry(open.volume).or_default().merge_open(open);
                self.settle(open.volume, open.flush_point);
            }
            Record::Retain(retain) => self.retain(retain),
            Record::Revoke(revoke) => self.revoke(revoke),
            Record::Data(_) => unreachable!("data is not a note"),
        }
    }

    /// First of all at a start: without the layout of its volume no other record can be understood, and what is known
    /// of F need not be kept until it is known.
    pub fn foresee(&mut self, record: &Record) {
        match record {
            Record::Clear(clear) if !self.dropped.contains(&clear.volume) => {
                self.settle(clear.volume, clear.flush_point)
            }
            Record::Data(data) if !self.dropped.contains(&data.volume) => self.settle(data.volume, data.flush_point),
            Record::Clear(_) | Record::Data(_) => {}
            note => self.note(note),
        }
    }

    /// What a footer says of all its data of that volume.
    pub fn foresee_flush_point(&mut self, volume: VolumeId, flush_point: Version) {
        if !self.dropped.contains(&volume) {
            self.settle(volume, flush_point);
        }
    }

    pub fn slice_of(&self, volume: VolumeId, extent: ExtentIndex) -> SliceId {
        let layout = self.volumes.get(&volume).and_then(|volume| volume.layout.as_ref());
        layout.map_or(UNKNOWN_SLICE, |layout| layout.placement.slice_of(extent))
    }

    fn settle(&mut self, volume: VolumeId, flush_point: Version) {
        let volume = self.volumes.entry(volume).or_default();
        volume.settle(flush_point).into_iter().for_each(|freed| self.space.remove_live(freed));
    }

    fn retain(&mut self, record: &Retain) {
        let freed = self.volumes.entry(record.volume).or_default().merge_retain(record);
        freed.into_iter().for_each(|freed| self.space.remove_live(freed));
        self.ledger.is_due = true;
        self.settle(record.volume, record.flush_point);
    }

    fn instances(&mut self, record: &Instances) {
        self.volumes.entry(record.volume).or_default().merge_instances(record);
    }

    fn data(&mut self, data: &Data, at_tie: AtTie) {
        if self.dropped.contains(&data.volume) {
            return;
        }
        self.settle(data.volume, data.flush_point);
        let mut number = 0;
        while number < data.checksums.len() {
            let block = BlockIndex(data.first.0 + number as u64);
            let count = (BLOCKS_PER_EXTENT - block.in_extent()).min((data.checksums.len() - number) as u64) as usize;
            let first = Place { volume: data.volume, slice: self.slice_of(data.volume, block.extent()), block };
            let position = Position(data.position.0 + number as u32);
            let checksums = &data.checksums[number..number + count];
            self.data_run(Run { first, version: data.version, position, checksums }, at_tie);
            number += count;
        }
    }

    /// Part of a record whose F is known, within one extent; without what was revoked.
    pub fn data_run(&mut self, run: Run<'_>, at_tie: AtTie) {
        let (volume, first) = (run.first.volume, run.first.block);
        let end = first.0 + run.checksums.len() as u64;
        let Some(revoked) = self.first_revoked(volume, first.0..end, run.version) else {
            return self.alive_run(run, at_tie);
        };
        let before = (revoked.0 - first.0) as usize;
        let part = |from: usize, checksums| {
            let block = BlockIndex(first.0 + from as u64);
            let position = Position(run.position.0 + from as u32);
            Run { first: Place { block, ..run.first }, version: run.version, position, checksums }
        };
        if before > 0 {
            self.alive_run(part(0, &run.checksums[..before]), at_tie);
        }
        if before + 1 < run.checksums.len() {
            self.data_run(part(before + 1, &run.checksums[before + 1..]), at_tie);
        }
    }

    fn alive_run(&mut self, run: Run<'_>, at_tie: AtTie) {
        let entry = |number: usize| {
            let position = Position(run.position.0 + number as u32);
            Entry { position, checksum: run.checksums[number], version: run.version }
        };
        self.space.add_live_run(run.position, run.checksums.len() as u32);
        let mut superseded = Few::new();
        self.index.apply_run(run, at_tie, |number, applied| match applied {
            Applied::Current { replaced } => {
                superseded.extend(replaced.map(|replaced| (number, replaced, run.version)));
            }
            Applied::Superseded { by } => superseded.push((number, entry(number), by)),
        });
        for (number, old, by) in superseded {
            let block = BlockIndex(run.first.block.0 + number as u64);
            self.supersede(Place { block, ..run.first }, old, by, at_tie);
        }
    }

    /// Its space is free at once if the newer version can never be taken back and no pin lies between, and otherwise
    /// when F, the horizon and the pins say so.
    pub(super) fn supersede(&mut self, place: Place, old: Entry, by: Version, at_tie: AtTie) {
        let volume = self.volumes.entry(place.volume).or_default();
        // A copy under the same version takes nothing away.
        let freed = if by == old.version {
            Some(old.position)
        } else {
            volume.keep(place.block, old, by, at_tie == AtTie::NewcomerWins)
        };
        freed.into_iter().for_each(|position| self.space.remove_live(position));
    }

    /// The cleaner's copy is needed exactly if its original still is.
    fn moved(&mut self, data: &Data, origins: &[Position]) {
        assert_eq!(origins.len(), data.checksums.len());
        for (number, from) in (0u32..).zip(origins) {
            let block = BlockIndex(data.first.0 + u64::from(number));
            let place = self.place_of(data.volume, block);
            let to = Position(data.position.0 + number);
            let kept = Kept { block, version: data.version };
            let volume = self.volumes.get_mut(&data.volume);
            let pinned = volume.is_some_and(|volume| volume.pins.relocate(kept, *from, to));
            if pinned || self.index.relocate(place, *from, to) {
                self.space.add_moved(*from, to);
                self.space.remove_live(*from);
            }
        }
    }

    fn clear(&mut self, clear: &Clear) {
        self.settle(clear.volume, clear.flush_point);
        let spared = self.spared(clear);
        let Some(layout) = self.volumes.get(&clear.volume).and_then(|volume| volume.layout.as_ref()) else { return };
        let mut hidden = Vec::new();
        let tell = |place, entry| hidden.push((place, entry));
        self.index.clear(clear_range(clear), clear.version, &layout.placement, tell);
        // Also of a block that is newer: its extent is not cleared as a whole.
        for (place, before) in spared {
            self.index.take_back(place, clear.version, before);
            hidden.retain(|(hidden, _)| *hidden != place);
        }
        let at_tie = AtTie::NewcomerWins;
        hidden.into_iter().for_each(|(place, entry)| self.supersede(place, entry, clear.version, at_tie));
    }

    fn drop_volume(&mut self, volume: VolumeId) {
        self.dropped.insert(volume);
        self.damage.drop_volume(volume);
        let space = &mut self.space;
        self.index.drop_volume(volume, |entry| space.remove_live(entry.position));
        let pins = self.volumes.remove(&volume).map(|volume| volume.pins).unwrap_or_default();
        pins.positions().for_each(|position| space.remove_live(position));
    }

    /// That block of the record is current where it lies, or kept. `pinned`: of its segment.
    pub fn needs(&self, data: &Data, number: usize, pinned: &Set<Position>) -> bool {
        let position = Position(data.position.0 + number as u32);
        let block = BlockIndex(data.first.0 + number as u64);
        let slice = self.slice_of(data.volume, block.extent());
        let found = self.index.find(Place { volume: data.volume, slice, block });
        pinned.contains(&position) || matches!(found, Found::Data(entry) if entry.position == position)
    }

    /// Positions in `segment` that are kept though superseded.
    pub fn pinned_in(&self, segment: SegmentIndex) -> Set<Position> {
        let geometry = self.space.geometry();
        let pins = self.volumes.values().flat_map(|volume| volume.pins.positions());
        pins.filter(|position| geometry.segment_of(*position) == segment).collect()
    }
}
