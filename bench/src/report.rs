//! How results are told: tables for people, JSON in `bench/out/` for programs.

use crate::error::{BenchError, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::path::{Path, PathBuf};

/// A table that reads as text and pastes as Markdown.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header.iter().copied());
    rows.into_iter().for_each(|row| {
        table.add_row(row);
    });
    table.column_iter_mut().skip(1).for_each(|column| column.set_cell_alignment(CellAlignment::Right));
    table
}

/// `bench/out/NAME.json`, in the folder of the sources.
pub fn write_json(name: &str, value: &impl Serialize) -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("out");
    let path = folder.join(format!("{name}.json"));
    let wrap = |because: String| BenchError::Failed { what: format!("results to {}", path.display()), because };
    std::fs::create_dir_all(&folder).map_err(|error| wrap(error.to_string()))?;
    let text = serde_json::to_string_pretty(value).map_err(|error| wrap(error.to_string()))?;
    std::fs::write(&path, text).map_err(|error| wrap(error.to_string()))?;
    Ok(path)
}
