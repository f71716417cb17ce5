//! The NBD server as its clients see it, on a device in memory.
//!
//! * `clients`       the tools that people use
//! * `lifecycle`     overlap, bounds, errors, ends
//! * `misbehaviour`  what no client should send
//! * `support`       the server under test, and a client that may say anything

mod clients;
mod lifecycle;
mod misbehaviour;
mod support;
