//! Whole block files as shards left them, and a disk that holds one of them with some blocks changed.

use super::super::harness::{Client, Machine, simulate};
use crate::log::BLOCK;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use torus_rpc::runtime::{Disk, DiskError};

pub const SEGMENTS: u64 = 10;
pub const SEGMENT_BLOCKS: u64 = 24;

/// What a shard left after some life of that seed: volumes written, cleared and dropped, segments cleaned, the last
/// ones open, and what was not synced lost, kept or torn.
pub fn image(seed: u64) -> Rc<[u8]> {
    let found = Rc::new(RefCell::new(Vec::new()));
    let image = found.clone();
    simulate(seed, move |world| async move {
        let machine = Machine::new(&world, SEGMENTS, SEGMENT_BLOCKS).await;
        let clients = [Client::create(&machine, 1).await, Client::create(&machine, 2).await];
        for client in &clients {
            client.open().await.unwrap();
        }
        for _ in 0..20 + world.random_below(150) {
            let client = &clients[world.random_below(2) as usize];
            // A full disk refuses, and that is a state like any other.
            match world.random_below(10) {
                0 => drop(client.flush().await),
                1 => drop(client.clear(world.random_below(8), 8 + world.random_below(3000)).await),
                2 if world.one_in(4) => drop(client.open().await),
                _ => drop(client.write(world.random_below(30) * 50, 1 + world.random_below(6)).await),
            }
        }
        if world.one_in(3) {
            machine.shard().drop_volume(clients[1].volume).await.unwrap();
        }
        if world.one_in(3) {
            machine.shard().close().await;
        }
        machine.crash();
        let bytes = 16 * BLOCK as u64 + SEGMENTS * SEGMENT_BLOCKS * BLOCK as u64;
        *image.borrow_mut() = machine.disk.peek(0, bytes as usize);
    });
    found.take().into()
}

/// What is read where nothing was changed is the image.
#[derive(Clone)]
pub struct ImageDisk {
    image: Rc<[u8]>,
    changed: Rc<RefCell<BTreeMap<usize, Vec<u8>>>>,
    /// From there on nothing can be read.
    end: usize,
}

impl ImageDisk {
    pub fn new(image: Rc<[u8]>, changed: BTreeMap<usize, Vec<u8>>, end: usize) -> Self {
        Self { image, changed: Rc::new(RefCell::new(changed)), end }
    }
}

fn error(operation: &'static str, offset: u64, bytes: usize) -> DiskError {
    DiskError { place: "an image".to_string(), operation, offset, bytes, because: "it is cut off".to_string() }
}

impl Disk for ImageDisk {
    type Buffer = Vec<u8>;
    type Bytes = Rc<[u8]>;

    fn size_bytes(&self) -> u64 {
        self.image.len() as u64
    }

    fn allocate(&self, bytes: usize) -> Vec<u8> {
        vec![0; bytes]
    }

    async fn read(&self, offset: u64, bytes: usize) -> Result<Rc<[u8]>, DiskError> {
        let (start, end) = (offset as usize, offset as usize + bytes);
        assert!(end <= self.image.len(), "nobody reads behind the disk's end: {offset} + {bytes}");
        if end > self.end {
            return Err(error("read", offset, bytes));
        }
        let mut read = self.image[start..end].to_vec();
        for (block, changed) in self.changed.borrow().range(start / BLOCK..end.div_ceil(BLOCK)) {
            read[block * BLOCK - start..][..BLOCK].copy_from_slice(changed);
        }
        Ok(read.into())
    }

    async fn write(&self, offset: u64, buffer: Vec<u8>) -> Result<(), DiskError> {
        let end = offset as usize + buffer.len();
        assert!(end <= self.image.len(), "nobody writes behind the disk's end: {offset} + {}", buffer.len());
        if end > self.end {
            return Err(error("write", offset, buffer.len()));
        }
        let blocks = (offset as usize / BLOCK..).zip(buffer.chunks(BLOCK));
        self.changed.borrow_mut().extend(blocks.map(|(block, bytes)| (block, bytes.to_vec())));
        Ok(())
    }

    async fn write_durable(&self, offset: u64, buffer: Vec<u8>) -> Result<(), DiskError> {
        self.write(offset, buffer).await
    }

    async fn sync(&self) -> Result<(), DiskError> {
        Ok(())
    }

    async fn discard(&self, _offset: u64, _bytes: u64) -> Result<(), DiskError> {
        Ok(())
    }
}
