//! Recording how long a stage took allocates nothing: every operation does it several times. A test binary of its own,
//! since the allocator that counts is the whole process's.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;
use torus_schema::latency::{OperationKind, Stage, Stages};

thread_local! {
    // Const and without a destructor: reaching it allocates nothing.
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: everything is left to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: as the caller of this function promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as the caller of this function promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

#[test]
fn recording_a_stage_allocates_nothing() {
    let before = allocations();
    let stages = Stages::default();
    assert!(allocations() > before, "the allocator does not count");
    let before = allocations();
    for us in 0..100_000 {
        for kind in OperationKind::ALL {
            stages.record(kind, Stage::Disk, Duration::from_micros(us * us));
        }
    }
    assert_eq!(allocations(), before);
    assert_eq!(stages.counts().get(OperationKind::Read, Stage::Disk).count(), 100_000);
}
