//! Batches on their way to the disk, and the shared sync. The decisions are in `queue`; here they meet the disk.
//!
//! Everything submitted runs in a task of its own: a caller that goes away abandons the waiting, nothing else.

use super::course::Span;
use super::queue::{Ahead, Append, Batch, Filling, Need, Next, Queue, Waiting};
use super::{Shard, State};
use crate::log::footer::Footer;
use crate::log::record::Record;
use crate::log::recovery::write_footer;
use crate::log::segment::{Opening, RECENT_MAX, Recent};
use crate::log::space::SyncNumber;
use crate::log::{BLOCK, BatchNumber, Geometry, Position, SegmentIdentity};
use bytes::Bytes;
use std::rc::Rc;
use torus_rpc::message::Refusal;
use torus_rpc::runtime::{Class, Clock, Disk, DiskError, Random, Runtime, Spawn};
use torus_schema::limits::BATCHES_IN_FLIGHT_MAX;

impl<R: Runtime> Shard<R> {
    /// Waits until the record is applied: readable, not durable.
    pub(super) async fn append(self: &Rc<Self>, need: Need, record: Record, payload: Bytes) -> Result<Span, Refusal> {
        self.submit(need, record, payload, None)?.done().await
    }

    /// In the queue before it returns.
    pub(super) fn submit(
        self: &Rc<Self>,
        need: Need,
        record: Record,
        payload: Bytes,
        origins: Option<Vec<Position>>,
    ) -> Result<Waiting, Refusal> {
        self.queued(record, |queue, record| queue.push(need, record, payload, origins))
    }

    /// A writer's data, that is answered when it is durable: its batch may be written so.
    pub(super) fn submit_durable(self: &Rc<Self>, record: Record, payload: Bytes) -> Result<Waiting, Refusal> {
        self.queued(record, |queue, record| queue.push_durable(record, payload))
    }

    fn queued(
        self: &Rc<Self>,
        record: Record,
        push: impl FnOnce(&mut Queue, Record) -> Waiting,
    ) -> Result<Waiting, Refusal> {
        let waiting = {
            let state = &mut *self.state.borrow_mut();
            state.check_alive()?;
            // A copy, or a repair, may have been on its way when the volume was dropped: that must not make it known again.
            if record.is_of_writer() && !state.contents.dropped.contains(&record.volume()) {
                state.contents.volumes.entry(record.volume()).or_default().in_flight += 1;
            }
            push(&mut state.queue, record)
        };
        self.pump_soon();
        Ok(waiting)
    }

    /// A task of its own, so that all who are ready to append now get into the same batch.
    pub(super) fn pump_soon(self: &Rc<Self>) {
        if self.pump_planned.replace(true) {
            return;
        }
        let shard = self.clone();
        self.runtime.spawn().spawn(Class::Foreground, async move {
            shard.pump_planned.set(false);
            shard.write_batches().await;
        });
    }

    /// Starts as many batches as may be in flight.
    pub(super) fn pump(self: &Rc<Self>) {
        while let Some(batch) = self.next_batch() {
            let shard = self.clone();
            self.runtime.spawn().spawn(Class::Foreground, async move {
                shard.write_batch(batch).await;
                shard.write_batches().await;
            });
        }
        self.open_ahead();
    }

    /// One after the other, as long as there is one to write, without a new task for each; others beside it, if more than
    /// one may be in flight.
    async fn write_batches(self: &Rc<Self>) {
        while let Some(batch) = self.next_batch() {
            self.pump();
            self.write_batch(batch).await;
        }
        self.open_ahead();
    }

    /// What is to be written next, if it may be in flight beside what is.
    fn next_batch(self: &Rc<Self>) -> Option<Batch> {
        loop {
            let (next, waits) = {
                let state = &mut *self.state.borrow_mut();
                let busy = state.queue.in_flight >= BATCHES_IN_FLIGHT_MAX;
                if busy || state.failed.is_some() {
                    return None;
                }
                let free = state.contents.space.free();
                let next = state.queue.next(state.contents.space.geometry(), free);
                (next, state.queue.waits_for_space(free))
            };
            if waits {
                self.changed.notify();
            }
            match next {
                Next::Nothing => return None,
                Next::Batch(batch) => return Some(batch),
                Next::NeedSegment if self.next_segment() => {}
                Next::NeedSegment => return None,
            }
        }
    }

    async fn write_batch(self: &Rc<Self>, batch: Batch) {
        let began = self.runtime.clock().now();
        let buffer = self.encoded(&batch);
        let offset = Geometry::offset(batch.heading.position);
        let written = match batch.durable {
            true => self.disk.write_durable(offset, buffer).await,
            false => self.disk.write(offset, buffer).await,
        };
        match written {
            Ok(()) => {
                let ended = self.runtime.clock().now();
                self.batch_written(batch, Span { began, ended });
            }
            Err(error) => {
                let refusal = self.fail(error);
                batch.appends.iter().for_each(|append| append.piece.answer(Err(refusal.clone())));
            }
        }
    }

    fn encoded(&self, batch: &Batch) -> <R::Disk as Disk>::Buffer {
        let mut buffer = self.disk.allocate(batch.bytes);
        let header = &mut *self.header.borrow_mut();
        batch.heading.encode(batch.appends.iter().map(|append| &append.record), header);
        buffer[..header.len()].copy_from_slice(header);
        let mut at = header.len();
        for append in &batch.appends {
            buffer[at..at + append.payload.len()].copy_from_slice(&append.payload);
            at += append.payload.len();
        }
        assert_eq!(at, batch.bytes);
        buffer
    }

    fn batch_written(self: &Rc<Self>, batch: Batch, span: Span) {
        let ready = {
            let state = &mut *self.state.borrow_mut();
            state.statistics.batches += 1;
            state.statistics.bytes_appended += batch.bytes as u64;
            let segment = batch.heading.identity.segment;
            for append in &batch.appends {
                state.contents.apply(&append.record, segment, append.origins.as_deref());
                state.statistics.blocks_moved += append.origins.as_ref().map_or(0, |origins| origins.len() as u64);
                state.append_done(append, span);
            }
            state.queue.batch_done(batch)
        };
        ready.into_iter().for_each(|filling| self.seal(filling));
        self.changed.notify();
    }

    /// The open segment is full: goes on with the one that was opened ahead. False if none is ready yet.
    fn next_segment(self: &Rc<Self>) -> bool {
        let (ready, begun, changed) = {
            let state = &mut *self.state.borrow_mut();
            let retired = state.queue.retire_head();
            retired.into_iter().for_each(|retired| state.contents.space.sealing(retired.segment));
            let waited = state.queue.wants_segment;
            let begun = state.queue.begin_ahead(state.syncs.completed);
            match begun {
                Some(identity) => {
                    state.contents.space.begin(identity.segment, identity.sequence);
                    state.statistics.segments_opened += 1;
                    state.statistics.segments_waited_for += u64::from(waited);
                }
                None => {
                    state.queue.wants_segment = true;
                    state.want_opening_synced();
                }
            }
            (state.queue.take_ready(), begun.is_some(), begun.is_some() || retired.is_some())
        };
        ready.into_iter().for_each(|filling| self.seal(filling));
        self.start_sync();
        if changed {
            self.changed.notify();
        }
        begun
    }

    /// While one segment fills the opening of the next is written; a sync that comes along makes it durable, and if
    /// none does until it is needed, one is asked for then. It is durable before any batch of the segment is written;
    /// see `log::segment`.
    fn open_ahead(self: &Rc<Self>) {
        let opening = {
            let state = &mut *self.state.borrow_mut();
            let is_over = state.failed.is_some() || (state.closing && !state.queue.wants_segment);
            if is_over || !state.queue.wants_ahead(self.geometry) {
                return;
            }
            if state.queue.unsealed.len() >= RECENT_MAX {
                // Only a sync over the oldest footer makes room to say where all of them begin.
                state.syncs.wanted = state.syncs.wanted.max(state.queue.unsealed[0].needs.unwrap_or_default());
                None
            } else {
                state.contents.space.prepare_one().map(|segment| {
                    let sequence = state.queue.next_sequence;
                    state.queue.next_sequence += 1;
                    let identity = SegmentIdentity { segment, nonce: self.runtime.random().u64(), sequence };
                    state.queue.ahead = Some(Ahead { identity, needs: None });
                    state.opening(identity, self.runtime.clock().unix_seconds())
                })
            }
        };
        self.start_sync();
        let Some(opening) = opening else { return };
        let shard = self.clone();
        self.runtime.spawn().spawn(Class::Foreground, async move {
            match shard.write_opening(&opening).await {
                Ok(()) => shard.opening_written(),
                Err(error) => {
                    shard.fail(error);
                }
            }
        });
    }

    fn opening_written(self: &Rc<Self>) {
        {
            let state = &mut *self.state.borrow_mut();
            let needs = SyncNumber(state.syncs.started.0 + 1);
            if let Some(ahead) = &mut state.queue.ahead {
                ahead.needs = Some(needs);
            }
            if state.queue.wants_segment {
                state.want_opening_synced();
            }
        }
        self.start_sync();
        self.changed.notify();
    }

    async fn write_opening(&self, opening: &Opening) -> Result<(), DiskError> {
        let geometry = self.geometry;
        let mut buffer = self.disk.allocate(BLOCK);
        buffer.copy_from_slice(&opening.encode());
        self.disk.write(Geometry::offset(geometry.first(opening.identity.segment)), buffer).await
    }

    /// All its batches are applied: once they are durable too, the segment gets its footer.
    pub(super) fn seal(self: &Rc<Self>, filling: Filling) {
        let shard = self.clone();
        self.state.borrow_mut().seals_in_flight += 1;
        self.runtime.spawn().spawn(Class::Foreground, async move {
            if shard.sync_after_now().await.is_err() {
                return;
            }
            let durable = shard.state.borrow().queue.durable;
            let Filling { identity, first_batch, end_batch, records, .. } = filling;
            let sealed_s = shard.runtime.clock().unix_seconds();
            let batches = (end_batch.0 - first_batch.0) as u32;
            let footer = Footer { identity, first_batch, end_batch, durable, batches, sealed_s, records };
            match write_footer(&shard.disk, shard.geometry, &footer).await {
                Ok(()) => {
                    let state = &mut *shard.state.borrow_mut();
                    state.contents.space.sealed(identity.segment);
                    state.queue.footer_written(identity, SyncNumber(state.syncs.started.0 + 1));
                    state.seals_in_flight -= 1;
                }
                Err(error) => {
                    shard.fail(error);
                }
            }
            shard.changed.notify();
            shard.pump();
        });
    }

    /// By a sync that starts after this call: one that runs already may have missed what the caller wrote (rule 8).
    pub(super) async fn sync_after_now(self: &Rc<Self>) -> Result<Span, Refusal> {
        let needed = {
            let state = &mut *self.state.borrow_mut();
            state.check_alive()?;
            let needed = SyncNumber(state.syncs.started.0 + 1);
            state.syncs.wanted = needed;
            needed
        };
        self.start_sync();
        let done = || {
            let state = self.state.borrow();
            match state.check_alive() {
                _ if state.syncs.completed >= needed => Some(Ok(state.syncs.last)),
                Ok(()) => None,
                Err(refusal) => Some(Err(refusal)),
            }
        };
        self.changed.until(done).await
    }

    fn start_sync(self: &Rc<Self>) {
        let covers = {
            let state = &mut *self.state.borrow_mut();
            if state.syncs.running || state.syncs.wanted <= state.syncs.started || state.failed.is_some() {
                return;
            }
            state.syncs.running = true;
            state.syncs.started.0 += 1;
            state.contents.space.sync_started(state.syncs.started);
            state.statistics.syncs += 1;
            // What is applied now was written before the sync started.
            state.queue.applied
        };
        let (shard, began) = (self.clone(), self.runtime.clock().now());
        self.runtime.spawn().spawn(Class::Foreground, async move {
            match shard.disk.sync().await {
                Ok(()) => {
                    let ended = shard.runtime.clock().now();
                    shard.synced(covers, Span { began, ended });
                }
                Err(error) => {
                    shard.fail(error);
                }
            }
        });
    }

    fn synced(self: &Rc<Self>, covers: BatchNumber, span: Span) {
        {
            let state = &mut *self.state.borrow_mut();
            if state.failed.is_some() {
                return;
            }
            state.syncs.running = false;
            state.syncs.completed = state.syncs.started;
            state.syncs.last = span;
            state.queue.durable = state.queue.durable.max(covers);
            state.contents.space.sync_completed(state.syncs.completed);
            state.queue.forget_sealed(state.syncs.completed);
        }
        self.start_sync();
        self.changed.notify();
        self.pump();
    }

    /// Rule 16: no second try. What the disk still holds is known only by reading it again, so nothing is answered
    /// until the shard is opened anew.
    pub(super) fn fail(self: &Rc<Self>, error: DiskError) -> Refusal {
        let refusal = Refusal::Disk { because: error.to_string() };
        let waiting = {
            let state = &mut *self.state.borrow_mut();
            if state.failed.is_none() {
                tracing::error!(%error, "the disk failed; the shard answers nothing until it is opened again");
                state.incarnation = torus_schema::ids::Incarnation(self.runtime.random().u128());
                state.failed = Some(refusal.clone());
            }
            state.queue.take_all()
        };
        waiting.iter().for_each(|append| append.piece.answer(Err(refusal.clone())));
        self.changed.notify();
        self.background.notify();
        refusal
    }
}

impl State {
    fn want_opening_synced(&mut self) {
        let needs = self.queue.ahead.as_ref().and_then(|ahead| ahead.needs);
        self.syncs.wanted = self.syncs.wanted.max(needs.unwrap_or_default());
    }

    fn opening(&self, identity: SegmentIdentity, opened_s: u64) -> Opening {
        let completed = self.syncs.completed;
        let recent = self.queue.unsealed.iter().map(|segment| Recent {
            sequence: segment.sequence,
            first_batch: segment.first_batch,
            sealed: segment.needs.is_some_and(|needs| needs <= completed),
        });
        let (first_batch, durable) = (self.queue.next_batch, self.queue.durable);
        Opening { identity, first_batch, durable, opened_s, recent: recent.collect() }
    }

    pub(super) fn check_alive(&self) -> Result<(), Refusal> {
        self.failed.clone().map_or(Ok(()), Err)
    }

    fn append_done(&mut self, append: &Append, span: Span) {
        if append.piece.done(span) {
            self.no_longer_in_flight(&append.record);
        }
    }

    /// The volume may have been dropped meanwhile.
    pub(super) fn no_longer_in_flight(&mut self, record: &Record) {
        let volume = self.contents.volumes.get_mut(&record.volume()).filter(|_| record.is_of_writer());
        volume.into_iter().for_each(|volume| volume.in_flight = volume.in_flight.saturating_sub(1));
    }
}
