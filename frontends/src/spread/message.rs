//! What executors tell each other. Everything in it can be sent to another thread; payloads are shared, not copied.

use super::homes::Claim;
use crate::device::{ExportInfo, Pieces, Run, VolumeError};
use bytes::Bytes;

/// What one executor had to tell another when its tasks had come to rest, in order.
pub struct Batch {
    /// The executor it comes from.
    pub from: usize,
    pub messages: Vec<Message>,
}

/// Numbers a request among those of the executor that asked.
pub type RequestId = u64;
/// Numbers a device among those that live on one executor and are used from others.
pub type DeviceId = u64;

pub enum Message {
    Asked(Asked),
    Told(Told),
    /// It asks no more.
    Left,
}

/// To a home.
pub enum Asked {
    Describe { id: RequestId, name: String },
    Attach { id: RequestId, claim: Claim },
    Carry { id: RequestId, device: DeviceId, order: Order },
    Release { device: DeviceId },
}

/// From a home.
pub enum Told {
    Described { id: RequestId, described: Result<ExportInfo, VolumeError> },
    Attached { id: RequestId, attached: Result<Attached, VolumeError> },
    Carried { id: RequestId, result: Result<Outcome, VolumeError> },
    Resized { device: DeviceId, size_bytes: u64 },
    Ended { device: DeviceId, because: String },
}

#[derive(Clone, Copy, Debug)]
pub struct Attached {
    pub device: DeviceId,
    pub size_bytes: u64,
    pub read_only: bool,
}

/// What is asked of a device.
pub enum Order {
    Read { offset: u64, length: u64 },
    Write { offset: u64, data: Bytes, durable: bool },
    Clear { offset: u64, length: u64, durable: bool, advisory: bool },
    Map { offset: u64, length: u64 },
    Flush,
}

/// What became of an order.
pub enum Outcome {
    Done,
    Read(Pieces),
    Map(Vec<Run>),
}
