//! Another replica of the volume, a real shard on a sound and roomy disk, which is asked over the network as any peer. It
//! gets most of what the shard under test gets, under the same versions; now and then nothing, so that it is behind, or
//! another content for a block, which must raise an alarm and never be used.

use super::super::repair::Pair;
use super::*;
use crate::index::{Entry, Found};
use std::collections::BTreeSet;
use torus_rpc::message::{Operation, Revoked};
use torus_schema::limits::BLOCK_BYTES;

/// Whose address the shard under test is told; see `Pair::table`.
const NODE: u8 = 3;
const SEGMENT_COUNT: u64 = 24;
const SEGMENT_BLOCK_COUNT: u64 = 256;

#[derive(Clone)]
pub struct Replica {
    client: Rc<RefCell<Client>>,
    /// Blocks that it was given with another content than was sent.
    differing: Rc<RefCell<BTreeSet<(u64, Version)>>>,
    on_their_way: Rc<Cell<u64>>,
}

impl Replica {
    pub async fn new(world: &World, number: u8) -> Self {
        let machine = Machine::of(world, identity_of(NODE), SEGMENT_COUNT, SEGMENT_BLOCK_COUNT).await;
        machine.listen_as(NODE);
        let client = Client::create(&machine, number).await;
        client.open().await.unwrap();
        let client = Rc::new(RefCell::new(client));
        Self { client, differing: Rc::default(), on_their_way: Rc::default() }
    }

    /// The shard under test may ask it from now on.
    pub fn introduce(&self, machine: &Machine) {
        machine.shard().set_peers(Pair::table());
    }

    fn send(&self, world: &World, operation: Operation, payload: bytes::Bytes) {
        let client = self.client.borrow().clone();
        let on_their_way = self.on_their_way.clone();
        on_their_way.set(on_their_way.get() + 1);
        world.spawn(client.machine.process.get(), async move {
            // What is late is refused, since its epoch is over.
            let _ = client.call_with(operation, payload).await;
            on_their_way.set(on_their_way.get() - 1);
        });
    }

    pub fn write(&self, world: &World, first: u64, count: u64, version: Version) {
        if world.one_in(8) {
            return;
        }
        let (mut operation, mut payload) = Client::write_operation(first, count, version, false);
        if world.one_in(30) {
            let differs = world.random_below(count);
            let mut bytes = payload.to_vec();
            bytes[(differs * BLOCK_BYTES) as usize + 100] ^= 1;
            let block = &bytes[(differs * BLOCK_BYTES) as usize..][..BLOCK_BYTES as usize];
            if let Operation::Write { checksums, .. } = &mut operation {
                checksums[differs as usize] = crc32c::crc32c(block);
            }
            self.differing.borrow_mut().insert((first + differs, version));
            payload = bytes.into();
        }
        self.send(world, operation, payload);
    }

    pub fn clear(&self, world: &World, operation: Operation) {
        if !world.one_in(8) {
            self.send(world, operation, bytes::Bytes::new());
        }
    }

    pub async fn is_idle(&self, world: &World) {
        while self.on_their_way.get() > 0 {
            world.sleep(Duration::from_micros(200)).await;
        }
    }

    /// What is current there.
    pub fn current(&self, block: u64) -> Option<Entry> {
        let client = self.client.borrow();
        match client.found(block) {
            Found::Data(entry) => Some(entry),
            Found::Cleared(_) | Found::Never => None,
        }
    }

    pub fn differs(&self, block: u64, version: Version) -> bool {
        self.differing.borrow().contains(&(block, version))
    }

    pub fn differing(&self) -> Vec<(u64, Version)> {
        self.differing.borrow().iter().copied().collect()
    }

    /// Its writer is another one too, and takes back what the shard under test does not have any more. `kept`: what
    /// that one has.
    pub async fn begin_epoch(&self, world: &World, epoch: Epoch, kept: impl Fn(u64) -> Version) {
        self.is_idle(world).await;
        let client = self.client.borrow().clone();
        client.open_in(epoch).await.unwrap();
        loop {
            let newer = |block: u64| {
                let version = client.found(block).version();
                (version > kept(block)).then_some(Revoked { block: BlockIndex(block), version })
            };
            let revoked: Vec<Revoked> = (0..EXTENTS * BLOCKS_USED).map(block_at).filter_map(newer).collect();
            if revoked.is_empty() {
                return;
            }
            client.call(Operation::Revoke { revoked }).await.unwrap();
        }
    }

    /// Another volume takes the place of what was.
    pub async fn begin_anew(&self, world: &World, number: u8) {
        self.is_idle(world).await;
        let machine = self.client.borrow().machine.clone();
        let gone = self.client.borrow().volume;
        machine.shard().drop_volume(gone).await.unwrap();
        let client = Client::create(&machine, number).await;
        client.open().await.unwrap();
        self.differing.borrow_mut().clear();
        *self.client.borrow_mut() = client;
    }
}

impl Client {
    /// What the index says of the block.
    pub fn found(&self, block: u64) -> Found {
        let shard = self.machine.shard();
        let contents = &shard.state.borrow().contents;
        contents.index.find(contents.place_of(self.volume, BlockIndex(block)))
    }
}
