//! What people have already works: a file system of real files is copied into a volume and back, random writes are
//! verified, ranges of any alignment hold, and all of it is there after everything was stopped and started again.

use std::fs;
use std::path::Path;
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::process::{self, Outcome};
use torus_tests::tools::{assert_same_content, fio_verified, nbdcopy, qemu_io_ok, spawn_fio};

const IMAGE_MIB: u64 = 192;

/// Three nodes and a volume of some MiB.
fn with_volume(name: &'static str, size: &str) -> Cluster {
    let cluster = Cluster::start(ClusterOptions { size: "1GiB", ..ClusterOptions::new(name, 3) });
    cluster.torusblk(&["volume", "create", "demo", size]).ok();
    cluster
}

/// An ext4 image with the machine's own headers in it.
fn make_image(path: &Path) {
    let files = Path::new("/usr/include");
    assert!(fs::read_dir(files).unwrap().count() > 100, "few files in {}: run `make setup`", files.display());
    let mut command = process::tool("mkfs.ext4");
    command.args(["-q", "-F", "-d"]).arg(files).arg(path).arg(format!("{IMAGE_MIB}M"));
    Outcome::of(&mut command).ok();
}

#[test]
fn a_file_system_of_real_files_survives_a_restart_of_everything() {
    let mut cluster = with_volume("file-system", &format!("{IMAGE_MIB}MiB"));
    let (image, copy) = (cluster.folder().join("image"), cluster.folder().join("copy"));
    make_image(&image);
    let mut server = cluster.serve();
    nbdcopy(image.to_str().unwrap(), &server.url("demo"));
    nbdcopy(&server.url("demo"), copy.to_str().unwrap());
    assert_same_content(&image, &copy, IMAGE_MIB << 20);
    qemu_io_ok(&server.url("demo"), &["flush"]);

    assert!(server.process.stop().success());
    (0..3).for_each(|node| assert!(cluster.stop_node(node).success()));
    cluster.store.kill();
    cluster.store.start_again();
    cluster.start_nodes(&[0, 1, 2]);
    let server = cluster.serve();
    fs::remove_file(&copy).unwrap();
    nbdcopy(&server.url("demo"), copy.to_str().unwrap());
    assert_same_content(&image, &copy, IMAGE_MIB << 20);
    Outcome::of(process::tool("e2fsck").arg("-fn").arg(&copy)).ok();
}

#[test]
fn random_writes_at_queue_depth_32_read_back_as_written() {
    let mut cluster = with_volume("fio", "64MiB");
    let server = cluster.serve();
    let mut fio = spawn_fio(&mut fio_verified(&server.url("demo"), "64M", &[]), cluster.folder());
    assert!(fio.await_end().success(), "{}", fio.log());
}

#[test]
fn ranges_of_any_alignment_keep_what_is_around_them() {
    let mut cluster = with_volume("patterns", "64MiB");
    let server = cluster.serve();
    let url = server.url("demo");
    qemu_io_ok(&url, &["read -P 0 0 64k", "write -P 17 0 64k", "write -P 34 512 512", "write -P 51 4000 200"]);
    let around = ["read -P 17 0 512", "read -P 34 512 512", "read -P 17 1024 2976", "read -P 51 4000 200"];
    qemu_io_ok(&url, &around);
    qemu_io_ok(&url, &["read -P 17 4200 61336"]);
    // Across an extent, then cleared across it.
    qemu_io_ok(&url, &["write -P 68 4190208 8192", "read -P 68 4190208 8192"]);
    qemu_io_ok(&url, &["write -z 4192000 4096", "read -P 0 4192000 4096", "read -P 68 4190208 1792"]);
    qemu_io_ok(&url, &["discard 0 64k", "flush"]);
}
