//! What a data dir or a device is refused for.

use super::devices::list;
use crate::disk::device::DeviceError;
use std::path::PathBuf;
use thiserror::Error;
use torus_schema::ids::{ClusterId, NodeId, ShardIndex};

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
    #[error("data dir {path} was never formatted, or its format was cut off: there is nothing to look at")]
    NotFormatted { path: PathBuf },
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
        "data dir {path} has {found} bytes in its shards, --size {size} asks for {asked}: a node grows and never shrinks; leave --size out, or take this node out of the ring and format another"
    )]
    Smaller { path: PathBuf, found: u64, size: String, asked: u64 },
    #[error(
        "data dir {path}: its {found} shards share {expected} devices, so the first on a device cannot grow into the next; add a node instead"
    )]
    SharedDevices { path: PathBuf, found: u16, expected: usize },
    #[error(
        "--shards {found} on {expected} devices; each needs a shard at least: choose more --shards, or fewer devices"
    )]
    FewShards { found: u16, expected: usize },
    #[error(
        "device too small: {path} has {found} bytes, {shards} shards on it need {needed}; choose a smaller --size, or larger devices"
    )]
    DeviceTooSmall { path: PathBuf, found: u64, needed: u64, shards: u64 },
    #[error("--device {path} and {other} are one device ({number}); name it once")]
    DeviceTwice { path: PathBuf, other: PathBuf, number: String },
    #[error(
        "--device {} is given, but the shards of this data dir are files in it; leave it out, or format another data dir",
        list(asked)
    )]
    DevicesNotUsed { asked: Vec<PathBuf> },
    #[error(
        "formatted on the devices {}, now --device {}; name all of them, or none to use those",
        list(found),
        list(asked)
    )]
    DeviceCount { found: Vec<PathBuf>, asked: Vec<PathBuf> },
    #[error(
        "the device of shard {shard} of node {node} is missing: it was {was}, {found}, and {looked_at}; attach it, or let the cluster copy the data to a new node"
    )]
    DeviceMissing { shard: ShardIndex, node: NodeId, was: PathBuf, found: String, looked_at: String },
    #[error(
        "shard {shard} is found twice, on {one} and {other}: one is a copy; name the right ones with --device, and remove the copy"
    )]
    DeviceCopies { shard: ShardIndex, one: PathBuf, other: PathBuf },
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error(
        "block file {path} has {found} bytes, expected {expected}: it was truncated or replaced; restore it, or start over in an empty data dir"
    )]
    BlockFileLength { path: PathBuf, found: u64, expected: u64 },
    #[error(
        "data dir {path} is empty and will be formatted: say how much of the disk to take with --size, or name raw devices with --device"
    )]
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
