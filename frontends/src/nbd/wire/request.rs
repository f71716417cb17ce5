//! Requests.

use super::{Cookie, Style, Violation, u32_at, u64_at};
use bytes::{BufMut, BytesMut};

// Request, client to server, with compact headers and with extended ones:
//
//   offset  bytes
//        0      4  0x25609513, or 0x21e41c71
//        4      2  command flags
//        6      2  command
//        8      8  cookie, returned as it is
//       16      8  offset
//       24   4, 8  length
//   28, 32      …  payload: of a write; extended, of what has FLAG_PAYLOAD_LENGTH

const COMPACT_BYTES: usize = 28;
const EXTENDED_BYTES: usize = 32;
const MAGIC_COMPACT: u32 = 0x2560_9513;
const MAGIC_EXTENDED: u32 = 0x21e4_1c71;

pub const COMMAND_READ: u16 = 0;
pub const COMMAND_WRITE: u16 = 1;
pub const COMMAND_DISCONNECT: u16 = 2;
pub const COMMAND_FLUSH: u16 = 3;
pub const COMMAND_TRIM: u16 = 4;
pub const COMMAND_CACHE: u16 = 5;
pub const COMMAND_WRITE_ZEROES: u16 = 6;
pub const COMMAND_BLOCK_STATUS: u16 = 7;

pub const FLAG_FUA: u16 = 1 << 0;
pub const FLAG_NO_HOLE: u16 = 1 << 1;
pub const FLAG_DO_NOT_FRAGMENT: u16 = 1 << 2;
pub const FLAG_REQUEST_ONE: u16 = 1 << 3;
pub const FLAG_FAST_ZERO: u16 = 1 << 4;
/// The length is that of the payload.
pub const FLAG_PAYLOAD_LENGTH: u16 = 1 << 5;

/// A request as it was sent: nothing but its magic is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: Cookie,
    pub offset: u64,
    pub length: u64,
}

impl Request {
    pub fn header_bytes(style: Style) -> usize {
        if style == Style::Extended { EXTENDED_BYTES } else { COMPACT_BYTES }
    }

    /// `None`: fewer bytes than a header has.
    pub fn parse(bytes: &[u8], style: Style) -> Option<Result<Self, Violation>> {
        let (head, length, expected) = if style == Style::Extended {
            let bytes = bytes.first_chunk::<EXTENDED_BYTES>()?;
            (bytes.first_chunk::<24>()?, u64_at(bytes, 24), MAGIC_EXTENDED)
        } else {
            let bytes = bytes.first_chunk::<COMPACT_BYTES>()?;
            (bytes.first_chunk::<24>()?, u64::from(u32_at(bytes, 24)), MAGIC_COMPACT)
        };
        let magic = u32_at(head, 0);
        if magic != expected {
            let (found, expected) = (u64::from(magic), u64::from(expected));
            return Some(Err(Violation::Magic { place: "request", found, expected }));
        }
        Some(Ok(Self {
            flags: u16::from_be_bytes([head[4], head[5]]),
            command: u16::from_be_bytes([head[6], head[7]]),
            cookie: Cookie(u64_at(head, 8)),
            offset: u64_at(head, 16),
            length,
        }))
    }

    /// Bytes that follow the header. "The command NBD_CMD_WRITE MUST use the flag NBD_CMD_FLAG_PAYLOAD_LEN in this mode":
    /// QEMU 10.0 as a client does not, and sends its payload all the same (its server takes that, too).
    pub fn payload_bytes(&self, style: Style) -> u64 {
        let flagged = style == Style::Extended && self.flags & FLAG_PAYLOAD_LENGTH != 0;
        if flagged || self.command == COMMAND_WRITE { self.length } else { 0 }
    }

    /// What a client sends; the tests are one. A compact length has to fit 32 bits.
    pub fn put(&self, style: Style, out: &mut BytesMut) {
        let extended = style == Style::Extended;
        out.put_u32(if extended { MAGIC_EXTENDED } else { MAGIC_COMPACT });
        out.put_u16(self.flags);
        out.put_u16(self.command);
        out.put_u64(self.cookie.0);
        out.put_u64(self.offset);
        match extended {
            true => out.put_u64(self.length),
            false => out.put_u32(u32::try_from(self.length).expect("a compact length")),
        }
    }
}

// Payload of a block status request: bytes that are asked about (8), ids of the contexts that are asked for (4 each).

/// Bytes asked about and the contexts, or what is wrong.
pub fn parse_status_payload(payload: &[u8]) -> Result<(u64, Vec<u32>), String> {
    let short = || format!("a block status payload of {} bytes is not 8 and 4 for each context", payload.len());
    let (length, ids) = payload.split_first_chunk::<8>().ok_or_else(short)?;
    if ids.is_empty() || !ids.len().is_multiple_of(4) {
        return Err(short());
    }
    let ids = ids.chunks_exact(4).map(|id| u32::from_be_bytes([id[0], id[1], id[2], id[3]])).collect();
    Ok((u64::from_be_bytes(*length), ids))
}

#[cfg(test)]
mod tests {
    use super::super::hex_of;
    use super::*;
    use proptest::prelude::*;

    const STYLES: [Style; 3] = [Style::Simple, Style::Structured, Style::Extended];
    const REQUEST: Request =
        Request { flags: FLAG_FUA, command: COMMAND_WRITE, cookie: Cookie(7), offset: 8192, length: 4096 };

    #[test]
    fn a_request_is_these_bytes_and_parses_back() {
        let compact = "25609513000100010000000000000007000000000000200000001000";
        let extended = "21e41c710001000100000000000000070000000000002000000000000000".to_owned() + "1000";
        for (style, expected) in [(Style::Simple, compact), (Style::Structured, compact), (Style::Extended, &extended)]
        {
            assert_eq!(hex_of(|out| REQUEST.put(style, out)), expected);
            let mut out = BytesMut::new();
            REQUEST.put(style, &mut out);
            assert_eq!(out.len(), Request::header_bytes(style));
            assert_eq!(Request::parse(&out, style), Some(Ok(REQUEST)));
            assert_eq!(Request::parse(&out[..out.len() - 1], style), None);
        }
    }

    #[test]
    fn what_follows_a_header_is_announced_by_the_command_or_by_a_flag() {
        let read = Request { command: COMMAND_READ, ..REQUEST };
        let flagged = Request { flags: FLAG_PAYLOAD_LENGTH, ..read };
        let bytes = |request: Request| STYLES.map(|style| request.payload_bytes(style));
        assert_eq!(bytes(REQUEST), [4096, 4096, 4096]);
        assert_eq!(bytes(read), [0, 0, 0]);
        assert_eq!(bytes(flagged), [0, 0, 4096]);
    }

    #[test]
    fn wrong_magic_names_both_values() {
        let error = |bytes: &[u8], style| Request::parse(bytes, style).expect("whole").expect_err("bad").to_string();
        assert_eq!(error(&[0xff; 28], Style::Simple), "magic of request is 0xffffffff, expected 0x25609513");
        assert_eq!(error(&[0; 32], Style::Extended), "magic of request is 0x0, expected 0x21e41c71");
    }

    #[test]
    fn a_status_payload_is_a_length_and_at_least_one_context() {
        let good = [0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4];
        assert_eq!(parse_status_payload(&good), Ok(((1 << 32) + 2, vec![3, 4])));
        for cut in [0, 7, 8, 9, 13] {
            assert!(parse_status_payload(&good[..cut]).is_err(), "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parsers_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for style in STYLES {
                let mut bytes = bytes.clone();
                let _ = Request::parse(&bytes, style);
                let magic = if style == Style::Extended { MAGIC_EXTENDED } else { MAGIC_COMPACT };
                bytes.splice(0..bytes.len().min(4), magic.to_be_bytes());
                if let Some(Ok(request)) = Request::parse(&bytes, style) {
                    let mut back = BytesMut::new();
                    request.put(style, &mut back);
                    prop_assert_eq!(&back[..], &bytes[..back.len()]);
                }
            }
            let _ = parse_status_payload(&bytes);
        }
    }
}
