//! Greeting, options and their replies.

use super::{Violation, u32_at, u64_at};
use bytes::{BufMut, BytesMut};

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
pub const OPTION_STARTTLS: u32 = 5;
pub const OPTION_INFO: u32 = 6;
pub const OPTION_GO: u32 = 7;
pub const OPTION_STRUCTURED_REPLY: u32 = 8;
pub const OPTION_LIST_META_CONTEXT: u32 = 9;
pub const OPTION_SET_META_CONTEXT: u32 = 10;
pub const OPTION_EXTENDED_HEADERS: u32 = 11;

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
    let (name, rest) = split_counted(data).ok_or_else(short)?;
    let (count, rest) = rest.split_first_chunk::<2>().ok_or_else(short)?;
    let count = usize::from(u16::from_be_bytes(*count));
    if rest.len() != count * 2 {
        return Err(format!("{count} information requests announced, {} bytes of them sent", rest.len()));
    }
    Ok((name, rest.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect()))
}

// Data of OPTION_LIST_META_CONTEXT and OPTION_SET_META_CONTEXT:
//
//   offset  bytes
//        0      4  length of the export's name = n
//        4      n  name, UTF-8
//      4+n      4  number of queries
//      8+n      …  queries, each a length (4) and so many bytes of UTF-8

/// Export name and queries of an option's data, or what is wrong with it.
pub fn parse_queries(data: &[u8]) -> Result<(&[u8], Vec<&[u8]>), String> {
    let short = || format!("{} bytes of data are too few for what they announce", data.len());
    let (name, rest) = split_counted(data).ok_or_else(short)?;
    let (count, mut rest) = rest.split_first_chunk::<4>().ok_or_else(short)?;
    let count = u32::from_be_bytes(*count) as usize;
    // Each takes at least its length: what is announced reserves no more memory than what was sent.
    if count > rest.len() / 4 {
        return Err(short());
    }
    let mut queries = Vec::with_capacity(count);
    for _ in 0..count {
        let (query, behind) = split_counted(rest).ok_or_else(short)?;
        queries.push(query);
        rest = behind;
    }
    match rest.len() {
        0 => Ok((name, queries)),
        left => Err(format!("{left} bytes behind the last of {count} queries")),
    }
}

fn split_counted(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = data.split_first_chunk::<4>()?;
    rest.split_at_checked(u32::from_be_bytes(*length) as usize)
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
    MetaContext = 4,
    Unsupported = (1 << 31) + 1,
    Policy = (1 << 31) + 2,
    Invalid = (1 << 31) + 3,
    TlsRequired = (1 << 31) + 5,
    Unknown = (1 << 31) + 6,
    Shutdown = (1 << 31) + 7,
    TooBig = (1 << 31) + 9,
    ExtendedHeadersRequired = (1 << 31) + 10,
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

/// Data of `OptionReply::MetaContext`: context id (4), name.
pub fn meta_context_data(id: u32, name: &str) -> BytesMut {
    let mut data = BytesMut::with_capacity(4 + name.len());
    data.put_u32(id);
    data.put_slice(name.as_bytes());
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
pub const EXPORT_SEND_DF: u16 = 1 << 7;
pub const EXPORT_CAN_MULTI_CONN: u16 = 1 << 8;
pub const EXPORT_SEND_CACHE: u16 = 1 << 10;
pub const EXPORT_SEND_FAST_ZERO: u16 = 1 << 11;
pub const EXPORT_BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;

#[cfg(test)]
mod tests {
    use super::super::hex_of;
    use super::*;
    use proptest::prelude::*;

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

    #[test]
    fn a_context_is_these_bytes() {
        assert_eq!(hex_of(|out| out.put(meta_context_data(1, "b:a"))), "00000001623a61");
    }

    #[test]
    fn queries_have_to_fill_their_option_exactly() {
        let good = [0, 0, 0, 1, b'd', 0, 0, 0, 2, 0, 0, 0, 2, b'b', b':', 0, 0, 0, 0];
        assert_eq!(parse_queries(&good), Ok((&b"d"[..], vec![&b"b:"[..], &b""[..]])));
        for cut in 0..good.len() {
            assert!(parse_queries(&good[..cut]).is_err(), "cut at {cut}");
        }
        let longer = [&good[..], &[0]].concat();
        assert!(parse_queries(&longer).is_err());
        assert!(parse_queries(&[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]).is_err());
    }

    #[test]
    fn wrong_magic_of_an_option_names_both_values() {
        let error = OptionHeader::parse(&[0; 16]).expect_err("zeros are no option");
        assert_eq!(error.to_string(), "magic of option is 0x0, expected 0x49484156454f5054");
    }

    proptest! {
        #[test]
        fn no_data_of_an_option_makes_a_parser_panic(data in proptest::collection::vec(any::<u8>(), 0..64), zeros in 0usize..8) {
            // Short lengths lie behind three zeros: without them nearly all is refused by its first number.
            let data = [&vec![0; zeros][..], &data].concat();
            if let Ok((name, information)) = parse_info(&data) {
                prop_assert_eq!(data.len(), 6 + name.len() + 2 * information.len());
            }
            if let Ok((name, queries)) = parse_queries(&data) {
                prop_assert_eq!(data.len(), 8 + name.len() + queries.iter().map(|query| 4 + query.len()).sum::<usize>());
            }
        }
    }
}
