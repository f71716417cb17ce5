//! What everybody has to agree on, and nothing that does I/O.
//!
//! * `cpus`     lists of cores as people write them
//! * `hash`     hash maps that a simulated world can repeat
//! * `ids`      newtypes for every id and counter
//! * `latency`  how long things take: histograms, and the stages of an operation
//! * `limits`   every bound, with its reason
//! * `records`  what stands in the metadata store, and under which key
//! * `ring`     which shards hold a slice, and which slice holds an extent
//! * `size`     sizes as people write them
//! * `spin`     how long an executor looks for work before it sleeps
//! * `*_capnp`  the messages of the data plane, the control plane and the embedded metadata store

pub mod cpus;
pub mod hash;
pub mod ids;
pub mod latency;
pub mod limits;
pub mod records;
pub mod ring;
pub mod size;
pub mod spin;

#[allow(clippy::all, clippy::unimplemented)]
pub mod data_capnp {
    include!(concat!(env!("OUT_DIR"), "/data_capnp.rs"));
}
#[allow(clippy::all, clippy::unimplemented)]
pub mod control_capnp {
    include!(concat!(env!("OUT_DIR"), "/control_capnp.rs"));
}
#[allow(clippy::all, clippy::unimplemented)]
pub mod metadata_capnp {
    include!(concat!(env!("OUT_DIR"), "/metadata_capnp.rs"));
}
