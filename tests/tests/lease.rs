//! What ownership hangs on, with real processes: a dead writer's volume is free soon, a fenced one does not look
//! healthy, a stopped one that goes on answers nothing old.

use nix::sys::signal::Signal;
use std::time::{Duration, Instant};
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::nbd::{Command, NbdClient};
use torus_tests::store::StoreKind;
use torus_tests::tools::qemu_io_ok;
use torus_tests::wait;

const BLOCK: u32 = 4096;

fn with_volume(name: &'static str, store: StoreKind) -> Cluster {
    let cluster = Cluster::start(ClusterOptions { store, ..ClusterOptions::new(name, 3) });
    cluster.torusblk(&["volume", "create", "demo", "64MiB"]).ok();
    cluster
}

fn block(value: u8) -> Vec<u8> {
    vec![value; BLOCK as usize]
}

#[test]
fn a_killed_writers_volume_is_free_two_seconds_after_its_lease() {
    const TTL: Duration = Duration::from_secs(5);
    let mut cluster = with_volume("lease-killed", StoreKind::Etcd);
    let mut first = cluster.serve_with(&["--volume", "demo", "--lease-ttl", "5"]);
    qemu_io_ok(&first.url("demo"), &["write -P 1 0 64k", "flush"]);
    let second = cluster.serve_with(&["--lease-ttl", "5"]);
    first.process.kill();
    let killed = Instant::now();
    let mut client = wait::until("the volume to be free", || NbdClient::connect(second.address, "demo").ok());
    let took = killed.elapsed();
    println!("attached {took:?} after kill -9 with a lease of {TTL:?}");
    assert!(took <= TTL + Duration::from_secs(2), "{took:?}");
    assert_eq!(client.read(0, BLOCK).expect("attached"), Ok(block(1)));
}

#[test]
fn a_fenced_writer_that_nobody_uses_says_so_and_ends() {
    let mut cluster = with_volume("lease-fenced", StoreKind::Etcd);
    let stats = cluster.folder().join("stats");
    let stats_argument = stats.to_string_lossy().into_owned();
    let mut first = cluster.serve_with(&["--volume", "demo", "--lease-ttl", "2", "--stats", &stats_argument]);
    let mut idle = NbdClient::connect(first.address, "demo").expect("it serves");
    idle.call(Command::Write, 0, &block(1)).expect("it serves").expect("all is well");
    let _second = cluster.serve_with(&["--force", "--volume", "demo", "--lease-ttl", "2"]);
    let ended = first.process.ends_within(Duration::from_secs(5));
    assert_eq!(ended.and_then(|status| status.code()), Some(1), "{}", first.process.log());
    let log = first.process.log();
    assert!(log.contains("session ended") && log.contains("another writer"), "{log}");
    // The connection may be on another executor than the volume: it ends by either, whichever gets there first.
    let by_volume = log.contains("connection closed") && log.contains("no longer served here");
    assert!(by_volume || log.contains("stopping NBD"), "{log}");
    assert!(idle.call(Command::Write, 0, &block(2)).is_err(), "the connection outlived the session");
    let stats = std::fs::read_to_string(stats).expect("written every second");
    assert!(stats.contains("torus_volumes_attached"), "{stats}");
}

#[test]
fn a_stopped_writer_that_goes_on_answers_nothing_old() {
    let mut cluster = with_volume("lease-stopped", StoreKind::Embedded);
    let first = cluster.serve_with(&["--lease-ttl", "2"]);
    let mut old = NbdClient::connect(first.address, "demo").expect("it serves");
    old.call(Command::Write, 0, &block(1)).expect("it serves").expect("all is well");
    first.process.signal(Signal::SIGSTOP);
    let second = cluster.serve_with(&["--lease-ttl", "2"]);
    let mut new = wait::until("the volume to be free", || NbdClient::connect(second.address, "demo").ok());
    assert_eq!(new.read(0, BLOCK).expect("attached"), Ok(block(1)));
    new.call(Command::Write, 0, &block(2)).expect("attached").expect("all is well");
    first.process.signal(Signal::SIGCONT);
    // Its lease looks valid to nobody who looks at the clock; each read is an error or an end, never what was.
    let late = old.read(0, BLOCK);
    assert!(!matches!(late, Ok(Ok(_))), "the stopped writer answered {:?}", late.map(|read| read.map(|data| data[0])));
    let mut waiting = old;
    let write = waiting.call(Command::Write, 0, &block(3));
    assert!(!matches!(write, Ok(Ok(()))), "the stopped writer wrote");
    assert_eq!(new.read(0, BLOCK).expect("attached"), Ok(block(2)));
}

#[test]
fn a_lease_that_cannot_be_kept_is_refused() {
    let cluster = Cluster::start(ClusterOptions::new("lease-refused", 0));
    let refused = cluster.torusblk(&["serve", "--lease-ttl", "1"]).refused();
    assert!(refused.contains("--lease-ttl") && refused.contains("from 2s to 60s"), "{refused}");
    let refused = cluster.torusblk(&["serve", "--lease-ttl", "4", "--clock-drift", "2000"]).refused();
    assert!(refused.contains("at most 1s"), "{refused}");
}
