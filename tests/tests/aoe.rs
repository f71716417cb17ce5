//! AoE targets on real (virtual) Ethernet: what is written there is there, copies and late frames do no harm, a second
//! process takes over when the first is killed, and what clients store at a target outlives it.
//!
//! Every frame is sent by hand, from a host of its own; nothing is sent twice that the test does not send twice.

use nix::sys::signal::Signal;
use pnet::util::MacAddr;
use std::io::Write;
use std::process::Stdio;
use std::time::Duration;
use torus_frontends::aoe::wire::{
    Address, COMMAND_ATA, COMMAND_CONFIG, COMMAND_RESERVE, CONFIG_READ, CONFIG_SET, Config, EVERY_SHELF, EVERY_SLOT,
    RESERVE_SET, Reserve,
};
use torus_tests::aoe::{IDENTIFY, Initiator, READ, Reply, WRITE};
use torus_tests::cluster::{Cluster, ClusterOptions, client_host, hosts_for};
use torus_tests::network::Network;
use torus_tests::process::{self, Process};
use torus_tests::wait;

const E1_0: Address = Address { shelf: 1, slot: 0 };
const ALL: Address = Address { shelf: EVERY_SHELF, slot: EVERY_SLOT };
const SIZE: u64 = 16 << 20;
/// An answer of a healthy target, on a machine that does much else.
const ANSWERED: Duration = Duration::from_secs(5);
/// No answer comes.
const SILENT: Duration = Duration::from_millis(300);

struct Bed {
    targets: Vec<Process>,
    cluster: Cluster,
    initiator: Initiator,
    next_tag: u32,
}

fn config(command: u8, string: &[u8]) -> Vec<u8> {
    let mut argument = Vec::new();
    Config { buffers: 0, firmware: 0, sectors: 0, command, string }.put(&mut argument);
    argument
}

impl Bed {
    fn new(name: &'static str, nodes: usize) -> Option<Self> {
        // One host more than a cluster needs: for the second target.
        let network = Network::new(hosts_for(nodes) + 1)?;
        let cluster = Cluster::start(ClusterOptions { network: Some(network), ..ClusterOptions::new(name, nodes) });
        cluster.torusblk(&["volume", "create", "db", &SIZE.to_string(), "--replicas", "1"]).ok();
        let initiator = Initiator::open("eth0");
        let mut bed = Self { targets: vec![], cluster, initiator, next_tag: 1 };
        bed.start(client_host(nodes), "serving e1.0");
        Some(bed)
    }

    /// Served by the storage node itself.
    fn on_node(name: &'static str) -> Option<Self> {
        let network = Network::new(hosts_for(1))?;
        let node_arguments = ["--aoe", "eth0", "--export", "db=1.0"].map(str::to_string).to_vec();
        let options = ClusterOptions { network: Some(network), node_arguments, ..ClusterOptions::new(name, 1) };
        let cluster = Cluster::start(options);
        // Not there when the node started: it looks again.
        cluster.torusblk(&["volume", "create", "db", &SIZE.to_string(), "--replicas", "1"]).ok();
        Some(Self { targets: vec![], cluster, initiator: Initiator::open("eth0"), next_tag: 1 })
    }

    fn start(&mut self, host: usize, says: &str) {
        let mut target = self.cluster.aoe_on(host, &["db", "eth0", "1", "0", "--lease-ttl", "3"]);
        target.await_line(says);
        self.targets.push(target);
    }

    fn tag(&mut self) -> u32 {
        self.next_tag += 1;
        // As in one tick of Linux.
        self.next_tag << 16 | 0x0100
    }

    fn ask(&mut self, to: MacAddr, address: Address, command: u8, argument: &[u8]) -> Option<Reply> {
        let tag = self.tag();
        self.initiator.send(&self.initiator.request(to, address, command, tag, argument));
        self.initiator.answer(tag, ANSWERED)
    }

    fn discover(&mut self) -> Reply {
        let found = wait::within(wait::SOON, || {
            let tag = self.tag();
            let asked = config(CONFIG_READ, &[]);
            self.initiator.send(&self.initiator.request(MacAddr::broadcast(), ALL, COMMAND_CONFIG, tag, &asked));
            self.initiator.answer(tag, SILENT)
        });
        found.expect("a target answers")
    }

    fn ata(&mut self, to: MacAddr, command: u8, lba: u64, sectors: u8, data: &[u8]) -> Reply {
        let argument = Initiator::ata(command, lba, sectors, data);
        self.ask(to, E1_0, COMMAND_ATA, &argument).expect("the target answers")
    }

    fn write(&mut self, to: MacAddr, lba: u64, with: u8) -> Reply {
        let argument = Initiator::ata(WRITE, lba, 2, &[with; 1024]);
        // A target that began to serve takes no write before what was sent to another can no longer arrive.
        let answer = wait::within(Duration::from_secs(30), || {
            let tag = self.tag();
            self.initiator.send(&self.initiator.request(to, E1_0, COMMAND_ATA, tag, &argument));
            self.initiator.answer(tag, Duration::from_secs(1))
        });
        let answer = answer.expect("a write is answered in the end");
        assert_eq!(answer.registers().0.command, 0x40, "{answer:?}");
        answer
    }

    fn read(&mut self, to: MacAddr, lba: u64) -> u8 {
        let reply = self.ata(to, READ, lba, 2, &[]);
        let (registers, data) = reply.registers();
        assert_eq!((registers.command, data.len()), (0x40, 1024), "{reply:?}");
        assert!(data.iter().all(|byte| *byte == data[0]), "a torn sector: {data:?}");
        data[0]
    }
}

#[test]
fn a_volume_is_found_identified_written_and_read() {
    let Some(mut bed) = Bed::new("aoe-serves", 1) else { return };
    let found = bed.discover();
    assert_eq!((found.address, found.config().sectors, found.config().buffers), (E1_0, 2, 64));
    let target = found.from;
    let identified = bed.ata(target, IDENTIFY, 0, 1, &[]);
    let (_, words) = identified.registers();
    assert_eq!(words.len(), 512);
    assert_eq!(u64::from_le_bytes(words[200..208].try_into().unwrap()), SIZE / 512);
    assert_decoded(words);
    assert_eq!(bed.read(target, 8), 0, "nothing was written yet");
    bed.write(target, 9, 1);
    assert_eq!(bed.read(target, 9), 1);
    let beyond = bed.ata(target, READ, SIZE / 512, 1, &[]);
    assert_eq!((beyond.registers().0.command, beyond.registers().0.feature), (0x41, 0x10));
    let aborted = bed.ata(target, 0xb0, 0, 1, &[]);
    assert_eq!((aborted.registers().0.command, aborted.registers().0.feature), (0x41, 0x04));
}

/// By hdparm, whose authors read the standard without us.
fn assert_decoded(words: &[u8]) {
    let hex = |word: &[u8]| format!("{:02x}{:02x}", word[1], word[0]);
    let line = |line: &[u8]| line.chunks_exact(2).map(hex).collect::<Vec<_>>().join(" ");
    let dump = words.chunks_exact(16).map(line).collect::<Vec<_>>().join("\n") + "\n";
    let mut hdparm = process::tool("hdparm");
    let mut hdparm =
        hdparm.arg("--Istdin").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("hdparm is installed");
    hdparm.stdin.take().unwrap().write_all(dump.as_bytes()).unwrap();
    let said = String::from_utf8(hdparm.wait_with_output().unwrap().stdout).unwrap();
    let sectors = SIZE / 512;
    for line in [
        "ATA device, with non-removable media",
        "Model Number:       Torus volume ",
        &format!("LBA    user addressable sectors:{sectors:>12}"),
        &format!("LBA48  user addressable sectors:{sectors:>12}"),
        "Logical  Sector size:                   512 bytes",
        "Physical Sector size:                  4096 bytes",
        "Logical Sector-0 offset:                  0 bytes",
        "Nominal Media Rotation Rate: Solid State Device",
        "*\t48-bit Address feature set",
        "*\tFLUSH_CACHE_EXT",
        "*\tWRITE_{DMA|MULTIPLE}_FUA_EXT",
        "*\t64-bit World wide name",
        "*\tData Set Management TRIM supported (limit 1 block)",
        "*\tDeterministic read data after TRIM",
        "NAA\t\t: 3",
        "Checksum: correct",
    ] {
        assert!(said.contains(line), "no {line:?} in what hdparm says:\n{said}");
    }
    assert!(!said.contains("Write cache"), "nothing volatile is between a write and its answer:\n{said}");
}

#[test]
fn copies_and_late_originals_change_nothing() {
    let Some(mut bed) = Bed::new("aoe-late", 1) else { return };
    let target = bed.discover().from;
    let request = |bed: &Bed, tag: u32, with: u8| {
        let argument = Initiator::ata(WRITE, 0, 2, &[with; 1024]);
        bed.initiator.request(target, E1_0, COMMAND_ATA, tag, &argument)
    };
    let (original, again, newer) = (0x0001_0010, 0x0002_0020, 0x0003_0030);
    // The original is lost to us for now; its retransmission and a newer write are answered.
    for (tag, with) in [(again, 1), (newer, 2)] {
        bed.initiator.send(&request(&bed, tag, with));
        bed.initiator.answer(tag, ANSWERED).expect("a write is answered");
    }
    bed.initiator.send(&request(&bed, original, 1));
    assert!(bed.initiator.answer(original, SILENT).is_none(), "the late original is dropped");
    assert_eq!(bed.read(target, 0), 2);
    // What was answered and comes once more, doubled by the network, is answered again; with other data, to see that
    // none of it is applied.
    for tag in [again, newer] {
        bed.initiator.send(&request(&bed, tag, 9));
        bed.initiator.answer(tag, ANSWERED).expect("a copy is answered");
    }
    assert_eq!(bed.read(target, 0), 2, "a copy is not applied");
}

#[test]
fn a_standby_takes_over_when_the_target_is_killed_and_has_its_lists() {
    let Some(mut bed) = Bed::new("aoe-standby", 1) else { return };
    let first = bed.discover().from;
    bed.start(hosts_for(1), "standby e1.0");
    bed.write(first, 100, 7);
    let set = bed.ask(MacAddr::broadcast(), E1_0, COMMAND_CONFIG, &config(CONFIG_SET, b"mine")).unwrap();
    assert_eq!((set.error, set.config().string), (0, &b"mine"[..]));
    let mut reserve = Vec::new();
    Reserve { command: RESERVE_SET, macs: vec![MacAddr::new(2, 9, 9, 9, 9, 9)] }.put(&mut reserve);
    assert_eq!(bed.ask(first, E1_0, COMMAND_RESERVE, &reserve).unwrap().error, 0);
    let refused = bed.ata(first, READ, 100, 2, &[]);
    assert_eq!((refused.flags & 0x04, refused.error), (0x04, 6), "it is another's now");
    bed.targets[0].kill();
    bed.targets[1].await_line("serving e1.0");
    let second = bed.discover();
    assert_ne!(second.from, first);
    assert_eq!(second.config().string, b"mine");
    assert_eq!(bed.ata(second.from, READ, 100, 2, &[]).error, 6, "still");
    let mut forced = Vec::new();
    Reserve { command: 2, macs: vec![] }.put(&mut forced);
    assert_eq!(bed.ask(second.from, E1_0, COMMAND_RESERVE, &forced).unwrap().error, 0);
    assert_eq!(bed.read(second.from, 100), 7);
    bed.write(second.from, 100, 8);
    assert_eq!(bed.read(second.from, 100), 8);
}

#[test]
fn a_target_that_was_paused_too_long_falls_silent_and_stands_by() {
    let Some(mut bed) = Bed::new("aoe-paused", 1) else { return };
    let first = bed.discover().from;
    bed.start(hosts_for(1), "standby e1.0");
    bed.write(first, 0, 1);
    bed.targets[0].signal(Signal::SIGSTOP);
    bed.targets[1].await_line("serving e1.0");
    let second = wait::within(wait::SOON, || Some(bed.discover().from).filter(|from| *from != first));
    let second = second.expect("the second answers");
    bed.write(second, 0, 2);
    // What waited in its socket is from before it knew.
    let tag = bed.tag();
    let late = Initiator::ata(WRITE, 0, 2, &[3; 1024]);
    bed.initiator.send(&bed.initiator.request(first, E1_0, COMMAND_ATA, tag, &late));
    bed.targets[0].signal(Signal::SIGCONT);
    bed.targets[0].await_line("standby e1.0");
    assert!(bed.initiator.answer(tag, SILENT).is_none(), "a fenced target answers nothing");
    assert_eq!(bed.read(second, 0), 2);
}

#[test]
fn a_target_that_is_started_again_takes_no_frame_of_before() {
    let Some(mut bed) = Bed::new("aoe-restart", 1) else { return };
    let target = bed.discover().from;
    let request = |bed: &Bed, tag: u32, with: u8| {
        let argument = Initiator::ata(WRITE, 0, 2, &[with; 1024]);
        bed.initiator.request(target, E1_0, COMMAND_ATA, tag, &argument)
    };
    let (original, newer) = (0x0001_0010, 0x0003_0030);
    bed.initiator.send(&request(&bed, newer, 2));
    bed.initiator.answer(newer, ANSWERED).expect("a write is answered");
    // In order: the volume is free at once, and the next process knows nothing of these writes.
    assert!(bed.targets[0].stop().success());
    bed.start(client_host(1), "serving e1.0");
    bed.initiator.send(&request(&bed, original, 1));
    assert!(bed.initiator.answer(original, SILENT).is_none(), "it may be under way since before");
    assert_eq!(bed.read(target, 0), 2, "reads are answered from the beginning");
    bed.write(target, 0, 3);
    assert_eq!(bed.read(target, 0), 3);
}

#[test]
fn a_storage_node_serves_a_volume_itself_and_lets_it_go_at_its_end() {
    let Some(mut bed) = Bed::on_node("aoe-node") else { return };
    let target = bed.discover().from;
    bed.write(target, 5, 9);
    assert_eq!(bed.read(target, 5), 9);
    assert!(bed.cluster.stop_node(0).success());
    bed.cluster.start_node(0);
    let target = bed.discover().from;
    assert_eq!(bed.read(target, 5), 9);
}

#[test]
fn an_address_is_one_volumes() {
    let Some(bed) = Bed::new("aoe-address", 1) else { return };
    bed.cluster.torusblk(&["volume", "create", "other", "16MiB", "--replicas", "1"]).ok();
    let refused = bed.cluster.torusblk(&["aoe", "other", "eth0", "1", "0"]).refused();
    assert!(refused.contains("e1.0 is the address of volume db"), "{refused}");
    let refused = bed.cluster.torusblk(&["aoe", "other", "eth7", "1", "1"]).refused();
    assert!(refused.contains("eth7") && refused.contains("eth0"), "{refused}");
}
