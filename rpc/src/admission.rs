//! What a shard may have under way: of one connection, and of all together, reads and the rest apart. Whoever waits
//! here is not read from, or is a caller on the shard's own executor that waits its turn.
//!
//! A connection with nothing else under way may always have one request: others cannot keep it out, and since no request
//! that was let in waits for one that was not, all come to their turn.

use crate::message::Operation;
use crate::notify::Notify;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::task::{Poll, Waker};
use torus_schema::limits::{
    BLOCK_BYTES, BLOCKS_PER_FRAME_MAX, CONNECTION_BYTES_MAX, CONNECTION_REQUESTS_MAX, SHARD_OUTSTANDING_BYTES_MAX,
    SHARD_REQUESTS_MAX,
};

/// Of one shard.
#[derive(Default)]
pub struct Admission {
    lanes: [Lane; 2],
}

#[derive(Default)]
struct Lane {
    requests: Cell<usize>,
    bytes: Cell<usize>,
    released: Notify,
}

impl Lane {
    fn has_room(&self, bytes: usize) -> bool {
        self.requests.get() < SHARD_REQUESTS_MAX && self.bytes.get() + bytes <= SHARD_OUTSTANDING_BYTES_MAX as usize
    }
}

impl Admission {
    /// Requests that were let in and are not answered yet.
    pub fn requests(&self) -> usize {
        self.lanes.iter().map(|lane| lane.requests.get()).sum()
    }
}

/// Bytes of memory the request may take until it is answered.
pub fn cost(frame_bytes: usize, operation: &Operation) -> usize {
    let answered_blocks = match operation {
        Operation::Read { count, .. } => u64::from(*count).min(BLOCKS_PER_FRAME_MAX),
        _ => 0,
    };
    frame_bytes + (answered_blocks * BLOCK_BYTES) as usize
}

/// Of one connection.
pub struct Entrance {
    shard: Rc<Admission>,
    requests: Cell<usize>,
    bytes: Cell<usize>,
    /// The one who enters, or waits for the end.
    waiting: RefCell<Option<Waker>>,
}

impl Entrance {
    pub fn new(shard: Rc<Admission>) -> Rc<Self> {
        Rc::new(Self { shard, requests: Cell::new(0), bytes: Cell::new(0), waiting: RefCell::default() })
    }

    /// Waits until there is room, of this connection's and of the shard's. For one at a time.
    pub async fn enter(self: &Rc<Self>, operation: &Operation, bytes: usize) -> Admitted {
        self.wait(|entrance| entrance.has_room(bytes)).await;
        let mut admitted = self.reserve(operation, bytes);
        let lane = &self.shard.lanes[admitted.lane];
        if !lane.has_room(bytes) {
            lane.released.until(|| (lane.has_room(bytes) || self.requests.get() <= 1).then_some(())).await;
        }
        admitted.let_in();
        admitted
    }

    /// The same without waiting: only if there is room now.
    pub fn enter_now(self: &Rc<Self>, operation: &Operation, bytes: usize) -> Option<Admitted> {
        let lane = &self.shard.lanes[lane_of(operation)];
        if !self.has_room(bytes) || !(lane.has_room(bytes) || self.requests.get() == 0) {
            return None;
        }
        let mut admitted = self.reserve(operation, bytes);
        admitted.let_in();
        Some(admitted)
    }

    /// Until nothing is under way.
    pub async fn idle(&self) {
        self.wait(|entrance| entrance.requests.get() == 0).await;
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.requests.get() == 0
            || self.requests.get() < CONNECTION_REQUESTS_MAX
                && self.bytes.get() + bytes <= CONNECTION_BYTES_MAX as usize
    }

    fn reserve(self: &Rc<Self>, operation: &Operation, bytes: usize) -> Admitted {
        self.requests.set(self.requests.get() + 1);
        self.bytes.set(self.bytes.get() + bytes);
        Admitted { entrance: self.clone(), lane: lane_of(operation), bytes, is_in: false }
    }

    async fn wait(&self, until: impl Fn(&Self) -> bool) {
        std::future::poll_fn(|context| {
            if until(self) {
                return Poll::Ready(());
            }
            *self.waiting.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

fn lane_of(operation: &Operation) -> usize {
    usize::from(matches!(operation, Operation::Read { .. } | Operation::Map { .. }))
}

/// A request that was let in, until it is dropped.
pub struct Admitted {
    entrance: Rc<Entrance>,
    lane: usize,
    bytes: usize,
    is_in: bool,
}

impl Admitted {
    fn lane(&self) -> &Lane {
        &self.entrance.shard.lanes[self.lane]
    }

    fn let_in(&mut self) {
        let lane = self.lane();
        lane.requests.set(lane.requests.get() + 1);
        lane.bytes.set(lane.bytes.get() + self.bytes);
        self.is_in = true;
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let Entrance { requests, bytes, waiting, .. } = &*self.entrance;
        requests.set(requests.get() - 1);
        bytes.set(bytes.get() - self.bytes);
        if self.is_in {
            let lane = self.lane();
            lane.requests.set(lane.requests.get() - 1);
            lane.bytes.set(lane.bytes.get() - self.bytes);
            lane.released.notify();
        }
        if let Some(waker) = waiting.take() {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use torus_schema::ids::BlockIndex;

    fn read() -> Operation {
        Operation::Read { first: BlockIndex(0), count: 1 }
    }

    fn full(shard: &Rc<Admission>) -> Vec<Admitted> {
        let mut all = Vec::new();
        while shard.lanes[1].has_room(0) {
            let entrance = Entrance::new(shard.clone());
            all.extend((0..CONNECTION_REQUESTS_MAX).map_while(|_| entrance.enter_now(&read(), 0)));
        }
        all
    }

    #[test]
    fn a_connection_has_bounded_requests_and_bytes_under_way() {
        let entrance = Entrance::new(Rc::default());
        let first = entrance.enter_now(&Operation::Flush, CONNECTION_BYTES_MAX as usize + 1);
        assert!(first.is_some(), "alone it may be of any size");
        assert!(entrance.enter_now(&Operation::Flush, 0).is_none());
        let mut waiting = Box::pin(entrance.enter(&Operation::Flush, 7));
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(first);
        let second = waiting.now_or_never().expect("there is room");
        assert!(entrance.idle().now_or_never().is_none());
        drop(second);
        assert!(entrance.idle().now_or_never().is_some());
        assert_eq!((entrance.bytes.get(), entrance.shard.requests()), (0, 0));
    }

    #[test]
    fn a_full_shard_lets_in_one_request_of_a_connection_that_has_none_and_writes_beside_reads() {
        let shard = Rc::<Admission>::default();
        let mut others = full(&shard);
        assert_eq!(shard.requests(), SHARD_REQUESTS_MAX);
        let entrance = Entrance::new(shard.clone());
        let first = entrance.enter_now(&read(), 4096).expect("it has nothing under way");
        assert!(entrance.enter_now(&read(), 4096).is_none());
        let write = entrance.enter_now(&Operation::Flush, 0).expect("reads do not keep out the rest");
        let another = read();
        let mut waiting = Box::pin(entrance.enter(&another, 4096));
        assert!(waiting.as_mut().now_or_never().is_none());
        // As many as were let in above the bound.
        others.truncate(others.len() - 2);
        assert!(waiting.now_or_never().is_some());
        drop((first, write, others));
        assert_eq!(shard.requests(), 0);
    }

    #[test]
    fn who_gives_up_waiting_leaves_nothing_behind() {
        let shard = Rc::<Admission>::default();
        let others = full(&shard);
        let entrance = Entrance::new(shard.clone());
        let first = entrance.enter_now(&read(), 0);
        let another = read();
        let mut waiting = Box::pin(entrance.enter(&another, 9));
        assert!(waiting.as_mut().now_or_never().is_none());
        drop(waiting);
        drop((first, others));
        assert_eq!((entrance.requests.get(), entrance.bytes.get(), shard.requests()), (0, 0, 0));
    }
}
