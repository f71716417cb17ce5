//! What a simulated disk does wrong beyond losing what was not synced. Every kind is off until a test asks for it, and
//! drawn from the disk's seed.
//!
//! | kind                  | how long                | what happens                                                    |
//! |-----------------------|-------------------------|-----------------------------------------------------------------|
//! | `read_rot_one_in`     | this read               | some bits of one page are inverted                              |
//! | `read_old_one_in`     | this read               | one page is as it was before it was last written                |
//! | `read_elsewhere_one_in` | this read             | one page is that of another place                               |
//! | `write_rot_one_in`    | until written again     | some bits of one page are inverted                              |
//! | `write_lost_one_in`   | until written again     | the write completes and never happened                          |
//! | `write_elsewhere_one_in` | until written again  | the write completes and stands at another place                 |
//! | `slow_one_in`         | this operation          | it takes a hundred times as long; no damage                     |
//! | `SimulatedDisk::damage` | until written again   | one page that is in use rots, is old, or holds another place's  |
//! | `SimulatedDisk::damage_at` | until written again  | the same to one page that the test names                        |
//! | `SimulatedDisk::make_bad` | until written again | reads of the place fail                                         |
//! | `SimulatedDisk::vanish` | until `reappear`      | every operation fails                                           |
//! | `fail_reads`, `_writes`, `_syncs` | so many     | the next ones fail; see `simulated`                             |
//!
//! Places are drawn near by or anywhere, half each: what lies in the same segment misleads more. One of another place
//! that begins like it (`Damage::Twin`) misleads most: a header where another header should be.

use super::pages::{PAGE_BYTES, Pages};
use super::{SimulatedDisk, State};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};
use torus_rpc::runtime::Clock;

/// A page near by is at most so far away.
const NEAR_PAGES: u64 = 40;
/// What twins have in common: as much as a format usually begins with.
const TWIN_BYTES: usize = 8;

/// One operation in so many; 0: none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    pub read_rot_one_in: u64,
    pub read_old_one_in: u64,
    pub read_elsewhere_one_in: u64,
    pub write_rot_one_in: u64,
    pub write_lost_one_in: u64,
    pub write_elsewhere_one_in: u64,
    pub slow_one_in: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    Rot,
    Old,
    Elsewhere,
    /// Of a place near by that begins with the same bytes; if there is none, nothing happens.
    Twin,
}

/// One proof may be what is damaged next.
const PROOFS: usize = 3;
const DURABLE_WRITES_KNOWN: usize = 32;

#[derive(Default)]
pub(super) struct FaultState {
    pub faults: Faults,
    /// What a page held before it was last written.
    pub before: BTreeMap<u64, Bytes>,
    pub bad: BTreeSet<u64>,
    pub vanished: bool,
    /// How often what is on the disk, or what was read from it, was made something else.
    pub damages: u64,
    /// For each page the number of the first write that can begin after it became durable.
    durable_before: BTreeMap<u64, u64>,
    /// The newest durable writes: number, first page.
    durable_writes: BTreeMap<u64, u64>,
}

impl FaultState {
    /// The write of that number to these pages became durable; `next` is the number of the next one.
    pub fn became_durable(&mut self, number: u64, pages: std::ops::Range<u64>, next: u64) {
        self.durable_writes.insert(number, pages.start);
        if self.durable_writes.len() > DURABLE_WRITES_KNOWN {
            self.durable_writes.pop_first();
        }
        self.durable_before.extend(pages.map(|page| (page, next)));
    }
}

impl<C: Clock> SimulatedDisk<C> {
    pub fn set_faults(&self, faults: Faults) {
        self.state.borrow_mut().fault.faults = faults;
    }

    /// Counts all that was damaged so far. A write that stands elsewhere counts for each page it fell upon, and one more.
    pub fn damages(&self) -> u64 {
        self.state.borrow().fault.damages
    }

    /// Inverts the bits of `mask` in one byte, durably: rot.
    pub fn flip(&self, offset: u64, mask: u8) {
        let state = &mut *self.state.borrow_mut();
        assert!(offset < state.size_bytes && mask != 0);
        for pages in [&mut state.current, &mut state.durable] {
            pages.patch(offset, |bytes| bytes[0] ^= mask);
        }
        state.fault.damages += 1;
    }

    /// Pages that hold something durably of which a log that begins at `log` can know that it was durable: several of
    /// its writes that began after that are durable themselves. Not what was written over since. Ascending.
    pub fn proven_pages(&self, log: u64) -> Vec<u64> {
        let state = self.state.borrow();
        let fault = &state.fault;
        let proofs = fault.durable_writes.iter().rev().filter(|(_, page)| **page >= log);
        let Some((proof, _)) = proofs.take(PROOFS).nth(PROOFS - 1) else { return Vec::new() };
        let volatile = state.volatile.values().flat_map(|write| pages_of(write.offset, write.bytes.len()));
        let volatile: BTreeSet<u64> = volatile.collect();
        let proven = fault.durable_before.iter().filter(|(page, next)| *next <= proof && !volatile.contains(page));
        proven.map(|(page, _)| *page).collect()
    }

    /// Damages one page that was written, durably. Says which one; `None` if there is none that could be.
    pub fn damage(&self, damage: Damage) -> Option<u64> {
        let state = &mut *self.state.borrow_mut();
        let numbers = state.durable.numbers();
        let page = *numbers.get(state.random() as usize % numbers.len().max(1))?;
        state.spoil(damage, page).then_some(page)
    }

    /// Damages the page at that place, durably. False if that changes nothing.
    pub fn damage_at(&self, damage: Damage, offset: u64) -> bool {
        self.state.borrow_mut().spoil(damage, offset / PAGE_BYTES as u64)
    }

    /// Pages of that range that are durable and begin with those bytes.
    pub fn beginning_with(&self, begin: &[u8], range: std::ops::Range<u64>) -> Vec<u64> {
        let state = self.state.borrow();
        let offsets = range.step_by(PAGE_BYTES);
        offsets.filter(|offset| state.durable.page(offset / PAGE_BYTES as u64).starts_with(begin)).collect()
    }

    /// Nothing there fails to be read, apart from what fails once.
    pub fn is_readable(&self, offset: u64, bytes: usize) -> bool {
        let state = self.state.borrow();
        !state.fault.vanished && !state.is_bad(offset, bytes)
    }

    /// The pages around this place cannot be read until they are written again.
    pub fn make_bad(&self, offset: u64, bytes: usize) {
        let state = &mut *self.state.borrow_mut();
        state.fault.damages += 1;
        state.fault.bad.extend(pages_of(offset, bytes));
    }

    /// As if pulled out.
    pub fn vanish(&self) {
        self.state.borrow_mut().fault.vanished = true;
    }

    pub fn reappear(&self) {
        self.state.borrow_mut().fault.vanished = false;
    }
}

impl State {
    pub(super) fn is_due(&mut self, one_in: u64) -> bool {
        one_in > 0 && self.random().is_multiple_of(one_in)
    }

    /// Another page than this, within the disk.
    fn another(&mut self, page: u64) -> u64 {
        let pages = self.size_bytes / PAGE_BYTES as u64;
        if self.random().is_multiple_of(2) {
            return (page + 1 + self.random() % (pages - 1)) % pages;
        }
        let distance = 1 + self.random() % NEAR_PAGES;
        if self.random().is_multiple_of(2) { (page + distance).min(pages - 1) } else { page.saturating_sub(distance) }
    }

    fn twin(&mut self, page: u64) -> Option<u64> {
        let begin = self.current.page(page);
        let begin = &begin[..TWIN_BYTES];
        let near = page.saturating_sub(NEAR_PAGES)..(page + NEAR_PAGES).min(self.size_bytes / PAGE_BYTES as u64);
        let is_twin = |other: &u64| *other != page && self.current.page(*other).starts_with(begin);
        let twins: Vec<u64> = near.filter(is_twin).collect();
        twins.get(self.random() as usize % twins.len().max(1)).copied()
    }

    /// For good. False if that changes nothing.
    fn spoil(&mut self, damage: Damage, page: u64) -> bool {
        let Some(bytes) = self.damaged(damage, page) else { return false };
        for pages in [&mut self.current, &mut self.durable] {
            pages.put(page * PAGE_BYTES as u64, &bytes, |_, _| {});
        }
        self.fault.damages += 1;
        tracing::debug!(page, ?damage, "damaged");
        true
    }

    /// What stands at `page` when it is damaged so; `None` if that changes nothing.
    fn damaged(&mut self, damage: Damage, page: u64) -> Option<Bytes> {
        let good = self.current.page(page);
        let bytes = match damage {
            Damage::Rot => self.rotten(&good),
            Damage::Old => self.fault.before.get(&page).cloned().unwrap_or_else(|| Pages::default().page(page)),
            Damage::Elsewhere => {
                let other = self.another(page);
                self.current.page(other)
            }
            Damage::Twin => {
                let other = self.twin(page)?;
                self.current.page(other)
            }
        };
        (bytes != good).then_some(bytes)
    }

    fn rotten(&mut self, good: &Bytes) -> Bytes {
        let mut bytes = good.to_vec();
        // Half of them at the start, where headers have all they say.
        let range = if self.random().is_multiple_of(2) { 256 } else { PAGE_BYTES };
        for _ in 0..1 + self.random() % 3 {
            let at = self.random() as usize % range;
            bytes[at] ^= 1 << (self.random() % 8);
        }
        bytes.into()
    }

    /// What a read gives that should have given `good`.
    pub(super) fn misread(&mut self, offset: u64, good: Bytes) -> Bytes {
        let Faults { read_rot_one_in, read_old_one_in, read_elsewhere_one_in, .. } = self.fault.faults;
        let kinds = [
            (read_rot_one_in, Damage::Rot),
            (read_old_one_in, Damage::Old),
            (read_elsewhere_one_in, Damage::Elsewhere),
        ];
        let Some((_, damage)) = kinds.into_iter().find(|(one_in, _)| self.is_due(*one_in)) else { return good };
        let number = self.random() as usize % (good.len() / PAGE_BYTES);
        let Some(page) = self.damaged(damage, offset / PAGE_BYTES as u64 + number as u64) else { return good };
        self.fault.damages += 1;
        tracing::debug!(page = offset / PAGE_BYTES as u64 + number as u64, ?damage, "misread");
        let mut bytes = good.to_vec();
        bytes[number * PAGE_BYTES..][..PAGE_BYTES].copy_from_slice(&page);
        bytes.into()
    }

    /// Where and what a write really writes; `None`: nothing.
    pub(super) fn miswrite(&mut self, offset: u64, bytes: Bytes) -> Option<(u64, Bytes)> {
        let Faults { write_rot_one_in, write_lost_one_in, write_elsewhere_one_in, .. } = self.fault.faults;
        if self.is_due(write_lost_one_in) {
            self.fault.damages += 1;
            tracing::debug!(page = offset / PAGE_BYTES as u64, pages = bytes.len() / PAGE_BYTES, "write lost");
            return None;
        }
        if self.is_due(write_elsewhere_one_in) {
            let pages = (bytes.len() / PAGE_BYTES) as u64;
            self.fault.damages += 1 + pages;
            let place = self.another(offset / PAGE_BYTES as u64).min(self.size_bytes / PAGE_BYTES as u64 - pages);
            tracing::debug!(page = offset / PAGE_BYTES as u64, pages, place, "write elsewhere");
            return Some((place * PAGE_BYTES as u64, bytes));
        }
        if self.is_due(write_rot_one_in) {
            self.fault.damages += 1;
            let at = self.random() as usize % (bytes.len() / PAGE_BYTES) * PAGE_BYTES;
            tracing::debug!(page = (offset + at as u64) / PAGE_BYTES as u64, "write rots");
            let page = self.rotten(&bytes.slice(at..at + PAGE_BYTES));
            let mut rotten = bytes.to_vec();
            rotten[at..at + PAGE_BYTES].copy_from_slice(&page);
            return Some((offset, rotten.into()));
        }
        Some((offset, bytes))
    }

    pub(super) fn is_bad(&self, offset: u64, bytes: usize) -> bool {
        !self.fault.bad.is_empty() && self.fault.bad.range(pages_of(offset, bytes)).next().is_some()
    }

    /// A sector that is written is a good one again: disks have spare ones.
    pub(super) fn heal(&mut self, offset: u64, bytes: usize) {
        if !self.fault.bad.is_empty() {
            pages_of(offset, bytes).for_each(|page| {
                self.fault.bad.remove(&page);
            });
        }
    }
}

fn pages_of(offset: u64, bytes: usize) -> std::ops::Range<u64> {
    offset / PAGE_BYTES as u64..(offset + bytes as u64).div_ceil(PAGE_BYTES as u64)
}
