//! What a successor of this process has to know of a device to serve it on: `/run/torus/nbdN.json`. It is gone with the
//! machine's memory, as is the device.
//!
//! The epoch decides whether anything may be lost: see `attach`. Before a device is served on, the new epoch is written:
//! what stands here is never older than what the kernel was answered in. For a new device its number has to be known first;
//! what an earlier one of that number left is of an epoch too low to be taken for this one's.

use super::{KernelError, io};
use serde::{Deserialize, Serialize};
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use torus_schema::ids::{Epoch, VolumeId};

const FOLDER: &str = "/run/torus";

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memo {
    pub volume: VolumeId,
    pub name: String,
    /// In which the device was last served.
    pub epoch: Epoch,
    /// Who serves it.
    pub pid: u32,
}

/// Readable by root alone: the server's socket lies here, too.
pub fn folder() -> Result<PathBuf, KernelError> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(FOLDER);
    made.map_err(io(FOLDER))?;
    Ok(PathBuf::from(FOLDER))
}

fn path(folder: &Path, index: u32) -> PathBuf {
    folder.join(format!("nbd{index}.json"))
}

impl Memo {
    pub fn read(index: u32) -> Option<Self> {
        Self::read_in(Path::new(FOLDER), index)
    }

    /// What cannot be read is as good as not there: the device is then failed instead of served on.
    fn read_in(folder: &Path, index: u32) -> Option<Self> {
        serde_json::from_slice(&fs::read(path(folder, index)).ok()?).ok()
    }

    pub fn write(&self, index: u32) -> Result<(), KernelError> {
        self.write_in(&folder()?, index)
    }

    fn write_in(&self, folder: &Path, index: u32) -> Result<(), KernelError> {
        let (path, beside) = (path(folder, index), folder.join(format!("nbd{index}.new")));
        let text = serde_json::to_vec(self).map_err(std::io::Error::from).map_err(io("a note of the device"))?;
        let written = fs::write(&beside, text).and_then(|()| fs::rename(&beside, &path));
        written.map_err(io(path.display().to_string()))
    }

    /// Whether the process that wrote it is still there; another may have its number by now, which it is not then.
    pub fn is_served(&self) -> bool {
        let name = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        let first = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Path::new(&*String::from_utf8_lossy(first)).file_name().is_some_and(|name| name == "torusblk")
    }
}

pub fn remove(index: u32) {
    if let Err(error) = fs::remove_file(path(Path::new(FOLDER), index)) {
        tracing::debug!(index, %error, "no note of the device to remove");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_read_as_it_was_written_and_damage_is_none_at_all() {
        let folder = tempfile::tempdir().unwrap();
        let volume = VolumeId(uuid::Uuid::from_u128(7));
        let memo = Memo { volume, name: "db-1".into(), epoch: Epoch(3), pid: 1 };
        memo.write_in(folder.path(), 2).unwrap();
        assert_eq!(Memo::read_in(folder.path(), 2), Some(memo));
        assert_eq!(Memo::read_in(folder.path(), 1), None);
        fs::write(path(folder.path(), 2), "{").unwrap();
        assert_eq!(Memo::read_in(folder.path(), 2), None);
    }

    #[test]
    fn a_process_that_is_no_torusblk_serves_nothing() {
        let volume = VolumeId(uuid::Uuid::from_u128(7));
        let memo = Memo { volume, name: "x".into(), epoch: Epoch(1), pid: std::process::id() };
        assert!(!memo.is_served());
    }
}
