//! A device that answers from memory at once. Reads are data, as those of other servers' null back ends are: a hole would
//! be an answer without payload.

use bytes::Bytes;
use torus_frontends::device::{Device, ExportInfo, Exports, Piece, Pieces, Run, VolumeError};

static CONTENT: [u8; 1 << 20] = [0x5a; 1 << 20];

#[derive(Clone)]
pub struct Null {
    pub bytes: u64,
}

impl Device for Null {
    fn size_bytes(&self) -> u64 {
        self.bytes
    }

    fn read_only(&self) -> bool {
        false
    }

    async fn read(&self, _offset: u64, length: u64) -> std::result::Result<Pieces, VolumeError> {
        let mut pieces = Pieces::new();
        let mut left = length as usize;
        while left > 0 {
            let here = left.min(CONTENT.len());
            pieces.push(Piece::Data(Bytes::from_static(&CONTENT[..here])));
            left -= here;
        }
        Ok(pieces)
    }

    async fn write(&self, _offset: u64, _data: Bytes, _durable: bool) -> std::result::Result<(), VolumeError> {
        Ok(())
    }

    async fn clear(&self, _: u64, _: u64, _: bool, _: bool) -> std::result::Result<(), VolumeError> {
        Ok(())
    }

    async fn map(&self, _offset: u64, length: u64) -> std::result::Result<Vec<Run>, VolumeError> {
        Ok(vec![Run { bytes: length, stored: true }])
    }

    async fn flush(&self) -> std::result::Result<(), VolumeError> {
        Ok(())
    }
}

impl Exports for Null {
    type Device = Null;

    async fn list(&self) -> std::result::Result<Vec<ExportInfo>, VolumeError> {
        Ok(vec![self.describe("").await?])
    }

    async fn describe(&self, name: &str) -> std::result::Result<ExportInfo, VolumeError> {
        let (name, description) = (name.to_string(), "nothing".to_string());
        Ok(ExportInfo { name, size_bytes: self.bytes, read_only: false, description })
    }

    async fn attach(&self, _name: &str) -> std::result::Result<Null, VolumeError> {
        Ok(self.clone())
    }
}
