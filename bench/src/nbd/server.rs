//! Our NBD server before a device that answers from memory at once, in a process of its own: what the protocol and the
//! sockets cost.

use crate::error::{BenchError, Result};
use crate::null::Null;
use futures::channel::oneshot;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::path::Path;
use torus_frontends::nbd::{Listener, Offer, serve as serve_nbd};
use torus_rpc::runtime::glommio::{Thread, run_on};
use torus_schema::spin::Spin;

/// Until SIGTERM or SIGINT. `address`: HOST:PORT or unix:PATH.
pub fn serve(address: &str, bytes: u64, spin: Spin) -> Result<()> {
    let listener = match address.strip_prefix("unix:") {
        Some(path) => Listener::unix(Path::new(path)),
        None => Listener::tcp(address),
    };
    let listener = listener.map_err(BenchError::wrap("an address to listen on"))?;
    let signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM]);
    let mut signals = signals.map_err(BenchError::wrap("signal handlers"))?;
    let (stop, stopped) = oneshot::channel::<()>();
    std::thread::spawn(move || {
        signals.forever().next();
        drop(stop);
    });
    let serving = serve_nbd(listener, Null { bytes }, Offer::default(), async { stopped.await.unwrap_or_default() });
    let served =
        run_on("null", Thread { cpu: None, spin: spin.0 }, serving).map_err(BenchError::wrap("an executor"))?;
    served.map_err(BenchError::wrap("the NBD server"))
}
