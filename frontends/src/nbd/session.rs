//! The transmission phase without I/O: bytes in, checked commands out. What is refused comes out as its answer, so
//! that who carries commands out has nothing left to check.

use crate::device::VolumeError;
use crate::nbd::wire::{self, Cookie, Errno, Request, Violation};
use bytes::{Buf, Bytes, BytesMut};
use torus_schema::limits::{NBD_DISCARD_BYTES_MAX, NBD_PAYLOAD_BYTES_MAX};

/// A request that may be carried out as it is: inside the device, allowed, of bounded payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Read {
        cookie: Cookie,
        offset: u64,
        length: u64,
    },
    Write {
        cookie: Cookie,
        offset: u64,
        data: Bytes,
        durable: bool,
    },
    Clear {
        cookie: Cookie,
        offset: u64,
        length: u64,
        durable: bool,
        advisory: bool,
    },
    Flush {
        cookie: Cookie,
    },
    /// Nothing to do but to say so: refused, or of length zero.
    Answer {
        cookie: Cookie,
        error: Option<Errno>,
    },
    Disconnect,
}

impl Command {
    /// Bytes held until the command is answered: its payload or that of its reply.
    pub fn payload_bytes(&self) -> u64 {
        match self {
            Command::Read { length, .. } => *length,
            Command::Write { data, .. } => data.len() as u64,
            Command::Clear { .. } | Command::Flush { .. } | Command::Answer { .. } | Command::Disconnect => 0,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    Command(Command),
    /// No command is complete before that many bytes are in the input.
    Receive(usize),
}

/// ```text
///   Request ──write──► Payload ──► Request
///      └──refused write──► Discard ──► Request
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Request,
    Payload { cookie: Cookie, offset: u64, length: usize, durable: bool },
    Discard { cookie: Cookie, error: Errno, left: usize },
}

pub struct Session {
    size_bytes: u64,
    read_only: bool,
    stopping: bool,
    state: State,
}

impl Session {
    pub fn new(size_bytes: u64, read_only: bool) -> Self {
        Self { size_bytes, read_only, stopping: false, state: State::Request }
    }

    /// From now on every request but the disconnect is refused: "any subsequently received requests SHOULD be
    /// NBD_ESHUTDOWN".
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    /// Consumes what it understands of the input; a payload is split off it, not copied.
    pub fn next_command(&mut self, input: &mut BytesMut) -> Result<Next, Violation> {
        loop {
            match self.state {
                State::Request => {
                    let Some(bytes) = input.first_chunk::<{ wire::REQUEST_BYTES }>() else {
                        return Ok(Next::Receive(wire::REQUEST_BYTES));
                    };
                    let request = Request::parse(bytes)?;
                    input.advance(wire::REQUEST_BYTES);
                    if let Some(command) = self.begin(&request)? {
                        return Ok(Next::Command(command));
                    }
                }
                State::Payload { cookie, offset, length, durable } => {
                    if input.len() < length {
                        return Ok(Next::Receive(length));
                    }
                    self.state = State::Request;
                    if length == 0 {
                        return Ok(Next::Command(Command::Answer { cookie, error: None }));
                    }
                    let data = input.split_to(length).freeze();
                    return Ok(Next::Command(Command::Write { cookie, offset, data, durable }));
                }
                State::Discard { cookie, error, left } => {
                    let here = left.min(input.len());
                    input.advance(here);
                    if here < left {
                        self.state = State::Discard { cookie, error, left: left - here };
                        return Ok(Next::Receive(1));
                    }
                    self.state = State::Request;
                    return Ok(Next::Command(Command::Answer { cookie, error: Some(error) }));
                }
            }
        }
    }

    /// A command that is complete with its header, or none and the state that awaits its payload.
    fn begin(&mut self, request: &Request) -> Result<Option<Command>, Violation> {
        let checked = self.check(request);
        if request.command == wire::COMMAND_WRITE {
            self.state = match checked {
                Ok(_) => State::Payload {
                    cookie: request.cookie,
                    offset: request.offset,
                    length: request.length as usize,
                    durable: request.flags & wire::FLAG_FUA != 0,
                },
                Err(error) => {
                    // "MAY initiate a hard disconnect if a payload length […] would be large enough to be deemed a
                    // denial of service attack".
                    let (found, limit) = (request.length, NBD_DISCARD_BYTES_MAX);
                    if u64::from(found) > limit {
                        return Err(Violation::PayloadTooLong { found, limit });
                    }
                    State::Discard { cookie: request.cookie, error, left: found as usize }
                }
            };
            return Ok(None);
        }
        let cookie = request.cookie;
        Ok(Some(checked.unwrap_or_else(|error| Command::Answer { cookie, error: Some(error) })))
    }

    /// The command of a request, or why it is refused. A write's data is not there yet: it comes out empty.
    fn check(&self, request: &Request) -> Result<Command, Errno> {
        let Request { flags, command, cookie, offset, length } = *request;
        // "The server MUST handle all outstanding requests […] and close": whatever else the request holds.
        if command == wire::COMMAND_DISCONNECT {
            return Ok(Command::Disconnect);
        }
        if self.stopping {
            return Err(Errno::Shutdown);
        }
        check_flags(command, flags)?;
        let writes = matches!(command, wire::COMMAND_WRITE | wire::COMMAND_TRIM | wire::COMMAND_WRITE_ZEROES);
        // "It SHOULD return NBD_EPERM if it receives a write or trim request on a read-only export."
        if writes && self.read_only {
            return Err(Errno::Permission);
        }
        self.check_range(request)?;
        let durable = flags & wire::FLAG_FUA != 0;
        let length = u64::from(length);
        match command {
            // "The client SHOULD NOT request a […] length of 0; […] the server SHOULD NOT disconnect": nothing is
            // read, written or cleared, successfully.
            wire::COMMAND_READ | wire::COMMAND_TRIM | wire::COMMAND_WRITE_ZEROES if length == 0 => {
                Ok(Command::Answer { cookie, error: None })
            }
            wire::COMMAND_READ => Ok(Command::Read { cookie, offset, length }),
            wire::COMMAND_WRITE => Ok(Command::Write { cookie, offset, data: Bytes::new(), durable }),
            wire::COMMAND_TRIM => Ok(Command::Clear { cookie, offset, length, durable, advisory: true }),
            // NO_HOLE asks for space to be provisioned. In a log no place is kept for a later overwrite, zeros or
            // data: the promise that future writes do not run out of space holds as well, or as badly, with a hole.
            wire::COMMAND_WRITE_ZEROES => Ok(Command::Clear { cookie, offset, length, durable, advisory: false }),
            wire::COMMAND_FLUSH => Ok(Command::Flush { cookie }),
            // "The server SHOULD return NBD_EINVAL if it receives an unknown command."
            _ => Err(Errno::Invalid),
        }
    }

    fn check_range(&self, request: &Request) -> Result<(), Errno> {
        let Request { command, offset, length, .. } = *request;
        match command {
            // "For a flush request, length and offset are reserved, and MUST be set to all-zero."
            wire::COMMAND_FLUSH if offset != 0 || length != 0 => return Err(Errno::Invalid),
            // "the client MUST NOT request a length larger than the maximum payload size"
            wire::COMMAND_READ | wire::COMMAND_WRITE if u64::from(length) > NBD_PAYLOAD_BYTES_MAX => {
                return Err(Errno::Invalid);
            }
            _ => {}
        }
        let inside = offset.checked_add(u64::from(length)).is_some_and(|end| end <= self.size_bytes);
        if !inside { Err(beyond_the_end(command)) } else { Ok(()) }
    }
}

/// "It also SHOULD return NBD_EINVAL if it receives a request with a flag not explicitly documented as applicable to
/// the given request." FUA "is valid for all commands".
fn check_flags(command: u16, flags: u16) -> Result<(), Errno> {
    let allowed = match command {
        wire::COMMAND_WRITE_ZEROES => wire::FLAG_FUA | wire::FLAG_NO_HOLE,
        _ => wire::FLAG_FUA,
    };
    if flags & !allowed != 0 { Err(Errno::Invalid) } else { Ok(()) }
}

/// "The server SHOULD return NBD_ENOSPC if it receives a write request including one or more sectors beyond the size
/// of the device […] NBD_EINVAL if it receives a read or trim request" so; write zeroes is as write.
fn beyond_the_end(command: u16) -> Errno {
    match command {
        wire::COMMAND_WRITE | wire::COMMAND_WRITE_ZEROES => Errno::NoSpace,
        _ => Errno::Invalid,
    }
}

/// The one table from a volume's errors to NBD's. `writes`: the request was a write or write zeroes.
pub fn errno(error: &VolumeError, writes: bool) -> Errno {
    match error {
        VolumeError::NoSpace { .. } => Errno::NoSpace,
        VolumeError::ReadOnly => Errno::Permission,
        VolumeError::OutOfRange { .. } if writes => Errno::NoSpace,
        VolumeError::OutOfRange { .. } => Errno::Invalid,
        VolumeError::NotFound { .. }
        | VolumeError::Attached { .. }
        | VolumeError::SessionEnded { .. }
        | VolumeError::TimedOut { .. }
        | VolumeError::Unreadable { .. }
        | VolumeError::NotReady { .. }
        | VolumeError::Metadata { .. } => Errno::InputOutput,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: u64 = 1 << 20;
    const COOKIE: Cookie = Cookie(42);

    fn request(command: u16, flags: u16, offset: u64, length: u32) -> BytesMut {
        let mut out = BytesMut::new();
        Request { flags, command, cookie: COOKIE, offset, length }.put(&mut out);
        out
    }

    fn only_command(session: &mut Session, mut input: BytesMut) -> Command {
        let Ok(Next::Command(command)) = session.next_command(&mut input) else { panic!("no command") };
        assert_eq!(session.next_command(&mut input), Ok(Next::Receive(wire::REQUEST_BYTES)));
        assert!(input.is_empty());
        command
    }

    fn answer(error: Errno) -> Command {
        Command::Answer { cookie: COOKIE, error: Some(error) }
    }

    #[test]
    fn a_request_arrives_however_tcp_cuts_it() {
        let mut whole = request(wire::COMMAND_WRITE, wire::FLAG_FUA, 5, 3);
        whole.extend_from_slice(b"abc");
        whole.extend_from_slice(&request(wire::COMMAND_READ, 0, 7, 9));
        let expected = [
            Command::Write { cookie: COOKIE, offset: 5, data: Bytes::from_static(b"abc"), durable: true },
            Command::Read { cookie: COOKIE, offset: 7, length: 9 },
        ];
        for cut in 0..=whole.len() {
            let mut session = Session::new(SIZE, false);
            let mut found = Vec::new();
            let mut input = BytesMut::new();
            for part in [&whole[..cut], &whole[cut..]] {
                input.extend_from_slice(part);
                while let Next::Command(command) = session.next_command(&mut input).expect("good bytes") {
                    found.push(command);
                }
            }
            assert_eq!(found, expected, "cut at {cut}");
        }
    }

    #[test]
    fn each_good_request_becomes_its_command() {
        let mut session = Session::new(SIZE, false);
        let cookie = COOKIE;
        let clear = |durable, advisory| Command::Clear { cookie, offset: 0, length: SIZE, durable, advisory };
        let table = [
            ((wire::COMMAND_READ, 0, 4095, 1), Command::Read { cookie, offset: 4095, length: 1 }),
            ((wire::COMMAND_READ, wire::FLAG_FUA, 0, 1), Command::Read { cookie, offset: 0, length: 1 }),
            ((wire::COMMAND_READ, 0, SIZE, 0), Command::Answer { cookie, error: None }),
            ((wire::COMMAND_WRITE, 0, 0, 0), Command::Answer { cookie, error: None }),
            ((wire::COMMAND_TRIM, 0, 0, 0), Command::Answer { cookie, error: None }),
            ((wire::COMMAND_TRIM, 0, 0, SIZE as u32), clear(false, true)),
            ((wire::COMMAND_TRIM, wire::FLAG_FUA, 0, SIZE as u32), clear(true, true)),
            ((wire::COMMAND_WRITE_ZEROES, wire::FLAG_NO_HOLE, 0, SIZE as u32), clear(false, false)),
            ((wire::COMMAND_WRITE_ZEROES, wire::FLAG_FUA, 0, SIZE as u32), clear(true, false)),
            ((wire::COMMAND_FLUSH, wire::FLAG_FUA, 0, 0), Command::Flush { cookie }),
            ((wire::COMMAND_DISCONNECT, 0, 0, 0), Command::Disconnect),
        ];
        for ((command, flags, offset, length), expected) in table {
            assert_eq!(only_command(&mut session, request(command, flags, offset, length)), expected);
        }
    }

    #[test]
    fn each_bad_request_gets_the_error_of_the_specification_and_the_next_one_works() {
        let (mut writable, mut read_only) = (Session::new(SIZE, false), Session::new(SIZE, true));
        let huge = NBD_PAYLOAD_BYTES_MAX as u32 + 1;
        let table = [
            (false, wire::COMMAND_READ, 0, SIZE, 1, Errno::Invalid),
            (false, wire::COMMAND_READ, 0, u64::MAX, 1, Errno::Invalid),
            (false, wire::COMMAND_READ, 0, 0, huge, Errno::Invalid),
            (false, wire::COMMAND_READ, 1 << 2, 0, 1, Errno::Invalid),
            (false, wire::COMMAND_TRIM, 0, SIZE - 1, 2, Errno::Invalid),
            (false, wire::COMMAND_WRITE_ZEROES, 0, SIZE - 1, 2, Errno::NoSpace),
            (false, wire::COMMAND_WRITE_ZEROES, 1 << 4, 0, 2, Errno::Invalid),
            (false, wire::COMMAND_WRITE, 0, SIZE - 1, 2, Errno::NoSpace),
            (false, wire::COMMAND_WRITE, wire::FLAG_NO_HOLE, 0, 2, Errno::Invalid),
            (false, wire::COMMAND_WRITE, 0, 0, huge, Errno::Invalid),
            (false, wire::COMMAND_FLUSH, 0, 0, 1, Errno::Invalid),
            (false, wire::COMMAND_FLUSH, 0, 1, 0, Errno::Invalid),
            (false, 5, 0, 0, 0, Errno::Invalid),
            (false, 999, 0xffff, u64::MAX, u32::MAX, Errno::Invalid),
            (true, wire::COMMAND_WRITE, 0, 0, 2, Errno::Permission),
            (true, wire::COMMAND_TRIM, 0, 0, 2, Errno::Permission),
            (true, wire::COMMAND_WRITE_ZEROES, 0, 0, 2, Errno::Permission),
        ];
        for (is_read_only, command, flags, offset, length, error) in table {
            let session = if is_read_only { &mut read_only } else { &mut writable };
            let mut input = request(command, flags, offset, length);
            if command == wire::COMMAND_WRITE {
                input.resize(input.len() + length as usize, 0xee);
            }
            assert_eq!(only_command(session, input), answer(error), "{command} {flags} {offset} {length}");
            let good = only_command(session, request(wire::COMMAND_READ, 0, 0, 1));
            assert_eq!(good, Command::Read { cookie: COOKIE, offset: 0, length: 1 });
        }
    }

    #[test]
    fn a_write_too_long_even_to_be_thrown_away_ends_the_session() {
        let found = NBD_DISCARD_BYTES_MAX as u32 + 1;
        let mut input = request(wire::COMMAND_WRITE, 0, 0, found);
        let error = Session::new(SIZE, false).next_command(&mut input).expect_err("an attack");
        assert_eq!(error, Violation::PayloadTooLong { found, limit: NBD_DISCARD_BYTES_MAX });
    }

    #[test]
    fn a_stopping_session_refuses_what_comes_but_not_the_disconnect() {
        let mut session = Session::new(SIZE, false);
        session.stop();
        assert_eq!(only_command(&mut session, request(wire::COMMAND_READ, 0, 0, 1)), answer(Errno::Shutdown));
        let mut write = request(wire::COMMAND_WRITE, 0, 0, 1);
        write.extend_from_slice(b"x");
        assert_eq!(only_command(&mut session, write), answer(Errno::Shutdown));
        assert_eq!(only_command(&mut session, request(wire::COMMAND_DISCONNECT, 0, 0, 0)), Command::Disconnect);
    }

    #[test]
    fn errors_of_the_volume_have_their_number() {
        let range = VolumeError::OutOfRange { offset: 0, length: 1, size: 0 };
        assert_eq!(errno(&range, true), Errno::NoSpace);
        assert_eq!(errno(&range, false), Errno::Invalid);
        assert_eq!(errno(&VolumeError::ReadOnly, true), Errno::Permission);
        assert_eq!(errno(&VolumeError::NoSpace { shard: "a".into() }, true), Errno::NoSpace);
        assert_eq!(errno(&VolumeError::SessionEnded { because: "a".into() }, true), Errno::InputOutput);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_session_panic_or_ask_for_unbounded_memory(
            mut parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..20),
            magic_at in proptest::collection::vec(any::<bool>(), 20),
        ) {
            let mut session = Session::new(SIZE, false);
            let mut input = BytesMut::new();
            for (part, magic) in parts.iter_mut().zip(magic_at) {
                if magic && part.len() >= 8 {
                    part[..8].copy_from_slice(&[0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1]);
                }
                input.extend_from_slice(part);
                loop {
                    match session.next_command(&mut input) {
                        Ok(Next::Command(command)) => {
                            prop_assert!(command.payload_bytes() <= NBD_PAYLOAD_BYTES_MAX);
                        }
                        Ok(Next::Receive(wanted)) => {
                            prop_assert!(wanted as u64 <= NBD_PAYLOAD_BYTES_MAX && wanted > input.len());
                            break;
                        }
                        Err(_) => return Ok(()),
                    }
                }
            }
        }
    }
}
