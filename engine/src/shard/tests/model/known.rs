//! What the model knows of each block: which versions may be there, and which is the least that must be.
//!
//! What was flushed must be there after any crash. If the disk also damaged something, one case is beyond any store of
//! this kind: of the newest batches nothing on the disk says yet that they were synced, so damage to them is taken for a
//! torn tail. So each flush has a *level*, and its proofs are counted: a write sent after it and itself made durable
//! says in its header that what the flush covered is durable, if the shard knew it by then: its mark is one number, and
//! what is durable behind a batch that is still in flight is not under it. With n damages, what has n proofs must be there or be
//! answered as damaged or lost; what has fewer may be older, but nothing that never was. And what a start dropped, as a torn
//! tail or because it could not read the header, is left out of the segment's footer; the header is mended if it can be.
//! Damage to the header and to the footer, two at least, brings it back.

use crate::log::BatchNumber;
use std::collections::{BTreeMap, BTreeSet};
use torus_schema::ids::Version;

#[derive(Default)]
struct Known {
    /// Every version sent that may be there, and whether it is data.
    sent: BTreeMap<Version, bool>,
    /// What was there once, and is superseded by something that nothing proves.
    past: BTreeMap<Version, bool>,
    /// What was taken back, at which level, and whether it was data.
    revoked: BTreeMap<Version, (u64, bool)>,
    /// What a start dropped.
    dropped: BTreeSet<Version>,
    /// The highest that was answered.
    acknowledged: Version,
    /// All that were.
    answered: BTreeSet<Version>,
    /// Of these, what a flush covered. One may be of a lower version than what a flush covered before.
    durable: BTreeSet<Version>,
    /// The highest that a flush of that level covered; ascending in both.
    flushed: Vec<(u64, Version)>,
}

impl Known {
    fn flushed(&mut self, level: u64, version: Version) {
        if self.flushed.last().is_none_or(|(_, last)| *last < version) {
            self.flushed.push((level, version));
        }
    }

    fn may_be(&self, version: Version, damages: u64, level: u64) -> Option<bool> {
        let past = self.past.get(&version).filter(|_| damages > 0);
        let revoked = self.revoked.get(&version).filter(|(at, _)| !is_proven(*at, damages, level));
        self.sent.get(&version).or(past).or(revoked.map(|(_, data)| data)).copied()
    }
}

/// What a flush of level `at` covered must be there in spite of those damages.
fn is_proven(at: u64, damages: u64, level: u64) -> bool {
    damages == 0 || at + damages < level
}

/// What a flush that was answered has made durable.
pub struct Covered {
    /// By block, of each the highest last.
    versions: Vec<(u64, BTreeSet<Version>)>,
    proof: Option<u64>,
}

#[derive(Default)]
pub struct Blocks {
    known: BTreeMap<u64, Known>,
    /// Raised when a write sent at this level is durable.
    level: u64,
    /// The highest level at which something was sent that is answered.
    answered: Option<u64>,
    /// As it is now.
    pub log: Log,
    /// What was flushed so far is durable when batches up to this one are.
    mark: BatchNumber,
}

/// How far the log of the shard under test is.
#[derive(Clone, Copy, Default)]
pub struct Log {
    /// What the next header says is durable.
    pub durable: BatchNumber,
    /// The last number given.
    pub last: BatchNumber,
}

impl Blocks {
    pub fn acknowledged(&self, block: u64) -> Version {
        self.known.get(&block).map(|known| known.acknowledged).unwrap_or_default()
    }

    /// What may be found, and whether it is data. Before anything was written there are zeros.
    pub fn may_be(&self, block: u64, version: Version, damages: u64) -> Option<bool> {
        let zeros = (version == Version::ZERO).then_some(false);
        self.known.get(&block).and_then(|known| known.may_be(version, damages, self.level)).or(zeros)
    }

    /// Though it was dropped.
    pub fn may_be_back(&self, block: u64, version: Version, damages: u64) -> bool {
        damages >= 2 && self.known.get(&block).is_some_and(|known| known.dropped.contains(&version))
    }

    /// Gives the level of which it will be a proof.
    pub fn sent(&mut self, blocks: &[u64], version: Version, data: bool) -> Option<u64> {
        for block in blocks {
            self.known.entry(*block).or_default().sent.insert(version, data);
        }
        (self.log.durable >= self.mark).then_some(self.level)
    }

    pub fn answered(&mut self, blocks: &[u64], version: Version, sent_at: Option<u64>, durable: bool) {
        for block in blocks {
            let known = self.known.entry(*block).or_default();
            known.acknowledged = known.acknowledged.max(version);
            known.answered.insert(version);
        }
        self.answered = self.answered.max(sent_at);
        if durable {
            let versions = blocks.iter().map(|block| (*block, BTreeSet::from([version]))).collect();
            self.flushed(Covered { versions, proof: sent_at });
        }
    }

    /// What a flush that is sent now will cover.
    pub fn covered(&self) -> Covered {
        let versions = self.known.iter().map(|(block, known)| (*block, known.answered.clone())).collect();
        Covered { versions, proof: self.answered }
    }

    pub fn flushed(&mut self, covered: Covered) {
        let level = self.level_now();
        for (block, versions) in covered.versions {
            let known = self.known.entry(block).or_default();
            versions.last().into_iter().for_each(|highest| known.flushed(level, *highest));
            known.durable.extend(versions);
        }
        if covered.proof == Some(level) {
            self.level += 1;
        }
    }

    /// Of what is known to be flushed from now on.
    fn level_now(&mut self) -> u64 {
        self.mark = self.mark.max(self.log.last);
        self.level
    }

    /// The least that must be there after a start.
    pub fn least(&self, block: u64, damages: u64) -> Version {
        let flushed = self.known.get(&block).map(|known| &known.flushed[..]).unwrap_or_default();
        flushed
            .iter()
            .rev()
            .find(|(at, _)| is_proven(*at, damages, self.level))
            .map(|(_, version)| *version)
            .unwrap_or_default()
    }

    /// This is what a start made of it, so it is what stays: what else was sent must never show again.
    pub fn accept(&mut self, block: u64, version: Version, data: bool) {
        let level = self.level_now();
        let known = self.known.entry(block).or_default();
        known.dropped.extend(known.sent.keys().filter(|sent| **sent > version));
        known.dropped.remove(&version);
        let older = std::mem::take(&mut known.sent).into_iter().filter(|(sent, _)| *sent < version);
        known.past.extend(older);
        known.past.retain(|past, _| *past < version);
        known.revoked.remove(&version);
        known.sent = BTreeMap::from([(version, data)]);
        known.acknowledged = version;
        (known.answered, known.durable) = (BTreeSet::from([version]), BTreeSet::from([version]));
        known.flushed.retain(|(_, flushed)| *flushed <= version);
        known.flushed(level, version);
    }

    /// The newest that was answered, and what it superseded; `None` if that is not known for sure.
    pub fn newest_two(&self, block: u64) -> Option<(Version, Version)> {
        let known = self.known.get(&block)?;
        let newest = *known.sent.last_key_value()?.0;
        let before = known.sent.range(..newest).next_back().map(|(version, _)| *version);
        let before = before.or(known.past.is_empty().then_some(Version::ZERO))?;
        (newest == known.acknowledged && newest > Version::ZERO).then_some((newest, before))
    }

    /// It is being taken back: until that is answered a crash may leave it, or `before`, or what it might have left
    /// anyway. That one was answered does not make it durable; the revocation does, when it is durable itself.
    pub fn is_being_revoked(&mut self, block: u64, before: Version) {
        let level = self.level_now();
        let known = self.known.entry(block).or_default();
        known.sent.entry(before).or_insert(false);
        known.flushed.retain(|(_, flushed)| *flushed <= before);
        if known.durable.contains(&before) {
            known.flushed(level, before);
        }
    }

    /// It never was: a revocation is answered when it is durable. On a damaged disk it may be dropped as a torn tail, as
    /// a flush may.
    pub fn revoked(&mut self, block: u64, version: Version, before: Version) {
        let level = self.level_now();
        let known = self.known.entry(block).or_default();
        if let Some(data) = known.sent.remove(&version) {
            known.revoked.insert(version, (level, data));
        }
        known.acknowledged = before;
        known.answered.remove(&version);
        known.durable.insert(before);
        known.flushed(level, before);
    }
}

#[test]
fn what_was_answered_and_not_flushed_may_be_gone_when_a_crash_cuts_a_revocation_short() {
    let version = |sequence| Version::new(torus_schema::ids::Epoch(7), sequence);
    let written = |durable: bool| {
        let mut blocks = Blocks::default();
        for sequence in [1, 2] {
            let sent_at = blocks.sent(&[5], version(sequence), true);
            blocks.answered(&[5], version(sequence), sent_at, durable);
        }
        assert_eq!(blocks.newest_two(5), Some((version(2), version(1))));
        blocks.is_being_revoked(5, version(1));
        blocks
    };
    assert_eq!(written(false).least(5, 0), Version::ZERO);
    let mut blocks = written(true);
    assert_eq!(blocks.least(5, 0), version(1));
    assert_eq!(blocks.may_be(5, version(2), 0), Some(true), "it may not be taken back yet");
    blocks.revoked(5, version(2), version(1));
    assert_eq!((blocks.may_be(5, version(2), 0), blocks.least(5, 0)), (None, version(1)));
    assert_eq!(blocks.may_be(5, version(2), 1), Some(true), "damage may look like a torn tail");
}
