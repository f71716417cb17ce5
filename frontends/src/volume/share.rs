//! What the requests of one volume may take at once, in operations and bytes: who comes when all of it is taken waits
//! for his turn, in the order of coming. Reads and writes have a share each, so that a burst of writes, which waits for
//! every replica, never keeps a read waiting.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Poll, Waker};

pub struct Share {
    operations_max: usize,
    bytes_max: u64,
    operations: Cell<usize>,
    bytes: Cell<u64>,
    next_ticket: Cell<u64>,
    waiting: RefCell<VecDeque<Waiting>>,
}

struct Waiting {
    ticket: u64,
    waker: Option<Waker>,
}

impl Share {
    pub fn new(operations_max: usize, bytes_max: u64) -> Rc<Self> {
        Rc::new(Self {
            operations_max,
            bytes_max,
            operations: Cell::new(0),
            bytes: Cell::new(0),
            next_ticket: Cell::new(0),
            waiting: RefCell::default(),
        })
    }

    /// Whether one that comes now has to wait.
    pub fn is_taken(&self, bytes: u64) -> bool {
        !self.waiting.borrow().is_empty() || !self.fits(bytes)
    }

    /// One that is larger than the whole share is let in alone.
    fn fits(&self, bytes: u64) -> bool {
        let none = self.operations.get() == 0;
        none || self.operations.get() < self.operations_max && self.bytes.get() + bytes <= self.bytes_max
    }

    pub async fn take(self: &Rc<Self>, bytes: u64) -> Taken {
        if self.is_taken(bytes) {
            self.turn(bytes).await;
        }
        self.operations.set(self.operations.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
        Taken { share: self.clone(), bytes }
    }

    async fn turn(self: &Rc<Self>, bytes: u64) {
        let place = Place { share: self, ticket: self.next_ticket.replace(self.next_ticket.get() + 1) };
        self.waiting.borrow_mut().push_back(Waiting { ticket: place.ticket, waker: None });
        std::future::poll_fn(|context| {
            let mut waiting = self.waiting.borrow_mut();
            if waiting.front().is_some_and(|first| first.ticket == place.ticket) && self.fits(bytes) {
                return Poll::Ready(());
            }
            let own = waiting.iter_mut().find(|waiting| waiting.ticket == place.ticket);
            own.expect("it stays until the place is dropped").waker = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
        // Taken before the place is given up, without an await between: the next one counts it.
        drop(place);
    }

    fn wake_first(&self) {
        let waker = self.waiting.borrow_mut().front_mut().and_then(|first| first.waker.take());
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

struct Place<'a> {
    share: &'a Share,
    ticket: u64,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.share.waiting.borrow_mut().retain(|waiting| waiting.ticket != self.ticket);
        // The next one may fit too; it looks when it is polled, after its predecessor has taken its part.
        self.share.wake_first();
    }
}

/// Given back when it is dropped.
pub struct Taken {
    share: Rc<Share>,
    bytes: u64,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.share.operations.set(self.share.operations.get() - 1);
        self.share.bytes.set(self.share.bytes.get() - self.bytes);
        self.share.wake_first();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn what_does_not_fit_waits_in_the_order_of_coming() {
        let share = Share::new(10, 100);
        let first = share.take(60).now_or_never().unwrap();
        let mut large = Box::pin(share.take(60));
        let mut small = Box::pin(share.take(10));
        assert!(large.as_mut().now_or_never().is_none());
        assert!(small.as_mut().now_or_never().is_none(), "it overtook one that came before");
        drop(first);
        let large = large.now_or_never().unwrap();
        let small = small.now_or_never().unwrap();
        assert_eq!((share.operations.get(), share.bytes.get()), (2, 70));
        drop((large, small));
        assert_eq!((share.operations.get(), share.bytes.get()), (0, 0));
    }

    #[test]
    fn operations_are_bounded_too_and_one_too_large_goes_alone() {
        let share = Share::new(2, 100);
        let all = share.take(1000).now_or_never().unwrap();
        assert!(share.take(1).now_or_never().is_none());
        drop(all);
        let (_a, _b) = (share.take(1).now_or_never().unwrap(), share.take(1).now_or_never().unwrap());
        assert!(share.take(1).now_or_never().is_none());
    }

    #[test]
    fn who_gives_up_waiting_does_not_hold_up_the_next() {
        let share = Share::new(1, 100);
        let first = share.take(1).now_or_never().unwrap();
        let mut second = Box::pin(share.take(1));
        let mut third = Box::pin(share.take(1));
        assert!(second.as_mut().now_or_never().is_none() && third.as_mut().now_or_never().is_none());
        drop(second);
        drop(first);
        assert!(third.now_or_never().is_some());
    }
}
