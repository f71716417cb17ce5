//! The production runtime: one executor per thread on glommio, and how such a thread is started.

use super::watchdog::Watchdog;
use super::{Class, Clock, Connect, Disk, Instant, NoDisk, Random, Runtime, Spawn};
use crate::client::TcpConnect;
use crate::metadata::Metadata;
use glommio::{CpuSet, Latency, LocalExecutorBuilder, Placement, Shares, TaskQueueHandle};
use nix::sched::{CpuSet as Affinity, sched_getaffinity};
use nix::unistd::Pid;
use std::future::Future;
use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use thiserror::Error;

/// Default would be 100 ms, for which a busy task queue then holds up timers and disk completions.
const PREEMPT_TIMER: Duration = Duration::from_millis(5);
/// Several of these to each look of the watchdog.
const TICK: Duration = Duration::from_millis(250);
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

/// How the thread of an executor uses the machine.
#[derive(Clone, Copy, Debug, Default)]
pub struct Thread {
    /// The core that it is pinned to, or any that the process may use.
    pub cpu: Option<usize>,
    /// So long it looks for something to do before it sleeps: what comes meanwhile (a disk's answer, the next request of
    /// a client that sends one at a time) costs no sleep and no wake.
    pub spin: Duration,
}

/// Runs `task` on this thread in an executor of its own, pinned to `cpu` if one is given. It does not spin.
pub fn run<T>(name: &str, cpu: Option<usize>, task: impl Future<Output = T>) -> Result<T, StartError> {
    run_on(name, Thread { cpu, spin: Duration::ZERO }, task)
}

/// Runs `task` on this thread in an executor of its own.
pub fn run_on<T>(name: &str, thread: Thread, task: impl Future<Output = T>) -> Result<T, StartError> {
    check_memlock()?;
    let describe = thread.cpu.map_or("any cpu".to_string(), |cpu| format!("cpu {cpu}"));
    let executor = LocalExecutorBuilder::new(placement(name, thread))
        .name(name)
        .preempt_timer(PREEMPT_TIMER)
        .io_memory(IO_MEMORY_BYTES)
        .spin_before_park(thread.spin)
        .make()
        .map_err(|error| start_error(describe, &error.to_string()))?;
    let watchdog = Watchdog::new(name)
        .map_err(|error| StartError::Executor { placement: "a watchdog".to_string(), because: error.to_string() })?;
    Ok(executor.run(async {
        glommio::spawn_local(tick(watchdog.turns())).detach();
        task.await
    }))
}

/// glommio spins only on an executor that is bound to cores: one that is not is bound to all that it may use anyway.
fn placement(name: &str, thread: Thread) -> Placement {
    if let Some(cpu) = thread.cpu {
        return Placement::Fixed(cpu);
    }
    if thread.spin.is_zero() {
        return Placement::Unbound;
    }
    match allowed_cpus() {
        Ok(cpus) => Placement::Fenced(cpus),
        Err(because) => {
            tracing::warn!(name, because, "which cores may be used is not known, so this executor sleeps at once");
            Placement::Unbound
        }
    }
}

fn allowed_cpus() -> Result<CpuSet, String> {
    let affinity = sched_getaffinity(Pid::from_raw(0)).map_err(|error| format!("sched_getaffinity: {error}"))?;
    let is_allowed = |cpu: usize| cpu < Affinity::count() && affinity.is_set(cpu).unwrap_or(false);
    let online = CpuSet::online().map_err(|error| format!("/sys/devices/system/cpu: {error}"))?;
    let allowed = online.filter(|location| is_allowed(location.cpu));
    match allowed.len() {
        0 => Err("none of the cores that are online may be used".to_string()),
        _ => Ok(allowed),
    }
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

/// For the watchdog: an idle executor turns too.
async fn tick(turns: Arc<AtomicU64>) {
    loop {
        turns.fetch_add(1, Ordering::Relaxed);
        glommio::timer::sleep(TICK).await;
    }
}

/// `D`: the disk of a shard's executor, or none on a client's. `C`: how shards are reached.
pub struct GlommioRuntime<M, D = NoDisk, C = TcpConnect> {
    here: Here,
    connect: C,
    metadata: M,
    disk: PhantomData<fn() -> D>,
}

impl<M: Metadata, D: Disk> GlommioRuntime<M, D> {
    /// Inside an executor.
    pub fn new(metadata: M) -> Self {
        Self::connecting(metadata, Here::new(), TcpConnect)
    }
}

impl<M: Metadata, D: Disk, C: Connect> GlommioRuntime<M, D, C> {
    pub fn connecting(metadata: M, here: Here, connect: C) -> Self {
        Self { here, connect, metadata, disk: PhantomData }
    }
}

impl<M: Clone, D, C: Clone> Clone for GlommioRuntime<M, D, C> {
    fn clone(&self) -> Self {
        Self {
            here: self.here.clone(),
            connect: self.connect.clone(),
            metadata: self.metadata.clone(),
            disk: PhantomData,
        }
    }
}

impl<M: Metadata, D: Disk, C: Connect> Runtime for GlommioRuntime<M, D, C> {
    type Disk = D;
    type Clock = Here;
    type Link = C::Link;
    type Connect = C;
    type Metadata = M;
    type Spawn = Here;
    type Random = Here;

    fn clock(&self) -> &Here {
        &self.here
    }
    fn connect(&self) -> &C {
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

impl Here {
    /// Inside an executor.
    pub fn new() -> Self {
        let background = glommio::executor().create_task_queue(
            Shares::Static(BACKGROUND_SHARES),
            Latency::NotImportant,
            "background",
        );
        Self { background }
    }
}

impl Default for Here {
    fn default() -> Self {
        Self::new()
    }
}

fn boot_time() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    let time = clock_gettime(ClockId::CLOCK_BOOTTIME).expect("Linux has had CLOCK_BOOTTIME since 2.6.39");
    Duration::from(time)
}

/// The clock of every executor.
pub fn now() -> Instant {
    Instant(boot_time())
}

impl Clock for Here {
    fn now(&self) -> Instant {
        now()
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
