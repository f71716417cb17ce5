//! `torusadm top` and `torusadm latency VOLUME`: how much is asked of the shards, and in which stage its time goes. Asked
//! of the nodes themselves, at their control ports.

use super::snapshot::{Found, Nodes};
use super::{AdminError, Report};
use clap::Args;
use futures::future::join_all;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use torus_rpc::control::{self, ShardStages};
use torus_rpc::metadata::Metadata;
use torus_rpc::runtime::{Clock, Runtime};
use torus_schema::ids::{NodeId, ShardIndex, VolumeId};
use torus_schema::latency::{Counts, OperationKind, Stage, StageCounts};
use torus_schema::records::{OwnerRecord, keys};

/// What a shard can tell of; the others are the client's.
const STAGES: [Stage; 3] = [Stage::ShardQueue, Stage::Disk, Stage::Reply];

#[derive(Args, Clone, Debug)]
pub struct TopArguments {
    /// Show it once, after one interval, instead of again and again
    #[arg(long)]
    pub once: bool,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub interval: u16,
}

#[derive(Args, Clone, Debug)]
pub struct LatencyArguments {
    /// Name of the volume
    pub volume: String,
}

/// What all nodes that are up said at one time.
struct Look {
    shards: BTreeMap<(String, ShardIndex), (NodeId, StageCounts)>,
    /// Why a node said nothing.
    warnings: Vec<String>,
}

async fn look<M: Metadata>(metadata: &M, only: Option<VolumeId>, patience: Duration) -> Result<Look, AdminError> {
    let nodes = Nodes::read(metadata).await?;
    let up: Vec<_> = nodes.records.values().filter(|record| nodes.heartbeats.contains_key(&record.id)).collect();
    let answers = join_all(up.iter().map(|record| control::ask_stages(&record.control, only, patience))).await;
    let mut look = Look { shards: BTreeMap::new(), warnings: Vec::new() };
    for (record, answer) in up.into_iter().zip(answers) {
        match answer {
            Ok(shards) => {
                let keyed = |ShardStages { index, stages }| ((record.control.clone(), index), (record.id, stages));
                look.shards.extend(shards.into_iter().map(keyed));
            }
            Err(error) => look.warnings.push(error.to_string()),
        }
    }
    Ok(look)
}

/// Each look goes to `show`; ends after the first with `--once`, and else with the process.
pub async fn top<R: Runtime>(
    runtime: &R,
    arguments: &TopArguments,
    deadline: Duration,
    mut show: impl FnMut(&Report),
) -> Result<Report, AdminError> {
    let mut before = (runtime.clock().now(), look(runtime.metadata(), None, deadline / 2).await?);
    loop {
        runtime.clock().sleep(Duration::from_secs(arguments.interval.into())).await;
        let now = look(runtime.metadata(), None, deadline / 2).await?;
        let at = runtime.clock().now();
        let report = top_report(&before.1, &now, at.since(before.0));
        if arguments.once {
            return Ok(report);
        }
        show(&report);
        before = (at, now);
    }
}

fn top_report(before: &Look, now: &Look, took: Duration) -> Report {
    let (mut rows, mut documents) = (Vec::new(), Vec::new());
    let mut all: BTreeMap<&'static str, f64> = BTreeMap::new();
    for (key, (node, total)) in &now.shards {
        let none = StageCounts::default();
        let earlier = before.shards.get(key).map_or(&none, |(_, earlier)| earlier);
        let lately = total.since(earlier);
        for kind in OperationKind::ALL {
            let counted = |stages: &StageCounts| stages.get(kind, Stage::ShardQueue).count();
            if counted(total) == 0 {
                continue;
            }
            let per_second = counted(&lately) as f64 / took.as_secs_f64().max(1e-6);
            *all.entry(kind.name()).or_default() += per_second;
            let (address, shard) = key;
            let mut row = vec![address.clone(), shard.to_string(), kind.name().to_string(), format!("{per_second:.0}")];
            row.extend(STAGES.map(|stage| pair(lately.get(kind, stage))));
            rows.push(row);
            documents.push(json!({
                "node": node, "address": address, "shard": shard, "operation": kind.name(),
                "per_second": per_second, "operations": counted(&lately), "operations_total": counted(total),
                "stages": stages_document(&lately, kind), "stages_total": stages_document(total, kind),
            }));
        }
    }
    let rates: Vec<String> = all.iter().map(|(kind, rate)| format!("{rate:.0} {kind}/s")).collect();
    let sum = if rates.is_empty() { "nothing was asked of any shard yet".to_string() } else { rates.join(", ") };
    Report {
        title: format!("{} shards: {sum}", now.shards.len()),
        header: vec!["ADDRESS", "SHARD", "OPERATION", "PER SECOND", "QUEUE p50·p99", "DISK p50·p99", "REPLY p50·p99"],
        rows,
        json: json!({ "interval_s": took.as_secs_f64(), "shards": documents }),
        warnings: now.warnings.clone(),
        ..Report::default()
    }
}

fn stages_document(stages: &StageCounts, kind: OperationKind) -> Value {
    let told = |stage| (Stage::name(stage).to_string(), document(stages.get(kind, stage)));
    Value::Object(STAGES.map(told).into_iter().collect())
}

fn document(counts: &Counts) -> Value {
    json!({
        "count": counts.count(), "sum_us": counts.sum().as_micros() as u64, "p50_us": counts.quantile_us(0.5),
        "p99_us": counts.quantile_us(0.99), "p99_9_us": counts.quantile_us(0.999), "max_us": counts.max_us(),
    })
}

/// `64 µs · 1.2 ms`
fn pair(counts: &Counts) -> String {
    match counts.count() {
        0 => "-".to_string(),
        _ => format!("{} · {}", time(counts.quantile_us(0.5)), time(counts.quantile_us(0.99))),
    }
}

fn time(us: u64) -> String {
    match us {
        0 => "<1 µs".to_string(),
        1..1000 => format!("{us} µs"),
        1000..10_000 => format!("{:.1} ms", us as f64 / 1e3),
        10_000..1_000_000 => format!("{} ms", us / 1000),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

/// Nodes get half of the deadline.
pub async fn latency<M: Metadata>(
    metadata: &M,
    arguments: &LatencyArguments,
    deadline: Duration,
) -> Result<Report, AdminError> {
    let found = Found::read(metadata, &arguments.volume).await?;
    let volume = found.record.id;
    let Look { shards, warnings } = look(metadata, Some(volume), deadline / 2).await?;
    let owners = super::snapshot::by_volume::<_, OwnerRecord>(metadata, &keys::owners()).await?;
    let mut all = StageCounts::default();
    shards.values().for_each(|(_, stages)| all.merge(stages));
    let (name, owner) = (&found.record.name, owners.get(&volume));
    Ok(Report { warnings, ..latency_report(name, &all, owner) })
}

fn latency_report(name: &str, all: &StageCounts, owner: Option<&OwnerRecord>) -> Report {
    let (mut rows, mut documents) = (Vec::new(), Vec::new());
    for kind in OperationKind::ALL {
        let whole: Duration = STAGES.iter().map(|stage| all.get(kind, *stage).sum()).sum();
        for stage in STAGES {
            let counts = all.get(kind, stage);
            if counts.count() == 0 {
                continue;
            }
            let share = counts.sum().as_secs_f64() / whole.as_secs_f64().max(f64::MIN_POSITIVE);
            let times = [0.5, 0.99, 0.999].map(|quantile| time(counts.quantile_us(quantile)));
            let mut row = vec![kind.name().to_string(), stage.name().to_string(), counts.count().to_string()];
            row.extend(times);
            row.extend([time(counts.max_us()), format!("{:.0}%", share * 100.0)]);
            rows.push(row);
            let mut told = document(counts);
            told["operation"] = kind.name().into();
            told["stage"] = stage.name().into();
            told["share"] = share.into();
            documents.push(told);
        }
    }
    let client = match owner {
        Some(owner) => format!("it is attached by {} on {} (pid {})", owner.process, owner.host, owner.pid),
        None => "nobody has it attached".to_string(),
    };
    let mut summary = Vec::new();
    if rows.is_empty() {
        summary.push(format!("no shard that is up has been asked for {name} of late"));
    }
    summary.push(format!(
        "each replica that was asked counts; client queue, wire and the whole are told by the client at its --http: {client}"
    ));
    Report {
        header: vec!["OPERATION", "STAGE", "COUNT", "p50", "p99", "p99.9", "MAX", "OF ITS TIME"],
        rows,
        summary,
        json: json!({ "volume": name, "owner": owner, "stages": documents }),
        ..Report::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::output::Format;
    use super::*;
    use torus_schema::latency::Stages;

    fn stages(reads: u64, disk_us: u64) -> StageCounts {
        let stages = Stages::default();
        for _ in 0..reads {
            stages.record(OperationKind::Read, Stage::ShardQueue, Duration::from_micros(100));
            stages.record(OperationKind::Read, Stage::Disk, Duration::from_micros(disk_us));
        }
        stages.counts()
    }

    fn look(told: StageCounts) -> Look {
        let shards = [(("10.0.0.7:7000".to_string(), ShardIndex(1)), (NodeId::from_bytes([3; 16]), told))];
        Look { shards: shards.into(), warnings: Vec::new() }
    }

    #[test]
    fn top_shows_what_happened_between_two_looks() {
        let mut later = stages(100, 200);
        later.merge(&stages(50, 3000));
        let report = top_report(&look(stages(100, 200)), &look(later), Duration::from_secs(2));
        assert_eq!(report.title, "1 shards: 25 read/s");
        let [row] = &report.rows[..] else { panic!("{:?}", report.rows) };
        assert_eq!(row[..4], ["10.0.0.7:7000", "1", "read", "25"]);
        assert!(row[5].contains("ms ·") && row[6] == "-", "{row:?}");
        let shard = &report.json["shards"][0];
        assert_eq!((&shard["operations"], &shard["operations_total"]), (&json!(50), &json!(150)));
        assert_eq!(shard["stages"]["disk"]["count"], 50);
    }

    #[test]
    fn a_node_that_was_started_anew_counts_from_its_start() {
        let report = top_report(&look(stages(100, 200)), &look(stages(10, 200)), Duration::from_secs(1));
        assert_eq!(report.json["shards"][0]["operations"], 10);
    }

    #[test]
    fn latency_says_in_which_stage_the_time_goes_and_who_knows_the_rest() {
        let report = latency_report("db", &stages(10, 300), None);
        let shown = report.render(Format::Table);
        assert_eq!(report.rows.len(), 2);
        assert_eq!(report.rows[1][7], "75%");
        assert!(shown.contains("shard_queue") && shown.contains("nobody has it attached"), "{shown}");
        let empty = latency_report("db", &StageCounts::default(), None).render(Format::Table);
        assert!(empty.contains("no shard that is up has been asked for db"), "{empty}");
    }

    #[test]
    fn times_are_said_in_units_that_can_be_read() {
        let shown = [0, 7, 999, 1500, 20_000, 3_200_000].map(time);
        assert_eq!(shown, ["<1 µs", "7 µs", "999 µs", "1.5 ms", "20 ms", "3.2 s"]);
    }
}
