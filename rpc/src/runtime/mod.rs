//! The seams between our logic and the world: one bundle trait, so that shard, log, volume and attach are generic
//! over a single parameter and run unchanged on glommio and in a seeded simulation.
//!
//! Awaits stand only at Disk, Link, Clock and Metadata; everything between them is a synchronous state change.
//! Dropping a future abandons the waiting, never what was submitted.

pub mod ends_process;
pub mod glommio;
pub mod simulated;
mod watchdog;

use crate::error::LinkError;
use crate::message::{Envelope, Operation, Reply};
use crate::metadata::Metadata;
use bytes::Bytes;
use std::future::Future;
use std::ops::{Deref, DerefMut};
use std::time::Duration;
use thiserror::Error;
use torus_schema::ids::{ClusterId, NodeId, ShardIndex};

pub trait Runtime: Clone + 'static {
    type Disk: Disk;
    type Clock: Clock;
    type Link: Link;
    type Connect: Connect<Link = Self::Link>;
    type Metadata: Metadata;
    type Spawn: Spawn;
    type Random: Random;

    fn clock(&self) -> &Self::Clock;
    fn connect(&self) -> &Self::Connect;
    fn metadata(&self) -> &Self::Metadata;
    fn spawn(&self) -> &Self::Spawn;
    fn random(&self) -> &Self::Random;
}

/// Time since boot, suspension included (CLOCK_BOOTTIME): leases must not outlive a suspended host.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Instant(pub Duration);

impl Instant {
    pub fn after(self, wait: Duration) -> Self {
        Self(self.0 + wait)
    }
    pub fn since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

pub trait Clock: Clone + 'static {
    fn now(&self) -> Instant;
    /// Since 1970, as the host's clock says: for people to read and for ages, never for a decision about data.
    fn unix_seconds(&self) -> u64 {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        now.map_or(0, |since| since.as_secs())
    }
    fn sleep(&self, wait: Duration) -> impl Future<Output = ()> + 'static;
}

/// What must not wait for what: background work has its own, smaller share of the executor.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Class {
    Foreground,
    Background,
}

pub trait Spawn: Clone + 'static {
    /// Runs to its end on this executor, whether or not anybody waits for it.
    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static);
}

pub trait Random: Clone + 'static {
    fn u64(&self) -> u64;

    fn u128(&self) -> u128 {
        u128::from(self.u64()) << 64 | u128::from(self.u64())
    }
}

#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{operation} of {bytes} bytes at offset {offset} of {place} failed: {because}")]
pub struct DiskError {
    pub place: String,
    pub operation: &'static str,
    pub offset: u64,
    pub bytes: usize,
    pub because: String,
}

/// One shard's block area: a file or device of fixed size. Offsets and lengths are multiples of the block size.
pub trait Disk: 'static {
    /// Aligned for direct I/O, zeroed or holding anything when allocated; filled in place, written without a copy.
    type Buffer: DerefMut<Target = [u8]>;
    /// What a read gave; clones share it.
    type Bytes: Deref<Target = [u8]> + Clone + 'static;

    fn size_bytes(&self) -> u64;
    fn allocate(&self, bytes: usize) -> Self::Buffer;
    fn read(&self, offset: u64, bytes: usize) -> impl Future<Output = Result<Self::Bytes, DiskError>>;
    /// Completed means readable, not durable.
    fn write(&self, offset: u64, buffer: Self::Buffer) -> impl Future<Output = Result<(), DiskError>>;
    /// Completed means durable: this one alone, not what was written before it.
    fn write_durable(&self, offset: u64, buffer: Self::Buffer) -> impl Future<Output = Result<(), DiskError>>;
    /// Everything whose write completed before the call is durable after it.
    fn sync(&self) -> impl Future<Output = Result<(), DiskError>>;
    /// The range's content is no longer needed (a hint).
    fn discard(&self, offset: u64, bytes: u64) -> impl Future<Output = Result<(), DiskError>>;
}

/// Frontends have no disk; this one cannot be made.
pub enum NoDisk {}

impl Disk for NoDisk {
    type Buffer = Vec<u8>;
    type Bytes = Bytes;

    fn size_bytes(&self) -> u64 {
        match *self {}
    }
    fn allocate(&self, _bytes: usize) -> Self::Buffer {
        match *self {}
    }
    async fn read(&self, _offset: u64, _bytes: usize) -> Result<Self::Bytes, DiskError> {
        match *self {}
    }
    async fn write(&self, _offset: u64, _buffer: Self::Buffer) -> Result<(), DiskError> {
        match *self {}
    }
    async fn write_durable(&self, _offset: u64, _buffer: Self::Buffer) -> Result<(), DiskError> {
        match *self {}
    }
    async fn sync(&self) -> Result<(), DiskError> {
        match *self {}
    }
    async fn discard(&self, _offset: u64, _bytes: u64) -> Result<(), DiskError> {
        match *self {}
    }
}

/// Whom a link leads to; the hello checks that it is them.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Peer {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub shard: ShardIndex,
    /// `host:port` of the shard's data port.
    pub address: String,
}

pub trait Connect: Clone + 'static {
    type Link: Link;
    /// Connects and says hello.
    fn connect(&self, peer: &Peer) -> impl Future<Output = Result<Self::Link, LinkError>>;
}

/// A pipelined connection to one shard; batching is hidden in it. Clones share the connection.
pub trait Link: Clone + 'static {
    /// The request is encoded before the first await, so that one operation is shared by all replicas. Answers
    /// arrive in any order. An error says that no answer will come: the request may have been carried out.
    fn call(
        &self,
        envelope: &Envelope,
        operation: &Operation,
        payload: &Bytes,
    ) -> impl Future<Output = Result<(Reply, Bytes), LinkError>>;
}
