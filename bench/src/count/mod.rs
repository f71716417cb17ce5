//! What an operation costs that can be counted: system calls, context switches, allocations. Unlike times, counts are
//! the same on a busy machine. README.md explains each figure.

mod allocations;
pub mod allocator;
mod syscalls;

use crate::error::Result;
use crate::options::Effort;

pub fn run(effort: &Effort) -> Result<()> {
    let (_, time) = effort.rounds_and_time();
    // First, before this process has threads that could allocate beside those that are counted.
    allocations::run(time)?;
    syscalls::run(time)
}
