//! Writers and readers on one volume, each on blocks of its own, reporting to the history.

use super::history::{History, SECTOR_BYTES};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;
use torus_frontends::device::{Device, Piece, VolumeError};
use torus_rpc::runtime::simulated::World;

const BLOCK_BYTES: u64 = 4096;

/// What all workers of a run share.
#[derive(Clone)]
pub struct Workload {
    pub world: World,
    pub history: Rc<RefCell<History>>,
    next_value: Rc<Cell<u64>>,
    pub failed: Rc<RefCell<Option<String>>>,
    /// Workers stop when their operation is done.
    pub stop: Rc<Cell<bool>>,
    /// Those who work end at once when this counts up, and may begin anew.
    pub let_go: Rc<Cell<u64>>,
    began: u64,
    /// Between some of its operations a worker pauses for up to so long.
    pub pause: Duration,
    /// A worker flushes after nearly every write, as a journal does.
    pub flushes_each: Rc<Cell<bool>>,
    epoch: u64,
}

impl Workload {
    pub fn new(world: &World) -> Self {
        Self {
            world: world.clone(),
            history: Rc::default(),
            next_value: Rc::new(Cell::new(1)),
            failed: Rc::default(),
            stop: Rc::default(),
            let_go: Rc::default(),
            began: 0,
            pause: Duration::ZERO,
            flushes_each: Rc::default(),
            epoch: 0,
        }
    }

    /// The same for a writer of this epoch, which has just attached.
    pub fn in_epoch(&self, epoch: u64) -> Self {
        self.history.borrow_mut().attached(epoch);
        Self { epoch, began: self.let_go.get(), ..self.clone() }
    }

    /// Another volume's, which reports to the same place.
    pub fn beside(&self) -> Self {
        Self { history: Rc::default(), ..self.clone() }
    }

    pub fn was_let_go(&self) -> bool {
        self.let_go.get() != self.began
    }

    fn is_over(&self) -> bool {
        self.stop.get() || self.was_let_go() || self.failed.borrow().is_some()
    }

    async fn pause(&self) {
        if !self.pause.is_zero() && self.world.one_in(3) {
            self.world.sleep(Duration::from_micros(self.world.random_below(self.pause.as_micros() as u64))).await;
        }
    }

    /// Operations on blocks `first..first + count` until one fails or `operations` are done; the error, if any.
    pub async fn work<D: Device>(
        &self,
        device: &D,
        first: u64,
        count: u64,
        operations: u64,
    ) -> Result<(), VolumeError> {
        for _ in 0..operations {
            if self.is_over() {
                return Ok(());
            }
            self.pause().await;
            let (offset, length) = self.range(first, count);
            match self.world.random_below(16) {
                0..=6 => {
                    self.write(device, offset, length).await?;
                    if self.flushes_each.get() && !self.world.one_in(16) {
                        self.flush(device).await?;
                    }
                }
                7 => self.clear(device, offset, length).await?,
                8 | 9 => self.flush(device).await?,
                _ => self.read(device, offset, length).await?,
            }
        }
        Ok(())
    }

    /// Reads of the same blocks beside the worker, until it is done.
    pub async fn watch<D: Device>(&self, device: &D, first: u64, count: u64) -> Result<(), VolumeError> {
        while !self.is_over() {
            self.pause().await;
            let (offset, length) = self.range(first, count);
            self.read(device, offset, length).await?;
        }
        Ok(())
    }

    /// Whole sectors, mostly not whole blocks.
    fn range(&self, first: u64, count: u64) -> (u64, u64) {
        let sectors = count * BLOCK_BYTES / SECTOR_BYTES;
        let start = self.world.random_below(sectors);
        let length = 1 + self.world.random_below((sectors - start).min(24));
        let (mut start, mut end) = (start, start + length);
        if self.world.one_in(2) {
            start -= start % 8;
            end = end.next_multiple_of(8);
        }
        (first * BLOCK_BYTES + start * SECTOR_BYTES, (end - start) * SECTOR_BYTES)
    }

    async fn write<D: Device>(&self, device: &D, offset: u64, length: u64) -> Result<(), VolumeError> {
        let value = self.next_value.replace(self.next_value.get() + 1);
        let data = Bytes::from(value.to_le_bytes().repeat(length as usize / 8));
        self.submitted(offset, length, value);
        self.tell(|| format!("begins to write {value} to {}", sectors(offset, length)));
        tracing::debug!(now = ?self.world.now().0, sector = offset / SECTOR_BYTES, sectors = length / SECTOR_BYTES, value, "write");
        device.write(offset, data, self.world.one_in(8)).await?;
        self.tell(|| format!("wrote {value} to {}", sectors(offset, length)));
        self.answered(offset, length, value);
        Ok(())
    }

    async fn clear<D: Device>(&self, device: &D, offset: u64, length: u64) -> Result<(), VolumeError> {
        self.submitted(offset, length, 0);
        self.tell(|| format!("begins to clear {}", sectors(offset, length)));
        device.clear(offset, length, self.world.one_in(8), false).await?;
        self.tell(|| format!("cleared {}", sectors(offset, length)));
        self.answered(offset, length, 0);
        Ok(())
    }

    pub async fn flush<D: Device>(&self, device: &D) -> Result<(), VolumeError> {
        let before = self.history.borrow().before_flush();
        device.flush().await?;
        self.tell(|| "flushed".to_string());
        tracing::debug!(now = ?self.world.now().0, "flushed");
        self.history.borrow_mut().flushed(before, self.epoch);
        Ok(())
    }

    pub async fn read<D: Device>(&self, device: &D, offset: u64, length: u64) -> Result<(), VolumeError> {
        let first = offset / SECTOR_BYTES;
        let last = (offset + length) / SECTOR_BYTES;
        let floors: Vec<_> = (first..last).map(|sector| self.history.borrow().floor(sector)).collect();
        let pieces = device.read(offset, length).await?;
        let mut bytes = Vec::with_capacity(length as usize);
        for piece in pieces {
            match piece {
                Piece::Data(data) => bytes.extend_from_slice(&data),
                Piece::Zeros(zeros) => bytes.resize(bytes.len() + zeros as usize, 0),
            }
        }
        assert_eq!(bytes.len() as u64, length, "seed {}", self.world.seed());
        for (index, sector) in bytes.chunks_exact(SECTOR_BYTES as usize).enumerate() {
            self.check(first + index as u64, sector, floors[index]);
        }
        self.check_blocks(first, &bytes);
        Ok(())
    }

    fn check_blocks(&self, first: u64, bytes: &[u8]) {
        let value = |sector: &[u8]| u64::from_le_bytes(sector[..8].try_into().expect("8 bytes"));
        let seen: Vec<_> = (first..).zip(bytes.chunks_exact(SECTOR_BYTES as usize).map(value)).collect();
        for block in seen.chunk_by(|(a, _), (b, _)| a * SECTOR_BYTES / BLOCK_BYTES == b * SECTOR_BYTES / BLOCK_BYTES) {
            if let Err(because) = self.history.borrow().check_block(block) {
                self.fail(because);
            }
        }
    }

    pub fn fail(&self, because: String) {
        self.world.note(|| format!("FOUND: {because}"));
        self.failed.borrow_mut().get_or_insert(format!("seed {}: {because}", self.world.seed()));
    }

    fn check(&self, sector: u64, bytes: &[u8], floor: usize) {
        let value = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes"));
        let torn = bytes.chunks_exact(8).any(|other| other != &bytes[..8]);
        let result = match torn {
            true => Err(format!("sector {sector} is torn: {bytes:02x?}")),
            false => self.history.borrow_mut().read(sector, value, floor),
        };
        if let Err(because) = result {
            self.fail(because);
        }
    }

    fn tell(&self, event: impl FnOnce() -> String) {
        self.world.note(|| format!("writer of epoch {} {}", self.epoch, event()));
    }

    fn submitted(&self, offset: u64, length: u64, value: u64) {
        for sector in offset / SECTOR_BYTES..(offset + length) / SECTOR_BYTES {
            self.history.borrow_mut().submitted(sector, value, self.epoch);
        }
    }

    fn answered(&self, offset: u64, length: u64, value: u64) {
        for sector in offset / SECTOR_BYTES..(offset + length) / SECTOR_BYTES {
            self.history.borrow_mut().answered(sector, value, self.epoch);
        }
        let broken = self.history.borrow_mut().broken.take();
        if let Some(because) = broken {
            self.fail(because);
        }
    }

    /// Panics with what was found wrong, and the seed.
    pub fn verdict(&self) {
        if let Some(because) = &*self.failed.borrow() {
            panic!("{because}");
        }
    }
}

fn sectors(offset: u64, length: u64) -> String {
    let (first, last) = (offset / SECTOR_BYTES, (offset + length) / SECTOR_BYTES - 1);
    format!("sectors {first} to {last} (blocks {} to {})", first / 8, last / 8)
}
