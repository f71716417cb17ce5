//! How programs of a cluster talk: to a shard over the data plane, to the metadata store, and through which seams.
//!
//! * `runtime`   the bundle trait of all seams, and the production one on glommio
//! * `message`   requests and answers of the data plane as types
//! * `frame`     their bytes; `receive` takes them out of a stream, `outbox` gathers them for a send
//! * `token`     how a shard knows a writer
//! * `client`    a pipelined connection to one shard
//! * `server`    one connection from a client
//! * `control`   what a node tells of scrub and damage, and how tools ask
//! * `notify`    waiting for a state to change
//! * `metadata`  who is who: etcd, embedded, memory

pub mod client;
pub mod control;
pub mod error;
pub mod frame;
pub mod message;
pub mod metadata;
pub mod notify;
pub mod outbox;
pub mod receive;
pub mod runtime;
pub mod server;
pub mod token;
