//! The contract. Each case works below a prefix of its own, so that all of them run at the same time on one store,
//! through two clients of it.

use futures::future::join_all;
use std::pin::Pin;
use std::time::Duration;
use torus_rpc::metadata::{
    Compare, Entry, Event, LeaseId, Metadata, MetadataError, Revision, Transaction, TransactionResult, Watch, Write,
};

/// No case waits longer for anything.
const PATIENCE: Duration = Duration::from_secs(60);
/// etcd lengthens anything shorter.
const SHORT_TTL: Duration = Duration::from_secs(2);
const LONG_TTL: Duration = Duration::from_secs(300);

macro_rules! contract {
    ($($case:ident),* $(,)?) => {
        pub async fn keep_contract<M: Metadata>(one: &M, other: &M) {
            let cases: Vec<Pin<Box<dyn Future<Output = ()> + '_>>> =
                vec![$(Box::pin($case(one, other, concat!(stringify!($case), "/")))),*];
            join_all(cases).await;
        }
    };
}

contract![
    a_key_is_absent_then_present_then_absent_again,
    a_prefix_is_not_confused_by_ids_that_begin_alike,
    a_range_is_in_the_order_of_its_keys,
    large_ranges_and_binary_values_arrive_whole,
    create_and_mod_revisions_tell_making_from_changing,
    every_kind_of_compare_holds_and_fails,
    one_compare_that_fails_applies_nothing,
    reads_see_the_writes_of_their_transaction,
    a_transaction_has_one_revision_and_changing_nothing_has_none,
    malformed_transactions_are_refused,
    deleting_an_absent_key_is_no_error,
    only_one_of_two_creators_wins,
    a_lease_that_ends_deletes_its_keys_and_watchers_see_it,
    keep_alive_extends_a_lease,
    a_revoked_lease_is_gone_with_its_keys,
    a_put_with_a_lease_that_is_gone_is_refused,
    a_key_put_again_without_its_lease_outlives_it,
    a_watch_from_the_past_misses_nothing_and_is_in_order,
    a_watch_sees_its_prefix_only,
    a_watch_from_a_range_continues_it,
    a_dropped_watch_disturbs_nobody,
];

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("nothing happened within {PATIENCE:?}"))
}

/// Asks until it is so. The pause only spares the server.
pub async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let asked = async {
        while !is_so().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, asked).await.unwrap_or_else(|_| panic!("not within {PATIENCE:?}: {what}"));
}

pub async fn put(store: &impl Metadata, key: &str, value: &[u8]) -> Revision {
    write(store, vec![put_with(key, value, None)]).await
}

pub async fn write(store: &impl Metadata, writes: Vec<Write>) -> Revision {
    let result = transact(store, Transaction { writes, ..Transaction::default() }).await;
    assert!(result.applied, "there were no compares");
    result.revision
}

async fn transact(store: &impl Metadata, transaction: Transaction) -> TransactionResult {
    within(store.transact(transaction)).await.expect("the store answers")
}

pub fn put_with(key: &str, value: &[u8], lease: Option<LeaseId>) -> Write {
    Write::Put { key: key.to_owned(), value: value.to_vec(), lease }
}

fn delete(key: &str) -> Write {
    Write::Delete { key: key.to_owned() }
}

async fn get(store: &impl Metadata, key: &str) -> Option<Entry> {
    within(store.get(key)).await.expect("the store answers")
}

async fn keys(store: &impl Metadata, prefix: &str) -> Vec<String> {
    let range = within(store.range(prefix)).await.expect("the store answers");
    range.entries.into_iter().map(|entry| entry.key).collect()
}

/// The next events, this many; more are an error of the test.
pub async fn events(watch: &mut impl Watch, count: usize) -> Vec<Event> {
    let mut seen = Vec::new();
    while seen.len() < count {
        seen.extend(within(watch.next()).await.expect("the watch goes on"));
    }
    assert_eq!(seen.len(), count, "{seen:?}");
    seen
}

/// (key, value), or (key, nothing) if it was deleted.
pub fn brief(events: &[Event]) -> Vec<(&str, Option<&[u8]>)> {
    events.iter().map(|event| (event.key(), value_of(event))).collect()
}

fn value_of(event: &Event) -> Option<&[u8]> {
    match event {
        Event::Put(entry) => Some(&entry.value),
        Event::Deleted { .. } => None,
    }
}

async fn a_key_is_absent_then_present_then_absent_again<M: Metadata>(one: &M, other: &M, at: &str) {
    let key = format!("{at}key");
    assert_eq!(get(other, &key).await, None);
    let revision = put(one, &key, b"value").await;
    let entry = Entry { key: key.clone(), value: b"value".to_vec(), create_revision: revision, mod_revision: revision };
    assert_eq!(get(other, &key).await, Some(entry));
    write(one, vec![delete(&key)]).await;
    assert_eq!(get(other, &key).await, None);
}

async fn a_prefix_is_not_confused_by_ids_that_begin_alike<M: Metadata>(one: &M, other: &M, at: &str) {
    for key in ["volumes/2", "volumes/2/owner", "volumes/20", "volumes/20/owner", "volumes/3"] {
        put(one, &format!("{at}{key}"), b"").await;
    }
    assert_eq!(keys(other, &format!("{at}volumes/2/")).await, [format!("{at}volumes/2/owner")]);
    assert_eq!(keys(other, &format!("{at}volumes/")).await.len(), 5);
    assert_eq!(get(other, &format!("{at}volumes/2")).await.map(|entry| entry.key), Some(format!("{at}volumes/2")));
    assert_eq!(keys(other, &format!("{at}nothing/")).await, Vec::<String>::new());
}

async fn a_range_is_in_the_order_of_its_keys<M: Metadata>(one: &M, other: &M, at: &str) {
    for key in ["c", "a", "10", "b/1", "9"] {
        put(one, &format!("{at}{key}"), b"").await;
    }
    let expected = ["10", "9", "a", "b/1", "c"].map(|key| format!("{at}{key}"));
    assert_eq!(keys(other, at).await, expected);
}

async fn large_ranges_and_binary_values_arrive_whole<M: Metadata>(one: &M, other: &M, at: &str) {
    // Beyond 4 MiB, what gRPC accepts unless told otherwise.
    let value: Vec<u8> = (0..1 << 20).map(|index: u32| (index % 251) as u8).collect();
    for index in 0..6 {
        put(one, &format!("{at}{index}"), &value).await;
    }
    let range = within(other.range(at)).await.expect("the store answers");
    assert_eq!(range.entries.len(), 6);
    assert!(range.entries.iter().all(|entry| entry.value == value));
}

async fn create_and_mod_revisions_tell_making_from_changing<M: Metadata>(one: &M, other: &M, at: &str) {
    let key = format!("{at}key");
    let created = put(one, &key, b"1").await;
    let changed = put(one, &key, b"2").await;
    assert!(changed > created);
    let entry = get(other, &key).await.expect("there");
    assert_eq!((entry.create_revision, entry.mod_revision), (created, changed));
    write(one, vec![delete(&key)]).await;
    let again = put(one, &key, b"3").await;
    assert_eq!(get(other, &key).await.expect("there").create_revision, again);
}

async fn every_kind_of_compare_holds_and_fails<M: Metadata>(one: &M, other: &M, at: &str) {
    let (key, missing) = (format!("{at}key"), format!("{at}missing"));
    let created = put(one, &key, b"1").await;
    let changed = put(one, &key, b"2").await;
    let table = [
        (Compare::Absent(missing.clone()), true),
        (Compare::Absent(key.clone()), false),
        (Compare::Present(key.clone()), true),
        (Compare::Present(missing.clone()), false),
        (Compare::CreateRevision(key.clone(), created), true),
        (Compare::CreateRevision(key.clone(), changed), false),
        (Compare::CreateRevision(missing.clone(), created), false),
        (Compare::ModRevision(key.clone(), changed), true),
        (Compare::ModRevision(key.clone(), created), false),
        (Compare::ModRevision(missing.clone(), changed), false),
        (Compare::ModRevision(missing.clone(), Revision(0)), true),
        (Compare::PrefixUnchanged(key.clone(), changed), true),
        (Compare::PrefixUnchanged(key.clone(), created), false),
        (Compare::PrefixUnchanged(missing.clone(), Revision(1)), true),
        (Compare::PrefixUnchanged(format!("{at}ke"), created), false),
    ];
    for (compare, holds) in table {
        let writes = vec![put_with(&format!("{at}written"), b"", None)];
        let transaction = Transaction { compares: vec![compare.clone()], writes, ..Transaction::default() };
        assert_eq!(transact(other, transaction).await.applied, holds, "{compare:?}");
    }
}

async fn one_compare_that_fails_applies_nothing<M: Metadata>(one: &M, other: &M, at: &str) {
    let (here, new) = (format!("{at}here"), format!("{at}new"));
    put(one, &here, b"1").await;
    let transaction = Transaction {
        compares: vec![Compare::Present(here.clone()), Compare::Present(new.clone())],
        writes: vec![put_with(&new, b"", None), delete(&here)],
        reads: vec![here.clone(), new.clone()],
    };
    let result = transact(one, transaction).await;
    assert!(!result.applied);
    assert_eq!(result.reads[0].as_ref().map(|entry| entry.value.as_slice()), Some(&b"1"[..]));
    assert_eq!(result.reads[1], None);
    assert_eq!(keys(other, at).await, [here]);
}

async fn reads_see_the_writes_of_their_transaction<M: Metadata>(one: &M, _: &M, at: &str) {
    let (gone, new) = (format!("{at}gone"), format!("{at}new"));
    put(one, &gone, b"1").await;
    let transaction = Transaction {
        compares: vec![Compare::Absent(new.clone())],
        writes: vec![delete(&gone), put_with(&new, b"2", None)],
        reads: vec![new.clone(), gone, new.clone()],
    };
    let result = transact(one, transaction).await;
    let entry =
        Entry { key: new, value: b"2".to_vec(), create_revision: result.revision, mod_revision: result.revision };
    assert_eq!(result.reads, [Some(entry.clone()), None, Some(entry)]);
}

async fn a_transaction_has_one_revision_and_changing_nothing_has_none<M: Metadata>(one: &M, other: &M, at: &str) {
    let revision = write(one, (0..10).map(|index| put_with(&format!("{at}{index}"), b"", None)).collect()).await;
    let range = within(other.range(at)).await.expect("the store answers");
    assert!(range.entries.iter().all(|entry| entry.mod_revision == revision));
    assert!(range.revision >= revision);
    // Other cases change the store meanwhile, so only what is below our prefix tells.
    let mut watch = within(other.watch(at, revision)).await.expect("a watch");
    assert_eq!(events(&mut watch, 10).await.len(), 10);
    write(one, vec![delete(&format!("{at}missing"))]).await;
    let last = put(one, &format!("{at}last"), b"").await;
    assert_eq!(events(&mut watch, 1).await[0].revision(), last);
}

async fn malformed_transactions_are_refused<M: Metadata>(one: &M, other: &M, at: &str) {
    let key = format!("{at}key");
    let twice = vec![put_with(&key, b"1", None), put_with(&key, b"2", None)];
    let many = (0..129).map(|index| put_with(&format!("{at}{index}"), b"", None)).collect();
    let large = vec![put_with(&key, &vec![0; 3 << 20], None)];
    for writes in [twice, many, large, vec![put_with("", b"", None)]] {
        let refused = within(one.transact(Transaction { writes, ..Transaction::default() })).await;
        assert!(matches!(refused, Err(MetadataError::Refused { .. })), "{refused:?}");
    }
    assert_eq!(keys(other, at).await, Vec::<String>::new());
}

async fn deleting_an_absent_key_is_no_error<M: Metadata>(one: &M, _: &M, at: &str) {
    let writes = vec![delete(&format!("{at}missing"))];
    let result = transact(one, Transaction { writes, ..Transaction::default() }).await;
    assert!(result.applied);
}

async fn only_one_of_two_creators_wins<M: Metadata>(one: &M, other: &M, at: &str) {
    for round in 0..10 {
        let key = format!("{at}{round}");
        let create = |value: &[u8]| Transaction {
            compares: vec![Compare::Absent(key.clone())],
            writes: vec![put_with(&key, value, None)],
            reads: vec![key.clone()],
        };
        let (first, second) = futures::join!(transact(one, create(b"one")), transact(other, create(b"other")));
        assert!(first.applied != second.applied, "round {round}");
        assert_eq!(first.reads, second.reads, "both see the winner's, round {round}");
    }
}

async fn a_lease_that_ends_deletes_its_keys_and_watchers_see_it<M: Metadata>(one: &M, other: &M, at: &str) {
    let lease = within(one.grant_lease(SHORT_TTL)).await.expect("a lease");
    let (first, second) = (format!("{at}first"), format!("{at}second"));
    let revision = write(one, vec![put_with(&first, b"1", Some(lease)), put_with(&second, b"2", Some(lease))]).await;
    let mut watch = within(other.watch(at, Revision(revision.0 + 1))).await.expect("a watch");
    let seen = events(&mut watch, 2).await;
    let mut sorted = brief(&seen);
    sorted.sort();
    assert_eq!(sorted, [(first.as_str(), None), (second.as_str(), None)]);
    assert_eq!(keys(other, at).await, Vec::<String>::new());
    let gone = within(one.keep_alive(lease)).await;
    assert_eq!(gone, Err(MetadataError::LeaseGone(lease)));
}

async fn keep_alive_extends_a_lease<M: Metadata>(one: &M, other: &M, at: &str) {
    let kept = within(one.grant_lease(Duration::from_secs(6))).await.expect("a lease");
    write(one, vec![put_with(&format!("{at}kept"), b"", Some(kept))]).await;
    // Leases granted one after the other measure the time: each lasts for at least its TTL.
    for _ in 0..4 {
        let measure = within(one.grant_lease(SHORT_TTL)).await.expect("a lease");
        let key = format!("{at}measure");
        write(one, vec![put_with(&key, b"", Some(measure))]).await;
        eventually("the short lease ends", async || {
            within(one.keep_alive(kept)).await.expect("kept alive in time");
            get(other, &key).await.is_none()
        })
        .await;
    }
    assert_eq!(keys(other, at).await, [format!("{at}kept")]);
}

async fn a_revoked_lease_is_gone_with_its_keys<M: Metadata>(one: &M, other: &M, at: &str) {
    let lease = within(one.grant_lease(LONG_TTL)).await.expect("a lease");
    let (bound, free) = (format!("{at}bound"), format!("{at}free"));
    write(one, vec![put_with(&bound, b"", Some(lease)), put_with(&free, b"", None)]).await;
    assert_eq!(keys(other, at).await, [bound, free.clone()]);
    within(other.revoke_lease(lease)).await.expect("any client may");
    assert_eq!(keys(one, at).await, [free]);
    assert_eq!(within(one.keep_alive(lease)).await, Err(MetadataError::LeaseGone(lease)));
    assert_eq!(within(one.revoke_lease(lease)).await, Ok(()), "a lease that is gone is no error");
}

async fn a_put_with_a_lease_that_is_gone_is_refused<M: Metadata>(one: &M, other: &M, at: &str) {
    let lease = within(one.grant_lease(LONG_TTL)).await.expect("a lease");
    within(one.revoke_lease(lease)).await.expect("revoked");
    let (bound, free) = (format!("{at}bound"), format!("{at}free"));
    let writes = vec![put_with(&free, b"", None), put_with(&bound, b"", Some(lease))];
    let compares = vec![Compare::Present(free.clone())];
    let refused = within(one.transact(Transaction { writes: writes.clone(), ..Transaction::default() })).await;
    assert_eq!(refused, Err(MetadataError::LeaseGone(lease)));
    assert_eq!(keys(other, at).await, Vec::<String>::new(), "nothing of it was applied");
    // Nobody asks for the lease where the compares fail.
    let failed = transact(one, Transaction { compares, writes, ..Transaction::default() }).await;
    assert!(!failed.applied);
}

async fn a_key_put_again_without_its_lease_outlives_it<M: Metadata>(one: &M, other: &M, at: &str) {
    let lease = within(one.grant_lease(LONG_TTL)).await.expect("a lease");
    let key = format!("{at}key");
    write(one, vec![put_with(&key, b"1", Some(lease))]).await;
    put(one, &key, b"2").await;
    within(one.revoke_lease(lease)).await.expect("revoked");
    assert_eq!(get(other, &key).await.map(|entry| entry.value), Some(b"2".to_vec()));
}

async fn a_watch_from_the_past_misses_nothing_and_is_in_order<M: Metadata>(one: &M, other: &M, at: &str) {
    let key = format!("{at}key");
    let start = put(one, &key, b"0").await;
    for value in 1..50_u8 {
        put(one, &key, &[value]).await;
    }
    let mut watch = within(other.watch(at, start)).await.expect("a watch");
    for value in 50..100_u8 {
        put(one, &key, &[value]).await;
    }
    write(one, vec![delete(&key)]).await;
    let seen = events(&mut watch, 101).await;
    let expected: Vec<Option<Vec<u8>>> =
        [Some(b"0".to_vec())].into_iter().chain((1..100).map(|value| Some(vec![value]))).chain([None]).collect();
    let values: Vec<Option<Vec<u8>>> = brief(&seen).iter().map(|(_, value)| value.map(<[u8]>::to_vec)).collect();
    assert_eq!(values, expected);
    assert!(seen.is_sorted_by(|earlier, later| earlier.revision() < later.revision()));
    assert!(matches!(&seen[0], Event::Put(entry) if entry.create_revision == start && entry.mod_revision == start));
}

async fn a_watch_sees_its_prefix_only<M: Metadata>(one: &M, other: &M, at: &str) {
    let start = put(one, &format!("{at}nodes/1"), b"").await;
    let mut watch = within(other.watch(&format!("{at}nodes/1/"), start)).await.expect("a watch");
    put(one, &format!("{at}nodes/10/heartbeat"), b"").await;
    put(one, &format!("{at}volumes/1"), b"").await;
    put(one, &format!("{at}nodes/1/heartbeat"), b"").await;
    let seen = events(&mut watch, 1).await;
    assert_eq!(seen[0].key(), format!("{at}nodes/1/heartbeat"));
}

async fn a_watch_from_a_range_continues_it<M: Metadata>(one: &M, other: &M, at: &str) {
    put(one, &format!("{at}in-range"), b"").await;
    let range = within(other.range(at)).await.expect("the store answers");
    put(one, &format!("{at}behind"), b"").await;
    let mut watch = within(other.watch(at, Revision(range.revision.0 + 1))).await.expect("a watch");
    assert_eq!(events(&mut watch, 1).await[0].key(), format!("{at}behind"));
}

async fn a_dropped_watch_disturbs_nobody<M: Metadata>(one: &M, other: &M, at: &str) {
    let start = put(one, &format!("{at}0"), b"").await;
    let mut stays = within(other.watch(at, start)).await.expect("a watch");
    let leaves = within(other.watch(at, start)).await.expect("a watch");
    events(&mut stays, 1).await;
    drop(leaves);
    put(one, &format!("{at}1"), b"").await;
    events(&mut stays, 1).await;
}
