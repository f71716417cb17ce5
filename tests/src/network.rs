//! Hosts with addresses of their own on one Ethernet segment: network namespaces, joined by a bridge in one more. What
//! passes between any two can be dropped, one way or both, by the kernel's packet filter; neither side is told.
//!
//! Needs root, `ip` and `nft`. Nothing outside the namespaces is touched or can be reached from inside.

use crate::process::{self, Outcome};
use nix::sched::{CloneFlags, setns};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Drops what comes from whoever is in the set.
const RULES: &str = "table inet torus {
 set cut { type ipv4_addr; }
 chain input { type filter hook input priority 0; ip saddr @cut drop; }
}
";

/// Which host: a number below the count asked for.
pub type Host = usize;

#[derive(Clone)]
pub struct Network(Rc<Inner>);

impl std::fmt::Debug for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.prefix)
    }
}

/// Where `ip` keeps the names of namespaces.
const NAMESPACES: &str = "/run/netns";
/// What Ethernet carries, unless a test wants more.
const MTU: u32 = 1500;
/// Of a virtual machine on the segment, beyond any host's.
const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 254);

/// Where the process was before it made any network: the first is made by somebody who has entered none.
static OUTSIDE: OnceLock<File> = OnceLock::new();

struct Inner {
    /// Part of every namespace's name, so that tests beside each other do not meet.
    prefix: String,
    hosts: usize,
    mtu: u32,
    cut: RefCell<BTreeSet<(Host, Host)>>,
}

impl Network {
    /// `None`, with the reason printed, where this machine lets us make no network namespaces.
    pub fn new(hosts: usize) -> Option<Self> {
        Self::with_mtu(hosts, MTU)
    }

    /// Every host's, and the guest's.
    pub fn with_mtu(hosts: usize, mtu: u32) -> Option<Self> {
        static NETWORKS: AtomicUsize = AtomicUsize::new(0);
        assert!(hosts < 250);
        let number = NETWORKS.fetch_add(1, Ordering::Relaxed);
        OUTSIDE.get_or_init(|| File::open("/proc/thread-self/ns/net").expect("a thread is in a namespace"));
        let prefix = format!("torus-{}-{number}", std::process::id());
        for left in process::left_behind(Path::new(NAMESPACES), "torus") {
            delete(&left);
        }
        let tried = Outcome::of(process::tool("ip").args(["netns", "add", &format!("{prefix}-switch")]));
        if !tried.status.success() {
            eprintln!("SKIPPED: no network namespace can be had here: {}", tried.stderr.trim());
            return None;
        }
        let inner = Rc::new(Inner { prefix, hosts, mtu, cut: RefCell::default() });
        let switch = inner.switch();
        if !inner.rules(&switch, RULES) {
            eprintln!("SKIPPED: no packet filter can be had here (`nft`, in a network namespace)");
            return None;
        }
        ip(&["-n", &switch, "link", "add", "bridge", "type", "bridge"]);
        ip(&["-n", &switch, "link", "set", "bridge", "mtu", &mtu.to_string(), "up"]);
        (0..hosts).for_each(|host| inner.add(host));
        Some(Self(inner))
    }

    pub fn address(&self, host: Host) -> Ipv4Addr {
        address(host)
    }

    pub fn mtu(&self) -> u32 {
        self.0.mtu
    }

    pub fn guest_address(&self) -> Ipv4Addr {
        GUEST
    }

    /// A port of the switch for a virtual machine: the name of a tap device there. One at a time. The error says why
    /// there is none.
    pub fn guest_port(&self) -> Result<String, String> {
        let (switch, mtu) = (self.0.switch(), self.0.mtu.to_string());
        let tried = |arguments: &[&str]| {
            let tried = Outcome::of(process::tool("ip").args(["-n", &switch]).args(arguments));
            if tried.status.success() { Ok(()) } else { Err(tried.stderr.trim().to_string()) }
        };
        // An earlier one's is gone with it, unless it never ran.
        let _ = tried(&["link", "delete", "guest"]);
        tried(&["tuntap", "add", "dev", "guest", "mode", "tap"])?;
        tried(&["link", "set", "guest", "mtu", &mtu, "master", "bridge", "up"])?;
        Ok("guest".to_string())
    }

    /// The command's process will be where the switch is.
    pub fn place_on_switch(&self, command: &mut Command) {
        enter_before_it_runs(self.0.open_switch(), command);
    }

    /// The command's process will be on that host.
    pub fn place(&self, host: Host, command: &mut Command) {
        enter_before_it_runs(self.0.open(host), command);
    }

    /// This thread is on that host from now on, and so is every thread and process it starts.
    pub fn enter(&self, host: Host) {
        setns(self.0.open(host), CloneFlags::CLONE_NEWNET).expect("the namespace is ours");
    }

    /// The switch forwards no such frames any more (`hub` does).
    pub fn bridge_drops(&self, ethertype: u16) {
        let chain = format!("type filter hook forward priority 0;\nether type {ethertype:#06x} drop\n");
        let rules = format!("table bridge torus {{\nchain forward {{\n{chain}}}\n}}\n");
        assert!(self.0.rules(&self.0.switch(), &rules), "nft refused:\n{rules}");
    }

    /// It forwards all of them again.
    pub fn bridge_forwards(&self) {
        assert!(self.0.rules(&self.0.switch(), "delete table bridge torus\n"), "nft refused");
    }

    pub fn switch_namespace(&self) -> String {
        self.0.switch()
    }

    /// Of the switch: each host's, and the guest's if there is one.
    pub fn ports(&self) -> Vec<String> {
        let listed =
            Outcome::of(process::tool("ip").args(["-n", &self.0.switch(), "-o", "link", "show", "master", "bridge"]));
        let name = |line: &str| line.split(": ").nth(1)?.split('@').next().map(str::to_string);
        listed.ok().lines().filter_map(name).collect()
    }

    /// Nothing that `from` sends arrives at `to`.
    pub fn cut(&self, from: Host, to: Host) {
        if self.0.cut.borrow_mut().insert((from, to)) {
            self.0.filter(to, &format!("add element inet torus cut {{ {} }}\n", address(from)));
        }
    }

    /// In both directions.
    pub fn part(&self, one: Host, other: Host) {
        self.cut(one, other);
        self.cut(other, one);
    }

    /// Everything arrives again.
    pub fn heal(&self) {
        for (from, to) in self.0.cut.take() {
            self.0.filter(to, &format!("delete element inet torus cut {{ {} }}\n", address(from)));
        }
    }
}

fn enter_before_it_runs(namespace: File, command: &mut Command) {
    // SAFETY: between fork and exec only one system call is made, which allocates nothing.
    unsafe {
        command.pre_exec(move || setns(&namespace, CloneFlags::CLONE_NEWNET).map_err(std::io::Error::from));
    }
}

/// The command's process will be where this one was before it made any network: on this machine, with its addresses.
pub fn place_outside(command: &mut Command) {
    if let Some(outside) = OUTSIDE.get() {
        enter_before_it_runs(outside.try_clone().expect("there are descriptors left"), command);
    }
}

/// For this thread.
pub fn enter_namespace(name: &str) {
    setns(open(name), CloneFlags::CLONE_NEWNET).expect("the namespace is ours");
}

fn address(host: Host) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, 1 + u8::try_from(host).expect("fewer than 250 hosts"))
}

fn delete(namespace: &str) {
    // It may be gone already, or never have been.
    let _ = process::tool("ip").args(["netns", "delete", namespace]).stderr(Stdio::null()).status();
}

fn open(namespace: &str) -> File {
    File::open(Path::new(NAMESPACES).join(namespace)).expect("the namespace was made by us")
}

#[track_caller]
fn ip(arguments: &[&str]) {
    Outcome::of(process::tool("ip").args(arguments)).ok();
}

impl Inner {
    fn switch(&self) -> String {
        format!("{}-switch", self.prefix)
    }

    fn name(&self, host: Host) -> String {
        format!("{}-{host}", self.prefix)
    }

    fn add(&self, host: Host) {
        let (name, switch, port) = (self.name(host), self.switch(), format!("port{host}"));
        ip(&["netns", "add", &name]);
        ip(&["-n", &switch, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &name]);
        let mtu = self.mtu.to_string();
        ip(&["-n", &switch, "link", "set", &port, "mtu", &mtu, "master", "bridge", "up"]);
        ip(&["-n", &name, "address", "add", &format!("{}/24", address(host)), "dev", "eth0"]);
        ip(&["-n", &name, "link", "set", "lo", "up"]);
        ip(&["-n", &name, "link", "set", "eth0", "mtu", &mtu, "up"]);
        self.filter(host, RULES);
    }

    fn open(&self, host: Host) -> File {
        assert!(host < self.hosts, "host {host} of {}", self.hosts);
        open(&self.name(host))
    }

    fn open_switch(&self) -> File {
        open(&self.switch())
    }

    #[track_caller]
    fn filter(&self, host: Host, rules: &str) {
        assert!(self.rules(&self.name(host), rules), "nft refused:\n{rules}");
    }

    fn rules(&self, namespace: &str, rules: &str) -> bool {
        let mut command = process::tool("ip");
        command.args(["netns", "exec", namespace, "nft", "-f", "-"]);
        let mut child = command.stdin(Stdio::piped()).spawn().expect("`ip` was run before");
        let mut stdin = child.stdin.take().expect("it was asked for");
        // One that ended at once says why by how it ended.
        let _ = stdin.write_all(rules.as_bytes());
        drop(stdin);
        child.wait().expect("our own child").success()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Whoever still runs in one keeps it until he ends; its name is gone.
        (0..self.hosts).map(|host| self.name(host)).chain([self.switch()]).for_each(|name| delete(&name));
    }
}
