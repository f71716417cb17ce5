//! Tests of the handshake: what a client sends, byte for byte, and what it gets.

use super::*;
use bytes::BufMut;
use proptest::prelude::*;

const FIXED: u32 = wire::CLIENT_FIXED_NEWSTYLE | wire::CLIENT_NO_ZEROES;

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.put_u32(number);
    bytes.put_u32(data.len() as u32);
    bytes.extend_from_slice(data);
    bytes
}

fn info(number: u32, name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(name.len() as u32);
    data.put_slice(name.as_bytes());
    data.put_u16(wanted.len() as u16);
    wanted.iter().for_each(|kind| data.put_u16(*kind));
    option(number, &data)
}

fn contexts(number: u32, export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = Vec::new();
    data.put_u32(export.len() as u32);
    data.put_slice(export.as_bytes());
    data.put_u32(queries.len() as u32);
    for query in queries {
        data.put_u32(query.len() as u32);
        data.put_slice(query.as_bytes());
    }
    option(number, &data)
}

fn export(name: &str, read_only: bool) -> ExportInfo {
    ExportInfo { name: name.into(), size_bytes: 1 << 30, read_only, description: "a disk".into() }
}

fn missing(name: &str) -> VolumeError {
    VolumeError::NotFound { name: name.into() }
}

/// A client that has sent its flags, and the server it talks to.
struct Talk {
    handshake: Handshake,
    input: BytesMut,
    out: BytesMut,
}

impl Talk {
    fn begin(flags: u32) -> Self {
        Self::with_tls(TlsMode::Off, flags)
    }

    fn with_tls(tls: TlsMode, flags: u32) -> Self {
        let mut out = BytesMut::new();
        let handshake = Handshake::start(tls, &mut out);
        out.clear();
        let mut talk = Self { handshake, input: BytesMut::new(), out };
        talk.input.put_u32(flags);
        talk
    }

    fn send(&mut self, bytes: &[u8]) -> Result<Step, Violation> {
        self.input.extend_from_slice(bytes);
        self.handshake.next(&mut self.input, &mut self.out)
    }

    /// The replies so far: option, type, data.
    fn replies(&mut self) -> Vec<(u32, u32, Vec<u8>)> {
        let mut replies = Vec::new();
        while !self.out.is_empty() {
            assert_eq!(self.out.get_u64(), 0x0003_e889_0455_65a9);
            let (option, kind, length) = (self.out.get_u32(), self.out.get_u32(), self.out.get_u32());
            replies.push((option, kind, self.out.split_to(length as usize).to_vec()));
        }
        replies
    }

    /// Of an option that is answered at once.
    fn answer(&mut self, bytes: &[u8]) -> Vec<u32> {
        assert_eq!(self.send(bytes), Ok(Step::Receive(16)));
        self.kinds()
    }

    /// Selects or lists contexts of an export that exists.
    fn contexts(&mut self, number: u32, export_name: &str, queries: &[&str]) -> Vec<u32> {
        let step = self.send(&contexts(number, export_name, queries));
        assert_eq!(step, Ok(Step::Describe { name: export_name.into() }));
        self.handshake.described(Ok(export(export_name, false)), &mut self.out).expect("asked for");
        self.kinds()
    }

    /// Enters the transmission phase: transmission flags, and the step.
    fn go(&mut self, name: &str) -> (u16, Step) {
        self.send(&info(wire::OPTION_GO, name, &[])).expect("a good option");
        self.handshake.attached(Ok(export(name, false)), &mut self.out).expect("asked for");
        let flags = &self.replies()[0].2[10..];
        (u16::from_be_bytes([flags[0], flags[1]]), self.send(b"").expect("a step"))
    }

    fn kinds(&mut self) -> Vec<u32> {
        self.replies().into_iter().map(|(_, kind, _)| kind).collect()
    }
}

const ACK: u32 = OptionReply::Ack as u32;
const INFO: u32 = OptionReply::Info as u32;
const CONTEXT: u32 = OptionReply::MetaContext as u32;
const POLICY: u32 = OptionReply::Policy as u32;
const TLS_REQUIRED: u32 = OptionReply::TlsRequired as u32;
const EXTENDED_REQUIRED: u32 = OptionReply::ExtendedHeadersRequired as u32;
const SIMPLE: Step = Step::Transmission { style: Style::Simple, allocation: false };
const UNSUPPORTED: u32 = OptionReply::Unsupported as u32;
const INVALID: u32 = OptionReply::Invalid as u32;
const UNKNOWN: u32 = OptionReply::Unknown as u32;
const TOO_BIG: u32 = OptionReply::TooBig as u32;
const SHUTDOWN: u32 = OptionReply::Shutdown as u32;

#[test]
fn a_go_arrives_however_tcp_cuts_it() {
    let whole = info(wire::OPTION_GO, "disk", &[wire::INFO_BLOCK_SIZE]);
    for cut in 0..whole.len() {
        let mut talk = Talk::begin(FIXED);
        assert!(matches!(talk.send(&whole[..cut]), Ok(Step::Receive(wanted)) if wanted > cut), "cut at {cut}");
        assert_eq!(talk.send(&whole[cut..]), Ok(Step::Attach { name: "disk".into() }));
    }
}

#[test]
fn go_gives_what_was_asked_for_and_then_requests_follow() {
    let mut talk = Talk::begin(FIXED);
    let wanted = [wire::INFO_NAME, wire::INFO_DESCRIPTION, wire::INFO_BLOCK_SIZE, 777];
    talk.send(&info(wire::OPTION_GO, "disk", &wanted)).expect("a good option");
    talk.handshake.attached(Ok(export("disk", false)), &mut talk.out).expect("asked for");
    let replies = talk.replies();
    let data: Vec<&[u8]> = replies.iter().map(|(_, _, data)| &data[..]).collect();
    assert!(replies.iter().all(|(option, _, _)| *option == wire::OPTION_GO));
    assert_eq!(replies.iter().map(|(_, kind, _)| *kind).collect::<Vec<_>>(), [INFO, INFO, INFO, INFO, ACK]);
    assert_eq!(data[0], [0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0x0d, 0x6d]);
    assert_eq!(data[1], b"\0\x01disk");
    assert_eq!(data[2], b"\0\x02a disk");
    assert_eq!(data[3], [0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0]);
    assert_eq!(talk.send(b""), Ok(SIMPLE));
}

#[test]
fn info_attaches_nothing_and_tells_no_more_than_was_asked_for() {
    let mut talk = Talk::begin(FIXED);
    let step = talk.send(&info(wire::OPTION_INFO, "disk", &[]));
    assert_eq!(step, Ok(Step::Describe { name: "disk".into() }));
    talk.handshake.described(Ok(export("disk", true)), &mut talk.out).expect("asked for");
    let replies = talk.replies();
    assert_eq!(replies.len(), 2);
    assert_eq!(replies[0].2[10..], [0x05, 0x0f], "flags of a read-only export");
    assert_eq!(talk.send(b""), Ok(Step::Receive(16)));
}

#[test]
fn an_export_that_cannot_be_had_is_refused_with_the_reason_and_haggling_goes_on() {
    for number in [wire::OPTION_INFO, wire::OPTION_GO] {
        let mut talk = Talk::begin(FIXED);
        talk.send(&info(number, "gone", &[])).expect("a good option");
        match number {
            wire::OPTION_INFO => talk.handshake.described(Err(missing("gone")), &mut talk.out),
            _ => talk.handshake.attached(Err(missing("gone")), &mut talk.out),
        }
        .expect("an error is replied");
        let text = missing("gone").to_string().into_bytes();
        assert_eq!(talk.replies(), [(number, UNKNOWN, text)]);
        assert_eq!(talk.send(&option(wire::OPTION_ABORT, b"ignored")), Ok(Step::End));
        assert_eq!(talk.kinds(), [ACK]);
    }
}

#[test]
fn the_list_names_every_export() {
    let mut talk = Talk::begin(FIXED);
    assert_eq!(talk.send(&option(wire::OPTION_LIST, b"")), Ok(Step::List));
    talk.handshake.listed(Ok(vec![export("a", false), export("b", true)]), &mut talk.out).expect("asked for");
    let server = OptionReply::Server as u32;
    let data = |name: &[u8]| [b"\0\0\0\x01", name, b"a disk"].concat();
    let expected = [(3, server, data(b"a")), (3, server, data(b"b")), (3, ACK, Vec::new())];
    assert_eq!(talk.replies(), expected);
}

#[test]
fn export_name_enters_at_once_or_ends_the_session() {
    for (flags, length) in [(0, 134), (wire::CLIENT_FIXED_NEWSTYLE, 134), (FIXED, 10)] {
        let mut talk = Talk::begin(flags);
        let step = talk.send(&option(wire::OPTION_EXPORT_NAME, b"disk"));
        assert_eq!(step, Ok(Step::Attach { name: "disk".into() }));
        talk.handshake.attached(Ok(export("disk", false)), &mut talk.out).expect("asked for");
        assert_eq!(talk.out.len(), length);
        assert_eq!(talk.send(b""), Ok(SIMPLE));
    }
    let mut talk = Talk::begin(FIXED);
    talk.send(&option(wire::OPTION_EXPORT_NAME, b"gone")).expect("a good option");
    let because = missing("gone").to_string();
    let error = talk.handshake.attached(Err(missing("gone")), &mut talk.out).expect_err("no reply is possible");
    assert_eq!(error, Violation::ExportName { because });
}

#[test]
fn each_bad_option_gets_its_error_and_the_next_one_works() {
    let long = vec![0; NBD_OPTION_BYTES_MAX as usize + 1];
    let long_name = info(wire::OPTION_GO, &"n".repeat(NBD_NAME_BYTES_MAX + 1), &[]);
    let table = [
        (option(4, b""), UNSUPPORTED),
        (option(wire::OPTION_STARTTLS, b""), POLICY),
        (option(wire::OPTION_STARTTLS, b"x"), INVALID),
        (option(wire::OPTION_STRUCTURED_REPLY, b"x"), INVALID),
        (option(wire::OPTION_EXTENDED_HEADERS, b"x"), INVALID),
        (contexts(wire::OPTION_LIST_META_CONTEXT, "disk", &[]), INVALID),
        (contexts(wire::OPTION_SET_META_CONTEXT, "disk", &[]), INVALID),
        (option(12, b"some data"), UNSUPPORTED),
        (option(u32::MAX, b"some data"), UNSUPPORTED),
        (option(77, &long), TOO_BIG),
        (option(wire::OPTION_GO, &long), TOO_BIG),
        (option(wire::OPTION_LIST, b"x"), INVALID),
        (option(wire::OPTION_GO, b""), INVALID),
        (option(wire::OPTION_INFO, b"\0\0\0\x09abc\0\0"), INVALID),
        (option(wire::OPTION_GO, b"\0\0\0\x01\xff\0\0"), INVALID),
        (long_name, INVALID),
    ];
    let mut talk = Talk::begin(FIXED);
    for (bytes, expected) in table {
        assert_eq!(talk.send(&bytes), Ok(Step::Receive(16)));
        assert_eq!(talk.kinds(), [expected], "{:?}", &bytes[..16]);
        assert_eq!(talk.send(&option(wire::OPTION_LIST, b"")), Ok(Step::List));
        talk.handshake.listed(Ok(Vec::new()), &mut talk.out).expect("asked for");
        assert_eq!(talk.kinds(), [ACK]);
    }
}

#[test]
fn each_style_is_entered_by_its_option_and_advertised() {
    use wire::{EXPORT_BLOCK_STATUS_PAYLOAD, EXPORT_SEND_DF};
    let (structured, extended) = (wire::OPTION_STRUCTURED_REPLY, wire::OPTION_EXTENDED_HEADERS);
    let table: [(&[u32], Style, u16); 4] = [
        (&[], Style::Simple, 0),
        (&[structured], Style::Structured, EXPORT_SEND_DF),
        (&[extended, extended], Style::Extended, EXPORT_SEND_DF | EXPORT_BLOCK_STATUS_PAYLOAD),
        (&[structured, structured, extended], Style::Extended, EXPORT_SEND_DF | EXPORT_BLOCK_STATUS_PAYLOAD),
    ];
    for (options, style, expected) in table {
        for allocation in [false, style != Style::Simple] {
            let mut talk = Talk::begin(FIXED);
            for number in options {
                assert_eq!(talk.answer(&option(*number, b"")), [ACK]);
            }
            if allocation {
                let set = talk.contexts(wire::OPTION_SET_META_CONTEXT, "disk", &["base:allocation"]);
                assert_eq!(set, [CONTEXT, ACK]);
            }
            let (flags, step) = talk.go("disk");
            let expected = if allocation { expected } else { expected & EXPORT_SEND_DF };
            assert_eq!(flags & (EXPORT_SEND_DF | EXPORT_BLOCK_STATUS_PAYLOAD), expected, "{options:?}");
            assert_eq!(step, Step::Transmission { style, allocation });
        }
    }
}

#[test]
fn after_extended_headers_nothing_less_is_agreed_on() {
    let mut talk = Talk::begin(FIXED);
    assert_eq!(talk.answer(&option(wire::OPTION_EXTENDED_HEADERS, b"")), [ACK]);
    assert_eq!(talk.answer(&option(wire::OPTION_STRUCTURED_REPLY, b"")), [EXTENDED_REQUIRED]);
    let error = talk.send(&option(wire::OPTION_EXPORT_NAME, b"disk"));
    assert!(matches!(error, Err(Violation::ExportName { .. })), "{error:?}");
}

#[test]
fn a_context_holds_for_the_export_it_was_last_set_for() {
    let set = wire::OPTION_SET_META_CONTEXT;
    let allocation = &["base:allocation"][..];
    type Settings<'a> = &'a [(u32, &'a str, &'a [&'a str])];
    let table: [(Settings<'_>, bool); 6] = [
        (&[(set, "disk", allocation)], true),
        (&[(set, "other", allocation)], false),
        (&[(set, "disk", allocation), (set, "other", allocation)], false),
        (&[(set, "disk", allocation), (set, "disk", &[])], false),
        (&[(set, "disk", allocation), (wire::OPTION_LIST_META_CONTEXT, "other", allocation)], true),
        (&[(wire::OPTION_LIST_META_CONTEXT, "disk", allocation)], false),
    ];
    for (settings, expected) in table {
        let mut talk = Talk::begin(FIXED);
        talk.answer(&option(wire::OPTION_STRUCTURED_REPLY, b""));
        for (number, name, queries) in settings {
            talk.contexts(*number, name, queries);
        }
        let (_, step) = talk.go("disk");
        assert_eq!(step, Step::Transmission { style: Style::Structured, allocation: expected }, "{settings:?}");
    }
}

#[test]
fn a_set_that_fails_unselects_too() {
    let failing = [
        contexts(wire::OPTION_SET_META_CONTEXT, "disk", &["no namespace"]),
        option(wire::OPTION_SET_META_CONTEXT, b"too short"),
        contexts(wire::OPTION_SET_META_CONTEXT, "gone", &["base:allocation"]),
    ];
    for bytes in failing {
        let mut talk = Talk::begin(FIXED);
        talk.answer(&option(wire::OPTION_STRUCTURED_REPLY, b""));
        talk.contexts(wire::OPTION_SET_META_CONTEXT, "disk", &["base:allocation"]);
        match talk.send(&bytes) {
            Ok(Step::Describe { name }) => {
                talk.handshake.described(Err(missing(&name)), &mut talk.out).expect("an error is replied");
                assert_eq!(talk.kinds(), [UNKNOWN]);
            }
            step => {
                assert_eq!(step, Ok(Step::Receive(16)));
                assert_eq!(talk.kinds(), [INVALID]);
            }
        }
        let (_, step) = talk.go("disk");
        assert_eq!(step, Step::Transmission { style: Style::Structured, allocation: false });
    }
}

#[test]
fn tls_forgets_what_was_agreed_on_before_it() {
    for mode in [TlsMode::Allow, TlsMode::Require] {
        let mut talk = Talk::with_tls(mode, FIXED);
        if mode == TlsMode::Allow {
            talk.answer(&option(wire::OPTION_STRUCTURED_REPLY, b""));
            talk.contexts(wire::OPTION_SET_META_CONTEXT, "disk", &["base:allocation"]);
        }
        assert_eq!(talk.send(&option(wire::OPTION_STARTTLS, b"")), Ok(Step::StartTls));
        assert_eq!(talk.kinds(), [ACK]);
        talk.handshake.secured(&mut talk.out).expect("asked for");
        assert_eq!(talk.answer(&option(wire::OPTION_STARTTLS, b"")), [INVALID], "twice");
        assert_eq!(talk.go("disk").1, SIMPLE);
    }
}

#[test]
fn where_tls_is_required_nothing_else_is_talked_about_first() {
    let mut talk = Talk::with_tls(TlsMode::Require, FIXED);
    let long = vec![0; NBD_OPTION_BYTES_MAX as usize + 1];
    for bytes in [
        option(wire::OPTION_LIST, b""),
        info(wire::OPTION_INFO, "disk", &[]),
        info(wire::OPTION_GO, "disk", &[]),
        option(wire::OPTION_STRUCTURED_REPLY, b""),
        option(wire::OPTION_EXTENDED_HEADERS, b""),
        contexts(wire::OPTION_SET_META_CONTEXT, "disk", &[]),
        contexts(wire::OPTION_LIST_META_CONTEXT, "disk", &[]),
        option(77, b"unknown"),
        option(77, &long),
    ] {
        assert_eq!(talk.answer(&bytes), [TLS_REQUIRED], "{:?}", &bytes[..16]);
    }
    assert_eq!(talk.answer(&option(wire::OPTION_STARTTLS, b"x")), [INVALID]);
    let error = talk.send(&option(wire::OPTION_EXPORT_NAME, b"disk"));
    assert!(matches!(error, Err(Violation::ExportName { .. })), "{error:?}");
    let mut talk = Talk::with_tls(TlsMode::Require, FIXED);
    assert_eq!(talk.send(&option(wire::OPTION_ABORT, b"")), Ok(Step::End));
    assert_eq!(talk.kinds(), [ACK]);
}

#[test]
fn what_breaks_the_protocol_ends_the_session() {
    assert!(matches!(Talk::begin(4).send(b""), Err(Violation::ClientFlags { found: 4, known: 3 })));
    let error = Talk::begin(FIXED).send(b"GET / HTTP/1.1\r\n\r\n");
    assert!(matches!(error, Err(Violation::Magic { place: "option", .. })));
    let error = Talk::begin(0).send(&option(wire::OPTION_LIST, b""));
    assert_eq!(error, Err(Violation::NotFixed { option: 3 }));
    let header = &option(77, b"")[..12];
    let error = Talk::begin(FIXED).send(&[header, &[0xff; 4]].concat());
    assert!(matches!(error, Err(Violation::OptionTooLong { option: 77, found: u32::MAX, .. })));
}

#[test]
fn a_flood_of_options_ends_the_session() {
    let mut talk = Talk::begin(FIXED);
    for _ in 0..NBD_OPTIONS_MAX {
        assert_eq!(talk.send(&option(77, b"")), Ok(Step::Receive(16)));
    }
    assert_eq!(talk.send(&option(77, b"")), Err(Violation::TooManyOptions { limit: NBD_OPTIONS_MAX }));
}

#[test]
fn a_stopping_server_refuses_options_but_not_the_abort() {
    let mut talk = Talk::begin(FIXED);
    talk.send(b"").expect("flags are good");
    talk.handshake.stop();
    assert_eq!(talk.send(&info(wire::OPTION_GO, "disk", &[])), Ok(Step::Receive(16)));
    assert_eq!(talk.kinds(), [SHUTDOWN]);
    assert_eq!(talk.send(&option(wire::OPTION_ABORT, b"")), Ok(Step::End));
}

proptest! {
    #[test]
    fn no_bytes_make_the_handshake_panic_or_ask_for_unbounded_memory(
        options in proptest::collection::vec(
            (0u32..12, proptest::collection::vec(any::<u8>(), 0..40), any::<bool>()), 0..20),
        tail in proptest::collection::vec(any::<u8>(), 0..64),
        flags in 0u32..5,
    ) {
        let mut talk = Talk::begin(flags);
        let mut bytes = Vec::new();
        for (number, data, good) in &options {
            bytes.extend_from_slice(&option(*number, data));
            if *good {
                bytes.extend_from_slice(&info(*number, "disk", &[1, 2, 3]));
            }
        }
        bytes.extend_from_slice(&tail);
        talk.input.extend_from_slice(&bytes);
        loop {
            let result = match talk.handshake.next(&mut talk.input, &mut talk.out) {
                Ok(Step::Receive(wanted)) => {
                    prop_assert!(wanted as u64 <= NBD_OPTION_BYTES_MAX + 16 && wanted > talk.input.len());
                    break;
                }
                Ok(Step::List) => talk.handshake.listed(Ok(vec![export("a", false)]), &mut talk.out),
                Ok(Step::Describe { name }) => talk.handshake.described(Err(missing(&name)), &mut talk.out),
                Ok(Step::Attach { name }) => talk.handshake.attached(Err(missing(&name)), &mut talk.out),
                Ok(Step::Transmission { .. } | Step::StartTls | Step::End) | Err(_) => break,
            };
            if result.is_err() {
                break;
            }
        }
        prop_assert!(talk.out.len() < 1 << 20);
    }
}
