//! An executor's end of what it tells the others: messages that go out, gathered until its tasks rest, and who waits for
//! what comes in.

use super::far::{FarDevice, Handle};
use super::homes::Claim;
use super::message::{Asked, Attached, Batch, DeviceId, Message, Order, Outcome, RequestId, Told};
use crate::device::{ExportInfo, VolumeError};
use futures::StreamExt;
use futures::channel::{mpsc, oneshot};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Poll, Waker};
use torus_rpc::notify::Notify;
use torus_rpc::runtime::{Class, Spawn};
use torus_schema::hash::Map;

/// What an executor handed to others; read by any thread.
#[derive(Debug, Default)]
pub struct Handoffs {
    /// Messages: requests, and answers to those of others.
    pub messages: AtomicU64,
    /// What they went in; each wakes the other executor once at most.
    pub batches: AtomicU64,
}

/// Before it is on its executor.
pub struct Unopened {
    executor: usize,
    inbox: mpsc::UnboundedReceiver<Batch>,
    others: Vec<mpsc::UnboundedSender<Batch>>,
    pub handoffs: Arc<Handoffs>,
}

/// One for each executor. What is under way is bounded by what connections may have outstanding.
pub fn ports(executors: usize) -> Vec<Unopened> {
    let (others, inboxes): (Vec<_>, Vec<_>) = (0..executors).map(|_| mpsc::unbounded()).unzip();
    let unopened = |(executor, inbox)| Unopened { executor, inbox, others: others.clone(), handoffs: Arc::default() };
    inboxes.into_iter().enumerate().map(unopened).collect()
}

/// Messages from the others, one by one.
pub struct Inbox {
    receiver: mpsc::UnboundedReceiver<Batch>,
    from: usize,
    messages: std::vec::IntoIter<Message>,
}

impl Inbox {
    pub async fn next(&mut self) -> Option<(usize, Message)> {
        loop {
            if let Some(message) = self.messages.next() {
                return Some((self.from, message));
            }
            let batch = self.receiver.next().await?;
            (self.from, self.messages) = (batch.from, batch.messages.into_iter());
        }
    }
}

pub struct Port {
    pub executor: usize,
    outboxes: Vec<Outbox>,
    next_request: Cell<RequestId>,
    waiting: RefCell<Map<RequestId, Waiting>>,
    /// Devices elsewhere, by where and which.
    devices: RefCell<Map<(usize, DeviceId), Weak<Handle>>>,
    /// Executors that ask no more, this one included.
    left: RefCell<Vec<bool>>,
    /// Those that are gone, or never began.
    lost: RefCell<Vec<bool>>,
    leaving: Notify,
}

struct Waiting {
    home: usize,
    waiter: Waiter,
}

enum Waiter {
    Described(oneshot::Sender<Result<ExportInfo, VolumeError>>),
    Attached(oneshot::Sender<Result<FarDevice, VolumeError>>),
    Carried(oneshot::Sender<Result<Outcome, VolumeError>>),
}

/// To one other executor.
#[derive(Default)]
struct Outbox {
    messages: RefCell<VecDeque<Message>>,
    sender: RefCell<Option<Waker>>,
}

impl Outbox {
    fn push(&self, message: Message) {
        self.messages.borrow_mut().push_back(message);
        if let Some(waker) = self.sender.take() {
            waker.wake();
        }
    }

    fn is_empty(&self) -> bool {
        self.messages.borrow().is_empty()
    }

    async fn take(&self) -> Vec<Message> {
        poll_fn(|context| {
            let mut messages = self.messages.borrow_mut();
            if !messages.is_empty() {
                return Poll::Ready(messages.drain(..).collect());
            }
            *self.sender.borrow_mut() = Some(context.waker().clone());
            Poll::Pending
        })
        .await
    }
}

impl Port {
    pub fn open(unopened: Unopened, spawn: &impl Spawn) -> (Rc<Self>, Inbox) {
        let Unopened { executor, inbox, others, handoffs } = unopened;
        let port = Rc::new(Self {
            executor,
            outboxes: others.iter().map(|_| Outbox::default()).collect(),
            next_request: Cell::new(0),
            waiting: RefCell::default(),
            devices: RefCell::default(),
            left: RefCell::new(vec![false; others.len()]),
            lost: RefCell::new(vec![false; others.len()]),
            leaving: Notify::default(),
        });
        for (to, other) in others.into_iter().enumerate().filter(|(to, _)| *to != executor) {
            spawn.spawn(Class::Foreground, send(port.clone(), to, other, handoffs.clone()));
        }
        (port, Inbox { receiver: inbox, from: executor, messages: Vec::new().into_iter() })
    }

    pub fn ask(&self, home: usize, asked: Asked) {
        self.outboxes[home].push(Message::Asked(asked));
    }

    pub fn tell(&self, asker: usize, told: Told) {
        self.outboxes[asker].push(Message::Told(told));
    }

    /// Nobody would answer what is asked of an executor that has ended: then the waiter is dropped at once.
    fn wait(&self, home: usize, waiter: Waiter) -> RequestId {
        let id = self.next_request.replace(self.next_request.get() + 1);
        if !self.lost.borrow()[home] {
            self.waiting.borrow_mut().insert(id, Waiting { home, waiter });
        }
        id
    }

    pub async fn describe(&self, home: usize, name: &str) -> Result<ExportInfo, VolumeError> {
        let (answer, answered) = oneshot::channel();
        let id = self.wait(home, Waiter::Described(answer));
        self.ask(home, Asked::Describe { id, name: name.to_string() });
        answered.await.unwrap_or_else(|_| Err(gone()))
    }

    pub async fn attach(&self, claim: Claim) -> Result<FarDevice, VolumeError> {
        let (answer, answered) = oneshot::channel();
        let home = claim.executor;
        let id = self.wait(home, Waiter::Attached(answer));
        self.ask(home, Asked::Attach { id, claim });
        answered.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Handed over before the first await; carried out whether or not somebody waits.
    pub async fn carry(&self, home: usize, device: DeviceId, order: Order) -> Result<Outcome, VolumeError> {
        let (answer, answered) = oneshot::channel();
        let id = self.wait(home, Waiter::Carried(answer));
        self.ask(home, Asked::Carry { id, device, order });
        answered.await.unwrap_or_else(|_| Err(gone()))
    }

    /// What is asked of this executor is given back, for its host.
    pub fn receive(self: &Rc<Self>, from: usize, message: Message) -> Option<Asked> {
        match message {
            Message::Asked(asked) => return Some(asked),
            Message::Told(told) => self.told(from, told),
            Message::Left => self.one_left(from),
        }
        None
    }

    fn told(self: &Rc<Self>, home: usize, told: Told) {
        let waiter = |id| self.waiting.borrow_mut().remove(&id).map(|waiting| waiting.waiter);
        // Whoever does not wait any more need not hear; a device that nobody waits for is released by being dropped.
        match told {
            Told::Described { id, described } => {
                if let Some(Waiter::Described(answer)) = waiter(id) {
                    let _ = answer.send(described);
                }
            }
            Told::Attached { id, attached } => {
                let device = attached.map(|attached| self.device(home, attached));
                if let Some(Waiter::Attached(answer)) = waiter(id) {
                    let _ = answer.send(device);
                }
            }
            Told::Carried { id, result } => {
                if let Some(Waiter::Carried(answer)) = waiter(id) {
                    let _ = answer.send(result);
                }
            }
            Told::Resized { device, size_bytes } => self.with(home, device, |handle| handle.resized(size_bytes)),
            Told::Ended { device, because } => self.with(home, device, |handle| handle.end(because)),
        }
    }

    fn device(self: &Rc<Self>, home: usize, attached: Attached) -> FarDevice {
        let handle = Rc::new(Handle::new(self.clone(), home, attached));
        self.devices.borrow_mut().insert((home, attached.device), Rc::downgrade(&handle));
        FarDevice::new(handle)
    }

    fn with(&self, home: usize, device: DeviceId, tell: impl FnOnce(&Handle)) {
        let handle = self.devices.borrow().get(&(home, device)).and_then(Weak::upgrade);
        if let Some(handle) = handle {
            tell(&handle);
        }
    }

    pub fn release(&self, home: usize, device: DeviceId) {
        self.devices.borrow_mut().remove(&(home, device));
        self.ask(home, Asked::Release { device });
    }

    /// That executor is gone, or never began: nobody is left waiting for it. One that ends by a panic ends the process.
    fn lost(&self, home: usize) {
        self.lost.borrow_mut()[home] = true;
        let lost: Vec<_> = self.waiting.borrow_mut().extract_if(|_, waiting| waiting.home == home).collect();
        if !self.left.borrow()[home] {
            tracing::error!(executor = home, requests = lost.len(), "an executor has ended before its time");
        }
        drop(lost);
        self.one_left(home);
        let of_home = |((at, _), handle): (&(usize, DeviceId), &Weak<Handle>)| (*at == home).then(|| handle.upgrade());
        let devices: Vec<_> = self.devices.borrow().iter().filter_map(of_home).flatten().collect();
        devices.iter().for_each(|device| device.end(GONE.to_string()));
    }

    fn one_left(&self, executor: usize) {
        self.left.borrow_mut()[executor] = true;
        self.leaving.notify();
    }

    pub async fn leave(&self) {
        let others = self.outboxes.iter().enumerate().filter(|(to, _)| *to != self.executor);
        others.for_each(|(_, outbox)| outbox.push(Message::Left));
        self.one_left(self.executor);
        // Also until the others have been told: the last one would end before that.
        let told = || {
            let mut outboxes = self.outboxes.iter().enumerate();
            outboxes.all(|(to, outbox)| to == self.executor || self.lost.borrow()[to] || outbox.is_empty())
        };
        let all_left = || self.left.borrow().iter().all(|left| *left);
        self.leaving.until(|| (all_left() && told()).then_some(())).await;
    }
}

const GONE: &str = "the executor it lived on has ended; connect again";

fn gone() -> VolumeError {
    VolumeError::SessionEnded { because: GONE.to_string() }
}

/// Runs behind the tasks that were ready before it: what they tell goes over with it.
async fn send(port: Rc<Port>, to: usize, other: mpsc::UnboundedSender<Batch>, handoffs: Arc<Handoffs>) {
    loop {
        let messages = port.outboxes[to].take().await;
        // Written by this executor alone.
        handoffs.messages.fetch_add(messages.len() as u64, Ordering::Relaxed);
        handoffs.batches.fetch_add(1, Ordering::Relaxed);
        if other.unbounded_send(Batch { from: port.executor, messages }).is_err() {
            return port.lost(to);
        }
        if port.left.borrow()[port.executor] {
            port.leaving.notify();
        }
    }
}
