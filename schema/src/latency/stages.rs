//! The stages of an operation, from who asks to the disk and back, and a histogram of each.
//!
//! ```text
//!  client (volume)                             shard
//!  accepted ──► handed to the wire ── … ──► arrived ──► its disk operation begins ──► that is done ──► to the socket
//!  └ client queue ┘                            └── shard queue ──┘└────── disk ───────┘└──── reply ────┘
//!                 └──────────── round trip = wire + shard queue + disk ─────────── … ──► answered
//! ```
//! A shard tells its part of the round trip in its answer; what is left of it is *wire*: both network stacks, the network,
//! and what an answer waits for after the disk.

use super::{Counts, Histogram};
use std::time::Duration;

/// What users ask of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OperationKind {
    Read,
    /// Clears too.
    Write,
    Flush,
}

impl OperationKind {
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Flush];

    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// In the client, outside of the round trip that came last: locks, waiting for room or for a replica that is away,
    /// requests before that one.
    ClientQueue,
    /// The round trip, without what the shard says it took.
    Wire,
    /// From the arrival at the shard until a disk operation begins for it.
    ShardQueue,
    /// That disk operation. As a client counts it: and what the shard does until it answers.
    Disk,
    /// From the end of the disk operation until the answer was handed to the socket.
    Reply,
    /// As the user of the volume sees it. No stage of its own: the sum of the client's.
    Whole,
}

impl Stage {
    pub const ALL: [Self; 6] = [Self::ClientQueue, Self::Wire, Self::ShardQueue, Self::Disk, Self::Reply, Self::Whole];

    pub fn name(self) -> &'static str {
        match self {
            Self::ClientQueue => "client_queue",
            Self::Wire => "wire",
            Self::ShardQueue => "shard_queue",
            Self::Disk => "disk",
            Self::Reply => "reply",
            Self::Whole => "whole",
        }
    }
}

const HISTOGRAMS: usize = OperationKind::ALL.len() * Stage::ALL.len();

fn place(kind: OperationKind, stage: Stage) -> usize {
    kind as usize * Stage::ALL.len() + stage as usize
}

/// As in `Histogram`, there is one thread that records.
#[derive(Debug)]
pub struct Stages(Box<[Histogram]>);

impl Default for Stages {
    fn default() -> Self {
        Self((0..HISTOGRAMS).map(|_| Histogram::default()).collect())
    }
}

impl Stages {
    pub fn record(&self, kind: OperationKind, stage: Stage, took: Duration) {
        self.0[place(kind, stage)].record(took);
    }

    pub fn counts(&self) -> StageCounts {
        StageCounts(self.0.iter().map(Histogram::counts).collect())
    }
}

/// What `Stages` held at some moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageCounts(Vec<Counts>);

impl Default for StageCounts {
    fn default() -> Self {
        Self(vec![Counts::default(); HISTOGRAMS])
    }
}

impl StageCounts {
    pub fn get(&self, kind: OperationKind, stage: Stage) -> &Counts {
        &self.0[place(kind, stage)]
    }

    pub fn set(&mut self, kind: OperationKind, stage: Stage, counts: Counts) {
        self.0[place(kind, stage)] = counts;
    }

    pub fn merge(&mut self, other: &StageCounts) {
        self.0.iter_mut().zip(&other.0).for_each(|(own, other)| own.merge(other));
    }

    pub fn since(&self, earlier: &StageCounts) -> StageCounts {
        StageCounts(self.0.iter().zip(&earlier.0).map(|(now, earlier)| now.since(earlier)).collect())
    }

    /// Those of which something was recorded.
    pub fn recorded(&self) -> impl Iterator<Item = (OperationKind, Stage, &Counts)> {
        let all = OperationKind::ALL.into_iter().flat_map(|kind| Stage::ALL.map(|stage| (kind, stage)));
        all.map(|(kind, stage)| (kind, stage, self.get(kind, stage))).filter(|(.., counts)| counts.count() > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_of_every_operation_has_a_histogram_of_its_own() {
        let stages = Stages::default();
        for (number, kind) in (0u64..).zip(OperationKind::ALL) {
            for (more, stage) in (1u64..).zip(Stage::ALL) {
                (0..10 * number + more).for_each(|_| stages.record(kind, stage, Duration::from_micros(7)));
            }
        }
        let mut counts = stages.counts();
        counts.merge(&stages.counts());
        assert_eq!(counts.recorded().count(), HISTOGRAMS);
        assert_eq!(counts.get(OperationKind::Flush, Stage::Whole).count(), 2 * 26);
        assert_eq!(counts.since(&stages.counts()), stages.counts());
    }
}
