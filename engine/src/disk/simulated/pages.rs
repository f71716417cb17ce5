//! What a simulated disk holds, sparse. A page is a slice of the buffer it was written from, so that keeping it as what
//! is read, what is durable and what was there before costs no copy.

use bytes::Bytes;
use torus_schema::hash::Map;

pub const SECTOR_BYTES: usize = 512;
pub const PAGE_BYTES: usize = 4096;

#[derive(Clone, Default)]
pub struct Pages {
    by_number: Map<u64, Bytes>,
}

impl Pages {
    /// Whole pages; what each of them replaces goes to `replaced`.
    pub fn put(&mut self, offset: u64, bytes: &Bytes, mut replaced: impl FnMut(u64, Bytes)) {
        for (page, at) in (offset / PAGE_BYTES as u64..).zip((0..bytes.len()).step_by(PAGE_BYTES)) {
            if let Some(before) = self.by_number.insert(page, bytes.slice(at..at + PAGE_BYTES)) {
                replaced(page, before);
            }
        }
    }

    /// Changes bytes within one page.
    pub fn patch(&mut self, offset: u64, change: impl FnOnce(&mut [u8])) {
        let (page, start) = (offset / PAGE_BYTES as u64, offset as usize % PAGE_BYTES);
        let mut bytes = self.page(page).to_vec();
        change(&mut bytes[start..]);
        self.by_number.insert(page, bytes.into());
    }

    pub fn get(&self, offset: u64, bytes: usize) -> Bytes {
        let first = offset / PAGE_BYTES as u64;
        if bytes == PAGE_BYTES {
            return self.page(first);
        }
        let mut out = Vec::with_capacity(bytes);
        for page in first..first + (bytes / PAGE_BYTES) as u64 {
            match self.by_number.get(&page) {
                Some(page) => out.extend_from_slice(page),
                None => out.resize(out.len() + PAGE_BYTES, 0),
            }
        }
        out.into()
    }

    pub fn page(&self, number: u64) -> Bytes {
        static ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
        self.by_number.get(&number).cloned().unwrap_or_else(|| Bytes::from_static(&ZEROS))
    }

    /// Pages ever written, ascending.
    pub fn numbers(&self) -> Vec<u64> {
        let mut numbers: Vec<u64> = self.by_number.keys().copied().collect();
        numbers.sort_unstable();
        numbers
    }
}
