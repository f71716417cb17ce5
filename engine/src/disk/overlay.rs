//! A block area that is only looked at: reads by `pread`, and writes kept in memory, so that the very code of a start
//! can run over it and tell what it would do. The file is opened without the right to write.

use super::area::BlockArea;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use torus_rpc::runtime::{Disk, DiskError};
use torus_schema::limits::BLOCK_BYTES;

const BLOCK: usize = BLOCK_BYTES as usize;

pub struct OverlayDisk {
    file: File,
    area: BlockArea,
    /// By block of the area.
    written: RefCell<BTreeMap<u64, Vec<u8>>>,
}

impl OverlayDisk {
    pub fn new(file: File, area: BlockArea) -> Self {
        Self { file, area, written: RefCell::default() }
    }

    pub fn area(&self) -> &BlockArea {
        &self.area
    }

    /// By those who believe that they write to the disk.
    pub fn was_written(&self, block: u64) -> bool {
        self.written.borrow().contains_key(&block)
    }

    fn read_now(&self, offset: u64, bytes: usize) -> io::Result<Vec<u8>> {
        let mut out = vec![0; bytes];
        self.file.read_exact_at(&mut out, self.area.offset_bytes + offset)?;
        let first = offset / BLOCK_BYTES;
        let written = self.written.borrow();
        for (block, content) in written.range(first..first + (bytes / BLOCK) as u64) {
            let at = (block - first) as usize * BLOCK;
            out[at..at + BLOCK].copy_from_slice(content);
        }
        Ok(out)
    }
}

impl Disk for OverlayDisk {
    type Buffer = Vec<u8>;
    type Bytes = bytes::Bytes;

    fn size_bytes(&self) -> u64 {
        self.area.bytes
    }

    fn allocate(&self, bytes: usize) -> Vec<u8> {
        vec![0; bytes]
    }

    async fn read(&self, offset: u64, bytes: usize) -> Result<bytes::Bytes, DiskError> {
        assert!(offset + bytes as u64 <= self.area.bytes);
        let read = self.read_now(offset, bytes);
        read.map(bytes::Bytes::from).map_err(|error| DiskError {
            place: self.area.path.display().to_string(),
            operation: "read",
            offset: self.area.offset_bytes + offset,
            bytes,
            because: error.to_string(),
        })
    }

    async fn write(&self, offset: u64, buffer: Vec<u8>) -> Result<(), DiskError> {
        assert!(offset.is_multiple_of(BLOCK_BYTES) && buffer.len().is_multiple_of(BLOCK));
        let mut written = self.written.borrow_mut();
        (offset / BLOCK_BYTES..).zip(buffer.chunks(BLOCK)).for_each(|(block, content)| {
            written.insert(block, content.to_vec());
        });
        Ok(())
    }

    async fn write_durable(&self, offset: u64, buffer: Vec<u8>) -> Result<(), DiskError> {
        self.write(offset, buffer).await
    }

    async fn sync(&self) -> Result<(), DiskError> {
        Ok(())
    }

    async fn discard(&self, _offset: u64, _bytes: u64) -> Result<(), DiskError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::area::AreaKind;
    use futures::executor::block_on;

    #[test]
    fn what_is_written_is_read_again_and_the_file_stays_as_it_was() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; 4 * BLOCK]).unwrap();
        let area = BlockArea {
            path: file.path().to_path_buf(),
            kind: AreaKind::File,
            offset_bytes: BLOCK_BYTES,
            bytes: 3 * BLOCK_BYTES,
        };
        let disk = OverlayDisk::new(File::open(file.path()).unwrap(), area);
        block_on(disk.write(BLOCK_BYTES, vec![9; BLOCK])).unwrap();
        let read = block_on(disk.read(0, 3 * BLOCK)).unwrap();
        assert_eq!(read, [vec![7; BLOCK], vec![9; BLOCK], vec![7; BLOCK]].concat());
        assert_eq!(std::fs::read(file.path()).unwrap(), vec![7; 4 * BLOCK]);
    }
}
