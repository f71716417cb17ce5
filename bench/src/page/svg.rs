//! Marks of a plot as SVG text. Colours are classes, so that style.css has one set for light and one for dark.

use std::fmt::Write;

/// What may not stand as it is in text or between quotes.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Anchor {
    Start,
    Middle,
    End,
}

/// Told from others without colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marker {
    Circle,
    Square,
    Triangle,
    Diamond,
}

const MARKER_RADIUS: f64 = 4.0;

pub struct Svg {
    width: f64,
    height: f64,
    /// What it is, for who cannot see it.
    label: String,
    body: String,
}

impl Svg {
    pub fn new(width: f64, height: f64, label: &str) -> Self {
        Self { width, height, label: label.to_string(), body: String::new() }
    }

    fn put(&mut self, element: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.body.write_fmt(element);
        self.body.push('\n');
    }

    pub fn line(&mut self, class: &str, (x1, y1): (f64, f64), (x2, y2): (f64, f64)) {
        self.put(format_args!(r#"<line class="{class}" x1="{x1:.1}" y1="{y1:.1}" x2="{x2:.1}" y2="{y2:.1}"/>"#));
    }

    pub fn polyline(&mut self, class: &str, points: &[(f64, f64)]) {
        let points: Vec<String> = points.iter().map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        self.put(format_args!(r#"<polyline class="{class}" points="{}"/>"#, points.join(" ")));
    }

    /// `title` is shown when the pointer rests on it.
    pub fn rect(&mut self, class: &str, (x, y): (f64, f64), (width, height): (f64, f64), title: &str) {
        let title = escape(title);
        self.put(format_args!(
            r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" width="{width:.1}" height="{height:.1}"><title>{title}</title></rect>"#
        ));
    }

    pub fn text(&mut self, class: &str, (x, y): (f64, f64), anchor: Anchor, text: &str) {
        let (anchor, text) = (anchor_name(anchor), escape(text));
        self.put(format_args!(r#"<text class="{class}" x="{x:.1}" y="{y:.1}" text-anchor="{anchor}">{text}</text>"#));
    }

    /// From below to above, its middle at that point.
    pub fn text_upwards(&mut self, class: &str, (x, y): (f64, f64), text: &str) {
        let text = escape(text);
        self.put(format_args!(
            r#"<text class="{class}" transform="translate({x:.1} {y:.1}) rotate(-90)" text-anchor="middle">{text}</text>"#
        ));
    }

    pub fn marker(&mut self, class: &str, marker: Marker, (x, y): (f64, f64), title: &str) {
        let (r, title) = (MARKER_RADIUS, escape(title));
        let shape = match marker {
            Marker::Circle => {
                return self.put(format_args!(
                    r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="{r}"><title>{title}</title></circle>"#
                ));
            }
            Marker::Square => vec![(-r, -r), (r, -r), (r, r), (-r, r)],
            Marker::Triangle => vec![(0.0, -r * 1.2), (r * 1.15, r), (-r * 1.15, r)],
            Marker::Diamond => vec![(0.0, -r * 1.35), (r * 1.35, 0.0), (0.0, r * 1.35), (-r * 1.35, 0.0)],
        };
        let points: Vec<String> = shape.iter().map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy)).collect();
        let points = points.join(" ");
        self.put(format_args!(r#"<polygon class="{class}" points="{points}"><title>{title}</title></polygon>"#));
    }

    pub fn end(self) -> String {
        let Self { width, height, label, body } = self;
        let label = escape(&label);
        format!(
            "<svg viewBox=\"0 0 {width} {height}\" style=\"max-width:{width}px\" role=\"img\" aria-label=\"{label}\">\n{body}</svg>\n"
        )
    }
}

fn anchor_name(anchor: Anchor) -> &'static str {
    match anchor {
        Anchor::Start => "start",
        Anchor::Middle => "middle",
        Anchor::End => "end",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_cannot_break_the_page() {
        let mut svg = Svg::new(10.0, 10.0, "a \"b\"");
        svg.text("t", (1.0, 2.0), Anchor::Start, "<script> & more");
        let text = svg.end();
        assert!(text.contains("&lt;script&gt; &amp; more") && text.contains("a &quot;b&quot;"), "{text}");
    }
}
