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
fn what_is_stored_is_told_and_holes_are_neither_copied_nor_read() {
    let mut cluster = with_volume("holes", "1GiB");
    let server = cluster.serve();
    let url = server.url("demo");
    qemu_io_ok(&url, &["write -P 1 5M 64k", "write -P 2 700M 4k", "write -P 3 900M 1M", "write -z -u 900M 512k"]);
    qemu_io_ok(&url, &["write -z 600M 4k", "discard 5M 4k"]);
    let said = Outcome::of(process::tool("qemu-img").args(["map", "-f", "raw", "--output=json", &url])).ok();
    let map: serde_json::Value = serde_json::from_str(&said).unwrap();
    let stored = map.as_array().unwrap().iter().filter(|part| part["data"] == true);
    let stored: Vec<_> =
        stored.map(|part| (part["start"].as_u64().unwrap(), part["length"].as_u64().unwrap())).collect();
    const MIB: u64 = 1 << 20;
    const KIB: u64 = 1 << 10;
    let zeros_that_are_stored = (600 * MIB, 4 * KIB);
    let expected = [
        (5 * MIB + 4 * KIB, 60 * KIB),
        zeros_that_are_stored,
        (700 * MIB, 4 * KIB),
        (900 * MIB + 512 * KIB, 512 * KIB),
    ];
    assert_eq!(stored, expected, "{said}");
    let total: u64 = map.as_array().unwrap().iter().map(|part| part["length"].as_u64().unwrap()).sum();
    assert_eq!(total, 1 << 30);
    let said = Outcome::of(process::tool("nbdinfo").args(["--map", &url])).ok();
    assert_eq!(said.lines().filter(|line| line.contains("data")).count(), 4, "{said}");
    let copy = cluster.folder().join("copy");
    nbdcopy(&url, copy.to_str().unwrap());
    let compare =
        Outcome::of(process::tool("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&copy).arg(&url));
    assert!(compare.ok().contains("identical"));
}

#[test]
fn a_volume_grows_under_its_clients_and_does_not_shrink_under_them() {
    let mut cluster = with_volume("grows", "64MiB");
    let mut server = cluster.serve_with(&["--volume=demo"]);
    let url = server.url("demo");
    qemu_io_ok(&url, &["write -P 1 0 1M"]);
    let size = || Outcome::of(process::tool("nbdinfo").args(["--size", &url])).ok();
    cluster.torusblk(&["volume", "resize", "demo", "96MiB"]).ok();
    torus_tests::wait::until("the server to hear of it", || {
        (size().trim() == (96_u64 << 20).to_string()).then_some(())
    });
    qemu_io_ok(&url, &["read -P 0 64M 1M", "write -P 2 95M 1M", "read -P 2 95M 1M", "flush"]);
    let refused = cluster.torusblk(&["volume", "resize", "demo", "32MiB"]).refused();
    assert!(refused.contains("--allow-shrink"), "{refused}");
    let refused = cluster.torusblk(&["volume", "resize", "demo", "32MiB", "--allow-shrink"]).refused();
    assert!(refused.contains("attached by"), "{refused}");
    assert!(server.process.stop().success());
    cluster.torusblk(&["volume", "resize", "demo", "32MiB", "--allow-shrink"]).ok();
    cluster.torusblk(&["volume", "resize", "demo", "96MiB"]).ok();
    let server = cluster.serve();
    qemu_io_ok(&server.url("demo"), &["read -P 1 0 1M", "read -P 0 1M 95M"]);
}

#[test]
fn over_tls_with_certificates_of_clients_everything_is_as_without() {
    let mut cluster = with_volume("tls", "64MiB");
    let certificates = cluster.folder().join("pki");
    make_certificates(&certificates);
    let directory = certificates.to_str().unwrap().to_owned();
    let mut server = cluster.serve_with(&[
        "--tls=require",
        "--tls-certificates",
        &directory,
        "--tls-clients=required",
        "--volume=demo",
        "--read-only",
    ]);
    let refused = Outcome::of(process::tool("nbdinfo").arg(server.url("demo")));
    assert!(!refused.status.success(), "{refused:?}");
    let secure = format!("nbds://localhost:{}/?tls-certificates={directory}", server.address.port());
    let said = Outcome::of(process::tool("nbdinfo").args(["--json", &secure])).ok();
    let info: serde_json::Value = serde_json::from_str(&said).unwrap();
    let export = &info["exports"][0];
    assert_eq!(
        (&info["TLS"], &info["structured"], &export["is_read_only"]),
        (&true.into(), &true.into(), &true.into())
    );
    assert_eq!((&export["export-size"], &export["can_multi_conn"]), (&(64 << 20).into(), &true.into()));
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
    assert!(server.process.stop().success());
    let writable = ["--tls=require", "--tls-certificates", &directory, "--tls-clients=required"];
    let server = cluster.serve_with(&writable);
    let secure = format!("nbds://localhost:{}/demo?tls-certificates={directory}", server.address.port());
    let (image, copy) = (cluster.folder().join("image"), cluster.folder().join("copy"));
    let noise: Vec<u8> = (0..64_u32 << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    fs::write(&image, &noise).unwrap();
    let connections = |from: &str, to: &str| {
        Outcome::of(process::tool("nbdcopy").args(["--connections=8", "--flush", from, to])).ok();
    };
    connections(image.to_str().unwrap(), &secure);
    connections(&secure, copy.to_str().unwrap());
    assert_same_content(&image, &copy, 64 << 20);
}

/// One pair of keys for everybody: an authority that is server and client as well.
fn make_certificates(directory: &Path) {
    fs::create_dir(directory).unwrap();
    let mut openssl = process::tool("openssl");
    openssl.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
    openssl.args(["-days", "2", "-subj", "/CN=authority", "-keyout", "ca-key.pem", "-out", "ca-cert.pem"]);
    Outcome::of(openssl.current_dir(directory)).ok();
    for who in ["server", "client"] {
        let (key, request, certificate) = (format!("{who}-key.pem"), format!("{who}.csr"), format!("{who}-cert.pem"));
        let mut openssl = process::tool("openssl");
        openssl.args(["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]);
        openssl.args(["-subj", &format!("/CN={who}"), "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]);
        Outcome::of(openssl.args(["-keyout", &key, "-out", &request]).current_dir(directory)).ok();
        let mut openssl = process::tool("openssl");
        openssl.args([
            "x509",
            "-req",
            "-copy_extensions",
            "copy",
            "-days",
            "2",
            "-CAcreateserial",
            "-CA",
            "ca-cert.pem",
        ]);
        openssl.args(["-CAkey", "ca-key.pem", "-in", &request, "-out", &certificate]);
        Outcome::of(openssl.current_dir(directory)).ok();
    }
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
