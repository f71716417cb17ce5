//! Memory of tasks that ended, for the next ones: a server makes one for each request, of a few sizes only.
//!
//! A thread keeps its own. It may give what another one took: all of it is the allocator's.

use std::{
    alloc::{Layout, alloc, dealloc},
    cell::RefCell,
};

/// Sizes are rounded up to this.
const STEP_BYTES: usize = 128;
/// What is larger is not kept.
const KEPT_BYTES_MAX: usize = 8 << 10;
/// As many pieces of one size as are kept.
const KEPT_MAX: usize = 256;
/// What glibc gives without asking for more.
const ALIGN: usize = 16;

/// By size in steps.
struct Spare([Vec<*mut u8>; KEPT_BYTES_MAX / STEP_BYTES]);

thread_local! {
    static SPARE: RefCell<Spare> = const { RefCell::new(Spare([const { Vec::new() }; KEPT_BYTES_MAX / STEP_BYTES])) };
}

impl Drop for Spare {
    fn drop(&mut self) {
        for (class, pieces) in self.0.iter_mut().enumerate() {
            // SAFETY: `give` had them from `take`, which allocates all of a class alike.
            pieces.drain(..).for_each(|piece| unsafe { dealloc(piece, class_layout(class)) });
        }
    }
}

fn class_of(layout: Layout) -> Option<usize> {
    let is_kept = (1..=KEPT_BYTES_MAX).contains(&layout.size()) && layout.align() <= ALIGN;
    is_kept.then(|| (layout.size() - 1) / STEP_BYTES)
}

fn class_layout(class: usize) -> Layout {
    Layout::from_size_align((class + 1) * STEP_BYTES, ALIGN).expect("a few KiB, aligned to a power of two")
}

/// Memory for `layout`; null if there is none.
///
/// # Safety
///
/// `layout` has a size, as for [`alloc`].
pub(crate) unsafe fn take(layout: Layout) -> *mut u8 {
    let Some(class) = class_of(layout) else {
        // SAFETY: as the caller promises.
        return unsafe { alloc(layout) };
    };
    // A thread that ends has none any more.
    let spare = SPARE.try_with(|spare| spare.borrow_mut().0[class].pop()).unwrap_or(None);
    // SAFETY: a class has a size.
    spare.unwrap_or_else(|| unsafe { alloc(class_layout(class)) })
}

/// # Safety
///
/// `piece` is from [`take`] with the same `layout`, and is given once.
pub(crate) unsafe fn give(piece: *mut u8, layout: Layout) {
    let Some(class) = class_of(layout) else {
        // SAFETY: `take` had it from the allocator by this layout.
        return unsafe { dealloc(piece, layout) };
    };
    let keep = |spare: &RefCell<Spare>| {
        let pieces = &mut spare.borrow_mut().0[class];
        let has_room = pieces.len() < KEPT_MAX;
        if has_room {
            pieces.push(piece);
        }
        has_room
    };
    if !SPARE.try_with(keep).unwrap_or(false) {
        // SAFETY: `take` has all of a class by this layout.
        unsafe { dealloc(piece, class_layout(class)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 8).unwrap()
    }

    #[test]
    fn what_was_given_is_taken_again_for_any_size_of_its_class() {
        unsafe {
            let piece = take(layout(130));
            give(piece, layout(130));
            assert_eq!(take(layout(256)), piece);
            let other = take(layout(256));
            assert_ne!(other, piece, "in use");
            let larger = take(layout(257));
            assert!(larger != piece && larger != other);
            for (piece, size) in [(piece, 256), (other, 256), (larger, 257)] {
                give(piece, layout(size));
            }
        }
    }

    #[test]
    fn what_is_large_or_aligned_to_more_is_the_allocators() {
        let aligned = Layout::from_size_align(64, 64).unwrap();
        assert_eq!([class_of(layout(KEPT_BYTES_MAX + 1)), class_of(aligned)], [None, None]);
        assert_eq!(class_of(layout(KEPT_BYTES_MAX)), Some(KEPT_BYTES_MAX / STEP_BYTES - 1));
        assert_eq!([class_of(layout(1)), class_of(layout(128)), class_of(layout(129))], [Some(0), Some(0), Some(1)]);
        unsafe {
            give(take(aligned), aligned);
        }
    }

    #[test]
    fn more_than_is_kept_is_given_back_and_so_is_all_at_the_end_of_a_thread() {
        let kept = || SPARE.with(|spare| spare.borrow().0[0].len());
        let thread = std::thread::spawn(move || unsafe {
            let pieces: Vec<_> = (0..KEPT_MAX + 10).map(|_| take(layout(8))).collect();
            pieces.into_iter().for_each(|piece| give(piece, layout(8)));
            kept()
        });
        assert_eq!(thread.join().unwrap(), KEPT_MAX);
        // Given by another thread than took it.
        let piece = std::thread::spawn(|| unsafe { take(layout(8)) } as usize).join().unwrap();
        unsafe { give(piece as *mut u8, layout(8)) };
        assert_eq!(kept(), 1);
    }
}
