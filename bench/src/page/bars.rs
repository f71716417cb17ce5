//! Plots with a line for each system: ratios to the raw file, and CPU time per operation stacked by process.

use super::axis::{Axis, Field};
use super::curves::figure;
use super::look::{CLIENT_CLASS, of_process, of_system};
use super::svg::{Anchor, Svg};
use crate::compare::report::{Report, Row, is_raw};

const WIDTH: f64 = 560.0;
const LABELS_WIDTH: f64 = 190.0;
/// For the figure behind a bar.
const VALUES_WIDTH: f64 = 86.0;
const ROW_HEIGHT: f64 = 24.0;
const BAR_HEIGHT: f64 = 14.0;
const FOOT_HEIGHT: f64 = 44.0;
/// Beyond that a ratio is only told as a number: a cache would make all others small.
const RATIO_SHOWN_MAX: f64 = 1.6;
const RATIO_SHOWN_MIN: f64 = 1.05;

fn field(rows: usize, x: Axis) -> (Svg, Field) {
    let height = rows as f64 * ROW_HEIGHT;
    let field = Field { left: LABELS_WIDTH, top: 6.0, width: WIDTH - LABELS_WIDTH - VALUES_WIDTH, height, x, y: None };
    (Svg::new(WIDTH, height + FOOT_HEIGHT, ""), field)
}

fn middle(field: &Field, index: usize) -> f64 {
    field.top + (index as f64 + 0.5) * ROW_HEIGHT
}

/// Of one load: median and range of all systems but the raw file itself.
pub fn ratios(report: &Report, load: &str, caption: &str) -> String {
    let rows: Vec<&Row> = report.of_load(load).filter(|row| !is_raw(row)).collect();
    let told: Vec<_> = rows.iter().filter_map(|row| Some((*row, row.ratio_to_raw.as_ref()?))).collect();
    if told.is_empty() {
        return String::new();
    }
    let high = told.iter().map(|(_, ratio)| ratio.high).fold(0.0, f64::max);
    let axis = Axis::linear_to("× the raw file's rate", (high * 1.05).clamp(RATIO_SHOWN_MIN, RATIO_SHOWN_MAX));
    let (mut svg, field) = field(told.len(), axis);
    field.draw(&mut svg);
    svg.line("reference", (field.x_of(1.0), field.top), (field.x_of(1.0), field.top + field.height));
    for (index, (row, ratio)) in told.iter().enumerate() {
        let (y, look) = (middle(&field, index), report.system(&row.system).map(of_system));
        let Some(look) = look else { continue };
        svg.text("name", (field.left - 8.0, y + 4.0), Anchor::End, &row.system);
        let title = format!("{}: {} × raw, {}", row.system, ratio.with_range(2), row.rate());
        let (low, high) = (field.x_of(ratio.low), field.x_of(ratio.high));
        svg.rect(&format!("range {}", look.class), (low, y - 4.0), ((high - low).max(1.0), 8.0), &title);
        svg.marker(&format!("mark {}", look.class), look.marker, (field.x_of(ratio.median), y), &title);
        let beyond = if field.x.is_beyond(ratio.median) { " ▸" } else { "" };
        let value = format!("{:.2}{beyond}", ratio.median);
        svg.text("value", (field.left + field.width + 8.0, y + 4.0), Anchor::Start, &value);
    }
    figure(caption, svg.end())
}

/// Class, name and µs of each piece, from the client on.
fn pieces(row: &Row) -> Vec<(&'static str, String, f64)> {
    let mut pieces = vec![(CLIENT_CLASS, "client".to_string(), row.client_cpu_us.median)];
    for role in ["p-metadata", "p-node", "p-server"] {
        let of_role = row.cpu_us.iter().filter(|(name, _)| of_process(name).0 == role);
        pieces.extend(of_role.map(|(name, us)| (role, name.clone(), us.median)));
    }
    pieces
}

/// Of one load: what each process of each system took for an operation.
pub fn cpu(report: &Report, load: &str, caption: &str) -> String {
    let rows: Vec<&Row> = report.of_load(load).collect();
    if rows.is_empty() {
        return String::new();
    }
    let sum = |row: &Row| pieces(row).iter().map(|(_, _, us)| us).sum::<f64>();
    let high = rows.iter().map(|row| sum(row)).fold(0.0, f64::max);
    let (mut svg, field) = field(rows.len(), Axis::linear("CPU µs per operation", high));
    field.draw(&mut svg);
    for (index, row) in rows.iter().enumerate() {
        let (y, mut from) = (middle(&field, index), 0.0);
        svg.text("name", (field.left - 8.0, y + 4.0), Anchor::End, &row.system);
        for (class, name, us) in pieces(row) {
            let (left, right) = (field.x_of(from), field.x_of(from + us));
            let title = format!("{}, {name}: {us:.1} µs", row.system);
            svg.rect(class, (left, y - BAR_HEIGHT / 2.0), (right - left, BAR_HEIGHT), &title);
            from += us;
        }
        let value = format!("{:.1}", sum(row));
        svg.text("value", (field.left + field.width + 8.0, y + 4.0), Anchor::Start, &value);
    }
    figure(caption, svg.end())
}
