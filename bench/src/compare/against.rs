//! Our volumes of three replicas divided by Ceph's, beside what they are to reach.

use super::ceph;
use super::report::{Report, Row};
use crate::statistics::{Spread, ratio};
use serde::{Deserialize, Serialize};

/// A load, and how many times Ceph's rate ours is to be.
pub const AIMS: [(&str, f64); 3] = [("randread-qd32", 3.5), ("randwrite-qd32", 12.0), ("write-fsync", 3.5)];

/// One of ours under one load.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Against {
    pub load: String,
    pub system: String,
    /// Rate divided by Ceph's in the same round.
    pub ratio: Spread,
    pub aim: f64,
}

pub const HEADER: [&str; 4] = ["against Ceph RBD, 3 replicas both", "× its rate", "to reach", "reached"];

impl Against {
    pub fn cells(&self) -> Vec<String> {
        let reached = if self.ratio.median >= self.aim { "yes" } else { "no" };
        let name = format!("{}, {}", self.load, self.system);
        vec![name, self.ratio.with_range(2), format!("{:.1}", self.aim), reached.to_string()]
    }
}

/// Nothing where Ceph was not measured.
pub fn against(report: &Report) -> Vec<Against> {
    let of_load = |(load, aim): (&'static str, f64)| {
        let theirs = report.of_load(load).find(|row| row.system == ceph::NAME);
        let is_ours = |row: &&Row| report.system(&row.system).is_some_and(|system| system.replicas == Some(3));
        let compare = move |(ours, theirs): (&Row, &Row)| {
            let ratio = ratio(&ours.iops.rounds, &theirs.iops.rounds)?;
            Some(Against { load: load.to_string(), system: ours.system.clone(), ratio, aim })
        };
        let pairs = theirs
            .into_iter()
            .flat_map(move |theirs| report.of_load(load).filter(is_ours).map(move |ours| (ours, theirs)));
        pairs.filter_map(compare).collect::<Vec<Against>>()
    };
    AIMS.into_iter().flat_map(of_load).collect()
}
