//! The time in which this process was running. While it is stopped, or its thread has no core, frames wait unseen in the
//! sockets: what is remembered of writes must not grow old meanwhile.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::runtime::{Clock, Instant, Runtime};

const TICK: Duration = Duration::from_millis(250);
/// A tick that comes later than this was held up.
const TICK_MAX: Duration = Duration::from_secs(1);

pub struct RunningClock<R: Runtime> {
    runtime: R,
    ticked: Cell<Instant>,
    running: Cell<Duration>,
}

impl<R: Runtime> RunningClock<R> {
    pub fn new(runtime: R) -> Rc<Self> {
        let ticked = Cell::new(runtime.clock().now());
        Rc::new(Self { runtime, ticked, running: Cell::default() })
    }

    /// Since it was made.
    pub fn now(&self) -> Duration {
        self.running.get() + self.runtime.clock().now().since(self.ticked.get()).min(TICK_MAX)
    }

    /// For ever.
    pub async fn tick(self: Rc<Self>) {
        loop {
            self.runtime.clock().sleep(TICK).await;
            self.running.set(self.now());
            self.ticked.set(self.runtime.clock().now());
        }
    }
}
