//! Volumes: the one writer of each, on the executor that attached it.
//!
//! * `exports`    the volumes of a cluster by name, attached at first use and released when idle
//! * `attach`     becoming the writer: `own` the volume, open its replicas, `reconcile` what the last writer left
//! * `session`    one epoch of one volume, and the loop that gets a request to a replica
//! * `writer`, `reads`, `flush`   the three things it does; `map` what is stored
//! * `recover`    what becomes of a replica that failed: open again and replay, or stale, or waited for
//! * `replay`     the records a restarted replica may lack, and the bounds on them (pure)
//! * `places`     nodes that were replaced by others while volumes are attached
//! * `resync`     stale replicas are brought back; `resync_told` how far that is; `repair_owner` where nobody is attached
//! * `sizes`     volumes that grow while they are attached
//! * `regress`    a metadata store that is older than the replicas
//! * `retain`     what the shards are told to keep
//! * `status`     marking replicas stale; `replicas` which are in sync (pure)
//! * `wanted`     volumes that are owned only for repair are let go when a client wants them
//! * `lease`      what ownership hangs on; `guard` notices that it is gone
//! * `links`      connections to shards, shared by all volumes of the executor
//! * `counters`   what happened, in numbers
//! * `hedge`      when a read is asked of a second replica (pure); `share` what a volume's requests may take at once
//! * `plan`, `locks`, `window`    ranges cut into frames, ranges under way, sequences under way (pure)

mod attach;
mod counters;
mod exports;
mod flush;
mod guard;
mod hedge;
mod lease;
mod links;
mod locks;
mod map;
mod own;
mod places;
mod plan;
mod reads;
mod reconcile;
mod recover;
mod regress;
mod repair_owner;
mod replay;
mod replicas;
mod resync;
mod resync_told;
mod retain;
mod session;
mod share;
mod sizes;
mod status;
mod wanted;
mod window;
mod writer;

pub use attach::{Attacher, find};
pub use counters::Counters;
pub use exports::{AttachedVolume, VolumeExports, VolumeSettings};
pub use lease::LeaseTerms;
pub use repair_owner::RepairOwner;
pub use replay::ReplayLimits;
