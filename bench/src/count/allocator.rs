//! An allocator that counts, when asked to, what this process allocates, and how much of that is this thread's; or how
//! many bytes are taken.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};

static IS_COUNTING: AtomicBool = AtomicBool::new(false);
static ALL: AtomicU64 = AtomicU64::new(0);
static IS_WEIGHING: AtomicBool = AtomicBool::new(false);
/// Taken since `start_bytes`, less what was given back.
static BYTES: AtomicI64 = AtomicI64::new(0);
/// glibc keeps the length in front of each piece.
const OVERHEAD_BYTES: i64 = 8;

thread_local! {
    // Const and without a destructor: reaching it allocates nothing.
    static OWN: Cell<u64> = const { Cell::new(0) };
}

/// A growing buffer counts too: it is the same work.
pub struct Counting;

fn count() {
    if IS_COUNTING.load(Ordering::Relaxed) {
        ALL.fetch_add(1, Ordering::Relaxed);
        OWN.with(|own| own.set(own.get() + 1));
    }
}

/// `sign`: taken or given back. The piece is what the system made of the request, rounding and its own word included.
fn weigh(pointer: *mut u8, sign: i64) {
    if IS_WEIGHING.load(Ordering::Relaxed) && !pointer.is_null() {
        // SAFETY: the system's allocator gave it and has not got it back yet.
        let usable = unsafe { libc::malloc_usable_size(pointer.cast()) };
        BYTES.fetch_add(sign * (usable as i64 + OVERHEAD_BYTES), Ordering::Relaxed);
    }
}

// SAFETY: everything is left to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller of this function promises.
        let pointer = unsafe { System.alloc(layout) };
        weigh(pointer, 1);
        pointer
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller of this function promises.
        let pointer = unsafe { System.alloc_zeroed(layout) };
        weigh(pointer, 1);
        pointer
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        weigh(pointer, -1);
        // SAFETY: as the caller of this function promises.
        let moved = unsafe { System.realloc(pointer, layout, size) };
        // A failed one has left the old piece where it was.
        weigh(if moved.is_null() { pointer } else { moved }, 1);
        moved
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        weigh(pointer, -1);
        // SAFETY: as the caller of this function promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// Allocations of this thread, and of all others of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    pub own: u64,
    pub others: u64,
}

/// From `start` to `stop`, once at a time.
pub fn start() {
    ALL.store(0, Ordering::SeqCst);
    OWN.with(|own| own.set(0));
    IS_COUNTING.store(true, Ordering::SeqCst);
}

pub fn stop() -> Counted {
    IS_COUNTING.store(false, Ordering::SeqCst);
    let own = OWN.with(Cell::get);
    Counted { own, others: ALL.load(Ordering::SeqCst).saturating_sub(own) }
}

/// Bytes of this process taken from now on and not given back, until `weighed` tells.
pub fn start_weighing() {
    BYTES.store(0, Ordering::SeqCst);
    IS_WEIGHING.store(true, Ordering::SeqCst);
}

pub fn weighed() -> u64 {
    IS_WEIGHING.store(false, Ordering::SeqCst);
    u64::try_from(BYTES.load(Ordering::SeqCst)).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_thread_counts_as_own() {
        start();
        let kept: Vec<Box<u64>> = (0..10).map(Box::new).collect();
        std::thread::spawn(|| (0..100).map(Box::new).collect::<Vec<Box<u64>>>()).join().unwrap();
        let counted = stop();
        assert!(counted.own >= 10, "{counted:?} of {}", kept.len());
        assert!(counted.others >= 100, "{counted:?}");
        assert!(counted.own < 100, "{counted:?}");
    }

    #[test]
    fn what_is_given_back_weighs_nothing() {
        start_weighing();
        let kept = vec![0u8; 10 << 20];
        drop(vec![0u8; 30 << 20]);
        let mut grown = Vec::with_capacity(1 << 20);
        grown.resize(5 << 20, 1u8);
        let weighed = weighed();
        // Other tests run beside this one.
        assert!((15 << 20..25 << 20).contains(&weighed), "{weighed} with {} and {}", kept.len(), grown.len());
    }
}
