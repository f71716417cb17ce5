//! Where the time of one request of a user went: how long the client had it, and what the round trip that was answered
//! last consisted of. With several replicas that is the one that everybody waited for.

use std::cell::Cell;
use std::time::Duration;
use torus_rpc::message::Took;
use torus_rpc::runtime::Instant;
use torus_schema::latency::{OperationKind, Stage, Stages};

/// One round trip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    /// Handed to the wire.
    pub sent: Instant,
    pub answered: Instant,
    /// As the shard says.
    pub took: Took,
}

/// One request, from its beginning to its end.
#[derive(Default)]
pub struct Course {
    accepted: Instant,
    /// It has drawn a version: from then on it can be waited for or not, but no longer be given up.
    pub begun: Cell<bool>,
    last: Cell<Option<Leg>>,
}

impl Course {
    pub fn new(accepted: Instant) -> Self {
        Self { accepted, ..Self::default() }
    }

    pub fn heard(&self, leg: Leg) {
        self.last.set(Some(leg));
    }

    /// What was not part of the last round trip was the client's: the stages are as long as the whole, together.
    pub fn finished(&self, stages: &Stages, kind: OperationKind, now: Instant) {
        let whole = now.since(self.accepted);
        stages.record(kind, Stage::Whole, whole);
        let Some(Leg { sent, answered, took }) = self.last.get() else {
            return stages.record(kind, Stage::ClientQueue, whole);
        };
        let round_trip = answered.since(sent).min(whole);
        // The clocks of two hosts do not run alike, and microseconds are rounded.
        let queue = Duration::from_micros(took.queue_us.into()).min(round_trip);
        let service = Duration::from_micros(took.service_us.into()).min(round_trip - queue);
        stages.record(kind, Stage::ClientQueue, whole - round_trip);
        stages.record(kind, Stage::Wire, round_trip - queue - service);
        stages.record(kind, Stage::ShardQueue, queue);
        stages.record(kind, Stage::Disk, service);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(us: u64) -> Instant {
        Instant(Duration::from_micros(us))
    }

    fn leg(sent: u64, answered: u64, (queue_us, service_us): (u32, u32)) -> Leg {
        Leg { sent: at(sent), answered: at(answered), took: Took { queue_us, service_us } }
    }

    fn recorded(legs: &[Leg]) -> Vec<(Stage, u64)> {
        let (course, stages) = (Course::new(at(1000)), Stages::default());
        legs.iter().for_each(|leg| course.heard(*leg));
        course.finished(&stages, OperationKind::Write, at(1500));
        let counts = stages.counts();
        counts.recorded().map(|(_, stage, counts)| (stage, counts.sum().as_micros() as u64)).collect()
    }

    #[test]
    fn the_stages_are_those_of_the_round_trip_that_was_waited_for_and_as_long_as_the_whole() {
        let stages = recorded(&[leg(1100, 1200, (1, 2)), leg(1100, 1450, (20, 200))]);
        let expected = [(Stage::ClientQueue, 150), (Stage::Wire, 130), (Stage::ShardQueue, 20), (Stage::Disk, 200)];
        assert_eq!(stages, [&expected[..], &[(Stage::Whole, 500)]].concat());
    }

    #[test]
    fn a_shard_that_claims_more_than_the_round_trip_is_not_believed() {
        let stages = recorded(&[leg(1100, 1400, (100, 900))]);
        let expected = [(Stage::ClientQueue, 200), (Stage::Wire, 0), (Stage::ShardQueue, 100), (Stage::Disk, 200)];
        assert_eq!(stages, [&expected[..], &[(Stage::Whole, 500)]].concat());
    }

    #[test]
    fn what_asked_no_shard_was_the_clients_alone() {
        assert_eq!(recorded(&[]), [(Stage::ClientQueue, 500), (Stage::Whole, 500)]);
    }
}
