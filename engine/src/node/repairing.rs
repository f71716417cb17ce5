//! This node's share of the repairs: a thread of its own, with an executor like a client's, on which the volumes code of a
//! client runs (`torus_frontends::volume::RepairOwner`). It knows the shards only as any client does, over the network.

use futures::channel::oneshot;
use futures::future::{Either, select};
use std::pin::pin;
use torus_frontends::volume::RepairOwner;
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::runtime::glommio::{GlommioRuntime, run};
use torus_schema::ids::NodeId;

pub struct Repairing {
    stop: oneshot::Sender<()>,
    stopped: oneshot::Receiver<()>,
}

impl Repairing {
    /// A node without it serves all the same; others repair.
    pub fn start(metadata: AnyMetadata, node: NodeId, host: &str) -> Option<Self> {
        let (stop, stopping) = oneshot::channel();
        let (ended, stopped) = oneshot::channel();
        let host = host.to_string();
        let work = move || {
            let served = run("repair", None, async {
                let owner = RepairOwner::new(GlommioRuntime::<_>::new(metadata), node, host);
                if let Either::Right(_) = select(pin!(owner.run()), stopping).await {
                    owner.stop().await;
                }
            });
            if let Err(error) = served {
                tracing::warn!(%error, "this node repairs no volumes");
            }
            // Nobody waits any more only if the node is being stopped at once.
            let _ = ended.send(());
        };
        match std::thread::Builder::new().name("repair".to_string()).spawn(work) {
            Ok(_) => Some(Self { stop, stopped }),
            Err(error) => {
                tracing::warn!(%error, "this node repairs no volumes");
                None
            }
        }
    }

    /// Volumes that are owned for repair are free again when this returns.
    pub async fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.stopped.await;
    }
}
