//! A node's own directory: who it is, and which files are its disk.
//!
//! | name             | what it is                                                                       |
//! |------------------|----------------------------------------------------------------------------------|
//! | `lock`           | locked (flock) by the process that uses the directory; holds its pid             |
//! | `formatting`     | present from the first moment of a format until after `torus.json` is durable    |
//! | `shard-N.blocks` | the block file of shard N, of exactly `shard_bytes`                              |
//! | `torus.json`     | [`Identity`], written last: with it the directory is formatted, without it not   |
//! | `lease.json`     | the lease of the last heartbeat (`node::membership`)                             |
//! | `metadata/`      | the store of `--metadata embedded`                                               |
//!
//! | found at a start                     | done                                                                |
//! |--------------------------------------|---------------------------------------------------------------------|
//! | nothing but `lock`, `metadata/`, `lost+found` | formatted                                                  |
//! | `formatting`, no `torus.json`        | a format was cut off: nobody ever wrote to these block files, so they are removed and the format starts over |
//! | `torus.json` (and `formatting`)      | checked against what is asked for; a leftover `formatting` is removed |
//! | anything else                        | refused: it is somebody's data                                      |

use crate::config::NodeSize;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;
use torus_schema::ids::{ClusterId, NodeId, ShardIndex};
use torus_schema::limits;
use torus_schema::records::decimal;

/// Layout of the directory and of `torus.json`.
const FORMAT_VERSION: u32 = 1;
const LOCK: &str = "lock";
const FORMATTING: &str = "formatting";
const IDENTITY: &str = "torus.json";
const LEASE: &str = "lease.json";
const METADATA: &str = "metadata";

/// What was fixed when the directory was formatted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub format_version: u32,
    pub cluster: ClusterId,
    pub node: NodeId,
    pub shards: u16,
    #[serde(with = "decimal")]
    pub shard_bytes: u64,
    /// `--size` as it was given: a share of the disk is compared as such.
    pub size: String,
}

/// Only this much is read of a file that may be of another version.
#[derive(Deserialize)]
struct AnyVersion {
    format_version: u32,
}

/// Locked for as long as it lives.
pub struct DataDir {
    path: PathBuf,
    _lock: Flock<File>,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    Empty,
    InterruptedFormat,
    Formatted(Identity),
}

/// The size of each shard, and the setting it came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    pub shards: u16,
    pub shard_bytes: u64,
    pub size: NodeSize,
}

impl DataDir {
    /// Makes the directory if needed and locks it.
    pub fn lock(path: &Path) -> Result<Self, DataDirError> {
        fs::create_dir_all(path).map_err(|error| io_error(path, "create the directory", error))?;
        let path = path.canonicalize().map_err(|error| io_error(path, "find the directory", error))?;
        let lock_path = path.join(LOCK);
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&lock_path);
        let file = file.map_err(|error| io_error(&lock_path, "open", error))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut lock) => {
                write_pid(&mut lock).map_err(|error| io_error(&lock_path, "write the pid to", error))?;
                Ok(Self { path, _lock: lock })
            }
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let mut pid = String::new();
                file.read_to_string(&mut pid).map_err(|error| io_error(&lock_path, "read", error))?;
                Err(DataDirError::Locked { path, pid: pid.trim().to_string() })
            }
            Err((_, errno)) => Err(io_error(&lock_path, "lock", errno.into())),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn block_file(&self, shard: ShardIndex) -> PathBuf {
        self.path.join(format!("shard-{shard}.blocks"))
    }

    pub fn metadata_dir(&self) -> PathBuf {
        self.path.join(METADATA)
    }

    /// Looks, and changes nothing.
    pub fn inspect(&self) -> Result<Found, DataDirError> {
        let identity_path = self.path.join(IDENTITY);
        match fs::read(&identity_path) {
            Ok(bytes) => return parse_identity(&identity_path, &bytes).map(Found::Formatted),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io_error(&identity_path, "read", error)),
        }
        let names = self.names()?;
        let interrupted = names.iter().any(|name| name == FORMATTING);
        let ours = |name: &str| {
            // A mount point of its own has `lost+found`; the marker's temporary file is what a crash leaves first.
            matches!(name, LOCK | METADATA | "lost+found" | "formatting.new")
                || interrupted && (name == FORMATTING || is_left_by_a_format(name))
        };
        match names.iter().find(|name| !ours(name)) {
            Some(name) => Err(DataDirError::UnknownContent { path: self.path.clone(), found: name.clone() }),
            None if interrupted => Ok(Found::InterruptedFormat),
            None => Ok(Found::Empty),
        }
    }

    fn names(&self) -> Result<Vec<String>, DataDirError> {
        let read = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in fs::read_dir(&self.path)? {
                names.push(entry?.file_name().to_string_lossy().into_owned());
            }
            names.sort();
            Ok(names)
        };
        read().map_err(|error| io_error(&self.path, "list", error))
    }

    /// The sizes for a new format, checked against the disk's free space.
    pub fn plan_format(&self, size: Option<NodeSize>, shards: u16) -> Result<Layout, DataDirError> {
        let size = size.ok_or_else(|| DataDirError::SizeMissing { path: self.path.clone() })?;
        let disk = nix::sys::statvfs::statvfs(&self.path)
            .map_err(|errno| io_error(&self.path, "ask for the free space of", errno.into()))?;
        let unit = disk.fragment_size();
        let wanted = match size {
            NodeSize::Bytes(bytes) => bytes,
            NodeSize::Percent(percent) => disk.blocks() * unit / 100 * u64::from(percent),
        };
        let layout = layout_of(size, wanted, shards)?;
        let needed = layout.shard_bytes * u64::from(shards);
        let found = disk.blocks_available() * unit;
        if found < needed {
            return Err(DataDirError::DiskTooSmall { path: self.path.clone(), found, needed });
        }
        Ok(layout)
    }

    /// From here until `finish_format` a crash leaves a directory that is formatted anew.
    pub fn begin_format(&self) -> Result<(), DataDirError> {
        self.write_durably(FORMATTING, b"a format is under way or was cut off; the next start begins it again\n")?;
        for name in self.names()?.iter().filter(|name| is_left_by_a_format(name)) {
            let path = self.path.join(name);
            fs::remove_file(&path).map_err(|error| io_error(&path, "remove", error))?;
        }
        Ok(())
    }

    /// The block files are durable; this makes the directory a node's.
    pub fn finish_format(&self, cluster: ClusterId, node: NodeId, layout: &Layout) -> Result<Identity, DataDirError> {
        let Layout { shards, shard_bytes, size } = layout.clone();
        let size = size.to_string();
        let identity = Identity { format_version: FORMAT_VERSION, cluster, node, shards, shard_bytes, size };
        let text = serde_json::to_vec_pretty(&identity).expect("an identity is strings and numbers");
        self.write_durably(IDENTITY, &text)?;
        self.forget_format()?;
        Ok(identity)
    }

    /// `torus.json` is there: the marker no longer means anything.
    pub fn forget_format(&self) -> Result<(), DataDirError> {
        let path = self.path.join(FORMATTING);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&path, "remove", error)),
            _ => Ok(()),
        }
    }

    /// Is this the node that is asked for, and is its disk whole?
    pub fn check(
        &self,
        identity: &Identity,
        cluster: ClusterId,
        size: Option<NodeSize>,
        shards: Option<u16>,
    ) -> Result<(), DataDirError> {
        let path = || self.path.clone();
        if identity.cluster != cluster {
            return Err(DataDirError::OtherCluster { path: path(), found: identity.cluster, expected: cluster });
        }
        if let Some(asked) = shards.filter(|asked| *asked != identity.shards) {
            return Err(DataDirError::OtherShards { path: path(), found: identity.shards, asked });
        }
        if let Some(asked) = size.map(|size| size.to_string()).filter(|asked| *asked != identity.size) {
            return Err(DataDirError::OtherSize { path: path(), found: identity.size.clone(), asked });
        }
        for shard in (0..identity.shards).map(ShardIndex) {
            check_length(&self.block_file(shard), identity.shard_bytes)?;
        }
        Ok(())
    }

    /// The lease note, if it was written in this very directory.
    pub fn read_lease_note(&self) -> Result<Option<String>, DataDirError> {
        let path = self.path.join(LEASE);
        match fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error(&path, "read", error)),
        }
    }

    pub fn write_lease_note(&self, text: &str) -> Result<(), DataDirError> {
        self.write_durably(LEASE, text.as_bytes())
    }

    /// Whole or not at all, also across a power cut: temporary file, fsync, rename, fsync of the directory.
    fn write_durably(&self, name: &str, content: &[u8]) -> Result<(), DataDirError> {
        let path = self.path.join(name);
        let temporary = self.path.join(format!("{name}.new"));
        let write = || -> io::Result<()> {
            let mut file = File::create(&temporary)?;
            file.write_all(content)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            File::open(&self.path)?.sync_all()
        };
        write().map_err(|error| io_error(&path, "write", error))
    }
}

fn write_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

fn is_left_by_a_format(name: &str) -> bool {
    let shard = name.strip_prefix("shard-").and_then(|rest| rest.strip_suffix(".blocks"));
    shard.is_some_and(|digits| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()))
        || name.strip_suffix(".new").is_some_and(|name| matches!(name, IDENTITY | FORMATTING))
}

/// Each shard takes an equal part, in whole segments.
fn layout_of(size: NodeSize, wanted: u64, shards: u16) -> Result<Layout, DataDirError> {
    let part = wanted / u64::from(shards);
    let shard_bytes = part - part % limits::SEGMENT_BYTES;
    if shard_bytes < limits::SHARD_BYTES_MIN {
        let needed = limits::SHARD_BYTES_MIN * u64::from(shards);
        return Err(DataDirError::SizeTooSmall { size: size.to_string(), found: wanted, needed, shards });
    }
    if shard_bytes > limits::SHARD_BYTES_MAX {
        let at_most = limits::SHARD_BYTES_MAX * u64::from(shards);
        return Err(DataDirError::SizeTooLarge { size: size.to_string(), found: wanted, at_most, shards });
    }
    Ok(Layout { shards, shard_bytes, size })
}

fn parse_identity(path: &Path, bytes: &[u8]) -> Result<Identity, DataDirError> {
    let damaged = |error: serde_json::Error| DataDirError::DamagedIdentity {
        path: path.to_path_buf(),
        because: error.to_string(),
    };
    let AnyVersion { format_version: found } = serde_json::from_slice(bytes).map_err(damaged)?;
    if found != FORMAT_VERSION {
        return Err(DataDirError::OtherFormat { path: path.to_path_buf(), found, expected: FORMAT_VERSION });
    }
    serde_json::from_slice(bytes).map_err(damaged)
}

fn check_length(path: &Path, expected: u64) -> Result<(), DataDirError> {
    let metadata = fs::metadata(path).map_err(|error| io_error(path, "find the block file", error))?;
    let found = metadata.len();
    if found != expected {
        return Err(DataDirError::BlockFileLength { path: path.to_path_buf(), found, expected });
    }
    Ok(())
}

fn io_error(path: &Path, operation: &'static str, error: io::Error) -> DataDirError {
    DataDirError::Io { path: path.to_path_buf(), operation, because: error.to_string() }
}

#[derive(Debug, Error, PartialEq, Eq)]
pub enum DataDirError {
    #[error("cannot {operation} {path}: {because}")]
    Io { path: PathBuf, operation: &'static str, because: String },
    #[error("data dir {path} is in use by process {pid}; stop it first, or give this node another --data-dir")]
    Locked { path: PathBuf, pid: String },
    #[error(
        "data dir {path} holds {found:?}, which is no node's: only an empty directory is formatted; choose another or empty it"
    )]
    UnknownContent { path: PathBuf, found: String },
    #[error("{path} has format version {found}, expected {expected}; run the program that wrote it")]
    OtherFormat { path: PathBuf, found: u32, expected: u32 },
    #[error(
        "{path} cannot be read ({because}); restore it, or start over in an empty directory and let the cluster copy the data"
    )]
    DamagedIdentity { path: PathBuf, because: String },
    #[error("data dir {path} belongs to cluster {found}, expected {expected}; is --metadata or --data-dir wrong?")]
    OtherCluster { path: PathBuf, found: ClusterId, expected: ClusterId },
    #[error("data dir {path} was formatted with {found} shards, --shards asks for {asked}; it is fixed at format")]
    OtherShards { path: PathBuf, found: u16, asked: u16 },
    #[error(
        "data dir {path} was formatted with --size {found}, now --size {asked}; it is fixed at format: leave --size out"
    )]
    OtherSize { path: PathBuf, found: String, asked: String },
    #[error(
        "block file {path} has {found} bytes, expected {expected}: it was truncated or replaced; restore it, or start over in an empty data dir"
    )]
    BlockFileLength { path: PathBuf, found: u64, expected: u64 },
    #[error("data dir {path} is empty and will be formatted: say how much of the disk to take with --size")]
    SizeMissing { path: PathBuf },
    #[error(
        "disk too small: found {found} bytes free at {path}, needed {needed}; choose a smaller --size or free space"
    )]
    DiskTooSmall { path: PathBuf, found: u64, needed: u64 },
    #[error("--size {size} is {found} bytes, {shards} shards need at least {needed}; choose more, or fewer --shards")]
    SizeTooSmall { size: String, found: u64, needed: u64, shards: u16 },
    #[error("--size {size} is {found} bytes, {shards} shards hold at most {at_most}; choose more --shards")]
    SizeTooLarge { size: String, found: u64, at_most: u64, shards: u16 },
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYOUT: Layout =
        Layout { shards: 1, shard_bytes: limits::SHARD_BYTES_MIN, size: NodeSize::Bytes(limits::SHARD_BYTES_MIN) };

    fn formatted(path: &Path) -> (DataDir, Identity) {
        let dir = DataDir::lock(path).unwrap();
        dir.begin_format().unwrap();
        File::create(dir.block_file(ShardIndex(0))).unwrap().set_len(LAYOUT.shard_bytes).unwrap();
        let identity = dir.finish_format(ClusterId::random(), NodeId::random(), &LAYOUT).unwrap();
        (dir, identity)
    }

    #[test]
    fn an_empty_directory_is_formatted_and_then_found_formatted() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("node");
        assert_eq!(DataDir::lock(&path).unwrap().inspect(), Ok(Found::Empty));
        let (dir, identity) = formatted(&path);
        assert_eq!(dir.inspect(), Ok(Found::Formatted(identity.clone())));
        assert_eq!(dir.check(&identity, identity.cluster, None, None), Ok(()));
        assert!(!path.join(FORMATTING).exists());
    }

    #[test]
    fn a_second_process_is_refused_with_the_pid_of_the_first() {
        let temporary = tempfile::tempdir().unwrap();
        let _first = DataDir::lock(temporary.path()).unwrap();
        let error = DataDir::lock(temporary.path()).err().unwrap();
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    }

    #[test]
    fn somebody_elses_files_are_never_formatted_over() {
        let temporary = tempfile::tempdir().unwrap();
        fs::write(temporary.path().join("thesis.tex"), "…").unwrap();
        let error = DataDir::lock(temporary.path()).unwrap().inspect().unwrap_err();
        assert!(error.to_string().contains("thesis.tex"), "{error}");
    }

    #[test]
    fn a_block_file_without_an_identity_is_data_unless_a_format_was_cut_off() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::lock(temporary.path()).unwrap();
        let file = dir.block_file(ShardIndex(0));
        fs::write(&file, "data").unwrap();
        assert!(matches!(dir.inspect(), Err(DataDirError::UnknownContent { .. })));
        fs::write(temporary.path().join(FORMATTING), "").unwrap();
        assert_eq!(dir.inspect(), Ok(Found::InterruptedFormat));
        dir.begin_format().unwrap();
        assert!(!file.exists());
    }

    #[test]
    fn what_differs_from_the_format_is_refused_with_both_values() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, identity) = formatted(temporary.path());
        let cluster = identity.cluster;
        let other = ClusterId::random();
        let error = dir.check(&identity, other, None, None).unwrap_err().to_string();
        assert!(error.contains(&cluster.to_string()) && error.contains(&other.to_string()), "{error}");
        let error = dir.check(&identity, cluster, None, Some(3)).unwrap_err().to_string();
        assert!(error.contains("1 shards") && error.contains("asks for 3"), "{error}");
        let error = dir.check(&identity, cluster, Some(NodeSize::Percent(10)), None).unwrap_err().to_string();
        assert!(error.contains("536870912") && error.contains("10%"), "{error}");
    }

    #[test]
    fn a_truncated_block_file_is_refused_with_both_lengths() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, identity) = formatted(temporary.path());
        File::options().write(true).open(dir.block_file(ShardIndex(0))).unwrap().set_len(4096).unwrap();
        let error = dir.check(&identity, identity.cluster, None, None).unwrap_err().to_string();
        assert!(error.contains("4096") && error.contains("536870912"), "{error}");
    }

    #[test]
    fn another_format_version_is_refused_before_anything_else_is_read() {
        let temporary = tempfile::tempdir().unwrap();
        fs::write(temporary.path().join(IDENTITY), "{\"format_version\":9,\"new\":true}").unwrap();
        let error = DataDir::lock(temporary.path()).unwrap().inspect().unwrap_err().to_string();
        assert!(error.contains("version 9") && error.contains("expected 1"), "{error}");
    }

    #[test]
    fn a_size_that_no_shard_can_work_with_is_refused() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = DataDir::lock(temporary.path()).unwrap();
        assert!(matches!(dir.plan_format(None, 1), Err(DataDirError::SizeMissing { .. })));
        let small = Some(NodeSize::Bytes(limits::MIB));
        assert!(matches!(dir.plan_format(small, 1), Err(DataDirError::SizeTooSmall { .. })));
        let huge = Some(NodeSize::Bytes(15 * limits::TIB));
        assert!(matches!(dir.plan_format(huge, 1), Err(DataDirError::DiskTooSmall { .. })));
    }

    #[test]
    fn the_identity_keeps_its_form() {
        let identity = Identity {
            format_version: 1,
            cluster: ClusterId::from_bytes([1; 16]),
            node: NodeId::from_bytes([2; 16]),
            shards: 2,
            shard_bytes: 1 << 30,
            size: "80%".to_string(),
        };
        let golden = "{\"format_version\":1,\"cluster\":\"01010101-0101-0101-0101-010101010101\",\
             \"node\":\"02020202-0202-0202-0202-020202020202\",\"shards\":2,\"shard_bytes\":\"1073741824\",\"size\":\"80%\"}";
        assert_eq!(serde_json::to_string(&identity).unwrap(), golden);
    }
}
