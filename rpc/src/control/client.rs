//! One question to a node's control port, one answer, from any executor: capnp-rpc needs tokio, which runs on a thread
//! that ends with the answer. For tools; nothing on a data path asks here.

use super::instances::get_instances;
use super::stages::get_stages;
use super::{ScrubOrder, ScrubStatus, ShardDamage, ShardInstances, ShardStages, get_damage, get_scrub_status};
use capnp::message::ReaderOptions;
use capnp_rpc::{RpcSystem, rpc_twoparty_capnp, twoparty};
use futures::channel::oneshot;
use std::time::Duration;
use thiserror::Error;
use tokio::net::TcpStream;
use tokio_util::compat::{TokioAsyncReadCompatExt, TokioAsyncWriteCompatExt};
use torus_schema::control_capnp::node_control;
use torus_schema::ids::VolumeId;

#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error(
    "the node at {address} could not be asked: {because}; is it running, and is its control port reachable from here?"
)]
pub struct ControlError {
    pub address: String,
    pub because: String,
}

/// Gives the order, and what holds then.
pub async fn ask_scrub(address: &str, order: ScrubOrder, deadline: Duration) -> Result<ScrubStatus, ControlError> {
    ask(address, deadline, async move |client| {
        let mut request = client.scrub_request();
        request.get().set_order(order.into());
        let response = request.send().promise.await?;
        get_scrub_status(response.get()?.get_status()?)
    })
    .await
}

/// At most `limit` of each list and shard.
pub async fn ask_damage(address: &str, limit: u32, deadline: Duration) -> Result<Vec<ShardDamage>, ControlError> {
    ask(address, deadline, async move |client| {
        let mut request = client.damage_request();
        request.get().set_limit(limit);
        let response = request.send().promise.await?;
        response.get()?.get_shards()?.iter().map(get_damage).collect()
    })
    .await
}

/// Of one volume, or of all.
pub async fn ask_instances(
    address: &str,
    volume: Option<VolumeId>,
    deadline: Duration,
) -> Result<Vec<ShardInstances>, ControlError> {
    ask(address, deadline, async move |client| {
        let mut request = client.instances_request();
        request.get().set_volume(volume.map_or_else(String::new, |volume| volume.to_string()));
        let response = request.send().promise.await?;
        response.get()?.get_shards()?.iter().map(get_instances).collect()
    })
    .await
}

/// Of one volume, or of all.
pub async fn ask_stages(
    address: &str,
    volume: Option<VolumeId>,
    deadline: Duration,
) -> Result<Vec<ShardStages>, ControlError> {
    ask(address, deadline, async move |client| {
        let mut request = client.stages_request();
        request.get().set_volume(volume.map_or_else(String::new, |volume| volume.to_string()));
        let response = request.send().promise.await?;
        response.get()?.get_shards()?.iter().map(get_stages).collect()
    })
    .await
}

async fn ask<T: Send + 'static>(
    address: &str,
    deadline: Duration,
    question: impl AsyncFnOnce(node_control::Client) -> Result<T, capnp::Error> + Send + 'static,
) -> Result<T, ControlError> {
    let failed = |because: String| ControlError { address: address.to_string(), because };
    let (answer, answered) = oneshot::channel();
    let to = address.to_string();
    let work = move || {
        // Nobody waits any more only if the command has ended.
        let _ = answer.send(run(&to, deadline, question));
    };
    std::thread::Builder::new().name("control".into()).spawn(work).map_err(|error| failed(error.to_string()))?;
    answered.await.map_err(|_| failed("the thread that asked has ended".to_string()))?.map_err(failed)
}

fn run<T>(
    address: &str,
    deadline: Duration,
    question: impl AsyncFnOnce(node_control::Client) -> Result<T, capnp::Error>,
) -> Result<T, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let conversation = async {
            let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
            let (reader, writer) = stream.into_split();
            let side = rpc_twoparty_capnp::Side::Client;
            let network = twoparty::VatNetwork::new(reader.compat(), writer.compat_write(), side, ReaderOptions::new());
            let mut system = RpcSystem::new(Box::new(network), None);
            let client: node_control::Client = system.bootstrap(rpc_twoparty_capnp::Side::Server);
            let running = tokio::task::spawn_local(system);
            let answer = question(client).await;
            running.abort();
            answer.map_err(|error| error.to_string())
        };
        let too_late = || format!("no answer within {deadline:?}");
        tokio::time::timeout(deadline, conversation).await.unwrap_or_else(|_| Err(too_late()))
    })
}
