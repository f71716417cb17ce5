//! A network's switch as far as AoE goes, in user space: what it forwards it can lose, repeat, and keep back, so that
//! frames overtake each other. Everything else goes by the kernel's bridge. (Linux can do that by netem, which the kernel
//! under test may lack.)

use crate::ether::{ETHERTYPE, Mac, Port};
use crate::network::Network;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Until frames that wait are looked at again, or the end is.
const TICK: Duration = Duration::from_millis(1);

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    Pass,
    Lost,
    Twice,
    /// Kept back for so long.
    Late(Duration),
}

/// What is asked of every frame that arrives.
pub type Decide = Box<dyn FnMut(&[u8]) -> Fate + Send>;

pub struct Hub {
    ended: Arc<AtomicBool>,
    forwarded: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Hub {
    /// Takes over from the bridge between the ports that the network has now.
    pub fn start(network: &Network, decide: Decide) -> Self {
        network.bridge_drops(ETHERTYPE);
        let (ended, forwarded) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (switch, names) = (network.switch_namespace(), network.ports());
        let (end, count) = (ended.clone(), forwarded.clone());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            crate::network::enter_namespace(&switch);
            let ports = names.iter().map(|name| Port::open(name).expect("the port is the network's own")).collect();
            let mut forwarding = Forwarding { ports, decide, behind: HashMap::new(), late: BTreeMap::new(), kept: 0 };
            ready.send(()).expect("who starts it waits");
            while !end.load(Ordering::Relaxed) {
                count.fetch_add(forwarding.step(), Ordering::Relaxed);
            }
        });
        is_ready.recv().expect("the hub starts");
        Self { ended, forwarded, thread: Some(thread) }
    }

    /// Frames so far, with those that were lost.
    pub fn frames(&self) -> u64 {
        self.forwarded.load(Ordering::Relaxed)
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Forwarding {
    ports: Vec<Port>,
    decide: Decide,
    /// The port that a station was heard at.
    behind: HashMap<Mac, usize>,
    /// What is kept back, by when it goes on, with the port that it came by.
    late: BTreeMap<(Instant, u64), (usize, Vec<u8>)>,
    kept: u64,
}

impl Forwarding {
    /// Everything that is there; waits a tick for it. How many frames it was.
    fn step(&mut self) -> u64 {
        self.wait();
        let mut frames = 0;
        for at in 0..self.ports.len() {
            // In turns, so that one that floods does not keep the others out.
            for _ in 0..64 {
                let frame = self.ports[at].receive(Duration::ZERO).ok().flatten().map(<[u8]>::to_vec);
                let Some(frame) = frame else { break };
                frames += 1;
                self.behind.insert(frame[6..12].try_into().expect("six bytes"), at);
                match (self.decide)(&frame) {
                    Fate::Pass => self.forward(at, &frame),
                    Fate::Lost => {}
                    Fate::Twice => (0..2).for_each(|_| self.forward(at, &frame)),
                    Fate::Late(by) => {
                        self.kept += 1;
                        self.late.insert((Instant::now() + by, self.kept), (at, frame));
                    }
                }
            }
        }
        while let Some(due) = self.late.first_entry().filter(|due| due.key().0 <= Instant::now()) {
            let (at, frame) = due.remove();
            self.forward(at, &frame);
        }
        frames
    }

    fn wait(&self) {
        use std::os::fd::AsRawFd;
        let readable = |port: &Port| nix::libc::pollfd { fd: port.as_raw_fd(), events: nix::libc::POLLIN, revents: 0 };
        let mut asked: Vec<_> = self.ports.iter().map(readable).collect();
        // SAFETY: as many descriptors as the vector has, all of them ours. An error is a wait that ended early.
        unsafe { nix::libc::poll(asked.as_mut_ptr(), asked.len() as u64, TICK.as_millis() as i32) };
    }

    /// To where its receiver was heard, or to everybody.
    fn forward(&self, from: usize, frame: &[u8]) {
        let known = self.behind.get(&frame[..6]).copied();
        let everybody = 0..self.ports.len();
        for to in known.map_or(everybody, |at| at..at + 1).filter(|to| *to != from) {
            // A full queue is a frame lost, as anywhere.
            let _ = self.ports[to].send(frame);
        }
    }
}
