//! Loop devices: block devices for tests, made of files. They need root and a kernel that has them; a test that gets
//! none says so and tests nothing.

use crate::process::{self, Outcome};
use crate::wait;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

mod request {
    // EXT4_IOC_SHUTDOWN, which XFS made and others took over (XFS_IOC_GOINGDOWN).
    nix::ioctl_read!(shutdown, b'X', 125, u32);
}
/// The journal is not even written any more.
const SHUTDOWN_AT_ONCE: u32 = 2;

/// A device as long as its file, which is sparse. Detached when it is dropped.
pub struct LoopDevice {
    pub path: PathBuf,
    pub file: PathBuf,
}

impl LoopDevice {
    /// `None`, with the reason printed, where this machine has no loop devices for us.
    pub fn new(folder: &Path, name: &str, bytes: u64) -> Option<Self> {
        let file = folder.join(format!("{name}.device"));
        File::create(&file).and_then(|made| made.set_len(bytes)).expect("the test's folder can be written");
        Self::of(&file)
    }

    pub fn of(file: &Path) -> Option<Self> {
        let attached = Outcome::of(process::tool("losetup").args(["--find", "--show"]).arg(file));
        if !attached.status.success() {
            eprintln!("SKIPPED: no loop device can be had here: {}", attached.stderr.trim());
            return None;
        }
        Some(Self { path: PathBuf::from(attached.stdout.trim()), file: file.to_path_buf() })
    }

    pub fn text(&self) -> &str {
        self.path.to_str().expect("/dev/loopN")
    }

    /// The device takes the size that its file has now.
    pub fn resize(&self, bytes: u64) {
        let file = fs::OpenOptions::new().write(true).open(&self.file).expect("it was made by us");
        file.set_len(bytes).expect("the test's folder can be written");
        Outcome::of(process::tool("losetup").arg("--set-capacity").arg(&self.path)).ok();
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        // While a node still holds it the kernel detaches it when that ends.
        let _ = process::tool("losetup").arg("--detach").arg(&self.path).status();
    }
}

/// An ext4 file system of its own on a loop device, mounted.
pub struct Mounted {
    pub path: PathBuf,
    device: LoopDevice,
}

impl Mounted {
    pub fn new(folder: &Path, name: &str, bytes: u64) -> Option<Self> {
        let device = LoopDevice::new(folder, name, bytes)?;
        Outcome::of(process::tool("mkfs.ext4").args(["-q", "-F"]).arg(&device.path)).ok();
        let path = folder.join(name);
        fs::create_dir(&path).expect("the test's folder can be written");
        Outcome::of(process::tool("mount").arg(&device.path).arg(&path)).ok();
        Some(Self { path, device })
    }

    /// From now on every access to a file of it fails with EIO, as when its disk is pulled.
    pub fn cut_off(&self) {
        let folder = File::open(&self.path).expect("it is mounted");
        let mut how = SHUTDOWN_AT_ONCE;
        // SAFETY: the descriptor is ours, and the call reads one number.
        let done = unsafe { request::shutdown(folder.as_raw_fd(), &mut how) };
        done.unwrap_or_else(|errno| panic!("shutdown of {}: {errno}", self.path.display()));
    }

    /// The disk is plugged in again: with what was durable.
    pub fn mount_again(&self) {
        // A process that was killed holds its files until the kernel has taken its rings apart; a loop device on one of
        // them goes after that.
        wait::until("the file system to be left by all", || {
            Outcome::of(process::tool("umount").arg(&self.path)).status.success().then_some(())
        });
        Outcome::of(process::tool("mount").arg(&self.device.path).arg(&self.path)).ok();
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: a test that fails may leave a node that still has files open for a moment.
        let _ = process::tool("umount").arg("--lazy").arg(&self.path).status();
    }
}
