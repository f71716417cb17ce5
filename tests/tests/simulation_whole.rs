//! The whole system under everything at once, from many seeds; see `torus_tests::simulation::whole`.
//!
//! Each run of the test takes 300 seeds, the next ones with every commit. `SIMULATION_SEEDS=first..last` for others,
//! `SIMULATION_THREADS` for how many at once. Seeds that failed once stay in `FOUND`. `SIMULATION_FAILURES`: after how many of them it ends.

use std::ops::Range;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use torus_tests::simulation::whole::{Failure, Figures, run_seed, two_courses};

/// Seeds that once found something.
const FOUND: [u64; 22] = [
    110778, 111299, 200265, 201147, 202231, 203624, 206500, 206514, 207984, 209226, 215052, 318506, 324108, 335461,
    404898, 408218, 408248, 118646, 619787, 625360, 634339, 699626,
];
const SEEDS_PER_RUN: u64 = 300;
/// So many of them are run twice, and those that once went more than one way.
const SEEDS_TWICE: u64 = 20;
const SEEDS_WITH_TWO_COURSES: [u64; 1] = [77];
/// More are not looked for: they would be the same few mistakes.
const FAILURES_MAX: usize = 5;
/// Simulated time in time of one core, or somebody made the simulation too slow to be of use: about a fifth of what it is.
const SPEED_MIN: f64 = 100.0;

fn commits() -> u64 {
    let output = Command::new("git").args(["rev-list", "--count", "HEAD"]).output();
    output.ok().and_then(|output| String::from_utf8(output.stdout).ok()?.trim().parse().ok()).unwrap_or_default()
}

fn seeds() -> Range<u64> {
    let Ok(text) = std::env::var("SIMULATION_SEEDS") else {
        let first = commits() * SEEDS_PER_RUN;
        return first..first + SEEDS_PER_RUN;
    };
    let bounds = text.split_once("..").and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    let (first, last) = bounds.expect("SIMULATION_SEEDS=first..last");
    first..last
}

fn threads() -> usize {
    let asked = std::env::var("SIMULATION_THREADS").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |cores| cores.get()))
}

fn failures_max() -> usize {
    let asked = std::env::var("SIMULATION_FAILURES").ok().and_then(|text| text.parse().ok());
    asked.unwrap_or(FAILURES_MAX)
}

/// What this thread has had of a core: the machine has other things to do.
fn processor_time() -> Duration {
    let said = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux says what a thread has had");
    let nanos = said.split_whitespace().next().and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(nanos.expect("the first number is nanoseconds on a core"))
}

#[derive(Default)]
struct Total {
    seeds: u64,
    busy: Duration,
    figures: Figures,
    failures: Vec<Failure>,
}

impl Total {
    fn add(&mut self, figures: Figures, took: Duration) {
        self.seeds += 1;
        self.busy += took;
        let total = &mut self.figures;
        total.virtual_time += figures.virtual_time;
        total.reads_checked += figures.reads_checked;
        total.troubles += figures.troubles;
        total.whole_after = total.whole_after.max(figures.whole_after);
        total.tasks = total.tasks.max(figures.tasks);
    }

    fn speed(&self) -> f64 {
        self.figures.virtual_time.as_secs_f64() / self.busy.as_secs_f64().max(1e-9)
    }

    fn print(&self) {
        let Figures { virtual_time, reads_checked, troubles, whole_after, tasks, .. } = self.figures;
        println!(
            "{} seeds clean, {} failed: {:.1} h of a cluster in {:.0} s of one core ({:.0} times as fast), {troubles} \
             troubles, {reads_checked} sectors read and checked, in sync after {:.0} s at most, {tasks} tasks more at rest than at first",
            self.seeds,
            self.failures.len(),
            virtual_time.as_secs_f64() / 3600.0,
            self.busy.as_secs_f64(),
            self.speed(),
            whole_after.as_secs_f64(),
        );
    }
}

#[test]
fn whatever_goes_wrong_nothing_promised_is_lost_and_all_becomes_well_by_itself() {
    let seeds = seeds();
    println!("seeds {seeds:?} and {} that once failed", FOUND.len());
    let all: Vec<u64> = FOUND.into_iter().chain(seeds).collect();
    let (next, total) = (AtomicU64::new(0), Mutex::new(Total::default()));
    std::thread::scope(|scope| {
        for _ in 0..threads() {
            scope.spawn(|| work(&all, &next, &total));
        }
    });
    let total = total.into_inner().expect("a seed's panics are caught");
    total.failures.iter().for_each(|failure| println!("{failure}\n"));
    total.print();
    let failed: Vec<u64> = total.failures.iter().map(|failure| failure.seed).collect();
    assert!(failed.is_empty(), "seeds {failed:?} failed; their stories stand above");
    assert!(total.speed() > SPEED_MIN, "only {:.0} times as fast as what it simulates", total.speed());
}

/// A story that cannot be told again is of little use.
#[test]
fn one_seed_has_one_course() {
    let (first, all) = (commits() * SEEDS_PER_RUN, Mutex::new(Vec::new()));
    let seeds: Vec<u64> = SEEDS_WITH_TWO_COURSES.into_iter().chain(first..first + SEEDS_TWICE).collect();
    // Each time on a thread of its own, the second time in the opposite order.
    std::thread::scope(|scope| {
        scope.spawn(|| seeds.iter().for_each(|seed| all.lock().unwrap().push((*seed, course(*seed)))));
        scope.spawn(|| seeds.iter().rev().for_each(|seed| all.lock().unwrap().push((*seed, course(*seed)))));
    });
    let mut all = all.into_inner().unwrap();
    all.sort();
    for pair in all.chunks_exact(2) {
        let [(seed, one), (_, other)] = pair else { unreachable!("chunks of two") };
        assert!(one == other, "seed {seed} has two courses, {one:?} and {other:?}: {:#?}", two_courses(*seed));
    }
}

fn course(seed: u64) -> Result<u64, String> {
    run_seed(seed).map(|figures| figures.course).map_err(|failure| failure.because)
}

fn work(all: &[u64], next: &AtomicU64, total: &Mutex<Total>) {
    loop {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let Some(seed) = all.get(number as usize) else { return };
        let began = processor_time();
        let result = run_seed(*seed);
        let took = processor_time() - began;
        let mut total = total.lock().expect("a seed's panics are caught");
        match result {
            Ok(figures) => total.add(figures, took),
            Err(failure) => {
                println!("seed {seed}: {}", failure.because);
                total.failures.push(*failure);
                if total.failures.len() >= failures_max() {
                    next.store(all.len() as u64, Ordering::Relaxed);
                }
            }
        }
        if number % 1000 == 999 {
            println!("up to seed {seed}");
            total.print();
        }
    }
}
