// Not part of glommio 0.9.0: see vendor/README.md of Torus.

//! How long an executor looks for work before it sleeps.
//!
//! Looking saves a sleep and a wake where what is awaited comes within the
//! window, and is a waste otherwise; and where others want this core it takes
//! from them what they need to do the very work that is awaited. So it is done
//! as long as it pays, and not while somebody else wants the core. The first
//! is seen from how it ended, the second from a look that took far longer than
//! a look takes: the thread was not running meanwhile.

use std::time::{Duration, Instant};

/// A look takes less than a microsecond, an interrupt in between a few.
const DISTURBED_AFTER: Duration = Duration::from_micros(15);
const REST_MIN: Duration = Duration::from_millis(1);
const REST_MAX: Duration = Duration::from_millis(256);
/// Successes in a row after which disturbances are forgiven by half.
const FORGIVEN_AFTER: u32 = 64;
const CREDIT_MAX: u32 = 16;
/// What a success earns; a failure costs one.
const CREDIT_EARNED: u32 = 2;
/// Below this it is tried only now and then.
const CREDIT_NEEDED: u32 = 4;
const TRIED_EVERY: u32 = 16;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Look {
    Again,
    /// It is time to sleep.
    Enough,
}

#[derive(Debug)]
pub(crate) struct AdaptiveSpin {
    window: Duration,
    credit: u32,
    skipped: u32,
    hits: u32,
    rest: Duration,
    rest_until: Option<Instant>,
    begun: Instant,
    /// When the last look ended; none yet, this time.
    looked: Option<Instant>,
}

impl AdaptiveSpin {
    pub(crate) fn new(window: Duration, now: Instant) -> Self {
        Self {
            window,
            credit: CREDIT_MAX / 2,
            skipped: 0,
            hits: 0,
            rest: REST_MIN,
            rest_until: None,
            begun: now,
            looked: None,
        }
    }

    /// Whether to look at all, this time.
    pub(crate) fn begin(&mut self, now: Instant) -> Look {
        if self.window.is_zero() {
            return Look::Enough;
        }
        if self.rest_until.is_some_and(|until| now < until) {
            return Look::Enough;
        }
        self.rest_until = None;
        if self.credit < CREDIT_NEEDED && self.skipped < TRIED_EVERY {
            self.skipped += 1;
            return Look::Enough;
        }
        self.skipped = 0;
        self.begun = now;
        self.looked = None;
        Look::Again
    }

    /// After a look that found nothing.
    pub(crate) fn missed(&mut self, now: Instant) -> Look {
        if self.disturbed(now) {
            return Look::Enough;
        }
        if now.duration_since(self.begun) > self.window {
            self.credit = self.credit.saturating_sub(1);
            return Look::Enough;
        }
        Look::Again
    }

    /// After a look that found something.
    pub(crate) fn found(&mut self, now: Instant) {
        self.credit = (self.credit + CREDIT_EARNED).min(CREDIT_MAX);
        if !self.disturbed(now) {
            self.hits += 1;
            if self.hits >= FORGIVEN_AFTER {
                self.hits = 0;
                self.rest = (self.rest / 2).max(REST_MIN);
            }
        }
    }

    fn disturbed(&mut self, now: Instant) -> bool {
        // The first one also submits what was asked for, which takes its time.
        let before = self.looked.replace(now);
        if before.is_none_or(|before| now.duration_since(before) <= DISTURBED_AFTER) {
            return false;
        }
        self.hits = 0;
        self.rest_until = Some(now + self.rest);
        self.rest = (self.rest * 2).min(REST_MAX);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: Duration = Duration::from_micros(50);
    const LOOK: Duration = Duration::from_micros(1);

    /// Looks until it is enough; how long that was.
    fn in_vain(spin: &mut AdaptiveSpin, now: &mut Instant) -> Duration {
        let begun = *now;
        let mut look = spin.begin(*now);
        while look == Look::Again {
            *now += LOOK;
            look = spin.missed(*now);
        }
        *now - begun
    }

    #[test]
    fn it_sleeps_at_once_without_a_window() {
        let now = Instant::now();
        assert_eq!(AdaptiveSpin::new(Duration::ZERO, now).begin(now), Look::Enough);
    }

    #[test]
    fn looking_in_vain_becomes_rare_and_success_makes_it_usual_again() {
        let mut now = Instant::now();
        let mut spin = AdaptiveSpin::new(WINDOW, now);
        let spent: Duration = (0..1700).map(|_| in_vain(&mut spin, &mut now)).sum();
        assert!(spent > WINDOW * 90 && spent < WINDOW * 120, "{spent:?}");
        while spin.begin(now) == Look::Enough {}
        for _ in 0..8 {
            spin.found(now);
        }
        assert_eq!(spin.begin(now), Look::Again);
    }

    #[test]
    fn a_core_that_others_want_is_left_to_them_for_longer_each_time() {
        let mut now = Instant::now();
        let mut spin = AdaptiveSpin::new(WINDOW, now);
        for rest in [1, 2, 4, 8].map(Duration::from_millis) {
            assert_eq!(spin.begin(now), Look::Again);
            now += Duration::from_micros(30);
            assert_eq!(spin.missed(now), Look::Again);
            now += Duration::from_micros(30);
            assert_eq!(spin.missed(now), Look::Enough);
            assert_eq!(spin.begin(now + rest - LOOK), Look::Enough);
            now += rest;
        }
        assert_eq!(spin.begin(now), Look::Again);
        for _ in 0..FORGIVEN_AFTER {
            now += LOOK;
            spin.found(now);
        }
        assert_eq!(spin.rest, Duration::from_millis(8));
    }
}
