//! Which shards hold a slice: a pure function of one versioned document, so that a client and a node never have to
//! ask each other.
//!
//! * `placement`  extent → slot → slice, the same for ever for one volume
//! * `table`      slice → ordered replicas, an explicit table
//! * `planner`    makes the table: weights, failure domains, least data moved

pub mod placement;
