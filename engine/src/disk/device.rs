//! A raw device as a node takes it: alone, and only after a look at what it holds.
//!
//! The device is opened with O_EXCL, which the kernel refuses while a file system on it is mounted or another program
//! holds it so; and for as long as we hold it, it refuses them. Everything here is done by ordinary reads and writes,
//! at a start, before a shard's executor opens the device for direct I/O.
//!
//! | found at a format                                   | done                                                 |
//! |-----------------------------------------------------|------------------------------------------------------|
//! | first and last MiB zero, no signature elsewhere     | taken                                                |
//! | superblocks of the very format that was cut off     | taken: that format is begun again                    |
//! | a signature we know, or any other byte that is not 0| refused, unless `--force`                            |
//! | mounted, or held by another program                 | refused, whatever is forced                          |

use crate::log::superblock::{SUPERBLOCK_BLOCKS, Superblock, decode_either};
use nix::errno::Errno;
use nix::sys::stat;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use thiserror::Error;
use torus_schema::ids::NodeId;
use torus_schema::limits::{BLOCK_BYTES, DEVICE_PROBE_BYTES};

mod request {
    nix::ioctl_read_bad!(logical_block_bytes, nix::request_code_none!(0x12, 104), nix::libc::c_int);
    nix::ioctl_write_ptr_bad!(discard, nix::request_code_none!(0x12, 119), [u64; 2]);
}

/// What begins with this magic at this offset; looked for to name what is found, and where the first and last MiB do
/// not reach.
const SIGNATURES: &[(u64, &[u8], &str)] = &[
    (0, b"TORUSSUP", "a Torus shard"),
    (0, b"XFSB", "an XFS file system"),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (0x1_0040, b"_BHRfS_M", "a Btrfs file system"),
    // The second copy of its superblock, which outlives a wipe of the start.
    (0x400_0040, b"_BHRfS_M", "a Btrfs file system whose start was wiped"),
    (0, b"LUKS\xba\xbe", "an encrypted (LUKS) volume"),
    (512, b"LABELONE", "an LVM physical volume"),
    (4096, b"\xfc\x4e\x2b\xa9", "a member of an md array"),
    (0, b"\xfc\x4e\x2b\xa9", "a member of an md array"),
    (4086, b"SWAPSPACE2", "swap space"),
    (3, b"NTFS    ", "an NTFS file system"),
    (0, b"bluestore block device", "a Ceph OSD"),
    (512, b"EFI PART", "a GPT partition table"),
    (4096, b"EFI PART", "a GPT partition table"),
    (510, b"\x55\xaa", "a partition table or a boot sector"),
];

#[derive(Debug, Error, PartialEq, Eq)]
pub enum DeviceError {
    #[error("cannot {operation} {path}: {because}")]
    Io { path: PathBuf, operation: &'static str, because: String },
    #[error("{path} is not a block device; --device takes a disk or partition such as /dev/nvme0n1")]
    NotADevice { path: PathBuf },
    #[error(
        "{path} is in use: it is mounted, or another program holds it (found EBUSY, expected to have it alone); unmount or stop that, no --force helps here"
    )]
    InUse { path: PathBuf },
    #[error("{path} has logical blocks of {found} bytes, at most {expected} can be written to")]
    LogicalBlock { path: PathBuf, found: u64, expected: u64 },
    #[error(
        "{path} holds {found}, expected an empty device; is it the right one? `--force` overwrites it, `blkdiscard` or `wipefs` empty it"
    )]
    Foreign { path: PathBuf, found: String },
}

/// Held exclusively for as long as it lives.
#[derive(Debug)]
pub struct Device {
    pub path: PathBuf,
    /// Major and minor: two paths may lead to one device.
    pub number: u64,
    pub bytes: u64,
    file: File,
}

impl Device {
    pub fn open(path: &Path) -> Result<Self, DeviceError> {
        let failed = |operation| move |error: io::Error| io_error(path, operation, error);
        let metadata = std::fs::metadata(path).map_err(failed("find"))?;
        if !metadata.file_type().is_block_device() {
            return Err(DeviceError::NotADevice { path: path.to_path_buf() });
        }
        let mut file = open_exclusively(path, OpenOptions::new().read(true).write(true))?;
        let found = logical_block_bytes(&file).map_err(failed("ask for the block size of"))?;
        if found > BLOCK_BYTES {
            return Err(DeviceError::LogicalBlock { path: path.to_path_buf(), found, expected: BLOCK_BYTES });
        }
        let bytes = file.seek(SeekFrom::End(0)).map_err(failed("find the size of"))?;
        Ok(Self { path: path.to_path_buf(), number: metadata.rdev(), bytes, file })
    }

    /// That of the area which begins at `offset`, if one can be read.
    pub fn superblock(&self, offset: u64) -> Result<Option<Superblock>, DeviceError> {
        superblock_of(&self.file, self.bytes, offset).map_err(|error| io_error(&self.path, "read", error))
    }

    /// Refuses a device that holds anything but zeros, or the superblock that the cut-off format of `draft` left.
    pub fn check_empty(&self, draft: Option<NodeId>) -> Result<(), DeviceError> {
        let failed = |error| io_error(&self.path, "read", error);
        let is_ours = match (draft, self.superblock(0)?) {
            (Some(draft), Some(found)) => found.node == draft,
            _ => false,
        };
        let named = self.signature().map_err(failed)?.filter(|_| !is_ours);
        let found = match named {
            Some(what) => Some(what.to_string()),
            None => self.first_foreign_byte(is_ours).map_err(failed)?,
        };
        let Some(found) = found else { return Ok(()) };
        let found = blkid(&self.path).map_or(found.clone(), |kind| format!("{found} (blkid says: {kind})"));
        Err(DeviceError::Foreign { path: self.path.clone(), found })
    }

    fn signature(&self) -> io::Result<Option<&'static str>> {
        for (offset, magic, what) in SIGNATURES {
            if offset + magic.len() as u64 <= self.bytes {
                let mut found = vec![0; magic.len()];
                self.file.read_exact_at(&mut found, *offset)?;
                if found == *magic {
                    return Ok(Some(what));
                }
            }
        }
        Ok(None)
    }

    /// In the first and the last MiB: backup partition tables and RAID superblocks stand at the end.
    fn first_foreign_byte(&self, is_ours: bool) -> io::Result<Option<String>> {
        let probe = DEVICE_PROBE_BYTES.min(self.bytes);
        for start in [0, self.bytes - probe] {
            let mut bytes = vec![0; probe as usize];
            self.file.read_exact_at(&mut bytes, start)?;
            if is_ours && start == 0 {
                bytes[..(SUPERBLOCK_BLOCKS * BLOCK_BYTES) as usize].fill(0);
            }
            if let Some(at) = bytes.iter().position(|byte| *byte != 0) {
                let (byte, at) = (bytes[at], start + at as u64);
                return Ok(Some(format!("data that is not known to us, the byte {byte:#04x} at offset {at}")));
            }
        }
        Ok(None)
    }

    /// So that nothing of an earlier use is taken for ours, nor we for an earlier use. Discarding is a hint that a
    /// device may refuse, and that promises no zeros.
    pub fn wipe(&self, starts: &[u64]) -> Result<(), DeviceError> {
        let range = [0, self.bytes];
        // SAFETY: the descriptor is ours, and the call reads two numbers.
        if let Err(errno) = unsafe { request::discard(self.file.as_raw_fd(), &range) } {
            tracing::info!(device = %self.path.display(), %errno, "not discarded; nothing is lost by that");
        }
        let probe = DEVICE_PROBE_BYTES.min(self.bytes);
        let wipe = || -> io::Result<()> {
            for start in [0, self.bytes - probe] {
                self.file.write_all_at(&vec![0; probe as usize], start)?;
            }
            for start in starts {
                self.file.write_all_at(&[0; (SUPERBLOCK_BLOCKS * BLOCK_BYTES) as usize], *start)?;
            }
            for (offset, magic, _) in SIGNATURES
                .iter()
                .filter(|(offset, magic, _)| *offset >= probe && offset + (magic.len() as u64) <= self.bytes)
            {
                self.file.write_all_at(&vec![0; magic.len()], *offset)?;
            }
            self.file.sync_all()
        };
        wipe().map_err(|error| io_error(&self.path, "empty", error))
    }
}

fn open_exclusively(path: &Path, options: &mut OpenOptions) -> Result<File, DeviceError> {
    let file = options.custom_flags(nix::libc::O_EXCL).open(path);
    file.map_err(|error| match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBUSY) => DeviceError::InUse { path: path.to_path_buf() },
        _ => io_error(path, "open", error),
    })
}

/// To read it, with nobody who writes.
pub fn peek_exclusively(path: &Path) -> Result<File, DeviceError> {
    open_exclusively(path, OpenOptions::new().read(true))
}

/// Without holding the device: for a look at those of which nobody said that they are ours.
pub fn peek_superblock(path: &Path) -> io::Result<Option<Superblock>> {
    peek_area(path, 0)
}

/// Of the area that begins at `offset`.
pub fn peek_area(path: &Path, offset: u64) -> io::Result<Option<Superblock>> {
    let mut file = File::open(path)?;
    let bytes = file.seek(SeekFrom::End(0))?;
    superblock_of(&file, bytes, offset)
}

/// Every block device of this machine, by the name the kernel gave it.
pub fn all() -> io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir("/sys/class/block")? {
        // A slash in a device's name is an exclamation mark there.
        let name = entry?.file_name().to_string_lossy().replace('!', "/");
        paths.push(Path::new("/dev").join(name));
    }
    paths.sort();
    Ok(paths)
}

fn superblock_of(file: &File, bytes: u64, offset: u64) -> io::Result<Option<Superblock>> {
    let length = SUPERBLOCK_BLOCKS * BLOCK_BYTES;
    if offset + length > bytes {
        return Ok(None);
    }
    let mut found = vec![0; length as usize];
    file.read_exact_at(&mut found, offset)?;
    Ok(decode_either(&found).ok())
}

fn logical_block_bytes(file: &File) -> io::Result<u64> {
    let mut found = 0;
    // SAFETY: the descriptor is ours, and the call writes one number.
    unsafe { request::logical_block_bytes(file.as_raw_fd(), &mut found) }?;
    Ok(u64::try_from(found).unwrap_or(u64::MAX))
}

/// What the machine's own tool calls it; many machines do not have it.
fn blkid(path: &Path) -> Option<String> {
    let mut command = Command::new("blkid");
    command.args(["-p", "-o", "export"]).arg(path).stdin(Stdio::null()).stderr(Stdio::null());
    let said = String::from_utf8(command.output().ok()?.stdout).ok()?;
    let kind = |line: &&str| line.starts_with("TYPE=") || line.starts_with("PTTYPE=");
    said.lines().find(kind).and_then(|line| line.split_once('=')).map(|(_, kind)| kind.to_string())
}

fn io_error(path: &Path, operation: &'static str, error: io::Error) -> DeviceError {
    DeviceError::Io { path: path.to_path_buf(), operation, because: error.to_string() }
}

/// As people know it: `8:16`.
pub fn number_text(number: u64) -> String {
    format!("{}:{}", stat::major(number), stat::minor(number))
}
