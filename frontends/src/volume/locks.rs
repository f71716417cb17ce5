//! Block ranges under way. A write holds its range from before it draws its version until every replica has it, so
//! that versions of one block are given in arrival order; a read waits for what was there before it and holds nothing
//! (protocol rule 6: reads that overlap an own write in flight would go new, then old).
//!
//! First come, first served among those that overlap. A handful of ranges is under way at a time, so they are a list.

use std::cell::RefCell;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

#[derive(Clone, Default)]
pub struct RangeLocks {
    state: Rc<RefCell<State>>,
}

#[derive(Default)]
struct State {
    next_ticket: u64,
    /// In order of arrival.
    entries: Vec<Entry>,
}

struct Entry {
    ticket: u64,
    blocks: Range<u64>,
    waker: Option<Waker>,
}

impl State {
    fn is_first(&self, ticket: u64, blocks: &Range<u64>) -> bool {
        let mut earlier = self.entries.iter().take_while(|entry| entry.ticket != ticket);
        !earlier.any(|entry| entry.blocks.start < blocks.end && blocks.start < entry.blocks.end)
    }
}

impl RangeLocks {
    /// The place in the queue is taken now, not when the future is first polled.
    pub fn lock(&self, blocks: Range<u64>) -> Acquire {
        Acquire { guard: Some(self.enter(blocks)) }
    }

    /// Waits until every overlapping lock that was asked for before is gone.
    pub async fn passed(&self, blocks: Range<u64>) {
        let clear = {
            let state = self.state.borrow();
            !state.entries.iter().any(|entry| entry.blocks.start < blocks.end && blocks.start < entry.blocks.end)
        };
        if !clear {
            drop(self.lock(blocks).await);
        }
    }

    fn enter(&self, blocks: Range<u64>) -> Guard {
        let mut state = self.state.borrow_mut();
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.entries.push(Entry { ticket, blocks: blocks.clone(), waker: None });
        Guard { locks: self.clone(), ticket, blocks }
    }
}

pub struct Acquire {
    guard: Option<Guard>,
}

impl Future for Acquire {
    type Output = Guard;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Guard> {
        let guard = self.guard.take().expect("a future is not polled after it was ready");
        let locks = guard.locks.clone();
        let mut state = locks.state.borrow_mut();
        if state.is_first(guard.ticket, &guard.blocks) {
            return Poll::Ready(guard);
        }
        let entry = state.entries.iter_mut().find(|entry| entry.ticket == guard.ticket);
        entry.expect("a guard's entry is there until it is dropped").waker = Some(context.waker().clone());
        drop(state);
        self.guard = Some(guard);
        Poll::Pending
    }
}

/// Held, or waiting to be; dropping it lets the next ones go.
pub struct Guard {
    locks: RangeLocks,
    ticket: u64,
    blocks: Range<u64>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut state = self.locks.state.borrow_mut();
        state.entries.retain(|entry| entry.ticket != self.ticket);
        let blocks = &self.blocks;
        let overlapping =
            state.entries.iter_mut().filter(|entry| entry.blocks.start < blocks.end && blocks.start < entry.blocks.end);
        let wakers: Vec<_> = overlapping.filter_map(|entry| entry.waker.take()).collect();
        drop(state);
        for waker in wakers {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn overlapping_ranges_are_held_in_the_order_they_were_asked_for() {
        let locks = RangeLocks::default();
        let first = locks.lock(0..4).now_or_never().unwrap();
        let mut second = locks.lock(3..6);
        let mut third = locks.lock(5..9);
        let elsewhere = locks.lock(100..101).now_or_never();
        assert!(elsewhere.is_some());
        assert!((&mut second).now_or_never().is_none());
        assert!((&mut third).now_or_never().is_none(), "it came after the second, which it overlaps");
        drop(first);
        let second = (&mut second).now_or_never().unwrap();
        assert!((&mut third).now_or_never().is_none());
        drop(second);
        assert!(third.now_or_never().is_some());
    }

    #[test]
    fn a_waiter_that_gives_up_blocks_nobody() {
        let locks = RangeLocks::default();
        let first = locks.lock(0..4).now_or_never().unwrap();
        let second = locks.lock(0..4);
        let third = locks.lock(0..4);
        drop(second);
        drop(first);
        assert!(third.now_or_never().is_some());
    }

    #[test]
    fn a_read_waits_for_the_write_before_it_and_holds_up_none_after_it() {
        let locks = RangeLocks::default();
        let write = locks.lock(0..4).now_or_never().unwrap();
        let mut read = Box::pin(locks.passed(3..4));
        assert!((&mut read).now_or_never().is_none());
        drop(write);
        assert!(read.now_or_never().is_some());
        assert!(locks.lock(0..4).now_or_never().is_some());
    }
}
