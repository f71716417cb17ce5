//! Clients: each is a process that attaches a volume, works on it with several workers, lets go and takes another, as
//! long as there is work. Some take volumes over by force. What a client does is done by tasks of its process, so that
//! it stands still and ends with it.

use super::{AREA_BLOCKS, AREAS, Volume, Whole};
use crate::simulation::cluster::Client;
use crate::simulation::workload::Workload;
use futures::future::{join_all, select};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use torus_frontends::device::Exports;
use torus_rpc::metadata::memory::MemoryStore;
use torus_rpc::runtime::simulated::{Here, ProcessId};

/// A client as others see it.
#[derive(Clone)]
pub(super) struct Person {
    pub name: String,
    pub process: ProcessId,
    pub store: MemoryStore<Here>,
}

impl Whole {
    pub(super) fn open_for_work(self: &Rc<Self>) {
        self.workload.stop.set(false);
        self.world.set_faults(self.profile.faults);
        let missing = self.profile.clients - self.people.borrow().len();
        (0..missing).for_each(|_| self.hire());
    }

    /// One more client, with a name nobody had before.
    pub(super) fn hire(self: &Rc<Self>) {
        let name = format!("client-{}", self.names_given.replace(self.names_given.get() + 1));
        let by_force = self.world.one_in(3);
        let client = self.cluster.client(&name, by_force);
        self.world.note(|| format!("{name} comes{}", if by_force { ", with force" } else { "" }));
        let process = client.process;
        self.people.borrow_mut().push(Person { name, process, store: client.store.clone() });
        let run = self.clone();
        self.world.spawn(process, async move { run.work(client).await });
    }

    pub(super) fn kill_person(&self, person: &Person) {
        self.world.note(|| format!("{} is killed", person.name));
        self.people.borrow_mut().retain(|other| other.process != person.process);
        self.world.kill(person.process);
    }

    async fn work(&self, client: Client) {
        let _busy = Busy::count(&self.busy);
        while !self.workload.stop.get() {
            let open: Vec<Volume> = self.volumes.borrow().values().filter(|volume| !volume.closed).cloned().collect();
            if !open.is_empty() {
                let number = self.world.random_below(open.len() as u64) as usize;
                self.work_on(&client, &open[number]).await;
            }
            self.world.sleep(Duration::from_millis(self.world.random_below(1500))).await;
        }
        client.exports.release_all().await;
        let mut people = self.people.borrow_mut();
        people.retain(|other| other.process != client.process);
    }

    async fn work_on(&self, client: &Client, volume: &Volume) {
        let name_of = |id| {
            let volumes = self.volumes.borrow();
            volumes.iter().find(|(_, other)| other.id == id).map(|(name, _)| name.clone())
        };
        let Some(name) = name_of(volume.id) else { return };
        let Ok(device) = client.exports.attach(&name).await else { return };
        if self.volumes.borrow().get(&name).is_none_or(|other| other.id != volume.id) {
            return;
        }
        let epoch = u64::from(device.epoch().0);
        self.world.note(|| format!("{} attached {name} in epoch {epoch}", self.world.name_of(client.process)));
        let workload = self.attached(volume, epoch).await;
        let operations = 5 + self.world.random_below(80);
        let workers = AREAS.iter().map(|first| {
            let work = workload.work(&device, *first, AREA_BLOCKS, operations);
            let watch = workload.watch(&device, *first, AREA_BLOCKS);
            // An error ends it: what was not answered may or may not have happened, and the history knows.
            async move { _ = select(pin!(work), pin!(watch)).await }
        });
        join_all(workers).await;
        drop(device);
        if self.world.one_in(2) || workload.was_let_go() {
            client.exports.release_all().await;
        }
    }
}

impl Whole {
    /// A writer serves from now on: what it found is durable wherever it is in sync, and what it did not find is gone.
    pub(super) async fn attached(&self, volume: &Volume, epoch: u64) -> Workload {
        if volume.newest.get() < epoch {
            volume.newest.set(epoch);
            self.attaches.set(self.attaches.get() + 1);
            volume.forget_what_may_be_lost(self.profile.min_replicas);
            volume.powerless.borrow_mut().clear();
            self.count_holders(volume).await;
        }
        volume.workload.in_epoch(epoch)
    }
}

/// Counts down however it ends.
struct Busy(Rc<std::cell::Cell<usize>>);

impl Busy {
    fn count(count: &Rc<std::cell::Cell<usize>>) -> Self {
        count.set(count.get() + 1);
        Self(count.clone())
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}
