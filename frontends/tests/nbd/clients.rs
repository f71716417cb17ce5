//! The clients that people use work with the server, over TCP and unix sockets: libnbd's tools, QEMU's, fio.

use crate::support::{MIB, Server, run, run_any};
use std::path::Path;

/// Bytes that repeat nowhere near, from a seed.
fn noise(bytes: usize, seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut words = Vec::with_capacity(bytes + 8);
    while words.len() < bytes {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        words.extend_from_slice(&(state ^ (state >> 33)).to_le_bytes());
    }
    words.truncate(bytes);
    words
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary directories have plain names")
}

#[test]
fn nbdinfo_tells_everything_about_an_export() {
    let server = Server::start(64 * MIB);
    let said = run("nbdinfo", &["--json", &server.uri]);
    let info: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(info["protocol"], "newstyle-fixed");
    let export = &info["exports"][0];
    assert_eq!(export["export-name"], "disk");
    assert_eq!(export["description"], "memory of a test");
    assert_eq!(export["export-size"], 64 * MIB);
    assert_eq!(export["block_size_minimum"], 1);
    assert_eq!(export["block_size_preferred"], 4096);
    assert_eq!(export["block_size_maximum"], 32 * MIB);
    for (flag, expected) in [
        ("is_read_only", false),
        ("can_flush", true),
        ("can_fua", true),
        ("can_trim", true),
        ("can_zero", true),
        ("can_multi_conn", true),
        ("can_fast_zero", true),
        ("can_df", true),
        ("can_cache", true),
    ] {
        assert_eq!(export[flag], expected, "{flag}");
    }
}

#[test]
fn nbdinfo_lists_the_exports_and_nothing_is_attached_by_it() {
    let server = Server::start(64 * MIB);
    let said = run("nbdinfo", &["--list", "--json", &server.base_uri]);
    let info: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let names: Vec<&str> =
        info["exports"].as_array().expect("a list").iter().filter_map(|e| e["export-name"].as_str()).collect();
    assert_eq!(names, ["disk", "frozen"]);
    assert_eq!(info["exports"][1]["is_read_only"], true);
    assert_eq!(server.device.counts().attaches, 0);
}

#[test]
fn an_unknown_export_is_refused_with_the_reason() {
    let server = Server::start(MIB);
    let (good, said) = run_any("nbdinfo", &[&server.uri.replace("/disk", "/nowhere")]);
    assert!(!good);
    assert!(said.contains("nowhere"), "{said}");
}

#[test]
fn nbdcopy_brings_a_file_in_and_out_again_over_several_connections() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = Server::unix(&directory.path().join("nbd.sock"), 48 * MIB);
    let (source, copy) = (directory.path().join("source"), directory.path().join("copy"));
    let mut data = noise(48 << 20, 1);
    data[8 << 20..20 << 20].fill(0);
    std::fs::write(&source, &data).expect("a file");
    run("nbdcopy", &["--connections=8", "--flush", text(&source), &server.uri]);
    run("nbdcopy", &["--connections=8", &server.uri, text(&copy)]);
    assert!(std::fs::read(&copy).expect("the copy") == data, "the copy differs");
    assert!(server.device.counts().flushes > 0);
}

#[test]
fn qemu_img_converts_both_ways_and_compares() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = Server::start(32 * MIB);
    let (source, back) = (directory.path().join("source.raw"), directory.path().join("back.qcow2"));
    std::fs::write(&source, noise(32 << 20, 2)).expect("a file");
    let said = run("qemu-img", &["info", &server.uri]);
    assert!(said.contains("32 MiB"), "{said}");
    run("qemu-img", &["convert", "-n", "-W", "-f", "raw", "-O", "raw", text(&source), &server.uri]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &server.uri, text(&back)]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &server.uri]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", text(&source), text(&back)]);
}

#[test]
fn qemu_img_maps_what_is_stored_and_copies_no_holes() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = Server::start(32 * MIB);
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 1M 64k", "-c", "write -P 8 20M 4k", &server.uri]);
    let said = run("qemu-img", &["map", "-f", "raw", "--output=json", &server.uri]);
    let map: serde_json::Value = serde_json::from_str(&said).expect("JSON");
    let found: Vec<_> = map
        .as_array()
        .expect("a list")
        .iter()
        .map(|part| {
            let number = |key: &str| part[key].as_u64().expect("a number");
            (number("start"), number("length"), part["data"] == true, part["zero"] == true)
        })
        .collect();
    let hole = |start, end| (start, end - start, false, true);
    let data = |start, length| (start, length, true, false);
    let expected = [
        hole(0, MIB),
        data(MIB, 64 << 10),
        hole(MIB + (64 << 10), 20 * MIB),
        data(20 * MIB, 4096),
        hole(20 * MIB + 4096, 32 * MIB),
    ];
    assert_eq!(found, expected);
    let before = server.device.counts();
    let copy = directory.path().join("copy");
    run("nbdcopy", &["--connections=4", &server.uri, text(&copy)]);
    let reads = server.device.counts().reads - before.reads;
    assert!(reads <= 3, "{reads} reads for two stored parts");
    assert_eq!(std::fs::metadata(&copy).expect("the copy").len(), 32 * MIB);
    let said = run("nbdinfo", &["--map", &server.uri]);
    assert_eq!(said.lines().count(), 5, "{said}");
    assert!(said.contains("hole,zero") && said.contains("data"), "{said}");
}

#[test]
fn a_bridge_by_nbdkit_passes_everything_on() {
    let server = Server::start(16 * MIB);
    let script = r#"
h.pwrite(b"x" * 8192, 4096, nbd.CMD_FLAG_FUA)
assert h.pread(8192, 4096) == b"x" * 8192
h.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO)
h.trim(4096, 0)
h.cache(4096, 0)
h.flush()
runs = []
h.block_status(16 << 20, 0, lambda name, offset, entries, error: runs.extend(entries))
assert runs[:6] == [4096, 3, 4096, 0, (16 << 20) - 8192, 3], runs
"#;
    let nbdsh = format!("nbdsh --base-allocation -u \"$uri\" -c '{script}'");
    run("nbdkit", &["-U", "-", "nbd", &format!("uri={}", server.uri), "--run", &nbdsh]);
    let counts = server.device.counts();
    assert!(counts.durable == 1 && counts.flushes >= 1 && counts.maps >= 1 && counts.clears == 2, "{counts:?}");
}

#[test]
fn qemu_io_patterns_hold_at_every_alignment() {
    let server = Server::start(16 * MIB);
    let script = [
        "write -P 0x11 0 64k",
        "write -P 0x22 4095 2",
        "write -P 0x33 8193 1",
        "write -f -P 0x44 12288 512",
        "write -z -u 20000 3000",
        "write -z 28672 4096",
        "write -P 0x11 28672 4096",
        "discard 32768 4096",
        "flush",
        "read -P 0x11 0 4095",
        "read -P 0x22 4095 2",
        "read -P 0x11 4097 4096",
        "read -P 0x33 8193 1",
        "read -P 0x44 12288 512",
        "read -P 0x11 12800 7200",
        "read -P 0 20000 3000",
        "read -P 0x11 23000 9768",
        "read -P 0 32768 4096",
        "write -z 65536 64k",
        "read -P 0 65536 1M",
        "write -P 0x55 8388608 8M",
        "read -P 0x55 8388608 8M",
        "aio_write -P 0x66 1M 128k",
        "aio_write -P 0x67 2M 128k",
        "aio_flush",
        "read -P 0x66 1M 128k",
        "read -P 0x67 2M 128k",
    ];
    let mut arguments = vec!["-f", "raw", &server.uri];
    arguments.extend(script.iter().flat_map(|command| ["-c", command]));
    let said = run("qemu-io", &arguments);
    assert!(!said.contains("Pattern verification failed"), "{said}");
    let counts = server.device.counts();
    assert!(counts.durable >= 1 && counts.clears >= 2, "{counts:?}");
}

#[test]
fn fio_verifies_random_writes_at_queue_depth_32() {
    let directory = tempfile::tempdir().expect("a directory");
    for server in [Server::start(32 * MIB), Server::unix(&directory.path().join("nbd.sock"), 32 * MIB)] {
        let said = run(
            "fio",
            &[
                "--name=verify",
                "--ioengine=nbd",
                &format!("--uri={}", server.uri),
                "--rw=randwrite",
                "--bsrange=512-128k",
                "--bs_unaligned=1",
                "--iodepth=32",
                "--size=32m",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--fsync=64",
                "--output-format=terse",
            ],
        );
        assert!(!said.contains("verify:"), "{said}");
        assert!(server.device.counts().writes > 100);
    }
}

#[test]
fn nbdsh_reaches_each_command_with_its_flags() {
    let server = Server::start(16 * MIB);
    let script = r#"
import errno
h.pwrite(b"x" * 5000, 3, nbd.CMD_FLAG_FUA)
assert h.pread(5002, 0) == b"\0\0\0" + b"x" * 4999
h.trim(4096, 0, nbd.CMD_FLAG_FUA)
h.zero(100, 4200, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
assert h.pread(200, 4150) == b"x" * 50 + b"\0" * 100 + b"x" * 50
h.zero(16 << 20, 0)
assert h.pread(32, 4096) == bytes(32)
h.pwrite(b"y" * (16 << 20), 0)
assert h.pread(16 << 20, 0) == b"y" * (16 << 20)
h.flush()
h.set_strict_mode(0)
def fails(number, act):
    try:
        act()
    except nbd.Error as error:
        assert error.errnum == number, error
    else:
        raise Exception("no error")
fails(errno.EINVAL, lambda: h.pread(2, (16 << 20) - 1))
fails(errno.ENOSPC, lambda: h.pwrite(b"zz", (16 << 20) - 1))
fails(errno.ENOSPC, lambda: h.zero(2, (16 << 20) - 1))
fails(errno.EINVAL, lambda: h.trim(2, (16 << 20) - 1))
fails(errno.ENOTSUP, lambda: h.zero(512, 0, nbd.CMD_FLAG_FAST_ZERO))
fails(errno.EINVAL, lambda: h.cache(512, (16 << 20) - 1))
fails(errno.EINVAL, lambda: h.block_status(512, (16 << 20) - 1, lambda *a: 0))
fails(errno.EOVERFLOW, lambda: h.pread((32 << 20) + 1, 0))
fails(errno.ENOTSUP, lambda: h.zero(4096, 0, nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE))
h.cache(512, 0)
assert h.pread(1, 0) == b"y"
h.shutdown()
"#;
    run("nbdsh", &["--base-allocation", "-u", &server.uri, "-c", script]);
    assert_eq!(server.device.counts().durable, 3);
    let frozen = server.uri.replace("/disk", "/frozen");
    let refused = r#"
import errno
h.set_strict_mode(0)
assert h.is_read_only()
for act in (lambda: h.pwrite(b"z", 0), lambda: h.trim(1, 0), lambda: h.zero(1, 0)):
    try:
        act()
        raise Exception("no error")
    except nbd.Error as error:
        assert error.errnum == errno.EPERM, error
assert h.pread(4, 0) == bytes(4)
"#;
    run("nbdsh", &["-u", &frozen, "-c", refused]);
}

#[test]
fn nbdsh_sees_holes_and_what_is_stored() {
    let server = Server::start(16 * MIB);
    let script = r#"
h.pwrite(b"x" * 4096, 4096)
chunks = []
def chunk(buffer, offset, status, error):
    chunks.append((bytes(buffer), offset, status))
h.pread_structured(4096 * 4, 0, chunk)
assert [(offset, len(data), status) for data, offset, status in chunks] == [
    (0, 4096, nbd.READ_HOLE), (4096, 4096, nbd.READ_DATA), (8192, 8192, nbd.READ_HOLE)], chunks
chunks = []
h.pread_structured(4096 * 4, 0, chunk, nbd.CMD_FLAG_DF)
assert [(offset, len(data), status) for data, offset, status in chunks] == [(0, 16384, nbd.READ_DATA)]
def runs(count, offset, flags=0):
    found = []
    h.block_status(count, offset, lambda name, at, entries, error: found.append((name, at, entries)), flags)
    assert len(found) == 1
    return found[0]
assert h.can_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
assert runs(16384, 0) == ("base:allocation", 0, [4096, 3, 4096, 0, 8192, 3])
assert runs(100, 4090) == ("base:allocation", 4090, [6, 3, 94, 0])
assert runs(16384, 0, nbd.CMD_FLAG_REQ_ONE) == ("base:allocation", 0, [4096, 3])
h.zero(4096, 8192, nbd.CMD_FLAG_NO_HOLE)
assert runs(4096, 8192)[2] == [4096, 0]
h.zero(4096, 8192, nbd.CMD_FLAG_FAST_ZERO)
assert runs(4096, 8192)[2] == [4096, 3]
"#;
    run("nbdsh", &["--base-allocation", "-u", &server.uri, "-c", script]);
    let simple = r#"
h.set_request_structured_replies(False)
h.connect_uri(uri)
assert not h.get_structured_replies_negotiated() and not h.can_df()
assert h.pread(8, 4092) == bytes(4) + b"xxxx"
"#;
    run("nbdsh", &["-c", &format!("uri = '{}'", server.uri), "-c", simple]);
}
