//! Hosts that are cut off, paused, killed and come back, one trouble after the other, under load that knows what it was
//! promised and under fio's own verification. Real processes: three nodes, three members of etcd and an NBD server, each
//! on a host of its own (network namespaces), with the kernel's packet filter between them.
//!
//! With three replicas of which two are enough, no single trouble may cost an error, and when it is over every replica
//! has to be in sync again without anybody's help.
//!
//! `TORUS_TROUBLE_SECONDS=1800` makes it as long as one likes, `TORUS_TROUBLE_SEED` changes what happens.

use nix::sys::signal::Signal;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use torus_tests::cluster::{Cluster, ClusterOptions, NbdServer, client_host, hosts_for, node_host, store_hosts};
use torus_tests::nbd::connect;
use torus_tests::network::Network;
use torus_tests::store::StoreKind;
use torus_tests::tools::fio_verified;
use torus_tests::wait;
use torus_tests::witness::{Promise, Witness};
use torus_tests::{Outcome, process};

const NODES: usize = 3;
const VOLUME_BYTES: u64 = 32 << 20;
const BACKUP: &str = "backup";
/// Longer than it takes to give up a node, to fetch what it missed, and to find a new writer.
const IN_SYNC_WITHIN: Duration = Duration::from_secs(90);

#[derive(Clone, Copy, Debug)]
enum Trouble {
    NodeFromClient,
    ClientToNode,
    NodeToClient,
    NodeFromStore,
    NodeFromNodes,
    NodeFromAll,
    ClientFromStore,
    PauseNode,
    KillNode,
    StopNode,
    ShiftClock,
    PauseStore,
    KillStore,
    PauseLeader,
    KillLeader,
    LeaderFromMembers,
    RestoreStore,
    PauseClient,
}

const TROUBLES: [Trouble; 18] = [
    Trouble::NodeFromClient,
    Trouble::KillNode,
    Trouble::KillStore,
    Trouble::RestoreStore,
    Trouble::PauseNode,
    Trouble::ClientFromStore,
    Trouble::KillLeader,
    Trouble::NodeFromAll,
    Trouble::ClientToNode,
    Trouble::PauseLeader,
    Trouble::StopNode,
    Trouble::NodeToClient,
    Trouble::PauseStore,
    Trouble::NodeFromStore,
    Trouble::ShiftClock,
    Trouble::LeaderFromMembers,
    Trouble::NodeFromNodes,
    Trouble::PauseClient,
];

impl Trouble {
    /// What I/O does not wait for may last longer than a lease.
    fn is_long(self) -> bool {
        use Trouble::*;
        let of_store = matches!(self, PauseStore | KillStore | PauseLeader | KillLeader | LeaderFromMembers);
        of_store || matches!(self, NodeFromStore | NodeFromAll | ClientFromStore | PauseClient)
    }
}

fn others(count: usize, own: usize) -> impl Iterator<Item = usize> {
    (0..count).filter(move |other| *other != own)
}

struct Bed {
    /// First, so that what it said can be shown before the cluster's folder goes.
    server: NbdServer,
    cluster: Cluster,
    network: Network,
    random: u64,
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// The length of a trouble, not a wait for something.
fn pass(time: Duration) {
    let _ = wait::within(time, || None::<()>);
}

impl Bed {
    fn new(network: Network) -> Self {
        let options = ClusterOptions {
            store: StoreKind::EtcdOfThree,
            size: "1GiB",
            network: Some(network.clone()),
            ..ClusterOptions::new("network", NODES)
        };
        let mut cluster = Cluster::start(options);
        for volume in ["witness", "fio"] {
            let size = VOLUME_BYTES.to_string();
            cluster.torusblk(&["volume", "create", volume, &size]).ok();
        }
        // Attached from the start: a volume that is let go between two runs of fio cannot be had while etcd is away.
        let server = cluster.serve_with(&["--volume", "witness", "--volume", "fio"]);
        // What a store forgets that is restored from a backup must not be that they were attached.
        ["witness", "fio"].iter().for_each(|volume| drop(connect(server.address, volume)));
        Self { server, cluster, network, random: number("TORUS_TROUBLE_SEED", 1) }
    }

    fn random(&mut self, below: u64) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.random >> 33) % below
    }

    fn trouble(&mut self, trouble: Trouble) {
        let node = self.random(NODES as u64) as usize;
        let short = Duration::from_millis(200 + self.random(5000));
        // A lease ends after 10 s.
        let long = Duration::from_secs(8 + self.random(8));
        let (host, client) = (node_host(node), client_host(NODES));
        println!("{trouble:?}, node {node}, {short:?} or {long:?}");
        let network = self.network.clone();
        match trouble {
            Trouble::NodeFromClient => network.part(host, client),
            Trouble::ClientToNode => network.cut(client, host),
            Trouble::NodeToClient => network.cut(host, client),
            Trouble::NodeFromStore => store_hosts(NODES).iter().for_each(|store| network.part(host, *store)),
            Trouble::NodeFromNodes => others(NODES, node).for_each(|other| network.part(host, node_host(other))),
            Trouble::NodeFromAll => others(hosts_for(NODES), host).for_each(|other| network.part(host, other)),
            Trouble::ClientFromStore => store_hosts(NODES).iter().for_each(|store| network.part(client, *store)),
            Trouble::PauseNode => self.cluster.node(node).signal(Signal::SIGSTOP),
            Trouble::KillNode => self.cluster.kill_node(node),
            Trouble::StopNode | Trouble::ShiftClock => assert!(self.cluster.stop_node(node).success()),
            Trouble::PauseStore => self.cluster.store.freeze(),
            Trouble::KillStore => self.cluster.store.kill(),
            Trouble::PauseLeader => self.cluster.store.freeze_member(self.cluster.store.leader()),
            Trouble::KillLeader => self.cluster.store.kill_member(self.cluster.store.leader()),
            Trouble::LeaderFromMembers => {
                let leader = self.cluster.store.leader();
                let hosts = store_hosts(NODES);
                others(hosts.len(), leader).for_each(|other| network.part(hosts[leader], hosts[other]));
            }
            Trouble::RestoreStore => self.restore_store(node, short),
            Trouble::PauseClient => self.server.process.signal(Signal::SIGSTOP),
        }
        pass(if trouble.is_long() { long } else { short });
        match trouble {
            Trouble::PauseNode => self.cluster.node(node).signal(Signal::SIGCONT),
            Trouble::KillNode | Trouble::StopNode => self.cluster.start_node(node),
            Trouble::ShiftClock => {
                let offset = self.random(7200) as i64 - 3600;
                self.cluster.start_node_shifted(node, offset);
            }
            Trouble::PauseStore | Trouble::PauseLeader => self.cluster.store.thaw(),
            Trouble::KillStore | Trouble::KillLeader => self.cluster.store.start_again(),
            Trouble::PauseClient => self.server.process.signal(Signal::SIGCONT),
            _ => network.heal(),
        }
    }

    /// etcd forgets that a node got another address. That a replica was stale meanwhile it must not forget: such a volume
    /// is no longer attached, which `etcd_restored.rs` shows.
    fn restore_store(&mut self, node: usize, age: Duration) {
        let backed_up = wait::within(IN_SYNC_WITHIN, || {
            self.await_in_sync();
            let before = self.cluster.statuses();
            self.cluster.store.back_up(BACKUP);
            assert!(self.cluster.stop_node(node).success());
            self.cluster.start_node(node);
            pass(age);
            (self.cluster.statuses() == before).then_some(())
        });
        assert!(backed_up.is_some(), "a node is not back before it is missed:\n{}", self.server.process.log());
        self.cluster.store.kill();
        self.cluster.store.restore(BACKUP);
        self.cluster.store.start_again();
    }

    /// Every replica of every volume, by itself.
    fn await_in_sync(&mut self) -> Duration {
        let started = Instant::now();
        assert!(self.cluster.await_in_sync(IN_SYNC_WITHIN), "not in sync:\n{}", self.server.process.log());
        started.elapsed()
    }
}

/// Writes and now and then reads everything back, without an error, until told to stop. Gives how much was written.
fn witness(server: SocketAddr, stop: &AtomicBool) -> usize {
    let mut witness = Witness::new(VOLUME_BYTES, 1);
    let mut client = connect(server, "witness");
    let mut written = 0;
    while !stop.load(Ordering::Relaxed) {
        for round in 0..20 {
            let loaded = witness.load(&mut client, 100, 10 + round * 3);
            written += loaded.unwrap_or_else(|error| panic!("a request failed: {error:?}"));
        }
        witness.verify(&mut client, Promise::Acknowledged).expect("the server is there").expect("no error");
    }
    written
}

/// Runs of fio one after the other, each verified by itself. Gives how many.
fn fio(url: &str, folder: &std::path::Path, stop: &AtomicBool) -> usize {
    let mut runs = 0;
    while !stop.load(Ordering::Relaxed) {
        let mut command = fio_verified(url, "32M", &["--rate_iops=2000", "--bssplit=4k/70:16k/20:64k/10"]);
        command.arg(format!("--randseed={runs}")).current_dir(folder);
        Outcome::of(&mut command).ok();
        runs += 1;
    }
    runs
}

#[test]
fn no_single_trouble_costs_an_error_and_all_replicas_are_in_sync_after_it() {
    let Some(network) = Network::new(hosts_for(NODES)) else { return };
    let seconds = number("TORUS_TROUBLE_SECONDS", 180);
    let mut bed = Bed::new(network);
    let stop = Arc::new(AtomicBool::new(false));
    let failed = Arc::new(AtomicUsize::new(0));
    let (address, url) = (bed.server.address, bed.server.url("fio"));
    let folder = process::temporary_dir("network-fio");
    let loads = {
        let (witness_stop, fio_stop, fio_folder) = (stop.clone(), stop.clone(), folder.path().to_path_buf());
        // Threads that this one starts are on its host.
        let watch = |load: std::thread::JoinHandle<usize>| {
            let failed = failed.clone();
            std::thread::spawn(move || {
                let ended = load.join();
                failed.fetch_add(usize::from(ended.is_err()), Ordering::Relaxed);
                ended
            })
        };
        [
            watch(std::thread::spawn(move || witness(address, &witness_stop))),
            watch(std::thread::spawn(move || fio(&url, &fio_folder, &fio_stop))),
        ]
    };
    let started = Instant::now();
    let mut troubles = 0;
    while started.elapsed() < Duration::from_secs(seconds) && failed.load(Ordering::Relaxed) == 0 {
        let first = number("TORUS_TROUBLE_SEED", 1) as usize;
        bed.trouble(TROUBLES[(first + troubles) % TROUBLES.len()]);
        troubles += 1;
        println!("in sync again after {:?}", bed.await_in_sync());
    }
    stop.store(true, Ordering::Relaxed);
    let [witness, fio] = loads.map(|load| load.join().expect("it only watches"));
    let log = || bed.server.process.log();
    let written = witness.unwrap_or_else(|_| panic!("the witness failed; the server said:\n{}", log()));
    let runs = fio.unwrap_or_else(|_| panic!("fio failed; the server said:\n{}", log()));
    println!("{troubles} troubles in {:?}: {written} writes and {runs} runs of fio, no error", started.elapsed());
}
