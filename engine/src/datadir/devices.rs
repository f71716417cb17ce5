//! Raw devices of a node: which is whose. Shard i lies on device i mod n, as its (i / n)th area; all areas are equal.
//!
//! A path may lead to another device after a reboot, so a formatted device is known by the superblock of its first
//! area (cluster, node, shard), and `torus.json` remembers the path only as the place to look first.

use super::layout::slots;
use super::{DataDir, DataDirError, Identity};
use crate::disk::area::{AreaKind, BlockArea};
use crate::disk::device::{self, Device, number_text};
use crate::log::superblock::Superblock;
use std::path::{Path, PathBuf};
use torus_schema::ids::{NodeId, ShardIndex};

/// In the order of their first shards; empty for a node whose shards are files.
#[derive(Debug, Default)]
pub struct Devices(pub Vec<Device>);

impl Devices {
    /// For a format: each held, none twice.
    pub fn take(paths: &[PathBuf]) -> Result<Self, DataDirError> {
        let mut taken: Vec<Device> = Vec::new();
        for path in paths {
            // Held exclusively, a second time would be refused as in use by another.
            if let Some(other) = taken.iter().find(|other| is_at(other, path)) {
                let (path, number) = (path.clone(), number_text(other.number));
                return Err(DataDirError::DeviceTwice { path, other: other.path.clone(), number });
            }
            taken.push(Device::open(path)?);
        }
        Ok(Self(taken))
    }

    /// Refuses what holds anything else. `draft`: whose format was cut off.
    pub fn check_empty(&self, draft: Option<NodeId>) -> Result<(), DataDirError> {
        self.0.iter().try_for_each(|device| device.check_empty(draft)).map_err(DataDirError::from)
    }

    /// Before a format. After it nothing of an earlier use can be mistaken for ours.
    pub fn wipe(&self, shards: u16, shard_bytes: u64) -> Result<(), DataDirError> {
        let starts: Vec<u64> = (0..slots(shards, self.0.len())).map(|slot| slot * shard_bytes).collect();
        for device in &self.0 {
            let within: Vec<u64> = starts.iter().copied().filter(|start| start + shard_bytes <= device.bytes).collect();
            device.wipe(&within)?;
        }
        Ok(())
    }

    pub fn paths(&self) -> Vec<PathBuf> {
        self.0.iter().map(|device| device.path.clone()).collect()
    }
}

fn is_at(device: &Device, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(path).is_ok_and(|metadata| metadata.rdev() == device.number)
}

impl DataDir {
    /// Where the shards of `identity` lie, each `bytes` long.
    pub fn areas(&self, identity: &Identity, bytes: u64) -> Vec<BlockArea> {
        let count = identity.devices.len();
        let area = |shard: ShardIndex| match identity.devices.get(usize::from(shard.0) % count.max(1)) {
            None => BlockArea { path: self.block_file(shard), kind: AreaKind::File, offset_bytes: 0, bytes },
            Some(path) => {
                let offset_bytes = (usize::from(shard.0) / count) as u64 * bytes;
                BlockArea { path: path.clone(), kind: AreaKind::Device, offset_bytes, bytes }
            }
        };
        (0..identity.shards).map(ShardIndex).map(area).collect()
    }
}

/// The devices of a formatted node, held, and its identity with the paths they have now.
pub fn attach(identity: &Identity, given: &[PathBuf]) -> Result<(Devices, Identity), DataDirError> {
    let paths = look_for(identity, given)?;
    let devices = Devices::take(&paths)?;
    Ok((devices, Identity { devices: paths, ..identity.clone() }))
}

/// Where the devices of a formatted node are now. `given` by `--device`: only there is looked then, in any order;
/// otherwise where they were, and if one is not there, everywhere.
pub fn look_for(identity: &Identity, given: &[PathBuf]) -> Result<Vec<PathBuf>, DataDirError> {
    let remembered = &identity.devices;
    if remembered.is_empty() && !given.is_empty() {
        return Err(DataDirError::DevicesNotUsed { asked: given.to_vec() });
    }
    if !given.is_empty() && given.len() != remembered.len() {
        return Err(DataDirError::DeviceCount { found: remembered.clone(), asked: given.to_vec() });
    }
    let candidates = if given.is_empty() { remembered } else { given };
    let mut paths = Vec::new();
    for (shard, was) in (0..).map(ShardIndex).zip(remembered) {
        // Where it was comes first, so that a healthy start looks at nothing else.
        let mut places: Vec<&PathBuf> = candidates.iter().collect();
        places.sort_by_key(|path| *path != was);
        let path = match places.into_iter().find(|path| carries(path, identity, shard)) {
            Some(path) => path.clone(),
            None if given.is_empty() => search(identity, shard, was)?,
            None => return Err(missing(identity, shard, was, given.to_vec())),
        };
        if path != *was {
            tracing::warn!(%shard, was = %was.display(), now = %path.display(), "a device has another path now");
        }
        paths.push(path);
    }
    Ok(paths)
}

fn carries(path: &Path, identity: &Identity, shard: ShardIndex) -> bool {
    device::peek_superblock(path).ok().flatten().is_some_and(|found| is_of(&found, identity, shard))
}

fn is_of(found: &Superblock, identity: &Identity, shard: ShardIndex) -> bool {
    (found.cluster, found.node, found.shard) == (identity.cluster, identity.node, shard)
}

/// Of two that carry the same superblock one is a copy, and nobody but the operator knows which.
fn search(identity: &Identity, shard: ShardIndex, was: &Path) -> Result<PathBuf, DataDirError> {
    let all = device::all().unwrap_or_default();
    let mut found: Vec<PathBuf> = all.into_iter().filter(|path| carries(path, identity, shard)).collect();
    match (found.pop(), found.pop()) {
        (Some(path), None) => Ok(path),
        (Some(one), Some(other)) => Err(DataDirError::DeviceCopies { shard, one, other }),
        (None, _) => Err(missing(identity, shard, was, Vec::new())),
    }
}

fn missing(identity: &Identity, shard: ShardIndex, was: &Path, looked_at: Vec<PathBuf>) -> DataDirError {
    let found = match device::peek_superblock(was) {
        Ok(Some(other)) => format!("there is shard {} of node {}", other.shard, other.node),
        Ok(None) => "what is there now has no superblock of a shard".to_string(),
        Err(error) => format!("it cannot be read: {error}"),
    };
    let looked_at = match looked_at.as_slice() {
        [] => "no block device of this machine has it".to_string(),
        paths => format!("none of those given has it ({})", list(paths)),
    };
    DataDirError::DeviceMissing { shard, node: identity.node, was: was.to_path_buf(), found, looked_at }
}

pub(super) fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}
