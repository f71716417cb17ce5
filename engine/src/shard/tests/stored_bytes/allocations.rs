//! What a thread of a test asks for: no byte on a disk may make the program take more memory than it has reason to.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// In bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allocations {
    pub largest: usize,
    /// More held than at the start.
    pub peak: usize,
}

thread_local! {
    static SEEN: Cell<Allocations> = const { Cell::new(Allocations { largest: 0, peak: 0 }) };
    static HELD: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: usize) {
    let held = HELD.get() + bytes as isize;
    HELD.set(held);
    let Allocations { largest, peak } = SEEN.get();
    SEEN.set(Allocations { largest: largest.max(bytes), peak: peak.max(held.max(0) as usize) });
}

// SAFETY: everything is the system allocator's; what is counted needs no memory and no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.set(HELD.get() - layout.size() as isize);
        unsafe { System.dealloc(pointer, layout) }
    }
}

/// What `task` asked for on this thread.
pub fn during<T>(task: impl FnOnce() -> T) -> (T, Allocations) {
    HELD.set(0);
    SEEN.set(Allocations::default());
    let result = task();
    (result, SEEN.get())
}
