//! The production runtime: one executor per thread on glommio, and how such a thread is started.

use super::watchdog::Watchdog;
use super::{Class, Clock, Disk, Instant, NoDisk, Random, Runtime, Spawn};
use crate::client::{TcpConnect, TcpLink};
use crate::metadata::Metadata;
use glommio::{Latency, LocalExecutorBuilder, Placement, Shares, TaskQueueHandle};
use std::cell::Cell;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use thiserror::Error;

/// Default would be 100 ms, for which a busy task queue then holds up timers and disk completions; the shorter, the
/// more often glommio parks by mistake (`tick`).
const PREEMPT_TIMER: Duration = Duration::from_millis(5);
/// What a park by mistake (`tick`) costs at most, and for how many ticks after the last traffic.
const AWAKE_TICK: Duration = Duration::from_millis(2);
const AWAKE_TICKS: u32 = 50;
/// The same without traffic: 27 wakes a second are a thousandth of a core.
const IDLE_TICK: Duration = Duration::from_millis(50);
/// Registered buffers of an executor's disk I/O, pinned (glommio's default).
const IO_MEMORY_BYTES: usize = 10 << 20;
/// Below this glommio cannot set up its rings.
const MEMLOCK_BYTES_MIN: u64 = 512 * 1024;
/// Against 1000 of the foreground queue.
const BACKGROUND_SHARES: usize = 100;

#[derive(Debug, Error)]
pub enum StartError {
    #[error(
        "the limit of locked memory is {found} bytes, io_uring needs {expected}; \
         raise it with `ulimit -l unlimited` or LimitMEMLOCK=infinity in the unit"
    )]
    Memlock { found: u64, expected: u64 },
    #[error("io_uring cannot be used ({because}); it needs Linux 5.8 and kernel.io_uring_disabled=0")]
    Uring { because: String },
    #[error("no thread could be started on {placement}: {because}")]
    Executor { placement: String, because: String },
}

/// Runs `task` on this thread in an executor of its own, pinned to `cpu` if one is given.
pub fn run<T>(name: &str, cpu: Option<usize>, task: impl Future<Output = T>) -> Result<T, StartError> {
    check_memlock()?;
    let placement = cpu.map_or(Placement::Unbound, Placement::Fixed);
    let describe = cpu.map_or("any cpu".to_string(), |cpu| format!("cpu {cpu}"));
    let executor = LocalExecutorBuilder::new(placement)
        .name(name)
        .preempt_timer(PREEMPT_TIMER)
        .io_memory(IO_MEMORY_BYTES)
        .make()
        .map_err(|error| start_error(describe, &error.to_string()))?;
    let watchdog = Watchdog::new(name)
        .map_err(|error| StartError::Executor { placement: "a watchdog".to_string(), because: error.to_string() })?;
    Ok(executor.run(async {
        glommio::spawn_local(tick(1, watchdog.turns())).detach();
        glommio::spawn_local(tick(3, watchdog.turns())).detach();
        task.await
    }))
}

fn start_error(placement: String, because: &str) -> StartError {
    let because = because.to_string();
    if because.contains("io_uring") || because.contains("Function not implemented") || because.contains("os error 1)") {
        return StartError::Uring { because };
    }
    StartError::Executor { placement, because }
}

fn check_memlock() -> Result<(), StartError> {
    use nix::sys::resource::{Resource, getrlimit};
    let (found, _) =
        getrlimit(Resource::RLIMIT_MEMLOCK).map_err(|error| StartError::Uring { because: error.to_string() })?;
    if found < MEMLOCK_BYTES_MIN {
        return Err(StartError::Memlock { found, expected: MEMLOCK_BYTES_MIN });
    }
    Ok(())
}

thread_local! {
    /// Ticks left at the short interval.
    static AWAKE: Cell<u32> = const { Cell::new(0) };
}

/// To be called where there is traffic: the executor's ticks come faster for a while.
pub fn stay_awake() {
    AWAKE.set(AWAKE_TICKS);
}

/// If glommio's preempt timer expires between its look at I/O and its look at the task queues (the thread lost its
/// core), it takes "nothing ran" for "nothing to run" and parks with tasks runnable until some other event: on a loaded
/// machine requests were seen to wait for seconds. A timer that is always set is such an event; there are two of
/// different length, since the task of one may be among those that the park leaves behind.
async fn tick(stretch: u32, turns: Arc<AtomicU64>) {
    loop {
        turns.fetch_add(1, Ordering::Relaxed);
        let left = AWAKE.get();
        AWAKE.set(left.saturating_sub(1));
        glommio::timer::sleep(stretch * if left > 0 { AWAKE_TICK } else { IDLE_TICK }).await;
    }
}

/// `D`: the disk of a shard's executor, or none on a client's.
pub struct GlommioRuntime<M, D = NoDisk> {
    here: Here,
    connect: TcpConnect,
    metadata: M,
    disk: PhantomData<fn() -> D>,
}

impl<M: Metadata, D: Disk> GlommioRuntime<M, D> {
    /// Inside an executor.
    pub fn new(metadata: M) -> Self {
        let background = glommio::executor().create_task_queue(
            Shares::Static(BACKGROUND_SHARES),
            Latency::NotImportant,
            "background",
        );
        let here = Here { background };
        Self { here, connect: TcpConnect, metadata, disk: PhantomData }
    }
}

impl<M: Clone, D> Clone for GlommioRuntime<M, D> {
    fn clone(&self) -> Self {
        Self {
            here: self.here.clone(),
            connect: self.connect.clone(),
            metadata: self.metadata.clone(),
            disk: PhantomData,
        }
    }
}

impl<M: Metadata, D: Disk> Runtime for GlommioRuntime<M, D> {
    type Disk = D;
    type Clock = Here;
    type Link = TcpLink;
    type Connect = TcpConnect;
    type Metadata = M;
    type Spawn = Here;
    type Random = Here;

    fn clock(&self) -> &Here {
        &self.here
    }
    fn connect(&self) -> &TcpConnect {
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

/// Clock, tasks and chance of this executor.
#[derive(Clone)]
pub struct Here {
    background: TaskQueueHandle,
}

fn boot_time() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has had CLOCK_BOOTTIME since 2.6.39");
    Duration::from(time)
}

impl Clock for Here {
    fn now(&self) -> Instant {
        Instant(boot_time())
    }
    fn sleep(&self, wait: Duration) -> impl Future<Output = ()> + 'static {
        glommio::timer::sleep(wait)
    }
}

impl Spawn for Here {
    fn spawn(&self, class: Class, task: impl Future<Output = ()> + 'static) {
        match class {
            Class::Foreground => glommio::spawn_local(task).detach(),
            Class::Background => glommio::spawn_local_into(task, self.background)
                .expect("the queue was created with this executor and is never removed")
                .detach(),
        };
    }
}

impl Random for Here {
    /// Capabilities and nonces come from here, so every number is the kernel's.
    fn u64(&self) -> u64 {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes).expect("getrandom of a booted Linux does not fail for 8 bytes");
        u64::from_le_bytes(bytes)
    }
}
