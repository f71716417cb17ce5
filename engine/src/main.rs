//! `torus-engine`: a storage node, the metadata store of one machine, or a look at the disks of a stopped node.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use torus_engine::config::{Command, CommandLine, MetadataArguments};
use torus_engine::{inspect, node};
use torus_rpc::metadata::embedded_server::EmbeddedServer;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let line = CommandLine::read(std::env::args_os()).unwrap_or_else(|error| error.exit());
    let result = match (line.command, line.node) {
        (Some(Command::Metadata(arguments)), _) => start_log(&arguments.log).and_then(|()| serve_metadata(&arguments)),
        (Some(Command::Inspect(arguments)), _) => arguments
            .check()
            .and_then(|()| start_log(&arguments.log))
            .and_then(|()| inspect::run(&arguments).map_err(|error| error.to_string())),
        (None, Some(arguments)) => {
            let run = || node::run(arguments.clone(), &line.serving).map_err(|error| error.to_string());
            start_log(&arguments.log).and_then(|()| run())
        }
        (None, None) => Err("nothing was asked for; see --help".to_string()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "torus-engine: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start_log(level: &str) -> Result<(), String> {
    let filter = tracing_subscriber::EnvFilter::try_new(level)
        .map_err(|error| format!("--log {level:?} is not understood ({error}); expected info, debug or a filter"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    Ok(())
}

/// Serves until it is told to stop; its URL is the one line on stdout, for scripts.
fn serve_metadata(arguments: &MetadataArguments) -> Result<(), String> {
    let signals = [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT];
    let mut signals =
        signal_hook::iterator::Signals::new(signals).map_err(|error| format!("signal handlers: {error}"))?;
    let server = EmbeddedServer::start(&arguments.dir, arguments.listen).map_err(|error| error.to_string())?;
    let mut stdout = std::io::stdout();
    let told = writeln!(stdout, "torus://{}", server.address()).and_then(|()| stdout.flush());
    told.map_err(|error| format!("stdout: {error}"))?;
    let stopper = server.stopper();
    let until_signal = move || {
        signals.forever().next();
        stopper.stop();
    };
    std::thread::Builder::new().spawn(until_signal).map_err(|error| format!("signal handlers: {error}"))?;
    server.wait().map_err(|error| error.to_string())
}
