//! AoE target, after AoEr11 (S. Hopkins, B. Coile, "AoE (ATA over Ethernet)", February 2009; "the specification" in this
//! folder's comments).
//!
//! * `wire`       the numbers and byte tables; nothing else knows them
//! * `ata`        what an ATA command asks for, and its answer's registers; `identify` what a volume tells of itself
//! * `lists`      config string, MAC mask list, reserve list (pure)
//! * `target`     what becomes of a frame (pure)
//! * `retransmit` which writes are applied, of frames that come twice, late or in another order (pure)
//! * `merge`      writes on their way to the device: those that wait for the same blocks become one
//! * `filter`     what the kernel lets through; `socket` raw Ethernet
//! * `port`       an interface as its targets see it; `server` frames in, frames out
//! * `export`     one volume under one address; `hold` who serves it; `store` what the metadata store keeps of it
//! * `clock`      the time in which this process was running; `counts` what happened, in numbers

pub mod ata;
mod clock;
pub mod counts;
mod export;
pub mod filter;
mod hold;
pub mod identify;
pub mod lists;
pub mod merge;
mod port;
pub mod retransmit;
pub mod server;
pub mod socket;
pub mod store;
pub mod target;
pub mod wire;

pub use export::Named;
pub use hold::Held;
pub use server::{Server, Wanted};
