//! An allocator that counts, when asked to, what this process allocates, and how much of that is this thread's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

static IS_COUNTING: AtomicBool = AtomicBool::new(false);
static ALL: AtomicU64 = AtomicU64::new(0);

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

// SAFETY: everything is left to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller of this function promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller of this function promises.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: as the caller of this function promises.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
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
}
