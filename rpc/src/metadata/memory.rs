//! The metadata store of simulations and unit tests: the same state machine as the embedded one, without a server,
//! on whatever clock it is given. It does nothing by itself: leases end when somebody asks or watches.
//!
//! Fault model, per client (`another_client` is one more):
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
