//! The client host: volumes, and the protocols that serve them.
//!
//! * `admin`   what `torusadm` and `torusblk volume` do
//! * `aoe`     the AoE target
//! * `device`  what a protocol server needs of a volume
//! * `kernel`  `torusblk nbd`: block devices of this host's kernel
//! * `nbd`     the NBD server
//! * `serve`   `torusblk serve`
//! * `spread`  volumes used from several executors
//! * `volume`  the writer: attach, fan-out, flush, reads

pub mod admin;
pub mod aoe;
pub mod device;
pub mod kernel;
pub mod nbd;
pub mod serve;
pub mod spread;
pub mod volume;
