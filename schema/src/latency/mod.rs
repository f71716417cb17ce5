//! How long things take: histograms that cost next to nothing to keep, and the stages of an operation.
//!
//! * `stages`  which operations and stages there are, and a histogram of each
//!
//! Buckets are log-linear: a microsecond each below 32 µs, then 16 to each doubling, so that what is told is at most a
//! sixteenth above what was:
//!
//! ```text
//!  µs     0 1 2 … 31 | 32 34 … 62 | 64 68 … 124 | … | 64 Mi, 68 Mi, … and everything above
//!  bucket 0 1 2 … 31 | 32 33 … 47 | 48 49 …  63 | … |          … 383
//! ```

mod stages;

pub use stages::{OperationKind, Stage, StageCounts, Stages};

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// To each doubling.
const STEPS: usize = 16;
const STEPS_LOG2: u32 = STEPS.ilog2();
/// Below this a bucket is a microsecond.
const LINEAR: usize = 2 * STEPS;
/// The last doubling begins at 2^26 µs = 67 s.
const LAST_DOUBLING: u32 = 26;
pub const BUCKETS: usize = LINEAR + STEPS * (LAST_DOUBLING - STEPS_LOG2) as usize;
const _: () = assert!(BUCKETS <= 600 && LINEAR.is_power_of_two());

fn bucket_of(us: u64) -> usize {
    if us < LINEAR as u64 {
        return us as usize;
    }
    let doubling = us.ilog2();
    let within = (us >> (doubling - STEPS_LOG2)) as usize - STEPS;
    (LINEAR + STEPS * (doubling - STEPS_LOG2 - 1) as usize + within).min(BUCKETS - 1)
}

/// The least value that is counted in the bucket.
fn lower_us(bucket: usize) -> u64 {
    match bucket.checked_sub(LINEAR) {
        None => bucket as u64,
        Some(above) => ((STEPS + above % STEPS) as u64) << (above / STEPS + 1),
    }
}

/// Written by one thread, read by any. A count is loaded and stored, without the locked instruction that several writers
/// would need: with more than one, counts would be lost.
#[derive(Debug)]
pub struct Histogram {
    counts: [AtomicU64; BUCKETS],
    sum_ns: AtomicU64,
    max_us: AtomicU64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: [const { AtomicU64::new(0) }; BUCKETS], sum_ns: AtomicU64::new(0), max_us: AtomicU64::new(0) }
    }
}

impl Histogram {
    pub fn record(&self, took: Duration) {
        let us = took.as_secs().saturating_mul(1_000_000).saturating_add(u64::from(took.subsec_micros()));
        add(&self.counts[bucket_of(us)], 1);
        // 584 years fit.
        add(&self.sum_ns, took.as_secs().wrapping_mul(1_000_000_000).wrapping_add(u64::from(took.subsec_nanos())));
        if us > self.max_us.load(Ordering::Relaxed) {
            self.max_us.store(us, Ordering::Relaxed);
        }
    }

    /// What is recorded meanwhile may be in it in part.
    pub fn counts(&self) -> Counts {
        let load = |number: &AtomicU64| number.load(Ordering::Relaxed);
        Counts {
            buckets: self.counts.iter().map(load).collect(),
            sum_ns: load(&self.sum_ns),
            max_us: load(&self.max_us),
        }
    }
}

fn add(number: &AtomicU64, more: u64) {
    number.store(number.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
}

/// What a histogram held at some moment; several can be put together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Empty, or `BUCKETS` of them.
    buckets: Vec<u64>,
    sum_ns: u64,
    max_us: u64,
}

impl Counts {
    /// Of what another process told; buckets that are not known here are left out.
    pub fn from_told(told: impl IntoIterator<Item = (usize, u64)>, sum: Duration, max_us: u64) -> Self {
        let mut buckets = vec![0; BUCKETS];
        for (bucket, count) in told {
            if let Some(known) = buckets.get_mut(bucket) {
                *known = count;
            }
        }
        Self { buckets, sum_ns: u64::try_from(sum.as_nanos()).unwrap_or(u64::MAX), max_us }
    }

    /// Those that are not empty.
    pub fn told(&self) -> impl Iterator<Item = (usize, u64)> + '_ {
        self.buckets.iter().copied().enumerate().filter(|(_, count)| *count > 0)
    }

    pub fn merge(&mut self, other: &Counts) {
        if self.buckets.len() < other.buckets.len() {
            self.buckets.resize(other.buckets.len(), 0);
        }
        self.buckets.iter_mut().zip(&other.buckets).for_each(|(own, other)| *own = own.saturating_add(*other));
        self.sum_ns = self.sum_ns.saturating_add(other.sum_ns);
        self.max_us = self.max_us.max(other.max_us);
    }

    /// What was recorded since `earlier`. If it was begun anew in between, that is all there is. The largest is known as
    /// exactly as its bucket.
    pub fn since(&self, earlier: &Counts) -> Counts {
        let before = |bucket: usize| earlier.buckets.get(bucket).copied().unwrap_or(0);
        if self.buckets.iter().enumerate().any(|(bucket, count)| *count < before(bucket)) {
            return self.clone();
        }
        let buckets: Vec<u64> = self.buckets.iter().enumerate().map(|(bucket, count)| count - before(bucket)).collect();
        let highest = buckets.iter().rposition(|count| *count > 0);
        let max_us = highest.map_or(0, |bucket| highest_us(bucket).min(self.max_us));
        Counts { buckets, sum_ns: self.sum_ns.saturating_sub(earlier.sum_ns), max_us }
    }

    pub fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    pub fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum_ns)
    }

    pub fn max_us(&self) -> u64 {
        self.max_us
    }

    /// That many of all are at or below it: 0.5 is the median. Zero if there are none.
    pub fn quantile_us(&self, quantile: f64) -> u64 {
        let rank = (quantile.clamp(0.0, 1.0) * self.count() as f64).ceil() as u64;
        let mut left = rank.max(1);
        for (bucket, count) in self.told() {
            if count >= left {
                return highest_us(bucket).min(self.max_us);
            }
            left -= count;
        }
        self.max_us
    }

    /// How many took less than that; exact where a bucket begins, as at every power of two.
    pub fn below_us(&self, bound_us: u64) -> u64 {
        self.told().filter(|(bucket, _)| lower_us(*bucket) < bound_us).map(|(_, count)| count).sum()
    }
}

/// The largest value that is counted in the bucket; of the last one there is none.
fn highest_us(bucket: usize) -> u64 {
    if bucket + 1 < BUCKETS { lower_us(bucket + 1) - 1 } else { u64::MAX }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn counted(values: &[u64]) -> Counts {
        let histogram = Histogram::default();
        values.iter().for_each(|us| histogram.record(Duration::from_micros(*us)));
        histogram.counts()
    }

    #[test]
    fn a_bucket_ends_where_the_next_begins() {
        for bucket in 0..BUCKETS {
            assert_eq!(bucket_of(lower_us(bucket)), bucket);
            assert!(bucket == 0 || bucket_of(lower_us(bucket) - 1) == bucket - 1, "{bucket}");
        }
        assert!(lower_us(BUCKETS - 1) > 60_000_000, "more than a minute");
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn nothing_recorded_is_nothing_told() {
        let none = Counts::default();
        assert_eq!((none.count(), none.quantile_us(0.99), none.max_us(), none.below_us(u64::MAX)), (0, 0, 0, 0));
        assert_eq!(Histogram::default().counts().quantile_us(1.0), 0);
    }

    #[test]
    fn powers_of_two_bound_what_is_counted_below_them_exactly() {
        let counts = counted(&[0, 15, 16, 1023, 1024, 1025, 90_000_000_000]);
        let below = [16, 1024, 2048, 1 << 26].map(|bound| counts.below_us(bound));
        assert_eq!(below, [2, 4, 6, 6]);
        assert_eq!(counts.max_us(), 90_000_000_000);
    }

    proptest! {
        #[test]
        fn quantiles_are_those_of_hdrhistogram_to_a_sixteenth(
            values in prop::collection::vec((0u32..27, any::<u64>()), 1..400),
            quantile in 0.0..=1.0f64,
        ) {
            // As many short ones as long ones.
            let values: Vec<u64> = values.into_iter().map(|(doubling, any)| any % (1 << doubling)).collect();
            let mut reference = hdrhistogram::Histogram::<u64>::new(4).unwrap();
            values.iter().for_each(|us| reference.record(*us).unwrap());
            let (found, expected) = (counted(&values).quantile_us(quantile), reference.value_at_quantile(quantile));
            let (low, high) = (expected as f64 / 1.001, expected as f64 * (1.0 + 1.0 / 16.0) + 1.0);
            prop_assert!((low..=high).contains(&(found as f64)), "{found}, expected {expected}");
        }

        #[test]
        fn two_put_together_are_one_of_all_and_the_difference_is_the_rest(
            first in prop::collection::vec(0u64..1 << 27, 0..50),
            second in prop::collection::vec(0u64..1 << 27, 0..50),
        ) {
            let all: Vec<u64> = first.iter().chain(&second).copied().collect();
            let (first, second, all) = (counted(&first), counted(&second), counted(&all));
            let mut merged = first.clone();
            merged.merge(&second);
            prop_assert_eq!(&merged, &all);
            let rest = all.since(&first);
            prop_assert_eq!((rest.count(), rest.sum()), (second.count(), second.sum()));
            prop_assert!(rest.max_us() >= second.max_us());
            prop_assert_eq!(first.since(&all).count(), if second.count() == 0 { 0 } else { first.count() });
            let told = Counts::from_told(all.told(), all.sum(), all.max_us());
            prop_assert_eq!(told, all);
        }
    }
}
