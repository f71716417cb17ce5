//! What a client was told, block by block, and whether what it reads later may be.
//!
//! Every write carries a stamp of its own in every 8 bytes of the block, so that a torn block shows, and another
//! block's data does too. Of each block is known: the last stamp that was acknowledged, the last that a flush covered,
//! and those that were sent behind these and may or may not have got there.

use crate::nbd::{Command, Failed, NbdClient};
use std::collections::HashMap;
use std::io;

pub const BLOCK: usize = 4096;

#[derive(Clone, Debug, Default)]
struct Known {
    flushed: u64,
    acknowledged: u64,
    /// Sent after `flushed`, in this order, `acknowledged` among them.
    later: Vec<u64>,
}

/// What has to be there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Promise {
    /// The replica set was never without the data.
    Acknowledged,
    /// It may have been.
    Flushed,
}

pub struct Witness {
    blocks: Vec<Known>,
    next_stamp: u64,
    in_flight: HashMap<u64, usize>,
    random: u64,
}

impl Witness {
    pub fn new(bytes: u64, seed: u64) -> Self {
        let blocks = vec![Known::default(); (bytes / BLOCK as u64) as usize];
        Self { blocks, next_stamp: 1, in_flight: HashMap::new(), random: seed }
    }

    fn random(&mut self) -> u64 {
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.random >> 33
    }

    fn content(stamp: u64, block: usize) -> Vec<u8> {
        let word = if stamp == 0 { 0 } else { stamp << 24 | block as u64 };
        word.to_be_bytes().repeat(BLOCK / 8)
    }

    /// Sends a write of a random block that has none under way.
    fn send(&mut self, client: &mut NbdClient) -> io::Result<()> {
        let block = loop {
            let block = self.random() as usize % self.blocks.len();
            if !self.in_flight.values().any(|other| *other == block) {
                break block;
            }
        };
        let stamp = self.next_stamp;
        self.next_stamp += 1;
        self.blocks[block].later.push(stamp);
        self.in_flight.insert(stamp, block);
        client.send(Command::Write, stamp, (block * BLOCK) as u64, &Self::content(stamp, block), BLOCK as u32)
    }

    fn receive(&mut self, client: &mut NbdClient) -> io::Result<Result<(), Failed>> {
        let (stamp, result) = client.receive()?;
        let block = self.in_flight.remove(&stamp).expect("an answer to what was asked");
        if result.is_ok() {
            self.blocks[block].acknowledged = stamp;
        }
        Ok(result)
    }

    /// `writes` of them, some under way at once, with a flush after each `flush_every`. Ends early, without an error,
    /// when one fails or the connection does: gives how many were acknowledged.
    pub fn load(
        &mut self,
        client: &mut NbdClient,
        writes: usize,
        flush_every: usize,
    ) -> Result<usize, (usize, String)> {
        let mut acknowledged = 0;
        let (mut sent, mut since_flush) = (0, 0);
        self.in_flight.clear();
        while acknowledged < writes {
            while sent < writes && self.in_flight.len() < 16 && since_flush < flush_every {
                self.send(client).map_err(|error| (acknowledged, error.to_string()))?;
                (sent, since_flush) = (sent + 1, since_flush + 1);
            }
            while !self.in_flight.is_empty() {
                match self.receive(client) {
                    Ok(Ok(())) => acknowledged += 1,
                    Ok(Err(failed)) => return Err((acknowledged, format!("errno {}", failed.0))),
                    Err(error) => return Err((acknowledged, error.to_string())),
                }
            }
            if since_flush >= flush_every {
                since_flush = 0;
                match client.call(Command::Flush, 0, &[]) {
                    Ok(Ok(())) => self.flushed(),
                    Ok(Err(failed)) => return Err((acknowledged, format!("flush: errno {}", failed.0))),
                    Err(error) => return Err((acknowledged, format!("flush: {error}"))),
                }
            }
        }
        Ok(acknowledged)
    }

    fn flushed(&mut self) {
        for known in &mut self.blocks {
            if known.acknowledged > known.flushed {
                known.flushed = known.acknowledged;
                known.later.retain(|stamp| *stamp > known.flushed);
            }
        }
    }

    /// Reads everything; panics with the first block that is not what was promised. What is read counts from now on as
    /// the block's content.
    #[track_caller]
    pub fn verify(&mut self, client: &mut NbdClient, promise: Promise) -> io::Result<Result<(), Failed>> {
        const AT_ONCE: usize = 64;
        self.in_flight.clear();
        for first in (0..self.blocks.len()).step_by(AT_ONCE) {
            let count = AT_ONCE.min(self.blocks.len() - first);
            let content = match client.read((first * BLOCK) as u64, (count * BLOCK) as u32)? {
                Ok(content) => content,
                Err(failed) => return Ok(Err(failed)),
            };
            for (block, bytes) in (first..).zip(content.chunks(BLOCK)) {
                self.check(block, bytes, promise);
            }
        }
        Ok(Ok(()))
    }

    #[track_caller]
    fn check(&mut self, block: usize, bytes: &[u8], promise: Promise) {
        let known = &mut self.blocks[block];
        let least = match promise {
            Promise::Acknowledged => known.acknowledged.max(known.flushed),
            Promise::Flushed => known.flushed,
        };
        let word = u64::from_be_bytes(bytes[..8].try_into().expect("eight bytes"));
        let stamp = word >> 24;
        assert!(bytes == Self::content(stamp, block), "block {block} is torn or of another block: {:x?}", &bytes[..16]);
        let may_be = stamp == known.flushed || known.later.contains(&stamp);
        assert!(
            may_be && stamp >= least,
            "block {block} holds write {stamp}, {promise:?} at least {least}; flushed {}, acknowledged {}, later {:?}",
            known.flushed,
            known.acknowledged,
            known.later
        );
        // Of those sent and not answered it is decided now, except that they are not flushed.
        known.acknowledged = stamp;
        known.later.retain(|other| *other <= stamp);
    }
}
