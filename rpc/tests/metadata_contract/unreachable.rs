//! Servers that are not there, and servers that do not answer: every call ends within its deadline, says what it
//! tried, and tells "nothing took place" from "nobody knows".

use crate::cases::{put_with, within};
use crate::run;
use crate::servers::free_port;
use std::net::TcpListener;
use std::time::{Duration, Instant};
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::metadata::{LeaseId, Metadata, MetadataError, Revision, Transaction};

const DEADLINE: Duration = Duration::from_millis(400);
/// The machine may be busy.
const SLACK: Duration = Duration::from_secs(5);

fn write() -> Transaction {
    Transaction { writes: vec![put_with("key", b"value", None)], ..Transaction::default() }
}

fn connect(url: &str) -> AnyMetadata {
    AnyMetadata::connect(url, DEADLINE).expect("the URL is well formed")
}

/// Every kind of call in turn; what each ended with.
async fn errors_of(store: &AnyMetadata) -> Vec<(&'static str, MetadataError)> {
    let begun = Instant::now();
    let lease = LeaseId(1);
    let ended = vec![
        ("get", within(store.get("key")).await.map(drop)),
        ("range", within(store.range("prefix")).await.map(drop)),
        ("watch", within(store.watch("prefix", Revision(1))).await.map(drop)),
        ("transact", within(store.transact(write())).await.map(drop)),
        ("grant lease", within(store.grant_lease(Duration::from_secs(10))).await.map(drop)),
        ("keep alive", within(store.keep_alive(lease)).await),
        ("revoke", within(store.revoke_lease(lease)).await),
    ];
    let calls = ended.len() as u32;
    assert!(begun.elapsed() < calls * DEADLINE + SLACK, "{calls} calls took {:?}", begun.elapsed());
    ended.into_iter().map(|(call, ended)| (call, ended.expect_err(call))).collect()
}

#[test]
fn nobody_at_the_address_means_that_nothing_took_place() {
    let (first, second) = (free_port(), free_port());
    let embedded = format!("torus://127.0.0.1:{first}");
    let etcd = format!("etcd://127.0.0.1:{first},127.0.0.1:{second}");
    run(async {
        for url in [embedded, etcd] {
            for (call, error) in errors_of(&connect(&url)).await {
                let MetadataError::Unreachable { tried, because, .. } = &error else { panic!("{call}: {error}") };
                assert_eq!(*tried, url);
                assert!(because.contains("refused"), "{call}: {because}");
            }
        }
    });
}

#[test]
fn every_etcd_endpoint_that_was_tried_is_named() {
    let (first, second) = (free_port(), free_port());
    run(async {
        let store = connect(&format!("127.0.0.1:{first},127.0.0.1:{second}"));
        let error = within(store.get("key")).await.expect_err("nobody is there").to_string();
        assert!(error.contains(&first.to_string()) && error.contains(&second.to_string()), "{error}");
    });
}

#[test]
fn a_server_that_takes_a_transaction_and_never_answers_leaves_it_unknown() {
    // The kernel accepts connections; nobody ever reads them.
    let silent = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let url = format!("torus://{}", silent.local_addr().expect("it is bound"));
    run(async {
        for (call, error) in errors_of(&connect(&url)).await {
            match call {
                "get" | "range" | "watch" => {
                    assert!(matches!(error, MetadataError::Unreachable { .. }), "{call}: {error}");
                }
                _ => assert!(matches!(error, MetadataError::Unknown { .. }), "{call}: {error}"),
            }
        }
    });
}

#[test]
fn a_silent_etcd_endpoint_is_never_sent_a_transaction() {
    let silent = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let url = format!("etcd://{}", silent.local_addr().expect("it is bound"));
    run(async {
        let error = within(connect(&url).transact(write())).await.expect_err("nobody answers");
        assert!(matches!(error, MetadataError::Unreachable { .. }), "{error}");
    });
}

#[test]
fn a_host_name_that_does_not_resolve_is_named() {
    run(async {
        for url in ["torus://no-such-host.invalid:1", "etcd://no-such-host.invalid:1"] {
            let error = within(connect(url).get("key")).await.expect_err("it does not exist").to_string();
            assert!(error.contains("no-such-host.invalid"), "{error}");
        }
    });
}
