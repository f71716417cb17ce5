//! Replies of the transmission phase.

use super::{Cookie, Style};
use bytes::{BufMut, BytesMut};

/// The errors that this server gives. The specification's NBD_ENOMEM is not among them: "SHOULD NOT return".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    Permission = 1,
    InputOutput = 5,
    Invalid = 22,
    NoSpace = 28,
    Overflow = 75,
    NotSupported = 95,
    Shutdown = 108,
}

// Simple reply, server to client:
//
//   offset  bytes
//        0      4  0x67446698
//        4      4  error, 0 is none
//        8      8  cookie of the request
//       16      …  what a read without error has read

const MAGIC_SIMPLE_REPLY: u32 = 0x6744_6698;

pub fn put_simple_reply(out: &mut BytesMut, cookie: Cookie, error: Option<Errno>) {
    out.put_u32(MAGIC_SIMPLE_REPLY);
    out.put_u32(error.map_or(0, |errno| errno as u32));
    out.put_u64(cookie.0);
}

// Chunk of a reply, server to client, with structured headers and with extended ones:
//
//   offset  bytes
//        0      4  0x668e33ef, or 0x6e8a278c
//        4      2  flags; bit 0 says that it is the request's last
//        6      2  type
//        8      8  cookie of the request
//       16   0, 8  offset of the request
//   16, 24   4, 8  length of the payload
//   20, 32      …  payload

const MAGIC_STRUCTURED: u32 = 0x668e_33ef;
const MAGIC_EXTENDED: u32 = 0x6e8a_278c;
const FLAG_DONE: u16 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum ChunkKind {
    None = 0,
    OffsetData = 1,
    OffsetHole = 2,
    BlockStatus = 5,
    BlockStatusExtended = 6,
    Error = (1 << 15) + 1,
    ErrorOffset = (1 << 15) + 2,
}

/// What the chunks of one reply have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkOf {
    pub cookie: Cookie,
    /// Of the request.
    pub offset: u64,
    pub extended: bool,
}

impl ChunkOf {
    pub fn new(style: Style, cookie: Cookie, offset: u64) -> Self {
        Self { cookie, offset, extended: style == Style::Extended }
    }

    fn put_header(&self, out: &mut BytesMut, kind: ChunkKind, done: bool, payload_bytes: u64) {
        out.put_u32(if self.extended { MAGIC_EXTENDED } else { MAGIC_STRUCTURED });
        out.put_u16(if done { FLAG_DONE } else { 0 });
        out.put_u16(kind as u16);
        out.put_u64(self.cookie.0);
        if self.extended {
            out.put_u64(self.offset);
            out.put_u64(payload_bytes);
        } else {
            out.put_u32(u32::try_from(payload_bytes).expect("payloads are bounded far below 4 GiB"));
        }
    }

    /// No payload; always the last.
    pub fn put_none(&self, out: &mut BytesMut) {
        self.put_header(out, ChunkKind::None, true, 0);
    }

    /// Payload: offset (8), then so many bytes, which the caller puts behind it.
    pub fn put_data_header(&self, out: &mut BytesMut, offset: u64, data_bytes: u64, done: bool) {
        self.put_header(out, ChunkKind::OffsetData, done, 8 + data_bytes);
        out.put_u64(offset);
    }

    /// Payload: offset (8), bytes of zeros (4).
    pub fn put_hole(&self, out: &mut BytesMut, offset: u64, hole_bytes: u32, done: bool) {
        self.put_header(out, ChunkKind::OffsetHole, done, 12);
        out.put_u64(offset);
        out.put_u32(hole_bytes);
    }

    /// Payload: context (4), then for each run its bytes (4) and status (4); extended: context (4), number of runs
    /// (4), then for each run its bytes (8) and status (8). Always the last: there is one context.
    pub fn put_block_status(&self, out: &mut BytesMut, context: u32, runs: &[(u64, u32)]) {
        let count = runs.len() as u64;
        if self.extended {
            self.put_header(out, ChunkKind::BlockStatusExtended, true, 8 + 16 * count);
            out.put_u32(context);
            out.put_u32(u32::try_from(count).expect("runs are bounded"));
        } else {
            self.put_header(out, ChunkKind::BlockStatus, true, 4 + 8 * count);
            out.put_u32(context);
        }
        for (bytes, status) in runs {
            if self.extended {
                out.put_u64(*bytes);
                out.put_u64(u64::from(*status));
            } else {
                out.put_u32(u32::try_from(*bytes).expect("runs end with a request of 32 bits"));
                out.put_u32(*status);
            }
        }
    }

    /// Payload: error (4), length of the message (2), message, and where it happened (8), if that is known. Always the
    /// last. "message length MUST NOT exceed the 4096 bytes string length limit": the caller sees to that.
    pub fn put_error(&self, out: &mut BytesMut, error: Errno, message: &str, at: Option<u64>) {
        let kind = if at.is_some() { ChunkKind::ErrorOffset } else { ChunkKind::Error };
        let payload_bytes = 6 + message.len() + if at.is_some() { 8 } else { 0 };
        self.put_header(out, kind, true, payload_bytes as u64);
        out.put_u32(error as u32);
        out.put_u16(u16::try_from(message.len()).expect("messages are cut"));
        out.put_slice(message.as_bytes());
        if let Some(at) = at {
            out.put_u64(at);
        }
    }
}

/// Flags of `base:allocation`.
pub const STATUS_HOLE: u32 = 1 << 0;
pub const STATUS_ZERO: u32 = 1 << 1;

#[cfg(test)]
mod tests {
    use super::super::hex_of;
    use super::*;

    fn chunk(style: Style) -> ChunkOf {
        ChunkOf::new(style, Cookie(9), 0x1000)
    }

    #[test]
    fn a_simple_reply_is_these_bytes() {
        assert_eq!(hex_of(|out| put_simple_reply(out, Cookie(9), None)), "67446698000000000000000000000009");
        let refused = hex_of(|out| put_simple_reply(out, Cookie(9), Some(Errno::NoSpace)));
        assert_eq!(refused, "674466980000001c0000000000000009");
    }

    /// Each chunk with both headers, the payload in common unless it is given for the extended one.
    fn assert_chunk(put: impl Fn(ChunkOf, &mut BytesMut), flags_type: [&str; 2], lengths: [u8; 2], payload: [&str; 2]) {
        let structured = hex_of(|out| put(chunk(Style::Structured), out));
        let [structured_type, extended_type] = flags_type;
        let expected = format!("668e33ef{structured_type}0000000000000009000000{:02x}{}", lengths[0], payload[0]);
        assert_eq!(structured, expected);
        let extended = hex_of(|out| put(chunk(Style::Extended), out));
        let (zeros, length) = ("00000000000000", lengths[1]);
        let head = format!("6e8a278c{extended_type}00000000000000090000000000001000{zeros}{length:02x}");
        assert_eq!(extended, head + payload[1]);
    }

    #[test]
    fn chunks_are_these_bytes() {
        assert_chunk(|chunk, out| chunk.put_none(out), ["00010000"; 2], [0; 2], [""; 2]);
        let offset = "0000000000002000";
        assert_chunk(|chunk, out| chunk.put_data_header(out, 0x2000, 1, false), ["00000001"; 2], [9; 2], [offset; 2]);
        let hole = "000000000000200000000200";
        assert_chunk(|chunk, out| chunk.put_hole(out, 0x2000, 0x200, true), ["00010002"; 2], [12; 2], [hole; 2]);
        let status = [
            "00000001000010000000000000002000000000".to_owned() + "03",
            ["00000001", "00000002", "0000000000001000", "0000000000000000", "0000000000002000", "0000000000000003"]
                .concat(),
        ];
        let runs = [(0x1000, 0), (0x2000, STATUS_HOLE | STATUS_ZERO)];
        let put = |chunk: ChunkOf, out: &mut BytesMut| chunk.put_block_status(out, 1, &runs);
        assert_chunk(put, ["00010005", "00010006"], [20, 40], [&status[0], &status[1]]);
        let put = |chunk: ChunkOf, out: &mut BytesMut| chunk.put_error(out, Errno::Invalid, "no", None);
        assert_chunk(put, ["00018001"; 2], [8; 2], ["0000001600026e6f"; 2]);
        let put = |chunk: ChunkOf, out: &mut BytesMut| chunk.put_error(out, Errno::InputOutput, "no", Some(0x3000));
        assert_chunk(put, ["00018002"; 2], [16; 2], ["0000000500026e6f0000000000003000"; 2]);
    }
}
