//! Why a request failed, and the one table from a volume's errors to NBD's.

use crate::device::VolumeError;
use crate::nbd::wire::Errno;
use torus_schema::limits::{BLOCK_BYTES, NBD_MESSAGE_BYTES_MAX};

/// What a client is told of a failed request; the message and the place only where it has structured replies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub errno: Errno,
    /// At most `NBD_MESSAGE_BYTES_MAX` long.
    pub message: String,
    /// Byte of the export, inside the request.
    pub at: Option<u64>,
}

impl Failure {
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        let mut message = message.into();
        while message.len() > NBD_MESSAGE_BYTES_MAX {
            message.pop();
        }
        Self { errno, message, at: None }
    }

    /// Of a request that began at `offset`. `writes`: it was a write or write zeroes.
    pub fn of_volume(error: &VolumeError, offset: u64, writes: bool) -> Self {
        let at = match error {
            VolumeError::Unreadable { block, .. } => Some(offset.max(block.saturating_mul(BLOCK_BYTES))),
            _ => None,
        };
        Self { at, ..Self::new(errno(error, writes), error.to_string()) }
    }
}

/// The one table from a volume's errors to NBD's. `writes`: the request was a write or write zeroes.
pub fn errno(error: &VolumeError, writes: bool) -> Errno {
    match error {
        VolumeError::NoSpace { .. } => Errno::NoSpace,
        VolumeError::ReadOnly => Errno::Permission,
        VolumeError::OutOfRange { .. } if writes => Errno::NoSpace,
        VolumeError::OutOfRange { .. } => Errno::Invalid,
        VolumeError::NotFound { .. }
        | VolumeError::Attached { .. }
        | VolumeError::SessionEnded { .. }
        | VolumeError::TimedOut { .. }
        | VolumeError::Unreadable { .. }
        | VolumeError::NotReady { .. }
        | VolumeError::Metadata { .. } => Errno::InputOutput,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_volume_have_their_number() {
        let range = VolumeError::OutOfRange { offset: 0, length: 1, size: 0 };
        assert_eq!(errno(&range, true), Errno::NoSpace);
        assert_eq!(errno(&range, false), Errno::Invalid);
        assert_eq!(errno(&VolumeError::ReadOnly, true), Errno::Permission);
        assert_eq!(errno(&VolumeError::NoSpace { shard: "a".into() }, true), Errno::NoSpace);
        assert_eq!(errno(&VolumeError::SessionEnded { because: "a".into() }, true), Errno::InputOutput);
    }

    #[test]
    fn an_unreadable_block_says_where_it_begins_within_the_request() {
        let unreadable = VolumeError::Unreadable { block: 2, because: "damaged".into() };
        assert_eq!(Failure::of_volume(&unreadable, 0, false).at, Some(8192));
        assert_eq!(Failure::of_volume(&unreadable, 8193, false).at, Some(8193));
        assert_eq!(Failure::of_volume(&VolumeError::ReadOnly, 0, true).at, None);
    }

    #[test]
    fn a_message_is_cut_to_what_a_client_accepts_and_stays_text() {
        let failure = Failure::new(Errno::Invalid, "ß".repeat(NBD_MESSAGE_BYTES_MAX));
        assert_eq!(failure.message, "ß".repeat(NBD_MESSAGE_BYTES_MAX / 2));
    }
}
