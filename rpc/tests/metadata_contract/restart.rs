//! A server is killed and comes back: what was answered is still there, and its clients go on by themselves.

use crate::cases::{brief, events, put, put_with, write};
use crate::servers::Server;
use crate::{DEADLINE, connect, eventually, within};
use std::cell::{Cell, RefCell};
use std::time::Duration;
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::metadata::{Metadata, MetadataError, Revision, Transaction, Watch};

pub async fn clients_go_on(server: &mut impl Server) {
    let store = connect(server);
    let lease = within(store.grant_lease(Duration::from_secs(300))).await.expect("a lease");
    let first = put(&store, "restart/1", b"one").await;
    write(&store, vec![put_with("restart/2", b"two", Some(lease))]).await;
    let mut watch = within(store.watch("restart/", first)).await.expect("a watch");
    let mut from_the_past = within(store.watch("restart/", Revision(first.0 + 1))).await.expect("a watch");
    assert_eq!(events(&mut watch, 2).await.len(), 2);

    server.kill();
    let hasty = AnyMetadata::connect(&server.url(), Duration::from_millis(300)).expect("a URL");
    assert!(matches!(within(hasty.get("restart/1")).await, Err(MetadataError::Unreachable { .. })));
    server.start_again();

    // The very first call goes through, within its deadline.
    let range = within(store.range("restart/")).await.expect("the client reconnects");
    let values: Vec<_> = range.entries.iter().map(|entry| (entry.key.as_str(), entry.value.as_slice())).collect();
    assert_eq!(values, [("restart/1", &b"one"[..]), ("restart/2", b"two")]);
    assert_eq!(range.entries[0].create_revision, first);

    let third = put(&store, "restart/3", b"three").await;
    assert!(third > range.revision, "revisions go on where they were");
    assert_eq!(brief(&events(&mut watch, 1).await), [("restart/3", Some(&b"three"[..]))]);
    let seen = events(&mut from_the_past, 2).await;
    assert_eq!(brief(&seen), [("restart/2", Some(&b"two"[..])), ("restart/3", Some(b"three"))]);

    within(store.keep_alive(lease)).await.expect("leases survive");
    within(store.revoke_lease(lease)).await.expect("and know their keys");
    assert_eq!(brief(&events(&mut watch, 1).await), [("restart/2", None)]);
    let next = within(store.grant_lease(DEADLINE)).await.expect("a lease");
    assert_ne!(next, lease, "ids are not used again");

    // Again, and this time somebody else writes while the watch is away.
    server.kill();
    server.start_again();
    let other = connect(server);
    eventually("the other client is served", async || other.get("restart/1").await.is_ok()).await;
    put(&other, "restart/4", b"four").await;
    assert_eq!(brief(&events(&mut watch, 1).await), [("restart/4", Some(&b"four"[..]))]);
}

/// A watch that has seen revisions which the store, restored from a backup, has yet to draw would be told nothing until
/// they are passed, and lack what they then are.
pub async fn a_watch_ends_when_the_store_went_back(server: &mut impl Server) {
    let store = connect(server);
    let first = put(&store, "back/1", b"one").await;
    server.kill();
    server.back_up();
    server.start_again();
    let mut watch = within(store.watch("back/", first)).await.expect("a watch");
    for _ in 0..10 {
        put(&store, "back/2", b"two").await;
    }
    assert_eq!(events(&mut watch, 11).await.len(), 11);
    server.kill();
    server.restore();
    server.start_again();
    let ended = within(watch.next()).await;
    let Err(MetadataError::Compacted { from, oldest }) = ended else { panic!("it did not end: {ended:?}") };
    assert!(from > oldest, "from {from:?}, {oldest:?}");
    let now = within(store.range("back/")).await.expect("the store is there");
    assert_eq!(now.entries.len(), 1, "it went back");
    let mut watch = within(store.watch("back/", Revision(now.revision.0 + 1))).await.expect("a watch");
    put(&store, "back/3", b"three").await;
    assert_eq!(brief(&events(&mut watch, 1).await), [("back/3", Some(&b"three"[..]))]);
}

/// Writes one key after the other while the server is killed under them, round after round.
pub async fn nothing_that_was_answered_is_lost(server: &mut impl Server) {
    const ROUNDS: usize = 4;
    const KEYS_PER_ROUND: usize = 40;
    let store = connect(server);
    let answered = RefCell::new(Vec::new());
    let is_over = Cell::new(false);
    let writer = async {
        for index in 0.. {
            let key = format!("written/{index:06}");
            let writes = vec![put_with(&key, b"value", None)];
            match store.transact(Transaction { writes, ..Transaction::default() }).await {
                Ok(result) => answered.borrow_mut().push((key, result.revision)),
                Err(MetadataError::Unknown { .. }) => {}
                Err(error) => panic!("a restart is no reason for this: {error}"),
            }
            if is_over.get() {
                return;
            }
        }
    };
    let killer = async {
        for round in 1..=ROUNDS {
            let enough = async || answered.borrow().len() >= round * KEYS_PER_ROUND;
            eventually("the writer gets on", enough).await;
            server.kill();
            server.start_again();
        }
        is_over.set(true);
    };
    within(async { futures::join!(writer, killer) }).await;
    let range = within(store.range("written/")).await.expect("the store answers");
    for (key, revision) in answered.into_inner() {
        let found = range.entries.iter().find(|entry| entry.key == key).map(|entry| entry.mod_revision);
        assert_eq!(found, Some(revision), "{key} was answered and is lost");
    }
}
