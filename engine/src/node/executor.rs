//! One shard's thread: a glommio executor with its block file, its log and its data port, all its own.
//!
//! The node's main thread reaches it by commands alone, for what happens once in a while: numbers, a deleted volume,
//! the end. Nothing of the data path passes here.

use crate::disk::area::{AreaKind, BlockArea};
use crate::disk::direct::{DirectDisk, DirectError};
use crate::disk::faulty::{FaultFile, FaultyDisk};
use crate::node::no_metadata::NoMetadata;
use crate::shard::supervisor::{Health, Media, Supervisor};
use crate::shard::{Chunk, DamageReport, PeerTable, ScrubPass, ScrubReport, Shard, ShardIdentity};
use futures::StreamExt;
use futures::channel::{mpsc, oneshot};
use futures::future::LocalBoxFuture;
use std::cell::Cell;
use std::future::Future;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use thiserror::Error;
use torus_rpc::admission::Admission;
use torus_rpc::control::{HeldVolume, ShardInstances, ShardStages};
use torus_rpc::runtime::Disk;
use torus_rpc::runtime::ends_process::EndsTheProcess;
use torus_rpc::runtime::glommio::{self as executor, GlommioRuntime};
use torus_rpc::server::{self, ConnectionCounts, Finished, Handled, Listener, Request};
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{ShardIndex, VolumeId};
use torus_schema::latency::StageCounts;
use torus_schema::limits::SEGMENT_BYTES;

type ShardDisk = FaultyDisk<DirectDisk>;
type ShardRuntime = GlommioRuntime<NoMetadata, ShardDisk>;
type DirectChunk = Chunk<<ShardDisk as Disk>::Bytes>;

/// Everything a shard's thread needs to know.
pub struct ShardOptions {
    pub identity: ShardIdentity,
    pub area: BlockArea,
    /// For tests.
    pub faults: FaultFile,
    pub thread: executor::Thread,
    /// Written by resyncs at most.
    pub resync_bytes_s: u64,
}

impl ShardOptions {
    fn thread_name(&self) -> String {
        format!("shard-{}", self.identity.shard)
    }
}

#[derive(Debug, Error)]
pub enum ShardThreadError {
    #[error("shard {shard} could not be {what}: {because}")]
    Start { shard: ShardIndex, what: &'static str, because: String },
    #[error("the thread of shard {shard} has ended; see the log before this, and start the node again")]
    Ended { shard: ShardIndex },
    #[error("shard {shard}: {because}")]
    Refused { shard: ShardIndex, because: String },
}

/// Makes the shard, in an executor that ends with it. Its device, if it has one, was emptied.
pub async fn format(options: ShardOptions) -> Result<(), ShardThreadError> {
    in_own_thread(options, "formatted", async |options: &ShardOptions, runtime: &ShardRuntime| {
        let disk = match options.area.kind {
            AreaKind::File => DirectDisk::create(&options.area.path, options.area.bytes).await,
            AreaKind::Device => DirectDisk::open_area(&options.area).await,
        };
        let disk = FaultyDisk::new(disk.map_err(text)?, FaultFile::default());
        let formatted = Shard::format(runtime, &disk, options.identity, SEGMENT_BYTES).await;
        formatted.map_err(|error| error.to_string())?;
        disk.sync().await.map_err(|error| error.to_string())?;
        disk.into_inner().close().await.map_err(text)
    })
    .await
}

/// The area has become larger: the shard takes all of it.
pub async fn grow(options: ShardOptions) -> Result<(), ShardThreadError> {
    in_own_thread(options, "grown", async |options: &ShardOptions, _: &ShardRuntime| {
        let disk = DirectDisk::open_area(&options.area).await.map_err(text)?;
        let disk = FaultyDisk::new(disk, FaultFile::default());
        Shard::<ShardRuntime>::grow(&disk, options.identity).await.map_err(|error| error.to_string())?;
        disk.into_inner().close().await.map_err(text)
    })
    .await
}

async fn in_own_thread<F>(options: ShardOptions, what: &'static str, task: F) -> Result<(), ShardThreadError>
where
    F: AsyncFnOnce(&ShardOptions, &ShardRuntime) -> Result<(), String> + Send + 'static,
{
    let shard = options.identity.shard;
    let failed = move |because| ShardThreadError::Start { shard, what, because };
    let (answer, answered) = oneshot::channel();
    let work = move || {
        let task = async {
            let runtime = ShardRuntime::new(NoMetadata);
            task(&options, &runtime).await
        };
        let result = executor::run_on(&options.thread_name(), options.thread, task);
        // Nobody waits any more only if the node is being stopped.
        let _ = answer.send(result.map_err(|error| error.to_string()).and_then(|inner| inner));
    };
    std::thread::Builder::new().spawn(work).map_err(|error| failed(error.to_string()))?;
    answered.await.map_err(|_| ShardThreadError::Ended { shard })?.map_err(failed)
}

fn text(error: DirectError) -> String {
    error.to_string()
}

/// A shard's numbers, with those of its port.
#[derive(Clone, Debug)]
pub struct Numbers {
    pub health: Health,
    pub scrub: ScrubReport,
    pub connections: u32,
}

/// What runs on the executor of a shard beside it, and may call it.
pub type Beside = Box<dyn FnOnce(ShardHere) -> LocalBoxFuture<'static, ()> + Send>;

/// A shard, to who is on its executor.
pub struct ShardHere {
    pub handler: ShardHandler,
    pub identity: server::Identity,
    /// Which it shares with the connections.
    pub admission: Rc<Admission>,
}

enum Command {
    Numbers(oneshot::Sender<Numbers>),
    DropVolume(VolumeId, oneshot::Sender<Result<(), String>>),
    Peers(Arc<PeerTable>),
    StartScrub { pass: ScrubPass, rate_bytes_s: u64 },
    StopScrub(oneshot::Sender<Option<ScrubPass>>),
    Damage { limit: usize, answer: oneshot::Sender<DamageReport> },
    Held(Option<VolumeId>, oneshot::Sender<Result<Vec<HeldVolume>, String>>),
    Stages(Option<VolumeId>, oneshot::Sender<StageCounts>),
    Run(Beside),
    Close(oneshot::Sender<()>),
}

/// The main thread's end of it.
pub struct ShardThread {
    pub index: ShardIndex,
    commands: mpsc::UnboundedSender<Command>,
}

impl ShardThread {
    /// Opens the shard and serves it on `listener`.
    pub async fn start(options: ShardOptions, key: ClusterKey, listener: Listener) -> Result<Self, ShardThreadError> {
        let index = options.identity.shard;
        let failed = move |because| ShardThreadError::Start { shard: index, what: "started", because };
        let (commands, receiver) = mpsc::unbounded();
        let (ready, is_ready) = oneshot::channel();
        let work = move || {
            let ready = Rc::new(Cell::new(Some(ready)));
            let tell = {
                let ready = ready.clone();
                // Nobody waits any more only if the node is being stopped.
                move |result: Result<(), String>| ready.take().map_or((), |ready| drop(ready.send(result)))
            };
            let (name, thread) = (options.thread_name(), options.thread);
            let _ends = EndsTheProcess::with(&name);
            let served = executor::run_on(&name, thread, async {
                let shard = open(&options, key).await;
                tell(shard.as_ref().map(drop).map_err(String::clone));
                if let Ok(shard) = shard {
                    serve(shard, options.identity, listener, receiver).await;
                }
            });
            if let Err(error) = served {
                tell(Err(error.to_string()));
            }
        };
        std::thread::Builder::new().spawn(work).map_err(|error| failed(error.to_string()))?;
        is_ready.await.map_err(|_| ShardThreadError::Ended { shard: index })?.map_err(failed)?;
        Ok(Self { index, commands })
    }

    pub async fn numbers(&self) -> Result<Numbers, ShardThreadError> {
        self.ask(Command::Numbers).await
    }

    pub async fn drop_volume(&self, volume: VolumeId) -> Result<(), ShardThreadError> {
        let dropped = self.ask(|answer| Command::DropVolume(volume, answer)).await?;
        dropped.map_err(|because| ShardThreadError::Refused { shard: self.index, because })
    }

    /// Who else holds what, from now on. A thread that has ended needs no peers.
    pub fn set_peers(&self, table: Arc<PeerTable>) {
        let _ = self.commands.unbounded_send(Command::Peers(table));
    }

    /// Nothing if one runs, or the disk is away.
    pub fn start_scrub(&self, pass: ScrubPass, rate_bytes_s: u64) {
        let _ = self.commands.unbounded_send(Command::StartScrub { pass, rate_bytes_s });
    }

    pub async fn stop_scrub(&self) -> Result<Option<ScrubPass>, ShardThreadError> {
        self.ask(Command::StopScrub).await
    }

    pub async fn damage(&self, limit: usize) -> Result<DamageReport, ShardThreadError> {
        self.ask(|answer| Command::Damage { limit, answer }).await
    }

    pub async fn held(&self, only: Option<VolumeId>) -> Result<ShardInstances, ShardThreadError> {
        let held = self.ask(|answer| Command::Held(only, answer)).await?;
        let (volumes, failed) = match held {
            Ok(volumes) => (volumes, None),
            Err(because) => (Vec::new(), Some(because)),
        };
        Ok(ShardInstances { index: self.index, failed, volumes })
    }

    pub async fn stages(&self, only: Option<VolumeId>) -> Result<ShardStages, ShardThreadError> {
        let stages = self.ask(|answer| Command::Stages(only, answer)).await?;
        Ok(ShardStages { index: self.index, stages })
    }

    /// False: the thread has ended.
    pub fn run(&self, beside: Beside) -> bool {
        self.commands.unbounded_send(Command::Run(beside)).is_ok()
    }

    /// No connection is accepted any more, what is in flight ends, and everything is durable.
    pub async fn close(&self) -> Result<(), ShardThreadError> {
        self.ask(Command::Close).await
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, ShardThreadError> {
        let (answer, answered) = oneshot::channel();
        let ended = || ShardThreadError::Ended { shard: self.index };
        self.commands.unbounded_send(command(answer)).map_err(|_| ended())?;
        answered.await.map_err(|_| ended())
    }
}

type SupervisedShard = Supervisor<ShardRuntime, Area>;

/// Opened by its path each time: a device that came back is another one to the kernel.
struct Area(BlockArea, FaultFile);

impl Media<ShardRuntime> for Area {
    async fn open(&self) -> Result<ShardDisk, String> {
        self.1.check("open")?;
        let disk = DirectDisk::open_area(&self.0).await.map_err(text)?;
        Ok(FaultyDisk::new(disk, self.1.clone()))
    }
}

async fn open(options: &ShardOptions, key: ClusterKey) -> Result<Rc<SupervisedShard>, String> {
    let runtime = ShardRuntime::new(NoMetadata);
    let media = Area(options.area.clone(), options.faults.clone());
    let shard = Supervisor::start(runtime, media, options.identity, key).await.map_err(|error| error.to_string())?;
    shard.set_resync_limit(options.resync_bytes_s);
    Ok(shard)
}

/// Until it is told to close, or the main thread is gone.
async fn serve(
    shard: Rc<SupervisedShard>,
    identity: ShardIdentity,
    listener: Listener,
    mut commands: mpsc::UnboundedReceiver<Command>,
) {
    let identity = server::Identity { cluster: identity.cluster, node: identity.node, shard: identity.shard };
    let counts = Rc::new(ConnectionCounts::default());
    let admission = Rc::new(Admission::default());
    let accepting = glommio::spawn_local(server::serve(
        listener,
        identity,
        ShardHandler(shard.clone()),
        (counts.clone(), admission.clone()),
    ));
    while let Some(command) = commands.next().await {
        match command {
            Command::Numbers(answer) => {
                let (health, scrub) = (shard.health(), shard.scrub_report());
                let numbers = Numbers { health, scrub, connections: counts.open.get() };
                let _ = answer.send(numbers);
            }
            Command::DropVolume(volume, answer) => {
                let dropped = shard.drop_volume(volume).await.map_err(|error| error.to_string());
                let _ = answer.send(dropped);
            }
            Command::Peers(table) => shard.set_peers(table),
            Command::StartScrub { pass, rate_bytes_s } => shard.start_scrub(pass, rate_bytes_s),
            Command::StopScrub(answer) => {
                let _ = answer.send(shard.stop_scrub());
            }
            Command::Damage { limit, answer } => {
                let _ = answer.send(shard.damage(limit));
            }
            Command::Held(only, answer) => {
                let _ = answer.send(shard.held(only).map_err(|refusal| refusal.to_string()));
            }
            Command::Stages(only, answer) => {
                let _ = answer.send(shard.measured().counts(only));
            }
            Command::Run(beside) => {
                let here = ShardHere { handler: ShardHandler(shard.clone()), identity, admission: admission.clone() };
                drop(glommio::spawn_local(beside(here)).detach());
            }
            Command::Close(answer) => {
                accepting.cancel().await;
                shard.close().await;
                let _ = answer.send(());
                return;
            }
        }
    }
}

/// Hands a connection's requests to the shard.
pub struct ShardHandler(Rc<SupervisedShard>);

impl Clone for ShardHandler {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl server::Handler for ShardHandler {
    type Chunk = DirectChunk;

    fn handle(&self, request: &mut Request) -> impl Future<Output = Handled<DirectChunk>> {
        self.0.handle_arrived(request)
    }

    fn sent(&self, what: Finished, after: Duration) {
        self.0.measured().sent(what, after);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_rpc::server::Handler;

    fn bytes_of<A, B, F: Future>(_: impl FnOnce(A, B) -> F) -> usize {
        size_of::<F>()
    }

    /// It is moved to where its task lives, and with it the room for whatever is rare, unless that is boxed.
    #[test]
    fn the_future_of_a_request_is_small() {
        let handle = |handler: &'static ShardHandler, request: &'static mut Request| handler.handle(request);
        let bytes = bytes_of(handle);
        assert!(bytes <= 1024, "{bytes} bytes; the rare branches of Shard::answer are to be boxed");
    }
}
