//! A pipelined connection to one shard, on glommio: one task sends, one receives, and a third watches as long as
//! something is outstanding (an idle connection costs nothing).

use crate::answers::{Answers, Waiting};
use crate::error::LinkError;
use crate::frame::{decode_reply, encode_request};
use crate::local::{self, Via};
use crate::message::{Answer, Envelope, Operation, PROTOCOL, Reply};
use crate::outbox::{Batch, Outbox};
use crate::receive::ReceiveBuffer;
use crate::runtime::{Connect, Link, Peer};
use crate::send::Sender;
use bytes::Bytes;
use glommio::net::TcpStream;
use std::cell::{Cell, RefCell};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;
use torus_schema::limits::{LINK_DEAD_AFTER, LINK_PROBE_AFTER, REQUEST_DEADLINE};

/// A shard of this host that has not greeted by then is tried by TCP.
const LOCAL_HELLO_WITHIN: Duration = Duration::from_millis(500);

#[derive(Clone)]
pub struct TcpLink {
    handle: Rc<Handle>,
}

/// The tasks share the connection; when nobody else does any more it is closed.
struct Handle {
    connection: Rc<Connection>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.connection.fail(self.connection.closed("nobody uses it any more"));
    }
}

struct Connection {
    address: String,
    /// To shut it down whoever is at work on it.
    socket: OwnedFd,
    outbox: Rc<Outbox>,
    answers: Rc<Answers>,
    /// Why no answer will come any more.
    failed: RefCell<Option<LinkError>>,
    /// Ticks of the watch so far; a tick is `LINK_PROBE_AFTER`.
    ticks: Cell<u32>,
    watching: Cell<bool>,
    /// Something was received since the last tick.
    heard: Cell<bool>,
}

impl Link for TcpLink {
    async fn call(
        &self,
        envelope: &Envelope,
        operation: &Operation,
        payload: &Bytes,
    ) -> Result<(Reply, Bytes), LinkError> {
        self.handle.connection.submit(envelope, operation, payload)?.await
    }
}

#[derive(Clone, Default)]
pub struct TcpConnect;

impl Connect for TcpConnect {
    type Link = TcpLink;

    async fn connect(&self, peer: &Peer) -> Result<TcpLink, LinkError> {
        let address = &peer.address;
        if let Some(socket) = local::connect_to(address) {
            // SAFETY: a stream socket that was made for this, and is owned by nobody else.
            let stream = unsafe { TcpStream::from_raw_fd(socket.into_raw_fd()) };
            match greet(stream, Via::Unix, peer, LOCAL_HELLO_WITHIN).await {
                // A node that is gone and whose socket is not yet, or one that says it is where it is not: who answers
                // at the address itself counts.
                Err(error) => tracing::debug!(address, %error, "not greeted within the host; connecting by TCP"),
                link => return link,
            }
        }
        match TcpStream::connect_timeout(&**address, LINK_DEAD_AFTER).await {
            Ok(stream) => greet(stream, Via::Tcp, peer, LINK_DEAD_AFTER).await,
            Err(error) => Err(connect_error(address.clone(), error)),
        }
    }
}

/// Says hello, and hears it.
async fn greet(stream: TcpStream, via: Via, peer: &Peer, within: Duration) -> Result<TcpLink, LinkError> {
    let address = &peer.address;
    let link = TcpLink::start(stream, via, address.clone())?;
    let hello = Operation::Hello { protocol: PROTOCOL, cluster: peer.cluster, node: peer.node, shard: peer.shard };
    let nothing = Bytes::new();
    let answer = link.call(&Envelope::NONE, &hello, &nothing);
    let deadline = glommio::timer::sleep(within);
    futures::pin_mut!(answer, deadline);
    match futures::future::select(answer, deadline).await {
        futures::future::Either::Right(_) => {
            Err(LinkError::Silent { address: address.clone(), silent_ms: within.as_millis() as u64 })
        }
        futures::future::Either::Left((answer, _)) => match answer?.0.answer {
            Answer::Hello { protocol: PROTOCOL } => Ok(link.clone()),
            Answer::Refused(refusal) => Err(LinkError::Hello { address: address.clone(), refusal }),
            other => Err(LinkError::Protocol {
                address: address.clone(),
                because: format!("the hello was answered by {other:?}, expected protocol {PROTOCOL}"),
            }),
        },
    }
}

fn connect_error(address: String, error: glommio::GlommioError<()>) -> LinkError {
    let text = error.to_string();
    let error = match error {
        // The conversion would keep the kind alone, which has no word for most of these.
        glommio::GlommioError::EnhancedIoError { source, .. } => source,
        other => std::io::Error::from(other),
    };
    match error.kind() {
        _ if is_local(&error) => LinkError::Local { address, because: text },
        std::io::ErrorKind::ConnectionRefused | std::io::ErrorKind::ConnectionReset => {
            LinkError::ConnectionRefused { address, because: text }
        }
        _ => LinkError::Silent { address, silent_ms: LINK_DEAD_AFTER.as_millis() as u64 },
    }
}

/// Descriptors, memory, ports or a network that this host lacks: every peer would look dead, and be marked stale for
/// nothing. A host that is gone from a network we have is not among them (EHOSTUNREACH).
fn is_local(error: &std::io::Error) -> bool {
    use nix::errno::Errno;
    let local = [
        Errno::EMFILE,
        Errno::ENFILE,
        Errno::ENOBUFS,
        Errno::ENOMEM,
        Errno::EADDRNOTAVAIL,
        Errno::ENETDOWN,
        Errno::ENETUNREACH,
        Errno::EACCES,
        Errno::EPERM,
    ];
    error.raw_os_error().is_some_and(|code| local.contains(&Errno::from_raw(code)))
}

impl TcpLink {
    fn start(stream: TcpStream, via: Via, address: String) -> Result<TcpLink, LinkError> {
        let closed = |error: std::io::Error| {
            let (address, because) = (address.clone(), error.to_string());
            if is_local(&error) {
                LinkError::Local { address, because }
            } else {
                LinkError::Closed { address, because }
            }
        };
        if via == Via::Tcp {
            stream.set_nodelay(true).map_err(|error| closed(error.into()))?;
        }
        let receiving = duplicate(&stream).map_err(closed)?;
        let connection = Rc::new(Connection {
            socket: duplicate_descriptor(&stream).map_err(closed)?,
            address,
            outbox: Rc::default(),
            answers: Rc::default(),
            failed: RefCell::default(),
            ticks: Cell::new(0),
            watching: Cell::new(false),
            heard: Cell::new(false),
        });
        glommio::spawn_local(send(connection.clone(), Sender::new(stream, via))).detach();
        glommio::spawn_local(receive(connection.clone(), receiving)).detach();
        Ok(TcpLink { handle: Rc::new(Handle { connection }) })
    }
}

/// A second stream on the same socket: reading needs a stream of its own.
pub fn duplicate(stream: &TcpStream) -> std::io::Result<TcpStream> {
    let copy = duplicate_descriptor(stream)?;
    // SAFETY: the descriptor is a stream socket and from here on owned by the new stream alone.
    Ok(unsafe { TcpStream::from_raw_fd(copy.into_raw_fd()) })
}

fn duplicate_descriptor(stream: &TcpStream) -> std::io::Result<OwnedFd> {
    // SAFETY: the stream owns the descriptor for longer than this borrow of it.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(stream.as_raw_fd()) };
    borrowed.try_clone_to_owned()
}

impl Connection {
    fn submit(
        self: &Rc<Self>,
        envelope: &Envelope,
        operation: &Operation,
        payload: &Bytes,
    ) -> Result<Waiting, LinkError> {
        if let Some(error) = &*self.failed.borrow() {
            return Err(error.clone());
        }
        let id = self.answers.expect(self.ticks.get());
        let encode = |out: &mut Vec<u8>| encode_request(out, id, envelope, operation, payload.len());
        self.outbox.push(encode, (!payload.is_empty()).then(|| payload.clone()));
        if !self.watching.replace(true) {
            // Its silence counts from this request on.
            self.heard.set(false);
            glommio::spawn_local(watch(self.clone())).detach();
        }
        Ok(self.answers.wait(id))
    }

    /// The first failure counts; everybody who waits hears of it.
    fn fail(&self, error: LinkError) {
        if self.failed.borrow().is_some() {
            return;
        }
        *self.failed.borrow_mut() = Some(error.clone());
        tracing::debug!(address = %self.address, %error, outstanding = self.answers.outstanding(), "link failed");
        self.outbox.close();
        // Ends a send that the peer does not take, and the receiver, which has its own descriptor.
        let _ = nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        self.answers.fail_all(&error);
    }

    fn end_overdue(&self, tick: u32) {
        let deadline_ticks = REQUEST_DEADLINE.as_millis().div_ceil(LINK_PROBE_AFTER.as_millis()) as u32;
        self.answers.fail_overdue(tick, deadline_ticks, |ticks| {
            let waited_ms = u64::from(ticks) * LINK_PROBE_AFTER.as_millis() as u64;
            LinkError::Overdue { address: self.address.clone(), waited_ms }
        });
    }

    fn closed(&self, because: &str) -> LinkError {
        LinkError::Closed { address: self.address.clone(), because: because.to_string() }
    }
}

async fn send(connection: Rc<Connection>, mut sender: Sender) {
    let mut batch = Batch::default();
    while connection.outbox.take(&mut batch).await {
        if let Err(error) = sender.send(&mut batch, &connection.outbox).await {
            return connection.fail(connection.closed(&error.to_string()));
        }
    }
    sender.shut_down().await;
}

async fn receive(connection: Rc<Connection>, mut stream: TcpStream) {
    let mut buffer = ReceiveBuffer::default();
    loop {
        match buffer.fill(&mut stream).await {
            Ok(0) => return connection.fail(connection.closed("the peer closed it")),
            Ok(_) => connection.heard.set(true),
            Err(error) => return connection.fail(connection.closed(&error.to_string())),
        }
        loop {
            let decoded = buffer.next_frame().and_then(|frame| {
                frame.map(|frame| Ok((decode_reply(&frame.prefix, &frame.header)?, frame))).transpose()
            });
            match decoded {
                Ok(Some((reply, frame))) => {
                    connection.answers.answer(frame.prefix.request_id, Ok((reply, frame.payload)))
                }
                Ok(None) => break,
                Err(error) => {
                    let address = connection.address.clone();
                    return connection.fail(LinkError::Protocol { address, because: error.to_string() });
                }
            }
        }
    }
}

/// Protocol rule 10: probe when silent, dead when still silent; a request that stays unanswered on a live link fails
/// alone. Ends itself when nothing is outstanding.
async fn watch(connection: Rc<Connection>) {
    let dead_ticks = LINK_DEAD_AFTER.as_millis().div_ceil(LINK_PROBE_AFTER.as_millis()) as u32;
    let mut silent_ticks = 0;
    loop {
        glommio::timer::sleep(LINK_PROBE_AFTER).await;
        let tick = connection.ticks.get() + 1;
        connection.ticks.set(tick);
        connection.end_overdue(tick);
        if connection.answers.outstanding() == 0 {
            connection.watching.set(false);
            return;
        }
        silent_ticks = if connection.heard.replace(false) { 0 } else { silent_ticks + 1 };
        if silent_ticks >= dead_ticks {
            let silent_ms = u64::from(silent_ticks) * LINK_PROBE_AFTER.as_millis() as u64;
            return connection.fail(LinkError::Silent { address: connection.address.clone(), silent_ms });
        }
        if silent_ticks > 0 {
            // Nobody waits for the answer; that one comes is what counts.
            drop(connection.submit(&Envelope::NONE, &Operation::Ping, &Bytes::new()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::errno::Errno;

    fn connecting(errno: Errno) -> LinkError {
        let source = std::io::Error::from_raw_os_error(errno as i32);
        let error = glommio::GlommioError::EnhancedIoError { source, op: "connect", path: None, fd: None };
        connect_error("peer:1".to_string(), error)
    }

    #[test]
    fn what_this_host_lacks_is_not_taken_for_a_dead_peer() {
        for errno in [Errno::EMFILE, Errno::ENFILE, Errno::ENETUNREACH, Errno::EADDRNOTAVAIL] {
            assert!(matches!(connecting(errno), LinkError::Local { .. }), "{errno}");
        }
        assert!(matches!(connecting(Errno::ECONNREFUSED), LinkError::ConnectionRefused { .. }));
        assert!(matches!(connecting(Errno::EHOSTUNREACH), LinkError::Silent { .. }));
        assert!(matches!(connecting(Errno::ETIMEDOUT), LinkError::Silent { .. }));
    }
}
