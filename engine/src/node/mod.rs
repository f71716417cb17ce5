//! The life of a storage node: lock the data dir, find the cluster, format or check, open the shards, join, serve,
//! leave.
//!
//! * `disks`        what is done with files and devices before they serve: format, growth
//! * `executor`     a shard's thread
//! * `numa`         which core it is pinned to, by the disk
//! * `no_metadata`  what a shard asks the metadata store for
//! * `shards`       all of them, as the main thread sees them
//! * `membership`   the node's record and heartbeat
//! * `joining`      the node's place in the ring, for `--auto-join`
//! * `deleting`     volumes that were deleted
//! * `peers`        who else holds what, for the shards
//! * `repairing`    volumes with stale replicas that nobody has attached
//! * `serving`      volumes over NBD, for `--nbd`; `serving_aoe` over ATA over Ethernet, for `--aoe`; `serving_numbers`
//!   numbers and latencies over HTTP, for `--http`
//! * `scrub`        when the shards are scrubbed
//!
//! The main thread runs tokio for the metadata store, the control port and signals; it never touches data. While the
//! metadata store is away, the shards serve on.

pub mod deleting;
mod disks;
pub mod executor;
pub mod joining;
pub mod membership;
pub mod no_metadata;
mod numa;
pub mod peers;
mod repairing;
pub mod scrub;
pub mod serving;
mod serving_aoe;
mod serving_numbers;
pub mod shards;

use crate::config::NodeArguments;
use crate::control;
use crate::datadir::{DataDir, DataDirError, Devices, Found, Identity};
use crate::node::disks::Disks;
use crate::node::executor::{ShardThread, ShardThreadError};
use crate::node::joining::Joined;
use crate::node::membership::{Membership, MembershipError};
use crate::node::repairing::Repairing;
use crate::node::scrub::Scrubber;
use crate::node::serving::{Serving, ServingArguments, ServingError};
use crate::node::serving_aoe::ServingAoe;
use crate::node::serving_numbers::Served;
use crate::node::shards::{NodeReporter, Shards};
use std::convert::Infallible;
use std::net::{SocketAddr, TcpListener};
use std::rc::Rc;
use thiserror::Error;
use tokio::signal::unix::{Signal, SignalKind, signal};
use torus_rpc::http::{HttpError, HttpListener};
use torus_rpc::local::patience;
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::metadata::embedded_server::EmbeddedServer;
use torus_rpc::metadata::{Metadata, MetadataError, Revision, Watch};
use torus_rpc::server::Listener;
use torus_rpc::token::{ClusterKey, KeyError};
use torus_schema::ids::{ClusterId, NodeId, ShardIndex};
use torus_schema::limits::{HEARTBEAT_INTERVAL, METADATA_RETRY_AFTER};
use torus_schema::records::{self, ClusterRecord, NodeRecord, RecordError, ShardRecord, keys};

#[derive(Debug, Error)]
pub enum NodeError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error(transparent)]
    Membership(#[from] MembershipError),
    #[error(transparent)]
    Shard(#[from] ShardThreadError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("the key of the cluster record cannot be used: {0}")]
    Key(#[from] KeyError),
    #[error("the metadata store at {url} holds no cluster; make one with `torusadm -C {url} init`")]
    NoCluster { url: String },
    #[error("the cluster's records have format version {found}, expected {expected}; run the program that wrote them")]
    ClusterFormat { found: u32, expected: u32 },
    #[error(
        "{what} cannot listen on {address}: {because}; is another node or program there? choose another --listen, or port 0 for any free one"
    )]
    Listen { what: String, address: SocketAddr, because: String },
    #[error("the embedded metadata store could not be started: {because}")]
    Embedded { because: String },
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error("--nbd, --aoe: {0}")]
    Nbd(#[source] ServingError),
    #[error("{0}")]
    Setting(String),
    #[error("{what}: {because}")]
    System { what: &'static str, because: String },
}

/// Runs a node until it is told to stop. Blocks.
pub fn run(arguments: NodeArguments, volumes: &ServingArguments) -> Result<(), NodeError> {
    let system = |what| move |error: std::io::Error| NodeError::System { what, because: error.to_string() };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(system("the main thread's event loop"))?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let mut stop = StopSignals::new().map_err(system("signal handlers"))?;
        let dir = DataDir::lock(&arguments.data_dir)?;
        let node = tokio::select! {
            started = Node::start(&arguments, volumes, &dir) => started?,
            _ = stop.wait() => return Ok(()),
        };
        node.serve(&mut stop).await
    })
}

struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    fn new() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => tracing::info!("SIGTERM: stopping"),
            _ = self.interrupt.recv() => tracing::info!("SIGINT: stopping"),
        }
    }
}

/// Started and joined.
struct Node<'a> {
    id: NodeId,
    metadata: AnyMetadata,
    membership: Membership<'a, AnyMetadata>,
    cluster: ClusterId,
    dir: &'a DataDir,
    shards: Rc<Shards>,
    scrubber: Rc<Scrubber>,
    repairing: Option<Repairing>,
    serving: Option<Serving>,
    serving_aoe: Option<ServingAoe>,
    control: tokio::net::TcpListener,
    reporter: Rc<NodeReporter>,
    http: Option<HttpListener>,
    numbers: Served,
    /// Held, so that nobody mounts or formats them meanwhile.
    _devices: Devices,
    /// Ends with the node.
    _embedded: Option<EmbeddedServer>,
}

impl<'a> Node<'a> {
    async fn start(
        arguments: &NodeArguments,
        volumes: &ServingArguments,
        dir: &'a DataDir,
    ) -> Result<Node<'a>, NodeError> {
        // What is wrong with the settings is said before anybody is asked for anything.
        serving::check(volumes)?;
        let (nbd_exports, aoe_exports) = volumes.exports().map_err(NodeError::Setting)?;
        serving_aoe::check(volumes)?;
        let found = dir.inspect()?;
        let cores = &numa::usable_cores();
        if !matches!(found, Found::Formatted(_)) {
            Disks { arguments, dir, cores }.plan_format()?;
        }
        let host = arguments.advertised_host().map_err(NodeError::Setting)?;
        let (embedded, url) = start_embedded(arguments, dir)?;
        let metadata = AnyMetadata::connect(&url, arguments.deadline)?;
        let cluster = find_cluster(&metadata, &url, embedded.is_some()).await?;
        let key = ClusterKey::from_hex(&cluster.key)?;
        let disks = Disks { arguments, dir, cores };
        let (identity, devices) = match found {
            Found::Formatted(identity) => disks.take(identity, cluster.id).await?,
            Found::Empty | Found::InterruptedFormat => disks.format(&cluster, &found).await?,
        };
        let mut listeners = Listeners::bind(arguments, identity.shards)?;
        let nbd = serving::listen(volumes)?;
        let record = node_record(arguments, &identity, &host, &listeners)?;
        let mut threads = Vec::new();
        let options = disks.shard_options(&identity);
        for (options, listener) in options.into_iter().zip(listeners.take_shards(&record)) {
            threads.push(ShardThread::start(options, key.clone(), listener).await?);
        }
        let shards = Rc::new(Shards::new(threads));
        let mut membership = Membership::new(metadata.clone(), dir, record.clone());
        membership.join(shards.usage().await?).await?;
        if arguments.auto_join {
            join_ring(&metadata, &record).await;
        }
        tracing::info!(node = %identity.node, cluster = %cluster.id, control = record.control, "serving");
        let size_bytes = identity.shard_bytes * u64::from(identity.shards);
        let scrubber = Scrubber::new(shards.clone(), arguments.scrub_rate, size_bytes, dir.read_scrub_note()?);
        let (scrubber, started_s) = (Rc::new(scrubber), membership.started_s());
        let repairing = Repairing::start(metadata.clone(), identity.node, &record.host);
        let serving = match nbd.is_empty() {
            true => None,
            false => Some(Serving::start(volumes, (nbd, nbd_exports), &metadata, &shards)?),
        };
        let (serving, numbers) = serving.unzip();
        let numbers = Served::start(volumes, numbers)?;
        let serving_aoe = ServingAoe::start(volumes, aoe_exports, numbers.aoe.clone(), &metadata, &shards)?;
        let reporter = NodeReporter { record, started_s, shards: shards.clone(), scrubber: scrubber.clone() };
        Ok(Node {
            id: identity.node,
            metadata,
            membership,
            cluster: cluster.id,
            dir,
            shards,
            scrubber,
            repairing,
            serving,
            serving_aoe,
            control: listeners.control,
            reporter: Rc::new(reporter),
            http: listeners.http,
            numbers,
            _devices: devices,
            _embedded: embedded,
        })
    }

    /// Until a signal, or until it cannot go on.
    async fn serve(mut self, stop: &mut StopSignals) -> Result<(), NodeError> {
        if let Some(listener) = self.http {
            serving_numbers::tell(listener, self.reporter.clone(), self.numbers)?;
        }
        let control = tokio::task::spawn_local(control::serve(self.control, self.reporter));
        let result = tokio::select! {
            _ = stop.wait() => Ok(()),
            error = beat(&mut self.membership, &self.shards) => Err(error),
            never = follow_deletions(&self.metadata, self.id, &self.shards) => match never {},
            never = follow_peers(&self.metadata, self.cluster, &self.shards) => match never {},
            error = self.scrubber.follow(|text| save_scrub(self.dir, text)) => Err(error.into()),
        };
        control.abort();
        let leave = async {
            // All before the shards, which they may be at work on.
            if let Some(serving) = self.serving {
                stop_beating(serving.stop(), beat(&mut self.membership, &self.shards)).await;
            }
            if let Some(serving) = self.serving_aoe {
                stop_beating(serving.stop(), beat(&mut self.membership, &self.shards)).await;
            }
            if let Some(repairing) = self.repairing {
                repairing.stop().await;
            }
            self.shards.close().await?;
            self.membership.leave().await?;
            Ok::<(), NodeError>(())
        };
        tokio::select! {
            left = leave => match left {
                Ok(()) => tracing::info!("stopped"),
                Err(error) => tracing::warn!(%error, "stopped, though not as it should be"),
            },
            _ = stop.wait() => tracing::warn!("told to stop twice: ended at once"),
        }
        result
    }
}

/// Until clients have gone, which may take a while: the node is none that is down meanwhile.
async fn stop_beating(stop: impl Future<Output = ()>, beat: impl Future<Output = NodeError>) {
    let mut stopped = std::pin::pin!(stop);
    tokio::select! {
        () = &mut stopped => {}
        error = beat => {
            tracing::warn!(%error, "no heartbeat any more, while volumes are still being released");
            stopped.await;
        }
    }
}

/// A node that cannot join serves all the same: an operator can add it.
async fn join_ring(metadata: &AnyMetadata, record: &NodeRecord) {
    match joining::join(metadata, record).await {
        Ok(Joined::Already) => {}
        Ok(Joined::Now(generation)) => tracing::info!(%generation, "joined the ring"),
        Ok(Joined::Refused { volumes }) => {
            tracing::warn!(volumes, "--auto-join: not joined, since data would move; use `torusadm peer add`");
        }
        Err(error) => tracing::warn!(%error, "--auto-join: not joined"),
    }
}

/// Renews the heartbeat; ends only with what a node cannot live with.
async fn beat(membership: &mut Membership<'_, AnyMetadata>, shards: &Shards) -> NodeError {
    let mut is_away = false;
    loop {
        tokio::time::sleep(HEARTBEAT_INTERVAL).await;
        // A shard that does not answer holds up the heartbeat: the cluster shall see a stuck node as down.
        let usage = match shards.usage().await {
            Ok(usage) => usage,
            Err(error) => return error.into(),
        };
        match membership.renew(usage).await {
            Ok(()) if is_away => {
                is_away = false;
                tracing::info!("the metadata store answers again");
            }
            Ok(()) => {}
            Err(MembershipError::Metadata(error)) if is_away => tracing::debug!(%error, "still no heartbeat"),
            Err(MembershipError::Metadata(error)) => {
                is_away = true;
                tracing::warn!(%error, "no heartbeat; data is served on, trying again");
            }
            Err(error) => return error.into(),
        }
    }
}

async fn follow_deletions(metadata: &AnyMetadata, node: NodeId, shards: &Shards) -> Infallible {
    loop {
        match deleting::follow(metadata, node, shards).await {
            Ok(never) => match never {},
            Err(error) => tracing::warn!(%error, "deleted volumes cannot be followed; trying again"),
        }
        tokio::time::sleep(METADATA_RETRY_AFTER).await;
    }
}

async fn follow_peers(metadata: &AnyMetadata, cluster: ClusterId, shards: &Shards) -> Infallible {
    loop {
        match peers::follow(metadata, cluster, shards).await {
            Ok(never) => match never {},
            Err(error) => tracing::warn!(%error, "the ring cannot be followed; repairs ask whom they know"),
        }
        tokio::time::sleep(METADATA_RETRY_AFTER).await;
    }
}

fn save_scrub(dir: &DataDir, text: &str) -> Result<(), String> {
    dir.write_scrub_note(text).map_err(|error| error.to_string())
}

/// The store inside this node, if asked for, and the URL under which the store is reached.
fn start_embedded(arguments: &NodeArguments, dir: &DataDir) -> Result<(Option<EmbeddedServer>, String), NodeError> {
    if !arguments.is_metadata_embedded() {
        return Ok((None, arguments.metadata.clone()));
    }
    let server = EmbeddedServer::start(&dir.metadata_dir(), arguments.metadata_listen)
        .map_err(|error| NodeError::Embedded { because: error.to_string() })?;
    let url = format!("torus://{}", server.address());
    tracing::info!(url, "serving the cluster's metadata");
    Ok((Some(server), url))
}

/// A store inside this node is reached only once the node runs, so there the cluster is waited for.
async fn find_cluster(metadata: &AnyMetadata, url: &str, is_embedded: bool) -> Result<ClusterRecord, NodeError> {
    let key = keys::cluster();
    loop {
        if let Some(entry) = metadata.get(&key).await? {
            let record: ClusterRecord = records::decode(&key, &entry.value)?;
            let (found, expected) = (record.format_version, records::FORMAT_VERSION);
            return if found == expected { Ok(record) } else { Err(NodeError::ClusterFormat { found, expected }) };
        }
        if !is_embedded {
            return Err(NodeError::NoCluster { url: url.to_string() });
        }
        tracing::info!("no cluster yet: make one with `torusadm -C {url} init`");
        // A cluster made since the question shows in the watch, which starts before everything.
        metadata.watch(&key, Revision(1)).await?.next().await?;
    }
}

/// Bound before anything is opened, without SO_REUSEPORT, so that a port that is taken is an error.
struct Listeners {
    control: tokio::net::TcpListener,
    shards: Vec<TcpListener>,
    http: Option<HttpListener>,
}

impl Listeners {
    fn bind(arguments: &NodeArguments, shards: u16) -> Result<Self, NodeError> {
        let listen = |what: String, address: SocketAddr| {
            TcpListener::bind(address).map_err(|error| NodeError::Listen { what, address, because: error.to_string() })
        };
        let control = listen("the control port".to_string(), arguments.listen)?;
        let mut data = Vec::new();
        for shard in (0..shards).map(ShardIndex) {
            let address = arguments.shard_listen(shard).map_err(NodeError::Setting)?;
            data.push(listen(format!("shard {shard}"), address)?);
        }
        let to_tokio = || {
            control.set_nonblocking(true)?;
            tokio::net::TcpListener::from_std(control)
        };
        let control = to_tokio().map_err(|error| system("the control port", error))?;
        let http = arguments.http.map(HttpListener::bind).transpose()?;
        Ok(Self { control, shards: data, http })
    }

    /// Each for who is told the address of `record`. Taken once.
    fn take_shards(&mut self, record: &NodeRecord) -> Vec<Listener> {
        let (advertised, until) = (std::mem::take(&mut self.shards).into_iter().zip(&record.shards), patience());
        advertised.map(|(listener, shard)| Listener::new(listener).advertised_as(&shard.address, until)).collect()
    }
}

fn system(what: &'static str, error: std::io::Error) -> NodeError {
    NodeError::System { what, because: error.to_string() }
}

fn node_record(
    arguments: &NodeArguments,
    identity: &Identity,
    host: &str,
    listeners: &Listeners,
) -> Result<NodeRecord, NodeError> {
    let mut shards = Vec::new();
    for (index, listener) in (0..).map(ShardIndex).zip(&listeners.shards) {
        let port = listener.local_addr().map_err(|error| system("the port of a shard", error))?.port();
        shards.push(ShardRecord { index, address: format!("{host}:{port}"), size_bytes: identity.shard_bytes });
    }
    let port = listeners.control.local_addr().map_err(|error| system("the control port", error))?.port();
    let this_host = || nix::unistd::gethostname().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(NodeRecord {
        id: identity.node,
        cluster: identity.cluster,
        host: arguments.host.clone().unwrap_or_else(this_host),
        zone: arguments.zone.clone(),
        rack: arguments.rack.clone(),
        control: format!("{host}:{port}"),
        shards,
        program: env!("CARGO_PKG_VERSION").to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use futures::channel::oneshot;
    use std::cell::Cell;

    #[test]
    fn a_node_beats_while_its_clients_go_and_waits_for_them_when_it_cannot() {
        let beats = Cell::new(0);
        for fails in [false, true] {
            let (gone, all_gone) = oneshot::channel::<()>();
            let beat = async {
                beats.set(beats.get() + 1);
                if fails { NodeError::Setting("no disk".to_string()) } else { std::future::pending().await }
            };
            let mut stopping = Box::pin(stop_beating(all_gone.map(drop), beat));
            assert!(stopping.as_mut().now_or_never().is_none(), "a client is still there");
            drop(gone);
            assert!(stopping.now_or_never().is_some(), "all have gone");
        }
        assert_eq!(beats.get(), 2);
    }
}
