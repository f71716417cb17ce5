//! The numbers and byte tables of NBD. All integers are big endian.
//!
//! * `option`   greeting, options, their replies
//! * `request`  requests, with compact and with extended headers
//! * `reply`    simple replies, and chunks with structured and with extended headers

mod option;
mod reply;
mod request;

pub use option::*;
pub use reply::*;
pub use request::*;

use thiserror::Error;

/// What a client must not send. The connection is closed: where its next message begins is unknown, or it is an
/// attack. The specification: either side "MAY initiate a hard disconnect if it detects a violation".
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Violation {
    #[error("magic of {place} is {found:#x}, expected {expected:#x}")]
    Magic { place: &'static str, found: u64, expected: u64 },
    #[error("client flags {found:#x}, only {known:#x} are known")]
    ClientFlags { found: u32, known: u32 },
    #[error("option {option} without fixed newstyle, which allows only option 1 (EXPORT_NAME)")]
    NotFixed { option: u32 },
    #[error("more than {limit} options in one handshake")]
    TooManyOptions { limit: u32 },
    #[error("option {option} with {found} bytes of data, at most {limit} are read")]
    OptionTooLong { option: u32, found: u32, limit: u64 },
    /// EXPORT_NAME has no error reply: "the server MUST terminate the session".
    #[error("export name cannot be served: {because}")]
    ExportName { because: String },
    #[error("a payload of {found} bytes, at most {limit} are read to be thrown away")]
    PayloadTooLong { found: u64, limit: u64 },
}

/// What the two sides have agreed on for the transmission phase: the headers of requests and of replies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Style {
    /// Compact requests, simple replies.
    #[default]
    Simple,
    /// Compact requests, replies in chunks.
    Structured,
    /// Requests and chunks with headers of 32 bytes and lengths of 64 bits.
    Extended,
}

/// The client's name for a request in flight; opaque to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cookie(pub u64);

fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes were cut"))
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes were cut"))
}

#[cfg(test)]
fn hex_of(put: impl FnOnce(&mut bytes::BytesMut)) -> String {
    let mut out = bytes::BytesMut::new();
    put(&mut out);
    out.iter().map(|byte| format!("{byte:02x}")).collect()
}
