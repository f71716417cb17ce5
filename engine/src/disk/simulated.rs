//! A disk in memory that does to its user whatever a real one may do, decided by a seed.
//!
//! Fault model:
//! * A write that completed is readable; it is durable only after a sync that started after it completed.
//! * At a crash each write that is not durable, in flight or completed, is lost, kept, or torn at sectors of 512 bytes,
//!   each on its own and in any order: a later one may survive an earlier one. Sectors are atomic.
//! * A failed write may have reached the disk in part. After a failed sync what it covered may be lost at a crash,
//!   whatever a later sync answers (as Linux does with dirty pages it could not write).
//! * Bytes rot when a test says so (`flip`).
//! * Every operation suspends at least once, for a time drawn from the seed, so that others come in between.
//!
//! It never returns old or misdirected sectors by itself.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::runtime::{Clock, Disk, DiskError};

const SECTOR_BYTES: usize = 512;
const PAGE_BYTES: usize = 4096;
/// An operation takes up to this long, a sync four times as long.
const DELAY_US_MAX: u64 = 200;

/// Clones are the same disk: a test keeps one to crash it and to start again from it.
pub struct SimulatedDisk<C> {
    clock: C,
    state: Rc<RefCell<State>>,
}

impl<C: Clone> Clone for SimulatedDisk<C> {
    fn clone(&self) -> Self {
        Self { clock: self.clock.clone(), state: self.state.clone() }
    }
}

struct State {
    size_bytes: u64,
    random: u64,
    /// Counts crashes: what was in flight before one does not complete after it.
    life: u64,
    next_write: u64,
    /// What is read now.
    current: BTreeMap<u64, Box<[u8; PAGE_BYTES]>>,
    /// What is there after a crash, whatever happens to the rest.
    durable: BTreeMap<u64, Box<[u8; PAGE_BYTES]>>,
    /// Not durable yet, by the order of their start.
    volatile: BTreeMap<u64, VolatileWrite>,
    writes_to_fail: u64,
    syncs_to_fail: u64,
    reads_to_fail: u64,
    counts: Counts,
}

struct VolatileWrite {
    offset: u64,
    bytes: Rc<[u8]>,
    completed: bool,
    /// A sync over it failed: no later sync makes it durable.
    doomed: bool,
}

impl VolatileWrite {
    fn overlaps(&self, other: &VolatileWrite) -> bool {
        self.offset < other.offset + other.bytes.len() as u64 && other.offset < self.offset + self.bytes.len() as u64
    }
}

/// How many operations were started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub reads: u64,
    pub writes: u64,
    pub syncs: u64,
    pub bytes_written: u64,
    pub bytes_read: u64,
}

impl<C: Clock> SimulatedDisk<C> {
    /// Zeros of `size_bytes`, a multiple of the block size.
    pub fn new(clock: C, seed: u64, size_bytes: u64) -> Self {
        assert!(size_bytes.is_multiple_of(PAGE_BYTES as u64));
        let state = State {
            size_bytes,
            random: seed ^ 0x5851_f42d_4c95_7f2d,
            life: 0,
            next_write: 0,
            current: BTreeMap::new(),
            durable: BTreeMap::new(),
            volatile: BTreeMap::new(),
            writes_to_fail: 0,
            syncs_to_fail: 0,
            reads_to_fail: 0,
            counts: Counts::default(),
        };
        Self { clock, state: Rc::new(RefCell::new(state)) }
    }

    /// The power fails: of what was not durable each write is lost, kept or torn, as `seed` says.
    pub fn crash(&self, seed: u64) {
        let state = &mut *self.state.borrow_mut();
        state.random ^= seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        state.life += 1;
        state.current = state.durable.clone();
        let mut fates: Vec<VolatileWrite> = std::mem::take(&mut state.volatile).into_values().collect();
        while !fates.is_empty() {
            let drawn = state.random() as usize % fates.len();
            let write = fates.swap_remove(drawn);
            match state.random() % 3 {
                0 => {}
                1 => put(&mut state.current, write.offset, &write.bytes),
                _ => state.tear(&write),
            }
        }
        state.durable = state.current.clone();
    }

    /// The process dies and the machine lives on: every completed write is kept, those in flight may be lost.
    pub fn kill(&self) {
        let state = &mut *self.state.borrow_mut();
        state.life += 1;
        for (_, write) in std::mem::take(&mut state.volatile) {
            if !write.completed && state.random().is_multiple_of(2) {
                put(&mut state.current, write.offset, &write.bytes);
            }
        }
        state.durable = state.current.clone();
    }

    /// Inverts the bits of `mask` in one byte, durably: rot.
    pub fn flip(&self, offset: u64, mask: u8) {
        let state = &mut *self.state.borrow_mut();
        assert!(offset < state.size_bytes && mask != 0);
        for pages in [&mut state.current, &mut state.durable] {
            let page = pages.entry(offset / PAGE_BYTES as u64).or_insert_with(|| Box::new([0; PAGE_BYTES]));
            page[offset as usize % PAGE_BYTES] ^= mask;
        }
    }

    pub fn fail_writes(&self, count: u64) {
        self.state.borrow_mut().writes_to_fail = count;
    }

    pub fn fail_syncs(&self, count: u64) {
        self.state.borrow_mut().syncs_to_fail = count;
    }

    pub fn fail_reads(&self, count: u64) {
        self.state.borrow_mut().reads_to_fail = count;
    }

    pub fn counts(&self) -> Counts {
        self.state.borrow().counts
    }

    /// What a read would give now.
    pub fn peek(&self, offset: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        get(&self.state.borrow().current, offset, &mut out);
        out
    }

    fn sleep(&self, times: u64) -> impl Future<Output = ()> + 'static {
        let drawn = self.state.borrow_mut().random() % (DELAY_US_MAX * times);
        self.clock.sleep(Duration::from_micros(1 + drawn))
    }

    fn error(&self, operation: &'static str, offset: u64, bytes: usize, because: &str) -> DiskError {
        DiskError { place: "a simulated disk".to_string(), operation, offset, bytes, because: because.to_string() }
    }

    /// Our callers' promise: whole blocks, within the disk.
    fn check(&self, offset: u64, bytes: usize) {
        assert!(offset.is_multiple_of(PAGE_BYTES as u64) && bytes.is_multiple_of(PAGE_BYTES) && bytes > 0);
        let size = self.state.borrow().size_bytes;
        assert!(offset + bytes as u64 <= size, "{bytes} bytes at {offset} of a disk of {size}");
    }
}

impl State {
    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.random ^ (self.random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn tear(&mut self, write: &VolatileWrite) {
        for (sector, bytes) in write.bytes.chunks(SECTOR_BYTES).enumerate() {
            if self.random().is_multiple_of(2) {
                put(&mut self.current, write.offset + (sector * SECTOR_BYTES) as u64, bytes);
            }
        }
    }

    /// One of the faults asked for is due.
    fn due(counter: &mut u64) -> bool {
        let due = *counter > 0;
        *counter = counter.saturating_sub(1);
        due
    }
}

/// `bytes` may start inside a page but never crosses one unless it starts at its beginning.
fn put(pages: &mut BTreeMap<u64, Box<[u8; PAGE_BYTES]>>, offset: u64, bytes: &[u8]) {
    let mut at = offset;
    for chunk in bytes.chunks(PAGE_BYTES) {
        let page = pages.entry(at / PAGE_BYTES as u64).or_insert_with(|| Box::new([0; PAGE_BYTES]));
        let start = at as usize % PAGE_BYTES;
        page[start..start + chunk.len()].copy_from_slice(chunk);
        at += chunk.len() as u64;
    }
}

fn get(pages: &BTreeMap<u64, Box<[u8; PAGE_BYTES]>>, offset: u64, out: &mut [u8]) {
    for (number, chunk) in out.chunks_mut(PAGE_BYTES).enumerate() {
        match pages.get(&(offset / PAGE_BYTES as u64 + number as u64)) {
            Some(page) => chunk.copy_from_slice(&page[..chunk.len()]),
            None => chunk.fill(0),
        }
    }
}

impl<C: Clock> Disk for SimulatedDisk<C> {
    type Buffer = Vec<u8>;
    type Bytes = bytes::Bytes;

    fn size_bytes(&self) -> u64 {
        self.state.borrow().size_bytes
    }

    /// Holds garbage, as a recycled buffer would: who forgets to fill it is found out.
    fn allocate(&self, bytes: usize) -> Vec<u8> {
        vec![0xa5; bytes]
    }

    async fn read(&self, offset: u64, bytes: usize) -> Result<bytes::Bytes, DiskError> {
        self.check(offset, bytes);
        let life = self.state.borrow().life;
        self.sleep(1).await;
        let state = &mut *self.state.borrow_mut();
        state.counts.reads += 1;
        state.counts.bytes_read += bytes as u64;
        if state.life != life || State::due(&mut state.reads_to_fail) {
            return Err(self.error("read", offset, bytes, "injected"));
        }
        let mut out = vec![0; bytes];
        get(&state.current, offset, &mut out);
        Ok(out.into())
    }

    async fn write(&self, offset: u64, buffer: Vec<u8>) -> Result<(), DiskError> {
        self.check(offset, buffer.len());
        let bytes: Rc<[u8]> = buffer.into();
        let (life, number, fails) = {
            let state = &mut *self.state.borrow_mut();
            state.counts.writes += 1;
            state.counts.bytes_written += bytes.len() as u64;
            let number = state.next_write;
            state.next_write += 1;
            let write = VolatileWrite { offset, bytes: bytes.clone(), completed: false, doomed: false };
            state.volatile.insert(number, write);
            (state.life, number, State::due(&mut state.writes_to_fail))
        };
        self.sleep(1).await;
        let state = &mut *self.state.borrow_mut();
        if state.life != life || fails {
            return Err(self.error("write", offset, bytes.len(), "injected"));
        }
        put(&mut state.current, offset, &bytes);
        let write = state.volatile.get_mut(&number).expect("only a sync over completed writes or a crash removes it");
        write.completed = true;
        Ok(())
    }

    async fn sync(&self) -> Result<(), DiskError> {
        let (life, covered, fails) = {
            let state = &mut *self.state.borrow_mut();
            state.counts.syncs += 1;
            let covered: Vec<u64> =
                state.volatile.iter().filter(|(_, write)| write.completed).map(|(number, _)| *number).collect();
            (state.life, covered, State::due(&mut state.syncs_to_fail))
        };
        self.sleep(4).await;
        let state = &mut *self.state.borrow_mut();
        if state.life != life {
            return Err(self.error("sync", 0, 0, "the disk crashed"));
        }
        for number in covered {
            if fails {
                state.volatile.get_mut(&number).into_iter().for_each(|write| write.doomed = true);
            } else if state.volatile.get(&number).is_some_and(|write| !write.doomed) {
                let write = state.volatile.remove(&number).expect("just looked at");
                put(&mut state.durable, write.offset, &write.bytes);
                // What a durable write replaced cannot come back.
                state.volatile.retain(|older, other| *older > number || !other.overlaps(&write));
            }
        }
        if fails { Err(self.error("sync", 0, 0, "injected")) } else { Ok(()) }
    }

    async fn discard(&self, _offset: u64, _bytes: u64) -> Result<(), DiskError> {
        self.sleep(1).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_rpc::runtime::simulated::{Here, World};

    fn disk(seed: u64) -> (World, SimulatedDisk<Here>) {
        let world = World::new(seed);
        let here = Here { world: world.clone(), process: world.start_process() };
        (world, SimulatedDisk::new(here, seed, 1 << 20))
    }

    #[test]
    fn what_was_synced_survives_every_crash() {
        for seed in 0..50 {
            let (world, disk) = disk(seed);
            let handle = disk.clone();
            world.block_on(async move {
                handle.write(8192, vec![7; 8192]).await.unwrap();
                handle.sync().await.unwrap();
                handle.write(0, vec![9; 4096]).await.unwrap();
            });
            disk.crash(seed);
            assert_eq!(disk.peek(8192, 8192), vec![7; 8192], "seed {seed}");
        }
    }

    #[test]
    fn what_was_not_synced_is_lost_kept_or_torn_at_sectors() {
        let mut seen = std::collections::BTreeSet::new();
        for seed in 0..50 {
            let (world, disk) = disk(seed);
            let handle = disk.clone();
            world.block_on(async move { handle.write(0, vec![9; 4096]).await.unwrap() });
            disk.crash(seed);
            let sectors = disk.peek(0, 4096).chunks(512).map(|sector| sector[0] == 9).filter(|kept| *kept).count();
            assert!(disk.peek(0, 4096).chunks(512).all(|sector| sector.iter().all(|byte| *byte == sector[0])));
            seen.insert(sectors);
        }
        assert!(seen.contains(&0) && seen.contains(&8) && seen.len() > 4, "{seen:?}");
    }

    #[test]
    fn a_write_still_in_flight_when_a_sync_starts_is_not_made_durable_by_it() {
        let lost = (0..50).any(|seed| {
            let (world, disk) = disk(seed);
            let handle = disk.clone();
            world.block_on(async move {
                let (sync, write) = futures::join!(handle.sync(), handle.write(0, vec![9; 4096]));
                sync.and(write).unwrap();
            });
            disk.crash(seed);
            disk.peek(0, 4096)[0] != 9
        });
        assert!(lost);
    }
}
