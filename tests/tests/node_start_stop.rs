//! A node starts, joins, answers on its control port, stops cleanly, and lives with a metadata store that comes and
//! goes.

use futures::executor::block_on;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use torus_rpc::metadata::{Metadata, Transaction, Write as Put};
use torus_schema::ids::VolumeId;
use torus_schema::records::{self, DeletingRecord, keys};
use torus_tests::cluster::{Cluster, ClusterOptions, NODE_SIZE};
use torus_tests::process::{self, Outcome, Process};
use torus_tests::store::{StoreKind, free_address};
use torus_tests::wait;

fn one_node(name: &'static str) -> Cluster {
    Cluster::start(ClusterOptions { is_joined: false, ..ClusterOptions::new(name, 1) })
}

#[test]
fn a_node_that_serves_stands_in_the_metadata_store() {
    let cluster = one_node("record");
    let record = cluster.node_record(0);
    assert_eq!(record.id, cluster.node_id(0));
    assert_eq!(record.size_bytes(), 512 << 20);
    let heartbeat = cluster.heartbeat(0).expect("a node that serves has a heartbeat");
    assert_eq!(heartbeat.shards.len(), 1);
    assert!(heartbeat.shards[0].free_bytes > 400 << 20, "{heartbeat:?}");
    for address in [&record.control, &record.shards[0].address] {
        TcpStream::connect(address).unwrap_or_else(|error| panic!("{address}: {error}"));
    }
}

#[test]
fn a_stopped_node_is_down_at_once_and_comes_back_as_itself() {
    let mut cluster = one_node("stop");
    let before = cluster.node_id(0);
    assert!(cluster.stop_node(0).success());
    assert_eq!(cluster.heartbeat(0), None);
    cluster.start_node(0);
    assert_eq!(cluster.node_id(0), before);
    assert!(cluster.heartbeat(0).is_some());
}

#[test]
fn a_killed_node_does_not_wait_for_its_own_heartbeat_to_lapse() {
    let mut cluster = one_node("kill");
    let first = cluster.heartbeat(0).expect("it serves");
    cluster.kill_node(0);
    cluster.start_node(0);
    assert!(!cluster.node(0).log().contains("waiting for the heartbeat"), "{}", cluster.node(0).log());
    let second = cluster.heartbeat(0).expect("it serves again");
    assert!(second.started_s >= first.started_s);
}

#[test]
fn several_shards_have_a_block_file_and_a_port_each() {
    let options = ClusterOptions { is_joined: false, size: "1GiB", ..ClusterOptions::new("shards", 1) };
    let cluster = Cluster::start(ClusterOptions { node_arguments: vec!["--shards".into(), "2".into()], ..options });
    let record = cluster.node_record(0);
    assert_eq!(record.shards.len(), 2);
    assert_ne!(record.shards[0].address, record.shards[1].address);
    assert!(cluster.data_dir(0).join("shard-1.blocks").exists());
}

#[test]
fn nodes_that_join_by_themselves_are_members_without_a_command() {
    let options = ClusterOptions { is_joined: false, ..ClusterOptions::new("auto-join", 3) };
    let mut cluster = Cluster::start(ClusterOptions { node_arguments: vec!["--auto-join".into()], ..options });
    cluster.torusblk(&["volume", "create", "demo", "64MiB", "--replicas", "3"]).ok();
    // With a volume there is data to move: the fourth waits for an operator.
    let mut command = cluster.node_command(0);
    command.arg("--data-dir").arg(cluster.folder().join("fourth")).args(["--size", NODE_SIZE]);
    let mut fourth = Process::spawn("fourth", &mut command, cluster.folder());
    fourth.await_line("not joined");
    fourth.await_line("serving node");
    assert!(cluster.stop_node(0).success());
    cluster.start_node(0);
}

#[test]
fn a_port_that_is_taken_is_named() {
    let cluster = Cluster::start(ClusterOptions::new("port-taken", 0));
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let mut command = cluster.node_command(0);
    let text = Outcome::of(command.args(["--size", NODE_SIZE]).args(["--listen", &address])).refused();
    assert!(text.contains(&address) && text.contains("--listen"), "{text}");
}

#[test]
fn a_store_that_does_not_answer_ends_the_start_within_the_deadline() {
    let folder = process::temporary_dir("unreachable");
    let nobody = free_address();
    for scheme in ["torus", "etcd"] {
        let mut command = process::program("torus-engine");
        command.args(["--metadata", &format!("{scheme}://{nobody}"), "--size", NODE_SIZE, "--deadline", "1"]);
        command.arg("--data-dir").arg(folder.path().join(scheme));
        let mut node = Process::spawn(scheme, &mut command, folder.path());
        let status = node.ends_within(std::time::Duration::from_secs(10)).expect("it gives up");
        assert_eq!(status.code(), Some(1));
        assert!(node.log().contains(&nobody.to_string()), "{}", node.log());
    }
}

#[test]
fn a_store_without_a_cluster_is_refused_with_the_command_that_makes_one() {
    let folder = process::temporary_dir("no-cluster");
    let store = torus_tests::store::Store::start(StoreKind::Embedded, folder.path());
    let mut command = process::program("torus-engine");
    command.args(["--metadata", &store.url(), "--size", NODE_SIZE]).arg("--data-dir").arg(folder.path().join("node"));
    let text = Outcome::of(&mut command).refused();
    assert!(text.contains("torusadm") && text.contains("init") && text.contains(&store.url()), "{text}");
}

#[test]
fn a_lone_node_holds_the_metadata_itself() {
    let folder = process::temporary_dir("lone");
    let mut command = process::program("torus-engine");
    command.args(["--metadata", "embedded", "--metadata-listen", "127.0.0.1:0", "--size", NODE_SIZE]);
    command.arg("--data-dir").arg(folder.path().join("node"));
    let mut node = Process::spawn("node", &mut command, folder.path());
    let line = node.await_line("no cluster yet");
    let url = line.split_whitespace().find(|word| word.starts_with("torus://")).expect("it names the store");
    Outcome::of(process::program("torusadm").args(["--metadata", url, "init"])).ok();
    node.await_line("serving node");
    assert!(node.stop().success());
}

#[test]
fn the_heartbeat_comes_back_after_the_store_was_away_for_longer_than_its_lease() {
    let mut cluster = one_node("store-away");
    let before = cluster.heartbeat(0).expect("it serves");
    cluster.store.kill();
    cluster.node(0).await_line("no heartbeat; data is served on");
    cluster.store.start_again();
    cluster.node(0).await_line("the metadata store answers again");
    let after = wait::until("the heartbeat", || cluster.heartbeat(0));
    assert_eq!(after.started_s, before.started_s);
    assert!(cluster.node(0).is_running());
}

#[test]
fn a_heartbeat_that_was_taken_away_is_made_anew() {
    let mut cluster = one_node("lease-lost");
    let key = keys::heartbeat(cluster.node_id(0));
    let delete = Transaction { writes: vec![Put::Delete { key }], ..Default::default() };
    block_on(cluster.metadata().transact(delete)).unwrap();
    cluster.node(0).await_line("joining again");
    wait::until("the heartbeat", || cluster.heartbeat(0));
}

#[test]
fn a_deleted_volume_is_confirmed_even_if_the_node_never_knew_it() {
    let mut cluster = one_node("deleting");
    let put = |cluster: &Cluster, volume: VolumeId| {
        let record = DeletingRecord { volume, holders: vec![cluster.node_id(0)] };
        let write = Put::Put { key: keys::deleting(volume), value: records::encode(&record), lease: None };
        let transaction = Transaction { writes: vec![write], ..Default::default() };
        block_on(cluster.metadata().transact(transaction)).unwrap();
    };
    let await_gone = |cluster: &Cluster, volume: VolumeId| {
        let gone = || block_on(cluster.metadata().get(&keys::deleting(volume))).unwrap().is_none().then_some(());
        wait::until("the confirmation", gone);
    };
    let (while_up, while_down) = (VolumeId::random(), VolumeId::random());
    put(&cluster, while_up);
    await_gone(&cluster, while_up);
    cluster.stop_node(0);
    put(&cluster, while_down);
    cluster.start_node(0);
    await_gone(&cluster, while_down);
}

#[test]
fn garbage_on_its_ports_does_not_hurt_a_node() {
    let mut cluster = one_node("garbage");
    let record = cluster.node_record(0);
    for address in [&record.control, &record.shards[0].address] {
        for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 4096], &[0; 65536]] {
            let mut stream = TcpStream::connect(address).unwrap();
            // It may be closed on us before all is sent, which is as good an answer as any.
            let _ = stream.write_all(garbage);
        }
    }
    assert!(cluster.node(0).is_running());
    for address in [&record.control, &record.shards[0].address] {
        TcpStream::connect(address).unwrap();
    }
    assert!(cluster.stop_node(0).success());
}
