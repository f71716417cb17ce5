//! What a target did, in numbers; any thread may read them.

use super::target::Dropped;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Default)]
pub struct Count(AtomicU64);

impl Count {
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Of a process.
#[derive(Default)]
pub struct Counts {
    pub frames_received: Count,
    pub frames_sent: Count,
    /// Answers that the interface did not take.
    pub frames_unsent: Count,
    /// The kernel had no room for them.
    pub kernel_drops: Count,
    pub reads: Count,
    pub read_bytes: Count,
    pub writes: Count,
    pub written_bytes: Count,
    pub trims: Count,
    pub flushes: Count,
    /// Writes that came again and were answered without being applied again.
    pub answered_again: Count,
    /// ATA commands that ended in an error of the volume.
    pub failed: Count,
    pub dropped: [Count; Dropped::ALL.len()],
    /// Targets that are served here now.
    pub owned: AtomicU64,
}

impl Counts {
    pub fn leave_out(&self, why: Dropped) {
        self.dropped[why as usize].add(1);
    }

    pub fn dropped(&self, why: Dropped) -> u64 {
        self.dropped[why as usize].get()
    }

    /// Prometheus' text format.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let plain = [
            ("frames_received", "Frames received", &self.frames_received),
            ("frames_sent", "Frames sent", &self.frames_sent),
            ("frames_unsent", "Answers that an interface did not take", &self.frames_unsent),
            ("kernel_drops", "Frames that the kernel dropped because the socket was full", &self.kernel_drops),
            ("reads", "ATA reads", &self.reads),
            ("read_bytes", "Bytes read by them", &self.read_bytes),
            ("writes", "ATA writes", &self.writes),
            ("written_bytes", "Bytes written by them", &self.written_bytes),
            ("trims", "ATA trims", &self.trims),
            ("flushes", "ATA flushes", &self.flushes),
            ("answered_again", "Writes that came again and were not applied again", &self.answered_again),
            ("failed", "ATA commands that ended in an error of the volume", &self.failed),
        ];
        for (name, help, count) in plain {
            let _ = write!(text, "# HELP torus_aoe_{name}_total {help}\n# TYPE torus_aoe_{name}_total counter\n");
            let _ = writeln!(text, "torus_aoe_{name}_total {}", count.get());
        }
        let name = "torus_aoe_dropped_total";
        let _ = write!(text, "# HELP {name} Frames that were not answered, by reason\n# TYPE {name} counter\n");
        for why in Dropped::ALL {
            let _ = writeln!(text, "{name}{{reason=\"{}\"}} {}", why.name(), self.dropped(why));
        }
        let owned = self.owned.load(Ordering::Relaxed);
        let name = "torus_aoe_targets";
        let _ = write!(text, "# HELP {name} Targets that are served by this process now\n# TYPE {name} gauge\n");
        let _ = writeln!(text, "{name} {owned}");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_own_line() {
        let counts = Counts::default();
        counts.leave_out(Dropped::Late);
        for (index, why) in Dropped::ALL.into_iter().enumerate() {
            assert_eq!(why as usize, index, "{why:?} is out of its place");
        }
        let text = counts.to_text();
        assert!(text.contains("torus_aoe_dropped_total{reason=\"late\"} 1"), "{text}");
        assert_eq!(text.matches("torus_aoe_dropped_total{").count(), Dropped::ALL.len());
    }
}
