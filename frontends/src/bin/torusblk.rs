//! `torusblk`: volumes and how hosts get at them. `volume` is in `admin/volume.rs`, `nbd` in
//! `kernel/`, `serve` and `aoe` in `serve/`.

mod common;

use clap::{Parser, Subcommand};
use common::{Global, execute, fail, progress};
use std::process::ExitCode;
use torus_frontends::admin::volume::{self, VolumeCommand};
use torus_frontends::kernel::attach::{NbdArguments, run_attached};
use torus_frontends::kernel::listing;
use torus_frontends::serve::aoe::{AoeArguments, run_aoe};
use torus_frontends::serve::{ServeArguments, run_server};
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const EXAMPLES: &str = "\
Examples:
  torusblk -C torus://127.0.0.1:7700 volume create db-1 10GiB
  torusblk -C torus://127.0.0.1:7700 serve --listen 127.0.0.1:10809
  nbdinfo nbd://127.0.0.1:10809/db-1
  modprobe nbd && torusblk -C torus://127.0.0.1:7700 nbd db-1

Set TORUS_METADATA instead of repeating -C. RUST_LOG=debug makes `serve` and `nbd` say more.

Exit codes: 0 done, 1 refused or failed (the error says what to do), 2 wrong usage.";

const NBD_HELP: &str = "\
Prints `attached /dev/nbdN` and serves the device in the foreground. While replicas are away its requests wait; none
fails. SIGTERM or SIGINT flushes and detaches the device; while it is in use (mounted) that waits until it no longer is.
A second signal detaches it under its users.

When this process dies, the device's requests wait (--reconnect). Start the same command again: it serves the same device
on if nothing can have been lost, as is so unless every replica of some part was started anew meanwhile or another host
had the volume; otherwise it fails the device.

Examples:
  torusblk nbd db-1                      # the first free device
  torusblk nbd db-1 /dev/nbd3 --block-size 512
  torusblk nbd --list
  torusblk nbd --detach /dev/nbd3";

const AOE_HELP: &str = "\
AoE has no authentication and no encryption: whoever reaches the Ethernet segment can read and write every volume that is
served there. Addresses are easily forged, so mask lists and reservations protect from mistakes, not from people. Give AoE
a VLAN of its own, with nothing on it but targets and initiators.

Every write is on stable storage of all replicas in sync before it is answered: initiators never send a flush.

Start the same command on another host, too: it is a standby, answers nothing, and takes over when the volume has no owner
any more (--lease-ttl after its owner died). Prints `serving eX.Y …` and `standby eX.Y …` as that changes.

Needs CAP_NET_RAW. Linux: modprobe aoe; the device is /dev/etherd/eX.Y.

Examples:
  torusblk aoe db-1 eth1 1 0
  torusblk aoe db-1 eth1,eth2 1 0 --export db-2=1.1 --stats /run/torus-aoe.prom";

/// Makes volumes of a Torus cluster, and serves them as block devices
#[derive(Parser, Debug)]
#[command(name = "torusblk", version, after_help = EXAMPLES)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Clone, Debug)]
enum Command {
    /// Volumes: create, list, show, delete
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Serve all volumes over NBD until stopped; each is attached at its first use
    Serve(ServeArguments),
    /// Attach a volume to this host's kernel as /dev/nbdN, until stopped or detached (as root, with the nbd module)
    #[command(after_help = NBD_HELP)]
    Nbd(NbdArguments),
    /// Serve volumes over ATA over Ethernet until stopped, or stand by for who does (with CAP_NET_RAW)
    #[command(after_help = AOE_HELP)]
    Aoe(AoeArguments),
}

fn main() -> ExitCode {
    let Arguments { global, command } = Arguments::parse();
    let deadline = global.deadline;
    match command {
        Command::Volume(command) => execute(&global, command.is_long(), async move |runtime| {
            volume::run(runtime, &command, deadline, progress).await
        }),
        Command::Nbd(arguments) => nbd(&global, &arguments),
        Command::Aoe(arguments) => {
            log();
            match run_aoe(&global.metadata, deadline, &arguments) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error),
            }
        }
        Command::Serve(arguments) => {
            log();
            match run_server(&global.metadata, deadline, &arguments) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error),
            }
        }
    }
}

fn log() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

fn nbd(global: &Global, arguments: &NbdArguments) -> ExitCode {
    let report = match &arguments.detach {
        Some(device) => listing::detach(device, arguments.force),
        None if arguments.list => listing::list(),
        None => {
            log();
            return match run_attached(&global.metadata, global.deadline, arguments) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error),
            };
        }
    };
    match report {
        Ok(report) => common::show(&report, global.format()),
        Err(error) => fail(&error),
    }
}
