//! What an outbox gathered goes to the socket, in order, as many frames as it takes by one call.
//!
//! A large payload goes zero-copy (IORING_OP_SEND_ZC, Linux 6.0): the network card reads it where it
//! lies, until the peer has acknowledged it; only then is it released. That is for real networks. On the loopback
//! interface, veth, or under a packet capture the kernel copies all the same, later and at a higher price, and says so.
//! So each connection tries, and goes back to plain sends for good where it is told of copies only:
//!
//! | What the kernel says                     | This payload      | Those that follow                          |
//! |------------------------------------------|-------------------|--------------------------------------------|
//! | sent from where it lay                   | is sent           | zero-copy                                  |
//! | sent, but copied                         | is sent           | plain after `COPIES_MAX` of these in a row |
//! | it cannot (EINVAL, EOPNOTSUPP)           | plain             | plain                                      |
//! | no memory can be pinned (ENOMEM, ENOBUFS)| plain             | as of one that was copied                  |
//! | anything else                            | connection's end  |                                            |
//!
//! Never within the host: a unix socket always copies.

use crate::local::Via;
use crate::message::Few;
use crate::outbox::{Batch, Outbox};
use futures::AsyncWriteExt;
use glommio::net::{TcpStream, ZeroCopySend};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, sendmsg};
use std::cell::Cell;
use std::io::{self, IoSlice};
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::rc::Rc;

/// Below this a copy costs less than to pin its memory and be told of its release.
pub const ZERO_COPY_BYTES_MIN: usize = 32 * 1024;
/// Of one call; the kernel takes 1024, and a socket's buffer is full well before.
const SEGMENTS_MAX: usize = 64;

/// So many payloads in a row may be copied before a connection gives up: one alone may have met whoever captured packets
/// just then.
const COPIES_MAX: u32 = 4;

/// What a connection has learned, and counts of what it did.
#[derive(Default)]
pub struct ZeroCopy {
    copies_max: u32,
    copies_in_a_row: Cell<u32>,
    /// For good: whatever is said later of what was sent before.
    has_given_up: Cell<bool>,
    /// Payloads that went zero-copy, all of them or in part.
    pub tried: Cell<u64>,
    /// Of these, the ones that the kernel has told us it copied.
    pub copied: Cell<u64>,
}

impl ZeroCopy {
    fn giving_up_after(copies_max: u32) -> Self {
        Self { copies_max, has_given_up: Cell::new(copies_max == 0), ..Self::default() }
    }

    fn is_worth_trying(&self) -> bool {
        !self.has_given_up.get()
    }

    fn released(&self, was_copied: bool) {
        if !was_copied {
            self.copies_in_a_row.set(0);
            return;
        }
        self.copied.set(self.copied.get() + 1);
        self.gained_nothing();
    }

    fn gained_nothing(&self) {
        self.copies_in_a_row.set(self.copies_in_a_row.get() + 1);
        if self.copies_in_a_row.get() >= self.copies_max && !self.has_given_up.replace(true) {
            tracing::debug!(copies = self.copies_max, "zero-copy sends gain nothing on this connection; sent plainly");
        }
    }

    /// Whether a plain send may do what this one did not.
    fn refused(&self, error: &io::Error) -> bool {
        match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EINVAL | Errno::EOPNOTSUPP) => {
                tracing::debug!(%error, "no zero-copy sends on this connection");
                self.has_given_up.set(true);
                true
            }
            Some(Errno::ENOMEM | Errno::ENOBUFS) => {
                self.gained_nothing();
                true
            }
            _ => false,
        }
    }
}

/// The sending side of a connection.
pub struct Sender {
    stream: TcpStream,
    zero_copy: Rc<ZeroCopy>,
}

impl Sender {
    pub fn new(stream: TcpStream, via: Via) -> Self {
        let copies_max = match via {
            Via::Tcp => COPIES_MAX,
            Via::Unix => 0,
        };
        Self::giving_up_after(copies_max, stream)
    }

    /// After so many copies in a row all is sent plainly; 0: from the start.
    pub fn giving_up_after(copies_max: u32, stream: TcpStream) -> Self {
        Self { stream, zero_copy: Rc::new(ZeroCopy::giving_up_after(copies_max)) }
    }

    pub fn zero_copy(&self) -> &Rc<ZeroCopy> {
        &self.zero_copy
    }

    /// The socket has all of the batch when this returns, and the batch is empty. The outbox hears of what is out when its
    /// memory is needed no more, which for a payload that went zero-copy is later.
    pub async fn send<P>(&mut self, batch: &mut Batch<P>, outbox: &Rc<Outbox<P>>) -> io::Result<()>
    where
        P: Deref<Target = [u8]> + 'static,
    {
        while !batch.is_empty() {
            let zero_copy_from = if self.zero_copy.is_worth_trying() { ZERO_COPY_BYTES_MIN } else { usize::MAX };
            if let Some(payload) = batch.take_payload(zero_copy_from) {
                self.send_zero_copy(Rc::new(payload), outbox).await?;
                continue;
            }
            let sent = send_some(&mut self.stream, batch.segments_before(zero_copy_from)).await?;
            batch.sent(sent);
            outbox.released(sent);
        }
        Ok(())
    }

    async fn send_zero_copy<P>(&mut self, payload: Rc<P>, outbox: &Rc<Outbox<P>>) -> io::Result<()>
    where
        P: Deref<Target = [u8]> + 'static,
    {
        self.zero_copy.tried.set(self.zero_copy.tried.get() + 1);
        let mut sends = Few::new();
        let result = self.hand_over(&payload, &mut sends).await;
        // Also of those that failed: what was sent of them is read until it is acknowledged.
        glommio::spawn_local(release(payload, sends, self.zero_copy.clone(), outbox.clone())).detach();
        result
    }

    async fn hand_over<P>(&mut self, payload: &Rc<P>, sends: &mut Few<ZeroCopySend>) -> io::Result<()>
    where
        P: Deref<Target = [u8]> + 'static,
    {
        let mut handed = 0;
        while handed < payload.len() {
            let send = self.stream.send_zero_copy(payload.clone(), handed);
            let taken = send.sent().await;
            sends.push(send);
            match taken {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(taken) => handed += taken,
                Err(error) if self.zero_copy.refused(&error) => {
                    return self.stream.write_all(&payload[handed..]).await;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Ends the receiver too, which has its own descriptor of the socket.
    pub async fn shut_down(self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both).await;
    }
}

/// Sends what the socket takes of the segments, in order, by one call, at least a byte; waits if it takes nothing now.
pub async fn send_some<'a>(
    stream: &mut TcpStream,
    mut segments: impl Iterator<Item = &'a [u8]> + Clone,
) -> io::Result<usize> {
    // glommio has no gathering send: ours is tried first, its own waits when the socket's buffer is full.
    let sent = match send_now(stream, segments.clone()) {
        Ok(sent) => sent,
        Err(Errno::EAGAIN | Errno::EINTR) => stream.write(segments.next().unwrap_or_default()).await?,
        Err(error) => return Err(error.into()),
    };
    if sent == 0 { Err(io::ErrorKind::WriteZero.into()) } else { Ok(sent) }
}

fn send_now<'a>(stream: &TcpStream, segments: impl Iterator<Item = &'a [u8]>) -> nix::Result<usize> {
    let mut slices = [IoSlice::new(&[]); SEGMENTS_MAX];
    let mut count = 0;
    for (slice, segment) in slices.iter_mut().zip(segments) {
        *slice = IoSlice::new(segment);
        count += 1;
    }
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
    sendmsg::<()>(stream.as_raw_fd(), &slices[..count], &[], flags, None)
}

/// Waits until the kernel reads the payload no more.
async fn release<P>(payload: Rc<P>, sends: Few<ZeroCopySend>, zero_copy: Rc<ZeroCopy>, outbox: Rc<Outbox<P>>)
where
    P: Deref<Target = [u8]>,
{
    let mut was_copied = None;
    for send in &sends {
        let usage = send.released().await;
        // Of a send that failed, the kernel says too that nothing went from where it lay.
        if send.sent().await.is_ok() {
            was_copied = was_copied.max(usage);
        }
    }
    was_copied.into_iter().for_each(|was_copied| zero_copy.released(was_copied));
    let bytes = payload.len();
    drop((sends, payload));
    outbox.released(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connection() -> ZeroCopy {
        ZeroCopy::giving_up_after(COPIES_MAX)
    }

    #[test]
    fn a_connection_that_copies_only_goes_back_to_plain_sends() {
        let zero_copy = connection();
        for _ in 1..COPIES_MAX {
            zero_copy.released(true);
        }
        assert!(zero_copy.is_worth_trying());
        zero_copy.released(true);
        assert!(!zero_copy.is_worth_trying());
        // Of one that was sent before, and is acknowledged last.
        zero_copy.released(false);
        assert!(!zero_copy.is_worth_trying());
    }

    #[test]
    fn copies_now_and_then_do_not_count() {
        let zero_copy = connection();
        for _ in 0..3 * COPIES_MAX {
            zero_copy.released(true);
            zero_copy.released(false);
        }
        assert!(zero_copy.is_worth_trying());
    }

    #[test]
    fn what_the_kernel_does_not_know_is_not_asked_of_it_again() {
        for errno in [Errno::EINVAL, Errno::EOPNOTSUPP] {
            let zero_copy = connection();
            assert!(zero_copy.refused(&errno.into()) && !zero_copy.is_worth_trying(), "{errno}");
        }
    }

    #[test]
    fn memory_that_cannot_be_pinned_now_may_be_later_but_is_not_asked_for_forever() {
        for errno in [Errno::ENOMEM, Errno::ENOBUFS] {
            let zero_copy = connection();
            for _ in 1..COPIES_MAX {
                assert!(zero_copy.refused(&errno.into()) && zero_copy.is_worth_trying(), "{errno}");
            }
            assert!(zero_copy.refused(&errno.into()) && !zero_copy.is_worth_trying(), "{errno}");
        }
    }

    #[test]
    fn a_broken_connection_is_not_sent_on_plainly() {
        for errno in [Errno::EPIPE, Errno::ECONNRESET] {
            let zero_copy = connection();
            assert!(!zero_copy.refused(&errno.into()) && zero_copy.is_worth_trying(), "{errno}");
        }
    }
}
