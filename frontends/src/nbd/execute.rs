//! Carries out a command on a device.

use crate::device::{Device, Run, VolumeError};
use crate::nbd::errors::Failure;
use crate::nbd::receive::released;
use crate::nbd::reply::{Content, ZEROS, bytes_of};
use crate::nbd::session::{Action, Command};
use crate::nbd::wire::Errno;
use bytes::Bytes;
use std::cell::Cell;
use torus_schema::limits::{NBD_STATUS_LOOKS_MAX, NBD_STATUS_RUNS_ENOUGH, VOLUME_MAP_RUNS_MAX};

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

/// To be awaited to its end.
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
            let written = device.write_to_end(offset, released(data), durable).await;
            written.map(done).map_err(|error| failed("write", true, error))
        }
        Action::Clear { length, durable, advisory } => {
            // In boxes, here and below, since every request would be as large as the rarest.
            let cleared = Box::pin(device.clear(offset, length, durable, advisory)).await;
            let request = if advisory { "trim" } else { "write zeroes" };
            cleared.map(done).map_err(|error| failed(request, !advisory, error))
        }
        Action::Provision { length, durable } => {
            let provisioned = Box::pin(provision(device, offset, length, durable)).await;
            provisioned.map(done).map_err(|error| failed("write zeroes", true, error))
        }
        Action::Map { length, one } => match Box::pin(map(device, offset, length, one)).await {
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
        Action::Flush => Box::pin(device.flush()).await.map(done).map_err(|error| failed("flush", false, error)),
        Action::Answer(answer) => answer.map(done),
    }
}

/// A device looks at a part of a long range; the client would ask for the rest. As long as there is little to tell, that
/// is spared: a sparse volume of many TiB takes few requests.
async fn map<D: Device>(device: &D, offset: u64, length: u64, one: bool) -> Result<Vec<Run>, VolumeError> {
    let enough = if one { 2 } else { NBD_STATUS_RUNS_ENOUGH };
    let mut found = device.map(offset, length).await?;
    for _ in 1..NBD_STATUS_LOOKS_MAX {
        let covered: u64 = found.iter().map(|run| run.bytes).sum();
        if covered == 0 || covered >= length || found.len() >= enough {
            break;
        }
        // What was found is right; if the rest still cannot be looked at, the client hears it when it asks for that.
        let Ok(more) = device.map(offset + covered, length - covered).await else { break };
        if more.is_empty() {
            break;
        }
        for run in more {
            match found.last_mut() {
                Some(last) if last.stored == run.stored => last.bytes += run.bytes,
                _ => found.push(run),
            }
        }
    }
    found.truncate(VOLUME_MAP_RUNS_MAX as usize);
    Ok(found)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Pieces;
    use crate::nbd::wire::Cookie;
    use futures::FutureExt;
    use std::rc::Rc;

    const LOOK: u64 = 512 << 20;

    /// Stored is every `stored_every`th look of it; it fails from `fails_from` on.
    #[derive(Clone)]
    struct Sparse {
        stored_every: u64,
        fails_from: u64,
        looks: Rc<Cell<u64>>,
    }

    impl Device for Sparse {
        fn size_bytes(&self) -> u64 {
            1 << 50
        }
        fn read_only(&self) -> bool {
            false
        }
        async fn read(&self, _: u64, _: u64) -> Result<Pieces, VolumeError> {
            unreachable!("only its map is asked for")
        }
        async fn write(&self, _: u64, _: Bytes, _: bool) -> Result<(), VolumeError> {
            unreachable!("only its map is asked for")
        }
        async fn clear(&self, _: u64, _: u64, _: bool, _: bool) -> Result<(), VolumeError> {
            unreachable!("only its map is asked for")
        }
        async fn map(&self, offset: u64, length: u64) -> Result<Vec<Run>, VolumeError> {
            self.looks.set(self.looks.get() + 1);
            if offset >= self.fails_from {
                return Err(VolumeError::TimedOut { waited_ms: 1 });
            }
            let look = offset / LOOK;
            let bytes = length.min((look + 1) * LOOK - offset);
            Ok(vec![Run { bytes, stored: look.is_multiple_of(self.stored_every) }])
        }
        async fn flush(&self) -> Result<(), VolumeError> {
            unreachable!("only its map is asked for")
        }
    }

    fn status(
        stored_every: u64,
        fails_from: u64,
        (offset, length, one): (u64, u64, bool),
    ) -> (Result<Content, Failure>, u64) {
        let device = Sparse { stored_every, fails_from, looks: Rc::default() };
        let command = Command { cookie: Cookie(1), offset, action: Action::Map { length, one } };
        let failures = Failures::new("a client".to_string());
        let found = execute(&device, command, &failures).now_or_never().expect("nothing waits");
        (found, device.looks.get())
    }

    fn run(looks: u64, stored: bool) -> Run {
        Run { bytes: looks * LOOK, stored }
    }

    #[test]
    fn the_status_of_a_long_sparse_range_is_one_answer() {
        let all = Ok(Content::Map(vec![run(1, true), run(19, false), run(1, true), run(9, false)]));
        assert_eq!(status(20, u64::MAX, (0, 30 * LOOK, false)), (all, 30));
        let (found, looks) = status(u64::MAX, u64::MAX, (LOOK, 1 << 49, false));
        assert_eq!((found, looks), (Ok(Content::Map(vec![run(NBD_STATUS_LOOKS_MAX, false)])), NBD_STATUS_LOOKS_MAX));
    }

    #[test]
    fn it_ends_with_what_was_asked_for_or_when_there_is_enough_to_tell() {
        assert_eq!(status(5, u64::MAX, (LOOK, 1 << 49, true)), (Ok(Content::Map(vec![run(4, false)])), 5));
        assert_eq!(status(5, u64::MAX, (100, 50, false)), (Ok(Content::Map(vec![Run { bytes: 50, stored: true }])), 1));
    }

    #[test]
    fn what_cannot_be_looked_at_ends_the_answer_and_is_an_error_only_at_its_beginning() {
        assert_eq!(status(5, 3 * LOOK, (LOOK, 9 * LOOK, false)), (Ok(Content::Map(vec![run(2, false)])), 3));
        assert!(status(5, LOOK, (LOOK, 9 * LOOK, false)).0.is_err());
    }
}
