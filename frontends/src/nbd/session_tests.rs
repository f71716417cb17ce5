//! Tests of the transmission phase: what a client sends, byte for byte, and what comes out.

use super::*;
use bytes::BufMut;
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;
const COOKIE: Cookie = Cookie(42);
const TERMS: Terms = Terms { size_bytes: SIZE, read_only: false, style: Style::Simple, allocation: false };

fn with(style: Style, allocation: bool) -> Session {
    Session::new(Terms { style, allocation, ..TERMS })
}

fn in_style(style: Style, command: u16, flags: u16, offset: u64, length: u64) -> BytesMut {
    let mut out = BytesMut::new();
    Request { flags, command, cookie: COOKIE, offset, length }.put(style, &mut out);
    out
}

fn request(command: u16, flags: u16, offset: u64, length: u32) -> BytesMut {
    in_style(Style::Simple, command, flags, offset, u64::from(length))
}

fn only_command(session: &mut Session, mut input: BytesMut) -> Action {
    let Ok(Next::Command(command)) = session.next_command(&mut input) else { panic!("no command") };
    let wanted = Request::header_bytes(session.terms.style);
    assert_eq!(session.next_command(&mut input), Ok(Next::Receive(wanted)));
    assert!(input.is_empty());
    assert_eq!(command.cookie, COOKIE);
    command.action
}

fn disconnects(session: &mut Session, mut input: BytesMut) -> bool {
    session.next_command(&mut input) == Ok(Next::Disconnect)
}

#[track_caller]
fn assert_refused(action: Action, errno: Errno, what: &str) {
    match action {
        Action::Answer(Err(failure)) => {
            assert_eq!(failure.errno, errno, "{what}");
            assert!(!failure.message.is_empty(), "{what}");
        }
        other => panic!("{what}: {other:?}"),
    }
}

const DONE: Action = Action::Answer(Ok(()));

#[test]
fn a_request_arrives_however_tcp_cuts_it() {
    let mut whole = request(wire::COMMAND_WRITE, wire::FLAG_FUA, 5, 3);
    whole.extend_from_slice(b"abc");
    whole.extend_from_slice(&request(wire::COMMAND_READ, 0, 7, 9));
    let expected = [
        (5, Action::Write { data: Bytes::from_static(b"abc"), durable: true }),
        (7, Action::Read { length: 9, whole: false }),
    ];
    for cut in 0..=whole.len() {
        let mut session = Session::new(TERMS);
        let mut found = Vec::new();
        let mut input = BytesMut::new();
        for part in [&whole[..cut], &whole[cut..]] {
            input.extend_from_slice(part);
            while let Next::Command(command) = session.next_command(&mut input).expect("good bytes") {
                found.push((command.offset, command.action));
            }
        }
        assert_eq!(found, expected, "cut at {cut}");
    }
}

#[test]
fn each_good_request_becomes_its_command() {
    let mut session = Session::new(TERMS);
    let clear = |durable, advisory| Action::Clear { length: SIZE, durable, advisory };
    let read = |length| Action::Read { length, whole: false };
    let table = [
        ((wire::COMMAND_READ, 0, 4095, 1), read(1)),
        ((wire::COMMAND_READ, wire::FLAG_FUA, 0, 1), read(1)),
        ((wire::COMMAND_READ, 0, SIZE, 0), DONE),
        ((wire::COMMAND_WRITE, 0, 0, 0), DONE),
        ((wire::COMMAND_TRIM, 0, 0, 0), DONE),
        ((wire::COMMAND_TRIM, 0, 0, SIZE as u32), clear(false, true)),
        ((wire::COMMAND_TRIM, wire::FLAG_FUA, 0, SIZE as u32), clear(true, true)),
        ((wire::COMMAND_WRITE_ZEROES, 0, 0, 0), DONE),
        ((wire::COMMAND_WRITE_ZEROES, wire::FLAG_FUA, 0, SIZE as u32), clear(true, false)),
        ((wire::COMMAND_WRITE_ZEROES, wire::FLAG_FAST_ZERO, 0, SIZE as u32), clear(false, false)),
        (
            (wire::COMMAND_WRITE_ZEROES, wire::FLAG_FAST_ZERO, 1, 8191),
            Action::Clear { length: 8191, durable: false, advisory: false },
        ),
        (
            (wire::COMMAND_WRITE_ZEROES, wire::FLAG_NO_HOLE | wire::FLAG_FUA, 7, 9),
            Action::Provision { length: 9, durable: true },
        ),
        ((wire::COMMAND_FLUSH, wire::FLAG_FUA, 0, 0), Action::Flush),
        ((wire::COMMAND_CACHE, 0, 0, SIZE as u32), DONE),
        ((wire::COMMAND_CACHE, wire::FLAG_FUA, 0, 0), DONE),
    ];
    for ((command, flags, offset, length), expected) in table {
        assert_eq!(only_command(&mut session, request(command, flags, offset, length)), expected);
    }
    assert!(disconnects(&mut session, request(wire::COMMAND_DISCONNECT, 0, 0, 0)));
}

#[test]
fn each_bad_request_gets_the_error_of_the_specification_and_the_next_one_works() {
    let mut writable = Session::new(TERMS);
    let mut read_only = Session::new(Terms { read_only: true, ..TERMS });
    let huge = NBD_PAYLOAD_BYTES_MAX as u32 + 1;
    let table = [
        (false, wire::COMMAND_READ, 0, SIZE, 1, Errno::Invalid),
        (false, wire::COMMAND_READ, 0, u64::MAX, 1, Errno::Invalid),
        (false, wire::COMMAND_READ, 0, 0, huge, Errno::Invalid),
        (false, wire::COMMAND_READ, wire::FLAG_DO_NOT_FRAGMENT, 0, 1, Errno::Invalid),
        (false, wire::COMMAND_READ, wire::FLAG_PAYLOAD_LENGTH, 0, 1, Errno::Invalid),
        (false, wire::COMMAND_TRIM, 0, SIZE - 1, 2, Errno::Invalid),
        (false, wire::COMMAND_TRIM, wire::FLAG_NO_HOLE, 0, 2, Errno::Invalid),
        (false, wire::COMMAND_CACHE, 0, SIZE - 1, 2, Errno::Invalid),
        (false, wire::COMMAND_CACHE, wire::FLAG_NO_HOLE, 0, 2, Errno::Invalid),
        (false, wire::COMMAND_WRITE_ZEROES, 0, SIZE - 1, 2, Errno::NoSpace),
        (false, wire::COMMAND_WRITE_ZEROES, 1 << 6, 0, 2, Errno::Invalid),
        (false, wire::COMMAND_WRITE_ZEROES, wire::FLAG_FAST_ZERO, 1, 8190, Errno::NotSupported),
        (false, wire::COMMAND_WRITE_ZEROES, wire::FLAG_FAST_ZERO | wire::FLAG_NO_HOLE, 0, 8192, Errno::NotSupported),
        (false, wire::COMMAND_WRITE, 0, SIZE - 1, 2, Errno::NoSpace),
        (false, wire::COMMAND_WRITE, wire::FLAG_NO_HOLE, 0, 2, Errno::Invalid),
        (false, wire::COMMAND_WRITE, 0, 0, huge, Errno::Invalid),
        (false, wire::COMMAND_FLUSH, 0, 0, 1, Errno::Invalid),
        (false, wire::COMMAND_FLUSH, 0, 1, 0, Errno::Invalid),
        (false, wire::COMMAND_BLOCK_STATUS, 0, 0, 1, Errno::Invalid),
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
        assert_refused(only_command(session, input), error, &format!("{command} {flags} {offset} {length}"));
        let good = only_command(session, request(wire::COMMAND_READ, 0, 0, 1));
        assert_eq!(good, Action::Read { length: 1, whole: false });
    }
}

#[test]
fn replies_in_chunks_allow_whole_reads_and_the_status_of_blocks() {
    for style in [Style::Structured, Style::Extended] {
        let mut session = with(style, true);
        let mut act = |command, flags, length| only_command(&mut session, in_style(style, command, flags, 0, length));
        let whole = act(wire::COMMAND_READ, wire::FLAG_DO_NOT_FRAGMENT, 1);
        assert_eq!(whole, Action::Read { length: 1, whole: true });
        assert_eq!(act(wire::COMMAND_BLOCK_STATUS, 0, SIZE), Action::Map { length: SIZE, one: false });
        assert_eq!(act(wire::COMMAND_BLOCK_STATUS, wire::FLAG_REQUEST_ONE, 7), Action::Map { length: 7, one: true });
        assert_refused(act(wire::COMMAND_BLOCK_STATUS, 0, SIZE + 1), Errno::Invalid, "beyond the end");
        assert_refused(act(wire::COMMAND_BLOCK_STATUS, 0, 0), Errno::Invalid, "of nothing");
        assert_refused(act(wire::COMMAND_BLOCK_STATUS, wire::FLAG_NO_HOLE, 7), Errno::Invalid, "another's flag");
        assert_refused(act(wire::COMMAND_READ, 0, NBD_PAYLOAD_BYTES_MAX + 1), Errno::Overflow, "too long");
        let mut unselected = with(style, false);
        let asked = in_style(style, wire::COMMAND_BLOCK_STATUS, 0, 0, 512);
        assert_refused(only_command(&mut unselected, asked), Errno::Invalid, "no context was selected");
    }
}

#[test]
fn extended_headers_carry_long_lengths_and_say_what_has_a_payload() {
    const HUGE: u64 = 5 << 30;
    let style = Style::Extended;
    let mut session = Session::new(Terms { size_bytes: HUGE, style, allocation: true, ..TERMS });
    let trim = only_command(&mut session, in_style(style, wire::COMMAND_TRIM, 0, 0, HUGE));
    assert_eq!(trim, Action::Clear { length: HUGE, durable: false, advisory: true });
    let mut write = in_style(style, wire::COMMAND_WRITE, wire::FLAG_PAYLOAD_LENGTH | wire::FLAG_FUA, 0, 3);
    write.put_slice(b"abc");
    let written = Action::Write { data: Bytes::from_static(b"abc"), durable: true };
    assert_eq!(only_command(&mut session, write), written.clone());
    let mut unflagged = in_style(style, wire::COMMAND_WRITE, wire::FLAG_FUA, 0, 3);
    unflagged.put_slice(b"abc");
    assert_eq!(only_command(&mut session, unflagged), written, "as QEMU sends it");
    for command in [wire::COMMAND_READ, wire::COMMAND_TRIM, wire::COMMAND_FLUSH, 999] {
        let mut with_payload = in_style(style, command, wire::FLAG_PAYLOAD_LENGTH, 0, 4096);
        with_payload.put_bytes(0xee, 4096);
        assert_refused(only_command(&mut session, with_payload), Errno::Invalid, "a payload too many");
    }
    let mut overlong = in_style(style, wire::COMMAND_READ, wire::FLAG_PAYLOAD_LENGTH, 0, NBD_PAYLOAD_BYTES_MAX + 1);
    let error = session.next_command(&mut overlong).expect_err("a hard disconnect");
    let (found, limit) = (NBD_PAYLOAD_BYTES_MAX + 1, NBD_PAYLOAD_BYTES_MAX);
    assert_eq!(error, Violation::PayloadTooLong { found, limit });
}

#[test]
fn a_status_payload_selects_among_the_contexts_that_were_agreed_on() {
    let style = Style::Extended;
    let mut session = with(style, true);
    let mut asked = |flags, payload: &[u8]| {
        let flags = flags | wire::FLAG_PAYLOAD_LENGTH;
        let mut input = in_style(style, wire::COMMAND_BLOCK_STATUS, flags, 0, payload.len() as u64);
        input.put_slice(payload);
        only_command(&mut session, input)
    };
    let of = |length: u64, contexts: &[u32]| {
        let mut payload = length.to_be_bytes().to_vec();
        contexts.iter().for_each(|context| payload.put_u32(*context));
        payload
    };
    assert_eq!(asked(0, &of(SIZE, &[ALLOCATION_ID])), Action::Map { length: SIZE, one: false });
    let one = asked(wire::FLAG_REQUEST_ONE, &of(1, &[ALLOCATION_ID]));
    assert_eq!(one, Action::Map { length: 1, one: true });
    for (what, payload) in [
        ("beyond the end", of(SIZE + 1, &[ALLOCATION_ID])),
        ("of nothing", of(0, &[ALLOCATION_ID])),
        ("no context", of(1, &[])),
        ("an unknown one", of(1, &[ALLOCATION_ID + 1])),
        ("one twice", of(1, &[ALLOCATION_ID, ALLOCATION_ID])),
        ("half a length", vec![0; 4]),
        ("longer than any can be", vec![0; 1 << 20]),
    ] {
        assert_refused(asked(0, &payload), Errno::Invalid, what);
    }
}

#[test]
fn what_lies_within_a_grown_export_is_no_longer_beyond_its_end() {
    let mut session = Session::new(TERMS);
    let read = || request(wire::COMMAND_READ, 0, SIZE, 1);
    assert_refused(only_command(&mut session, read()), Errno::Invalid, "beyond the end");
    session.grown(SIZE + 1);
    session.grown(SIZE);
    assert_eq!(only_command(&mut session, read()), Action::Read { length: 1, whole: false });
}

#[test]
fn a_write_too_long_even_to_be_thrown_away_ends_the_session() {
    let found = NBD_DISCARD_BYTES_MAX + 1;
    let mut input = request(wire::COMMAND_WRITE, 0, 0, found as u32);
    let error = Session::new(TERMS).next_command(&mut input).expect_err("an attack");
    assert_eq!(error, Violation::PayloadTooLong { found, limit: NBD_DISCARD_BYTES_MAX });
}

#[test]
fn a_stopping_session_refuses_what_comes_but_not_the_disconnect() {
    let mut session = Session::new(TERMS);
    session.stop();
    assert_refused(only_command(&mut session, request(wire::COMMAND_READ, 0, 0, 1)), Errno::Shutdown, "read");
    let mut write = request(wire::COMMAND_WRITE, 0, 0, 1);
    write.extend_from_slice(b"x");
    assert_refused(only_command(&mut session, write), Errno::Shutdown, "write");
    assert!(disconnects(&mut session, request(wire::COMMAND_DISCONNECT, 0, 0, 0)));
}

proptest! {
    #[test]
    fn no_bytes_make_the_session_panic_or_ask_for_unbounded_memory(
        mut parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 0..20),
        magic_at in proptest::collection::vec(any::<bool>(), 20),
        style in prop_oneof![Just(Style::Simple), Just(Style::Structured), Just(Style::Extended)],
        allocation in any::<bool>(),
    ) {
        let mut session = with(style, allocation);
        let mut input = BytesMut::new();
        for (part, magic) in parts.iter_mut().zip(magic_at) {
            if magic && part.len() >= 8 {
                // A good header's beginning, and a command that there is.
                let (flags, command) = (part[5] & 0x3f, part[7] % 9);
                let start = if style == Style::Extended { 0x21e4_1c71_u32 } else { 0x2560_9513 };
                part[..4].copy_from_slice(&start.to_be_bytes());
                part[4..8].copy_from_slice(&[0, flags, 0, command]);
            }
            input.extend_from_slice(part);
            loop {
                match session.next_command(&mut input) {
                    Ok(Next::Command(command)) => {
                        prop_assert!(command.action.payload_bytes() <= NBD_PAYLOAD_BYTES_MAX);
                    }
                    Ok(Next::Receive(wanted)) => {
                        prop_assert!(wanted as u64 <= NBD_PAYLOAD_BYTES_MAX && wanted > input.len());
                        break;
                    }
                    Ok(Next::Disconnect) | Err(_) => return Ok(()),
                }
            }
        }
    }
}
