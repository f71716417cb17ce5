//! What requests go through in a shard, and how long each stage takes: of all together, and of each volume that is used.

use super::Chunks;
use std::cell::{Cell, RefCell};
use std::time::Duration;
use torus_rpc::message::{Answer, Took};
use torus_rpc::runtime::{Instant, Runtime};
use torus_rpc::server::Finished;
use torus_schema::hash::Map;
use torus_schema::ids::VolumeId;
use torus_schema::latency::{OperationKind, Stage, StageCounts, Stages};
use torus_schema::limits::{STAGES_KEPT_AT_LEAST, STAGES_VOLUMES_MAX};

/// A disk operation, or the first and last of several.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    pub began: Instant,
    pub ended: Instant,
}

impl Span {
    pub fn and(self, other: Option<Span>) -> Span {
        let Some(other) = other else { return self };
        Span { began: self.began.min(other.began), ended: self.ended.max(other.ended) }
    }
}

/// An answer, and what the disk did for it.
pub(super) struct Done<R: Runtime> {
    pub answer: Answer,
    pub chunks: Chunks<R>,
    /// `None`: nothing, or nobody wants to know.
    pub disk: Option<Span>,
}

impl<R: Runtime> From<Answer> for Done<R> {
    fn from(answer: Answer) -> Self {
        Self { answer, chunks: Default::default(), disk: None }
    }
}

/// How a request of a user went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Course {
    pub kind: OperationKind,
    pub queue: Duration,
    /// `None`: the answer was in memory.
    pub disk: Option<Duration>,
    /// The disk's part.
    pub ended: Instant,
}

impl Course {
    /// And what its client is told. `arrived`, `answered`: of the request.
    pub fn new(kind: OperationKind, arrived: Instant, disk: Option<Span>, answered: Instant) -> (Self, Took) {
        let span = disk.unwrap_or(Span { began: answered, ended: answered });
        let queue = span.began.since(arrived);
        let course = Self { kind, queue, disk: disk.map(|span| span.ended.since(span.began)), ended: span.ended };
        (course, Took::new(queue, answered.since(span.began)))
    }
}

/// Kept for as long as the process runs, whatever happens to the disk.
#[derive(Default)]
pub struct Measured {
    all: Stages,
    volumes: RefCell<Map<VolumeId, OfVolume>>,
    /// Of the last look for a volume that is not used any more.
    looked: Cell<Instant>,
}

struct OfVolume {
    stages: Stages,
    used: Cell<Instant>,
}

impl Measured {
    /// Gives what is to be told when the answer is sent.
    pub fn answered(&self, volume: VolumeId, course: Course) -> Finished {
        let Course { kind, queue, disk, ended } = course;
        self.each(volume, ended, |stages| {
            stages.record(kind, Stage::ShardQueue, queue);
            if let Some(disk) = disk {
                stages.record(kind, Stage::Disk, disk);
            }
        });
        Finished { volume, kind, at: ended }
    }

    pub fn sent(&self, what: Finished, after: Duration) {
        self.each(what.volume, what.at, |stages| stages.record(what.kind, Stage::Reply, after));
    }

    /// Of one volume, or of all; empty if that volume is not among those that are kept.
    pub fn counts(&self, only: Option<VolumeId>) -> StageCounts {
        let Some(volume) = only else { return self.all.counts() };
        self.volumes.borrow().get(&volume).map(|volume| volume.stages.counts()).unwrap_or_default()
    }

    fn each(&self, volume: VolumeId, now: Instant, record: impl Fn(&Stages)) {
        record(&self.all);
        if let Some(known) = self.volumes.borrow().get(&volume) {
            known.used.set(now);
            return record(&known.stages);
        }
        if self.make_room(now) {
            let known = OfVolume { stages: Stages::default(), used: Cell::new(now) };
            record(&known.stages);
            self.volumes.borrow_mut().insert(volume, known);
        }
    }

    /// For one more volume. If there are more in use than are kept, the latecomers do without: who threw out one of the
    /// others would allocate with every request.
    fn make_room(&self, now: Instant) -> bool {
        let mut volumes = self.volumes.borrow_mut();
        if volumes.len() < STAGES_VOLUMES_MAX {
            return true;
        }
        if now.since(self.looked.replace(now)) < STAGES_KEPT_AT_LEAST {
            return false;
        }
        volumes.retain(|_, volume| now.since(volume.used.get()) < STAGES_KEPT_AT_LEAST);
        volumes.len() < STAGES_VOLUMES_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(us: u64) -> Instant {
        Instant(Duration::from_micros(us))
    }

    fn course(at_us: u64) -> Course {
        let disk = Some(Span { began: at(at_us), ended: at(at_us + 70) });
        Course::new(OperationKind::Read, at(at_us - 5), disk, at(at_us + 72)).0
    }

    #[test]
    fn what_a_client_is_told_is_all_of_the_time_the_shard_had_its_request() {
        let disk = Some(Span { began: at(130), ended: at(200) });
        let (course, took) = Course::new(OperationKind::Write, at(100), disk, at(207));
        assert_eq!((course.queue.as_micros(), course.disk.map(|disk| disk.as_micros())), (30, Some(70)));
        assert_eq!((course.ended, took), (at(200), Took { queue_us: 30, service_us: 77 }));
        let (course, took) = Course::new(OperationKind::Read, at(100), None, at(107));
        assert_eq!((course.disk, course.ended, took), (None, at(107), Took { queue_us: 7, service_us: 0 }));
    }

    #[test]
    fn volumes_that_are_used_are_kept_and_others_make_room() {
        let measured = Measured::default();
        let volume = |number: usize| VolumeId::from_bytes([number as u8 + 1; 16]);
        let reads = |number| measured.counts(Some(volume(number))).get(OperationKind::Read, Stage::Disk).count();
        for number in 0..=STAGES_VOLUMES_MAX {
            let finished = measured.answered(volume(number), course(1000));
            measured.sent(finished, Duration::from_micros(3));
        }
        assert_eq!((reads(0), reads(STAGES_VOLUMES_MAX)), (1, 0), "the last one came too late");
        let later = STAGES_KEPT_AT_LEAST.as_micros() as u64 * 2;
        measured.answered(volume(0), course(later));
        measured.answered(volume(STAGES_VOLUMES_MAX), course(later));
        assert_eq!((reads(0), reads(1), reads(STAGES_VOLUMES_MAX)), (2, 0, 1));
        let all = measured.counts(None);
        assert_eq!(all.get(OperationKind::Read, Stage::Disk).count(), STAGES_VOLUMES_MAX as u64 + 3);
        assert_eq!(all.get(OperationKind::Read, Stage::Reply).quantile_us(0.5), 3);
    }
}
