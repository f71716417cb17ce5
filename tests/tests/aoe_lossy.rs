//! An AoE target on a segment that loses, repeats and delays frames, so that they overtake each other, under an initiator
//! that sends again as Linux does: under a new tag. What it was answered is what it reads, though originals arrive after
//! their retransmission and after newer writes to the same sectors.
//!
//! `TORUS_AOE_WRITES` makes it longer, `TORUS_AOE_SEED` lets other things happen. What passed is kept as a capture and
//! read by tshark, whose dissector of AoE may complain of nothing.

use pnet::util::MacAddr;
use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use torus_frontends::aoe::wire::{Address, COMMAND_ATA, COMMAND_CONFIG, Config};
use torus_tests::aoe::{Initiator, READ, Reply, WRITE};
use torus_tests::cluster::{Cluster, ClusterOptions, client_host, hosts_for};
use torus_tests::hub::{Fate, Hub};
use torus_tests::network::Network;
use torus_tests::process::{self, Outcome, Process};
use torus_tests::wait;

const TARGET: Address = Address { shelf: 1, slot: 0 };
const SIZE: u64 = 16 << 20;
/// Written and read at once: what fits into a frame of 1500 bytes.
const SECTORS: u64 = 2;
/// Few, so that the same ones are written again while older frames are still on their way.
const UNITS: u64 = 24;
const OUTSTANDING: usize = 16;
/// Shorter than frames are delayed: most of what is late is sent again meanwhile.
const SEND_AGAIN_AFTER: Duration = Duration::from_millis(40);
const LATE_AT_MOST: u64 = 250;
const FRAMES_CAPTURED: usize = 20_000;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }
}

/// The classic format of libpcap: magic, version 2.4, microseconds, link type 1 (Ethernet), all little-endian.
#[derive(Clone)]
struct Capture(Arc<Mutex<Captured>>, Instant);

struct Captured {
    file: Vec<u8>,
    frames: usize,
}

impl Capture {
    fn new() -> Self {
        let words = [0xa1b2_c3d4u32, 0x0004_0002, 0, 0, 65_535, 1];
        let file = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        Self(Arc::new(Mutex::new(Captured { file, frames: 0 })), Instant::now())
    }

    fn captured(&self) -> MutexGuard<'_, Captured> {
        self.0.lock().expect("nobody panics in here")
    }

    /// The first ones.
    fn note(&self, frame: &[u8]) {
        let (at, bytes) = (self.1.elapsed(), frame.len() as u32);
        let head = [at.as_secs() as u32, at.subsec_micros(), bytes, bytes];
        let mut captured = self.captured();
        if captured.frames < FRAMES_CAPTURED {
            captured.frames += 1;
            captured.file.extend(head.iter().flat_map(|word| word.to_le_bytes()));
            captured.file.extend(frame);
        }
    }

    /// How many there are in the file.
    fn store(&self, path: &Path) -> usize {
        let mut file = std::fs::File::create(path).expect("the test's folder can be written");
        let captured = self.captured();
        file.write_all(&captured.file).expect("the test's folder can be written");
        captured.frames
    }
}

/// How many frames tshark's dissector sees, and that it complains of none.
fn dissect(path: &Path) -> usize {
    let fields = ["-T", "fields", "-e", "aoe.cmd", "-e", "_ws.malformed", "-e", "_ws.expert.message"];
    let told = Outcome::of(process::tool("tshark").arg("-r").arg(path).args(fields)).ok();
    let complaints: Vec<&str> = told.lines().filter(|line| line.trim_end().contains('\t')).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    told.lines().filter(|line| !line.is_empty()).count()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Doing {
    Nothing,
    Writing(u64),
    Reading,
}

struct Unit {
    /// What was last written and answered.
    value: u64,
    doing: Doing,
    since: Instant,
}

struct Lossy {
    _target: Process,
    hub: Option<Hub>,
    cluster: Cluster,
    network: Network,
    initiator: Initiator,
    to: MacAddr,
    units: Vec<Unit>,
    /// Which unit a tag was sent for, and what was done then.
    tags: HashMap<u32, (usize, u64)>,
    /// Counts what was begun at each unit: an answer to something earlier is passed over.
    begun: Vec<u64>,
    count: u32,
    start: Instant,
    value: u64,
}

fn content(value: u64, unit: usize) -> Vec<u8> {
    (value << 16 | unit as u64).to_be_bytes().repeat((SECTORS * 512 / 8) as usize)
}

impl Lossy {
    fn new() -> Option<Self> {
        let network = Network::new(hosts_for(1) + 1)?;
        let options = ClusterOptions { network: Some(network.clone()), ..ClusterOptions::new("aoe-lossy", 1) };
        let mut cluster = Cluster::start(options);
        cluster.torusblk(&["volume", "create", "db", &SIZE.to_string(), "--replicas", "1"]).ok();
        let mut target = cluster.aoe_on(client_host(1), &["db", "eth0", "1", "0"]);
        target.await_line("serving e1.0");
        let initiator = Initiator::open("eth0");
        let unit = || Unit { value: 0, doing: Doing::Nothing, since: Instant::now() };
        let mut lossy = Self {
            _target: target,
            hub: None,
            cluster,
            network,
            initiator,
            to: MacAddr::broadcast(),
            units: (0..UNITS).map(|_| unit()).collect(),
            tags: HashMap::new(),
            begun: vec![0; UNITS as usize],
            // The counter comes round soon.
            count: 0x7f00,
            start: Instant::now(),
            value: 0,
        };
        lossy.to = lossy.discover().from;
        Some(lossy)
    }

    /// As the driver does: the tick of 4 ms in the low 16 bits, a counter in bits 16 to 30.
    fn tag(&mut self) -> u32 {
        self.count = (self.count + 1) & 0x7fff;
        self.count << 16 | (self.start.elapsed().as_millis() / 4) as u32 & 0xffff
    }

    fn discover(&mut self) -> Reply {
        let mut asked = Vec::new();
        Config { buffers: 0, firmware: 0, sectors: 0, command: 0, string: &[] }.put(&mut asked);
        wait::until("the target to be found", || {
            let tag = self.tag();
            self.initiator.send(&self.initiator.request(MacAddr::broadcast(), TARGET, COMMAND_CONFIG, tag, &asked));
            self.initiator.answer(tag, Duration::from_millis(300))
        })
    }

    fn send(&mut self, unit: usize) {
        let tag = self.tag();
        self.tags.insert(tag, (unit, self.begun[unit]));
        let lba = unit as u64 * SECTORS;
        let argument = match self.units[unit].doing {
            Doing::Writing(value) => Initiator::ata(WRITE, lba, SECTORS as u8, &content(value, unit)),
            _ => Initiator::ata(READ, lba, SECTORS as u8, &[]),
        };
        self.units[unit].since = Instant::now();
        self.initiator.send(&self.initiator.request(self.to, TARGET, COMMAND_ATA, tag, &argument));
    }

    fn begin(&mut self, unit: usize, doing: Doing) {
        self.begun[unit] += 1;
        self.units[unit].doing = doing;
        self.send(unit);
    }

    /// Whether that ended something.
    fn take(&mut self, reply: &Reply) -> bool {
        let Some(&(unit, begun)) = self.tags.get(&reply.tag) else { return false };
        if reply.command != COMMAND_ATA || begun != self.begun[unit] || self.units[unit].doing == Doing::Nothing {
            return false;
        }
        let (registers, data) = reply.registers();
        assert_eq!((reply.error, registers.command & 0x01), (0, 0), "{reply:?}");
        match self.units[unit].doing {
            Doing::Writing(value) => self.units[unit].value = value,
            _ => {
                let expected = self.units[unit].value;
                let expected = if expected == 0 { vec![0; data.len()] } else { content(expected, unit) };
                let found = u64::from_be_bytes(data[..8].try_into().expect("eight bytes")) >> 16;
                assert!(data == expected, "unit {unit} reads {found}, and {} was answered", self.units[unit].value);
            }
        }
        self.units[unit].doing = Doing::Nothing;
        true
    }

    fn busy(&self) -> usize {
        self.units.iter().filter(|unit| unit.doing != Doing::Nothing).count()
    }

    /// Answers that are there, and what has waited too long is sent again.
    fn step(&mut self) -> usize {
        let mut ended = 0;
        if let Some(reply) = self.initiator.receive(Duration::from_millis(5)) {
            ended += usize::from(self.take(&reply));
        }
        for unit in 0..self.units.len() {
            let waits = &self.units[unit];
            if waits.doing != Doing::Nothing && waits.since.elapsed() > SEND_AGAIN_AFTER {
                self.send(unit);
            }
        }
        ended
    }

    fn run(&mut self, writes: u64, random: &mut Random) {
        let deadline = Instant::now() + Duration::from_secs(300);
        while self.value < writes || self.busy() > 0 {
            assert!(Instant::now() < deadline, "{} of {writes} writes were answered", self.value);
            while self.busy() < OUTSTANDING && self.value < writes {
                let unit = random.below(UNITS) as usize;
                if self.units[unit].doing != Doing::Nothing {
                    continue;
                }
                if random.below(3) == 0 {
                    self.begin(unit, Doing::Reading);
                } else {
                    self.value += 1;
                    self.begin(unit, Doing::Writing(self.value));
                }
            }
            self.step();
        }
    }

    /// Of everything, as it is when nothing is under way any more.
    fn read_all(&mut self) {
        let quiet = Instant::now() + Duration::from_millis(2 * LATE_AT_MOST);
        while Instant::now() < quiet {
            let _ = self.initiator.receive(Duration::from_millis(20));
        }
        self.hub = None;
        self.network.bridge_forwards();
        for unit in 0..UNITS as usize {
            self.begin(unit, Doing::Reading);
            while self.units[unit].doing != Doing::Nothing {
                self.step();
            }
        }
    }

    fn folder(&self) -> PathBuf {
        self.cluster.folder().to_path_buf()
    }
}

#[test]
fn what_was_answered_is_read_though_frames_are_lost_repeated_and_overtaken() {
    let Some(mut lossy) = Lossy::new() else { return };
    let (capture, mut fates) = (Capture::new(), Random(number("TORUS_AOE_SEED", 1)));
    let noted = capture.clone();
    let decide = move |frame: &[u8]| {
        noted.note(frame);
        match fates.below(100) {
            0..5 => Fate::Lost,
            5..10 => Fate::Twice,
            10..25 => Fate::Late(Duration::from_millis(1 + fates.below(LATE_AT_MOST))),
            _ => Fate::Pass,
        }
    };
    lossy.hub = Some(Hub::start(&lossy.network, Box::new(decide)));
    let writes = number("TORUS_AOE_WRITES", 3_000);
    lossy.run(writes, &mut Random(number("TORUS_AOE_SEED", 1) + 1));
    let frames = lossy.hub.as_ref().map_or(0, Hub::frames);
    assert!(frames > 2 * writes, "{frames} frames went by the hub for {writes} writes");
    lossy.read_all();
    let path = lossy.folder().join("frames.pcap");
    let captured = capture.store(&path);
    let dissected = dissect(&path);
    assert_eq!(dissected, captured);
    println!("{writes} writes answered, {frames} frames, {dissected} dissected");
}
