//! The storage node: it keeps blocks of volumes on its disks and answers for what it acknowledged.
//!
//! * `disk`   one shard's block area: direct I/O in production, a disk that crashes by seed in tests
//! * `log`    formats and recovery of what stands on the disk; an appending log of segments
//! * `index`  where the newest version of every block lies; a cache of the log
//! * `shard`  ties them together: answers requests, commits in groups, cleans
//!
//! `log` and `index` do not know each other.

pub mod disk;
pub mod index;
pub mod log;
pub mod shard;
