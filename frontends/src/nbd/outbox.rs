//! Replies on their way from the requests to the writer, and the connection's limits: a request counts from the
//! moment it is taken to the moment its reply was sent, so a client that does not read is not read from either.

use crate::nbd::reply::Reply;
use std::cell::RefCell;
use std::future::poll_fn;
use std::task::{Poll, Waker};
use torus_schema::limits::{NBD_OUTSTANDING_BYTES_MAX, NBD_REQUESTS_MAX};

#[derive(Default)]
struct Inner {
    replies: Vec<Reply>,
    requests: usize,
    payload_bytes: u64,
    /// No more requests come.
    finished: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Default)]
pub struct Outbox {
    inner: RefCell<Inner>,
}

impl Outbox {
    /// Waits until another request of so many payload bytes may be outstanding. For the one reader.
    pub async fn room(&self, payload_bytes: u64) {
        debug_assert!(payload_bytes <= NBD_OUTSTANDING_BYTES_MAX, "the session refuses what never fits");
        poll_fn(|context| {
            let mut inner = self.inner.borrow_mut();
            let fits = inner.payload_bytes + payload_bytes <= NBD_OUTSTANDING_BYTES_MAX;
            if inner.requests < NBD_REQUESTS_MAX && fits {
                return Poll::Ready(());
            }
            inner.reader = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }

    /// Exactly one `push` has to follow.
    pub fn begin(&self, payload_bytes: u64) {
        let mut inner = self.inner.borrow_mut();
        inner.requests += 1;
        inner.payload_bytes += payload_bytes;
    }

    pub fn push(&self, reply: Reply) {
        let mut inner = self.inner.borrow_mut();
        inner.replies.push(reply);
        if let Some(writer) = inner.writer.take() {
            writer.wake();
        }
    }

    /// No `begin` follows.
    pub fn finish(&self) {
        let mut inner = self.inner.borrow_mut();
        inner.finished = true;
        if let Some(writer) = inner.writer.take() {
            writer.wake();
        }
    }

    /// Puts all replies that there are into `into`, which is empty; false when there will be none any more. For the one
    /// writer.
    pub async fn take(&self, into: &mut Vec<Reply>) -> bool {
        poll_fn(|context| {
            let mut inner = self.inner.borrow_mut();
            if !inner.replies.is_empty() {
                std::mem::swap(&mut inner.replies, into);
                return Poll::Ready(true);
            }
            if inner.finished && inner.requests == 0 {
                return Poll::Ready(false);
            }
            inner.writer = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// The replies of so many requests were sent, or will never be.
    pub fn release(&self, requests: usize, payload_bytes: u64) {
        let mut inner = self.inner.borrow_mut();
        inner.requests = inner.requests.checked_sub(requests).expect("only what was begun is released");
        inner.payload_bytes -= payload_bytes;
        if let Some(reader) = inner.reader.take() {
            reader.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::reply::Content;
    use crate::nbd::wire::Cookie;
    use futures::FutureExt;

    fn reply(payload_bytes: u64) -> Reply {
        Reply { cookie: Cookie(1), offset: 0, result: Ok(Content::Nothing), payload_bytes }
    }

    #[test]
    fn a_connection_has_bounded_requests_and_bytes_outstanding() {
        let outbox = Outbox::default();
        for _ in 0..NBD_REQUESTS_MAX {
            assert!(outbox.room(0).now_or_never().is_some());
            outbox.begin(0);
        }
        assert!(outbox.room(0).now_or_never().is_none());
        outbox.release(1, 0);
        assert!(outbox.room(NBD_OUTSTANDING_BYTES_MAX).now_or_never().is_some());
        outbox.begin(NBD_OUTSTANDING_BYTES_MAX - 4);
        outbox.release(1, 0);
        assert!(outbox.room(5).now_or_never().is_none());
        assert!(outbox.room(4).now_or_never().is_some());
    }

    #[test]
    fn the_writer_ends_only_after_the_last_outstanding_request() {
        let outbox = Outbox::default();
        outbox.begin(7);
        outbox.finish();
        let mut replies = Vec::new();
        assert!(outbox.take(&mut replies).now_or_never().is_none());
        outbox.push(reply(7));
        assert_eq!(
            (outbox.take(&mut replies).now_or_never(), replies.drain(..).as_slice()),
            (Some(true), &[reply(7)][..])
        );
        assert!(outbox.take(&mut replies).now_or_never().is_none(), "sent, but not released yet");
        outbox.release(1, 7);
        assert_eq!(outbox.take(&mut replies).now_or_never(), Some(false));
    }
}
