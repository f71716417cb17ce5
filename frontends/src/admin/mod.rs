//! Administration: what `torusadm` and `torusblk volume` do, one file per noun. Nothing here prints: a command gives a
//! `Report`, and the programs in `bin/` show it.
//!
//! * `cluster`   `init`
//! * `status`    healthy or not, and why; `facts` is what it looks at
//! * `peer`      storage nodes, and which of them are in the ring; `peer_replace` one for another
//! * `standing`  how the replicas of a volume stand
//! * `ring`      the ring document
//! * `volume`    the noun both programs share; `volume_create`, `volume_compare`, `volume_delete`,
//!   `volume_show`, `volume_set`, `volume_resize`, `volume_promote`; `unowned` while nobody has it attached
//! * `why`       where a byte lies, and what each replica has there
//! * `top`       how much is asked of shards, and in which stage the time goes; of one volume: `latency`
//! * `scrub`     reading and verifying everything, and what was found
//! * `snapshot`  what stands in the metadata store, read and checked
//! * `output`    tables, JSON and CSV
//! * `error`     every way a command is refused or fails, and what to do next

pub mod cluster;
mod error;
mod facts;
pub mod output;
pub mod peer;
pub mod peer_replace;
pub mod ring;
pub mod scrub;
mod snapshot;
mod standing;
pub mod status;
pub mod top;
mod unowned;
pub mod volume;
mod volume_compare;
pub mod volume_create;
pub mod volume_delete;
pub mod volume_promote;
mod volume_regressed;
pub mod volume_resize;
pub mod volume_set;
mod volume_show;
pub mod why;

#[cfg(test)]
mod operator_tests;
#[cfg(test)]
mod tests;

pub use error::AdminError;
pub use output::{Format, Report};

use std::time::{SystemTime, UNIX_EPOCH};
use torus_rpc::runtime::{Random, Runtime};
use uuid::Uuid;

/// Seconds since the epoch of Unix, for records that people read.
fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// From the runtime's chance, so that a simulation repeats it.
fn draw_uuid<R: Runtime>(runtime: &R) -> Uuid {
    uuid::Builder::from_random_bytes(runtime.random().u128().to_be_bytes()).into_uuid()
}
