//! A shard asks the metadata store for nothing: what it has to know comes with each request and is signed. So its
//! runtime gets a store that refuses, and a shard that asked after all would be found out by its first test.

use std::time::Duration;
use torus_rpc::metadata::{Entry, Event, LeaseId, Metadata, MetadataError, Range, Result, Revision, Transaction};
use torus_rpc::metadata::{TransactionResult, Watch};

#[derive(Clone)]
pub struct NoMetadata;

/// Cannot be made.
pub enum NoWatch {}

impl Watch for NoWatch {
    async fn next(&mut self) -> Result<Vec<Event>> {
        match *self {}
    }
}

fn refused<T>(operation: &'static str) -> Result<T> {
    let because = "a shard does not ask the metadata store".to_string();
    Err(MetadataError::Refused { tried: "no store".to_string(), operation, because })
}

impl Metadata for NoMetadata {
    type Watch = NoWatch;

    async fn get(&self, _key: &str) -> Result<Option<Entry>> {
        refused("get")
    }
    async fn range(&self, _prefix: &str) -> Result<Range> {
        refused("range")
    }
    async fn transact(&self, _transaction: Transaction) -> Result<TransactionResult> {
        refused("transact")
    }
    async fn watch(&self, _prefix: &str, _from: Revision) -> Result<NoWatch> {
        refused("watch")
    }
    async fn grant_lease(&self, _ttl: Duration) -> Result<LeaseId> {
        refused("grant_lease")
    }
    async fn keep_alive(&self, _lease: LeaseId) -> Result<()> {
        refused("keep_alive")
    }
    async fn revoke_lease(&self, _lease: LeaseId) -> Result<()> {
        refused("revoke_lease")
    }
}
