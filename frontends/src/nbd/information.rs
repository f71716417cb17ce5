//! What a client is told of an export, by INFO, GO and EXPORT_NAME.

use crate::device::ExportInfo;
use crate::nbd::handshake::parse_name;
use crate::nbd::wire::{self, OptionReply, Style, put_option_reply};
use bytes::BytesMut;
use torus_schema::limits::{BLOCK_BYTES, NBD_PAYLOAD_BYTES_MAX};

/// The export an option is about, and what the client wants to know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    pub option: u32,
    pub name: String,
    pub information: Vec<u16>,
}

impl Asked {
    pub fn parse(option: u32, data: &[u8]) -> Result<Self, String> {
        let (name, information) = wire::parse_info(data)?;
        Ok(Self { option, name: parse_name(name)?, information })
    }
}

/// What was agreed on before an export was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    pub style: Style,
    /// `base:allocation` was selected for this export.
    pub allocation: bool,
}

impl Features {
    pub fn transmission_flags(self, read_only: bool) -> u16 {
        // CAN_MULTI_CONN: "the effects of NBD_CMD_FLUSH and NBD_CMD_FLAG_FUA MUST be visible across all connections".
        // A device's flush covers what was answered on every connection, because `Device::flush` does.
        let mut flags = wire::EXPORT_HAS_FLAGS
            | wire::EXPORT_SEND_FLUSH
            | wire::EXPORT_SEND_FUA
            | wire::EXPORT_CAN_MULTI_CONN
            | wire::EXPORT_SEND_CACHE;
        flags |= match read_only {
            true => wire::EXPORT_READ_ONLY,
            false => wire::EXPORT_SEND_TRIM | wire::EXPORT_SEND_WRITE_ZEROES | wire::EXPORT_SEND_FAST_ZERO,
        };
        // "MUST leave this flag clear if neither structured replies nor extended headers have been negotiated"
        if self.style != Style::Simple {
            flags |= wire::EXPORT_SEND_DF;
        }
        // "MUST NOT advertise this bit unless the client successfully negotiates extended headers […] SHOULD NOT […] if
        // the client does not negotiate metacontexts"
        if self.style == Style::Extended && self.allocation {
            flags |= wire::EXPORT_BLOCK_STATUS_PAYLOAD;
        }
        flags
    }
}

/// "the server MUST send at least one NBD_REP_INFO, with an NBD_INFO_EXPORT information type" and "MUST ignore any
/// information requests it does not understand".
pub fn put_information(asked: &Asked, export: &ExportInfo, features: Features, out: &mut BytesMut) {
    let mut put = |data: &[u8]| put_option_reply(out, asked.option, OptionReply::Info, data);
    put(&wire::info_export_data(export.size_bytes, features.transmission_flags(export.read_only)));
    if asked.information.contains(&wire::INFO_NAME) {
        put(&wire::info_text_data(wire::INFO_NAME, &export.name));
    }
    if asked.information.contains(&wire::INFO_DESCRIPTION) {
        put(&wire::info_text_data(wire::INFO_DESCRIPTION, &export.description));
    }
    if asked.information.contains(&wire::INFO_BLOCK_SIZE) {
        put(&wire::info_block_size_data(1, BLOCK_BYTES as u32, NBD_PAYLOAD_BYTES_MAX as u32));
    }
    put_option_reply(out, asked.option, OptionReply::Ack, b"");
}
