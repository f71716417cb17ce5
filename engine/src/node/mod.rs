//! The life of a storage node.
pub mod deleting;
pub mod membership;
pub mod preflight;
