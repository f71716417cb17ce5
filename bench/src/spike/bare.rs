//! io_uring with nothing around it: the floor.

use super::{BLOCK, Load, Offsets};
use crate::error::{BenchError, Result};
use io_uring::{IoUring, opcode, types};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::Instant;

/// One block of memory, aligned for direct I/O.
struct Block(*mut u8);

const LAYOUT: Layout = match Layout::from_size_align(BLOCK, BLOCK) {
    Ok(layout) => layout,
    Err(_) => panic!("a block's size is a power of two"),
};

impl Block {
    fn new() -> Self {
        // SAFETY: the layout's size is not zero.
        let memory = unsafe { alloc_zeroed(LAYOUT) };
        assert!(!memory.is_null(), "out of memory for one block");
        Self(memory)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout.
        unsafe { dealloc(self.0, LAYOUT) }
    }
}

/// Returns the operations that completed.
pub fn run(load: &Load) -> Result<u64> {
    let wrap = |what: &str| BenchError::wrap::<std::io::Error>(format!("{what} of {}", load.file.display()));
    pin(load.cpu)?;
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).custom_flags(libc::O_DIRECT).open(&load.file).map_err(wrap("open"))?;
    let descriptor = types::Fd(file.as_raw_fd());
    let mut offsets = Offsets::new(load.seed);
    let blocks: Vec<Block> = (0..load.depth).map(|_| Block::new()).collect();
    let mut ring = IoUring::new(load.depth as u32).map_err(wrap("a ring for direct I/O"))?;
    let mut entry = |slot: usize| {
        let (memory, offset, length) = (blocks[slot].0, offsets.next(), BLOCK as u32);
        let entry = match load.is_write {
            true => opcode::Write::new(descriptor, memory, length).offset(offset).build(),
            false => opcode::Read::new(descriptor, memory, length).offset(offset).build(),
        };
        entry.user_data(slot as u64)
    };
    let end = Instant::now() + load.run;
    for slot in 0..load.depth {
        // SAFETY: each slot's block outlives the ring's use of it (everything is awaited below), and the ring has
        // room for as many requests as there are slots.
        unsafe { ring.submission().push(&entry(slot)).expect("the ring is as large as the depth") };
    }
    let (mut completed, mut in_flight) = (0, load.depth);
    while in_flight > 0 {
        ring.submit_and_wait(1).map_err(wrap("submission"))?;
        let done: Vec<_> = ring.completion().collect();
        for done in done {
            if done.result() != BLOCK as i32 {
                let because = format!("result {}, expected {BLOCK}", done.result());
                return Err(BenchError::Failed { what: format!("4 KiB on {}", load.file.display()), because });
            }
            completed += 1;
            in_flight -= 1;
            if Instant::now() < end {
                in_flight += 1;
                // SAFETY: as above; the slot's former request has completed.
                unsafe {
                    let again = entry(done.user_data() as usize);
                    ring.submission().push(&again).expect("the ring is as large as the depth");
                }
            }
        }
    }
    Ok(completed)
}

/// This thread, as glommio pins its executors.
fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    pinned.map_err(BenchError::wrap(format!("pinning to CPU {cpu}")))
}
