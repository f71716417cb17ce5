//! `torusadm`: administration of a cluster. Each noun's subcommands are in its file under `admin/`.

mod common;

use clap::{Parser, Subcommand};
use common::{Global, execute, progress};
use std::process::ExitCode;
use torus_frontends::admin::cluster::{self, InitArguments};
use torus_frontends::admin::peer::{self, PeerCommand};
use torus_frontends::admin::ring::{self, RingCommand};
use torus_frontends::admin::scrub::{self, ScrubCommand};
use torus_frontends::admin::volume::{self, VolumeCommand};
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
    /// Nodes and volumes in a few lines
    Status,
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
    let deadline = global.deadline;
    let is_long = matches!(&command, Command::Volume(command) if command.is_long());
    execute(&global, is_long, async move |runtime| {
        let metadata = runtime.metadata();
        match &command {
            Command::Init(arguments) => cluster::init(runtime, arguments).await,
            Command::Status => cluster::status(metadata).await,
            Command::Peer(command) => peer::run(metadata, command).await,
            Command::ListPeers => peer::list(metadata).await,
            Command::Ring(command) => ring::run(metadata, command).await,
            Command::Scrub(command) => scrub::run(metadata, command, deadline).await,
            Command::Volume(command) => volume::run(runtime, command, deadline, progress).await,
        }
    })
}
