//! Every figure of the page as a table: who cannot see a plot, or wants the number, has it here.

use super::svg::escape;
use crate::compare::against::{self, Against};
use crate::compare::report::{RatedRow, Report, Row, is_raw};
use crate::statistics::Spread;

/// The first cell of a row is its name.
fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let head: String = header.iter().map(|cell| format!("<th scope=\"col\">{}</th>", escape(cell))).collect();
    let row = |cells: Vec<String>| {
        let mut cells = cells.iter().map(|cell| escape(cell));
        let name = cells.next().unwrap_or_default();
        format!(
            "<tr><th scope=\"row\">{name}</th>{}</tr>\n",
            cells.map(|cell| format!("<td>{cell}</td>")).collect::<String>()
        )
    };
    let body: String = rows.into_iter().map(row).collect();
    format!("<div class=\"wide\"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n")
}

fn median(spread: Option<&Spread>) -> String {
    spread.map_or("–".to_string(), |spread| format!("{:.0}", spread.median))
}

fn ratio(spread: &Option<Spread>) -> String {
    spread.as_ref().map_or("–".to_string(), |spread| spread.with_range(2))
}

fn cells(row: &Row) -> Vec<String> {
    let [rate, latency] =
        if is_raw(row) { ["1", "1"].map(str::to_string) } else { [&row.ratio_to_raw, &row.latency_to_raw].map(ratio) };
    let mut cells = vec![row.system.clone(), row.rate(), rate, row.mean_us.with_range(0), latency];
    cells.extend(crate::fio::PERCENTILES.map(|percent| median(row.percentile(percent))));
    let parts: Vec<String> = row.cpu_us.iter().map(|(name, us)| format!("{name} {:.1}", us.median)).collect();
    cells.extend([
        if row.cpu_us.is_empty() { "–".to_string() } else { row.cpu_us_all.with_range(1) },
        parts.join(", "),
        row.client_cpu_us.with_range(1),
        row.iops_per_core.as_ref().map_or("–".to_string(), |spread| format!("{:.1} k", spread.median / 1000.0)),
    ]);
    cells
}

const HEADER: [&str; 14] = [
    "system",
    "IOPS, or MiB/s",
    "× raw",
    "mean µs",
    "× raw",
    "p50 µs",
    "p90",
    "p99",
    "p99.9",
    "p99.99",
    "servers CPU µs/op",
    "of these",
    "client CPU µs/op",
    "IOPS per core",
];

/// All loads, one table each.
pub fn loads(report: &Report) -> String {
    let of_load =
        |load: &str| format!("<h3>{}</h3>\n{}", escape(load), table(&HEADER, report.of_load(load).map(cells)));
    report.loads(false).into_iter().chain(report.loads(true)).map(of_load).collect()
}

/// Ours divided by Ceph's, where that was measured.
pub fn against(report: &Report) -> String {
    if report.against_ceph.is_empty() {
        return String::new();
    }
    let rows = report.against_ceph.iter().map(Against::cells);
    format!("<h3>Against Ceph RBD</h3>\n{}", table(&against::HEADER, rows))
}

pub fn rated(report: &Report) -> String {
    if report.rated.is_empty() {
        return String::new();
    }
    let at = |list: &[(f64, Spread)], wanted: f64| median(list.iter().find(|(at, _)| *at == wanted).map(|(_, us)| us));
    let cells = |row: &RatedRow| {
        let mut cells = vec![
            format!("{}, {}", row.work, row.system),
            format!("{:.1} k", row.asked_per_second / 1000.0),
            row.reached_per_second.thousands(),
            row.mean_us.with_range(0),
        ];
        cells.extend([50.0, 90.0, 99.0, 99.9, 99.99].map(|percent| at(&row.corrected, percent)));
        cells.extend([99.0, 99.9].map(|percent| at(&row.uncorrected, percent)));
        cells.extend([
            row.client_cpu_us.with_range(1),
            row.servers_cpu_us.with_range(1),
            row.never_started.to_string(),
        ]);
        cells
    };
    let header = [
        "work",
        "asked per s",
        "reached per s",
        "mean µs",
        "p50",
        "p90",
        "p99",
        "p99.9",
        "p99.99",
        "p99 uncorrected",
        "p99.9 uncorrected",
        "client CPU µs/op",
        "servers CPU µs/op",
        "never started",
    ];
    table(&header, report.rated.iter().map(cells))
}

pub fn idle(report: &Report) -> String {
    let rows = report.idle.iter().map(|idle| {
        let mib = idle.resident_bytes as f64 / f64::from(1 << 20);
        vec![idle.process.clone(), format!("{:.2} %", idle.percent_of_a_core), format!("{mib:.0} MiB")]
    });
    table(&["process", "of a core", "memory (RSS)"], rows)
}

/// Operations for a second of CPU, where that is worth comparing.
pub fn per_core(report: &Report, loads: &[&str]) -> String {
    let mut header = vec!["operations per second and core"];
    header.extend(loads);
    let row = |system: &str| {
        let found = |load: &&str| report.of_load(load).find(move |row| row.system == system);
        let of_load = |row: Option<&Row>| row.and_then(|row| row.iops_per_core.as_ref()).map(Spread::thousands);
        let mut cells = vec![system.to_string()];
        cells.extend(loads.iter().map(|load| of_load(found(load)).unwrap_or_else(|| "–".to_string())));
        cells
    };
    let systems = report.systems.iter().filter(|system| !system.processes.is_empty());
    table(&header, systems.map(|system| row(&system.name)))
}
