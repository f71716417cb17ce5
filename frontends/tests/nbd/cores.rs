//! Executors that are pinned: where the choice is free, a connection is served on the core that its packets come in on.
//!
//! On loopback that is the core of whoever sends, so a client's thread that is pinned decides it.

use crate::support::{MIB, Raw, Server, until};
use crate::tls::Certificates;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::sync::atomic::Ordering;
use torus_frontends::nbd::{ClientCertificates, Offer, TlsMode};

const SELF: Pid = Pid::from_raw(0);

fn two_cores() -> Option<(usize, usize)> {
    let allowed = sched_getaffinity(SELF).expect("it can be asked");
    let mut cores = (0..CpuSet::count()).filter(|core| allowed.is_set(*core).expect("a core"));
    let two = cores.next().zip(cores.next());
    if two.is_none() {
        eprintln!("SKIPPED: one core alone may be used here, which leaves nothing to choose");
    }
    two
}

/// A connection of a thread that runs on this core alone.
fn attached_from(core: usize, server: &Server) -> Raw {
    let attach = || {
        let mut only = CpuSet::new();
        only.set(core).expect("a core");
        sched_setaffinity(SELF, &only).expect("it may be used");
        server.attached()
    };
    std::thread::scope(|scope| scope.spawn(attach).join()).expect("the server answers")
}

fn pinned(cores: &[usize]) -> Server {
    let server = Server::pinned(cores, Offer::default(), MIB);
    until("every executor serves", || server.connections.iter().all(|counts| counts.core.get().is_some()));
    server
}

fn open(server: &Server) -> Vec<usize> {
    server.connections.iter().map(|counts| counts.open.load(Ordering::Relaxed)).collect()
}

fn handed_over(server: &Server) -> u64 {
    server.handoffs.iter().map(|handoffs| handoffs.messages.load(Ordering::Relaxed)).sum()
}

#[test]
fn connections_are_spread_evenly_and_first_to_the_core_their_packets_come_in_on() {
    let Some((one, other)) = two_cores() else { return };
    let server = pinned(&[one, other, one, other]);
    let mut connections = Vec::new();
    for expected in [[0, 1, 0, 0], [0, 1, 0, 1], [1, 1, 0, 1], [1, 1, 1, 1]] {
        connections.push(attached_from(other, &server));
        assert_eq!(open(&server), expected, "from core {other}");
    }
    connections.iter_mut().for_each(Raw::works);
}

#[test]
fn a_lone_connection_and_its_volume_live_on_the_core_its_packets_come_in_on() {
    let Some((one, other)) = two_cores() else { return };
    for (core, expected) in [(one, [1, 0]), (other, [0, 1])] {
        let server = pinned(&[one, other]);
        let mut raw = attached_from(core, &server);
        (0..100).for_each(|_| raw.works());
        assert_eq!((open(&server), handed_over(&server)), (expected.to_vec(), 0), "from core {core}");
    }
}

#[test]
fn the_core_of_its_volume_is_better_than_that_of_its_packets() {
    let Some((one, other)) = two_cores() else { return };
    let server = pinned(&[one, other]);
    drop(attached_from(one, &server));
    until("it is gone", || open(&server) == [0, 0]);
    let mut raw = attached_from(other, &server);
    until("it is where its volume lives", || open(&server) == [1, 0]);
    raw.works();
    let before = handed_over(&server);
    (0..100).for_each(|_| raw.works());
    assert_eq!(handed_over(&server), before);
}

/// It could not move to its volume from there.
#[test]
fn where_a_connection_may_come_over_tls_its_packets_decide_nothing() {
    let Some((one, other)) = two_cores() else { return };
    let offer = Certificates::make().offer(TlsMode::Allow, ClientCertificates::Ignored);
    let server = Server::pinned(&[one, other], offer, MIB);
    let mut connections = Vec::new();
    for expected in [[1, 0], [1, 1]] {
        connections.push(attached_from(other, &server));
        assert_eq!(open(&server), expected);
    }
    connections.iter_mut().for_each(Raw::works);
    let told = server.connections.iter().filter_map(|counts| counts.core.get());
    assert_eq!(told.count(), 0, "each serves, so it would have told its core");
}
