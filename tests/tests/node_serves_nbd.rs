//! `torus-engine --nbd`: a storage node serves volumes itself, from the executors of its shards, and stays a node first.

use std::fs;
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::process::{self, Outcome};
use torus_tests::store::free_address;
use torus_tests::tools::{assert_same_content, nbdcopy, qemu_io, qemu_io_ok};
use torus_tests::wait;

const VOLUME_MIB: usize = 64;

/// Nodes of which the first serves, and what its clients connect to.
struct Serving {
    cluster: Cluster,
    arguments: Vec<String>,
    socket: String,
    address: String,
}

impl Serving {
    /// The first node is started with `more` beside `--nbd` and `--export demo`; the volume is made before that.
    fn start(name: &'static str, nodes: usize, more: &[&str]) -> Self {
        let mut cluster = Cluster::start(ClusterOptions { size: "1GiB", ..ClusterOptions::new(name, nodes) });
        let replicas = nodes.to_string();
        cluster.torusblk(&["volume", "create", "demo", &format!("{VOLUME_MIB}MiB"), "--replicas", &replicas]).ok();
        let path = cluster.folder().join("nbd.sock").display().to_string();
        let address = free_address().to_string();
        let mut arguments =
            ["--nbd", &format!("unix:{path}"), "--nbd", &address, "--export", "demo"].map(str::to_string).to_vec();
        arguments.extend(more.iter().map(|argument| argument.to_string()));
        assert!(cluster.stop_node(0).success());
        let socket = format!("nbd+unix:///demo?socket={path}");
        let mut serving = Self { cluster, arguments, socket, address: format!("nbd://{address}/") };
        serving.start_first();
        serving.cluster.node(0).await_line("attached volume");
        serving
    }

    fn start_first(&mut self) {
        let arguments: Vec<&str> = self.arguments.iter().map(String::as_str).collect();
        self.cluster.start_node_with(0, &arguments);
    }
}

fn noise() -> Vec<u8> {
    (0..(VOLUME_MIB as u32) << 20).map(|at| (at.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

#[test]
fn what_is_copied_into_a_node_over_many_connections_is_there_and_free_when_it_has_stopped() {
    let mut serving = Serving::start("serves-nbd", 3, &[]);
    let (image, copy) = (serving.cluster.folder().join("image"), serving.cluster.folder().join("copy"));
    fs::write(&image, noise()).unwrap();
    // The one volume that is exported is meant by who names none.
    nbdcopy(image.to_str().unwrap(), &serving.address);
    nbdcopy(&serving.socket, copy.to_str().unwrap());
    assert_same_content(&image, &copy, (VOLUME_MIB as u64) << 20);
    qemu_io_ok(&serving.socket, &["write -P 9 0 64k", "flush", "write -z 64k 64k", "discard 1M 1M", "read -P 9 0 64k"]);
    assert!(serving.cluster.stop_node(0).success());
    // Detached before the shards closed: nobody waits for a lease to lapse.
    let server = serving.cluster.serve_with(&["--volume", "demo"]);
    qemu_io_ok(&server.url("demo"), &["read -P 9 0 64k", "read -P 0 64k 64k"]);
}

#[test]
fn a_node_alone_has_its_client_and_its_shards_in_one_process() {
    let mut serving = Serving::start("serves-alone", 1, &[]);
    let (image, copy) = (serving.cluster.folder().join("image"), serving.cluster.folder().join("copy"));
    fs::write(&image, noise()).unwrap();
    nbdcopy(image.to_str().unwrap(), &serving.socket);
    nbdcopy(&serving.socket, copy.to_str().unwrap());
    assert_same_content(&image, &copy, (VOLUME_MIB as u64) << 20);
    // What was flushed is there after kill -9 of both at once.
    qemu_io_ok(&serving.socket, &["write -P 3 0 1M", "flush"]);
    serving.cluster.kill_node(0);
    serving.start_first();
    wait::until("the volume to be attached again", || {
        qemu_io(&serving.socket, &["read -P 3 0 1M"]).status.success().then_some(())
    });
    assert!(serving.cluster.stop_node(0).success());
}

#[test]
fn the_shards_of_a_node_share_its_connections() {
    let options = ClusterOptions { size: "1GiB", ..ClusterOptions::new("serves-shards", 1) };
    let socket = std::env::temp_dir().join(format!("torus-{}.sock", std::process::id()));
    let stats = socket.with_extension("stats");
    let path = |path: &std::path::Path| path.display().to_string();
    let listen = format!("unix:{}", path(&socket));
    let arguments = ["--shards", "2", "--nbd", &listen, "--export", "a", "--export", "b", "--stats", &path(&stats)];
    let node_arguments = arguments.map(str::to_string).to_vec();
    let mut cluster = Cluster::start(ClusterOptions { node_arguments, ..options });
    // Neither is there yet: the node serves all the same, and has them when they are.
    cluster.node(0).await_line("cannot be attached");
    for volume in ["a", "b"] {
        cluster.torusblk(&["volume", "create", volume, &format!("{VOLUME_MIB}MiB"), "--replicas", "1"]).ok();
        cluster.node(0).await_line(&format!("attached volume=\"{volume}\""));
    }
    let (image, copy) = (cluster.folder().join("image"), cluster.folder().join("copy"));
    fs::write(&image, noise()).unwrap();
    for volume in ["a", "b"] {
        let url = format!("nbd+unix:///{volume}?socket={}", path(&socket));
        nbdcopy(image.to_str().unwrap(), &url);
        nbdcopy(&url, copy.to_str().unwrap());
        assert_same_content(&image, &copy, (VOLUME_MIB as u64) << 20);
        fs::remove_file(&copy).unwrap();
    }
    let served = |executor: usize| {
        let name = format!("torus_nbd_connections_served_total{{executor=\"{executor}\"}} ");
        let text = fs::read_to_string(&stats).unwrap();
        text.lines().find_map(|line| line.strip_prefix(&name)?.parse::<u64>().ok()).unwrap()
    };
    wait::until("the counters", || (served(0) > 0 && served(1) > 0).then_some(()));
    assert!(cluster.stop_node(0).success());
    assert!(!socket.exists(), "the socket's file goes with the node");
    fs::remove_file(&stats).unwrap();
}

#[test]
fn a_volume_that_is_taken_from_a_node_by_force_comes_back_to_it() {
    let mut serving = Serving::start("serves-forced", 3, &[]);
    qemu_io_ok(&serving.socket, &["write -P 1 0 64k"]);
    let mut other = serving.cluster.serve_with(&["--force", "--volume", "demo"]);
    qemu_io_ok(&other.url("demo"), &["read -P 1 0 64k", "write -P 2 0 64k", "flush"]);
    let stale = qemu_io(&serving.socket, &["write -P 3 0 64k"]);
    assert!(!stale.status.success() || stale.stdout.contains("failed"), "{stale:#?}");
    serving.cluster.node(0).await_line("the volume is not served any more");
    assert!(other.process.stop().success());
    wait::until("the node to have it again", || {
        qemu_io(&serving.socket, &["read -P 2 0 64k"]).status.success().then_some(())
    });
}

/// Of a node that nobody could reach yet: nothing was asked of the metadata store, which is not there.
#[test]
fn what_is_wrong_with_the_settings_of_nbd_is_said_before_the_node_joins() {
    let folder = process::temporary_dir("serves-wrong");
    let data = folder.path().join("node").display().to_string();
    let certificates = folder.path().join("pki").display().to_string();
    let node = ["--metadata", "torus://127.0.0.1:1", "--data-dir", &data, "--size", "1GiB", "--nbd", "127.0.0.1:0"];
    let tls = ["--tls", "require", "--tls-certificates", &certificates];
    for (more, says) in [(&tls[..], "server-cert.pem"), (&["--lease-ttl", "1"], "from 2s to 60s")] {
        let said = Outcome::of(process::program("torus-engine").args(node).args(more)).refused();
        assert!(said.contains("--nbd") && said.contains(says), "{more:?}: {said}");
    }
}
