//! Stock tools as tests use them.

use crate::process::{self, Outcome, Process};
use std::path::Path;
use std::process::Command;

/// Runs qemu-io commands on an NBD export.
pub fn qemu_io(url: &str, commands: &[&str]) -> Outcome {
    let mut tool = process::tool("qemu-io");
    tool.args(["-f", "raw"]);
    tool.args(commands.iter().flat_map(|command| ["-c", command]));
    Outcome::of(tool.arg(url))
}

/// qemu-io prints what differs and exits with 0 on some versions.
#[track_caller]
pub fn qemu_io_ok(url: &str, commands: &[&str]) {
    let output = qemu_io(url, commands).ok();
    assert!(!output.contains("failed") && !output.contains("error"), "{output}");
}

/// Between a file and an export, in either direction.
#[track_caller]
pub fn nbdcopy(from: &str, to: &str) {
    Outcome::of(process::tool("nbdcopy").args([from, to])).ok();
}

#[track_caller]
pub fn assert_same_content(one: &Path, other: &Path, bytes: u64) {
    Outcome::of(process::tool("cmp").args(["--bytes", &bytes.to_string()]).arg(one).arg(other)).ok();
}

/// Random writes of 4 KiB at queue depth 32, each block verified when all are written.
pub fn fio_verified(url: &str, bytes: &str, extra: &[&str]) -> Command {
    let mut command = process::tool("fio");
    command.args(["--name=verified", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=32"]);
    command.args(["--verify=crc32c", "--verify_fatal=1", "--randseed=7", "--output-format=terse"]);
    command.arg(format!("--uri={url}")).arg(format!("--size={bytes}")).args(extra);
    command
}

/// In the background; its end says whether everything read back.
pub fn spawn_fio(command: &mut Command, folder: &Path) -> Process {
    Process::spawn("fio", command.current_dir(folder), folder)
}
