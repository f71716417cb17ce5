//! What no client should send: each gets what the specification says, and no other connection notices.

use crate::support::{MIB, Raw, Server};
use std::net::Shutdown;
use torus_frontends::nbd::Offer;

const UNSUPPORTED: u32 = (1 << 31) + 1;
const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;
const ENOTSUP: u32 = 95;

#[test]
fn garbage_closes_its_connection_and_no_other() {
    let server = Server::start(MIB);
    let mut other = server.attached();
    type Misdeed = fn(&Server) -> Raw;
    let misdeeds: [(&str, Misdeed); 5] = [
        ("HTTP instead of flags", |server| {
            let mut raw = server.connect();
            raw.receive(18);
            raw.send(b"GET / HTTP/1.1\r\n\r\n");
            raw
        }),
        ("unknown client flags", |server| {
            let mut raw = server.connect();
            raw.receive(18);
            raw.send(&[0x80, 0, 0, 3]);
            raw
        }),
        ("wrong option magic", |server| {
            let mut raw = server.negotiating();
            raw.send(b"IHAVEOPS\0\0\0\x03\0\0\0\0");
            raw
        }),
        ("an option of 4 GiB", |server| {
            let mut raw = server.negotiating();
            raw.send(b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff");
            raw
        }),
        ("wrong request magic", |server| {
            let mut raw = server.attached();
            raw.send(&[0x77; 28]);
            raw
        }),
    ];
    for (name, misdeed) in misdeeds {
        let rest = misdeed(&server).closed();
        assert!(rest.is_empty(), "{name}: {rest:?}");
        other.works();
    }
}

#[test]
fn an_offer_may_be_read_only_and_have_a_default_export() {
    let offer = Offer { read_only: true, default_export: Some("disk".into()), ..Offer::default() };
    let server = Server::offering(offer, MIB);
    let mut raw = server.negotiating();
    raw.go("");
    for command in [1, 4, 6] {
        raw.request(command, 0, 8, 0, 4096);
        if command == 1 {
            raw.send(&[1; 4096]);
        }
        assert_eq!(raw.reply(), (8, EPERM));
    }
    raw.works();
    assert_eq!(server.device.counts().writes, 0);
}

#[test]
fn a_write_of_4_gib_closes_its_connection_and_takes_no_memory() {
    let server = Server::start(MIB);
    let mut other = server.attached();
    let mut raw = server.attached();
    raw.request(1, 0, 1, 0, u32::MAX);
    assert!(raw.closed().is_empty());
    other.works();
}

#[test]
fn an_export_name_that_does_not_exist_closes_the_connection() {
    let server = Server::start(MIB);
    let mut raw = server.negotiating();
    raw.option(1, b"nowhere");
    assert!(raw.closed().is_empty());
}

#[test]
fn an_export_name_that_exists_enters_transmission_with_or_without_zeroes() {
    let server = Server::start(MIB);
    for (flags, length) in [([0, 0, 0, 3], 10), ([0, 0, 0, 1], 134), ([0, 0, 0, 0], 134)] {
        let mut raw = server.connect();
        raw.receive(18);
        raw.send(&flags);
        raw.option(1, b"disk");
        let answer = raw.receive(length);
        assert_eq!(answer[..10], [0, 0, 0, 0, 0, 0x10, 0, 0, 0x0d, 0x6d]);
        assert!(answer[10..].iter().all(|byte| *byte == 0));
        raw.works();
    }
}

#[test]
fn unknown_options_are_refused_and_the_handshake_goes_on() {
    let server = Server::start(MIB);
    let mut raw = server.negotiating();
    for option in [4, 12, 1000] {
        raw.option(option, b"whatever");
        assert_eq!(raw.option_reply().0, UNSUPPORTED, "option {option}");
    }
    raw.go("disk");
    raw.works();
}

#[test]
fn a_flood_of_options_is_cut_off() {
    let server = Server::start(MIB);
    let mut raw = server.negotiating();
    for _ in 0..256 {
        raw.option(99, b"");
        assert_eq!(raw.option_reply().0, UNSUPPORTED);
    }
    raw.option(99, b"");
    assert!(raw.closed().is_empty());
    server.attached().works();
}

#[test]
fn each_bad_request_is_answered_and_the_next_one_on_the_connection_works() {
    let server = Server::start(MIB);
    let mut raw = server.attached();
    let too_much = (32 << 20) + 1;
    let table = [
        ("unknown command", 77, 0, 0, 0, EINVAL),
        ("cache beyond the end", 5, 0, MIB, 512, EINVAL),
        ("cache with a flag of another command", 5, 1 << 1, 0, 512, EINVAL),
        ("block status, which is not negotiated", 7, 0, 0, 512, EINVAL),
        ("unknown flag", 0, 0x8000, 0, 1, EINVAL),
        ("fast zero of part of a block", 6, 1 << 4, 0, 1, ENOTSUP),
        ("read beyond the end", 0, 0, MIB, 1, EINVAL),
        ("read around the end of numbers", 0, 0, u64::MAX, 1, EINVAL),
        ("unfragmented read, which is not negotiated", 0, 1 << 2, 0, 1, EINVAL),
        ("fast zero that is stored", 6, 1 << 4 | 1 << 1, 0, 4096, ENOTSUP),
        ("read too long", 0, 0, 0, too_much, EINVAL),
        ("write beyond the end", 1, 0, MIB - 1, 4096, ENOSPC),
        ("write too long", 1, 0, 0, too_much, EINVAL),
        ("write with a flag of another command", 1, 1 << 1, 0, 4096, EINVAL),
        ("trim beyond the end", 4, 0, 1, MIB as u32, EINVAL),
        ("write zeroes beyond the end", 6, 0, 1, MIB as u32, ENOSPC),
        ("flush of a range", 3, 0, 0, 4096, EINVAL),
    ];
    for (cookie, (name, command, flags, offset, length, error)) in table.into_iter().enumerate() {
        raw.request(command, flags, cookie as u64, offset, length);
        if command == 1 {
            raw.send(&vec![0xaa; length as usize]);
        }
        assert_eq!(raw.reply(), (cookie as u64, error), "{name}");
        raw.works();
    }
    assert_eq!(server.device.counts().writes, 0);
}

#[test]
fn lengths_of_zero_are_answered_and_nothing_happens() {
    let server = Server::start(MIB);
    let mut raw = server.attached();
    for command in [0, 1, 4, 6] {
        raw.request(command, 0, 9, 0, 0);
        assert_eq!(raw.reply(), (9, 0));
    }
    raw.works();
    assert_eq!(server.device.counts().writes + server.device.counts().clears, 0);
}

#[test]
fn connections_that_say_nothing_make_room_for_those_that_do() {
    let server = Server::offering(Offer { connections_max: 4, ..Offer::default() }, MIB);
    let mut working = [server.attached(), server.attached()];
    let mut silent: Vec<Raw> = (0..40).map(|_| server.connect()).collect();
    let mut last = server.attached();
    last.works();
    working.iter_mut().for_each(Raw::works);
    silent[0].closed();
    let mut fourth = server.attached();
    fourth.works();
    // All four are at work now: nobody is thrown out for who comes fifth.
    let mut fifth = server.connect();
    fifth.closed();
    working.iter_mut().chain([&mut last, &mut fourth]).for_each(Raw::works);
}

#[test]
fn a_client_that_stops_in_the_middle_of_anything_holds_up_nobody() {
    let server = Server::start(MIB);
    let silent = server.connect();
    let mut half_flags = server.connect();
    half_flags.send(&[0]);
    let mut half_option = server.negotiating();
    half_option.send(b"IHAVEOPT\0\0");
    let mut half_payload = server.attached();
    half_payload.request(1, 0, 1, 0, 4096);
    half_payload.send(&[1; 4095]);
    let mut half_request = server.attached();
    half_request.send(&[0x25, 0x60]);
    server.attached().works();
    for mut raw in [silent, half_flags, half_option, half_payload, half_request] {
        raw.stream.shutdown(Shutdown::Write).expect("connected");
        raw.closed();
    }
    assert_eq!(server.device.counts().writes, 0, "half a payload is no write");
}
