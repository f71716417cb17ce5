//! What a protocol server needs of a volume: the one seam between frontends and `volume`, so that a server can also
//! be measured and tested on memory.

use bytes::Bytes;
use smallvec::SmallVec;
use std::future::Future;
use thiserror::Error;

/// Content of a range, in order: what was read without being copied together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Data(Bytes),
    /// That many bytes of zeros which no replica stores.
    Zeros(u64),
}

/// What a read found; small ones are of one piece.
pub type Pieces = SmallVec<[Piece; 1]>;

/// Part of a range: stored, or a hole that reads as zeros and needs room when it is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub bytes: u64,
    pub stored: bool,
}

/// Offsets and lengths are bytes, of any alignment, inside the device (a server checks first and answers in its
/// protocol's terms; the device answers `OutOfRange` all the same). Futures may be dropped: the waiting is
/// abandoned, never the write. Clones are the same device; it is released when the last one is dropped.
pub trait Device: Clone + 'static {
    fn size_bytes(&self) -> u64;
    fn read_only(&self) -> bool;
    fn read(&self, offset: u64, length: u64) -> impl Future<Output = Result<Pieces, VolumeError>>;
    /// `durable`: on stable storage of every in-sync replica before it is answered.
    fn write(&self, offset: u64, data: Bytes, durable: bool) -> impl Future<Output = Result<(), VolumeError>>;
    /// `write`, for who waits until it has ended, whatever becomes of others: a future that is dropped may leave the write
    /// half way.
    fn write_to_end(&self, offset: u64, data: Bytes, durable: bool) -> impl Future<Output = Result<(), VolumeError>> {
        self.write(offset, data, durable)
    }
    /// The range reads as zeros. `advisory` (trim) may leave partial blocks at the edges as they are.
    fn clear(
        &self,
        offset: u64,
        length: u64,
        durable: bool,
        advisory: bool,
    ) -> impl Future<Output = Result<(), VolumeError>>;
    /// What of a range is stored, from its beginning: at least one run if the range is not empty, at most
    /// `VOLUME_MAP_RUNS_MAX` of them. It may end before the range does, since what is looked up at once is bounded.
    fn map(&self, offset: u64, length: u64) -> impl Future<Output = Result<Vec<Run>, VolumeError>>;
    /// The executor on which it can be used without handing anything over, if that is not this one.
    fn home(&self) -> Option<usize> {
        None
    }
    /// Why every further request will fail; waits until that is so.
    fn ended(&self) -> impl Future<Output = String> {
        std::future::pending()
    }
    /// Waits until the size is another than the one that was seen, and gives it.
    fn resized(&self, _seen_bytes: u64) -> impl Future<Output = u64> {
        std::future::pending()
    }
    /// Everything that was answered before the call is on stable storage of every in-sync replica after it.
    fn flush(&self) -> impl Future<Output = Result<(), VolumeError>>;
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    pub name: String,
    pub size_bytes: u64,
    pub read_only: bool,
    pub description: String,
}

/// The devices a server offers by name.
pub trait Exports: Clone + 'static {
    type Device: Device;
    fn list(&self) -> impl Future<Output = Result<Vec<ExportInfo>, VolumeError>>;
    /// Attaches nothing.
    fn describe(&self, name: &str) -> impl Future<Output = Result<ExportInfo, VolumeError>>;
    /// Attaches at first use; later calls give the same device while it is in use.
    fn attach(&self, name: &str) -> impl Future<Output = Result<Self::Device, VolumeError>>;
}

/// Every way in which a request on a volume ends badly; a protocol has one table from these to its codes.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum VolumeError {
    #[error("there is no volume {name:?}; `torusblk volume list` shows those there are")]
    NotFound { name: String },
    #[error("volume {name:?} is attached by {owner}; detach it there, or take it over with --force")]
    Attached { name: String, owner: String },
    #[error("{length} bytes at offset {offset} reach beyond the volume's end at {size}")]
    OutOfRange { offset: u64, length: u64, size: u64 },
    #[error("the volume is attached read-only")]
    ReadOnly,
    #[error("the cluster is full: shard {shard} takes no new data; delete or trim something, or add nodes")]
    NoSpace { shard: String },
    /// The session is over: every further request fails, until the volume is attached anew.
    #[error("the volume's session ended: {because}")]
    SessionEnded { because: String },
    /// A write may yet be carried out, as soon as that is possible.
    #[error("too few replicas answered within the I/O timeout of {waited_ms} ms")]
    TimedOut { waited_ms: u64 },
    #[error("block {block} cannot be read from any in-sync replica: {because}")]
    Unreadable { block: u64, because: String },
    #[error("the volume is not ready: {because}")]
    NotReady { because: String },
    #[error("metadata: {because}")]
    Metadata { because: String },
}
