//! What waits to be sent on one connection. Whoever has something appends it at once; one task sends all that has
//! gathered, so that many frames share a send.
//!
//! Small payloads are copied behind their headers (28 ns for 4 KiB); from `COPY_BYTES_MAX` on a payload is sent from
//! where it lies.

use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::ops::Deref;
use std::task::{Poll, Waker};

/// Above this a send of its own is cheaper than a copy.
pub const COPY_BYTES_MAX: usize = 32 * 1024;

pub enum Chunk<P> {
    Gathered(Vec<u8>),
    Payload(P),
}

impl<P: Deref<Target = [u8]>> Chunk<P> {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Chunk::Gathered(bytes) => bytes,
            Chunk::Payload(payload) => payload,
        }
    }
}

pub struct Outbox<P = Bytes> {
    waiting: RefCell<Vec<Chunk<P>>>,
    /// A buffer that was sent, to be filled again.
    spare: RefCell<Option<Vec<u8>>>,
    sender: RefCell<Option<Waker>>,
    /// Who waits for it to get shorter.
    finisher: RefCell<Option<Waker>>,
    /// Waiting, being sent, or sent and not released yet.
    bytes: Cell<usize>,
    closed: Cell<bool>,
}

impl<P> Default for Outbox<P> {
    fn default() -> Self {
        Self {
            waiting: RefCell::default(),
            spare: RefCell::default(),
            sender: RefCell::default(),
            finisher: RefCell::default(),
            bytes: Cell::new(0),
            closed: Cell::new(false),
        }
    }
}

impl<P: Deref<Target = [u8]>> Outbox<P> {
    /// `encode` appends to the bytes that are to be sent next; `payload` follows them.
    pub fn push(&self, encode: impl FnOnce(&mut Vec<u8>), payload: impl IntoIterator<Item = P>) {
        if self.closed.get() {
            return;
        }
        let mut waiting = self.waiting.borrow_mut();
        let gathered = self.gathered(&mut waiting);
        let before = gathered.len();
        encode(gathered);
        let mut added = gathered.len() - before;
        for payload in payload {
            added += payload.len();
            if payload.len() < COPY_BYTES_MAX {
                self.gathered(&mut waiting).extend_from_slice(&payload);
            } else {
                waiting.push(Chunk::Payload(payload));
            }
        }
        drop(waiting);
        self.bytes.set(self.bytes.get() + added);
        if let Some(waker) = self.sender.take() {
            waker.wake();
        }
    }

    fn gathered<'a>(&self, waiting: &'a mut Vec<Chunk<P>>) -> &'a mut Vec<u8> {
        if !matches!(waiting.last(), Some(Chunk::Gathered(_))) {
            waiting.push(Chunk::Gathered(self.spare.take().unwrap_or_default()));
        }
        match waiting.last_mut() {
            Some(Chunk::Gathered(bytes)) => bytes,
            _ => unreachable!("a gathered chunk was just pushed"),
        }
    }

    /// Everything that has gathered, once there is something; false after `close`. `into` is empty, and is what is
    /// gathered in next: the two lists are used in turn.
    pub async fn take(&self, into: &mut Vec<Chunk<P>>) -> bool {
        std::future::poll_fn(|context| {
            if self.closed.get() {
                return Poll::Ready(false);
            }
            let mut waiting = self.waiting.borrow_mut();
            if waiting.is_empty() {
                *self.sender.borrow_mut() = Some(context.waker().clone());
                return Poll::Pending;
            }
            assert!(into.is_empty(), "{} chunks were not sent", into.len());
            std::mem::swap(&mut *waiting, into);
            Poll::Ready(true)
        })
        .await
    }

    /// The chunk is out; its buffer is used again.
    pub fn sent(&self, chunk: Chunk<P>) {
        let bytes = chunk.bytes().len();
        if let Chunk::Gathered(mut bytes) = chunk
            && bytes.capacity() <= 8 * COPY_BYTES_MAX
        {
            bytes.clear();
            *self.spare.borrow_mut() = Some(bytes);
        }
        self.released(bytes);
    }

    /// A payload of so many bytes is out, and its memory needed no more.
    pub fn released(&self, bytes: usize) {
        self.bytes.set(self.bytes.get() - bytes);
        if let Some(finisher) = self.finisher.take() {
            finisher.wake();
        }
    }

    /// Waits until at most that much is waiting or being sent, or it is closed. For one waiter at a time.
    pub async fn at_most(&self, bytes: usize) {
        std::future::poll_fn(|context| {
            if self.bytes.get() <= bytes || self.closed.get() {
                return Poll::Ready(());
            }
            *self.finisher.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// What waits is dropped, and what is still pushed.
    pub fn close(&self) {
        self.closed.set(true);
        self.waiting.borrow_mut().clear();
        for waker in [self.sender.take(), self.finisher.take()].into_iter().flatten() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    /// `None`: it would wait.
    fn take(outbox: &Outbox) -> Option<Vec<Chunk<Bytes>>> {
        let mut chunks = Vec::new();
        outbox.take(&mut chunks).now_or_never().map(|is_open| if is_open { chunks } else { Vec::new() })
    }

    #[test]
    fn small_frames_gather_into_one_send_and_large_payloads_stand_alone() {
        let outbox = Outbox::<Bytes>::default();
        outbox.push(|out| out.extend_from_slice(b"a"), [Bytes::from_static(b"1")]);
        outbox.push(|out| out.extend_from_slice(b"b"), [Bytes::from(vec![2; COPY_BYTES_MAX])]);
        outbox.push(|out| out.extend_from_slice(b"c"), []);
        let chunks = take(&outbox).unwrap();
        let lengths: Vec<_> = chunks.iter().map(|chunk| chunk.bytes().len()).collect();
        assert_eq!(lengths, [3, COPY_BYTES_MAX, 1]);
        assert!(take(&outbox).is_none());
    }

    #[test]
    fn a_reader_that_takes_nothing_is_noticed_by_what_waits_for_it() {
        let outbox = Outbox::<Bytes>::default();
        outbox.push(|out| out.extend_from_slice(&[0; 100]), [Bytes::from(vec![1; COPY_BYTES_MAX])]);
        let mut drained = Box::pin(outbox.at_most(100));
        assert!(drained.as_mut().now_or_never().is_none());
        let chunks = take(&outbox).unwrap();
        assert!(drained.as_mut().now_or_never().is_none(), "being sent is not sent");
        for chunk in chunks {
            outbox.sent(chunk);
        }
        assert!(drained.now_or_never().is_some());
    }

    #[test]
    fn a_closed_outbox_ends_its_sender() {
        let outbox = Outbox::<Bytes>::default();
        outbox.push(|out| out.push(1), []);
        outbox.close();
        assert!(take(&outbox).unwrap().is_empty());
    }
}
