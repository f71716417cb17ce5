//! Shards on raw devices (loop devices here): formatted only where nothing else is, known by what stands on them and
//! not by their path, and held while the node runs.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::loops::LoopDevice;
use torus_tests::process::{self, Outcome, Process};
use torus_tests::tools::{qemu_io, qemu_io_ok};
use torus_tests::wait;

const MIB: u64 = 1 << 20;

/// A cluster that waits for its node, and devices for it.
fn with_devices<const COUNT: usize>(name: &'static str) -> Option<(Cluster, [LoopDevice; COUNT])> {
    let cluster = Cluster::start(ClusterOptions::new(name, 0));
    let mut devices = Vec::new();
    for number in 0..COUNT {
        devices.push(LoopDevice::new(cluster.folder(), &format!("disk-{number}"), 700 * MIB)?);
    }
    Some((cluster, devices.try_into().ok().expect("as many as were asked for")))
}

fn command(cluster: &Cluster, devices: &[&LoopDevice], extra: &[&str]) -> std::process::Command {
    let mut command = process::program("torus-engine");
    command.args(["--metadata", &cluster.url(), "--listen", "127.0.0.1:0"]);
    command.arg("--data-dir").arg(cluster.data_dir(0)).args(extra);
    command.args(devices.iter().flat_map(|device| ["--device", device.text()]));
    command
}

fn start(cluster: &Cluster, devices: &[&LoopDevice], extra: &[&str]) -> Process {
    let mut node = Process::spawn("node", &mut command(cluster, devices, extra), cluster.folder());
    node.await_line("serving node");
    node
}

fn refusal(cluster: &Cluster, devices: &[&LoopDevice], extra: &[&str]) -> String {
    Outcome::of(&mut command(cluster, devices, extra)).refused()
}

fn write_data(cluster: &mut Cluster) {
    cluster.torusadm(&["peer", "add", "--all-peers"]).ok();
    cluster.torusblk(&["volume", "create", "demo", "64MiB", "--replicas", "1"]).ok();
    let mut server = cluster.serve();
    qemu_io_ok(&server.url("demo"), &["write -P 85 0 8M", "write -P 34 40M 4M", "flush"]);
    assert!(server.process.stop().success());
}

fn check_data(cluster: &mut Cluster) {
    let mut server = cluster.serve();
    wait::until("the volume to be free", || {
        qemu_io(&server.url("demo"), &["read 0 4k"]).status.success().then_some(())
    });
    qemu_io_ok(&server.url("demo"), &["read -P 85 0 8M", "read -P 34 40M 4M", "read -P 0 8M 1M"]);
    assert!(server.process.stop().success());
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "expected {word:?} in: {text}");
    }
}

#[test]
fn shards_on_devices_keep_their_data_over_kill_and_restart_and_the_devices_are_held() {
    let Some((mut cluster, [one, two])) = with_devices::<2>("devices") else { return };
    let mut node = start(&cluster, &[&one, &two], &["--shards", "2"]);
    assert!(!cluster.data_dir(0).join("shard-0.blocks").exists());
    write_data(&mut cluster);
    let mkfs = Outcome::of(process::tool("mkfs.ext4").args(["-q", "-F"]).arg(&one.path));
    assert!(!mkfs.status.success(), "a device that serves can be formatted by another: {mkfs:?}");
    node.kill();
    // The devices are remembered; naming them in another order changes nothing.
    let mut node = start(&cluster, &[], &[]);
    check_data(&mut cluster);
    assert!(node.stop().success());
    let mut node = start(&cluster, &[&two, &one], &[]);
    check_data(&mut cluster);
    assert!(node.stop().success());
}

#[test]
fn several_shards_share_a_device() {
    let Some((mut cluster, [device])) = with_devices::<1>("shared-device") else { return };
    device.resize(1200 * MIB);
    let mut node = start(&cluster, &[&device], &["--shards", "2", "--size", "1GiB"]);
    write_data(&mut cluster);
    node.kill();
    let mut node = start(&cluster, &[], &[]);
    check_data(&mut cluster);
    assert!(node.stop().success());
    let text = refusal(&cluster, &[], &["--size", "1152MiB"]);
    assert_says(&text, &["share 1 devices", "add a node"]);
}

#[test]
fn a_device_that_holds_anything_is_refused_unless_forced() {
    let Some((cluster, [device])) = with_devices::<1>("foreign-device") else { return };
    let raw = OpenOptions::new().write(true).open(&device.path).unwrap();
    for (offset, what) in [(70_000, "70000"), (700 * MIB - 5000, "offset 733998")] {
        raw.write_all_at(&[7], offset).unwrap();
        let text = refusal(&cluster, &[&device], &[]);
        assert_says(&text, &[device.text(), what, "--force"]);
        raw.write_all_at(&[0], offset).unwrap();
    }
    drop(raw);
    Outcome::of(process::tool("mkfs.ext4").args(["-q", "-F"]).arg(&device.path)).ok();
    assert_says(&refusal(&cluster, &[&device], &[]), &["ext4", "--force", "expected an empty device"]);
    // Refused means untouched.
    Outcome::of(process::tool("e2fsck").arg("-fn").arg(&device.path)).ok();
    let mut node = start(&cluster, &[&device], &["--force"]);
    assert!(node.stop().success());
}

#[test]
fn a_device_that_is_mounted_or_no_device_or_named_twice_is_refused_whatever_is_forced() {
    let Some((cluster, [device])) = with_devices::<1>("used-device") else { return };
    let text = refusal(&cluster, &[&device, &device], &["--force", "--size", "512MiB"]);
    assert_says(&text, &["one device", device.text()]);
    let file = device.file.to_str().unwrap();
    assert_says(&refusal(&cluster, &[], &["--force", "--device", file]), &["not a block device"]);
    Outcome::of(process::tool("mkfs.ext4").args(["-q", "-F"]).arg(&device.path)).ok();
    let folder = cluster.folder().join("mounted");
    fs::create_dir(&folder).unwrap();
    Outcome::of(process::tool("mount").arg(&device.path).arg(&folder)).ok();
    let text = refusal(&cluster, &[&device], &["--force"]);
    Outcome::of(process::tool("umount").arg(&folder)).ok();
    assert_says(&text, &["in use", "mounted", device.text()]);
}

#[test]
fn a_device_of_another_node_is_refused() {
    let Some((cluster, [device])) = with_devices::<1>("other-nodes-device") else { return };
    assert!(start(&cluster, &[&device], &[]).stop().success());
    let mut other = command(&cluster, &[&device], &[]);
    other.arg("--data-dir").arg(cluster.folder().join("other"));
    assert_says(&Outcome::of(&mut other).refused(), &["a Torus shard", "--force"]);
}

#[test]
fn a_device_with_another_path_is_found_and_one_that_is_gone_is_named() {
    let Some((mut cluster, [one, two])) = with_devices::<2>("moved-device") else { return };
    let mut node = start(&cluster, &[&one, &two], &[]);
    write_data(&mut cluster);
    assert!(node.stop().success());
    // The second device takes the path of the first, and the first another one.
    let file = one.file.clone();
    let was = one.path.clone();
    drop(one);
    wait::until("the device to be detached", || {
        let listed = Outcome::of(process::tool("losetup").args(["--list", "--noheadings"]).arg(&was));
        (!listed.stdout.contains(file.to_str().unwrap())).then_some(())
    });
    let text = refusal(&cluster, &[], &[]);
    assert_says(&text, &["shard 0", "missing", was.to_str().unwrap(), "no block device of this machine has it"]);
    let placeholder = LoopDevice::new(cluster.folder(), "placeholder", 700 * MIB);
    let moved = LoopDevice::of(&file).unwrap();
    let mut node = start(&cluster, &[], &[]);
    check_data(&mut cluster);
    assert!(node.stop().success());
    assert_eq!(cluster.identity(0).devices, [moved.path.clone(), two.path.clone()]);
    let text = refusal(&cluster, &[&two], &[]);
    assert_says(&text, &["name all of them"]);
    let copy = cluster.folder().join("copy.device");
    Outcome::of(process::tool("cp").arg("--sparse=always").arg(&moved.file).arg(&copy)).ok();
    let _copy = LoopDevice::of(&copy).unwrap();
    // The remembered path still leads to the right one.
    assert!(start(&cluster, &[], &[]).stop().success());
    drop(placeholder);
}

#[test]
fn a_device_that_became_larger_is_used_when_more_is_asked_for() {
    let Some((mut cluster, [device])) = with_devices::<1>("larger-device") else { return };
    let mut node = start(&cluster, &[&device], &[]);
    write_data(&mut cluster);
    assert!(node.stop().success());
    assert_says(&refusal(&cluster, &[], &["--size", "1GiB"]), &["device too small", "1073741824"]);
    device.resize(1100 * MIB);
    // What lies behind the old end is not taken for segments.
    let raw = OpenOptions::new().write(true).open(&device.path).unwrap();
    raw.write_all_at(&vec![0xa5; 64 << 20], 700 * MIB).unwrap();
    raw.sync_all().unwrap();
    drop(raw);
    let mut node = start(&cluster, &[], &["--size", "1GiB"]);
    assert_eq!(cluster.node_record(0).size_bytes(), 1 << 30);
    check_data(&mut cluster);
    node.kill();
    let mut node = start(&cluster, &[], &[]);
    check_data(&mut cluster);
    assert!(node.stop().success());
}

#[test]
fn a_format_of_devices_killed_at_any_moment_is_completed_by_the_next_start() {
    let Some((cluster, [one, two])) = with_devices::<2>("killed-device-format") else { return };
    let dir = cluster.data_dir(0);
    for seen in ["formatting", "torus.json"] {
        let mut first = Process::spawn("first", &mut command(&cluster, &[&one, &two], &[]), cluster.folder());
        // On a busy machine a whole format may go by between two looks.
        let is_past = || dir.join(seen).exists() || dir.join("torus.json").exists();
        wait::until_glimpsed(seen, || is_past().then_some(()));
        first.kill();
    }
    // As after a crash between the superblocks and the identity.
    let node = cluster.node_id(0);
    cluster.unformat(0);
    fs::write(dir.join("formatting"), format!("a format of node {node} was cut off\n")).unwrap();
    let mut second = start(&cluster, &[&one, &two], &[]);
    assert_eq!(cluster.node_id(0), node);
    assert!(second.stop().success());
}
