//! Many volumes in one client process, a real etcd, and a node that falls silent (interleaving 26). TORUS_VOLUMES says
//! how many (CI: 100; the figures in docs/replication.md are of 1,000).

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, FuturesUnordered};
use nix::sys::signal::Signal;
use std::time::{Duration, Instant};
use torus_frontends::admin::volume_create::{NewVolume, create};
use torus_frontends::device::{Device, Exports};
use torus_frontends::volume::{AttachedVolume, Attacher, VolumeExports};
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::runtime::glommio::{GlommioRuntime, run};
use torus_tests::cluster::{Cluster, ClusterOptions};
use torus_tests::store::StoreKind;

const DEADLINE: Duration = Duration::from_secs(30);
const STALL_MAX: Duration = Duration::from_secs(3);
const BLOCK: u64 = 4096;

type Runtime = GlommioRuntime<AnyMetadata>;

fn volumes() -> usize {
    std::env::var("TORUS_VOLUMES").map_or(100, |count| count.parse().expect("TORUS_VOLUMES is a number"))
}

async fn attach_all(runtime: &Runtime, exports: &VolumeExports<Runtime>) -> Vec<AttachedVolume<Runtime>> {
    let attached = stream::iter(0..volumes()).map(|number| async move {
        let name = format!("v{number}");
        let new = NewVolume {
            name: name.clone(),
            size_bytes: 64 << 20,
            replicas: None,
            min_replicas: None,
            width: Some(4),
            write_through: false,
        };
        create(runtime, &new, DEADLINE).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        exports.attach(&name).await.unwrap_or_else(|error| panic!("{name}: {error}"))
    });
    attached.buffer_unordered(16).collect().await
}

/// The longest of one write to each.
async fn write_all(volumes: &[AttachedVolume<Runtime>]) -> Duration {
    let data = Bytes::from(vec![7; BLOCK as usize]);
    let writes: FuturesUnordered<_> = volumes
        .iter()
        .map(|volume| async {
            let began = Instant::now();
            volume.write(0, data.clone(), false).await.expect("two replicas are enough");
            began.elapsed()
        })
        .collect();
    writes.fold(Duration::ZERO, |longest, took| std::future::ready(longest.max(took))).await
}

#[test]
fn many_volumes_stall_for_three_seconds_at_most_when_a_node_falls_silent() {
    let options = ClusterOptions { store: StoreKind::Etcd, size: "1GiB", ..ClusterOptions::new("thousand", 3) };
    let mut cluster = Cluster::start(options);
    let metadata = AnyMetadata::connect(&cluster.url(), DEADLINE).expect("our own URL is understood");
    let node = cluster.node(2);
    let stalled = run("test", None, async {
        let runtime = Runtime::new(metadata);
        let attacher = Attacher { host: "test".into(), process: "test".into(), pid: 1, force: false, repair: false };
        let exports = VolumeExports::new(runtime.clone(), attacher);
        let volumes = attach_all(&runtime, &exports).await;
        let before = write_all(&volumes).await;
        // Like a power loss: nothing is heard of it any more, and no connection is refused.
        node.signal(Signal::SIGSTOP);
        let stalled = write_all(&volumes).await;
        let counters = exports.counters();
        let transactions = counters.status_transactions.get();
        println!("{} volumes: {before:?} before, stalled for {stalled:?}, {transactions} transactions", volumes.len());
        assert_eq!(counters.replicas_marked_stale.get(), volumes.len() as u64);
        assert_eq!(transactions, volumes.len() as u64);
        node.signal(Signal::SIGCONT);
        drop(volumes);
        exports.release_all().await;
        stalled
    });
    let stalled = stalled.expect("an executor starts");
    assert!(stalled <= STALL_MAX, "{stalled:?}");
}
