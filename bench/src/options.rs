//! The command line of `torus-bench`.

use clap::{Args, Parser, Subcommand, ValueEnum};
use std::path::PathBuf;
use std::time::Duration;
use torus_schema::spin::Spin;

/// Of one load on one system when it only has to be seen that it works.
const QUICK: Duration = Duration::from_millis(500);

/// Measures Torus beside the raw disk and its peers: one machine, one run
#[derive(Parser, Debug)]
#[command(
    name = "torus-bench",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Without a command: compare. Results go to stdout as tables, and as JSON and a page to \
                  bench/results/ (a whole comparison) or bench/out/. `make bench` builds what \
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
    /// Every load on the raw file, qemu-nbd, nbdkit, and Torus by NBD, by its library and inside a node
    Compare(Compare),
    /// The page of a result of `compare`, on stdout
    Page { result: PathBuf },
    /// A volume in a process of its own that takes orders on stdin; for `compare`
    #[command(hide = true)]
    LibraryClient(ClientOptions),
    /// 4 KiB on one file: bare io_uring, raw glommio, and our path through the Disk trait
    Spike(Effort),
    /// A volume with 3 replicas through the client library, without NBD
    Library(Effort),
    /// One node over its shards and one volume over an NBD server's executors, on 1, 2, 4 … cores
    Scale(Effort),
    /// One shard on a file, without network: log, index, start, cleaning, beside the raw file
    Store(StoreOptions),
    /// A node filled to its end, overwritten, trimmed, deleted and filled again: write amplification and latencies
    Fill(FillOptions),
    /// A node killed, missed for 30 s of writes and started again, with volumes of 1, 10 and 100 GiB
    Rejoin(RejoinOptions),
    /// NBD servers beside each other: qemu-nbd, nbdkit, torusblk serve and torus-engine --nbd, and their null back ends
    Nbd(NbdOptions),
    /// Our NBD server before a device in memory, until SIGTERM; for `nbd`
    #[command(hide = true)]
    NullServer {
        address: String,
        bytes: u64,
        #[arg(long, default_value_t)]
        spin: Spin,
    },
    /// AoE targets beside each other: vblade and torusblk aoe, in memory, on the disk, and with 3 replicas (needs root)
    Aoe(AoeOptions),
    /// Our AoE target before a device in memory, until SIGTERM; for `aoe`
    #[command(hide = true)]
    NullTarget { interface: String, shelf: u16, slot: u8, bytes: u64 },
    /// Time and allocations for each stage of an operation that is measured
    Stages,
    /// Allocations, instructions (needs valgrind), system calls and context switches (needs perf and root) per operation
    Count(CountOptions),
    /// The parts without I/O, for `count` to run under callgrind
    #[command(hide = true)]
    Pure,
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

/// Systems of others that are only set up when they are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Peer {
    /// Ceph RBD of Debian's packages with three replicas on three OSDs, started for this; says what it needs
    Ceph,
}

#[derive(Args, Clone, Debug)]
pub struct Compare {
    /// How often everything is measured, one after the other; figures are medians
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    rounds: u16,
    /// Seconds of each profile on each system
    #[arg(long, value_name = "SECONDS", default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..))]
    seconds: u16,
    /// Seconds of each depth between the profiles
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    sweep_seconds: u16,
    /// One short round on little data: to see that it works, not what it gives
    #[arg(long)]
    pub quick: bool,
    /// Only loads whose name contains this
    #[arg(long, value_name = "TEXT")]
    pub profile: Option<String>,
    /// Only systems whose name contains this, the raw file, and those of --peers
    #[arg(long = "system", value_name = "TEXT")]
    pub systems: Vec<String>,
    /// No depths but those of the profiles
    #[arg(long)]
    pub no_sweep: bool,
    /// No latencies at fixed rates
    #[arg(long)]
    pub no_rates: bool,
    /// Systems of others besides qemu-nbd and nbdkit
    #[arg(long, value_name = "PEER")]
    pub peers: Option<Peer>,
    /// Where JSON and page go [default: bench/results; bench/out when anything above leaves something out]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

impl Compare {
    pub fn rounds(&self) -> usize {
        if self.quick { 1 } else { self.rounds.into() }
    }

    pub fn seconds(&self, is_sweep: bool) -> Duration {
        match self.quick {
            true => QUICK,
            false => Duration::from_secs(if is_sweep { self.sweep_seconds } else { self.seconds }.into()),
        }
    }

    pub fn wants(&self, load: &str) -> bool {
        self.profile.as_ref().is_none_or(|text| load.contains(text.as_str()))
    }

    pub fn wants_system(&self, system: &str) -> bool {
        let has_it = |text: &String| system.to_lowercase().contains(&text.to_lowercase());
        self.systems.is_empty() || self.systems.iter().any(has_it)
    }

    /// Nothing is left out of it.
    pub fn is_whole(&self) -> bool {
        let leaves_out = self.quick || self.profile.is_some() || !self.systems.is_empty();
        !(leaves_out || self.no_sweep || self.no_rates)
    }
}

/// The client process of the comparison.
#[derive(Args, Clone, Debug)]
pub struct ClientOptions {
    #[arg(long, value_name = "URL")]
    pub metadata: String,
    #[arg(long, value_name = "NAME")]
    pub volume: String,
    #[arg(long, value_name = "MICROSECONDS", default_value_t)]
    pub spin: Spin,
}

/// What `count` consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CountPart {
    /// Of client and node
    Allocations,
    /// Of the parts without I/O
    Instructions,
    /// Of every process while fio runs
    Syscalls,
}

#[derive(Args, Clone, Debug)]
pub struct CountOptions {
    #[command(flatten)]
    pub effort: Effort,
    /// Only these parts; all by default
    #[arg(long = "part", value_name = "PART")]
    parts: Vec<CountPart>,
    /// Where the JSON goes [default: bench/out]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
}

impl CountOptions {
    pub fn wants(&self, part: CountPart) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
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
pub struct NbdOptions {
    #[command(flatten)]
    pub effort: Effort,
    /// Only loads whose name contains this
    #[arg(long, value_name = "TEXT")]
    load: Option<String>,
    /// What our servers are told, in microseconds: how long they look for work before they sleep
    #[arg(long, value_name = "MICROSECONDS", default_value_t)]
    pub spin: Spin,
    /// Only over unix sockets
    #[arg(long)]
    pub unix: bool,
    /// Only the null back ends
    #[arg(long)]
    pub null: bool,
}

impl NbdOptions {
    pub fn wants(&self, load: &str) -> bool {
        self.load.as_ref().is_none_or(|text| load.contains(text.as_str()))
    }
}

#[derive(Args, Clone, Debug)]
pub struct AoeOptions {
    #[command(flatten)]
    pub effort: Effort,
    /// Only the targets in memory
    #[arg(long)]
    pub null: bool,
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
    fn quick_is_one_short_round() {
        let line = CommandLine::parse_from(["torus-bench", "--quick", "--profile", "read"]);
        assert_eq!((line.compare.rounds(), line.compare.seconds(true)), (1, QUICK));
        assert!(line.compare.wants("randread-qd1") && !line.compare.wants("write-fsync"));
    }

    #[test]
    fn only_a_whole_run_is_worth_keeping() {
        let is_whole = |words: &[&str]| {
            let words = ["torus-bench"].into_iter().chain(words.iter().copied());
            CommandLine::parse_from(words).compare.is_whole()
        };
        assert!(is_whole(&[]) && is_whole(&["--rounds", "9"]));
        assert!(!is_whole(&["--quick"]) && !is_whole(&["--system", "raw"]) && !is_whole(&["--no-rates"]));
    }
}
