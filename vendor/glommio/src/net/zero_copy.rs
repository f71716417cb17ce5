//! Sends that take the bytes from where they lie.
use crate::{
    net::{stream::NonBuffered, TcpStream},
    sys::{SentInPlace, Source, SourceType},
};
use std::{future::poll_fn, io, ops::Deref, os::unix::io::AsRawFd, rc::Rc, task::Poll};

/// A send of `IORING_OP_SEND_ZC` that has begun. The kernel may read the payload until
/// it is released; so long the payload stays, also if this is dropped, which cancels
/// what was not sent yet.
#[derive(Debug)]
pub struct ZeroCopySend {
    source: Source,
}

impl TcpStream<NonBuffered> {
    /// Begins to send `payload` from its byte `from` on. The order is kept if the next
    /// send begins after this one was [`sent`](ZeroCopySend::sent). Dropping the payload
    /// must not use the executor: where nobody waits any more, its rings are at work then.
    pub fn send_zero_copy(
        &self,
        payload: Rc<dyn Deref<Target = [u8]>>,
        from: usize,
    ) -> ZeroCopySend {
        let sent = SentInPlace::new(payload, from);
        let reactor = crate::executor().reactor();
        ZeroCopySend {
            source: reactor.send_zero_copy(self.as_raw_fd(), sent),
        }
    }
}

impl ZeroCopySend {
    /// So many bytes the socket took, maybe fewer than there are.
    pub async fn sent(&self) -> io::Result<usize> {
        poll_fn(|cx| match self.source.result() {
            Some(result) => Poll::Ready(result),
            None => {
                self.source.add_waiter_single(cx.waker());
                Poll::Pending
            }
        })
        .await
    }

    /// The kernel is done with the payload. `Some(true)`: it had copied it after all;
    /// `None`: it did not come to send any.
    pub async fn released(&self) -> Option<bool> {
        poll_fn(|cx| {
            if self.source.is_under_way() {
                self.source.add_waiter_single(cx.waker());
                return Poll::Pending;
            }
            match &*self.source.source_type() {
                SourceType::SockSendZeroCopy(sent) => Poll::Ready(sent.copied),
                _ => unreachable!(),
            }
        })
        .await
    }
}
