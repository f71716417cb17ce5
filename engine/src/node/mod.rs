//! The life of a storage node.
//!
//! * `membership`   the node's record and heartbeat
//! * `deleting`     volumes that were deleted

pub mod deleting;
pub mod membership;
