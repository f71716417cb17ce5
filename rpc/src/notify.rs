//! Waiting for a state to change: whoever changes it wakes all, and each looks again.
//!
//! A waiter has one place however often it is polled: a list that only grew would, in a `select` beside something
//! busy, hold ever more clones of one waker (and glommio ends the process at 32,768 of them).

use std::cell::{Cell, RefCell};
use std::task::{Poll, Waker};

#[derive(Default)]
pub struct Notify {
    changes: Cell<u64>,
    /// A place for each waiter; `None`: it has been woken, or the place is free.
    waiting: RefCell<Vec<Option<Waker>>>,
    free: RefCell<Vec<usize>>,
}

impl Notify {
    pub fn notify(&self) {
        self.changes.set(self.changes.get() + 1);
        // One after the other, and not borrowed while one is woken: a list of them would be made with every change.
        let places = self.waiting.borrow().len();
        for place in 0..places {
            let waker = self.waiting.borrow_mut()[place].take();
            if let Some(waker) = waker {
                waker.wake();
            }
        }
    }

    /// Returns once `ready` gives something; it is asked now and after every change.
    pub async fn until<T>(&self, mut ready: impl FnMut() -> Option<T>) -> T {
        if let Some(value) = ready() {
            return value;
        }
        let mut seen = self.changes.get();
        let place = self.enter();
        std::future::poll_fn(|context| {
            if seen != self.changes.get() {
                seen = self.changes.get();
                if let Some(value) = ready() {
                    return Poll::Ready(value);
                }
            }
            let slot = &mut self.waiting.borrow_mut()[place.index];
            if !slot.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                *slot = Some(context.waker().clone());
            }
            Poll::Pending
        })
        .await
    }

    fn enter(&self) -> Place<'_> {
        let index = self.free.borrow_mut().pop().unwrap_or_else(|| {
            self.waiting.borrow_mut().push(None);
            self.waiting.borrow().len() - 1
        });
        Place { notify: self, index }
    }
}

struct Place<'a> {
    notify: &'a Notify,
    index: usize,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.notify.waiting.borrow_mut()[self.index] = None;
        self.notify.free.borrow_mut().push(self.index);
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
            notify.notify();
            assert_eq!(waiter.as_mut().now_or_never(), None);
        }
        value.set(2);
        notify.notify();
        assert_eq!(waiter.now_or_never(), Some("two"));
    }

    #[test]
    fn a_waiter_keeps_one_place_however_often_it_is_polled() {
        let notify = Notify::default();
        let mut waiter = Box::pin(notify.until(|| None::<()>));
        for _ in 0..100 {
            assert_eq!(waiter.as_mut().now_or_never(), None);
        }
        assert_eq!(notify.waiting.borrow().len(), 1);
        drop(waiter);
        let next = Box::pin(notify.until(|| None::<()>));
        assert_eq!(next.now_or_never(), None);
        assert_eq!(notify.waiting.borrow().len(), 1, "the place was not given back");
    }
}
