//! Goal: nothing flushed is ever lost, torn, or replaced by something older, whatever comes between; what was not
//! flushed is, block by block, as it was written or not there at all.
//!
//! Method: a seed draws rounds of concurrent writes, clears, reads and flushes over few blocks, on a shard of few and
//! tiny segments (so that cleaning and reuse happen all the time), with power failures and kills in the middle of a
//! round. A plain map knows every version ever sent for each block, and which is the least that must be there. Another
//! volume is made, filled and dropped meanwhile.

use super::harness::*;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::message::{Operation, Refusal};
use torus_rpc::runtime::simulated::World;
use torus_schema::ids::*;

const EXTENTS: u64 = 5;
const BLOCKS_USED: u64 = 40;
const SEEDS: u64 = 250;

/// What is known of one block.
#[derive(Default, Clone)]
struct Known {
    /// Every version sent that may be there, and whether it is data.
    sent: BTreeMap<Version, bool>,
    /// The highest that was answered.
    acknowledged: Version,
    /// The highest that a flush covered.
    flushed: Version,
}

struct Test {
    world: World,
    machine: Machine,
    client: Client,
    blocks: RefCell<BTreeMap<u64, Known>>,
    trouble: Cell<u8>,
}

fn block_at(number: u64) -> u64 {
    (number / BLOCKS_USED) * 1024 + number % BLOCKS_USED
}

impl Test {
    fn blocks_of(&self, first: u64, end: u64) -> Vec<u64> {
        (0..EXTENTS * BLOCKS_USED).map(block_at).filter(|block| *block >= first && *block < end).collect()
    }

    fn sent(&self, blocks: &[u64], version: Version, data: bool) {
        for block in blocks {
            self.blocks.borrow_mut().entry(*block).or_default().sent.insert(version, data);
        }
    }

    fn acknowledged(&self, blocks: &[u64], version: Version, durable: bool) {
        for block in blocks {
            let mut known = self.blocks.borrow_mut();
            let known = known.get_mut(block).unwrap();
            known.acknowledged = known.acknowledged.max(version);
            if durable {
                known.flushed = known.flushed.max(version);
            }
        }
    }

    /// Told, or the shard died meanwhile: then nobody is told anything.
    fn expect_answered<T>(&self, result: Result<T, Refusal>) -> bool {
        match result {
            Ok(_) => true,
            Err(refusal) => {
                panic!("seed {}: {refusal}", self.world.seed());
            }
        }
    }

    async fn write(self: Rc<Self>) {
        let world = &self.world;
        let start = world.random_below(BLOCKS_USED - 1);
        let count = 1 + world.random_below((BLOCKS_USED - start).min(if world.one_in(4) { 24 } else { 3 }));
        let first = world.random_below(EXTENTS) * 1024 + start;
        let (version, durable) = (self.client.next_version(), world.one_in(8));
        let blocks: Vec<u64> = (first..first + count).collect();
        self.sent(&blocks, version, true);
        let (operation, payload) = Client::write_operation(first, count, version, durable);
        // Some arrive late, behind others with higher versions.
        world.sleep(Duration::from_micros(world.random_below(300))).await;
        if self.expect_answered(self.client.call_with(operation, payload).await) {
            self.acknowledged(&blocks, version, durable);
        }
    }

    async fn clear(self: Rc<Self>) {
        let world = &self.world;
        let (a, b) = (world.random_below(EXTENTS * 1024), world.random_below(EXTENTS * 1024));
        let (first, end) = if world.one_in(3) { (0, 8 * 1024) } else { (a.min(b), a.max(b) + 1) };
        let volume = self.client.volume;
        let slices = placement(volume).slices().to_vec();
        let slice = slices[world.random_below(slices.len() as u64) as usize];
        let inside = |block: &u64| placement(volume).slice_of(BlockIndex(*block).extent()) == slice;
        let blocks: Vec<u64> = self.blocks_of(first, end).into_iter().filter(inside).collect();
        let (version, durable) = (self.client.next_version(), world.one_in(8));
        self.sent(&blocks, version, false);
        world.sleep(Duration::from_micros(world.random_below(300))).await;
        let first = BlockIndex(first);
        let operation = Operation::Clear { first, count: end - first.0, slice, version, durable };
        if self.expect_answered(self.client.call(operation).await) {
            self.acknowledged(&blocks, version, durable);
        }
    }

    async fn flush(self: Rc<Self>) {
        let covered: Vec<(u64, Version)> =
            self.blocks.borrow().iter().map(|(block, known)| (*block, known.acknowledged)).collect();
        if self.expect_answered(self.client.call(Operation::Flush).await) {
            for (block, version) in covered {
                let mut blocks = self.blocks.borrow_mut();
                let known = blocks.get_mut(&block).unwrap();
                known.flushed = known.flushed.max(version);
            }
        }
    }

    async fn read(self: Rc<Self>) {
        let first = self.world.random_below(EXTENTS) * 1024;
        let least: Vec<Version> = (first..first + BLOCKS_USED).map(|block| self.known(block).acknowledged).collect();
        let found = self.client.read(first, BLOCKS_USED as u32).await.unwrap();
        for ((block, found), least) in (first..).zip(found).zip(least) {
            self.check(block, found, least);
        }
    }

    fn known(&self, block: u64) -> Known {
        self.blocks.borrow().get(&block).cloned().unwrap_or_default()
    }

    fn check(&self, block: u64, (version, data): (Version, bool), least: Version) {
        let seed = self.world.seed();
        assert!(version >= least, "seed {seed}: block {block} is at {version}, {least} was there before");
        let sent = self.known(block).sent.get(&version).copied();
        let expected = if version == Version::ZERO { Some(false) } else { sent };
        assert_eq!(expected, Some(data), "seed {seed}: block {block} at {version}");
    }

    /// Concurrent operations; true if the machine went down in the middle.
    async fn round(self: &Rc<Self>) -> bool {
        let running = Rc::new(RefCell::new(0u64));
        let operations = 1 + self.world.random_below(12);
        for _ in 0..operations {
            *running.borrow_mut() += 1;
            let (test, running, kind) = (self.clone(), running.clone(), self.world.random_below(20));
            self.world.spawn(self.machine.process.get(), async move {
                match kind {
                    0..12 => test.write().await,
                    12..14 => test.clear().await,
                    14..17 => test.flush().await,
                    _ => test.read().await,
                }
                *running.borrow_mut() -= 1;
            });
        }
        let goes_down = self.world.one_in(6);
        let patience = if goes_down { self.world.random_below(1500) } else { u64::MAX };
        let mut waited = 0;
        while *running.borrow() > 0 && waited < patience {
            self.world.sleep(Duration::from_micros(50)).await;
            waited += 50;
            assert!(waited < 10_000_000, "seed {}: an operation never ends", self.world.seed());
        }
        goes_down
    }

    /// All is answered: what is there is the highest version of each block. Then F moves.
    async fn settle(self: &Rc<Self>) {
        for extent in 0..EXTENTS {
            let found = self.client.read(extent * 1024, BLOCKS_USED as u32).await.unwrap();
            for (block, found) in (extent * 1024..).zip(found) {
                let highest = self.known(block).acknowledged;
                assert_eq!(found.0, highest, "seed {}: block {block}", self.world.seed());
                self.check(block, found, highest);
            }
        }
        if self.world.one_in(2) {
            self.client.flush().await.unwrap();
            self.blocks.borrow_mut().values_mut().for_each(|known| known.flushed = known.acknowledged);
        }
    }

    async fn restart(self: &Rc<Self>, in_the_middle: bool) {
        if !in_the_middle && self.world.one_in(2) {
            self.machine.shard().close().await;
            self.machine.kill();
        } else if self.world.one_in(3) {
            self.machine.kill();
        } else {
            self.machine.crash();
        }
        // A start may itself be cut short.
        while self.world.one_in(4) {
            let (machine, world) = (self.machine.clone(), self.world.clone());
            let starting = self.world.start_process();
            world.spawn(starting, async move { drop(machine.start().await) });
            self.world.sleep(Duration::from_micros(self.world.random_below(8000))).await;
            self.world.kill(starting);
            self.machine.crash();
        }
        self.machine.start().await.unwrap();
        let opened = self.client.open().await.unwrap();
        let seed = self.world.seed();
        assert_eq!(opened.missing, vec![], "seed {seed}");
        assert!(!opened.open_in_previous_epoch, "seed {seed}");
        self.accept_what_is_there().await;
    }

    /// What is there after a start is what stays: whatever else was sent must never show again.
    async fn accept_what_is_there(self: &Rc<Self>) {
        for extent in 0..EXTENTS {
            let found = self.client.read(extent * 1024, BLOCKS_USED as u32).await.unwrap();
            for (block, found) in (extent * 1024..).zip(found) {
                self.check(block, found, self.known(block).flushed);
                let sent = BTreeMap::from([found]);
                let known = Known { sent, acknowledged: found.0, flushed: found.0 };
                self.blocks.borrow_mut().insert(block, known);
            }
        }
        let mut described = BTreeMap::new();
        for descriptor in self.client.describe(Version::ZERO).await.unwrap() {
            for block in descriptor.first.0..descriptor.first.0 + u64::from(descriptor.count) {
                described.insert(block, (descriptor.version, descriptor.checksum.is_some()));
            }
        }
        for (block, known) in self.blocks.borrow().iter() {
            let expected = known.sent.first_key_value().map(|(version, data)| (*version, *data));
            let expected = expected.filter(|(version, _)| *version > Version::ZERO);
            assert_eq!(described.get(block).copied(), expected, "seed {}: block {block}", self.world.seed());
        }
    }

    /// Another volume comes, is filled and goes; nothing of it may stay or come back.
    async fn trouble(self: &Rc<Self>) {
        self.trouble.set(self.trouble.get() + 1);
        let other = Client::create(&self.machine, 100 + self.trouble.get()).await;
        other.open().await.unwrap();
        other.write(0, 30).await.unwrap();
        self.machine.shard().drop_volume(other.volume).await.unwrap();
        assert_eq!(other.read(0, 1).await, Err(Refusal::NotOpen));
    }
}

async fn run(world: World) {
    let machine = Machine::new(&world, 14, 48).await;
    let client = Client::create(&machine, 1).await;
    client.open().await.unwrap();
    let test =
        Rc::new(Test { world: world.clone(), machine, client, blocks: RefCell::default(), trouble: Cell::default() });
    for _ in 0..25 {
        let down = test.round().await;
        if down {
            test.restart(true).await;
        } else {
            test.settle().await;
            if world.one_in(12) {
                test.restart(false).await;
            }
            if world.one_in(10) {
                test.trouble().await;
            }
        }
    }
    assert!(!test.machine.shard().statistics().lost, "seed {}", world.seed());
    // Tasks hold the world that holds them.
    test.machine.crash();
}

#[test]
fn nothing_flushed_is_ever_lost_torn_or_replaced_by_something_older() {
    let only: Option<u64> = std::env::var("SEED").ok().map(|seed| seed.parse().unwrap());
    let count: u64 = std::env::var("SEEDS").map_or(SEEDS, |count| count.parse().unwrap());
    for seed in only.map_or(0..count, |seed| seed..seed + 1) {
        simulate(seed, run);
    }
}
