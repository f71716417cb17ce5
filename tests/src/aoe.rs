//! An AoE initiator that sends exactly the frames it is told to, from where the test is: a raw socket without retries.

use nix::errno::Errno;
use nix::libc;
use pnet::datalink;
use pnet::util::MacAddr;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};
use torus_frontends::aoe::wire::{self, Address, Config, Registers};

/// READ and WRITE SECTORS EXT, IDENTIFY DEVICE.
pub const READ: u8 = 0x24;
pub const WRITE: u8 = 0x34;
pub const IDENTIFY: u8 = 0xec;

pub struct Initiator {
    socket: OwnedFd,
    pub mac: MacAddr,
}

/// A frame that came back.
#[derive(Clone, Debug)]
pub struct Reply {
    pub from: MacAddr,
    pub flags: u8,
    pub error: u8,
    pub address: Address,
    pub command: u8,
    pub tag: u32,
    pub argument: Vec<u8>,
}

impl Reply {
    /// Of an ATA command.
    pub fn registers(&self) -> (Registers, &[u8]) {
        Registers::parse(&self.argument).expect("an answer to an ATA command has its registers")
    }

    pub fn config(&self) -> Config<'_> {
        Config::parse(&self.argument).expect("an answer to a query config")
    }
}

impl Initiator {
    /// On the host where this thread is.
    pub fn open(interface: &str) -> Self {
        let found = datalink::interfaces().into_iter().find(|found| found.name == interface);
        let found = found.unwrap_or_else(|| panic!("no interface {interface:?} here"));
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointer is passed.
        let opened = unsafe { libc::socket(libc::AF_PACKET, kind, i32::from(wire::ETHERTYPE.to_be())) };
        Errno::result(opened).expect("raw sockets are had by root");
        // SAFETY: the descriptor was just made, and nobody else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(opened) };
        // SAFETY: the structure is plain numbers.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = wire::ETHERTYPE.to_be();
        address.sll_ifindex = found.index as i32;
        let length = size_of::<libc::sockaddr_ll>() as u32;
        // SAFETY: pointer and length are those of the structure.
        let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
        Errno::result(bound).expect("the interface is there");
        Self { socket, mac: found.mac.expect("an Ethernet interface has an address") }
    }

    /// A whole request; `to`: broadcast, if it is not known yet.
    pub fn request(&self, to: MacAddr, address: Address, command: u8, tag: u32, argument: &[u8]) -> Vec<u8> {
        let mut frame = Vec::new();
        frame.extend_from_slice(&to.octets());
        frame.extend_from_slice(&self.mac.octets());
        frame.extend_from_slice(&wire::ETHERTYPE.to_be_bytes());
        frame.extend_from_slice(&[wire::VERSION << 4, 0]);
        frame.extend_from_slice(&address.shelf.to_be_bytes());
        frame.extend_from_slice(&[address.slot, command]);
        frame.extend_from_slice(&tag.to_be_bytes());
        frame.extend_from_slice(argument);
        frame
    }

    pub fn send(&self, frame: &[u8]) {
        // SAFETY: pointer and length are those of the frame.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(Errno::result(sent), Ok(frame.len() as isize), "the interface takes the frame");
    }

    /// The next response within `wait`.
    pub fn receive(&self, wait: Duration) -> Option<Reply> {
        let until = Instant::now() + wait;
        let mut buffer = vec![0; 65_536];
        loop {
            let left = until.saturating_duration_since(Instant::now()).as_millis() as i32;
            let mut polled = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one structure is passed, and it is there.
            if unsafe { libc::poll(&raw mut polled, 1, left) } <= 0 {
                return None;
            }
            // SAFETY: pointer and length are those of the buffer.
            let count = unsafe { libc::recv(self.socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
            let frame = &buffer[..Errno::result(count).expect("the socket is bound") as usize];
            if let Some(reply) = reply(frame) {
                return Some(reply);
            }
        }
    }

    /// The answer to that tag; others are passed over.
    pub fn answer(&self, tag: u32, wait: Duration) -> Option<Reply> {
        let until = Instant::now() + wait;
        loop {
            let reply = self.receive(until.saturating_duration_since(Instant::now()))?;
            if reply.tag == tag {
                return Some(reply);
            }
        }
    }

    /// The argument of an ATA command of `sectors`, with its data.
    pub fn ata(command: u8, lba: u64, sectors: u8, data: &[u8]) -> Vec<u8> {
        let mut bytes = [0; 6];
        bytes.copy_from_slice(&lba.to_le_bytes()[..6]);
        let flags = Registers::EXTENDED | if data.is_empty() { 0 } else { Registers::WRITE };
        let mut argument = Vec::new();
        Registers { flags, feature: 0, count: sectors, command, lba: bytes }.put(&mut argument);
        argument.extend_from_slice(data);
        argument
    }
}

fn reply(frame: &[u8]) -> Option<Reply> {
    let is_response = frame.len() >= wire::HEADER_BYTES && frame[14] & 0x08 != 0;
    is_response.then(|| Reply {
        from: MacAddr::new(frame[6], frame[7], frame[8], frame[9], frame[10], frame[11]),
        flags: frame[14] & 0x0f,
        error: frame[15],
        address: Address { shelf: u16::from_be_bytes([frame[16], frame[17]]), slot: frame[18] },
        command: frame[19],
        tag: u32::from_be_bytes([frame[20], frame[21], frame[22], frame[23]]),
        argument: frame[wire::HEADER_BYTES..].to_vec(),
    })
}
