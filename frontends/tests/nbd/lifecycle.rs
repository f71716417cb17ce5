//! Requests overlap, are bounded, fail one by one, and end in order whatever becomes of their connection.

use crate::support::{MIB, Server, until};
use std::collections::HashSet;
use std::io::ErrorKind;
use std::io::Write;
use std::net::Shutdown;
use torus_frontends::device::VolumeError;
use torus_frontends::nbd::wire::{Cookie, Request, Style};

#[test]
fn a_request_that_waits_holds_up_no_other_connection() {
    let server = Server::start(MIB);
    let (mut slow, mut quick) = (server.attached(), server.negotiating());
    server.device.hold();
    slow.request(0, 0, 1, 0, 1);
    until("the read waits", || server.device.waiting() == 1);
    quick.go("frozen");
    quick.works();
    server.device.release();
    assert_eq!(slow.reply(), (1, 0));
}

#[test]
fn replies_overtake_each_other() {
    let server = Server::start(MIB);
    let mut raw = server.attached();
    server.device.hold();
    raw.request(0, 0, 1, 0, 1);
    raw.request(77, 0, 2, 0, 0);
    assert_eq!(raw.reply(), (2, 22), "the later one is answered first");
    server.device.release();
    assert_eq!(raw.reply(), (1, 0));
    raw.receive(1);
}

#[test]
fn a_client_that_floods_is_not_read_from_until_its_requests_are_answered() {
    let server = Server::start(MIB);
    let mut raw = server.attached();
    server.device.hold();
    for cookie in 0..1000 {
        raw.request(3, 0, cookie, 0, 0);
    }
    until("256 flushes wait", || server.device.waiting() == 256);
    server.attached();
    assert_eq!(server.device.waiting(), 256);
    server.device.release();
    let cookies: HashSet<u64> = (0..1000).map(|_| raw.reply().0).collect();
    assert_eq!(cookies.len(), 1000);
}

#[test]
fn a_client_that_takes_no_replies_is_bounded_and_holds_up_nobody() {
    let server = Server::start(64 * MIB);
    let mut raw = server.attached();
    raw.stream.set_nonblocking(true).expect("a socket");
    let mut request = bytes::BytesMut::new();
    Request { flags: 0, command: 0, cookie: Cookie(1), offset: 0, length: 32 << 20 }.put(Style::Simple, &mut request);
    let (mut sent, mut reads) = (0, 0);
    // 64 MiB may be outstanding, that is two of these reads and what the sockets hold; then sending stops.
    until("the server reads no more", || match raw.stream.write(&request) {
        Ok(count) => {
            sent += count;
            false
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            let before = std::mem::replace(&mut reads, server.device.counts().reads);
            reads > 0 && reads == before
        }
    });
    assert!(server.device.counts().reads <= 3, "{:?} of {sent} bytes", server.device.counts());
    server.attached().works();
    raw.stream.shutdown(Shutdown::Both).expect("connected");
    drop(raw);
    until("the device is released", || server.device.clones() == 2);
}

#[test]
fn errors_of_the_device_are_answered_without_payload_and_the_connection_goes_on() {
    let server = Server::start(MIB);
    let mut raw = server.attached();
    for (fault, error) in [
        (VolumeError::NoSpace { shard: "one".into() }, 28),
        (VolumeError::ReadOnly, 1),
        (VolumeError::SessionEnded { because: "fenced".into() }, 5),
        (VolumeError::Unreadable { block: 1, because: "damaged".into() }, 5),
        (VolumeError::NotReady { because: "opening".into() }, 5),
    ] {
        server.device.fail(Some(fault));
        for command in [0, 4, 6] {
            raw.request(command, 0, 3, 0, 4096);
            assert_eq!(raw.reply(), (3, error));
        }
        raw.request(3, 0, 4, 0, 0);
        assert_eq!(raw.reply(), (4, error));
        raw.request(1, 0, 5, 0, 4);
        raw.send(b"data");
        assert_eq!(raw.reply(), (5, error));
    }
    server.device.fail(None);
    raw.works();
}

#[test]
fn a_disconnect_is_closed_only_after_all_outstanding_requests_are_answered() {
    let server = Server::start(MIB);
    let mut raw = server.attached();
    server.device.hold();
    for cookie in 0..8 {
        raw.request(1, 1, cookie, cookie * 4096, 4096);
        raw.send(&[7; 4096]);
    }
    raw.request(2, 0, 99, 0, 0);
    until("eight writes wait", || server.device.waiting() == 8);
    server.device.release();
    for _ in 0..8 {
        assert_eq!(raw.reply().1, 0);
    }
    assert!(raw.closed().is_empty(), "a disconnect has no reply");
    assert_eq!(server.device.counts().durable, 8);
    until("the device is released", || server.device.clones() == 2);
}

#[test]
fn a_connection_that_vanishes_abandons_no_write_and_releases_the_device() {
    let server = Server::start(MIB);
    let mut raw = server.attached();
    server.device.hold();
    raw.request(1, 0, 1, 0, 4096);
    raw.send(&[7; 4096]);
    until("the write waits", || server.device.waiting() == 1);
    drop(raw);
    server.device.release();
    until("the write is carried out", || server.device.counts().writes == 1);
    until("the device is released", || server.device.clones() == 2);
}

#[test]
fn a_stopping_server_answers_what_is_in_flight_and_ends_every_connection() {
    let mut server = Server::start(MIB);
    let (mut busy, mut idle, mut haggling) = (server.attached(), server.attached(), server.negotiating());
    server.device.hold();
    busy.request(1, 0, 1, 0, 4096);
    busy.send(&[7; 4096]);
    until("the write waits", || server.device.waiting() == 1);
    server.begin_stop();
    assert!(idle.closed().is_empty());
    assert!(haggling.closed().is_empty());
    server.device.release();
    assert_eq!(busy.reply(), (1, 0));
    assert!(busy.closed().is_empty());
    server.join();
    assert_eq!(server.device.clones(), 1);
}

#[test]
fn a_flush_on_one_connection_covers_what_was_answered_on_another() {
    let server = Server::start(MIB);
    let (mut one, mut two) = (server.attached(), server.attached());
    one.request(1, 0, 1, 100, 4);
    one.send(b"data");
    assert_eq!(one.reply(), (1, 0));
    two.request(3, 0, 2, 0, 0);
    assert_eq!(two.reply(), (2, 0));
    two.request(0, 0, 3, 100, 4);
    assert_eq!(two.reply(), (3, 0));
    assert_eq!(two.receive(4), b"data");
    assert_eq!(server.device.counts().flushes, 1);
}
