//! What everybody has to agree on, and nothing that does I/O.
//!
//! * `hash`     hash maps that a simulated world can repeat
//! * `ids`      newtypes for every id and counter
//! * `limits`   every bound, with its reason
//! * `records`  what stands in the metadata store, and under which key
//! * `ring`     which shards hold a slice, and which slice holds an extent
//! * `size`     sizes as people write them
//! * `*_capnp`  the messages of the data plane, the control plane and the embedded metadata store

pub mod hash;
pub mod ids;
pub mod limits;
pub mod records;
pub mod ring;
pub mod size;

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
