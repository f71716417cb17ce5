//! One shard's block area (the trait `Disk` of `torus_rpc::runtime`).
//!
//! * `area`       where that is
//! * `direct`     a preallocated file or a device by O_DIRECT, on glommio
//! * `device`     a raw device, taken only if it is empty or ours
//! * `faulty`     one that fails when a file says so, for tests with real processes
//! * `overlay`    looked at and never written, for `inspect`
//! * `simulated`  in memory, with a seeded fault model

pub mod area;
pub mod device;
pub mod direct;
pub mod faulty;
pub mod overlay;
pub mod simulated;
