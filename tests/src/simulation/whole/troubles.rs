//! What goes wrong: one trouble after the other, each beside those that still last.

use super::Whole;
use super::people::Person;
use super::profile::Trouble;
use crate::simulation::cluster::{Disk, SEGMENT_BYTES};
use std::rc::Rc;
use std::time::Duration;
use torus_engine::disk::simulated::Damage;
use torus_engine::log::SEGMENTS_START_BLOCK;
use torus_rpc::metadata::memory::{Lost, MemoryStore};
use torus_rpc::runtime::simulated::{Here, ProcessId};

const BLOCK_BYTES: u64 = 4096;
/// Of a segment as small as the simulation's.
const FOOTER_BLOCKS_MAX: u64 = 4;

impl Whole {
    /// For as long as the profile says; what was begun then may last a little longer.
    pub(super) async fn make_trouble(self: &Rc<Self>) {
        let end = self.world.now().after(self.profile.trouble_for);
        loop {
            self.world.sleep(self.some_of(self.profile.trouble_every)).await;
            if self.world.now() >= end || self.workload.failed.borrow().is_some() {
                return;
            }
            let kinds = &self.profile.troubles;
            if kinds.is_empty() {
                continue;
            }
            let trouble = kinds[self.world.random_below(kinds.len() as u64) as usize];
            let run = self.clone();
            self.troubles.set(self.troubles.get() + 1);
            self.lasting.set(self.lasting.get() + 1);
            self.world.spawn(self.operator, async move {
                run.make(trouble).await;
                run.lasting.set(run.lasting.get() - 1);
            });
        }
    }

    /// Nothing is wrong any more when it returns, but for what has still to get well by itself.
    pub(super) async fn heal(self: &Rc<Self>) {
        self.healing.set(true);
        self.world.note(|| "nothing goes wrong any more".to_string());
        while self.lasting.get() > 0 {
            self.world.sleep(Duration::from_millis(50)).await;
        }
        self.world.heal_network();
        self.healing.set(false);
        for node in 0..self.cluster.nodes.len() {
            if !self.cluster.is_running(node) {
                self.start_node(node).await;
            }
        }
    }

    pub(super) fn some_of(&self, most: Duration) -> Duration {
        Duration::from_micros(1 + self.world.random_below(most.as_micros() as u64))
    }

    /// A part of so many milliseconds, cut short when all is to become well.
    pub(super) async fn for_a_while(&self, most_ms: u64) {
        self.until_healing(self.some_of(Duration::from_millis(most_ms))).await;
    }

    async fn until_healing(&self, most: Duration) {
        let end = self.world.now().after(most);
        while self.world.now() < end && !self.healing.get() {
            let left = end.since(self.world.now()).min(Duration::from_millis(500));
            self.world.sleep(left).await;
        }
    }

    fn some_node(&self) -> usize {
        self.profile.weak.unwrap_or_else(|| self.world.random_below(self.profile.nodes as u64) as usize)
    }

    fn any<T: Clone>(&self, of: &[T]) -> Option<T> {
        (!of.is_empty()).then(|| of[self.world.random_below(of.len() as u64) as usize].clone())
    }

    pub(super) fn some_person(&self) -> Option<Person> {
        self.any(&self.people.borrow())
    }

    /// Of all that run, the metadata store not counted.
    pub(super) fn processes(&self) -> Vec<ProcessId> {
        let nodes = self.cluster.nodes.iter().filter_map(|node| node.process.get());
        nodes.chain(self.people.borrow().iter().map(|person| person.process)).collect()
    }

    fn some_disk(&self, node: usize) -> Disk {
        let shards = &self.cluster.nodes[node].shards;
        let place = &shards[self.world.random_below(shards.len() as u64) as usize];
        place.disk.borrow().clone()
    }

    fn stores(&self) -> Vec<MemoryStore<Here>> {
        let nodes = self.cluster.nodes.iter().filter_map(|node| node.store.borrow().clone());
        nodes.chain(self.people.borrow().iter().map(|person| person.store.clone())).collect()
    }

    async fn make(self: &Rc<Self>, trouble: Trouble) {
        let node = self.some_node();
        self.world.note(|| format!("TROUBLE {trouble:?} (node-{node}, if it concerns one)"));
        match trouble {
            Trouble::KillNode => self.stop_for_a_while(node, false).await,
            Trouble::PowerOfNode => self.stop_for_a_while(node, true).await,
            Trouble::PowerOfAll => self.fail_all_power().await,
            Trouble::EmptyDisk => self.empty_disk(node).await,
            Trouble::PauseNode => {
                let _ails = self.ails(node);
                let process = self.cluster.nodes[node].process.get();
                self.pause(process, 12_000).await;
            }
            Trouble::PauseClient => {
                let process = self.some_person().map(|person| person.process);
                self.pause(process, 30_000).await;
            }
            Trouble::SlowNode => self.slow_node(node).await,
            Trouble::CutPair => self.cut_pair(false).await,
            Trouble::CutPairOneWay => self.cut_pair(true).await,
            Trouble::Isolate => self.isolate(node).await,
            Trouble::DiskGone | Trouble::DiskErrors | Trouble::Damage if self.starting.get() => {}
            Trouble::DiskErrors => self.disk_errors(node).await,
            Trouble::DiskGone => {
                let _ails = self.ails(node);
                let disk = self.some_disk(node);
                disk.vanish();
                self.for_a_while(20_000).await;
                disk.reappear();
            }
            Trouble::Damage => {
                let _ails = self.ails(node);
                self.damage(node);
            }
            Trouble::KillClient => {
                if let Some(person) = self.some_person() {
                    self.kill_person(&person);
                    self.for_a_while(3000).await;
                    self.hire();
                }
            }
            Trouble::StoreAwayFromOne => {
                let store = self.any(&self.stores());
                self.keep_away(store.as_slice(), 25_000).await;
            }
            Trouble::StoreAwayFromAll => self.keep_away(&self.stores(), 15_000).await,
            Trouble::StoreSlow => {
                self.cluster.store_slower_by.set(Duration::from_millis(500));
                self.for_a_while(10_000).await;
                self.cluster.store_slower_by.set(Duration::ZERO);
            }
            Trouble::OutcomeUnknown => {
                let lost = if self.world.one_in(2) { Lost::Answer } else { Lost::Request };
                self.any(&self.stores()).into_iter().for_each(|store| store.lose_next(lost));
            }
            Trouble::Delete => self.delete_one().await,
            Trouble::PowerAfterResync => self.power_after_resync(node).await,
            Trouble::PowerAfterAttach => self.power_after_attach(node).await,
            Trouble::Split => self.split(node).await,
            Trouble::LetGo => self.let_go(node).await,
        }
    }

    /// Its power fails, as seen by who checks what was promised.
    fn powerless(&self, node: usize) {
        for volume in self.volumes.borrow().values() {
            volume.powerless.borrow_mut().insert(node);
            volume.forget_what_may_be_lost(self.profile.min_replicas);
            self.world.note(|| format!("may be lost, but for what {:?} have", volume.holders.borrow()));
        }
    }

    async fn stop_for_a_while(&self, node: usize, power: bool) {
        self.stop_for(node, power, self.some_of(Duration::from_secs(15))).await;
    }

    pub(super) async fn stop_for(&self, node: usize, power: bool, pause: Duration) {
        if !self.cluster.is_running(node) || self.starting.replace(true) {
            return;
        }
        let _ails = self.ails(node);
        self.stop(node, power);
        self.starting.set(false);
        self.until_healing(pause).await;
        self.start_again(node).await;
    }

    pub(super) fn stop(&self, node: usize, power: bool) {
        self.world.note(|| format!("node-{node} is {}", if power { "without power" } else { "killed" }));
        match power {
            true => {
                self.cluster.fail_power(node);
                self.powerless(node);
            }
            false => self.cluster.kill_node(node),
        }
    }

    /// One node at a time is started, and stopped only while none is: a start is one thing here.
    pub(super) async fn start_again(&self, node: usize) {
        while self.starting.replace(true) {
            self.world.sleep(Duration::from_millis(1)).await;
        }
        if !self.cluster.is_running(node) {
            self.start_node(node).await;
        }
        self.starting.set(false);
    }

    pub(super) async fn fail_all_power(self: &Rc<Self>) {
        while self.starting.replace(true) {
            self.world.sleep(Duration::from_millis(1)).await;
        }
        let running: Vec<usize> = (0..self.profile.nodes).filter(|node| self.cluster.is_running(*node)).collect();
        let _ail: Vec<_> = running.iter().map(|node| self.ails(*node)).collect();
        running.iter().for_each(|node| self.stop(*node, true));
        self.starting.set(false);
        let people = self.people.borrow().clone();
        let killed: Vec<_> = people.iter().filter(|_| self.world.one_in(2)).collect();
        killed.iter().for_each(|person| self.kill_person(person));
        for node in running {
            self.for_a_while(3000).await;
            self.start_again(node).await;
        }
        killed.iter().for_each(|_| self.hire());
    }

    /// Only when nobody counts on it alone: every replica of everything is in sync.
    async fn empty_disk(&self, node: usize) {
        if !self.cluster.is_running(node) || !self.all_in_sync().await || self.starting.replace(true) {
            return;
        }
        let _ails = self.ails(node);
        self.stop(node, true);
        self.cluster.replace_disk(node).await;
        self.starting.set(false);
        self.world.note(|| format!("node-{node} gets empty disks"));
        self.start_again(node).await;
    }

    async fn pause(&self, process: Option<ProcessId>, most_ms: u64) {
        let Some(process) = process else { return };
        self.world.note(|| format!("{} stands still", self.world.name_of(process)));
        self.world.pause(process);
        self.for_a_while(most_ms).await;
        self.world.resume(process);
        self.world.note(|| format!("{} goes on", self.world.name_of(process)));
    }

    async fn slow_node(&self, node: usize) {
        let Some(process) = self.cluster.nodes[node].process.get() else { return };
        let _ails = self.ails(node);
        self.world.slow_down(process, 1 + self.world.random_below(4), self.some_of(Duration::from_millis(800)));
        self.for_a_while(10_000).await;
        self.world.slow_down(process, 0, Duration::ZERO);
    }

    async fn cut_pair(&self, one_way: bool) {
        let processes = self.processes();
        let (Some(a), Some(b)) = (self.any(&processes), self.any(&processes)) else { return };
        if a == b {
            return;
        }
        let nodes = (0..self.profile.nodes).filter(|node| {
            let process = self.cluster.nodes[*node].process.get();
            process == Some(a) || process == Some(b)
        });
        let _ail: Vec<_> = nodes.map(|node| self.ails(node)).collect();
        self.world.note(|| format!("from {} nothing reaches {}", self.world.name_of(a), self.world.name_of(b)));
        match one_way {
            true => self.world.cut_one_way(a, b),
            false => self.world.cut(a, b),
        }
        self.for_a_while(15_000).await;
        self.world.heal(a, b);
    }

    /// From all other processes; it still reaches the metadata store, half of the times.
    async fn isolate(&self, node: usize) {
        let Some(process) = self.cluster.nodes[node].process.get() else { return };
        let others: Vec<_> = self.processes().into_iter().filter(|other| *other != process).collect();
        let _ails = self.ails(node);
        others.iter().for_each(|other| self.world.cut(process, *other));
        let store = self.cluster.nodes[node].store.borrow().clone().filter(|_| self.world.one_in(2));
        self.keep_away(store.as_slice(), 15_000).await;
        others.iter().for_each(|other| self.world.heal(process, *other));
    }

    pub(super) async fn keep_away(&self, stores: &[MemoryStore<Here>], most_ms: u64) {
        stores.iter().for_each(|store| store.set_available(false));
        self.for_a_while(most_ms).await;
        stores.iter().for_each(|store| store.set_available(true));
    }

    async fn disk_errors(&self, node: usize) {
        let _ails = self.ails(node);
        let disk = self.some_disk(node);
        match self.world.random_below(3) {
            0 => disk.fail_writes(1 + self.world.random_below(4)),
            1 => disk.fail_syncs(1),
            _ => disk.fail_reads(1 + self.world.random_below(8)),
        }
        self.for_a_while(2000).await;
        disk.fail_writes(0);
        disk.fail_syncs(0);
        disk.fail_reads(0);
    }

    /// Not the first superblock: with both damaged a shard refuses to start, and its disk has to be replaced. And nothing
    /// of the newest batches: what says that they were durable is written later, so that damage there is taken for a torn
    /// tail by any log of which the last record is its end. And of a node one opening or footer of a segment at most: with
    /// both of one gone nothing says that it was one (`log::recovery`).
    fn damage(&self, node: usize) {
        let kinds = [Damage::Rot, Damage::Old, Damage::Elsewhere];
        let kind = kinds[self.world.random_below(3) as usize];
        let disk = self.some_disk(node);
        let mut pages = disk.proven_pages(SEGMENTS_START_BLOCK);
        let is_end = |page: u64| {
            let (blocks, segments) = (SEGMENT_BYTES / BLOCK_BYTES, page.checked_sub(SEGMENTS_START_BLOCK));
            segments.is_some_and(|page| page % blocks < 2 || page % blocks >= blocks - FOOTER_BLOCKS_MAX)
        };
        let spare_ends = self.ends_damaged.borrow().contains(&node);
        pages.retain(|page| *page > 0 && !(spare_ends && is_end(*page)));
        let Some(page) = self.any(&pages) else { return };
        if disk.damage_at(kind, page * BLOCK_BYTES) {
            if is_end(page) {
                self.ends_damaged.borrow_mut().insert(node);
            }
            self.world.note(|| format!("page {page} of a disk of node-{node} is damaged: {kind:?}"));
        }
    }
}
