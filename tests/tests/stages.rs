//! Where the time of requests goes, as it is told: by nodes and by who serves volumes over HTTP, and by `torusadm`. With
//! real processes; that what is told is right is `simulation_stages.rs`.

use serde_json::Value;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use torus_tests::cluster::{Cluster, ClusterOptions, NbdServer};
use torus_tests::nbd::{self, Command};
use torus_tests::process::Process;

/// Where the process says that it tells its numbers.
fn told_at(process: &mut Process) -> SocketAddr {
    let line = process.await_line("metrics at http://");
    let (_, address) = line.split_once("metrics at http://").expect("it was awaited");
    address.split('/').next().and_then(|address| address.parse().ok()).expect("an address")
}

/// Status and body.
fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n").as_bytes()).expect("it reads");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer with a head");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, body.to_string())
}

struct Metrics(String);

impl Metrics {
    fn of(address: SocketAddr) -> Self {
        let (status, text) = get(address, "/metrics");
        assert_eq!(status, 200, "{text}");
        Self(text)
    }

    /// The sum of all lines with this name and these labels.
    fn sum(&self, name: &str, labels: &[&str]) -> f64 {
        let named = self.0.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
        let meant = named.filter(|line| labels.iter().all(|label| line.contains(label)));
        meant.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    fn stage(&self, what: &str, operation: &str, stage: &str) -> f64 {
        let labels = [&format!("operation=\"{operation}\"")[..], &format!("stage=\"{stage}\"")];
        self.sum(&format!("torus_stage_seconds_{what}"), &labels)
    }
}

fn json(cluster: &Cluster, arguments: &[&str]) -> Value {
    let text = cluster.torusadm(&[arguments, &["--output", "json"]].concat()).ok();
    serde_json::from_str(&text).expect("a JSON document")
}

const WRITES: u64 = 40;

fn started(name: &'static str) -> (Cluster, NbdServer, SocketAddr) {
    let node_arguments = vec!["--http".to_string(), "0".to_string()];
    let mut cluster = Cluster::start(ClusterOptions { node_arguments, ..ClusterOptions::new(name, 3) });
    for volume in ["demo", "idle"] {
        cluster.torusblk(&["volume", "create", volume, "64MiB"]).ok();
    }
    let mut server = cluster.serve_with(&["--http", "0"]);
    let address = told_at(&mut server.process);
    (cluster, server, address)
}

/// One after the other, no write durable by itself, so that the flush has something to do.
fn write_and_read(server: &NbdServer) {
    let mut client = nbd::connect(server.address, "demo");
    let places = || (0..WRITES).map(|write| write * 65536);
    for offset in places() {
        client.call(Command::Write, offset, &[5; 4096]).expect("connected").expect("written");
    }
    client.call(Command::Flush, 0, &[]).expect("connected").expect("flushed");
    for offset in places() {
        assert_eq!(client.read(offset, 4096).expect("connected").expect("read"), [5; 4096]);
    }
}

#[test]
fn the_stages_of_what_was_done_are_told_by_both_sides_and_add_up() {
    let (mut cluster, server, address) = started("stages");
    write_and_read(&server);
    let client = Metrics::of(address);
    let writes = client.stage("count", "write", "whole");
    assert!(writes >= WRITES as f64 && client.stage("count", "read", "whole") >= WRITES as f64, "{}", client.0);
    for operation in ["read", "write", "flush"] {
        let sum = |stage| client.stage("sum", operation, stage);
        let (parts, whole) =
            (["client_queue", "wire", "shard_queue", "disk"].map(sum).iter().sum::<f64>(), sum("whole"));
        assert!((parts - whole).abs() <= whole / 100.0 && whole > 0.0, "{operation}: {parts} of {whole}");
        assert!(sum("disk") > 0.0 && sum("wire") > 0.0, "{operation}: {}", client.0);
    }
    let nodes: Vec<SocketAddr> = (0..3).map(|node| told_at(cluster.node(node))).collect();
    let told: Vec<Metrics> = nodes.iter().map(|address| Metrics::of(*address)).collect();
    let all = |what: &str, operation: &str, stage: &str| -> f64 {
        told.iter().map(|node| node.stage(what, operation, stage)).sum()
    };
    // Three replicas each, of which the client waited for the slowest.
    for stage in ["shard_queue", "disk", "reply"] {
        assert_eq!(all("count", "write", stage), 3.0 * writes, "{stage}");
    }
    assert_eq!(all("bucket", "write", "disk\",le=\"+Inf"), 3.0 * writes);
    for (node, metrics) in nodes.iter().zip(&told) {
        assert!(metrics.sum("torus_build_info", &["torus-engine"]) == 1.0, "{}", metrics.0);
        assert!(metrics.sum("torus_shard_writes_total", &["shard=\"0\""]) > 0.0, "{}", metrics.0);
        assert_eq!(get(*node, "/health"), (200, "serving\n".to_string()));
    }
    assert!(client.sum("torus_build_info", &["torusblk"]) == 1.0 && client.sum("torus_volumes_attached", &[]) == 1.0);
    assert_eq!(get(address, "/health").0, 200);
}

#[test]
fn top_and_latency_count_what_was_done() {
    let (cluster, server, address) = started("top");
    write_and_read(&server);
    let writes = Metrics::of(address).stage("count", "write", "whole") as u64;
    let top = json(&cluster, &["top", "--once"]);
    let shards = top["shards"].as_array().unwrap();
    let total = |operation: &str| -> u64 {
        let of = shards.iter().filter(|shard| shard["operation"] == operation);
        of.map(|shard| shard["operations_total"].as_u64().unwrap()).sum()
    };
    assert_eq!(total("write"), 3 * writes, "{top}");
    assert!(total("read") >= WRITES && total("flush") >= 1, "{top}");
    let disk = &shards.iter().find(|shard| shard["operation"] == "write").unwrap()["stages_total"]["disk"];
    assert!(disk["p99_us"].as_u64() >= disk["p50_us"].as_u64() && disk["max_us"].as_u64() > Some(0), "{top}");
    let shown = cluster.torusadm(&["top", "--once"]).ok();
    assert!(shown.starts_with("3 shards: ") && shown.contains("DISK p50·p99"), "{shown}");

    let latency = json(&cluster, &["latency", "demo"]);
    let stages = latency["stages"].as_array().unwrap();
    let disk = stages.iter().find(|told| told["operation"] == "write" && told["stage"] == "disk").unwrap();
    assert_eq!(disk["count"], 3 * writes, "{latency}");
    let shares: f64 =
        stages.iter().filter(|told| told["operation"] == "write").filter_map(|t| t["share"].as_f64()).sum();
    assert!((shares - 1.0).abs() < 1e-6, "{latency}");
    assert_eq!(json(&cluster, &["latency", "idle"])["stages"], Value::Array(vec![]));
    let idle = cluster.torusadm(&["latency", "idle"]).ok();
    assert!(idle.contains("has been asked for idle of late"), "{idle}");
    assert!(cluster.torusadm(&["latency", "nothing"]).refused().contains("nothing"));
}

#[test]
fn a_port_that_is_taken_is_found_out_before_anything_is_served() {
    let cluster = Cluster::start(ClusterOptions::new("http-taken", 0));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("it is bound").to_string();
    let refused = cluster.torusblk(&["serve", "--listen", "127.0.0.1:0", "--http", &address]).refused();
    assert!(refused.contains(&format!("--http {address}")), "{refused}");
}
