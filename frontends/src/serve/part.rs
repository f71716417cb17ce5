//! A server over several executors: each serves the connections that come to it and has the volumes whose home it is.
//!
//! All begin before a client is let in. At the end they stop serving together, wait for each other (a volume is served
//! on as long as another executor uses it), and release what lives with them.

use super::options::{NbdOptions, attacher};
use super::{ServeError, io_error};
use crate::nbd::{Arrivals, ConnectionCounts, Offer, Reception};
use crate::spread::{Handoffs, Place, Spread, SpreadDevice, places};
use crate::volume::{AttachedVolume, Attacher, Counters, VolumeExports, VolumeSettings};
use futures::FutureExt;
use std::fmt::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use torus_rpc::http::{HttpListener, Told};
use torus_rpc::metrics;
use torus_rpc::runtime::Runtime;
use torus_schema::latency::StageCounts;

const STATS_INTERVAL: Duration = Duration::from_secs(1);

/// A server, before it runs; any thread may have it.
pub struct Server {
    pub reception: Reception,
    pub parts: Vec<Part>,
    pub numbers: Numbers,
}

/// One executor's part, on its way to it.
pub struct Part {
    place: Place,
    arrivals: Arrivals,
    common: Common,
}

#[derive(Clone)]
struct Common {
    offer: Offer,
    attacher: Attacher,
    settings: VolumeSettings,
    counters: Arc<Counters>,
}

impl Server {
    /// `process`: as others will read it. `volumes`: those that are attached from the start.
    pub fn new(
        options: &NbdOptions,
        volumes: &[String],
        (process, force): (&str, bool),
        executors: usize,
    ) -> Result<Self, ServeError> {
        let (reception, arrivals) = Reception::new(executors);
        let counters = Arc::<Counters>::default();
        let common = Common {
            offer: options.offer(volumes)?,
            attacher: attacher(process, force),
            settings: options.settings(executors)?,
            counters: counters.clone(),
        };
        let places = places(executors);
        let handoffs = places.iter().map(Place::handoffs).collect();
        let numbers = Numbers { counters, connections: reception.counts(), handoffs };
        let part = |(place, arrivals)| Part { place, arrivals, common: common.clone() };
        Ok(Self { reception, parts: places.into_iter().zip(arrivals).map(part).collect(), numbers })
    }
}

impl Part {
    /// On its executor.
    pub fn begin<R: Runtime>(self, runtime: R) -> Running<R> {
        let Common { offer, attacher, settings, counters } = self.common;
        let exports = VolumeExports::counting(runtime.clone(), attacher, settings, counters);
        let spread = self.place.open(exports.clone(), runtime.spawn().clone());
        Running { exports, spread, arrivals: self.arrivals, offer }
    }
}

pub type SpreadVolumes<R> = Spread<VolumeExports<R>, <R as Runtime>::Spawn>;
pub type SpreadVolume<R> = SpreadDevice<AttachedVolume<R>>;

/// On its executor.
pub struct Running<R: Runtime> {
    exports: VolumeExports<R>,
    pub spread: SpreadVolumes<R>,
    arrivals: Arrivals,
    offer: Offer,
}

impl<R: Runtime> Running<R> {
    /// Until `stop`, and until all that it began is at its end; the volumes that live here are free again then.
    pub async fn serve(self, stop: impl Future<Output = ()>) {
        self.arrivals.serve(self.spread.clone(), self.offer, stop).await;
        self.spread.leave().await;
        self.exports.end().await;
    }
}

/// What a server can tell of itself.
#[derive(Clone)]
pub struct Numbers {
    counters: Arc<Counters>,
    connections: Vec<Arc<ConnectionCounts>>,
    handoffs: Vec<Arc<Handoffs>>,
}

impl Numbers {
    /// All of it, for who reads nothing else.
    pub fn to_text(&self, program: &str) -> String {
        metrics::text(program, &self.numbers_text(), &[(metrics::CLIENT_SIDE, &self.stages())])
    }

    pub fn stages(&self) -> StageCounts {
        self.counters.stages()
    }

    pub fn numbers_text(&self) -> String {
        let mut text = self.counters.to_text();
        let mut add = |name: &str, kind: &str, help: &str, values: Vec<u64>| {
            let _ = write!(text, "# HELP torus_{name} {help}\n# TYPE torus_{name} {kind}\n");
            for (executor, value) in values.into_iter().enumerate() {
                let _ = writeln!(text, "torus_{name}{{executor=\"{executor}\"}} {value}");
            }
        };
        let connections = |of: fn(&ConnectionCounts) -> u64| self.connections.iter().map(|counts| of(counts)).collect();
        let handoffs = |of: fn(&Handoffs) -> u64| self.handoffs.iter().map(|handoffs| of(handoffs)).collect();
        let open = connections(|counts| counts.open.load(Ordering::Relaxed) as u64);
        add("nbd_connections", "gauge", "NBD connections, by the executor that serves them", open);
        let served = connections(|counts| counts.served.load(Ordering::Relaxed));
        add("nbd_connections_served_total", "counter", "The same, since the start", served);
        let messages = handoffs(|handoffs| handoffs.messages.load(Ordering::Relaxed));
        add("handoffs_total", "counter", "Requests and answers handed to another executor", messages);
        let batches = handoffs(|handoffs| handoffs.batches.load(Ordering::Relaxed));
        add("handoff_batches_total", "counter", "Batches that those went in", batches);
        text
    }
}

/// Over HTTP, if it is asked for: a process that answers serves. Gives where.
pub fn tell_over_http(
    listener: Option<HttpListener>,
    text: impl Fn() -> String + Send + Sync + 'static,
) -> Result<Option<SocketAddr>, ServeError> {
    let Some(listener) = listener else { return Ok(None) };
    let address = listener.address;
    let tell = move || std::future::ready(Some(Told { metrics: text(), health: Ok(()) })).boxed();
    listener.serve(Arc::new(tell))?;
    tracing::info!("metrics at http://{address}/metrics");
    Ok(Some(address))
}

/// From a thread of its own, since a file may be slow; until the process ends.
pub fn write_stats(file: PathBuf, text: impl Fn() -> String + Send + 'static) -> Result<(), ServeError> {
    let beside = file.with_extension("new");
    let write = move || {
        // Renamed, so that no reader sees half of it.
        std::fs::write(&beside, text()).and_then(|()| std::fs::rename(&beside, &file))
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
