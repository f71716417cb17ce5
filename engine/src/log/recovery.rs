//! What a start believes of what it finds. D is the highest "durable" number in any opening, header or footer: every
//! batch up to it was once synced.
//!
//! A read that fails is tried once more; what cannot be read then is damaged like what has a wrong checksum. Only if no
//! segment can be read at all is it the disk, and the start fails.
//!
//! **What a segment is.** Three blocks of it never hold payload: the opening, the one behind it, which is the header of
//! the first batch, and the last, with the trailer. The newest use that one of them names is what it is used for:
//!
//! | newest use is named by        | the segment is                                                                 |
//! |-------------------------------|--------------------------------------------------------------------------------|
//! | none, the second is zeros     | empty: its first batch was never written, so nothing in it was ever durable    |
//! | none                          | lost: it was in use and cannot be read                                         |
//! | trailer, opening or header    | sealed: the footer lists what was whole once; damage shows when it is read     |
//! | only the trailer              | sealed, unless a header of a later use is found in it: then lost               |
//! | trailer, its tail is damaged  | unsealed, below; where it begins and ends is known                             |
//! | opening                       | unsealed, below                                                                |
//! | header, not the opening       | unsealed, below: the opening is damaged, or its write was lost                 |
//!
//! An opening or footer that names another segment was misdirected: damaged. A footer is read in two parts, its tail
//! (notes, flush points) before its data; one whose data turns out damaged counts as damaged, and keeps its notes.
//!
//! **A block inside an unsealed segment** (`search`):
//!
//! | block                                        | it is                                                          |
//! |----------------------------------------------|----------------------------------------------------------------|
//! | in a batch found before                      | its header or payload, not looked at further                   |
//! | header of this use, of this position, good   | a batch                                                        |
//! | header of another nonce                      | a remainder of an earlier use                                  |
//! | header of another position                   | misdirected, or a guest's copy inside a payload that was lost  |
//! | start of a footer of this use                | the trailer's copy: says where the segment begins and ends     |
//! | anything else, unreadable                    | a hole, which hides nothing behind it                          |
//!
//! **A batch of an unsealed segment:**
//!
//! | batch                        | up to D                              | above D                                 |
//! |------------------------------|--------------------------------------|-----------------------------------------|
//! | header and payload good      | keep                                 | keep: what is whole may stay            |
//! | header good, payload damaged | keep: its blocks answer `Damaged`    | drop those records: a torn tail         |
//! | header missing (`numbers`)   | lost: what it held is unknown        | nothing: it was never acknowledged a sync|
//!
//! If the trailer of a damaged footer is good, it says how many batches were there: fewer are found only if one is lost.
//!
//! **A whole segment** may look as if it were in an earlier use yet. So it is *lost* too if the newest opening lists a
//! segment without a footer that is nowhere, with something durable in it, or if D is behind the last batch of all.
//!
//! *Lost* is told to every writer (`Superblock::lost_below`), who then treats the instances as never filled.
//! Afterwards a torn tail is taken out of its batch's header, all that was unsealed gets a footer and what was lost is
//! emptied, so that a decision is made once: numbers are then known to be durable that were not when it was made. These
//! writes are read back: what undoes a decision is damage to the header and to the footer of one segment, later.

use super::batch::{BatchHeader, UncheckedHeader};
use super::footer::{Entries, Footer, Tail, Trailer, footer_blocks};
use super::numbers::{self, Begins, Unsealed};
use super::record::Record;
use super::search::{FoundBatch, Search, read_twice, search};
use super::segment::{Opening, Recent};
use super::{BLOCK, BatchNumber, Geometry, Position, SegmentIdentity, SegmentIndex};
use futures::StreamExt;
use futures::stream;
use std::ops::Range;
use torus_rpc::runtime::{Disk, DiskError};
use torus_schema::hash::Set;

/// Segments whose ends are read at once: as many small reads as keep an NVMe drive busy.
const ENDS_IN_FLIGHT: usize = 32;

/// A footer of which data was not looked at yet.
pub struct ReadFooter {
    pub trailer: Trailer,
    pub tail: Tail,
}

/// One segment that holds something.
pub struct FoundSegment {
    pub identity: SegmentIdentity,
    /// Second since 1970; `None`: its opening cannot be read.
    pub opened_s: Option<u64>,
    pub first_batch: BatchNumber,
    pub end_batch: BatchNumber,
    /// It is sealed.
    pub footer: Option<ReadFooter>,
    /// Otherwise it has to be given a footer with these.
    pub unsealed: Option<Vec<Record>>,
    /// Of those: blocks that were durable and are not as they were.
    pub damaged: Vec<Position>,
    /// What headers have to say from now on: they named a torn tail.
    pub mended: Vec<BatchHeader>,
    /// How many batches are there.
    pub batches: u32,
}

pub struct Scan {
    /// In the order of their opening.
    pub segments: Vec<FoundSegment>,
    /// Were in use and cannot be read.
    pub unreadable: Vec<SegmentIndex>,
    /// Something that was durable is gone, and nobody knows what.
    pub lost: bool,
    pub durable: BatchNumber,
    pub next_batch: BatchNumber,
    pub next_sequence: u64,
}

/// Looks at the ends of every segment, and into those that are not sealed.
pub async fn scan<D: Disk>(disk: &D, geometry: Geometry) -> Result<Scan, DiskError> {
    let mut scan = Scan {
        segments: Vec::new(),
        unreadable: Vec::new(),
        lost: false,
        durable: BatchNumber(0),
        next_batch: BatchNumber(1),
        next_sequence: 1,
    };
    let mut begins = Begins::default();
    let (mut opened, mut failed) = (Vec::new(), Vec::new());
    let mut newest: Option<Opening> = None;
    let segments = stream::iter((0..geometry.segments).map(SegmentIndex));
    let mut all_ends = segments.map(|segment| read_ends(disk, geometry, segment)).buffer_unordered(ENDS_IN_FLIGHT);
    while let Some(mut ends) = all_ends.next().await {
        scan.hear(&ends, &mut begins);
        failed.extend(ends.error.take());
        let sequence_of = |opening: &Opening| opening.identity.sequence;
        newest = newest.into_iter().chain(ends.opening.clone()).max_by_key(sequence_of);
        let segment = ends.segment;
        match classify(disk, geometry, ends).await {
            Class::Empty => {}
            Class::Sealed(opened_s, footer) => scan.segments.push(sealed(opened_s, footer)),
            Class::Unsealed(found) => opened.push(found),
            Class::Lost => {
                tracing::error!(segment = segment.0, "a segment was in use and cannot be read: its records are lost");
                scan.unreadable.push(segment);
                scan.lost = true;
            }
        }
    }
    if let Some(error) = failed.pop().filter(|_| failed.len() as u32 + 1 == geometry.segments) {
        return Err(error);
    }
    opened.sort_by_key(|opening| opening.identity.sequence);
    let mut searched = Vec::new();
    for opening in opened {
        let identity = opening.identity;
        let found = search(disk, geometry, identity.segment, |other| *other == identity).await;
        let batches =
            found.batches.iter().map(|batch| (batch.header.number.0, batch.header.durable.0, batch.damaged.len()));
        tracing::debug!(?identity, batches = ?batches.collect::<Vec<_>>(), "searched an unsealed segment");
        scan.hear_search(identity, &found, &mut begins);
        searched.push((opening, found));
    }
    scan.next_batch = scan.next_batch.max(BatchNumber(scan.durable.0 + 1));
    scan.decide(searched, &begins);
    scan.segments.sort_by_key(|found| found.identity.sequence);
    scan.look_for_what_is_nowhere(newest);
    let (segments, durable, next, lost) = (scan.segments.len(), scan.durable.0, scan.next_batch.0, scan.lost);
    tracing::debug!(segments, durable, next, lost, "looked at all segments");
    Ok(scan)
}

fn sealed(opened_s: Option<u64>, footer: ReadFooter) -> FoundSegment {
    let Trailer { identity, first_batch, end_batch, batches, .. } = footer.trailer;
    FoundSegment {
        identity,
        opened_s,
        first_batch,
        end_batch,
        footer: Some(footer),
        unsealed: None,
        damaged: Vec::new(),
        mended: Vec::new(),
        batches,
    }
}

impl Scan {
    fn hear(&mut self, ends: &Ends, begins: &mut Begins) {
        if let Some(opening) = &ends.opening {
            self.note(opening.identity, opening.first_batch, opening.durable);
            opening.recent.iter().for_each(|recent| begins.say(recent.sequence, recent.first_batch));
        }
        if let Some(header) = &ends.header {
            self.note(header.identity, BatchNumber(header.number.0 + 1), header.durable);
            begins.say(header.identity.sequence, header.first_batch);
        }
        // One of an earlier use was true too.
        if let Some(trailer) = &ends.trailer {
            self.hear_trailer(trailer, begins);
        }
    }

    fn hear_trailer(&mut self, trailer: &Trailer, begins: &mut Begins) {
        self.note(trailer.identity, trailer.end_batch, trailer.durable);
        begins.say(trailer.identity.sequence, trailer.first_batch);
        begins.say(trailer.identity.sequence + 1, trailer.end_batch);
    }

    fn hear_search(&mut self, identity: SegmentIdentity, search: &Search, begins: &mut Begins) {
        search.trailer.iter().for_each(|trailer| self.hear_trailer(trailer, begins));
        for FoundBatch { header, .. } in &search.batches {
            self.note(identity, BatchNumber(header.number.0 + 1), header.durable);
            begins.say(identity.sequence, header.first_batch);
        }
    }

    fn note(&mut self, identity: SegmentIdentity, next_batch: BatchNumber, durable: BatchNumber) {
        self.next_sequence = self.next_sequence.max(identity.sequence + 1);
        self.next_batch = self.next_batch.max(next_batch);
        self.durable = self.durable.max(durable);
    }

    /// What its batches are. `searched` by sequence.
    fn decide(&mut self, searched: Vec<(Opened, Search)>, begins: &Begins) {
        let of = |(opened, search): &(Opened, Search)| Unsealed {
            sequence: opened.identity.sequence,
            at_least: opened.first_batch,
            found: search.batches.iter().map(|batch| batch.header.number).collect(),
        };
        let trailer_of = |opened: &Opened, search: &mut Search| opened.trailer.clone().or(search.trailer.take());
        let mut without = Vec::new();
        for (opened, mut search) in searched {
            match trailer_of(&opened, &mut search) {
                Some(trailer) => {
                    self.miss(&trailer, search.batches.len());
                    let range = trailer.first_batch..trailer.end_batch;
                    self.push_unsealed(opened.identity, opened.opened_s, search, range);
                }
                None => without.push((opened, search)),
            }
        }
        let unsealed: Vec<Unsealed> = without.iter().map(of).collect();
        let decision = numbers::decide(&unsealed, begins, self.durable, self.next_sequence - 1);
        if decision.missing > 0 || decision.end_unknown {
            let (missing, end_unknown, durable) = (decision.missing, decision.end_unknown, self.durable.0);
            tracing::error!(missing, end_unknown, durable, "batches that were durable are gone");
            self.lost = true;
        }
        for ((opened, search), range) in without.into_iter().zip(decision.ranges) {
            self.push_unsealed(opened.identity, opened.opened_s, search, range);
        }
    }

    fn push_unsealed(
        &mut self,
        identity: SegmentIdentity,
        opened_s: Option<u64>,
        search: Search,
        range: Range<BatchNumber>,
    ) {
        self.next_batch = self.next_batch.max(range.end);
        let batches = search.batches.len() as u32;
        let Kept { records, damaged, mended } = kept(search.batches, self.durable);
        self.segments.push(FoundSegment {
            identity,
            opened_s,
            first_batch: range.start,
            end_batch: range.end,
            footer: None,
            unsealed: Some(records),
            damaged,
            mended,
            batches,
        });
    }

    /// The segment had a footer: what it counted is there, and no more. One more is a batch that a start dropped, since it
    /// could not read the header then; nobody knows what else was decided without it.
    fn miss(&mut self, trailer: &Trailer, found: usize) {
        if found != trailer.batches as usize {
            let (segment, expected) = (trailer.identity.segment.0, trailer.batches);
            tracing::error!(
                segment,
                found,
                expected,
                "batches are gone, or have come back, together with the footer that listed them"
            );
            self.lost = true;
        }
    }

    /// Whole segments.
    fn look_for_what_is_nowhere(&mut self, newest: Option<Opening>) {
        let durable = self.durable;
        // Only a later opening could have taken its place.
        let unsealed = newest.into_iter().flat_map(|opening| opening.recent).filter(|recent| !recent.sealed);
        for Recent { sequence, first_batch, .. } in unsealed {
            let is_there = self.segments.iter().any(|found| found.identity.sequence == sequence);
            if !is_there && first_batch <= durable {
                tracing::error!(sequence, first_batch = first_batch.0, "a segment in use is nowhere on the disk");
                self.lost = true;
            }
        }
        let end = self.segments.last().map_or(BatchNumber(1), |last| last.end_batch);
        if end <= durable {
            tracing::error!(end = end.0, durable = durable.0, "batches that were durable are gone with their segment");
            self.lost = true;
        }
    }

    /// The data in the footer of that segment turned out damaged: it is read batch by batch after all.
    pub async fn unseal<D: Disk>(&mut self, disk: &D, geometry: Geometry, at: usize) {
        let found = &mut self.segments[at];
        let Some(footer) = found.footer.take() else { return };
        let identity = found.identity;
        tracing::warn!(segment = identity.segment.0, "a footer is damaged: its segment is read batch by batch");
        let search = search(disk, geometry, identity.segment, |other| *other == identity).await;
        found.batches = search.batches.len() as u32;
        let Kept { mut records, damaged, mended } = kept(search.batches, self.durable);
        records.retain(|record| matches!(record, Record::Data(_)));
        records.extend(footer.tail.notes);
        (found.unsealed, found.damaged, found.mended) = (Some(records), damaged, mended);
        let batches = found.batches as usize;
        self.miss(&footer.trailer, batches);
    }
}

/// What is believed of the batches of a segment.
struct Kept {
    records: Vec<Record>,
    /// Of these, blocks that are damaged.
    damaged: Vec<Position>,
    mended: Vec<BatchHeader>,
}

fn kept(batches: Vec<FoundBatch>, durable: BatchNumber) -> Kept {
    let mut kept = Kept { records: Vec::new(), damaged: Vec::new(), mended: Vec::new() };
    for FoundBatch { mut header, damaged } in batches {
        if header.number <= durable {
            kept.damaged.extend(damaged);
        } else if !damaged.is_empty() {
            let damaged: Set<Position> = damaged.into_iter().collect();
            header.records.retain(|record| match record {
                Record::Data(data) => {
                    let mut blocks = (data.position.0..data.position.0 + data.checksums.len() as u32).map(Position);
                    !blocks.any(|position| damaged.contains(&position))
                }
                _ => true,
            });
            kept.mended.push(header.clone());
        }
        kept.records.extend(header.records);
    }
    kept
}

/// What stands at the two ends of a segment.
struct Ends {
    segment: SegmentIndex,
    opening: Option<Opening>,
    /// Of the first batch.
    header: Option<UncheckedHeader>,
    /// No batch was ever written here: where the first one's header would stand are zeros.
    is_unused: bool,
    /// The first block cannot be read.
    error: Option<DiskError>,
    trailer: Option<Trailer>,
    /// The same with its tail.
    footer: Option<ReadFooter>,
}

async fn read_ends<D: Disk>(disk: &D, geometry: Geometry, segment: SegmentIndex) -> Ends {
    let first = read_first(disk, geometry.first(segment));
    let ((first, second), footer) = futures::join!(first, read_tail(disk, geometry, segment));
    let (trailer, footer) = match footer {
        Some((trailer, tail)) => (Some(trailer.clone()), tail.map(|tail| ReadFooter { trailer, tail })),
        None => (None, None),
    };
    let (mut opening, mut error) = (None, None);
    match &first {
        Ok(block) => {
            opening = Opening::decode(block).ok().filter(|opening| opening.identity.segment == segment);
        }
        Err(because) => error = Some(because.clone()),
    }
    let is_here = |header: &UncheckedHeader| {
        header.identity.segment == segment && header.position.0 == geometry.first(segment).0 + 1
    };
    let header = second.as_deref().and_then(|block| UncheckedHeader::decode(block).ok()).filter(is_here);
    let is_unused = second.is_some_and(|block| block.iter().all(|byte| *byte == 0));
    Ends { segment, opening, header, is_unused, error, trailer, footer }
}

/// The first two blocks of a segment: at once, if nothing is wrong with either.
async fn read_first<D: Disk>(disk: &D, first: Position) -> (Result<Vec<u8>, DiskError>, Option<Vec<u8>>) {
    if let Ok(both) = read_twice(disk, first, 2).await {
        let (first, second) = both.split_at(BLOCK);
        return (Ok(first.to_vec()), Some(second.to_vec()));
    }
    let opening = read_twice(disk, first, 1).await.map(|block| block.to_vec());
    let header = read_twice(disk, Position(first.0 + 1), 1).await.map(|block| block.to_vec());
    (opening, header.ok())
}

/// A trailer that fits the segment, and its tail if that is good too.
async fn read_tail<D: Disk>(disk: &D, geometry: Geometry, segment: SegmentIndex) -> Option<(Trailer, Option<Tail>)> {
    let end = geometry.first(segment).0 + geometry.blocks;
    let last = read_twice(disk, Position(end - 1), 1).await.ok()?;
    let fits = |trailer: &Trailer| trailer.identity.segment == segment && trailer.blocks() < u64::from(geometry.blocks);
    let trailer = Trailer::decode_last(&last).ok().filter(fits)?;
    let blocks = trailer.tail_blocks() as u32;
    let tail = match blocks {
        1 => trailer.tail(&last).ok(),
        _ => read_twice(disk, Position(end - blocks), blocks).await.ok().and_then(|bytes| trailer.tail(&bytes).ok()),
    };
    Some((trailer, tail))
}

enum Class {
    Empty,
    Sealed(Option<u64>, ReadFooter),
    Unsealed(Opened),
    Lost,
}

/// A use of a segment that has no footer.
struct Opened {
    identity: SegmentIdentity,
    first_batch: BatchNumber,
    opened_s: Option<u64>,
    /// Of the footer that is damaged.
    trailer: Option<Trailer>,
}

/// What the segment is.
async fn classify<D: Disk>(disk: &D, geometry: Geometry, ends: Ends) -> Class {
    let Ends { segment, opening, header, is_unused, trailer, footer, .. } = ends;
    let named = [
        opening.as_ref().map(|opening| opening.identity),
        header.as_ref().map(|header| header.identity),
        trailer.as_ref().map(|trailer| trailer.identity),
    ];
    let Some(newest) = named.into_iter().flatten().max_by_key(|identity| identity.sequence) else {
        return if is_unused { Class::Empty } else { Class::Lost };
    };
    let opening = opening.filter(|opening| opening.identity == newest);
    let opened_s = opening.as_ref().map(|opening| opening.opened_s);
    let header = header.filter(|header| header.identity == newest);
    let unsealed = |first_batch, trailer| Class::Unsealed(Opened { identity: newest, first_batch, opened_s, trailer });
    match (trailer.filter(|trailer| trailer.identity == newest), footer, opening, header) {
        (Some(_), Some(footer), None, None) => {
            let later = search(disk, geometry, segment, |identity| identity.sequence > newest.sequence).await;
            if later.batches.is_empty() { Class::Sealed(None, footer) } else { Class::Lost }
        }
        (Some(_), Some(footer), _, _) => Class::Sealed(opened_s, footer),
        (Some(trailer), None, _, _) => unsealed(trailer.first_batch, Some(trailer)),
        (None, _, _, Some(header)) => unsealed(header.first_batch, None),
        (None, _, Some(opening), None) => unsealed(opening.first_batch, None),
        (None, _, None, None) => unreachable!("one of them named it"),
    }
}

/// The blocks of a footer that hold its data, as far as they can be read.
pub async fn read_data<D: Disk>(disk: &D, geometry: Geometry, footer: &ReadFooter) -> Option<Data<D>> {
    let trailer = &footer.trailer;
    let first = geometry.first(trailer.identity.segment).0 + geometry.blocks - trailer.blocks() as u32;
    match trailer.data_blocks() as u32 {
        0 => Some(Data(None)),
        blocks => read_twice(disk, Position(first), blocks).await.ok().map(|bytes| Data(Some(bytes))),
    }
}

/// Of a footer, not looked at yet.
pub struct Data<D: Disk>(Option<D::Bytes>);

impl ReadFooter {
    /// `None`: it is damaged.
    pub fn entries<'a, D: Disk>(&self, geometry: Geometry, data: &'a Data<D>) -> Option<Entries<'a>> {
        self.trailer.entries(geometry, data.0.as_deref().unwrap_or_default()).ok()
    }
}

/// The footer of a segment that was seen to have one; `None` if it is damaged. `sequence`: of its present use. The
/// footer of an earlier one stands there if the write of this one's was lost or went elsewhere; it lists other records,
/// and who goes by it never finds what is there.
pub async fn footer_of<D: Disk>(
    disk: &D,
    geometry: Geometry,
    segment: SegmentIndex,
    sequence: Option<u64>,
) -> Result<Option<Footer>, DiskError> {
    let end = geometry.first(segment).0 + geometry.blocks;
    let last = read_twice(disk, Position(end - 1), 1).await?;
    let is_of_this_use = |identity: SegmentIdentity| identity.segment == segment && Some(identity.sequence) == sequence;
    let fits = |trailer: &Trailer| is_of_this_use(trailer.identity) && trailer.blocks() < u64::from(geometry.blocks);
    let Some(trailer) = Trailer::decode_last(&last).ok().filter(fits) else { return Ok(None) };
    let blocks = trailer.blocks() as u32;
    let bytes = read_twice(disk, Position(end - blocks), blocks).await?;
    Ok(trailer.finalize(geometry, &bytes).ok())
}

/// Writes the footer of a segment all of whose records are durable.
pub async fn write_footer<D: Disk>(disk: &D, geometry: Geometry, footer: &Footer) -> Result<(), DiskError> {
    let (first, bytes) = footer_at(geometry, footer);
    let mut buffer = disk.allocate(bytes.len());
    buffer.copy_from_slice(&bytes);
    disk.write(Geometry::offset(first), buffer).await
}

/// Where the footer begins, and its blocks.
pub fn footer_at(geometry: Geometry, footer: &Footer) -> (Position, Vec<u8>) {
    let bytes = footer.encode();
    let blocks = (bytes.len() / BLOCK) as u32;
    assert!(blocks < geometry.blocks, "room for the footer is kept while a segment fills");
    (Position(geometry.first(footer.identity.segment).0 + geometry.blocks - blocks), bytes)
}

/// Room that a footer takes, in blocks.
pub fn footer_room(record_bytes: usize) -> u32 {
    footer_blocks(record_bytes) as u32
}
