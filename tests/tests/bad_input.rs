//! What people and strangers get wrong: each is refused with what to do, and costs nobody else anything.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::process::{self, Outcome};
use torus_tests::store::free_address;
use torus_tests::tools::qemu_io_ok;

fn with_volume(name: &'static str) -> Cluster {
    let cluster = Cluster::start(ClusterOptions::new(name, 3));
    cluster.torusblk(&["volume", "create", "demo", "64MiB"]).ok();
    cluster
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "expected {word:?} in: {text}");
    }
}

#[test]
fn a_volume_that_is_not_there_is_named() {
    let mut cluster = with_volume("unknown");
    for arguments in [["volume", "show", "nothing"], ["volume", "delete", "nothing"]] {
        assert_says(&cluster.torusblk(&arguments).refused(), &["nothing"]);
    }
    let server = cluster.serve();
    let info = Outcome::of(process::tool("nbdinfo").arg(server.url("nothing")));
    assert!(!info.status.success());
    assert_says(&info.stderr, &["nothing"]);
    qemu_io_ok(&server.url("demo"), &["write -P 1 0 4k"]);
}

#[test]
fn a_name_that_is_taken_is_refused() {
    let cluster = with_volume("taken");
    assert_says(&cluster.torusblk(&["volume", "create", "demo", "1GiB"]).refused(), &["demo"]);
}

#[test]
fn sizes_that_make_no_sense_are_refused() {
    let cluster = with_volume("sizes");
    for size in ["0", "many", "-1GiB", "2000TiB", "4097"] {
        let outcome = cluster.torusblk(&["volume", "create", "other", "--", size]);
        assert!(matches!(outcome.status.code(), Some(1 | 2)), "{size}: {outcome:#?}");
        assert!(!outcome.stderr.contains("panicked"), "{size}: {outcome:#?}");
    }
    let listed = cluster.torusblk(&["volume", "list"]).ok();
    assert!(!listed.contains("other"), "{listed}");
}

#[test]
fn more_replicas_than_nodes_are_refused() {
    let cluster = with_volume("replicas");
    let text = cluster.torusblk(&["volume", "create", "wide", "1GiB", "--replicas", "5"]).refused();
    assert_says(&text, &["5", "3"]);
}

#[test]
fn an_attached_volume_cannot_be_deleted_and_a_detached_one_gives_its_space_back() {
    let mut cluster = with_volume("delete");
    let mut server = cluster.serve_with(&["--volume", "demo"]);
    qemu_io_ok(&server.url("demo"), &["write -P 1 0 16M"]);
    assert_says(&cluster.torusblk(&["volume", "delete", "demo"]).refused(), &["demo"]);
    qemu_io_ok(&server.url("demo"), &["read -P 1 0 16M"]);
    assert!(server.process.stop().success());
    cluster.torusblk(&["volume", "delete", "demo"]).ok();
    torus_tests::wait::until("the space to come back", || {
        let used = |node| cluster.heartbeat(node).map(|heartbeat| heartbeat.shards[0].used_bytes);
        (0..3).all(|node| used(node) == Some(0)).then_some(())
    });
}

#[test]
fn every_command_ends_within_its_deadline_when_the_store_does_not_answer() {
    let nobody = free_address().to_string();
    for url in [format!("etcd://{nobody}"), format!("torus://{nobody}")] {
        let commands: [(&str, &[&str]); 7] = [
            ("torusadm", &["list-peers"]),
            ("torusadm", &["init"]),
            ("torusadm", &["status"]),
            ("torusadm", &["why", "demo", "0"]),
            ("torusadm", &["peer", "replace", "old", "new"]),
            ("torusadm", &["volume", "promote", "demo", "node"]),
            ("torusblk", &["volume", "list"]),
        ];
        for (program, arguments) in commands {
            let started = Instant::now();
            let mut command = process::program(program);
            let text = Outcome::of(command.args(["--metadata", &url, "--deadline", "1s"]).args(arguments)).refused();
            assert_says(&text, &[&nobody]);
            assert!(started.elapsed() < Duration::from_secs(5), "{program} {arguments:?}: {:?}", started.elapsed());
        }
    }
}

#[test]
fn a_server_that_would_talk_to_everybody_in_the_clear_is_not_started() {
    let cluster = with_volume("clear");
    let directory = cluster.folder().to_str().unwrap().to_owned();
    let serve = |arguments: &[&str]| {
        let mut command = process::program("torusblk");
        command.args(["--metadata", &cluster.url(), "serve", "--listen", "0.0.0.0:0"]).args(arguments);
        Outcome::of(&mut command)
    };
    for arguments in [&[][..], &["--tls=off"]] {
        assert_says(&serve(arguments).refused(), &["loopback", "--insecure", "--tls require"]);
    }
    let certificates = serve(&["--tls=require", "--tls-certificates", &directory]).refused();
    assert_says(&certificates, &["server-cert.pem", &directory]);
    let nowhere = serve(&["--tls=allow"]);
    assert_eq!(nowhere.status.code(), Some(2), "wrong usage: {nowhere:#?}");
    assert_says(&nowhere.stderr, &["--tls-certificates"]);
}

#[test]
fn garbage_on_every_port_leaves_the_volume_as_it_was() {
    let mut cluster = with_volume("garbage-ports");
    let server = cluster.serve_with(&["--volume", "demo"]);
    qemu_io_ok(&server.url("demo"), &["write -P 7 0 1M"]);
    let record = cluster.node_record(0);
    for address in [record.control, record.shards[0].address.clone(), server.address.to_string()] {
        for garbage in [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], &[0xff; 70_000], &[0; 70_000]] {
            let mut stream = TcpStream::connect(&address).unwrap();
            // The other side may close before it has read everything: that is its right.
            let _ = stream.write_all(garbage);
            let _ = stream.shutdown(Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        }
        qemu_io_ok(&server.url("demo"), &["read -P 7 0 1M"]);
    }
    (0..3).for_each(|node| assert!(cluster.node(node).is_running()));
}
