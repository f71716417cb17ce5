//! The client's side of NBD's negotiation with our own server, for the kernel, which can only transmit: fixed newstyle,
//! NBD_OPT_EXPORT_NAME, no zeroes (doc/proto.md). Blocks.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const GREETING_MAGIC: [u8; 16] = *b"NBDMAGICIHAVEOPT";
const OPTION_MAGIC: [u8; 8] = *b"IHAVEOPT";
const EXPORT_NAME: u32 = 1;
/// Fixed newstyle, no zeroes: both the server's handshake flags and ours.
const FLAGS: u16 = 3;
/// The server answers when the volume is attached, which it is.
const DEADLINE: Duration = Duration::from_secs(30);

/// A connection that transmits, for the kernel.
pub struct Negotiated {
    pub socket: UnixStream,
    pub size_bytes: u64,
    /// As the kernel takes them.
    pub flags: u16,
}

pub fn negotiate(path: &Path, export: &str) -> io::Result<Negotiated> {
    let mut socket = UnixStream::connect(path)?;
    socket.set_read_timeout(Some(DEADLINE))?;
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting)?;
    if greeting[..16] != GREETING_MAGIC || u16::from_be_bytes([greeting[16], greeting[17]]) & FLAGS != FLAGS {
        return Err(io::Error::other(format!("our own server greets with {greeting:02x?}")));
    }
    let mut hello = u32::from(FLAGS).to_be_bytes().to_vec();
    hello.extend(OPTION_MAGIC);
    hello.extend(EXPORT_NAME.to_be_bytes());
    hello.extend(u32::try_from(export.len()).map_err(io::Error::other)?.to_be_bytes());
    hello.extend(export.as_bytes());
    socket.write_all(&hello)?;
    let mut answer = [0; 10];
    socket.read_exact(&mut answer)?;
    // The kernel sets its own.
    socket.set_read_timeout(None)?;
    let (size, flags) = answer.split_at(8);
    let size_bytes = u64::from_be_bytes(size.try_into().expect("eight bytes"));
    Ok(Negotiated { socket, size_bytes, flags: u16::from_be_bytes(flags.try_into().expect("two bytes")) })
}
