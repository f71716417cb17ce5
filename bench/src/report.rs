//! How results are told: tables for people, JSON in `bench/out/` for programs.

use crate::error::{BenchError, Result};
use crate::machine::Machine;
use crate::processes::Idle;
use crate::rounds::Sample;
use crate::statistics::{Spread, ratio};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::path::{Path, PathBuf};

#[derive(Serialize)]
pub struct Report {
    pub machine: Machine,
    pub rounds: usize,
    pub seconds: f64,
    pub rows: Vec<Row>,
    pub idle: Vec<Idle>,
}

/// One system under one profile, all rounds.
#[derive(Serialize)]
pub struct Row {
    pub profile: &'static str,
    pub system: &'static str,
    pub iops: Spread,
    /// IOPS divided by those of the raw file in the same round.
    pub ratio_to_raw: Spread,
    pub mean_us: Spread,
    pub p99_us: Spread,
    /// Of each process, per operation.
    pub cpu_us: Vec<(String, Spread)>,
    pub cpu_us_all: Spread,
    pub client_cpu_us: Spread,
}

impl Row {
    /// `None` without rounds.
    pub fn of(profile: &'static str, system: &'static str, samples: &[Sample], raw: &[Sample]) -> Option<Self> {
        let all = |of: &dyn Fn(&Sample) -> f64| samples.iter().map(of).collect::<Vec<f64>>();
        let iops = all(&|sample| sample.fio.iops);
        let raw_iops: Vec<f64> = raw.iter().map(|sample| sample.fio.iops).collect();
        let processes = samples.first()?.cpu_us.iter().enumerate();
        let cpu_us = processes
            .filter_map(|(index, (name, _))| Some((name.clone(), Spread::of(all(&|sample| sample.cpu_us[index].1))?)))
            .collect();
        Some(Self {
            profile,
            system,
            ratio_to_raw: ratio(&iops, &raw_iops)?,
            iops: Spread::of(iops)?,
            mean_us: Spread::of(all(&|sample| sample.fio.mean_us))?,
            p99_us: Spread::of(all(&|sample| sample.fio.p99_us))?,
            cpu_us,
            cpu_us_all: Spread::of(all(&|sample| sample.cpu_us.iter().map(|(_, us)| us).sum()))?,
            client_cpu_us: Spread::of(all(&|sample| sample.fio.client_cpu_us))?,
        })
    }

    /// `38.1 = 12.0 + 13.1 + 13.0`, nothing where there is no server.
    fn servers_cpu(&self) -> String {
        let parts: Vec<String> = self.cpu_us.iter().map(|(_, spread)| format!("{:.1}", spread.median)).collect();
        match parts.len() {
            0 => String::new(),
            1 => parts[0].clone(),
            _ => format!("{:.1} = {}", self.cpu_us_all.median, parts.join(" + ")),
        }
    }

    /// Sequential profiles move 1 MiB with each operation, so their operations per second are MiB/s.
    fn rate(&self) -> String {
        let is_sequential = self.profile.starts_with("sequential");
        if is_sequential { format!("{} MiB/s", self.iops.with_range(0)) } else { self.iops.thousands() }
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.system.to_string(),
            self.rate(),
            self.ratio_to_raw.with_range(2),
            format!("{:.0}", self.mean_us.median),
            format!("{:.0}", self.p99_us.median),
            self.servers_cpu(),
            format!("{:.1}", self.client_cpu_us.median),
        ]
    }
}

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

impl Report {
    pub fn print(&self) {
        let machine = &self.machine;
        println!("{}, {} cores, Linux {}, {}", machine.processor, machine.cores, machine.kernel, machine.file_system);
        println!(
            "{} rounds of {} s, medians (lowest–highest); {}; commit {}; load before: {}",
            self.rounds, self.seconds, machine.fio, machine.commit, machine.load_average
        );
        let header = ["system", "IOPS or MiB/s", "× raw", "mean µs", "p99 µs", "server CPU µs/op", "fio CPU µs/op"];
        let mut profiles: Vec<&str> = self.rows.iter().map(|row| row.profile).collect();
        profiles.dedup();
        for profile in profiles {
            let rows = self.rows.iter().filter(|row| row.profile == profile);
            println!("\n{profile}\n{}", table(&header, rows.map(Row::cells)));
        }
        let names = self.rows.iter().map(|row| &row.cpu_us).find(|cpu| cpu.len() > 1);
        if let Some(names) = names {
            let names: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
            println!("\nserver CPU of Torus = {}", names.join(" + "));
        }
        let cells = |idle: &Idle| {
            let mib = idle.resident_bytes as f64 / f64::from(1 << 20);
            vec![idle.process.clone(), format!("{:.2} %", idle.percent_of_a_core), format!("{mib:.0} MiB")]
        };
        println!("\nidle\n{}", table(&["process", "of a core", "memory"], self.idle.iter().map(cells)));
    }
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
