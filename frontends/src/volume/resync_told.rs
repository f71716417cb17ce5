//! While replicas are brought back their writer says under `resyncs/<volume>` how far it is, for `torusadm status`: on its
//! own lease, seldom, and only for people to read.

use super::replicas::ShardPosition;
use super::resync::Progress;
use super::session::Session;
use futures::future::select;
use std::collections::BTreeMap;
use std::pin::pin;
use std::rc::Rc;
use torus_rpc::metadata::{Compare, Metadata, Transaction, Write};
use torus_rpc::runtime::{Clock, Instant, Runtime};
use torus_schema::ids::NodeNumber;
use torus_schema::limits::{BLOCK_BYTES, RESYNC_TOLD_INTERVAL};
use torus_schema::records::{ResyncRecord, ResyncingNode, encode, keys};

/// Until the session ends.
pub(super) async fn keep_telling<R: Runtime>(session: Rc<Session<R>>) {
    let mut told = Told::default();
    while session.ended.borrow().is_none() {
        let is_idle = session.resyncing.progress.borrow().is_empty();
        if is_idle && !told.standing {
            let begun = || session.ended.borrow().is_some() || !session.resyncing.progress.borrow().is_empty();
            session.changed.until(|| begun().then_some(())).await;
        }
        let ended = pin!(session.changed.until(|| session.ended.borrow().is_some().then_some(())));
        select(ended, pin!(session.runtime.clock().sleep(RESYNC_TOLD_INTERVAL))).await;
        let nodes = told.nodes(&session);
        told.standing = tell(&session, nodes).await;
    }
    if told.standing {
        tell(&session, Vec::new()).await;
    }
}

/// What the last word was made of.
#[derive(Default)]
struct Told {
    /// It stands in the metadata store.
    standing: bool,
    pulled: BTreeMap<ShardPosition, (Instant, u64)>,
}

impl Told {
    fn nodes<R: Runtime>(&mut self, session: &Session<R>) -> Vec<ResyncingNode> {
        let (now, now_s) = (session.runtime.clock().now(), session.runtime.clock().unix_seconds());
        let progress = session.resyncing.progress.borrow();
        self.pulled.retain(|position, _| progress.contains_key(position));
        let mut nodes: BTreeMap<NodeNumber, ResyncingNode> = BTreeMap::new();
        for (position, progress) in progress.iter() {
            let bytes = progress.pulled * BLOCK_BYTES;
            let (before, had) = self.pulled.insert(*position, (now, bytes)).unwrap_or((progress.started, 0));
            let rate_bytes_s = per_second(bytes.saturating_sub(had), now, before);
            let node = session.shards[*position].id.node;
            let started_s = now_s.saturating_sub(now.since(progress.started).as_secs());
            let all = nodes.entry(node).or_insert(ResyncingNode {
                node,
                started_s,
                slices_done: 0,
                slices: 0,
                pulled_bytes: 0,
                rate_bytes_s: 0,
                left_s: None,
            });
            all.slices_done += progress.slices_done as u32;
            all.slices += progress.slices as u32;
            all.pulled_bytes += bytes;
            all.rate_bytes_s += rate_bytes_s;
            // Its shards work side by side: the slowest says when.
            all.left_s = all.left_s.max(left_s(progress, now));
        }
        nodes.into_values().collect()
    }
}

fn per_second(bytes: u64, now: Instant, before: Instant) -> u64 {
    let millis = now.since(before).as_millis() as u64;
    (bytes * 1000).checked_div(millis).unwrap_or(0)
}

/// Slices are alike, as far as anybody knows.
fn left_s(progress: &Progress, now: Instant) -> Option<u64> {
    let (done, all) = (progress.slices_done as u64, progress.slices as u64);
    (now.since(progress.started).as_secs() * all.saturating_sub(done)).checked_div(done)
}

/// True: something stands there now, or may.
async fn tell<R: Runtime>(session: &Session<R>, nodes: Vec<ResyncingNode>) -> bool {
    let key = keys::resync(session.record.id);
    let (is_over, updated_s) = (nodes.is_empty(), session.runtime.clock().unix_seconds());
    let write = match is_over {
        true => Write::Delete { key },
        false => {
            let value = encode(&ResyncRecord { updated_s, nodes });
            Write::Put { key, value, lease: Some(session.lease.id()) }
        }
    };
    let owner = Compare::CreateRevision(keys::owner(session.record.id), session.status.owner_revision.get());
    // A last word may come when the volume is given up already; nobody else says anything under our epoch.
    let compares = if is_over { vec![] } else { vec![owner] };
    let transaction = Transaction { compares, writes: vec![write], reads: vec![] };
    match session.runtime.metadata().transact(transaction).await {
        Ok(result) => !is_over && result.applied,
        Err(error) => {
            tracing::debug!(volume = %session.record.name, %error, "cannot say how far the resync is");
            true
        }
    }
}

impl<R: Runtime> Session<R> {
    /// Differs from what it was before whenever a resync moved.
    pub fn resync_mark(&self) -> (usize, u64) {
        let stale: usize = self.replicas.borrow().to_status().stale.iter().map(|stale| stale.slices.len()).sum();
        let progress = self.resyncing.progress.borrow();
        (stale, progress.values().map(|progress| progress.examined + progress.pulled + progress.revoked).sum())
    }
}
