//! `torusblk serve`: the volumes of a cluster over NBD, until it is told to stop.

use crate::device::{Device, Exports, VolumeError};
use crate::nbd::{ClientCertificates, Listener, ListenerError, Offer, TlsError, TlsMode, TlsOffer, serve};
use crate::volume::{AttachedVolume, Attacher, Counters, LeaseTerms, VolumeExports, VolumeSettings};
use clap::Args;
use futures::channel::oneshot;
use futures::future::{FutureExt, Shared, select};
use std::io::Write;
use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use torus_rpc::metadata::MetadataError;
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::runtime::glommio::{GlommioRuntime, StartError, run};
use torus_schema::limits::{LEASE_DRIFT, OWNER_LEASE_TTL};

const STATS_INTERVAL: Duration = Duration::from_secs(1);

/// What clap shows as the command's help.
#[derive(Args, Clone, Debug)]
pub struct ServeArguments {
    /// Where clients connect: HOST:PORT (port 0: any free one) or unix:PATH; may be given several times
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:10809")]
    pub listen: Vec<String>,
    /// Attach this volume from the start instead of at its first use; may be given several times
    #[arg(long, value_name = "NAME")]
    pub volume: Vec<String>,
    /// Take volumes over from another owner (waits until its reads have ended: its --lease-ttl and --clock-drift)
    #[arg(long)]
    pub force: bool,
    /// Listen on other than loopback addresses although clients may talk without TLS
    #[arg(long)]
    pub insecure: bool,
    #[command(flatten)]
    pub tls: TlsArguments,
    /// Refuse to write any export; their volumes are attached all the same
    #[arg(long)]
    pub read_only: bool,
    /// Fail a request that has waited so many seconds for replicas to come back; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub io_timeout: u64,
    /// Volumes of a process that died can be attached again this long after its last sign of life
    #[arg(long, value_name = "SECONDS", default_value_t = OWNER_LEASE_TTL.as_secs())]
    pub lease_ttl: u64,
    /// How far the clocks of two hosts may drift apart within the lease; at most a quarter of it
    #[arg(long, value_name = "MILLISECONDS", default_value_t = LEASE_DRIFT.as_millis() as u64)]
    pub clock_drift: u64,
    /// Write counters to this file every second, in Prometheus' text format
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
    /// Pin the server to this CPU
    #[arg(long, value_name = "N")]
    pub cpu: Option<usize>,
}

#[derive(Args, Clone, Debug)]
pub struct TlsArguments {
    /// Whether NBD clients may, or have to, talk over TLS
    #[arg(long = "tls", value_name = "MODE", default_value = "off")]
    pub mode: TlsMode,
    /// Directory with server-cert.pem, server-key.pem and, for certificates of clients, ca-cert.pem
    #[arg(long = "tls-certificates", value_name = "DIRECTORY", required_if_eq_any([("mode", "allow"), ("mode", "require")]))]
    pub certificates: Option<PathBuf>,
    /// Whether clients show a certificate of the authority in ca-cert.pem
    #[arg(long = "tls-clients", value_name = "WHETHER", default_value = "ignored")]
    pub clients: ClientCertificates,
}

#[derive(Debug, Error)]
pub enum ServeError {
    #[error(transparent)]
    Listen(#[from] ListenerError),
    #[error(
        "{address} is not a loopback address: everybody who reaches it could read and write every volume; \
         listen on 127.0.0.1 or unix:PATH, say --tls require --tls-clients required, or say --insecure"
    )]
    NotLoopback { address: String },
    #[error("the address {address:?} is not understood ({because}); expected HOST:PORT or unix:PATH")]
    Address { address: String, because: String },
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error(transparent)]
    Volume(#[from] VolumeError),
    #[error("--lease-ttl and --clock-drift: {because}")]
    Lease { because: String },
    #[error("none of the volumes named by --volume is served any more; the last: {because}")]
    Ended { because: String },
    #[error("{what}: {because}")]
    Io { what: &'static str, because: std::io::Error },
}

fn io_error(what: &'static str) -> impl FnOnce(std::io::Error) -> ServeError {
    move |because| ServeError::Io { what, because }
}

/// Prints one line `serving URI` per address on stdout, then serves until SIGTERM or SIGINT.
pub fn run_server(metadata: &str, deadline: Duration, arguments: &ServeArguments) -> Result<(), ServeError> {
    lease_terms(arguments)?;
    let offer = offer(arguments)?;
    let listeners = listen(arguments)?;
    let metadata = AnyMetadata::connect(metadata, deadline)?;
    let stop = stop_signal()?;
    run("torusblk", arguments.cpu, serve_all(listeners, metadata, arguments, offer, stop))?
}

fn lease_terms(arguments: &ServeArguments) -> Result<LeaseTerms, ServeError> {
    let (ttl, drift) = (Duration::from_secs(arguments.lease_ttl), Duration::from_millis(arguments.clock_drift));
    LeaseTerms::new(ttl, drift).map_err(|because| ServeError::Lease { because })
}

fn offer(arguments: &ServeArguments) -> Result<Offer, ServeError> {
    let TlsArguments { mode, certificates, clients } = &arguments.tls;
    let directory = certificates.as_deref().unwrap_or(Path::new("."));
    let default_export = match &arguments.volume[..] {
        [only] => Some(only.clone()),
        _ => None,
    };
    let tls = TlsOffer::load(*mode, directory, *clients)?;
    Ok(Offer { tls, read_only: arguments.read_only, default_export, ..Offer::default() })
}

fn listen(arguments: &ServeArguments) -> Result<Vec<Listener>, ServeError> {
    let mut listeners = Vec::new();
    for address in &arguments.listen {
        if let Some(path) = address.strip_prefix("unix:") {
            listeners.push(Listener::unix(Path::new(path))?);
            continue;
        }
        let resolved: Vec<_> = address
            .to_socket_addrs()
            .map_err(|error| ServeError::Address { address: address.clone(), because: error.to_string() })?
            .collect();
        let private = arguments.insecure || arguments.tls.mode == TlsMode::Require;
        if !private && !resolved.iter().all(|resolved| resolved.ip().is_loopback()) {
            return Err(ServeError::NotLoopback { address: address.clone() });
        }
        if arguments.tls.clients != ClientCertificates::Required && !resolved.iter().all(|to| to.ip().is_loopback()) {
            tracing::warn!(%address, "everybody who reaches it may read and write: --tls-clients is not required");
        }
        listeners.push(Listener::tcp(address)?);
    }
    Ok(listeners)
}

type Stop = Shared<oneshot::Receiver<()>>;

/// Ready at the first SIGTERM or SIGINT; a second one ends the process at once.
fn stop_signal() -> Result<Stop, ServeError> {
    let signals = [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT];
    let mut signals = signal_hook::iterator::Signals::new(signals).map_err(io_error("signal handlers"))?;
    let (stop, stopped) = oneshot::channel();
    let wait = move || {
        let mut signals = signals.forever();
        signals.next();
        // If nobody listens any more the process is ending anyway.
        let _ = stop.send(());
        signals.next();
        std::process::exit(130);
    };
    std::thread::Builder::new().name("signals".to_string()).spawn(wait).map_err(io_error("signal handlers"))?;
    Ok(stopped.shared())
}

async fn serve_all(
    listeners: Vec<Listener>,
    metadata: AnyMetadata,
    arguments: &ServeArguments,
    offer: Offer,
    stop: Stop,
) -> Result<(), ServeError> {
    let attacher = Attacher {
        host: nix::unistd::gethostname().map_or_else(|_| "?".to_string(), |name| name.to_string_lossy().into_owned()),
        process: "torusblk serve".to_string(),
        pid: std::process::id(),
        force: arguments.force,
        repair: false,
    };
    let io_timeout = (arguments.io_timeout > 0).then(|| Duration::from_secs(arguments.io_timeout));
    let lease = lease_terms(arguments)?;
    let settings = VolumeSettings { io_timeout, lease, ..VolumeSettings::default() };
    let exports = VolumeExports::with_settings(GlommioRuntime::<_>::new(metadata), attacher, settings);
    if let Some(file) = &arguments.stats {
        write_stats(file.clone(), exports.counters())?;
    }
    let served = serve_until(listeners, &exports, arguments, offer, stop).await;
    exports.release_all().await;
    served
}

async fn serve_until(
    listeners: Vec<Listener>,
    exports: &VolumeExports<GlommioRuntime<AnyMetadata>>,
    arguments: &ServeArguments,
    offer: Offer,
    stop: Stop,
) -> Result<(), ServeError> {
    let mut kept = Vec::new();
    for name in &arguments.volume {
        kept.push(exports.attach(name).await?);
    }
    // An unreachable store or a wrong URL is found out now, not by the first client.
    exports.list().await?;
    let mut stdout = std::io::stdout();
    for listener in &listeners {
        let name = arguments.volume.first().map_or("", String::as_str);
        writeln!(stdout, "serving {}", listener.uri(name)).map_err(io_error("stdout"))?;
    }
    stdout.flush().map_err(io_error("stdout"))?;
    let ended = all_ended(kept).shared();
    let stopped = select(stop, ended.clone()).map(|_| ()).shared();
    let servers =
        listeners.into_iter().map(|listener| serve(listener, exports.clone(), offer.clone(), stopped.clone()));
    for ended in futures::future::join_all(servers).await {
        ended.map_err(io_error("NBD listener"))?;
    }
    // A process that serves nothing of what it was started for must not look healthy.
    match ended.peek() {
        Some(because) => Err(ServeError::Ended { because: because.clone() }),
        None => Ok(()),
    }
}

/// When no session of these volumes is left; never, if there are none.
async fn all_ended(volumes: Vec<AttachedVolume<GlommioRuntime<AnyMetadata>>>) -> String {
    let mut last = None;
    for volume in volumes {
        last = Some(format!("{}: {}", volume.name(), volume.ended().await));
    }
    match last {
        Some(last) => last,
        None => std::future::pending().await,
    }
}

/// From a thread of its own, since a file may be slow; until the process ends.
fn write_stats(file: PathBuf, counters: Arc<Counters>) -> Result<(), ServeError> {
    let beside = file.with_extension("new");
    let write = move || {
        // Renamed, so that no reader sees half of it.
        std::fs::write(&beside, counters.to_text()).and_then(|()| std::fs::rename(&beside, &file))
    };
    write().map_err(io_error("--stats"))?;
    let write_on = move || {
        let mut failed = false;
        loop {
            std::thread::sleep(STATS_INTERVAL);
            let written = write();
            if let Err(error) = &written
                && !failed
            {
                tracing::warn!(%error, "cannot write the statistics; trying on");
            }
            failed = written.is_err();
        }
    };
    std::thread::Builder::new().name("stats".to_string()).spawn(write_on).map_err(io_error("--stats"))?;
    Ok(())
}
