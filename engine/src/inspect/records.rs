//! The records of a shard one by one: those of one block, and all of them for their checksums.

use super::report::{DamagedBlock, RecordInspection, Verified};
use crate::disk::overlay::OverlayDisk;
use crate::log::record::{Data, Record};
use crate::log::{BLOCK, Geometry, Position};
use crate::shard::survey::{Survey, SurveyedSegment};
use futures::executor::block_on;
use std::io::Write;
use torus_rpc::runtime::{Disk, DiskError};
use torus_schema::ids::{BlockIndex, VolumeId};

/// Named one by one; of more the number says enough.
const DAMAGED_LISTED_MAX: usize = 1000;

/// Everything that was ever written to it and not overwritten by the log since, oldest first.
pub fn of_block(
    disk: &OverlayDisk,
    found: &Survey,
    volume: VolumeId,
    block: BlockIndex,
) -> Result<Vec<RecordInspection>, DiskError> {
    let mut records = Vec::new();
    for segment in by_age(found) {
        let pinned = found.pinned_in(segment.segment);
        for data in data_of(disk, found, segment)? {
            let number = block.0.checked_sub(data.first.0).map(|number| number as usize);
            let Some(number) = number.filter(|number| data.volume == volume && *number < data.checksums.len()) else {
                continue;
            };
            let position = Position(data.position.0 + number as u32);
            let checksum = data.checksums[number];
            let is_intact = block_on(disk.read(Geometry::offset(position), BLOCK))
                .is_ok_and(|bytes| crc32c::crc32c(&bytes) == checksum);
            records.push(RecordInspection {
                segment: segment.segment.0,
                sequence: segment.identity.map_or(String::new(), |identity| identity.sequence.to_string()),
                position: position.0,
                epoch: data.version.epoch.0,
                version_sequence: data.version.sequence.to_string(),
                checksum: format!("{checksum:08x}"),
                is_needed: found.needs(&data, number, &pinned),
                is_intact,
            });
        }
    }
    Ok(records)
}

/// Reads every block that a record lists.
pub fn verify(disk: &OverlayDisk, found: &Survey, shows_progress: bool) -> Result<Verified, DiskError> {
    let mut verified = Verified::default();
    let segments = by_age(found);
    for (done, segment) in segments.iter().enumerate() {
        let pinned = found.pinned_in(segment.segment);
        for data in data_of(disk, found, segment)? {
            let bytes = block_on(disk.read(Geometry::offset(data.position), data.checksums.len() * BLOCK));
            for (number, checksum) in data.checksums.iter().enumerate() {
                verified.blocks += 1;
                let because = match &bytes {
                    Ok(bytes) => mismatch(&bytes[number * BLOCK..][..BLOCK], *checksum),
                    Err(_) => one_block(disk, &data, number),
                };
                if let Some(because) = because {
                    verified.note(&data, number, found.needs(&data, number, &pinned), because);
                }
            }
        }
        if shows_progress {
            let (percent, blocks) = ((done + 1) * 100 / segments.len(), verified.blocks);
            // Nobody to see it is no reason to stop.
            let _ = write!(std::io::stderr(), "\rverified {percent} %, {blocks} blocks");
        }
    }
    if shows_progress {
        let _ = writeln!(std::io::stderr());
    }
    Ok(verified)
}

fn mismatch(bytes: &[u8], expected: u32) -> Option<String> {
    let found = crc32c::crc32c(bytes);
    (found != expected).then(|| format!("checksum {found:08x}, expected {expected:08x}"))
}

/// Of a run that cannot be read as a whole.
fn one_block(disk: &OverlayDisk, data: &Data, number: usize) -> Option<String> {
    let position = Position(data.position.0 + number as u32);
    match block_on(disk.read(Geometry::offset(position), BLOCK)) {
        Ok(bytes) => mismatch(&bytes, data.checksums[number]),
        Err(error) => Some(error.to_string()),
    }
}

impl Verified {
    fn note(&mut self, data: &Data, number: usize, is_needed: bool, because: String) {
        self.damaged_blocks += 1;
        self.damaged_needed_blocks += u64::from(is_needed);
        if self.damaged.len() < DAMAGED_LISTED_MAX {
            let volume = data.volume.to_string();
            let block = data.first.0 + number as u64;
            let offset_bytes = Geometry::offset(Position(data.position.0 + number as u32));
            self.damaged.push(DamagedBlock { volume, block, offset_bytes, is_needed, because });
        }
    }
}

fn by_age(found: &Survey) -> Vec<&SurveyedSegment> {
    let mut segments: Vec<&SurveyedSegment> =
        found.segments.iter().filter(|segment| segment.identity.is_some()).collect();
    segments.sort_by_key(|segment| segment.identity.map(|identity| identity.sequence));
    segments
}

fn data_of(disk: &OverlayDisk, found: &Survey, segment: &SurveyedSegment) -> Result<Vec<Data>, DiskError> {
    let records = block_on(found.records(disk, segment))?.unwrap_or_default();
    let data = |record| match record {
        Record::Data(data) => Some(data),
        _ => None,
    };
    Ok(records.into_iter().filter_map(data).collect())
}
