//! What both programs have in common: global options, the runtime a command runs on, and how its report is shown.

use clap::Args;
use futures::future::{Either, select};
use std::io::Write;
use std::pin::pin;
use std::process::ExitCode;
use std::time::Duration;
use torus_frontends::admin::{AdminError, Format, Report};
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::runtime::glommio::{GlommioRuntime, run};
use torus_rpc::runtime::{Clock, Runtime};

pub type CommandRuntime = GlommioRuntime<AnyMetadata>;

/// A month.
const LONG: Duration = Duration::from_secs(30 * 24 * 3600);

#[derive(Args, Clone, Debug)]
pub struct Global {
    /// Where the metadata store is: etcd://HOST:PORT[,HOST:PORT…] or torus://HOST:PORT
    #[arg(short = 'C', long, global = true, env = "TORUS_METADATA", default_value = "etcd://127.0.0.1:2379")]
    pub metadata: String,
    /// How results are shown
    #[arg(long, global = true, value_enum, default_value_t)]
    pub output: Format,
    /// Short for --output csv
    #[arg(long, global = true, conflicts_with = "output")]
    pub csv: bool,
    /// Every command ends within this, with a result or an error: 5s, 500ms, 2m
    #[arg(long, global = true, default_value = "5s", value_parser = parse_duration)]
    pub deadline: Duration,
}

impl Global {
    /// The metadata store gets most of the deadline, so that its own error, which says what was tried, comes first.
    fn metadata_deadline(&self) -> Duration {
        self.deadline * 9 / 10
    }

    pub fn format(&self) -> Format {
        if self.csv { Format::Csv } else { self.output }
    }
}

/// `5s`, `500ms`, `2m`, or seconds.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let units = [("ms", 1), ("s", 1000), ("m", 60_000)];
    let found = units.iter().find_map(|(suffix, unit)| Some((text.strip_suffix(suffix)?, *unit)));
    let (number, unit) = found.unwrap_or((text, 1000));
    let bad = || format!("{text:?} is not a duration; write 5s, 500ms or 2m, more than nothing and at most a day");
    let number: u64 = number.trim().parse().map_err(|_| bad())?;
    let milliseconds = number.checked_mul(unit).filter(|count| (1..=86_400_000).contains(count)).ok_or_else(bad)?;
    Ok(Duration::from_millis(milliseconds))
}

/// Runs the command and shows what came of it. A long one shows how far it is, and only what it asks of others has the
/// deadline; any other ends within it.
pub fn execute(
    global: &Global,
    is_long: bool,
    command: impl AsyncFnOnce(&CommandRuntime) -> Result<Report, AdminError>,
) -> ExitCode {
    let metadata = match AnyMetadata::connect(&global.metadata, global.metadata_deadline()) {
        Ok(metadata) => metadata,
        Err(error) => return fail(&error),
    };
    let deadline = if is_long { LONG } else { global.deadline };
    let result = run("torus-command", None, async move {
        let runtime = CommandRuntime::new(metadata);
        let limit = runtime.clock().sleep(deadline);
        match select(pin!(command(&runtime)), pin!(limit)).await {
            Either::Left((result, _)) => result,
            Either::Right(_) => Err(AdminError::Deadline { deadline, doing: "the cluster was asked" }),
        }
    });
    match result {
        Ok(Ok(report)) => show(&report, global.format()),
        Ok(Err(error)) => fail(&error),
        Err(error) => fail(&error),
    }
}

/// Refused or failed: exit code 1; clap's own errors are 2.
pub fn fail(error: &dyn std::fmt::Display) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::FAILURE
}

/// What a command waits for, as it changes.
pub fn progress(awaited: &[String]) {
    eprintln!("waiting for {}", awaited.join(", "));
}

pub fn show(report: &Report, format: Format) -> ExitCode {
    for warning in &report.warnings {
        eprintln!("warning: {warning}");
    }
    // A reader that has seen enough, such as `head`, is no failure.
    match std::io::stdout().write_all(report.render(format).as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => fail(&format!("standard output: {error}")),
        _ if report.failed => ExitCode::FAILURE,
        _ => ExitCode::SUCCESS,
    }
}
