//! Where a server listens: TCP or unix sockets. Bound before there is an executor, so that a port that is taken is
//! found out first.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// The kernel lets go of the sockets of a process that was killed a moment after the process is gone: what its io_uring
/// had begun is ended first.
const FREED_WITHIN: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(20);

#[derive(Debug, Error)]
pub enum ListenerError {
    #[error("{address} is in use by another process; stop that one or listen elsewhere")]
    InUse { address: String },
    #[error("cannot listen on {address}: {because}")]
    Other { address: String, because: io::Error },
}

fn failed(address: &str, because: io::Error) -> ListenerError {
    let address = address.to_owned();
    match because.kind() {
        io::ErrorKind::AddrInUse => ListenerError::InUse { address },
        _ => ListenerError::Other { address, because },
    }
}

/// For one executor: glommio's accept flips the socket's O_NONBLOCK, so two on one socket could block each other.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    address: String,
    tcp: Option<SocketAddr>,
    _file: Option<SocketFile>,
}

/// The file goes with the listener.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0) {
            tracing::debug!(path = %self.0.display(), %error, "the socket's file was gone already");
        }
    }
}

impl Listener {
    /// `HOST:PORT`; port 0 takes any free one. Without SO_REUSEPORT: two servers on one port would each get some of
    /// the clients.
    pub fn tcp(address: &str) -> Result<Self, ListenerError> {
        let socket = TcpListener::bind(address).map_err(|because| failed(address, because))?;
        let bound = socket.local_addr().map_err(|because| failed(address, because))?;
        Ok(Self { socket: socket.into(), address: bound.to_string(), tcp: Some(bound), _file: None })
    }

    /// A file that a dead server left behind is replaced, a live one's is not.
    pub fn unix(path: &Path) -> Result<Self, ListenerError> {
        let until = Instant::now() + FREED_WITHIN;
        loop {
            match Self::try_unix(path) {
                Err(ListenerError::InUse { .. }) if Instant::now() < until => std::thread::sleep(LOOK_AGAIN),
                tried => return tried,
            }
        }
    }

    fn try_unix(path: &Path) -> Result<Self, ListenerError> {
        let address = path.display().to_string();
        let socket = match UnixListener::bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                let dead =
                    UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
                if !dead {
                    return Err(ListenerError::InUse { address });
                }
                std::fs::remove_file(path).and_then(|()| UnixListener::bind(path))
            }
            other => other,
        }
        .map_err(|because| failed(&address, because))?;
        let file = SocketFile(path.to_owned());
        Ok(Self { socket: socket.into(), address, tcp: None, _file: Some(file) })
    }

    /// The address with the port that was taken, or the path.
    pub fn address(&self) -> &str {
        &self.address
    }

    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp
    }

    /// What a client is given to connect to an export.
    pub fn uri(&self, export: &str) -> String {
        match self.tcp {
            Some(address) => format!("nbd://{address}/{export}"),
            None => format!("nbd+unix:///{export}?socket={}", self.address),
        }
    }

    /// A file descriptor of its own for glommio, which closes what it is given.
    pub(crate) fn socket(&self) -> io::Result<OwnedFd> {
        self.socket.try_clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_is_taken_is_named() {
        let first = Listener::tcp("127.0.0.1:0").expect("a free port");
        assert_ne!(first.tcp_address().map(|address| address.port()), Some(0));
        let error = Listener::tcp(first.address()).expect_err("taken").to_string();
        assert!(error.starts_with(first.address()) && error.contains("in use"), "{error}");
        let error = Listener::tcp("nowhere").expect_err("no port").to_string();
        assert!(error.starts_with("cannot listen on nowhere: "), "{error}");
    }

    #[test]
    fn a_dead_servers_socket_file_is_replaced_a_live_ones_is_not() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("nbd.sock");
        drop(UnixListener::bind(&path).expect("a new path"));
        assert!(path.exists());
        let listener = Listener::unix(&path).expect("nobody listens");
        let error = Listener::unix(&path).expect_err("we listen").to_string();
        assert!(error.contains("in use"), "{error}");
        drop(listener);
        assert!(!path.exists());
    }
}
