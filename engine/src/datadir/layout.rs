//! How much each shard takes: equal parts in whole segments.
//!
//! | `--size` at a later start                                    | is                                            |
//! |--------------------------------------------------------------|-----------------------------------------------|
//! | left out, or the same text as before                         | nothing changes (80% stays what it came to)   |
//! | other text, the same shards after rounding to whole segments | nothing changes                               |
//! | other text, larger (a percentage: of the disk as it is now)  | the shards grow (`growth`)                    |
//! | other text, smaller                                          | refused: shards do not shrink                 |

use super::{DataDir, DataDirError, Identity, io_error};
use crate::config::NodeSize;
use crate::disk::device::Device;
use torus_schema::limits;

/// The size of each shard, and the setting it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub shards: u16,
    pub shard_bytes: u64,
    /// See `Identity`.
    pub size: String,
}

impl DataDir {
    /// The sizes for a new format, checked against the space there is.
    pub fn plan_format(&self, size: Option<NodeSize>, shards: u16, devices: &[Device]) -> Result<Layout, DataDirError> {
        if !devices.is_empty() {
            return plan_on_devices(size, shards, devices);
        }
        let size = size.ok_or_else(|| DataDirError::SizeMissing { path: self.path.clone() })?;
        let disk = self.disk_space()?;
        let layout = layout_of(size.to_string(), wanted(size, disk.total_bytes), shards)?;
        self.check_space(disk, layout.shard_bytes * u64::from(shards))?;
        Ok(layout)
    }

    /// What the shards of a formatted node have to become, if that is more than they are. See the table above.
    pub fn plan_growth(
        &self,
        identity: &Identity,
        asked: Option<NodeSize>,
        devices: &[Device],
    ) -> Result<Option<Layout>, DataDirError> {
        let Some(asked) = asked.filter(|asked| asked.to_string() != identity.size) else { return Ok(None) };
        let shards = u64::from(identity.shards);
        let disk = self.disk_space()?;
        let total = if devices.is_empty() { disk.total_bytes } else { total_bytes(devices) };
        let wanted = wanted(asked, total);
        if whole_segments(wanted / shards) < identity.shard_bytes {
            let (found, size) = (identity.shard_bytes * shards, asked.to_string());
            return Err(DataDirError::Smaller { path: self.path.clone(), found, size, asked: wanted });
        }
        let layout = layout_of(asked.to_string(), wanted, identity.shards)?;
        if layout.shard_bytes == identity.shard_bytes {
            return Ok(None);
        }
        if devices.is_empty() {
            self.check_space(disk, (layout.shard_bytes - identity.shard_bytes) * shards)?;
        } else if devices.len() < usize::from(identity.shards) {
            let (found, expected) = (identity.shards, devices.len());
            return Err(DataDirError::SharedDevices { path: self.path.clone(), found, expected });
        }
        check_devices(&layout, devices)?;
        Ok(Some(layout))
    }

    fn disk_space(&self) -> Result<DiskSpace, DataDirError> {
        let disk = nix::sys::statvfs::statvfs(&self.path)
            .map_err(|errno| io_error(&self.path, "ask for the free space of", errno.into()))?;
        let unit = disk.fragment_size();
        Ok(DiskSpace { total_bytes: disk.blocks() * unit, free_bytes: disk.blocks_available() * unit })
    }

    fn check_space(&self, disk: DiskSpace, needed: u64) -> Result<(), DataDirError> {
        if disk.free_bytes < needed {
            return Err(DataDirError::DiskTooSmall { path: self.path.clone(), found: disk.free_bytes, needed });
        }
        Ok(())
    }
}

#[derive(Clone, Copy)]
struct DiskSpace {
    total_bytes: u64,
    free_bytes: u64,
}

fn wanted(size: NodeSize, total_bytes: u64) -> u64 {
    match size {
        NodeSize::Bytes(bytes) => bytes,
        NodeSize::Percent(percent) => total_bytes / 100 * u64::from(percent),
    }
}

fn total_bytes(devices: &[Device]) -> u64 {
    devices.iter().map(|device| device.bytes).sum()
}

/// Without a size: all that the smallest device has for each of its shards.
fn plan_on_devices(size: Option<NodeSize>, shards: u16, devices: &[Device]) -> Result<Layout, DataDirError> {
    if usize::from(shards) < devices.len() {
        return Err(DataDirError::FewShards { found: shards, expected: devices.len() });
    }
    let layout = match size {
        Some(size) => layout_of(size.to_string(), wanted(size, total_bytes(devices)), shards)?,
        None => {
            let smallest = devices.iter().map(|device| device.bytes).min().unwrap_or(0);
            let part = whole_segments(smallest / slots(shards, devices.len()));
            layout_of(String::new(), part * u64::from(shards), shards)?
        }
    };
    check_devices(&layout, devices)?;
    Ok(layout)
}

fn check_devices(layout: &Layout, devices: &[Device]) -> Result<(), DataDirError> {
    for (number, device) in devices.iter().enumerate() {
        let shards = (usize::from(layout.shards) - number).div_ceil(devices.len()) as u64;
        let needed = layout.shard_bytes * shards;
        if device.bytes < needed {
            let (path, found) = (device.path.clone(), device.bytes);
            return Err(DataDirError::DeviceTooSmall { path, found, needed, shards });
        }
    }
    Ok(())
}

/// Shards on one device, at most.
pub(super) fn slots(shards: u16, devices: usize) -> u64 {
    usize::from(shards).div_ceil(devices.max(1)) as u64
}

fn whole_segments(bytes: u64) -> u64 {
    bytes - bytes % limits::SEGMENT_BYTES
}

/// Each shard takes an equal part, in whole segments.
fn layout_of(size: String, wanted: u64, shards: u16) -> Result<Layout, DataDirError> {
    let shard_bytes = whole_segments(wanted / u64::from(shards));
    if shard_bytes < limits::SHARD_BYTES_MIN {
        let needed = limits::SHARD_BYTES_MIN * u64::from(shards);
        return Err(DataDirError::SizeTooSmall { size, found: wanted, needed, shards });
    }
    if shard_bytes > limits::SHARD_BYTES_MAX {
        let at_most = limits::SHARD_BYTES_MAX * u64::from(shards);
        return Err(DataDirError::SizeTooLarge { size, found: wanted, at_most, shards });
    }
    Ok(Layout { shards, shard_bytes, size })
}

#[cfg(test)]
mod tests {
    use super::super::tests::formatted;
    use super::*;

    #[test]
    fn a_size_that_no_shard_can_work_with_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::lock(temporary.path()).unwrap();
        assert!(matches!(dir.plan_format(None, 1, &[]), Err(DataDirError::SizeMissing { .. })));
        let small = Some(NodeSize::Bytes(limits::MIB));
        assert!(matches!(dir.plan_format(small, 1, &[]), Err(DataDirError::SizeTooSmall { .. })));
        let huge = Some(NodeSize::Bytes(15 * limits::TIB));
        assert!(matches!(dir.plan_format(huge, 1, &[]), Err(DataDirError::DiskTooSmall { .. })));
    }

    #[test]
    fn a_size_that_comes_to_the_same_shards_changes_nothing() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, identity) = formatted(temporary.path());
        let now = limits::SHARD_BYTES_MIN;
        for asked in [None, Some(NodeSize::Bytes(now)), Some(NodeSize::Bytes(now + limits::SEGMENT_BYTES - 1))] {
            assert_eq!(dir.plan_growth(&identity, asked, &[]), Ok(None), "{asked:?}");
        }
    }

    #[test]
    fn a_percentage_that_was_given_before_is_not_computed_anew() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, identity) = formatted(temporary.path());
        let identity = Identity { size: "1%".to_string(), ..identity };
        assert_eq!(dir.plan_growth(&identity, Some(NodeSize::Percent(1)), &[]), Ok(None));
    }

    #[test]
    fn a_larger_size_grows_and_a_smaller_is_refused_with_both() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, identity) = formatted(temporary.path());
        let larger = NodeSize::Bytes(limits::SHARD_BYTES_MIN + 3 * limits::SEGMENT_BYTES);
        let planned = dir.plan_growth(&identity, Some(larger), &[]).unwrap().unwrap();
        assert_eq!(planned.shard_bytes, limits::SHARD_BYTES_MIN + 3 * limits::SEGMENT_BYTES);
        let smaller = NodeSize::Bytes(limits::SHARD_BYTES_MIN - 1);
        let text = dir.plan_growth(&identity, Some(smaller), &[]).unwrap_err().to_string();
        assert!(text.contains("536870911") && text.contains("536870912"), "{text}");
        let huge = NodeSize::Bytes(15 * limits::TIB);
        assert!(matches!(dir.plan_growth(&identity, Some(huge), &[]), Err(DataDirError::DiskTooSmall { .. })));
    }
}
