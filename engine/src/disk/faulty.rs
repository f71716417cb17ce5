//! A disk that fails when a file says so: for tests with real processes, on machines without device-mapper. Without such
//! a file (`torus-engine --fault-file`, hidden) every operation goes straight through.
//!
//! The file holds words: `open`, `read`, `write`, `sync`. As long as it names an operation, that operation fails before
//! anything reached the disk; a disk that has vanished is all four. No file, or an empty one: all is well.

use std::path::{Path, PathBuf};
use torus_rpc::runtime::{Disk, DiskError};

#[derive(Clone, Debug, Default)]
pub struct FaultFile(Option<PathBuf>);

impl FaultFile {
    pub fn new(path: Option<&Path>) -> Self {
        Self(path.map(Path::to_path_buf))
    }

    /// What is wrong with the operation, if anything.
    pub fn check(&self, operation: &str) -> Result<(), String> {
        let Some(path) = &self.0 else { return Ok(()) };
        // A file that is not there says nothing.
        let text = std::fs::read_to_string(path).unwrap_or_default();
        match text.split_whitespace().any(|word| word == operation) {
            true => Err(format!("{} says that it fails", path.display())),
            false => Ok(()),
        }
    }
}

pub struct FaultyDisk<D> {
    disk: D,
    faults: FaultFile,
}

impl<D: Disk> FaultyDisk<D> {
    pub fn new(disk: D, faults: FaultFile) -> Self {
        Self { disk, faults }
    }

    pub fn into_inner(self) -> D {
        self.disk
    }

    fn check(&self, operation: &'static str, offset: u64, bytes: usize) -> Result<(), DiskError> {
        let place = "the disk under --fault-file";
        let failed = |because| DiskError { place: place.to_string(), operation, offset, bytes, because };
        self.faults.check(operation).map_err(failed)
    }
}

impl<D: Disk> Disk for FaultyDisk<D> {
    type Buffer = D::Buffer;
    type Bytes = D::Bytes;

    fn size_bytes(&self) -> u64 {
        self.disk.size_bytes()
    }

    fn allocate(&self, bytes: usize) -> D::Buffer {
        self.disk.allocate(bytes)
    }

    async fn read(&self, offset: u64, bytes: usize) -> Result<D::Bytes, DiskError> {
        self.check("read", offset, bytes)?;
        self.disk.read(offset, bytes).await
    }

    async fn write(&self, offset: u64, buffer: D::Buffer) -> Result<(), DiskError> {
        self.check("write", offset, buffer.len())?;
        self.disk.write(offset, buffer).await
    }

    async fn write_durable(&self, offset: u64, buffer: D::Buffer) -> Result<(), DiskError> {
        self.check("write", offset, buffer.len())?;
        self.check("sync", offset, buffer.len())?;
        self.disk.write_durable(offset, buffer).await
    }

    async fn sync(&self) -> Result<(), DiskError> {
        self.check("sync", 0, 0)?;
        self.disk.sync().await
    }

    async fn discard(&self, offset: u64, bytes: u64) -> Result<(), DiskError> {
        self.disk.discard(offset, bytes).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_file_names_fails_and_only_while_it_does() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("faults");
        let faults = FaultFile::new(Some(&path));
        assert!(faults.check("sync").is_ok());
        std::fs::write(&path, "sync open\n").unwrap();
        assert!(faults.check("sync").unwrap_err().contains("faults"));
        assert!(faults.check("open").is_err() && faults.check("read").is_ok());
        std::fs::remove_file(&path).unwrap();
        assert!(faults.check("sync").is_ok());
        assert!(FaultFile::default().check("sync").is_ok());
    }
}
