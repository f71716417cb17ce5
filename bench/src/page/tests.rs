//! The page of made-up results: whole, self-contained, and also there when something was left out.

use super::*;
use crate::compare::against::{Against, against};
use crate::compare::ceph;
use crate::compare::report::{RatedRow, Row, notes};
use crate::compare::stand::{Described, RAW, Transport};
use crate::machine::Machine;
use crate::processes::Idle;
use crate::statistics::Spread;

fn spread(value: f64) -> Spread {
    Spread::of(vec![value * 0.9, value, value * 1.2]).unwrap()
}

fn row(load: &str, kind: &str, depth: usize, system: &Described) -> Row {
    let cpu_us = system.processes.iter().map(|name| (name.clone(), spread(7.0))).collect();
    Row {
        load: load.to_string(),
        kind: kind.to_string(),
        depth,
        bytes: 4096,
        is_sweep: false,
        system: system.name.clone(),
        iops: spread(20_000.0 * depth as f64),
        ratio_to_raw: Some(spread(0.5)),
        mean_us: spread(50.0),
        latency_to_raw: Some(spread(2.0)),
        percentiles: vec![(50.0, spread(40.0)), (99.0, spread(90.0))],
        cpu_us,
        cpu_us_all: spread(14.0),
        client_cpu_us: spread(6.0),
        iops_per_core: Some(spread(70_000.0)),
    }
}

fn system(name: &str, transport: Transport, replicas: Option<u32>, processes: &[&str]) -> Described {
    let processes = processes.iter().map(|name| name.to_string()).collect();
    Described { name: name.to_string(), transport, replicas, processes }
}

fn rated() -> RatedRow {
    RatedRow {
        system: "Torus <×3>, library".to_string(),
        work: "random read".to_string(),
        full_per_second: 40_000.0,
        asked_per_second: 20_000.0,
        reached_per_second: spread(20_000.0),
        mean_us: spread(100.0),
        corrected: vec![(50.0, spread(90.0)), (99.9, spread(900.0))],
        uncorrected: vec![(50.0, spread(80.0)), (99.9, spread(300.0))],
        client_cpu_us: spread(9.0),
        servers_cpu_us: spread(12.0),
        never_started: 0,
    }
}

fn report() -> Report {
    let systems = vec![
        system(RAW, Transport::File, None, &[]),
        system("qemu-nbd, file", Transport::Unix, None, &["qemu-nbd"]),
        // A name that would break a page which is not careful.
        system("Torus <×3>, library", Transport::Library, Some(3), &["metadata", "node 1"]),
    ];
    let loads = [("randread-qd1", 1), ("randread-qd8", 8), ("randread-qd32", 32)];
    let rows = loads.iter().flat_map(|(load, depth)| systems.iter().map(|system| row(load, READS, *depth, system)));
    let rows = rows.collect();
    let idle = vec![Idle { process: "node 1".to_string(), percent_of_a_core: 0.3, resident_bytes: 45 << 20 }];
    Report {
        version: VERSION,
        machine: Machine { processor: "some <processor>".to_string(), cores: 2, ..Machine::default() },
        load_average_after: "0.1".to_string(),
        rounds: 3,
        seconds: 1.0,
        sweep_seconds: 1.0,
        region_bytes: 1 << 30,
        systems,
        rows,
        rated: vec![rated()],
        idle_seconds: 10.0,
        idle,
        against_ceph: vec![],
        notes: notes(),
    }
}

/// With Ceph, whose rates are a quarter of ours in every round.
fn with_ceph() -> Report {
    let mut report = report();
    let ceph = system(ceph::NAME, Transport::Library, None, &["ceph-mon a", "ceph-mgr x", "ceph-osd 0"]);
    let mut theirs = row("randread-qd32", READS, 32, &ceph);
    theirs.iops = spread(20_000.0 * 32.0 / 4.0);
    report.systems.push(ceph);
    report.rows.push(theirs);
    report.against_ceph = against(&report);
    report
}

/// What stands between `start` and the next `end`, each time.
fn between<'a>(text: &'a str, start: &'a str, end: &'a str) -> impl Iterator<Item = &'a str> {
    text.split(start).skip(1).filter_map(move |rest| rest.split(end).next())
}

#[test]
fn it_needs_nothing_from_elsewhere() {
    let page = render(&report());
    for foreign in ["<script", "http:", "https:", "src=", "url(", "@import"] {
        assert!(!page.contains(foreign), "{foreign} is in the page");
    }
}

#[test]
fn every_part_of_the_template_is_filled() {
    let page = render(&report());
    assert!(!page.contains("{{"), "{:?}", between(&page, "{{", "}}").collect::<Vec<_>>());
    let parts =
        ["Rate, divided by", "4 KiB random reads", "4 KiB random read: 20 k/s", "p99.9 uncorrected", "Not measured"];
    for part in parts {
        assert!(page.contains(part), "{part} is not in the page");
    }
}

#[test]
fn elements_are_closed_and_text_is_escaped() {
    let page = render(&report());
    for name in ["svg", "text", "title", "table", "tr", "ul", "li", "figure", "main"] {
        let [opened, closed] = [format!("<{name}"), format!("</{name}>")].map(|tag| page.matches(&tag).count());
        // `tr`, `text` and `li` begin other names too.
        let others = match name {
            "li" => page.matches("<line").count(),
            _ => 0,
        };
        assert_eq!(opened - others, closed, "{name}");
    }
    assert!(page.contains("some &lt;processor&gt;") && page.contains("Torus &lt;×3&gt;") && !page.contains("<×3>"));
}

#[test]
fn plots_name_their_units_and_have_no_value_that_is_no_number() {
    let page = render(&report());
    for label in [
        "operations per second",
        "operations in flight (depth)",
        "latency in µs, logarithmic",
        "percent of operations within it",
        "CPU µs per operation",
        "× the raw file&#39;s rate",
    ] {
        assert!(page.contains(&label.replace("&#39;", "'")), "{label} is on no axis");
    }
    assert!(!page.contains("NaN") && !page.contains("inf\""), "a number is none");
}

#[test]
fn every_class_of_a_mark_has_its_style() {
    let page = render(&with_ceph());
    let (style, body) = page.split_once("</style>").unwrap();
    for class in between(body, "class=\"", "\"").flat_map(|classes| classes.split(' ')) {
        assert!(class == "solid" || style.contains(&format!(".{class}")), "{class} has no style");
    }
}

#[test]
fn what_was_not_measured_is_left_out() {
    let empty = Report { rows: vec![], rated: vec![], idle: vec![], ..report() };
    let page = render(&empty);
    assert!(!page.contains("{{") && !page.contains("<figure>"));
}

#[test]
fn ours_is_divided_by_ceph_round_by_round_where_that_was_measured() {
    assert!(against(&report()).is_empty() && !render(&report()).contains("Against Ceph"));
    let report = with_ceph();
    let [found] = &report.against_ceph[..] else { panic!("{:?}", report.against_ceph) };
    assert_eq!((found.load.as_str(), found.system.as_str()), ("randread-qd32", "Torus <×3>, library"));
    assert_eq!((found.ratio.low, found.ratio.median, found.ratio.high), (4.0, 4.0, 4.0));
    assert_eq!(found.cells()[1..], ["4.00 (4.00–4.00)", "3.5", "yes"]);
    let missed = Against { aim: 4.1, ..found.clone() };
    assert_eq!(missed.cells()[3], "no");
    let page = render(&report);
    assert!(page.contains("Against Ceph RBD") && page.contains("c-ceph") && page.contains(ceph::NAME));
}

#[test]
fn a_result_from_before_ceph_was_a_peer_is_read() {
    let mut json = serde_json::to_value(report()).unwrap();
    json.as_object_mut().unwrap().remove("against_ceph").unwrap();
    let read: Report = serde_json::from_value(json).unwrap();
    assert_eq!(render(&read), render(&report()));
}

#[test]
fn a_result_that_was_written_can_be_read_again() {
    let text = serde_json::to_string(&report()).unwrap();
    let read: Report = serde_json::from_str(&text).unwrap();
    assert_eq!(render(&read), render(&report()));
}
