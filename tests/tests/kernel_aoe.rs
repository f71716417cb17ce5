//! The kernel's own AoE initiator on volumes with three replicas, in a guest (`torus_tests::guest`) on the same Ethernet
//! segment as `torusblk aoe`: file systems, verified load while a node, the target and in the end everything is killed,
//! and a root file system to boot from.
//!
//! The initiator gives a device up after `aoe_deadsecs`, by default 180 s without an answer; until then it sends again.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;
use torus_tests::cluster::{client_host, hosts_for, store_hosts};
use torus_tests::guest::{self, Guest};
use torus_tests::network::{Host, Network};
use torus_tests::process::{self, Process};
use torus_tests::{Cluster, ClusterOptions, wait};

const NODES: usize = 3;
const DEADLINE: Duration = Duration::from_secs(900);
/// The initiator sends what is not answered again at least every few seconds, for 180.
const SILENCE: Duration = Duration::from_secs(120);
const SHELF: &str = "7";
const SLOT: &str = "3";

const PRELUDE: &str = r#"
D=/dev/etherd/e7.3
# What the device says of itself while its first answers are under way is not there yet.
discovered() { echo >/dev/etherd/discover; sleep 0.5; test -b $D && [ "$(blockdev --getsize64 $D)" -gt 0 ]; }
"#;

struct Bed {
    cluster: Cluster,
    network: Network,
}

impl Bed {
    fn new(name: &'static str, mtu: u32) -> Option<Self> {
        let network = Network::with_mtu(hosts_for(NODES), mtu)?;
        let options =
            ClusterOptions { size: "1GiB", network: Some(network.clone()), ..ClusterOptions::new(name, NODES) };
        let cluster = Cluster::start(options);
        Some(Self { cluster, network })
    }

    fn stats(&self, name: &str) -> PathBuf {
        self.cluster.folder().join(format!("{name}.stats"))
    }

    /// Sum of a target's counters whose name, with what follows it, begins so; 0 before it has said any.
    fn counted(&self, name: &str, counter: &str) -> u64 {
        let text = std::fs::read_to_string(self.stats(name)).unwrap_or_default();
        let lines = text.lines().filter(|line| line.starts_with(&format!("torus_aoe_{counter}")));
        lines.map(|line| line.rsplit(' ').next().and_then(|value| value.parse::<u64>().ok()).unwrap_or(0)).sum()
    }

    fn frames_received(&self, name: &str) -> u64 {
        self.counted(name, "frames_received_total")
    }

    /// Whether each frame that the target received was answered, or dropped for a reason it counts.
    fn is_all_answered(&self, name: &str) -> bool {
        self.frames_received(name) <= self.counted(name, "frames_sent_total") + self.counted(name, "dropped_total")
    }

    /// A host that is neither a node nor the first target's.
    fn second_host() -> Host {
        store_hosts(NODES)[1]
    }

    /// `torusblk aoe` for the volume `data`.
    fn target(&self, name: &str, host: Host) -> Process {
        let mut command = process::program("torusblk");
        self.network.place(host, &mut command);
        command.args(["--metadata", &self.cluster.url(), "aoe", "data", "eth0", SHELF, SLOT]);
        command.arg("--stats").arg(self.stats(name));
        Process::spawn(name, &mut command, self.cluster.folder())
    }

    fn script(&self, script: &str) -> String {
        [&guest::prelude(&self.cluster.url()), PRELUDE, script].concat()
    }

    fn guest(&self, script: &str) -> Option<Guest> {
        Guest::start("guest", &self.network, self.cluster.folder(), &self.script(script))
    }
}

const FILE_SYSTEMS: &str = r#"
modprobe aoe
# What the driver is at when nothing is completed for long.
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null || true
completed() { awk '{ print $1, $5 }' "/sys/block/etherd!e7.3/stat" 2>/dev/null; }
while LAST=$(completed) || true; sleep 30; do
    if [ "$LAST" = "$(completed)" ]; then
        cat "/sys/block/etherd!e7.3/stat" /sys/kernel/debug/aoe/* || true
        ps ax -o stat,wchan:30,args | grep '^D' || true
    fi
done &
WATCH=$!
await 60 discovered
aoe-discover
await 20 bash -c 'aoe-stat | grep e7.3 | grep up'
aoe-stat
size_is $D $((512 << 20))
aoe-interfaces
# Frames as long as the segment lets them be, in whole blocks where one has room.
MTU=$(cat /sys/class/net/eth0/mtu)
case $MTU in
    1500) aoe-stat | grep -q ' 1024 ' ;;
    9000) aoe-stat | grep -q ' 8192 ' ;;
esac
timeout 20 aoeping 7 3 eth0
timeout 20 aoeping -I 7 3 eth0
aoecfg -t 2 -c fset -s 'what the operator wrote' 7 3 eth0
aoecfg -t 2 -c read 7 3 eth0 | grep 'what the operator wrote'
aoe-version
aoe-sancheck
aoe-revalidate e7.3
# It has nothing to do where the driver gives out device numbers as they are needed.
{ aoe-mkshelf /run/etherd 7 2>&1 || true; } | grep -q 'dynamic devices'
# Large direct requests at MTU 1500 may stall in this driver whoever the target is.
if [ "$MTU" -lt 9000 ]; then echo 128 >"/sys/block/etherd!e7.3/queue/max_sectors_kb"; fi

mkdir -p /mnt/t
for FS in ext4 xfs; do
    modprobe $FS
    case $FS in
        ext4) mkfs.ext4 -q -F $D ;;
        xfs) mkfs.xfs -q -f $D ;;
    esac
    mount -t $FS $D /mnt/t
    files /mnt/t
    (cd /mnt/t && find . -type f | sort | xargs sha256sum) >/run/sums
    umount /mnt/t
    case $FS in
        ext4) e2fsck -fn $D ;;
        xfs) xfs_repair -n $D 2>/dev/null ;;
    esac
    # What was read before must not come from memory.
    blockdev --flushbufs $D
    mount -t $FS $D /mnt/t
    (cd /mnt/t && sha256sum --quiet -c /run/sums)
    umount /mnt/t
    echo "$FS is well"
done
fio --name=verified --filename=$D --direct=1 --ioengine=libaio --rw=randwrite --bsrange=1k-16k --blockalign=1k --iodepth=32 \
    --size=32M --verify=crc32c --verify_fatal=1 --output-format=terse >/run/fio
kill $WATCH
no_io_errors
echo 'all is well'
"#;

fn file_systems(name: &'static str, mtu: u32) {
    let Some(bed) = Bed::new(name, mtu) else { return };
    bed.cluster.torusblk(&["volume", "create", "data", "512MiB"]).ok();
    let mut target = bed.target("aoe", client_host(NODES));
    for attempt in 1.. {
        let Some(guest) = bed.guest(FILE_SYSTEMS) else { return };
        match guest.finish_unless_silent(DEADLINE, SILENCE, || bed.frames_received("aoe")) {
            Ok(ran) => {
                let output = ran.ok();
                println!("{output}");
                assert!(output.ends_with("all is well\n"), "{output}");
                wait::until("all that was asked to be answered", || bed.is_all_answered("aoe").then_some(()));
                return;
            }
            // This driver stalls at times with frames of 1,024 bytes, whoever the target is, and then asks nothing more.
            // What it had asked and was not answered, it would ask again.
            Err(told) => {
                println!("SILENT: the guest asked nothing for {SILENCE:?}: {told}");
                assert!(attempt == 1 && mtu < 9000, "silent: {told}");
                // It gives a device up that leaves it without an answer for 180 s, and is silent then too.
                assert!(bed.is_all_answered("aoe"), "not answered: {told}");
                assert!(target.is_running(), "{}", target.log());
            }
        }
    }
}

#[test]
fn file_systems_on_an_aoe_device_keep_what_they_are_given_in_short_frames() {
    file_systems("kernel-aoe-short", 1500);
}

#[test]
fn file_systems_on_an_aoe_device_keep_what_they_are_given_in_jumbo_frames() {
    file_systems("kernel-aoe-jumbo", 9000);
}

const TROUBLES: &str = r#"
modprobe aoe
await 60 discovered
mkfs.ext4 -q -F $D
mkdir -p /mnt/t
mount $D /mnt/t
# Answered is durable: what fio has been told is written must be read back whatever dies meanwhile.
fio --name=verified --directory=/mnt/t --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=32 --size=32M \
    --time_based --runtime=75 --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=256 \
    --output-format=terse >/run/fio 2>/run/fio.errors &
LOAD=$!
sleep 3
echo 'kill a node'
await 60 is_degraded
echo 'a node is away'
await 120 is_healthy
echo 'kill the target'
sleep 20
echo 'kill everything'
if ! wait $LOAD; then cat /run/fio /run/fio.errors; exit 1; fi
cat /run/fio.errors
umount /mnt/t
e2fsck -fn $D
no_io_errors
echo 'all is well'
"#;

#[test]
fn a_node_the_target_and_then_everything_is_killed_under_load_and_the_kernel_sees_no_error() {
    let Some(mut bed) = Bed::new("kernel-aoe-troubles", 9000) else { return };
    bed.cluster.torusblk(&["volume", "create", "data", "256MiB"]).ok();
    let mut first = bed.target("aoe-first", client_host(NODES));
    let Some(mut guest) = bed.guest(TROUBLES) else { return };
    guest.await_line("kill a node", DEADLINE);
    bed.cluster.kill_node(0);
    // It waits for the first to go.
    let mut second = bed.target("aoe-second", Bed::second_host());
    guest.await_line("a node is away", DEADLINE);
    bed.cluster.start_node(0);
    guest.await_line("kill the target", DEADLINE);
    first.kill();
    guest.await_line("kill everything", DEADLINE);
    assert!(second.is_running(), "{}", second.log());
    second.kill();
    (0..NODES).for_each(|node| bed.cluster.kill_node(node));
    bed.cluster.start_nodes(&[0, 1, 2]);
    let _third = bed.target("aoe-third", client_host(NODES));
    let output = guest.finish(DEADLINE).ok();
    println!("{output}");
    assert!(output.ends_with("all is well\n"), "{output}");
}

/// Makes the root file system: busybox, and a console to log in at.
fn root_image(folder: &std::path::Path) -> std::path::PathBuf {
    let (root, image) = (folder.join("root"), folder.join("root.ext4"));
    let script = format!(
        r#"set -eu
mkdir -p {root}/bin {root}/etc {root}/dev {root}/proc {root}/sys {root}/root {root}/sbin
cp "$(command -v busybox)" {root}/bin/busybox
for name in sh init getty login mount cat echo sync reboot poweroff ls umount sleep dmesg grep; do
    ln -sf /bin/busybox {root}/bin/$name
done
ln -sf /bin/busybox {root}/sbin/init
echo 'root::0:0:root:/root:/bin/sh' >{root}/etc/passwd
cat >{root}/etc/inittab <<'END'
::sysinit:/bin/mount -t proc proc /proc
::sysinit:/bin/mount -o remount,rw /
hvc0::respawn:/bin/getty -L 115200 hvc0 vt100
::shutdown:/bin/umount -a -r
END
PATH=$PATH:/usr/sbin:/sbin
mke2fs -q -t ext4 -d {root} {image} 64M"#,
        root = root.display(),
        image = image.display()
    );
    process::Outcome::of(Command::new("bash").arg("-c").arg(script)).ok();
    image
}

#[test]
fn a_guest_boots_from_an_aoe_volume_and_finds_its_changes_after_a_reboot() {
    let Some(mut bed) = Bed::new("kernel-aoe-root", 1500) else { return };
    bed.cluster.torusblk(&["volume", "create", "data", "64MiB"]).ok();
    let image = root_image(bed.cluster.folder());
    let mut server = bed.cluster.serve();
    process::Outcome::of(process::tool("nbdcopy").arg(&image).arg(server.url("data"))).ok();
    assert!(server.process.stop().success());
    let _target = bed.target("aoe", client_host(NODES));
    for boot in ["first", "second"] {
        let folder = bed.cluster.folder();
        let Some(mut guest) = Guest::boot_from_aoe(boot, &bed.network, folder, "e7.3") else { return };
        guest.await_console("login:", DEADLINE);
        guest.type_line("root");
        guest.await_console("/root #", DEADLINE);
        guest.type_line("grep ' / ' /proc/mounts");
        guest.await_console("/dev/etherd/e7.3 / ext4 rw", DEADLINE);
        if boot == "first" {
            guest.type_line("echo what was chan''ged >/etc/kept; echo done-$?");
            guest.await_console("done-0", DEADLINE);
        } else {
            guest.type_line("cat /etc/kept");
            guest.await_console("what was changed", DEADLINE);
        }
        guest.type_line("! dmesg | grep 'I/O error' && echo no''thing wrong");
        guest.await_console("nothing wrong", DEADLINE);
        guest.type_line("reboot");
        guest.await_end(DEADLINE);
    }
}
