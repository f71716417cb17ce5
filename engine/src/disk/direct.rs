//! A shard's block area on a real disk: a preallocated file or a device, by O_DIRECT, on glommio.
//!
//! Trap in glommio 0.9: the first file an executor opens on a device decides, by reading its first sector through a
//! polled ring, whether that executor believes in polled I/O. A read of a hole or of a preallocated, never written
//! extent needs no device and so succeeds on devices that cannot poll; every later read then fails with EOPNOTSUPP.
//! So whatever is opened here has its first block really written before glommio sees it.
//!
//! A file that is only preallocated has unwritten extents: the first write to each costs the file system a journal
//! commit at the next sync. `create` preallocates; a device has no such cost.

use super::area::{AreaKind, BlockArea};
use crate::log::superblock::{self, SUPERBLOCK_BLOCKS};
use glommio::io::{DmaBuffer, DmaFile, OpenOptions, ReadResult};
use std::fs;
use std::io::{self, Read};
use std::ops::{Deref, DerefMut};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use thiserror::Error;
use torus_rpc::runtime::{Disk, DiskError};
use torus_schema::limits::BLOCK_BYTES;

#[derive(Debug, Error)]
pub enum DirectError {
    #[error("{operation} of {path} failed: {because}")]
    Io { operation: &'static str, path: PathBuf, because: String },
    #[error(
        "{path} has {found} bytes, expected {expected} (by its superblock or torus.json); it was truncated or replaced: restore it, or format a new data dir and let the cluster fill it"
    )]
    Size { path: PathBuf, found: u64, expected: u64 },
    #[error("device {path} has {found} bytes, expected at least {expected}; is it another device or partition now?")]
    DeviceSize { path: PathBuf, found: u64, expected: u64 },
    #[error("{path}: a size of {found} bytes is not a positive multiple of {expected}")]
    Unaligned { path: PathBuf, found: u64, expected: u64 },
}

pub struct DirectDisk {
    file: DmaFile,
    /// The same, opened with O_DSYNC: open(2). Not on btrfs: its direct writes by io_uring forgot O_DSYNC in Linux 5.16
    /// to 6.0 (mended by 8184620ae212).
    durable: Option<DmaFile>,
    path: PathBuf,
    /// Where the area begins in it.
    start_bytes: u64,
    size_bytes: u64,
}

impl DirectDisk {
    /// A new file, all of its space taken from the file system. It must not exist.
    pub async fn create(path: impl AsRef<Path>, size_bytes: u64) -> Result<Self, DirectError> {
        let path = path.as_ref();
        if size_bytes == 0 || !size_bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(DirectError::Unaligned { path: path.to_path_buf(), found: size_bytes, expected: BLOCK_BYTES });
        }
        let wrap = |operation| move |because| io_error(operation, path, because);
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(path).map_err(wrap("create"))?;
        nix::fcntl::posix_fallocate(&file, 0, size_bytes as i64)
            .map_err(|errno| io_error("preallocation", path, errno.into()))?;
        write_first_block(&file).map_err(wrap("write"))?;
        drop(file);
        Self::open_direct(path, 0, size_bytes).await
    }

    /// The disk of a shard whose area is known: a file has to be as long, a device at least.
    pub async fn open_area(area: &BlockArea) -> Result<Self, DirectError> {
        let path = &area.path;
        if area.kind == AreaKind::File {
            return Self::open_file(path, Some(area.bytes)).await;
        }
        let wrap = |operation| move |because| io_error(operation, path, because);
        let file = fs::OpenOptions::new().read(true).write(true).open(path).map_err(wrap("open"))?;
        let (found, expected) = (length(&file).map_err(wrap("seek"))?, area.offset_bytes + area.bytes);
        if found < expected {
            return Err(DirectError::DeviceSize { path: path.clone(), found, expected });
        }
        if !area.offset_bytes.is_multiple_of(BLOCK_BYTES) || !area.bytes.is_multiple_of(BLOCK_BYTES) {
            return Err(DirectError::Unaligned { path: path.clone(), found: area.bytes, expected: BLOCK_BYTES });
        }
        drop(file);
        Self::open_direct(path, area.offset_bytes, area.bytes).await
    }

    /// Refuses a file whose length is not what its superblock says. One without a superblock is opened: whether it
    /// may be formatted is for the caller to say.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, DirectError> {
        Self::open_file(path.as_ref(), None).await
    }

    /// `expected`: what it has to be long, where that is known better than from the superblock.
    async fn open_file(path: &Path, expected: Option<u64>) -> Result<Self, DirectError> {
        let wrap = |operation| move |because| io_error(operation, path, because);
        let mut file = fs::OpenOptions::new().read(true).write(true).open(path).map_err(wrap("open"))?;
        let found = length(&file).map_err(wrap("seek"))?;
        let mut start = Vec::new();
        Read::by_ref(&mut file)
            .take(SUPERBLOCK_BLOCKS * BLOCK_BYTES)
            .read_to_end(&mut start)
            .map_err(wrap("read of the superblock"))?;
        let by_superblock = || superblock::decode_either(&start).ok().map(|superblock| superblock.size_bytes);
        if let Some(expected) = expected.or_else(by_superblock).filter(|expected| *expected != found) {
            return Err(DirectError::Size { path: path.to_path_buf(), found, expected });
        }
        if found == 0 || !found.is_multiple_of(BLOCK_BYTES) {
            return Err(DirectError::Unaligned { path: path.to_path_buf(), found, expected: BLOCK_BYTES });
        }
        // Zeros may be a block that was never written: rewriting them costs nothing, and asking the file system
        // (SEEK_DATA) depends on what its cache holds.
        if start.iter().take(BLOCK_BYTES as usize).all(|byte| *byte == 0) {
            write_first_block(&file).map_err(wrap("write"))?;
        }
        drop(file);
        Self::open_direct(path, 0, found).await
    }

    async fn open_direct(path: &Path, start_bytes: u64, size_bytes: u64) -> Result<Self, DirectError> {
        let open = async |flags| {
            let opened = OpenOptions::new().read(true).write(true).custom_flags(flags).dma_open(path).await;
            opened.map_err(|error| {
                let because = error.to_string();
                DirectError::Io { operation: "open for direct I/O", path: path.to_path_buf(), because }
            })
        };
        let file = open(0).await?;
        let durable = match is_on_btrfs(path)? {
            true => None,
            false => Some(open(nix::libc::O_DSYNC).await?),
        };
        Ok(Self { file, durable, path: path.to_path_buf(), start_bytes, size_bytes })
    }

    /// glommio closes a dropped file too, but says so in the log.
    pub async fn close(self) -> Result<(), DirectError> {
        let path = self.path.clone();
        let wrap =
            |error: glommio::GlommioError<()>| DirectError::Io { operation: "close", path, because: error.to_string() };
        let closed = self.file.close().await;
        match self.durable {
            Some(durable) => closed.and(durable.close().await).map_err(wrap),
            None => closed.map_err(wrap),
        }
    }

    /// Our callers' promise: behind the area's end another shard's may begin.
    fn check_inside(&self, offset: u64, bytes: usize) {
        let end = offset.checked_add(bytes as u64);
        assert!(end.is_some_and(|end| end <= self.size_bytes), "{bytes} bytes at {offset} of {}", self.size_bytes);
    }

    async fn write_to(&self, file: &DmaFile, offset: u64, buffer: DirectBuffer) -> Result<(), DiskError> {
        let bytes = buffer.len();
        self.check_inside(offset, bytes);
        let wrap = |error: glommio::GlommioError<()>| self.error("write", offset, bytes, error);
        let written = file.write_at(buffer.0, self.start_bytes + offset).await.map_err(wrap)?;
        if written != bytes {
            return Err(self.error("write", offset, bytes, format!("only {written} bytes went")));
        }
        Ok(())
    }

    fn error(&self, operation: &'static str, offset: u64, bytes: usize, because: impl ToString) -> DiskError {
        let (place, offset) = (self.path.display().to_string(), self.start_bytes + offset);
        DiskError { place, operation, offset, bytes, because: because.to_string() }
    }
}

fn io_error(operation: &'static str, path: &Path, because: io::Error) -> DirectError {
    DirectError::Io { operation, path: path.to_path_buf(), because: because.to_string() }
}

fn is_on_btrfs(path: &Path) -> Result<bool, DirectError> {
    use nix::sys::statfs::{BTRFS_SUPER_MAGIC, statfs};
    let found = statfs(path).map_err(|errno| io_error("statfs", path, errno.into()))?;
    Ok(found.filesystem_type() == BTRFS_SUPER_MAGIC)
}

/// By seeking, so that it holds for devices too.
fn length(mut file: &fs::File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    let length = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    Ok(length)
}

/// It reads as zeros before and after.
fn write_first_block(file: &fs::File) -> io::Result<()> {
    file.write_all_at(&[0; BLOCK_BYTES as usize], 0)?;
    file.sync_data()
}

/// glommio's aligned buffer.
pub struct DirectBuffer(DmaBuffer);

impl Deref for DirectBuffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl DerefMut for DirectBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.0.as_bytes_mut()
    }
}

impl Disk for DirectDisk {
    type Buffer = DirectBuffer;
    type Bytes = ReadResult;

    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn allocate(&self, bytes: usize) -> DirectBuffer {
        DirectBuffer(self.file.alloc_dma_buffer(bytes))
    }

    async fn read(&self, offset: u64, bytes: usize) -> Result<ReadResult, DiskError> {
        let wrap = |error: glommio::GlommioError<()>| self.error("read", offset, bytes, error);
        self.check_inside(offset, bytes);
        let result = self.file.read_at_aligned(self.start_bytes + offset, bytes).await.map_err(wrap)?;
        if result.len() != bytes {
            return Err(self.error("read", offset, bytes, format!("only {} bytes came", result.len())));
        }
        Ok(result)
    }

    async fn write(&self, offset: u64, buffer: DirectBuffer) -> Result<(), DiskError> {
        self.write_to(&self.file, offset, buffer).await
    }

    async fn write_durable(&self, offset: u64, buffer: DirectBuffer) -> Result<(), DiskError> {
        match &self.durable {
            Some(durable) => self.write_to(durable, offset, buffer).await,
            None => {
                self.write(offset, buffer).await?;
                self.sync().await
            }
        }
    }

    async fn sync(&self) -> Result<(), DiskError> {
        self.file.fdatasync().await.map_err(|error| self.error("fdatasync", 0, 0, error))
    }

    /// No holes are punched: the space stays ours, and a hole would cost its extent anew.
    async fn discard(&self, _offset: u64, _bytes: u64) -> Result<(), DiskError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use glommio::{LocalExecutorBuilder, Placement};

    /// In the target directory: /tmp may be in memory, where direct I/O is not what is tested.
    fn directory() -> tempfile::TempDir {
        let target = std::env::current_exe().unwrap();
        tempfile::tempdir_in(target.parent().unwrap()).unwrap()
    }

    fn run<F: Future<Output = ()> + 'static>(test: impl FnOnce(PathBuf) -> F + Send + 'static) {
        let directory = directory();
        let path = directory.path().join("shard-0.blocks");
        let executor = LocalExecutorBuilder::new(Placement::Unbound).io_memory(1 << 20);
        executor.spawn(move || test(path)).unwrap().join().unwrap();
    }

    #[test]
    fn a_file_that_was_only_preallocated_can_be_read_by_the_executor_that_made_it() {
        run(|path| async move {
            let disk = DirectDisk::create(&path, 1 << 20).await.unwrap();
            let mut buffer = disk.allocate(8192);
            buffer.fill(7);
            disk.write(65536, buffer).await.unwrap();
            disk.sync().await.unwrap();
            let mut buffer = disk.allocate(4096);
            buffer.fill(8);
            disk.write_durable(131_072, buffer).await.unwrap();
            assert!(disk.read(131_072, 4096).await.unwrap().iter().all(|byte| *byte == 8));
            assert!(disk.read(65536, 8192).await.unwrap().iter().all(|byte| *byte == 7));
            assert!(disk.read(0, 4096).await.unwrap().iter().all(|byte| *byte == 0));
            disk.close().await.unwrap();
        });
    }

    #[test]
    fn what_is_written_durable_goes_by_a_descriptor_with_o_dsync() {
        run(|path| async move {
            let disk = DirectDisk::create(&path, 1 << 20).await.unwrap();
            let has_dsync = |file: &DmaFile| {
                // SAFETY: the file owns the descriptor for longer than this borrow of it.
                let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(file)) };
                let flags = nix::fcntl::fcntl(borrowed, nix::fcntl::FcntlArg::F_GETFL).unwrap();
                flags & nix::libc::O_DSYNC != 0
            };
            assert!(!has_dsync(&disk.file));
            match &disk.durable {
                Some(durable) => assert!(has_dsync(durable)),
                None => assert!(is_on_btrfs(&path).unwrap()),
            }
            disk.close().await.unwrap();
        });
    }

    #[test]
    fn a_foreign_preallocated_file_opened_first_does_not_spoil_later_reads() {
        run(|path| async move {
            let file = fs::File::create_new(&path).unwrap();
            nix::fcntl::posix_fallocate(&file, 0, 1 << 20).unwrap();
            let disk = DirectDisk::open(&path).await.unwrap();
            let mut buffer = disk.allocate(4096);
            buffer.fill(9);
            disk.write(8192, buffer).await.unwrap();
            assert_eq!(disk.read(8192, 4096).await.unwrap()[0], 9);
            assert_eq!(disk.size_bytes(), 1 << 20);
            disk.close().await.unwrap();
        });
    }

    #[test]
    fn create_takes_all_of_its_space_and_never_overwrites() {
        run(|path| async move {
            DirectDisk::create(&path, 1 << 20).await.unwrap().close().await.unwrap();
            use std::os::unix::fs::MetadataExt;
            assert!(fs::metadata(&path).unwrap().blocks() * 512 >= 1 << 20);
            assert!(matches!(
                DirectDisk::create(&path, 1 << 20).await,
                Err(DirectError::Io { operation: "create", .. })
            ));
        });
    }

    #[test]
    fn a_file_shorter_than_its_superblock_says_is_refused_with_path_and_both_sizes() {
        run(|path| async move {
            let disk = DirectDisk::create(&path, 1 << 20).await.unwrap();
            let mut buffer = disk.allocate(4096);
            buffer.copy_from_slice(&superblock::example(1 << 20).encode());
            disk.write(0, buffer).await.unwrap();
            disk.close().await.unwrap();
            fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 19).unwrap();
            let text = DirectDisk::open(&path).await.err().unwrap().to_string();
            assert!(text.contains("shard-0.blocks") && text.contains("524288") && text.contains("1048576"), "{text}");
        });
    }

    #[test]
    fn reads_that_wait_for_others_are_all_answered_also_beside_some_that_nobody_wants_any_more() {
        run(|path| async move {
            const BLOCKS: u64 = 256;
            let disk = DirectDisk::create(&path, BLOCKS * 4096).await.unwrap();
            let mut buffer = disk.allocate(BLOCKS as usize * 4096);
            for (block, bytes) in (0_u64..).zip(buffer.chunks_mut(4096)) {
                bytes.fill(block as u8);
            }
            disk.write(0, buffer).await.unwrap();
            for round in 0..50_u64 {
                let reads = (0..64).map(|number| {
                    let block = (round * 64 + number * 37) % BLOCKS;
                    let read = disk.read(block * 4096, 4096);
                    async move { read.await.unwrap().iter().all(|byte| *byte == block as u8) }
                });
                let (given_up, wanted): (Vec<_>, Vec<_>) =
                    reads.map(Box::pin).enumerate().partition(|(number, _)| round % 2 == 1 && number % 3 == 0);
                // Asked for, and queued before the others; dropped with these under way.
                let mut given_up: futures::stream::FuturesUnordered<_> =
                    given_up.into_iter().map(|(_, read)| read).collect();
                assert!(futures::poll!(futures::StreamExt::next(&mut given_up)).is_pending() || round % 2 == 0);
                let wanted = futures::future::join_all(wanted.into_iter().map(|(_, read)| read));
                let mut wanted = std::pin::pin!(wanted);
                assert!(futures::poll!(&mut wanted).is_pending());
                // Before they are with the kernel, or when some are and others wait.
                if round % 4 == 3 {
                    disk.read(0, 4096).await.unwrap();
                }
                drop(given_up);
                assert!(wanted.await.into_iter().all(|is_good| is_good), "round {round}");
            }
            disk.close().await.unwrap();
        });
    }
}
