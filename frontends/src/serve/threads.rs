//! The executors of `torusblk serve` beside the main thread's, each in a thread of its own.

use super::part::Part;
use super::{ServeError, Stopped, io_error};
use futures::channel::oneshot;
use std::cell::Cell;
use std::rc::Rc;
use std::thread::JoinHandle;
use torus_rpc::metadata::any::AnyMetadata;
use torus_rpc::runtime::ends_process::EndsTheProcess;
use torus_rpc::runtime::glommio::{GlommioRuntime, StartError, Thread, run_on};

pub struct Serving {
    ready: oneshot::Receiver<Result<(), StartError>>,
    handle: JoinHandle<()>,
}

impl Serving {
    /// Serves `part` until it is stopped.
    pub fn start(
        name: String,
        thread: Thread,
        part: Part,
        metadata: AnyMetadata,
        stopped: Stopped,
    ) -> Result<Self, ServeError> {
        let (tell, ready) = oneshot::channel();
        let work = move || {
            let _ends = EndsTheProcess::with(&name);
            let tell = Rc::new(Cell::new(Some(tell)));
            // Nobody waits any more only if the process is ending.
            let tell = |result| tell.take().map_or((), |tell| drop(tell.send(result)));
            let served = run_on(&name, thread, async {
                let running = part.begin(GlommioRuntime::<_>::new(metadata));
                tell(Ok(()));
                running.serve(stopped).await;
            });
            if let Err(error) = served {
                tell(Err(error));
            }
        };
        let handle = std::thread::Builder::new().spawn(work).map_err(io_error("a thread"))?;
        Ok(Self { ready, handle })
    }

    /// Until it serves.
    pub async fn ready(&mut self) -> Result<(), ServeError> {
        match (&mut self.ready).await {
            Ok(started) => Ok(started?),
            Err(_) => Err(io_error("an executor")(std::io::Error::other("its thread ended before it began"))),
        }
    }

    /// Until it has ended.
    pub fn join(self) {
        if self.handle.join().is_err() {
            tracing::error!("an executor panicked");
        }
    }
}
