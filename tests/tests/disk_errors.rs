//! Disks that fail under real processes. What this needs of the machine: root, loop devices, and a file system that can
//! be shut down (EXT4_IOC_SHUTDOWN), after which all that lies on it answers with EIO, as a disk does that was pulled.
//! Device-mapper (`error`, `flakey`) and the kernel's fault injection would do as well; the machine that this was
//! written on has neither. Without loop devices these tests say so and test nothing; the simulation has the same
//! faults, from a seed, everywhere.

use std::fs;
use std::process::Command;
use torus_tests::cluster::{Cluster, ClusterOptions, NODE_SIZE};
use torus_tests::loops::{LoopDevice, Mounted};
use torus_tests::nbd::NbdClient;
use torus_tests::process::{self, Outcome, Process};
use torus_tests::wait;
use torus_tests::witness::{Promise, Witness};

const MIB: u64 = 1 << 20;
const BYTES: u64 = 16 * MIB;

/// Two nodes of the usual kind; the third is the one whose disk fails.
fn two_nodes(name: &'static str) -> Cluster {
    Cluster::start(ClusterOptions { is_joined: false, ..ClusterOptions::new(name, 2) })
}

fn third(cluster: &Cluster, extra: &[&str]) -> Command {
    let mut command = process::program("torus-engine");
    command.args(["--metadata", &cluster.url(), "--listen", "127.0.0.1:0"]);
    command.arg("--data-dir").arg(cluster.folder().join("third")).args(extra);
    command
}

fn start_third(cluster: &Cluster, extra: &[&str]) -> Process {
    let mut node = Process::spawn("third", &mut third(cluster, extra), cluster.folder());
    node.await_line("serving node");
    node
}

fn create(cluster: &Cluster, volume: &str, replicas: &str) {
    cluster.torusadm(&["peer", "add", "--all-peers"]).ok();
    cluster.torusblk(&["volume", "create", volume, "16MiB", "--replicas", replicas]).ok();
}

fn connect(server: &torus_tests::cluster::NbdServer, volume: &str) -> NbdClient {
    wait::until("the volume to answer", || {
        let mut client = NbdClient::connect(server.address, volume).ok()?;
        client.read(0, 4096).ok()?.ok()?;
        Some(client)
    })
}

#[test]
fn a_disk_pulled_under_one_of_three_costs_no_error_and_no_acknowledged_write() {
    let mut cluster = two_nodes("pulled-disk");
    let Some(host) = Mounted::new(cluster.folder(), "host", 1100 * MIB) else { return };
    let Some(device) = LoopDevice::new(&host.path, "disk", 600 * MIB) else { return };
    let file = device.file.clone();
    let mut node = start_third(&cluster, &["--device", device.text()]);
    create(&cluster, "demo", "3");
    let mut server = cluster.serve();
    let mut witness = Witness::new(BYTES, 1);
    let mut client = connect(&server, "demo");
    witness.load(&mut client, 500, 100).unwrap();
    host.cut_off();
    witness.load(&mut client, 1000, 100).expect("two replicas are left");
    node.await_line("the disk failed");
    assert!(node.log().contains(device.text()), "{}", node.log());
    witness.verify(&mut client, Promise::Acknowledged).unwrap().unwrap();
    assert!(node.is_running(), "a node outlives its disk:\n{}", node.log());
    drop(client);
    // The disk is put in again, under a new name, with what was durable.
    node.kill();
    drop(device);
    host.mount_again();
    let _other = LoopDevice::new(cluster.folder(), "other", 600 * MIB).unwrap();
    let device = LoopDevice::of(&file).unwrap();
    let mut node = start_third(&cluster, &[]);
    assert!(server.process.stop().success());
    let server = cluster.serve();
    witness.verify(&mut connect(&server, "demo"), Promise::Acknowledged).unwrap().unwrap();
    assert!(node.stop().success());
    drop(device);
}

#[test]
fn what_was_flushed_to_a_disk_that_was_pulled_is_there_when_it_is_back() {
    let cluster = Cluster::start(ClusterOptions::new("pulled-only-disk", 0));
    let Some(disk) = Mounted::new(cluster.folder(), "third", 1100 * MIB) else { return };
    let mut cluster = cluster;
    let mut node = start_third(&cluster, &["--size", NODE_SIZE]);
    create(&cluster, "demo", "1");
    let mut server = cluster.serve();
    let mut witness = Witness::new(BYTES, 1);
    let mut client = connect(&server, "demo");
    witness.load(&mut client, 1000, 100).unwrap();
    disk.cut_off();
    // The writer keeps what was not flushed and waits for its only replica: both are ended.
    client.send(torus_tests::nbd::Command::Flush, 0, 0, &[], 0).unwrap();
    node.kill();
    server.process.kill();
    drop(client);
    disk.mount_again();
    let mut node = start_third(&cluster, &[]);
    let server = cluster.serve_with(&["--force"]);
    witness.verify(&mut connect(&server, "demo"), Promise::Flushed).unwrap().unwrap();
    assert!(node.stop().success());
}

/// A device whose file lies on a file system that has no space left: the kernel answers writes with an error.
#[test]
fn a_disk_that_refuses_writes_is_left_alone_and_taken_again_when_it_works() {
    let mut cluster = two_nodes("refused-writes");
    let small = cluster.folder().join("small");
    fs::create_dir(&small).unwrap();
    let mount = Outcome::of(process::tool("mount").args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"]).arg(&small));
    if !mount.status.success() {
        eprintln!("SKIPPED: no tmpfs can be mounted here: {}", mount.stderr.trim());
        return;
    }
    let unmounted = Unmounted(small.clone());
    let Some(device) = LoopDevice::new(&small, "disk", 600 * MIB) else { return };
    let mut node = start_third(&cluster, &["--device", device.text()]);
    create(&cluster, "demo", "3");
    let mut server = cluster.serve();
    let mut witness = Witness::new(BYTES, 1);
    let mut client = connect(&server, "demo");
    witness.load(&mut client, 12_000, 500).expect("two replicas are left");
    node.await_line("the disk failed");
    witness.verify(&mut client, Promise::Acknowledged).unwrap().unwrap();
    Outcome::of(process::tool("mount").args(["-o", "remount,size=700m"]).arg(&small)).ok();
    node.await_line("the disk works again");
    drop(client);
    assert!(server.process.stop().success());
    let server = cluster.serve();
    witness.verify(&mut connect(&server, "demo"), Promise::Acknowledged).unwrap().unwrap();
    // The shard serves: a new volume takes it for a replica in good order. It may have been opened and have failed some
    // times before there was room, so that it takes a moment.
    wait::until("a new volume on all three", || {
        let size = format!("{}MiB", BYTES >> 20);
        let created = cluster.torusblk(&["volume", "create", "after", &size, "--replicas", "3"]);
        created.status.success().then_some(())
    });
    let mut other = Witness::new(BYTES, 2);
    let mut client = connect(&server, "after");
    other.load(&mut client, 300, 100).unwrap();
    other.verify(&mut client, Promise::Acknowledged).unwrap().unwrap();
    assert!(node.stop().success());
    drop(device);
    drop(unmounted);
}

struct Unmounted(std::path::PathBuf);

impl Drop for Unmounted {
    fn drop(&mut self) {
        let _ = process::tool("umount").arg("--lazy").arg(&self.0).status();
    }
}
