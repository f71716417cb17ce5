//! A guest: a throw-away virtual machine with a stock Debian kernel, which runs one script as root. It is one more host
//! on a test's network, sees this machine's files read-only where they are here (what it writes is gone with it), and
//! loads any module of its kernel. So the kernel's own block drivers can be tested where the machine's kernel has none.
//!
//! Emulated, since a test must not depend on /dev/kvm: it boots in seconds and runs several times slower than the machine. For
//! correctness, not for figures. Its one process dies with the test, and with it everything in it.
//!
//! Or it boots from a root file system on an AoE volume, with a console to log in at.
//!
//! `tests/vm/kernel` prepares what is booted, `tests/vm/init` is the guest's side.

use crate::network::{self, Network};
use crate::process::{self, Outcome, Process};
use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// What the first serial port prints: the kernel, and init until something else takes over.
const BOOT: &str = "boot";
/// What is typed at, where there is no script.
const CONSOLE: &str = "console";
/// Names of the virtio ports; `tests/vm/init` knows them.
const OUTPUT: &str = "output";
const KERNEL: &str = "kernel";
const STATUS: &str = "status";
/// `tests/vm/init` says it first of all.
const ALIVE: &str = "torus.alive";
/// It takes seconds, on a machine that does something else too a minute.
const BOOTED_WITHIN: Duration = Duration::from_secs(300);
/// How often a guest is booted that ends before its init is there: what runs until then is the emulator and a kernel.
const BOOTS_MAX: u32 = 3;
/// Memory that holds what the script writes below `/`, too.
const MEMORY: &str = "1536M";
const PROCESSORS: &str = "2";

/// What a script begins with that uses the programs that were built, on the cluster of this metadata store.
pub fn prelude(metadata: &str) -> String {
    let programs = process::programs();
    let environment = format!("export TORUS_METADATA={metadata} PATH={}:$PATH\n", programs.display());
    environment + include_str!("../vm/prelude")
}

/// What a script did.
#[derive(Debug)]
pub struct Ran {
    /// Of both stdout and stderr.
    pub output: String,
    /// The kernel's log as the script ended, and only if it did.
    pub kernel_log: String,
    /// `None`: the guest ended before the script did.
    pub status: Option<i32>,
    /// What stood on the console that is typed at.
    console: String,
    /// What the machine said while it booted.
    boot: String,
}

impl Ran {
    /// Its output, if it succeeded.
    #[track_caller]
    pub fn ok(self) -> String {
        assert_eq!(self.status, Some(0), "{}", self.told());
        self.output
    }

    /// Everything there is to find out why.
    pub fn told(&self) -> String {
        let last = |text: &str| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(60)..].join("\n")
        };
        let Self { output, kernel_log, status, console, boot } = self;
        let (kernel_log, console, boot) = (last(kernel_log), last(console), last(boot));
        format!(
            "script ended with {status:?}\n{output}\n---- kernel:\n{kernel_log}\n---- console:\n{console}\n\
             ---- boot:\n{boot}"
        )
    }
}

/// A guest that runs, or has run, its script.
pub struct Guest {
    pub process: Process,
    folder: PathBuf,
    /// What is typed at the console of one that booted from a volume.
    keyboard: Option<UnixStream>,
}

impl Guest {
    /// Boots on the network and runs `script` (for bash) there; its files are below `folder`, under `name`. `None`, with
    /// the reason printed, where no guest can be had.
    pub fn start(name: &str, network: &Network, folder: &Path, script: &str) -> Option<Self> {
        let kernel = kernel()?;
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder).expect("the test's folder can be written");
        std::fs::write(folder.join("script"), script).expect("the test's folder can be written");
        let script = folder.join("script").canonicalize().expect("it was just written");
        let modules = kernel.join("modules").canonicalize().expect("it was prepared");
        let asked = format!("torus.script={} torus.modules={}", script.display(), modules.display());
        let mut command = machine(&kernel, network, &asked)?;
        command.arg("-serial").arg(format!("file:{}", folder.join(BOOT).display()));
        command.args(["-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap"]);
        command.args(["-device", "virtio-9p-pci,fsdev=root,mount_tag=root", "-device", "virtio-serial-pci"]);
        for port in [OUTPUT, KERNEL, STATUS] {
            command.arg("-chardev").arg(format!("file,id={port},path={}", folder.join(port).display()));
            command.args(["-device", &format!("virtserialport,chardev={port},name={port}")]);
        }
        Some(Self { process: boot(name, &mut command, &folder), folder, keyboard: None })
    }

    /// Boots from the root file system on the AoE device `e<shelf>.<slot>`, with nothing else of this machine's.
    pub fn boot_from_aoe(name: &str, network: &Network, folder: &Path, device: &str) -> Option<Self> {
        let kernel = kernel()?;
        let folder = folder.join(name);
        std::fs::create_dir_all(&folder).expect("the test's folder can be written");
        let mut command = machine(&kernel, network, &format!("torus.root={device}"))?;
        let (socket, log) = (folder.join("keyboard"), folder.join(CONSOLE));
        let (socket_path, log) = (socket.display(), log.display());
        command.arg("-chardev").arg(format!("socket,id=tty,path={socket_path},server=on,wait=off,logfile={log}"));
        // The emulated serial port loses interrupts of what is typed.
        command.args(["-device", "virtio-serial-pci", "-device", "virtconsole,chardev=tty"]);
        command.arg("-serial").arg(format!("file:{}", folder.join(BOOT).display()));
        let mut process = boot(name, &mut command, &folder);
        let keyboard = crate::wait::until("the guest's console", || {
            assert!(process.is_running(), "the machine ended:\n{}", process.log());
            UnixStream::connect(&socket).ok()
        });
        Some(Self { process, folder, keyboard: Some(keyboard) })
    }

    /// Whether its console shows `words` within `deadline`.
    #[track_caller]
    pub fn await_console(&mut self, words: &str, deadline: Duration) {
        let found = crate::wait::within(deadline, || {
            let is_there = self.ran().console.contains(words);
            (is_there || !self.process.is_running()).then_some(is_there)
        });
        if found != Some(true) {
            panic!("the console did not show {words:?} within {deadline:?}: {}", self.ran().told());
        }
    }

    /// At the console.
    pub fn type_line(&mut self, line: &str) {
        let keyboard = self.keyboard.as_mut().expect("it booted from a volume");
        keyboard.write_all(format!("{line}\n").as_bytes()).expect("the guest runs");
    }

    /// It has switched itself off within `deadline`.
    #[track_caller]
    pub fn await_end(&mut self, deadline: Duration) {
        if self.process.ends_within(deadline).is_none() {
            panic!("the guest still ran after {deadline:?}: {}", self.ran().told());
        }
    }

    /// What it printed so far.
    pub fn output(&self) -> String {
        let bytes = std::fs::read(self.folder.join(OUTPUT)).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// Whether it prints a line with `words` on it within `deadline`.
    #[track_caller]
    pub fn await_line(&mut self, words: &str, deadline: Duration) {
        let found = crate::wait::within(deadline, || {
            let is_there = self.output().lines().any(|line| line.contains(words));
            (is_there || !self.process.is_running()).then_some(is_there)
        });
        if found != Some(true) {
            panic!("the guest did not say {words:?} within {deadline:?}: {}", self.ran().told());
        }
    }

    /// Waits for the script's end.
    #[track_caller]
    pub fn finish(mut self, deadline: Duration) -> Ran {
        self.await_end(deadline);
        self.ran()
    }

    /// Waits for the script's end as long as `asked`, a count of what the guest asked somebody, goes on within `silence`.
    /// `Err` with all there is to find out why it did not.
    #[track_caller]
    pub fn finish_unless_silent(
        mut self,
        deadline: Duration,
        silence: Duration,
        asked: impl Fn() -> u64,
    ) -> Result<Ran, String> {
        let (mut last, mut since) = (asked(), Instant::now());
        let ended = crate::wait::within(deadline, || {
            let now = asked();
            if now != last {
                (last, since) = (now, Instant::now());
            }
            let has_ended = !self.process.is_running();
            (has_ended || since.elapsed() > silence).then_some(has_ended)
        });
        match ended {
            Some(true) => Ok(self.ran()),
            Some(false) => Err(self.ran().told()),
            None => panic!("the guest still ran after {deadline:?}: {}", self.ran().told()),
        }
    }

    fn ran(&self) -> Ran {
        let read = |name: &str| {
            let bytes = std::fs::read(self.folder.join(name)).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let status = read(STATUS).trim().parse().ok();
        Ran {
            output: read(OUTPUT),
            kernel_log: read(KERNEL),
            status,
            console: read(CONSOLE),
            boot: read(BOOT) + &self.process.log(),
        }
    }
}

/// Runs the machine; returns once its init runs. What ends or stands still before is told, and booted again.
fn boot(name: &str, command: &mut Command, folder: &Path) -> Process {
    let said = || String::from_utf8_lossy(&std::fs::read(folder.join(BOOT)).unwrap_or_default()).into_owned();
    for _ in 0..BOOTS_MAX {
        // What one before left there is not this one's.
        let _ = std::fs::remove_file(folder.join(BOOT));
        let mut process = Process::spawn(name, command, folder);
        let is_alive = crate::wait::within(BOOTED_WITHIN, || {
            let is_alive = said().contains(ALIVE);
            (is_alive || !process.is_running()).then_some(is_alive)
        });
        if is_alive == Some(true) {
            return process;
        }
        process.kill();
        eprintln!("{name} did not come as far as its init:\n{}\n{}", said(), process.log());
    }
    panic!("no guest came as far as its init in {BOOTS_MAX} boots");
}

/// The folder with what is booted; prepared at the first use.
fn kernel() -> Option<PathBuf> {
    // Beside the programs' folder, so that another profile of the build finds it again.
    let folder = process::programs().parent().expect("programs are below target/").join("guest");
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED: a guest needs root (network namespaces, tap devices)");
        return None;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("vm/kernel");
    let mut command = Command::new(script);
    // It may have to be downloaded.
    network::place_outside(&mut command);
    let prepared = Outcome::of(command.arg(&folder));
    if !prepared.status.success() {
        eprintln!("SKIPPED: {}", prepared.stderr.trim());
        return None;
    }
    Some(folder)
}

/// With one port on the network's segment. `asked` is for `tests/vm/init`. `None`, with the reason printed, where there
/// can be no such port.
fn machine(kernel: &Path, network: &Network, asked: &str) -> Option<Command> {
    let port = match network.guest_port() {
        Ok(port) => port,
        Err(because) => {
            eprintln!("SKIPPED: no tap device can be had here: {because}");
            return None;
        }
    };
    let mut command = process::tool("qemu-system-x86_64");
    network.place_on_switch(&mut command);
    command.args(["-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max"]);
    command.args([
        "-smp",
        PROCESSORS,
        "-m",
        MEMORY,
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
    ]);
    command.arg("-kernel").arg(kernel.join("vmlinux")).arg("-initrd").arg(kernel.join("initrd"));
    let (address, mtu) = (network.guest_address(), network.mtu());
    // No watchdogs and no clock that has to be measured: emulated processors stand still when the machine is busy.
    let quick = "tsc=reliable clocksource=tsc no_timer_check nowatchdog nokaslr mitigations=off audit=0 \
                 random.trust_cpu=on cryptomgr.notests rcupdate.rcu_expedited=1";
    let line = format!(
        "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic rdinit=/init {quick} {asked} \
         torus.address={address}/24 torus.mtu={mtu}"
    );
    command.args(["-append", &line]);
    command.args(["-device", "virtio-rng-pci"]);
    command.arg("-netdev").arg(format!("tap,id=net,ifname={port},script=no,downscript=no"));
    command.args(["-device", &format!("virtio-net-pci,netdev=net,host_mtu={mtu},romfile=")]);
    Some(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_before_its_init_is_booted_again_and_what_never_comes_so_far_is_given_up() {
        let folder = process::temporary_dir("guest-boots");
        let machine = |ends: u32| {
            let script = format!(
                "echo >>boots; [ $(wc -l <boots) -gt {ends} ] || exit 1; echo {ALIVE} >{BOOT}; exec tail -f /dev/null"
            );
            let mut command = Command::new("sh");
            command.arg("-c").arg(script).current_dir(folder.path());
            command
        };
        let boots = || std::fs::read_to_string(folder.path().join("boots")).unwrap().lines().count();
        let mut process = boot("twice", &mut machine(1), folder.path());
        assert!(process.is_running() && boots() == 2);
        std::fs::remove_file(folder.path().join("boots")).unwrap();
        let mut never = machine(u32::MAX);
        let given_up =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| boot("never", &mut never, folder.path())));
        assert!(given_up.is_err() && boots() == BOOTS_MAX as usize);
    }
}
