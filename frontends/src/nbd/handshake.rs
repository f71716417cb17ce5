//! Option haggling without I/O: bytes in, replies and steps out.
//!
//! ```text
//!   Flags ──► Option ──LIST──► Listing ──► Option
//!              │ ▲ ├──INFO, *_META_CONTEXT──► Describing ─► Option
//!              │ │ ├──GO, EXPORT_NAME──► Attaching ──ok──► Transmission
//!              │ │ │                        └──GO refused──► Option
//!              │ │ ├──STARTTLS──► Securing ──► Option
//!              │ │ ├──STRUCTURED_REPLY, EXTENDED_HEADERS: agreed
//!              │ │ ├──too long──► Skipping ──► Option
//!              │ └─┴──unknown, invalid, TLS required: error reply
//!              └──ABORT──► Ended
//! ```

use crate::device::{ExportInfo, VolumeError};
use crate::nbd::contexts::Queries;
use crate::nbd::information::{Asked, Features, put_information};
use crate::nbd::wire::{self, OptionHeader, OptionReply, Style, Violation, put_option_reply};
use bytes::{Buf, BytesMut};
use torus_schema::limits::{NBD_NAME_BYTES_MAX, NBD_OPTION_BYTES_MAX, NBD_OPTION_DISCARD_BYTES_MAX, NBD_OPTIONS_MAX};

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
    /// Send what is to be sent as it is, speak TLS from then on, then `secured`. What is in the input was sent before
    /// TLS was agreed on: it is TLS, or an attack.
    StartTls,
    /// Requests follow, with these headers; `allocation`: `base:allocation` was selected.
    Transmission { style: Style, allocation: bool },
    /// Send what is to be sent and close.
    End,
}

/// Whether a client may, or has to, speak TLS: the specification's NOTLS, SELECTIVETLS with no export that is TLS-only,
/// and FORCEDTLS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum TlsMode {
    /// Nobody talks TLS
    #[default]
    Off,
    /// Who wants to does
    Allow,
    /// Everybody does
    Require,
}

/// Why an export is looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
enum About {
    Info(Asked),
    Contexts(Queries),
}

#[derive(Debug)]
enum State {
    Flags,
    Option,
    Skipping { option: u32, left: usize },
    Listing,
    Describing(About),
    Attaching(Asked),
    Securing,
    Transmission { allocation: bool },
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
    Secured,
}

pub struct Handshake {
    state: State,
    client: u32,
    options: u32,
    stopping: bool,
    tls: TlsMode,
    secure: bool,
    style: Style,
    /// The export for which `base:allocation` was selected.
    allocation_of: Option<String>,
}

impl Handshake {
    /// The server speaks first.
    pub fn start(tls: TlsMode, out: &mut BytesMut) -> Self {
        wire::put_greeting(out);
        Self {
            state: State::Flags,
            client: 0,
            options: 0,
            stopping: false,
            tls,
            secure: false,
            style: Style::Simple,
            allocation_of: None,
        }
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

    /// From now on everything is received and sent over TLS.
    pub fn secured(&mut self, out: &mut BytesMut) -> Result<(), Violation> {
        self.apply(Event::Secured, out)
    }

    /// The step that the state waits for, where it does not wait for bytes.
    fn pending(&self) -> Option<Step> {
        match &self.state {
            State::Flags | State::Option | State::Skipping { .. } => None,
            State::Listing => Some(Step::List),
            State::Describing(About::Info(asked)) => Some(Step::Describe { name: asked.name.clone() }),
            State::Describing(About::Contexts(queries)) => Some(Step::Describe { name: queries.export.clone() }),
            State::Attaching(asked) => Some(Step::Attach { name: asked.name.clone() }),
            State::Securing => Some(Step::StartTls),
            State::Transmission { allocation } => {
                Some(Step::Transmission { style: self.style, allocation: *allocation })
            }
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
            (State::Skipping { option, .. }, Event::Skipped) if self.lacks_tls(option) => tls_required(option, out),
            (State::Skipping { option, .. }, Event::Skipped) => {
                let text = format!("at most {NBD_OPTION_BYTES_MAX} bytes of option data are accepted");
                put_option_reply(out, option, OptionReply::TooBig, text.as_bytes());
                State::Option
            }
            (State::Listing, Event::Listed(Ok(exports))) => list(&exports, out),
            (State::Listing, Event::Listed(Err(error))) => refuse(wire::OPTION_LIST, &error, out),
            (State::Describing(About::Info(asked)), Event::Described(Ok(export))) => {
                put_information(&asked, &export, self.features(&asked.name), out);
                State::Option
            }
            (State::Describing(About::Info(asked)), Event::Described(Err(error))) => refuse(asked.option, &error, out),
            (State::Describing(About::Contexts(queries)), Event::Described(Ok(_))) => {
                if queries.answer(out) {
                    self.allocation_of = Some(queries.export);
                }
                State::Option
            }
            (State::Describing(About::Contexts(queries)), Event::Described(Err(error))) => {
                refuse(queries.option, &error, out)
            }
            (State::Attaching(asked), Event::Attached(Ok(export))) => self.enter(&asked, &export, out),
            (State::Attaching(asked), Event::Attached(Err(error))) if asked.option == wire::OPTION_EXPORT_NAME => {
                return Err(Violation::ExportName { because: error.to_string() });
            }
            (State::Attaching(asked), Event::Attached(Err(error))) => refuse(asked.option, &error, out),
            (State::Securing, Event::Secured) => {
                self.secure = true;
                State::Option
            }
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

    fn haggle(&mut self, option: u32, data: &[u8], out: &mut BytesMut) -> Result<State, Violation> {
        // "This is the only valid option in nonfixed newstyle negotiation."
        if self.client & wire::CLIENT_FIXED_NEWSTYLE == 0 && option != wire::OPTION_EXPORT_NAME {
            return Err(Violation::NotFixed { option });
        }
        if option == wire::OPTION_EXPORT_NAME {
            return self.export_name(data);
        }
        // "The server MUST reply with NBD_REP_ACK." and "SHOULD ignore any data sent by the client".
        if option == wire::OPTION_ABORT {
            put_option_reply(out, option, OptionReply::Ack, b"");
            return Ok(State::Ended);
        }
        if self.stopping {
            put_option_reply(out, option, OptionReply::Shutdown, b"the server is shutting down");
            return Ok(State::Option);
        }
        if self.lacks_tls(option) {
            return Ok(tls_required(option, out));
        }
        Ok(match self.agree(option, data, out) {
            Ok(state) => state,
            Err((reply, because)) => {
                put_option_reply(out, option, reply, because.as_bytes());
                State::Option
            }
        })
    }

    /// What has no error reply.
    fn export_name(&self, data: &[u8]) -> Result<State, Violation> {
        let refused = |because: &str| Err(Violation::ExportName { because: because.into() });
        if self.stopping {
            return refused("the server is shutting down");
        }
        // "as this request cannot error, it MUST terminate the session"
        if self.lacks_tls(wire::OPTION_EXPORT_NAME) {
            return refused("TLS is required");
        }
        // "a client that has used NBD_OPT_EXTENDED_HEADERS to negotiate extended headers MUST NOT use this option"
        if self.style == Style::Extended {
            return refused("extended headers were agreed on, after which only GO ends the handshake");
        }
        let name = parse_name(data).map_err(|because| Violation::ExportName { because })?;
        Ok(State::Attaching(Asked { option: wire::OPTION_EXPORT_NAME, name, information: Vec::new() }))
    }

    /// What an option that may be answered leads to, or the error that it is answered with.
    fn agree(&mut self, option: u32, data: &[u8], out: &mut BytesMut) -> Result<State, (OptionReply, String)> {
        let invalid = |because: String| (OptionReply::Invalid, because);
        // "MUST NOT send any additional data with the option, and the server SHOULD reject a request that includes data
        // with NBD_REP_ERR_INVALID".
        let bare =
            [wire::OPTION_LIST, wire::OPTION_STARTTLS, wire::OPTION_STRUCTURED_REPLY, wire::OPTION_EXTENDED_HEADERS];
        if bare.contains(&option) && !data.is_empty() {
            return Err(invalid(format!("{} bytes of data with option {option}, which takes none", data.len())));
        }
        match option {
            wire::OPTION_LIST => Ok(State::Listing),
            wire::OPTION_INFO => {
                Asked::parse(option, data).map(|asked| State::Describing(About::Info(asked))).map_err(invalid)
            }
            wire::OPTION_GO => Asked::parse(option, data).map(State::Attaching).map_err(invalid),
            wire::OPTION_STARTTLS => self.start_tls(out),
            wire::OPTION_STRUCTURED_REPLY if self.style == Style::Extended => {
                // "The client has already successfully negotiated extended headers, which takes precedence".
                let because = "extended headers were agreed on already";
                Err((OptionReply::ExtendedHeadersRequired, because.into()))
            }
            wire::OPTION_STRUCTURED_REPLY | wire::OPTION_EXTENDED_HEADERS => {
                self.style = if option == wire::OPTION_EXTENDED_HEADERS { Style::Extended } else { Style::Structured };
                put_option_reply(out, option, OptionReply::Ack, b"");
                Ok(State::Option)
            }
            wire::OPTION_LIST_META_CONTEXT | wire::OPTION_SET_META_CONTEXT => {
                if option == wire::OPTION_SET_META_CONTEXT {
                    // "replaces all previously-set metadata contexts (including when this command fails)"
                    self.allocation_of = None;
                }
                // "MUST NOT be requested unless structured replies or extended headers have been negotiated first"
                if self.style == Style::Simple {
                    return Err(invalid("metadata contexts need structured replies or extended headers".into()));
                }
                Queries::parse(option, data).map(|queries| State::Describing(About::Contexts(queries))).map_err(invalid)
            }
            _ => Err((OptionReply::Unsupported, format!("option {option} is not known"))),
        }
    }

    fn start_tls(&mut self, out: &mut BytesMut) -> Result<State, (OptionReply, String)> {
        // "If the server receives NBD_OPT_STARTTLS when TLS has already been negotiated, it MUST reply with
        // NBD_REP_ERR_INVALID."
        if self.secure {
            return Err((OptionReply::Invalid, "this is TLS already".into()));
        }
        // "MUST respond with NBD_REP_ERR_POLICY (if it does not support TLS for policy reasons)"
        if self.tls == TlsMode::Off {
            return Err((OptionReply::Policy, "this server was started without TLS".into()));
        }
        put_option_reply(out, wire::OPTION_STARTTLS, OptionReply::Ack, b"");
        // "the server MUST NOT preserve any negotiation state […] issued before this command"
        self.style = Style::Simple;
        self.allocation_of = None;
        Ok(State::Securing)
    }

    /// "forces the client to upgrade by erroring any NBD options other than NBD_OPT_STARTTLS or NBD_OPT_ABORT".
    fn lacks_tls(&self, option: u32) -> bool {
        let exempt = [wire::OPTION_STARTTLS, wire::OPTION_ABORT].contains(&option);
        self.tls == TlsMode::Require && !self.secure && !exempt
    }

    fn features(&self, export: &str) -> Features {
        Features { style: self.style, allocation: self.allocation_of.as_deref() == Some(export) }
    }

    fn too_long(&self, option: u32, length: usize) -> Result<State, Violation> {
        if self.client & wire::CLIENT_FIXED_NEWSTYLE == 0 || option == wire::OPTION_EXPORT_NAME {
            let because = format!("{length} bytes of option data, at most {NBD_OPTION_BYTES_MAX} are accepted");
            return Err(Violation::ExportName { because });
        }
        Ok(State::Skipping { option, left: length })
    }

    fn enter(&self, asked: &Asked, export: &ExportInfo, out: &mut BytesMut) -> State {
        let features = self.features(&asked.name);
        if asked.option == wire::OPTION_EXPORT_NAME {
            let zeroes = self.client & wire::CLIENT_NO_ZEROES == 0;
            wire::put_export(out, export.size_bytes, features.transmission_flags(export.read_only), zeroes);
        } else {
            put_information(asked, export, features, out);
        }
        State::Transmission { allocation: features.allocation }
    }
}

pub(super) fn parse_name(bytes: &[u8]) -> Result<String, String> {
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

/// "a FORCEDTLS server MUST NOT send NBD_REP_INFO replies"
fn tls_required(option: u32, out: &mut BytesMut) -> State {
    put_option_reply(out, option, OptionReply::TlsRequired, b"this server talks only over TLS: send STARTTLS");
    State::Option
}

#[cfg(test)]
#[path = "handshake_tests.rs"]
mod tests;
