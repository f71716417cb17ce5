//! What the node tells to who watches it: over HTTP (`--http`) its shards' numbers and latencies, and those of the volumes
//! that it serves; in a file (`--stats`) the volumes' alone.
//!
//! The HTTP server has a thread of its own; what it tells is put together here, on the main thread, when it is asked.

use crate::control::{Reporter, ShardReport};
use crate::node::NodeError;
use crate::node::serving::ServingArguments;
use crate::node::shards::NodeReporter;
use futures::channel::{mpsc, oneshot};
use futures::{FutureExt, StreamExt};
use std::fmt::Write;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use torus_frontends::aoe::counts::Counts;
use torus_frontends::serve::part::{Numbers, write_stats};
use torus_frontends::volume::Counters;
use torus_rpc::control::ShardStages;
use torus_rpc::http::{HttpListener, Told};
use torus_rpc::metrics;
use torus_schema::latency::StageCounts;

const PROGRAM: &str = "torus-engine";

/// What happened at AoE targets, and to their volumes.
#[derive(Clone, Default)]
pub struct AoeNumbers {
    pub counts: Arc<Counts>,
    pub counters: Arc<Counters>,
}

/// What happens to the volumes that the node serves.
#[derive(Clone)]
pub struct Served {
    nbd: Option<Numbers>,
    pub aoe: AoeNumbers,
    is_aoe: bool,
}

impl Served {
    /// Written to the file of `--stats` from now on, if there is one.
    pub fn start(volumes: &ServingArguments, nbd: Option<Numbers>) -> Result<Self, NodeError> {
        let served = Self::new(nbd, volumes.aoe.is_some());
        served.write_stats(volumes.options.stats.as_deref())?;
        Ok(served)
    }

    fn new(nbd: Option<Numbers>, is_aoe: bool) -> Self {
        Self { nbd, aoe: AoeNumbers::default(), is_aoe }
    }

    fn is_none(&self) -> bool {
        self.nbd.is_none() && !self.is_aoe
    }

    /// The volumes' counters of NBD and AoE have the same names: those of NBD's stand alone if there are both.
    fn numbers_text(&self) -> String {
        let mut text = match &self.nbd {
            Some(nbd) => nbd.numbers_text(),
            None if self.is_aoe => self.aoe.counters.to_text(),
            None => String::new(),
        };
        if self.is_aoe {
            text += &self.aoe.counts.to_text();
        }
        text
    }

    fn stages(&self) -> StageCounts {
        let mut stages = self.aoe.counters.stages();
        self.nbd.iter().for_each(|nbd| stages.merge(&nbd.stages()));
        stages
    }

    fn write_stats(&self, file: Option<&Path>) -> Result<(), NodeError> {
        let (Some(file), false) = (file, self.is_none()) else { return Ok(()) };
        let served = self.clone();
        let text = move || metrics::text(PROGRAM, &served.numbers_text(), &[(metrics::CLIENT_SIDE, &served.stages())]);
        write_stats(file.to_path_buf(), text).map_err(NodeError::Nbd)
    }
}

/// Until the node ends, and with it the task that answers.
pub fn tell(listener: HttpListener, reporter: Rc<NodeReporter>, served: Served) -> Result<(), NodeError> {
    let (ask, mut asked) = mpsc::unbounded::<oneshot::Sender<Told>>();
    let address = listener.address;
    let tell = move || {
        let (answer, answered) = oneshot::channel();
        let sent = ask.unbounded_send(answer);
        async move {
            sent.ok()?;
            answered.await.ok()
        }
        .boxed()
    };
    listener.serve(Arc::new(tell))?;
    tracing::info!("metrics at http://{address}/metrics");
    tokio::task::spawn_local(async move {
        while let Some(answer) = asked.next().await {
            let told = gather(&reporter, &served).await;
            // Who asked may have been too slow, or gone.
            let _ = answer.send(told);
        }
    });
    Ok(())
}

async fn gather(reporter: &NodeReporter, served: &Served) -> Told {
    let (report, stages) = futures::future::join(reporter.report(), reporter.stages(None)).await;
    let (shards, stages) = match (report, stages) {
        (Ok(report), Ok(stages)) => (report.shards, stages),
        (Err(because), _) | (_, Err(because)) => {
            return Told { metrics: metrics::text(PROGRAM, "", &[]), health: Err(because) };
        }
    };
    let failed = shards.iter().find_map(|shard| Some(format!("shard {}: {}", shard.index, shard.failed.as_ref()?)));
    Told { metrics: text(&shards, &stages, served), health: failed.map_or(Ok(()), Err) }
}

fn text(shards: &[ShardReport], stages: &[ShardStages], served: &Served) -> String {
    let labels: Vec<String> = stages.iter().map(|shard| format!("side=\"shard\",shard=\"{}\"", shard.index)).collect();
    let client = served.stages();
    let mut all: Vec<(&str, &StageCounts)> =
        labels.iter().map(String::as_str).zip(stages.iter().map(|shard| &shard.stages)).collect();
    all.push((metrics::CLIENT_SIDE, &client));
    metrics::text(PROGRAM, &(shards_text(shards) + &served.numbers_text()), &all)
}

/// Name, kind, meaning, value.
type ShardNumber = (&'static str, &'static str, &'static str, fn(&ShardReport) -> u64);

const NUMBERS: [ShardNumber; 21] = [
    ("up", "gauge", "1 while the shard's disk works", |shard| u64::from(shard.failed.is_none())),
    ("disk_failures_total", "counter", "How often its disk failed", |shard| shard.failures.into()),
    ("segments", "gauge", "Segments of its block file", |shard| shard.segments.into()),
    ("segments_free", "gauge", "Of those, free", |shard| shard.segments_free.into()),
    ("live_bytes", "gauge", "Of blocks that can be read or are kept", |shard| shard.live_bytes),
    ("volumes", "gauge", "Volumes that it has a part of", |shard| shard.volumes.into()),
    ("connections", "gauge", "Connections of clients", |shard| shard.connections.into()),
    ("reads_total", "counter", "Reads asked of it", |shard| shard.reads),
    ("writes_total", "counter", "Writes asked of it", |shard| shard.writes),
    ("flushes_total", "counter", "Flushes asked of it", |shard| shard.flushes),
    ("batches_total", "counter", "Batches written to its log", |shard| shard.batches),
    ("syncs_total", "counter", "Syncs of its disk", |shard| shard.syncs),
    ("appended_bytes_total", "counter", "Written to its log", |shard| shard.bytes_appended),
    ("checksum_errors_total", "counter", "Blocks that did not match their checksum", |shard| shard.checksum_errors),
    ("refused_total", "counter", "Requests refused", |shard| shard.refused),
    ("index_blocks", "gauge", "Blocks that its index knows", |shard| shard.index_blocks),
    ("index_bytes", "gauge", "Memory its index takes", |shard| shard.index_bytes),
    ("damaged", "gauge", "Blocks that cannot be read and are not repaired yet", |shard| shard.damaged),
    ("damaged_found_total", "counter", "Such blocks found since it was opened", |shard| shard.damaged_found),
    ("repaired_total", "counter", "Of those, repaired", |shard| shard.repaired),
    ("conflicts", "gauge", "Blocks of which a peer has another content", |shard| shard.conflicts),
];

fn shards_text(shards: &[ShardReport]) -> String {
    let mut text = String::new();
    for (name, kind, help, value) in NUMBERS {
        let _ = write!(text, "# HELP torus_shard_{name} {help}\n# TYPE torus_shard_{name} {kind}\n");
        for shard in shards {
            let _ = writeln!(text, "torus_shard_{name}{{shard=\"{}\"}} {}", shard.index, value(shard));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::ids::ShardIndex;

    #[test]
    fn every_name_is_told_once_with_a_line_for_each_shard() {
        let shard = |index| ShardReport { index: ShardIndex(index), reads: 7 + u64::from(index), ..Default::default() };
        let stages =
            |index| ShardStages { index: ShardIndex(index), stages: torus_schema::latency::Stages::default().counts() };
        for is_aoe in [false, true] {
            let text = text(&[shard(0), shard(1)], &[stages(0), stages(1)], &Served::new(None, is_aoe));
            assert!(text.contains("torus_shard_reads_total{shard=\"1\"} 8\n"), "{text}");
            assert_eq!(text.contains("torus_volumes_attached"), is_aoe);
            let types: Vec<_> = text.lines().filter(|line| line.starts_with("# TYPE")).collect();
            let mut distinct = types.clone();
            distinct.sort_unstable();
            distinct.dedup();
            assert_eq!(types.len(), distinct.len(), "{text}");
        }
    }
}
