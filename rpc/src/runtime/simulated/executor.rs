//! The seeded executor: one thread, virtual time, the next task drawn by lot.

use crate::runtime::Instant;
use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;
use torus_schema::hash::Map;

/// A process of the simulated world; killed ones are not started again under the same id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ProcessId(pub u64);

pub(super) type TaskId = u64;
type Task = Pin<Box<dyn Future<Output = ()>>>;
/// `None` while it is polled; the name is its type's.
type Running = (ProcessId, Option<Task>, &'static str);

#[derive(Clone)]
pub struct World {
    pub(super) state: Rc<State>,
}

pub(super) struct State {
    pub seed: u64,
    random: Cell<u64>,
    now: Cell<Duration>,
    /// Of all that happened up to now, in its order.
    course: Cell<u64>,
    next: Cell<u64>,
    tasks: RefCell<Map<TaskId, Running>>,
    alive: RefCell<std::collections::BTreeSet<ProcessId>>,
    ready: Arc<Mutex<Vec<TaskId>>>,
    timers: RefCell<BinaryHeap<Reverse<(Duration, u64)>>>,
    timer_wakers: RefCell<Map<u64, Waker>>,
    pub network: super::network::Network,
    pub hosts: super::hosts::Hosts,
    pub trace: super::trace::Trace,
}

struct TaskWaker {
    task: TaskId,
    ready: Arc<Mutex<Vec<TaskId>>>,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        let mut ready = self.ready.lock().expect("no task panics while it wakes another");
        if !ready.contains(&self.task) {
            ready.push(self.task);
        }
    }
}

impl World {
    pub fn new(seed: u64) -> Self {
        torus_schema::hash::seed_maps_of_this_thread(seed);
        let state = State {
            seed,
            random: Cell::new(seed),
            // Not zero, so that a subtraction too many shows.
            now: Cell::new(Duration::from_secs(1000)),
            course: Cell::new(seed),
            next: Cell::new(1),
            tasks: RefCell::default(),
            alive: RefCell::default(),
            ready: Arc::default(),
            timers: RefCell::default(),
            timer_wakers: RefCell::default(),
            network: super::network::Network::default(),
            hosts: super::hosts::Hosts::default(),
            trace: super::trace::Trace::default(),
        };
        Self { state: Rc::new(state) }
    }

    pub fn seed(&self) -> u64 {
        self.state.seed
    }

    /// SplitMix64: a few bits of state, and every seed a good one.
    pub fn random_u64(&self) -> u64 {
        let next = self.state.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.state.random.set(next);
        let mixed = (next ^ (next >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`.
    pub fn random_below(&self, bound: u64) -> u64 {
        self.random_u64() % bound
    }

    /// True once in `n` times.
    pub fn one_in(&self, n: u64) -> bool {
        self.random_below(n) == 0
    }

    /// A number that is the same for two runs that went the same way: which task ran when, and what was sent.
    pub fn course(&self) -> u64 {
        self.state.course.get()
    }

    pub(super) fn passes(&self, event: u64) {
        let course = (self.state.course.get() ^ event).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.state.course.set(course ^ (course >> 32));
    }

    pub fn now(&self) -> Instant {
        Instant(self.state.now.get())
    }

    pub fn start_process(&self) -> ProcessId {
        let process = ProcessId(self.unique());
        self.state.alive.borrow_mut().insert(process);
        process
    }

    pub fn is_alive(&self, process: ProcessId) -> bool {
        self.state.alive.borrow().contains(&process)
    }

    /// Its tasks end where they stand. Must not be called from one of them.
    pub fn kill(&self, process: ProcessId) {
        self.state.alive.borrow_mut().remove(&process);
        self.state.hosts.forget(process);
        let dead: Vec<_> = {
            let mut tasks = self.state.tasks.borrow_mut();
            let ids: Vec<_> = tasks.iter().filter(|(_, task)| task.0 == process).map(|(id, _)| *id).collect();
            ids.into_iter().filter_map(|id| tasks.remove(&id)).collect()
        };
        // Their destructors may spawn and wake, so nothing is borrowed any more.
        drop(dead);
    }

    pub(super) fn wake_all(&self, tasks: Vec<TaskId>) {
        self.state.ready.lock().expect("no task panics while it wakes another").extend(tasks);
    }

    /// Tasks that wait for something: at rest their number is that of what runs all the time.
    pub fn task_count(&self) -> usize {
        self.state.tasks.borrow().len()
    }

    /// How many there are of each type of task, most first.
    pub fn tasks_by_type(&self) -> Vec<(usize, &'static str)> {
        let mut counts = std::collections::BTreeMap::new();
        self.state.tasks.borrow().values().for_each(|(_, _, name)| *counts.entry(*name).or_insert(0) += 1);
        let mut counts: Vec<_> = counts.into_iter().map(|(name, count)| (count, name)).collect();
        counts.sort_by(|a, b| b.cmp(a));
        counts
    }

    /// Ends every task, so that nothing of the world is left in memory: tasks hold the world that holds them.
    pub fn close(&self) {
        self.state.alive.borrow_mut().clear();
        self.state.network.close();
        loop {
            let tasks = std::mem::take(&mut *self.state.tasks.borrow_mut());
            if tasks.is_empty() {
                return;
            }
            drop(tasks);
        }
    }

    /// Does nothing in a process that was killed.
    pub fn spawn<F: Future<Output = ()> + 'static>(&self, process: ProcessId, task: F) {
        if !self.is_alive(process) {
            return;
        }
        let id = self.unique();
        self.state.tasks.borrow_mut().insert(id, (process, Some(Box::pin(task)), std::any::type_name::<F>()));
        self.state.ready.lock().expect("no task panics while it wakes another").push(id);
    }

    pub fn sleep(&self, wait: Duration) -> impl Future<Output = ()> + 'static {
        Sleep { world: self.clone(), until: self.state.now.get() + wait, timer: None }
    }

    /// Runs the world until `task` is done. Panics, with the seed, when nothing can ever happen again.
    pub fn block_on<T: 'static>(&self, task: impl Future<Output = T> + 'static) -> T {
        let driver = self.start_process();
        let result = Rc::new(RefCell::new(None));
        let slot = result.clone();
        self.spawn(driver, async move {
            let value = task.await;
            *slot.borrow_mut() = Some(value);
        });
        loop {
            if let Some(value) = result.borrow_mut().take() {
                return value;
            }
            assert!(self.step(), "seed {}: deadlock, no task can run and no timer is set", self.state.seed);
        }
    }

    /// Runs one task, or moves the clock to the next timer; false if there is neither.
    fn step(&self) -> bool {
        let next = {
            let mut ready = self.state.ready.lock().expect("no task panics while it wakes another");
            let length = ready.len() as u64;
            (length > 0).then(|| ready.swap_remove(self.random_below(length) as usize))
        };
        match next {
            Some(task) => self.poll(task),
            None => return self.advance(),
        }
        true
    }

    fn poll(&self, id: TaskId) {
        let taken = self.state.tasks.borrow_mut().get_mut(&id).and_then(|(process, task, _)| {
            let stands_still = self.state.hosts.parks(*process, id);
            if stands_still { None } else { task.take() }
        });
        let Some(mut task) = taken else { return };
        self.passes(id);
        let waker = Waker::from(Arc::new(TaskWaker { task: id, ready: self.state.ready.clone() }));
        let done = task.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        let mut tasks = self.state.tasks.borrow_mut();
        if done {
            tasks.remove(&id);
        } else if let Some((_, slot, _)) = tasks.get_mut(&id) {
            *slot = Some(task);
            return;
        }
        drop(tasks);
        drop(task);
    }

    fn advance(&self) -> bool {
        let Some(Reverse((time, timer))) = self.state.timers.borrow_mut().pop() else { return false };
        self.state.now.set(self.state.now.get().max(time));
        self.passes(time.as_nanos() as u64);
        let waker = self.state.timer_wakers.borrow_mut().remove(&timer);
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    fn unique(&self) -> u64 {
        self.state.next.replace(self.state.next.get() + 1)
    }
}

struct Sleep {
    world: World,
    until: Duration,
    timer: Option<u64>,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let state = self.world.state.clone();
        if state.now.get() >= self.until && self.timer.is_some() {
            return Poll::Ready(());
        }
        let timer = match self.timer {
            Some(timer) => timer,
            None => {
                let timer = self.world.unique();
                state.timers.borrow_mut().push(Reverse((self.until, timer)));
                self.timer = Some(timer);
                timer
            }
        };
        state.timer_wakers.borrow_mut().insert(timer, context.waker().clone());
        Poll::Pending
    }
}

impl Drop for Sleep {
    fn drop(&mut self) {
        if let Some(timer) = self.timer {
            self.world.state.timer_wakers.borrow_mut().remove(&timer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order_of(seed: u64) -> Vec<u64> {
        let world = World::new(seed);
        let order = Rc::new(RefCell::new(Vec::new()));
        let process = world.start_process();
        for number in 0..8 {
            let (order, world_here) = (order.clone(), world.clone());
            world.spawn(process, async move {
                world_here.sleep(Duration::from_millis(number % 2)).await;
                order.borrow_mut().push(number);
            });
        }
        let here = world.clone();
        world.block_on(async move { here.sleep(Duration::from_secs(1)).await });
        Rc::try_unwrap(order).unwrap().into_inner()
    }

    #[test]
    fn one_seed_gives_one_order_and_another_seed_another() {
        assert_eq!(order_of(1), order_of(1));
        assert!((2..20).any(|seed| order_of(seed) != order_of(1)));
    }

    #[test]
    fn a_killed_process_does_nothing_more() {
        let world = World::new(1);
        let process = world.start_process();
        let touched = Rc::new(Cell::new(false));
        let (flag, here) = (touched.clone(), world.clone());
        world.spawn(process, async move {
            here.sleep(Duration::from_secs(1)).await;
            flag.set(true);
        });
        let here = world.clone();
        world.block_on(async move {
            here.sleep(Duration::from_millis(1)).await;
            here.kill(process);
            here.sleep(Duration::from_secs(5)).await;
        });
        assert!(!touched.get());
    }
}
