//! Blocks that cannot be read as they were written, until they are repaired, superseded or dropped; and conflicts:
//! two copies of one version that are whole and differ. Pure: who finds and who repairs is in `reads`, `start`,
//! `cleaner`, `scrub` and `repair`.
//!
//! Both lists are bounded: a disk that rots all over must not eat the memory. What is not listed is counted, and found
//! again by the next read or scrub once there is room.
//!
//! A damaged block is in one of these states:
//! ```text
//!   found ──► due ──► in hand ──► repaired, or gone: no longer listed
//!              ▲         │
//!              └─ pause ◄┘  nobody had it: tried again, later each time
//! ```

use crate::log::Position;
use std::collections::BTreeMap;
use std::time::Duration;
use torus_rpc::runtime::{Instant, Peer};
use torus_schema::ids::{BlockIndex, Version, VolumeId};
use torus_schema::limits::{CONFLICTS_LISTED_MAX, DAMAGED_LISTED_MAX, REPAIR_PAUSE_MAX, REPAIR_PAUSE_MIN};

/// What the index says is at a position, and is not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Damaged {
    pub volume: VolumeId,
    pub block: BlockIndex,
    pub version: Version,
    /// Made by the client; what a repair has to match.
    pub checksum: u32,
    pub position: Position,
}

/// Who came across it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FoundBy {
    /// A client or a peer wanted it.
    Read,
    Scrub,
    /// Recovery: its record stands below something that was synced, its payload is not what the record says.
    Start,
    Cleaner,
}

impl FoundBy {
    pub fn name(self) -> &'static str {
        match self {
            FoundBy::Read => "read",
            FoundBy::Scrub => "scrub",
            FoundBy::Start => "start",
            FoundBy::Cleaner => "cleaner",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListedDamage {
    pub damaged: Damaged,
    pub by: FoundBy,
    pub since: Instant,
    /// Repairs tried so far.
    pub attempts: u32,
    due: Instant,
    in_hand: bool,
}

/// Two valid, different copies at one version: an operator's business, never a vote.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Conflict {
    pub volume: VolumeId,
    pub block: BlockIndex,
    pub version: Version,
    pub checksum_here: u32,
    pub checksum_there: u32,
    pub peer: Peer,
    pub since: Instant,
}

/// Since the shard was opened.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct DamageCounts {
    /// Listed now.
    pub damaged: u64,
    pub found: u64,
    pub repaired: u64,
    /// Of those found, not listed for want of room.
    pub unlisted: u64,
    /// Conflicts found.
    pub conflicts: u64,
    /// Conflicts listed now.
    pub conflicting: u64,
}

/// Both lists, as far as they were asked for.
#[derive(Clone, Default, Debug)]
pub struct DamageReport {
    pub counts: DamageCounts,
    pub blocks: Vec<ListedDamage>,
    pub conflicts: Vec<Conflict>,
    /// For the age of what is listed.
    pub now: Instant,
}

type Key = (VolumeId, BlockIndex, Version);

#[derive(Default)]
pub struct Damage {
    listed: BTreeMap<Key, ListedDamage>,
    conflicts: BTreeMap<Key, Conflict>,
    counts: DamageCounts,
}

impl Damage {
    /// True if it was not known.
    pub fn found(&mut self, damaged: Damaged, by: FoundBy, now: Instant) -> bool {
        let key = (damaged.volume, damaged.block, damaged.version);
        if let Some(listed) = self.listed.get_mut(&key) {
            // The cleaner may have moved it since, and it was damaged there.
            listed.damaged.position = damaged.position;
            return false;
        }
        self.counts.found += 1;
        if self.listed.len() >= DAMAGED_LISTED_MAX {
            self.counts.unlisted += 1;
            return true;
        }
        let listed = ListedDamage { damaged, by, since: now, attempts: 0, due: now, in_hand: false };
        self.listed.insert(key, listed);
        true
    }

    /// Takes up to `limit` of those due in hand.
    pub fn take_due(&mut self, now: Instant, limit: usize) -> Vec<Damaged> {
        let due = self.listed.values_mut().filter(|listed| !listed.in_hand && listed.due <= now);
        due.take(limit)
            .map(|listed| {
                listed.in_hand = true;
                listed.damaged
            })
            .collect()
    }

    /// When the next is due; `None`: nothing is listed that is not in hand.
    pub fn next_due(&self) -> Option<Instant> {
        self.listed.values().filter(|listed| !listed.in_hand).map(|listed| listed.due).min()
    }

    pub fn repaired(&mut self, damaged: &Damaged) {
        if self.remove(damaged) {
            self.counts.repaired += 1;
        }
    }

    /// Something newer is current, or the volume was dropped: nobody asks for it any more.
    pub fn gone(&mut self, damaged: &Damaged) {
        self.remove(damaged);
    }

    /// Nobody had it: later again, after a pause that doubles.
    pub fn not_repaired(&mut self, damaged: &Damaged, now: Instant) {
        let Some(listed) = self.listed.get_mut(&(damaged.volume, damaged.block, damaged.version)) else { return };
        listed.in_hand = false;
        listed.due = now.after(pause_after(listed.attempts));
        listed.attempts = listed.attempts.saturating_add(1);
    }

    /// Peers are known that were not: what waits is tried at once.
    pub fn all_due(&mut self, now: Instant) {
        self.listed.values_mut().for_each(|listed| listed.due = listed.due.min(now));
    }

    fn remove(&mut self, damaged: &Damaged) -> bool {
        self.listed.remove(&(damaged.volume, damaged.block, damaged.version)).is_some()
    }

    /// True if it was not known.
    pub fn conflict(&mut self, conflict: Conflict) -> bool {
        let key = (conflict.volume, conflict.block, conflict.version);
        if self.conflicts.contains_key(&key) {
            return false;
        }
        self.counts.conflicts += 1;
        if self.conflicts.len() < CONFLICTS_LISTED_MAX {
            self.conflicts.insert(key, conflict);
        }
        true
    }

    pub fn conflicts(&self) -> impl Iterator<Item = &Conflict> {
        self.conflicts.values()
    }

    /// Something newer stands there now.
    pub fn settled(&mut self, conflict: &Conflict) {
        self.conflicts.remove(&(conflict.volume, conflict.block, conflict.version));
    }

    pub fn drop_volume(&mut self, volume: VolumeId) {
        self.listed.retain(|(of, _, _), _| *of != volume);
        self.conflicts.retain(|(of, _, _), _| *of != volume);
    }

    /// At most `limit` of each list.
    pub fn report(&self, limit: usize, now: Instant) -> DamageReport {
        let blocks = self.listed.values().take(limit).copied().collect();
        let conflicts = self.conflicts.values().take(limit).cloned().collect();
        DamageReport { counts: self.counts(), blocks, conflicts, now }
    }

    pub fn counts(&self) -> DamageCounts {
        DamageCounts { damaged: self.listed.len() as u64, conflicting: self.conflicts.len() as u64, ..self.counts }
    }
}

fn pause_after(attempts: u32) -> Duration {
    REPAIR_PAUSE_MIN.saturating_mul(1u32.checked_shl(attempts.min(31)).unwrap_or(u32::MAX)).min(REPAIR_PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::ids::Epoch;

    fn damaged(block: u64, sequence: u64) -> Damaged {
        let version = Version::new(Epoch(1), sequence);
        let volume = VolumeId::from_bytes([1; 16]);
        Damaged { volume, block: BlockIndex(block), version, checksum: 7, position: Position(40) }
    }

    fn at(seconds: u64) -> Instant {
        Instant(Duration::from_secs(seconds))
    }

    #[test]
    fn a_block_that_nobody_has_is_tried_again_later_each_time_and_never_given_up() {
        let mut damage = Damage::default();
        assert!(damage.found(damaged(1, 3), FoundBy::Read, at(0)));
        assert!(!damage.found(damaged(1, 3), FoundBy::Scrub, at(0)));
        let mut now = at(0);
        let mut pauses = Vec::new();
        for _ in 0..40 {
            assert_eq!(damage.take_due(now, 8), vec![damaged(1, 3)]);
            assert_eq!((damage.take_due(now, 8), damage.next_due()), (vec![], None), "it is in hand");
            damage.not_repaired(&damaged(1, 3), now);
            let due = damage.next_due().unwrap();
            pauses.push(due.since(now));
            now = due;
        }
        assert_eq!((pauses[0], pauses[39]), (REPAIR_PAUSE_MIN, REPAIR_PAUSE_MAX));
        assert!(pauses.is_sorted());
        assert_eq!(damage.counts().damaged, 1);
        damage.repaired(&damaged(1, 3));
        assert_eq!((damage.counts().damaged, damage.counts().repaired), (0, 1));
        damage.repaired(&damaged(1, 3));
        assert_eq!(damage.counts().repaired, 1, "it was not listed");
    }

    #[test]
    fn the_list_is_bounded_and_what_is_not_listed_is_counted() {
        let mut damage = Damage::default();
        let total = DAMAGED_LISTED_MAX as u64 + 5;
        assert!((0..total).all(|block| damage.found(damaged(block, 3), FoundBy::Scrub, at(0))));
        let counts = damage.counts();
        assert_eq!((counts.found, counts.damaged, counts.unlisted), (total, total - 5, 5));
        damage.drop_volume(damaged(0, 3).volume);
        assert_eq!(damage.counts().damaged, 0);
    }
}
