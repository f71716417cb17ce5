//! What a process tells, in Prometheus' text format: what program it is, its numbers, and histograms of stages.

use std::fmt::Write;
use torus_schema::latency::StageCounts;

/// Bounds of what is told, as powers of two of microseconds: there buckets begin, so that what is told is exact.
const BOUNDS_LOG2: std::ops::RangeInclusive<u32> = 4..=24;

/// Of the volumes that a process serves, as those who wait for them feel it.
pub const CLIENT_SIDE: &str = "side=\"client\"";

/// `numbers`: what the program itself says.
pub fn text(program: &str, numbers: &str, stages: &[(&str, &StageCounts)]) -> String {
    let mut text = String::new();
    build_text(&mut text, program);
    text.push_str(numbers);
    stages_text(&mut text, stages);
    text
}

/// All of them under one name, each with its labels.
fn stages_text(text: &mut String, all: &[(&str, &StageCounts)]) {
    const NAME: &str = "torus_stage_seconds";
    let _ = writeln!(text, "# HELP {NAME} How long each stage of users' operations took; see docs/operations.md");
    let _ = writeln!(text, "# TYPE {NAME} histogram");
    for (labels, stages) in all {
        for (kind, stage, counts) in stages.recorded() {
            let labels = format!("{labels},operation=\"{}\",stage=\"{}\"", kind.name(), stage.name());
            for bound_us in BOUNDS_LOG2.map(|log2| 1u64 << log2) {
                let (bound, below) = (bound_us as f64 / 1e6, counts.below_us(bound_us));
                let _ = writeln!(text, "{NAME}_bucket{{{labels},le=\"{bound}\"}} {below}");
            }
            let (count, sum) = (counts.count(), counts.sum().as_secs_f64());
            let _ = writeln!(text, "{NAME}_bucket{{{labels},le=\"+Inf\"}} {count}");
            let _ = writeln!(text, "{NAME}_sum{{{labels}}} {sum}\n{NAME}_count{{{labels}}} {count}");
        }
    }
}

fn build_text(text: &mut String, program: &str) {
    let version = env!("CARGO_PKG_VERSION");
    let _ = write!(
        text,
        "# HELP torus_build_info What program this is\n# TYPE torus_build_info gauge\n\
         torus_build_info{{program=\"{program}\",version=\"{version}\"}} 1\n"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use torus_schema::latency::{OperationKind, Stage, Stages};

    #[test]
    fn buckets_count_all_that_took_less_and_the_last_one_everything() {
        let stages = Stages::default();
        for us in [10, 100, 1000, 100_000_000] {
            stages.record(OperationKind::Read, Stage::Disk, Duration::from_micros(us));
        }
        let mut text = String::new();
        stages_text(&mut text, &[("shard=\"1\"", &stages.counts())]);
        let labels = "shard=\"1\",operation=\"read\",stage=\"disk\"";
        for line in [
            format!("torus_stage_seconds_bucket{{{labels},le=\"0.000016\"}} 1\n"),
            format!("torus_stage_seconds_bucket{{{labels},le=\"0.001024\"}} 3\n"),
            format!("torus_stage_seconds_bucket{{{labels},le=\"16.777216\"}} 3\n"),
            format!("torus_stage_seconds_bucket{{{labels},le=\"+Inf\"}} 4\n"),
            format!("torus_stage_seconds_sum{{{labels}}} 100.00111\n"),
            format!("torus_stage_seconds_count{{{labels}}} 4\n"),
        ] {
            assert!(text.contains(&line), "{line} in {text}");
        }
        assert_eq!(text.lines().count(), 2 + BOUNDS_LOG2.count() + 3);
    }

    #[test]
    fn the_program_and_its_version_are_told() {
        let text = text("torus-engine", "torus_x 1\n", &[]);
        assert!(text.contains("torus_build_info{program=\"torus-engine\",version=\"0."), "{text}");
        assert!(text.contains("torus_x 1\n"), "{text}");
    }
}
