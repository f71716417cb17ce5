//! One shard: answers for its slices, on one executor, sharing nothing.
//!
//! State changes are synchronous and stand in `State`, behind one `RefCell` that is never held over an await; awaits
//! stand only at the disk, at the answer of an append, and at `Notify`.
//!
//! * `requests`  what is asked, checked and answered
//! * `retention` what the writer needs kept, taken back, or mapped
//! * `resync`    a stale replica takes what it lacks
//! * `course`    how long the stages of a request took
//! * `reads`     blocks from the disk, verified
//! * `volumes`   instances, writers, flush points
//! * `held`      what there is of each volume
//! * `damage`    what cannot be read as it was written
//! * `peers`     who else holds a slice
//! * `repair`    what is damaged is fetched from them
//! * `pins`      what is superseded and kept
//! * `history`   what a block was before
//! * `ledger`    which notes are still needed, and where they stand
//! * `state`     what a record does to index, space and volumes
//! * `queue`     appends gathered into batches (pure)
//! * `append`    batches and syncs on their way to the disk
//! * `cleaner`   gives space back
//! * `scrub`     finds damage before anybody asks
//! * `start`     format and recovery
//! * `survey`    what a start would believe, for `inspect`
//! * `grow`      a disk that became larger
//! * `gather`    what footers list, by extent
//! * `replay`    which of several copies counts then
//! * `supervisor` opens it anew when its disk failed

mod append;
mod cleaner;
pub mod course;
mod damage;
mod gather;
mod grow;
mod held;
mod history;
mod ledger;
mod peers;
mod pins;
mod queue;
mod reads;
mod repair;
mod replay;
mod requests;
mod resync;
mod retention;
mod scrub;
mod start;
mod state;
pub mod supervisor;
pub mod survey;
#[cfg(test)]
mod tests;
mod volumes;

use crate::log::{BatchNumber, FormatError, Geometry};
use bytes::Bytes;
use course::{Course, Done};
pub use damage::{Conflict, DamageReport, Damaged, FoundBy, ListedDamage};
use futures::channel::oneshot;
pub use peers::PeerTable;
use peers::Peers;
use queue::{Need, Queue, Syncs};
pub use reads::Chunk;
use resync::Resyncs;
use scrub::Scrub;
pub use scrub::{ScrubPass, ScrubReport};
use state::Contents;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use thiserror::Error;
use torus_rpc::message::{Answer, Envelope, Few, Operation, Refusal, Reply};
use torus_rpc::notify::Notify;
use torus_rpc::runtime::{Clock, Disk, DiskError, Instant, Runtime};
use torus_rpc::server::Request;
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{ClusterId, Incarnation, NodeId, ShardIndex, VolumeId};
use torus_schema::latency::OperationKind;
use torus_schema::limits::BLOCK_BYTES;

/// Whose shard it is; a disk belongs to exactly one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShardIdentity {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub shard: ShardIndex,
}

#[derive(Debug, Error)]
pub enum ShardError {
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("this is not the block area of a shard, or both copies of its superblock are damaged: {0}")]
    Superblock(FormatError),
    #[error("the block area belongs to {field} {found}, expected {expected}; use the data dir it was made for")]
    OtherOwner { field: &'static str, found: String, expected: String },
    #[error(
        "the block area has {found} bytes, its superblock says {expected}; it was truncated or replaced: restore it, or format a new data dir and let the cluster fill it"
    )]
    Size { found: u64, expected: u64 },
    #[error("a shard of {found} bytes is too small; it needs at least {expected}")]
    TooSmall { found: u64, expected: u64 },
    #[error("segments of {found} bytes; expected a multiple of {expected} that gives each room for the largest record")]
    SegmentSize { found: u64, expected: u64 },
    #[error("the block area is formatted already, for node {node}, shard {shard}; remove it if its data is not needed")]
    Formatted { node: NodeId, shard: ShardIndex },
    #[error("the footer of segment {segment} could be read a moment ago and now cannot; check the disk")]
    Unsteady { segment: u32 },
    #[error(
        "what was written and synced at byte {offset} is not what is read there: the disk loses writes; check and replace it"
    )]
    NotKept { offset: u64 },
    #[error("{0}")]
    Refused(Refusal),
}

/// See `ShardStatus` of the control plane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShardStatistics {
    pub segments: u32,
    pub segments_free: u32,
    pub segment_bytes: u64,
    /// Of blocks that can be read or are kept for a version that can.
    pub live_bytes: u64,
    pub volumes: u32,
    pub reads: u64,
    pub writes: u64,
    pub clears: u64,
    pub flushes: u64,
    pub batches: u64,
    pub syncs: u64,
    pub bytes_appended: u64,
    /// That batches were written to.
    pub segments_opened: u64,
    /// Of those, for how many a batch had to wait: their opening was not durable when it was needed.
    pub segments_waited_for: u64,
    pub segments_cleaned: u64,
    /// Copied out of them.
    pub blocks_moved: u64,
    pub checksum_errors: u64,
    pub refused: u64,
    /// Blocks with data that the index knows, and the memory it takes for them.
    pub index_blocks: u64,
    pub index_bytes: u64,
    /// Blocks that cannot be read as they were written and are not repaired yet.
    pub damaged: u64,
    /// Such blocks found and repaired since the shard was opened.
    pub damaged_found: u64,
    pub repaired: u64,
    /// Blocks of which a peer has another content under the same version.
    pub conflicts: u64,
    pub full: bool,
    pub failed: bool,
    /// Something durable was lost in this shard's life: instances older than that are refused.
    pub lost: bool,
}

struct State {
    contents: Contents,
    queue: Queue,
    syncs: Syncs,
    /// Footers being written.
    seals_in_flight: usize,
    incarnation: Incarnation,
    lost_below: BatchNumber,
    failed: Option<Refusal>,
    closing: bool,
    cleaner_stopped: bool,
    repairer_stopped: bool,
    scrub: Scrub,
    statistics: ShardStatistics,
}

pub struct Shard<R: Runtime> {
    runtime: R,
    disk: R::Disk,
    key: ClusterKey,
    geometry: Geometry,
    state: RefCell<State>,
    /// Told after every change of the state that anybody could wait for.
    changed: Notify,
    /// Told when there is something to repair or to scrub, and when that has to stop.
    background: Notify,
    peers: Peers<R::Link>,
    resyncs: Resyncs,
    /// Dropped with the shard: who holds the other end learns that nothing of it is in flight.
    gone: RefCell<Option<oneshot::Sender<()>>>,
    pump_planned: Cell<bool>,
    /// Of the last batch, to be used again.
    header: RefCell<Vec<u8>>,
}

type Chunks<R> = Few<Chunk<<<R as Runtime>::Disk as Disk>::Bytes>>;

impl<R: Runtime> Shard<R> {
    /// Every operation but hello and ping, which the server answers.
    pub async fn handle(
        self: &Rc<Self>,
        envelope: Envelope,
        operation: Operation,
        payload: Bytes,
    ) -> (Reply, Chunks<R>) {
        let arrived = self.runtime.clock().now();
        let mut request = Request { arrived, envelope, operation, payload };
        let (reply, chunks, _) = self.handle_arrived(&mut request).await;
        (reply, chunks)
    }

    /// A request that came some time ago, and how it went if it was a user's and was carried out.
    pub async fn handle_arrived(self: &Rc<Self>, request: &mut Request) -> (Reply, Chunks<R>, Option<Course>) {
        let began = self.runtime.clock().now();
        let (arrived, kind) = (request.arrived, request.operation.kind());
        let result = if self.state.borrow().closing {
            Err(Refusal::Disk { because: "the shard is being closed".to_string() })
        } else {
            self.answer(request, began).await
        };
        let now = kind.map(|kind| (kind, self.answered_at(kind, &result)));
        if let Some((OperationKind::Read | OperationKind::Write, now)) = now {
            self.resyncs.pacer.borrow_mut().answered(now, now.since(began));
        }
        let state = &mut *self.state.borrow_mut();
        let full = state.contents.space.is_full();
        match result {
            Ok(Done { answer, chunks, disk }) => {
                let course = now.map(|(kind, now)| Course::new(kind, arrived, disk, now));
                let (course, took) = course.unzip();
                (Reply { full, took: took.unwrap_or_default(), answer }, chunks, course)
            }
            Err(refusal) => {
                state.statistics.refused += 1;
                (Reply { full, ..Reply::of(Answer::Refused(refusal)) }, Few::new(), None)
            }
        }
    }

    /// A read is answered when the disk is done with it. A write also waits for its turn after that.
    fn answered_at(&self, kind: OperationKind, result: &Result<Done<R>, Refusal>) -> Instant {
        match (kind, result) {
            (OperationKind::Read, Ok(Done { disk: Some(disk), .. })) => disk.ended,
            _ => self.runtime.clock().now(),
        }
    }

    /// Durable before it returns; then its space is free.
    pub async fn drop_volume(self: &Rc<Self>, volume: VolumeId) -> Result<(), ShardError> {
        let (known, dropped) = {
            let contents = &self.state.borrow().contents;
            (contents.volumes.contains_key(&volume), contents.dropped.contains(&volume))
        };
        if known {
            let record = crate::log::record::Record::Drop(volume);
            self.append(Need::Note, record, Bytes::new()).await.map_err(ShardError::Refused)?;
        }
        if known || dropped {
            self.sync_after_now().await.map_err(ShardError::Refused)?;
        }
        Ok(())
    }

    pub fn statistics(&self) -> ShardStatistics {
        let state = self.state.borrow();
        let space = &state.contents.space;
        let damage = state.contents.damage.counts();
        ShardStatistics {
            segments: self.geometry.segments,
            segments_free: space.free(),
            segment_bytes: u64::from(self.geometry.blocks) * BLOCK_BYTES,
            live_bytes: space.live() * BLOCK_BYTES,
            volumes: state.contents.volumes.values().filter(|volume| volume.layout.is_some()).count() as u32,
            index_blocks: state.contents.index.blocks(),
            index_bytes: state.contents.index.memory_bytes(),
            damaged: damage.damaged,
            damaged_found: damage.found,
            repaired: damage.repaired,
            conflicts: damage.conflicts,
            full: space.is_full(),
            failed: state.failed.is_some(),
            lost: state.lost_below > BatchNumber(0),
            ..state.statistics
        }
    }

    /// At most `limit` of each list.
    pub fn damage(&self, limit: usize) -> DamageReport {
        let now = self.runtime.clock().now();
        self.state.borrow().contents.damage.report(limit, now)
    }

    /// Why it answers nothing any more.
    pub fn failure(&self) -> Option<Refusal> {
        self.state.borrow().failed.clone()
    }

    pub async fn wait_for_failure(&self) -> Refusal {
        self.changed.until(|| self.failure()).await
    }

    /// Resolves when the last user of the shard is gone: requests, background work and everything in flight.
    fn gone(&self) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        *self.gone.borrow_mut() = Some(sender);
        receiver
    }

    /// Waits for what is in flight and leaves all of it durable, with a footer, so that the next start is short.
    /// New requests are refused from the moment it is called.
    pub async fn close(self: &Rc<Self>) {
        self.state.borrow_mut().closing = true;
        self.changed.notify();
        self.background.notify();
        let idle = || {
            let state = self.state.borrow();
            let waits = state.queue.waits_for_space(state.contents.space.free());
            let opening = state.queue.ahead.as_ref().is_some_and(|ahead| ahead.needs.is_none());
            let idle = state.queue.in_flight == 0 && !opening && (state.queue.is_empty() || waits);
            let stopped = state.cleaner_stopped && state.repairer_stopped && state.scrub.stopped;
            (state.failed.is_some() || (stopped && idle)).then_some(())
        };
        self.changed.until(idle).await;
        let ready = {
            let state = &mut *self.state.borrow_mut();
            state.queue.take_all().iter().for_each(|append| append.piece.answer(Err(Refusal::NoSpace)));
            if let Some(retired) = state.queue.retire_head() {
                state.contents.space.sealing(retired.segment);
            }
            // Without a footer the next start would look for batches in it.
            if let Some(unused) = state.queue.retire_ahead() {
                state.contents.space.begin(unused.segment, unused.sequence);
                state.contents.space.sealing(unused.segment);
            }
            std::iter::from_fn(|| state.queue.take_ready()).collect::<Vec<_>>()
        };
        ready.into_iter().for_each(|filling| self.seal(filling));
        let sealed = || {
            let state = self.state.borrow();
            (state.failed.is_some() || state.seals_in_flight == 0).then_some(())
        };
        self.changed.until(sealed).await;
        // A shard that failed has said so already.
        let _ = self.sync_after_now().await;
    }
}
