//! The receive buffer: bytes land in a large chunk, and payloads are split off it without being copied. A payload
//! keeps its chunk in memory; what a connection may have outstanding bounds their number.

use bytes::{Bytes, BytesMut};

/// What is received into at once; large enough for dozens of small writes per receive.
pub const CHUNK_BYTES: usize = 256 << 10;
/// A payload below this is copied out of its chunk: a volume keeps it until it is flushed, and would keep the chunk, whose
/// rest may be requests without payload. A larger one keeps at most four times itself.
pub const COPIED_BYTES_MAX: usize = CHUNK_BYTES / 4;
/// The handshake's: a connection that never says anything costs no more.
pub const SMALL_CHUNK_BYTES: usize = 4 << 10;
/// With less space than this left for small requests, a new chunk is begun.
const SPARE_BYTES_MIN: usize = 4 << 10;

/// `filled` and `spare` are neighbours in one chunk. The spare part is zeroed when it is allocated, so that it can
/// be lent out as plain bytes.
#[derive(Default)]
pub struct Receive {
    pub filled: BytesMut,
    spare: BytesMut,
}

impl Receive {
    /// Where the next bytes go, when at least `wanted` in all have to fit, in chunks of `chunk_bytes` or that much.
    pub fn spare(&mut self, wanted: usize, chunk_bytes: usize) -> &mut [u8] {
        let lacking = wanted.saturating_sub(self.filled.len()).max(1);
        let needed = if wanted <= SPARE_BYTES_MIN { SPARE_BYTES_MIN } else { lacking };
        if self.spare.len() < needed {
            let mut chunk = BytesMut::zeroed(wanted.max(self.filled.len() + needed).max(chunk_bytes));
            chunk[..self.filled.len()].copy_from_slice(&self.filled);
            self.filled = chunk.split_to(self.filled.len());
            self.spare = chunk;
        }
        &mut self.spare
    }

    /// So many bytes have been put where `spare` said.
    pub fn received(&mut self, bytes: usize) {
        self.filled.unsplit(self.spare.split_to(bytes));
    }
}

/// The payload without its chunk, if it is small.
pub fn released(payload: Bytes) -> Bytes {
    if payload.len() < COPIED_BYTES_MAX { Bytes::copy_from_slice(&payload) } else { payload }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_payload_does_not_keep_the_chunk_it_came_in() {
        let mut receive = Receive::default();
        put(&mut receive, 28, &[7; 4096]);
        let payload = receive.filled.split_to(4096).freeze();
        let kept = released(payload.clone());
        assert_eq!(kept, payload);
        assert_ne!(kept.as_ptr(), payload.as_ptr());
        let large = Bytes::from(vec![1; COPIED_BYTES_MAX]);
        assert_eq!(released(large.clone()).as_ptr(), large.as_ptr());
    }

    fn put(receive: &mut Receive, wanted: usize, data: &[u8]) {
        receive.spare(wanted, CHUNK_BYTES)[..data.len()].copy_from_slice(data);
        receive.received(data.len());
    }

    #[test]
    fn bytes_stay_in_order_over_chunks_and_payloads_are_not_copied() {
        let mut receive = Receive::default();
        put(&mut receive, 28, b"header");
        let place = receive.filled.as_ptr();
        let header = receive.filled.split_to(6).freeze();
        put(&mut receive, 28, b"next");
        assert_eq!((&header[..], &receive.filled[..]), (&b"header"[..], &b"next"[..]));
        assert_eq!(header.as_ptr(), place);
        put(&mut receive, CHUNK_BYTES * 2, b" and more");
        assert_eq!(&receive.filled[..], b"next and more");
        assert_eq!(receive.spare(CHUNK_BYTES * 2, CHUNK_BYTES).len(), CHUNK_BYTES * 2 - 13);
    }

    #[test]
    fn there_is_always_space_for_what_is_wanted() {
        let mut receive = Receive::default();
        for round in 0..200 {
            let wanted = if round % 7 == 0 { 300_000 } else { 28 };
            let spare = receive.spare(wanted, CHUNK_BYTES).len();
            assert!(spare >= wanted.min(SPARE_BYTES_MIN) && receive.filled.len() + spare >= wanted);
            receive.received(spare.min(5000));
            let here = receive.filled.len() / 2;
            drop(receive.filled.split_to(here));
        }
    }
}
