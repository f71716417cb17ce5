//! The report for people.

use super::picture;
use super::report::{NodeInspection, RecordInspection, SegmentInspection, ShardInspection, Verified};
use std::io::{self, Write};
use std::time::{SystemTime, UNIX_EPOCH};

/// Of more segments only the picture is shown; `--output json` has them all.
const SEGMENTS_LISTED_MAX: usize = 128;

pub fn write(out: &mut impl Write, node: &NodeInspection) -> io::Result<()> {
    if let (Some(path), Some(cluster), Some(id)) = (&node.data_dir, &node.cluster, &node.node) {
        writeln!(out, "data dir  {}\ncluster   {cluster}\nnode      {id}", path.display())?;
    }
    if let Some(bytes) = node.growing_to_shard_bytes {
        writeln!(out, "growing   to {} a shard; the next start goes on with it", size(bytes))?;
    }
    node.shards.iter().try_for_each(|shard| write_shard(out, shard))
}

fn write_shard(out: &mut impl Write, shard: &ShardInspection) -> io::Result<()> {
    let superblock = &shard.superblock;
    writeln!(out, "\nshard {}   {} at byte {}", superblock.shard, shard.path.display(), shard.offset_bytes)?;
    writeln!(
        out,
        "  superblock  format {}, revision {}, {} in segments of {}, of node {}, cluster {}",
        superblock.format_version,
        superblock.revision,
        size(superblock.size_bytes),
        size(superblock.segment_bytes),
        superblock.node,
        superblock.cluster
    )?;
    match (superblock.lost_below.as_str(), shard.lost_below_after_a_start.as_str()) {
        ("0", "0") => writeln!(out, "  lost        nothing")?,
        (was, now) if was == now => writeln!(out, "  lost        something, in batches below {was}")?,
        (_, now) => writeln!(out, "  lost        something; a start will say so, of batches below {now}")?,
    }
    let total = shard.segments.len();
    writeln!(
        out,
        "  segments    {total}: {} free, {} sealed, {} without a footer, {} lost; {} needed, of {} volumes",
        shard.segments_free,
        shard.segments_sealed,
        shard.segments_unsealed,
        shard.segments_lost,
        size(shard.live_bytes),
        shard.volumes.len()
    )?;
    picture::draw(&shard.segments).iter().try_for_each(|line| writeln!(out, "{line}"))?;
    write_segments(out, &shard.segments)?;
    if let Some(records) = &shard.records {
        write_records(out, records)?;
    }
    if let Some(verified) = &shard.verified {
        write_verified(out, verified)?;
    }
    Ok(())
}

fn write_segments(out: &mut impl Write, segments: &[SegmentInspection]) -> io::Result<()> {
    let used: Vec<_> = segments.iter().filter(|segment| segment.state != "free").collect();
    if used.is_empty() || used.len() > SEGMENTS_LISTED_MAX {
        return Ok(());
    }
    writeln!(out, "  segment  state     sequence  age         live    notes   batches")?;
    for segment in used {
        writeln!(
            out,
            "  {:>7}  {:<8}  {:>8}  {:<10}  {:>5.1}%  {:>6}  {} to {}",
            segment.segment,
            segment.state,
            segment.sequence.as_deref().unwrap_or("-"),
            segment.opened_s.map_or("-".to_string(), age),
            segment.live_share * 100.0,
            segment.note_bytes,
            segment.first_batch.as_deref().unwrap_or("-"),
            segment.end_batch.as_deref().unwrap_or("-"),
        )?;
    }
    Ok(())
}

fn write_records(out: &mut impl Write, records: &[RecordInspection]) -> io::Result<()> {
    writeln!(out, "  records of the block: {}", records.len())?;
    for record in records {
        writeln!(
            out,
            "    version {}.{}  segment {}  position {}  checksum {}  {}, {}",
            record.epoch,
            record.version_sequence,
            record.segment,
            record.position,
            record.checksum,
            if record.is_needed { "needed" } else { "superseded" },
            if record.is_intact { "intact" } else { "DAMAGED" }
        )?;
    }
    Ok(())
}

fn write_verified(out: &mut impl Write, verified: &Verified) -> io::Result<()> {
    writeln!(
        out,
        "  verified    {} blocks: {} damaged, {} of them needed",
        verified.blocks, verified.damaged_blocks, verified.damaged_needed_blocks
    )?;
    for damaged in &verified.damaged {
        let needed = if damaged.is_needed { "needed" } else { "superseded" };
        let (volume, block, offset) = (&damaged.volume, damaged.block, damaged.offset_bytes);
        writeln!(out, "    volume {volume} block {block} at byte {offset}, {needed}: {}", damaged.because)?;
    }
    Ok(())
}

fn size(bytes: u64) -> String {
    torus_schema::size::format(bytes)
}

fn age(opened_s: u64) -> String {
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    match now_s.saturating_sub(opened_s) {
        seconds @ 0..=119 => format!("{seconds} s"),
        seconds @ 120..=7199 => format!("{} min", seconds / 60),
        seconds @ 7200..=172_799 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86400),
    }
}
