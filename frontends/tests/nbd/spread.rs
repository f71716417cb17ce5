//! A server over several executors: connections go to all of them, and every one of them sees one device.

use crate::support::{MIB, Raw, Server, run, until};
use std::sync::atomic::Ordering;
use torus_frontends::device::VolumeError;
use torus_frontends::nbd::Offer;

const EXECUTORS: usize = 4;

fn started() -> Server {
    Server::spread(EXECUTORS, Offer::default(), 64 * MIB)
}

fn open(server: &Server) -> Vec<usize> {
    server.connections.iter().map(|counts| counts.open.load(Ordering::Relaxed)).collect()
}

fn write(raw: &mut Raw, cookie: u64, offset: u64) {
    raw.request(1, 0, cookie, offset, 4096);
    raw.send(&[cookie as u8; 4096]);
    assert_eq!(raw.reply(), (cookie, 0));
}

#[test]
fn connections_are_spread_evenly_and_stay_so_when_some_end() {
    let server = started();
    let mut connections: Vec<Raw> = (0..12).map(|_| server.attached()).collect();
    // Who is served stays where it is; before, it may still move to where there are fewer.
    connections.iter_mut().for_each(Raw::works);
    assert_eq!(open(&server), [3; EXECUTORS]);
    // Those of the first executor, which is the first to be asked again.
    for index in [8, 4, 0] {
        connections.remove(index);
    }
    until("three connections have ended", || open(&server) == [0, 3, 3, 3]);
    connections.extend((0..3).map(|_| server.attached()));
    assert_eq!(open(&server), [3; EXECUTORS]);
    connections.iter_mut().for_each(Raw::works);
}

#[test]
fn a_lone_connection_has_its_volume_on_its_own_executor() {
    let server = started();
    let mut raw = server.attached();
    for cookie in 0..100 {
        write(&mut raw, cookie, cookie * 4096);
    }
    let handed = server.handoffs.iter().map(|handoffs| handoffs.messages.load(Ordering::Relaxed));
    assert_eq!(handed.sum::<u64>(), 0);
}

#[test]
fn a_flush_on_any_connection_covers_what_was_answered_on_every_other() {
    let server = started();
    let mut connections: Vec<Raw> = (0..2 * EXECUTORS).map(|_| server.attached()).collect();
    for flushing in 0..connections.len() {
        for (at, raw) in connections.iter_mut().enumerate() {
            write(raw, at as u64, at as u64 * 4096);
        }
        assert_eq!(server.device.counts().unflushed, connections.len() as u64);
        connections[flushing].request(3, 0, 99, 0, 0);
        assert_eq!(connections[flushing].reply(), (99, 0));
        assert_eq!(server.device.counts().unflushed, 0, "flushed on connection {flushing}");
    }
}

#[test]
fn what_was_answered_on_one_connection_is_read_on_every_other() {
    let server = started();
    let mut connections: Vec<Raw> = (0..EXECUTORS).map(|_| server.attached()).collect();
    for writer in 0..EXECUTORS {
        write(&mut connections[writer], writer as u64 + 1, 0);
        for raw in &mut connections {
            raw.request(0, 0, 7, 0, 4096);
            assert_eq!(raw.reply(), (7, 0));
            assert_eq!(raw.receive(4096), [writer as u8 + 1; 4096]);
        }
    }
}

#[test]
fn no_write_is_answered_before_the_device_has_answered_it() {
    let server = started();
    let mut connections: Vec<Raw> = (0..EXECUTORS).map(|_| server.attached()).collect();
    server.device.hold();
    for raw in &mut connections {
        raw.request(1, 0, 5, 0, 4096);
        raw.send(&[1; 4096]);
    }
    until("every write waits", || server.device.waiting() == EXECUTORS);
    for raw in &mut connections {
        raw.stream.set_nonblocking(true).expect("a socket");
        let nothing = std::io::Read::read(&mut raw.stream, &mut [0; 1]).expect_err("no answer").kind();
        assert_eq!(nothing, std::io::ErrorKind::WouldBlock);
        raw.stream.set_nonblocking(false).expect("a socket");
    }
    server.device.release();
    connections.iter_mut().for_each(|raw| assert_eq!(raw.reply(), (5, 0)));
}

#[test]
fn a_device_that_fails_fails_on_every_executor() {
    let server = started();
    let mut connections: Vec<Raw> = (0..EXECUTORS).map(|_| server.attached()).collect();
    server.device.fail(Some(VolumeError::SessionEnded { because: "fenced".to_string() }));
    for raw in &mut connections {
        raw.request(3, 0, 1, 0, 0);
        assert_eq!(raw.reply(), (1, 5));
    }
}

#[test]
fn who_finds_an_executor_full_is_served_by_another() {
    let server = Server::spread(2, Offer { connections_max: 1, ..Offer::default() }, MIB);
    let mut first = server.attached();
    // The second executor is taken by one that says nothing; who comes next is sent to the first, which is full.
    let mut silent = server.connect();
    silent.receive(18);
    server.attached().works();
    assert!(silent.closed().is_empty(), "it made room");
    first.works();
}

#[test]
fn a_stopping_server_answers_what_is_in_flight_on_every_executor() {
    let mut server = started();
    let mut connections: Vec<Raw> = (0..EXECUTORS).map(|_| server.attached()).collect();
    server.device.hold();
    for raw in &mut connections {
        raw.request(1, 0, 1, 0, 4096);
        raw.send(&[7; 4096]);
    }
    until("the writes wait", || server.device.waiting() == EXECUTORS);
    server.begin_stop();
    server.device.release();
    for raw in &mut connections {
        assert_eq!(raw.reply(), (1, 0));
        assert!(raw.closed().is_empty());
    }
    server.join();
    assert_eq!(server.device.counts().writes, EXECUTORS as u64);
}

#[test]
fn nbdcopy_uses_all_executors_both_ways() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = started();
    let path = |name: &str| directory.path().join(name).to_str().expect("plain names").to_string();
    let data: Vec<u8> = (0..64_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    std::fs::write(path("source"), &data).expect("a file");
    run("nbdcopy", &["--connections=8", "--threads=8", "--flush", &path("source"), &server.uri]);
    run("nbdcopy", &["--connections=8", "--threads=8", &server.uri, &path("copy")]);
    assert!(std::fs::read(path("copy")).expect("the copy") == data, "the copy differs");
    let served: Vec<u64> = server.connections.iter().map(|counts| counts.served.load(Ordering::Relaxed)).collect();
    assert!(served.iter().all(|count| *count >= 4), "{served:?}");
    assert!(server.handoffs[0].batches.load(Ordering::Relaxed) > 0);
}
