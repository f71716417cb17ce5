//! Instructions of the parts that need no I/O, counted by callgrind: the same on every run of one build, however busy the
//! machine is. A child under valgrind does each part so many times; what a mark separates is counted apart.

use super::results_folder;
use crate::error::{BenchError, Result};
use crate::report::table;
use crate::store::bed;
use bytes::{BufMut, BytesMut};
use serde::Serialize;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, Stdio};
use torus_engine::index::{AtTie, Entry, Index, Place};
use torus_engine::log::batch::BatchHeader;
use torus_engine::log::record::{Data, Record};
use torus_engine::log::{BatchNumber, Position, SegmentIdentity, SegmentIndex};
use torus_frontends::nbd::session::{Next, Session, Terms};
use torus_frontends::nbd::wire::Style;
use torus_rpc::frame::{PREFIX_BYTES, Prefix, decode_reply, decode_request, encode_reply, encode_request};
use torus_rpc::message::{Answer, Envelope, Operation, Reply, Run};
use torus_schema::ids::{BlockIndex, Epoch, Incarnation, RingGeneration, SliceId, Version};
use torus_schema::limits::{BLOCK_BYTES, GIB};
use torus_tests::process;

/// Of each part: enough for the mark between two to weigh nothing.
const TIMES: u64 = 2000;
/// Of the index that is searched, at random over a volume of 64 GiB.
const INDEX_BLOCKS: u64 = 50_000;
const VOLUME_BLOCKS: u64 = 64 * GIB / BLOCK_BYTES;
/// Records of one group commit.
const BATCH_RECORDS: u64 = 32;

#[derive(Serialize)]
struct Row {
    part: &'static str,
    instructions_per_operation: f64,
}

/// What is told apart, in this order; `perform` marks before and behind each of them.
const PARTS: [&str; 9] = [
    "request of a write: encode",
    "request of a write: decode",
    "reply of a read: encode",
    "reply of a read: decode",
    "log record of a block: encode",
    "log header of 32 records: encode, per record",
    "index: insert of a block",
    "index: find a block",
    "NBD request of a read: parse",
];

/// Where callgrind ends one count and begins the next: it knows it by this name.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn torus_bench_counts_anew() {
    black_box(());
}

/// Between two marks: `times` operations and nothing else.
fn part(times: u64, mut operation: impl FnMut(u64)) {
    torus_bench_counts_anew();
    (0..times).for_each(&mut operation);
    torus_bench_counts_anew();
}

fn version(sequence: u64) -> Version {
    Version::new(Epoch(3), sequence + 1)
}

fn envelope() -> Envelope {
    Envelope {
        volume: bed::volume(),
        epoch: Epoch(3),
        incarnation: Incarnation(7 << 64 | 9),
        generation: RingGeneration(2),
        flush_point: version(0),
    }
}

/// All parts, in their order; under callgrind.
pub fn perform() {
    frames();
    records();
    index();
    nbd();
}

fn frames() {
    let (envelope, mut out) = (envelope(), Vec::with_capacity(4096));
    let write = Operation::Write {
        first: BlockIndex(77),
        version: version(5),
        durable: true,
        checksums: [0x1234].as_slice().into(),
    };
    part(TIMES, |id| {
        out.clear();
        encode_request(&mut out, id, black_box(&envelope), black_box(&write), BLOCK_BYTES as usize);
    });
    let request = out.clone();
    part(TIMES, |_| {
        let prefix = parse(black_box(&request));
        black_box(decode_request(&prefix, &request[PREFIX_BYTES..]).expect("it was just encoded"));
    });
    let runs = [Run { count: 1, version: version(5), data: true }].into();
    let reply = Reply::of(Answer::Read { runs, checksums: [0x1234].as_slice().into() });
    part(TIMES, |id| {
        out.clear();
        encode_reply(&mut out, id, black_box(&reply), BLOCK_BYTES as usize);
    });
    let reply = out.clone();
    part(TIMES, |_| {
        let prefix = parse(black_box(&reply));
        black_box(decode_reply(&prefix, &reply[PREFIX_BYTES..]).expect("it was just encoded"));
    });
}

fn parse(frame: &[u8]) -> Prefix {
    Prefix::parse(frame).expect("it was just encoded").expect("it is whole")
}

fn record(number: u64) -> Record {
    Record::Data(Data {
        volume: bed::volume(),
        first: BlockIndex(number * 7),
        version: version(number),
        flush_point: version(0),
        position: Position(16 + number as u32),
        checksums: [0x1234].as_slice().into(),
    })
}

fn records() {
    let (one, mut out) = (record(1), Vec::with_capacity(4096));
    part(TIMES, |_| {
        out.clear();
        black_box(&one).encode(&mut out);
    });
    let header = BatchHeader {
        identity: SegmentIdentity { segment: SegmentIndex(4), nonce: 0x5eed, sequence: 12 },
        number: BatchNumber(100),
        durable: BatchNumber(99),
        first_batch: BatchNumber(90),
        position: Position(8),
        records: (0..BATCH_RECORDS).map(record).collect(),
    };
    // So often that each record is counted as one operation.
    part(TIMES / BATCH_RECORDS, |_| {
        black_box(black_box(&header).encode());
    });
}

fn place(block: u64) -> Place {
    Place { volume: bed::volume(), slice: SliceId(0), block: BlockIndex(block) }
}

fn insert(index: &mut Index, block: u64, sequence: u64) {
    let entry =
        Entry { position: Position(16 + sequence as u32), checksum: sequence as u32, version: version(sequence) };
    black_box(index.apply(place(block), entry, AtTie::NewcomerWins));
}

fn index() {
    let mut random = crate::random::Random::new(1);
    let blocks: Vec<u64> = (0..INDEX_BLOCKS + TIMES).map(|_| random.below(VOLUME_BLOCKS)).collect();
    let (old, new) = blocks.split_at(INDEX_BLOCKS as usize);
    let mut index = Index::default();
    for (sequence, block) in (0u64..).zip(old) {
        insert(&mut index, *block, sequence);
    }
    part(TIMES, |at| insert(&mut index, new[at as usize], INDEX_BLOCKS + at));
    part(TIMES, |at| {
        black_box(index.find(place(old[at as usize * 7])));
    });
}

fn nbd() {
    let mut requests = BytesMut::new();
    for cookie in 0..TIMES {
        requests.put_u32(0x2560_9513);
        requests.put_u32(0);
        requests.put_u64(cookie);
        requests.put_u64(cookie * BLOCK_BYTES);
        requests.put_u32(BLOCK_BYTES as u32);
    }
    let terms = Terms { size_bytes: GIB, read_only: false, style: Style::Structured, allocation: false };
    let mut session = Session::new(terms);
    part(TIMES, |_| {
        let next = session.next_command(&mut requests).expect("the requests are valid");
        assert!(matches!(next, Next::Command(_)), "{next:?}");
    });
}

/// Runs itself under callgrind.
pub fn run(out: Option<&Path>) -> Result<()> {
    let folder = process::temporary_dir("bench-instructions");
    let output = folder.path().join("counts");
    let mut command = Command::new("valgrind");
    command.args(["--tool=callgrind", "--dump-before=torus_bench_counts_anew", "--quiet"]);
    command.arg(format!("--callgrind-out-file={}", output.display()));
    command.arg(std::env::current_exe().map_err(BenchError::wrap("the path of this program"))?).arg("pure");
    let ran = command.stdin(Stdio::null()).output();
    let ran = ran.map_err(|because| BenchError::Missing { program: "valgrind", package: "valgrind", because })?;
    if !ran.status.success() {
        let because = format!("{}; it said:\n{}", ran.status, String::from_utf8_lossy(&ran.stderr));
        return Err(BenchError::Failed { what: format!("{command:?}"), because });
    }
    let rows: Vec<Row> =
        PARTS.iter().enumerate().map(|(index, part)| row(&output, index, part)).collect::<Result<_>>()?;
    let cells = |row: &Row| vec![row.part.to_string(), format!("{:.0}", row.instructions_per_operation)];
    println!("{}", table(&["instructions per operation", ""], rows.iter().map(cells)));
    super::write(&results_folder(out), "instructions", &rows)
}

/// Dump 2n + 1 ends what was before part n, dump 2n + 2 ends the part.
fn row(output: &Path, index: usize, part: &'static str) -> Result<Row> {
    let path = output.with_extension((2 * index + 2).to_string());
    let wrap = BenchError::wrap(format!("callgrind's count of {part} in {}", path.display()));
    let text = std::fs::read_to_string(&path).map_err(|error| error.to_string());
    let counted = text.and_then(|text| summary(&text).ok_or_else(|| "no summary line".to_string())).map_err(wrap)?;
    let operations = if index == 5 { TIMES / BATCH_RECORDS * BATCH_RECORDS } else { TIMES };
    Ok(Row { part, instructions_per_operation: counted as f64 / operations as f64 })
}

fn summary(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("summary:").or_else(|| line.strip_prefix("totals:")))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_of_a_dump_is_its_summary() {
        assert_eq!(summary("version: 1\nevents: Ir\nsummary: 1234567\n\nfn=(1)\n"), Some(1_234_567));
        assert_eq!(summary("events: Ir\n"), None);
    }

    #[test]
    fn every_part_can_be_performed() {
        perform();
    }
}
