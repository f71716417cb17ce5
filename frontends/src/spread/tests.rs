//! Two executors in one thread: what goes between them does not know the difference.

use super::*;
use crate::device::Piece;
use futures::FutureExt;
use futures::executor::{LocalPool, LocalSpawner};
use futures::task::LocalSpawnExt;
use smallvec::smallvec;
use std::cell::{Cell, RefCell};
use std::sync::atomic::Ordering;
use torus_rpc::notify::Notify;
use torus_rpc::runtime::Class;

#[derive(Clone)]
struct Pool(LocalSpawner);

impl Spawn for Pool {
    fn spawn(&self, _class: Class, task: impl Future<Output = ()> + 'static) {
        self.0.spawn_local(task).expect("the pool lives as long as the test");
    }
}

/// One volume, `db`, that counts.
#[derive(Clone, Default)]
struct Volume(Rc<State>);

#[derive(Default)]
struct State {
    attaches: Cell<u32>,
    /// Attaching waits until then.
    attachable: Cell<bool>,
    written: Cell<u64>,
    flushed: Cell<u64>,
    size_bytes: Cell<u64>,
    ended: RefCell<Option<String>>,
    changed: Notify,
}

impl Volume {
    /// Users, beside the test and the exports of `executors`.
    fn users(&self, executors: usize) -> usize {
        // The exports stand in the host as well as in what everybody asks.
        Rc::strong_count(&self.0) - 1 - 2 * executors
    }
}

impl Exports for Volume {
    type Device = Volume;

    async fn list(&self) -> Result<Vec<ExportInfo>, VolumeError> {
        Ok(Vec::new())
    }

    async fn describe(&self, name: &str) -> Result<ExportInfo, VolumeError> {
        let (name, size_bytes) = (name.to_string(), self.0.size_bytes.get());
        Ok(ExportInfo { name, size_bytes, read_only: false, description: String::new() })
    }

    async fn attach(&self, name: &str) -> Result<Self::Device, VolumeError> {
        self.0.changed.until(|| self.0.attachable.get().then_some(())).await;
        if name != "db" {
            return Err(VolumeError::NotFound { name: name.to_string() });
        }
        self.0.attaches.set(self.0.attaches.get() + 1);
        Ok(self.clone())
    }
}

impl Device for Volume {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes.get()
    }

    fn read_only(&self) -> bool {
        false
    }

    async fn read(&self, _offset: u64, length: u64) -> Result<Pieces, VolumeError> {
        Ok(smallvec![Piece::Zeros(length)])
    }

    async fn write(&self, offset: u64, _data: Bytes, _durable: bool) -> Result<(), VolumeError> {
        if let Some(because) = self.0.ended.borrow().clone() {
            return Err(VolumeError::SessionEnded { because });
        }
        self.0.written.set(self.0.written.get().max(offset));
        Ok(())
    }

    async fn clear(&self, _: u64, _: u64, _: bool, _: bool) -> Result<(), VolumeError> {
        Ok(())
    }

    async fn map(&self, _offset: u64, length: u64) -> Result<Vec<Run>, VolumeError> {
        Ok(vec![Run { bytes: length, stored: false }])
    }

    async fn flush(&self) -> Result<(), VolumeError> {
        self.0.flushed.set(self.0.written.get());
        Ok(())
    }

    async fn ended(&self) -> String {
        self.0.changed.until(|| self.0.ended.borrow().clone()).await
    }

    async fn resized(&self, seen_bytes: u64) -> u64 {
        let now = || Some(self.0.size_bytes.get()).filter(|size| *size != seen_bytes);
        self.0.changed.until(now).await
    }
}

struct World {
    pool: LocalPool,
    volume: Volume,
    executors: Vec<Spread<Volume, Pool>>,
    handoffs: Vec<Arc<Handoffs>>,
}

fn world(executors: usize) -> World {
    let (pool, volume) = (LocalPool::new(), Volume::default());
    volume.0.attachable.set(true);
    let places = places(executors);
    let handoffs = places.iter().map(Place::handoffs).collect();
    let open = |place: Place| place.open(volume.clone(), Pool(pool.spawner()));
    let executors = places.into_iter().map(open).collect();
    World { pool, volume, executors, handoffs }
}

impl World {
    fn attach(&mut self, executor: usize) -> SpreadDevice<Volume> {
        let spread = self.executors[executor].clone();
        self.pool.run_until(async move { spread.attach("db").await }).expect("it is there")
    }

    fn messages(&self) -> Vec<(u64, u64)> {
        let counts = |of: &Arc<Handoffs>| (of.messages.load(Ordering::Relaxed), of.batches.load(Ordering::Relaxed));
        self.handoffs.iter().map(counts).collect()
    }
}

#[test]
fn a_volume_lives_where_it_was_used_first_and_is_reached_from_everywhere() {
    let mut world = world(3);
    let (near, far) = (world.attach(1), world.attach(0));
    assert!(matches!((&near, &far), (SpreadDevice::Near(_), SpreadDevice::Far(_))));
    let done = world.pool.run_until(async {
        let zeros = far.read(0, 4096).await?;
        assert_eq!(
            (zeros, far.map(0, 512).await?),
            (smallvec![Piece::Zeros(4096)], vec![Run { bytes: 512, stored: false }])
        );
        far.write(7, Bytes::new(), false).await?;
        near.write(9, Bytes::new(), false).await?;
        far.clear(0, 4096, false, true).await?;
        // Covers what was answered to either.
        far.flush().await
    });
    assert_eq!(done, Ok(()));
    assert_eq!(world.volume.0.flushed.get(), 9);
}

#[test]
fn at_home_nothing_is_handed_over() {
    let mut world = world(2);
    let near = world.attach(0);
    world.pool.run_until(async {
        near.write(1, Bytes::new(), true).await.expect("written");
        near.flush().await.expect("flushed");
    });
    assert_eq!(world.messages(), [(0, 0), (0, 0)]);
}

#[test]
fn what_is_asked_in_one_turn_goes_over_in_one_batch_and_so_do_the_answers() {
    let mut world = world(2);
    let (_near, far) = (world.attach(0), world.attach(1));
    let before = world.messages();
    let writes = (0..32).map(|at| far.write(at, Bytes::new(), false));
    let done = world.pool.run_until(futures::future::join_all(writes));
    assert!(done.into_iter().all(|written| written.is_ok()));
    for (before, after) in before.into_iter().zip(world.messages()) {
        assert_eq!((after.0 - before.0, after.1 - before.1), (32, 1));
    }
}

#[test]
fn a_device_is_released_with_its_last_user_wherever_that_is() {
    let mut world = world(2);
    let (near, far) = (world.attach(0), world.attach(1));
    let again = far.clone();
    drop(far);
    world.pool.run_until_stalled();
    assert!(world.volume.users(2) > 1, "the clone uses it");
    drop(again);
    world.pool.run_until_stalled();
    assert_eq!(world.volume.users(2), 1, "only who is near");
    drop(near);
    assert_eq!(world.volume.users(2), 0);
}

#[test]
fn the_size_of_a_volume_and_its_end_are_heard_everywhere() {
    let mut world = world(2);
    let (_near, far) = (world.attach(0), world.attach(1));
    world.volume.0.size_bytes.set(8192);
    world.volume.0.changed.notify();
    assert_eq!(world.pool.run_until(far.resized(0)), 8192);
    assert_eq!(far.size_bytes(), 8192);
    *world.volume.0.ended.borrow_mut() = Some("fenced".to_string());
    world.volume.0.changed.notify();
    assert_eq!(world.pool.run_until(far.ended()), "fenced");
    let refused = world.pool.run_until(far.write(0, Bytes::new(), false));
    assert_eq!(refused, Err(VolumeError::SessionEnded { because: "fenced".to_string() }));
}

#[test]
fn who_goes_away_while_it_is_attached_leaves_nothing_behind() {
    let mut world = world(2);
    drop(world.attach(0));
    world.volume.0.attachable.set(false);
    let spread = world.executors[1].clone();
    {
        let attaching = spread.attach("db");
        let mut attaching = std::pin::pin!(attaching);
        assert!(attaching.as_mut().now_or_never().is_none());
        world.pool.run_until_stalled();
    }
    world.volume.0.attachable.set(true);
    world.volume.0.changed.notify();
    world.pool.run_until_stalled();
    assert_eq!((world.volume.0.attaches.get(), world.volume.users(2)), (2, 0));
}

#[test]
fn what_is_not_there_is_refused_from_afar_as_it_is_nearby() {
    let mut world = world(2);
    let claim = world.executors[0].inner.homes.claim("nowhere", 0);
    let spread = world.executors[1].clone();
    let refused = world.pool.run_until(async move { spread.attach("nowhere").await.map(drop) });
    assert_eq!(refused, Err(VolumeError::NotFound { name: "nowhere".to_string() }));
    drop(claim);
    assert_eq!(world.executors[0].inner.homes.home("nowhere"), None);
}

#[test]
fn nobody_leaves_before_all_do_and_a_volume_is_served_until_then() {
    let mut world = world(2);
    let (near, far) = (world.attach(0), world.attach(1));
    drop(near);
    let first = world.executors[0].clone();
    let mut leaving = Box::pin(async move { first.leave().await });
    assert!(leaving.as_mut().now_or_never().is_none());
    world.pool.run_until(far.write(1, Bytes::new(), false)).expect("it is served on");
    assert!(leaving.as_mut().now_or_never().is_none());
    let second = world.executors[1].clone();
    world.pool.run_until(async move { second.leave().await });
    world.pool.run_until(leaving);
}

#[test]
fn an_executor_that_ended_keeps_nobody_waiting() {
    let pool = LocalPool::new();
    let mut places = places(2).into_iter();
    let first = places.next().expect("two").open(Volume::default(), Pool(pool.spawner()));
    let claim = first.inner.homes.claim("db", 1);
    drop(places);
    let mut pool = pool;
    let refused = pool.run_until(first.attach("db")).map(drop);
    assert!(matches!(refused, Err(VolumeError::SessionEnded { .. })), "{refused:?}");
    pool.run_until(first.leave());
    drop(claim);
}
