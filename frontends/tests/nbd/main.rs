//! The NBD server as its clients see it, on a device in memory.
//!
//! * `chunks`        replies with structured and extended headers
//! * `clients`       the tools that people use
//! * `cores`         which executor a connection goes to, by the core that its packets come in on
//! * `lifecycle`     overlap, bounds, errors, ends
//! * `misbehaviour`  what no client should send
//! * `spread`        several executors
//! * `tls`           encryption and certificates
//! * `support`       the server under test, and a client that may say anything

mod chunks;
mod clients;
mod cores;
mod lifecycle;
mod misbehaviour;
mod spread;
mod support;
mod tls;
