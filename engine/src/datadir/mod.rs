//! A node's own directory: who it is, and which files are its disk.
//!
//! | name             | what it is                                                                       |
//! |------------------|----------------------------------------------------------------------------------|
//! | `lock`           | locked (flock) by the process that uses the directory; holds its pid             |
//! | `formatting`     | present from the first moment of a format until after `torus.json` is durable    |
//! | `shard-N.blocks` | the block file of shard N, of exactly `shard_bytes`; none where shards are on devices |
//! | `torus.json`     | [`Identity`], written last: with it the directory is formatted, without it not   |
//! | `lease.json`     | the lease of the last heartbeat (`node::membership`)                             |
//! | `scrub.json`     | what is remembered of scrubs (`node::scrub`)                                     |
//! | `metadata/`      | the store of `--metadata embedded`                                               |
//!
//! | found at a start                     | done                                                                |
//! |--------------------------------------|---------------------------------------------------------------------|
//! | nothing but `lock`, `metadata/`, `lost+found` | formatted                                                  |
//! | `formatting`, no `torus.json`        | a format was cut off: nobody ever wrote to these block files, so they are removed and the format starts over |
//! | `torus.json` (and `formatting`)      | checked against what is asked for; a leftover `formatting` is removed |
//! | anything else                        | refused: it is somebody's data                                      |
//!
//! * `layout`   how much each shard takes, at a format and when asked for more
//! * `growth`   the steps from one size to a larger one
//! * `devices`  raw devices: which is whose
//! * `error`    what is refused

mod devices;
mod error;
mod growth;
mod layout;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};
use torus_schema::ids::{ClusterId, NodeId, ShardIndex};
use torus_schema::records::decimal;

pub use devices::{Devices, attach, look_for as look_for_devices};
pub use error::DataDirError;
pub use layout::Layout;

/// Layout of the directory and of `torus.json`.
pub const FORMAT_VERSION: u32 = 2;
const LOCK: &str = "lock";
const FORMATTING: &str = "formatting";
const IDENTITY: &str = "torus.json";
const LEASE: &str = "lease.json";
const SCRUB: &str = "scrub.json";
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
    /// `--size` as it was given when the shards got this size; empty: whole devices.
    pub size: String,
    /// Decided, and not finished on every shard (`growth`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub growing: Option<Growing>,
    /// Where the shards lie, if not in files of this directory: shard i on device i mod n.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Growing {
    #[serde(with = "decimal")]
    pub shard_bytes: u64,
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
            Err((file, Errno::EWOULDBLOCK)) => Err(locked(path, &lock_path, file)),
            Err((_, errno)) => Err(io_error(&lock_path, "lock", errno.into())),
        }
    }

    /// Of a node that does not run: locked, and nothing in it is touched.
    pub fn look(path: &Path) -> Result<(Self, Identity), DataDirError> {
        let path = path.canonicalize().map_err(|error| io_error(path, "find the directory", error))?;
        let lock_path = path.join(LOCK);
        let file = File::open(&lock_path).map_err(|error| io_error(&lock_path, "open", error))?;
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(lock) => {
                let dir = Self { path, _lock: lock };
                match dir.inspect()? {
                    Found::Formatted(identity) => Ok((dir, identity)),
                    Found::Empty | Found::InterruptedFormat => Err(DataDirError::NotFormatted { path: dir.path }),
                }
            }
            Err((file, Errno::EWOULDBLOCK)) => Err(locked(path, &lock_path, file)),
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

    /// From here until `finish_format` a crash leaves a directory that is formatted anew. The draft's node id stands in
    /// the marker, so that what the cut-off format left on devices is known to be its own.
    pub fn begin_format(&self, node: NodeId) -> Result<(), DataDirError> {
        let text = format!("a format of node {node} is under way or was cut off; the next start begins it again\n");
        self.write_durably(FORMATTING, text.as_bytes())?;
        for name in self.names()?.iter().filter(|name| is_left_by_a_format(name)) {
            let path = self.path.join(name);
            fs::remove_file(&path).map_err(|error| io_error(&path, "remove", error))?;
        }
        Ok(())
    }

    /// The shards are durable; this makes the directory a node's.
    pub fn finish_format(&self, identity: &Identity) -> Result<(), DataDirError> {
        self.write_identity(identity)?;
        self.forget_format()
    }

    /// Whose format was cut off, where the marker can be read: a crash may have left it empty.
    pub fn draft(&self) -> Option<NodeId> {
        let text = fs::read_to_string(self.path.join(FORMATTING)).ok()?;
        text.split_whitespace().find_map(|word| word.parse().ok())
    }

    /// `torus.json` is there: the marker no longer means anything.
    pub fn forget_format(&self) -> Result<(), DataDirError> {
        let path = self.path.join(FORMATTING);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(&path, "remove", error)),
            _ => Ok(()),
        }
    }

    /// Is this the node that is asked for?
    pub fn check(&self, identity: &Identity, cluster: ClusterId, shards: Option<u16>) -> Result<(), DataDirError> {
        let path = || self.path.clone();
        if identity.cluster != cluster {
            return Err(DataDirError::OtherCluster { path: path(), found: identity.cluster, expected: cluster });
        }
        if let Some(asked) = shards.filter(|asked| *asked != identity.shards) {
            return Err(DataDirError::OtherShards { path: path(), found: identity.shards, asked });
        }
        Ok(())
    }

    /// Whole or not at all: what a start decides by.
    pub fn write_identity(&self, identity: &Identity) -> Result<(), DataDirError> {
        let text = serde_json::to_vec_pretty(identity).expect("an identity is strings and numbers");
        self.write_durably(IDENTITY, &text)
    }

    /// The lease note, if it was written in this very directory.
    pub fn read_lease_note(&self) -> Result<Option<String>, DataDirError> {
        self.read_note(LEASE)
    }

    pub fn read_scrub_note(&self) -> Result<Option<String>, DataDirError> {
        self.read_note(SCRUB)
    }

    pub fn write_scrub_note(&self, text: &str) -> Result<(), DataDirError> {
        self.write_durably(SCRUB, text.as_bytes())
    }

    fn read_note(&self, name: &str) -> Result<Option<String>, DataDirError> {
        let path = self.path.join(name);
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

fn locked(path: PathBuf, lock_path: &Path, mut file: File) -> DataDirError {
    let mut pid = String::new();
    match file.read_to_string(&mut pid) {
        Ok(_) => DataDirError::Locked { path, pid: pid.trim().to_string() },
        Err(error) => io_error(lock_path, "read", error),
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

fn io_error(path: &Path, operation: &'static str, error: io::Error) -> DataDirError {
    DataDirError::Io { path: path.to_path_buf(), operation, because: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::limits;

    /// One shard of the smallest size, whose file has nothing in it.
    pub fn formatted(path: &Path) -> (DataDir, Identity) {
        let dir = DataDir::lock(path).unwrap();
        let identity = Identity {
            format_version: FORMAT_VERSION,
            cluster: ClusterId::random(),
            node: NodeId::random(),
            shards: 1,
            shard_bytes: limits::SHARD_BYTES_MIN,
            size: limits::SHARD_BYTES_MIN.to_string(),
            growing: None,
            devices: Vec::new(),
        };
        dir.begin_format(identity.node).unwrap();
        assert_eq!(dir.draft(), Some(identity.node));
        File::create(dir.block_file(ShardIndex(0))).unwrap().set_len(identity.shard_bytes).unwrap();
        dir.finish_format(&identity).unwrap();
        (dir, identity)
    }

    #[test]
    fn an_empty_directory_is_formatted_and_then_found_formatted() {
        let temporary = tempfile::tempdir().unwrap();
        let path = temporary.path().join("node");
        assert_eq!(DataDir::lock(&path).unwrap().inspect(), Ok(Found::Empty));
        let (dir, identity) = formatted(&path);
        assert_eq!(dir.inspect(), Ok(Found::Formatted(identity.clone())));
        assert_eq!(dir.check(&identity, identity.cluster, None), Ok(()));
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
        dir.begin_format(NodeId::random()).unwrap();
        assert!(!file.exists());
    }

    #[test]
    fn what_differs_from_the_format_is_refused_with_both_values() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, identity) = formatted(temporary.path());
        let cluster = identity.cluster;
        let other = ClusterId::random();
        let error = dir.check(&identity, other, None).unwrap_err().to_string();
        assert!(error.contains(&cluster.to_string()) && error.contains(&other.to_string()), "{error}");
        let error = dir.check(&identity, cluster, Some(3)).unwrap_err().to_string();
        assert!(error.contains("1 shards") && error.contains("asks for 3"), "{error}");
    }

    #[test]
    fn a_truncated_block_file_is_refused_with_both_lengths() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, identity) = formatted(temporary.path());
        File::options().write(true).open(dir.block_file(ShardIndex(0))).unwrap().set_len(4096).unwrap();
        let error = dir.check_files(&identity).unwrap_err().to_string();
        assert!(error.contains("4096") && error.contains("536870912"), "{error}");
    }

    #[test]
    fn another_format_version_is_refused_before_anything_else_is_read() {
        let temporary = tempfile::tempdir().unwrap();
        fs::write(temporary.path().join(IDENTITY), "{\"format_version\":9,\"new\":true}").unwrap();
        let error = DataDir::lock(temporary.path()).unwrap().inspect().unwrap_err().to_string();
        assert!(error.contains("version 9") && error.contains("expected 2"), "{error}");
    }

    #[test]
    fn the_identity_keeps_its_form() {
        let identity = Identity {
            format_version: 2,
            cluster: ClusterId::from_bytes([1; 16]),
            node: NodeId::from_bytes([2; 16]),
            shards: 2,
            shard_bytes: 1 << 30,
            size: "80%".to_string(),
            growing: None,
            devices: Vec::new(),
        };
        let golden = "{\"format_version\":2,\"cluster\":\"01010101-0101-0101-0101-010101010101\",\
             \"node\":\"02020202-0202-0202-0202-020202020202\",\"shards\":2,\"shard_bytes\":\"1073741824\",\"size\":\"80%\"}";
        assert_eq!(serde_json::to_string(&identity).unwrap(), golden);
        let growing = Some(Growing { shard_bytes: 2 << 30, size: "4GiB".to_string() });
        let more = Identity { growing, devices: vec!["/dev/sdb".into()], ..identity };
        let text = serde_json::to_string(&more).unwrap();
        let golden = golden.replace(
            "\"80%\"}",
            "\"80%\",\"growing\":{\"shard_bytes\":\"2147483648\",\"size\":\"4GiB\"},\"devices\":[\"/dev/sdb\"]}",
        );
        assert_eq!(text, golden);
        assert_eq!(serde_json::from_str::<Identity>(&text).unwrap(), more);
    }
}
