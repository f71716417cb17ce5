//! What waits to be sent on one connection. Whoever has something appends it at once; one task sends all that has
//! gathered, so that many frames share a send.
//!
//! Headers and small payloads are copied together; from `COPY_BYTES_MAX` on a payload is sent from where it lies.

use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::ops::{Deref, Range};
use std::task::{Poll, Waker};

/// A segment of its own in a send costs about as much as copying so many bytes.
pub const COPY_BYTES_MAX: usize = 1024;
/// Room for headers that is kept when they were sent.
const KEPT_BYTES_MAX: usize = 64 * 1024;
const KEPT_PIECES_MAX: usize = 1024;

/// Bytes on their way out, in order.
pub struct Batch<P = Bytes> {
    /// Headers and small payloads.
    copied: Vec<u8>,
    pieces: VecDeque<Piece<P>>,
    /// Of the first piece, so many bytes are out.
    sent: usize,
}

enum Piece<P> {
    /// Of what was copied.
    Copied(Range<usize>),
    Payload(P),
}

impl<P> Default for Batch<P> {
    fn default() -> Self {
        Self { copied: Vec::new(), pieces: VecDeque::new(), sent: 0 }
    }
}

impl<P: Deref<Target = [u8]>> Batch<P> {
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    fn copy(&mut self, append: impl FnOnce(&mut Vec<u8>)) {
        let before = self.copied.len();
        append(&mut self.copied);
        let after = self.copied.len();
        match self.pieces.back_mut() {
            Some(Piece::Copied(range)) => range.end = after,
            _ if after > before => self.pieces.push_back(Piece::Copied(before..after)),
            _ => {}
        }
    }

    fn put(&mut self, payload: P) {
        if payload.len() < COPY_BYTES_MAX {
            self.copy(|copied| copied.extend_from_slice(&payload));
        } else {
            self.pieces.push_back(Piece::Payload(payload));
        }
    }

    /// What is not out yet, in order, up to a payload of at least so many bytes; never without one that was begun.
    pub fn segments_before(&self, payload_bytes: usize) -> impl Iterator<Item = &[u8]> + Clone {
        let is_before = move |&(piece, sent): &(&Piece<P>, usize)| match piece {
            Piece::Copied(_) => true,
            Piece::Payload(payload) => payload.len() < payload_bytes || sent > 0,
        };
        let sent = std::iter::once(self.sent).chain(std::iter::repeat(0));
        self.pieces.iter().zip(sent).take_while(is_before).map(|(piece, sent)| match piece {
            Piece::Copied(range) => &self.copied[range.start + sent..range.end],
            Piece::Payload(payload) => &payload[sent..],
        })
    }

    /// The payload that is next, if it has at least so many bytes, to be sent in another way.
    pub fn take_payload(&mut self, payload_bytes: usize) -> Option<P> {
        match self.pieces.pop_front() {
            Some(Piece::Payload(payload)) if payload.len() >= payload_bytes && self.sent == 0 => Some(payload),
            Some(other) => {
                self.pieces.push_front(other);
                None
            }
            None => None,
        }
    }

    /// So many bytes of the segments are out.
    pub fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        while let Some(first) = self.pieces.front() {
            let length = match first {
                Piece::Copied(range) => range.len(),
                Piece::Payload(payload) => payload.len(),
            };
            if self.sent < length {
                return;
            }
            self.sent -= length;
            self.pieces.pop_front();
        }
        assert_eq!(self.sent, 0, "bytes were sent that nobody had");
    }

    /// All of it is out. Room for the next is kept, but not for as much as ever waited.
    fn reset(&mut self) {
        assert!(self.is_empty(), "{} pieces were not sent", self.pieces.len());
        self.copied.clear();
        self.copied.shrink_to(KEPT_BYTES_MAX);
        self.pieces.shrink_to(KEPT_PIECES_MAX);
    }
}

pub struct Outbox<P = Bytes> {
    waiting: RefCell<Batch<P>>,
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
        let before = waiting.copied.len();
        waiting.copy(encode);
        let mut added = waiting.copied.len() - before;
        for payload in payload {
            added += payload.len();
            waiting.put(payload);
        }
        drop(waiting);
        self.bytes.set(self.bytes.get() + added);
        if let Some(waker) = self.sender.take() {
            waker.wake();
        }
    }

    /// Everything that has gathered, once there is something; false after `close`. `into` is empty unless it is closed,
    /// and is what is gathered in next: the two are used in turn.
    pub async fn take(&self, into: &mut Batch<P>) -> bool {
        if !self.closed.get() {
            into.reset();
        }
        std::future::poll_fn(|context| {
            if self.closed.get() {
                return Poll::Ready(false);
            }
            let mut waiting = self.waiting.borrow_mut();
            if waiting.is_empty() {
                *self.sender.borrow_mut() = Some(context.waker().clone());
                return Poll::Pending;
            }
            std::mem::swap(&mut *waiting, into);
            Poll::Ready(true)
        })
        .await
    }

    /// So many bytes are out, and their memory needed no more.
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
        *self.waiting.borrow_mut() = Batch::default();
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
    fn take(outbox: &Outbox) -> Option<Batch> {
        let mut batch = Batch::default();
        outbox.take(&mut batch).now_or_never().map(|_| batch)
    }

    fn lengths(batch: &Batch, payload_bytes: usize) -> Vec<usize> {
        batch.segments_before(payload_bytes).map(<[u8]>::len).collect()
    }

    fn filled() -> Outbox {
        let outbox = Outbox::default();
        outbox.push(|out| out.extend_from_slice(b"a"), [Bytes::from_static(b"1")]);
        outbox.push(|out| out.extend_from_slice(b"b"), [Bytes::from(vec![2; COPY_BYTES_MAX])]);
        outbox.push(|_| {}, [Bytes::from(vec![3; 2 * COPY_BYTES_MAX])]);
        outbox.push(|out| out.extend_from_slice(b"c"), []);
        outbox.push(|out| out.extend_from_slice(b"d"), []);
        outbox
    }

    #[test]
    fn small_frames_gather_into_one_segment_and_payloads_stay_where_they_lie() {
        let outbox = filled();
        let payload = Bytes::from(vec![4; COPY_BYTES_MAX]);
        outbox.push(|_| {}, [payload.clone()]);
        let batch = take(&outbox).unwrap();
        assert_eq!(lengths(&batch, usize::MAX), [3, COPY_BYTES_MAX, 2 * COPY_BYTES_MAX, 2, COPY_BYTES_MAX]);
        assert_eq!(batch.segments_before(usize::MAX).last().unwrap().as_ptr(), payload.as_ptr());
        assert!(take(&outbox).is_none());
    }

    #[test]
    fn a_large_payload_is_taken_out_when_all_before_it_was_sent() {
        let mut batch = take(&filled()).unwrap();
        assert_eq!(lengths(&batch, 2 * COPY_BYTES_MAX), [3, COPY_BYTES_MAX]);
        for before in [2, COPY_BYTES_MAX + 1] {
            assert!(batch.take_payload(2 * COPY_BYTES_MAX).is_none());
            batch.sent(before);
        }
        assert!(batch.take_payload(2 * COPY_BYTES_MAX + 1).is_none());
        assert_eq!(batch.take_payload(2 * COPY_BYTES_MAX).unwrap(), vec![3; 2 * COPY_BYTES_MAX]);
        assert_eq!(batch.segments_before(0).collect::<Vec<_>>(), [b"cd"]);
    }

    #[test]
    fn what_was_sent_is_gone_wherever_the_send_was_cut() {
        let all = |batch: &Batch| batch.segments_before(usize::MAX).flatten().copied().collect::<Vec<u8>>();
        let expected = all(&take(&filled()).unwrap());
        assert_eq!(expected.len(), 3 * COPY_BYTES_MAX + 5);
        for cut in 0..=expected.len() {
            let mut batch = take(&filled()).unwrap();
            batch.sent(cut);
            assert_eq!(all(&batch), &expected[cut..], "cut at {cut}");
            batch.sent(expected.len() - cut);
            assert!(batch.is_empty());
        }
    }

    #[test]
    fn a_payload_that_was_begun_is_always_next() {
        let payload = Bytes::from(vec![2; 2 * COPY_BYTES_MAX]);
        let outbox = Outbox::default();
        outbox.push(|_| {}, [payload.clone(), payload.clone()]);
        let mut batch = take(&outbox).unwrap();
        batch.sent(1);
        assert!(batch.take_payload(COPY_BYTES_MAX).is_none());
        assert_eq!(lengths(&batch, COPY_BYTES_MAX), [payload.len() - 1]);
        batch.sent(payload.len() - 1);
        assert_eq!(batch.take_payload(COPY_BYTES_MAX), Some(payload));
    }

    #[test]
    fn what_was_sent_takes_no_memory_however_its_last_piece_went() {
        let outbox = Outbox::default();
        let mut batch = Batch::default();
        for _ in 0..3 {
            outbox.push(|out| out.push(1), [Bytes::from(vec![2; COPY_BYTES_MAX])]);
            assert_eq!(outbox.take(&mut batch).now_or_never(), Some(true));
            assert_eq!(batch.copied, [1]);
            batch.sent(1);
            assert!(batch.take_payload(0).is_some());
        }
        for _ in 0..4 * KEPT_PIECES_MAX {
            outbox.push(|out| out.extend_from_slice(&[0; 100]), [Bytes::from(vec![2; COPY_BYTES_MAX])]);
        }
        assert_eq!(outbox.take(&mut batch).now_or_never(), Some(true));
        batch.sent(4 * KEPT_PIECES_MAX * (100 + COPY_BYTES_MAX));
        assert_eq!(outbox.take(&mut batch).now_or_never(), None, "nothing waits");
        assert!(batch.copied.is_empty() && batch.copied.capacity() <= KEPT_BYTES_MAX);
        assert!(batch.pieces.capacity() <= KEPT_PIECES_MAX);
    }

    #[test]
    fn a_reader_that_takes_nothing_is_noticed_by_what_waits_for_it() {
        let outbox = Outbox::<Bytes>::default();
        outbox.push(|out| out.extend_from_slice(&[0; 100]), [Bytes::from(vec![1; COPY_BYTES_MAX])]);
        let mut drained = Box::pin(outbox.at_most(100));
        assert!(drained.as_mut().now_or_never().is_none());
        assert!(take(&outbox).is_some());
        assert!(drained.as_mut().now_or_never().is_none(), "being sent is not sent");
        outbox.released(COPY_BYTES_MAX);
        assert!(drained.now_or_never().is_some());
    }

    #[test]
    fn a_closed_outbox_ends_its_sender() {
        let outbox = Outbox::<Bytes>::default();
        outbox.push(|out| out.push(1), []);
        outbox.close();
        assert_eq!(outbox.take(&mut Batch::default()).now_or_never(), Some(false));
    }
}
