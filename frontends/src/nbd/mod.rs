//! NBD server, after doc/proto.md of NetworkBlockDevice/nbd ("the specification" in this folder's comments).
//!
//! ```text
//!  socket ─► connection ─► handshake ─► session ─► Device
//!               ▲ bytes in, steps out   │ commands     │
//!               └────────── reply ◄─────┴──────────────┘
//! ```
//!
//! * `wire`       the numbers and byte tables; nothing else knows them
//! * `handshake`  option haggling, a state machine without I/O
//! * `session`    the transmission phase: bytes in, checked commands out, without I/O
//! * `reply`      replies gathered into few sends, without I/O
//! * `receive`    the receive buffer that payloads are split off
//! * `outbox`     replies on their way to the writer, and what bounds a connection
//! * `listener`   TCP and unix sockets to accept on
//! * `server`     accepts, counts and stops connections
//! * `connection` one connection: reader, writer, and a task per request
//! * `memory`     a device in memory, for tests and for measuring the server alone

mod connection;
pub mod handshake;
pub mod listener;
pub mod memory;
mod outbox;
mod receive;
pub mod reply;
pub mod server;
pub mod session;
pub mod wire;

pub use listener::{Listener, ListenerError};
pub use server::serve;
