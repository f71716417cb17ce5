//! Who removes a folder when the bench has ended, however it did: interrupted, killed, or in the ordinary way.

use crate::error::{BenchError, Result};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A shell that reads until nobody is left to write, which the kernel sees to, then removes its folder. Again, while
/// processes that are being killed still write into it.
const SCRIPT: &str = "cat >/dev/null; tries=0; \
    while [ -e \"$0\" ] && [ $tries -lt 100 ]; do rm -rf -- \"$0\"; tries=$((tries+1)); sleep 0.1; done";

pub struct Guard {
    shell: Child,
}

impl Guard {
    pub fn of(folder: &Path) -> Result<Self> {
        let mut command = Command::new("sh");
        command.arg("-c").arg(SCRIPT).arg(folder).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        // Not in the terminal's foreground: Ctrl-C ends the bench, and is not for who cleans up behind it.
        let shell = command.process_group(0).spawn();
        let shell = shell.map_err(BenchError::wrap(format!("a shell that guards {}", folder.display())))?;
        Ok(Self { shell })
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.shell.stdin.take());
        // An error means that it is gone already.
        let _ = self.shell.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_gone_when_its_guard_is() {
        let outer = tempfile::tempdir().unwrap();
        let folder = outer.path().join("with a blank");
        std::fs::create_dir(&folder).unwrap();
        let guard = Guard::of(&folder).unwrap();
        std::fs::write(folder.join("file"), "x").unwrap();
        assert!(folder.exists());
        drop(guard);
        assert!(!folder.exists() && outer.path().exists());
    }

    #[test]
    fn a_folder_that_is_gone_already_is_no_error() {
        let outer = tempfile::tempdir().unwrap();
        drop(Guard::of(&outer.path().join("never made")).unwrap());
        assert!(outer.path().exists());
    }
}
