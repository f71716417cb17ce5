//! Between processes of one host the network stack is not needed: beside its TCP port a shard listens on a unix socket,
//! named by the address it advertises, in Linux's abstract namespace (unix(7)). Who finds the name is on this host and in
//! this network namespace; everybody else, and who finds there what another user made, connects by TCP.
//!
//! What is said is the same on both, from the hello on, and so is what follows from silence.

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, getsockopt, setsockopt, socket, sockopt};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::{Duration, Instant};

/// What is on its way in one direction at most, if this user may set it: a frame of the largest payload.
const SEND_BUFFER_BYTES: usize = 1 << 20;
/// The kernel lets go of the sockets of a process that was killed a moment after the process is gone: what its io_uring
/// had begun is ended first.
const FREED_WITHIN: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What a connection runs over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    Tcp,
    /// Within the host.
    Unix,
}

fn name(address: &str) -> Vec<u8> {
    format!("torus/{address}").into_bytes()
}

/// When a name that is still taken will not become free any more: of all that are listened on from now.
pub fn patience() -> Instant {
    Instant::now() + FREED_WITHIN
}

/// For the shard that is reached at `address` (`host:port`, as others are told) by TCP. Blocks while the name is taken.
pub fn listen(address: &str, until: Instant) -> io::Result<UnixListener> {
    let name = SocketAddr::from_abstract_name(name(address))?;
    loop {
        match UnixListener::bind_addr(&name) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < until => {
                std::thread::sleep(LOOK_AGAIN);
            }
            bound => return bound,
        }
    }
}

/// To the shard at `address`, if it is on this host; `None`: go by TCP. Does not block.
pub(crate) fn connect_to(address: &str) -> Option<OwnedFd> {
    let connected = try_connect(address);
    match connected {
        Ok(socket) => is_trusted(&socket, address).then_some(socket),
        Err(Errno::ECONNREFUSED) => None,
        Err(error) => {
            // Its backlog is full, or this process has no descriptors left, say: TCP will tell.
            tracing::debug!(address, %error, "no connection within the host");
            None
        }
    }
}

fn try_connect(address: &str) -> nix::Result<OwnedFd> {
    let name = UnixAddr::new_abstract(&name(address))?;
    // Non-blocking until it is connected: a full backlog is an error then.
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(socket.as_raw_fd(), &name)?;
    nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))?;
    set_buffer(&socket);
    Ok(socket)
}

/// For either end of a connection: how much it sends without the other end having received it.
pub(crate) fn set_buffer(socket: &impl AsFd) {
    let wanted = SEND_BUFFER_BYTES;
    // As root beyond the system's limit, else up to it.
    if setsockopt(socket, sockopt::SndBufForce, &wanted).is_err()
        && let Err(error) = setsockopt(socket, sockopt::SndBuf, &wanted)
    {
        tracing::debug!(%error, "a connection within the host keeps its send buffer as it was");
    }
}

/// The name is free for all users of the host: what one of them made that is neither we nor root is not asked.
fn is_trusted(socket: &OwnedFd, address: &str) -> bool {
    let found = getsockopt(socket, sockopt::PeerCredentials).map(|peer| peer.uid());
    let expected = nix::unistd::geteuid().as_raw();
    let is_trusted = found.is_ok_and(|found| found == expected || found == 0);
    if !is_trusted {
        tracing::debug!(address, ?found, expected, "a unix socket by this name is another user's; connecting by TCP");
    }
    is_trusted
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn who_is_on_the_host_is_found_by_the_address_it_advertises() {
        let address = format!("somewhere.test:{}", std::process::id());
        assert!(connect_to(&address).is_none(), "nobody listens there");
        let listener = listen(&address, patience()).unwrap();
        let mut here = std::os::unix::net::UnixStream::from(connect_to(&address).expect("it listens"));
        let (mut there, _) = listener.accept().unwrap();
        here.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        there.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
        let error = UnixListener::bind_addr(&SocketAddr::from_abstract_name(name(&address)).unwrap()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        drop((listener, there));
        assert!(connect_to(&address).is_none(), "the name goes with the process");
    }

    #[test]
    fn a_backlog_that_is_full_makes_nobody_wait() {
        let address = format!("busy.test:{}", std::process::id());
        let _listener = listen(&address, patience()).unwrap();
        let connected: Vec<_> = (0..10_000).map_while(|_| connect_to(&address)).collect();
        assert!(connected.len() < 10_000 && connect_to(&address).is_none());
    }

    #[test]
    fn an_address_too_long_for_a_name_is_reached_by_tcp() {
        let address = format!("{}:7000", "a".repeat(200));
        assert!(listen(&address, patience()).is_err() && connect_to(&address).is_none());
    }
}
