//! The transmission phase without I/O: bytes in, checked commands out. What is refused comes out as its answer, so
//! that who carries commands out has nothing left to check.

use crate::nbd::contexts::ALLOCATION_ID;
use crate::nbd::errors::Failure;
use crate::nbd::wire::{self, Cookie, Errno, Request, Style, Violation};
use bytes::{Buf, Bytes, BytesMut};
use torus_schema::limits::{BLOCK_BYTES, NBD_DISCARD_BYTES_MAX, NBD_PAYLOAD_BYTES_MAX, VOLUME_MAP_RUNS_MAX};

/// A request that may be carried out as it is: inside the device, allowed, of bounded payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    pub cookie: Cookie,
    pub offset: u64,
    pub action: Action,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// `whole`: in one chunk, holes as the zeros that they read as.
    Read {
        length: u64,
        whole: bool,
    },
    Write {
        data: Bytes,
        durable: bool,
    },
    /// `advisory`: a trim.
    Clear {
        length: u64,
        durable: bool,
        advisory: bool,
    },
    /// Zeros that are stored.
    Provision {
        length: u64,
        durable: bool,
    },
    /// `one`: nothing is told but the first run.
    Map {
        length: u64,
        one: bool,
    },
    Flush,
    /// Nothing to do but to say so: refused, or of length zero, or a hint.
    Answer(Result<(), Failure>),
}

/// Of a run in the longest reply to a block status request: extended headers.
const RUN_BYTES: u64 = 16;

impl Action {
    /// Bytes held until the command is answered: its payload or that of its reply.
    pub fn payload_bytes(&self) -> u64 {
        match self {
            Action::Read { length, .. } => *length,
            Action::Write { data, .. } => data.len() as u64,
            Action::Map { length, .. } => (length / BLOCK_BYTES + 2).min(VOLUME_MAP_RUNS_MAX) * RUN_BYTES,
            Action::Clear { .. } | Action::Provision { .. } | Action::Flush | Action::Answer(_) => 0,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    Command(Command),
    /// No command is complete before that many bytes are in the input.
    Receive(usize),
    Disconnect,
}

/// ```text
///   Request ──with payload──► Payload ──► Request
///      └──refused, with payload──► Discard ──► Request
/// ```
#[derive(Debug)]
enum State {
    Request,
    Payload(Request),
    Discard { request: Request, failure: Failure, left: usize },
}

/// What was agreed on when the transmission phase began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    pub size_bytes: u64,
    pub read_only: bool,
    pub style: Style,
    /// `base:allocation` may be asked for.
    pub allocation: bool,
}

pub struct Session {
    terms: Terms,
    stopping: bool,
    state: State,
}

impl Session {
    pub fn new(terms: Terms) -> Self {
        Self { terms, stopping: false, state: State::Request }
    }

    /// From now on every request but the disconnect is refused: "any subsequently received requests SHOULD be
    /// NBD_ESHUTDOWN".
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// The export has grown: what was beyond its end is not any more, for a client that has heard of it.
    pub fn grown(&mut self, size_bytes: u64) {
        self.terms.size_bytes = self.terms.size_bytes.max(size_bytes);
    }

    /// Consumes what it understands of the input; a payload is split off it, not copied.
    pub fn next_command(&mut self, input: &mut BytesMut) -> Result<Next, Violation> {
        loop {
            match std::mem::replace(&mut self.state, State::Request) {
                State::Request => {
                    let Some(request) = Request::parse(input, self.terms.style) else {
                        return Ok(Next::Receive(Request::header_bytes(self.terms.style)));
                    };
                    let request = request?;
                    input.advance(Request::header_bytes(self.terms.style));
                    if let Some(next) = self.begin(request)? {
                        return Ok(next);
                    }
                }
                State::Payload(request) => {
                    // Accepted payloads are bounded.
                    let length = request.length as usize;
                    if input.len() < length {
                        self.state = State::Payload(request);
                        return Ok(Next::Receive(length));
                    }
                    let payload = input.split_to(length).freeze();
                    let action = self.with_payload(&request, payload);
                    return Ok(next(&request, action));
                }
                State::Discard { request, failure, left } => {
                    let here = left.min(input.len());
                    input.advance(here);
                    if here < left {
                        self.state = State::Discard { request, failure, left: left - here };
                        return Ok(Next::Receive(1));
                    }
                    return Ok(next(&request, Err(failure)));
                }
            }
        }
    }

    /// What is complete with its header, or none and the state that awaits its payload.
    fn begin(&mut self, request: Request) -> Result<Option<Next>, Violation> {
        // "The server MUST handle all outstanding requests […] and close": whatever else the request holds.
        if request.command == wire::COMMAND_DISCONNECT {
            return Ok(Some(Next::Disconnect));
        }
        let payload_bytes = request.payload_bytes(self.terms.style);
        let checked = self.check(&request);
        if payload_bytes == 0 {
            return Ok(Some(next(&request, checked)));
        }
        self.state = match checked {
            Ok(_) => State::Payload(request),
            Err(failure) => {
                let limit = self.discarded_bytes_max();
                if payload_bytes > limit {
                    return Err(Violation::PayloadTooLong { found: payload_bytes, limit });
                }
                State::Discard { request, failure, left: payload_bytes as usize }
            }
        };
        Ok(None)
    }

    /// Compact: "MAY initiate a hard disconnect if a payload length […] would be large enough to be deemed a denial of
    /// service attack". Extended: "SHOULD initiate hard disconnect if a client sets the NBD_CMD_FLAG_PAYLOAD_LEN flag
    /// and uses a length larger than a server's advertised or default maximum payload length".
    fn discarded_bytes_max(&self) -> u64 {
        if self.terms.style == Style::Extended { NBD_PAYLOAD_BYTES_MAX } else { NBD_DISCARD_BYTES_MAX }
    }

    /// The action of a request, or why it is refused. What has a payload comes out without.
    fn check(&self, request: &Request) -> Result<Action, Failure> {
        let Request { flags, command, offset, length, .. } = *request;
        if self.stopping {
            return Err(Failure::new(Errno::Shutdown, "the server is shutting down"));
        }
        self.check_flags(command, flags)?;
        let writes = matches!(command, wire::COMMAND_WRITE | wire::COMMAND_TRIM | wire::COMMAND_WRITE_ZEROES);
        // "It SHOULD return NBD_EPERM if it receives a write or trim request on a read-only export."
        if writes && self.terms.read_only {
            return Err(Failure::new(Errno::Permission, "the export is read-only"));
        }
        let durable = flags & wire::FLAG_FUA != 0;
        match command {
            wire::COMMAND_FLUSH => check_flush(request),
            wire::COMMAND_BLOCK_STATUS if flags & wire::FLAG_PAYLOAD_LENGTH != 0 => check_status_payload(length),
            wire::COMMAND_BLOCK_STATUS => self.check_map(command, flags, offset, length),
            wire::COMMAND_READ | wire::COMMAND_WRITE => {
                self.check_transfer(request)?;
                Ok(match command {
                    // "The client SHOULD NOT request a read length of 0; […] the server SHOULD NOT disconnect":
                    // nothing is read, written or cleared, successfully.
                    _ if length == 0 => Action::Answer(Ok(())),
                    wire::COMMAND_READ => Action::Read { length, whole: flags & wire::FLAG_DO_NOT_FRAGMENT != 0 },
                    _ => Action::Write { data: Bytes::new(), durable },
                })
            }
            wire::COMMAND_TRIM | wire::COMMAND_WRITE_ZEROES | wire::COMMAND_CACHE => {
                self.check_inside(command, offset, length)?;
                match command {
                    // A cache request: "the server MAY use this information". There is no cache on the way to the
                    // data that it could fill: "there is no guarantee of an actual performance gain".
                    wire::COMMAND_CACHE => Ok(Action::Answer(Ok(()))),
                    _ if length == 0 => Ok(Action::Answer(Ok(()))),
                    wire::COMMAND_TRIM => Ok(Action::Clear { length, durable, advisory: true }),
                    _ => zeroes(flags, offset, length, durable),
                }
            }
            // "The server SHOULD return NBD_EINVAL if it receives an unknown command."
            _ => Err(Failure::new(Errno::Invalid, format!("command {command} is not known"))),
        }
    }

    /// "It also SHOULD return NBD_EINVAL if it receives a request with a flag not explicitly documented as applicable
    /// to the given request." FUA "is valid for all commands".
    fn check_flags(&self, command: u16, flags: u16) -> Result<(), Failure> {
        let extended = self.terms.style == Style::Extended;
        let mut allowed = wire::FLAG_FUA;
        match command {
            // "Clients MUST NOT set the NBD_CMD_FLAG_DF request flag unless this transmission flag is set."
            wire::COMMAND_READ if self.terms.style != Style::Simple => allowed |= wire::FLAG_DO_NOT_FRAGMENT,
            wire::COMMAND_WRITE if extended => allowed |= wire::FLAG_PAYLOAD_LENGTH,
            wire::COMMAND_WRITE_ZEROES => allowed |= wire::FLAG_NO_HOLE | wire::FLAG_FAST_ZERO,
            wire::COMMAND_BLOCK_STATUS => {
                allowed |= wire::FLAG_REQUEST_ONE;
                if extended && self.terms.allocation {
                    allowed |= wire::FLAG_PAYLOAD_LENGTH;
                }
            }
            _ => {}
        }
        if flags & !allowed != 0 {
            let text = format!("flags {flags:#x} for command {command}, allowed are {allowed:#x}");
            return Err(Failure::new(Errno::Invalid, text));
        }
        Ok(())
    }

    /// Of a read or write.
    fn check_transfer(&self, request: &Request) -> Result<(), Failure> {
        let Request { command, offset, length, .. } = *request;
        if length > NBD_PAYLOAD_BYTES_MAX {
            // Simple replies: "any client request with a length larger than the maximum payload size will fail".
            // Structured: "the server is also permitted to reject large read requests up front with NBD_EOVERFLOW".
            let chunks = self.terms.style != Style::Simple && command == wire::COMMAND_READ;
            let errno = if chunks { Errno::Overflow } else { Errno::Invalid };
            return Err(Failure::new(errno, format!("{length} bytes at once, at most {NBD_PAYLOAD_BYTES_MAX}")));
        }
        self.check_inside(command, offset, length)
    }

    /// "The server SHOULD return NBD_ENOSPC if it receives a write request including one or more sectors beyond the
    /// size of the device […] NBD_EINVAL if it receives a read or trim request" so; write zeroes is as write, the
    /// others are as read.
    fn check_inside(&self, command: u16, offset: u64, length: u64) -> Result<(), Failure> {
        let size = self.terms.size_bytes;
        if offset.checked_add(length).is_some_and(|end| end <= size) {
            return Ok(());
        }
        let errno = match command {
            wire::COMMAND_WRITE | wire::COMMAND_WRITE_ZEROES => Errno::NoSpace,
            _ => Errno::Invalid,
        };
        Err(Failure::new(errno, format!("{length} bytes at {offset} reach beyond the end at {size}")))
    }

    fn check_map(&self, command: u16, flags: u16, offset: u64, length: u64) -> Result<Action, Failure> {
        // "Servers SHOULD reply with NBD_EINVAL to clients sending NBD_CMD_BLOCK_STATUS without selecting at least one
        // metadata context."
        if !self.terms.allocation {
            return Err(Failure::new(Errno::Invalid, "no metadata context was selected for this export"));
        }
        self.check_inside(command, offset, length)?;
        if length == 0 {
            // There is no run that could be told: "each status descriptor has a non-zero length".
            return Err(Failure::new(Errno::Invalid, "the status of no bytes"));
        }
        Ok(Action::Map { length, one: flags & wire::FLAG_REQUEST_ONE != 0 })
    }

    /// A request whose header was accepted, and its payload.
    fn with_payload(&self, request: &Request, payload: Bytes) -> Result<Action, Failure> {
        if request.command == wire::COMMAND_WRITE {
            return Ok(Action::Write { data: payload, durable: request.flags & wire::FLAG_FUA != 0 });
        }
        let (length, contexts) =
            wire::parse_status_payload(&payload).map_err(|because| Failure::new(Errno::Invalid, because))?;
        // "detects duplicate or unknown metacontext ids in the client's payload […] NBD_EINVAL"
        if contexts != [ALLOCATION_ID] {
            let text = format!("contexts {contexts:?} are asked for, only {ALLOCATION_ID} was selected");
            return Err(Failure::new(Errno::Invalid, text));
        }
        self.check_map(request.command, request.flags, request.offset, length)
    }
}

fn next(request: &Request, action: Result<Action, Failure>) -> Next {
    let action = action.unwrap_or_else(|failure| Action::Answer(Err(failure)));
    Next::Command(Command { cookie: request.cookie, offset: request.offset, action })
}

/// "For a flush request, length and offset are reserved, and MUST be set to all-zero."
fn check_flush(request: &Request) -> Result<Action, Failure> {
    match (request.offset, request.length) {
        (0, 0) => Ok(Action::Flush),
        (offset, length) => Err(Failure::new(
            Errno::Invalid,
            format!("a flush of {length} bytes at {offset}; it is of the whole export"),
        )),
    }
}

/// "the server MUST gracefully consume the client's payload before failing with NBD_EINVAL": one that cannot be good
/// is not kept in memory for that.
fn check_status_payload(payload_bytes: u64) -> Result<Action, Failure> {
    const ONE_CONTEXT_BYTES: u64 = 12;
    match payload_bytes {
        ONE_CONTEXT_BYTES => Ok(Action::Answer(Ok(()))),
        found => {
            let text = format!("a block status payload of {found} bytes, {ONE_CONTEXT_BYTES} ask for one context");
            Err(Failure::new(Errno::Invalid, text))
        }
    }
}

/// "NBD_CMD_FLAG_NO_HOLE […] the area MUST be fully provisioned, ensuring that future writes to the same area will not
/// […] cause failure due to insufficient space": blocks that are stored can be replaced on a full cluster, holes cannot
/// be filled. NBD_CMD_FLAG_FAST_ZERO: "MUST fail quickly with NBD_ENOTSUP unless the request can be serviced in less time
/// than a corresponding NBD_CMD_WRITE". Whole blocks are cleared by a record without payload; edges cost what they cost
/// in a write.
fn zeroes(flags: u16, offset: u64, length: u64, durable: bool) -> Result<Action, Failure> {
    let provisioned = flags & wire::FLAG_NO_HOLE != 0;
    let covers_a_block = offset.next_multiple_of(BLOCK_BYTES) + BLOCK_BYTES <= offset + length;
    if flags & wire::FLAG_FAST_ZERO != 0 && (provisioned || !covers_a_block) {
        let text = "zeros that are stored, or of parts of blocks, are not faster than a write";
        return Err(Failure::new(Errno::NotSupported, text));
    }
    Ok(match provisioned {
        true => Action::Provision { length, durable },
        false => Action::Clear { length, durable, advisory: false },
    })
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
