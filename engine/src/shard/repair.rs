//! Damaged blocks are fetched from peers, in the background; a client that meets one reads another replica meanwhile.
//!
//! A record is named by (volume, block, version) and never changes, and its checksum was made by the client that wrote
//! it. So a block that a peer gives under the same version with the same checksum is what was lost, whatever epoch it
//! is, whoever owns the volume, and even if that peer is stale. Nothing else is accepted: neither a newer version
//! (then this replica is behind, which is for the volume's owner to mend) nor another content under the same version,
//! which is an alarm and left alone.
//!
//! What comes is appended like a copy by the cleaner: under its version, and it counts exactly if what it replaces
//! still did when it was applied. Until then the damaged place stays; afterwards it is free.

use super::course::Done;
use super::damage::{Conflict, Damaged, FoundBy};
use super::pins::Kept;
use super::queue::Need;
use super::requests::check_range;
use super::{Shard, State};
use crate::index::{Found, Place};
use crate::log::record::{Data, Record};
use crate::log::{BLOCK, Position, SegmentIndex};
use bytes::Bytes;
use std::ops::Range;
use std::rc::Rc;
use torus_rpc::message::{Answer, Envelope, Operation, Refusal, Run, Token};
use torus_rpc::runtime::{Clock, Instant, Peer, Runtime};
use torus_schema::ids::{BlockIndex, Epoch, Version, VolumeId};
use torus_schema::limits::REPAIRS_IN_FLIGHT_MAX;

/// Whose token reads from a peer: any shard of the cluster, in no epoch.
const PEER: &str = "peer";

enum Turn {
    Stop,
    Repair(Vec<Damaged>),
}

/// What became of one damaged block.
enum Outcome {
    Repaired,
    /// It could be read after all.
    Healed,
    /// Nothing asks for it any more.
    Gone,
    NotYet,
}

/// What one peer has.
enum Offer {
    Same(Bytes),
    /// Whole, under the same version, and not what our client wrote.
    Different(u32),
    Nothing,
}

impl<R: Runtime> Shard<R> {
    /// What a peer asks; answered from the index and this disk alone, so that questions never go in circles.
    pub(super) async fn peer_read(
        self: &Rc<Self>,
        volume: VolumeId,
        token: &Token,
        (first, count): (BlockIndex, u32),
        data: bool,
    ) -> Result<Done<R>, Refusal> {
        if !self.key.verify(volume, Epoch(0), PEER, token) {
            return Err(Refusal::BadToken);
        }
        check_range(first, u64::from(count))?;
        let place = {
            let contents = &self.state.borrow().contents;
            let known = contents.volumes.get(&volume).ok_or(Refusal::NotOpen)?;
            let slice = contents.slice_of(volume, first.extent());
            if !known.slices.contains_key(&slice) {
                return Err(Refusal::NotOwner { slice });
            }
            Place { volume, slice, block: first }
        };
        if data {
            return self.read(place, count, self.runtime.clock().now()).await;
        }
        let found = self.state.borrow().contents.index.find_range(place, count);
        let entries = found.iter().filter_map(|found| if let Found::Data(entry) = found { Some(entry) } else { None });
        let checksums = entries.map(|entry| entry.checksum).collect();
        Ok(Answer::Read { runs: super::reads::runs_of(&found), checksums }.into())
    }

    /// Takes note of a block that cannot be read.
    pub(super) fn note_damaged(&self, damaged: Damaged, by: FoundBy) {
        let now = self.runtime.clock().now();
        let state = &mut *self.state.borrow_mut();
        state.statistics.checksum_errors += 1;
        if state.contents.damage.found(damaged, by, now) {
            let Damaged { volume, block, version, position, .. } = damaged;
            let (position, by) = (position.0, by.name());
            tracing::error!(%volume, %block, %version, position, by, "a block cannot be read as it was written");
        }
        self.background.notify();
    }

    /// Reads part of a record block by block, each as often as a client would, and notes what is damaged. The caller
    /// keeps the segment from being reused.
    pub(super) async fn note_damage_in(&self, data: &Data, run: Range<usize>, by: FoundBy) -> usize {
        let mut count = 0;
        for number in run {
            let damaged = block_of(data, number);
            if self.read_verified(damaged.position, &[damaged.checksum]).await.is_none() {
                self.note_damaged(damaged, by);
                count += 1;
            }
        }
        count
    }

    pub(super) async fn repair_forever(self: Rc<Self>) {
        loop {
            match self.next_repairs().await {
                Turn::Stop => break,
                Turn::Repair(damaged) => {
                    futures::future::join_all(damaged.iter().map(|damaged| self.repair(damaged))).await;
                }
            }
        }
        self.peers.close_links();
        self.state.borrow_mut().repairer_stopped = true;
        self.changed.notify();
    }

    async fn next_repairs(self: &Rc<Self>) -> Turn {
        loop {
            let now = self.runtime.clock().now();
            let (turn, next_due) = {
                let state = &mut *self.state.borrow_mut();
                let damage = &mut state.contents.damage;
                let due = damage.take_due(now, REPAIRS_IN_FLIGHT_MAX);
                let next_due = damage.next_due();
                let turn =
                    if state.is_ending() { Some(Turn::Stop) } else { (!due.is_empty()).then_some(Turn::Repair(due)) };
                (turn, next_due)
            };
            if let Some(turn) = turn {
                return turn;
            }
            self.peers.close_links();
            self.wait_for_background(next_due).await;
        }
    }

    /// Until there may be something to do in the background, or the time has come.
    pub(super) async fn wait_for_background(&self, time: Option<Instant>) {
        let mut asked = false;
        let told = self.background.until(|| std::mem::replace(&mut asked, true).then_some(()));
        let Some(time) = time else { return told.await };
        let sleep = self.runtime.clock().sleep(time.since(self.runtime.clock().now()));
        futures::pin_mut!(told, sleep);
        futures::future::select(told, sleep).await;
    }

    async fn repair(self: &Rc<Self>, damaged: &Damaged) {
        let outcome = self.try_repair(damaged).await;
        let now = self.runtime.clock().now();
        {
            let state = &mut *self.state.borrow_mut();
            let contents = &mut state.contents;
            match outcome {
                Outcome::Repaired => contents.damage.repaired(damaged),
                Outcome::Healed => {
                    contents.damage.gone(damaged);
                    contents.space.unstick(self.geometry.segment_of(damaged.position));
                }
                Outcome::Gone => contents.damage.gone(damaged),
                Outcome::NotYet => contents.damage.not_repaired(damaged, now),
            }
        }
        self.changed.notify();
    }

    async fn try_repair(self: &Rc<Self>, damaged: &Damaged) -> Outcome {
        let Some(position) = self.state.borrow().standing(damaged) else { return Outcome::Gone };
        {
            let _reader = self.hold(self.geometry.segment_of(position));
            if self.read_verified(position, &[damaged.checksum]).await.is_some() {
                return Outcome::Healed;
            }
        }
        for peer in self.other_holders(damaged.volume, damaged.block) {
            match self.offer_of(&peer, damaged).await {
                Offer::Nothing => {}
                Offer::Different(checksum) => self.note_conflict(damaged, checksum, &peer),
                Offer::Same(payload) => return self.append_repaired(damaged, payload, &peer).await,
            }
        }
        Outcome::NotYet
    }

    pub(super) fn other_holders(&self, volume: VolumeId, block: BlockIndex) -> Vec<Peer> {
        let state = self.state.borrow();
        let layout = state.contents.volumes.get(&volume).and_then(|volume| volume.layout.as_ref());
        let Some(layout) = layout else { return Vec::new() };
        self.peers.others(layout.ring_slices, layout.placement.slice_of(block.extent()))
    }

    /// Signed for this volume, for what any shard may ask of another.
    pub(super) fn peer_request(
        &self,
        volume: VolumeId,
        first: BlockIndex,
        count: u32,
        data: bool,
    ) -> (Envelope, Operation) {
        let token = self.key.sign(volume, Epoch(0), PEER);
        (Envelope { volume, ..Envelope::NONE }, Operation::PeerRead { token, first, count, data })
    }

    /// `None`: the shard is closed or has failed meanwhile, and what is waited for is of no use any more. What was
    /// submitted goes on all the same.
    pub(super) async fn unless_ending<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let ending = self.background.until(|| self.state.borrow().is_ending().then_some(()));
        futures::pin_mut!(work, ending);
        match futures::future::select(work, ending).await {
            futures::future::Either::Left((done, _)) => Some(done),
            futures::future::Either::Right(_) => None,
        }
    }

    async fn offer_of(&self, peer: &Peer, damaged: &Damaged) -> Offer {
        let (envelope, operation) = self.peer_request(damaged.volume, damaged.block, 1, true);
        let answer = match self.unless_ending(self.ask_peer(peer, &envelope, &operation)).await {
            None => return Offer::Nothing,
            Some(Ok(answer)) => answer,
            Some(Err(error)) => {
                tracing::debug!(node = %peer.node, shard = %peer.shard, %error, "a peer cannot be asked");
                return Offer::Nothing;
            }
        };
        let (Answer::Read { runs, checksums }, payload) = answer else { return Offer::Nothing };
        judge(damaged, &runs, &checksums, payload)
    }

    pub(super) fn note_conflict(&self, ours: &Damaged, checksum_there: u32, peer: &Peer) {
        let &Damaged { volume, block, version, checksum: checksum_here, .. } = ours;
        let since = self.runtime.clock().now();
        let peer = peer.clone();
        let (node, shard) = (peer.node, peer.shard);
        let conflict = Conflict { volume, block, version, checksum_here, checksum_there, peer, since };
        if self.state.borrow_mut().contents.damage.conflict(conflict) {
            tracing::error!(
                %volume, %block, %version, checksum_here, checksum_there, peer_node = %node, peer_shard = %shard,
                "two different copies of one version: neither is touched; compare them with the application's data"
            );
        }
    }

    async fn append_repaired(self: &Rc<Self>, damaged: &Damaged, payload: Bytes, peer: &Peer) -> Outcome {
        let &Damaged { volume, block, version, checksum, .. } = damaged;
        let (from, flush_point) = {
            let state = self.state.borrow();
            let Some(from) = state.standing(damaged) else { return Outcome::Gone };
            (from, state.flush_point(volume))
        };
        let data = Data {
            volume,
            first: block,
            version,
            flush_point,
            position: Position(0),
            checksums: [checksum].as_slice().into(),
        };
        // Like a note it gives as much space back as it takes, so it may use what data may not.
        let appended = self.submit(Need::Note, Record::Data(data), payload, Some(vec![from]));
        let result = match appended {
            // Not waited for at the end: there may be no space any more, and nobody who makes some.
            Ok(waiting) => self.unless_ending(waiting.done()).await.map_or(Ok(()), |done| done.map(drop)),
            Err(refusal) => Err(refusal),
        };
        match result {
            Ok(()) => {
                tracing::info!(%volume, %block, %version, from_node = %peer.node, "repaired a block");
                Outcome::Repaired
            }
            Err(error) => {
                tracing::warn!(%volume, %block, %error, "a repaired block could not be appended");
                Outcome::NotYet
            }
        }
    }

    /// Keeps a segment from being reused while it is held.
    pub(super) fn hold(self: &Rc<Self>, segment: SegmentIndex) -> super::reads::Readers<R> {
        super::reads::Readers::of(self, [segment].into())
    }
}

/// Block `number` of a record, as it is known should it turn out to be damaged.
pub(super) fn block_of(data: &Data, number: usize) -> Damaged {
    Damaged {
        volume: data.volume,
        block: BlockIndex(data.first.0 + number as u64),
        version: data.version,
        checksum: data.checksums[number],
        position: Position(data.position.0 + number as u32),
    }
}

/// Only what is under the same version counts, and only if it is what its checksum says.
fn judge(damaged: &Damaged, runs: &[Run], checksums: &[u32], payload: Bytes) -> Offer {
    let same = matches!(runs, [Run { count: 1, version, data: true }] if *version == damaged.version);
    let ([told], BLOCK) = (checksums, payload.len()) else { return Offer::Nothing };
    if !same || crc32c::crc32c(&payload) != *told {
        return Offer::Nothing;
    }
    if *told == damaged.checksum { Offer::Same(payload) } else { Offer::Different(*told) }
}

impl State {
    /// Where the version of the block stands now, if it is still needed.
    pub(super) fn standing(&self, damaged: &Damaged) -> Option<Position> {
        let &Damaged { volume, block, version, checksum, .. } = damaged;
        let slice = self.contents.slice_of(volume, block.extent());
        if let Found::Data(entry) = self.contents.index.find(Place { volume, slice, block })
            && (entry.version, entry.checksum) == (version, checksum)
        {
            return Some(entry.position);
        }
        self.contents.volumes.get(&volume)?.pins.position(Kept { block, version })
    }

    /// Background work should stop.
    pub(super) fn is_ending(&self) -> bool {
        self.failed.is_some() || self.closing
    }
}

/// One version of a block in what a peer told of a range.
pub(super) fn versions_of(runs: &[Run], checksums: &[u32]) -> Option<Vec<(Version, Option<u32>)>> {
    let mut checksums = checksums.iter();
    let mut versions = Vec::new();
    for run in runs {
        for _ in 0..run.count.min(torus_schema::limits::BLOCKS_PER_FRAME_MAX as u32) {
            let checksum = if run.data { Some(*checksums.next()?) } else { None };
            versions.push((run.version, checksum));
        }
    }
    Some(versions)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn damaged(payload: &[u8]) -> Damaged {
        let version = Version::new(Epoch(1), 5);
        let checksum = crc32c::crc32c(payload);
        Damaged {
            volume: VolumeId::from_bytes([1; 16]),
            block: BlockIndex(3),
            version,
            checksum,
            position: Position(9),
        }
    }

    #[test]
    fn only_the_same_version_with_the_same_checksum_is_taken() {
        let (ours, other) = (Bytes::from(vec![7; BLOCK]), Bytes::from(vec![8; BLOCK]));
        let lost = damaged(&ours);
        let run = Run { count: 1, version: lost.version, data: true };
        let offer = |run: Run, checksum: u32, payload: &Bytes| judge(&lost, &[run], &[checksum], payload.clone());
        assert!(matches!(offer(run, lost.checksum, &ours), Offer::Same(bytes) if bytes == ours));
        let newer = Run { version: Version::new(Epoch(1), 6), ..run };
        assert!(matches!(offer(newer, lost.checksum, &ours), Offer::Nothing));
        assert!(matches!(offer(run, crc32c::crc32c(&other), &other), Offer::Different(_)));
        assert!(matches!(offer(run, lost.checksum, &other), Offer::Nothing), "damaged on its way");
        assert!(matches!(offer(run, crc32c::crc32c(&other), &ours), Offer::Nothing), "not what its checksum says");
        assert!(matches!(judge(&lost, &[run], &[lost.checksum], Bytes::new()), Offer::Nothing));
        assert!(matches!(judge(&lost, &[Run { data: false, ..run }], &[], Bytes::new()), Offer::Nothing));
    }
}
