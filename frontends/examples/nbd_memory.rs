//! Serves a device in memory as `disk`, to measure the NBD server without what stands behind it:
//! `cargo run --release --example nbd_memory -- /tmp/nbd.sock 1073741824`, or `HOST:PORT` instead of a path.

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::error::Error;
use std::path::Path;
use torus_frontends::nbd::memory::{MemoryDevice, MemoryExports};
use torus_frontends::nbd::{Listener, Offer, serve};
use torus_rpc::runtime::glommio::run;

fn main() -> Result<(), Box<dyn Error>> {
    tracing_subscriber::fmt::init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, size] = &arguments[..] else { return Err("usage: nbd_memory PATH|HOST:PORT BYTES".into()) };
    let listener = if address.contains('/') { Listener::unix(Path::new(address))? } else { Listener::tcp(address)? };
    let exports = MemoryExports::default().with("disk", "memory", MemoryDevice::new(size.parse()?, false));
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let (stop, stopped) = futures::channel::oneshot::channel::<()>();
    std::thread::spawn(move || {
        signals.forever().next();
        drop(stop);
    });
    run("nbd_memory", None, serve(listener, exports, Offer::default(), async { stopped.await.unwrap_or_default() }))??;
    Ok(())
}
