//! Volumes used from several executors: each lives on one of them, its home, and every executor can use it.
//!
//! ```text
//!   executor 0                              executor 1
//!   connection ─► Spread ─► near: a volume  ◄── asks, in batches ── far ◄─ Spread ◄─ connection
//!                                           ─── answers, in batches ──►
//! ```
//!
//! A volume has one writer, which gives every write its version: so it stays on one executor, and what comes in
//! elsewhere is handed over. Its home is the executor that uses it first, so that a volume with one connection has no
//! hop on its path. What was asked on one executor until its tasks rest goes over in one batch; nothing on the path is
//! locked. An answer is given only when the volume has given it at its home.
//!
//! * `homes`    which volume is where
//! * `message`  what executors tell each other
//! * `port`     an executor's end of it: what goes out, who waits for what
//! * `host`     volumes that live here, used from elsewhere
//! * `far`      volumes that live elsewhere

mod far;
mod homes;
mod host;
mod message;
mod port;
#[cfg(test)]
mod tests;

use crate::device::{Device, ExportInfo, Exports, Pieces, Run, VolumeError};
use bytes::Bytes;
use far::FarDevice;
use homes::Homes;
use host::Host;
use port::{Inbox, Port};
use std::rc::Rc;
use std::sync::Arc;
use torus_rpc::runtime::Spawn;

pub use port::Handoffs;

/// One executor's part, on its way to it.
pub struct Place {
    port: port::Unopened,
    homes: Arc<Homes>,
}

/// A place for each of so many executors.
pub fn places(executors: usize) -> Vec<Place> {
    let homes = Arc::<Homes>::default();
    port::ports(executors).into_iter().map(|port| Place { port, homes: homes.clone() }).collect()
}

impl Place {
    pub fn handoffs(&self) -> Arc<Handoffs> {
        self.port.handoffs.clone()
    }

    /// On its executor: `exports` are the volumes whose home is here.
    pub fn open<E: Exports, S: Spawn>(self, exports: E, spawn: S) -> Spread<E, S> {
        let (port, inbox) = Port::open(self.port, &spawn);
        let host = Host::new(exports.clone(), spawn.clone(), port.clone());
        let inner = Rc::new(Inner { exports, spawn: spawn.clone(), homes: self.homes, port });
        spawn.spawn(torus_rpc::runtime::Class::Foreground, receive(inbox, inner.clone(), host));
        Spread { inner }
    }
}

async fn receive<E: Exports, S: Spawn>(mut inbox: Inbox, inner: Rc<Inner<E, S>>, host: Host<E, S>) {
    while let Some((from, message)) = inbox.next().await {
        if let Some(asked) = inner.port.receive(from, message) {
            host.receive(from, asked);
        }
    }
}

struct Inner<E, S> {
    exports: E,
    spawn: S,
    homes: Arc<Homes>,
    port: Rc<Port>,
}

/// All volumes, wherever they live.
pub struct Spread<E, S> {
    inner: Rc<Inner<E, S>>,
}

impl<E, S> Clone for Spread<E, S> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

impl<E: Exports, S: Spawn> Spread<E, S> {
    /// Attaches `name`, whose home is `executor` if it has none yet.
    pub async fn attach_at(&self, name: &str, executor: usize) -> Result<SpreadDevice<E::Device>, VolumeError> {
        let inner = &self.inner;
        let claim = inner.homes.claim(name, executor);
        if claim.executor == inner.port.executor {
            host::attach(&inner.exports, &inner.spawn, claim).await.map(SpreadDevice::Near)
        } else {
            inner.port.attach(claim).await.map(SpreadDevice::Far)
        }
    }

    /// Nothing more is asked from here; returns when that holds for every executor. Until then volumes that live here
    /// are served on to the others.
    pub async fn leave(&self) {
        self.inner.port.leave().await;
    }
}

impl<E: Exports, S: Spawn> Exports for Spread<E, S> {
    type Device = SpreadDevice<E::Device>;

    async fn list(&self) -> Result<Vec<ExportInfo>, VolumeError> {
        self.inner.exports.list().await
    }

    /// Asked of its home, which knows an attached volume without the metadata store.
    async fn describe(&self, name: &str) -> Result<ExportInfo, VolumeError> {
        match self.inner.homes.home(name) {
            Some(home) if home != self.inner.port.executor => self.inner.port.describe(home, name).await,
            _ => self.inner.exports.describe(name).await,
        }
    }

    async fn attach(&self, name: &str) -> Result<Self::Device, VolumeError> {
        self.attach_at(name, self.inner.port.executor).await
    }
}

/// A volume that lives here or elsewhere.
#[derive(Clone)]
pub enum SpreadDevice<D> {
    Near(D),
    Far(FarDevice),
}

impl<D: Device> Device for SpreadDevice<D> {
    fn size_bytes(&self) -> u64 {
        match self {
            Self::Near(device) => device.size_bytes(),
            Self::Far(device) => device.size_bytes(),
        }
    }

    fn read_only(&self) -> bool {
        match self {
            Self::Near(device) => device.read_only(),
            Self::Far(device) => device.read_only(),
        }
    }

    fn home(&self) -> Option<usize> {
        match self {
            Self::Near(_) => None,
            Self::Far(device) => device.home(),
        }
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Pieces, VolumeError> {
        match self {
            Self::Near(device) => device.read(offset, length).await,
            Self::Far(device) => device.read(offset, length).await,
        }
    }

    async fn write(&self, offset: u64, data: Bytes, durable: bool) -> Result<(), VolumeError> {
        match self {
            Self::Near(device) => device.write(offset, data, durable).await,
            Self::Far(device) => device.write(offset, data, durable).await,
        }
    }

    async fn write_to_end(&self, offset: u64, data: Bytes, durable: bool) -> Result<(), VolumeError> {
        match self {
            Self::Near(device) => device.write_to_end(offset, data, durable).await,
            Self::Far(device) => device.write_to_end(offset, data, durable).await,
        }
    }

    async fn clear(&self, offset: u64, length: u64, durable: bool, advisory: bool) -> Result<(), VolumeError> {
        match self {
            Self::Near(device) => device.clear(offset, length, durable, advisory).await,
            Self::Far(device) => device.clear(offset, length, durable, advisory).await,
        }
    }

    async fn map(&self, offset: u64, length: u64) -> Result<Vec<Run>, VolumeError> {
        match self {
            Self::Near(device) => device.map(offset, length).await,
            Self::Far(device) => device.map(offset, length).await,
        }
    }

    async fn flush(&self) -> Result<(), VolumeError> {
        match self {
            Self::Near(device) => device.flush().await,
            Self::Far(device) => device.flush().await,
        }
    }

    async fn ended(&self) -> String {
        match self {
            Self::Near(device) => device.ended().await,
            Self::Far(device) => device.ended().await,
        }
    }

    async fn resized(&self, seen_bytes: u64) -> u64 {
        match self {
            Self::Near(device) => device.resized(seen_bytes).await,
            Self::Far(device) => device.resized(seen_bytes).await,
        }
    }
}
