//! Whatever stands on a disk: no decoder and no start of a shard panics over it, or takes much memory for it.
//!
//! Goal: damage that nobody thought of. Method: block files that real shards left, changed by seed: bits and fields,
//! blocks swapped, copied, emptied, the file cut; half of the time with the checksums made to hold again, since else
//! hardly anything gets past them. A case is its number and nothing else, so that one that fails can be run again:
//! `TORUS_FUZZ_FIRST=<number> TORUS_FUZZ_CASES=1`. More than in every run: `TORUS_FUZZ_CASES=10000000`. Sound structures
//! are kept in `corpus`, beside this file, for these and other fuzzers.

mod allocations;
mod decoders;
mod image;
mod mutation;

use super::harness::{NoMetadata, identity, key, placement, volume};
use crate::index::Place;
use crate::log::BLOCK;
use allocations::Allocations;
use decoders::{changed_footer, decode_as_anything};
use image::{ImageDisk, SEGMENT_BLOCKS, SEGMENTS, image};
use mutation::{Chance, Sealer, change, starts};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use torus_rpc::runtime::simulated::{SimulatedRuntime, World};
use torus_rpc::runtime::{Clock, Runtime};
use torus_schema::ids::{BlockIndex, Version};

const IMAGES: u64 = 12;
/// In every run; `TORUS_FUZZ_CASES` says otherwise.
const CASES: u64 = 30_000;
/// One case in so many starts a shard, which costs as much as some hundred others.
const START_EVERY: u64 = 20;
/// A decoder may take so many times the memory of what it is given, and this for its names.
const DECODED_TIMES_MAX: usize = 16;
const DECODED_BYTES: usize = 4096;
/// A start reads a window of a segment at once, and knows of everything on the disk.
const START_TIMES_MAX: usize = 4;

fn number_of(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap())
}

/// Says which case it was, whatever it died of.
struct Case(u64);

impl Drop for Case {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("case {0}: TORUS_FUZZ_FIRST={0} TORUS_FUZZ_CASES=1 runs it alone", self.0);
        }
    }
}

struct Seeds {
    images: Vec<Rc<[u8]>>,
    /// Image and place of every structure.
    structures: Vec<(usize, usize)>,
    sealer: Sealer,
}

impl Seeds {
    fn new() -> Self {
        let images: Vec<Rc<[u8]>> = (0..IMAGES).map(image).collect();
        let all: Vec<&[u8]> = images.iter().map(|image| &**image).collect();
        let sealer = Sealer::learn(&all);
        let numbered = all.iter().enumerate();
        let structures = numbered.flat_map(|(number, image)| starts(image).into_iter().map(move |at| (number, at)));
        Self { structures: structures.collect(), sealer, images }
    }
}

/// Bytes of one structure and some behind it, changed and given to every decoder.
fn decoder_case(seeds: &Seeds, chance: &mut Chance) {
    let (number, start) = seeds.structures[chance.below(seeds.structures.len())];
    let end = (start / BLOCK + 1 + chance.below(3)) * BLOCK;
    let image = &seeds.images[number];
    let mut bytes = image[start..end.min(image.len())].to_vec();
    for _ in 0..1 + chance.below(4) {
        change(&mut bytes, chance, 400);
    }
    if chance.one_in(2) {
        seeds.sealer.seal(&mut bytes);
    }
    if chance.one_in(8) {
        bytes.truncate(chance.below(bytes.len()));
    }
    check_decoders(&bytes, chance);
}

fn check_decoders(bytes: &[u8], chance: &mut Chance) -> usize {
    let (sound, taken) = allocations::during(|| decode_as_anything(bytes, chance));
    let allowed = DECODED_TIMES_MAX * bytes.len() + DECODED_BYTES;
    assert!(taken.peak <= allowed, "{taken:?} for {} bytes, expected at most {allowed}", bytes.len());
    sound
}

/// The blocks of a disk that are changed, and where it ends.
fn damage(seeds: &Seeds, image: &[u8], chance: &mut Chance) -> (BTreeMap<usize, Vec<u8>>, usize) {
    let mut changed: BTreeMap<usize, Vec<u8>> = BTreeMap::new();
    let blocks = image.len() / BLOCK;
    let known = starts(image);
    if chance.one_in(3)
        && let Some((first, bytes)) = changed_footer(image, chance)
    {
        changed.extend((first..).zip(bytes.chunks(BLOCK).map(<[u8]>::to_vec)));
    }
    for _ in 0..chance.below(6) {
        // Where something stands, mostly.
        let start = if chance.one_in(8) { chance.below(blocks) * BLOCK } else { known[chance.below(known.len())] };
        let (block, within) = (start / BLOCK, start % BLOCK);
        let other = known[chance.below(known.len())] / BLOCK;
        let read = |changed: &BTreeMap<usize, Vec<u8>>, block: usize| {
            changed.get(&block).cloned().unwrap_or_else(|| image[block * BLOCK..][..BLOCK].to_vec())
        };
        let mut bytes = read(&changed, block);
        match chance.below(12) {
            0 => drop(changed.insert(other, bytes.clone())),
            1 => {
                let swapped = read(&changed, other);
                changed.insert(other, std::mem::replace(&mut bytes, swapped));
            }
            2 => bytes.fill(0),
            3 => bytes.iter_mut().for_each(|byte| *byte = chance.u64() as u8),
            _ => {
                change(&mut bytes[within..], chance, 400);
                if chance.one_in(2) {
                    seeds.sealer.seal(&mut bytes[within..]);
                }
            }
        }
        changed.insert(block, bytes);
    }
    let end = if chance.one_in(20) { chance.below(blocks) * BLOCK } else { image.len() };
    (changed, end)
}

/// A shard on a block file that something happened to: it opens or says why not, and answers for every block.
fn start_case(seeds: &Seeds, chance: &mut Chance) {
    let image = seeds.images[chance.below(seeds.images.len())].clone();
    let (changed, end) = damage(seeds, &image, chance);
    let (bytes, seed) = (image.len(), chance.u64());
    let ((), taken) = allocations::during(|| start(ImageDisk::new(image, changed, end), seed));
    check_start(taken, bytes);
}

fn check_start(taken: Allocations, bytes: usize) {
    assert!(taken.largest <= bytes && taken.peak <= START_TIMES_MAX * bytes, "{taken:?} for a disk of {bytes} bytes");
}

fn start(disk: ImageDisk, seed: u64) {
    let world = World::new(seed);
    let process = world.start_process();
    let runtime = SimulatedRuntime::new(&world, process, NoMetadata);
    world.block_on(async move {
        let Ok(shard) = crate::shard::Shard::open(runtime, disk, identity(), key()).await else { return };
        for number in [1, 2].map(volume) {
            let layout = placement(number);
            let described =
                shard.state.borrow().contents.index.describe(number, Version::ZERO, BlockIndex(0), (&layout, None), 64);
            for descriptor in described.0 {
                let slice = layout.slice_of(descriptor.first.extent());
                let place = Place { volume: number, slice, block: descriptor.first };
                // Damaged, refused or right; it returns.
                drop(shard.read(place, descriptor.count.min(8), shard.runtime.clock().now()).await);
            }
        }
        shard.statistics();
    });
    world.kill(process);
}

#[test]
fn no_bytes_on_a_disk_make_a_shard_panic_or_take_much_memory() {
    let seeds = Seeds::new();
    let first = number_of("TORUS_FUZZ_FIRST", 0);
    let count = number_of("TORUS_FUZZ_CASES", CASES);
    let mut starts = 0;
    for number in first..first + count {
        let case = Case(number);
        let mut chance = Chance::new(number);
        if number % START_EVERY == 0 {
            start_case(&seeds, &mut chance);
            starts += 1;
        } else {
            decoder_case(&seeds, &mut chance);
        }
        drop(case);
        if (number + 1) % 1_000_000 == 0 {
            eprintln!("{} cases, {starts} of them starts", number + 1 - first);
        }
    }
}

#[test]
fn the_images_are_sound_and_their_checksums_known() {
    let seeds = Seeds::new();
    assert!(seeds.sealer.knows_bodies() && seeds.sealer.knows().len() == 4, "{:?}", seeds.sealer.knows());
    for image in &seeds.images {
        assert_eq!(image.len() as u64, (16 + SEGMENTS * SEGMENT_BLOCKS) * BLOCK as u64);
        let ((), taken) = allocations::during(|| start(ImageDisk::new(image.clone(), BTreeMap::new(), image.len()), 1));
        check_start(taken, image.len());
    }
    // Sealing what is sealed changes nothing, but for the few that a crash has torn.
    let is_kept = |(number, at): &&(usize, usize)| {
        let sound = &seeds.images[*number][*at..];
        let mut sealed = sound.to_vec();
        seeds.sealer.seal(&mut sealed);
        sealed == sound
    };
    let kept = seeds.structures.iter().filter(is_kept).count();
    assert!(kept * 10 >= seeds.structures.len() * 9, "{kept} of {}", seeds.structures.len());
}

/// One of each kind of a sound image: its place there, and its blocks.
fn kinds(seeds: &Seeds) -> BTreeMap<String, (usize, usize)> {
    let is_sound = |(number, at): &&(usize, usize)| {
        let bytes = &seeds.images[*number][*at..];
        let mut sealed = bytes.to_vec();
        seeds.sealer.seal(&mut sealed);
        sealed == bytes
    };
    let name = |(number, at): &(usize, usize)| {
        let magic = String::from_utf8_lossy(&seeds.images[*number][*at..][..8]).to_lowercase();
        // A footer's is at both its ends.
        if at % BLOCK == 0 { magic } else { format!("{magic}-last") }
    };
    seeds.structures.iter().filter(is_sound).map(|structure| (name(structure), *structure)).collect()
}

#[test]
fn every_field_of_every_structure_may_say_anything() {
    let seeds = Seeds::new();
    let extremes = [0, 1, 1 << 31, u64::from(u32::MAX), 1 << 60, 1 << 63, u64::MAX - 1, u64::MAX];
    let mut chance = Chance::new(3);
    for (number, at) in kinds(&seeds).into_values() {
        let image = &seeds.images[number];
        let first = at / BLOCK;
        for field in (8..160).step_by(4) {
            for value in extremes {
                let mut bytes = image[at..].to_vec();
                let end = (field + 8).min(bytes.len());
                bytes[field..end].copy_from_slice(&value.to_le_bytes()[..end - field]);
                seeds.sealer.seal(&mut bytes);
                let blocks = first..first + bytes.len().div_ceil(BLOCK).min(2);
                let whole = [&image[first * BLOCK..at], &bytes].concat();
                let changed = blocks.zip(whole.chunks(BLOCK).map(<[u8]>::to_vec)).collect();
                bytes.truncate(3 * BLOCK);
                check_decoders(&bytes, &mut chance);
                if field % 8 == 0 {
                    start(ImageDisk::new(image.clone(), changed, image.len()), value);
                }
            }
        }
    }
}

/// `TORUS_FUZZ_CORPUS=write` makes it anew, which a change of a format asks for.
#[test]
fn the_corpus_is_sound_and_harmless_however_it_is_cut() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/shard/tests/stored_bytes/corpus");
    if std::env::var("TORUS_FUZZ_CORPUS").is_ok_and(|text| text == "write") {
        let seeds = Seeds::new();
        for (name, (number, at)) in kinds(&seeds) {
            let (image, first) = (&seeds.images[number], at / BLOCK);
            // A footer ends with the block of its trailer, all else begins where it is found.
            let ranges =
                (1..8).map(|count| if at % BLOCK == 0 { first..first + count } else { first + 1 - count..first + 1 });
            let mut pieces = ranges.map(|blocks| &image[blocks.start * BLOCK..blocks.end * BLOCK]);
            let sound = pieces.find(|bytes| check_decoders(bytes, &mut Chance::new(1)) > 0);
            std::fs::write(folder.join(name), sound.unwrap()).unwrap();
        }
    }
    let mut seen = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        let sound = check_decoders(&bytes, &mut Chance::new(1));
        assert!(sound > 0, "{}: not of this format; TORUS_FUZZ_CORPUS=write makes it anew", path.display());
        for cut in (0..bytes.len()).step_by(7) {
            check_decoders(&bytes[..cut], &mut Chance::new(1));
            check_decoders(&bytes[cut..], &mut Chance::new(1));
        }
        seen += 1;
    }
    assert!(seen >= 4, "{}: {seen} files", folder.display());
}
