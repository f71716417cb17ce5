//! The state machine of a metadata store: keys, revisions, leases and the history that watches read. Pure: time
//! comes in with each call, and what a request changes comes out as a `Commit`, so that `memory` applies it at once
//! and the embedded server makes it durable first. The semantics are those of etcd, limits included, so that what
//! runs in the simulation runs there too.

use super::{Compare, Entry, Event, LeaseId, Range, Revision, Transaction, Write};
use crate::runtime::Instant;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Bound;
use std::time::Duration;
use torus_schema::limits::{
    METADATA_HISTORY_BYTES_MAX, METADATA_HISTORY_REVISIONS_MAX, METADATA_OPERATIONS_MAX,
    METADATA_TRANSACTION_BYTES_MAX, METADATA_WATCH_BATCH_BYTES,
};

/// Why a transaction is not carried out at all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Rejection {
    LeaseGone(LeaseId),
    Malformed(String),
}

/// One event and the lease its key is bound to from now on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Change {
    pub event: Event,
    pub lease: Option<LeaseId>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LeaseChange {
    Granted(LeaseId, Duration),
    Ended(LeaseId),
}

/// Everything one request changes; applied as a whole or not at all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Commit {
    /// The store's revision afterwards; it grows by one where there are changes, and stays otherwise.
    pub revision: Revision,
    pub changes: Vec<Change>,
    pub lease: Option<LeaseChange>,
}

/// A key as the store holds it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Held {
    pub value: Vec<u8>,
    pub create_revision: Revision,
    pub mod_revision: Revision,
    pub lease: Option<LeaseId>,
}

/// What a store starts from: nothing, or what was made durable.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Saved {
    pub revision: Revision,
    /// Of the lease granted last; ids are never used again, or a dead holder could keep a stranger's lease alive.
    pub last_lease: LeaseId,
    /// The earliest revision a watch may start from.
    pub oldest: Revision,
    pub keys: BTreeMap<String, Held>,
    pub leases: BTreeMap<LeaseId, Duration>,
    /// In the order of revisions.
    pub history: Vec<(Revision, Vec<Event>)>,
}

impl Default for Saved {
    /// Empty. The first transaction gets revision 2, as in etcd.
    fn default() -> Self {
        Self {
            revision: Revision(1),
            last_lease: LeaseId(0),
            oldest: Revision(1),
            keys: BTreeMap::new(),
            leases: BTreeMap::new(),
            history: Vec::new(),
        }
    }
}

/// Events a watch has not seen yet, and where it goes on afterwards.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Batch {
    pub events: Vec<Event>,
    pub next: Revision,
}

struct Lease {
    ttl: Duration,
    expires: Instant,
    keys: BTreeSet<String>,
}

pub struct Store {
    revision: Revision,
    last_lease: LeaseId,
    oldest: Revision,
    keys: BTreeMap<String, Held>,
    leases: BTreeMap<LeaseId, Lease>,
    history: VecDeque<(Revision, Vec<Event>)>,
    history_bytes: u64,
}

impl Store {
    /// Every lease gets its full TTL again: nobody could keep it alive while the store was away.
    pub fn restore(saved: Saved, now: Instant) -> Self {
        let mut leases: BTreeMap<LeaseId, Lease> = saved
            .leases
            .into_iter()
            .map(|(id, ttl)| (id, Lease { ttl, expires: now.after(ttl), keys: BTreeSet::new() }))
            .collect();
        for (key, held) in &saved.keys {
            if let Some(lease) = held.lease.and_then(|id| leases.get_mut(&id)) {
                lease.keys.insert(key.clone());
            }
        }
        let history_bytes = saved.history.iter().map(|(_, events)| bytes_of(events)).sum();
        Self {
            revision: saved.revision,
            last_lease: saved.last_lease,
            oldest: saved.oldest,
            keys: saved.keys,
            leases,
            history: saved.history.into(),
            history_bytes,
        }
    }

    /// All of it but the history: what a backup holds.
    pub fn backup(&self) -> Saved {
        Saved {
            revision: self.revision,
            last_lease: self.last_lease,
            oldest: Revision(self.revision.0 + 1),
            keys: self.keys.clone(),
            leases: self.leases.iter().map(|(id, lease)| (*id, lease.ttl)).collect(),
            history: Vec::new(),
        }
    }

    pub fn revision(&self) -> Revision {
        self.revision
    }

    pub fn last_lease(&self) -> LeaseId {
        self.last_lease
    }

    /// The earliest revision a watch may start from.
    pub fn oldest(&self) -> Revision {
        self.oldest
    }

    pub fn get(&self, key: &str) -> Option<Entry> {
        self.keys.get(key).map(|held| entry(key, held))
    }

    pub fn range(&self, prefix: &str) -> Range {
        let entries = self
            .keys
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, held)| entry(key, held))
            .collect();
        Range { entries, revision: self.revision }
    }

    /// `None` where a compare does not hold.
    pub fn prepare(&self, transaction: &Transaction) -> Result<Option<Commit>, Rejection> {
        check(transaction).map_err(Rejection::Malformed)?;
        if !transaction.compares.iter().all(|compare| self.holds(compare)) {
            return Ok(None);
        }
        let next = Revision(self.revision.0 + 1);
        let mut changes = Vec::new();
        for write in &transaction.writes {
            changes.extend(self.change(write, next)?);
        }
        let revision = if changes.is_empty() { self.revision } else { next };
        Ok(Some(Commit { revision, changes, lease: None }))
    }

    /// `ttl` is rounded up to whole seconds, one at least.
    pub fn prepare_grant(&self, ttl: Duration) -> (LeaseId, Commit) {
        let id = LeaseId(self.last_lease.0 + 1);
        let lease = Some(LeaseChange::Granted(id, Duration::from_secs(u64::from(whole_seconds(ttl)))));
        (id, Commit { revision: self.revision, changes: Vec::new(), lease })
    }

    /// Ends a lease, by wish or because its time is over; `None` where it is gone already.
    pub fn prepare_end(&self, id: LeaseId) -> Option<Commit> {
        let lease = self.leases.get(&id)?;
        let next = Revision(self.revision.0 + 1);
        let deleted = |key: &String| Change { event: Event::Deleted { key: key.clone(), revision: next }, lease: None };
        let changes: Vec<Change> = lease.keys.iter().map(deleted).collect();
        let revision = if changes.is_empty() { self.revision } else { next };
        Some(Commit { revision, changes, lease: Some(LeaseChange::Ended(id)) })
    }

    pub fn apply(&mut self, commit: Commit, now: Instant) {
        assert!(commit.revision.0 == self.revision.0 + i64::from(!commit.changes.is_empty()), "commits apply in order");
        self.revision = commit.revision;
        let mut events = Vec::with_capacity(commit.changes.len());
        for Change { event, lease } in commit.changes {
            self.apply_event(&event, lease);
            events.push(event);
        }
        if !events.is_empty() {
            self.history_bytes += bytes_of(&events);
            self.history.push_back((commit.revision, events));
            self.trim_history();
        }
        match commit.lease {
            Some(LeaseChange::Granted(id, ttl)) => {
                self.last_lease = id;
                self.leases.insert(id, Lease { ttl, expires: now.after(ttl), keys: BTreeSet::new() });
            }
            Some(LeaseChange::Ended(id)) => {
                self.leases.remove(&id);
            }
            None => {}
        }
    }

    /// False where the lease is gone. Callers end what is over (`expired`) first.
    pub fn keep_alive(&mut self, id: LeaseId, now: Instant) -> bool {
        let Some(lease) = self.leases.get_mut(&id) else { return false };
        lease.expires = now.after(lease.ttl);
        true
    }

    /// A lease whose time is over; to be ended before anything else is answered.
    pub fn expired(&self, now: Instant) -> Option<LeaseId> {
        self.leases.iter().find(|(_, lease)| lease.expires <= now).map(|(id, _)| *id)
    }

    pub fn next_expiry(&self) -> Option<Instant> {
        self.leases.values().map(|lease| lease.expires).min()
    }

    /// Events of keys with this prefix from `from` on, a revision never split; an error is the oldest revision kept.
    /// Who asks for what is to come after revisions that are not there either saw them before this store was restored
    /// from a backup: what he would be sent would lack whatever gets their numbers.
    pub fn events(&self, prefix: &str, from: Revision) -> Result<Batch, Revision> {
        if from < self.oldest || from.0 > self.revision.0 + 1 {
            return Err(self.oldest);
        }
        let start = self.history.partition_point(|(revision, _)| *revision < from);
        let mut batch = Batch { events: Vec::new(), next: Revision(self.revision.0 + 1) };
        let mut bytes = 0;
        for (revision, events) in self.history.range(start..) {
            let matching: Vec<Event> = events.iter().filter(|event| event.key().starts_with(prefix)).cloned().collect();
            bytes += bytes_of(&matching);
            batch.events.extend(matching);
            if bytes >= METADATA_WATCH_BATCH_BYTES {
                batch.next = Revision(revision.0 + 1);
                break;
            }
        }
        Ok(batch)
    }

    fn holds(&self, compare: &Compare) -> bool {
        // Revision 0 is that of a key that is not there, as in etcd.
        let create = |key: &str| self.keys.get(key).map_or(Revision(0), |held| held.create_revision);
        let modified = |key: &str| self.keys.get(key).map_or(Revision(0), |held| held.mod_revision);
        match compare {
            Compare::Absent(key) => !self.keys.contains_key(key),
            Compare::Present(key) => self.keys.contains_key(key),
            Compare::CreateRevision(key, revision) => create(key) == *revision,
            Compare::ModRevision(key, revision) => modified(key) == *revision,
            Compare::PrefixUnchanged(prefix, revision) => {
                let mut below = self.keys.range(prefix.clone()..).take_while(|(key, _)| key.starts_with(prefix));
                below.all(|(_, held)| held.mod_revision <= *revision)
            }
        }
    }

    fn change(&self, write: &Write, revision: Revision) -> Result<Option<Change>, Rejection> {
        match write {
            Write::Put { key, value, lease } => {
                if let Some(lease) = lease.filter(|lease| !self.leases.contains_key(lease)) {
                    return Err(Rejection::LeaseGone(lease));
                }
                let create_revision = self.keys.get(key).map_or(revision, |held| held.create_revision);
                let entry = Entry { key: key.clone(), value: value.clone(), create_revision, mod_revision: revision };
                Ok(Some(Change { event: Event::Put(entry), lease: *lease }))
            }
            Write::Delete { key } => Ok(self
                .keys
                .contains_key(key)
                .then(|| Change { event: Event::Deleted { key: key.clone(), revision }, lease: None })),
        }
    }

    fn apply_event(&mut self, event: &Event, lease: Option<LeaseId>) {
        let before = match event {
            Event::Put(entry) => {
                let held = Held {
                    value: entry.value.clone(),
                    create_revision: entry.create_revision,
                    mod_revision: entry.mod_revision,
                    lease,
                };
                self.keys.insert(entry.key.clone(), held)
            }
            Event::Deleted { key, .. } => self.keys.remove(key),
        };
        if let Some(lease) = before.and_then(|held| held.lease).and_then(|id| self.leases.get_mut(&id)) {
            lease.keys.remove(event.key());
        }
        if let Some(lease) = lease.and_then(|id| self.leases.get_mut(&id)) {
            lease.keys.insert(event.key().to_owned());
        }
    }

    fn trim_history(&mut self) {
        let over = |store: &Self| {
            store.history.len() > METADATA_HISTORY_REVISIONS_MAX || store.history_bytes > METADATA_HISTORY_BYTES_MAX
        };
        while over(self) {
            let Some((revision, events)) = self.history.pop_front() else { break };
            self.history_bytes -= bytes_of(&events);
            self.oldest = Revision(revision.0 + 1);
        }
    }
}

/// What every store refuses, so that a transaction that passes one passes all; the error is the reason.
pub fn check(transaction: &Transaction) -> Result<(), String> {
    let operations = transaction.compares.len().max(transaction.writes.len() + transaction.reads.len());
    if operations > METADATA_OPERATIONS_MAX {
        return Err(format!(
            "{operations} operations in one transaction, at most {METADATA_OPERATIONS_MAX} are accepted"
        ));
    }
    let bytes: u64 = transaction.writes.iter().map(|write| write.bytes()).sum();
    if bytes > METADATA_TRANSACTION_BYTES_MAX {
        return Err(format!("{bytes} bytes in one transaction, at most {METADATA_TRANSACTION_BYTES_MAX} are accepted"));
    }
    let mut written = BTreeSet::new();
    for write in &transaction.writes {
        if write.key().is_empty() {
            return Err("the empty key cannot be written".to_owned());
        }
        if !written.insert(write.key()) {
            return Err(format!("the key {:?} is written twice in one transaction", write.key()));
        }
    }
    Ok(())
}

/// Rounded up, one at least, as the stores count.
pub fn whole_seconds(ttl: Duration) -> u32 {
    let rounded_up = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
    u32::try_from(rounded_up.max(1)).unwrap_or(u32::MAX)
}

fn entry(key: &str, held: &Held) -> Entry {
    Entry {
        key: key.to_owned(),
        value: held.value.clone(),
        create_revision: held.create_revision,
        mod_revision: held.mod_revision,
    }
}

/// What the events weigh in memory, roughly.
fn bytes_of(events: &[Event]) -> u64 {
    let weigh = |event: &Event| match event {
        Event::Put(entry) => entry.key.len() + entry.value.len(),
        Event::Deleted { key, .. } => key.len(),
    };
    events.iter().map(|event| weigh(event) as u64).sum()
}

impl Event {
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Deleted { key, .. } => key,
        }
    }

    pub fn revision(&self) -> Revision {
        match self {
            Self::Put(entry) => entry.mod_revision,
            Self::Deleted { revision, .. } => *revision,
        }
    }
}

impl Write {
    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }

    fn bytes(&self) -> u64 {
        match self {
            Self::Put { key, value, .. } => (key.len() + value.len()) as u64,
            Self::Delete { key } => key.len() as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn put(key: &str, value: &[u8]) -> Transaction {
        let write = Write::Put { key: key.to_owned(), value: value.to_vec(), lease: None };
        Transaction { writes: vec![write], ..Transaction::default() }
    }

    fn commit(store: &mut Store, transaction: &Transaction) {
        let commit = store.prepare(transaction).expect("well formed").expect("compares hold");
        store.apply(commit, Instant::default());
    }

    #[test]
    fn history_is_bounded_and_says_where_it_begins() {
        let mut store = Store::restore(Saved::default(), Instant::default());
        for _ in 0..METADATA_HISTORY_REVISIONS_MAX + 10 {
            commit(&mut store, &put("key", b"value"));
        }
        assert_eq!(store.oldest(), Revision(2 + 10));
        assert_eq!(store.events("", Revision(11)), Err(Revision(12)));
        assert_eq!(store.events("", Revision(12)).expect("kept").events.len(), METADATA_HISTORY_REVISIONS_MAX);
    }

    #[test]
    fn a_watch_far_behind_is_served_in_batches_that_lack_nothing() {
        let mut store = Store::restore(Saved::default(), Instant::default());
        let value = vec![7; METADATA_WATCH_BATCH_BYTES as usize / 3];
        for index in 0..20 {
            commit(&mut store, &put(&format!("key/{index}"), &value));
        }
        let (mut from, mut seen, mut batches) = (Revision(1), Vec::new(), 0);
        while from <= store.revision() {
            let batch = store.events("key/", from).expect("kept");
            seen.extend(batch.events.iter().map(|event| event.revision().0));
            (from, batches) = (batch.next, batches + 1);
        }
        assert_eq!(seen, (2..22).collect::<Vec<_>>());
        assert!(batches > 1);
    }

    #[test]
    fn a_restored_store_gives_leases_their_full_time_again_and_never_reuses_an_id() {
        let leases = BTreeMap::from([(LeaseId(4), Duration::from_secs(10))]);
        let held =
            Held { value: vec![1], create_revision: Revision(2), mod_revision: Revision(2), lease: Some(LeaseId(4)) };
        let keys = BTreeMap::from([("node".to_owned(), held)]);
        let saved = Saved { leases, keys, revision: Revision(2), last_lease: LeaseId(9), ..Saved::default() };
        let start = Instant(Duration::from_secs(100));
        let store = Store::restore(saved, start);
        assert_eq!(store.next_expiry(), Some(start.after(Duration::from_secs(10))));
        assert_eq!(store.prepare_end(LeaseId(4)).expect("there").changes.len(), 1);
        assert_eq!(store.prepare_grant(Duration::from_millis(1)).0, LeaseId(10));
    }

    #[test]
    fn a_transaction_beyond_what_etcd_accepts_is_refused_everywhere() {
        let reads = vec!["key".to_owned(); METADATA_OPERATIONS_MAX + 1];
        assert!(check(&Transaction { reads, ..Transaction::default() }).is_err());
        assert!(check(&put("key", &vec![0; METADATA_TRANSACTION_BYTES_MAX as usize])).is_err());
        let mut twice = put("key", b"1");
        twice.writes.push(Write::Delete { key: "key".to_owned() });
        assert!(check(&twice).is_err());
        assert!(check(&put("", b"1")).is_err());
    }
}
