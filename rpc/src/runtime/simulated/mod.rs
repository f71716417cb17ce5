//! A world made of one seed: processes on virtual time, links that lose, delay and cut, and nothing else random.
//!
//! What it can do to the code under test:
//! * any runnable task may run next (`executor`)
//! * a process is killed at any await; its tasks vanish, what it sent may still arrive
//! * a process stands still for a while and then goes on as if nothing had been; its clock runs a little too fast or
//!   too slowly (`hosts`)
//! * a message is late, for milliseconds or for longer than any timeout; it is then delivered all the same
//! * an answer is lost, or a request is delivered twice
//! * two processes cannot reach each other for a while, or only one of them the other (`network`)
//!
//! Disks and metadata have their own fault models, where they are. What happens can be told (`trace`).

mod executor;
mod hosts;
mod network;
mod trace;

pub use executor::{ProcessId, World};
pub use network::{Faults, SimulatedConnect, SimulatedLink};

use super::{Class, Clock, Disk, Instant, Random, Runtime, Spawn};
use crate::metadata::Metadata;
use std::future::Future;
use std::marker::PhantomData;
use std::time::Duration;

/// One process's view of the world.
pub struct SimulatedRuntime<D, M> {
    here: Here,
    connect: SimulatedConnect,
    metadata: M,
    disk: PhantomData<fn() -> D>,
}

impl<D, M: Metadata> SimulatedRuntime<D, M> {
    pub fn new(world: &World, process: ProcessId, metadata: M) -> Self {
        let here = Here { world: world.clone(), process };
        Self { connect: SimulatedConnect::new(here.clone()), here, metadata, disk: PhantomData }
    }
}

impl<D, M: Clone> Clone for SimulatedRuntime<D, M> {
    fn clone(&self) -> Self {
        Self {
            here: self.here.clone(),
            connect: self.connect.clone(),
            metadata: self.metadata.clone(),
            disk: PhantomData,
        }
    }
}

impl<D: Disk, M: Metadata> Runtime for SimulatedRuntime<D, M> {
    type Disk = D;
    type Clock = Here;
    type Link = SimulatedLink;
    type Connect = SimulatedConnect;
    type Metadata = M;
    type Spawn = Here;
    type Random = Here;

    fn clock(&self) -> &Here {
        &self.here
    }
    fn connect(&self) -> &SimulatedConnect {
        &self.connect
    }
    fn metadata(&self) -> &M {
        &self.metadata
    }
    fn spawn(&self) -> &Here {
        &self.here
    }
    fn random(&self) -> &Here {
        &self.here
    }
}

/// When every world begins.
const WORLD_BEGAN_UNIX_S: u64 = 1_700_000_000;

/// A place in the world: clock, tasks and chance of one process.
#[derive(Clone)]
pub struct Here {
    pub world: World,
    pub process: ProcessId,
}

impl Clock for Here {
    fn now(&self) -> Instant {
        self.world.local_now(self.process)
    }
    /// The same in every run of a seed.
    fn unix_seconds(&self) -> u64 {
        WORLD_BEGAN_UNIX_S + self.world.now().0.as_secs()
    }
    fn sleep(&self, wait: Duration) -> impl Future<Output = ()> + 'static {
        self.world.sleep(self.world.local_wait(self.process, wait))
    }
}

impl Spawn for Here {
    fn spawn(&self, _class: Class, task: impl Future<Output = ()> + 'static) {
        self.world.spawn(self.process, task);
    }
}

impl Random for Here {
    fn u64(&self) -> u64 {
        self.world.random_u64()
    }
}
