//! The shard on a simulated disk.
//!
//! * `harness`   a client of one shard, that knows what it wrote
//! * `reads`     how the disk is read for them
//! * `requests`  what is refused, and with what
//! * `retention`  what is kept, what goes, what never was
//! * `recovery`  row by row
//! * `gathering` footers by extent, against record by record
//! * `repair`    damage, and peers that mend it
//! * `resync`    a stale replica takes what it lacks
//! * `scrub`     passes over everything
//! * `supervisor` disks that fail under a shard
//! * `space`     cleaning, full, dropping
//! * `stored_bytes`  decoders and starts over bytes that nobody wrote
//! * `model`     seeded sequences of everything, with crashes, against a plain map

mod gathering;
mod harness;
mod model;
mod reads;
mod recovery;
mod recovery_table;
mod repair;
mod requests;
mod resync;
mod retention;
mod scrub;
mod segments_ahead;
mod space;
mod stored_bytes;
mod supervisor;
