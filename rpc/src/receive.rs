//! Frames out of a byte stream: received into large shared chunks, payloads split off without being copied.

use crate::error::FrameError;
use crate::frame::{PREFIX_BYTES, Prefix};
use bytes::{BufMut, Bytes, BytesMut};
use futures::{AsyncRead, AsyncReadExt};
use std::io;

/// Received at once at most: some dozens of small frames.
const CHUNK_BYTES: usize = 128 * 1024;

#[derive(Default)]
pub struct ReceiveBuffer {
    bytes: BytesMut,
}

pub struct Frame {
    pub prefix: Prefix,
    pub header: Bytes,
    pub payload: Bytes,
}

impl ReceiveBuffer {
    /// The next whole frame among what was received; `Ok(None)`: more bytes are needed.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(prefix) = Prefix::parse(&self.bytes)? else { return Ok(None) };
        if self.bytes.len() < prefix.frame_bytes() {
            // Both lengths are within their limits, so this is too.
            self.bytes.reserve(prefix.frame_bytes() - self.bytes.len());
            return Ok(None);
        }
        let mut frame = self.bytes.split_to(prefix.frame_bytes()).freeze();
        let payload = frame.split_off(PREFIX_BYTES + prefix.header_bytes);
        let header = frame.split_off(PREFIX_BYTES);
        Ok(Some(Frame { prefix, header, payload }))
    }

    /// Receives what there is, at least one byte; 0 at the stream's end.
    pub async fn fill(&mut self, stream: &mut (impl AsyncRead + Unpin)) -> io::Result<usize> {
        if self.bytes.capacity() - self.bytes.len() < PREFIX_BYTES {
            self.bytes.reserve(CHUNK_BYTES);
        }
        let spare = self.bytes.chunk_mut();
        let length = spare.len();
        // SAFETY: the slice is only handed to a read, which writes to it and never reads from it; what was not
        // written is never exposed, since the length grows by what the read reports.
        let spare = unsafe { std::slice::from_raw_parts_mut(spare.as_mut_ptr(), length) };
        let received = stream.read(spare).await?;
        assert!(received <= length);
        // SAFETY: that many bytes were just written there.
        unsafe { self.bytes.advance_mut(received) };
        Ok(received)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{decode_request, encode_request};
    use crate::message::{Envelope, Operation};
    use futures::executor::block_on;
    use futures::io::Cursor;
    use torus_schema::ids::{BlockIndex, Version};

    fn two_frames() -> Vec<u8> {
        let mut bytes = Vec::new();
        let write = Operation::Write {
            first: BlockIndex(1),
            version: Version::ZERO,
            durable: false,
            checksums: [1].as_slice().into(),
        };
        encode_request(&mut bytes, 1, &Envelope::NONE, &write, 4096);
        bytes.extend_from_slice(&[7; 4096]);
        encode_request(&mut bytes, 2, &Envelope::NONE, &Operation::Ping, 0);
        bytes
    }

    #[test]
    fn a_frame_arrives_however_tcp_cuts_it() {
        let bytes = two_frames();
        for cut in (0..bytes.len()).step_by(7) {
            let mut buffer = ReceiveBuffer::default();
            let mut frames = Vec::new();
            for part in [&bytes[..cut], &bytes[cut..]] {
                let mut stream = Cursor::new(part);
                while block_on(buffer.fill(&mut stream)).unwrap() > 0 {
                    while let Some(frame) = buffer.next_frame().unwrap() {
                        frames.push(frame);
                    }
                }
            }
            assert_eq!(frames.len(), 2, "cut at {cut}");
            assert_eq!(frames[0].payload, vec![7; 4096]);
            assert_eq!(decode_request(&frames[1].prefix, &frames[1].header).unwrap().1, Operation::Ping);
        }
    }

    #[test]
    fn garbage_is_an_error_before_any_memory_is_taken_for_it() {
        let mut buffer = ReceiveBuffer::default();
        block_on(buffer.fill(&mut Cursor::new([0xff; 64]))).unwrap();
        assert!(matches!(buffer.next_frame(), Err(FrameError::Magic { .. })));
        assert!(buffer.bytes.capacity() <= CHUNK_BYTES);
    }
}
