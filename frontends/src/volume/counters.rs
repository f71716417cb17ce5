//! What happened to the volumes of a process, in numbers, for whoever watches it. Kept by the executors, read by any
//! thread; written out as `torusblk serve --stats FILE` asks (Prometheus' text format).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use torus_schema::latency::{StageCounts, Stages};

/// Goes up only, or up and down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
}

#[derive(Default, Debug)]
pub struct Number(AtomicU64);

impl Number {
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn sub(&self, count: u64) {
        self.0.fetch_sub(count, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// One more until the guard is dropped.
    pub fn hold(this: &Arc<Counters>, which: impl Fn(&Counters) -> &Number + 'static) -> Held {
        which(this).add(1);
        let counters = this.clone();
        Held(Box::new(move || which(&counters).sub(1)))
    }
}

pub struct Held(Box<dyn Fn()>);

impl Drop for Held {
    fn drop(&mut self) {
        (self.0)();
    }
}

macro_rules! counters {
    ($($name:ident, $kind:ident, $help:literal;)*) => {
        #[derive(Default, Debug)]
        pub struct Counters {
            $(#[doc = $help] pub $name: Number,)*
            /// Of each executor, since only one thread may write to them.
            stages: Mutex<Vec<Arc<Stages>>>,
        }

        impl Counters {
            fn all(&self) -> Vec<(&'static str, Kind, &'static str, u64)> {
                vec![$((stringify!($name), Kind::$kind, $help, self.$name.get()),)*]
            }
        }
    };
}

counters! {
    volumes_attached, Gauge, "Volumes attached by this process";
    sessions_ended, Counter, "Sessions that ended otherwise than by being released: fenced, or data lost";
    volumes_waiting, Gauge, "Volumes whose I/O waits because too few replicas are there";
    waits, Counter, "How often a volume began to wait for replicas";
    io_timeouts, Counter, "Requests failed by --io-timeout";
    replicas_marked_stale, Counter, "Shards marked stale, counted for each volume";
    status_transactions, Counter, "Transactions that marked them, tries included";
    reads, Counter, "Reads sent to a replica";
    reads_confirmed, Counter, "Reads that more than one replica had to confirm, the lease not being valid";
    reads_hedged, Counter, "Reads asked of a second replica because the first was slow";
    reads_hedged_won, Counter, "Of those, answered first by the second";
    requests_queued, Counter, "Requests that waited for their volume's share of memory";
}

impl Counters {
    /// For one more executor.
    pub fn stages_of_executor(&self) -> Arc<Stages> {
        let stages = Arc::<Stages>::default();
        self.stages.lock().unwrap_or_else(PoisonError::into_inner).push(stages.clone());
        stages
    }

    /// How long the stages of requests took, of all executors together.
    pub fn stages(&self) -> StageCounts {
        let mut all = StageCounts::default();
        let stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        stages.iter().for_each(|stages| all.merge(&stages.counts()));
        all
    }

    pub fn to_text(&self) -> String {
        let line = |(name, kind, help, value): (&str, Kind, &str, u64)| {
            let (kind, suffix) = match kind {
                Kind::Counter => ("counter", "_total"),
                Kind::Gauge => ("gauge", ""),
            };
            let name = format!("torus_{name}{suffix}");
            format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}\n")
        };
        self.all().into_iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_told_with_their_names_kinds_and_meaning() {
        let counters = Arc::new(Counters::default());
        counters.waits.add(3);
        let held = Number::hold(&counters, |counters| &counters.volumes_waiting);
        let text = counters.to_text();
        assert!(text.contains("# TYPE torus_waits_total counter\ntorus_waits_total 3\n"), "{text}");
        assert!(text.contains("# TYPE torus_volumes_waiting gauge\ntorus_volumes_waiting 1\n"), "{text}");
        drop(held);
        assert_eq!(counters.volumes_waiting.get(), 0);
    }
}
