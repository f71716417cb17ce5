//! A volume that lives on another executor.

use super::message::{Attached, DeviceId, Order, Outcome};
use super::port::Port;
use crate::device::{Device, Pieces, Run, VolumeError};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use torus_rpc::notify::Notify;

/// Released at its home when the last clone is dropped.
#[derive(Clone)]
pub struct FarDevice {
    handle: Rc<Handle>,
}

pub struct Handle {
    port: Rc<Port>,
    home: usize,
    device: DeviceId,
    read_only: bool,
    size_bytes: Cell<u64>,
    ended: RefCell<Option<String>>,
    /// Its size, or that it ended.
    changed: Notify,
}

impl Handle {
    pub fn new(port: Rc<Port>, home: usize, attached: Attached) -> Self {
        let Attached { device, size_bytes, read_only } = attached;
        let (size_bytes, ended, changed) = (Cell::new(size_bytes), RefCell::default(), Notify::default());
        Self { port, home, device, read_only, size_bytes, ended, changed }
    }

    pub fn resized(&self, size_bytes: u64) {
        self.size_bytes.set(size_bytes);
        self.changed.notify();
    }

    pub fn end(&self, because: String) {
        *self.ended.borrow_mut() = Some(because);
        self.changed.notify();
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.port.release(self.home, self.device);
    }
}

impl FarDevice {
    pub fn new(handle: Rc<Handle>) -> Self {
        Self { handle }
    }

    async fn carry(&self, order: Order) -> Result<Outcome, VolumeError> {
        self.handle.port.carry(self.handle.home, self.handle.device, order).await
    }

    async fn done(&self, order: Order) -> Result<(), VolumeError> {
        match self.carry(order).await? {
            Outcome::Done => Ok(()),
            Outcome::Read(_) | Outcome::Map(_) => unreachable!("its home answers what was asked"),
        }
    }
}

impl Device for FarDevice {
    fn size_bytes(&self) -> u64 {
        self.handle.size_bytes.get()
    }

    fn read_only(&self) -> bool {
        self.handle.read_only
    }

    fn home(&self) -> Option<usize> {
        Some(self.handle.home)
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Pieces, VolumeError> {
        match self.carry(Order::Read { offset, length }).await? {
            Outcome::Read(pieces) => Ok(pieces),
            Outcome::Done | Outcome::Map(_) => unreachable!("its home answers what was asked"),
        }
    }

    async fn write(&self, offset: u64, data: Bytes, durable: bool) -> Result<(), VolumeError> {
        self.done(Order::Write { offset, data, durable }).await
    }

    async fn clear(&self, offset: u64, length: u64, durable: bool, advisory: bool) -> Result<(), VolumeError> {
        self.done(Order::Clear { offset, length, durable, advisory }).await
    }

    async fn map(&self, offset: u64, length: u64) -> Result<Vec<Run>, VolumeError> {
        match self.carry(Order::Map { offset, length }).await? {
            Outcome::Map(runs) => Ok(runs),
            Outcome::Done | Outcome::Read(_) => unreachable!("its home answers what was asked"),
        }
    }

    async fn flush(&self) -> Result<(), VolumeError> {
        self.done(Order::Flush).await
    }

    async fn ended(&self) -> String {
        self.handle.changed.until(|| self.handle.ended.borrow().clone()).await
    }

    async fn resized(&self, seen_bytes: u64) -> u64 {
        let size_bytes = || Some(self.size_bytes()).filter(|size_bytes| *size_bytes != seen_bytes);
        self.handle.changed.until(size_bytes).await
    }
}
