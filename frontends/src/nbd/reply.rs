//! Replies without I/O: many are gathered into one send. What is small is copied together, what is large is sent from
//! where it lies.

use crate::device::{Piece, Pieces, Run};
use crate::nbd::contexts::{ALLOCATION_ID, allocation};
use crate::nbd::errors::Failure;
use crate::nbd::wire::{self, ChunkOf, Cookie, Style};
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;

/// The answer to one request, and what it holds of the connection's limits until it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub cookie: Cookie,
    /// Of the request.
    pub offset: u64,
    pub result: Result<Content, Failure>,
    /// Payload bytes of the request or its reply.
    pub payload_bytes: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    Nothing,
    /// `whole`: in one chunk, holes as the zeros that they read as.
    Read {
        pieces: Pieces,
        whole: bool,
    },
    /// Not empty; only where replies have chunks.
    Map(Vec<Run>),
}

/// A piece below this is copied: an entry of its own in the send costs about as much as copying so many bytes.
const COPY_BYTES_MAX: usize = 1024;
/// Room for headers of some hundred replies; what was sent is used again.
const OPEN_BYTES: usize = 4096;
/// Zeros of a hole are sent from here, and written from here where they are to be stored.
pub static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// Bytes on their way out, in order.
#[derive(Default)]
pub struct Gather {
    style: Style,
    /// Headers and small pieces that are not part of a segment yet.
    open: BytesMut,
    segments: VecDeque<Bytes>,
}

impl Gather {
    pub fn new(style: Style) -> Self {
        Self { style, open: BytesMut::with_capacity(OPEN_BYTES), ..Self::default() }
    }

    pub fn put(&mut self, reply: Reply) {
        match self.style {
            Style::Simple => self.put_simple(reply),
            Style::Structured | Style::Extended => self.put_chunks(reply),
        }
    }

    /// An error carries no payload: "it MUST NOT send any payload for this request".
    fn put_simple(&mut self, reply: Reply) {
        let error = reply.result.as_ref().err().map(|failure| failure.errno);
        wire::put_simple_reply(&mut self.open, reply.cookie, error);
        if let Ok(Content::Read { pieces, .. }) = reply.result {
            self.put_pieces(pieces);
        }
    }

    /// "if structured replies are negotiated, the server MUST use a structured reply for any response with a payload,
    /// and MUST NOT use a simple reply for NBD_CMD_READ"; with extended headers there are no simple replies at all. So
    /// there are none here.
    fn put_chunks(&mut self, reply: Reply) {
        let chunk = ChunkOf::new(self.style, reply.cookie, reply.offset);
        match reply.result {
            Ok(Content::Read { pieces, .. }) if pieces.is_empty() => chunk.put_none(&mut self.open),
            Ok(Content::Read { pieces, whole: true }) => {
                // "If the area being read contains both data and a hole, the server MUST use
                // NBD_REPLY_TYPE_OFFSET_DATA with the zeroes explicitly present."
                chunk.put_data_header(&mut self.open, reply.offset, bytes_of(&pieces), true);
                self.put_pieces(pieces);
            }
            Ok(Content::Read { pieces, whole: false }) => self.put_parts(&chunk, reply.offset, pieces),
            Ok(Content::Map(runs)) => chunk.put_block_status(&mut self.open, ALLOCATION_ID, &allocation(&runs)),
            Ok(Content::Nothing) => chunk.put_none(&mut self.open),
            Err(Failure { errno, message, at }) => chunk.put_error(&mut self.open, errno, &message, at),
        }
    }

    /// "the server SHOULD try to minimize the number of chunks": neighbours of one kind go together. The last is final:
    /// everything was read before anything is sent, so no error can follow.
    fn put_parts(&mut self, chunk: &ChunkOf, mut at: u64, pieces: Pieces) {
        let is_hole = |piece: &Piece| matches!(piece, Piece::Zeros(_));
        let mut pieces = pieces.into_iter();
        while let Some(part) = pieces.as_slice().chunk_by(|piece, next| is_hole(piece) == is_hole(next)).next() {
            let (count, bytes, of_hole) = (part.len(), bytes_of(part), is_hole(&part[0]));
            let done = count == pieces.len();
            let part = pieces.by_ref().take(count);
            match u32::try_from(bytes) {
                Ok(hole_bytes) if of_hole => {
                    part.for_each(drop);
                    chunk.put_hole(&mut self.open, at, hole_bytes, done);
                }
                _ => {
                    chunk.put_data_header(&mut self.open, at, bytes, done);
                    self.put_pieces(part);
                }
            }
            at += bytes;
        }
    }

    fn put_pieces(&mut self, pieces: impl IntoIterator<Item = Piece>) {
        for piece in pieces {
            match piece {
                Piece::Data(data) => self.put_bytes(data),
                Piece::Zeros(count) => self.put_zeros(count),
            }
        }
    }

    fn put_bytes(&mut self, data: Bytes) {
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

pub fn bytes_of(pieces: &[Piece]) -> u64 {
    let bytes = |piece: &Piece| match piece {
        Piece::Data(data) => data.len() as u64,
        Piece::Zeros(count) => *count,
    };
    pieces.iter().map(bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::Errno;
    use bytes::Buf;

    fn reply(cookie: u64, result: Result<Vec<Piece>, Errno>) -> Reply {
        let result = match result {
            Ok(pieces) => Ok(Content::Read { pieces: pieces.into(), whole: false }),
            Err(errno) => Err(Failure::new(errno, "refused")),
        };
        Reply { cookie: Cookie(cookie), offset: 0, result, payload_bytes: 0 }
    }

    /// Final, type and payload of each chunk.
    fn chunks(style: Style, offset: u64, result: Result<Content, Failure>) -> Vec<(bool, u16, Vec<u8>)> {
        let mut gather = Gather::new(style);
        gather.put(Reply { cookie: Cookie(5), offset, result, payload_bytes: 0 });
        let sent = all(&mut gather);
        let mut sent = &sent[..];
        let mut found = Vec::new();
        while !sent.is_empty() {
            assert_eq!(sent.get_u32(), if style == Style::Extended { 0x6e8a_278c } else { 0x668e_33ef });
            let (flags, kind) = (sent.get_u16(), sent.get_u16());
            assert_eq!(sent.get_u64(), 5);
            let length = if style == Style::Extended {
                assert_eq!(sent.get_u64(), offset);
                sent.get_u64() as usize
            } else {
                sent.get_u32() as usize
            };
            found.push((flags == 1, kind, sent[..length].to_vec()));
            sent.advance(length);
        }
        found
    }

    #[test]
    fn a_read_in_chunks_tells_data_from_holes_and_the_last_chunk_is_final() {
        let data = |text: &'static [u8]| Piece::Data(Bytes::from_static(text));
        let pieces = vec![data(b"ab"), data(b"c"), Piece::Zeros(512), Piece::Zeros(512), data(b"d")];
        for style in [Style::Structured, Style::Extended] {
            let read =
                |pieces: &[Piece], whole| chunks(style, 4096, Ok(Content::Read { pieces: pieces.into(), whole }));
            let at = |offset: u64, rest: &[u8]| [&offset.to_be_bytes()[..], rest].concat();
            let expected =
                [(false, 1, at(4096, b"abc")), (false, 2, at(4099, &1024u32.to_be_bytes())), (true, 1, at(5123, b"d"))];
            assert_eq!(read(&pieces, false), expected);
            assert_eq!(read(&pieces, true), [(true, 1, at(4096, &[b"abc", &[0; 1024][..], b"d"].concat()))]);
            assert_eq!(read(&pieces[2..3], false), [(true, 2, at(4096, &512u32.to_be_bytes()))]);
            assert_eq!(read(&[], false), [(true, 0, Vec::new())]);
        }
    }

    #[test]
    fn an_error_in_a_chunk_says_why_and_where() {
        let failure = Failure { at: Some(7), ..Failure::new(Errno::InputOutput, "bad") };
        for style in [Style::Structured, Style::Extended] {
            let told = chunks(style, 0, Err(failure.clone()));
            assert_eq!(told, [(true, 0x8002, b"\0\0\0\x05\0\x03bad\0\0\0\0\0\0\0\x07".to_vec())]);
            assert_eq!(chunks(style, 0, Ok(Content::Nothing)), [(true, 0, Vec::new())]);
        }
    }

    #[test]
    fn a_map_is_one_chunk_of_runs_with_their_status() {
        let runs = vec![Run { bytes: 4096, stored: true }, Run { bytes: 8192, stored: false }];
        let compact = b"\0\0\0\x01\0\0\x10\0\0\0\0\0\0\0\x20\0\0\0\0\x03".to_vec();
        assert_eq!(chunks(Style::Structured, 0, Ok(Content::Map(runs.clone()))), [(true, 5, compact)]);
        let extended = chunks(Style::Extended, 0, Ok(Content::Map(runs)));
        assert_eq!((extended.len(), extended[0].1, extended[0].2.len()), (1, 6, 8 + 32));
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
        assert_eq!(all(&mut gather).len(), 3 * 16 + 5);
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
        gather.put(reply(1, Ok(vec![Piece::Zeros(10_000_000)])));
        assert_eq!(gather.segments().iter().map(Bytes::len).sum::<usize>(), 10_000_000 + 16);
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
