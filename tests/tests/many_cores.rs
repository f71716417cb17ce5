//! `torusblk serve` over several executors: one writer whichever executor a connection is on.

use std::fs;
use torus_tests::cluster::{Cluster, ClusterOptions, NbdServer};
use torus_tests::nbd::{Command, NbdClient, connect};
use torus_tests::tools::{assert_same_content, fio_verified, nbdcopy, qemu_io_ok, spawn_fio};
use torus_tests::wait;

fn with_volume(name: &'static str) -> Cluster {
    let cluster = Cluster::start(ClusterOptions { size: "1GiB", ..ClusterOptions::new(name, 3) });
    cluster.torusblk(&["volume", "create", "demo", "64MiB"]).ok();
    cluster
}

fn four(server: &NbdServer) -> Vec<NbdClient> {
    (0..4).map(|_| connect(server.address, "demo")).collect()
}

#[test]
fn many_connections_of_real_tools_are_spread_and_see_one_volume() {
    let mut cluster = with_volume("cores-tools");
    let stats = cluster.folder().join("stats");
    let server = cluster.serve_with(&["--cores", "3", "--volume", "demo", "--stats", stats.to_str().unwrap()]);
    let (image, copy) = (cluster.folder().join("image"), cluster.folder().join("copy"));
    let noise: Vec<u8> = (0..64_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    fs::write(&image, noise).unwrap();
    nbdcopy(image.to_str().unwrap(), &server.url("demo"));
    nbdcopy(&server.url("demo"), copy.to_str().unwrap());
    assert_same_content(&image, &copy, 64 << 20);
    let mut fio = spawn_fio(
        &mut fio_verified(&server.url("demo"), "16M", &["--numjobs=4", "--offset_increment=16M"]),
        cluster.folder(),
    );
    assert!(fio.await_end().success(), "{}", fio.log());
    let connections: Vec<NbdClient> = (0..6).map(|_| connect(server.address, "demo")).collect();
    wait::until("two connections on each executor", || {
        let text = fs::read_to_string(&stats).ok()?;
        let name = |executor| format!("torus_nbd_connections{{executor=\"{executor}\"}} 2");
        (0..3).all(|executor| text.contains(&name(executor))).then_some(())
    });
    drop(connections);
}

/// Whoever comes alone is let in by the first executor, whose volume it may not be.
#[test]
fn a_lone_connection_is_served_where_its_volume_lives() {
    let mut cluster = with_volume("cores-alone");
    cluster.torusblk(&["volume", "create", "other", "64MiB"]).ok();
    let stats = cluster.folder().join("stats");
    let volumes = ["--volume", "demo", "--volume", "other"];
    let server = cluster.serve_with(&[&["--cores", "2", "--stats", stats.to_str().unwrap()], &volumes[..]].concat());
    let total = |name: &str| {
        let text = fs::read_to_string(&stats).unwrap();
        let of = |executor: usize| {
            let name = format!("torus_{name}{{executor=\"{executor}\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&name)?.parse::<u64>().ok()).unwrap()
        };
        [of(0), of(1)]
    };
    for volume in ["demo", "other"] {
        let mut client = connect(server.address, volume);
        for at in 0..200_u64 {
            client.call(Command::Write, at * 4096, &[7; 4096]).unwrap().unwrap();
        }
        assert_eq!(client.read(199 * 4096, 4096).unwrap().unwrap(), [7; 4096]);
    }
    // Written after both have gone, so after all that they asked.
    let gone = || total("nbd_connections") == [0, 0] && total("nbd_connections_served_total")[1] == 1;
    wait::until("one connection that moved, and is gone again", || gone().then_some(()));
    let handed_over: u64 = total("handoffs_total").iter().sum();
    assert!(handed_over < 50, "{handed_over} of 400 requests and their answers were handed over");
}

#[test]
fn what_one_executor_wrote_and_another_flushed_survives_the_process() {
    let mut cluster = with_volume("cores-flush");
    let mut server = cluster.serve_with(&["--cores", "2", "--lease-ttl", "2", "--clock-drift", "100"]);
    let mut clients = four(&server);
    for (index, client) in clients.iter_mut().enumerate() {
        let block = [index as u8 + 1; 4096];
        client.call(Command::Write, index as u64 * 4096, &block).unwrap().unwrap();
    }
    clients[3].call(Command::Flush, 0, &[]).unwrap().unwrap();
    server.process.kill();
    (0..3).for_each(|node| cluster.kill_node(node));
    cluster.start_nodes(&[0, 1, 2]);
    let server = cluster.serve_with(&["--cores", "2"]);
    let mut client = connect(server.address, "demo");
    for index in 0..4_u8 {
        let block = client.read(u64::from(index) * 4096, 4096).unwrap().unwrap();
        assert!(block.iter().all(|byte| *byte == index + 1), "block {index}");
    }
}

#[test]
fn a_fenced_volume_fails_on_every_executor() {
    let mut cluster = with_volume("cores-fenced");
    let first = cluster.serve_with(&["--cores", "2"]);
    let mut clients = four(&first);
    let second = cluster.serve_with(&["--force", "--volume", "demo"]);
    qemu_io_ok(&second.url("demo"), &["write -P 2 0 64k", "flush"]);
    for client in &mut clients {
        // An error or a closed connection; never an acknowledgement.
        let answered = client.call(Command::Write, 0, &[3; 4096]);
        assert!(!matches!(answered, Ok(Ok(()))), "{answered:?}");
    }
    qemu_io_ok(&second.url("demo"), &["read -P 2 0 64k"]);
}

#[test]
fn a_volume_that_grows_does_so_on_every_executor() {
    let mut cluster = with_volume("cores-grow");
    let server = cluster.serve_with(&["--cores", "2"]);
    let mut clients = four(&server);
    cluster.torusblk(&["volume", "resize", "demo", "128MiB"]).ok();
    for (index, client) in clients.iter_mut().enumerate() {
        let offset = (100 + index as u64) << 20;
        wait::until("the new part to be there", || {
            client.call(Command::Write, offset, &[7; 4096]).unwrap().is_ok().then_some(())
        });
    }
}
