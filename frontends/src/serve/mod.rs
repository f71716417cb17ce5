//! `torusblk serve`: the volumes of a cluster over NBD, until it is told to stop.
//!
//! * `aoe`      `torusblk aoe`: the same over ATA over Ethernet
//! * `options`  what can be asked for, of any program that serves volumes
//! * `part`     a server over several executors
//! * `threads`  the executors of this one

pub mod aoe;
pub mod options;
pub mod part;
mod threads;

use crate::device::{Device, Exports, VolumeError};
use crate::nbd::{Listener, ListenerError, Reception, TlsError};
use clap::Args;
use futures::channel::oneshot;
use futures::future::{FutureExt, Shared, join, join_all, select};
use options::{NbdOptions, default_executors};
use part::{Running, Server, SpreadVolume, SpreadVolumes, tell_over_http, write_stats};
use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;
use thiserror::Error;
use threads::Serving;
use torus_rpc::http::{HttpAddress, HttpError, HttpListener};
use torus_rpc::metadata::MetadataError;
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::runtime::Runtime;
use torus_rpc::runtime::glommio::{GlommioRuntime, StartError, Thread, run_on};
use torus_schema::cpus::CpuList;
use torus_schema::limits::CPUS_MAX;
use torus_schema::spin::Spin;

/// As metrics name it.
const PROGRAM: &str = "torusblk";

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
    /// Executors that connections are spread over, each in a thread of its own [default: one for each core, 8 at most]
    #[arg(long, value_name = "N", value_parser = parse_cores)]
    pub cores: Option<usize>,
    /// Cores to pin the executors to, one to each: 0,2,4 or 0-3
    #[arg(long, value_name = "LIST", conflicts_with = "cores")]
    pub cpus: Option<CpuList>,
    /// So long each executor looks for work before it sleeps; 0: not at all
    #[arg(long, value_name = "MICROSECONDS", default_value_t)]
    pub spin: Spin,
    /// Tell counters, latencies and health over HTTP: PORT of this host, or ADDRESS:PORT; /metrics, /health
    #[arg(long, value_name = "ADDRESS")]
    pub http: Option<HttpAddress>,
    #[command(flatten)]
    pub nbd: NbdOptions,
}

fn parse_cores(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(cores) if (1..=CPUS_MAX).contains(&cores) => Ok(cores),
        _ => Err(format!("found {text:?}, expected a number from 1 to {CPUS_MAX}")),
    }
}

impl ServeArguments {
    /// Of each executor.
    fn threads(&self) -> Vec<Thread> {
        let thread = |cpu| Thread { cpu, spin: self.spin.0 };
        match &self.cpus {
            Some(CpuList(cpus)) => cpus.iter().copied().map(Some).map(thread).collect(),
            None => vec![thread(None); self.cores.unwrap_or_else(default_executors)],
        }
    }
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
    Http(#[from] HttpError),
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
    #[error("AoE: {because}")]
    Aoe { because: String },
    #[error(transparent)]
    AoeAddress(#[from] crate::aoe::store::StoreError),
    #[error(transparent)]
    Socket(#[from] crate::aoe::socket::SocketError),
    #[error("{what}: {because}")]
    Io { what: &'static str, because: std::io::Error },
}

fn io_error(what: &'static str) -> impl FnOnce(std::io::Error) -> ServeError {
    move |because| ServeError::Io { what, because }
}

/// Prints one line `serving URI` per address on stdout (and `telling URI` of `--http`), then serves until SIGTERM or
/// SIGINT.
pub fn run_server(metadata: &str, deadline: Duration, arguments: &ServeArguments) -> Result<(), ServeError> {
    let placed = arguments.threads();
    let listeners = arguments.nbd.listen(&arguments.listen)?;
    let http = arguments.http.map(HttpListener::bind).transpose()?;
    let server = Server::new(&arguments.nbd, &arguments.volume, ("torusblk serve", arguments.force), placed.len())?;
    if let Some(file) = &arguments.nbd.stats {
        let numbers = server.numbers.clone();
        write_stats(file.clone(), move || numbers.to_text(PROGRAM))?;
    }
    let numbers = server.numbers.clone();
    let http = tell_over_http(http, move || numbers.to_text(PROGRAM))?;
    let metadata = AnyMetadata::connect(metadata, deadline)?;
    let signalled = stop_signal()?;
    let (stop, stopped) = oneshot::channel();
    let stopped = stopped.map(|_| ()).boxed().shared();
    let mut parts = server.parts.into_iter().zip(placed);
    let (part, thread) = parts.next().expect("there is an executor at least");
    let mut threads = Vec::new();
    for (index, (part, thread)) in (1..).zip(parts) {
        let name = format!("torusblk-{index}");
        // One after the other: what did not begin when one cannot is not waited for by the others.
        let mut serving = Serving::start(name, thread, part, metadata.clone(), stopped.clone())?;
        futures::executor::block_on(serving.ready())?;
        threads.push(serving);
    }
    let lead = Lead { listeners, reception: server.reception, volumes: &arguments.volume, http, signalled, stop };
    let served = run_on("torusblk", thread, async {
        let running = part.begin(GlommioRuntime::<_>::new(metadata));
        lead.serve(running, stopped, threads.len() + 1).await
    });
    threads.into_iter().for_each(Serving::join);
    served?
}

type Signalled = Shared<oneshot::Receiver<()>>;
/// On every executor.
type Stopped = Shared<futures::future::BoxFuture<'static, ()>>;

/// Ready at the first SIGTERM or SIGINT; a second one ends the process at once.
fn stop_signal() -> Result<Signalled, ServeError> {
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

/// What the first executor does beside its part.
struct Lead<'a> {
    listeners: Vec<Listener>,
    reception: Reception,
    volumes: &'a [String],
    http: Option<SocketAddr>,
    signalled: Signalled,
    /// Dropped, it stops every executor.
    stop: oneshot::Sender<()>,
}

impl Lead<'_> {
    async fn serve<R: Runtime>(
        self,
        running: Running<R>,
        stopped: Stopped,
        executors: usize,
    ) -> Result<(), ServeError> {
        let begun = self.begin(&running.spread, &stopped, executors).await;
        let Self { listeners, signalled, stop, .. } = self;
        let (kept, accepting) = match begun {
            Ok((kept, accepting)) => (Ok(kept), accepting),
            Err(error) => (Err(error), Vec::new()),
        };
        let ends = async {
            let ended = match kept {
                Ok(kept) => until_ended::<R>(kept, signalled).await,
                Err(error) => Err(error),
            };
            drop(stop);
            ended
        };
        let (ended, _) = join(ends, join(running.serve(stopped), join_all(accepting))).await;
        // The files of unix sockets go with them.
        drop(listeners);
        ended
    }

    /// The volumes that are kept attached, and what accepts clients.
    async fn begin<R: Runtime>(
        &self,
        spread: &SpreadVolumes<R>,
        stopped: &Stopped,
        executors: usize,
    ) -> Result<(Vec<(String, SpreadVolume<R>)>, Vec<impl Future<Output = ()> + use<R>>), ServeError> {
        let mut kept = Vec::new();
        for (index, name) in self.volumes.iter().enumerate() {
            kept.push((name.clone(), spread.attach_at(name, index % executors).await?));
        }
        // An unreachable store or a wrong URL is found out now, not by the first client.
        spread.list().await?;
        let accepting = self.listeners.iter().map(|listener| self.reception.accept(listener, stopped.clone()));
        let accepting = accepting.collect::<Result<Vec<_>, _>>().map_err(io_error("NBD listener"))?;
        self.tell()?;
        Ok((kept, accepting))
    }

    fn tell(&self) -> Result<(), ServeError> {
        let mut stdout = std::io::stdout();
        for listener in &self.listeners {
            let name = self.volumes.first().map_or("", String::as_str);
            writeln!(stdout, "serving {}", listener.uri(name)).map_err(io_error("stdout"))?;
        }
        if let Some(address) = self.http {
            writeln!(stdout, "telling http://{address}/metrics").map_err(io_error("stdout"))?;
        }
        stdout.flush().map_err(io_error("stdout"))
    }
}

/// A process that serves nothing of what it was started for must not look healthy.
async fn until_ended<R: Runtime>(kept: Vec<(String, SpreadVolume<R>)>, signalled: Signalled) -> Result<(), ServeError> {
    let ended = all_ended(kept).map(|because| Err(ServeError::Ended { because }));
    let signalled = signalled.map(|_| Ok(()));
    select(std::pin::pin!(signalled), std::pin::pin!(ended)).await.factor_first().0
}

/// When no session of these volumes is left; never, if there are none.
async fn all_ended<R: Runtime>(volumes: Vec<(String, SpreadVolume<R>)>) -> String {
    let mut last = None;
    for (name, volume) in volumes {
        last = Some(format!("{name}: {}", volume.ended().await));
    }
    match last {
        Some(last) => last,
        None => std::future::pending().await,
    }
}
