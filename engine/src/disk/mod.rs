//! One shard's block area (the trait `Disk` of `torus_rpc::runtime`).
//!
//! * `direct`     a preallocated file or a device by O_DIRECT, on glommio
//! * `simulated`  in memory, with a seeded fault model

pub mod direct;
pub mod simulated;
