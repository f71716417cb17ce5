//! `torusblk nbd`: a volume as a block device of this host's kernel, `/dev/nbdN`.
//!
//! ```text
//!  /dev/nbdN ─► kernel's nbd client ─► unix sockets ─► the NBD server in this process ─► volume
//!                     ▲ generic netlink: connect, reconfigure, disconnect
//!                  control
//! ```
//!
//! The kernel does not negotiate: this process connects to its own server, haggles, and hands the sockets over.
//!
//! * `wire`       the netlink messages of the kernel's nbd driver; nothing else knows their numbers
//! * `control`    asks the driver
//! * `handshake`  the client's side of NBD's negotiation, as far as it is needed
//! * `sysfs`      what the kernel shows of its devices
//! * `memo`       what a successor of this process has to know of a device to serve it on
//! * `attach`     the command: takes the volume, serves it to the kernel
//! * `drive`      the thread that blocks in the kernel: attach or serve on, wait, detach
//! * `listing`    `--list` and `--detach`

pub mod attach;
mod control;
mod drive;
mod handshake;
pub mod listing;
mod memo;
mod sysfs;
pub mod wire;

use std::path::PathBuf;
use thiserror::Error;
use torus_schema::ids::VolumeId;

/// Every way in which the kernel's device cannot be had, with what to do.
#[derive(Debug, Error)]
pub enum KernelError {
    #[error("this kernel has no nbd driver loaded; run: modprobe nbd")]
    NoModule,
    #[error("only root may attach devices to the kernel (netlink says: {because})")]
    NotAllowed { because: std::io::Error },
    #[error("{device} is no device of the nbd driver; expected /dev/nbdN")]
    NotNbd { device: PathBuf },
    #[error("{device} is attached already{to}; take another, or leave it out for the first free one")]
    Taken { device: PathBuf, to: String },
    #[error("{device} is not attached; `torusblk nbd --list` shows what is")]
    NotAttached { device: PathBuf },
    #[error("{device} was not attached by torusblk but is {backend:?}; detach it with what attached it")]
    NotOurs { device: PathBuf, backend: String },
    #[error("{device} is in use (mounted?), its users would see I/O errors; unmount it first, or say --force")]
    InUse { device: PathBuf },
    #[error("process {pid} serves this volume as {device} already; stop that one first (kill {pid})")]
    Served { pid: u32, device: PathBuf },
    #[error(
        "{device} was failed, its users see I/O errors: {because}. Unmount it, then attach the volume again; what was \
         flushed is there"
    )]
    Failed { device: PathBuf, because: String },
    #[error("the kernel refused to {what} {device}: {because}; its log (dmesg) may say more")]
    Refused { what: &'static str, device: String, because: std::io::Error },
    #[error("{what}: {because}")]
    Io { what: String, because: std::io::Error },
}

fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> KernelError {
    move |because| KernelError::Io { what: what.into(), because }
}

/// What the kernel keeps beside a device of ours. It compares it before it takes other sockets for a device.
fn backend_of(volume: VolumeId) -> String {
    format!("{BACKEND_PREFIX}{volume}")
}

const BACKEND_PREFIX: &str = "torus:";
