//! Replies without I/O: many are gathered into one send. What is small is copied together, what is large is sent from
//! where it lies.
//!
//! Structured replies will be a second way to put one: a `Reply` already says what was read piece by piece.

use crate::device::Piece;
use crate::nbd::wire::{self, Cookie, Errno};
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;

/// The answer to one request, and what it holds of the connection's limits until it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub cookie: Cookie,
    /// What a read gives, nothing otherwise; an error carries no payload: "it MUST NOT send any payload".
    pub result: Result<Vec<Piece>, Errno>,
    /// Payload bytes of the request or its reply.
    pub payload_bytes: u64,
}

/// A piece below this is copied: an entry of its own in the send costs about as much as copying so many bytes.
const COPY_BYTES_MAX: usize = 1024;
/// Zeros of a hole are sent from here.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Bytes on their way out, in order.
#[derive(Default)]
pub struct Gather {
    /// Headers and small pieces that are not part of a segment yet.
    open: BytesMut,
    segments: VecDeque<Bytes>,
}

impl Gather {
    pub fn put(&mut self, reply: Reply) {
        wire::put_simple_reply(&mut self.open, reply.cookie, reply.result.as_ref().err().copied());
        for piece in reply.result.unwrap_or_default() {
            match piece {
                Piece::Data(data) => self.put_bytes(data),
                Piece::Zeros(count) => self.put_zeros(count),
            }
        }
    }

    /// Raw bytes: the handshake's.
    pub fn put_bytes(&mut self, data: Bytes) {
        if data.len() < COPY_BYTES_MAX {
            self.open.extend_from_slice(&data);
        } else {
            self.close();
            self.segments.push_back(data);
        }
    }

    fn put_zeros(&mut self, mut count: u64) {
        while count > 0 {
            let here = count.min(ZEROS.len() as u64);
            self.put_bytes(Bytes::from_static(&ZEROS[..here as usize]));
            count -= here;
        }
    }

    fn close(&mut self) {
        if !self.open.is_empty() {
            self.segments.push_back(self.open.split().freeze());
        }
    }

    /// What is to be sent, in order; `sent` says how much of it was.
    pub fn segments(&mut self) -> &VecDeque<Bytes> {
        self.close();
        &self.segments
    }

    pub fn sent(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let first = self.segments.front_mut().expect("no more is sent than there was");
            if bytes < first.len() {
                *first = first.slice(bytes..);
                return;
            }
            bytes -= first.len();
            self.segments.pop_front();
        }
    }

    pub fn is_empty(&self) -> bool {
        self.open.is_empty() && self.segments.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(cookie: u64, result: Result<Vec<Piece>, Errno>) -> Reply {
        Reply { cookie: Cookie(cookie), result, payload_bytes: 0 }
    }

    fn all(gather: &mut Gather) -> Vec<u8> {
        gather.segments().iter().flat_map(|segment| segment.to_vec()).collect()
    }

    #[test]
    fn small_replies_become_one_segment() {
        let mut gather = Gather::default();
        gather.put(reply(1, Ok(Vec::new())));
        gather.put(reply(2, Err(Errno::InputOutput)));
        gather.put(reply(3, Ok(vec![Piece::Data(Bytes::from_static(b"abc")), Piece::Zeros(2)])));
        assert_eq!(gather.segments().len(), 1);
        assert_eq!(all(&mut gather).len(), 3 * wire::SIMPLE_REPLY_BYTES + 5);
        assert_eq!(&all(&mut gather)[48..], b"abc\0\0");
    }

    #[test]
    fn a_large_piece_is_not_copied() {
        let data = Bytes::from(vec![7; 4096]);
        let mut gather = Gather::default();
        gather.put(reply(1, Ok(vec![Piece::Data(data.clone())])));
        gather.put(reply(2, Ok(Vec::new())));
        let segments = gather.segments();
        assert_eq!(segments.len(), 3);
        assert_eq!(segments[1].as_ptr(), data.as_ptr());
    }

    #[test]
    fn a_long_hole_takes_no_memory() {
        let mut gather = Gather::default();
        gather.put(reply(1, Ok(vec![Piece::Zeros(1_000_000)])));
        assert_eq!(gather.segments().iter().map(Bytes::len).sum::<usize>(), 1_000_000 + 16);
        assert!(gather.segments().iter().skip(1).all(|segment| segment.as_ptr() == ZEROS.as_ptr()));
    }

    #[test]
    fn what_was_sent_is_gone_wherever_the_send_was_cut() {
        let mut whole = Gather::default();
        let pieces = || vec![Piece::Data(Bytes::from(vec![7; 1500])), Piece::Data(Bytes::from_static(b"end"))];
        whole.put(reply(1, Ok(pieces())));
        let expected = all(&mut whole);
        for cut in 0..=expected.len() {
            let mut gather = Gather::default();
            gather.put(reply(1, Ok(pieces())));
            gather.segments();
            gather.sent(cut);
            assert_eq!(all(&mut gather), &expected[cut..], "cut at {cut}");
            gather.sent(expected.len() - cut);
            assert!(gather.is_empty());
        }
    }
}
