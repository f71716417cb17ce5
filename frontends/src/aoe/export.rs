//! One volume under one address: what frames ask for is carried out while this process is the volume's writer; while it
//! is not, nothing is answered, and only note is taken of writes that pass by (`retransmit` says why).

use super::ata::{self, Operation};
use super::clock::RunningClock;
use super::counts::Counts;
use super::identify::identify;
use super::lists::{Answer, Lists, Request};
use super::merge::Writes;
use super::port::Port;
use super::retransmit::{Covered, History, Tag, Verdict};
use super::store::{self, Stored};
use super::target::{Decision, Dropped, answered, decide};
use super::wire::{self, Address, Header, Registers};
use crate::device::{Device, Piece, VolumeError};
use ahash::RandomState;
use bytes::Bytes;
use pnet::util::MacAddr;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use torus_rpc::metadata::Revision;
use torus_rpc::notify::Notify;
use torus_rpc::runtime::{Class, Runtime, Spawn};
use torus_schema::ids::VolumeId;
use torus_schema::limits::{AOE_FRAME_LIFETIME, AOE_OUTSTANDING_MAX, AOE_OUTSTANDING_PER_SOURCE_MAX};

static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// What is served where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub address: Address,
    pub name: String,
    pub volume: VolumeId,
}

/// Of an initiator with several addresses: each, and the one that stands for all of them.
pub type Hosts = HashMap<MacAddr, MacAddr, RandomState>;

/// What the targets of a process share.
pub struct Around<R: Runtime> {
    pub counts: Arc<Counts>,
    pub clock: Rc<RunningClock<R>>,
    pub hosts: Rc<Hosts>,
}

pub struct Export<D: Device, R: Runtime> {
    pub named: Named,
    pub(super) runtime: R,
    counts: Arc<Counts>,
    clock: Rc<RunningClock<R>>,
    hosts: Rc<Hosts>,
    /// Until then writes may come that were sent while another served the address, or nobody.
    quarantined_until: Cell<Duration>,
    /// Nobody ever answered under the address.
    is_new: Cell<bool>,
    lists: RefCell<(Lists, Revision)>,
    history: RefCell<History>,
    owned: RefCell<Option<Owned<D, R::Spawn>>>,
    outstanding: RefCell<HashMap<MacAddr, usize, RandomState>>,
    total: Cell<usize>,
    idle: Notify,
}

struct Owned<D, S> {
    device: D,
    writes: Writes<D, S>,
}

impl<D: Clone, S> Clone for Owned<D, S> {
    fn clone(&self) -> Self {
        Self { device: self.device.clone(), writes: self.writes.clone() }
    }
}

/// A request that is not answered yet.
struct Asked<D: Device, R: Runtime> {
    export: Rc<Export<D, R>>,
    port: Rc<Port>,
    header: Header,
    registers: Registers,
}

impl<D: Device, R: Runtime> Drop for Asked<D, R> {
    fn drop(&mut self) {
        let export = &self.export;
        let mut outstanding = export.outstanding.borrow_mut();
        if let Some(count) = outstanding.get_mut(&self.header.source) {
            *count -= 1;
            if *count == 0 {
                outstanding.remove(&self.header.source);
                export.idle.notify();
            }
        }
        export.total.set(export.total.get() - 1);
        if export.total.get() == 0 {
            export.idle.notify();
        }
    }
}

impl<D: Device, R: Runtime> Export<D, R> {
    /// `is_new`: nobody ever answered under the address, so that nothing can be under way to it.
    pub fn new(named: Named, runtime: R, around: Around<R>, is_new: bool) -> Self {
        let Around { counts, clock, hosts } = around;
        Self {
            named,
            runtime,
            counts,
            clock,
            hosts,
            quarantined_until: Cell::default(),
            is_new: Cell::new(is_new),
            lists: RefCell::new((Lists::default(), Revision(0))),
            history: RefCell::default(),
            owned: RefCell::default(),
            outstanding: RefCell::default(),
            total: Cell::default(),
            idle: Notify::default(),
        }
    }

    pub fn lists(&self) -> Lists {
        self.lists.borrow().0.clone()
    }

    /// Unless newer ones are known.
    pub fn learn(&self, stored: Stored) {
        let mut lists = self.lists.borrow_mut();
        if stored.revision >= lists.1 {
            *lists = (stored.lists, stored.revision);
        }
    }

    /// A write of before this may be under way, and what came after it may have been answered by another: nothing is
    /// taken for as long as a frame can live.
    pub fn own(&self, device: D) {
        if !self.is_new.replace(false) {
            self.quarantined_until.set(self.clock.now() + AOE_FRAME_LIFETIME);
        }
        let writes = Writes::new(device.clone(), self.runtime.spawn().clone());
        self.owned.replace(Some(Owned { device, writes }));
        self.counts.owned.fetch_add(1, Ordering::Relaxed);
    }

    pub fn disown(&self) {
        if self.owned.take().is_some() {
            self.counts.owned.fetch_sub(1, Ordering::Relaxed);
        }
    }

    pub fn is_owned(&self) -> bool {
        self.owned.borrow().is_some()
    }

    /// Until every request that was taken has ended.
    pub async fn idle(&self) {
        self.idle.until(|| (self.total.get() == 0).then_some(())).await;
    }

    /// Until every request of others than `asking` that the lists no longer let in has ended: a reservation is a fence.
    async fn settled(&self, asking: MacAddr) {
        let is_left = || {
            let (lists, outstanding) = (self.lists.borrow(), self.outstanding.borrow());
            let is_out = |source: &MacAddr| !lists.0.hears(*source) || !lists.0.lets_use(*source);
            outstanding.keys().any(|source| *source != asking && is_out(source))
        };
        self.idle.until(|| (!is_left()).then_some(())).await;
    }

    /// What came in one batch is begun together.
    pub fn start(&self) {
        if let Some(owned) = self.owned.borrow().clone() {
            owned.writes.start();
        }
    }

    pub fn receive(self: &Rc<Self>, header: &Header, argument: &[u8], port: &Rc<Port>) {
        let owned = self.owned.borrow().clone();
        let size_bytes = owned.as_ref().map_or(u64::MAX, |owned| owned.device.size_bytes());
        let face = port.face();
        let address = self.named.address;
        let decision = decide(header, argument, &face, address, &self.lists.borrow().0, size_bytes);
        let Some(owned) = owned else { return self.pass_by(header, &decision) };
        match decision {
            Decision::Drop(why) => self.counts.leave_out(why),
            Decision::Answer(answer) => port.send(answer, Vec::new()),
            Decision::Lists(request) => self.lists_asked(header, request, port),
            Decision::Ata(registers, Operation::Identify) => {
                let Named { volume, name, .. } = &self.named;
                let head = answered(header, &face, address, &ata::done(&registers, registers.count));
                port.send(head, vec![Bytes::copy_from_slice(&identify(*volume, name, size_bytes))]);
            }
            Decision::Ata(registers, Operation::Nothing(count)) => {
                port.send(answered(header, &face, address, &ata::done(&registers, count)), Vec::new());
            }
            Decision::Ata(registers, operation) => {
                let asked = self.asked(header, registers, port);
                match (asked, covered(&operation)) {
                    (None, _) => self.counts.leave_out(Dropped::Busy),
                    (Some(asked), None) => asked.look(owned.device, operation),
                    (Some(asked), Some(covered)) => {
                        if self.admit(&asked, &covered) {
                            asked.write(&owned.writes, operation);
                        }
                    }
                }
            }
        }
    }

    /// Not ours to answer; but what is older than a write that went by must not be taken later.
    fn pass_by(&self, header: &Header, decision: &Decision<'_>) {
        match decision {
            Decision::Drop(why) => self.counts.leave_out(*why),
            decision => {
                if let Decision::Ata(_, operation) = decision
                    && let Some(covered) = covered(operation)
                {
                    self.note(header, &covered);
                }
                self.counts.leave_out(Dropped::Standby);
            }
        }
    }

    fn note(&self, header: &Header, covered: &Covered) {
        self.history.borrow_mut().note(self.clock.now(), self.host_of(header), Tag(header.tag), covered);
    }

    /// Whose tags these are.
    fn host_of(&self, header: &Header) -> MacAddr {
        self.hosts.get(&header.source).copied().unwrap_or(header.source)
    }

    fn admit(&self, asked: &Asked<D, R>, covered: &Covered) -> bool {
        let header = &asked.header;
        if self.clock.now() < self.quarantined_until.get() {
            self.note(header, covered);
            self.counts.leave_out(Dropped::Quarantined);
            return false;
        }
        let host = self.host_of(header);
        let verdict = self.history.borrow_mut().admit(self.clock.now(), host, Tag(header.tag), covered);
        match verdict {
            Verdict::Apply => return true,
            Verdict::AnswerAgain => {
                self.counts.answered_again.add(1);
                asked.answer(&ata::done(&asked.registers, asked.registers.count), Vec::new());
            }
            Verdict::UnderWay => self.counts.leave_out(Dropped::Duplicate),
            Verdict::Late => self.counts.leave_out(Dropped::Late),
            Verdict::TooManySources => self.counts.leave_out(Dropped::Busy),
        }
        false
    }

    /// `None`: too many are not answered yet.
    fn asked(self: &Rc<Self>, header: &Header, registers: Registers, port: &Rc<Port>) -> Option<Asked<D, R>> {
        let mut outstanding = self.outstanding.borrow_mut();
        let of_source = outstanding.get(&header.source).copied().unwrap_or(0);
        if of_source >= AOE_OUTSTANDING_PER_SOURCE_MAX || self.total.get() >= AOE_OUTSTANDING_MAX {
            return None;
        }
        outstanding.insert(header.source, of_source + 1);
        self.total.set(self.total.get() + 1);
        Some(Asked { export: self.clone(), port: port.clone(), header: *header, registers })
    }

    /// Read at once; a change is stored first.
    fn lists_asked(self: &Rc<Self>, header: &Header, request: Request, port: &Rc<Port>) {
        let outcome = request.outcome(&self.lists.borrow().0, header.source, port.offered());
        if outcome.changed.is_none() {
            return self.tell(header, outcome.answer, port);
        }
        let no_registers = Registers { flags: 0, feature: 0, count: 0, command: 0, lba: [0; 6] };
        let Some(asked) = self.asked(header, no_registers, port) else { return self.counts.leave_out(Dropped::Busy) };
        self.runtime.spawn().spawn(Class::Foreground, async move {
            let Asked { export, port, header, .. } = &asked;
            let metadata = export.runtime.metadata();
            let address = export.named.address;
            match store::change(metadata, address, &request, header.source, port.offered()).await {
                Ok((answer, stored)) => {
                    tracing::info!(%address, source = %header.source, ?request, "changed by a client");
                    export.learn(stored);
                    export.settled(header.source).await;
                    export.tell(header, answer, port);
                }
                Err(error) => {
                    tracing::warn!(%address, %error, "a client's change could not be stored");
                    export.counts.leave_out(Dropped::Unanswered);
                }
            }
        });
    }

    fn tell(&self, header: &Header, answer: Option<Answer>, port: &Port) {
        match answer {
            Some(Answer { error, argument }) => {
                let mut frame = wire::response(header, port.face().mac, self.named.address, error);
                frame.extend_from_slice(&argument);
                port.send(frame, Vec::new());
            }
            None => self.counts.leave_out(Dropped::Unmatched),
        }
    }
}

/// What it changes of the device; `None`: nothing.
fn covered(operation: &Operation<'_>) -> Option<Covered> {
    match operation {
        Operation::Write(range, _) => Some(range.clone()),
        Operation::Trim(ranges) => {
            let hull = ranges.iter().cloned().reduce(|a, b| a.start.min(b.start)..a.end.max(b.end));
            Some(hull.unwrap_or(0..0))
        }
        _ => None,
    }
}

impl<D: Device, R: Runtime> Asked<D, R> {
    fn answer(&self, registers: &Registers, data: Vec<Bytes>) {
        let head = answered(&self.header, &self.port.face(), self.export.named.address, registers);
        self.port.send(head, data);
    }

    fn end(&self, result: Result<Vec<Bytes>, VolumeError>) {
        match result {
            Ok(data) => self.answer(&ata::done(&self.registers, self.registers.count), data),
            Err(error) => self.fail(&error),
        }
    }

    fn fail(&self, error: &VolumeError) {
        let failed = &self.export.counts.failed;
        failed.add(1);
        let (address, command) = (self.export.named.address, self.registers.command);
        // The first ones, and ever fewer of a flood.
        if failed.get().is_power_of_two() {
            tracing::warn!(%address, command = format_args!("{command:#04x}"), %error, failed = failed.get(), "an ATA command failed");
        }
        match ata::failed(&self.registers, error) {
            Some(registers) => self.answer(&registers, Vec::new()),
            None => self.export.counts.leave_out(Dropped::Unanswered),
        }
    }

    /// What changes nothing.
    fn look(self, device: D, operation: Operation<'_>) {
        let counts = self.export.counts.clone();
        let spawn = self.export.runtime.spawn().clone();
        match operation {
            Operation::Read(range) => {
                let length = range.end - range.start;
                counts.reads.add(1);
                counts.read_bytes.add(length);
                spawn.spawn(Class::Foreground, async move {
                    let read = device.read(range.start, length).await.map(|pieces| data_of(&pieces));
                    match read {
                        Ok(data) if data.iter().map(|data| data.len() as u64).sum::<u64>() != length => {
                            tracing::error!(?range, "the device read another length; a bug");
                        }
                        read => self.end(read),
                    }
                });
            }
            Operation::Verify(range) => spawn.spawn(Class::Foreground, async move {
                self.end(device.read(range.start, range.end - range.start).await.map(|_| Vec::new()));
            }),
            _ => {
                counts.flushes.add(1);
                spawn.spawn(Class::Foreground, async move {
                    self.end(device.flush().await.map(|()| Vec::new()));
                });
            }
        }
    }

    /// Under the locks of its blocks, durable before it is answered.
    fn write(self, writes: &Writes<D, R::Spawn>, operation: Operation<'_>) {
        let counts = self.export.counts.clone();
        let covered = covered(&operation).unwrap_or_default();
        let done = move |result: Result<(), VolumeError>| {
            let (host, tag) = (self.export.host_of(&self.header), Tag(self.header.tag));
            self.export.history.borrow_mut().ended(host, tag, &covered, result.is_ok());
            self.end(result.map(|()| Vec::new()));
        };
        match operation {
            Operation::Write(range, data) => {
                counts.writes.add(1);
                counts.written_bytes.add(data.len() as u64);
                writes.write(range.start, Bytes::copy_from_slice(data), done);
            }
            Operation::Trim(ranges) => {
                counts.trims.add(1);
                writes.clear(ranges, done);
            }
            _ => tracing::error!("what writes nothing was taken for a write; a bug"),
        }
    }
}

fn data_of(pieces: &[Piece]) -> Vec<Bytes> {
    let mut data = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match piece {
            Piece::Data(bytes) => data.push(bytes.clone()),
            Piece::Zeros(count) => {
                let mut left = *count as usize;
                while left > 0 {
                    let here = left.min(ZEROS.len());
                    data.push(Bytes::from_static(&ZEROS[..here]));
                    left -= here;
                }
            }
        }
    }
    data
}

#[cfg(test)]
#[path = "export_tests.rs"]
mod tests;
