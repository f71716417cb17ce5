//! Carries out a command on a device.

use crate::device::{Device, VolumeError};
use crate::nbd::errors::Failure;
use crate::nbd::receive::released;
use crate::nbd::reply::{Content, ZEROS, bytes_of};
use crate::nbd::session::{Action, Command};
use crate::nbd::wire::Errno;
use bytes::Bytes;
use std::cell::Cell;

/// Failures of one connection. A device that fails fails thousands of requests: the 1st, 2nd, 4th, 8th … is logged.
pub struct Failures {
    peer: String,
    count: Cell<u64>,
}

impl Failures {
    pub fn new(peer: String) -> Self {
        Self { peer, count: Cell::new(0) }
    }

    fn log(&self, request: &str, error: &VolumeError) {
        let count = self.count.get() + 1;
        self.count.set(count);
        if count.is_power_of_two() {
            tracing::warn!(peer = %self.peer, request, %error, count, "a request failed");
        }
    }
}

pub async fn execute<D: Device>(device: &D, command: Command, failures: &Failures) -> Result<Content, Failure> {
    let Command { offset, action, .. } = command;
    let failed = |request: &str, writes, error: VolumeError| {
        failures.log(request, &error);
        Failure::of_volume(&error, offset, writes)
    };
    let done = |()| Content::Nothing;
    match action {
        Action::Read { length, whole } => match device.read(offset, length).await {
            Ok(pieces) if bytes_of(&pieces) == length => Ok(Content::Read { pieces, whole }),
            Ok(pieces) => {
                // One byte more or less and the client would take data for the next reply.
                tracing::error!(offset, length, read = bytes_of(&pieces), "the device read another length; a bug");
                Err(Failure::new(Errno::InputOutput, "the volume gave another length; a bug of the server"))
            }
            Err(error) => Err(failed("read", false, error)),
        },
        Action::Write { data, durable } => {
            let written = device.write(offset, released(data), durable).await;
            written.map(done).map_err(|error| failed("write", true, error))
        }
        Action::Clear { length, durable, advisory } => {
            let cleared = device.clear(offset, length, durable, advisory).await;
            let request = if advisory { "trim" } else { "write zeroes" };
            cleared.map(done).map_err(|error| failed(request, !advisory, error))
        }
        Action::Provision { length, durable } => {
            let provisioned = provision(device, offset, length, durable).await;
            provisioned.map(done).map_err(|error| failed("write zeroes", true, error))
        }
        Action::Map { length, one } => match device.map(offset, length).await {
            Ok(runs) if runs.iter().any(|run| run.bytes == 0) || runs.is_empty() => {
                // "the server MUST return at least one status descriptor, and since each status descriptor has a
                // non-zero length, a client can always make progress"
                tracing::error!(offset, length, ?runs, "the device gave an empty map; a bug");
                Err(Failure::new(Errno::InputOutput, "the volume gave an empty map; a bug of the server"))
            }
            Ok(mut runs) => {
                // "If this flag is present, the server MUST NOT send metadata on more than one extent in the reply."
                runs.truncate(if one { 1 } else { runs.len() });
                Ok(Content::Map(runs))
            }
            Err(error) => Err(failed("block status", false, error)),
        },
        Action::Flush => device.flush().await.map(done).map_err(|error| failed("flush", false, error)),
        Action::Answer(answer) => answer.map(done),
    }
}

/// Writes zeros as data, a part at a time: of any length they take no memory.
async fn provision<D: Device>(device: &D, offset: u64, length: u64, durable: bool) -> Result<(), VolumeError> {
    let (mut at, end) = (offset, offset + length);
    while at < end {
        // Parts end at their own size's multiples, so that all but the first and last are whole blocks.
        let part = (end - at).min(ZEROS.len() as u64 - at % ZEROS.len() as u64);
        device.write(at, Bytes::from_static(&ZEROS[..part as usize]), durable).await?;
        at += part;
    }
    Ok(())
}
