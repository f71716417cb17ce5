//! A node formats an empty data dir and refuses every other that is not its own, before it touches anything: a disk
//! that is formatted by mistake is a disk lost.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use torus_tests::cluster::{Cluster, ClusterOptions, NODE_SIZE};
use torus_tests::process::{self, Outcome, Process};
use torus_tests::wait;

fn without_nodes(name: &'static str) -> Cluster {
    Cluster::start(ClusterOptions::new(name, 0))
}

/// A node that is expected to refuse its data dir.
fn refusal(cluster: &Cluster, data_dir: &Path, extra: &[&str]) -> String {
    let mut command = process::program("torus-engine");
    command.args(["--metadata", &cluster.url()]).arg("--data-dir").arg(data_dir).args(extra);
    Outcome::of(&mut command).refused()
}

#[track_caller]
fn assert_says(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "expected {word:?} in: {text}");
    }
}

/// One node that was started once and stopped.
fn with_stopped_node(name: &'static str) -> Cluster {
    let mut cluster = Cluster::start(ClusterOptions { is_joined: false, ..ClusterOptions::new(name, 1) });
    assert!(cluster.stop_node(0).success());
    cluster
}

#[test]
fn an_empty_directory_is_formatted_and_the_node_says_so() {
    let mut cluster = Cluster::start(ClusterOptions { is_joined: false, ..ClusterOptions::new("format", 1) });
    let log = cluster.node(0).log();
    assert_says(&log, &["is empty: formatting it"]);
    let length = fs::metadata(cluster.data_dir(0).join("shard-0.blocks")).unwrap().len();
    assert_eq!(length, 512 << 20);
}

#[test]
fn an_empty_directory_without_a_size_is_refused() {
    let cluster = without_nodes("no-size");
    assert_says(&refusal(&cluster, &cluster.data_dir(0), &[]), &["--size", "empty"]);
}

#[test]
fn a_directory_with_other_content_is_refused_and_left_alone() {
    let cluster = without_nodes("other-content");
    let dir = cluster.folder().join("home");
    fs::create_dir(&dir).unwrap();
    fs::write(dir.join("thesis.tex"), "years of work").unwrap();
    let text = refusal(&cluster, &dir, &["--size", NODE_SIZE]);
    assert_says(&text, &["thesis.tex", dir.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(dir.join("thesis.tex")).unwrap(), "years of work");
    assert!(!dir.join("shard-0.blocks").exists());
}

#[test]
fn a_disk_too_small_is_refused_before_anything_is_written() {
    let cluster = without_nodes("too-small");
    let dir = cluster.folder().join("node");
    let text = refusal(&cluster, &dir, &["--size", "15TiB"]);
    assert_says(&text, &["disk too small", "found", "needed"]);
    let text = refusal(&cluster, &dir, &["--size", "1MiB"]);
    assert_says(&text, &["1048576", "at least 536870912"]);
    assert!(!dir.join("shard-0.blocks").exists());
}

#[test]
fn a_data_dir_of_another_cluster_is_refused_with_both_ids() {
    let cluster = with_stopped_node("cluster-a");
    let other = without_nodes("cluster-b");
    let text = refusal(&other, &cluster.data_dir(0), &[]);
    assert_says(&text, &[&cluster.identity(0).cluster.to_string(), "belongs to cluster", "expected"]);
}

#[test]
fn a_second_process_on_a_data_dir_is_refused_with_the_pid_of_the_first() {
    let mut cluster = Cluster::start(ClusterOptions { is_joined: false, ..ClusterOptions::new("two-processes", 1) });
    let pid = cluster.node(0).pid().to_string();
    let text = refusal(&cluster, &cluster.data_dir(0), &[]);
    assert_says(&text, &["in use by process", &pid]);
    assert!(cluster.node(0).is_running());
}

#[test]
fn a_copied_data_dir_cannot_run_beside_its_original() {
    let mut cluster = Cluster::start(ClusterOptions { is_joined: false, ..ClusterOptions::new("copied", 1) });
    let copy = cluster.folder().join("copy");
    // Again if a file went away under it, as the node's notes do that are written anew and renamed.
    wait::until("a copy", || {
        let mut copying = process::tool("cp");
        copying.args(["-r", "-T", "--sparse=always"]).arg(cluster.data_dir(0)).arg(&copy);
        Outcome::of(&mut copying).status.success().then_some(())
    });
    let text = refusal(&cluster, &copy, &[]);
    assert_says(&text, &["another process runs as node", &cluster.node_id(0).to_string()]);
    assert!(cluster.node(0).is_running());
}

#[test]
fn a_block_file_that_was_truncated_is_refused_with_both_lengths() {
    let cluster = with_stopped_node("truncated");
    let file = OpenOptions::new().write(true).open(cluster.data_dir(0).join("shard-0.blocks")).unwrap();
    file.set_len(300 << 20).unwrap();
    let text = refusal(&cluster, &cluster.data_dir(0), &[]);
    assert_says(&text, &["shard-0.blocks", &(300u64 << 20).to_string(), &(512u64 << 20).to_string()]);
}

#[test]
fn a_block_file_that_is_missing_or_not_ours_is_refused() {
    let cluster = with_stopped_node("foreign-blocks");
    let path = cluster.data_dir(0).join("shard-0.blocks");
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0xa5; 8192], 0).unwrap();
    assert_says(&refusal(&cluster, &cluster.data_dir(0), &[]), &["shard 0"]);
    fs::remove_file(&path).unwrap();
    assert_says(&refusal(&cluster, &cluster.data_dir(0), &[]), &["shard-0.blocks", "No such file"]);
}

#[test]
fn settings_that_differ_from_the_format_are_refused_with_both_values() {
    let cluster = with_stopped_node("other-settings");
    let dir = cluster.data_dir(0);
    assert_says(&refusal(&cluster, &dir, &["--size", "64MiB"]), &["536870912", "67108864", "never shrinks"]);
    assert_says(&refusal(&cluster, &dir, &["--shards", "4"]), &["1 shards", "asks for 4"]);
}

#[test]
fn another_format_version_is_refused_with_both_versions() {
    let cluster = with_stopped_node("other-version");
    let path = cluster.data_dir(0).join("torus.json");
    let text = fs::read_to_string(&path).unwrap().replace("\"format_version\": 2", "\"format_version\": 7");
    fs::write(&path, text).unwrap();
    assert_says(&refusal(&cluster, &cluster.data_dir(0), &[]), &["format version 7", "expected 2", "torus.json"]);
}

#[test]
fn a_format_that_was_cut_off_is_begun_again() {
    let mut cluster = Cluster::start(ClusterOptions { is_joined: false, ..ClusterOptions::new("cut-off", 1) });
    cluster.kill_node(0);
    // As after kill -9 between the block files and the identity.
    let dir = cluster.data_dir(0);
    let before = cluster.node_id(0);
    cluster.unformat(0);
    File::create(dir.join("formatting")).unwrap();
    cluster.start_node(0);
    assert_says(&cluster.node(0).log(), &["a format was cut off"]);
    assert_ne!(cluster.node_id(0), before);
}

#[test]
fn a_format_killed_at_any_moment_is_completed_by_the_next_start() {
    let cluster = without_nodes("killed-format");
    // Killed as soon as each of these is there, which spreads the kills over the format.
    for (round, seen) in ["lock", "formatting", "shard-0.blocks", "torus.json"].into_iter().enumerate() {
        let dir = cluster.folder().join(format!("killed-{round}"));
        let command = || {
            let mut command = process::program("torus-engine");
            command.args(["--metadata", &cluster.url(), "--size", NODE_SIZE]).arg("--data-dir").arg(&dir);
            command
        };
        let mut first = Process::spawn(&format!("first-{round}"), &mut command(), cluster.folder());
        // On a busy machine a whole format may go by between two looks.
        let is_past = || dir.join(seen).exists() || dir.join("torus.json").exists();
        torus_tests::wait::until_glimpsed(seen, || is_past().then_some(()));
        first.kill();
        let mut second = Process::spawn(&format!("second-{round}"), &mut command(), cluster.folder());
        second.await_line("serving node");
        assert!(second.stop().success());
    }
}
