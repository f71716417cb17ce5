//! What integration tests share: real processes on this machine, and ways to await what they do.
//!
//! * `aoe`      an AoE initiator that sends what it is told to
//! * `wait`     await a state, with a deadline
//! * `ether`    raw Ethernet frames
//! * `hub`      an Ethernet hub for AoE frames that loses, repeats and delays them
//! * `guest`    a virtual machine with a stock kernel that has the block drivers this machine's may lack
//! * `loops`    loop devices, and file systems on them that can be cut off
//! * `network`  hosts with addresses of their own, which can be cut off from each other
//! * `nbd`      a client whose every answer can be recorded
//! * `process`  a program that ends with its test
//! * `simulation`  a whole cluster in one thread, from one seed
//! * `store`    a metadata store: etcd, or our own
//! * `tools`    stock NBD tools
//! * `witness`  load that knows what it was promised
//! * `cluster`  a store, nodes and the commands to administer them

pub mod aoe;
pub mod cluster;
pub mod ether;
pub mod guest;
pub mod hub;
pub mod loops;
pub mod nbd;
pub mod network;
pub mod process;
pub mod simulation;
pub mod store;
pub mod tools;
pub mod wait;
pub mod witness;

pub use cluster::{Cluster, ClusterOptions};
pub use process::{Outcome, Process};
pub use store::StoreKind;
