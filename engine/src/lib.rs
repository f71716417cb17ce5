//! The storage node: it keeps blocks of volumes on its disks and answers for what it acknowledged.
//!
//! * `config`   the command line
//! * `datadir`  the node's own directory: identity, lock, block files
//! * `node`     the life of the process: start, membership, stop
//! * `control`  what a node answers to those who ask about it
//! * `inspect`  what stands on the disks of a node that does not run
//! * `shard`    ties the following together: answers requests, commits in groups, cleans
//! * `log`      formats and recovery of what stands on the disk; an appending log of segments
//! * `index`    where the newest version of every block lies; a cache of the log
//! * `disk`     one shard's block area: direct I/O in production, a disk that crashes by seed in tests
//!
//! `log` and `index` do not know each other.

pub mod config;
pub mod control;
pub mod datadir;
pub mod disk;
pub mod index;
pub mod inspect;
pub mod log;
pub mod node;
pub mod shard;
