//! What a command shows: a table for people, the same as CSV, and a JSON document with everything.

use comfy_table::Table as Grid;
use serde::Serialize;
use serde_json::Value;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    #[default]
    Table,
    Json,
    Csv,
}

#[derive(Clone, Debug, Default)]
pub struct Report {
    pub header: Vec<&'static str>,
    pub rows: Vec<Vec<String>>,
    /// Lines below the table; not in CSV, unless there is no table.
    pub summary: Vec<String>,
    pub json: Value,
    /// For the error output, whatever the format.
    pub warnings: Vec<String>,
    /// What was looked for is not as it should be: exit code 1.
    pub failed: bool,
}

impl Report {
    /// A sentence for people, a document for programs.
    pub fn said(sentence: String, document: impl Serialize) -> Self {
        Self { summary: vec![sentence], json: json(document), ..Self::default() }
    }

    pub fn render(&self, format: Format) -> String {
        match format {
            Format::Table => self.table(),
            Format::Json => serde_json::to_string_pretty(&self.json).expect("a JSON value is valid JSON") + "\n",
            Format::Csv => self.csv(),
        }
    }

    fn table(&self) -> String {
        let mut text = String::new();
        if !self.header.is_empty() {
            let mut grid = Grid::new();
            grid.load_style(comfy_table::presets::ASCII_MARKDOWN);
            grid.set_header(&self.header);
            self.rows.iter().for_each(|row| _ = grid.add_row(row));
            text.push_str(&grid.to_string());
            text.push('\n');
        }
        for line in &self.summary {
            text.push_str(line);
            text.push('\n');
        }
        text
    }

    fn csv(&self) -> String {
        if self.header.is_empty() {
            return self.table();
        }
        let header = self.header.iter().map(|name| name.to_string()).collect();
        let lines = std::iter::once(&header).chain(&self.rows);
        lines.map(|cells| cells.iter().map(|cell| quoted(cell)).collect::<Vec<_>>().join(",") + "\r\n").collect()
    }
}

/// RFC 4180: a cell with a separator, a quote or a line break is quoted, and its quotes doubled.
fn quoted(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell.to_string() }
}

pub fn json(document: impl Serialize) -> Value {
    serde_json::to_value(document).expect("reports hold only strings, numbers and lists, which JSON can always express")
}

/// `3 seconds ago`
pub fn ago(seconds: u64) -> String {
    let (count, unit) = match seconds {
        0..60 => (seconds, "second"),
        60..3600 => (seconds / 60, "minute"),
        3600..86400 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

pub fn percent(part: u64, whole: u64) -> String {
    let share = if whole == 0 { 0.0 } else { part as f64 / whole as f64 * 100.0 };
    format!("{share:.2}%")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        Report {
            header: vec!["NAME", "SIZE"],
            rows: vec![vec!["a".into(), "1 GiB".into()], vec!["b,\"c\"".into(), "2 GiB".into()]],
            summary: vec!["Balanced: true".into()],
            json: json(["a", "b"]),
            ..Report::default()
        }
    }

    #[test]
    fn a_table_has_its_header_its_rows_and_the_summary_below() {
        let text = report().render(Format::Table);
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[0].contains("NAME") && lines[0].contains("SIZE"), "{text}");
        assert!(text.contains("1 GiB"), "{text}");
        assert_eq!(lines.last(), Some(&"Balanced: true"), "{text}");
    }

    #[test]
    fn csv_quotes_what_would_break_it_and_has_no_summary() {
        assert_eq!(report().render(Format::Csv), "NAME,SIZE\r\na,1 GiB\r\n\"b,\"\"c\"\"\",2 GiB\r\n");
    }

    #[test]
    fn json_is_the_document_and_nothing_else() {
        assert_eq!(serde_json::from_str::<Value>(&report().render(Format::Json)).unwrap(), json(["a", "b"]));
    }

    #[test]
    fn ages_are_said_in_the_largest_unit() {
        let cases = [(1, "1 second ago"), (59, "59 seconds ago"), (3600, "1 hour ago"), (180_000, "2 days ago")];
        for (seconds, text) in cases {
            assert_eq!(ago(seconds), text);
        }
    }
}
