//! How programs of a cluster talk: to a shard over the data plane, to the metadata store, and through which seams.
//!
//! * `runtime`   the bundle trait of all seams, and the production one on glommio
//! * `message`   requests and answers of the data plane as types
//! * `frame`     their bytes; `receive` takes them out of a stream, `outbox` gathers them, `send` puts them into one
//! * `token`     how a shard knows a writer
//! * `client`    a pipelined connection to one shard; `answers` are those it waits for
//! * `http`      numbers and health, for who watches a process
//! * `metrics`   latencies as Prometheus reads them
//! * `local`     a shard on the client's own host, without the network
//! * `near`      a shard on the client's own executor, without a connection
//! * `server`    one connection from a client
//! * `admission` what a shard may have under way
//! * `control`   what a node tells of scrub and damage, and how tools ask
//! * `notify`    waiting for a state to change
//! * `metadata`  who is who: etcd, embedded, memory

pub mod admission;
mod answers;
pub mod client;
pub mod control;
pub mod error;
pub mod frame;
pub mod http;
pub mod local;
pub mod message;
pub mod metadata;
pub mod metrics;
pub mod near;
pub mod notify;
pub mod outbox;
pub mod receive;
pub mod runtime;
pub mod send;
pub mod server;
pub mod token;
