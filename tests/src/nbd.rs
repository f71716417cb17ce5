//! A small NBD client that blocks, for load whose every answer is recorded (NBD protocol, doc/proto.md: fixed newstyle,
//! NBD_OPT_EXPORT_NAME, simple replies).

use crate::wait;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const EXPORT_NAME: u32 = 1;
/// Fixed newstyle, no zeroes.
const CLIENT_FLAGS: u32 = 3;
/// Longer than anything a server waits for before it answers with an error.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Command {
    Read = 0,
    Write = 1,
    Flush = 3,
    Trim = 4,
}

/// An errno of the server's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failed(pub u32);

/// A client whose reads are answered: the volume has a writer.
pub fn connect(server: SocketAddr, volume: &str) -> NbdClient {
    wait::until("the volume to answer", || {
        let mut client = NbdClient::connect(server, volume).ok()?;
        client.read(0, 4096).ok()?.ok()?;
        Some(client)
    })
}

pub struct NbdClient {
    stream: TcpStream,
    pub bytes: u64,
}

impl NbdClient {
    pub fn connect(server: SocketAddr, export: &str) -> io::Result<Self> {
        let mut stream = TcpStream::connect(server)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        let mut hello = CLIENT_FLAGS.to_be_bytes().to_vec();
        hello.extend(OPTION_MAGIC.to_be_bytes());
        hello.extend(EXPORT_NAME.to_be_bytes());
        hello.extend((export.len() as u32).to_be_bytes());
        hello.extend(export.as_bytes());
        stream.write_all(&hello)?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer)?;
        let bytes = u64::from_be_bytes(answer[..8].try_into().expect("eight bytes"));
        Ok(Self { stream, bytes })
    }

    /// Without waiting for the answer; any number may be under way.
    pub fn send(&mut self, command: Command, handle: u64, offset: u64, payload: &[u8], length: u32) -> io::Result<()> {
        let mut request = REQUEST_MAGIC.to_be_bytes().to_vec();
        request.extend(0u16.to_be_bytes());
        request.extend((command as u16).to_be_bytes());
        request.extend(handle.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(payload);
        self.stream.write_all(&request)
    }

    /// The next answer, of whatever request; not for reads, whose payload would follow.
    pub fn receive(&mut self) -> io::Result<(u64, Result<(), Failed>)> {
        let mut reply = [0; 16];
        self.stream.read_exact(&mut reply)?;
        assert_eq!(reply[..4], REPLY_MAGIC.to_be_bytes());
        let error = u32::from_be_bytes(reply[4..8].try_into().expect("four bytes"));
        let handle = u64::from_be_bytes(reply[8..].try_into().expect("eight bytes"));
        Ok((handle, if error == 0 { Ok(()) } else { Err(Failed(error)) }))
    }

    /// With nothing else under way.
    pub fn read(&mut self, offset: u64, length: u32) -> io::Result<Result<Vec<u8>, Failed>> {
        self.send(Command::Read, 0, offset, &[], length)?;
        if let (_, Err(failed)) = self.receive()? {
            return Ok(Err(failed));
        }
        let mut payload = vec![0; length as usize];
        self.stream.read_exact(&mut payload)?;
        Ok(Ok(payload))
    }

    /// With nothing else under way.
    pub fn call(&mut self, command: Command, offset: u64, payload: &[u8]) -> io::Result<Result<(), Failed>> {
        self.send(command, 0, offset, payload, payload.len() as u32)?;
        Ok(self.receive()?.1)
    }

    pub fn trim(&mut self, offset: u64, length: u32) -> io::Result<Result<(), Failed>> {
        self.send(Command::Trim, 0, offset, &[], length)?;
        Ok(self.receive()?.1)
    }
}
