//! One contract for every metadata store: what the memory store does in the simulation, the embedded one does on one
//! machine and etcd does in a cluster. `cases` holds the contract, `servers` real servers in processes of their own,
//! which `restart` kills and starts again; `unreachable` is about servers that are not there or do not answer.

mod cases;
mod restart;
mod servers;
mod unreachable;

use cases::{eventually, within};
use servers::{EmbeddedProcess, Etcd, Server};
use std::time::Duration;
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::metadata::memory::MemoryStore;
use torus_rpc::metadata::{Metadata, MetadataError, Revision, Transaction, Watch, Write};
use torus_rpc::runtime::{Clock, Instant};

/// Long enough for a server that starts on a busy machine.
const DEADLINE: Duration = Duration::from_secs(30);

/// Real time, for the memory store.
#[derive(Clone)]
struct RealClock(std::time::Instant);

impl Clock for RealClock {
    fn now(&self) -> Instant {
        Instant(self.0.elapsed())
    }
    fn sleep(&self, wait: Duration) -> impl Future<Output = ()> + 'static {
        tokio::time::sleep(wait)
    }
}

/// Timers for the tests; the stores under test need no runtime around them.
fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime for the test");
    tokio::task::LocalSet::new().block_on(&runtime, test);
}

fn memory() -> MemoryStore<RealClock> {
    MemoryStore::new(RealClock(std::time::Instant::now()))
}

fn connect(server: &impl Server) -> AnyMetadata {
    AnyMetadata::connect(&server.url(), DEADLINE).expect("the URL of a server of ours is well formed")
}

#[test]
fn the_memory_store_keeps_the_contract() {
    run(async {
        let store = memory();
        cases::keep_contract(&store, &store.another_client(RealClock(std::time::Instant::now()))).await;
    });
}

#[test]
fn the_embedded_store_keeps_the_contract() {
    let server = EmbeddedProcess::start();
    run(async { cases::keep_contract(&connect(&server), &connect(&server)).await });
}

#[test]
fn etcd_keeps_the_contract() {
    let server = Etcd::start();
    run(async { cases::keep_contract(&connect(&server), &connect(&server)).await });
}

#[test]
fn the_embedded_store_survives_kill_9_and_its_clients_go_on() {
    let mut server = EmbeddedProcess::start();
    run(async { restart::clients_go_on(&mut server).await });
}

#[test]
fn etcd_survives_kill_9_and_its_clients_go_on() {
    let mut server = Etcd::start();
    run(async { restart::clients_go_on(&mut server).await });
}

#[test]
fn a_watch_of_the_embedded_store_ends_when_it_was_restored_from_a_backup() {
    let mut server = EmbeddedProcess::start();
    run(async { restart::a_watch_ends_when_the_store_went_back(&mut server).await });
}

#[test]
fn a_watch_of_etcd_ends_when_it_was_restored_from_a_backup() {
    let mut server = Etcd::start();
    run(async { restart::a_watch_ends_when_the_store_went_back(&mut server).await });
}

#[test]
fn the_embedded_store_loses_nothing_it_answered_however_it_is_killed() {
    let mut server = EmbeddedProcess::start();
    run(async { restart::nothing_that_was_answered_is_lost(&mut server).await });
}

#[test]
fn a_client_of_etcd_is_told_nothing_that_is_lost() {
    let mut server = Etcd::start();
    run(async { restart::nothing_that_was_answered_is_lost(&mut server).await });
}

#[test]
fn answers_may_be_awaited_on_glommio() {
    let server = EmbeddedProcess::start();
    let store = connect(&server);
    let test = glommio::LocalExecutorBuilder::default().spawn(move || async move {
        let mut watch = store.watch("glommio/", Revision(1)).await.expect("a watch");
        let put = Write::Put { key: "glommio/key".to_owned(), value: b"value".to_vec(), lease: None };
        store.transact(Transaction { writes: vec![put], ..Transaction::default() }).await.expect("an answer");
        assert_eq!(watch.next().await.expect("events").len(), 1);
    });
    test.expect("an executor").join().expect("the test ends");
}

#[test]
fn a_dead_and_a_silent_etcd_member_do_not_keep_clients_from_a_live_one() {
    let server = Etcd::start();
    let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let silent = silent.local_addr().expect("it is bound");
    let url = format!("etcd://127.0.0.1:{},{silent},{}", servers::free_port(), server.address());
    run(async {
        within(connect(&server).get("key")).await.expect("etcd has started");
        let store = AnyMetadata::connect(&url, Duration::from_secs(8)).expect("a URL");
        let lease = within(store.grant_lease(Duration::from_secs(60))).await.expect("one of them answers");
        within(store.keep_alive(lease)).await.expect("and goes on answering");
    });
}

#[test]
fn etcd_reports_what_it_has_compacted() {
    let server = Etcd::start();
    run(async {
        let store = connect(&server);
        cases::put(&store, "compacted/key", b"1").await;
        let last = cases::put(&store, "compacted/key", b"2").await;
        let mut admin = etcd_client::Client::connect([server.address()], None).await.expect("etcd is there");
        admin.compact(last.0, None).await.expect("etcd compacts");
        let ended = match within(store.watch("compacted/", Revision(1))).await {
            Ok(mut watch) => within(watch.next()).await.map(drop),
            Err(error) => Err(error),
        };
        assert_eq!(ended, Err(MetadataError::Compacted { from: Revision(1), oldest: last }));
    });
}

#[test]
fn the_memory_store_reports_what_it_has_compacted() {
    run(async {
        let store = memory();
        for _ in 0..torus_schema::limits::METADATA_HISTORY_REVISIONS_MAX + 1 {
            cases::put(&store, "compacted/key", b"1").await;
        }
        let mut watch = store.watch("compacted/", Revision(1)).await.expect("a watch");
        let ended = within(watch.next()).await;
        assert_eq!(ended, Err(MetadataError::Compacted { from: Revision(1), oldest: Revision(3) }));
    });
}

/// Not a test: the server process of `EmbeddedProcess`.
#[test]
#[ignore = "started by other tests, as the process they kill"]
fn embedded_server_process() {
    servers::serve_embedded_if_asked();
}
