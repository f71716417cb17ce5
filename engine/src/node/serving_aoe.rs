//! Volumes over ATA over Ethernet from inside this node (`--aoe`): the target runs on the executor of a shard, which is a
//! call away from it. As with NBD the node is a node first: what is in the way of a volume is tried again.

use crate::node::NodeError;
use crate::node::executor::{ShardHere, ShardThreadError};
use crate::node::serving::{ServingArguments, ServingRuntime, Stopped};
use crate::node::serving_numbers::AoeNumbers;
use crate::node::shards::Shards;
use futures::channel::oneshot;
use futures::future::{Either, FutureExt, select};
use std::pin::pin;
use std::time::Duration;
use torus_frontends::aoe::socket;
use torus_frontends::aoe::{Held, Named, Server, Wanted};
use torus_frontends::serve::aoe::{ExportArgument, SameHost, claimed};
use torus_frontends::serve::options::attacher;
use torus_frontends::volume::{VolumeExports, VolumeSettings};
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::near::NearConnect;
use torus_rpc::runtime::glommio::Here;
use torus_rpc::runtime::{Clock, Runtime};

/// Between two attempts to find the volumes and to have their addresses.
const CLAIM_AGAIN_AFTER: Duration = Duration::from_secs(1);

pub struct ServingAoe {
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<()>,
}

/// What goes to the executor.
struct Target {
    interfaces: Vec<String>,
    exports: Vec<ExportArgument>,
    settings: VolumeSettings,
    same_hosts: Vec<SameHost>,
    numbers: AoeNumbers,
}

/// Whether the interfaces can be listened to, before anything is started.
pub fn check(arguments: &ServingArguments) -> Result<(), NodeError> {
    let names = arguments.aoe.iter().flat_map(|interfaces| &interfaces.0);
    names.into_iter().try_for_each(|name| socket::check_interface(name)).map_err(|error| NodeError::Nbd(error.into()))
}

impl ServingAoe {
    /// If there is something to serve; what happens is counted in `numbers`.
    pub fn start(
        arguments: &ServingArguments,
        exports: Vec<ExportArgument>,
        numbers: AoeNumbers,
        metadata: &AnyMetadata,
        shards: &Shards,
    ) -> Result<Option<Self>, NodeError> {
        if exports.is_empty() {
            return Ok(None);
        }
        let interfaces = arguments.aoe.clone().map_or_else(Vec::new, |interfaces| interfaces.0);
        let settings = arguments.options.settings(1).map_err(NodeError::Nbd)?;
        let same_hosts = arguments.same_host.clone();
        let target = Target { interfaces, exports, settings, same_hosts, numbers };
        let (stop, stopped) = oneshot::channel();
        let stopped: Stopped = stopped.map(|_| ()).boxed().shared();
        let (end, ended) = oneshot::channel();
        let metadata = metadata.clone();
        let task = move |shard| {
            async move {
                target.serve(shard, metadata, stopped).await;
                // Nobody waits any more only if the node is being stopped at once.
                let _ = end.send(());
            }
            .boxed_local()
        };
        // The last one: NBD's work of accepting is on the first.
        let index =
            shards.indexes().into_iter().next_back().ok_or_else(|| NodeError::Setting("no shard".to_string()))?;
        if !shards.run(index, Box::new(task)) {
            return Err(ShardThreadError::Ended { shard: index }.into());
        }
        Ok(Some(Self { stop, ended }))
    }

    /// Every volume is flushed and free again when this returns.
    pub async fn stop(self) {
        drop(self.stop);
        // An executor that ended has let go of them.
        let _ = self.ended.await;
    }
}

impl Target {
    /// On a shard's executor.
    async fn serve(self, shard: ShardHere, metadata: AnyMetadata, stopped: Stopped) {
        let here = Here::new();
        let ShardHere { handler, identity, admission } = shard;
        let connect = NearConnect::new(identity, handler, admission, here.clone());
        let runtime = ServingRuntime::connecting(metadata, here, connect);
        let claiming = self.claim(&runtime);
        let wanted = match select(pin!(claiming), stopped.clone()).await {
            Either::Left((wanted, _)) => wanted,
            Either::Right(_) => return,
        };
        let attacher = attacher("torus-engine", false);
        let exports = VolumeExports::counting(runtime.clone(), attacher, self.settings, self.numbers.counters);
        let same_hosts = self.same_hosts.into_iter().map(|host| host.0).collect();
        match Server::open(runtime, &self.interfaces, wanted, self.numbers.counts, same_hosts) {
            Ok(server) => server.serve(exports.clone(), stopped, tell).await,
            Err(error) => tracing::error!(%error, "AoE is not served"),
        }
        exports.end().await;
    }

    async fn claim(&self, runtime: &ServingRuntime) -> Vec<Wanted> {
        let mut said = None;
        loop {
            match claimed(runtime, self.exports.clone(), Default::default()).await {
                Ok(wanted) => return wanted,
                Err(error) => {
                    // A cluster that starts would say the same every second.
                    let error = error.to_string();
                    if said.as_ref() != Some(&error) {
                        tracing::warn!(error, "volumes cannot be served over AoE yet; trying again");
                        said = Some(error);
                    }
                }
            }
            runtime.clock().sleep(CLAIM_AGAIN_AFTER).await;
        }
    }
}

fn tell(Named { address, name, .. }: &Named, held: Held) {
    match held {
        Held::Serving => tracing::info!(%address, volume = name, "serving over AoE"),
        Held::Standby(because) => tracing::info!(%address, volume = name, because, "standing by for AoE"),
    }
}
