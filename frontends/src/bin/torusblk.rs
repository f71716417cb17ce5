//! `torusblk`: volumes and how hosts get at them. `volume` is in `admin/volume.rs`, `serve` in `serve.rs`.

mod common;

use clap::{Parser, Subcommand};
use common::{Global, execute, fail, progress};
use std::process::ExitCode;
use torus_frontends::admin::volume::{self, VolumeCommand};
use torus_frontends::serve::{ServeArguments, run_server};
use tracing_subscriber::EnvFilter;

const EXAMPLES: &str = "\
Examples:
  torusblk -C torus://127.0.0.1:7700 volume create db-1 10GiB
  torusblk -C torus://127.0.0.1:7700 serve --listen 127.0.0.1:10809
  nbdinfo nbd://127.0.0.1:10809/db-1

Set TORUS_METADATA instead of repeating -C. RUST_LOG=debug makes `serve` say more.

Exit codes: 0 done, 1 refused or failed (the error says what to do), 2 wrong usage.";

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
}

fn main() -> ExitCode {
    let Arguments { global, command } = Arguments::parse();
    let deadline = global.deadline;
    match command {
        Command::Volume(command) => execute(&global, command.is_long(), async move |runtime| {
            volume::run(runtime, &command, deadline, progress).await
        }),
        Command::Serve(arguments) => {
            let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
            match run_server(&global.metadata, deadline, &arguments) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error),
            }
        }
    }
}
