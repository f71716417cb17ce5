//! The kernel's own NBD client on volumes with three replicas, in a guest (`torus_tests::guest`): `torusblk nbd` and
//! `nbd-client`, file systems, trims, load while nodes and the process that serves the device are killed.
//!
//! The guest reads the programs that were built from this machine's files. `TORUS_GUEST_MINUTES` makes the load of the
//! troubles longer.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::time::Duration;
use torus_tests::cluster::{TEST_HOST, hosts_for};
use torus_tests::guest::{self, Guest};
use torus_tests::network::Network;
use torus_tests::process::{self, Outcome};
use torus_tests::{Cluster, ClusterOptions};

const NODES: usize = 3;
/// The first port that is rung on the test's own host, which the test is on: the network is nobody else's.
const BELL: u16 = 7;
const DEADLINE: Duration = Duration::from_secs(900);

/// What every script here begins with, after what all do. `attach` sets SERVER, its pid; the device is in its output's
/// last line.
const PRELUDE: &str = r#"
attach() {
    : >/run/nbd.out
    torusblk nbd "$@" >/run/nbd.out 2>>/run/nbd.log &
    SERVER=$!
    await 60 grep -q attached /run/nbd.out
    echo "attached as $(cut -d' ' -f2 /run/nbd.out)"
}
detach() { kill "$SERVER"; wait "$SERVER"; }
attached() { test -e "/sys/block/$1/pid"; }
bell() { await 120 bash -c "exec 3<>/dev/tcp/10.77.0.1/$1"; }
free_again() { ! attached "$1"; }
"#;

struct Bed {
    cluster: Cluster,
    network: Network,
}

impl Bed {
    fn new(name: &'static str) -> Option<Self> {
        let network = Network::new(hosts_for(NODES))?;
        let options =
            ClusterOptions { size: "1GiB", network: Some(network.clone()), ..ClusterOptions::new(name, NODES) };
        let cluster = Cluster::start(options);
        Some(Self { cluster, network })
    }

    fn volume(&self, name: &str, size: &str) {
        self.cluster.torusblk(&["volume", "create", name, size]).ok();
    }

    /// The guest's `bell PORT` returns.
    fn ring(&self, port: u16) -> TcpListener {
        TcpListener::bind((self.network.address(TEST_HOST), port)).expect("the test's host has no other ports")
    }

    fn picture(&self, node: usize) -> PathBuf {
        self.cluster.data_dir(node).with_extension("picture")
    }

    /// Of every node's disks, while nobody writes to them and all is flushed.
    fn take_pictures(&self) {
        (0..NODES).for_each(|node| copy(&self.cluster.data_dir(node), &self.picture(node)));
    }

    /// As if the power had failed: the disks, of nodes that do not run, lose what came after the flush.
    fn back_to_pictures(&self) {
        (0..NODES).for_each(|node| copy(&self.picture(node), &self.cluster.data_dir(node)));
    }

    fn replicas_are_alike(&self, volume: &str) {
        assert!(self.cluster.await_in_sync(DEADLINE), "{}", self.cluster.torusadm(&["status"]).stdout);
        let compared = self.cluster.torusadm(&["volume", "compare", volume]).ok();
        println!("{compared}");
        assert!(compared.contains(" 0 differ") && !compared.contains(" 0 with data"), "{compared}");
        assert!(!compared.contains("not compared"), "{compared}");
    }

    fn guest(&self, script: &str) -> Option<Guest> {
        let script = [&guest::prelude(&self.cluster.url()), PRELUDE, script].concat();
        Guest::start("guest", &self.network, self.cluster.folder(), &script)
    }
}

fn copy(from: &Path, to: &Path) {
    let _ = std::fs::remove_dir_all(to);
    Outcome::of(process::tool("cp").args(["-a", "--sparse=always"]).arg(from).arg(to)).ok();
}

const FILE_SYSTEMS: &str = r#"
# Without the module, which the kernel would load by itself, it says what to do.
MODPROBE=$(cat /proc/sys/kernel/modprobe)
echo /bin/false >/proc/sys/kernel/modprobe
torusblk nbd data 2>/run/hint && exit 1
grep -q 'modprobe nbd' /run/hint
echo "$MODPROBE" >/proc/sys/kernel/modprobe
modprobe nbd nbds_max=4 max_part=8

attach data
D=/dev/nbd0
size_is $D $((640 << 20))
test "$(blockdev --getss $D)" = 4096
test "$(cat /sys/block/nbd0/queue/write_cache)" = 'write back'
torusblk nbd --list | grep nbd0 | grep data
# Twice is refused, and says where it is.
torusblk nbd data 2>/run/again && exit 1
grep -q 'serves this volume as /dev/nbd0' /run/again

mkdir -p /mnt/t
for FS in ext4 xfs f2fs; do
    modprobe $FS
    case $FS in
        ext4) mkfs.ext4 -q -F $D ;;
        xfs) mkfs.xfs -q -f $D ;;
        f2fs) mkfs.f2fs -q -f $D ;;
    esac
    mount -t $FS -o discard $D /mnt/t
    files /mnt/t
    (cd /mnt/t && find . -type f | sort | xargs sha256sum) >/run/sums
    # Neither a larger size nor a signal harms anybody while it is mounted.
    if [ $FS = ext4 ]; then
        torusblk volume resize data 704MiB
        await 30 size_is $D $((704 << 20))
        resize2fs $D 2>&1
        test "$(df --output=size -B1M /mnt/t | tail -n 1)" -gt 640
        kill "$SERVER"
        await 20 grep -q 'in use' /run/nbd.log
        attached nbd0
    fi
    umount /mnt/t
    if [ $FS = ext4 ]; then
        wait "$SERVER"
        free_again nbd0
        attach data /dev/nbd0
    fi
    case $FS in
        ext4) e2fsck -fn $D ;;
        xfs) xfs_repair -n $D 2>/dev/null ;;
        f2fs) fsck.f2fs $D >/run/fsck; ! grep -E '\[Fail\]' /run/fsck ;;
    esac
    # What was read before must not come from memory.
    blockdev --flushbufs $D
    mount -t $FS -o nodiscard $D /mnt/t
    (cd /mnt/t && sha256sum --quiet -c /run/sums)
    sync
    FULL=$(used)
    rm -r /mnt/t/*
    sync
    fstrim -v /mnt/t
    # What was trimmed is freed once that is flushed.
    touch /mnt/t/x
    sync
    # 50 MB of files on three nodes.
    await 60 used_below $((FULL - (100 << 20))) || { echo "used $FULL before, $(used) after fstrim"; exit 1; }
    echo "$FS: used $FULL before fstrim, $(used) after"
    umount /mnt/t
    echo "$FS is well"
done

detach
no_io_errors
echo 'all is well'
"#;

#[test]
fn file_systems_on_a_kernel_device_keep_what_they_are_given_and_give_back_what_they_trim() {
    let Some(bed) = Bed::new("kernel-fs") else { return };
    bed.volume("data", "640MiB");
    let Some(guest) = bed.guest(FILE_SYSTEMS) else { return };
    let output = guest.finish(DEADLINE).ok();
    println!("{output}");
    assert!(output.ends_with("all is well\n"), "{output}");
}

const BARE: &str = r#"
modprobe nbd nbds_max=4
attach data
D=/dev/nbd0
fio --name=verified --filename=$D --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=32 --size=48M \
    --verify=crc32c --verify_fatal=1 --output-format=terse >/run/fio
blkdiscard -z $D
cmp -n $((128 << 20)) /dev/zero $D
blkdiscard $D
dd if=/dev/urandom of=$D bs=1M count=8 oflag=direct status=none
detach
free_again nbd0

# Smaller only when told that this is meant, and never under its users.
torusblk volume resize data 64MiB 2>/run/refused && exit 1
grep -q -e '--allow-shrink' /run/refused
torusblk volume resize data 64MiB --allow-shrink

# 512-byte requests, and no writes.
attach data /dev/nbd2 --block-size 512 --read-only
test "$(blockdev --getss /dev/nbd2)" = 512
test "$(blockdev --getro /dev/nbd2)" = 1
size_is /dev/nbd2 $((64 << 20))
torusblk volume resize data 32MiB --allow-shrink 2>/run/refused && exit 1
grep -q 'detach it there first' /run/refused
dd if=/dev/nbd2 of=/dev/null bs=512 count=3 skip=1 iflag=direct status=none
torusblk nbd --detach /dev/nbd2
wait "$SERVER"
free_again nbd2
torusblk nbd --detach /dev/nbd2 2>/run/refused && exit 1
grep -q 'is not attached' /run/refused
no_io_errors
echo 'all is well'
"#;

#[test]
fn a_bare_kernel_device_verifies_clears_shrinks_and_is_detached() {
    let Some(bed) = Bed::new("kernel-bare") else { return };
    bed.volume("data", "128MiB");
    let Some(guest) = bed.guest(BARE) else { return };
    let output = guest.finish(DEADLINE).ok();
    println!("{output}");
    assert!(output.ends_with("all is well\n"), "{output}");
}

const TROUBLES: &str = r#"
modprobe nbd nbds_max=4
attach data
D=/dev/nbd0
mkfs.ext4 -q -F $D
mkdir -p /mnt/t
mount $D /mnt/t
load() {
    fio --name=verified --directory=/mnt/t --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=32 --size=32M \
        --fsync=64 --time_based --runtime="$1" --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=256 \
        --output-format=terse >/run/fio 2>/run/fio.errors
}
load $SECONDS_OF_LOAD &
LOAD=$!
sleep 3
echo 'kill a node'
await 60 is_degraded
echo 'a node is away'
await 120 is_healthy
echo 'all in sync'
# Whoever serves the device dies under load, twice; the next one serves it on.
for _ in 1 2; do
    kill -9 "$SERVER"
    wait "$SERVER" || true
    attached nbd0
    torusblk nbd --list
    attach data
    grep -q nbd0 /run/nbd.out
    sleep 3
done
echo 'served on'
if ! wait $LOAD; then cat /run/fio /run/fio.errors; exit 1; fi
cat /run/fio.errors
umount /mnt/t
e2fsck -fn $D
detach
free_again nbd0
no_io_errors
echo 'all is well'
"#;

#[test]
fn a_node_and_the_serving_process_are_killed_under_load_and_the_kernel_sees_no_error() {
    let Some(mut bed) = Bed::new("kernel-troubles") else { return };
    bed.volume("data", "256MiB");
    let minutes: u64 =
        std::env::var("TORUS_GUEST_MINUTES").map_or(0, |text| text.parse().expect("TORUS_GUEST_MINUTES is a number"));
    let script = format!("SECONDS_OF_LOAD={}\n{TROUBLES}", 60 + minutes * 60);
    let Some(mut guest) = bed.guest(&script) else { return };
    guest.await_line("kill a node", DEADLINE);
    bed.cluster.kill_node(0);
    guest.await_line("a node is away", DEADLINE);
    bed.cluster.start_node(0);
    let output = guest.finish(DEADLINE + Duration::from_secs(minutes * 60)).ok();
    println!("{output}");
    assert!(output.ends_with("all is well\n"), "{output}");
}

/// The node that falls silent with the process that serves the device stays away until all of it is over.
const ABSENT: &str = r#"
modprobe nbd nbds_max=4
attach data
D=/dev/nbd0
mkfs.ext4 -q -F $D
mkdir -p /mnt/t
mount $D /mnt/t
fio --name=verified --directory=/mnt/t --direct=1 --ioengine=libaio --rw=randwrite --bs=4k --iodepth=32 --size=32M \
    --fsync=64 --time_based --runtime=30 --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_backlog=256 \
    --output-format=terse >/run/fio 2>/run/fio.errors &
LOAD=$!
# Files that come and are replaced until it is enough, each fourth on disk before the next.
python3 - <<'PYTHON' &
import hashlib, os, random
folder, sums, number = '/mnt/t/files', {}, 0
os.mkdir(folder)
while not os.path.exists('/run/enough'):
    data = random.randbytes(random.randrange(20000))
    with open('%s/%d' % (folder, number % 400), 'wb') as file:
        file.write(data)
        if number % 4 == 0:
            file.flush()
            os.fsync(file.fileno())
    sums[number % 400] = hashlib.sha256(data).hexdigest()
    number += 1
with open('/run/sums', 'w') as file:
    file.writelines('%s  %d\n' % (sums[name], name) for name in sums)
print(number, 'files written')
PYTHON
FILES=$!
# The device works: something new is on disk.
works() { dd if=/dev/urandom of=/mnt/t/works bs=4k count=16 conv=fsync status=none; }
next() {
    kill -9 "$SERVER"
    wait "$SERVER" || true
    attached nbd0
    attach data
    grep -q nbd0 /run/nbd.out
    works
}
await 30 test -e /mnt/t/files/20
echo 'kill a node with the process'
next
is_degraded
echo 'served on without the node'
# It is marked stale by now. Of the two that are in sync one has been there all the time, which is enough.
echo 'restart another with the process'
next
is_degraded
echo 'the node may come back'
await 60 is_healthy
echo 'all in sync'
works
touch /run/enough
if ! wait $LOAD; then cat /run/fio /run/fio.errors; exit 1; fi
cat /run/fio.errors
wait $FILES
umount /mnt/t
e2fsck -fn $D
# What was read before must not come from memory.
blockdev --flushbufs $D
mount $D /mnt/t
(cd /mnt/t/files && sha256sum --quiet -c /run/sums)
umount /mnt/t
detach
free_again nbd0
no_io_errors
echo 'all is well'
"#;

#[test]
fn the_process_dies_while_a_node_is_away_and_stays_away_and_the_kernel_sees_no_error() {
    let Some(mut bed) = Bed::new("kernel-absent") else { return };
    bed.volume("data", "256MiB");
    let Some(mut guest) = bed.guest(ABSENT) else { return };
    guest.await_line("kill a node with the process", DEADLINE);
    bed.cluster.kill_node(0);
    guest.await_line("restart another with the process", DEADLINE);
    bed.cluster.kill_node(1);
    bed.cluster.start_node(1);
    guest.await_line("the node may come back", DEADLINE);
    bed.cluster.start_node(0);
    let output = guest.finish(DEADLINE).ok();
    println!("{output}");
    assert!(output.ends_with("all is well\n"), "{output}");
    bed.replicas_are_alike("data");
}

const LOSSES: &str = r#"
modprobe nbd nbds_max=4
# Keeps the device open, as a file system does. What it wrote last is answered and not flushed as the power fails.
user() {
    python3 - <<'PYTHON'
import errno, mmap, os, time
def tell(what):
    open('/run/' + what, 'w').close()
def hear(what):
    while not os.path.exists('/run/' + what):
        time.sleep(0.05)
def attempt(what, call):
    try:
        call()
        print(what, 'succeeded', flush=True)
    except OSError as error:
        print(what, errno.errorcode[error.errno], flush=True)
device = os.open('/dev/nbd0', os.O_RDWR | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
def write(letter):
    page[:] = letter * 4096
    for block in range(64):
        os.pwrite(device, page, block * 4096)
write(b'f')
os.fsync(device)
tell('flushed')
hear('pictured')
write(b'u')
tell('answered')
hear('dead')
attempt('flush', lambda: os.fsync(device))
attempt('read', lambda: os.preadv(device, [page], 0))
attempt('write', lambda: os.pwrite(device, page, 0))
hear('over')
PYTHON
}
refused() { # to the next process: the device
    timeout -s KILL 60 torusblk nbd data >/run/nbd.out 2>/run/refusal || true
    cat /run/refusal /run/nbd.out
    # Nor did it serve it until its time was over. Whoever has the device open tells what became of his requests.
    test ! -s /run/nbd.out || { cat /run/user; return 1; }
}
lose() { # how the round is called, two ports
    rm -f /run/{flushed,pictured,answered,dead,over}
    attach data
    user >/run/user &
    USER_OF_IT=$!
    await 60 test -e /run/flushed
    echo "all is flushed, round $1"
    bell "$2"
    touch /run/pictured
    await 60 test -e /run/answered
    kill -9 "$SERVER"
    wait "$SERVER" || true
    touch /run/dead
    echo "the power fails, round $1"
    bell "$3"
    # Its flush waits for the next process. That may not serve the device on: the flush would succeed.
    test ! -s /run/user
    refused
    grep -q 'was failed' /run/refusal
    grep -q 'started anew' /run/refusal
    await 30 grep -q write /run/user
    cat /run/user
    diff <(printf '%s EIO\n' flush read write) /run/user
    # As long as somebody has it open nobody gets him a device that works again.
    refused
    touch /run/over
    wait "$USER_OF_IT"
    await 10 free_again nbd0
    # Attached anew it is as good as ever: what was flushed is there. What was not is lost.
    attach data
    dd if=/dev/nbd0 of=/run/found bs=4k count=64 iflag=direct status=none
    test "$(tr -d f </run/found | wc -c)" = 0
    detach
}
lose 'all come back' 7 8
lose 'one stays away' 9 10
dmesg | grep -q 'I/O error'
echo 'all is well'
"#;

#[test]
fn a_device_whose_unflushed_writes_are_gone_is_failed_by_the_next_process_under_its_user() {
    let Some(mut bed) = Bed::new("kernel-losses") else { return };
    bed.volume("data", "64MiB");
    let Some(mut guest) = bed.guest(LOSSES) else { return };
    let mut bells = vec![];
    for (round, back) in [("all come back", vec![0, 1, 2]), ("one stays away", vec![1, 2])] {
        guest.await_line(&format!("all is flushed, round {round}"), DEADLINE);
        bed.take_pictures();
        bells.push(bed.ring(BELL + bells.len() as u16));
        guest.await_line(&format!("the power fails, round {round}"), DEADLINE);
        (0..NODES).for_each(|node| bed.cluster.kill_node(node));
        bed.back_to_pictures();
        bed.cluster.start_nodes(&back);
        bells.push(bed.ring(BELL + bells.len() as u16));
    }
    let output = guest.finish(DEADLINE).ok();
    println!("{output}");
    assert!(output.ends_with("all is well\n"), "{output}");
    bed.cluster.start_node(0);
    bed.replicas_are_alike("data");
}

const NBD_CLIENT: &str = r#"
modprobe nbd nbds_max=4
nbd-client -N data -connections 4 $SERVER_HOST $SERVER_PORT /dev/nbd1
D=/dev/nbd1
mkfs.ext4 -q -F $D
mkdir -p /mnt/t
mount -o discard $D /mnt/t
dd if=/dev/urandom of=/mnt/t/file bs=1M count=16 conv=fsync status=none
sha256sum /mnt/t/file >/run/sum
umount /mnt/t
e2fsck -fn $D
mount $D /mnt/t
sha256sum --quiet -c /run/sum
umount /mnt/t
torusblk nbd --list | grep nbd1 | grep 'not of torusblk'
torusblk nbd --detach $D 2>/run/refused && exit 1
grep -q 'not attached by torusblk' /run/refused
nbd-client -d $D
no_io_errors
echo 'all is well'
"#;

#[test]
fn nbd_client_attaches_what_torusblk_serves() {
    let Some(mut bed) = Bed::new("kernel-nbd-client") else { return };
    bed.volume("data", "128MiB");
    let server = bed.cluster.serve();
    let address = server.address;
    let script = format!("SERVER_HOST={} SERVER_PORT={}\n{NBD_CLIENT}", address.ip(), address.port());
    let Some(guest) = bed.guest(&script) else { return };
    let output = guest.finish(DEADLINE).ok();
    println!("{output}");
    assert!(output.ends_with("all is well\n"), "{output}");
}
