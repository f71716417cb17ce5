//! The in-memory store with a way to go: every call takes a moment there and a moment back, so that what happens
//! meanwhile happens.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::metadata::memory::{MemoryStore, MemoryWatch};
use torus_rpc::metadata::{Entry, LeaseId, Metadata, Range, Result, Revision, Transaction, TransactionResult};
use torus_rpc::runtime::simulated::Here;

#[derive(Clone)]
pub struct DistantStore {
    pub store: MemoryStore<Here>,
    pub here: Here,
    /// One way takes up to so much longer, for every client of it.
    pub slower_by: Rc<Cell<Duration>>,
}

impl DistantStore {
    async fn travel(&self) {
        let slower_us = self.slower_by.get().as_micros() as u64;
        let micros = 100 + self.here.world.random_below(4000 + slower_us);
        self.here.world.sleep(Duration::from_micros(micros)).await;
    }

    async fn round_trip<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.travel().await;
        let answer = call.await;
        self.travel().await;
        answer
    }
}

impl Metadata for DistantStore {
    type Watch = MemoryWatch<Here>;

    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        self.round_trip(self.store.get(key)).await
    }
    async fn range(&self, prefix: &str) -> Result<Range> {
        self.round_trip(self.store.range(prefix)).await
    }
    async fn transact(&self, transaction: Transaction) -> Result<TransactionResult> {
        self.round_trip(self.store.transact(transaction)).await
    }
    async fn watch(&self, prefix: &str, from: Revision) -> Result<Self::Watch> {
        self.round_trip(self.store.watch(prefix, from)).await
    }
    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId> {
        self.round_trip(self.store.grant_lease(ttl)).await
    }
    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.round_trip(self.store.keep_alive(lease)).await
    }
    async fn revoke_lease(&self, lease: LeaseId) -> Result<()> {
        self.round_trip(self.store.revoke_lease(lease)).await
    }
}
