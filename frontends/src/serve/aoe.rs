//! `torusblk aoe`: volumes over ATA over Ethernet, until it is told to stop.

use super::options::attacher;
use super::part::{tell_over_http, write_stats};
use super::{PROGRAM, ServeError, io_error, stop_signal};
use crate::aoe::counts::Counts;
use crate::aoe::store::{Claimed, How, claim};
use crate::aoe::wire::Address;
use crate::aoe::{Held, Named, Server, Wanted};
use crate::device::Exports;
use crate::volume::{LeaseTerms, VolumeExports, VolumeSettings, find};
use clap::Args;
use futures::future::FutureExt;
use pnet::util::MacAddr;
use std::io::Write;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use torus_rpc::http::{HttpAddress, HttpListener};
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::metrics;
use torus_rpc::runtime::Runtime;
use torus_rpc::runtime::glommio::{GlommioRuntime, Thread, run_on};
use torus_schema::limits::{AOE_EXPORTS_MAX, LEASE_DRIFT, OWNER_LEASE_TTL};
use torus_schema::spin::Spin;

/// What clap shows as the command's help.
#[derive(Args, Clone, Debug)]
pub struct AoeArguments {
    /// The volume to serve
    pub volume: String,
    /// Ethernet interfaces of this host, such as eth1 or eth1,eth2; answers leave where the question came in
    #[arg(value_name = "INTERFACE[,INTERFACE…]")]
    pub interfaces: Interfaces,
    /// Shelf (major) of the address, 0 to 65534
    pub shelf: u16,
    /// Slot (minor) of the address, 0 to 254
    pub slot: u8,
    /// A further volume and its address; may be given several times
    #[arg(long = "export", value_name = "VOLUME=SHELF.SLOT")]
    pub exports: Vec<ExportArgument>,
    /// Give the addresses to these volumes although they are other volumes'
    #[arg(long)]
    pub take_address: bool,
    /// First forget whom the addresses' mask lists and reservations let in: everybody is heard again
    #[arg(long)]
    pub clear_lists: bool,
    /// Ethernet addresses of one initiator with several interfaces, whose frames may overtake each other; may be given
    /// several times
    #[arg(long, value_name = "MAC,MAC[,MAC…]")]
    pub same_host: Vec<SameHost>,
    /// Fail a request that has waited so many seconds for replicas to come back; 0: never (Linux gives up after 180)
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub io_timeout: u64,
    /// A standby takes the volumes of a process that died this long after its last sign of life
    #[arg(long, value_name = "SECONDS", default_value_t = OWNER_LEASE_TTL.as_secs())]
    pub lease_ttl: u64,
    /// How far the clocks of two hosts may drift apart within the lease; at most a quarter of it
    #[arg(long, value_name = "MILLISECONDS", default_value_t = LEASE_DRIFT.as_millis() as u64)]
    pub clock_drift: u64,
    /// Core to pin the executor to
    #[arg(long, value_name = "CPU")]
    pub cpu: Option<usize>,
    /// So long the executor looks for work before it sleeps; 0: not at all
    #[arg(long, value_name = "MICROSECONDS", default_value_t)]
    pub spin: Spin,
    /// Write counters to this file every second, in Prometheus' text format
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
    /// Tell counters, latencies and health over HTTP: PORT of this host, or ADDRESS:PORT; /metrics, /health
    #[arg(long, value_name = "ADDRESS")]
    pub http: Option<HttpAddress>,
}

/// Each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interfaces(pub Vec<String>);

impl FromStr for Interfaces {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<String> = text.split(',').map(str::to_string).collect();
        let is_doubled = |name: &String| names.iter().filter(|other| *other == name).count() > 1;
        if names.iter().any(|name| name.is_empty() || is_doubled(name)) {
            return Err(format!("found {text:?}, expected the names of interfaces, each once, such as eth1,eth2"));
        }
        Ok(Self(names))
    }
}

/// Addresses that are one initiator's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SameHost(pub Vec<MacAddr>);

impl FromStr for SameHost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad =
            || format!("found {text:?}, expected Ethernet addresses, such as 02:00:00:00:00:01,02:00:00:00:00:02");
        text.split(',').map(|mac| mac.parse().map_err(|_| bad())).collect::<Result<_, _>>().map(Self)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportArgument {
    pub volume: String,
    pub address: Address,
}

impl FromStr for ExportArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("found {text:?}, expected VOLUME=SHELF.SLOT, such as db-1=1.2");
        let (volume, address) = text.rsplit_once('=').ok_or_else(bad)?;
        Ok(Self { volume: volume.to_string(), address: address.parse()? })
    }
}

impl AoeArguments {
    fn all_exports(&self) -> Result<Vec<ExportArgument>, ServeError> {
        let usage = |because| ServeError::Aoe { because };
        let address = Address::new(self.shelf, self.slot).map_err(usage)?;
        let mut all = vec![ExportArgument { volume: self.volume.clone(), address }];
        all.extend(self.exports.iter().cloned());
        distinct(all).map_err(usage)
    }

    fn settings(&self) -> Result<VolumeSettings, ServeError> {
        let (ttl, drift) = (Duration::from_secs(self.lease_ttl), Duration::from_millis(self.clock_drift));
        let lease = LeaseTerms::new(ttl, drift).map_err(|because| ServeError::Lease { because })?;
        let io_timeout = (self.io_timeout > 0).then(|| Duration::from_secs(self.io_timeout));
        Ok(VolumeSettings { io_timeout, lease, ..VolumeSettings::default() })
    }
}

/// Every address once, and no more than a process serves.
pub fn distinct(exports: Vec<ExportArgument>) -> Result<Vec<ExportArgument>, String> {
    for (index, export) in exports.iter().enumerate() {
        if let Some(other) = exports[..index].iter().find(|other| other.address == export.address) {
            return Err(format!("{} and {} have the same address {}", other.volume, export.volume, export.address));
        }
    }
    match exports.len() {
        0..=AOE_EXPORTS_MAX => Ok(exports),
        found => Err(format!("found {found} exports, expected {AOE_EXPORTS_MAX} at most in one process")),
    }
}

/// Prints a line `serving eX.Y …` or `standby eX.Y …` on stdout whenever that changes, until SIGTERM or SIGINT.
pub fn run_aoe(metadata: &str, deadline: Duration, arguments: &AoeArguments) -> Result<(), ServeError> {
    let exports = arguments.all_exports()?;
    let settings = arguments.settings()?;
    let counts = Arc::<Counts>::default();
    let volumes = Arc::<crate::volume::Counters>::default();
    let text = {
        let (counts, volumes) = (counts.clone(), volumes.clone());
        move || {
            let numbers = volumes.to_text() + &counts.to_text();
            metrics::text(PROGRAM, &numbers, &[(metrics::CLIENT_SIDE, &volumes.stages())])
        }
    };
    if let Some(file) = &arguments.stats {
        write_stats(file.clone(), text.clone())?;
    }
    tell_over_http(arguments.http.map(HttpListener::bind).transpose()?, text)?;
    let metadata = AnyMetadata::connect(metadata, deadline)?;
    let signalled = stop_signal()?;
    run_on("torusblk-aoe", Thread { cpu: arguments.cpu, spin: arguments.spin.0 }, async {
        let runtime = GlommioRuntime::<_>::new(metadata);
        let attacher = attacher("torusblk aoe", false);
        let served = VolumeExports::counting(runtime.clone(), attacher, settings, volumes);
        // An unreachable store or a wrong URL is found out now.
        served.list().await?;
        let how = How { take: arguments.take_address, clear: arguments.clear_lists };
        let wanted = claimed(&runtime, exports, how).await?;
        let same_hosts = arguments.same_host.iter().map(|host| host.0.clone()).collect();
        let Interfaces(interfaces) = &arguments.interfaces;
        let server = Server::open(runtime, interfaces, wanted, counts, same_hosts)?;
        let interfaces = interfaces.join(",");
        let tell = move |named: &Named, held: Held| tell(named, &held, &interfaces);
        server.serve(served.clone(), signalled.map(|_| ()), tell).await;
        served.end().await;
        Ok(())
    })?
}

/// Their addresses are these volumes' when it returns.
pub async fn claimed<R: Runtime>(
    runtime: &R,
    exports: Vec<ExportArgument>,
    how: How,
) -> Result<Vec<Wanted>, ServeError> {
    let mut wanted: Vec<Wanted> = Vec::new();
    for ExportArgument { volume: name, address } in exports {
        let volume = find(runtime, &name).await?;
        // Each address orders its own writes: parts of one block written at two would undo each other.
        if let Some(other) = wanted.iter().find(|other| other.named.volume == volume) {
            let because = format!("volume {name} is to be {} and {address}; choose one address", other.named.address);
            return Err(ServeError::Aoe { because });
        }
        let claimed = claim(runtime.metadata(), address, (volume, &name), how).await?;
        wanted.push(Wanted { named: Named { address, name, volume }, is_new: claimed == Claimed::New });
    }
    Ok(wanted)
}

fn tell(Named { address, name, .. }: &Named, held: &Held, interfaces: &str) {
    let line = match held {
        Held::Serving => format!("serving {address} {name} on {interfaces}"),
        Held::Standby(because) => {
            tracing::info!(%address, name, because, "not answering");
            format!("standby {address} {name}")
        }
    };
    let mut stdout = std::io::stdout();
    if let Err(error) = writeln!(stdout, "{line}").and_then(|()| stdout.flush()).map_err(io_error("stdout")) {
        tracing::warn!(%error, line, "nobody reads our output");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        aoe: AoeArguments,
    }

    fn exports(words: &[&str]) -> Result<Vec<String>, String> {
        let command = Command::try_parse_from([&["aoe"], words].concat()).map_err(|error| error.to_string())?;
        let exports = command.aoe.all_exports().map_err(|error| error.to_string())?;
        Ok(exports.iter().map(|export| format!("{}={}", export.volume, export.address)).collect())
    }

    #[test]
    fn each_volume_has_its_address() {
        let found = exports(&["db-1", "eth0,eth1", "1", "2", "--export", "a=b=1.3"]).unwrap();
        assert_eq!(found, ["db-1=e1.2", "a=b=e1.3"]);
    }

    #[test]
    fn addresses_that_cannot_be_are_refused_with_what_can() {
        let refused = |words: &[&str], part: &str| {
            let error = exports(words).unwrap_err();
            assert!(error.contains(part), "{words:?}: {error}");
        };
        refused(&["db-1", "eth0", "65535", "2"], "every shelf");
        refused(&["db-1", "eth0", "1", "255"], "every slot");
        refused(&["db-1", "eth0", "1", "2", "--export", "b=1.2"], "the same address e1.2");
        refused(&["db-1", "eth0", "1", "2", "--export", "b"], "VOLUME=SHELF.SLOT");
        refused(&["db-1", "eth0,eth0", "1", "2"], "each once");
        refused(&["db-1", "eth0", "1", "2", "--same-host", "02:00"], "Ethernet addresses");
    }
}
