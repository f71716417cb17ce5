//! A target on a device in memory and virtual time, frame by frame.

use super::*;
use crate::aoe::hold::{Held, hold};
use crate::aoe::lists::Lists;
use crate::aoe::socket::{Link, Outgoing};
use crate::aoe::store::{Claimed, How, claim};
use crate::aoe::target::receive;
use crate::aoe::wire::{CONFIG_READ, CONFIG_SET, Config, MASK_EDIT, Registers, Reserve};
use crate::device::{ExportInfo, Exports};
use crate::nbd::memory::{MemoryDevice, MemoryExports};
use futures::channel::oneshot;
use futures::future::FutureExt;
use std::future::Future;
use torus_rpc::metadata::memory::MemoryStore;
use torus_rpc::metadata::{Metadata, Transaction, Write};
use torus_rpc::runtime::simulated::{Here, SimulatedRuntime, World};
use torus_rpc::runtime::{Clock, NoDisk};
use torus_schema::limits::AOE_FRAME_LIFETIME;
use torus_schema::records::{NameRecord, OwnerRecord, encode, keys};
use uuid::Uuid;

type Sim = SimulatedRuntime<NoDisk, MemoryStore<Here>>;

const SIZE: u64 = 1 << 20;
const E1_2: Address = Address { shelf: 1, slot: 2 };
const A: MacAddr = MacAddr(2, 0, 0, 0, 0, 1);
const B: MacAddr = MacAddr(2, 0, 0, 0, 0, 3);
const OURS: MacAddr = MacAddr(2, 0, 0, 0, 0, 2);

#[derive(Clone)]
struct Bed {
    runtime: Sim,
    device: MemoryDevice,
    export: Rc<Export<MemoryDevice, Sim>>,
    port: Rc<Port>,
    counts: Arc<Counts>,
}

/// A volume whose owner another process is, for as long as it has an owner's key.
#[derive(Clone)]
struct Contended {
    exports: MemoryExports,
    runtime: Sim,
}

impl Exports for Contended {
    type Device = MemoryDevice;

    async fn list(&self) -> Result<Vec<ExportInfo>, VolumeError> {
        self.exports.list().await
    }

    async fn describe(&self, name: &str) -> Result<ExportInfo, VolumeError> {
        self.exports.describe(name).await
    }

    async fn attach(&self, name: &str) -> Result<MemoryDevice, VolumeError> {
        match self.runtime.metadata().get(&keys::owner(volume())).await.unwrap() {
            Some(_) => Err(VolumeError::Attached { name: name.to_string(), owner: "another".to_string() }),
            None => self.exports.attach(name).await,
        }
    }
}

fn volume() -> VolumeId {
    VolumeId(Uuid::from_u128(7))
}

/// In a world of its own; `is_new`: nobody served the address before.
fn scene<F: Future<Output = ()> + 'static>(is_new: bool, run: impl FnOnce(Bed) -> F + 'static) {
    let world = World::new(1);
    let process = world.start_process();
    let here = Here { world: world.clone(), process };
    let runtime = Sim::new(&world, process, MemoryStore::new(here));
    let device = MemoryDevice::new(SIZE, false);
    let counts = Arc::<Counts>::default();
    let clock = RunningClock::new(runtime.clone());
    runtime.spawn().spawn(Class::Foreground, clock.clone().tick());
    let link = Link { mac: OURS, mtu: 1500, running: true };
    let port = Rc::new(Port::new("eth0", link, counts.clone()));
    let named = Named { address: E1_2, name: "db".to_string(), volume: volume() };
    let around = Around { counts: counts.clone(), clock, hosts: Rc::new(Hosts::from_iter([(B, B)])) };
    let export = Rc::new(Export::new(named, runtime.clone(), around, is_new));
    let bed = Bed { runtime, device, export, port, counts };
    world.block_on(async move {
        let claimed = claim(bed.runtime.metadata(), E1_2, (volume(), "db"), How::default()).await.unwrap();
        assert_eq!(claimed, Claimed::New);
        let value = encode(&NameRecord { volume: volume() });
        let named = Write::Put { key: keys::name("db"), value, lease: None };
        bed.runtime.metadata().transact(Transaction { writes: vec![named], ..Transaction::default() }).await.unwrap();
        run(bed).await;
    });
}

fn owner() -> OwnerRecord {
    OwnerRecord {
        host: "h".into(),
        process: "p".into(),
        pid: 1,
        epoch: torus_schema::ids::Epoch(1),
        lease: "1".into(),
        attached_s: 0,
        lease_ttl_ms: 1000,
        clock_drift_ms: 0,
        repair: false,
    }
}

fn ata(command: u8, lba: u8, data: &[u8]) -> Vec<u8> {
    let flags = Registers::EXTENDED | if data.is_empty() { 0 } else { Registers::WRITE };
    let count = (data.len() / 512).max(1) as u8;
    let mut argument = Vec::new();
    Registers { flags, feature: 0, count, command, lba: [lba, 0, 0, 0, 0, 0] }.put(&mut argument);
    argument.extend_from_slice(data);
    argument
}

impl Bed {
    fn send(&self, from: MacAddr, command: u8, tag: u32, argument: &[u8]) {
        let header = Header { destination: from, source: OURS, version: 1, address: E1_2, command, tag };
        let mut frame = wire::response(&header, from, E1_2, None);
        frame[14] = 0x10;
        frame.extend_from_slice(argument);
        frame[..6].copy_from_slice(&OURS.octets());
        let (header, argument) = receive(&frame, &self.port.face()).unwrap();
        self.export.receive(&header, argument, &self.port);
        self.export.start();
    }

    async fn settle(&self) {
        self.runtime.clock().sleep(Duration::from_millis(1)).await;
    }

    /// What went out since it was asked last.
    async fn answers(&self) -> Vec<Outgoing> {
        self.settle().await;
        self.port.outgoing().now_or_never().unwrap_or_default()
    }

    /// Tag, AoE's error and ATA's status of each.
    async fn statuses(&self) -> Vec<(u32, u8, u8)> {
        let status = |frame: &Outgoing| {
            let head = &frame.head;
            (u32::from_be_bytes([head[20], head[21], head[22], head[23]]), head[15], head.get(27).copied().unwrap_or(0))
        };
        self.answers().await.iter().map(status).collect()
    }

    async fn first_byte(&self) -> u8 {
        match &self.device.read(0, 512).await.unwrap()[0] {
            Piece::Data(data) => data[0],
            Piece::Zeros(_) => 0,
        }
    }
}

#[test]
fn a_write_is_durable_before_it_is_answered_and_once_however_often_it_comes() {
    scene(true, |bed| async move {
        bed.export.own(bed.device.clone());
        bed.device.hold();
        let write = ata(0x34, 0, &[7; 1024]);
        bed.send(A, 0, 0x0002_0001, &write);
        bed.send(A, 0, 0x0002_0001, &write);
        assert_eq!(bed.statuses().await, []);
        bed.device.release();
        assert_eq!(bed.statuses().await, [(0x0002_0001, 0, 0x40)]);
        bed.send(A, 0, 0x0002_0001, &write);
        assert_eq!(bed.statuses().await, [(0x0002_0001, 0, 0x40)]);
        let counts = bed.device.counts();
        assert_eq!((counts.writes, counts.durable, bed.first_byte().await), (1, 1, 7));
        assert_eq!((bed.counts.dropped(Dropped::Duplicate), bed.counts.answered_again.get()), (1, 1));
        bed.send(A, 0, 0x0001_0001, &ata(0x34, 0, &[1; 512]));
        assert_eq!((bed.statuses().await, bed.first_byte().await), (vec![], 7));
    });
}

#[test]
fn an_initiators_other_address_is_the_same_initiator_if_that_was_said() {
    scene(true, |bed| async move {
        let hosts = Rc::new(Hosts::from_iter([(A, A), (B, A)]));
        let around = Around { counts: bed.counts.clone(), clock: RunningClock::new(bed.runtime.clone()), hosts };
        let export = Rc::new(Export::new(bed.export.named.clone(), bed.runtime.clone(), around, true));
        let bed = Bed { export, ..bed };
        bed.export.own(bed.device.clone());
        bed.send(A, 0, 0x0002_0001, &ata(0x34, 0, &[2; 512]));
        assert_eq!(bed.statuses().await.len(), 1);
        bed.send(B, 0, 0x0001_0001, &ata(0x34, 0, &[1; 512]));
        assert_eq!((bed.statuses().await, bed.first_byte().await), (vec![], 2));
    });
}

#[test]
fn a_target_that_began_takes_no_write_before_older_frames_are_gone() {
    scene(false, |bed| async move {
        bed.export.own(bed.device.clone());
        bed.send(A, 0, 0x0002_0001, &ata(0x34, 0, &[1; 512]));
        bed.send(A, 0, 0x0002_0002, &ata(0x24, 0, &[]));
        assert_eq!(bed.statuses().await, [(0x0002_0002, 0, 0x40)], "reads are answered");
        bed.runtime.clock().sleep(AOE_FRAME_LIFETIME).await;
        bed.send(A, 0, 0x0003_0009, &ata(0x34, 0, &[1; 512]));
        assert_eq!((bed.statuses().await.len(), bed.first_byte().await), (1, 1));
    });
}

#[test]
fn who_serves_again_takes_no_write_before_what_was_sent_meanwhile_is_gone() {
    scene(true, |bed| async move {
        bed.export.own(bed.device.clone());
        bed.send(A, 0, 0x0001_0001, &ata(0x34, 0, &[1; 512]));
        assert_eq!(bed.statuses().await.len(), 1, "nobody can have sent to an address that is new");
        bed.export.disown();
        // Another answers now, and a newer write goes there. Then it is ours again, and an older one arrives.
        bed.export.own(bed.device.clone());
        bed.send(A, 0, 0x0002_0002, &ata(0x34, 0, &[2; 512]));
        assert_eq!((bed.statuses().await, bed.first_byte().await), (vec![], 1));
        bed.runtime.clock().sleep(AOE_FRAME_LIFETIME).await;
        bed.send(A, 0, 0x0004_0900, &ata(0x34, 0, &[4; 512]));
        assert_eq!((bed.statuses().await.len(), bed.first_byte().await), (1, 4));
    });
}

#[test]
fn a_reservation_is_answered_when_the_writes_of_others_have_ended() {
    scene(true, |bed| async move {
        bed.export.own(bed.device.clone());
        bed.device.hold();
        bed.send(A, 0, 0x0001_0001, &ata(0x34, 0, &[1; 512]));
        let mut reserve = Vec::new();
        Reserve { command: 1, macs: vec![B] }.put(&mut reserve);
        bed.send(B, 3, 3, &reserve);
        assert_eq!(bed.answers().await.len(), 0, "a write of another is under way");
        bed.device.release();
        let answers = bed.statuses().await;
        assert_eq!(answers.iter().map(|(tag, ..)| *tag).collect::<Vec<_>>(), [0x0001_0001, 3]);
    });
}

#[test]
fn an_address_that_became_another_volumes_is_no_longer_served() {
    scene(true, |bed| async move {
        let exports = MemoryExports::default().with("db", "", bed.device.clone());
        let said: Rc<RefCell<Vec<Held>>> = Rc::default();
        let tell = {
            let said = said.clone();
            move |_: &Named, held| said.borrow_mut().push(held)
        };
        let never = futures::future::pending::<()>().shared();
        let holding = hold(bed.export.clone(), exports, vec![bed.port.clone()], never, tell);
        bed.runtime.spawn().spawn(Class::Foreground, holding);
        bed.settle().await;
        assert!(bed.export.is_owned());
        let (metadata, other) = (bed.runtime.metadata(), VolumeId(Uuid::from_u128(8)));
        let put = |key: String, value: Vec<u8>| {
            let writes = vec![Write::Put { key, value, lease: None }];
            metadata.transact(Transaction { writes, ..Transaction::default() })
        };
        // Not while somebody has the volume, who may answer there.
        put(keys::owner(volume()), encode(&owner())).await.unwrap();
        let take = How { take: true, ..How::default() };
        let refused = claim(metadata, E1_2, (other, "other"), take).await.unwrap_err().to_string();
        assert!(refused.contains("attached"), "{refused}");
        assert!(bed.export.is_owned());
        // And if it were so all the same.
        let writes = vec![Write::Delete { key: keys::owner(volume()) }];
        metadata.transact(Transaction { writes, ..Transaction::default() }).await.unwrap();
        claim(metadata, E1_2, (other, "other"), take).await.unwrap();
        bed.runtime.clock().sleep(Duration::from_millis(100)).await;
        assert!(!bed.export.is_owned(), "{said:?}");
        bed.runtime.clock().sleep(Duration::from_secs(60)).await;
        assert!(!bed.export.is_owned() && bed.device.clones() == 2, "it is not attached either: {said:?}");
    });
}

#[test]
fn what_passes_a_standby_by_is_known_when_it_serves() {
    scene(true, |bed| async move {
        bed.send(A, 0, 0x0002_0002, &ata(0x34, 0, &[2; 512]));
        bed.send(A, 0, 0x0003_0003, &ata(0x24, 0, &[]));
        assert_eq!(bed.statuses().await, []);
        bed.export.own(bed.device.clone());
        bed.send(A, 0, 0x0001_0001, &ata(0x34, 0, &[1; 512]));
        assert_eq!((bed.statuses().await, bed.first_byte().await), (vec![], 0));
        assert_eq!((bed.counts.dropped(Dropped::Standby), bed.counts.dropped(Dropped::Late)), (2, 1));
    });
}

#[test]
fn a_failure_of_the_volume_is_told_or_left_to_who_comes_next() {
    scene(true, |bed| async move {
        bed.export.own(bed.device.clone());
        bed.device.fail(Some(VolumeError::NoSpace { shard: "a".into() }));
        bed.send(A, 0, 1 << 16, &ata(0x34, 0, &[1; 512]));
        assert_eq!(bed.statuses().await, [(1 << 16, 0, 0x61)]);
        bed.device.fail(Some(VolumeError::SessionEnded { because: "fenced".into() }));
        bed.send(A, 0, 2 << 16, &ata(0x34, 0, &[1; 512]));
        bed.send(A, 0, 3 << 16, &ata(0x24, 0, &[]));
        assert_eq!(bed.statuses().await, []);
        bed.device.fail(None);
        bed.send(A, 0, 2 << 16, &ata(0x34, 0, &[1; 512]));
        assert_eq!(bed.statuses().await, [(2 << 16, 0, 0x40)], "the same frame again, now that it can be done");
    });
}

#[test]
fn one_source_takes_no_more_than_its_share() {
    scene(true, |bed| async move {
        bed.export.own(bed.device.clone());
        bed.device.hold();
        for tag in 0..AOE_OUTSTANDING_PER_SOURCE_MAX as u32 + 5 {
            bed.send(A, 0, tag << 16, &ata(0x24, 0, &[]));
        }
        bed.send(B, 0, 0, &ata(0x24, 0, &[]));
        assert_eq!(bed.counts.dropped(Dropped::Busy), 5);
        bed.device.release();
        assert_eq!(bed.statuses().await.len(), AOE_OUTSTANDING_PER_SOURCE_MAX + 1);
        bed.export.idle().await;
    });
}

#[test]
fn lists_are_stored_before_they_are_answered_and_found_by_the_next_process() {
    scene(true, |bed| async move {
        bed.export.own(bed.device.clone());
        let mut config = Vec::new();
        Config { buffers: 0, firmware: 0, sectors: 0, command: CONFIG_SET, string: b"mine" }.put(&mut config);
        bed.send(A, 1, 1, &config);
        assert_eq!(bed.answers().await.len(), 1);
        let mask = [&[0, MASK_EDIT, 0, 1, 0, 1][..], &A.octets()].concat();
        bed.send(A, 2, 2, &mask);
        assert_eq!(bed.answers().await.len(), 1);
        let mut reserve = Vec::new();
        Reserve { command: 1, macs: vec![B] }.put(&mut reserve);
        bed.send(A, 3, 3, &reserve);
        assert_eq!(bed.answers().await.len(), 1);
        bed.send(A, 0, 4, &ata(0x24, 0, &[]));
        assert_eq!(bed.statuses().await, [(4, 6, 0)], "reserved for another");
        bed.send(B, 0, 5, &ata(0x24, 0, &[]));
        assert_eq!(bed.statuses().await, [], "not on the mask list");
        let key = store::key(E1_2);
        let entry = bed.runtime.metadata().get(&key).await.unwrap().unwrap();
        let expected = Lists { config: b"mine".to_vec(), masks: vec![A], reserved: vec![B] };
        assert_eq!(store::stored(&entry).unwrap().lists, expected);
        let clear = How { clear: true, ..How::default() };
        claim(bed.runtime.metadata(), E1_2, (volume(), "db"), clear).await.unwrap();
        let entry = bed.runtime.metadata().get(&key).await.unwrap().unwrap();
        assert_eq!(store::stored(&entry).unwrap().lists, Lists { config: b"mine".to_vec(), ..Lists::default() });
    });
}

#[test]
fn an_address_of_a_volume_that_is_gone_is_free() {
    scene(true, |bed| async move {
        let metadata = bed.runtime.metadata();
        let other = VolumeId(Uuid::from_u128(8));
        // The volume has no record here: it was deleted.
        assert_eq!(claim(metadata, E1_2, (other, "other"), How::default()).await.unwrap(), Claimed::Known);
        let entry = metadata.get(&store::key(E1_2)).await.unwrap().unwrap();
        assert_eq!(store::stored(&entry).unwrap().volume, other);
    });
}

#[test]
fn a_standby_serves_as_soon_as_the_owners_key_is_gone_and_says_so() {
    scene(true, |bed| async move {
        let metadata = bed.runtime.metadata().clone();
        let key = keys::owner(volume());
        let put = Write::Put { key: key.clone(), value: encode(&owner()), lease: None };
        metadata.transact(Transaction { writes: vec![put], ..Transaction::default() }).await.unwrap();
        let exports = MemoryExports::default().with("db", "", bed.device.clone());
        let exports = Contended { exports, runtime: bed.runtime.clone() };
        let (stop, stopped) = oneshot::channel::<()>();
        let said: Rc<RefCell<Vec<Held>>> = Rc::default();
        let tell = {
            let said = said.clone();
            move |_: &Named, held| said.borrow_mut().push(held)
        };
        let stopped = stopped.map(|_| ()).shared();
        let holding = hold(bed.export.clone(), exports, vec![bed.port.clone()], stopped, tell);
        bed.runtime.spawn().spawn(Class::Foreground, holding);
        bed.runtime.clock().sleep(Duration::from_secs(60)).await;
        assert!(!bed.export.is_owned() && matches!(said.borrow()[..], [Held::Standby(_)]), "{said:?}");
        let delete = Write::Delete { key };
        metadata.transact(Transaction { writes: vec![delete], ..Transaction::default() }).await.unwrap();
        bed.runtime.clock().sleep(Duration::from_millis(500)).await;
        assert!(bed.export.is_owned(), "by the watch, long before it would have looked again: {said:?}");
        let advertised = bed.answers().await;
        assert_eq!((advertised.len(), &advertised[0].head[..6]), (1, &[0xff; 6][..]));
        assert_eq!(Config::parse(&advertised[0].head[24..]).unwrap().command, CONFIG_READ);
        drop(stop);
        bed.settle().await;
        assert!(!bed.export.is_owned());
    });
}
