//! The answer to one append: who makes it and who waits for it share a piece of memory, which is used again.

use super::{Eras, UnderWay};
use crate::shard::course::Span;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Poll, Waker};
use torus_rpc::message::Refusal;

/// Appends that end at once: more than these take memory anew.
const SPARE_MAX: usize = 1024;

/// What appends that have ended leave for the next.
#[derive(Default)]
pub struct Spare(RefCell<Vec<Rc<Group>>>);

impl Spare {
    fn take(&self, new: Group) -> Rc<Group> {
        let mut spare = self.0.borrow_mut().pop();
        match spare.as_mut().and_then(Rc::get_mut) {
            Some(group) => *group = new,
            None => return Rc::new(new),
        }
        spare.expect("it was just filled")
    }

    /// If nobody else has it.
    fn give(&self, group: &Rc<Group>) {
        let mut spare = self.0.borrow_mut();
        if Rc::strong_count(group) == 1 && spare.len() < SPARE_MAX {
            spare.push(group.clone());
        }
    }
}

/// What all pieces of one append, and whoever waits for it, have in common.
struct Group {
    /// That are not applied yet.
    left: Cell<usize>,
    /// That may still be.
    held: Cell<usize>,
    /// Of the pieces that are applied.
    disk: Cell<Option<Span>>,
    /// The first counts.
    answer: RefCell<Option<Result<Span, Refusal>>>,
    waiter: RefCell<Option<Waker>>,
    under_way: RefCell<Option<UnderWay>>,
}

/// The answer to an append, or to a part of it, when all parts are applied. One that is dropped says that it never will.
pub struct Piece(Rc<Group>);

impl Piece {
    pub(super) fn new(eras: &Rc<Eras>, spare: &Rc<Spare>) -> (Self, Waiting) {
        let group = spare.take(Group {
            left: Cell::new(1),
            held: Cell::new(1),
            disk: Cell::default(),
            answer: RefCell::default(),
            waiter: RefCell::default(),
            under_way: RefCell::new(Some(eras.enter())),
        });
        (Self(group.clone()), Waiting { group, spare: spare.clone() })
    }

    pub(super) fn another(&self) -> Self {
        self.0.left.update(|left| left + 1);
        self.0.held.update(|held| held + 1);
        Self(self.0.clone())
    }

    /// True with the last piece.
    pub fn done(&self, disk: Span) -> bool {
        let disk = disk.and(self.0.disk.get());
        self.0.disk.set(Some(disk));
        self.0.left.update(|left| left - 1);
        let last = self.0.left.get() == 0;
        if last {
            self.answer(Ok(disk));
        }
        last
    }

    /// Nobody may be waiting any more; what was submitted happens all the same.
    pub fn answer(&self, result: Result<Span, Refusal>) {
        self.0.answer.borrow_mut().get_or_insert(result);
        if let Some(waiter) = self.0.waiter.take() {
            waiter.wake();
        }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.0.held.update(|held| held - 1);
        if self.0.held.get() == 0 {
            self.0.under_way.take();
            if self.0.answer.borrow().is_none() {
                self.answer(Err(Refusal::Disk { because: "the shard stopped".to_string() }));
            }
        }
    }
}

/// What an append waits for.
pub struct Waiting {
    group: Rc<Group>,
    spare: Rc<Spare>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.spare.give(&self.group);
    }
}

impl Waiting {
    /// When the disk was at work for it.
    pub async fn done(self) -> Result<Span, Refusal> {
        std::future::poll_fn(|context| {
            if let Some(answer) = self.group.answer.take() {
                return Poll::Ready(answer);
            }
            *self.group.waiter.borrow_mut() = Some(context.waker().clone());
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
    fn what_one_append_shared_is_shared_by_the_next_once_nobody_has_it() {
        let (eras, spare) = (Rc::<Eras>::default(), Rc::<Spare>::default());
        let (piece, waiting) = Piece::new(&eras, &spare);
        let first = Rc::as_ptr(&waiting.group);
        let (other, others) = Piece::new(&eras, &spare);
        assert_ne!(Rc::as_ptr(&others.group), first, "the first is in use");
        drop(others);
        assert!(spare.0.borrow().is_empty(), "what makes the answer still has it");
        assert!(piece.done(Span::default()));
        drop((piece, other));
        assert!(matches!(waiting.done().now_or_never(), Some(Ok(_))));
        let (piece, waiting) = Piece::new(&eras, &spare);
        assert_eq!(Rc::as_ptr(&waiting.group), first);
        drop(piece);
        assert!(
            matches!(waiting.done().now_or_never(), Some(Err(Refusal::Disk { .. }))),
            "nothing of the first is left"
        );
        assert!(eras.passed(eras.begin()), "and nothing is under way");
    }
}
