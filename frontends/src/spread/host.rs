//! Volumes that live on this executor and are used from others.

use super::homes::Claim;
use super::message::{Asked, Attached, DeviceId, Order, Outcome, RequestId, Told};
use super::port::Port;
use crate::device::{Device, Exports, VolumeError};
use futures::channel::oneshot;
use futures::future::{Either, select};
use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use torus_rpc::runtime::{Class, Spawn};
use torus_schema::hash::Map;

pub struct Host<E: Exports, S> {
    inner: Rc<Inner<E, S>>,
}

struct Inner<E: Exports, S> {
    exports: E,
    spawn: S,
    port: Rc<Port>,
    devices: RefCell<Map<DeviceId, Lent<E::Device>>>,
    next_device: Cell<DeviceId>,
}

/// In use by another executor.
struct Lent<D> {
    device: D,
    /// Dropped with it: ends who watches the device.
    _watched: oneshot::Sender<()>,
}

/// In a task of its own: the claim has to stay until it is settled, even if who asked goes away.
pub async fn attach<E: Exports>(exports: &E, spawn: &impl Spawn, claim: Claim) -> Result<E::Device, VolumeError> {
    let (answer, answered) = oneshot::channel();
    let exports = exports.clone();
    spawn.spawn(Class::Foreground, async move {
        let attached = exports.attach(&claim.name).await;
        if attached.is_ok() {
            claim.settle();
        }
        let _ = answer.send(attached);
    });
    let ended = |_| Err(VolumeError::SessionEnded { because: "the process ends".to_string() });
    answered.await.unwrap_or_else(ended)
}

impl<E: Exports, S: Spawn> Host<E, S> {
    pub fn new(exports: E, spawn: S, port: Rc<Port>) -> Self {
        let inner = Inner { exports, spawn, port, devices: RefCell::default(), next_device: Cell::new(0) };
        Self { inner: Rc::new(inner) }
    }

    pub fn receive(&self, asker: usize, asked: Asked) {
        let inner = self.inner.clone();
        match asked {
            Asked::Describe { id, name } => self.run(async move {
                let described = inner.exports.describe(&name).await;
                inner.port.tell(asker, Told::Described { id, described });
            }),
            Asked::Attach { id, claim } => self.run(inner.attach(asker, id, claim)),
            Asked::Carry { id, device, order } => {
                let lent = inner.devices.borrow().get(&device).map(|lent| lent.device.clone());
                let device = lent.expect("who uses a device has not released it");
                self.run(async move {
                    let result = carry(&device, order).await;
                    inner.port.tell(asker, Told::Carried { id, result });
                });
            }
            Asked::Release { device } => drop(inner.devices.borrow_mut().remove(&device)),
        }
    }

    fn run(&self, task: impl Future<Output = ()> + 'static) {
        self.inner.spawn.spawn(Class::Foreground, task);
    }
}

impl<E: Exports, S: Spawn> Inner<E, S> {
    async fn attach(self: Rc<Self>, asker: usize, id: RequestId, claim: Claim) {
        match attach(&self.exports, &self.spawn, claim).await {
            Ok(device) => self.lend(asker, id, device),
            Err(error) => self.port.tell(asker, Told::Attached { id, attached: Err(error) }),
        }
    }

    fn lend(self: &Rc<Self>, asker: usize, request: RequestId, device: E::Device) {
        let id = self.next_device.replace(self.next_device.get() + 1);
        let attached = Attached { device: id, size_bytes: device.size_bytes(), read_only: device.read_only() };
        // Before it is watched: who hears of the end of a device first would wait for another for ever.
        self.port.tell(asker, Told::Attached { id: request, attached: Ok(attached) });
        let (watched, released) = oneshot::channel();
        let (port, watching) = (self.port.clone(), device.clone());
        self.spawn.spawn(Class::Foreground, async move {
            let watch = pin!(watch(&port, asker, attached, watching));
            select(watch, released).await;
        });
        self.devices.borrow_mut().insert(id, Lent { device, _watched: watched });
    }
}

/// Tells of the device what its users hear without asking. Holds it: ends with its release, or says that it ended.
async fn watch<D: Device>(port: &Port, asker: usize, attached: Attached, device: D) {
    let Attached { device: id, mut size_bytes, .. } = attached;
    let mut ended = pin!(device.ended());
    loop {
        match select(ended.as_mut(), pin!(device.resized(size_bytes))).await {
            Either::Left((because, _)) => return port.tell(asker, Told::Ended { device: id, because }),
            Either::Right((now_bytes, _)) => {
                size_bytes = now_bytes;
                port.tell(asker, Told::Resized { device: id, size_bytes });
            }
        }
    }
}

/// To be awaited to its end.
async fn carry<D: Device>(device: &D, order: Order) -> Result<Outcome, VolumeError> {
    let done = |()| Outcome::Done;
    match order {
        Order::Read { offset, length } => device.read(offset, length).await.map(Outcome::Read),
        Order::Write { offset, data, durable } => device.write_to_end(offset, data, durable).await.map(done),
        Order::Clear { offset, length, durable, advisory } => {
            device.clear(offset, length, durable, advisory).await.map(done)
        }
        Order::Map { offset, length } => device.map(offset, length).await.map(Outcome::Map),
        Order::Flush => device.flush().await.map(done),
    }
}
