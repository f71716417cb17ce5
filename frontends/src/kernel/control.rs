//! Asks the kernel's nbd driver, by generic netlink; blocks for as long as the kernel takes.

use super::wire::{Answer, Connect, Device, Request, parse};
use super::{KernelError, io};
use crate::kernel::sysfs::device_path;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, sendto, socket,
};
use std::io::Error;
use std::os::fd::{AsRawFd, OwnedFd};

/// Netlink's own answers are far smaller; a status names each of up to some thousand devices.
const ANSWER_BYTES_MAX: usize = 256 << 10;

/// A socket to the driver.
pub struct Control {
    socket: OwnedFd,
    family: u16,
    sequence: u32,
}

impl Control {
    pub fn open() -> Result<Self, KernelError> {
        let socket =
            socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkGeneric)
                .map_err(|error| io("a netlink socket")(error.into()))?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(|error| io("a netlink socket")(error.into()))?;
        let mut control = Self { socket, family: 0, sequence: 0 };
        let family = control.ask(&Request::Family).map_err(|error| match error {
            Failed::Errno(Errno::ENOENT) => KernelError::NoModule,
            other => other.into_error("name its family", None),
        })?;
        let number = family.into_iter().find_map(|answer| match answer {
            Answer::Family(number) => Some(number),
            _ => None,
        });
        control.family = number.ok_or(KernelError::NoModule)?;
        Ok(control)
    }

    /// The device's number.
    pub fn connect(&mut self, connect: Connect) -> Result<u32, KernelError> {
        let index = connect.index;
        let answers = self.ask(&Request::Connect(connect)).map_err(|error| match (error, index) {
            (Failed::Errno(Errno::EBUSY), Some(index)) => {
                KernelError::Taken { device: device_path(index), to: String::new() }
            }
            (other, index) => other.into_error("attach", index),
        })?;
        let named = answers.into_iter().find_map(|answer| match answer {
            Answer::Index(index) => Some(index),
            _ => None,
        });
        let silent = || io("the nbd driver")(Error::other("it attached a device and did not say which"));
        named.or(index).ok_or_else(silent)
    }

    /// Other sockets in the place of those that ended, or another size.
    pub fn reconfigure(
        &mut self,
        index: u32,
        backend: &str,
        sockets: Vec<i32>,
        size_bytes: Option<u64>,
    ) -> Result<(), KernelError> {
        let request = Request::Reconfigure { index, size_bytes, sockets, backend: backend.to_string() };
        self.ask(&request).map(|_| ()).map_err(|error| error.into_error("reconfigure", Some(index)))
    }

    /// Requests that wait fail; gone when it returns.
    pub fn disconnect(&mut self, index: u32) -> Result<(), KernelError> {
        let request = Request::Disconnect { index };
        self.ask(&request).map(|_| ()).map_err(|error| error.into_error("detach", Some(index)))
    }

    pub fn devices(&mut self) -> Result<Vec<Device>, KernelError> {
        let answers = self.ask(&Request::Status).map_err(|error| error.into_error("list", None))?;
        let devices = answers.into_iter().filter_map(|answer| match answer {
            Answer::Devices(devices) => Some(devices),
            _ => None,
        });
        Ok(devices.flatten().collect())
    }

    fn ask(&mut self, request: &Request) -> Result<Vec<Answer>, Failed> {
        self.sequence += 1;
        let message = request.encode(self.family, self.sequence);
        let kernel = NetlinkAddr::new(0, 0);
        sendto(self.socket.as_raw_fd(), &message, &kernel, MsgFlags::empty()).map_err(Failed::Socket)?;
        let mut answers = Vec::new();
        let mut buffer = vec![0; ANSWER_BYTES_MAX];
        loop {
            let length = match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(length) => length,
                Err(Errno::EINTR) => continue,
                Err(error) => return Err(Failed::Socket(error)),
            };
            for answer in parse(&buffer[..length], self.family, self.sequence) {
                match answer {
                    Answer::Ended(0) => return Ok(answers),
                    Answer::Ended(number) => return Err(Failed::Errno(Errno::from_raw(number))),
                    other => answers.push(other),
                }
            }
        }
    }
}

enum Failed {
    /// The driver's answer.
    Errno(Errno),
    Socket(Errno),
}

impl Failed {
    fn into_error(self, what: &'static str, index: Option<u32>) -> KernelError {
        let device = index.map_or("a device".to_string(), |index| device_path(index).display().to_string());
        match self {
            Self::Errno(errno @ (Errno::EPERM | Errno::EACCES)) => KernelError::NotAllowed { because: errno.into() },
            Self::Errno(errno) => KernelError::Refused { what, device, because: errno.into() },
            Self::Socket(errno) => io("netlink")(errno.into()),
        }
    }
}
