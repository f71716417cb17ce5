//! Links of the simulated world. Frames are encoded and decoded as on a real wire.
//!
//! Fault model: a message takes 20 µs to 1 ms, one in some dozens up to 50 ms, and one in some hundreds longer than
//! any timeout. A connection breaks when one end is killed. While two processes are cut off from each other, messages
//! between them are held back and delivered after the cut, long after the sender gave up. Answers get lost and
//! requests are carried out twice with the probability of `Faults`. A cut can be one-way. A process can be slow: some or
//! all messages to and from it take longer.

use super::{Here, ProcessId, World};
use crate::error::LinkError;
use crate::frame::{PREFIX_BYTES, Prefix, decode_reply, decode_request, encode_reply, encode_request};
use crate::message::{Envelope, Operation, Reply};
use crate::runtime::{Connect, Link, Peer};
use bytes::Bytes;
use futures::FutureExt;
use futures::channel::oneshot;
use futures::future::LocalBoxFuture;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;
use torus_schema::limits::{LINK_DEAD_AFTER, LINK_PROBE_AFTER, REQUEST_DEADLINE};

type Handler = Rc<dyn Fn(Envelope, Operation, Bytes) -> LocalBoxFuture<'static, (Reply, Vec<u8>)>>;

/// One in that many; 0: never.
#[derive(Clone, Copy, Debug)]
pub struct Faults {
    pub slow: u64,
    pub very_late: u64,
    /// Half of these times it is the request that gets lost.
    pub answer_lost: u64,
    pub carried_out_twice: u64,
}

impl Faults {
    pub const NONE: Faults = Faults { slow: 0, very_late: 0, answer_lost: 0, carried_out_twice: 0 };
}

pub(super) struct Network {
    endpoints: RefCell<BTreeMap<String, (ProcessId, Handler)>>,
    /// From whom nothing arrives at whom.
    cuts: RefCell<BTreeSet<(ProcessId, ProcessId)>>,
    /// Messages to and from these: one in so many takes so much longer.
    slowed: RefCell<BTreeMap<ProcessId, (u64, Duration)>>,
    faults: Cell<Faults>,
}

impl Default for Network {
    fn default() -> Self {
        Self {
            endpoints: RefCell::default(),
            cuts: RefCell::default(),
            slowed: RefCell::default(),
            faults: Cell::new(Faults::NONE),
        }
    }
}

impl Network {
    pub(super) fn close(&self) {
        let endpoints = self.endpoints.take();
        drop(endpoints);
    }
}

impl World {
    /// Requests to `address` are answered by `handler`, run in tasks of `process`. Replaces who was there.
    pub fn listen<F>(
        &self,
        process: ProcessId,
        address: &str,
        handler: impl Fn(Envelope, Operation, Bytes) -> F + 'static,
    ) where
        F: Future<Output = (Reply, Vec<u8>)> + 'static,
    {
        let handler: Handler = Rc::new(move |e, o, p| handler(e, o, p).boxed_local());
        self.state.network.endpoints.borrow_mut().insert(address.to_string(), (process, handler));
    }

    pub fn set_faults(&self, faults: Faults) {
        self.state.network.faults.set(faults);
    }

    /// Messages between the two are held back until `heal`.
    pub fn cut(&self, a: ProcessId, b: ProcessId) {
        self.cut_one_way(a, b);
        self.cut_one_way(b, a);
    }

    /// The same for what `from` sends to `to`; what `to` sends arrives.
    pub fn cut_one_way(&self, from: ProcessId, to: ProcessId) {
        self.state.network.cuts.borrow_mut().insert((from, to));
    }

    pub fn heal(&self, a: ProcessId, b: ProcessId) {
        let mut cuts = self.state.network.cuts.borrow_mut();
        cuts.remove(&(a, b));
        cuts.remove(&(b, a));
    }

    /// One in `one_in` messages to or from the process takes so much longer; 0: none does any more.
    pub fn slow_down(&self, process: ProcessId, one_in: u64, by: Duration) {
        self.state.network.slowed.borrow_mut().insert(process, (one_in, by));
    }

    fn slowed(&self, a: ProcessId, b: ProcessId) -> Duration {
        let slowed = self.state.network.slowed.borrow();
        let found = [a, b].into_iter().find_map(|process| slowed.get(&process).copied());
        drop(slowed);
        found.filter(|(one_in, _)| self.hits(*one_in)).map_or(Duration::ZERO, |(_, by)| by)
    }

    /// Everybody reaches everybody again, as fast as ever.
    pub fn heal_network(&self) {
        self.state.network.cuts.borrow_mut().clear();
        self.state.network.slowed.borrow_mut().clear();
        self.set_faults(Faults::NONE);
    }

    fn is_cut(&self, from: ProcessId, to: ProcessId) -> bool {
        self.state.network.cuts.borrow().contains(&(from, to))
    }

    fn hits(&self, one_in: u64) -> bool {
        one_in > 0 && self.one_in(one_in)
    }

    /// One message on its way from `a` to `b`.
    async fn travel(&self, a: ProcessId, b: ProcessId) {
        let faults = self.state.network.faults.get();
        let mut micros = 20 + self.random_below(980);
        if self.hits(faults.slow) {
            micros += self.random_below(50_000);
        }
        if self.hits(faults.very_late) {
            micros += self.random_below(20_000_000);
        }
        self.sleep(Duration::from_micros(micros) + self.slowed(a, b)).await;
        while self.is_cut(a, b) {
            self.sleep(Duration::from_millis(10)).await;
        }
    }

    fn endpoint(&self, address: &str) -> Option<(ProcessId, Handler)> {
        let endpoints = self.state.network.endpoints.borrow();
        endpoints.get(address).filter(|(process, _)| self.is_alive(*process)).cloned()
    }
}

#[derive(Clone)]
pub struct SimulatedConnect {
    here: Here,
}

impl SimulatedConnect {
    pub(super) fn new(here: Here) -> Self {
        Self { here }
    }
}

impl Connect for SimulatedConnect {
    type Link = SimulatedLink;

    async fn connect(&self, peer: &Peer) -> Result<SimulatedLink, LinkError> {
        let world = &self.here.world;
        let address = peer.address.clone();
        let Some((process, _)) = world.endpoint(&address) else {
            world.sleep(Duration::from_micros(50)).await;
            return Err(LinkError::ConnectionRefused { address, because: "nobody listens there".to_string() });
        };
        let travel = async {
            world.travel(self.here.process, process).await;
            world.travel(process, self.here.process).await;
        };
        let too_long = world.sleep(LINK_DEAD_AFTER);
        futures::pin_mut!(travel, too_long);
        match futures::future::select(travel, too_long).await {
            futures::future::Either::Left(_) if world.is_alive(process) => {
                Ok(SimulatedLink { here: self.here.clone(), process, address, broken: Rc::default() })
            }
            futures::future::Either::Left(_) => {
                Err(LinkError::ConnectionRefused { address, because: "the process ended".to_string() })
            }
            futures::future::Either::Right(_) => {
                Err(LinkError::Silent { address, silent_ms: LINK_DEAD_AFTER.as_millis() as u64 })
            }
        }
    }
}

#[derive(Clone)]
pub struct SimulatedLink {
    here: Here,
    process: ProcessId,
    address: String,
    /// A connection that failed once stays failed: what was outstanding on it has no answer.
    broken: Rc<Cell<bool>>,
}

impl Link for SimulatedLink {
    async fn call(
        &self,
        envelope: &Envelope,
        operation: &Operation,
        payload: &Bytes,
    ) -> Result<(Reply, Bytes), LinkError> {
        let mut frame = Vec::new();
        encode_request(&mut frame, 0, envelope, operation, payload.len());
        frame.extend_from_slice(payload);
        if self.broken.get() {
            return Err(self.closed());
        }
        let (world, from) = (&self.here.world, self.here.process);
        world.note(|| format!("{} → {}: {}", world.name_of(from), self.address, request_line(envelope, operation)));
        let (answer, answered) = oneshot::channel();
        world.passes(u64::from(crc32c::crc32c(&frame)));
        self.deliver(Bytes::from(frame), answer);
        let too_long = self.too_long().fuse();
        let answered = answered.fuse();
        futures::pin_mut!(answered, too_long);
        let result = futures::select_biased! {
            frame = answered => frame.map_err(|_| self.closed()),
            () = too_long => Err(LinkError::Silent {
                address: self.address.clone(),
                silent_ms: REQUEST_DEADLINE.as_millis() as u64,
            }),
        };
        let result = match result {
            Ok(frame) => self.decode(frame),
            Err(error) => {
                self.broken.set(true);
                Err(error)
            }
        };
        world.note(|| {
            let answer = match &result {
                Ok((reply, _)) => format!("{:?}", reply.answer),
                Err(error) => format!("no answer: {error}"),
            };
            format!("{} ← {}: {answer} to {}", world.name_of(from), self.address, operation_line(operation))
        });
        result
    }
}

fn request_line(envelope: &Envelope, operation: &Operation) -> String {
    let Envelope { volume, epoch, generation, flush_point, .. } = envelope;
    let volume = volume.to_string();
    format!("{} of {:.8} epoch {epoch} generation {generation} F {flush_point}", operation_line(operation), volume)
}

fn operation_line(operation: &Operation) -> String {
    match operation {
        Operation::Write { first, version, durable, checksums } => {
            format!(
                "Write {version} to {} blocks from {first}{}",
                checksums.len(),
                if *durable { ", durable" } else { "" }
            )
        }
        other => format!("{other:?}"),
    }
}

impl SimulatedLink {
    /// As a real link probes: nothing is heard while the two are cut off from each other.
    async fn too_long(&self) {
        let (deadline, dead_after) = (REQUEST_DEADLINE.min(LINK_DEAD_AFTER * 2), LINK_DEAD_AFTER + LINK_PROBE_AFTER);
        let (mut waited, mut silent) = (Duration::ZERO, Duration::ZERO);
        while waited < deadline && silent < dead_after {
            self.here.world.sleep(LINK_PROBE_AFTER).await;
            waited += LINK_PROBE_AFTER;
            let (world, from, to) = (&self.here.world, self.here.process, self.process);
            let cut = world.is_cut(from, to) || world.is_cut(to, from);
            silent = if cut { silent + LINK_PROBE_AFTER } else { Duration::ZERO };
        }
    }

    /// The message is under way whatever becomes of the caller, unless the whole process dies before it left.
    fn deliver(&self, frame: Bytes, answer: oneshot::Sender<Bytes>) {
        let (world, from, to, address) =
            (self.here.world.clone(), self.here.process, self.process, self.address.clone());
        let faults = world.state.network.faults.get();
        let twice = world.hits(faults.carried_out_twice);
        let lost = world.hits(faults.answer_lost);
        let never_arrives = lost && world.one_in(2);
        if twice {
            let (world, address, frame) = (world.clone(), address.clone(), frame.clone());
            self.here.world.spawn(to, async move {
                world.travel(from, to).await;
                if let Some((_, handler)) = world.endpoint(&address).filter(|(process, _)| *process == to) {
                    carry_out(handler, frame).await;
                }
            });
        }
        // In a task of the receiver: what a killed sender sent still arrives.
        self.here.world.spawn(to, async move {
            world.travel(from, to).await;
            let Some((_, handler)) = world.endpoint(&address).filter(|(process, _)| *process == to) else { return };
            if never_arrives {
                // As on a connection on which nothing is heard any more: it ends by the caller's deadline.
                world.sleep(REQUEST_DEADLINE * 2).await;
                return;
            }
            let reply = carry_out(handler, frame).await;
            world.travel(to, from).await;
            if !lost {
                // The caller may have given up.
                let _ = answer.send(reply);
            }
        });
    }

    fn decode(&self, frame: Bytes) -> Result<(Reply, Bytes), LinkError> {
        let wrong = |because: String| LinkError::Protocol { address: self.address.clone(), because };
        let prefix = Prefix::parse(&frame).map_err(|error| wrong(error.to_string()))?;
        let prefix = prefix.ok_or_else(|| wrong("short frame".to_string()))?;
        let header = &frame[PREFIX_BYTES..PREFIX_BYTES + prefix.header_bytes];
        let reply = decode_reply(&prefix, header).map_err(|error| wrong(error.to_string()))?;
        Ok((reply, frame.slice(PREFIX_BYTES + prefix.header_bytes..)))
    }

    fn closed(&self) -> LinkError {
        LinkError::Closed { address: self.address.clone(), because: "the peer is gone".to_string() }
    }
}

async fn carry_out(handler: Handler, frame: Bytes) -> Bytes {
    let prefix = Prefix::parse(&frame).ok().flatten().expect("frames in the simulation are whole");
    let header = &frame[PREFIX_BYTES..PREFIX_BYTES + prefix.header_bytes];
    let (envelope, operation) = decode_request(&prefix, header).expect("frames in the simulation are whole");
    let payload = frame.slice(PREFIX_BYTES + prefix.header_bytes..);
    let (reply, payload) = handler(envelope, operation, payload).await;
    let mut out = Vec::new();
    encode_reply(&mut out, prefix.request_id, &reply, payload.len());
    out.extend_from_slice(&payload);
    Bytes::from(out)
}
