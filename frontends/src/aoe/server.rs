//! Targets on interfaces: receives in batches, hands each frame to the targets it is for, and sends in batches.
//!
//! ```text
//!   interface ─► socket ─► target::receive ─► export (one for each address) ─► merge ─► Device
//!                  ▲                              │ answers                      │
//!                  └──────────── port ◄───────────┴──────────────────────────────┘
//! ```

use super::clock::RunningClock;
use super::counts::Counts;
use super::export::{Around, Export, Hosts, Named};
use super::hold::{Held, hold};
use super::port::Port;
use super::socket::{Buffers, LinkNews, PacketSocket, Sent, SocketError};
use super::target::receive;
use super::wire::Address;
use crate::device::{Device, Exports};
use futures::future::{Either, FutureExt, Shared, join_all, select};
use pnet::util::MacAddr;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use torus_rpc::runtime::{Class, Clock, Runtime, Spawn};
use torus_schema::limits::{AOE_BATCH_FRAMES, AOE_STOP_GRACE};

/// Pause before an interface that failed is listened to again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How often the kernel is asked what it dropped.
const DROPS_INTERVAL: Duration = Duration::from_secs(1);

/// A target to be.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub named: Named,
    /// Nobody ever answered under the address: nothing can be under way to it.
    pub is_new: bool,
}

struct Interface {
    port: Rc<Port>,
    socket: Rc<PacketSocket>,
}

/// On its executor.
pub struct Server<D: Device, R: Runtime> {
    runtime: R,
    counts: Arc<Counts>,
    exports: Vec<Rc<Export<D, R>>>,
    interfaces: Vec<Interface>,
}

impl<D: Device, R: Runtime> Server<D, R> {
    /// From now on it listens, and answers nothing. `same_hosts`: addresses of initiators with several.
    pub fn open(
        runtime: R,
        interfaces: &[String],
        wanted: Vec<Wanted>,
        counts: Arc<Counts>,
        same_hosts: Vec<Vec<MacAddr>>,
    ) -> Result<Self, SocketError> {
        let addresses: Vec<Address> = wanted.iter().map(|wanted| wanted.named.address).collect();
        let open = |name: &String| {
            let socket = PacketSocket::open(name, &addresses)?;
            let port = Rc::new(Port::new(name, socket.link()?, counts.clone()));
            Ok(Interface { port, socket: Rc::new(socket) })
        };
        let interfaces = interfaces.iter().map(open).collect::<Result<Vec<_>, SocketError>>()?;
        let clock = RunningClock::new(runtime.clone());
        runtime.spawn().spawn(Class::Foreground, clock.clone().tick());
        let hosts = |addresses: Vec<MacAddr>| addresses.clone().into_iter().map(move |mac| (mac, addresses[0]));
        let hosts: Rc<Hosts> = Rc::new(same_hosts.into_iter().flat_map(hosts).collect());
        let export = |Wanted { named, is_new }: Wanted| {
            let around = Around { counts: counts.clone(), clock: clock.clone(), hosts: hosts.clone() };
            Rc::new(Export::new(named, runtime.clone(), around, is_new))
        };
        let exports = wanted.into_iter().map(export).collect();
        Ok(Self { runtime, counts, exports, interfaces })
    }

    /// Until `stop`; then what was taken is answered. `tell`: of each change of who serves.
    pub async fn serve<E: Exports<Device = D>>(
        self,
        exports: E,
        stop: impl Future<Output = ()> + 'static,
        tell: impl Fn(&Named, Held) + Clone + 'static,
    ) {
        let stop = stop.boxed_local().shared();
        let server = Rc::new(self);
        for index in 0..server.interfaces.len() {
            server.spawn(&stop, server.clone().listen(index));
            server.spawn(&stop, server.clone().watch_drops(index));
            // Beyond the stop: what is answered last goes out.
            server.runtime.spawn().spawn(Class::Foreground, server.clone().send(index));
        }
        server.spawn(&stop, server.clone().follow_links());
        let holding = server.exports.iter().map(|export| {
            let ports = server.interfaces.iter().map(|interface| interface.port.clone()).collect();
            hold(export.clone(), exports.clone(), ports, stop.clone(), tell.clone())
        });
        join_all(holding).await;
        let idle = join_all(server.exports.iter().map(|export| export.idle()));
        let grace = server.runtime.clock().sleep(AOE_STOP_GRACE);
        if let Either::Right(_) = select(pin!(idle), pin!(grace)).await {
            tracing::warn!("requests that wait for replicas are not waited for");
        }
    }

    fn spawn(&self, stop: &Shared<impl Future<Output = ()> + 'static>, task: impl Future<Output = ()> + 'static) {
        let stop = stop.clone();
        self.runtime.spawn().spawn(Class::Foreground, async move {
            select(pin!(stop), pin!(task)).await;
        });
    }

    /// For ever.
    async fn listen(self: Rc<Self>, index: usize) {
        let Interface { port, socket } = &self.interfaces[index];
        let mut buffers = Buffers::new(port.link().mtu);
        loop {
            if let Err(error) = self.listen_on(port, socket, &mut buffers).await {
                // The interface is down, or away; news of it comes by another way.
                tracing::warn!(interface = %port.name, %error, "cannot listen; trying on");
                self.runtime.clock().sleep(RETRY_AFTER).await;
            }
        }
    }

    async fn listen_on(&self, port: &Rc<Port>, socket: &PacketSocket, buffers: &mut Buffers) -> io::Result<()> {
        loop {
            socket.readable().await?;
            loop {
                if !buffers.is_for(port.link().mtu) {
                    *buffers = Buffers::new(port.link().mtu);
                }
                let count = socket.receive(buffers)?;
                buffers.frames().for_each(|frame| self.receive(frame, port));
                self.exports.iter().for_each(|export| export.start());
                self.counts.frames_received.add(count as u64);
                if count < AOE_BATCH_FRAMES {
                    break;
                }
                // What was begun is to get on as well.
                yield_once().await;
            }
        }
    }

    fn receive(&self, frame: &[u8], port: &Rc<Port>) {
        match receive(frame, &port.face()) {
            Ok((header, argument)) => {
                let meant = self.exports.iter().filter(|export| export.named.address.is_meant_by(header.address));
                meant.for_each(|export| export.receive(&header, argument, port));
            }
            Err(why) => self.counts.leave_out(why),
        }
    }

    /// For ever.
    async fn send(self: Rc<Self>, index: usize) {
        let Interface { port, socket } = &self.interfaces[index];
        let mut sender = loop {
            match socket.sender() {
                Ok(sender) => break sender,
                Err(error) => tracing::warn!(interface = %port.name, %error, "cannot send yet"),
            }
            self.runtime.clock().sleep(RETRY_AFTER).await;
        };
        loop {
            let frames = port.outgoing().await;
            let mut left = &frames[..];
            while let Some(first) = left.first() {
                let gone = match sender.send(left) {
                    Sent::Some(count) => {
                        self.counts.frames_sent.add(count as u64);
                        count
                    }
                    Sent::Later => match sender.send_later(first).await {
                        Ok(()) => {
                            self.counts.frames_sent.add(1);
                            1
                        }
                        Err(error) => self.unsent(port, &error),
                    },
                    Sent::Never(error) => self.unsent(port, &error),
                };
                left = &left[gone..];
            }
        }
    }

    /// One frame; who waits for it asks again.
    fn unsent(&self, port: &Port, error: &io::Error) -> usize {
        self.counts.frames_unsent.add(1);
        if self.counts.frames_unsent.get().is_power_of_two() {
            tracing::warn!(interface = %port.name, %error, "an answer could not be sent");
        }
        1
    }

    /// For ever.
    async fn watch_drops(self: Rc<Self>, index: usize) {
        loop {
            self.runtime.clock().sleep(DROPS_INTERVAL).await;
            if let Ok(drops) = self.interfaces[index].socket.kernel_drops() {
                self.counts.kernel_drops.add(drops.0);
            }
        }
    }

    /// An interface that comes up tells what is there; its address and MTU may be others then.
    async fn follow_links(self: Rc<Self>) {
        let news = match LinkNews::open() {
            Ok(news) => news,
            Err(error) => return tracing::warn!(%error, "changes of interfaces will not be noticed"),
        };
        loop {
            self.look_at_links();
            if let Err(error) = news.next().await {
                tracing::warn!(%error, "changes of interfaces will not be noticed");
                return;
            }
        }
    }

    fn look_at_links(&self) {
        for Interface { port, socket } in &self.interfaces {
            let link = match socket.link() {
                Ok(link) => link,
                Err(error) => {
                    tracing::warn!(%error, "the interface cannot be looked at");
                    continue;
                }
            };
            let before = port.link();
            port.set_link(link);
            if link != before {
                tracing::info!(interface = %port.name, mac = %link.mac, mtu = link.mtu, running = link.running, "changed");
                let owned = self.exports.iter().filter(|export| export.is_owned());
                owned.for_each(|export| port.advertise(export.named.address, &export.lists()));
            }
        }
    }
}

async fn yield_once() {
    let mut yielded = false;
    poll_fn(|context| {
        if yielded {
            return Poll::Ready(());
        }
        yielded = true;
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
