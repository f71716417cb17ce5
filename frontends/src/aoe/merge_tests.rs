//! What reaches the device of writes of less than a block, and in which order.

use super::*;
use crate::nbd::memory::{Counts, MemoryDevice};
use futures::executor::{LocalPool, LocalSpawner};
use futures::future::FutureExt;
use futures::task::LocalSpawn;
use proptest::prelude::*;
use std::cell::Cell;

#[derive(Clone)]
struct Tasks(LocalSpawner);

impl Spawn for Tasks {
    fn spawn(&self, _: Class, task: impl Future<Output = ()> + 'static) {
        self.0.spawn_local_obj(task.boxed_local().into()).expect("the pool lives as long as the test");
    }
}

const KIB: u64 = 1024;

struct Bed {
    pool: LocalPool,
    device: MemoryDevice,
    writes: Writes<MemoryDevice, Tasks>,
    answered: Rc<Cell<usize>>,
    failed: Rc<Cell<usize>>,
}

impl Bed {
    fn new() -> Self {
        let pool = LocalPool::new();
        let device = MemoryDevice::new(1 << 20, false);
        let writes = Writes::new(device.clone(), Tasks(pool.spawner()));
        Self { pool, device, writes, answered: Rc::default(), failed: Rc::default() }
    }

    fn write(&self, offset: u64, bytes: u64, with: u8) {
        let (answered, failed) = (self.answered.clone(), self.failed.clone());
        self.writes.write(offset, Bytes::from(vec![with; bytes as usize]), move |result| match result {
            Ok(()) => answered.set(answered.get() + 1),
            Err(_) => failed.set(failed.get() + 1),
        });
    }

    /// As if it came in a batch of its own.
    fn write_alone(&mut self, offset: u64, bytes: u64, with: u8) {
        self.write(offset, bytes, with);
        self.run();
    }

    fn run(&mut self) {
        self.writes.start();
        self.pool.run_until_stalled();
    }

    fn content(&mut self, offset: u64, bytes: u64) -> Vec<u8> {
        let pieces = self.pool.run_until(self.device.read(offset, bytes)).unwrap();
        let mut content = vec![0xee; bytes as usize];
        put_pieces(&mut content, 0, &pieces);
        content
    }

    fn counts(&self) -> Counts {
        self.device.counts()
    }
}

#[test]
fn four_frames_of_a_block_cost_one_read_and_one_durable_write() {
    let mut bed = Bed::new();
    bed.device.hold();
    (0..4).for_each(|quarter| bed.write_alone(8192 + quarter * KIB, KIB, quarter as u8 + 1));
    bed.device.release();
    bed.run();
    let counts = bed.counts();
    assert_eq!((counts.reads, counts.writes, counts.durable), (1, 1, 1));
    assert_eq!(bed.answered.get(), 4);
    let expected: Vec<u8> = (1..=4).flat_map(|with| [with; 1024]).collect();
    assert_eq!(bed.content(8192, 4096), expected);
}

#[test]
fn frames_that_cover_a_block_together_read_nothing() {
    let mut bed = Bed::new();
    (0..16).for_each(|quarter| bed.write(quarter * KIB, KIB, quarter as u8));
    bed.run();
    let counts = bed.counts();
    assert_eq!((counts.reads, counts.writes, bed.answered.get()), (0, 1, 16), "four blocks, one after the other");
}

#[test]
fn a_sequential_stream_with_16_outstanding_writes_each_block_once() {
    let mut bed = Bed::new();
    let (frames, window) = (256, 16);
    let mut sent = 0;
    bed.device.hold();
    while bed.answered.get() < frames {
        while sent < frames && sent - bed.answered.get() < window {
            bed.write_alone(sent as u64 * KIB, KIB, sent as u8);
            sent += 1;
        }
        bed.device.release();
        bed.run();
        bed.device.hold();
    }
    bed.device.release();
    let counts = bed.counts();
    assert_eq!(counts.writes as usize, frames / 4);
    assert!(counts.reads as usize <= frames / 4, "{counts:?}");
    let expected: Vec<u8> = (0..frames).flat_map(|with| [with as u8; 1024]).collect();
    assert_eq!(bed.content(0, 256 * KIB), expected);
}

#[test]
fn what_came_during_a_write_goes_into_the_next_and_reads_nothing() {
    let mut bed = Bed::new();
    bed.device.hold();
    bed.write(0, 4096, 1);
    bed.run();
    assert_eq!(bed.device.waiting(), 1, "a whole block is written at once");
    bed.write_alone(512, 512, 2);
    bed.write_alone(1024, 512, 3);
    assert_eq!((bed.answered.get(), bed.device.waiting()), (0, 1));
    bed.device.release();
    bed.run();
    let counts = bed.counts();
    assert_eq!((counts.reads, counts.writes, bed.answered.get()), (0, 2, 3));
    let content = bed.content(0, 4096);
    assert_eq!((content[0], content[512], content[1024], content[1536]), (1, 2, 3, 1));
}

#[test]
fn a_trim_waits_for_the_write_before_it_and_holds_up_the_one_after_it() {
    let mut bed = Bed::new();
    bed.device.hold();
    bed.write_alone(0, 4096, 1);
    let answered = bed.answered.clone();
    bed.writes.clear(vec![0..4096, 8192..12288], move |result| {
        assert_eq!((result, answered.get()), (Ok(()), 1));
        answered.set(2);
    });
    bed.run();
    bed.write_alone(8192, 4096, 2);
    bed.device.release();
    bed.run();
    assert_eq!(bed.answered.get(), 3);
    assert_eq!((bed.content(0, 4096)[0], bed.content(8192, 4096)[0]), (0, 2));
}

#[test]
fn a_failure_is_told_to_all_who_were_in_it_and_leaves_nothing_locked() {
    let mut bed = Bed::new();
    bed.device.fail(Some(VolumeError::ReadOnly));
    bed.write(0, KIB, 1);
    bed.write(KIB, KIB, 1);
    bed.run();
    assert_eq!(bed.failed.get(), 2);
    bed.device.fail(None);
    bed.write_alone(0, KIB, 2);
    assert_eq!((bed.answered.get(), bed.content(0, 2048)[0], bed.content(0, 2048)[1024]), (1, 2, 0));
}

#[test]
fn a_block_that_cannot_be_read_fails_who_needs_it_alone() {
    let mut bed = Bed::new();
    bed.device.rot(Some(1));
    // The first block whole; the second in part, for which it would have to be read.
    bed.write(0, 4 * KIB, 1);
    bed.write(4 * KIB, KIB, 2);
    bed.write(8 * KIB, 4 * KIB, 3);
    bed.run();
    assert_eq!((bed.answered.get(), bed.failed.get()), (2, 1));
    assert_eq!((bed.content(0, KIB)[0], bed.content(8 * KIB, KIB)[0]), (1, 3));
    bed.device.rot(None);
    bed.write_alone(4 * KIB, KIB, 4);
    assert_eq!((bed.answered.get(), bed.content(4 * KIB, KIB)[0]), (3, 4));
}

proptest! {
    /// However writes overlap, are held up and released: the device ends with what it had if each were applied in turn.
    #[test]
    fn the_content_is_as_if_written_one_by_one(
        writes in proptest::collection::vec((0u64..96, 1u64..24, any::<u8>(), 0u8..8), 1..80),
    ) {
        let mut bed = Bed::new();
        let mut expected = vec![0u8; 64 * 1024];
        for (first, sectors, with, then) in &writes {
            bed.write(first * 512, sectors * 512, *with);
            expected[(first * 512) as usize..((first + sectors) * 512) as usize].fill(*with);
            match then {
                0 => bed.device.hold(),
                1 => bed.device.release(),
                2 => bed.writes.start(),
                _ => bed.run(),
            }
        }
        bed.device.release();
        bed.run();
        prop_assert_eq!(bed.answered.get(), writes.len());
        prop_assert_eq!(bed.content(0, 64 * 1024), expected);
    }
}
