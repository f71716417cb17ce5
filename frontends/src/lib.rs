//! The client host: volumes, and the protocols that serve them.
//!
//! * `device`  what a protocol server needs of a volume
//! * `nbd`     the NBD server

pub mod device;
pub mod nbd;
