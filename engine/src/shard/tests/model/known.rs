//! What the model knows of each block: which versions may be there, and which is the least that must be.
//!
//! What was flushed must be there after any crash. If the disk also damaged something, one case is beyond any store of
//! this kind: of the newest batches nothing on the disk says yet that they were synced, so damage to them is taken for a
//! torn tail. So each flush has a *level*, and its proofs are counted: a write sent after it and itself made durable
//! says in its header that what the flush covered is durable. With n damages, what has n proofs must be there or be
//! answered as damaged or lost; what has fewer may be older, but nothing that never was.

use std::collections::BTreeMap;
use torus_schema::ids::Version;

#[derive(Default)]
struct Known {
    /// Every version sent that may be there, and whether it is data.
    sent: BTreeMap<Version, bool>,
    /// What was there once, and is superseded by something that nothing proves.
    past: BTreeMap<Version, bool>,
    /// The highest that was answered.
    acknowledged: Version,
    /// The highest that a flush of that level covered; ascending in both.
    flushed: Vec<(u64, Version)>,
}

impl Known {
    fn flushed(&mut self, level: u64, version: Version) {
        if self.flushed.last().is_none_or(|(_, last)| *last < version) {
            self.flushed.push((level, version));
        }
    }

    fn may_be(&self, version: Version, damages: u64) -> Option<bool> {
        let past = self.past.get(&version).filter(|_| damages > 0);
        self.sent.get(&version).or(past).copied()
    }
}

/// What a flush that was answered has made durable.
pub struct Covered {
    versions: Vec<(u64, Version)>,
    proof: Option<u64>,
}

#[derive(Default)]
pub struct Blocks {
    known: BTreeMap<u64, Known>,
    /// Raised when a write sent at this level is durable.
    level: u64,
    /// The highest level at which something was sent that is answered.
    answered: Option<u64>,
}

impl Blocks {
    pub fn acknowledged(&self, block: u64) -> Version {
        self.known.get(&block).map(|known| known.acknowledged).unwrap_or_default()
    }

    /// What may be found, and whether it is data. Before anything was written there are zeros.
    pub fn may_be(&self, block: u64, version: Version, damages: u64) -> Option<bool> {
        let zeros = (version == Version::ZERO).then_some(false);
        self.known.get(&block).and_then(|known| known.may_be(version, damages)).or(zeros)
    }

    /// Gives the level at which it was sent.
    pub fn sent(&mut self, blocks: &[u64], version: Version, data: bool) -> u64 {
        for block in blocks {
            self.known.entry(*block).or_default().sent.insert(version, data);
        }
        self.level
    }

    pub fn answered(&mut self, blocks: &[u64], version: Version, sent_at: u64, durable: bool) {
        for block in blocks {
            let known = self.known.entry(*block).or_default();
            known.acknowledged = known.acknowledged.max(version);
        }
        self.answered = self.answered.max(Some(sent_at));
        if durable {
            let versions = blocks.iter().map(|block| (*block, version)).collect();
            self.flushed(Covered { versions, proof: Some(sent_at) });
        }
    }

    /// What a flush that is sent now will cover.
    pub fn covered(&self) -> Covered {
        let versions = self.known.iter().map(|(block, known)| (*block, known.acknowledged)).collect();
        Covered { versions, proof: self.answered }
    }

    pub fn flushed(&mut self, covered: Covered) {
        let level = self.level;
        for (block, version) in covered.versions {
            self.known.entry(block).or_default().flushed(level, version);
        }
        if covered.proof == Some(level) {
            self.level += 1;
        }
    }

    /// The least that must be there after a start.
    pub fn least(&self, block: u64, damages: u64) -> Version {
        let is_proven = |level: u64| damages == 0 || level + damages < self.level;
        let flushed = self.known.get(&block).map(|known| &known.flushed[..]).unwrap_or_default();
        flushed.iter().rev().find(|(level, _)| is_proven(*level)).map(|(_, version)| *version).unwrap_or_default()
    }

    /// This is what a start made of it, so it is what stays: what else was sent must never show again.
    pub fn accept(&mut self, block: u64, version: Version, data: bool) {
        let level = self.level;
        let known = self.known.entry(block).or_default();
        let older = std::mem::take(&mut known.sent).into_iter().filter(|(sent, _)| *sent < version);
        known.past.extend(older);
        known.past.retain(|past, _| *past < version);
        known.sent = BTreeMap::from([(version, data)]);
        known.acknowledged = version;
        known.flushed.retain(|(_, flushed)| *flushed <= version);
        known.flushed(level, version);
    }
}
