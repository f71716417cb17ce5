//! Goal: nothing flushed is ever lost, torn, or replaced by something older, whatever comes between; what was not
//! flushed is, block by block, as it was written or not there at all. A damaged disk makes the shard answer `Damaged`
//! or refuse instances it lost, and nothing worse.
//!
//! Method: a seed draws rounds of concurrent writes, clears, reads and flushes over few blocks, on a shard of few and
//! tiny segments (so that cleaning and reuse happen all the time), with power failures and kills in the middle of a
//! round. A plain map (`known`) knows every version ever sent for each block, and which is the least that must be there.
//! Another volume is made, filled and dropped meanwhile.
//!
//! * `known`       the map
//! * `operations`  what a client does
//! * `past`        snapshots, and versions that are taken back
//! * `restart`     crashes and starts, and what must hold after them
//! * `scrub`       whole passes, what they must find, and what has to be mended after them
//! * `replica`     the peer that mends it
//! * `profile`     what a seed draws first: size of the disk, and what it does wrong
//!
//! `SEED=7` runs one seed, `SEEDS=1000..2000` a range, `RUST_LOG=debug` tells its story; `scripts/mutants` shows what the model catches.

mod known;
mod operations;
mod past;
mod profile;
mod replica;
mod restart;
mod scrub;

use super::harness::*;
use crate::log::BatchNumber;
use known::{Blocks, Log};
use past::Pin;
use profile::{Profile, Trouble};
use replica::Replica;
use scrub::Reached;
use std::cell::{Cell, RefCell, RefMut};
use std::ops::Range;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::message::Refusal;
use torus_rpc::runtime::simulated::World;
use torus_schema::ids::*;

const EXTENTS: u64 = 5;
const BLOCKS_USED: u64 = 40;
const ROUNDS: u64 = 25;
/// Of each of the tests below, four in all.
const SEEDS: u64 = 150;

struct Test {
    world: World,
    profile: Profile,
    machine: Machine,
    /// Of the same volume.
    replica: Option<Replica>,
    /// Another one after a loss.
    client: RefCell<Client>,
    blocks: RefCell<Blocks>,
    pins: RefCell<Vec<Pin>>,
    /// As the shard was told last: clears above it are kept.
    stale_since: Cell<Option<Version>>,
    /// Of volumes.
    last_number: Cell<u8>,
    /// The shard answers nothing any more until it is started again.
    failed: Cell<bool>,
    was_full: Cell<bool>,
    reached: Rc<RefCell<Reached>>,
}

fn block_at(number: u64) -> u64 {
    (number / BLOCKS_USED) * 1024 + number % BLOCKS_USED
}

impl Test {
    fn client(&self) -> Client {
        self.client.borrow().clone()
    }

    /// To be told something.
    fn blocks_now(&self) -> RefMut<'_, Blocks> {
        let mut blocks = self.blocks.borrow_mut();
        let shard = self.machine.shard();
        let queue = &shard.state.borrow().queue;
        blocks.log = Log { durable: queue.durable, last: BatchNumber(queue.next_batch.0 - 1) };
        blocks
    }

    fn seed(&self) -> u64 {
        self.world.seed()
    }

    /// How often the disk damaged anything so far: with none, nothing may be damaged or lost.
    fn damages(&self) -> u64 {
        self.machine.disk.damages()
    }

    /// How many of them are still running.
    fn start_operations(self: &Rc<Self>) -> Rc<Cell<u64>> {
        let running = Rc::new(Cell::new(1 + self.world.random_below(12)));
        for _ in 0..running.get() {
            let (test, running, kind) = (self.clone(), running.clone(), self.world.random_below(20));
            self.world.spawn(self.machine.process.get(), async move {
                match kind {
                    0..12 => test.write().await,
                    12..14 => test.clear().await,
                    14..17 => test.flush().await,
                    _ => test.read().await,
                }
                running.set(running.get() - 1);
            });
        }
        running
    }

    /// Or the shard has failed.
    async fn operations_done(&self, running: Rc<Cell<u64>>) {
        let mut waited = 0;
        while running.get() > 0 && !self.failed.get() {
            self.world.sleep(Duration::from_micros(200)).await;
            waited += 200;
            assert!(waited < 60_000_000, "seed {}: an operation never ends", self.seed());
        }
    }

    /// Concurrent operations; true if the machine went down in the middle, or the shard failed.
    async fn round(self: &Rc<Self>) -> bool {
        if self.world.one_in(8) {
            self.begin_scrub();
        }
        let running = self.start_operations();
        self.profile.hurt(&self.world, &self.machine.disk);
        let goes_down = self.world.one_in(6);
        let at_opening = goes_down && self.world.one_in(3);
        let patience = if goes_down && !at_opening { self.world.random_below(1500) } else { u64::MAX };
        let step = if goes_down { 20 } else { 200 };
        let opened = self.profile.is_opening(self.machine.disk.last_written());
        let mut waited = 0;
        while running.get() > 0 && waited < patience && !self.failed.get() {
            self.world.sleep(Duration::from_micros(step)).await;
            waited += step;
            assert!(waited < 60_000_000, "seed {}: an operation never ends", self.seed());
            // A segment is being taken into use: what must have been durable before?
            if at_opening && !opened && self.profile.is_opening(self.machine.disk.last_written()) {
                return true;
            }
        }
        goes_down || self.failed.get()
    }

    /// All is answered: what is there is the highest version of each block. Then F moves.
    async fn settle(self: &Rc<Self>) {
        for extent in 0..EXTENTS {
            let Ok(found) = self.read_extent(extent * 1024).await else { return };
            for (block, found) in (extent * 1024..).zip(found) {
                let Some(found) = found else { continue };
                let highest = self.blocks.borrow().acknowledged(block);
                // What was refused for want of space may have been carried out in part.
                let in_part = self.was_full.get() && found.0 > highest;
                let is_all = found.0 == highest || found.0 == Version::ZERO || in_part;
                assert!(is_all, "seed {}: block {block} is at {}, {highest} was answered", self.seed(), found.0);
                self.check(block, found, highest);
            }
        }
        if self.world.one_in(2) {
            self.flush_all().await;
        }
    }

    /// F moves to all that was answered. False if that failed.
    async fn flush_all(&self) -> bool {
        let covered = self.blocks.borrow().covered();
        let flushed = self.client().flush().await;
        let answered = self.is_answered(flushed);
        if answered {
            self.blocks_now().flushed(covered);
        }
        answered
    }

    /// What comes seldom, between rounds. True if the machine went down.
    async fn look_back(self: &Rc<Self>) -> bool {
        let down = match self.world.random_below(30) {
            _ if self.failed.get() => false,
            0..3 => {
                self.other_volume().await;
                false
            }
            3..8 => {
                self.take_snapshot().await;
                false
            }
            8..16 => self.revoke().await,
            16..18 => {
                self.retain().await;
                false
            }
            18..20 => {
                self.scrub().await;
                false
            }
            _ => false,
        };
        if !down && !self.failed.get() {
            self.check_snapshots();
        }
        down
    }

    /// Another volume comes, is filled and goes; nothing of it may stay or come back.
    async fn other_volume(self: &Rc<Self>) {
        let result = async {
            let other = Client::try_create(&self.machine, self.next_number()).await?;
            other.open().await?;
            other.write(0, 30).await?;
            let dropped = self.machine.shard().drop_volume(other.volume).await;
            dropped.map_err(|error| Refusal::Disk { because: error.to_string() })?;
            assert_eq!(other.read(0, 1).await, Err(Refusal::NotOpen));
            Ok(())
        };
        let result = result.await;
        self.is_answered(result);
    }

    fn next_number(&self) -> u8 {
        self.last_number.set(self.last_number.get() + 1);
        self.last_number.get()
    }
}

async fn run(world: World, damaged: bool, reached: Rc<RefCell<Reached>>) {
    let profile = Profile::draw(&world, damaged);
    let machine = Machine::new(&world, profile.segments, profile.segment_blocks).await;
    let client = Client::create(&machine, 1).await;
    client.open().await.unwrap();
    let replica = if profile.has_replica { Some(Replica::new(&world, 1).await) } else { None };
    replica.iter().for_each(|replica| replica.introduce(&machine));
    let test = Rc::new(Test {
        world: world.clone(),
        profile,
        machine,
        replica,
        client: RefCell::new(client),
        blocks: RefCell::default(),
        pins: RefCell::default(),
        stale_since: Cell::default(),
        last_number: Cell::new(1),
        failed: Cell::default(),
        was_full: Cell::default(),
        reached,
    });
    test.profile.begin(&test.machine.disk);
    for _ in 0..ROUNDS {
        let mut down = test.round().await;
        if !down {
            test.settle().await;
            down = test.look_back().await || test.failed.get();
        }
        if (down || world.one_in(12)) && !test.restart(down).await {
            break;
        }
    }
    let lost = test.machine.is_up() && test.machine.shard().statistics().lost;
    assert!(!lost || test.damages() > 0, "seed {}", world.seed());
    test.count_mended();
    // Tasks hold the world that holds them.
    test.machine.crash();
}

fn run_seeds(default: Range<u64>, damaged: bool) {
    // Fails if the other tests have done it.
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| "off".to_string());
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().try_init();
    let number = |text: &str| text.parse::<u64>().unwrap();
    let only = std::env::var("SEED").ok().map(|seed| number(&seed)..number(&seed) + 1);
    let range = std::env::var("SEEDS").ok().map(|range| {
        let (first, end) = range.split_once("..").unwrap_or(("0", &range));
        let (first, end) = (number(first), number(end));
        // Each of the two tests of a kind takes half.
        let half = first + (end - first) / 2;
        if default.start == 0 { first..half } else { half..end }
    });
    let is_default = only.is_none() && range.is_none();
    let mut reached = Reached::default();
    for seed in only.or(range).unwrap_or(default) {
        reached.add(run_seed(seed, damaged));
    }
    tracing::info!(damaged, ?reached, "scrub and repair");
    if is_default {
        reached.check(damaged);
    }
}

/// What its passes came across. Says which seed it was if it fails.
fn run_seed(seed: u64, damaged: bool) -> Reached {
    let reached: Rc<RefCell<Reached>> = Rc::default();
    let handle = reached.clone();
    let run = move || simulate(seed, move |world| run(world, damaged, handle));
    if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        let because = panic.downcast_ref::<String>().map_or("see above", |text| text.as_str());
        let name = if damaged { "damaged disk" } else { "sound disk" };
        panic!("{name} fails with seed {seed}: {because}");
    }
    reached.take()
}

/// Seeds that found something, and what it was. What a seed draws changes with the model; what they found has a test of
/// its own in `recovery` where it can be told apart.
const FOUND: [(u64, bool, &str); 11] = [
    (
        254,
        false,
        "a segment emptied and reused while one opened before it had no footer yet: batches seemed to be gone",
    ),
    (538, true, "zeros in the place of an opening hid a whole segment, and with it what said that it was durable"),
    (934, true, "records dropped as a torn tail came back when the footer that left them out was damaged later"),
    (399, true, "the same, as damaged blocks of a version that never was"),
    (
        3378,
        true,
        "a footer of an earlier use, since the write of the next was lost: cleaned again and again, for nothing",
    ),
    (1003, true, "the same, so that scrub passed over damaged blocks"),
    (1392, false, "a revoked clear of a whole extent, applied again, made an older one that a snapshot reads outdated"),
    (4551, true, "a mended header as it was before and no footer: what was dropped is back, as damaged blocks"),
    (7238, true, "a start's mended header and footer both lost on their way: what it dropped was back at the next"),
    (6121, true, "a header misread at one start, the footer made without it misread at the next: its batch was back"),
    (0, false, "scrub took a segment for unreadable whose footer was about to be written"),
];

#[test]
fn seeds_that_found_something_once() {
    for (seed, damaged, found) in FOUND {
        tracing::debug!(seed, damaged, found);
        run_seed(seed, damaged);
    }
}

// Two tests of each kind, so that several cores have work.

#[test]
fn on_a_sound_disk_nothing_flushed_is_ever_lost_torn_or_replaced_by_something_older() {
    run_seeds(0..SEEDS, false);
}

#[test]
fn on_a_sound_disk_nothing_flushed_is_lost_with_other_seeds_either() {
    run_seeds(SEEDS..2 * SEEDS, false);
}

#[test]
fn on_a_damaged_disk_what_is_not_there_is_answered_as_damaged_or_lost_and_never_as_something_else() {
    run_seeds(0..SEEDS, true);
}

#[test]
fn on_a_damaged_disk_nothing_else_is_answered_with_other_seeds_either() {
    run_seeds(SEEDS..2 * SEEDS, true);
}
