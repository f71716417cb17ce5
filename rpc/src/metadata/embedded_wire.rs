//! Values of the metadata store to and from the messages of `schema/metadata.capnp`, for its client and its server.

use super::{Compare, Entry, Event, LeaseId, Revision, Transaction, Write};
use capnp::message::ReaderOptions;
use capnp::struct_list;
use torus_schema::limits::{METADATA_ANSWER_BYTES_MAX, METADATA_TRANSACTION_BYTES_MAX};
use torus_schema::metadata_capnp::{compare, entry, event, maybe_entry, metadata_store, write};

/// For the client: lets the largest answer through, and no more than that.
pub fn answer_options() -> ReaderOptions {
    options(METADATA_ANSWER_BYTES_MAX)
}

/// For the server: the largest transaction, and its keys once more in compares and reads.
pub fn request_options() -> ReaderOptions {
    options(2 * METADATA_TRANSACTION_BYTES_MAX)
}

fn options(bytes: u64) -> ReaderOptions {
    let mut options = ReaderOptions::new();
    options.traversal_limit_in_words(Some((bytes / 8) as usize));
    options
}

/// Lists are counted in 32 bits; ours are limited far below that.
pub fn count(length: usize) -> u32 {
    u32::try_from(length).expect("lists of the metadata store are limited far below 2^32")
}

pub fn write_entry(mut to: entry::Builder<'_>, from: &Entry) {
    to.set_key(from.key.as_str());
    to.set_value(&from.value);
    to.set_create_revision(from.create_revision.0);
    to.set_mod_revision(from.mod_revision.0);
}

pub fn read_entry(from: entry::Reader<'_>) -> capnp::Result<Entry> {
    Ok(Entry {
        key: from.get_key()?.to_string()?,
        value: from.get_value()?.to_vec(),
        create_revision: Revision(from.get_create_revision()),
        mod_revision: Revision(from.get_mod_revision()),
    })
}

pub fn write_maybe(mut to: maybe_entry::Builder<'_>, from: Option<&Entry>) {
    match from {
        Some(entry) => write_entry(to.init_present(), entry),
        None => to.set_absent(()),
    }
}

pub fn read_maybe(from: maybe_entry::Reader<'_>) -> capnp::Result<Option<Entry>> {
    match from.which()? {
        maybe_entry::Present(entry) => read_entry(entry?).map(Some),
        maybe_entry::Absent(()) => Ok(None),
    }
}

pub fn write_events(mut to: struct_list::Builder<'_, event::Owned>, from: &[Event]) {
    for (index, event) in (0..).zip(from) {
        let mut to = to.reborrow().get(index);
        to.set_revision(event.revision().0);
        match event {
            Event::Put(entry) => write_entry(to.init_put(), entry),
            Event::Deleted { key, .. } => to.set_deleted(key.as_str()),
        }
    }
}

pub fn read_events(from: struct_list::Reader<'_, event::Owned>) -> capnp::Result<Vec<Event>> {
    let read = |event: event::Reader<'_>| match event.which()? {
        event::Put(entry) => Ok(Event::Put(read_entry(entry?)?)),
        event::Deleted(key) => Ok(Event::Deleted { key: key?.to_string()?, revision: Revision(event.get_revision()) }),
    };
    from.iter().map(read).collect()
}

pub fn write_transaction(mut to: metadata_store::transact_params::Builder<'_>, from: &Transaction) {
    let mut compares = to.reborrow().init_compares(count(from.compares.len()));
    for (index, compare) in (0..).zip(&from.compares) {
        let mut to = compares.reborrow().get(index);
        match compare {
            Compare::Absent(key) => {
                to.set_key(key.as_str());
                to.set_absent(());
            }
            Compare::Present(key) => {
                to.set_key(key.as_str());
                to.set_present(());
            }
            Compare::CreateRevision(key, revision) => {
                to.set_key(key.as_str());
                to.set_create_revision(revision.0);
            }
            Compare::ModRevision(key, revision) => {
                to.set_key(key.as_str());
                to.set_mod_revision(revision.0);
            }
            Compare::PrefixUnchanged(prefix, revision) => {
                to.set_key(prefix.as_str());
                to.set_prefix_unchanged(revision.0);
            }
        }
    }
    let mut writes = to.reborrow().init_writes(count(from.writes.len()));
    for (index, write) in (0..).zip(&from.writes) {
        let mut to = writes.reborrow().get(index);
        to.set_key(write.key());
        match write {
            Write::Put { value, lease, .. } => {
                to.set_put(value);
                to.set_lease(lease.map_or(0, |lease| lease.0));
            }
            Write::Delete { .. } => to.set_delete(()),
        }
    }
    let mut reads = to.init_reads(count(from.reads.len()));
    for (index, key) in (0..).zip(&from.reads) {
        reads.set(index, key.as_str());
    }
}

pub fn read_transaction(from: metadata_store::transact_params::Reader<'_>) -> capnp::Result<Transaction> {
    let compares = from.get_compares()?.iter().map(read_compare).collect::<capnp::Result<_>>()?;
    let writes = from.get_writes()?.iter().map(read_write).collect::<capnp::Result<_>>()?;
    let mut reads = Vec::new();
    for key in from.get_reads()?.iter() {
        reads.push(key?.to_string()?);
    }
    Ok(Transaction { compares, writes, reads })
}

fn read_compare(from: compare::Reader<'_>) -> capnp::Result<Compare> {
    let key = from.get_key()?.to_string()?;
    Ok(match from.which()? {
        compare::Absent(()) => Compare::Absent(key),
        compare::Present(()) => Compare::Present(key),
        compare::CreateRevision(revision) => Compare::CreateRevision(key, Revision(revision)),
        compare::ModRevision(revision) => Compare::ModRevision(key, Revision(revision)),
        compare::PrefixUnchanged(revision) => Compare::PrefixUnchanged(key, Revision(revision)),
    })
}

fn read_write(from: write::Reader<'_>) -> capnp::Result<Write> {
    let key = from.get_key()?.to_string()?;
    let lease = from.get_lease();
    Ok(match from.which()? {
        write::Delete(()) => Write::Delete { key },
        write::Put(value) => Write::Put { key, value: value?.to_vec(), lease: (lease != 0).then_some(LeaseId(lease)) },
    })
}
