//! Raw Ethernet on one interface of the namespace that the thread is in: frames of one type, as they are on the wire.

use nix::libc;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// AoE's.
pub const ETHERTYPE: u16 = 0x88a2;
/// More than the longest jumbo frame.
const FRAME_BYTES_MAX: usize = 16 << 10;
const SOCKET_BYTES: libc::c_int = 8 << 20;

pub type Mac = [u8; 6];
pub const BROADCAST: Mac = [0xff; 6];

pub struct Port {
    socket: OwnedFd,
    pub mac: Mac,
    buffer: Vec<u8>,
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Everything else is dropped before it is copied: load a half word at byte 12; return all of it if it is AoE's type.
fn filter(socket: libc::c_int) -> io::Result<()> {
    let step = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut steps = [
        step(libc::BPF_LD | libc::BPF_H | libc::BPF_ABS, 0, 0, 12),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, u32::from(ETHERTYPE)),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        step(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    let program = libc::sock_fprog { len: steps.len() as u16, filter: steps.as_mut_ptr() };
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

fn set<T>(socket: libc::c_int, level: libc::c_int, option: libc::c_int, value: &T) -> io::Result<()> {
    let bytes = size_of::<T>() as libc::socklen_t;
    // SAFETY: the value lives through the call, and its size is its own.
    check(unsafe { libc::setsockopt(socket, level, option, std::ptr::from_ref(value).cast(), bytes) }).map(drop)
}

impl Port {
    /// What arrives at the interface, not what leaves by it.
    pub fn open(interface: &str) -> io::Result<Self> {
        let every = u16::to_be(libc::ETH_P_ALL as u16);
        // SAFETY: no pointers.
        let socket = check(unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) })?;
        // SAFETY: it was just made and is nobody else's.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let descriptor = socket.as_raw_fd();
        filter(descriptor)?;
        set(descriptor, libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &1i32)?;
        set(descriptor, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &SOCKET_BYTES)?;
        // SAFETY: all zeros is an address.
        let mut address: libc::sockaddr_ll = unsafe { zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = every;
        address.sll_ifindex = nix::net::if_::if_nametoindex(interface)? as i32;
        let bytes = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: the address lives through the call, and its size is its own.
        check(unsafe { libc::bind(descriptor, std::ptr::from_ref(&address).cast(), bytes) })?;
        Ok(Self { socket, mac: mac_of(interface)?, buffer: vec![0; FRAME_BYTES_MAX] })
    }

    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        // SAFETY: the frame lives through the call.
        let sent = unsafe { libc::send(self.socket.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// The next frame, if one comes within `deadline`; zero: if one is there.
    pub fn receive(&mut self, deadline: Duration) -> io::Result<Option<&[u8]>> {
        let mut asked = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let milliseconds = i32::try_from(deadline.as_millis()).expect("a deadline in a test is short");
        // SAFETY: one descriptor, ours.
        if check(unsafe { libc::poll(&mut asked, 1, milliseconds) })? == 0 {
            return Ok(None);
        }
        let (into, bytes) = (self.buffer.as_mut_ptr(), self.buffer.len());
        // SAFETY: the buffer is ours and that long.
        let got = unsafe { libc::recv(self.socket.as_raw_fd(), into.cast(), bytes, libc::MSG_DONTWAIT) };
        match usize::try_from(got) {
            Ok(bytes) => Ok(Some(&self.buffer[..bytes])),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
                error => Err(error),
            },
        }
    }
}

impl AsRawFd for Port {
    fn as_raw_fd(&self) -> libc::c_int {
        self.socket.as_raw_fd()
    }
}

/// Through an ioctl: what `/sys` shows is of the namespace that it was mounted in.
fn mac_of(interface: &str) -> io::Result<Mac> {
    // SAFETY: all zeros is a request.
    let mut request: libc::ifreq = unsafe { zeroed() };
    assert!(interface.len() < request.ifr_name.len() && Path::new(interface).components().count() == 1);
    for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
        *to = from as libc::c_char;
    }
    // SAFETY: no pointers.
    let socket = check(unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: it was just made and is nobody else's.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    // SAFETY: the request lives through the call, which fills the address in.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFHWADDR, &mut request) })?;
    // SAFETY: that it was filled in is what success means.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr.sa_data };
    Ok(std::array::from_fn(|at| address[at] as u8))
}
