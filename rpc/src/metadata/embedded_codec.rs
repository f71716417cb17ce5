//! The rows of the embedded store's file. All integers are little-endian; redb checks the file's pages itself.
//!
//! Table `header`, one row under the key 0, written with every commit:
//!
//! | offset | bytes | meaning |
//! |---|---|---|
//! | 0  | 8 | magic `TorusMds`: another program's database is recognized before anything in it is believed |
//! | 8  | 4 | format version, 1 |
//! | 12 | 4 | zero |
//! | 16 | 8 | revision of the store |
//! | 24 | 8 | id of the lease granted last |
//! | 32 | 8 | oldest revision a watch may start from |
//!
//! Table `keys`, by key:
//!
//! | offset | bytes | meaning |
//! |---|---|---|
//! | 0  | 8 | create revision |
//! | 8  | 8 | mod revision |
//! | 16 | 8 | lease, 0 for none |
//! | 24 | … | value |
//!
//! Table `leases`, by id: the TTL in seconds (a `u32` of redb).
//!
//! Table `history`, by (revision, place within it), so that a watch reads it in order:
//!
//! | offset | bytes | meaning |
//! |---|---|---|
//! | 0  | 1 | 1 put, 2 deleted |
//! | 1  | 8 | create revision, 0 if deleted |
//! | 9  | 4 | length of the key |
//! | 13 | … | key, then the value to the end, which is empty if deleted |

use super::store::Held;
use super::{Entry, Event, LeaseId, Revision};

pub const MAGIC: [u8; 8] = *b"TorusMds";
pub const FORMAT_VERSION: u32 = 1;
const HEADER_BYTES: usize = 40;
const HELD_HEAD_BYTES: usize = 24;
const EVENT_HEAD_BYTES: usize = 13;
const PUT: u8 = 1;
const DELETED: u8 = 2;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    pub revision: Revision,
    pub last_lease: LeaseId,
    pub oldest: Revision,
}

/// Why bytes are not a row of this format.
pub type Wrong = String;

impl Header {
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.revision.0.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.last_lease.0.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.oldest.0.to_le_bytes());
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, Wrong> {
        if bytes.len() < 12 || bytes[0..8] != MAGIC {
            return Err(format!("its magic is {}, expected {}", start_of(bytes), hex::encode(MAGIC)));
        }
        let version = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if version != FORMAT_VERSION {
            return Err(format!("its format version is {version}, this program knows {FORMAT_VERSION}"));
        }
        if bytes.len() != HEADER_BYTES || bytes[12..16] != [0; 4] {
            return Err(format!("its header of {} bytes is damaged, expected {HEADER_BYTES}", bytes.len()));
        }
        Ok(Self {
            revision: Revision(integer(bytes, 16)),
            last_lease: LeaseId(integer(bytes, 24)),
            oldest: Revision(integer(bytes, 32)),
        })
    }
}

pub fn encode_held(held: &Held) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HELD_HEAD_BYTES + held.value.len());
    bytes.extend(held.create_revision.0.to_le_bytes());
    bytes.extend(held.mod_revision.0.to_le_bytes());
    bytes.extend(held.lease.map_or(0, |lease| lease.0).to_le_bytes());
    bytes.extend(&held.value);
    bytes
}

pub fn decode_held(bytes: &[u8]) -> Result<Held, Wrong> {
    if bytes.len() < HELD_HEAD_BYTES {
        return Err(format!("a key's row has {} bytes, expected at least {HELD_HEAD_BYTES}", bytes.len()));
    }
    let lease = integer(bytes, 16);
    Ok(Held {
        create_revision: Revision(integer(bytes, 0)),
        mod_revision: Revision(integer(bytes, 8)),
        lease: (lease != 0).then_some(LeaseId(lease)),
        value: bytes[HELD_HEAD_BYTES..].to_vec(),
    })
}

pub fn encode_event(event: &Event) -> Vec<u8> {
    let (kind, create_revision, value) = match event {
        Event::Put(entry) => (PUT, entry.create_revision, entry.value.as_slice()),
        Event::Deleted { .. } => (DELETED, Revision(0), &[][..]),
    };
    let key = event.key();
    let key_bytes = u32::try_from(key.len()).expect("a transaction's bytes are limited far below 4 GiB");
    let mut bytes = Vec::with_capacity(EVENT_HEAD_BYTES + key.len() + value.len());
    bytes.push(kind);
    bytes.extend(create_revision.0.to_le_bytes());
    bytes.extend(key_bytes.to_le_bytes());
    bytes.extend(key.as_bytes());
    bytes.extend(value);
    bytes
}

pub fn decode_event(revision: Revision, bytes: &[u8]) -> Result<Event, Wrong> {
    if bytes.len() < EVENT_HEAD_BYTES {
        return Err(format!("an event's row has {} bytes, expected at least {EVENT_HEAD_BYTES}", bytes.len()));
    }
    let key_bytes = u32::from_le_bytes([bytes[9], bytes[10], bytes[11], bytes[12]]) as usize;
    let rest = &bytes[EVENT_HEAD_BYTES..];
    let Some((key, value)) = rest.split_at_checked(key_bytes) else {
        return Err(format!("an event's key has {key_bytes} bytes, its row only {} more", rest.len()));
    };
    let key = str::from_utf8(key).map_err(|error| format!("an event's key is not UTF-8: {error}"))?.to_owned();
    match bytes[0] {
        PUT => {
            let create_revision = Revision(integer(bytes, 1));
            Ok(Event::Put(Entry { key, value: value.to_vec(), create_revision, mod_revision: revision }))
        }
        DELETED if value.is_empty() => Ok(Event::Deleted { key, revision }),
        kind => Err(format!("an event is of kind {kind} with {} bytes of value", value.len())),
    }
}

/// Callers have checked that it is there.
fn integer(bytes: &[u8], at: usize) -> i64 {
    i64::from_le_bytes(bytes[at..at + 8].try_into().expect("a slice of 8 bytes is an array of 8 bytes"))
}

fn start_of(bytes: &[u8]) -> String {
    hex::encode(&bytes[..bytes.len().min(8)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_header_has_these_bytes_and_no_others() {
        let header = Header { revision: Revision(7), last_lease: LeaseId(3), oldest: Revision(2) };
        let golden = "546f7275734d6473\
                      01000000\
                      00000000\
                      0700000000000000\
                      0300000000000000\
                      0200000000000000";
        assert_eq!(hex::encode(header.encode()), golden);
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn a_header_of_another_program_or_version_is_refused_with_both_values() {
        let good = Header { revision: Revision(1), last_lease: LeaseId(0), oldest: Revision(1) }.encode();
        let mut magic = good;
        magic[0] = b'X';
        assert!(Header::decode(&magic).is_err_and(|wrong| wrong.contains("586f7275734d6473")));
        let mut version = good;
        version[8] = 2;
        assert!(Header::decode(&version).is_err_and(|wrong| wrong.contains("is 2, this program knows 1")));
        let mut reserved = good;
        reserved[13] = 1;
        assert!(Header::decode(&reserved).is_err());
        assert!(Header::decode(&good[..30]).is_err());
        assert!(Header::decode(&[]).is_err());
    }

    #[test]
    fn a_key_has_these_bytes_and_no_others() {
        let held = Held {
            value: vec![0xaa, 0xbb],
            create_revision: Revision(2),
            mod_revision: Revision(0x0102),
            lease: Some(LeaseId(9)),
        };
        let golden = "0200000000000000\
                      0201000000000000\
                      0900000000000000\
                      aabb";
        assert_eq!(hex::encode(encode_held(&held)), golden);
        assert_eq!(decode_held(&encode_held(&held)), Ok(held));
        assert!(decode_held(&[0; 23]).is_err());
    }

    #[test]
    fn events_have_these_bytes_and_no_others() {
        let entry =
            Entry { key: "k/1".to_owned(), value: vec![0xcc], create_revision: Revision(4), mod_revision: Revision(5) };
        let put = Event::Put(entry);
        assert_eq!(hex::encode(encode_event(&put)), "010400000000000000030000006b2f31cc");
        assert_eq!(decode_event(Revision(5), &encode_event(&put)), Ok(put));
        let deleted = Event::Deleted { key: "k".to_owned(), revision: Revision(6) };
        assert_eq!(hex::encode(encode_event(&deleted)), "020000000000000000010000006b");
        assert_eq!(decode_event(Revision(6), &encode_event(&deleted)), Ok(deleted));
    }

    #[test]
    fn an_event_cut_anywhere_is_an_error_or_a_shorter_value_but_never_a_panic() {
        let deleted = encode_event(&Event::Deleted { key: "key".to_owned(), revision: Revision(6) });
        for cut in 0..deleted.len() {
            assert!(decode_event(Revision(6), &deleted[..cut]).is_err(), "cut at {cut}");
        }
        let mut kind = deleted;
        kind[0] = 3;
        assert!(decode_event(Revision(6), &kind).is_err());
    }
}
