//! Waiting for a state to change: whoever changes it wakes all, and each looks again.

use std::cell::{Cell, RefCell};
use std::task::{Poll, Waker};

#[derive(Default)]
pub struct Notify {
    changes: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Notify {
    pub fn wake_all(&self) {
        self.changes.set(self.changes.get() + 1);
        for waker in self.waiting.take() {
            waker.wake();
        }
    }

    /// Returns once `ready` gives something; it is asked now and after every change.
    pub async fn until<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        let mut seen = None;
        std::future::poll_fn(|context| {
            if seen != Some(self.changes.get()) {
                seen = Some(self.changes.get());
                if let Some(value) = ready() {
                    return Poll::Ready(value);
                }
            }
            self.waiting.borrow_mut().push(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn a_waiter_looks_again_after_every_change() {
        let (notify, value) = (Notify::default(), Cell::new(0));
        let mut waiter = Box::pin(notify.until(|| (value.get() == 2).then_some("two")));
        for next in 0..2 {
            value.set(next);
            notify.wake_all();
            assert_eq!(waiter.as_mut().now_or_never(), None);
        }
        value.set(2);
        notify.wake_all();
        assert_eq!(waiter.now_or_never(), Some("two"));
    }
}
