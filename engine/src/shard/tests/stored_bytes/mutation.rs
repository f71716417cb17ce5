//! What happens to bytes on a disk, and a little more: damaged, misplaced, cut, and changed together with the checksum
//! that covers them, as only a broken program would.

use crate::log::BLOCK;
use std::collections::BTreeMap;

/// SplitMix64.
pub struct Chance(u64);

impl Chance {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.u64() % bound.max(1) as u64) as usize
    }

    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    /// Numbers at which counts, lengths and places go wrong, and others.
    pub fn number(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => 1,
            2 => u64::MAX - self.below(3) as u64,
            3 => u64::from(u32::MAX) - self.below(3) as u64,
            4 => 1 << self.below(64),
            5 => (1 << self.below(64)) - 1,
            6 => self.below(300) as u64,
            _ => self.u64(),
        }
    }
}

/// Changes some bytes of them, near `hot` more often than elsewhere.
pub fn change(bytes: &mut [u8], chance: &mut Chance, hot: usize) {
    if bytes.is_empty() {
        return;
    }
    let bound = if chance.one_in(4) { bytes.len() } else { hot.min(bytes.len()) };
    let at = chance.below(bound);
    let aligned = at & !3;
    match chance.below(6) {
        0 => bytes[at] ^= 1 << chance.below(8),
        1 => bytes[at] = chance.u64() as u8,
        2 => put(bytes, aligned, &(chance.number() as u32).to_le_bytes()),
        3 => put(bytes, aligned, &chance.number().to_le_bytes()),
        4 => {
            let length = (1 + chance.below(64)).min(bytes.len() - at);
            let from = chance.below(bytes.len() - length + 1);
            bytes.copy_within(from..from + length, at);
        }
        _ => {
            let length = (1 + chance.below(64)).min(bytes.len() - at);
            bytes[at..at + length].fill(0);
        }
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    let count = value.len().min(bytes.len() - at);
    bytes[at..at + count].copy_from_slice(&value[..count]);
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Where a structure of that magic holds its checksums, as was found in sound ones: whoever changes a format need not
/// change it here too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Seals {
    /// The last checksum, of all bytes of the fixed part before it.
    fixed: usize,
    /// A length of what follows the fixed part, and its checksum.
    body: Option<(usize, usize)>,
}

pub struct Sealer {
    by_magic: BTreeMap<[u8; 8], Seals>,
}

const MAGIC_START: &[u8] = b"TORUS";

impl Sealer {
    /// Learns from blocks of a sound disk.
    pub fn learn(images: &[&[u8]]) -> Self {
        let mut by_magic = BTreeMap::new();
        for image in images {
            for start in starts(image) {
                let structure = &image[start..];
                let magic: [u8; 8] = structure[..8].try_into().expect("eight bytes");
                let Some(found) = seals_of(structure) else { continue };
                let known: &mut Seals = by_magic.entry(magic).or_insert(found);
                known.body = known.body.or(found.body);
            }
        }
        Self { by_magic }
    }

    pub fn knows(&self) -> Vec<String> {
        self.by_magic.keys().map(|magic| String::from_utf8_lossy(magic).into_owned()).collect()
    }

    /// Whether the checksum of a body is known of any.
    pub fn knows_bodies(&self) -> bool {
        self.by_magic.values().any(|seals| seals.body.is_some())
    }

    /// Makes the checksums of the structure at the start of `bytes` hold again, if it is one.
    pub fn seal(&self, bytes: &mut [u8]) {
        let Some(magic) = bytes.get(..8) else { return };
        let Some(seals) = self.by_magic.get(magic) else { return };
        if bytes.len() < seals.fixed + 4 {
            return;
        }
        if let Some((length, checksum)) = seals.body {
            let length = u32_at(bytes, length).unwrap_or(0) as usize;
            let body = bytes.get(seals.fixed + 4..).and_then(|body| body.get(..length));
            let value = body.map_or(0, crc32c::crc32c);
            put(bytes, checksum, &value.to_le_bytes());
        }
        let value = crc32c::crc32c(&bytes[..seals.fixed]);
        put(bytes, seals.fixed, &value.to_le_bytes());
    }
}

/// Of structures in a block file: at the start of a block or, of a trailer, within its last bytes.
pub fn starts(image: &[u8]) -> Vec<usize> {
    let mut found = Vec::new();
    for block in 0..image.len() / BLOCK {
        let tail = (BLOCK - 256..BLOCK).step_by(4);
        let places = std::iter::once(0).chain(tail).map(|at| block * BLOCK + at);
        found.extend(places.filter(|at| image[*at..].starts_with(MAGIC_START)));
    }
    found
}

/// The first place at which the checksum of all before it stands.
fn seals_of(structure: &[u8]) -> Option<Seals> {
    let fixed = (12..512)
        .step_by(4)
        .find(|at| structure.len() >= at + 4 && u32_at(structure, *at) == Some(crc32c::crc32c(&structure[..*at])))?;
    let fields = || (8..fixed).step_by(4);
    let body = fields().find_map(|length| {
        let bytes = u32_at(structure, length).filter(|bytes| *bytes > 0)? as usize;
        let value = crc32c::crc32c(structure.get(fixed + 4..)?.get(..bytes)?);
        fields().find(|at| u32_at(structure, *at) == Some(value)).map(|checksum| (length, checksum))
    });
    Some(Seals { fixed, body })
}
