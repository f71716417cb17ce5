//! Option haggling without I/O: bytes in, replies and steps out.
//!
//! ```text
//!   Flags ──► Option ──LIST──► Listing ──► Option
//!              │ ▲ ├──INFO──► Describing ─► Option
//!              │ │ ├──GO, EXPORT_NAME──► Attaching ──ok──► Transmission
//!              │ │ │                        └──GO refused──► Option
//!              │ │ ├──too long──► Skipping ──► Option
//!              │ └─┴──unknown, invalid: error reply
//!              └──ABORT──► Ended
//! ```
//!
//! Structured replies, metadata contexts, extended headers and TLS will be options of this table; until then they are
//! answered as unknown and the client goes on without.

use crate::device::{ExportInfo, VolumeError};
use crate::nbd::wire::{self, OptionHeader, OptionReply, Violation, put_option_reply};
use bytes::{Buf, BytesMut};
use torus_schema::limits::{
    BLOCK_BYTES, NBD_NAME_BYTES_MAX, NBD_OPTION_BYTES_MAX, NBD_OPTION_DISCARD_BYTES_MAX, NBD_OPTIONS_MAX,
    NBD_PAYLOAD_BYTES_MAX,
};

/// What has to be done before the handshake can go on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Receive until at least that many bytes are in the input, then `next` again.
    Receive(usize),
    /// Find the exports, then `listed`.
    List,
    /// Find out about an export without attaching it, then `described`.
    Describe { name: String },
    /// Attach an export, then `attached`.
    Attach { name: String },
    /// Requests follow.
    Transmission,
    /// Send what is to be sent and close.
    End,
}

/// The export an option is about, and what the client wants to know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Asked {
    option: u32,
    name: String,
    information: Vec<u16>,
}

#[derive(Debug)]
enum State {
    Flags,
    Option,
    Skipping { option: u32, left: usize },
    Listing,
    Describing(Asked),
    Attaching(Asked),
    Transmission,
    Ended,
}

enum Event<'a> {
    Flags(u32),
    Option { option: u32, data: &'a [u8] },
    OptionTooLong { option: u32, length: usize },
    Skipped,
    Listed(Result<Vec<ExportInfo>, VolumeError>),
    Described(Result<ExportInfo, VolumeError>),
    Attached(Result<ExportInfo, VolumeError>),
}

pub struct Handshake {
    state: State,
    client: u32,
    options: u32,
    stopping: bool,
}

impl Handshake {
    /// The server speaks first.
    pub fn start(out: &mut BytesMut) -> Self {
        wire::put_greeting(out);
        Self { state: State::Flags, client: 0, options: 0, stopping: false }
    }

    /// "SHOULD error further options received (other than an NBD_OPT_ABORT) with NBD_REP_ERR_SHUTDOWN".
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Consumes what it understands of the input and writes what it replies.
    pub fn next(&mut self, input: &mut BytesMut, out: &mut BytesMut) -> Result<Step, Violation> {
        loop {
            if let Some(step) = self.pending() {
                return Ok(step);
            }
            match self.state {
                State::Flags => {
                    let Some(flags) = input.first_chunk::<{ wire::CLIENT_FLAGS_BYTES }>() else {
                        return Ok(Step::Receive(wire::CLIENT_FLAGS_BYTES));
                    };
                    let flags = u32::from_be_bytes(*flags);
                    input.advance(wire::CLIENT_FLAGS_BYTES);
                    self.apply(Event::Flags(flags), out)?;
                }
                State::Skipping { option, left } => {
                    let here = left.min(input.len());
                    input.advance(here);
                    self.state = State::Skipping { option, left: left - here };
                    if here < left {
                        return Ok(Step::Receive(1));
                    }
                    self.apply(Event::Skipped, out)?;
                }
                _ => {
                    if let Some(wanted) = self.option(input, out)? {
                        return Ok(Step::Receive(wanted));
                    }
                }
            }
        }
    }

    pub fn listed(&mut self, found: Result<Vec<ExportInfo>, VolumeError>, out: &mut BytesMut) -> Result<(), Violation> {
        self.apply(Event::Listed(found), out)
    }

    pub fn described(&mut self, found: Result<ExportInfo, VolumeError>, out: &mut BytesMut) -> Result<(), Violation> {
        self.apply(Event::Described(found), out)
    }

    /// `attached`: the export as it is, attached.
    pub fn attached(&mut self, attached: Result<ExportInfo, VolumeError>, out: &mut BytesMut) -> Result<(), Violation> {
        self.apply(Event::Attached(attached), out)
    }

    /// The step that the state waits for, where it does not wait for bytes.
    fn pending(&self) -> Option<Step> {
        match &self.state {
            State::Flags | State::Option | State::Skipping { .. } => None,
            State::Listing => Some(Step::List),
            State::Describing(asked) => Some(Step::Describe { name: asked.name.clone() }),
            State::Attaching(asked) => Some(Step::Attach { name: asked.name.clone() }),
            State::Transmission => Some(Step::Transmission),
            State::Ended => Some(Step::End),
        }
    }

    /// Takes one option from the input, or says how many bytes it needs for that.
    fn option(&mut self, input: &mut BytesMut, out: &mut BytesMut) -> Result<Option<usize>, Violation> {
        let Some(header) = input.first_chunk::<{ wire::OPTION_HEADER_BYTES }>() else {
            return Ok(Some(wire::OPTION_HEADER_BYTES));
        };
        let OptionHeader { option, length } = OptionHeader::parse(header)?;
        if u64::from(length) > NBD_OPTION_DISCARD_BYTES_MAX {
            let limit = NBD_OPTION_DISCARD_BYTES_MAX;
            return Err(Violation::OptionTooLong { option, found: length, limit });
        }
        let length = length as usize;
        let too_long = length as u64 > NBD_OPTION_BYTES_MAX;
        let whole = wire::OPTION_HEADER_BYTES + length;
        if !too_long && input.len() < whole {
            return Ok(Some(whole));
        }
        self.options += 1;
        // "if a server believes a client's behaviour constitutes a denial of service, it MAY initiate a hard
        // disconnect"
        if self.options > NBD_OPTIONS_MAX {
            return Err(Violation::TooManyOptions { limit: NBD_OPTIONS_MAX });
        }
        input.advance(wire::OPTION_HEADER_BYTES);
        if too_long {
            self.apply(Event::OptionTooLong { option, length }, out)?;
        } else {
            let data = input.split_to(length);
            self.apply(Event::Option { option, data: &data }, out)?;
        }
        Ok(None)
    }

    /// Every pair that can happen, in the order of the picture; the answers come to the state that asked for them.
    fn apply(&mut self, event: Event<'_>, out: &mut BytesMut) -> Result<(), Violation> {
        let state = std::mem::replace(&mut self.state, State::Ended);
        self.state = match (state, event) {
            (State::Flags, Event::Flags(flags)) => self.flags(flags)?,
            (State::Option, Event::Option { option, data }) => self.haggle(option, data, out)?,
            (State::Option, Event::OptionTooLong { option, length }) => self.too_long(option, length)?,
            (State::Skipping { option, .. }, Event::Skipped) => {
                let text = format!("at most {NBD_OPTION_BYTES_MAX} bytes of option data are accepted");
                put_option_reply(out, option, OptionReply::TooBig, text.as_bytes());
                State::Option
            }
            (State::Listing, Event::Listed(Ok(exports))) => list(&exports, out),
            (State::Listing, Event::Listed(Err(error))) => refuse(wire::OPTION_LIST, &error, out),
            (State::Describing(asked), Event::Described(Ok(export))) => {
                put_information(&asked, &export, out);
                State::Option
            }
            (State::Describing(asked), Event::Described(Err(error))) => refuse(asked.option, &error, out),
            (State::Attaching(asked), Event::Attached(Ok(export))) => self.enter(&asked, &export, out),
            (State::Attaching(asked), Event::Attached(Err(error))) if asked.option == wire::OPTION_EXPORT_NAME => {
                return Err(Violation::ExportName { because: error.to_string() });
            }
            (State::Attaching(asked), Event::Attached(Err(error))) => refuse(asked.option, &error, out),
            (state, _) => unreachable!("the handshake was answered what it did not ask for in state {state:?}"),
        };
        Ok(())
    }

    /// "the server MUST close the TCP connection if it does not recognize the client's flags"
    fn flags(&mut self, flags: u32) -> Result<State, Violation> {
        if flags & !wire::CLIENT_FLAGS_KNOWN != 0 {
            return Err(Violation::ClientFlags { found: flags, known: wire::CLIENT_FLAGS_KNOWN });
        }
        self.client = flags;
        Ok(State::Option)
    }

    fn haggle(&self, option: u32, data: &[u8], out: &mut BytesMut) -> Result<State, Violation> {
        // "This is the only valid option in nonfixed newstyle negotiation."
        if self.client & wire::CLIENT_FIXED_NEWSTYLE == 0 && option != wire::OPTION_EXPORT_NAME {
            return Err(Violation::NotFixed { option });
        }
        if self.stopping && option == wire::OPTION_EXPORT_NAME {
            return Err(Violation::ExportName { because: "the server is shutting down".into() });
        }
        if self.stopping && option != wire::OPTION_ABORT {
            put_option_reply(out, option, OptionReply::Shutdown, b"the server is shutting down");
            return Ok(State::Option);
        }
        match option {
            wire::OPTION_EXPORT_NAME => {
                let name = parse_name(data).map_err(|because| Violation::ExportName { because })?;
                Ok(State::Attaching(Asked { option, name, information: Vec::new() }))
            }
            // "The server MUST reply with NBD_REP_ACK." and "SHOULD ignore any data sent by the client".
            wire::OPTION_ABORT => {
                put_option_reply(out, option, OptionReply::Ack, b"");
                Ok(State::Ended)
            }
            // "the server SHOULD reject a request that includes data with NBD_REP_ERR_INVALID"
            wire::OPTION_LIST if !data.is_empty() => {
                put_option_reply(out, option, OptionReply::Invalid, b"LIST takes no data");
                Ok(State::Option)
            }
            wire::OPTION_LIST => Ok(State::Listing),
            wire::OPTION_INFO | wire::OPTION_GO => Ok(match parse_asked(option, data) {
                Ok(asked) if option == wire::OPTION_INFO => State::Describing(asked),
                Ok(asked) => State::Attaching(asked),
                Err(because) => {
                    put_option_reply(out, option, OptionReply::Invalid, because.as_bytes());
                    State::Option
                }
            }),
            _ => {
                put_option_reply(out, option, OptionReply::Unsupported, b"this server does not know the option");
                Ok(State::Option)
            }
        }
    }

    fn too_long(&self, option: u32, length: usize) -> Result<State, Violation> {
        if self.client & wire::CLIENT_FIXED_NEWSTYLE == 0 || option == wire::OPTION_EXPORT_NAME {
            let because = format!("{length} bytes of option data, at most {NBD_OPTION_BYTES_MAX} are accepted");
            return Err(Violation::ExportName { because });
        }
        Ok(State::Skipping { option, left: length })
    }

    fn enter(&self, asked: &Asked, export: &ExportInfo, out: &mut BytesMut) -> State {
        if asked.option == wire::OPTION_EXPORT_NAME {
            let zeroes = self.client & wire::CLIENT_NO_ZEROES == 0;
            wire::put_export(out, export.size_bytes, transmission_flags(export.read_only), zeroes);
        } else {
            put_information(asked, export, out);
        }
        State::Transmission
    }
}

/// CAN_MULTI_CONN: a device's flush covers what was answered on every connection, because `Device::flush` does.
pub fn transmission_flags(read_only: bool) -> u16 {
    let always = wire::EXPORT_HAS_FLAGS | wire::EXPORT_SEND_FLUSH | wire::EXPORT_SEND_FUA | wire::EXPORT_CAN_MULTI_CONN;
    let by_kind = match read_only {
        true => wire::EXPORT_READ_ONLY,
        false => wire::EXPORT_SEND_TRIM | wire::EXPORT_SEND_WRITE_ZEROES,
    };
    always | by_kind
}

fn parse_asked(option: u32, data: &[u8]) -> Result<Asked, String> {
    let (name, information) = wire::parse_info(data)?;
    Ok(Asked { option, name: parse_name(name)?, information })
}

fn parse_name(bytes: &[u8]) -> Result<String, String> {
    if bytes.len() > NBD_NAME_BYTES_MAX {
        return Err(format!("a name of {} bytes, at most {NBD_NAME_BYTES_MAX} are accepted", bytes.len()));
    }
    let name = std::str::from_utf8(bytes).map_err(|error| format!("the name is not UTF-8: {error}"))?;
    Ok(name.to_owned())
}

fn list(exports: &[ExportInfo], out: &mut BytesMut) -> State {
    for export in exports {
        let data = wire::server_data(&export.name, &export.description);
        put_option_reply(out, wire::OPTION_LIST, OptionReply::Server, &data);
    }
    put_option_reply(out, wire::OPTION_LIST, OptionReply::Ack, b"");
    State::Option
}

fn refuse(option: u32, error: &VolumeError, out: &mut BytesMut) -> State {
    put_option_reply(out, option, OptionReply::Unknown, error.to_string().as_bytes());
    State::Option
}

/// "the server MUST send at least one NBD_REP_INFO, with an NBD_INFO_EXPORT information type" and "MUST ignore any
/// information requests it does not understand".
fn put_information(asked: &Asked, export: &ExportInfo, out: &mut BytesMut) {
    let mut put = |data: &[u8]| put_option_reply(out, asked.option, OptionReply::Info, data);
    put(&wire::info_export_data(export.size_bytes, transmission_flags(export.read_only)));
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

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
