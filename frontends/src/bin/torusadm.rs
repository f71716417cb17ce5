//! `torusadm`: administration of a cluster. Each noun's subcommands are in its file under `admin/`.

mod common;

use clap::{Parser, Subcommand};
use common::{Global, execute, progress};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use torus_frontends::admin::cluster::{self, InitArguments};
use torus_frontends::admin::peer::{self, PeerCommand};
use torus_frontends::admin::ring::{self, RingCommand};
use torus_frontends::admin::scrub::{self, ScrubCommand};
use torus_frontends::admin::status;
use torus_frontends::admin::top::{self, LatencyArguments, TopArguments};
use torus_frontends::admin::volume::{self, VolumeCommand};
use torus_frontends::admin::why::{self, WhyArguments};
use torus_frontends::admin::{Format, Report};
use torus_rpc::runtime::Runtime;

const EXAMPLES: &str = "\
A cluster from nothing:
  torusadm -C etcd://10.0.0.1:2379 init          once
  torus-engine --metadata etcd://10.0.0.1:2379 … on every storage host
  torusadm -C etcd://10.0.0.1:2379 peer list     they are Avail
  torusadm -C etcd://10.0.0.1:2379 peer add --all-peers
  torusblk -C etcd://10.0.0.1:2379 volume create db-1 500GiB

Set TORUS_METADATA instead of repeating -C.

Exit codes: 0 done, 1 refused or failed (the error says what to do), 2 wrong usage.";

/// Administers a Torus cluster: its nodes, its ring and its volumes
#[derive(Parser, Debug)]
#[command(name = "torusadm", version, after_help = EXAMPLES)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Clone, Debug)]
enum Command {
    /// Make a new cluster in an empty metadata store
    Init(InitArguments),
    /// Healthy or not, and why: nodes, degraded volumes and their resync, what needs somebody
    Status,
    /// Where a byte of a volume lies, and what each of its replicas has there
    Why(WhyArguments),
    /// What is asked of each shard, how often, and how long its stages take; until Ctrl-C
    Top(TopArguments),
    /// In which stage of its operations the time of a volume goes
    Latency(LatencyArguments),
    /// Storage nodes: list them, put them into the ring, take them out
    #[command(subcommand)]
    Peer(PeerCommand),
    /// The same as `peer list`
    ListPeers,
    /// The ring: which shards hold which slices
    #[command(subcommand)]
    Ring(RingCommand),
    /// Scrub: have nodes read and verify all they hold, and see what they found
    #[command(subcommand)]
    Scrub(ScrubCommand),
    /// Volumes: create, list, show, delete
    #[command(subcommand)]
    Volume(VolumeCommand),
}

fn main() -> ExitCode {
    let Arguments { global, command } = Arguments::parse();
    let (deadline, format) = (global.deadline, global.format());
    let is_long = match &command {
        Command::Volume(command) => command.is_long(),
        // It waits until all is copied.
        Command::Peer(PeerCommand::Replace(_)) => true,
        // Until somebody has seen enough, or for its interval.
        Command::Top(_) => true,
        _ => false,
    };
    execute(&global, is_long, async move |runtime| {
        let metadata = runtime.metadata();
        match &command {
            Command::Init(arguments) => cluster::init(runtime, arguments).await,
            Command::Status => status::status(metadata, deadline).await,
            Command::Top(arguments) => top::top(runtime, arguments, deadline, |report| redraw(report, format)).await,
            Command::Latency(arguments) => top::latency(metadata, arguments, deadline).await,
            Command::Why(arguments) => why::why(runtime, arguments, deadline).await,
            Command::Peer(command) => peer::run(runtime, command, |said| eprintln!("{said}")).await,
            Command::ListPeers => peer::list(metadata).await,
            Command::Ring(command) => ring::run(metadata, command).await,
            Command::Scrub(command) => scrub::run(metadata, command, deadline).await,
            Command::Volume(command) => volume::run(runtime, command, deadline, progress).await,
        }
    })
}

/// Over what was shown before, on a terminal; elsewhere below it, one JSON document a line.
fn redraw(report: &Report, format: Format) {
    report.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    let mut stdout = std::io::stdout();
    let text = match format {
        Format::Json => format!("{}\n", report.json),
        format => report.render(format),
    };
    // Home, and nothing below.
    let clear = if stdout.is_terminal() { "\x1b[H\x1b[J" } else { "" };
    let shown = write!(stdout, "{clear}{text}").and_then(|()| stdout.flush());
    if shown.is_err() {
        // Nobody reads it any more.
        std::process::exit(0);
    }
}
