//! What is asked of a volume through the client library: operations in flight, or so many a second.
//!
//! At a fixed rate a latency counts from the moment its operation was to be started, not from when the client came to
//! it: one that waits for a slow answer would otherwise not see the time that those lost which it did not send meanwhile
//! (coordinated omission). Both are recorded, so that the difference shows.

use crate::error::{BenchError, Result};
use crate::library::volume_error;
use crate::random::Random;
use bytes::Bytes;
use futures::future::join_all;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant};
use torus_frontends::device::{Device, VolumeError};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Work {
    Read,
    Write,
    /// On stable storage of every in-sync replica before it is answered.
    DurableWrite,
    /// A write, and when it is answered a flush: what fio makes of it over NBD.
    WriteThenFlush,
    /// Seven reads to three writes.
    Mixed,
}

const MIXED_READ_PERCENT: u64 = 70;
const LATENCY_NS_MAX: u64 = 60_000_000_000;

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Load {
    pub work: Work,
    pub depth: usize,
    /// Of each operation.
    pub bytes: u64,
    /// One after the other instead of at random.
    pub is_sequential: bool,
    /// The part of the volume that is used, from its start.
    pub region_bytes: u64,
    pub run: Duration,
    pub seed: u64,
}

/// Of the tasks of one load, in turn or at random.
struct Places {
    load: Load,
    random: Random,
    next: Rc<Cell<u64>>,
}

impl Places {
    fn new(load: Load, task: usize, next: &Rc<Cell<u64>>) -> Self {
        Self { load, random: Random::new((load.seed << 32) + ((task as u64) << 16)), next: next.clone() }
    }

    fn offset(&mut self) -> u64 {
        let count = self.load.region_bytes / self.load.bytes;
        let index = if self.load.is_sequential {
            self.next.replace(self.next.get() + 1) % count
        } else {
            self.random.below(count)
        };
        index * self.load.bytes
    }

    fn work(&mut self) -> Work {
        match self.load.work {
            Work::Mixed if self.random.below(100) < MIXED_READ_PERCENT => Work::Read,
            Work::Mixed => Work::Write,
            work => work,
        }
    }
}

async fn once<D: Device>(device: &D, places: &mut Places, content: &Bytes) -> std::result::Result<(), VolumeError> {
    let offset = places.offset();
    match places.work() {
        Work::Read => device.read(offset, places.load.bytes).await.map(drop),
        Work::Write => device.write_to_end(offset, content.clone(), false).await,
        Work::DurableWrite => device.write_to_end(offset, content.clone(), true).await,
        Work::WriteThenFlush => {
            device.write_to_end(offset, content.clone(), false).await?;
            device.flush().await
        }
        Work::Mixed => unreachable!("each of its operations is a read or a write"),
    }
}

type Shared = Rc<RefCell<Histogram<u64>>>;

fn histogram() -> Result<Shared> {
    let histogram = Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3).map_err(BenchError::wrap("a histogram"))?;
    Ok(Rc::new(RefCell::new(histogram)))
}

fn unshared(histogram: Shared) -> Histogram<u64> {
    Rc::into_inner(histogram).expect("the tasks have ended").into_inner()
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

async fn all_of(tasks: impl Iterator<Item = glommio::Task<std::result::Result<(), VolumeError>>>) -> Result<()> {
    // Started, all of them, before the first is waited for.
    let tasks: Vec<_> = tasks.collect();
    join_all(tasks).await.into_iter().collect::<std::result::Result<(), VolumeError>>().map_err(volume_error)
}

/// Keeps `load.depth` operations in flight for `load.run`; latencies in nanoseconds.
pub async fn drive<D: Device>(device: &D, load: Load) -> Result<Histogram<u64>> {
    let latencies = histogram()?;
    // One allocation for all writes: sharing it is the caller's good right.
    let content = Bytes::from(vec![0xa5; load.bytes as usize]);
    let next = Rc::new(Cell::new(0));
    let end = Instant::now() + load.run;
    let task = |index: usize| {
        let (device, content, latencies) = (device.clone(), content.clone(), latencies.clone());
        let mut places = Places::new(load, index, &next);
        glommio::spawn_local(async move {
            loop {
                let started = Instant::now();
                if started >= end {
                    return Ok(());
                }
                once(&device, &mut places, &content).await?;
                latencies.borrow_mut().saturating_record(nanoseconds(started.elapsed()));
            }
        })
    };
    all_of((0..load.depth).map(task)).await?;
    Ok(unshared(latencies))
}

/// Latencies in nanoseconds.
pub struct Paced {
    /// From when each was to be started.
    pub corrected: Histogram<u64>,
    /// From when each was started.
    pub uncorrected: Histogram<u64>,
    /// Were to be started within the time but never were, because the volume could not keep up with the rate for twice
    /// the time: without them the corrected figures are too good.
    pub never_started: u64,
}

/// `per_second` operations a second, evenly, for `load.run`; `load.depth` tasks take turns, so that so many may be in
/// flight before one has to wait for another. That wait is in the corrected latency, as is the client's own waking up.
pub async fn drive_at_rate<D: Device>(device: &D, load: Load, per_second: f64) -> Result<Paced> {
    let (corrected, uncorrected) = (histogram()?, histogram()?);
    let content = Bytes::from(vec![0xa5; load.bytes as usize]);
    let (next, never_started) = (Rc::new(Cell::new(0)), Rc::new(Cell::new(0u64)));
    let start = Instant::now();
    let count = (load.run.as_secs_f64() * per_second) as u64;
    let task = |index: usize| {
        let (device, content, never_started) = (device.clone(), content.clone(), never_started.clone());
        let (corrected, uncorrected) = (corrected.clone(), uncorrected.clone());
        let mut places = Places::new(load, index, &next);
        let turns = (index as u64..count).step_by(load.depth);
        glommio::spawn_local(async move {
            for turn in turns {
                let intended = start + Duration::from_secs_f64(turn as f64 / per_second);
                let now = Instant::now();
                if now < intended {
                    glommio::timer::sleep(intended - now).await;
                } else if now > start + 2 * load.run {
                    never_started.set(never_started.get() + 1);
                    continue;
                }
                let started = Instant::now();
                once(&device, &mut places, &content).await?;
                let ended = Instant::now();
                corrected.borrow_mut().saturating_record(nanoseconds(ended - intended));
                uncorrected.borrow_mut().saturating_record(nanoseconds(ended - started));
            }
            Ok(())
        })
    };
    all_of((0..load.depth).map(task)).await?;
    let never_started = never_started.get();
    Ok(Paced { corrected: unshared(corrected), uncorrected: unshared(uncorrected), never_started })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::null::Null;
    use torus_frontends::device::{Pieces, Run};
    use torus_rpc::runtime::glommio::run;
    use torus_schema::limits::{GIB, MIB};

    const LOAD: Load = Load {
        work: Work::Mixed,
        depth: 4,
        bytes: 4096,
        is_sequential: false,
        region_bytes: GIB,
        run: Duration::from_millis(50),
        seed: 7,
    };

    /// Answers its first request only after a while.
    #[derive(Clone)]
    struct Stalling {
        null: Null,
        stall: Rc<Cell<Duration>>,
    }

    impl Device for Stalling {
        fn size_bytes(&self) -> u64 {
            self.null.bytes
        }

        fn read_only(&self) -> bool {
            false
        }

        async fn read(&self, offset: u64, length: u64) -> std::result::Result<Pieces, VolumeError> {
            glommio::timer::sleep(self.stall.take()).await;
            self.null.read(offset, length).await
        }

        async fn write(&self, _: u64, _: Bytes, _: bool) -> std::result::Result<(), VolumeError> {
            Ok(())
        }

        async fn clear(&self, _: u64, _: u64, _: bool, _: bool) -> std::result::Result<(), VolumeError> {
            Ok(())
        }

        async fn map(&self, offset: u64, length: u64) -> std::result::Result<Vec<Run>, VolumeError> {
            self.null.map(offset, length).await
        }

        async fn flush(&self) -> std::result::Result<(), VolumeError> {
            Ok(())
        }
    }

    #[test]
    fn what_waits_behind_a_slow_answer_is_slow_too() {
        let load = Load { work: Work::Read, depth: 1, ..LOAD };
        let device = Stalling { null: Null { bytes: GIB }, stall: Rc::new(Cell::new(Duration::from_millis(30))) };
        let paced = run("paced", None, drive_at_rate(&device, load, 1000.0)).unwrap().unwrap();
        assert_eq!((paced.corrected.len(), paced.never_started), (50, 0));
        let slow = |histogram: &Histogram<u64>| histogram.len() - histogram.count_between(0, 9_999_999);
        // One is; others only where this test itself had to wait for a core.
        assert!((1..10).contains(&slow(&paced.uncorrected)), "{}", slow(&paced.uncorrected));
        // Those of the next 20 ms waited for more than 10 ms each.
        assert!(slow(&paced.corrected) >= 20, "{}", slow(&paced.corrected));
    }

    #[test]
    fn a_volume_that_cannot_keep_up_is_told_on_not_waited_for() {
        let load = Load { work: Work::Read, depth: 1, run: Duration::from_millis(200), ..LOAD };
        let device = Stalling { null: Null { bytes: GIB }, stall: Rc::new(Cell::new(Duration::from_millis(500))) };
        let paced = run("paced", None, drive_at_rate(&device, load, 1000.0)).unwrap().unwrap();
        assert_eq!((paced.corrected.len(), paced.never_started), (1, 199));
    }

    #[test]
    fn the_tasks_of_a_sequential_load_share_one_order() {
        let load = Load { is_sequential: true, bytes: MIB, region_bytes: 3 * MIB, ..LOAD };
        let next = Rc::new(Cell::new(0));
        let mut tasks = [Places::new(load, 0, &next), Places::new(load, 1, &next)];
        let offsets: Vec<u64> = [0, 1, 0, 0].map(|task| tasks[task].offset()).to_vec();
        assert_eq!(offsets, [0, MIB, 2 * MIB, 0]);
    }

    #[test]
    fn seven_of_ten_operations_of_a_mix_are_reads() {
        let mut places = Places::new(LOAD, 0, &Rc::default());
        let reads = (0..10_000).filter(|_| places.work() == Work::Read).count();
        assert!((6_800..7_200).contains(&reads), "{reads}");
    }
}
