//! What footers list, gathered by extent: at a start scattered blocks would miss the cache in the index again and again,
//! and each move what its page holds already. So entries are first put into buckets of some extents, then each bucket
//! is sorted by extent, and all that came of an extent is applied at once (`index::bulk`).
//!
//! Within an extent nothing changes its order: of two copies the later one counts, and what supersedes what is the same
//! as if each entry had been applied when it came. Extents have nothing to do with each other. Only clears are about
//! many of them: what was gathered of those is applied before.

use super::state::Contents;
use crate::index::bulk::{Scratch, Superseded};
use crate::index::{AtTie, Place, Run};
use crate::log::Position;
use crate::log::footer::{Entries, Entry, FlushPoint};
use crate::log::record::{Clear, Record};
use torus_schema::hash::Map;
use torus_schema::ids::{BlockIndex, Epoch, ExtentIndex, Version, VolumeId};
use torus_schema::limits::{BLOCK_BYTES, BLOCKS_PER_EXTENT, SEQUENCE_MAX, VOLUME_BYTES_MAX};

/// What is gathered before it is applied: the more, the fewer times each page is built, and the more memory a start
/// takes beside the index. Half a GiB of footers hold no more than that, if every block was written alone.
const GATHERED_BYTES_MAX: usize = 256 << 20;
/// So few that the ends of all lie in the cache while entries go to one or the other, so many that what one holds does.
const BUCKETS: usize = 512;
/// Extents of a bucket whose number is found without hashing.
const NEAR: usize = 256;
/// For fewer entries than that it is not worth taking a page apart, nor if it holds so many times more blocks.
const RUNS_MIN: usize = 8;
const TIMES_MAX: usize = 16;

/// Of a block's number within its volume, in `Gathered::place`.
const BLOCK_BITS: u32 = 38;
const _: () = assert!(VOLUME_BYTES_MAX / BLOCK_BYTES <= 1 << BLOCK_BITS);
/// Of an extent's, in the key of volume and extent.
const EXTENT_BITS: u32 = BLOCK_BITS - BLOCKS_PER_EXTENT.ilog2();
/// Odd, so that volumes are spread over all buckets.
const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;
/// Of a sequence, beside the count of blocks.
const SEQUENCE_BITS: u32 = 48;
const _: () = assert!(SEQUENCE_MAX < 1 << SEQUENCE_BITS && BLOCKS_PER_EXTENT < 1 << (64 - SEQUENCE_BITS));

/// An entry of a footer, or its part in one extent, without its checksums.
#[derive(Clone, Copy)]
struct Gathered {
    /// Place of its volume in the list, and below that its first block.
    place: u64,
    version: Version,
    position: u32,
    count: usize,
}

/// Of an entry, and behind it one for each checksum.
const WORDS: usize = 6;

impl Gathered {
    fn encode(self) -> [u32; WORDS] {
        let Self { place, version, position, count } = self;
        let sequence = (count as u64) << SEQUENCE_BITS | version.sequence;
        let halves = |whole: u64| (whole as u32, (whole >> 32) as u32);
        let ((place, upper_place), (sequence, upper)) = (halves(place), halves(sequence));
        [place, upper_place, sequence, upper, version.epoch.0, position]
    }

    fn decode(words: &[u32]) -> Self {
        let whole = |at: usize| u64::from(words[at + 1]) << 32 | u64::from(words[at]);
        let (place, sequence) = (whole(0), whole(2));
        let version = Version { epoch: Epoch(words[4]), sequence: sequence & SEQUENCE_MAX };
        Self { place, version, position: words[5], count: (sequence >> SEQUENCE_BITS) as usize }
    }
}

/// Memory in equal chunks, which are used again. All of it is one allocation, which goes back when the start is done:
/// what came in small pieces would stay with the allocator.
#[derive(Default)]
struct Arena {
    words: Vec<u32>,
    spare: Vec<u32>,
}

/// Of a chunk; any entry fits into one.
const CHUNK_WORDS: usize = 4096;
const _: () = assert!(WORDS + BLOCKS_PER_EXTENT as usize <= CHUNK_WORDS);

impl Arena {
    /// Where a chunk begins that nobody uses.
    fn chunk(&mut self) -> u32 {
        self.spare.pop().unwrap_or_else(|| {
            let start = self.words.len();
            self.words.resize(start + CHUNK_WORDS, 0);
            start as u32
        })
    }

    fn at(&self, at: u32) -> Gathered {
        Gathered::decode(&self.words[at as usize..][..WORDS])
    }

    /// The entry there, of the extent of `place`.
    fn run(&self, at: u32, place: Place) -> Run<'_> {
        let Gathered { place: block, version, position, count } = self.at(at);
        let first = Place { block: BlockIndex(block & ((1 << BLOCK_BITS) - 1)), ..place };
        let checksums = &self.words[at as usize + WORDS..][..count];
        Run { first, version, position: Position(position), checksums }
    }

    fn used_bytes(&self) -> usize {
        (self.words.len() - self.spare.len() * CHUNK_WORDS) * size_of::<u32>()
    }
}

/// Entries of some extents, in their order.
#[derive(Default)]
struct Bucket {
    /// Where chunks begin, and where what is in them ends.
    full: Vec<(u32, u32)>,
    open: (u32, u32),
}

impl Bucket {
    fn make_room(&mut self, arena: &mut Arena, words: usize) {
        let (start, end) = self.open;
        if self.is_empty() || (end - start) as usize + words > CHUNK_WORDS {
            if !self.is_empty() {
                self.full.push(self.open);
            }
            let chunk = arena.chunk();
            self.open = (chunk, chunk);
        }
    }

    fn is_empty(&self) -> bool {
        self.open.0 == self.open.1
    }

    /// Where each entry is.
    fn entries<'a>(&'a self, arena: &'a Arena) -> impl Iterator<Item = (u32, Gathered)> + 'a {
        let chunks = self.full.iter().chain(std::iter::once(&self.open)).copied();
        chunks.flat_map(move |(start, end)| {
            let mut next = start;
            std::iter::from_fn(move || {
                let at = (next < end).then_some(next)?;
                let gathered = arena.at(at);
                next += (WORDS + gathered.count) as u32;
                Some((at, gathered))
            })
        })
    }

    fn clear(&mut self, arena: &mut Arena) {
        let used = self.full.drain(..).chain(std::iter::once(std::mem::take(&mut self.open)));
        arena.spare.extend(used.filter(|(start, end)| start != end).map(|(start, _)| start));
    }
}

/// What footers list and is not applied yet.
pub struct Gathering {
    arena: Arena,
    buckets: Vec<Bucket>,
    volumes: Vec<VolumeId>,
    places: Map<VolumeId, u64>,
    sorting: Sorting,
    scratch: Scratch,
    superseded: Vec<Superseded>,
}

impl Default for Gathering {
    fn default() -> Self {
        Self {
            arena: Arena::default(),
            buckets: (0..BUCKETS).map(|_| Bucket::default()).collect(),
            volumes: Vec::new(),
            places: Map::default(),
            sorting: Sorting::default(),
            scratch: Scratch::default(),
            superseded: Vec::new(),
        }
    }
}

impl Gathering {
    pub fn is_full(&self) -> bool {
        self.arena.used_bytes() >= GATHERED_BYTES_MAX
    }

    /// The data of a footer whose flush points and notes, with those of all others, are known.
    pub fn take(&mut self, volumes: &[FlushPoint], entries: Entries, contents: &Contents) {
        let mut place_of = |said: &FlushPoint| {
            let place = *self.places.entry(said.volume).or_insert_with(|| {
                self.volumes.push(said.volume);
                self.volumes.len() as u64 - 1
            });
            (!contents.dropped.contains(&said.volume)).then_some(place << BLOCK_BITS)
        };
        let places: Vec<Option<u64>> = volumes.iter().map(&mut place_of).collect();
        for entry in entries {
            if let Some(volume) = places[entry.volume as usize] {
                self.take_entry(volume | entry.first.0, &entry);
            }
        }
    }

    fn take_entry(&mut self, first: u64, entry: &Entry) {
        let (mut checksums, mut done) = (entry.checksums(), 0);
        while checksums.len() > 0 {
            let place = first + u64::from(done);
            let count = checksums.len().min((BLOCKS_PER_EXTENT - place % BLOCKS_PER_EXTENT) as usize);
            let (position, words) = (entry.position.0 + done, WORDS + count);
            let bucket = &mut self.buckets[bucket_of(place / BLOCKS_PER_EXTENT)];
            bucket.make_room(&mut self.arena, words);
            let (fixed, behind) = self.arena.words[bucket.open.1 as usize..][..words].split_at_mut(WORDS);
            fixed.copy_from_slice(&Gathered { place, version: entry.version, position, count }.encode());
            behind.iter_mut().zip(&mut checksums).for_each(|(word, checksum)| *word = checksum);
            bucket.open.1 += words as u32;
            done += count as u32;
        }
    }

    /// A clear finds what came before it: what it superseded unseen would be kept longer than need be.
    pub fn replay_note(&mut self, note: &Record, contents: &mut Contents) {
        if let Record::Clear(clear) = note {
            self.apply_below(clear, contents);
        }
        contents.replay(note, AtTie::NewcomerWins);
    }

    /// Applies what was gathered of the clear's extents.
    fn apply_below(&mut self, clear: &Clear, contents: &mut Contents) {
        let Some(place) = self.places.get(&clear.volume) else { return };
        let (first, end) = (clear.first.0, clear.first.0.saturating_add(clear.count).min(1 << BLOCK_BITS));
        let extents = first / BLOCKS_PER_EXTENT..end.div_ceil(BLOCKS_PER_EXTENT);
        // Of so many neighbours some lie in each bucket.
        let extents = extents.start..extents.end.min(extents.start.saturating_add(BUCKETS as u64));
        let volume = place << EXTENT_BITS;
        extents.for_each(|extent| self.apply_bucket(bucket_of(volume | extent), contents));
    }

    /// Applies what was gathered, and forgets it.
    pub fn apply(&mut self, contents: &mut Contents) {
        (0..BUCKETS).for_each(|number| self.apply_bucket(number, contents));
        self.volumes.clear();
        self.places.clear();
    }

    fn apply_bucket(&mut self, number: usize, contents: &mut Contents) {
        let bucket = &mut self.buckets[number];
        if bucket.is_empty() {
            return;
        }
        self.sorting.sort(bucket.entries(&self.arena));
        for (key, entries) in self.sorting.extents() {
            let volume = self.volumes[(key >> EXTENT_BITS) as usize];
            let extent = ExtentIndex(key & ((1 << EXTENT_BITS) - 1));
            let slice = contents.slice_of(volume, extent);
            let place = Place { volume, slice, block: extent.first_block() };
            let runs = entries.iter().map(|at| self.arena.run(*at, place));
            contents.replay_extent(place, runs, &mut self.scratch, &mut self.superseded);
        }
        bucket.clear(&mut self.arena);
    }
}

/// Neighbours go to different buckets, and volumes begin with different ones.
fn bucket_of(key: u64) -> usize {
    let volume = key >> EXTENT_BITS;
    (key.wrapping_add(volume.wrapping_mul(STRIDE)) % BUCKETS as u64) as usize
}

/// Where the entries of a bucket are, those of one extent together and in their order.
#[derive(Default)]
struct Sorting {
    groups: Groups,
    /// As they came: the number of the extent, and where the entry is.
    unsorted: Vec<(u32, u32)>,
    sorted: Vec<u32>,
}

/// The extents of a bucket, by number.
#[derive(Default)]
struct Groups {
    numbers: Map<u64, u32>,
    /// Some of them, where they are found sooner: key and number.
    near: Vec<(u64, u32)>,
    /// Of each: its key, and how many entries it has, or later where they end.
    ends: Vec<(u64, u32)>,
}

impl Groups {
    fn clear(&mut self) {
        self.numbers.clear();
        self.ends.clear();
        self.near.clear();
        self.near.resize(NEAR, (u64::MAX, 0));
    }

    #[inline]
    fn number(&mut self, key: u64) -> u32 {
        let near = &mut self.near[(key / BUCKETS as u64) as usize % NEAR];
        if near.0 != key {
            let number = *self.numbers.entry(key).or_insert_with(|| {
                self.ends.push((key, 0));
                self.ends.len() as u32 - 1
            });
            *near = (key, number);
        }
        near.1
    }
}

impl Sorting {
    fn sort(&mut self, entries: impl Iterator<Item = (u32, Gathered)>) {
        let Self { groups, unsorted, sorted } = self;
        groups.clear();
        unsorted.clear();
        for (at, gathered) in entries {
            let group = groups.number(gathered.place / BLOCKS_PER_EXTENT);
            groups.ends[group as usize].1 += 1;
            unsorted.push((group, at));
        }
        let mut start = 0;
        for (_, end) in &mut groups.ends {
            start += std::mem::replace(end, start);
        }
        // Each is written over below.
        sorted.resize(unsorted.len(), 0);
        for (group, at) in unsorted {
            let end = &mut groups.ends[*group as usize].1;
            sorted[*end as usize] = *at;
            *end += 1;
        }
    }

    fn extents(&self) -> impl Iterator<Item = (u64, &[u32])> {
        let mut start = 0;
        self.groups.ends.iter().map(move |(key, end)| {
            let from = std::mem::replace(&mut start, *end as usize);
            (*key, &self.sorted[from..*end as usize])
        })
    }
}

impl Contents {
    /// Runs of one extent in the order in which they count; `place` is its first block.
    fn replay_extent<'a>(
        &mut self,
        place: Place,
        runs: impl ExactSizeIterator<Item = Run<'a>>,
        scratch: &mut Scratch,
        superseded: &mut Vec<Superseded>,
    ) {
        let blocks = place.block.0..place.block.0 + BLOCKS_PER_EXTENT;
        let is_little = runs.len() < RUNS_MIN || self.index.blocks_near(place) > TIMES_MAX * runs.len();
        if is_little || self.has_revoked(place.volume, blocks) {
            return runs.for_each(|run| self.data_run(run, AtTie::NewcomerWins));
        }
        let runs = runs.inspect(|run| self.space.add_live_run(run.position, run.checksums.len() as u32));
        self.index.apply_extent(place, runs, scratch, superseded);
        for Superseded { block, old, by } in superseded.drain(..) {
            self.supersede(Place { block, ..place }, old, by, AtTie::NewcomerWins);
        }
    }
}
