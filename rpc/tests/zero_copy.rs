//! Zero-copy sends, on real sockets: what the peer receives is what was sent, though a payload's memory is overwritten
//! the moment it is released.
//!
//! That a release came too early is seen here although the loopback interface copies: it does so when it carries a
//! segment, and what a peer that does not read leaves in the sender's queue is not carried yet.

use futures::future::{Either, select};
use futures::{AsyncReadExt, FutureExt};
use glommio::net::TcpStream;
use nix::sys::socket::{setsockopt, sockopt};
use std::cell::RefCell;
use std::io::Read;
use std::net::SocketAddr;
use std::ops::Deref;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::local::Via;
use torus_rpc::outbox::{Batch, Outbox};
use torus_rpc::send::{Sender, ZERO_COPY_BYTES_MIN};

const OVERWRITTEN: u8 = 0xee;
/// As every user may set it; the kernel doubles it, and counts its own part.
const SEND_BUFFER_BYTES: usize = 200_000;
const RECEIVE_BUFFER_BYTES: usize = 16 * 1024;
/// The peer's receive buffer takes less of it than half, the sender's all.
const QUEUED_BYTES: usize = 4 * 32 * 1024;
/// More than both take, and less than a user may lock in memory.
const ENDLESS_BYTES: usize = 2 << 20;

/// Memory of payloads that were released, to be used again.
type Pool = Rc<RefCell<Vec<Vec<u8>>>>;

struct Payload {
    bytes: Vec<u8>,
    pool: Pool,
}

impl Payload {
    /// Each byte tells of which payload it is, and from where in it.
    fn new(number: usize, length: usize, pool: &Pool) -> Self {
        let mut bytes = pool.borrow_mut().pop().unwrap_or_default();
        bytes.clear();
        bytes.extend(content(number, length));
        Self { bytes, pool: pool.clone() }
    }
}

/// Never `OVERWRITTEN`.
fn content(number: usize, length: usize) -> impl Iterator<Item = u8> {
    (0..length).map(move |at| ((number * 31 + at / 512) % 0xdf) as u8)
}

impl Deref for Payload {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        self.bytes.fill(OVERWRITTEN);
        self.pool.borrow_mut().push(std::mem::take(&mut self.bytes));
    }
}

fn run<T>(test: impl Future<Output = T>) -> T {
    torus_rpc::runtime::glommio::run("test", None, within_a_minute("the test", test)).unwrap()
}

async fn within_a_minute<T>(what: &str, future: impl Future<Output = T>) -> T {
    match select(pin!(future), pin!(glommio::timer::sleep(Duration::from_secs(60)))).await {
        Either::Left((value, _)) => value,
        Either::Right(_) => panic!("{what} hangs"),
    }
}

async fn connected() -> (TcpStream, TcpStream) {
    let listener = listener();
    let here = connect(listener.local_addr().unwrap()).await;
    // It is in the backlog: this does not block.
    let there = OwnedFd::from(listener.accept().unwrap().0);
    // SAFETY: a stream socket that nobody else holds.
    (here, unsafe { TcpStream::from_raw_fd(there.into_raw_fd()) })
}

fn listener() -> std::net::TcpListener {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    setsockopt(&listener, sockopt::RcvBuf, &RECEIVE_BUFFER_BYTES).unwrap();
    listener
}

async fn connect(address: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(address).await.unwrap();
    // SAFETY: the stream owns the descriptor for longer than this borrow of it.
    let socket = unsafe { BorrowedFd::borrow_raw(stream.as_raw_fd()) };
    setsockopt(&socket, sockopt::SndBuf, &SEND_BUFFER_BYTES).unwrap();
    stream
}

fn within_the_host() -> (TcpStream, TcpStream) {
    let (here, there) = std::os::unix::net::UnixStream::pair().unwrap();
    // SAFETY: stream sockets that nobody else holds.
    let stream = |socket| unsafe { TcpStream::from_raw_fd(OwnedFd::from(socket).into_raw_fd()) };
    (stream(here), stream(there))
}

async fn send(sender: &mut Sender, outbox: &Rc<Outbox<Payload>>, payload: Payload) -> std::io::Result<()> {
    outbox.push(|_| {}, [payload]);
    send_what_waits(sender, outbox).await
}

/// As the rpc does it; is back when the socket has all of it.
async fn send_what_waits(sender: &mut Sender, outbox: &Rc<Outbox<Payload>>) -> std::io::Result<()> {
    let mut batch = Batch::default();
    assert!(outbox.take(&mut batch).await);
    sender.send(&mut batch, outbox).await
}

async fn expect(peer: &mut TcpStream, number: usize, length: usize) {
    let mut received = vec![0; length];
    peer.read_exact(&mut received).await.unwrap();
    assert_same(&received, number);
}

fn assert_same(received: &[u8], number: usize) {
    let differs = received.iter().copied().zip(content(number, received.len())).position(|(found, sent)| found != sent);
    let found = differs.map(|at| (at, received[at]));
    assert_eq!(found, None, "payload {number} of {} bytes: where, and the byte found there", received.len());
}

/// All that a test needs of this side.
fn over(sender: Sender) -> (Sender, Rc<Outbox<Payload>>, Pool) {
    (sender, Rc::default(), Pool::default())
}

fn is_released(outbox: &Outbox<Payload>) -> bool {
    outbox.at_most(0).now_or_never().is_some()
}

#[test]
fn a_payload_is_released_when_the_kernel_needs_it_no_more_and_not_when_it_was_sent() {
    run(async {
        let (here, mut there) = connected().await;
        let (mut sender, outbox, pool) = over(Sender::new(here, Via::Tcp));
        send(&mut sender, &outbox, Payload::new(1, QUEUED_BYTES, &pool)).await.unwrap();
        assert!(pool.borrow().is_empty() && !is_released(&outbox), "the peer has not read it");
        expect(&mut there, 1, QUEUED_BYTES).await;
        outbox.at_most(0).await;
        assert_eq!(pool.borrow().len(), 1);
        assert_eq!(pool.borrow()[0][0], OVERWRITTEN);
        assert_eq!(sender.zero_copy().tried.get(), 1);
    });
}

#[test]
fn payloads_arrive_as_they_were_sent_while_their_memory_is_used_again() {
    let lengths: Vec<usize> = (0..200).map(|number| ZERO_COPY_BYTES_MIN << (number % 6)).collect();
    run(async {
        let (here, mut there) = connected().await;
        let (mut sender, outbox, pool) = over(Sender::giving_up_after(u32::MAX, here));
        let sending = async {
            for (number, length) in lengths.iter().enumerate() {
                // Several are on their way, so that the receiver is behind.
                outbox.at_most(1 << 20).await;
                send(&mut sender, &outbox, Payload::new(number, *length, &pool)).await.unwrap();
            }
            outbox.at_most(0).await;
        };
        let receiving = async {
            for (number, length) in lengths.iter().enumerate() {
                expect(&mut there, number, *length).await;
            }
        };
        futures::future::join(sending, receiving).await;
        assert_eq!(sender.zero_copy().tried.get(), 200);
        assert!(pool.borrow().len() < 200, "memory was used again");
    });
}

#[test]
fn what_the_kernel_copies_anyway_is_sent_plainly_after_a_few() {
    run(async {
        let (here, mut there) = connected().await;
        let (mut sender, outbox, pool) = over(Sender::new(here, Via::Tcp));
        for number in 0..20 {
            send(&mut sender, &outbox, Payload::new(number, QUEUED_BYTES / 4, &pool)).await.unwrap();
            expect(&mut there, number, QUEUED_BYTES / 4).await;
            outbox.at_most(0).await;
        }
        let counts = sender.zero_copy();
        assert_eq!((counts.tried.get(), counts.copied.get()), (4, 4));
    });
}

#[test]
fn within_the_host_zero_copy_is_not_tried_and_a_socket_that_cannot_is_asked_once() {
    for (copies_max, tried) in [(None, 0), (Some(u32::MAX), 1)] {
        run(async {
            let (here, mut there) = within_the_host();
            let mut sender = match copies_max {
                None => Sender::new(here, Via::Unix),
                Some(copies_max) => Sender::giving_up_after(copies_max, here),
            };
            let (outbox, pool) = (Rc::default(), Pool::default());
            for number in 0..5 {
                let payload = Payload::new(number, ZERO_COPY_BYTES_MIN, &pool);
                let received = expect(&mut there, number, ZERO_COPY_BYTES_MIN);
                futures::future::join(send(&mut sender, &outbox, payload), received).await.0.unwrap();
                outbox.at_most(0).await;
            }
            assert_eq!(sender.zero_copy().tried.get(), tried);
        });
    }
}

/// The kernel has a part of what is being sent, and no room for the rest.
async fn begun<T>(sending: Pin<&mut impl Future<Output = T>>, there: &TcpStream) {
    match select(sending, pin!(there.peek(&mut [0]))).await {
        Either::Left(_) => panic!("the peer does not read, and yet all was sent"),
        Either::Right((peeked, _)) => assert_eq!(peeked.unwrap(), 1),
    }
}

#[test]
fn a_peer_that_goes_away_ends_what_was_being_sent_to_it() {
    run(async {
        let (here, there) = connected().await;
        let (mut sender, outbox, pool) = over(Sender::new(here, Via::Tcp));
        let mut endless = pin!(send(&mut sender, &outbox, Payload::new(1, ENDLESS_BYTES, &pool)));
        begun(endless.as_mut(), &there).await;
        assert!(pool.borrow().is_empty());
        // With something unread in it, which is a reset.
        drop(there);
        assert!(endless.await.is_err());
        outbox.at_most(0).await;
        assert_eq!(pool.borrow().len(), 1);
    });
}

#[test]
fn a_peer_that_goes_away_releases_what_was_sent_to_it() {
    run(async {
        let (here, there) = connected().await;
        let (mut sender, outbox, pool) = over(Sender::new(here, Via::Tcp));
        send(&mut sender, &outbox, Payload::new(1, QUEUED_BYTES, &pool)).await.unwrap();
        assert!(pool.borrow().is_empty());
        drop(there);
        outbox.at_most(0).await;
        assert_eq!(pool.borrow().len(), 1);
    });
}

#[test]
fn a_send_that_nobody_waits_for_any_more_is_cancelled_and_keeps_its_memory_until_then() {
    run(async {
        let (here, mut there) = connected().await;
        let (mut sender, outbox, pool) = over(Sender::new(here, Via::Tcp));
        {
            let mut endless = pin!(send(&mut sender, &outbox, Payload::new(7, ENDLESS_BYTES, &pool)));
            begun(endless.as_mut(), &there).await;
        }
        assert!(pool.borrow().is_empty(), "the kernel has a part of it");
        drop(sender);
        let mut received = Vec::new();
        there.read_to_end(&mut received).await.unwrap();
        assert!((1..ENDLESS_BYTES).contains(&received.len()), "{} bytes", received.len());
        assert_same(&received, 7);
        while pool.borrow().is_empty() {
            glommio::executor().yield_task_queue_now().await;
        }
    });
}

#[test]
fn a_send_that_was_not_submitted_yet_never_is() {
    run(async {
        let (here, mut there) = connected().await;
        let (mut sender, outbox, pool) = over(Sender::new(here, Via::Tcp));
        assert!(send(&mut sender, &outbox, Payload::new(0, QUEUED_BYTES, &pool)).now_or_never().is_none());
        assert_eq!(pool.borrow().len(), 1, "nobody else has seen it");
        drop(sender);
        assert_eq!(there.read_to_end(&mut Vec::new()).await.unwrap(), 0);
    });
}

#[test]
fn what_is_on_its_way_when_an_executor_ends_arrives_as_it_was() {
    for length in [QUEUED_BYTES, ENDLESS_BYTES] {
        let mut there = run(async {
            let (here, there) = connected().await;
            let (mut sender, outbox, pool) = over(Sender::new(here, Via::Tcp));
            let mut sending = pin!(send(&mut sender, &outbox, Payload::new(3, length, &pool)));
            match length {
                QUEUED_BYTES => sending.await.unwrap(),
                _ => begun(sending.as_mut(), &there).await,
            }
            // SAFETY: the stream owns the descriptor for longer than this borrow of it.
            let socket = unsafe { BorrowedFd::borrow_raw(there.as_raw_fd()) };
            std::net::TcpStream::from(socket.try_clone_to_owned().unwrap())
        });
        let mut received = Vec::new();
        there.read_to_end(&mut received).unwrap();
        assert!((1..=length).contains(&received.len()), "{} bytes", received.len());
        assert!(length != QUEUED_BYTES || received.len() == length, "all of it had been taken");
        assert_same(&received, 3);
    }
}

#[test]
fn a_payload_larger_than_all_buffers_arrives_whole() {
    run(async {
        let (here, mut there) = connected().await;
        let (mut sender, outbox, pool) = over(Sender::new(here, Via::Tcp));
        let receiving = expect(&mut there, 5, ENDLESS_BYTES);
        let payload = Payload::new(5, ENDLESS_BYTES, &pool);
        futures::future::join(send(&mut sender, &outbox, payload), receiving).await.0.unwrap();
        outbox.at_most(0).await;
        assert_eq!(pool.borrow().len(), 1);
    });
}

#[test]
fn small_frames_and_large_payloads_stay_in_their_order() {
    run(async {
        let (here, mut there) = connected().await;
        let (mut sender, outbox, pool) = over(Sender::giving_up_after(u32::MAX, here));
        let sending = async {
            for number in 0..50 {
                let payload = Payload::new(number, ZERO_COPY_BYTES_MIN, &pool);
                outbox.push(|out| out.push(number as u8), [payload]);
                send_what_waits(&mut sender, &outbox).await.unwrap();
            }
            outbox.at_most(0).await;
        };
        let receiving = async {
            for number in 0..50 {
                let mut frame = [0];
                there.read_exact(&mut frame).await.unwrap();
                assert_eq!(frame, [number as u8]);
                expect(&mut there, number, ZERO_COPY_BYTES_MIN).await;
            }
        };
        futures::future::join(sending, receiving).await;
    });
}

/// More segments than one call takes, more bytes than the buffers, and payloads around each of the limits.
#[test]
fn many_payloads_of_all_lengths_arrive_in_order_wherever_a_send_is_cut() {
    let lengths: Vec<usize> =
        (0..300).map(|number| [1, 1023, 1024, 4096, 4097, 32767, 32768, 70_000][number % 8]).collect();
    for (copies_max, is_tcp) in [(0, false), (0, true), (3, true), (u32::MAX, true)] {
        run(async {
            let (here, mut there) = if is_tcp { connected().await } else { within_the_host() };
            let (mut sender, outbox, pool) = over(Sender::giving_up_after(copies_max, here));
            for (number, length) in lengths.iter().enumerate() {
                outbox.push(|out| out.extend([number as u8; 3]), [Payload::new(number, *length, &pool)]);
            }
            let sending = async {
                send_what_waits(&mut sender, &outbox).await.unwrap();
                outbox.at_most(0).await;
            };
            let receiving = async {
                for (number, length) in lengths.iter().enumerate() {
                    let mut frame = [0; 3];
                    there.read_exact(&mut frame).await.unwrap();
                    assert_eq!(frame, [number as u8; 3]);
                    expect(&mut there, number, *length).await;
                }
            };
            futures::future::join(sending, receiving).await;
            assert_eq!(sender.zero_copy().tried.get() > 0, copies_max > 0);
        });
    }
}
