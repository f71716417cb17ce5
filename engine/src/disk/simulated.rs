//! A disk in memory that does to its user whatever a real one may do, decided by a seed.
//!
//! Fault model:
//! * A write that completed is readable; it is durable only after a sync that started after it completed.
//! * At a crash each write that is not durable, in flight or completed, is lost, kept, or torn at sectors of 512 bytes,
//!   each on its own and in any order: a later one may survive an earlier one. Sectors are atomic. In some crashes all
//!   before one of them are lost and all from there on kept, in some the other way round: orders that drawing each
//!   on its own hardly ever gives, and that show what relies on one write being there before another.
//! * A failed write may have reached the disk in part. After a failed sync what it covered may be lost at a crash,
//!   whatever a later sync answers (as Linux does with dirty pages it could not write).
//! * Every operation suspends at least once, for a time drawn from the seed, so that others come in between.
//! * Rot, old and misdirected sectors, bad places, and a disk that is gone: `fault`, when a test asks for it.
//!
//! Not modelled: a sync that lies (whole caches lost after it answered), sectors that change while nobody touches them
//! *and* keep a valid checksum.

mod fault;
mod pages;

use bytes::Bytes;
use fault::FaultState;
pub use fault::{Damage, Faults};
use pages::{PAGE_BYTES, Pages, SECTOR_BYTES};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::runtime::{Clock, Disk, DiskError};

/// An operation takes up to this long, a sync four times as long.
const DELAY_US_MAX: u64 = 200;
/// How much longer a slow one takes.
const SLOW_TIMES: u64 = 100;

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
    current: Pages,
    /// What is there after a crash, whatever happens to the rest.
    durable: Pages,
    /// Not durable yet, by the order of their start.
    volatile: BTreeMap<u64, VolatileWrite>,
    writes_to_fail: u64,
    syncs_to_fail: u64,
    reads_to_fail: u64,
    counts: Counts,
    last_written: u64,
    fault: FaultState,
}

struct VolatileWrite {
    offset: u64,
    bytes: Bytes,
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
            current: Pages::default(),
            durable: Pages::default(),
            volatile: BTreeMap::new(),
            writes_to_fail: 0,
            syncs_to_fail: 0,
            reads_to_fail: 0,
            counts: Counts::default(),
            last_written: 0,
            fault: FaultState::default(),
        };
        Self { clock, state: Rc::new(RefCell::new(state)) }
    }

    /// The power fails: of what was not durable each write is lost, kept or torn, as `seed` says.
    pub fn crash(&self, seed: u64) {
        let state = &mut *self.state.borrow_mut();
        state.random ^= seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        state.life += 1;
        state.current = state.durable.clone();
        let fates: Vec<VolatileWrite> = std::mem::take(&mut state.volatile).into_values().collect();
        match state.random() % 6 {
            0 => state.keep_some(fates, |number, cut| number >= cut),
            1 => state.keep_some(fates, |number, cut| number < cut),
            _ => state.keep_any(fates),
        }
        state.durable = state.current.clone();
    }

    /// The process dies and the machine lives on: every completed write is kept, those in flight may be lost.
    pub fn kill(&self) {
        let state = &mut *self.state.borrow_mut();
        state.life += 1;
        for (_, write) in std::mem::take(&mut state.volatile) {
            if !write.completed && state.random().is_multiple_of(2) {
                state.land(&write);
            }
        }
        state.durable = state.current.clone();
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

    /// Where the write that completed last was asked to go.
    pub fn last_written(&self) -> u64 {
        self.state.borrow().last_written
    }

    /// What a read would give now.
    pub fn peek(&self, offset: u64, bytes: usize) -> Vec<u8> {
        self.state.borrow().current.get(offset, bytes).to_vec()
    }

    fn sleep(&self, times: u64) -> impl Future<Output = ()> + 'static {
        let state = &mut *self.state.borrow_mut();
        let slow = state.fault.faults.slow_one_in;
        let times = if state.is_due(slow) { times * SLOW_TIMES } else { times };
        let drawn = state.random() % (DELAY_US_MAX * times);
        self.clock.sleep(Duration::from_micros(1 + drawn))
    }

    fn error(&self, operation: &'static str, offset: u64, bytes: usize, because: &str) -> DiskError {
        DiskError { place: "a simulated disk".to_string(), operation, offset, bytes, because: because.to_string() }
    }

    async fn write_numbered(&self, offset: u64, buffer: Vec<u8>) -> Result<u64, DiskError> {
        self.check(offset, buffer.len());
        let bytes = buffer.len();
        let (life, number, fails) = {
            let state = &mut *self.state.borrow_mut();
            state.counts.writes += 1;
            state.counts.bytes_written += bytes as u64;
            let number = state.next_write;
            state.next_write += 1;
            let fails = State::due(&mut state.writes_to_fail) || state.fault.vanished;
            if let Some((offset, bytes)) = state.miswrite(offset, buffer.into()).filter(|_| !state.fault.vanished) {
                let write = VolatileWrite { offset, bytes, completed: false, doomed: false };
                state.volatile.insert(number, write);
            }
            (state.life, number, fails)
        };
        self.sleep(1).await;
        let state = &mut *self.state.borrow_mut();
        if state.life != life || fails || state.fault.vanished {
            return Err(self.error("write", offset, bytes, "injected"));
        }
        state.last_written = offset;
        // Otherwise it was one that is lost: only a sync over completed writes or a crash removes others.
        if let Some(mut write) = state.volatile.remove(&number) {
            state.land(&write);
            write.completed = true;
            state.volatile.insert(number, write);
        }
        Ok(number)
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

    fn keep_any(&mut self, mut fates: Vec<VolatileWrite>) {
        while !fates.is_empty() {
            let drawn = self.random() as usize % fates.len();
            let write = fates.swap_remove(drawn);
            match self.random() % 3 {
                0 => {}
                1 => self.land(&write),
                _ => self.tear(&write),
            }
        }
    }

    /// By their place in the order of their start, and where the cut is.
    fn keep_some(&mut self, fates: Vec<VolatileWrite>, kept: impl Fn(u64, u64) -> bool) {
        let cut = self.random() % (fates.len() as u64 + 1);
        for (_, write) in (0..).zip(&fates).filter(|(number, _)| kept(*number, cut)) {
            self.land(write);
        }
    }

    fn land(&mut self, write: &VolatileWrite) {
        let before = &mut self.fault.before;
        self.current.put(write.offset, &write.bytes, |page, bytes| {
            before.insert(page, bytes);
        });
        self.heal(write.offset, write.bytes.len());
    }

    /// The completed write is durable now, or never will be for certain.
    fn synced(&mut self, number: u64, fails: bool) {
        if fails {
            self.volatile.get_mut(&number).into_iter().for_each(|write| write.doomed = true);
        } else if self.volatile.get(&number).is_some_and(|write| !write.doomed) {
            let write = self.volatile.remove(&number).expect("just looked at");
            self.durable.put(write.offset, &write.bytes, |_, _| {});
            let first = write.offset / PAGE_BYTES as u64;
            let pages = first..first + (write.bytes.len() / PAGE_BYTES) as u64;
            self.fault.became_durable(number, pages, self.next_write);
            // What a durable write replaced cannot come back.
            self.volatile.retain(|older, other| *older > number || !other.overlaps(&write));
        }
    }

    fn tear(&mut self, write: &VolatileWrite) {
        for (sector, bytes) in write.bytes.chunks(SECTOR_BYTES).enumerate() {
            if self.random().is_multiple_of(2) {
                let offset = write.offset + (sector * SECTOR_BYTES) as u64;
                self.current.patch(offset, |place| place[..SECTOR_BYTES].copy_from_slice(bytes));
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

impl<C: Clock> Disk for SimulatedDisk<C> {
    type Buffer = Vec<u8>;
    type Bytes = Bytes;

    fn size_bytes(&self) -> u64 {
        self.state.borrow().size_bytes
    }

    /// Holds garbage, as a recycled buffer would: who forgets to fill it is found out.
    fn allocate(&self, bytes: usize) -> Vec<u8> {
        vec![0xa5; bytes]
    }

    async fn read(&self, offset: u64, bytes: usize) -> Result<Bytes, DiskError> {
        self.check(offset, bytes);
        let life = self.state.borrow().life;
        self.sleep(1).await;
        let state = &mut *self.state.borrow_mut();
        state.counts.reads += 1;
        state.counts.bytes_read += bytes as u64;
        if state.life != life {
            return Err(self.error("read", offset, bytes, "the disk crashed"));
        }
        if State::due(&mut state.reads_to_fail) {
            state.fault.damages += 1;
            return Err(self.error("read", offset, bytes, "injected"));
        }
        if state.fault.vanished || state.is_bad(offset, bytes) {
            return Err(self.error("read", offset, bytes, "the place is bad or the disk is gone"));
        }
        let good = state.current.get(offset, bytes);
        Ok(state.misread(offset, good))
    }

    async fn write(&self, offset: u64, buffer: Vec<u8>) -> Result<(), DiskError> {
        self.write_numbered(offset, buffer).await.map(|_| ())
    }

    /// Fails as a sync does, too.
    async fn write_durable(&self, offset: u64, buffer: Vec<u8>) -> Result<(), DiskError> {
        let bytes = buffer.len();
        let (life, fails) = {
            let state = &mut *self.state.borrow_mut();
            state.counts.syncs += 1;
            (state.life, State::due(&mut state.syncs_to_fail))
        };
        let number = self.write_numbered(offset, buffer).await?;
        self.sleep(4).await;
        let state = &mut *self.state.borrow_mut();
        if state.life != life || state.fault.vanished {
            return Err(self.error("durable write", offset, bytes, "the disk crashed or is gone"));
        }
        state.synced(number, fails);
        if fails { Err(self.error("durable write", offset, bytes, "injected")) } else { Ok(()) }
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
        if state.life != life || state.fault.vanished {
            return Err(self.error("sync", 0, 0, "the disk crashed or is gone"));
        }
        covered.into_iter().for_each(|number| state.synced(number, fails));
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
    fn a_durable_write_survives_every_crash_and_takes_nothing_with_it() {
        let mut others = std::collections::BTreeSet::new();
        for seed in 0..50 {
            let (world, disk) = disk(seed);
            let handle = disk.clone();
            world.block_on(async move {
                handle.write(0, vec![9; 4096]).await.unwrap();
                handle.write_durable(8192, vec![7; 8192]).await.unwrap();
            });
            disk.crash(seed);
            assert_eq!(disk.peek(8192, 8192), vec![7; 8192], "seed {seed}");
            others.insert(disk.peek(0, 4096)[0]);
        }
        assert_eq!(others.len(), 2, "what was written before is kept or lost");
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
