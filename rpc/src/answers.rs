//! Who waits for the answers of one connection. A place is used again for another request, so that waiting allocates
//! nothing; there are as many as requests were ever outstanding at once.

use crate::error::LinkError;
use crate::message::Reply;
use bytes::Bytes;
use std::cell::RefCell;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

pub type Answered = Result<(Reply, Bytes), LinkError>;

#[derive(Default)]
pub struct Answers {
    places: RefCell<Places>,
}

#[derive(Default)]
struct Places {
    all: Vec<Place>,
    free: Vec<u32>,
    /// Requests so far, from zero again after the last.
    requests: u32,
    /// Neither answered nor failed, whether or not somebody waits.
    outstanding: usize,
}

struct Place {
    /// Of the request it is, or was last, used for.
    id: u64,
    since_tick: u32,
    state: State,
}

enum State {
    Free,
    Waiting(Option<Waker>),
    /// Nobody waits any more; the answer is still to come.
    Abandoned,
    Answered(Answered),
}

impl Places {
    /// Which place it is stands in the low half of an id; the other tells the requests that used it apart.
    fn of(&mut self, id: u64) -> Option<&mut Place> {
        self.all.get_mut(id as u32 as usize).filter(|place| place.id == id)
    }

    fn free(&mut self, id: u64) {
        self.all[id as u32 as usize].state = State::Free;
        self.free.push(id as u32);
    }

    fn is_outstanding(place: &Place) -> bool {
        matches!(place.state, State::Waiting(_) | State::Abandoned)
    }
}

impl Answers {
    /// A new request's id.
    pub fn expect(&self, tick: u32) -> u64 {
        let mut places = self.places.borrow_mut();
        let index = places.free.pop().unwrap_or_else(|| {
            places.all.push(Place { id: 0, since_tick: 0, state: State::Free });
            places.all.len() as u32 - 1
        });
        let id = u64::from(places.requests) << 32 | u64::from(index);
        places.requests = places.requests.wrapping_add(1);
        places.outstanding += 1;
        places.all[index as usize] = Place { id, since_tick: tick, state: State::Waiting(None) };
        id
    }

    /// Does nothing if the request failed before.
    pub fn answer(&self, id: u64, answered: Answered) {
        let waker = {
            let mut places = self.places.borrow_mut();
            let Some(place) = places.of(id).filter(|place| Places::is_outstanding(place)) else { return };
            let before = std::mem::replace(&mut place.state, State::Answered(answered));
            places.outstanding -= 1;
            match before {
                State::Waiting(waker) => waker,
                _ => {
                    places.free(id);
                    None
                }
            }
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Every request that is outstanding for longer than `ticks` fails, with an error that is told for how many.
    pub fn fail_overdue(&self, tick: u32, ticks: u32, error: impl Fn(u32) -> LinkError) {
        let waited = |place: &Place| tick - place.since_tick;
        let is_overdue = |place: &&Place| Places::is_outstanding(place) && waited(place) > ticks;
        let overdue: Vec<_> = {
            let places = self.places.borrow();
            places.all.iter().filter(is_overdue).map(|place| (place.id, waited(place))).collect()
        };
        overdue.into_iter().for_each(|(id, waited)| self.answer(id, Err(error(waited))));
    }

    pub fn fail_all(&self, error: &LinkError) {
        let outstanding: Vec<_> = {
            let places = self.places.borrow();
            places.all.iter().filter(|place| Places::is_outstanding(place)).map(|place| place.id).collect()
        };
        outstanding.into_iter().for_each(|id| self.answer(id, Err(error.clone())));
    }

    pub fn outstanding(&self) -> usize {
        self.places.borrow().outstanding
    }

    /// To be waited for by one.
    pub fn wait(self: &Rc<Self>, id: u64) -> Waiting {
        Waiting { answers: self.clone(), id }
    }
}

/// Until the answer is there; dropping it abandons the waiting.
pub struct Waiting {
    answers: Rc<Answers>,
    id: u64,
}

impl Future for Waiting {
    type Output = Answered;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Answered> {
        let mut places = self.answers.places.borrow_mut();
        let place = places.of(self.id).expect("a place is kept for who waits");
        if let State::Waiting(waker) = &mut place.state {
            if !waker.as_ref().is_some_and(|waker| waker.will_wake(context.waker())) {
                *waker = Some(context.waker().clone());
            }
            return Poll::Pending;
        }
        match std::mem::replace(&mut place.state, State::Free) {
            State::Answered(answered) => {
                places.free(self.id);
                Poll::Ready(answered)
            }
            _ => unreachable!("a future is not polled after it was ready"),
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut places = self.answers.places.borrow_mut();
        let Some(place) = places.of(self.id) else { return };
        match place.state {
            State::Waiting(_) => place.state = State::Abandoned,
            State::Answered(_) => places.free(self.id),
            State::Free | State::Abandoned => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Answer;
    use futures::FutureExt;

    fn answered() -> Answered {
        Ok((Reply::of(Answer::Written), Bytes::new()))
    }

    fn gone() -> LinkError {
        LinkError::Closed { address: "a".to_string(), because: "it is gone".to_string() }
    }

    #[test]
    fn each_waits_for_its_own_answer_and_places_are_used_again() {
        let answers = Rc::<Answers>::default();
        for _ in 0..3 {
            let ids = [answers.expect(0), answers.expect(0)];
            let [mut first, second] = ids.map(|id| answers.wait(id));
            answers.answer(ids[1], answered());
            assert_eq!((&mut first).now_or_never(), None);
            assert_eq!(second.now_or_never(), Some(answered()));
            answers.answer(ids[0], answered());
            assert_eq!(first.now_or_never(), Some(answered()));
        }
        assert_eq!((answers.outstanding(), answers.places.borrow().all.len()), (0, 2));
    }

    #[test]
    fn an_answer_that_comes_after_its_request_failed_is_not_taken_for_anothers() {
        let answers = Rc::<Answers>::default();
        let (late, other) = (answers.expect(0), answers.expect(9));
        let waiting = answers.wait(late);
        answers.fail_overdue(11, 10, |_| gone());
        assert_eq!(waiting.now_or_never(), Some(Err(gone())));
        let next = answers.expect(11);
        assert_eq!(next as u32, late as u32, "it has the same place");
        answers.answer(late, answered());
        assert_eq!(answers.wait(next).now_or_never(), None);
        assert_eq!(answers.wait(other).now_or_never(), None);
    }

    #[test]
    fn what_nobody_waits_for_is_outstanding_until_it_is_answered() {
        let answers = Rc::<Answers>::default();
        let (first, second) = (answers.expect(0), answers.expect(0));
        drop((answers.wait(first), answers.wait(second)));
        assert_eq!(answers.outstanding(), 2);
        answers.answer(first, answered());
        assert_eq!(answers.outstanding(), 1);
        answers.fail_all(&gone());
        assert_eq!((answers.outstanding(), answers.places.borrow().free.len()), (0, 2));
    }
}
