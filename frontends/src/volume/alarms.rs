//! Deadlines of which nearly none comes to pass: a read that is answered in time takes its own back. One task sleeps for
//! all of them, for as long as there are any: a timer of the executor for each would be made and taken down with
//! every read.

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use torus_rpc::runtime::{Class, Clock, Instant, Runtime, Spawn};
use torus_schema::limits::HEDGE_AFTER_MIN;

#[derive(Default)]
pub struct Alarms {
    /// A place for each that is set; they are used again.
    places: RefCell<Vec<Place>>,
    free: RefCell<Vec<usize>>,
    is_watched: Cell<bool>,
}

enum Place {
    Free,
    Set { at: Instant, waker: Option<Waker> },
    Rung,
}

impl Alarms {
    /// Rings at that time, which is no sooner than `HEDGE_AFTER_MIN` from now.
    pub fn set<R: Runtime>(self: &Rc<Self>, runtime: &R, at: Instant) -> Alarm {
        let mut places = self.places.borrow_mut();
        let index = self.free.borrow_mut().pop().unwrap_or_else(|| {
            places.push(Place::Free);
            places.len() - 1
        });
        places[index] = Place::Set { at, waker: None };
        drop(places);
        if !self.is_watched.replace(true) {
            runtime.spawn().spawn(Class::Foreground, watch(self.clone(), runtime.clock().clone()));
        }
        Alarm { alarms: self.clone(), index }
    }

    /// Rings those whose time has come, and says when the next one's has.
    fn ring(&self, now: Instant) -> Option<Instant> {
        let (mut next, mut wakers) = (None::<Instant>, Vec::new());
        for place in self.places.borrow_mut().iter_mut() {
            match place {
                Place::Set { at, waker } if *at <= now => {
                    wakers.extend(waker.take());
                    *place = Place::Rung;
                }
                Place::Set { at, .. } => next = Some(next.map_or(*at, |next| next.min(*at))),
                Place::Free | Place::Rung => {}
            }
        }
        wakers.into_iter().for_each(Waker::wake);
        next
    }
}

/// Ends when none is set. It sleeps no longer than any is set ahead, so that it has seen each before its time.
async fn watch(alarms: Rc<Alarms>, clock: impl Clock) {
    loop {
        let now = clock.now();
        let Some(next) = alarms.ring(now) else { return alarms.is_watched.set(false) };
        clock.sleep(next.since(now).min(HEDGE_AFTER_MIN)).await;
    }
}

/// Until it rings; dropping it takes it back.
pub struct Alarm {
    alarms: Rc<Alarms>,
    index: usize,
}

impl Future for Alarm {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        match &mut self.alarms.places.borrow_mut()[self.index] {
            Place::Set { waker, .. } => {
                if !waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                    *waker = Some(context.waker().clone());
                }
                Poll::Pending
            }
            Place::Rung => Poll::Ready(()),
            Place::Free => unreachable!("its place is kept until it is dropped"),
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.alarms.places.borrow_mut()[self.index] = Place::Free;
        self.alarms.free.borrow_mut().push(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use std::time::Duration;

    const fn ms(milliseconds: u64) -> Instant {
        Instant(Duration::from_millis(milliseconds))
    }

    /// Without the task that watches them.
    fn set(alarms: &Rc<Alarms>, at: Instant) -> Alarm {
        alarms.places.borrow_mut().push(Place::Set { at, waker: None });
        Alarm { alarms: alarms.clone(), index: alarms.places.borrow().len() - 1 }
    }

    #[test]
    fn each_rings_at_its_time_whatever_the_order_in_which_they_were_set() {
        let alarms = Rc::<Alarms>::default();
        let (mut late, mut early) = (set(&alarms, ms(30)), set(&alarms, ms(20)));
        assert_eq!(alarms.ring(ms(19)), Some(ms(20)));
        assert_eq!(((&mut late).now_or_never(), (&mut early).now_or_never()), (None, None));
        assert_eq!(alarms.ring(ms(20)), Some(ms(30)));
        assert_eq!(((&mut late).now_or_never(), early.now_or_never()), (None, Some(())));
        assert_eq!((alarms.ring(ms(31)), late.now_or_never()), (None, Some(())));
    }

    #[test]
    fn one_that_is_taken_back_is_not_waited_for() {
        let alarms = Rc::<Alarms>::default();
        drop(set(&alarms, ms(20)));
        assert_eq!(alarms.ring(ms(1)), None);
        assert_eq!(*alarms.free.borrow(), [0]);
    }
}
