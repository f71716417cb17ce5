//! Where a shard's blocks lie: a file of its own, or a part of a device.

use std::path::PathBuf;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AreaKind {
    /// In the data dir; as long as the area, and made by its format.
    File,
    /// Longer than the area or as long, and there before us.
    Device,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockArea {
    pub path: PathBuf,
    pub kind: AreaKind,
    /// Where it begins in what is at `path`; 0 in a file.
    pub offset_bytes: u64,
    pub bytes: u64,
}
