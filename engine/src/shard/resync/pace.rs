//! How fast resyncs may fill this shard: a bound in bytes a second for all of them together, halved as long as clients
//! wait longer than they do without a resync, and growing back when they do not. Pure: the caller gives the time.

use std::time::Duration;
use torus_rpc::runtime::Instant;
use torus_schema::limits::RESYNC_PACE_MIN_BYTES_S;

/// Between two changes of the pace: some requests of clients have to be seen under each.
const ADJUST_EVERY: Duration = Duration::from_millis(100);
/// How long after the last byte moved the shard counts as quiet.
const QUIET_AFTER: Duration = Duration::from_millis(500);
/// Below this nobody complains, whatever it was before: a moving average of few requests is not exact.
const UNNOTICED_US: f64 = 2000.0;

/// A moving average over about 32 requests.
#[derive(Clone, Copy, Debug, Default)]
struct Average {
    us: f64,
    known: bool,
}

impl Average {
    fn add(&mut self, took: Duration) {
        let us = took.as_micros() as f64;
        self.us = if self.known { self.us + (us - self.us) / 32.0 } else { us };
        self.known = true;
    }
}

/// Twice as slow as usual, and so that one notices.
fn is_strained(now: Average, usual: Average) -> bool {
    now.known && now.us > UNNOTICED_US.max(2.0 * usual.us)
}

#[derive(Debug)]
pub struct Pacer {
    limit: f64,
    pace: f64,
    /// What was admitted has moved by then.
    free_at: Instant,
    adjusted: Instant,
    moved: Option<Instant>,
    /// Requests of clients here, without a resync and beside one.
    quiet: Average,
    busy: Average,
    /// Reads at the source, now and at their best.
    source: Average,
    source_best: Average,
}

impl Pacer {
    pub fn new(limit_bytes_s: u64) -> Self {
        let limit = limit_bytes_s.max(RESYNC_PACE_MIN_BYTES_S) as f64;
        Self {
            limit,
            pace: limit / 4.0,
            free_at: Instant::default(),
            adjusted: Instant::default(),
            moved: None,
            quiet: Average::default(),
            busy: Average::default(),
            source: Average::default(),
            source_best: Average::default(),
        }
    }

    pub fn set_limit(&mut self, limit_bytes_s: u64) {
        self.limit = limit_bytes_s.max(RESYNC_PACE_MIN_BYTES_S) as f64;
        self.pace = self.pace.min(self.limit);
    }

    /// How long to wait before so many bytes are moved; they count from now on.
    pub fn take(&mut self, now: Instant, bytes: u64) -> Duration {
        self.adjust(now);
        let start = self.free_at.max(now);
        self.free_at = start.after(Duration::from_secs_f64(bytes as f64 / self.pace));
        self.moved = Some(self.free_at);
        start.since(now)
    }

    /// A client's request was answered here.
    pub fn answered(&mut self, now: Instant, took: Duration) {
        if self.moved.is_some_and(|moved| now.since(moved) < QUIET_AFTER) {
            self.busy.add(took);
        } else {
            self.quiet.add(took);
            self.busy = Average::default();
        }
    }

    /// The source answered a read.
    pub fn source_answered(&mut self, took: Duration) {
        self.source.add(took);
        if !self.source_best.known || self.source.us < self.source_best.us {
            self.source_best = self.source;
        } else {
            // What was best once need not be possible for ever.
            self.source_best.us *= 1.001;
        }
    }

    fn adjust(&mut self, now: Instant) {
        if now.since(self.adjusted) < ADJUST_EVERY {
            return;
        }
        self.adjusted = now;
        let strained = is_strained(self.busy, self.quiet) || is_strained(self.source, self.source_best);
        let pace = if strained { self.pace / 2.0 } else { self.pace * 1.25 };
        self.pace = pace.clamp(RESYNC_PACE_MIN_BYTES_S as f64, self.limit);
        // Of what comes next.
        self.busy = Average::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::limits::MIB;

    const FRAME: u64 = MIB / 4;

    fn at(ms: u64) -> Instant {
        Instant(Duration::from_millis(ms))
    }

    /// Bytes moved within a second by somebody who always wants to; clients are answered after `latency` meanwhile.
    fn one_second(pacer: &mut Pacer, start_ms: u64, latency: Option<Duration>) -> u64 {
        let (mut now, mut moved) = (at(start_ms), 0);
        while now < at(start_ms + 1000) {
            let wait = pacer.take(now, FRAME);
            now = now.after(wait);
            moved += FRAME;
            latency.into_iter().for_each(|latency| pacer.answered(now, latency));
        }
        moved
    }

    #[test]
    fn an_idle_shard_is_filled_as_fast_as_allowed_and_no_faster() {
        let mut pacer = Pacer::new(100 * MIB);
        one_second(&mut pacer, 1000, None);
        one_second(&mut pacer, 2000, None);
        let moved = one_second(&mut pacer, 3000, None);
        assert!((95 * MIB..=101 * MIB).contains(&moved), "{moved}");
    }

    #[test]
    fn it_makes_way_while_clients_are_twice_as_slow_and_comes_back_when_they_are_not() {
        let mut pacer = Pacer::new(100 * MIB);
        (0..50).for_each(|_| pacer.answered(at(500), Duration::from_millis(2)));
        one_second(&mut pacer, 1000, Some(Duration::from_millis(10)));
        let moved = one_second(&mut pacer, 2000, Some(Duration::from_millis(10)));
        assert!(moved <= 2 * RESYNC_PACE_MIN_BYTES_S, "{moved}");
        one_second(&mut pacer, 3000, Some(Duration::from_millis(3)));
        one_second(&mut pacer, 4000, Some(Duration::from_millis(3)));
        let moved = one_second(&mut pacer, 5000, Some(Duration::from_millis(3)));
        assert!(moved > 80 * MIB, "{moved}");
    }

    #[test]
    fn it_makes_way_for_the_clients_of_the_source() {
        let mut pacer = Pacer::new(100 * MIB);
        (0..50).for_each(|_| pacer.source_answered(Duration::from_millis(2)));
        one_second(&mut pacer, 1000, None);
        (0..50).for_each(|_| pacer.source_answered(Duration::from_millis(20)));
        one_second(&mut pacer, 2000, None);
        let moved = one_second(&mut pacer, 3000, None);
        assert!(moved <= 2 * RESYNC_PACE_MIN_BYTES_S, "{moved}");
    }
}
