//! What can go wrong between a client and a shard.

use crate::message::Refusal;
use thiserror::Error;

/// No answer will come. Whether the request was carried out is unknown.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum LinkError {
    /// Nobody listens there: the process is gone.
    #[error("{address} refused the connection: {because}")]
    ConnectionRefused { address: String, because: String },
    #[error("{address} did not answer for {silent_ms} ms")]
    Silent { address: String, silent_ms: u64 },
    /// This host cannot connect to anybody there: it says nothing about the peer.
    #[error("no connection to {address} for want of something on this host: {because}")]
    Local { address: String, because: String },
    /// The connection lives, the answer to this request does not come.
    #[error("{address} has not answered a request for {waited_ms} ms")]
    Overdue { address: String, waited_ms: u64 },
    #[error("the connection to {address} ended: {because}")]
    Closed { address: String, because: String },
    #[error("{address} sent what is not a frame of this protocol: {because}")]
    Protocol { address: String, because: String },
    #[error("{address} is not whom we look for: {refusal}")]
    Hello { address: String, refusal: Refusal },
}

/// Bytes that are not a frame.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum FrameError {
    #[error("frame magic {found:08x}, expected {expected:08x}")]
    Magic { found: u32, expected: u32 },
    #[error("frame {part} of {found} bytes, at most {limit} are accepted")]
    TooLong { part: &'static str, found: u64, limit: u64 },
    #[error("frame prefix checksum {found:08x}, expected {expected:08x}")]
    Checksum { found: u32, expected: u32 },
    #[error("frame header: {because}")]
    Header { because: String },
}
