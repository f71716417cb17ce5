//! Raw Ethernet: packet sockets bound to an interface, driven from the executor, and word of what becomes of interfaces.
//!
//! pnet's own channel needs a thread of its own and costs 4.1–4.5 µs a frame, against 2.5 µs of recvmmsg and sendmmsg
//! from the executor (measured), so the socket is ours; packet types, addresses and interfaces are pnet's.
//!
//! glommio waits for us: it takes any descriptor for a stream, and a peek at one byte of it ends when there is a frame.
//! Hence the socket is blocking, and every call of ours says that it will not wait.

use super::filter::filter;
use super::wire::{Address, ETHERNET_BYTES, ETHERTYPE};
use futures::AsyncWriteExt;
use glommio::net::TcpStream;
use nix::errno::Errno;
use nix::libc;
use pnet::datalink::{self, NetworkInterface};
use pnet::util::MacAddr;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use thiserror::Error;
use torus_schema::limits::{AOE_BATCH_FRAMES, AOE_SOCKET_BUFFER_BYTES};

#[derive(Debug, Error)]
pub enum SocketError {
    #[error("there is no interface {name:?}; there are: {there}")]
    NoInterface { name: String, there: String },
    #[error("{name} is no Ethernet interface: it has no address of six bytes")]
    NoEthernet { name: String },
    #[error("raw sockets are refused: run as root, or give the program CAP_NET_RAW ({because})")]
    Forbidden { because: io::Error },
    #[error("{what} of {name} failed: {because}")]
    Failed { what: &'static str, name: String, because: io::Error },
}

/// What an interface is at the moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    pub mac: MacAddr,
    pub mtu: usize,
    /// Switched on, and with a carrier.
    pub running: bool,
}

/// A frame to be sent: what is behind its head is not copied.
#[derive(Clone, Debug)]
pub struct Outgoing {
    pub head: Vec<u8>,
    pub data: Vec<bytes::Bytes>,
}

pub struct PacketSocket {
    pub name: String,
    /// The same descriptor again: a glommio stream is exclusive to whoever waits for it.
    readable: TcpStream,
    descriptor: OwnedFd,
}

/// Frames dropped by the kernel since it was last asked.
pub struct KernelDrops(pub u64);

fn find(name: &str) -> Result<NetworkInterface, SocketError> {
    let interfaces = datalink::interfaces();
    let there = || interfaces.iter().map(|interface| interface.name.as_str()).collect::<Vec<_>>().join(", ");
    let found = interfaces.iter().find(|interface| interface.name == name);
    match found {
        Some(interface) if interface.mac.is_some_and(|mac| !mac.is_zero()) => Ok(interface.clone()),
        Some(_) => Err(SocketError::NoEthernet { name: name.to_string() }),
        None => Err(SocketError::NoInterface { name: name.to_string(), there: there() }),
    }
}

/// Whether it is there, and raw sockets can be had: before there is an executor.
pub fn check_interface(name: &str) -> Result<(), SocketError> {
    find(name)?;
    unbound(name).map(drop)
}

/// Hears nothing until it is bound.
fn unbound(name: &str) -> Result<OwnedFd, SocketError> {
    // SAFETY: no pointer is passed.
    let opened = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    let opened = check(opened).map_err(|because| match because.raw_os_error() {
        Some(libc::EPERM) => SocketError::Forbidden { because },
        _ => SocketError::Failed { what: "opening a socket", name: name.to_string(), because },
    })?;
    // SAFETY: the descriptor was just made, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(opened) })
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    Ok(Errno::result(result)?)
}

impl PacketSocket {
    /// On an executor. Hears nothing but requests for `addresses`, and from the moment it is bound.
    pub fn open(name: &str, addresses: &[Address]) -> Result<Self, SocketError> {
        let interface = find(name)?;
        let failed = |what| move |because| SocketError::Failed { what, name: name.to_string(), because };
        let descriptor = unbound(name)?;
        attach(&descriptor, addresses, interface.index).map_err(failed("the filter"))?;
        let one: libc::c_int = 1;
        set(&descriptor, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &one)
            .map_err(failed("PACKET_IGNORE_OUTGOING"))?;
        enlarge(&descriptor).map_err(failed("the socket's buffers"))?;
        bind(&descriptor, interface.index).map_err(failed("binding to the interface"))?;
        let readable = stream_of(&descriptor).map_err(failed("duplicating the socket"))?;
        Ok(Self { name: name.to_string(), readable, descriptor })
    }

    /// Until there is a frame, or news of the socket.
    pub async fn readable(&self) -> io::Result<()> {
        self.readable.peek(&mut [0]).await.map_err(io::Error::from)?;
        Ok(())
    }

    /// What came in; none: there is nothing more.
    pub fn receive(&self, buffers: &mut Buffers) -> io::Result<usize> {
        let mut messages = buffers.messages();
        // SAFETY: each message points to its own part of the buffers, which live until the call is over.
        let count = unsafe {
            libc::recvmmsg(
                self.descriptor.as_raw_fd(),
                messages.headers.as_mut_ptr(),
                messages.headers.len() as libc::c_uint,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        let lengths = messages.headers.iter().map(|message| {
            let is_whole = message.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
            if is_whole { message.msg_len as usize } else { 0 }
        });
        let lengths: Vec<usize> = lengths.take(count.max(0) as usize).collect();
        match Errno::result(count) {
            Ok(_) => {
                buffers.lengths = lengths;
                Ok(count as usize)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => {
                buffers.lengths.clear();
                Ok(0)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// As many as the kernel takes at once; a frame that cannot be sent at all is given up, since who waits for it asks
    /// again.
    pub fn send(&self, frames: &[Outgoing]) -> Sent {
        let frames = &frames[..frames.len().min(AOE_BATCH_FRAMES)];
        let mut slices: Vec<Vec<libc::iovec>> = frames.iter().map(slices_of).collect();
        let mut headers: Vec<libc::mmsghdr> = slices.iter_mut().map(|slices| header_of(slices)).collect();
        // SAFETY: headers, slices and frames live until the call is over, and it only reads the frames.
        let count = unsafe {
            libc::sendmmsg(
                self.descriptor.as_raw_fd(),
                headers.as_mut_ptr(),
                headers.len() as libc::c_uint,
                libc::MSG_DONTWAIT as _,
            )
        };
        match Errno::result(count) {
            Ok(count) => Sent::Some(count as usize),
            Err(Errno::EINTR) => Sent::Some(0),
            Err(Errno::EAGAIN) => Sent::Later,
            Err(error) => Sent::Never(error.into()),
        }
    }

    /// When the kernel's buffer is full: waits for room for this one.
    pub async fn send_later(&mut self, frame: &Outgoing) -> io::Result<()> {
        let mut whole = frame.head.clone();
        frame.data.iter().for_each(|data| whole.extend_from_slice(data));
        // A packet socket takes a frame whole or not at all.
        self.readable.write_all(&whole).await?;
        Ok(())
    }

    /// For who sends beside who receives.
    pub fn sender(&self) -> io::Result<Self> {
        let descriptor = self.descriptor.try_clone()?;
        Ok(Self { name: self.name.clone(), readable: stream_of(&descriptor)?, descriptor })
    }

    pub fn link(&self) -> Result<Link, SocketError> {
        let failed = |what| move |because| SocketError::Failed { what, name: self.name.clone(), because };
        let flags = ask(&self.descriptor, &self.name, libc::SIOCGIFFLAGS as _).map_err(failed("the flags"))?;
        let mtu = ask(&self.descriptor, &self.name, libc::SIOCGIFMTU as _).map_err(failed("the MTU"))?;
        let hardware = ask(&self.descriptor, &self.name, libc::SIOCGIFHWADDR as _).map_err(failed("the address"))?;
        // SAFETY: each of the three calls filled the member of the union that is its own.
        let (flags, mtu, mac) = unsafe {
            let mac = hardware.ifr_ifru.ifru_hwaddr.sa_data.map(|byte| byte as u8);
            (i32::from(flags.ifr_ifru.ifru_flags), mtu.ifr_ifru.ifru_mtu, mac)
        };
        let running = flags & libc::IFF_UP != 0 && flags & libc::IFF_RUNNING != 0;
        let mac = MacAddr::new(mac[0], mac[1], mac[2], mac[3], mac[4], mac[5]);
        Ok(Link { mac, mtu: usize::try_from(mtu).unwrap_or(0), running })
    }

    /// Frames for which the socket's buffer had no room, since the last call.
    pub fn kernel_drops(&self) -> io::Result<KernelDrops> {
        // SAFETY: the structure is plain numbers, which the kernel fills.
        let mut counts: libc::tpacket_stats = unsafe { zeroed() };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: pointer and length are those of the structure.
        check(unsafe {
            libc::getsockopt(
                self.descriptor.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut counts).cast(),
                &mut length,
            )
        })?;
        Ok(KernelDrops(counts.tp_drops.into()))
    }
}

pub enum Sent {
    Some(usize),
    Later,
    /// The first of them cannot be sent.
    Never(io::Error),
}

fn stream_of(descriptor: &OwnedFd) -> io::Result<TcpStream> {
    let copy = descriptor.try_clone()?;
    // SAFETY: the descriptor was duplicated for this and is owned by nobody else.
    Ok(unsafe { TcpStream::from_raw_fd(copy.into_raw_fd()) })
}

fn set<T>(descriptor: &OwnedFd, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let length = size_of::<T>() as libc::socklen_t;
    // SAFETY: pointer and length are those of the value.
    let result = unsafe { libc::setsockopt(descriptor.as_raw_fd(), level, option, (&raw const *value).cast(), length) };
    check(result).map(|_| ())
}

fn attach(descriptor: &OwnedFd, addresses: &[Address], interface: u32) -> io::Result<()> {
    let mut instructions = filter(addresses, interface);
    let program = libc::sock_fprog { len: instructions.len() as u16, filter: instructions.as_mut_ptr() };
    set(descriptor, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

/// By force where that is allowed; otherwise as far as the system's limit goes.
fn enlarge(descriptor: &OwnedFd) -> io::Result<()> {
    let bytes = AOE_SOCKET_BUFFER_BYTES as libc::c_int;
    for (forced, bounded) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
        if set(descriptor, libc::SOL_SOCKET, forced, &bytes).is_err() {
            set(descriptor, libc::SOL_SOCKET, bounded, &bytes)?;
        }
    }
    Ok(())
}

fn bind(descriptor: &OwnedFd, index: u32) -> io::Result<()> {
    // SAFETY: the structure is plain numbers.
    let mut address: libc::sockaddr_ll = unsafe { zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ETHERTYPE.to_be();
    address.sll_ifindex = index as libc::c_int;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: pointer and length are those of the structure.
    check(unsafe { libc::bind(descriptor.as_raw_fd(), (&raw const address).cast(), length) }).map(|_| ())
}

/// One of the ioctls of netdevice(7) that ask about an interface.
fn ask(descriptor: &OwnedFd, name: &str, what: libc::Ioctl) -> io::Result<libc::ifreq> {
    // SAFETY: the structure is plain numbers.
    let mut request: libc::ifreq = unsafe { zeroed() };
    // The last byte stays zero: names are 15 bytes at most.
    for (place, byte) in request.ifr_name[..libc::IFNAMSIZ - 1].iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    // SAFETY: the kernel reads the name and fills the union of the structure.
    check(unsafe { libc::ioctl(descriptor.as_raw_fd(), what, &raw mut request) })?;
    Ok(request)
}

fn slices_of(frame: &Outgoing) -> Vec<libc::iovec> {
    let parts = std::iter::once(&frame.head[..]).chain(frame.data.iter().map(|data| &data[..]));
    parts.map(|part| libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() }).collect()
}

fn header_of(slices: &mut [libc::iovec]) -> libc::mmsghdr {
    // SAFETY: the structure is plain numbers and pointers that may be null.
    let mut message: libc::mmsghdr = unsafe { zeroed() };
    message.msg_hdr.msg_iov = slices.as_mut_ptr();
    message.msg_hdr.msg_iovlen = slices.len() as _;
    message
}

/// Where frames are received to; used again and again.
pub struct Buffers {
    bytes: Vec<u8>,
    frame_bytes: usize,
    lengths: Vec<usize>,
}

struct Messages {
    headers: Vec<libc::mmsghdr>,
    /// The headers point into it.
    _slices: Vec<libc::iovec>,
}

impl Buffers {
    pub fn new(mtu: usize) -> Self {
        let frame_bytes = mtu + ETHERNET_BYTES;
        Self { bytes: vec![0; frame_bytes * AOE_BATCH_FRAMES], frame_bytes, lengths: Vec::new() }
    }

    /// Whether frames of this size just fit.
    pub fn is_for(&self, mtu: usize) -> bool {
        self.frame_bytes == mtu + ETHERNET_BYTES
    }

    /// What was received last; a frame that was cut off is empty.
    pub fn frames(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks_exact(self.frame_bytes).zip(&self.lengths).map(|(frame, length)| &frame[..*length])
    }

    fn messages(&mut self) -> Messages {
        let frames = self.bytes.chunks_exact_mut(self.frame_bytes);
        let slices = frames.map(|frame| libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() });
        let mut slices: Vec<_> = slices.collect();
        let headers = slices.iter_mut().map(|slice| header_of(std::slice::from_mut(slice))).collect();
        Messages { headers, _slices: slices }
    }
}

/// Wakes when any interface of this network namespace changes.
pub struct LinkNews {
    stream: TcpStream,
    descriptor: OwnedFd,
}

impl LinkNews {
    pub fn open() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointer is passed.
        let opened = check(unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) })?;
        // SAFETY: the descriptor was just made, and nobody else has it.
        let descriptor = unsafe { OwnedFd::from_raw_fd(opened) };
        // SAFETY: the structure is plain numbers.
        let mut address: libc::sockaddr_nl = unsafe { zeroed() };
        address.nl_family = libc::AF_NETLINK as u16;
        address.nl_groups = libc::RTMGRP_LINK as u32;
        let length = size_of::<libc::sockaddr_nl>() as libc::socklen_t;
        // SAFETY: pointer and length are those of the structure.
        check(unsafe { libc::bind(descriptor.as_raw_fd(), (&raw const address).cast(), length) })?;
        Ok(Self { stream: stream_of(&descriptor)?, descriptor })
    }

    /// What it is has to be asked for: news may be lost when there are many.
    pub async fn next(&self) -> io::Result<()> {
        // ENOBUFS says that there were too many: news all the same.
        let _ = self.stream.peek(&mut [0]).await;
        while receive_any(self.descriptor.as_raw_fd())? {}
        Ok(())
    }
}

/// Takes one message, whatever it says.
fn receive_any(descriptor: RawFd) -> io::Result<bool> {
    let mut message = [0u8; 256];
    // SAFETY: pointer and length are those of the array.
    let count = unsafe { libc::recv(descriptor, message.as_mut_ptr().cast(), message.len(), libc::MSG_DONTWAIT) };
    match Errno::result(count) {
        Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR) => Ok(true),
        Err(Errno::EAGAIN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
