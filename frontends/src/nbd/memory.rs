//! A device and its exports in memory: what the server is tested on, and measured on where only the server counts.
//! It can be shared by executors, be told to fail, and be held, so that requests overlap as a test wants them to.

use crate::device::{Device, ExportInfo, Exports, Piece, Pieces, Run, VolumeError};
use bytes::{Bytes, BytesMut};
use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Poll, Waker};
use torus_schema::hash::Map;
use torus_schema::limits::BLOCK_BYTES;

/// What was asked of a device, counted when it was carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub attaches: u64,
    pub reads: u64,
    pub writes: u64,
    pub clears: u64,
    pub flushes: u64,
    pub maps: u64,
    /// Of the writes and clears.
    pub durable: u64,
    /// Writes and clears that no flush has followed.
    pub unflushed: u64,
}

/// A real volume looks at a bounded part at once as well.
const BLOCKS_PER_MAP_MAX: usize = 64 << 10;

#[derive(Default)]
struct State {
    blocks: Map<u64, Bytes>,
    counts: Counts,
    fault: Option<VolumeError>,
    /// A block that cannot be read.
    rotten: Option<u64>,
    held: bool,
    waiting: Vec<Waker>,
}

#[derive(Clone)]
pub struct MemoryDevice {
    size_bytes: u64,
    read_only: bool,
    state: Arc<Mutex<State>>,
}

impl MemoryDevice {
    pub fn new(size_bytes: u64, read_only: bool) -> Self {
        Self { size_bytes, read_only, state: Arc::default() }
    }

    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// Every further request fails so, until told otherwise.
    pub fn fail(&self, fault: Option<VolumeError>) {
        self.lock().fault = fault;
    }

    /// Of one block, or none.
    pub fn rot(&self, block: Option<u64>) {
        self.lock().rotten = block;
    }

    /// Further requests wait until `release`.
    pub fn hold(&self) {
        self.lock().held = true;
    }

    pub fn release(&self) {
        let mut state = self.lock();
        state.held = false;
        state.waiting.drain(..).for_each(Waker::wake);
    }

    /// Requests that wait for `release`; each counts once until it is woken.
    pub fn waiting(&self) -> usize {
        self.lock().waiting.len()
    }

    /// Clones that there are, this one included.
    pub fn clones(&self) -> usize {
        Arc::strong_count(&self.state)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nobody panics while holding the state")
    }

    async fn begin(&self, offset: u64, length: u64) -> Result<(), VolumeError> {
        poll_fn(|context| {
            let mut state = self.lock();
            if state.held {
                state.waiting.push(context.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
        if let Some(fault) = &self.lock().fault {
            return Err(fault.clone());
        }
        match offset.checked_add(length).is_some_and(|end| end <= self.size_bytes) {
            true => Ok(()),
            false => Err(VolumeError::OutOfRange { offset, length, size: self.size_bytes }),
        }
    }

    fn writable(&self) -> Result<(), VolumeError> {
        if self.read_only { Err(VolumeError::ReadOnly) } else { Ok(()) }
    }
}

/// The blocks of a range: block, first byte in it, bytes of it.
fn blocks(offset: u64, length: u64) -> impl Iterator<Item = (u64, usize, usize)> {
    let (mut at, end) = (offset, offset + length);
    std::iter::from_fn(move || {
        if at == end {
            return None;
        }
        let (block, from) = (at / BLOCK_BYTES, at % BLOCK_BYTES);
        let here = (BLOCK_BYTES - from).min(end - at);
        at += here;
        Some((block, from as usize, here as usize))
    })
}

/// A block with `data` at `from`, the rest as it was.
fn patched(old: Option<&Bytes>, from: usize, data: &[u8]) -> Bytes {
    if data.len() == BLOCK_BYTES as usize {
        return Bytes::copy_from_slice(data);
    }
    let mut new = match old {
        Some(old) => BytesMut::from(&old[..]),
        None => BytesMut::zeroed(BLOCK_BYTES as usize),
    };
    new[from..from + data.len()].copy_from_slice(data);
    new.freeze()
}

impl Device for MemoryDevice {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    async fn read(&self, offset: u64, length: u64) -> Result<Pieces, VolumeError> {
        self.begin(offset, length).await?;
        let mut state = self.lock();
        state.counts.reads += 1;
        if let Some(block) = state.rotten.filter(|rotten| blocks(offset, length).any(|(block, ..)| block == *rotten)) {
            return Err(VolumeError::Unreadable { block, because: "it is rotten".to_string() });
        }
        let mut pieces = Pieces::new();
        for (block, from, here) in blocks(offset, length) {
            match (state.blocks.get(&block), pieces.last_mut()) {
                (Some(data), _) => pieces.push(Piece::Data(data.slice(from..from + here))),
                (None, Some(Piece::Zeros(count))) => *count += here as u64,
                (None, _) => pieces.push(Piece::Zeros(here as u64)),
            }
        }
        Ok(pieces)
    }

    async fn write(&self, offset: u64, mut data: Bytes, durable: bool) -> Result<(), VolumeError> {
        self.begin(offset, data.len() as u64).await?;
        self.writable()?;
        let mut state = self.lock();
        state.counts.writes += 1;
        state.counts.durable += u64::from(durable);
        state.counts.unflushed += 1;
        for (block, from, here) in blocks(offset, data.len() as u64) {
            let new = patched(state.blocks.get(&block), from, &data.split_to(here));
            state.blocks.insert(block, new);
        }
        Ok(())
    }

    async fn clear(&self, offset: u64, length: u64, durable: bool, _advisory: bool) -> Result<(), VolumeError> {
        self.begin(offset, length).await?;
        self.writable()?;
        let mut state = self.lock();
        state.counts.clears += 1;
        state.counts.durable += u64::from(durable);
        state.counts.unflushed += 1;
        for (block, from, here) in blocks(offset, length) {
            if here == BLOCK_BYTES as usize {
                state.blocks.remove(&block);
            } else if let Some(old) = state.blocks.get(&block) {
                let new = patched(Some(old), from, &vec![0; here]);
                state.blocks.insert(block, new);
            }
        }
        Ok(())
    }

    /// Of whole blocks that exist, in steps of at most so many: what is asked for beyond is left to the next request.
    async fn map(&self, offset: u64, length: u64) -> Result<Vec<Run>, VolumeError> {
        self.begin(offset, length).await?;
        let mut state = self.lock();
        state.counts.maps += 1;
        let mut runs: Vec<Run> = Vec::new();
        for (block, _, here) in blocks(offset, length).take(BLOCKS_PER_MAP_MAX) {
            let stored = state.blocks.contains_key(&block);
            match runs.last_mut() {
                Some(run) if run.stored == stored => run.bytes += here as u64,
                _ => runs.push(Run { bytes: here as u64, stored }),
            }
        }
        Ok(runs)
    }

    async fn flush(&self) -> Result<(), VolumeError> {
        self.begin(0, 0).await?;
        let mut state = self.lock();
        state.counts.flushes += 1;
        state.counts.unflushed = 0;
        Ok(())
    }
}

/// Named devices; attaching one is taking a clone of it.
#[derive(Clone, Default)]
pub struct MemoryExports {
    devices: Vec<(ExportInfo, MemoryDevice)>,
}

impl MemoryExports {
    pub fn with(mut self, name: &str, description: &str, device: MemoryDevice) -> Self {
        let info = ExportInfo {
            name: name.to_owned(),
            size_bytes: device.size_bytes,
            read_only: device.read_only,
            description: description.to_owned(),
        };
        self.devices.push((info, device));
        self
    }

    fn find(&self, name: &str) -> Result<&(ExportInfo, MemoryDevice), VolumeError> {
        let found = self.devices.iter().find(|(info, _)| info.name == name);
        found.ok_or_else(|| VolumeError::NotFound { name: name.to_owned() })
    }
}

impl Exports for MemoryExports {
    type Device = MemoryDevice;

    async fn list(&self) -> Result<Vec<ExportInfo>, VolumeError> {
        Ok(self.devices.iter().map(|(info, _)| info.clone()).collect())
    }

    async fn describe(&self, name: &str) -> Result<ExportInfo, VolumeError> {
        self.find(name).map(|(info, _)| info.clone())
    }

    async fn attach(&self, name: &str) -> Result<MemoryDevice, VolumeError> {
        let (_, device) = self.find(name)?;
        device.lock().counts.attaches += 1;
        Ok(device.clone())
    }
}
