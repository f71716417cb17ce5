//! Axes: where a value stands, and where the ticks are.

use super::svg::{Anchor, Svg};

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Linear,
    Logarithmic,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Axis {
    kind: Kind,
    low: f64,
    high: f64,
    ticks: Vec<(f64, String)>,
    /// With the unit.
    label: String,
}

/// 1500 as `1.5 k`.
pub fn short(value: f64) -> String {
    let trimmed = |value: f64| {
        let text = format!("{value:.2}");
        text.trim_end_matches('0').trim_end_matches('.').to_string()
    };
    match value.abs() {
        size if size >= 1e6 => format!("{} M", trimmed(value / 1e6)),
        size if size >= 1e3 => format!("{} k", trimmed(value / 1e3)),
        _ => trimmed(value),
    }
}

impl Axis {
    /// From 0 to at least `high`, with at most about six round ticks.
    pub fn linear(label: &str, high: f64) -> Self {
        let high = if high.is_finite() && high > 0.0 { high } else { 1.0 };
        let step = round_step(high / 5.0);
        let count = (high / step).ceil();
        let ticks = (0..=count as u32).map(|index| f64::from(index) * step).map(|value| (value, short(value)));
        Self { kind: Kind::Linear, low: 0.0, high: count * step, ticks: ticks.collect(), label: label.to_string() }
    }

    /// Exactly from 0 to `high`, which need not be a tick.
    pub fn linear_to(label: &str, high: f64) -> Self {
        let mut axis = Self::linear(label, high);
        axis.high = high;
        axis.ticks.retain(|(value, _)| *value <= high);
        axis
    }

    pub fn logarithmic(label: &str, low: f64, high: f64) -> Self {
        let is_usable = low.is_finite() && high.is_finite() && low > 0.0 && high > low;
        let (low, high) = if is_usable { (low / 1.15, high * 1.15) } else { (1.0, 10.0) };
        let first = low.log10().floor() as i32;
        let last = high.log10().ceil() as i32;
        let digits: &[f64] = if last - first > 4 { &[1.0] } else { &[1.0, 2.0, 5.0] };
        let values = (first..=last).flat_map(|power| digits.iter().map(move |digit| digit * 10f64.powi(power)));
        let ticks = values.filter(|value| (low..=high).contains(value)).map(|value| (value, short(value)));
        Self { kind: Kind::Logarithmic, low, high, ticks: ticks.collect(), label: label.to_string() }
    }

    /// Doubling from tick to tick.
    pub fn depths(label: &str, depths: &[usize]) -> Self {
        let low = depths.iter().copied().min().unwrap_or(1) as f64;
        let high = depths.iter().copied().max().unwrap_or(2) as f64;
        let ticks = depths.iter().map(|depth| (*depth as f64, depth.to_string())).collect();
        let high = if high > low { high } else { low * 2.0 };
        Self { kind: Kind::Logarithmic, low: low / 1.2, high: high * 1.2, ticks, label: label.to_string() }
    }

    /// By how little is beyond: as far from 99 to 99.9 as from 90 to 99. From the first of `ticks` to at least
    /// `end`, which is a [`rarity`].
    pub fn percents(label: &str, ticks: &[f64], end: f64) -> Self {
        let ticks: Vec<(f64, String)> = ticks.iter().map(|percent| (rarity(*percent), format!("{percent}"))).collect();
        let low = ticks.iter().map(|(value, _)| *value).fold(f64::INFINITY, f64::min);
        let high = ticks.iter().map(|(value, _)| *value).fold(end, f64::max);
        let (low, high) = if high > low { (low, high) } else { (0.0, 4.0) };
        let margin = (high - low) * 0.04;
        Self { kind: Kind::Linear, low: low - margin, high: high + margin, ticks, label: label.to_string() }
    }

    /// 0 at the axis' beginning, 1 at its end; what lies beyond is put there.
    pub fn share(&self, value: f64) -> f64 {
        let share = match self.kind {
            Kind::Linear => (value - self.low) / (self.high - self.low),
            Kind::Logarithmic => (value.max(f64::MIN_POSITIVE) / self.low).ln() / (self.high / self.low).ln(),
        };
        share.clamp(0.0, 1.0)
    }

    pub fn is_beyond(&self, value: f64) -> bool {
        value > self.high
    }
}

/// Where a percentile stands on its axis.
pub fn rarity(percent: f64) -> f64 {
    -((100.0 - percent).max(1e-6) / 100.0).log10()
}

fn round_step(rough: f64) -> f64 {
    let power = 10f64.powf(rough.log10().floor());
    let digit = [1.0, 2.0, 5.0, 10.0].into_iter().find(|digit| digit * power >= rough * 0.999).unwrap_or(10.0);
    digit * power
}

/// The part of a picture that is measured off by two axes.
pub struct Field {
    pub left: f64,
    pub top: f64,
    pub width: f64,
    pub height: f64,
    pub x: Axis,
    pub y: Option<Axis>,
}

impl Field {
    pub fn x_of(&self, value: f64) -> f64 {
        self.left + self.width * self.x.share(value)
    }

    pub fn y_of(&self, value: f64) -> f64 {
        let share = self.y.as_ref().map_or(0.0, |axis| axis.share(value));
        self.top + self.height * (1.0 - share)
    }

    pub fn draw(&self, svg: &mut Svg) {
        let (right, bottom) = (self.left + self.width, self.top + self.height);
        for (value, name) in &self.x.ticks {
            let x = self.x_of(*value);
            svg.line("grid", (x, self.top), (x, bottom));
            svg.text("tick", (x, bottom + 15.0), Anchor::Middle, name);
        }
        svg.text("axis", (self.left + self.width / 2.0, bottom + 34.0), Anchor::Middle, &self.x.label);
        if let Some(axis) = &self.y {
            for (value, name) in &axis.ticks {
                let y = self.y_of(*value);
                svg.line("grid", (self.left, y), (right, y));
                svg.text("tick", (self.left - 6.0, y + 4.0), Anchor::End, name);
            }
            svg.text_upwards("axis", (14.0, self.top + self.height / 2.0), &axis.label);
        }
        svg.line("base", (self.left, bottom), (right, bottom));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_reach_the_end() {
        let axis = Axis::linear("µs", 37.0);
        let values: Vec<f64> = axis.ticks.iter().map(|(value, _)| *value).collect();
        assert_eq!(values, [0.0, 10.0, 20.0, 30.0, 40.0]);
        assert_eq!((axis.share(0.0), axis.share(20.0), axis.share(400.0)), (0.0, 0.5, 1.0));
    }

    #[test]
    fn nothing_to_show_is_an_axis_all_the_same() {
        assert!(Axis::linear("", f64::NAN).share(0.5) > 0.0);
        assert!(Axis::logarithmic("", f64::INFINITY, f64::NEG_INFINITY).share(5.0) > 0.0);
        assert!(Axis::percents("", &[], 50.0).share(1.0).is_finite());
        assert!(Axis::depths("", &[]).share(1.0).is_finite());
    }

    #[test]
    fn each_nine_is_as_far_as_the_one_before() {
        let steps = [90.0, 99.0, 99.9, 99.99].map(rarity);
        steps.windows(2).for_each(|pair| assert!((pair[1] - pair[0] - 1.0).abs() < 1e-6, "{pair:?}"));
    }

    #[test]
    fn thousands_and_millions_are_told_short() {
        assert_eq!([0.25, 20.0, 1500.0, 2e6].map(short), ["0.25", "20", "1.5 k", "2 M"]);
    }
}
