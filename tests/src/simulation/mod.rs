//! A whole cluster in one thread, from one seed: the shipped shard, volume and attach code over simulated disks,
//! links and metadata, under a checker.
//!
//! * `cluster`   nodes, clients and the metadata store, and what can be done to them
//! * `metadata`  the metadata store with the delays of a real one
//! * `history`   what every sector may read as, given what was answered (the checker)
//! * `replicas`  what each node has, past any client
//! * `scenario`  whole runs
//! * `whole`     all of it at once, from one seed
//! * `workload`  writers and readers that report to the history

pub mod cluster;
pub mod history;
pub mod metadata;
pub mod replicas;
pub mod scenario;
pub mod whole;
pub mod workload;
