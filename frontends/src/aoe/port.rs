//! An interface as its targets see it: what it is, and the answers that go out of it.

use super::counts::Counts;
use super::lists::{Lists, Offered, told};
use super::socket::{Link, Outgoing};
use super::target::Face;
use super::wire::{self, Address, SECTOR_BYTES};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::sync::Arc;
use torus_rpc::notify::Notify;
use torus_schema::limits::{AOE_BUFFERS, AOE_OUTBOX_FRAMES_MAX, AOE_SECTORS_MAX, BLOCK_BYTES};

/// What a target tells as its firmware version.
const FIRMWARE: u16 = 1;
/// The Linux driver takes its MTU less the Ethernet, AoE and ATA headers, and so do we: what it asks for has room.
const HEADERS_BYTES: usize = wire::HEADER_BYTES + wire::ATA_BYTES;
/// IEEE 802.3, without the checksum. Network cards fill up what is shorter, virtual ones do not, and there are programs
/// that take nothing shorter (aoeping).
const FRAME_BYTES_MIN: usize = 60;
const SECTORS_PER_BLOCK: u8 = (BLOCK_BYTES / SECTOR_BYTES as u64) as u8;

pub struct Port {
    pub name: String,
    link: Cell<Link>,
    outbox: RefCell<Vec<Outgoing>>,
    changed: Notify,
    counts: Arc<Counts>,
}

/// In one command, as the frames of an interface have room.
pub fn sectors_max(mtu: usize) -> u8 {
    let sectors = mtu.saturating_sub(HEADERS_BYTES) / SECTOR_BYTES;
    sectors.min(usize::from(AOE_SECTORS_MAX)) as u8
}

/// What initiators are told: whole blocks where more than one has room, so that few are written in part.
fn sectors_told(mtu: usize) -> u8 {
    match sectors_max(mtu) {
        few if few < SECTORS_PER_BLOCK => few,
        many => many - many % SECTORS_PER_BLOCK,
    }
}

impl Port {
    pub fn new(name: &str, link: Link, counts: Arc<Counts>) -> Self {
        let (outbox, changed) = (RefCell::default(), Notify::default());
        Self { name: name.to_string(), link: Cell::new(link), outbox, changed, counts }
    }

    pub fn link(&self) -> Link {
        self.link.get()
    }

    pub fn set_link(&self, link: Link) {
        self.link.set(link);
    }

    pub fn face(&self) -> Face {
        let Link { mac, mtu, .. } = self.link.get();
        Face { mac, sectors_max: sectors_max(mtu) }
    }

    pub fn offered(&self) -> Offered {
        Offered { buffers: AOE_BUFFERS, firmware: FIRMWARE, sectors: sectors_told(self.link.get().mtu) }
    }

    /// Goes out with what else is ready then.
    pub fn send(&self, mut head: Vec<u8>, data: Vec<Bytes>) {
        if data.is_empty() && head.len() < FRAME_BYTES_MIN {
            head.resize(FRAME_BYTES_MIN, 0);
        }
        let mut outbox = self.outbox.borrow_mut();
        // Only an interface that takes nothing gets here; who waits for an answer asks again.
        if outbox.len() >= AOE_OUTBOX_FRAMES_MAX {
            return self.counts.frames_unsent.add(1);
        }
        outbox.push(Outgoing { head, data });
        drop(outbox);
        self.changed.notify();
    }

    /// That the target is there, to everybody.
    pub fn advertise(&self, address: Address, lists: &Lists) {
        if self.link.get().running {
            let mut frame = wire::advertisement(self.link.get().mac, address);
            frame.extend_from_slice(&told(wire::CONFIG_READ, &lists.config, self.offered()));
            self.send(frame, Vec::new());
        }
    }

    /// At least one frame.
    pub async fn outgoing(&self) -> Vec<Outgoing> {
        let some = || Some(self.outbox.take()).filter(|frames| !frames.is_empty());
        self.changed.until(some).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_frame_is_shorter_than_ethernets_are() {
        let link = Link { mac: pnet::util::MacAddr(2, 0, 0, 0, 0, 1), mtu: 1500, running: true };
        let port = Port::new("eth0", link, Arc::default());
        port.send(vec![7; 36], Vec::new());
        port.send(vec![7; 36], vec![Bytes::from_static(&[8; 512])]);
        port.send(vec![7; 80], Vec::new());
        let lengths: Vec<usize> = port.outbox.borrow().iter().map(|frame| frame.head.len()).collect();
        assert_eq!((lengths, &port.outbox.borrow()[0].head[36..]), (vec![60, 36, 80], &[0; 24][..]));
    }

    #[test]
    fn sectors_follow_the_mtu_and_are_told_in_whole_blocks() {
        let both = [1500, 9000, 548, 547, 68, 65_535].map(|mtu| (sectors_max(mtu), sectors_told(mtu)));
        assert_eq!(both, [(2, 2), (17, 16), (1, 1), (0, 0), (0, 0), (127, 120)]);
    }
}
