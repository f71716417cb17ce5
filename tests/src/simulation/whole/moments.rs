//! Troubles that wait for their moment: each goes for the one at which a rule of the protocol counts, which troubles by
//! lot hardly ever meet.

use super::Whole;
use std::rc::Rc;
use std::time::Duration;

const LOOK_EVERY: Duration = Duration::from_millis(10);
/// More clients than the profile says, for those that take over.
const CLIENTS_MORE: usize = 2;

impl Whole {
    /// Until `is_so` or everything is to become well; false: it did not become so within the time.
    async fn wait_for(&self, within: Duration, mut is_so: impl AsyncFnMut() -> bool) -> bool {
        let end = self.world.now().after(within);
        while self.world.now() < end && !self.healing.get() {
            if is_so().await {
                return true;
            }
            self.world.sleep(LOOK_EVERY).await;
        }
        false
    }

    /// Replicas of all volumes that are listed as stale.
    async fn stale(&self) -> usize {
        let ids: Vec<_> = self.volumes.borrow().values().map(|volume| volume.id).collect();
        let mut stale = 0;
        for id in ids {
            stale += self.status(id).await.stale.len();
        }
        stale
    }

    /// A node was away for long enough to be stale, comes back, and loses its power when it is in sync again (rule 11,
    /// interleaving 6).
    pub(super) async fn power_after_resync(&self, node: usize) {
        let _ails = self.ails(node);
        self.stop_for(node, false, Duration::from_secs(5)).await;
        let mut before = 0;
        let in_sync = async || {
            let now = self.stale().await;
            std::mem::replace(&mut before, now) > now
        };
        if self.wait_for(Duration::from_secs(20), in_sync).await {
            self.world.sleep(self.some_of(Duration::from_millis(60))).await;
            self.stop_for(node, true, Duration::from_secs(2)).await;
        }
    }

    /// A client is killed, and the power fails when the next one has what it left (rule 4, interleaving 10).
    pub(super) async fn power_after_attach(self: &Rc<Self>, node: usize) {
        let Some(person) = self.some_person() else { return };
        self.kill_person(&person);
        self.hire();
        let before = self.attaches.get();
        if self.wait_for(Duration::from_secs(20), async || self.attaches.get() > before).await {
            self.world.sleep(self.some_of(Duration::from_millis(60))).await;
            match self.profile.weak.is_none() && self.world.one_in(3) {
                true => self.fail_all_power().await,
                false => self.stop_for(node, true, Duration::from_secs(2)).await,
            }
        }
    }

    /// A client and one node on one side, everything else on the other, where somebody takes the volume over: rules 2
    /// and 7, interleaving 1.
    pub(super) async fn split(self: &Rc<Self>, node: usize) {
        let (Some(person), Some(process)) = (self.some_person(), self.cluster.nodes[node].process.get()) else {
            return;
        };
        if self.people.borrow().len() < self.profile.clients + CLIENTS_MORE {
            self.hire();
        }
        let _ail: Vec<_> = (0..self.profile.nodes).map(|node| self.ails(node)).collect();
        self.world.note(|| format!("{} and node-{node} are on their own", person.name));
        let others = self.processes().into_iter().filter(|other| *other != process && *other != person.process);
        let cut: Vec<_> = others.flat_map(|other| [(process, other), (person.process, other)]).collect();
        cut.iter().for_each(|(a, b)| self.world.cut(*a, *b));
        let store = (!self.world.one_in(4)).then(|| person.store.clone());
        self.keep_away(store.as_slice(), 40_000).await;
        cut.iter().for_each(|(a, b)| self.world.heal(*a, *b));
    }

    /// Everybody lets go at the moment at which a replica becomes stale, while others want the volume: rule 2,
    /// interleaving 13.
    pub(super) async fn let_go(&self, node: usize) {
        let _ails = self.ails(node);
        if !self.cluster.is_running(node) || self.starting.replace(true) {
            return;
        }
        self.stop(node, false);
        self.starting.set(false);
        let before = self.stale().await;
        self.wait_for(Duration::from_secs(8), async || self.stale().await > before).await;
        self.workload.let_go.set(self.workload.let_go.get() + 1);
        self.for_a_while(1000).await;
        self.start_again(node).await;
    }
}
