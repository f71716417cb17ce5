//! How long the stages of a shard's requests take, as the control port tells it: for `torusadm top` and `latency`.

use super::length;
use std::time::Duration;
use torus_schema::control_capnp::{self, shard_stages, stage_histogram};
use torus_schema::ids::ShardIndex;
use torus_schema::latency::{Counts, OperationKind, Stage, StageCounts};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardStages {
    pub index: ShardIndex,
    pub stages: StageCounts,
}

fn wire_kind(kind: OperationKind) -> control_capnp::OperationKind {
    match kind {
        OperationKind::Read => control_capnp::OperationKind::Read,
        OperationKind::Write => control_capnp::OperationKind::Write,
        OperationKind::Flush => control_capnp::OperationKind::Flush,
    }
}

fn wire_stage(stage: Stage) -> control_capnp::Stage {
    match stage {
        Stage::ClientQueue => control_capnp::Stage::ClientQueue,
        Stage::Wire => control_capnp::Stage::Wire,
        Stage::ShardQueue => control_capnp::Stage::ShardQueue,
        Stage::Disk => control_capnp::Stage::Disk,
        Stage::Reply => control_capnp::Stage::Reply,
        Stage::Whole => control_capnp::Stage::Whole,
    }
}

pub fn set_stages(mut to: shard_stages::Builder<'_>, shard: &ShardStages) {
    to.set_index(shard.index.0);
    let recorded: Vec<_> = shard.stages.recorded().collect();
    let mut stages = to.init_stages(length(recorded.len()));
    for (position, (kind, stage, counts)) in (0u32..).zip(recorded) {
        let mut to = stages.reborrow().get(position);
        to.set_operation(wire_kind(kind));
        to.set_stage(wire_stage(stage));
        to.set_sum_ns(u64::try_from(counts.sum().as_nanos()).unwrap_or(u64::MAX));
        to.set_max_us(counts.max_us());
        let told: Vec<_> = counts.told().collect();
        let mut buckets = to.reborrow().init_buckets(length(told.len()));
        for (position, (bucket, _)) in (0u32..).zip(&told) {
            buckets.set(position, *bucket as u16);
        }
        let mut numbers = to.init_counts(length(told.len()));
        for (position, (_, count)) in (0u32..).zip(&told) {
            numbers.set(position, *count);
        }
    }
}

/// Operations and stages that a later version may tell of are passed over.
pub(super) fn get_stages(from: shard_stages::Reader<'_>) -> Result<ShardStages, capnp::Error> {
    let mut stages = StageCounts::default();
    for told in from.get_stages()?.iter() {
        let kind = OperationKind::ALL.into_iter().find(|kind| told.get_operation() == Ok(wire_kind(*kind)));
        let stage = Stage::ALL.into_iter().find(|stage| told.get_stage() == Ok(wire_stage(*stage)));
        if let (Some(kind), Some(stage)) = (kind, stage) {
            stages.set(kind, stage, get_counts(told)?);
        }
    }
    Ok(ShardStages { index: ShardIndex(from.get_index()), stages })
}

fn get_counts(from: stage_histogram::Reader<'_>) -> Result<Counts, capnp::Error> {
    let buckets = from.get_buckets()?.iter().map(usize::from);
    let told: Vec<_> = buckets.zip(from.get_counts()?.iter()).collect();
    Ok(Counts::from_told(told, Duration::from_nanos(from.get_sum_ns()), from.get_max_us()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use capnp::message::Builder;
    use torus_schema::latency::Stages;

    #[test]
    fn what_was_recorded_arrives_as_it_was() {
        let stages = Stages::default();
        for (number, kind) in (1u64..).zip(OperationKind::ALL) {
            for stage in Stage::ALL {
                (0..40).for_each(|step| stages.record(kind, stage, Duration::from_micros(number << step)));
            }
        }
        let shard = ShardStages { index: ShardIndex(3), stages: stages.counts() };
        let mut message = Builder::new_default();
        set_stages(message.init_root(), &shard);
        assert_eq!(get_stages(message.get_root_as_reader().unwrap()).unwrap(), shard);
    }

    #[test]
    fn nothing_recorded_is_no_list() {
        let shard = ShardStages { index: ShardIndex(0), stages: StageCounts::default() };
        let mut message = Builder::new_default();
        set_stages(message.init_root(), &shard);
        let told = message.get_root_as_reader::<shard_stages::Reader<'_>>().unwrap();
        assert_eq!(told.get_stages().unwrap().len(), 0);
        assert_eq!(get_stages(told).unwrap(), shard);
    }
}
