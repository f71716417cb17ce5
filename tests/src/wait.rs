//! Awaiting what another process does. It cannot wake us, so this is the one place that polls.

use std::time::{Duration, Instant};

const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// Enough for whatever a healthy process does, on a machine that runs many tests at once.
pub const SOON: Duration = Duration::from_secs(60);

/// What `look` finds, as soon as it finds something; panics with `what` after `SOON`.
pub fn until<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    within(SOON, look).unwrap_or_else(|| panic!("waited {SOON:?} in vain for {what}"))
}

/// As `until`, without a pause between looks: for what is gone again within milliseconds.
pub fn until_glimpsed<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    while started.elapsed() < SOON {
        if let Some(found) = look() {
            return found;
        }
        std::thread::yield_now();
    }
    panic!("watched for {what} in vain for {SOON:?}");
}

/// `None` when the time is up.
pub fn within<T>(deadline: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let started = Instant::now();
    loop {
        if let Some(found) = look() {
            return Some(found);
        }
        if started.elapsed() > deadline {
            return None;
        }
        std::thread::sleep(LOOK_AGAIN);
    }
}
