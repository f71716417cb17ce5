//! What the kernel shows of its nbd devices, in /sys/block, and who else uses one.

use super::KernelError;
use nix::fcntl::OFlag;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// /sys counts in these whatever the device's blocks are.
const SECTOR_BYTES: u64 = 512;

pub fn device_path(index: u32) -> PathBuf {
    PathBuf::from(format!("/dev/nbd{index}"))
}

pub fn index_of(device: &Path) -> Result<u32, KernelError> {
    let not_nbd = || KernelError::NotNbd { device: device.to_path_buf() };
    let name = device.to_str().and_then(|path| path.strip_prefix("/dev/nbd")).ok_or_else(not_nbd)?;
    name.parse().map_err(|_| not_nbd())
}

/// `None` where the kernel says nothing, as for a device that is not attached.
fn told(index: u32, name: &str) -> Option<String> {
    let text = std::fs::read_to_string(format!("/sys/block/nbd{index}/{name}")).ok()?;
    Some(text.trim().to_string())
}

/// It has this file for as long as it has a connection, or waits for another.
pub fn is_attached(index: u32) -> bool {
    told(index, "pid").is_some()
}

/// What it was attached to, by whoever did.
pub fn backend(index: u32) -> Option<String> {
    told(index, "backend")
}

pub fn size_bytes(index: u32) -> Option<u64> {
    Some(told(index, "size")?.parse::<u64>().ok()? * SECTOR_BYTES)
}

pub fn is_read_only(index: u32) -> bool {
    told(index, "ro").as_deref() == Some("1")
}

/// Every attached device that says it is of this backend.
pub fn attached_to(backend_wanted: &str) -> Vec<u32> {
    let names = std::fs::read_dir("/sys/block").into_iter().flatten().filter_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        name.strip_prefix("nbd")?.parse().ok()
    });
    let wanted = |index: &u32| is_attached(*index) && backend(*index).as_deref() == Some(backend_wanted);
    let mut found: Vec<u32> = names.filter(wanted).collect();
    found.sort_unstable();
    found
}

/// From now on, for requests that are begun from now on.
pub fn look_at_requests_every(index: u32, interval: Duration) -> std::io::Result<()> {
    std::fs::write(format!("/sys/block/nbd{index}/queue/io_timeout"), interval.as_millis().to_string())
}

/// Nobody can mount it while this is held.
pub fn open_alone(index: u32) -> Result<File, KernelError> {
    let device = device_path(index);
    let write = !is_read_only(index);
    let flags = (OFlag::O_EXCL | OFlag::O_CLOEXEC).bits();
    OpenOptions::new().read(true).write(write).custom_flags(flags).open(&device).map_err(|because| {
        match because.kind() {
            std::io::ErrorKind::ResourceBusy => KernelError::InUse { device },
            _ => KernelError::Io { what: device.display().to_string(), because },
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_devices_of_the_driver_are_taken() {
        assert_eq!(index_of(Path::new("/dev/nbd12")).ok(), Some(12));
        for other in ["/dev/nbd", "/dev/nbd1p2", "/dev/sda", "nbd1", "/dev/nbd-1"] {
            let error = index_of(Path::new(other)).expect_err(other).to_string();
            assert!(error.contains(other) && error.contains("/dev/nbdN"), "{error}");
        }
    }
}
