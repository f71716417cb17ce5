//! What was: snapshots, which must read as they were taken however much is written, cleaned and crashed after them, and
//! versions that are taken back, which must never show again.

use super::*;
use crate::index::Found;
use crate::log::Geometry;
use torus_rpc::message::{Operation, Revoked};
use torus_schema::limits::BLOCK_BYTES;

const PINS_HELD_MAX: usize = 3;

pub struct Pin {
    version: Version,
    /// Of each block used: its version then, and whether it is data.
    blocks: Vec<(u64, Version, bool)>,
}

impl Test {
    /// All is answered, so it is drained. It is flushed, then told; an old one may go with it.
    pub async fn take_snapshot(&self) {
        if !self.flush_all().await {
            return;
        }
        let version = self.client().last_version();
        let blocks = {
            let blocks = self.blocks.borrow();
            let known = |block| {
                let version = blocks.acknowledged(block);
                (block, version, blocks.may_be(block, version, 0) == Some(true))
            };
            (0..EXTENTS * BLOCKS_USED).map(block_at).map(known).collect()
        };
        {
            let mut pins = self.pins.borrow_mut();
            pins.retain(|pin| pin.version < version);
            if pins.len() >= PINS_HELD_MAX {
                let gone = self.world.random_below(pins.len() as u64) as usize;
                pins.remove(gone);
            }
            pins.push(Pin { version, blocks });
        }
        self.retain().await;
    }

    /// Says which snapshots there are, and that a replica is stale since now, or that none is.
    pub async fn retain(&self) {
        let pins: Vec<Version> = self.pins.borrow().iter().map(|pin| pin.version).collect();
        let stale_since = self.world.one_in(3).then(|| self.client().last_version());
        tracing::trace!(?pins, ?stale_since, flush_point = %self.client().envelope.get().flush_point, "retain");
        let retained = self.client().retain(pins, stale_since).await;
        self.stale_since.set(stale_since.filter(|_| retained.is_ok()));
        if !self.is_answered(retained) {
            self.pins.borrow_mut().clear();
        }
    }

    /// On a damaged disk a snapshot may have lost something, but it shows nothing newer.
    pub fn check_snapshots(&self) {
        let (seed, client, shard) = (self.seed(), self.client(), self.machine.shard());
        for pin in self.pins.borrow().iter() {
            for (block, version, data) in pin.blocks.iter().copied() {
                let found = {
                    let contents = &shard.state.borrow().contents;
                    contents.find_at(contents.place_of(client.volume, BlockIndex(block)), pin.version)
                };
                let is_data = matches!(found, Found::Data(_));
                if self.damages() > 0 {
                    assert!(found.version() <= pin.version, "seed {seed}: snapshot {}, block {block}", pin.version);
                    continue;
                }
                // A clear may have gone with all that it hid.
                let same = found.version() == version || (!data && !is_data);
                assert!(same && data == is_data, "seed {seed}: snapshot {}, block {block}: {found:?}", pin.version);
                if let Found::Data(entry) = found {
                    let bytes = self.machine.disk.peek(Geometry::offset(entry.position), BLOCK_BYTES as usize);
                    let expected = content(BlockIndex(block), version);
                    assert!(bytes == expected, "seed {seed}: snapshot {}, block {block}: reused", pin.version);
                }
            }
        }
    }

    /// Takes the newest version of some block back, as a resync does with what only this replica got. True if the
    /// machine goes down meanwhile.
    pub async fn revoke(self: &Rc<Self>) -> bool {
        let block = block_at(self.world.random_below(EXTENTS * BLOCKS_USED));
        let client = self.client();
        let Some((version, before)) = self.blocks.borrow().newest_two(block) else { return false };
        // What the shard was told to be flushed everywhere is never taken back, and what was refused may not be there.
        if version <= client.envelope.get().flush_point || self.was_full.get() {
            return false;
        }
        tracing::debug!(block, %version, %before, "revoke");
        self.blocks_now().is_being_revoked(block, before);
        let answered = Rc::new(RefCell::new(None));
        let (answer, revoked) = (answered.clone(), vec![Revoked { block: BlockIndex(block), version }]);
        self.world.spawn(self.machine.process.get(), async move {
            let result = client.call(Operation::Revoke { revoked }).await;
            *answer.borrow_mut() = Some(result);
        });
        let patience = if self.world.one_in(3) { self.world.random_below(1500) } else { u64::MAX };
        let mut waited = 0;
        while answered.borrow().is_none() {
            if waited >= patience {
                tracing::debug!("while it revokes");
                return true;
            }
            self.world.sleep(Duration::from_micros(50)).await;
            waited += 50;
        }
        let answered = answered.borrow_mut().take().expect("just seen");
        if self.is_answered(answered) {
            self.blocks_now().revoked(block, version, before);
        }
        false
    }
}
