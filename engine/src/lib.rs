//! The storage node.
//!
//! * `config`   the command line
//! * `datadir`  the node's own directory: identity, lock, block files

pub mod config;
pub mod datadir;
