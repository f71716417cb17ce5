//! One frame of the data plane: prefix, Cap'n Proto header, raw payload.
//!
//! | offset | bytes | field                                                              |
//! |--------|-------|--------------------------------------------------------------------|
//! | 0      | 4     | magic `TOR1`                                                       |
//! | 4      | 4     | header length H, a multiple of 8                                   |
//! | 8      | 4     | payload length P, a multiple of the block size                     |
//! | 12     | 4     | reserved, zero                                                     |
//! | 16     | 8     | request id, chosen by the client, repeated in the answer           |
//! | 24     | 4     | CRC32C of the H header bytes                                       |
//! | 28     | 4     | CRC32C of bytes 0 to 28, so that lengths are trusted before use    |
//! | 32     | H     | header: `Request` or `Reply` of data.capnp, standard framing       |
//! | 32 + H | P     | payload; its blocks have their own checksums, in the header        |
//!
//! Numbers are little-endian. The header stands first so that the payload ends on a buffer's end and can be received
//! in place; lengths stand before the id so that they are checked by one comparison each before memory is taken.

mod reply;
mod request;
mod words;

pub use reply::{decode_reply, encode_reply};
pub use request::{decode_request, encode_request};

use crate::error::FrameError;
use torus_schema::ids::Version;
use torus_schema::limits::{BLOCK_BYTES, HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX};

pub const MAGIC: u32 = u32::from_le_bytes(*b"TOR1");
pub const PREFIX_BYTES: usize = 32;

/// Lengths that have been checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefix {
    pub header_bytes: usize,
    pub payload_bytes: usize,
    pub request_id: u64,
    header_checksum: u32,
}

impl Prefix {
    pub fn frame_bytes(&self) -> usize {
        PREFIX_BYTES + self.header_bytes + self.payload_bytes
    }

    /// `Ok(None)`: more bytes are needed.
    pub fn parse(bytes: &[u8]) -> Result<Option<Prefix>, FrameError> {
        let Some(prefix) = bytes.first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
        let word = |at: usize| u32::from_le_bytes([prefix[at], prefix[at + 1], prefix[at + 2], prefix[at + 3]]);
        if word(0) != MAGIC {
            return Err(FrameError::Magic { found: word(0), expected: MAGIC });
        }
        let expected = crc32c::crc32c(&prefix[..28]);
        if word(28) != expected {
            return Err(FrameError::Checksum { found: word(28), expected });
        }
        let (header, payload) = (u64::from(word(4)), u64::from(word(8)));
        check_length("header", header, HEADER_BYTES_MAX, 8)?;
        check_length("payload", payload, PAYLOAD_BYTES_MAX, BLOCK_BYTES)?;
        if word(12) != 0 {
            return Err(FrameError::Header { because: format!("reserved field is {:#x}, expected 0", word(12)) });
        }
        Ok(Some(Prefix {
            header_bytes: header as usize,
            payload_bytes: payload as usize,
            request_id: u64::from(word(16)) | u64::from(word(20)) << 32,
            header_checksum: word(24),
        }))
    }

    /// The header's bytes, once they are known to be what was sent.
    fn verify<'a>(&self, header: &'a [u8]) -> Result<&'a [u8], FrameError> {
        assert_eq!(header.len(), self.header_bytes);
        let found = crc32c::crc32c(header);
        if found != self.header_checksum {
            return Err(FrameError::Checksum { found, expected: self.header_checksum });
        }
        Ok(header)
    }
}

fn check_length(part: &'static str, found: u64, limit: u64, unit: u64) -> Result<(), FrameError> {
    if found > limit {
        return Err(FrameError::TooLong { part, found, limit });
    }
    if !found.is_multiple_of(unit) {
        return Err(FrameError::Header { because: format!("{part} of {found} bytes, expected a multiple of {unit}") });
    }
    Ok(())
}

/// Appends prefix and header, which `put_header` appends; the caller appends `payload_bytes` of payload.
fn append_frame(out: &mut Vec<u8>, request_id: u64, payload_bytes: usize, put_header: impl FnOnce(&mut Vec<u8>)) {
    let start = out.len();
    out.resize(start + PREFIX_BYTES, 0);
    put_header(out);
    let header_bytes = out.len() - start - PREFIX_BYTES;
    assert!(header_bytes as u64 <= HEADER_BYTES_MAX, "a header of {header_bytes} bytes");
    assert!((payload_bytes as u64).is_multiple_of(BLOCK_BYTES) && payload_bytes as u64 <= PAYLOAD_BYTES_MAX);
    let header_checksum = crc32c::crc32c(&out[start + PREFIX_BYTES..]);
    let prefix = &mut out[start..start + PREFIX_BYTES];
    prefix[0..4].copy_from_slice(&MAGIC.to_le_bytes());
    prefix[4..8].copy_from_slice(&(header_bytes as u32).to_le_bytes());
    prefix[8..12].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
    prefix[16..24].copy_from_slice(&request_id.to_le_bytes());
    prefix[24..28].copy_from_slice(&header_checksum.to_le_bytes());
    let checksum = crc32c::crc32c(&prefix[..28]);
    prefix[28..32].copy_from_slice(&checksum.to_le_bytes());
}

fn put_message(out: &mut Vec<u8>, message: &capnp::message::Builder<impl capnp::message::Allocator>) {
    capnp::serialize::write_message(out, message).expect("writing to memory does not fail");
}

/// A header is small; what it could make a reader walk is bounded all the same.
fn reader_options() -> capnp::message::ReaderOptions {
    let mut options = capnp::message::ReaderOptions::new();
    options.traversal_limit_in_words(Some(4 * HEADER_BYTES_MAX as usize / 8)).nesting_limit(8);
    options
}

/// First segment of a header on the stack: all but opens and descriptions fit.
const SCRATCH_BYTES: usize = 1024;

#[repr(align(8))]
struct Scratch([u8; SCRATCH_BYTES]);

fn to_halves(bytes: [u8; 16]) -> (u64, u64) {
    let number = u128::from_be_bytes(bytes);
    ((number >> 64) as u64, number as u64)
}

fn from_halves(high: u64, low: u64) -> [u8; 16] {
    (u128::from(high) << 64 | u128::from(low)).to_be_bytes()
}

fn set_version(mut builder: torus_schema::data_capnp::version::Builder<'_>, version: Version) {
    builder.set_epoch(version.epoch.0);
    builder.set_sequence(version.sequence);
}

fn get_version(reader: torus_schema::data_capnp::version::Reader<'_>) -> Result<Version, FrameError> {
    version(reader.get_epoch(), reader.get_sequence())
}

fn version(epoch: u32, sequence: u64) -> Result<Version, FrameError> {
    let limit = torus_schema::limits::SEQUENCE_MAX;
    if sequence > limit {
        return Err(FrameError::TooLong { part: "sequence", found: sequence, limit });
    }
    Ok(Version::new(torus_schema::ids::Epoch(epoch), sequence))
}

impl From<capnp::Error> for FrameError {
    fn from(error: capnp::Error) -> Self {
        FrameError::Header { because: error.to_string() }
    }
}

impl From<capnp::NotInSchema> for FrameError {
    fn from(error: capnp::NotInSchema) -> Self {
        FrameError::Header { because: error.to_string() }
    }
}

impl From<std::str::Utf8Error> for FrameError {
    fn from(error: std::str::Utf8Error) -> Self {
        FrameError::Header { because: error.to_string() }
    }
}
