//! How long a shard takes to start, by what it holds: a sparse file with the openings and footers of a shard that was
//! filled and closed in order. The payload is a hole, which no start reads; footers are read from the disk, past its cache.

use super::bed::{BLOCK, BenchRuntime, BenchShard, GENERATION, failed, identity, key, volume};
use crate::error::{BenchError, Result};
use crate::report::table;
use crate::statistics::Spread;
use serde::Serialize;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;
use torus_engine::disk::direct::DirectDisk;
use torus_engine::log::footer::Footer;
use torus_engine::log::record::{Data, Instances, Record};
use torus_engine::log::recovery::write_footer;
use torus_engine::log::segment::Opening;
use torus_engine::log::{BatchNumber, Geometry, Position, SEGMENTS_START_BLOCK, SegmentIdentity, SegmentIndex};
use torus_engine::node::no_metadata::NoMetadata;
use torus_rpc::runtime::Disk;
use torus_schema::ids::{BlockIndex, Epoch, SliceId, Version};
use torus_schema::limits::{GIB, SEGMENT_BYTES};

const SIZES_GIB: [u64; 4] = [1, 4, 16, 64];
const QUICK_GIB: [u64; 2] = [1, 4];
/// Of the shard, so that nothing is cleaned.
const FREE_PERCENT: u64 = 15;
/// Odd, so that its multiples reach every block of a volume of 2^n of them.
const STRIDE: u64 = 0x9e37_79b9_7f4a_7c15;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Pattern {
    /// By 1 MiB: one descriptor for 256 blocks.
    Sequential,
    /// By 64 KiB at random.
    RandomLarge,
    /// By 4 KiB at random: a descriptor for each block, the longest footers there are.
    Random,
}

impl Pattern {
    const ALL: [Pattern; 3] = [Pattern::Sequential, Pattern::RandomLarge, Pattern::Random];

    /// Of one write.
    fn blocks(self) -> u64 {
        match self {
            Pattern::Sequential => 256,
            Pattern::RandomLarge => 16,
            Pattern::Random => 1,
        }
    }

    /// Where the block that is written as number `at` lies in the volume.
    fn block(self, at: u64, volume_blocks: u64) -> u64 {
        let blocks = self.blocks();
        match self {
            Pattern::Sequential => at,
            Pattern::RandomLarge | Pattern::Random => {
                (at / blocks).wrapping_mul(STRIDE) % (volume_blocks / blocks) * blocks + at % blocks
            }
        }
    }
}

#[derive(Serialize)]
pub struct Row {
    pattern: Pattern,
    gib: u64,
    seconds: Spread,
    footer_bytes: u64,
}

pub async fn measure(folder: &Path, rounds: usize, quick: bool) -> Result<Vec<Row>> {
    let sizes: &[u64] = if quick { &QUICK_GIB } else { &SIZES_GIB };
    let runtime = BenchRuntime::new(NoMetadata);
    let mut rows = Vec::new();
    for pattern in Pattern::ALL {
        for gib in sizes {
            eprintln!("bench: start with {gib} GiB, {pattern:?}");
            let path = folder.join("start");
            let footer_bytes = make(&runtime, &path, pattern, gib * GIB).await?;
            let mut seconds = Vec::new();
            for _ in 0..rounds {
                seconds.push(start(&runtime, &path, gib * GIB).await?);
            }
            std::fs::remove_file(&path).map_err(failed("removal", &path))?;
            let none = || BenchError::Failed { what: "starting".to_string(), because: "of no rounds".to_string() };
            let seconds = Spread::of(seconds).ok_or_else(none)?;
            rows.push(Row { pattern, gib: *gib, seconds, footer_bytes });
        }
    }
    Ok(rows)
}

/// Seconds from the closed file to a shard that answers.
async fn start(runtime: &BenchRuntime, path: &Path, live_bytes: u64) -> Result<f64> {
    let started = Instant::now();
    let disk = DirectDisk::open(path).await.map_err(failed("opening", path))?;
    let shard = BenchShard::open(runtime.clone(), disk, identity(), key()).await.map_err(failed("start", path))?;
    let took = started.elapsed().as_secs_f64();
    let found = shard.statistics().live_bytes;
    shard.close().await;
    if found != live_bytes {
        let because = format!("it found {found} bytes, expected {live_bytes}");
        return Err(BenchError::Failed { what: format!("a start of the shard on {}", path.display()), because });
    }
    Ok(took)
}

/// Returns the bytes of all footers.
async fn make(runtime: &BenchRuntime, path: &PathBuf, pattern: Pattern, live_bytes: u64) -> Result<u64> {
    let wanted = live_bytes * 100 / (100 - FREE_PERCENT);
    let size_bytes = SEGMENTS_START_BLOCK * BLOCK as u64 + wanted.next_multiple_of(SEGMENT_BYTES);
    let sparse = File::create_new(path).and_then(|file| file.set_len(size_bytes));
    sparse.map_err(failed("making the file", path))?;
    let disk = DirectDisk::open(path).await.map_err(failed("opening", path))?;
    BenchShard::format(runtime, &disk, identity(), SEGMENT_BYTES).await.map_err(failed("format", path))?;
    let geometry = Geometry::new(size_bytes, SEGMENT_BYTES);
    let (blocks, mut done, mut footer_bytes) = (live_bytes / BLOCK as u64, 0, 0);
    let segments_needed = blocks.div_ceil(geometry.payload_blocks().into());
    let mut next_batch = BatchNumber(1);
    for segment in (0..segments_needed as u32).map(SegmentIndex) {
        let count = u64::from(geometry.payload_blocks()).min(blocks - done);
        let mut records = records(geometry, segment, pattern, done..done + count, blocks);
        if segment.0 == 0 {
            records.push(Record::Instances(instances()));
        }
        let end_batch = BatchNumber(next_batch.0 + records.len() as u64);
        let identity =
            SegmentIdentity { segment, nonce: STRIDE ^ u64::from(segment.0), sequence: 1 + u64::from(segment.0) };
        let durable = BatchNumber(next_batch.0 - 1);
        let opening = Opening { identity, first_batch: next_batch, durable, opened_s: 0, recent: Vec::new() };
        let mut buffer = disk.allocate(BLOCK);
        buffer.copy_from_slice(&opening.encode());
        disk.write(Geometry::offset(geometry.first(segment)), buffer).await.map_err(failed("filling", path))?;
        let durable = BatchNumber(end_batch.0 - 1);
        let batches = records.len() as u32;
        let footer = Footer { identity, first_batch: next_batch, end_batch, durable, batches, sealed_s: 0, records };
        write_footer(&disk, geometry, &footer).await.map_err(failed("filling", path))?;
        footer_bytes += footer.encode().len() as u64;
        (done, next_batch) = (done + count, end_batch);
    }
    disk.sync().await.map_err(failed("filling", path))?;
    disk.close().await.map_err(failed("closing", path))?;
    Ok(footer_bytes)
}

fn instances() -> Instances {
    let (volume, created) = (volume(), BatchNumber(1));
    let slices = vec![SliceId(0)];
    Instances { volume, placement: volume, generation: GENERATION, created, width: 1, ring_slices: 1, slices }
}

/// The volume's blocks of `range`, as they come in that order, behind the opening and a header for every 64 of them.
fn records(
    geometry: Geometry,
    segment: SegmentIndex,
    pattern: Pattern,
    range: std::ops::Range<u64>,
    volume_blocks: u64,
) -> Vec<Record> {
    let each = pattern.blocks();
    let first_position = geometry.first(segment).0 + 1;
    let (mut records, mut at) = (Vec::new(), range.start);
    while at < range.end {
        // Up to the end of the frame, so that none crosses an extent.
        let count = (each - at % each).min(range.end - at);
        let first = pattern.block(at, volume_blocks);
        let within = (at - range.start) as u32;
        let version = Version::new(Epoch(1), at + 1);
        records.push(Record::Data(Data {
            volume: volume(),
            first: BlockIndex(first),
            version,
            flush_point: version,
            position: Position(first_position + within + within / 64),
            checksums: (at..at + count).map(|block| block as u32).collect(),
        }));
        at += count;
    }
    records
}

pub fn print(rows: &[Row]) {
    let cells = |row: &Row| {
        let mib = row.footer_bytes as f64 / f64::from(1 << 20);
        vec![format!("{} GiB, {:?}", row.gib, row.pattern), row.seconds.with_range(2), format!("{mib:.1}")]
    };
    println!("{}", table(&["start of a shard that holds", "seconds", "MiB of footers"], rows.iter().map(cells)));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_block_is_written_once_and_lies_inside_its_segment() {
        let geometry = Geometry::new(GIB, SEGMENT_BYTES);
        let blocks = 1 << 13;
        for pattern in Pattern::ALL {
            let segment = SegmentIndex(1);
            let records = records(geometry, segment, pattern, 0..blocks, blocks);
            let mut seen = BTreeSet::new();
            for record in &records {
                let Record::Data(data) = record else { panic!("{record:?}") };
                let count = data.checksums.len() as u64;
                seen.extend((0..count).map(|number| data.first.0 + number));
                assert_eq!(data.first.extent(), BlockIndex(data.first.0 + count - 1).extent());
                let last = Position(data.position.0 + count as u32 - 1);
                assert_eq!(geometry.segment_of(last), segment);
            }
            assert_eq!(seen.len() as u64, blocks, "{pattern:?}");
        }
    }
}
