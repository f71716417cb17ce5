//! Which shards hold a slice: a pure function of one versioned document, so that a client and a node never have to
//! ask each other.
//!
//! * `placement`  extent → slot → slice, the same for ever for one volume
//! * `record`     the document as it stands in the metadata store
//! * `table`      slice → ordered replicas, an explicit table
//! * `planner`    makes the table: weights, failure domains, least data moved
//! * `quota`      how many slices each shard should hold
//! * `rank`       who of several goes first
//! * `matching`   rows to targets of limited capacity

mod matching;
pub mod placement;
pub mod planner;
mod quota;
pub mod rank;
pub mod record;
pub mod table;

pub use planner::{PlanNode, plan};
pub use record::{RingKind, RingNode, RingRecord, RingShard};
pub use table::{Ring, RingError};
