//! Volumes: the one writer of each, on the executor that attached it.
//!
//! * `exports`    the volumes of a cluster by name, attached at first use and released when idle
//! * `attached`   a volume as its users have it
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
//! * `status`     marking replicas stale; `marking` the transaction that does; `replicas` which are in sync (pure)
//! * `wanted`     volumes that are owned only for repair are let go when a client wants them
//! * `lease`      what ownership hangs on; `guard` notices that it is gone
//! * `links`      connections to shards, shared by all volumes of the executor
//! * `counters`   what happened, in numbers; `course` where the time of a request went; `detached` one that is not given up
//! * `together`     reads that go to the same replica (pure)
//! * `hedge`      when a read is asked of a second replica (pure); `alarms` tell when it is time; `share` what a volume's requests may take at once
//! * `plan`, `locks`, `window`    ranges cut into frames, ranges under way, sequences under way (pure)

mod alarms;
mod attach;
mod attached;
mod counters;
mod course;
mod detached;
mod exports;
mod flush;
mod guard;
mod habit;
mod hedge;
mod lease;
mod links;
mod locks;
mod map;
mod marking;
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
mod together;
mod wanted;
mod window;
mod writer;

pub use attach::{Attacher, find};
pub use attached::AttachedVolume;
pub use counters::Counters;
pub use exports::{VolumeExports, VolumeSettings};
pub use lease::LeaseTerms;
pub use repair_owner::RepairOwner;
pub use replay::ReplayLimits;
