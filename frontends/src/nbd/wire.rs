//! The numbers and byte tables of NBD. All integers are big endian.

use bytes::{BufMut, BytesMut};
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
    #[error("a write of {found} bytes, at most {limit} are read to be thrown away")]
    PayloadTooLong { found: u32, limit: u64 },
}

// Greeting, server to client:
//
//   offset  bytes
//        0      8  "NBDMAGIC"
//        8      8  "IHAVEOPT"
//       16      2  handshake flags
//
// then client to server: 4 bytes of client flags.

const MAGIC_GREETING: u64 = 0x4e42_444d_4147_4943;
const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;

const HANDSHAKE_FIXED_NEWSTYLE: u16 = 1 << 0;
const HANDSHAKE_NO_ZEROES: u16 = 1 << 1;

pub const CLIENT_FLAGS_BYTES: usize = 4;
pub const CLIENT_FIXED_NEWSTYLE: u32 = 1 << 0;
pub const CLIENT_NO_ZEROES: u32 = 1 << 1;
pub const CLIENT_FLAGS_KNOWN: u32 = CLIENT_FIXED_NEWSTYLE | CLIENT_NO_ZEROES;

pub fn put_greeting(out: &mut BytesMut) {
    out.put_u64(MAGIC_GREETING);
    out.put_u64(MAGIC_OPTION);
    out.put_u16(HANDSHAKE_FIXED_NEWSTYLE | HANDSHAKE_NO_ZEROES);
}

// Option, client to server:
//
//   offset  bytes
//        0      8  "IHAVEOPT"
//        8      4  option
//       12      4  length of data
//       16      …  data

pub const OPTION_HEADER_BYTES: usize = 16;

pub const OPTION_EXPORT_NAME: u32 = 1;
pub const OPTION_ABORT: u32 = 2;
pub const OPTION_LIST: u32 = 3;
pub const OPTION_INFO: u32 = 6;
pub const OPTION_GO: u32 = 7;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    pub option: u32,
    pub length: u32,
}

impl OptionHeader {
    pub fn parse(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<Self, Violation> {
        let magic = u64_at(bytes, 0);
        if magic != MAGIC_OPTION {
            return Err(Violation::Magic { place: "option", found: magic, expected: MAGIC_OPTION });
        }
        Ok(Self { option: u32_at(bytes, 8), length: u32_at(bytes, 12) })
    }
}

// Data of OPTION_INFO and OPTION_GO:
//
//   offset  bytes
//        0      4  length of the name = n
//        4      n  name, UTF-8
//      4+n      2  number of information requests = m
//      6+n     2m  information requests

pub const INFO_EXPORT: u16 = 0;
pub const INFO_NAME: u16 = 1;
pub const INFO_DESCRIPTION: u16 = 2;
pub const INFO_BLOCK_SIZE: u16 = 3;

/// Name and information requests of an option's data, or what is wrong with it.
pub fn parse_info(data: &[u8]) -> Result<(&[u8], Vec<u16>), String> {
    let short = || format!("{} bytes of data are too few for what they announce", data.len());
    let (length, rest) = data.split_first_chunk::<4>().ok_or_else(short)?;
    let length = u32::from_be_bytes(*length) as usize;
    let (name, rest) = rest.split_at_checked(length).ok_or_else(short)?;
    let (count, rest) = rest.split_first_chunk::<2>().ok_or_else(short)?;
    let count = usize::from(u16::from_be_bytes(*count));
    if rest.len() != count * 2 {
        return Err(format!("{count} information requests announced, {} bytes of them sent", rest.len()));
    }
    Ok((name, rest.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect()))
}

// Reply to an option, server to client:
//
//   offset  bytes
//        0      8  0x0003e889045565a9
//        8      4  option
//       12      4  reply type; bit 31 says error, data is then a message for humans
//       16      4  length of data
//       20      …  data

const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum OptionReply {
    Ack = 1,
    Server = 2,
    Info = 3,
    Unsupported = (1 << 31) + 1,
    Invalid = (1 << 31) + 3,
    Unknown = (1 << 31) + 6,
    Shutdown = (1 << 31) + 7,
    TooBig = (1 << 31) + 9,
}

pub fn put_option_reply(out: &mut BytesMut, option: u32, reply: OptionReply, data: &[u8]) {
    out.put_u64(MAGIC_OPTION_REPLY);
    out.put_u32(option);
    out.put_u32(reply as u32);
    out.put_u32(u32::try_from(data.len()).expect("what we reply is bounded by names and descriptions"));
    out.put_slice(data);
}

/// Data of `OptionReply::Server`: length of the name (4), name, description.
pub fn server_data(name: &str, description: &str) -> BytesMut {
    let mut data = BytesMut::with_capacity(4 + name.len() + description.len());
    data.put_u32(u32::try_from(name.len()).expect("names are bounded"));
    data.put_slice(name.as_bytes());
    data.put_slice(description.as_bytes());
    data
}

/// Data of `OptionReply::Info` for INFO_EXPORT: type (2), size (8), transmission flags (2).
pub fn info_export_data(size_bytes: u64, flags: u16) -> BytesMut {
    let mut data = BytesMut::with_capacity(12);
    data.put_u16(INFO_EXPORT);
    data.put_u64(size_bytes);
    data.put_u16(flags);
    data
}

/// Data of `OptionReply::Info` for INFO_NAME and INFO_DESCRIPTION: type (2), text.
pub fn info_text_data(info: u16, text: &str) -> BytesMut {
    let mut data = BytesMut::with_capacity(2 + text.len());
    data.put_u16(info);
    data.put_slice(text.as_bytes());
    data
}

/// Data of `OptionReply::Info` for INFO_BLOCK_SIZE: type (2), minimum (4), preferred (4), payload at most (4).
pub fn info_block_size_data(minimum: u32, preferred: u32, payload_max: u32) -> BytesMut {
    let mut data = BytesMut::with_capacity(14);
    data.put_u16(INFO_BLOCK_SIZE);
    data.put_u32(minimum);
    data.put_u32(preferred);
    data.put_u32(payload_max);
    data
}

// Answer to OPTION_EXPORT_NAME, which has no reply header: size (8), transmission flags (2), 124 zeros unless the
// client set CLIENT_NO_ZEROES.

pub fn put_export(out: &mut BytesMut, size_bytes: u64, flags: u16, zeroes: bool) {
    out.put_u64(size_bytes);
    out.put_u16(flags);
    if zeroes {
        out.put_bytes(0, 124);
    }
}

pub const EXPORT_HAS_FLAGS: u16 = 1 << 0;
pub const EXPORT_READ_ONLY: u16 = 1 << 1;
pub const EXPORT_SEND_FLUSH: u16 = 1 << 2;
pub const EXPORT_SEND_FUA: u16 = 1 << 3;
pub const EXPORT_SEND_TRIM: u16 = 1 << 5;
pub const EXPORT_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub const EXPORT_CAN_MULTI_CONN: u16 = 1 << 8;

// Request, client to server:
//
//   offset  bytes
//        0      4  0x25609513
//        4      2  command flags
//        6      2  command
//        8      8  cookie, returned as it is
//       16      8  offset
//       24      4  length
//       28      …  payload of a write

pub const REQUEST_BYTES: usize = 28;
const MAGIC_REQUEST: u32 = 0x2560_9513;

pub const COMMAND_READ: u16 = 0;
pub const COMMAND_WRITE: u16 = 1;
pub const COMMAND_DISCONNECT: u16 = 2;
pub const COMMAND_FLUSH: u16 = 3;
pub const COMMAND_TRIM: u16 = 4;
pub const COMMAND_WRITE_ZEROES: u16 = 6;

pub const FLAG_FUA: u16 = 1 << 0;
pub const FLAG_NO_HOLE: u16 = 1 << 1;

/// The client's name for a request in flight; opaque to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cookie(pub u64);

/// A request as it was sent: nothing but its magic is checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: Cookie,
    pub offset: u64,
    pub length: u32,
}

impl Request {
    pub fn parse(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, Violation> {
        let magic = u32_at(bytes, 0);
        if magic != MAGIC_REQUEST {
            let (found, expected) = (u64::from(magic), u64::from(MAGIC_REQUEST));
            return Err(Violation::Magic { place: "request", found, expected });
        }
        Ok(Self {
            flags: u16::from_be_bytes([bytes[4], bytes[5]]),
            command: u16::from_be_bytes([bytes[6], bytes[7]]),
            cookie: Cookie(u64_at(bytes, 8)),
            offset: u64_at(bytes, 16),
            length: u32_at(bytes, 24),
        })
    }

    /// What a client sends; the tests are one.
    pub fn put(&self, out: &mut BytesMut) {
        out.put_u32(MAGIC_REQUEST);
        out.put_u16(self.flags);
        out.put_u16(self.command);
        out.put_u64(self.cookie.0);
        out.put_u64(self.offset);
        out.put_u32(self.length);
    }
}

// Simple reply, server to client:
//
//   offset  bytes
//        0      4  0x67446698
//        4      4  error, 0 is none
//        8      8  cookie of the request
//       16      …  what a read without error has read

pub const SIMPLE_REPLY_BYTES: usize = 16;
const MAGIC_SIMPLE_REPLY: u32 = 0x6744_6698;

/// The errors that this server gives; the specification's other values are for commands it does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    Permission = 1,
    InputOutput = 5,
    Invalid = 22,
    NoSpace = 28,
    Shutdown = 108,
}

pub fn put_simple_reply(out: &mut BytesMut, cookie: Cookie, error: Option<Errno>) {
    out.put_u32(MAGIC_SIMPLE_REPLY);
    out.put_u32(error.map_or(0, |errno| errno as u32));
    out.put_u64(cookie.0);
}

fn u32_at<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes were cut"))
}

fn u64_at<const N: usize>(bytes: &[u8; N], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes were cut"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex_of(put: impl FnOnce(&mut BytesMut)) -> String {
        let mut out = BytesMut::new();
        put(&mut out);
        out.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_greeting_is_these_bytes() {
        assert_eq!(hex_of(put_greeting), "4e42444d4147494349484156454f50540003");
    }

    #[test]
    fn an_option_reply_is_these_bytes() {
        let found = hex_of(|out| put_option_reply(out, OPTION_GO, OptionReply::Unsupported, b"no"));
        assert_eq!(found, "0003e889045565a90000000780000001000000026e6f");
        let found = hex_of(|out| put_option_reply(out, OPTION_GO, OptionReply::Ack, b""));
        assert_eq!(found, "0003e889045565a9000000070000000100000000");
    }

    #[test]
    fn information_is_these_bytes() {
        assert_eq!(hex_of(|out| out.put(info_export_data(1 << 40, 0x16d))), "00000000010000000000016d");
        assert_eq!(hex_of(|out| out.put(info_text_data(INFO_NAME, "ab"))), "00016162");
        assert_eq!(hex_of(|out| out.put(info_block_size_data(1, 4096, 32 << 20))), "0003000000010000100002000000");
        assert_eq!(hex_of(|out| out.put(server_data("ab", "c"))), "00000002616263");
    }

    #[test]
    fn the_answer_to_export_name_has_124_zeros_unless_declined() {
        assert_eq!(hex_of(|out| put_export(out, 4096, 1, false)), "00000000000010000001");
        assert_eq!(hex_of(|out| put_export(out, 4096, 1, true)), "00000000000010000001".to_owned() + &"00".repeat(124));
    }

    #[test]
    fn a_request_is_these_bytes_and_parses_back() {
        let request =
            Request { flags: FLAG_FUA, command: COMMAND_WRITE, cookie: Cookie(7), offset: 8192, length: 4096 };
        let mut out = BytesMut::new();
        request.put(&mut out);
        assert_eq!(hex_of(|o| request.put(o)), "25609513000100010000000000000007000000000000200000001000");
        let bytes: [u8; REQUEST_BYTES] = out[..].try_into().expect("28 bytes");
        assert_eq!(Request::parse(&bytes), Ok(request));
    }

    #[test]
    fn a_simple_reply_is_these_bytes() {
        assert_eq!(hex_of(|out| put_simple_reply(out, Cookie(9), None)), "67446698000000000000000000000009");
        let refused = hex_of(|out| put_simple_reply(out, Cookie(9), Some(Errno::NoSpace)));
        assert_eq!(refused, "674466980000001c0000000000000009");
    }

    #[test]
    fn wrong_magic_names_both_values() {
        let error = OptionHeader::parse(&[0; 16]).expect_err("zeros are no option");
        assert_eq!(error.to_string(), "magic of option is 0x0, expected 0x49484156454f5054");
        let error = Request::parse(&[0xff; 28]).expect_err("ones are no request");
        assert_eq!(error.to_string(), "magic of request is 0xffffffff, expected 0x25609513");
    }

    #[test]
    fn information_requests_have_to_fill_their_option_exactly() {
        let good = [0, 0, 0, 2, b'a', b'b', 0, 2, 0, 1, 0, 3];
        assert_eq!(parse_info(&good), Ok((&b"ab"[..], vec![1, 3])));
        for cut in 0..good.len() {
            assert!(parse_info(&good[..cut]).is_err(), "cut at {cut}");
        }
        let longer = [&good[..], &[0]].concat();
        assert!(parse_info(&longer).is_err());
        assert!(parse_info(&[0xff; 12]).is_err());
    }
}
