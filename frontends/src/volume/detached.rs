//! A request that runs to its end in a task of its own, and who waits for that: they share one piece of memory.

use super::course::Course;
use crate::device::VolumeError;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::{Poll, Waker};

type Done = Result<(), VolumeError>;

pub struct Detached {
    pub course: Course,
    result: RefCell<Option<Done>>,
    is_told: Cell<bool>,
    waiter: RefCell<Option<Waker>>,
}

/// The task's handle: who waits hears that it was dropped, if it comes to no other end.
pub struct Task(pub Rc<Detached>);

impl Detached {
    pub fn new(course: Course) -> Rc<Self> {
        let (result, is_told, waiter) = (RefCell::default(), Cell::new(false), RefCell::default());
        Rc::new(Self { course, result, is_told, waiter })
    }

    /// For one waiter, once.
    pub async fn done(&self) -> Done {
        poll_fn(|context| match self.result.take() {
            Some(result) => Poll::Ready(result),
            None => {
                *self.waiter.borrow_mut() = Some(context.waker().clone());
                Poll::Pending
            }
        })
        .await
    }
}

impl Task {
    /// The first that is told counts.
    pub fn tell(&self, result: Done) {
        if self.0.is_told.replace(true) {
            return;
        }
        *self.0.result.borrow_mut() = Some(result);
        if let Some(waiter) = self.0.waiter.take() {
            waiter.wake();
        }
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if !self.0.is_told.get() {
            self.tell(Err(VolumeError::SessionEnded { because: "the process ends".to_string() }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[test]
    fn who_waits_hears_the_first_result_or_that_there_will_be_none() {
        let request = Detached::new(Course::default());
        let task = Task(request.clone());
        let mut waiting = Box::pin(request.done());
        assert_eq!((&mut waiting).now_or_never(), None);
        task.tell(Err(VolumeError::TimedOut { waited_ms: 1 }));
        task.tell(Ok(()));
        drop(task);
        assert_eq!(waiting.now_or_never(), Some(Err(VolumeError::TimedOut { waited_ms: 1 })));
        let request = Detached::new(Course::default());
        drop(Task(request.clone()));
        assert!(matches!(request.done().now_or_never(), Some(Err(VolumeError::SessionEnded { .. }))));
    }
}
