//! Plots with lines: rates over the depth, latencies over the percentile.

use super::axis::{Axis, Field, rarity, short};
use super::look::{Look, of_system};
use super::svg::Svg;
use crate::compare::report::{RatedRow, Report, Row};
use crate::statistics::Spread;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 360.0;

struct Series {
    name: String,
    look: Look,
    points: Vec<Point>,
}

struct Point {
    x: f64,
    y: Spread,
    title: String,
}

/// Lines, a marker for each median and a whisker from the lowest to the highest round.
fn draw(label: &str, x: Axis, y: Axis, series: &[Series]) -> String {
    let mut svg = Svg::new(WIDTH, HEIGHT, label);
    let field = Field { left: 64.0, top: 12.0, width: WIDTH - 80.0, height: HEIGHT - 60.0, x, y: Some(y) };
    field.draw(&mut svg);
    for Series { look, points, .. } in series {
        let at: Vec<(f64, f64)> =
            points.iter().map(|point| (field.x_of(point.x), field.y_of(point.y.median))).collect();
        for (point, (x, _)) in points.iter().zip(&at) {
            let class = format!("whisker {}", look.class);
            svg.line(&class, (*x, field.y_of(point.y.low)), (*x, field.y_of(point.y.high)));
        }
        svg.polyline(&format!("series {} {}", look.class, look.dash), &at);
    }
    // Above all lines, so that each can be pointed at.
    for Series { name, look, points } in series {
        for point in points {
            let place = (field.x_of(point.x), field.y_of(point.y.median));
            svg.marker(&format!("mark {}", look.class), look.marker, place, &format!("{name}: {}", point.title));
        }
    }
    figure(label, svg.end())
}

pub fn figure(caption: &str, content: String) -> String {
    let caption = super::svg::escape(caption);
    format!("<figure><figcaption>{caption}</figcaption>\n{content}</figure>\n")
}

fn largest(series: &[Series]) -> f64 {
    series.iter().flat_map(|series| &series.points).map(|point| point.y.high).fold(0.0, f64::max)
}

fn smallest(series: &[Series]) -> f64 {
    series.iter().flat_map(|series| &series.points).map(|point| point.y.low).fold(f64::INFINITY, f64::min)
}

/// `kind` over the depth; nothing where there are not at least three depths.
pub fn rates_over_depth(report: &Report, kind: &str, caption: &str) -> String {
    let rows: Vec<&Row> = report.rows.iter().filter(|row| row.kind == kind).collect();
    let mut depths: Vec<usize> = rows.iter().map(|row| row.depth).collect();
    depths.sort_unstable();
    depths.dedup();
    if depths.len() < 3 {
        return String::new();
    }
    let point = |row: &&Row| {
        let title = format!("{} IOPS at depth {}, mean {:.0} µs", row.iops.thousands(), row.depth, row.mean_us.median);
        Point { x: row.depth as f64, y: row.iops.clone(), title }
    };
    let of_system = |system: &crate::compare::stand::Described| {
        let mut own: Vec<&Row> = rows.iter().copied().filter(|row| row.system == system.name).collect();
        own.sort_by_key(|row| row.depth);
        Series { name: system.name.clone(), look: of_system(system), points: own.iter().map(point).collect() }
    };
    let series: Vec<Series> = report.systems.iter().map(of_system).collect();
    let y = Axis::linear("operations per second", largest(&series));
    draw(caption, Axis::depths("operations in flight (depth)", &depths), y, &series)
}

/// The latencies of one load over the percentile.
pub fn percentiles(report: &Report, load: &str, caption: &str) -> String {
    let series: Vec<Series> = report
        .of_load(load)
        .filter_map(|row| {
            let look = of_system(report.system(&row.system)?);
            Some(Series { name: row.system.clone(), look, points: points_of(&row.percentiles) })
        })
        .collect();
    draw_percentiles(caption, &series)
}

fn points_of(percentiles: &[(f64, Spread)]) -> Vec<Point> {
    let point = |(percent, us): &(f64, Spread)| {
        let title = format!("{percent} % within {} µs ({}–{})", short(us.median), short(us.low), short(us.high));
        Point { x: rarity(*percent), y: us.clone(), title }
    };
    percentiles.iter().map(point).collect()
}

fn draw_percentiles(caption: &str, series: &[Series]) -> String {
    let end = series.iter().flat_map(|one| &one.points).map(|point| point.x).fold(f64::NEG_INFINITY, f64::max);
    let is_reached = |percent: &f64| rarity(*percent) <= end + 1e-9;
    let ticks: Vec<f64> = crate::fio::PERCENTILES.into_iter().filter(is_reached).collect();
    if ticks.is_empty() {
        return String::new();
    }
    let y = Axis::logarithmic("latency in µs, logarithmic", smallest(series), largest(series));
    draw(caption, Axis::percents("percent of operations within it", &ticks, end), y, series)
}

/// The library at a fixed rate, as it is and as it would look if the client left out what it did not send.
pub fn rated(report: &Report, work: &str) -> String {
    let rows: Vec<&RatedRow> = report.rated.iter().filter(|row| row.work == work).collect();
    let mut series = Vec::new();
    let mut rates = Vec::new();
    for row in rows {
        let Some(system) = report.system(&row.system) else { continue };
        let look = of_system(system);
        rates.push(format!("{}/s to {}", short(row.asked_per_second), row.system));
        let corrected = Series {
            name: row.system.clone(),
            look: Look { dash: "solid", ..look },
            points: points_of(&row.corrected),
        };
        let name = format!("{}, uncorrected", row.system);
        let uncorrected = Series { name, look: Look { dash: "dotted", ..look }, points: points_of(&row.uncorrected) };
        series.extend([corrected, uncorrected]);
    }
    if series.is_empty() {
        return String::new();
    }
    draw_percentiles(&format!("4 KiB {work}: {}", rates.join(", ")), &series)
}
