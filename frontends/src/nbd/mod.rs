//! NBD server, after doc/proto.md of NetworkBlockDevice/nbd ("the specification" in this folder's comments).
//!
//! ```text
//!  socket ─► connection ─► handshake ─► session ─► Device
//!               ▲ bytes in, steps out   │ commands     │
//!               └────────── reply ◄─────┴──────────────┘
//! ```
//!
//! * `wire`       the numbers and byte tables; nothing else knows them
//! * `handshake`  option haggling, a state machine without I/O; `information` what is told of an export, `contexts`
//!   the metadata contexts that can be selected
//! * `session`    the transmission phase: bytes in, checked commands out, without I/O
//! * `reply`      replies gathered into few sends, without I/O; `errors` why requests failed
//! * `receive`    the receive buffer that payloads are split off
//! * `outbox`     replies on their way to the writer, and what bounds a connection
//! * `listener`   TCP and unix sockets to accept on
//! * `reception`  accepts connections and spreads them over executors
//! * `server`     the connections of one executor: counts and stops them
//! * `connection` one connection: reader, writer, and a task per request, which `execute` carries out
//! * `stream`     a connection's socket, as it is or over TLS; `tls` that without I/O, and its certificates
//! * `memory`     a device in memory, for tests and for measuring the server alone

mod connection;
mod contexts;
mod errors;
mod execute;
pub mod handshake;
mod information;
pub mod listener;
pub mod memory;
mod outbox;
mod receive;
mod reception;
pub mod reply;
pub mod server;
pub mod session;
mod stream;
pub mod tls;
pub mod wire;

pub use handshake::TlsMode;
pub use listener::{Listener, ListenerError};
pub use reception::{Arrivals, ConnectionCounts, Reception};
pub use server::{Offer, serve};
pub use tls::{ClientCertificates, TlsError, TlsOffer};
