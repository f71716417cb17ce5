//! Little-endian fields, written and read in order; reading never goes past the end.

use super::FormatError;

pub fn put_u32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub fn put_u64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}

/// No disk lives to count so far; the next number, and the sum of two, need no care then.
const COUNTER_MAX: u64 = 1 << 60;

/// Bytes nobody has checked yet.
pub struct Reader<'a> {
    what: &'static str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Self { what, bytes, at: 0 }
    }

    pub fn take(&mut self, count: usize) -> Result<&'a [u8], FormatError> {
        let end = self.at.checked_add(count).filter(|end| *end <= self.bytes.len());
        let short =
            FormatError::Short { what: self.what, found: self.bytes.len(), expected: self.at.saturating_add(count) };
        let end = end.ok_or(short)?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        Ok(self.take(N)?.try_into().expect("take gives as many bytes as asked for"))
    }

    pub fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Of something that goes up by one over the life of a disk, or by the second.
    pub fn counter(&mut self, field: &'static str) -> Result<u64, FormatError> {
        let found = self.u64()?;
        if found <= COUNTER_MAX {
            return Ok(found);
        }
        Err(FormatError::Field { what: self.what, field, found, expected: COUNTER_MAX })
    }

    pub fn is_empty(&self) -> bool {
        self.at == self.bytes.len()
    }

    pub fn expect(&self, field: &'static str, found: u64, expected: u64) -> Result<(), FormatError> {
        if found == expected { Ok(()) } else { Err(FormatError::Field { what: self.what, field, found, expected }) }
    }

    pub fn magic_and_version(&mut self, expected: &[u8; 8]) -> Result<(), FormatError> {
        self.magic(expected)?;
        self.version()
    }

    pub fn magic(&mut self, expected: &[u8; 8]) -> Result<(), FormatError> {
        let found = self.array()?;
        if found == *expected {
            Ok(())
        } else {
            Err(FormatError::Magic { what: self.what, found, expected: *expected })
        }
    }

    pub fn version(&mut self) -> Result<(), FormatError> {
        let version = self.u32()?;
        if version != super::FORMAT_VERSION {
            let expected = super::FORMAT_VERSION;
            return Err(FormatError::Version { what: self.what, found: version, expected });
        }
        Ok(())
    }
}

/// The checksum is the last field of what it covers.
pub fn seal(out: &mut Vec<u8>) {
    let checksum = crc32c::crc32c(out);
    put_u32(out, checksum);
}

/// Checks what `seal` did over the first `length` bytes.
pub fn check_seal(what: &'static str, bytes: &[u8], length: usize) -> Result<(), FormatError> {
    if bytes.len() < length {
        return Err(FormatError::Short { what, found: bytes.len(), expected: length });
    }
    let expected = crc32c::crc32c(&bytes[..length - 4]);
    let found = u32::from_le_bytes(bytes[length - 4..length].try_into().expect("four bytes"));
    if found == expected { Ok(()) } else { Err(FormatError::Checksum { what, found, expected }) }
}
