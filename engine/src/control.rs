//! The control plane of a node: `NodeControl` by capnp-rpc on the control port, served by the node's main thread.
//!
//! The port is open to whoever reaches it: a message is bounded before memory is taken for it, connections are
//! bounded in number, and garbage ends its own connection only.

use capnp::message::ReaderOptions;
use capnp_rpc::{RpcSystem, rpc_twoparty_capnp, twoparty};
use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};
use torus_rpc::control::{self, ScrubOrder, ScrubStatus, ShardDamage, ShardInstances, ShardStages};
use torus_schema::control_capnp::node_control;
use torus_schema::ids::{ShardIndex, VolumeId};
use torus_schema::limits;

/// What a node tells about itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeReport {
    /// JSON, as in the metadata store.
    pub node: String,
    pub heartbeat: String,
    pub shards: Vec<ShardReport>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ShardReport {
    pub index: ShardIndex,
    pub segments: u32,
    pub segments_free: u32,
    pub live_bytes: u64,
    pub volumes: u32,
    pub connections: u32,
    pub reads: u64,
    pub writes: u64,
    pub flushes: u64,
    pub batches: u64,
    pub syncs: u64,
    pub bytes_appended: u64,
    pub checksum_errors: u64,
    pub refused: u64,
    pub index_blocks: u64,
    pub index_bytes: u64,
    pub damaged: u64,
    pub damaged_found: u64,
    pub repaired: u64,
    pub conflicts: u64,
    /// Why it answers nothing.
    pub failed: Option<String>,
    pub failures: u32,
}

/// Asked at each call, so that nothing is kept up to date for nobody.
pub trait Reporter: 'static {
    fn report(&self) -> Answered<NodeReport>;
    /// Carries the order out, and tells what holds then.
    fn scrub(&self, order: ScrubOrder) -> Answered<ScrubStatus>;
    /// At most `limit` of each list and shard.
    fn damage(&self, limit: u32) -> Answered<Vec<ShardDamage>>;
    /// Of one volume, or of all.
    fn instances(&self, only: Option<VolumeId>) -> Answered<Vec<ShardInstances>>;
    /// Of one volume, or of all.
    fn stages(&self, only: Option<VolumeId>) -> Answered<Vec<ShardStages>>;
}

pub type Answered<T> = Pin<Box<dyn Future<Output = Result<T, String>>>>;

/// Serves until it is dropped, together with the local task set it runs in.
pub async fn serve(listener: TcpListener, reporter: Rc<dyn Reporter>) {
    let open = Rc::new(Cell::new(0));
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or the peer was gone again: the next may do better, but not at once.
                tracing::warn!(%error, "control: accept failed");
                tokio::time::sleep(limits::ACCEPT_RETRY_AFTER).await;
                continue;
            }
        };
        if open.get() >= limits::CONTROL_CONNECTIONS_MAX {
            tracing::warn!(%peer, limit = limits::CONTROL_CONNECTIONS_MAX, "control: too many connections, closed one");
            continue;
        }
        let guard = Open::new(open.clone());
        let reporter = reporter.clone();
        tokio::task::spawn_local(async move {
            let _guard = guard;
            if let Err(error) = talk(stream, reporter).await {
                tracing::info!(%peer, %error, "control: connection ended");
            }
        });
    }
}

async fn talk(stream: TcpStream, reporter: Rc<dyn Reporter>) -> Result<(), capnp::Error> {
    stream.set_nodelay(true).map_err(|error| capnp::Error::failed(error.to_string()))?;
    let (reader, writer) = stream.into_split();
    let mut options = ReaderOptions::new();
    options.traversal_limit_in_words(Some(limits::CONTROL_MESSAGE_WORDS_MAX)).nesting_limit(16);
    let (reader, writer) = (reader.compat(), writer.compat_write());
    let network = twoparty::VatNetwork::new(reader, writer, rpc_twoparty_capnp::Side::Server, options);
    let client: node_control::Client = capnp_rpc::new_client(Control { reporter });
    RpcSystem::new(Box::new(network), Some(client.client)).await
}

struct Open(Rc<Cell<usize>>);

impl Open {
    fn new(count: Rc<Cell<usize>>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

struct Control {
    reporter: Rc<dyn Reporter>,
}

impl node_control::Server for Control {
    async fn status(
        self: Rc<Self>,
        _: node_control::StatusParams,
        mut results: node_control::StatusResults,
    ) -> Result<(), capnp::Error> {
        let report = self.reporter.report().await.map_err(capnp::Error::failed)?;
        let mut status = results.get().init_status();
        status.set_node(&report.node);
        status.set_heartbeat(&report.heartbeat);
        let mut shards = status.init_shards(u32::try_from(report.shards.len()).unwrap_or(0));
        for (position, shard) in (0u32..).zip(&report.shards) {
            let mut to = shards.reborrow().get(position);
            to.set_index(shard.index.0);
            to.set_segments(shard.segments);
            to.set_segments_free(shard.segments_free);
            to.set_live_bytes(shard.live_bytes);
            to.set_volumes(shard.volumes);
            to.set_connections(shard.connections);
            to.set_reads(shard.reads);
            to.set_writes(shard.writes);
            to.set_flushes(shard.flushes);
            to.set_batches(shard.batches);
            to.set_syncs(shard.syncs);
            to.set_bytes_appended(shard.bytes_appended);
            to.set_checksum_errors(shard.checksum_errors);
            to.set_refused(shard.refused);
            to.set_index_blocks(shard.index_blocks);
            to.set_index_bytes(shard.index_bytes);
            to.set_damaged(shard.damaged);
            to.set_damaged_found(shard.damaged_found);
            to.set_repaired(shard.repaired);
            to.set_conflicts(shard.conflicts);
            to.set_failed(shard.failed.as_deref().unwrap_or_default());
            to.set_failures(shard.failures);
        }
        Ok(())
    }

    async fn scrub(
        self: Rc<Self>,
        params: node_control::ScrubParams,
        mut results: node_control::ScrubResults,
    ) -> Result<(), capnp::Error> {
        let order = params.get()?.get_order()?.into();
        let status = self.reporter.scrub(order).await.map_err(capnp::Error::failed)?;
        control::set_scrub_status(results.get().init_status(), &status);
        Ok(())
    }

    async fn damage(
        self: Rc<Self>,
        params: node_control::DamageParams,
        mut results: node_control::DamageResults,
    ) -> Result<(), capnp::Error> {
        let limit = params.get()?.get_limit();
        let damage = self.reporter.damage(limit).await.map_err(capnp::Error::failed)?;
        let mut shards = results.get().init_shards(u32::try_from(damage.len()).unwrap_or(0));
        for (position, shard) in (0u32..).zip(&damage) {
            control::set_damage(shards.reborrow().get(position), shard);
        }
        Ok(())
    }

    async fn instances(
        self: Rc<Self>,
        params: node_control::InstancesParams,
        mut results: node_control::InstancesResults,
    ) -> Result<(), capnp::Error> {
        let volume = read_volume(params.get()?.get_volume()?)?;
        let held = self.reporter.instances(volume).await.map_err(capnp::Error::failed)?;
        let mut shards = results.get().init_shards(u32::try_from(held.len()).unwrap_or(0));
        for (position, shard) in (0u32..).zip(&held) {
            control::set_instances(shards.reborrow().get(position), shard);
        }
        Ok(())
    }

    async fn stages(
        self: Rc<Self>,
        params: node_control::StagesParams,
        mut results: node_control::StagesResults,
    ) -> Result<(), capnp::Error> {
        let volume = read_volume(params.get()?.get_volume()?)?;
        let stages = self.reporter.stages(volume).await.map_err(capnp::Error::failed)?;
        let mut shards = results.get().init_shards(u32::try_from(stages.len()).unwrap_or(0));
        for (position, shard) in (0u32..).zip(&stages) {
            control::set_stages(shards.reborrow().get(position), shard);
        }
        Ok(())
    }
}

/// One volume, or (empty) all.
fn read_volume(wanted: capnp::text::Reader<'_>) -> Result<Option<VolumeId>, capnp::Error> {
    match wanted.to_str()? {
        "" => Ok(None),
        text => {
            let failed = |_| capnp::Error::failed(format!("found {text:?}, expected the uuid of a volume"));
            text.parse().map(Some).map_err(failed)
        }
    }
}

/// The other side, for tools and tests: one question, one answer.
pub async fn ask_status(address: &str) -> Result<NodeReport, capnp::Error> {
    let failed = |error: std::io::Error| capnp::Error::failed(format!("{address}: {error}"));
    let stream = TcpStream::connect(address).await.map_err(failed)?;
    let (reader, writer) = stream.into_split();
    let (reader, writer) = (reader.compat(), writer.compat_write());
    let side = rpc_twoparty_capnp::Side::Client;
    let network = twoparty::VatNetwork::new(reader, writer, side, ReaderOptions::new());
    let mut system = RpcSystem::new(Box::new(network), None);
    let client: node_control::Client = system.bootstrap(rpc_twoparty_capnp::Side::Server);
    let running = tokio::task::spawn_local(system);
    let response = client.status_request().send().promise.await?;
    let report = read_report(response.get()?.get_status()?);
    running.abort();
    report
}

fn read_report(status: torus_schema::control_capnp::node_status::Reader<'_>) -> Result<NodeReport, capnp::Error> {
    let read_shard =
        |shard: torus_schema::control_capnp::shard_status::Reader<'_>| -> Result<ShardReport, capnp::Error> {
            let failed = shard.get_failed()?.to_string()?;
            Ok(ShardReport {
                index: ShardIndex(shard.get_index()),
                segments: shard.get_segments(),
                segments_free: shard.get_segments_free(),
                live_bytes: shard.get_live_bytes(),
                volumes: shard.get_volumes(),
                connections: shard.get_connections(),
                reads: shard.get_reads(),
                writes: shard.get_writes(),
                flushes: shard.get_flushes(),
                batches: shard.get_batches(),
                syncs: shard.get_syncs(),
                bytes_appended: shard.get_bytes_appended(),
                checksum_errors: shard.get_checksum_errors(),
                refused: shard.get_refused(),
                index_blocks: shard.get_index_blocks(),
                index_bytes: shard.get_index_bytes(),
                damaged: shard.get_damaged(),
                damaged_found: shard.get_damaged_found(),
                repaired: shard.get_repaired(),
                conflicts: shard.get_conflicts(),
                failed: (!failed.is_empty()).then_some(failed),
                failures: shard.get_failures(),
            })
        };
    let shards: Vec<ShardReport> = status.get_shards()?.iter().map(read_shard).collect::<Result<_, _>>()?;
    let node = status.get_node()?.to_string()?;
    let heartbeat = status.get_heartbeat()?.to_string()?;
    Ok(NodeReport { node, heartbeat, shards })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::SocketAddr;

    struct Fixed;

    impl Reporter for Fixed {
        fn report(&self) -> Answered<NodeReport> {
            let (live_bytes, index_blocks, index_bytes) = (u64::MAX, 11, 13);
            let (index, failed) = (ShardIndex(1), Some("fdatasync failed".to_string()));
            let shard = ShardReport { index, live_bytes, index_blocks, index_bytes, failed, ..Default::default() };
            let report = NodeReport { node: "{}".into(), heartbeat: "{\"é\":1}".into(), shards: vec![shard] };
            Box::pin(async move { Ok(report) })
        }

        fn scrub(&self, _order: ScrubOrder) -> Answered<ScrubStatus> {
            Box::pin(async { Err("the disk is away".to_string()) })
        }

        fn damage(&self, _limit: u32) -> Answered<Vec<ShardDamage>> {
            Box::pin(async { Ok(Vec::new()) })
        }

        fn instances(&self, _only: Option<VolumeId>) -> Answered<Vec<ShardInstances>> {
            Box::pin(async { Ok(Vec::new()) })
        }

        fn stages(&self, _only: Option<VolumeId>) -> Answered<Vec<ShardStages>> {
            Box::pin(async { Ok(Vec::new()) })
        }
    }

    fn with_server<F: Future<Output = ()>>(test: impl FnOnce(SocketAddr) -> F) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            tokio::task::spawn_local(serve(listener, Rc::new(Fixed)));
            test(address).await;
        });
    }

    #[test]
    fn the_status_arrives_as_it_was_reported() {
        with_server(|address| async move {
            let report = ask_status(&address.to_string()).await.unwrap();
            assert_eq!(report, Fixed.report().await.unwrap());
        });
    }

    #[test]
    fn garbage_ends_its_own_connection_and_no_other() {
        with_server(|address| async move {
            let garbage = [&[0xff; 64][..], b"GET / HTTP/1.1\r\n\r\n", &[0; 4096], &[0, 0, 0, 0, 255, 255, 255, 127]];
            for bytes in garbage {
                let bytes = bytes.to_vec();
                let sent = tokio::task::spawn_blocking(move || {
                    let mut stream = std::net::TcpStream::connect(address).unwrap();
                    stream.write_all(&bytes).unwrap();
                    // The server may have closed its side already.
                    let _ = stream.shutdown(std::net::Shutdown::Write);
                    // Ends when the server has closed its side; what it says before is of no interest.
                    let _ = stream.read_to_end(&mut Vec::new());
                });
                sent.await.unwrap();
                assert!(ask_status(&address.to_string()).await.is_ok());
            }
        });
    }
}
