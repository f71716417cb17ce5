//! One self-contained page of what a comparison found: no scripts, nothing from elsewhere, light and dark.
//!
//! * `svg`     marks
//! * `axis`    where values stand
//! * `look`    colours, lines and markers
//! * `curves`  rates over the depth, latencies over the percentile
//! * `bars`    ratios, CPU by process
//! * `tables`  all of it as numbers

mod axis;
mod bars;
mod curves;
mod look;
mod svg;
mod tables;

use crate::compare::loads::{RATED, READS, WRITES};
use crate::compare::report::{Report, VERSION};
use crate::error::{BenchError, Result};
use std::path::Path;
use svg::escape;

const TEMPLATE: &str = include_str!("template.html");
const STYLE: &str = include_str!("style.css");

/// Profiles as people say them.
const PROFILES: [(&str, &str); 9] = [
    ("randread-qd1", "4 KiB random read, depth 1"),
    ("randread-qd32", "4 KiB random read, depth 32"),
    ("randwrite-qd1", "4 KiB random write, depth 1"),
    ("randwrite-qd32", "4 KiB random write, depth 32"),
    ("mixed-qd32", "4 KiB random, 70 % reads, depth 32"),
    ("write-fsync", "4 KiB write + flush each, depth 1"),
    ("sequential-1m-read", "1 MiB sequential read, depth 8, after random writes"),
    ("sequential-1m-read, as written", "1 MiB sequential read, depth 8, as written"),
    ("sequential-1m-write", "1 MiB sequential write, depth 8"),
];
/// Where operations are small enough for CPU per operation to say something.
const SMALL: std::ops::Range<usize> = 0..6;
const DEPTHS: [(&str, &str); 2] = [(READS, "4 KiB random reads"), (WRITES, "4 KiB random writes")];
const NOT_MEASURED: &str = "<p>Not measured in this run.</p>\n";
const PER_CORE: [&str; 3] = ["randread-qd32", "randwrite-qd32", "mixed-qd32"];

/// The page of a result that was written by `compare`.
pub fn print(result: &Path) -> Result<()> {
    let what = || format!("{}, which should be a result of `torus-bench compare`", result.display());
    let text = std::fs::read_to_string(result).map_err(BenchError::wrap(what()))?;
    let report: Report = serde_json::from_str(&text).map_err(BenchError::wrap(what()))?;
    if report.version != VERSION {
        let because =
            format!("version {} found, {VERSION} expected; measure again, or use that commit's bench", report.version);
        return Err(BenchError::Failed { what: what(), because });
    }
    print!("{}", render(&report));
    Ok(())
}

pub fn render(report: &Report) -> String {
    let of_profiles = |draw: &dyn Fn(&str, &str) -> String, which: &[(&str, &str)]| -> String {
        which.iter().map(|(load, caption)| draw(load, caption)).collect()
    };
    let told = |content: String| if content.is_empty() { NOT_MEASURED.to_string() } else { content };
    let list = |items: &[String]| items.iter().map(|item| format!("<li>{}</li>\n", escape(item))).collect::<String>();
    let parts = [
        ("style", STYLE.to_string()),
        ("setting", report.setting().iter().map(|sentence| format!("<p>{}</p>\n", escape(sentence))).collect()),
        ("legend", look::legend(report)),
        ("ratios", of_profiles(&|load, caption| bars::ratios(report, load, caption), &PROFILES)),
        ("against", tables::against(report)),
        (
            "depths",
            told(DEPTHS.iter().map(|(kind, caption)| curves::rates_over_depth(report, kind, caption)).collect()),
        ),
        ("percentiles", of_profiles(&|load, caption| curves::percentiles(report, load, caption), &PROFILES[SMALL])),
        ("rated", told(RATED.iter().map(|(work, _)| curves::rated(report, work)).collect())),
        ("rated-table", tables::rated(report)),
        ("role-legend", look::role_legend()),
        ("cpu", of_profiles(&|load, caption| bars::cpu(report, load, caption), &PROFILES[SMALL])),
        ("per-core", tables::per_core(report, &PER_CORE)),
        ("idle-seconds", format!("{}", report.idle_seconds)),
        ("idle", tables::idle(report)),
        ("tables", tables::loads(report)),
        ("notes", list(&report.notes)),
    ];
    // No name of a system, a process or a load has braces, so nothing that is put in names a part.
    parts.iter().fold(TEMPLATE.to_string(), |page, (name, content)| page.replace(&format!("{{{{{name}}}}}"), content))
}

#[cfg(test)]
mod tests;
