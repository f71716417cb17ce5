//! Reads that are asked at nearly the same time are asked of the same replica: one message, one wake-up and one batch of
//! its disk instead of several of each. Pure.

use super::replicas::ShardPosition;
use torus_rpc::runtime::Instant;
use torus_schema::limits::{READS_TOGETHER_BYTES_MAX, READS_TOGETHER_WITHIN};

/// Those that the next read may join.
#[derive(Clone, Copy, Debug)]
pub(super) struct Together {
    replica: ShardPosition,
    /// When the first was asked.
    since: Instant,
    bytes: u64,
}

impl Together {
    /// A read that joins nobody.
    pub fn first(replica: ShardPosition, bytes: u64, now: Instant) -> Self {
        Self { replica, since: now, bytes }
    }

    /// With a read of so many bytes; `None` if it is too late, or too much.
    pub fn joined(self, bytes: u64, now: Instant) -> Option<Self> {
        let bytes = self.bytes + bytes;
        let fits = bytes <= READS_TOGETHER_BYTES_MAX && now.since(self.since) < READS_TOGETHER_WITHIN;
        fits.then_some(Self { bytes, ..self })
    }

    pub fn replica(self) -> ShardPosition {
        self.replica
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const AT: Instant = Instant(Duration::from_secs(9));

    #[test]
    fn reads_join_until_they_are_as_much_as_a_message_takes() {
        let mut together = Together::first(2, 4096, AT);
        for _ in 1..READS_TOGETHER_BYTES_MAX / 4096 {
            together = together.joined(4096, AT).unwrap();
            assert_eq!(together.replica(), 2);
        }
        assert!(together.joined(512, AT).is_none());
        assert!(Together::first(2, 4096, AT).joined(READS_TOGETHER_BYTES_MAX, AT).is_none(), "a large one");
    }

    #[test]
    fn a_read_that_comes_later_joins_nobody() {
        let together = Together::first(2, 4096, AT);
        let last = AT.after(READS_TOGETHER_WITHIN - Duration::from_nanos(1));
        let joined = together.joined(4096, last).unwrap();
        assert!(joined.joined(4096, AT.after(READS_TOGETHER_WITHIN)).is_none(), "the first counts, not the last");
    }
}
