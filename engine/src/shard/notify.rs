//! Wakes all who wait for the shard's state to change; each looks again for itself.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::task::{Poll, Waker};

#[derive(Default)]
pub struct Notify {
    changes: Cell<u64>,
    waiting: RefCell<Vec<Waker>>,
}

impl Notify {
    pub fn notify(&self) {
        self.changes.set(self.changes.get() + 1);
        // A waker may run anything, so nothing is borrowed while it is called.
        let waiting = std::mem::take(&mut *self.waiting.borrow_mut());
        waiting.into_iter().for_each(Waker::wake);
    }

    /// Until `done` gives something. It is asked first, and again after each change.
    pub async fn until<T>(&self, mut done: impl FnMut() -> Option<T>) -> T {
        loop {
            let seen = self.changes.get();
            if let Some(result) = done() {
                return result;
            }
            poll_fn(|context| {
                if self.changes.get() != seen {
                    return Poll::Ready(());
                }
                self.waiting.borrow_mut().push(context.waker().clone());
                Poll::Pending
            })
            .await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn a_change_between_asking_and_waiting_is_not_missed() {
        let (notify, value) = (Notify::default(), Cell::new(0));
        let mut waiting = Box::pin(notify.until(|| (value.get() == 2).then_some("done")));
        assert_eq!((&mut waiting).now_or_never(), None);
        value.set(1);
        notify.notify();
        assert_eq!((&mut waiting).now_or_never(), None);
        value.set(2);
        notify.notify();
        assert_eq!((&mut waiting).now_or_never(), Some("done"));
    }
}
