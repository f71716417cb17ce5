//! Wakes an executor that sleeps though it has work.
//!
//! On a machine loaded for minutes, executors were seen asleep in io_uring with their own timers long due and other
//! threads' wake-ups unanswered; they went on at the first signal that reached them (attaching a debugger was enough).
//! So a thread beside each executor looks once a second whether it has turned since, and sends it a signal that does
//! nothing but end the system call it is in. An idle executor turns by its ticks, so that only a stuck one is kicked.

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Many ticks of an idle executor, and well below every deadline.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Used for nothing else here; without a handler it would be ignored and interrupt nothing.
const SIGNAL: Signal = Signal::SIGURG;

/// Ends with its drop.
pub struct Watchdog {
    turns: Arc<AtomicU64>,
    ends: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Watchdog {
    /// Watches the calling thread.
    pub fn new(name: &str) -> std::io::Result<Self> {
        install_handler()?;
        let turns = Arc::new(AtomicU64::new(0));
        let (ends, ended) = channel();
        // SAFETY: has no preconditions.
        let watched = unsafe { libc::pthread_self() };
        let (seen_turns, name) = (turns.clone(), name.to_string());
        let thread = std::thread::Builder::new().name("watchdog".to_string()).spawn(move || {
            let mut seen = None;
            while ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                let now = seen_turns.load(Ordering::Relaxed);
                if seen.replace(now) == Some(now) {
                    tracing::warn!(executor = name, "has not turned for a second: woken by a signal");
                    // SAFETY: the watched thread is alive, since it waits for this one in the drop below.
                    unsafe { libc::pthread_kill(watched, SIGNAL as libc::c_int) };
                }
            }
        })?;
        Ok(Self { turns, ends: Some(ends), thread: Some(thread) })
    }

    /// Counts the turns of the executor: to be increased whenever it turns.
    pub fn turns(&self) -> Arc<AtomicU64> {
        self.turns.clone()
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.ends = None;
        // It only panics with the logger, and then there is nothing left to do.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

extern "C" fn nothing(_: libc::c_int) {}

fn install_handler() -> std::io::Result<()> {
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, so that it may run anywhere.
    unsafe { sigaction(SIGNAL, &action) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    #[test]
    fn a_thread_that_sleeps_in_the_kernel_without_turning_is_woken() {
        let _watchdog = Watchdog::new("test").unwrap();
        // SAFETY: nothing is polled, for no time limit.
        let result = unsafe { libc::poll(std::ptr::null_mut(), 0, -1) };
        assert_eq!((result, std::io::Error::last_os_error().kind()), (-1, std::io::ErrorKind::Interrupted));
    }
}
