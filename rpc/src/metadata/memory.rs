//! The metadata store of simulations and unit tests: the same state machine as the embedded one, without a server,
//! on whatever clock it is given. It does nothing by itself: leases end when somebody asks or watches.
//!
//! Fault model, per client (`another_client` is one more):
//! * restored: for all clients the content is that of an earlier moment
//! * unavailable: calls wait and are answered if the store comes back within their deadline, else `Unreachable`;
//!   watches wait and miss nothing
//! * a lost answer: the next transaction is applied or not, and reported as `Unknown` after the deadline

use super::store::{Rejection, Saved, Store};
use super::{
    Entry, Event, LeaseId, Metadata, MetadataError, Range, Result, Revision, Transaction, TransactionResult, Watch,
};
use crate::runtime::{Clock, Instant};
use futures::future::{Either, select};
use std::cell::{Cell, RefCell};
use std::future::{pending, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Poll, Waker};
use std::time::Duration;
use torus_schema::limits::METADATA_DEADLINE;

/// Stands where the others name a server.
const TRIED: &str = "memory";

/// What became of a transaction whose answer is lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Lost {
    Request,
    Answer,
}

/// A client of a store; clones are the same client.
pub struct MemoryStore<C> {
    store: Rc<RefCell<Store>>,
    /// Rings when the store changes or a client's faults do.
    bell: Rc<Bell>,
    faults: Rc<Faults>,
    clock: C,
    deadline: Duration,
}

#[derive(Default)]
struct Faults {
    unavailable: Cell<bool>,
    lose_next: Cell<Option<Lost>>,
}

impl<C: Clock> MemoryStore<C> {
    pub fn new(clock: C) -> Self {
        Self::with_deadline(clock, METADATA_DEADLINE)
    }

    pub fn with_deadline(clock: C, deadline: Duration) -> Self {
        let store = Store::restore(Saved::default(), clock.now());
        Self {
            store: Rc::new(RefCell::new(store)),
            bell: Rc::new(Bell::default()),
            faults: Rc::new(Faults::default()),
            clock,
            deadline,
        }
    }

    /// Another client of the same store, on its own clock and with its own faults.
    pub fn another_client(&self, clock: C) -> Self {
        Self { faults: Rc::new(Faults::default()), clock, ..self.clone() }
    }

    pub fn set_available(&self, available: bool) {
        self.faults.unavailable.set(!available);
        self.bell.ring();
    }

    /// The next transaction of this client ends as `Unknown`.
    pub fn lose_next(&self, lost: Lost) {
        self.faults.lose_next.set(Some(lost));
    }

    /// The content as of now.
    pub fn backup(&self) -> Saved {
        self.store.borrow().backup()
    }

    /// For all its clients the store is again what it was then; leases begin anew.
    pub fn restore(&self, backup: Saved) {
        *self.store.borrow_mut() = Store::restore(backup, self.clock.now());
        self.bell.ring();
    }

    /// Ends every lease whose time is over. Calls and watches do so by themselves; a simulation in which nobody
    /// does may.
    pub fn expire_leases(&self) {
        let now = self.clock.now();
        let mut ended = false;
        let mut store = self.store.borrow_mut();
        while let Some(lease) = store.expired(now) {
            let commit = store.prepare_end(lease).expect("an expired lease is there: the store just named it");
            store.apply(commit, now);
            ended = true;
        }
        drop(store);
        if ended {
            self.bell.ring();
        }
    }

    async fn reach(&self) -> Result<()> {
        let end = self.clock.now().after(self.deadline);
        while self.faults.unavailable.get() {
            if self.clock.now() >= end {
                let because = "made unavailable".to_owned();
                return Err(MetadataError::Unreachable { tried: TRIED.to_owned(), waited: self.deadline, because });
            }
            self.change_or(Some(end)).await;
        }
        self.expire_leases();
        Ok(())
    }

    /// Until something changes, or this moment.
    async fn change_or(&self, moment: Option<Instant>) {
        let timer = async {
            match moment {
                Some(moment) => self.clock.sleep(moment.since(self.clock.now())).await,
                None => pending().await,
            }
        };
        match select(pin!(self.bell.rung()), pin!(timer)).await {
            Either::Left(_) | Either::Right(_) => {}
        }
    }

    fn carry_out(&self, transaction: &Transaction) -> Result<TransactionResult> {
        let mut store = self.store.borrow_mut();
        let prepared = store.prepare(transaction).map_err(|rejection| match rejection {
            Rejection::LeaseGone(lease) => MetadataError::LeaseGone(lease),
            Rejection::Malformed(because) => {
                MetadataError::Refused { tried: TRIED.to_owned(), operation: "transact", because }
            }
        })?;
        let applied = prepared.is_some();
        if let Some(commit) = prepared {
            store.apply(commit, self.clock.now());
        }
        let reads = transaction.reads.iter().map(|key| store.get(key)).collect();
        let revision = store.revision();
        drop(store);
        self.bell.ring();
        Ok(TransactionResult { applied, revision, reads })
    }
}

impl<C: Clone> Clone for MemoryStore<C> {
    fn clone(&self) -> Self {
        Self {
            store: self.store.clone(),
            bell: self.bell.clone(),
            faults: self.faults.clone(),
            clock: self.clock.clone(),
            deadline: self.deadline,
        }
    }
}

impl<C: Clock> Metadata for MemoryStore<C> {
    type Watch = MemoryWatch<C>;

    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        self.reach().await?;
        Ok(self.store.borrow().get(key))
    }

    async fn range(&self, prefix: &str) -> Result<Range> {
        self.reach().await?;
        Ok(self.store.borrow().range(prefix))
    }

    async fn transact(&self, transaction: Transaction) -> Result<TransactionResult> {
        self.reach().await?;
        let Some(lost) = self.faults.lose_next.take() else { return self.carry_out(&transaction) };
        if lost == Lost::Answer {
            self.carry_out(&transaction)?;
        }
        self.clock.sleep(self.deadline).await;
        let because = "the answer was made to be lost".to_owned();
        Err(MetadataError::Unknown { tried: TRIED.to_owned(), operation: "transact", waited: self.deadline, because })
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Self::Watch> {
        self.reach().await?;
        Ok(MemoryWatch { client: self.clone(), prefix: prefix.to_owned(), from: from.max(Revision(1)) })
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId> {
        self.reach().await?;
        let mut store = self.store.borrow_mut();
        let (lease, commit) = store.prepare_grant(ttl);
        store.apply(commit, self.clock.now());
        drop(store);
        // Who waits for the next expiry has to look again.
        self.bell.ring();
        Ok(lease)
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.reach().await?;
        let there = self.store.borrow_mut().keep_alive(lease, self.clock.now());
        if there { Ok(()) } else { Err(MetadataError::LeaseGone(lease)) }
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<()> {
        self.reach().await?;
        let mut store = self.store.borrow_mut();
        if let Some(commit) = store.prepare_end(lease) {
            store.apply(commit, self.clock.now());
        }
        drop(store);
        self.bell.ring();
        Ok(())
    }
}

pub struct MemoryWatch<C> {
    client: MemoryStore<C>,
    prefix: String,
    from: Revision,
}

impl<C: Clock> Watch for MemoryWatch<C> {
    async fn next(&mut self) -> Result<Vec<Event>> {
        loop {
            let mut expiry = None;
            if !self.client.faults.unavailable.get() {
                self.client.expire_leases();
                let store = self.client.store.borrow();
                let batch = store
                    .events(&self.prefix, self.from)
                    .map_err(|oldest| MetadataError::Compacted { from: self.from, oldest })?;
                self.from = batch.next;
                if !batch.events.is_empty() {
                    return Ok(batch.events);
                }
                expiry = store.next_expiry();
            }
            self.client.change_or(expiry).await;
        }
    }
}

/// Wakes everybody who waits, on one executor.
#[derive(Default)]
struct Bell {
    rings: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Bell {
    fn ring(&self) {
        self.rings.set(self.rings.get() + 1);
        self.waiting.take().into_iter().for_each(Waker::wake);
    }

    /// The next ring after this call.
    fn rung(&self) -> impl Future<Output = ()> {
        let before = self.rings.get();
        poll_fn(move |context| {
            if self.rings.get() != before {
                return Poll::Ready(());
            }
            let mut waiting = self.waiting.borrow_mut();
            if !waiting.iter().any(|waker| waker.will_wake(context.waker())) {
                waiting.push(context.waker().clone());
            }
            Poll::Pending
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Transaction, Write};
    use super::*;
    use futures::executor::block_on;
    use futures::future::{join, ready};

    /// Whoever sleeps moves the time.
    #[derive(Clone, Default)]
    struct LeapingClock(Rc<Cell<Duration>>);

    impl Clock for LeapingClock {
        fn now(&self) -> Instant {
            Instant(self.0.get())
        }
        fn sleep(&self, wait: Duration) -> impl Future<Output = ()> + 'static {
            let (clock, until) = (self.0.clone(), self.0.get() + wait);
            async move { clock.set(clock.get().max(until)) }
        }
    }

    fn put(key: &str, lease: Option<LeaseId>) -> Transaction {
        let write = Write::Put { key: key.to_owned(), value: Vec::new(), lease };
        Transaction { writes: vec![write], ..Transaction::default() }
    }

    #[test]
    fn an_unavailable_store_is_unreachable_after_the_deadline_and_for_its_own_client_only() {
        let clock = LeapingClock::default();
        let store = MemoryStore::new(clock.clone());
        let other = store.another_client(clock.clone());
        store.set_available(false);
        let refused = block_on(store.transact(put("key", None)));
        assert!(matches!(refused, Err(MetadataError::Unreachable { .. })), "{refused:?}");
        assert_eq!(clock.now(), Instant(METADATA_DEADLINE));
        assert_eq!(block_on(other.get("key")), Ok(None), "nothing was applied, and others are answered");
    }

    /// Nobody's sleep ends.
    #[derive(Clone)]
    struct StoppedClock;

    impl Clock for StoppedClock {
        fn now(&self) -> Instant {
            Instant::default()
        }
        fn sleep(&self, _: Duration) -> impl Future<Output = ()> + 'static {
            pending()
        }
    }

    #[test]
    fn a_store_that_comes_back_in_time_answers_the_call_that_waited() {
        let store = MemoryStore::new(StoppedClock);
        store.set_available(false);
        // The call is polled first and finds the store away; its timer never fires; then the store comes back.
        let (answer, ()) = block_on(join(store.get("key"), async { store.set_available(true) }));
        assert_eq!(answer, Ok(None));
    }

    #[test]
    fn a_lost_request_is_not_applied_a_lost_answer_is_and_nobody_can_tell() {
        let store = MemoryStore::new(LeapingClock::default());
        for (lost, applied) in [(Lost::Request, false), (Lost::Answer, true)] {
            let key = format!("{lost:?}");
            store.lose_next(lost);
            let unknown = block_on(store.transact(put(&key, None)));
            assert!(matches!(unknown, Err(MetadataError::Unknown { .. })), "{unknown:?}");
            assert_eq!(block_on(store.get(&key)).expect("available again").is_some(), applied, "{lost:?}");
        }
    }

    #[test]
    fn a_watcher_sees_a_lease_end_in_virtual_time_though_nobody_else_moves() {
        let clock = LeapingClock::default();
        let store = MemoryStore::new(clock.clone());
        let seen = block_on(async {
            let lease = store.grant_lease(Duration::from_secs(10)).await?;
            let revision = store.transact(put("key", Some(lease))).await?.revision;
            store.watch("key", Revision(revision.0 + 1)).await?.next().await
        });
        assert_eq!(seen, Ok(vec![Event::Deleted { key: "key".to_owned(), revision: Revision(3) }]));
        assert_eq!(clock.now(), Instant(Duration::from_secs(10)));
    }

    #[test]
    fn a_watch_of_an_unavailable_store_waits_and_then_misses_nothing() {
        let clock = LeapingClock::default();
        let store = MemoryStore::new(clock.clone());
        let other = store.another_client(clock);
        block_on(async {
            let mut watch = store.watch("", Revision(1)).await.expect("available");
            store.set_available(false);
            other.transact(put("key", None)).await.expect("available to others");
            let is_blocked = matches!(select(pin!(watch.next()), ready(())).await, Either::Right(_));
            assert!(is_blocked, "it saw events while unavailable");
            store.set_available(true);
            assert_eq!(watch.next().await.expect("events").len(), 1);
        });
    }
}
