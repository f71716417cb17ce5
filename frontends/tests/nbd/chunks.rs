//! Replies in chunks, byte for byte, with structured and with extended headers: every malformed request of a table gets
//! its error with a message, and the next one on the same connection works.

use crate::support::{Chunk, MIB, Raw, Server};
use torus_frontends::device::VolumeError;
use torus_frontends::nbd::wire::{Cookie, Request, Style};

const STYLES: [Style; 2] = [Style::Structured, Style::Extended];
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const EOVERFLOW: u32 = 75;
const ENOTSUP: u32 = 95;

const NONE: u16 = 0;
const DATA: u16 = 1;
const HOLE: u16 = 2;
const ERROR_OFFSET: u16 = (1 << 15) + 2;

const PAYLOAD_LENGTH: u16 = 1 << 5;

fn write(raw: &mut Raw, offset: u64, data: &[u8]) {
    raw.request(1, if raw.style == Style::Extended { PAYLOAD_LENGTH } else { 0 }, 1, offset, data.len() as u32);
    raw.send(data);
    assert_eq!(raw.chunk(offset), Chunk { last: true, kind: NONE, cookie: 1, payload: Vec::new() });
}

fn at(offset: u64, rest: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes()[..], rest].concat()
}

#[test]
fn a_read_gives_holes_as_holes_unless_it_is_to_be_whole() {
    let server = Server::start(MIB);
    for style in STYLES {
        let mut raw = server.attached_in(style);
        write(&mut raw, 4096, &[7; 4096]);
        raw.request(0, 0, 9, 0, 12288);
        let parts: Vec<_> = (0..3).map(|_| raw.chunk(0)).collect();
        let (kinds, lasts): (Vec<_>, Vec<_>) = parts.iter().map(|chunk| (chunk.kind, chunk.last)).unzip();
        assert_eq!((&kinds[..], &lasts[..]), (&[HOLE, DATA, HOLE][..], &[false, false, true][..]));
        assert_eq!(parts[0].payload, at(0, &4096_u32.to_be_bytes()));
        assert_eq!(parts[1].payload, at(4096, &[7; 4096]));
        raw.request(0, 1 << 2, 9, 4000, 200);
        let whole = raw.chunk(4000);
        assert_eq!(
            (whole.kind, whole.last, &whole.payload[..]),
            (DATA, true, &at(4000, &[[0; 96].as_slice(), &[7; 104]].concat())[..])
        );
    }
}

#[test]
fn the_status_of_blocks_is_told_in_runs() {
    let server = Server::start(MIB);
    for style in STYLES {
        let mut raw = server.attached_in(style);
        write(&mut raw, 8192, &[1; 4096]);
        for (flags, runs) in [(0, &[(8192, 3), (4096, 0), (MIB - 12288, 3)][..]), (1 << 3, &[(8192, 3)])] {
            raw.request(7, flags, 5, 0, MIB as u32);
            let chunk = raw.chunk(0);
            let mut expected = 1_u32.to_be_bytes().to_vec();
            if style == Style::Extended {
                expected.extend((runs.len() as u32).to_be_bytes());
            }
            for (bytes, status) in runs {
                match style {
                    Style::Extended => expected.extend([bytes.to_be_bytes(), u64::to_be_bytes(*status)].concat()),
                    _ => expected.extend([(*bytes as u32).to_be_bytes(), (*status as u32).to_be_bytes()].concat()),
                }
            }
            assert_eq!((chunk.kind, chunk.last), (if style == Style::Extended { 6 } else { 5 }, true));
            assert_eq!(chunk.payload, expected);
        }
    }
}

#[test]
fn each_bad_request_is_answered_with_a_message_and_the_next_one_works() {
    let server = Server::start(MIB);
    let too_much = (32 << 20) + 1;
    let table = [
        ("unknown command", 77, 0, 0, 0, EINVAL),
        ("unknown flag", 0, 0x8000, 0, 1, EINVAL),
        ("flag of another command", 4, 1 << 2, 0, 4096, EINVAL),
        ("read beyond the end", 0, 0, MIB, 1, EINVAL),
        ("read around the end of numbers", 0, 0, u64::MAX, 1, EINVAL),
        ("read too long", 0, 0, 0, too_much, EOVERFLOW),
        ("write beyond the end", 1, 0, MIB - 1, 4096, ENOSPC),
        ("trim beyond the end", 4, 0, 1, MIB as u32, EINVAL),
        ("cache beyond the end", 5, 0, 1, MIB as u32, EINVAL),
        ("write zeroes beyond the end", 6, 0, 1, MIB as u32, ENOSPC),
        ("fast zero of part of a block", 6, 1 << 4, 0, 512, ENOTSUP),
        ("fast zero that is stored", 6, 1 << 4 | 1 << 1, 0, 4096, ENOTSUP),
        ("flush of a range", 3, 0, 0, 4096, EINVAL),
        ("status beyond the end", 7, 0, MIB, 1, EINVAL),
        ("status of nothing", 7, 0, 0, 0, EINVAL),
        ("resize, an extension that is not agreed on", 8, 0, 0, 0, EINVAL),
    ];
    for style in STYLES {
        let mut raw = server.attached_in(style);
        for (cookie, (name, command, flags, offset, length, error)) in table.into_iter().enumerate() {
            let is_payload = command == 1 && style == Style::Extended;
            raw.request(command, flags | if is_payload { PAYLOAD_LENGTH } else { 0 }, cookie as u64, offset, length);
            if command == 1 {
                raw.send(&vec![0xaa; length as usize]);
            }
            let chunk = raw.chunk(offset);
            assert_eq!((chunk.cookie, chunk.error().0), (cookie as u64, error), "{name}");
            assert!(!chunk.error().1.is_empty(), "{name}");
            raw.works();
        }
    }
    assert_eq!(server.device.counts().writes, 0);
}

#[test]
fn payloads_nobody_asked_for_are_taken_and_refused() {
    let server = Server::start(MIB);
    let mut raw = server.attached_in(Style::Extended);
    for (name, command, payload) in [
        ("a read with payload", 0, vec![1; 4096]),
        ("a flush with payload", 3, vec![1; 1]),
        ("an unknown command with payload", 99, vec![1; 70_000]),
        ("a status of no context", 7, vec![0; 8]),
        ("a status of an unknown context", 7, [&1_u64.to_be_bytes()[..], &7_u32.to_be_bytes()].concat()),
        ("a status of half a context", 7, vec![0; 10]),
    ] {
        raw.request(command, PAYLOAD_LENGTH, 3, 0, payload.len() as u32);
        raw.send(&payload);
        assert_eq!(raw.chunk(0).error().0, EINVAL, "{name}");
        raw.works();
    }
    let good = [&MIB.to_be_bytes()[..], &1_u32.to_be_bytes()].concat();
    raw.request(7, PAYLOAD_LENGTH, 3, 0, good.len() as u32);
    raw.send(&good);
    assert_eq!(raw.chunk(0).kind, 6);
    raw.request(0, PAYLOAD_LENGTH, 3, 0, (32 << 20) + 1);
    assert!(raw.closed().is_empty(), "more than is taken");
}

#[test]
fn lengths_beyond_32_bits_are_one_request() {
    let size = 6 << 30;
    let server = Server::start(size);
    let mut raw = server.attached_in(Style::Extended);
    write(&mut raw, size - 4096, &[1; 4096]);
    let mut send = |command, length| {
        let mut bytes = bytes::BytesMut::new();
        Request { flags: 0, command, cookie: Cookie(4), offset: 0, length }.put(Style::Extended, &mut bytes);
        raw.send(&bytes);
        raw.chunk(0)
    };
    assert_eq!(send(7, size).kind, 6);
    assert_eq!(send(0, size).error().0, EOVERFLOW);
    assert_eq!(send(5, size).kind, NONE);
    assert_eq!(send(4, size - 8192).kind, NONE);
    assert_eq!(send(6, size + 1).error().0, ENOSPC);
    assert_eq!(server.device.counts().clears, 1);
}

#[test]
fn an_unreadable_block_is_told_with_its_place() {
    let server = Server::start(MIB);
    for style in STYLES {
        let mut raw = server.attached_in(style);
        server.device.fail(Some(VolumeError::Unreadable { block: 2, because: "damaged".into() }));
        raw.request(0, 0, 1, 4096, 8192);
        let chunk = raw.chunk(4096);
        let place = chunk.payload[chunk.payload.len() - 8..].to_vec();
        assert_eq!((chunk.kind, place), (ERROR_OFFSET, 8192_u64.to_be_bytes().to_vec()));
        let (error, message) = chunk.error();
        assert!(error == 5 && message.contains("damaged"), "{error}: {message}");
        server.device.fail(None);
        raw.works();
    }
}
