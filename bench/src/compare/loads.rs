//! What every system is asked: the profiles, and random reads and writes over the depths between.

use crate::client::load::{Load as ClientLoad, Work};
use crate::error::{BenchError, Result};
use crate::fio::{self, Connections, PROFILES, Profile, Size, Target};
use std::process::Command;
use torus_schema::limits::{BLOCK_BYTES, MIB};

/// The same question in fio's words and in those of our client process.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub name: &'static str,
    /// Loads of one kind differ in their depth.
    pub kind: &'static str,
    pub depth: usize,
    pub bytes: u64,
    /// Between two profiles: only for curves over the depth.
    pub is_sweep: bool,
    /// The whole region is written in order before, on every system.
    pub is_filled_before: bool,
    work: Work,
    fio: Fio,
}

#[derive(Clone, Copy, Debug)]
enum Fio {
    Profile(Profile),
    Random(Connections),
}

pub const READS: &str = "randread";
pub const WRITES: &str = "randwrite";
const SEQUENTIAL: &str = "sequential";
/// What was written in order is read so; the profile itself comes after random writes.
const READ_AS_WRITTEN: &str = "sequential-1m-read, as written";

/// Depths 1 and 32 are profiles.
const SWEEP: [(&str, bool, usize); 10] = [
    ("randread-qd2", false, 2),
    ("randread-qd4", false, 4),
    ("randread-qd8", false, 8),
    ("randread-qd16", false, 16),
    ("randread-qd64", false, 64),
    ("randwrite-qd2", true, 2),
    ("randwrite-qd4", true, 4),
    ("randwrite-qd8", true, 8),
    ("randwrite-qd16", true, 16),
    ("randwrite-qd64", true, 64),
];

/// What the profile's file says, for who is not fio.
fn of_profile(profile: Profile) -> Load {
    let (kind, work, depth, bytes) = match profile.name {
        "randread-qd1" => (READS, Work::Read, 1, BLOCK_BYTES),
        "randread-qd32" => (READS, Work::Read, 32, BLOCK_BYTES),
        "randwrite-qd1" => (WRITES, Work::Write, 1, BLOCK_BYTES),
        "randwrite-qd32" => (WRITES, Work::Write, 32, BLOCK_BYTES),
        "mixed-qd32" => ("mixed", Work::Mixed, 32, BLOCK_BYTES),
        "write-fsync" => ("write-fsync", Work::WriteThenFlush, 1, BLOCK_BYTES),
        "sequential-1m-read" => ("sequential read", Work::Read, 8, MIB),
        "sequential-1m-write" => ("sequential write", Work::Write, 8, MIB),
        other => unreachable!("profile {other} is not in this table"),
    };
    let (is_sweep, is_filled_before) = (false, false);
    Load { name: profile.name, kind, depth, bytes, is_sweep, is_filled_before, work, fio: Fio::Profile(profile) }
}

fn read_as_written() -> Load {
    let profiles = PROFILES.into_iter().map(of_profile);
    let mut reads = profiles.filter(|load| load.kind.starts_with(SEQUENTIAL) && load.work == Work::Read);
    let profile = reads.next().expect("one of the profiles reads in order");
    Load { name: READ_AS_WRITTEN, kind: "sequential read, as written", is_filled_before: true, ..profile }
}

fn of_depth((name, is_write, depth): (&'static str, bool, usize)) -> Load {
    let (kind, work) = if is_write { (WRITES, Work::Write) } else { (READS, Work::Read) };
    let fio = Fio::Random(Connections { name, is_write, connections: 1, depth });
    Load { name, kind, depth, bytes: BLOCK_BYTES, is_sweep: true, is_filled_before: false, work, fio }
}

/// Profiles first.
pub fn all() -> Vec<Load> {
    let profiles = PROFILES.into_iter().map(of_profile).chain([read_as_written()]);
    profiles.chain(SWEEP.into_iter().map(of_depth)).collect()
}

impl Load {
    pub fn fio(&self, target: &Target, size: Size) -> Command {
        match self.fio {
            Fio::Profile(profile) => fio::command(profile, target, size, &[]),
            Fio::Random(connections) => fio::connections_command(connections, target, size, &[]),
        }
    }

    pub fn client(&self, size: Size, seed: u64) -> ClientLoad {
        let is_sequential = self.kind.starts_with(SEQUENTIAL);
        let (work, depth, bytes, run) = (self.work, self.depth, self.bytes, size.run);
        ClientLoad { work, depth, bytes, is_sequential, region_bytes: size.bytes, run, seed }
    }
}

/// What is asked of the client library at a fixed rate.
pub const RATED: [(&str, Work); 3] =
    [("random read", Work::Read), ("random write", Work::Write), ("random durable write", Work::DurableWrite)];
/// In flight where the rate to be halved is found.
const RATED_DEPTH: usize = 32;
/// Beyond that operations wait for each other in the client, which is in their latency.
const RATED_IN_FLIGHT_MAX: usize = 64;

pub fn full_speed(work: Work, size: Size, seed: u64) -> ClientLoad {
    let (depth, bytes, run) = (RATED_DEPTH, BLOCK_BYTES, size.run);
    ClientLoad { work, depth, bytes, is_sequential: false, region_bytes: size.bytes, run, seed }
}

pub fn rated(work: Work, size: Size, seed: u64) -> ClientLoad {
    ClientLoad { depth: RATED_IN_FLIGHT_MAX, ..full_speed(work, size, seed) }
}

/// Whether `text` is in the name of a load.
pub fn check(text: &str) -> Result<()> {
    let names: Vec<&str> = all().iter().map(|load| load.name).collect();
    if names.iter().any(|name| name.contains(text)) {
        return Ok(());
    }
    let because = format!("no load has that in its name; there are {}", names.join(", "));
    Err(BenchError::Failed { what: format!("--profile {text:?}"), because })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_profile_can_be_asked_of_the_library() {
        let all = all();
        assert_eq!(all.len(), PROFILES.len() + 1 + SWEEP.len());
        assert!(
            all.iter()
                .all(|load| load.name.contains(&format!("qd{}", load.depth)) || load.depth == 1 || load.bytes == MIB)
        );
    }

    #[test]
    fn reads_and_writes_are_there_for_each_depth_once() {
        for kind in [READS, WRITES] {
            let mut depths: Vec<usize> = all().iter().filter(|load| load.kind == kind).map(|load| load.depth).collect();
            depths.sort_unstable();
            assert_eq!(depths, [1, 2, 4, 8, 16, 32, 64]);
        }
    }

    #[test]
    fn a_filter_that_fits_nothing_is_refused() {
        assert!(check("qd64").is_ok() && check("nonsense").is_err());
    }
}
