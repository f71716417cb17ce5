//! When a read is slow enough to be asked of a second replica, and whether that may be afforded (The Tail at Scale,
//! Dean and Barroso 2013). Pure.
//!
//! Slow is four times what 19 of 20 reads of the volume took of late, and never less than 5 ms, so that the ordinary
//! scatter of a busy cluster hedges nothing. Every read earns a twentieth of a hedge; when all replicas are slow, one
//! read in twenty is asked twice, and no more.

use std::time::Duration;
use torus_schema::limits::{HEDGE_AFTER_MIN, HEDGE_AFTER_P95_FACTOR, HEDGE_CREDIT_MAX, READS_PER_HEDGE};

/// Two buckets to each doubling, from 1 µs on.
const BUCKETS: usize = 64;
/// Samples after which the percentile is looked up again.
const LOOK_EVERY: u32 = 64;
/// At so many samples all counts are halved: what was slow an hour ago is forgotten.
const SAMPLES_MAX: u32 = 4096;

pub struct Hedging {
    counts: [u32; BUCKETS],
    samples: u32,
    since_look: u32,
    after: Duration,
    /// In reads.
    credit: u32,
    never: bool,
}

impl Hedging {
    /// `never`: for measurements without it.
    pub fn new(never: bool) -> Self {
        let after = HEDGE_AFTER_MIN * HEDGE_AFTER_P95_FACTOR;
        Self { counts: [0; BUCKETS], samples: 0, since_look: 0, after, credit: READS_PER_HEDGE, never }
    }

    /// A read has begun.
    pub fn earn(&mut self) {
        self.credit = (self.credit + 1).min(HEDGE_CREDIT_MAX * READS_PER_HEDGE);
    }

    /// How long to wait for the first replica.
    pub fn after(&self) -> Duration {
        self.after
    }

    /// Whether a second replica may be asked now; it is paid for.
    pub fn pay(&mut self) -> bool {
        let may = !self.never && self.credit >= READS_PER_HEDGE;
        if may {
            self.credit -= READS_PER_HEDGE;
        }
        may
    }

    /// A read was answered after so long.
    pub fn note(&mut self, took: Duration) {
        self.counts[bucket(took)] += 1;
        self.samples += 1;
        self.since_look += 1;
        if self.samples >= SAMPLES_MAX {
            self.counts.iter_mut().for_each(|count| *count /= 2);
            self.samples = self.counts.iter().sum();
        }
        if self.since_look >= LOOK_EVERY {
            self.since_look = 0;
            self.after = (self.p95() * HEDGE_AFTER_P95_FACTOR).max(HEDGE_AFTER_MIN);
        }
    }

    /// The upper end of its bucket.
    fn p95(&self) -> Duration {
        let mut above = self.samples / 20;
        for bucket in (0..BUCKETS).rev() {
            match above.checked_sub(self.counts[bucket]) {
                Some(left) => above = left,
                None => return upper(bucket),
            }
        }
        Duration::ZERO
    }
}

fn bucket(took: Duration) -> usize {
    let micros = (took.as_micros() as u64).max(1);
    let doubling = micros.ilog2() as usize;
    let half = usize::from(doubling > 0 && micros >> (doubling - 1) & 1 == 1);
    (2 * doubling + half).min(BUCKETS - 1)
}

fn upper(bucket: usize) -> Duration {
    // There is no half of a microsecond: the second bucket stays empty.
    let next = (bucket + 1).max(2);
    let base = 1u64 << (next / 2);
    Duration::from_micros(if next.is_multiple_of(2) { base } else { base + base / 2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_ends_where_the_next_begins() {
        for micros in [1, 2, 3, 4, 5, 6, 7, 8, 100, 999, 1_000_000, 3_600_000_000] {
            let took = Duration::from_micros(micros);
            let found = bucket(took);
            assert!(took < upper(found) && (found == 0 || took >= upper(found - 1)), "{micros}: {found}");
        }
    }

    #[test]
    fn slow_is_four_times_what_nineteen_of_twenty_reads_took() {
        let mut hedging = Hedging::new(false);
        for read in 0..1000 {
            hedging.note(Duration::from_micros(if read % 50 == 0 { 900_000 } else { 2000 }));
        }
        let after = hedging.after();
        assert!(after >= Duration::from_millis(8) && after <= Duration::from_millis(13), "{after:?}");
        (0..40_000).for_each(|_| hedging.note(Duration::from_micros(100)));
        assert_eq!(hedging.after(), HEDGE_AFTER_MIN, "never less");
    }

    #[test]
    fn at_most_one_read_in_twenty_is_asked_twice() {
        let mut hedging = Hedging::new(false);
        let mut paid = 0;
        for _ in 0..100_000 {
            hedging.earn();
            paid += u32::from(hedging.pay());
        }
        assert!((4900..=5002).contains(&paid), "{paid}");
    }

    #[test]
    fn a_quiet_hour_does_not_pay_for_a_storm() {
        let mut hedging = Hedging::new(false);
        (0..1_000_000).for_each(|_| hedging.earn());
        let burst = (0..1000).filter(|_| hedging.pay()).count();
        assert_eq!(burst, HEDGE_CREDIT_MAX as usize);
    }
}
