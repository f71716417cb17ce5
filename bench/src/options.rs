//! The command line of `torus-bench`.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;

/// Measures Torus beside the raw disk and its peers: one machine, one run
#[derive(Parser, Debug)]
#[command(
    name = "torus-bench",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Without a command: compare. Results go to stdout as tables and to bench/out/ as JSON. `make bench` builds what \
                  is measured first.\nUnused otherwise, the machine gives better figures; ratios suffer less than rates."
)]
pub struct CommandLine {
    #[command(subcommand)]
    pub command: Option<Command>,
    #[command(flatten)]
    pub compare: Compare,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// Every fio profile on the raw file, qemu-nbd, and Torus over NBD with 3 replicas and with 1
    Compare(Compare),
    /// 4 KiB on one file: bare io_uring, raw glommio, and our path through the Disk trait
    Spike(Effort),
    /// A volume with 3 replicas through the client library, without NBD
    Library(Effort),
    /// One shard on a file, without network: log, index, start, cleaning, beside the raw file
    Store(StoreOptions),
    /// A node filled to its end, overwritten, trimmed, deleted and filled again: write amplification and latencies
    Fill(FillOptions),
    /// A node killed, missed for 30 s of writes and started again, with volumes of 1, 10 and 100 GiB
    Rejoin(RejoinOptions),
    /// System calls and context switches (needs `perf` and root), and allocations, per 4 KiB operation
    Count(Effort),
}

#[derive(Args, Clone, Debug)]
pub struct Effort {
    /// How often everything is measured, one after the other; figures are medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    pub rounds: u16,
    /// Seconds of each measurement
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub seconds: u16,
    /// One short round: to see that it works, not what it gives
    #[arg(long)]
    pub quick: bool,
}

impl Effort {
    pub fn rounds_and_time(&self) -> (usize, Duration) {
        if self.quick {
            (1, Duration::from_secs(1))
        } else {
            (self.rounds.into(), Duration::from_secs(self.seconds.into()))
        }
    }
}

#[derive(Args, Clone, Debug)]
pub struct Compare {
    #[command(flatten)]
    effort: Effort,
    /// Only profiles whose name contains this
    #[arg(long, value_name = "TEXT")]
    profile: Option<String>,
    /// Reach our NBD server by TCP instead of a unix socket
    #[arg(long)]
    pub tcp: bool,
}

impl Compare {
    pub fn effort(&self) -> (usize, Duration) {
        self.effort.rounds_and_time()
    }

    pub fn wants(&self, profile: &str) -> bool {
        self.profile.as_ref().is_none_or(|text| profile.contains(text.as_str()))
    }
}

/// What `store` consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StorePart {
    /// Append, append + flush and random read at depth 1, 8 and 32, beside fio; group commit
    Traffic,
    /// Insert and look-up, bytes for each block
    Index,
    /// Shards that hold 1 to 64 GiB
    Start,
    /// Write amplification under random overwriting
    Cleaning,
    /// Reads while segments are cleaned
    Reads,
}

#[derive(Args, Clone, Debug)]
pub struct StoreOptions {
    /// How often traffic and starts are measured, one after the other; figures are medians
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Seconds of each measurement of traffic; reads beside the cleaner take five times as long
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
    seconds: u16,
    /// One short round, and small shards: to see that it works, not what it gives
    #[arg(long)]
    pub quick: bool,
    /// Only these parts; all by default
    #[arg(long = "part", value_name = "PART")]
    parts: Vec<StorePart>,
    /// Where the block files are made and removed again, on the disk that is measured [default: the build folder]
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub struct FillOptions {
    /// How many times its size the full node is overwritten
    #[arg(long, value_name = "N", default_value_t = 10)]
    pub times: u64,
    /// A node of 512 MiB instead of 2 GiB
    #[arg(long)]
    pub quick: bool,
}

#[derive(Args, Clone, Debug)]
pub struct RejoinOptions {
    /// How long the node is away
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub seconds: u64,
    /// 4 KiB writes a second meanwhile
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub writes: u64,
    /// Volumes of 1 and 10 GiB with little in them
    #[arg(long)]
    pub quick: bool,
}

impl StoreOptions {
    pub fn rounds_and_time(&self) -> (usize, Duration) {
        Effort { rounds: self.rounds, seconds: self.seconds, quick: self.quick }.rounds_and_time()
    }

    pub fn wants(&self, part: StorePart) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        CommandLine::command().debug_assert();
    }

    #[test]
    fn quick_is_one_round_of_one_second() {
        let line = CommandLine::parse_from(["torus-bench", "--quick", "--profile", "read"]);
        assert_eq!(line.compare.effort(), (1, Duration::from_secs(1)));
        assert!(line.compare.wants("randread-qd1") && !line.compare.wants("write-fsync"));
    }
}
