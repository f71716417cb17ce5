//! Both directions of a connection's socket, as they are or over TLS.

use crate::nbd::receive::Receive;
use crate::nbd::reply::Gather;
use crate::nbd::tls::{Tls, TlsFailure};
use bytes::BytesMut;
use futures::{AsyncReadExt, AsyncWriteExt};
use glommio::net::TcpStream;
use nix::sys::socket::{Shutdown, shutdown};
use std::io;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use thiserror::Error;
use torus_rpc::send::send_some;

/// What is received at once over TLS: a few of its records.
const CIPHERTEXT_BYTES: usize = 64 << 10;

#[derive(Debug, Error)]
pub(crate) enum StreamError {
    #[error("the client closed it")]
    Closed,
    #[error("the socket failed: {0}")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Tls(#[from] TlsFailure),
}

/// The receiving direction, and what was received but not understood yet.
pub(crate) struct Input {
    stream: TcpStream,
    bytes: Receive,
    tls: Option<Encrypted>,
}

struct Encrypted {
    tls: Rc<Tls>,
    /// Received, not decrypted yet.
    ciphertext: BytesMut,
}

impl Input {
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, bytes: Receive::default(), tls: None }
    }

    /// Of a client that another executor shook hands with: what it received and did not understand.
    pub fn resume(&mut self, received: BytesMut) {
        self.bytes.filled = received;
    }

    pub fn is_encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// What was received and not understood.
    pub fn filled(&mut self) -> &mut BytesMut {
        &mut self.bytes.filled
    }

    /// At least one byte more, into a buffer that has room for `wanted` in all.
    pub async fn receive(&mut self, wanted: usize, chunk_bytes: usize) -> Result<(), StreamError> {
        let Some(encrypted) = &mut self.tls else {
            let count = self.stream.read(self.bytes.spare(wanted, chunk_bytes)).await?;
            return received(count).map(|()| self.bytes.received(count));
        };
        loop {
            let count = encrypted.tls.decrypted(self.bytes.spare(wanted, chunk_bytes))?;
            match count {
                Some(count) => return received(count).map(|()| self.bytes.received(count)),
                None => receive_encrypted(&mut self.stream, encrypted).await?,
            }
        }
    }
}

fn received(count: usize) -> Result<(), StreamError> {
    if count == 0 {
        return Err(StreamError::Closed);
    }
    Ok(())
}

/// A step on: decrypts of what was received, or receives more.
async fn receive_encrypted(stream: &mut TcpStream, encrypted: &mut Encrypted) -> Result<(), StreamError> {
    if encrypted.ciphertext.is_empty() {
        encrypted.ciphertext.resize(CIPHERTEXT_BYTES, 0);
        let count = stream.read(&mut encrypted.ciphertext).await;
        encrypted.ciphertext.truncate(*count.as_ref().unwrap_or(&0));
        received(count?)?;
    }
    Ok(encrypted.tls.received(&mut encrypted.ciphertext)?)
}

/// The sending direction.
pub(crate) struct Output {
    stream: TcpStream,
    tls: Option<Rc<Tls>>,
}

impl Output {
    pub fn new(stream: TcpStream) -> Self {
        Self { stream, tls: None }
    }

    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<(), StreamError> {
        let Some(tls) = self.tls.clone() else {
            return Ok(self.stream.write_all(bytes).await?);
        };
        while !bytes.is_empty() {
            bytes = &bytes[tls.encrypt(bytes)?..];
            self.write_encrypted(&tls).await?;
        }
        Ok(())
    }

    pub async fn send(&mut self, gather: &mut Gather) -> Result<(), StreamError> {
        match self.tls.clone() {
            Some(tls) => self.send_encrypted(gather, &tls).await,
            None => Ok(self.send_plain(gather).await?),
        }
    }

    async fn send_plain(&mut self, gather: &mut Gather) -> io::Result<()> {
        while !gather.is_empty() {
            let segments = gather.segments().iter().map(|segment| &segment[..]);
            let sent = send_some(&mut self.stream, segments).await?;
            gather.sent(sent);
        }
        Ok(())
    }

    /// Encrypts until the buffer for that is full, sends it, and so on.
    async fn send_encrypted(&mut self, gather: &mut Gather, tls: &Tls) -> Result<(), StreamError> {
        while !gather.is_empty() {
            let first = &gather.segments()[0];
            let (all, encrypted) = (first.len(), tls.encrypt(first)?);
            gather.sent(encrypted);
            if encrypted < all || gather.is_empty() {
                self.write_encrypted(tls).await?;
            }
        }
        Ok(())
    }

    async fn write_encrypted(&mut self, tls: &Tls) -> Result<(), StreamError> {
        let ciphertext = tls.outgoing()?;
        Ok(self.stream.write_all(&ciphertext).await?)
    }

    /// Nothing follows. "the server MUST close down the TLS session (if one is running) and then close the TCP
    /// connection".
    pub async fn finish(&mut self) -> Result<(), StreamError> {
        if let Some(tls) = self.tls.clone() {
            tls.close();
            self.write_encrypted(&tls).await?;
        }
        self.shut(Shutdown::Write);
        Ok(())
    }

    pub fn shut(&self, how: Shutdown) {
        if let Err(error) = shutdown(self.stream.as_raw_fd(), how) {
            tracing::debug!(%error, "the connection was gone already");
        }
    }
}

/// From now on both directions are TLS: shakes hands. What was received and not understood is the client's beginning of
/// it, whatever it is.
pub(crate) async fn secure(input: &mut Input, output: &mut Output, tls: Tls) -> Result<(), StreamError> {
    let tls = Rc::new(tls);
    output.tls = Some(tls.clone());
    let mut encrypted = Encrypted { tls: tls.clone(), ciphertext: input.bytes.filled.split() };
    while tls.is_handshaking() {
        output.write_encrypted(&tls).await?;
        let step = receive_encrypted(&mut input.stream, &mut encrypted).await;
        if let Err(StreamError::Tls(_)) = &step {
            // What is wrong, in TLS's terms; who sent garbage need not hear it.
            let _ = output.write_encrypted(&tls).await;
        }
        step?;
    }
    output.write_encrypted(&tls).await?;
    input.tls = Some(encrypted);
    Ok(())
}
