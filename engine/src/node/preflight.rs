//! What the machine has to offer, asked before anything is touched: an executor that cannot start says little about
//! why.

use nix::errno::Errno;
use nix::libc;
use nix::sys::resource::{Resource, getrlimit};
use thiserror::Error;
use torus_schema::limits;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum PreflightError {
    #[error(
        "this kernel offers no io_uring ({because}); Linux 5.8 or later is needed, and in a container a seccomp profile that allows io_uring_setup (kernel.io_uring_disabled = 0)"
    )]
    NoIoUring { because: String },
    #[error(
        "locked memory is limited to {found} bytes, needed {needed}: run `ulimit -l {}` first, or set LimitMEMLOCK={needed} in the service", needed / 1024
    )]
    Memlock { found: u64, needed: u64 },
}

pub fn check() -> Result<(), PreflightError> {
    check_io_uring()?;
    let (found, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((limits::MEMLOCK_BYTES_MIN, 0));
    check_memlock(found)
}

fn check_memlock(found: u64) -> Result<(), PreflightError> {
    let needed = limits::MEMLOCK_BYTES_MIN;
    if found < needed { Err(PreflightError::Memlock { found, needed }) } else { Ok(()) }
}

/// Asks for a ring of no entries at a null address: a kernel with io_uring finds fault with the arguments
/// (EFAULT or EINVAL), one without has no such call, and a forbidden one is EPERM.
fn check_io_uring() -> Result<(), PreflightError> {
    // SAFETY: the kernel refuses a null parameter block; nothing is created and no memory of ours is touched.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, 0, std::ptr::null_mut::<libc::c_void>()) };
    match Errno::result(result) {
        Err(errno @ (Errno::ENOSYS | Errno::EPERM | Errno::EACCES)) => {
            Err(PreflightError::NoIoUring { because: errno.desc().to_string() })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_little_locked_memory_is_refused_with_the_command_that_helps() {
        let error = check_memlock(64 * 1024).unwrap_err().to_string();
        assert!(error.contains("65536") && error.contains("ulimit -l 512") && error.contains("LimitMEMLOCK"), "{error}");
        assert_eq!(check_memlock(512 * 1024), Ok(()));
    }

    #[test]
    fn a_machine_that_runs_these_tests_has_io_uring() {
        assert_eq!(check_io_uring(), Ok(()));
    }
}
