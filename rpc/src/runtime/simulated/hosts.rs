//! What a host does to its processes: they stand still (SIGSTOP, a suspended machine) and go on later, and their clocks
//! are not quite right.

use super::executor::TaskId;
use super::{ProcessId, World};
use crate::runtime::Instant;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

const MILLION: i128 = 1_000_000;
/// A timer that is scaled must not end before its moment on the scaled clock.
const ROUNDED_UP: Duration = Duration::from_micros(1);

#[derive(Default)]
pub(super) struct Hosts {
    /// Those that stand still, and which of their tasks are to run when they go on.
    paused: RefCell<BTreeMap<ProcessId, Vec<TaskId>>>,
    /// By how many millionths a process's clock is too fast.
    drifts: RefCell<BTreeMap<ProcessId, i64>>,
}

impl Hosts {
    pub(super) fn forget(&self, process: ProcessId) {
        self.paused.borrow_mut().remove(&process);
        self.drifts.borrow_mut().remove(&process);
    }

    /// The task's turn came while its process stands still.
    pub(super) fn parks(&self, process: ProcessId, task: TaskId) -> bool {
        match self.paused.borrow_mut().get_mut(&process) {
            Some(parked) => {
                parked.push(task);
                true
            }
            None => false,
        }
    }
}

impl World {
    /// The process stands still: time goes on, messages arrive and wait, nothing of it runs until `resume`.
    pub fn pause(&self, process: ProcessId) {
        if self.is_alive(process) {
            self.state.hosts.paused.borrow_mut().entry(process).or_default();
        }
    }

    pub fn resume(&self, process: ProcessId) {
        let parked = self.state.hosts.paused.borrow_mut().remove(&process);
        self.wake_all(parked.unwrap_or_default());
    }

    /// From its start on, the process's clock is too fast by so many millionths (or too slow).
    pub fn set_drift(&self, process: ProcessId, millionths: i64) {
        self.state.hosts.drifts.borrow_mut().insert(process, millionths);
    }

    fn drift(&self, process: ProcessId) -> i64 {
        self.state.hosts.drifts.borrow().get(&process).copied().unwrap_or_default()
    }

    pub(super) fn local_now(&self, process: ProcessId) -> Instant {
        match self.drift(process) {
            0 => self.now(),
            drift => Instant(scaled(self.now().0, MILLION + i128::from(drift), MILLION)),
        }
    }

    pub(super) fn local_wait(&self, process: ProcessId, wait: Duration) -> Duration {
        match self.drift(process) {
            0 => wait,
            drift => scaled(wait, MILLION, MILLION + i128::from(drift)) + ROUNDED_UP,
        }
    }
}

fn scaled(duration: Duration, by: i128, of: i128) -> Duration {
    Duration::from_nanos((duration.as_nanos() as i128 * by / of) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::Clock;
    use crate::runtime::simulated::Here;
    use std::cell::Cell;
    use std::rc::Rc;

    #[test]
    fn a_paused_process_does_nothing_until_it_goes_on_and_then_all_it_missed() {
        let world = World::new(1);
        let process = world.start_process();
        let turns = Rc::new(Cell::new(0));
        let (count, here) = (turns.clone(), world.clone());
        world.spawn(process, async move {
            loop {
                here.sleep(Duration::from_secs(1)).await;
                count.set(count.get() + 1);
            }
        });
        let here = world.clone();
        world.block_on(async move {
            here.sleep(Duration::from_millis(2500)).await;
            here.pause(process);
            here.sleep(Duration::from_secs(10)).await;
            assert_eq!(turns.get(), 2);
            here.resume(process);
            here.sleep(Duration::from_millis(1500)).await;
            assert_eq!(turns.get(), 4);
        });
    }

    #[test]
    fn a_clock_that_is_too_fast_ends_its_waits_early_and_none_ends_before_its_own_time() {
        let world = World::new(1);
        let process = world.start_process();
        world.set_drift(process, 1000);
        let (host, here) = (Here { world: world.clone(), process }, world.clone());
        world.block_on(async move {
            let (began, began_there) = (here.now(), host.now());
            host.sleep(Duration::from_secs(1000)).await;
            let passed = here.now().since(began);
            assert!(passed > Duration::from_secs(998) && passed < Duration::from_secs(1000), "{passed:?}");
            assert!(host.now().since(began_there) >= Duration::from_secs(1000));
        });
    }
}
