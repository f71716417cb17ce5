//! Our AoE target before a device that answers from memory at once, in a process of its own: what the protocol and the
//! socket cost.

use crate::error::{BenchError, Result};
use crate::null::Null;
use futures::channel::oneshot;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::sync::Arc;
use torus_engine::disk::direct::DirectDisk;
use torus_frontends::aoe::store::{How, claim};
use torus_frontends::aoe::wire::Address;
use torus_frontends::aoe::{Named, Server, Wanted};
use torus_rpc::metadata::memory::MemoryStore;
use torus_rpc::metadata::{Metadata, Transaction, Write};
use torus_rpc::runtime::Runtime;
use torus_rpc::runtime::glommio::{GlommioRuntime, Here, Thread, run_on};
use torus_schema::ids::VolumeId;
use torus_schema::records::{NameRecord, encode, keys};
use torus_schema::spin::Spin;

const NAME: &str = "null";

/// Until SIGTERM or SIGINT. Writes are taken from the start: nobody served the address before.
pub fn serve(interface: &str, shelf: u16, slot: u8, bytes: u64) -> Result<()> {
    let failed = |because: String| BenchError::Failed { what: "an AoE target before nothing".to_string(), because };
    let address = Address::new(shelf, slot).map_err(failed)?;
    let signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]);
    let mut signals = signals.map_err(BenchError::wrap("signal handlers"))?;
    let (stop, stopped) = oneshot::channel::<()>();
    std::thread::spawn(move || {
        signals.forever().next();
        drop(stop);
    });
    let serving = async {
        let runtime = GlommioRuntime::<_, DirectDisk>::new(MemoryStore::new(Here::new()));
        let volume = VolumeId::random();
        // A target serves only what the metadata store says is its own.
        let put = Write::Put { key: keys::name(NAME), value: encode(&NameRecord { volume }), lease: None };
        let transaction = Transaction { writes: vec![put], ..Transaction::default() };
        runtime.metadata().transact(transaction).await.map_err(|error| failed(error.to_string()))?;
        let claimed = claim(runtime.metadata(), address, (volume, NAME), How::default()).await;
        claimed.map_err(|error| failed(error.to_string()))?;
        let named = Named { address, name: NAME.to_string(), volume };
        let wanted = vec![Wanted { named, is_new: true }];
        let counts = Arc::default();
        let server = Server::open(runtime, &[interface.to_string()], wanted, counts, vec![]);
        let server = server.map_err(|error| failed(error.to_string()))?;
        server.serve(Null { bytes }, async { stopped.await.unwrap_or_default() }, |_, _| {}).await;
        Ok(())
    };
    // As `torusblk aoe` has it.
    run_on("null-aoe", Thread { cpu: None, spin: Spin::default().0 }, serving)
        .map_err(BenchError::wrap("an executor"))?
}
