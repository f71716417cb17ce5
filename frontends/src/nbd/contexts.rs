//! Metadata contexts: which of them a client lists and selects. There is one, `base:allocation`.

use crate::device::Run;
use crate::nbd::handshake::parse_name;
use crate::nbd::wire::{self, OptionReply, put_option_reply};
use bytes::BytesMut;

pub const ALLOCATION: &str = "base:allocation";
/// Of `base:allocation`, on every connection.
pub const ALLOCATION_ID: u32 = 1;

/// A list or set of contexts, as it was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Queries {
    pub option: u32,
    pub export: String,
    allocation: bool,
}

impl Queries {
    /// What the option's data asks for, or what is wrong with it.
    pub fn parse(option: u32, data: &[u8]) -> Result<Self, String> {
        let (export, queries) = wire::parse_queries(data)?;
        let export = parse_name(export)?;
        let list = option == wire::OPTION_LIST_META_CONTEXT;
        // "If zero queries are sent, then the server MUST return all the metadata contexts"; when selecting, "MUST
        // select no metadata contexts".
        let mut allocation = list && queries.is_empty();
        for query in queries {
            let query = parse_name(query)?;
            allocation |= matches(&query, list)?;
        }
        Ok(Self { option, export, allocation })
    }

    /// Replies; gives whether `base:allocation` is selected from now on.
    pub fn answer(&self, out: &mut BytesMut) -> bool {
        let selects = self.option == wire::OPTION_SET_META_CONTEXT;
        if self.allocation {
            // "The metadata context ID in these replies is reserved and SHOULD be set to zero" when listing.
            let id = if selects { ALLOCATION_ID } else { 0 };
            put_option_reply(out, self.option, OptionReply::MetaContext, &wire::meta_context_data(id, ALLOCATION));
        }
        put_option_reply(out, self.option, OptionReply::Ack, b"");
        selects && self.allocation
    }
}

/// "the server MUST ignore query strings belonging to an unknown namespace" and, of ours, a leaf-name that "is not
/// recognized"; what lacks "the required colon that delimits the namespace […] MAY fail".
fn matches(query: &str, list: bool) -> Result<bool, String> {
    match query.split_once(':') {
        // "MUST ignore this form during NBD_OPT_SET_META_CONTEXT, and MUST support this as a wildcard during
        // NBD_OPT_LIST_META_CONTEXT"
        Some(("base", "")) => Ok(list),
        Some(("base", "allocation")) => Ok(true),
        Some(_) => Ok(false),
        None => Err(format!("the query {query:?} has no namespace; one that has is {ALLOCATION:?}")),
    }
}

/// Length and status flags of each run, as `base:allocation` has them: what is not stored reads as zeros, and needs
/// room when it is written.
pub fn allocation(runs: &[Run]) -> Vec<(u64, u32)> {
    let hole = wire::STATUS_HOLE | wire::STATUS_ZERO;
    runs.iter().map(|run| (run.bytes, if run.stored { 0 } else { hole })).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::{Buf, BufMut};
    use proptest::prelude::*;

    fn data(queries: &[&str]) -> Vec<u8> {
        let mut data = b"\0\0\0\x04disk".to_vec();
        data.put_u32(queries.len() as u32);
        for query in queries {
            data.put_u32(query.len() as u32);
            data.put_slice(query.as_bytes());
        }
        data
    }

    fn parsed(option: u32, queries: &[&str]) -> Result<bool, String> {
        let queries = Queries::parse(option, &data(queries))?;
        assert_eq!(queries.export, "disk");
        let mut out = BytesMut::new();
        let selected = queries.answer(&mut out);
        out.advance(12);
        let found = out.get_u32() == OptionReply::MetaContext as u32;
        assert_eq!(selected, found && option == wire::OPTION_SET_META_CONTEXT);
        if found {
            out.advance(4);
            assert_eq!(out.get_u32(), if selected { ALLOCATION_ID } else { 0 });
            assert_eq!(&out[..ALLOCATION.len()], ALLOCATION.as_bytes());
        }
        Ok(found)
    }

    #[test]
    fn each_query_finds_what_the_specification_says() {
        let (list, set) = (wire::OPTION_LIST_META_CONTEXT, wire::OPTION_SET_META_CONTEXT);
        let table: [(&[&str], bool, bool); 7] = [
            (&[], true, false),
            (&["base:"], true, false),
            (&["base:allocation"], true, true),
            (&["base:nothing"], false, false),
            (&["qemu:dirty-bitmap:x", "x-mine:"], false, false),
            (&["x-mine:allocation", "base:allocation", "base:allocation"], true, true),
            (&["BASE:allocation"], false, false),
        ];
        for (queries, listed, selected) in table {
            assert_eq!(parsed(list, queries), Ok(listed), "{queries:?}");
            assert_eq!(parsed(set, queries), Ok(selected), "{queries:?}");
        }
        assert!(parsed(set, &["allocation"]).is_err());
        assert!(Queries::parse(set, &[data(&["base:allocation"]), vec![0]].concat()).is_err());
        assert!(Queries::parse(set, b"\0\0\0\0\0\0\0\x01\0\0\0\x01\xff").is_err(), "not UTF-8");
    }

    proptest! {
        #[test]
        fn no_data_makes_the_parser_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            for data in [bytes.clone(), [data(&[]), bytes].concat()] {
                let _ = Queries::parse(wire::OPTION_SET_META_CONTEXT, &data);
            }
        }
    }
}
