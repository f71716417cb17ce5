//! Volumes over NBD from inside this node (`--nbd`): the server runs on the executors of the shards, each of which serves
//! its part of the connections, and a shard on the executor of a volume is a call away.
//!
//! The node is a node first: a volume that cannot be attached, or that was taken over, is tried again, and everything
//! else goes on. At the end the volumes are released before the shards close.

use crate::node::NodeError;
use crate::node::executor::{ShardHandler, ShardHere, ShardThreadError};
use crate::node::shards::Shards;
use clap::Args;
use futures::channel::oneshot;
use futures::future::{BoxFuture, FutureExt, Shared, join, join_all, select};
use std::pin::pin;
use std::time::Duration;
use torus_frontends::device::Device;
use torus_frontends::nbd::{Listener, Reception};
use torus_frontends::serve::aoe::{ExportArgument, Interfaces, SameHost, distinct};
use torus_frontends::serve::options::NbdOptions;
use torus_frontends::serve::part::{Numbers, Part, Server, SpreadVolumes};
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::near::NearConnect;
use torus_rpc::runtime::glommio::{GlommioRuntime, Here};
use torus_rpc::runtime::{Clock, NoDisk, Runtime};

/// Between two attempts to attach a volume of `--export`.
const ATTACH_AGAIN_AFTER: Duration = Duration::from_secs(1);

pub use torus_frontends::serve::ServeError as ServingError;

/// Beside a node's arguments, not among them: clap takes those for absent as a whole if they have parts of their own.
#[derive(Clone, Debug, Args)]
pub struct ServingArguments {
    /// Serve volumes over NBD from inside this node: HOST:PORT or unix:PATH; may be given several times. Every volume
    /// of the cluster can be asked for by its name
    #[arg(long, value_name = "ADDRESS", action = clap::ArgAction::Append)]
    pub nbd: Vec<String>,
    /// Serve volumes over ATA over Ethernet from inside this node, on these interfaces (docs/aoe.md: no authentication)
    #[arg(long, value_name = "INTERFACE[,INTERFACE…]")]
    pub aoe: Option<Interfaces>,
    /// With --nbd, VOLUME: keep it attached instead of attaching it at its first use; the only one is also what a
    /// client gets that names none. With --aoe, VOLUME=SHELF.SLOT: serve it under this address. May be given several
    /// times; a volume is served by one of both
    #[arg(long, value_name = "VOLUME[=SHELF.SLOT]", action = clap::ArgAction::Append)]
    pub export: Vec<String>,
    /// With --aoe: Ethernet addresses of one initiator with several interfaces, whose frames may overtake each other; may
    /// be given several times
    #[arg(long, value_name = "MAC,MAC[,MAC…]", requires = "aoe")]
    pub same_host: Vec<SameHost>,
    #[command(flatten)]
    pub options: NbdOptions,
}

/// Options of NBD that mean nothing without it, and those that mean nothing without volumes served either way.
pub const NEED_NBD: [&str; 5] = ["insecure", "mode", "certificates", "clients", "read_only"];
pub const NEED_VOLUMES: [&str; 4] = ["io_timeout", "lease_ttl", "clock_drift", "stats"];

impl ServingArguments {
    /// What is kept attached for NBD, and what AoE serves.
    pub fn exports(&self) -> Result<(Vec<String>, Vec<ExportArgument>), String> {
        let (aoe, nbd): (Vec<_>, Vec<_>) = self.export.iter().partition(|export| export.contains('='));
        let nbd: Vec<String> = nbd.into_iter().cloned().collect();
        let aoe = aoe.into_iter().map(|export| export.parse()).collect::<Result<Vec<ExportArgument>, _>>()?;
        if let Some(export) = nbd.first()
            && self.nbd.is_empty()
        {
            return Err(format!("--export {export} needs --nbd ADDRESS, or --aoe INTERFACE and {export}=SHELF.SLOT"));
        }
        match (&self.aoe, aoe.first()) {
            (None, Some(export)) => Err(format!("--export {}=… needs --aoe INTERFACE", export.volume)),
            (Some(_), _) if self.options.read_only => Err("--read-only is NBD's: AoE has no such thing".to_string()),
            (Some(_), None) => Err("--aoe serves nothing without --export VOLUME=SHELF.SLOT".to_string()),
            _ => Ok((nbd, distinct(aoe)?)),
        }
    }
}

/// A client's, on a shard's executor.
pub type ServingRuntime = GlommioRuntime<AnyMetadata, NoDisk, NearConnect<ShardHandler, Here>>;
pub type Stopped = Shared<BoxFuture<'static, ()>>;

pub struct Serving {
    stop: oneshot::Sender<()>,
    ended: Vec<oneshot::Receiver<()>>,
}

/// What the first executor does beside its part.
struct Lead {
    listeners: Vec<Listener>,
    reception: Reception,
    exports: Vec<String>,
    executors: usize,
}

/// Of what can be wrong without anybody being asked: TLS files, times.
pub fn check(arguments: &ServingArguments) -> Result<(), NodeError> {
    if arguments.nbd.is_empty() {
        return Ok(());
    }
    arguments.options.check().map_err(NodeError::Nbd)
}

/// Where clients will connect, so that a port that is taken is found out first.
pub fn listen(arguments: &ServingArguments) -> Result<Vec<Listener>, NodeError> {
    arguments.options.listen(&arguments.nbd).map_err(NodeError::Nbd)
}

impl Serving {
    pub fn start(
        arguments: &ServingArguments,
        (listeners, exports): (Vec<Listener>, Vec<String>),
        metadata: &AnyMetadata,
        shards: &Shards,
    ) -> Result<(Self, Numbers), NodeError> {
        let executors = shards.indexes().len();
        let server = Server::new(&arguments.options, &exports, ("torus-engine", false), executors);
        let server = server.map_err(NodeError::Nbd)?;
        let numbers = server.numbers.clone();
        let (stop, stopped) = oneshot::channel();
        let stopped: Stopped = stopped.map(|_| ()).boxed().shared();
        let mut lead = Some(Lead { listeners, reception: server.reception, exports, executors });
        let mut ended = Vec::new();
        for (index, part) in shards.indexes().into_iter().zip(server.parts) {
            let (end, at_end) = oneshot::channel();
            let (metadata, stopped, lead) = (metadata.clone(), stopped.clone(), lead.take());
            let task = move |here| {
                async move {
                    serve(part, lead, here, metadata, stopped).await;
                    // Nobody waits any more only if the node is being stopped at once.
                    let _ = end.send(());
                }
                .boxed_local()
            };
            if !shards.run(index, Box::new(task)) {
                return Err(ShardThreadError::Ended { shard: index }.into());
            }
            ended.push(at_end);
        }
        Ok((Self { stop, ended }, numbers))
    }

    /// Every volume is flushed and free again when this returns.
    pub async fn stop(self) {
        drop(self.stop);
        join_all(self.ended).await;
    }
}

/// On a shard's executor.
async fn serve(part: Part, lead: Option<Lead>, shard: ShardHere, metadata: AnyMetadata, stopped: Stopped) {
    let here = Here::new();
    let ShardHere { handler, identity, admission } = shard;
    let connect = NearConnect::new(identity, handler, admission, here.clone());
    let runtime = ServingRuntime::connecting(metadata, here, connect);
    let running = part.begin(runtime.clone());
    let spread = running.spread.clone();
    let leading = async {
        if let Some(lead) = lead {
            lead.serve(&runtime, &spread, &stopped).await;
        }
    };
    join(leading, running.serve(stopped.clone())).await;
}

impl Lead {
    async fn serve(&self, runtime: &ServingRuntime, spread: &SpreadVolumes<ServingRuntime>, stopped: &Stopped) {
        let mut accepting = Vec::new();
        for listener in &self.listeners {
            match self.reception.accept(listener, stopped.clone()) {
                Ok(accept) => accepting.push(accept),
                Err(error) => tracing::error!(address = listener.address(), %error, "NBD is not served there"),
            }
        }
        let keeping = self.exports.iter().enumerate().map(|(index, name)| async move {
            let keep = pin!(keep(runtime, spread, name, index % self.executors));
            select(keep, stopped.clone()).await;
        });
        join(join_all(accepting), join_all(keeping)).await;
    }
}

/// Keeps a volume attached, whatever happens to it.
async fn keep(runtime: &ServingRuntime, spread: &SpreadVolumes<ServingRuntime>, name: &str, executor: usize) {
    let mut failed = None;
    loop {
        match spread.attach_at(name, executor).await {
            Ok(volume) => {
                tracing::info!(volume = name, size_bytes = volume.size_bytes(), "attached");
                failed = None;
                let because = volume.ended().await;
                tracing::warn!(volume = name, because, "the volume is not served any more; it will be attached again");
            }
            Err(error) => {
                // A cluster that starts, or an owner that died, would say the same every second.
                let kind = std::mem::discriminant(&error);
                if failed.replace(kind) != Some(kind) {
                    tracing::warn!(volume = name, %error, "the volume cannot be attached; trying again");
                }
            }
        }
        runtime.clock().sleep(ATTACH_AGAIN_AFTER).await;
    }
}
