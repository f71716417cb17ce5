//! The storage node.
//!
//! * `config`   the command line
//! * `datadir`  the node's own directory: identity, lock, block files
//! * `node`     the life of the process: start, membership, stop
//! * `control`  what a node answers to those who ask about it

pub mod config;
pub mod control;
pub mod datadir;
pub mod node;
