//! Headers of reads, writes and flushes, word by word: the very bytes that Cap'n Proto's builder makes (the tests compare
//! them; where it would begin a second segment, from some 120 checksums on, here all is one), without an arena for each, which takes memory and some two thousand instructions. Everything else is left to
//! the builder, and all decoding to its reader.
//!
//! A word has 8 bytes. The first says that there is one segment, and its length; the second points to the root.
//!
//! | words | request                                    | words | reply                                             |
//! |-------|--------------------------------------------|-------|---------------------------------------------------|
//! | 2–9   | its numbers, the last: which operation     | 2–3   | which answer, and its numbers                     |
//! | 10    | pointer to the operation; zero for a flush | 4     | pointer to what was read; zero for a write, flush |
//!
//! | words | read         | words | write                         | words | what was read, of one run             |
//! |-------|--------------|-------|-------------------------------|-------|---------------------------------------|
//! | 11–12 | first, count | 11–12 | first, durable                | 5–6   | pointers to runs and checksums        |
//! |       |              | 13–14 | pointers to the next two      | 7–9   | how long a run is; count, data; where its version is |
//! |       |              | 15–16 | version                       | 10–11 | version                               |
//! |       |              | 17–   | checksums, filled up by zeros | 12–   | checksums, filled up by zeros         |

use super::to_halves;
use crate::message::{Answer, Envelope, Operation, Reply, Run};
use torus_schema::ids::Version;

/// Discriminants of the union in `Request`.
mod operation {
    pub const READ: u64 = 4;
    pub const WRITE: u64 = 5;
    pub const FLUSH: u64 = 7;
}

/// Discriminants of the union in `Reply`.
mod answer {
    pub const READ: u64 = 4;
    pub const WRITTEN: u64 = 5;
    pub const CLEARED: u64 = 6;
    pub const FLUSHED: u64 = 7;
}

const REQUEST_WORDS: usize = 10;
const REPLY_WORDS: usize = 4;

/// A list of structs, and of 4 bytes each, as its pointer says.
const COMPOSITE: u64 = 7;
const FOUR_BYTES: u64 = 4;

/// To a struct that begins so many words behind the pointer.
fn pointer(skipped: u64, data_words: u64, pointers: u64) -> u64 {
    skipped << 2 | data_words << 32 | pointers << 48
}

fn list_pointer(skipped: u64, kind: u64, length: usize) -> u64 {
    1 | skipped << 2 | kind << 32 | (length as u64) << 35
}

struct Words<'a>(&'a mut Vec<u8>);

impl Words<'_> {
    fn put(&mut self, words: &[u64]) {
        words.iter().for_each(|word| self.0.extend_from_slice(&word.to_le_bytes()));
    }

    fn put_version(&mut self, version: Version) {
        self.put(&[u64::from(version.epoch.0), version.sequence]);
    }

    fn put_checksums(&mut self, checksums: &[u32]) {
        for pair in checksums.chunks(2) {
            let second = pair.get(1).copied().unwrap_or_default();
            self.put(&[u64::from(pair[0]) | u64::from(second) << 32]);
        }
    }
}

/// False: nothing was appended, it is not one of these.
pub fn put_request(out: &mut Vec<u8>, envelope: &Envelope, operation: &Operation) -> bool {
    let (kind, behind) = match operation {
        Operation::Read { .. } => (operation::READ, 2),
        Operation::Write { checksums, .. } if !checksums.is_empty() => {
            (operation::WRITE, 6 + checksums.len().div_ceil(2))
        }
        Operation::Flush => (operation::FLUSH, 0),
        _ => return false,
    };
    let mut words = Words(out);
    words.put(&[((REQUEST_WORDS + behind) as u64) << 32, pointer(0, 8, 1)]);
    let (high, low) = to_halves(envelope.volume.to_bytes());
    let incarnation = envelope.incarnation.0;
    words.put(&[high, low, (incarnation >> 64) as u64, incarnation as u64, envelope.generation.0]);
    words.put(&[u64::from(envelope.epoch.0) | u64::from(envelope.flush_point.epoch.0) << 32]);
    words.put(&[envelope.flush_point.sequence, kind]);
    match operation {
        Operation::Read { first, count } => words.put(&[pointer(0, 2, 0), first.0, u64::from(*count)]),
        Operation::Write { first, version, durable, checksums } => {
            words.put(&[pointer(0, 2, 2), first.0, u64::from(*durable)]);
            words.put(&[pointer(1, 2, 0), list_pointer(2, FOUR_BYTES, checksums.len())]);
            words.put_version(*version);
            words.put_checksums(checksums);
        }
        _ => words.put(&[0]),
    }
    true
}

/// False: nothing was appended, it is not one of these.
pub fn put_reply(out: &mut Vec<u8>, reply: &Reply) -> bool {
    let (kind, behind) = match &reply.answer {
        Answer::Read { runs, checksums } if runs.len() == 1 && !checksums.is_empty() => {
            (answer::READ, 7 + checksums.len().div_ceil(2))
        }
        Answer::Written => (answer::WRITTEN, 0),
        Answer::Cleared => (answer::CLEARED, 0),
        Answer::Flushed => (answer::FLUSHED, 0),
        _ => return false,
    };
    let mut words = Words(out);
    words.put(&[((REPLY_WORDS + behind) as u64) << 32, pointer(0, 2, 1)]);
    words.put(&[u64::from(reply.full) | kind << 16]);
    words.put(&[u64::from(reply.took.queue_us) | u64::from(reply.took.service_us) << 32]);
    let Answer::Read { runs, checksums } = &reply.answer else {
        words.put(&[0]);
        return true;
    };
    let Run { count, version, data } = runs[0];
    words.put(&[pointer(0, 0, 2), list_pointer(1, COMPOSITE, 2), list_pointer(5, FOUR_BYTES, checksums.len())]);
    words.put(&[pointer(1, 1, 1), u64::from(count) | u64::from(data) << 32, pointer(0, 2, 0)]);
    words.put_version(version);
    words.put_checksums(checksums);
    true
}

#[cfg(test)]
mod tests {
    use crate::frame::{PREFIX_BYTES, Prefix, decode_reply, decode_request, encode_reply, encode_request};
    use crate::message::{Answer, Envelope, Operation, Reply, Run};
    use torus_schema::ids::{BlockIndex, Epoch, Version};
    use torus_schema::limits::{BLOCKS_PER_FRAME_MAX, SEQUENCE_MAX};

    #[test]
    fn writes_and_reads_of_every_size_are_understood_as_they_were_meant() {
        for count in 1..=BLOCKS_PER_FRAME_MAX as u32 {
            let (first, version) = (BlockIndex(u64::from(count) << 40), Version::new(Epoch(u32::MAX), SEQUENCE_MAX));
            let checksums: Vec<u32> = (0..count).map(|number| u32::MAX - number).collect();
            let write = Operation::Write { first, version, durable: count % 2 == 0, checksums: checksums[..].into() };
            let mut bytes = Vec::new();
            encode_request(&mut bytes, 7, &Envelope::NONE, &write, count as usize * 4096);
            let prefix = Prefix::parse(&bytes).unwrap().unwrap();
            assert_eq!(decode_request(&prefix, &bytes[PREFIX_BYTES..]).unwrap(), (Envelope::NONE, write));

            let runs = [Run { count, version, data: true }];
            let answer = Answer::Read { runs: runs[..].into(), checksums: checksums[..].into() };
            let reply = Reply { full: count % 2 == 0, ..Reply::of(answer) };
            bytes.clear();
            encode_reply(&mut bytes, 7, &reply, count as usize * 4096);
            let prefix = Prefix::parse(&bytes).unwrap().unwrap();
            assert_eq!(decode_reply(&prefix, &bytes[PREFIX_BYTES..]).unwrap(), reply);
        }
    }
}
