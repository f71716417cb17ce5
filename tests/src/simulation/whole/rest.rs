//! What must hold when nothing is wrong any more: everything that waited goes on, every replica of every volume comes
//! back in sync by itself, all that are in sync have the same, nothing is kept in memory that is not needed, what was
//! deleted is gone, and what has no record is still there.

use super::{AREA_BLOCKS, AREAS, Volume, Whole};
use crate::simulation::cluster::{Client, KEY, Runtime, joined};
use bytes::Bytes;
use std::rc::Rc;
use std::time::Duration;
use torus_frontends::device::{Exports, VolumeError};
use torus_frontends::volume::AttachedVolume;
use torus_rpc::control::HeldVolume;
use torus_rpc::message::{Answer, Envelope, Operation, Refusal};
use torus_rpc::metadata::Metadata;
use torus_rpc::token::ClusterKey;
use torus_schema::ids::{BlockIndex, Epoch, ShardId, Version, VolumeId};
use torus_schema::records::{StatusRecord, VolumeRecord, decode, keys};
use torus_schema::ring::placement::Placement;

/// Requests that waited go on within it: leases run out, disks that vanished are looked for every minute.
const REST_WITHIN: Duration = Duration::from_secs(180);
/// A repair that failed is tried again after ten minutes at the latest.
const WHOLE_WITHIN: Duration = Duration::from_secs(1500);
/// A damaged block is taken from a peer when somebody has asked for it.
const REPAIRED_WITHIN: Duration = Duration::from_secs(120);
const BLOCK_BYTES: u64 = 4096;
/// More than when nothing had been done yet: repair owners may look at something just then, and each that ever attached
/// anything follows the volumes' records from then on.
const TASKS_MORE_PER_NODE: usize = 8;

/// What one replica has of a block: version and checksum; `None`: it reads as zeros.
type Held = Option<(Version, u32)>;

impl Whole {
    /// All clients end their work and let go.
    pub(super) async fn come_to_rest(self: &Rc<Self>) -> Result<(), String> {
        self.workload.stop.set(true);
        let deadline = self.world.now().after(REST_WITHIN);
        while self.busy.get() > 0 {
            if self.world.now() >= deadline {
                let waiting: Vec<_> = self.people.borrow().iter().map(|person| person.name.clone()).collect();
                return Err(format!("{waiting:?} still wait {REST_WITHIN:?} after nothing is wrong any more"));
            }
            self.world.sleep(Duration::from_millis(100)).await;
        }
        self.world.note(|| "all clients are done".to_string());
        Ok(())
    }

    pub(super) async fn status(&self, volume: VolumeId) -> StatusRecord {
        let key = keys::status(volume);
        let entry = self.cluster.store.get(&key).await.expect("the operator reaches the store");
        entry.map(|entry| decode(&key, &entry.value).expect("ours")).unwrap_or_default()
    }

    pub(super) async fn all_in_sync(&self) -> bool {
        let volumes: Vec<VolumeId> = self.volumes.borrow().values().map(|volume| volume.id).collect();
        for volume in volumes {
            if !self.status(volume).await.stale.is_empty() {
                return false;
            }
        }
        true
    }

    /// How long that took. Either clients have the volumes attached meanwhile, or nobody does.
    pub(super) async fn become_whole(self: &Rc<Self>) -> Result<Duration, String> {
        let began = self.world.now();
        let client = self.cluster.client(&self.new_name(), false);
        let mut attached = Vec::new();
        if !self.profile.left_alone {
            for name in self.names() {
                let (device, volume) = (self.attach(&client, &name).await?, self.volumes.borrow()[&name].clone());
                self.attached(&volume, u64::from(device.epoch().0)).await;
                attached.push(device);
            }
        }
        self.wait_until_in_sync().await?;
        drop(attached);
        client.exports.release_all().await;
        self.world.kill(client.process);
        Ok(self.world.now().since(began))
    }

    async fn wait_until_in_sync(&self) -> Result<(), String> {
        let began = self.world.now();
        while !self.all_in_sync().await {
            let passed = self.world.now().since(began);
            if passed > WHOLE_WITHIN {
                let mut left = Vec::new();
                let volumes = self.volumes.borrow().clone();
                for (name, volume) in volumes {
                    left.push(format!("{name}: {:?}", self.status(volume.id).await.stale));
                }
                return Err(format!("not in sync after {passed:?}: {}", left.join("; ")));
            }
            self.world.sleep(Duration::from_millis(200)).await;
        }
        self.world.note(|| "every replica is in sync".to_string());
        Ok(())
    }

    fn new_name(&self) -> String {
        format!("client-{}", self.names_given.replace(self.names_given.get() + 1))
    }

    fn names(&self) -> Vec<String> {
        self.volumes.borrow().keys().cloned().collect()
    }

    async fn attach(&self, client: &Client, name: &str) -> Result<AttachedVolume<Runtime>, String> {
        let deadline = self.world.now().after(REST_WITHIN);
        loop {
            match client.exports.attach(name).await {
                Ok(device) => return Ok(device),
                Err(VolumeError::Attached { .. }) if self.world.now() < deadline => {}
                Err(VolumeError::NotReady { .. }) if self.world.now() < deadline => {}
                Err(error) => return Err(format!("{name} cannot be attached though nothing is wrong: {error}")),
            }
            self.world.sleep(Duration::from_millis(500)).await;
        }
    }

    /// By a new client: it reads everything from each replica in turn, then the replicas are compared behind its back.
    pub(super) async fn check_everything(self: &Rc<Self>) -> Result<(), String> {
        let client = self.cluster.client(&self.new_name(), false);
        for name in self.names() {
            let volume = self.volumes.borrow()[&name].clone();
            let device = self.attach(&client, &name).await?;
            let workload = self.attached(&volume, u64::from(device.epoch().0)).await;
            for _ in 0..4 {
                for first in AREAS {
                    let read = workload.read(&device, first * BLOCK_BYTES, AREA_BLOCKS * BLOCK_BYTES).await;
                    read.map_err(|error| format!("{name} cannot be read though nothing is wrong: {error}"))?;
                }
            }
            workload.flush(&device).await.map_err(|error| format!("{name} cannot be flushed: {error}"))?;
            // A replica that lost everything may have been noticed by this attach only.
            self.wait_until_in_sync().await?;
            self.compare(&name, &volume).await?;
        }
        client.exports.release_all().await;
        self.world.kill(client.process);
        self.check_held().await
    }

    async fn compare(&self, name: &str, volume: &Volume) -> Result<(), String> {
        let ring = self.cluster.ring().await;
        let key = keys::volume(volume.id);
        let entry = self.cluster.store.get(&key).await.expect("available").ok_or(format!("{name} has no record"))?;
        let record: VolumeRecord = decode(&key, &entry.value).expect("ours");
        let placement = Placement::new(record.placement, record.width, ring.slices());
        for block in AREAS.iter().flat_map(|first| *first..first + AREA_BLOCKS).map(BlockIndex) {
            let slice = placement.slice_of(block.extent());
            let mut expected: Option<(ShardId, Held)> = None;
            for shard in ring.replicas(slice, record.replicas) {
                let node = ring.node(shard.node).expect("of the ring").id;
                let held = self.held_of(node, *shard, volume.id, block).await?;
                match &expected {
                    None => expected = Some((*shard, held)),
                    Some((other, first)) if *first != held => {
                        return Err(format!(
                            "{name}, block {block}: shard {other} has {first:?}, shard {shard} has {held:?}, and both \
                             are in sync"
                        ));
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(())
    }

    async fn held_of(
        &self,
        node: torus_schema::ids::NodeId,
        shard: ShardId,
        volume: VolumeId,
        block: BlockIndex,
    ) -> Result<Held, String> {
        let serving = self.cluster.place(node, shard.shard).shard.borrow().clone().expect("all nodes run");
        let token = ClusterKey::from_hex(KEY).expect("32 bytes").sign(volume, Epoch(0), "peer");
        let operation = Operation::PeerRead { token, first: block, count: 1, data: true };
        let deadline = self.world.now().after(REPAIRED_WITHIN);
        let (reply, chunks) = loop {
            let envelope = Envelope { volume, ..Envelope::NONE };
            let (reply, chunks) = serving.handle(envelope, operation.clone(), Bytes::new()).await;
            let damaged = matches!(reply.answer, Answer::Refused(Refusal::Damaged { .. }));
            if !damaged || self.world.now() >= deadline {
                break (reply, chunks);
            }
            self.world.sleep(Duration::from_secs(1)).await;
        };
        let Answer::Read { runs, checksums } = reply.answer else {
            return Err(format!("shard {shard}, in sync, block {block}: {:?}", reply.answer));
        };
        let bytes = joined(&chunks);
        match checksums.first() {
            Some(checksum) if crc32c::crc32c(&bytes) != *checksum => {
                Err(format!("shard {shard}, block {block}: the data is not what its checksum was made of"))
            }
            Some(checksum) => Ok(Some((runs[0].version, *checksum))),
            None => Ok(None),
        }
    }

    /// What was deleted is gone from every disk, and the orphan is on as many as ever.
    async fn check_held(&self) -> Result<(), String> {
        let deadline = self.world.now().after(REST_WITHIN);
        loop {
            let found = self.held_wrongly();
            match found {
                None => return Ok(()),
                Some(because) if self.world.now() >= deadline => return Err(because),
                Some(_) => self.world.sleep(Duration::from_secs(1)).await,
            }
        }
    }

    fn held_wrongly(&self) -> Option<String> {
        let mut orphans = 0;
        let nodes = self.cluster.nodes.iter().enumerate();
        for (number, place) in nodes.flat_map(|(number, node)| node.shards.iter().map(move |place| (number, place))) {
            let shard = place.shard.borrow().clone().expect("all nodes run");
            let Ok(held) = shard.held(None) else { return Some(format!("the disk of {} is away", place.address)) };
            let weak = Some(number) == self.profile.weak;
            let deleted = self.deleted.borrow();
            // A disk that lost what it had durably may have lost that a volume was deleted, and the record of the deletion
            // went when this node had confirmed it. Without one nothing is freed (rule 17), so that it is an orphan
            // there; but none that could be taken for data: what is older than a loss is refused (rule 15).
            let there = |held: &&HeldVolume| !weak || held.slices.iter().any(|group| group.valid);
            if let Some(found) = held.iter().filter(there).find(|held| deleted.contains(&held.volume)) {
                return Some(format!(
                    "{} still has volume {}, which was deleted: {found:?}",
                    place.address, found.volume
                ));
            }
            if !weak {
                orphans += held.iter().filter(|held| Some(held.volume) == self.orphan.get()).count();
            }
        }
        let before = self.orphans_at_first.get();
        if before == 0 {
            // The first count is what is compared with.
            self.orphans_at_first.set(orphans);
            return None;
        }
        (orphans != before).then(|| format!("{orphans} shards have the volume without a record, {before} did before"))
    }

    /// Nobody works: whatever is left beyond what runs all the time is never given back.
    pub(super) async fn check_memory(&self) -> Result<usize, String> {
        let at_first = self.tasks_at_first.get();
        let most = at_first + TASKS_MORE_PER_NODE * self.profile.nodes;
        let deadline = self.world.now().after(REST_WITHIN);
        loop {
            let tasks = self.world.task_count();
            if tasks <= most {
                return Ok(tasks.saturating_sub(at_first));
            }
            if self.world.now() >= deadline {
                let because = format!("{tasks} tasks at rest, {at_first} before anything was done");
                let most_of = self.world.tasks_by_type();
                return Err(format!(
                    "{because}, expected at most {most}; of them: {:#?}",
                    &most_of[..most_of.len().min(12)]
                ));
            }
            self.world.sleep(Duration::from_secs(1)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Profile;
    use super::*;
    use torus_rpc::runtime::simulated::World;

    /// In a cluster in which nothing was done yet, of nodes of which none is excused.
    fn with_whole(test: impl AsyncFnOnce(Rc<Whole>) + 'static) {
        let world = World::new(1);
        let here = world.clone();
        world.block_on(async move {
            let profile = Profile { weak: None, ..Profile::draw(&here) };
            let run = Whole::start(here, profile).await;
            run.check_held().await.expect("nothing was deleted");
            test(run).await;
        });
        world.close();
    }

    fn some_shard_with(run: &Whole, volume: VolumeId) -> crate::simulation::cluster::SimulatedShard {
        let shards = run.cluster.nodes.iter().flat_map(|node| &node.shards);
        let mut shards = shards.map(|place| place.shard.borrow().clone().expect("it runs"));
        let has = |shard: &crate::simulation::cluster::SimulatedShard| {
            shard.held(None).expect("its disk is there").iter().any(|held| held.volume == volume)
        };
        shards.find(has).expect("somebody has it")
    }

    #[test]
    fn a_freed_orphan_is_found() {
        with_whole(async |run| {
            let orphan = run.orphan.get().expect("there is one");
            some_shard_with(&run, orphan).drop_volume(orphan).await.expect("the disk is well");
            let found = run.check_held().await.expect_err("one has gone");
            assert!(found.contains("without a record"), "{found}");
        });
    }

    #[test]
    fn a_deleted_volume_that_is_still_there_is_found() {
        with_whole(async |run| {
            let volume = run.volumes.borrow().values().next().expect("there is one").id;
            run.deleted.borrow_mut().push(volume);
            let found = run.check_held().await.expect_err("it is everywhere");
            assert!(found.contains("which was deleted"), "{found}");
        });
    }

    #[test]
    fn tasks_that_nobody_ends_are_found() {
        with_whole(async |run| {
            run.check_memory().await.expect("nothing was done yet");
            let most = TASKS_MORE_PER_NODE * run.profile.nodes;
            (0..=most).for_each(|_| run.world.spawn(run.operator, std::future::pending()));
            run.check_memory().await.expect_err("they never end");
        });
    }

    #[test]
    fn replicas_that_differ_are_found() {
        with_whole(async |run| {
            let name = run.names()[0].clone();
            let volume = run.volumes.borrow()[&name].clone();
            run.compare(&name, &volume).await.expect("all are empty");
            let client = run.cluster.client("client", false);
            let device = run.attach(&client, &name).await.expect("all is well");
            let workload = run.attached(&volume, u64::from(device.epoch().0)).await;
            workload.work(&device, AREAS[0], AREA_BLOCKS, 40).await.expect("all is well");
            run.compare(&name, &volume).await.expect("all have the same");
            let place = run.cluster.nodes.iter().flat_map(|node| &node.shards).find(|place| {
                let shard = place.shard.borrow().clone().expect("it runs");
                shard.held(Some(volume.id)).expect("its disk is there").iter().any(|held| held.blocks > 0)
            });
            let shard = place.expect("somebody has data").shard.borrow().clone().expect("it runs");
            shard.drop_volume(volume.id).await.expect("the disk is well");
            run.compare(&name, &volume).await.expect_err("one has nothing");
        });
    }
}
