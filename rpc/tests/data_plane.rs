//! A client and a server of the data plane, over loopback TCP and within the host, on glommio as in production.

use bytes::Bytes;
use futures::{AsyncReadExt, AsyncWriteExt};
use torus_rpc::client::TcpConnect;
use torus_rpc::error::LinkError;
use torus_rpc::local::{self, patience};
use torus_rpc::message::{Answer, Envelope, Few, Operation, Refusal, Reply, Run};
use torus_rpc::runtime::{Connect, Link, Peer};
use torus_rpc::server::{Handled, Handler, Identity, Listener, Request, serve};
use torus_schema::ids::{BlockIndex, ClusterId, NodeId, ShardIndex, Version};

/// Answers a read with its block number in every byte, later requests first.
#[derive(Clone)]
struct Echo;

impl Handler for Echo {
    type Chunk = Bytes;

    async fn handle(&self, request: &mut Request) -> Handled<Bytes> {
        let Request { operation, payload, .. } = request;
        let (answer, chunks) = match *operation {
            Operation::Read { first, count } => {
                glommio::timer::sleep(std::time::Duration::from_millis(20 - first.0)).await;
                let run = Run { count, version: Version::ZERO, data: true };
                let bytes = Bytes::from_owner(Overwritten(vec![first.0 as u8; 4096 * count as usize]));
                (Answer::Read { runs: [run].into(), checksums: Default::default() }, [bytes].into())
            }
            Operation::Write { .. } if payload.iter().all(|byte| *byte == 9) => (Answer::Written, Few::new()),
            _ => (Answer::Refused(Refusal::NotOpen), Few::new()),
        };
        Handled { reply: Reply::of(answer), chunks, finished: None }
    }
}

/// Over TCP, then within the host.
fn with_server<F: Future<Output = ()>>(test: impl Fn(Peer) -> F) {
    for is_local in [false, true] {
        with_one_server(is_local, &test);
    }
}

fn with_one_server<F: Future<Output = ()>>(is_local: bool, test: impl FnOnce(Peer) -> F) {
    torus_rpc::runtime::glommio::run("test", None, async {
        let identity = Identity { cluster: ClusterId::random(), node: NodeId::random(), shard: ShardIndex(0) };
        let listener = Listener::new(std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let address = listener.local_addr().unwrap().to_string();
        let listener = if is_local { listener.advertised_as(&address, patience()) } else { listener };
        let server = glommio::spawn_local(serve(listener, identity, Echo, Default::default()));
        test(Peer { cluster: identity.cluster, node: identity.node, shard: identity.shard, address }).await;
        server.cancel().await;
    })
    .unwrap();
}

fn write(blocks: usize) -> Operation {
    let checksums = vec![0; blocks].into();
    Operation::Write { first: BlockIndex(0), version: Version::ZERO, durable: false, checksums }
}

#[test]
fn requests_are_answered_out_of_order_on_one_connection() {
    with_server(|peer| async move {
        let link = TcpConnect.connect(&peer).await.unwrap();
        let nothing = Bytes::new();
        let reads = (0..16).map(|first| {
            let (link, nothing) = (&link, &nothing);
            async move {
                let read = Operation::Read { first: BlockIndex(first), count: 1 + first as u32 };
                let (reply, payload) = link.call(&Envelope::NONE, &read, nothing).await.unwrap();
                assert!(matches!(reply.answer, Answer::Read { .. }));
                assert_eq!(payload, vec![first as u8; 4096 * (1 + first as usize)]);
            }
        });
        futures::future::join_all(reads).await;
    });
}

#[test]
fn a_payload_of_the_largest_size_arrives_whole() {
    with_server(|peer| async move {
        let link = TcpConnect.connect(&peer).await.unwrap();
        for blocks in [1, 8, 256] {
            let payload = Bytes::from(vec![9; 4096 * blocks]);
            let (reply, _) = link.call(&Envelope::NONE, &write(blocks), &payload).await.unwrap();
            assert_eq!(reply.answer, Answer::Written);
        }
    });
}

/// As a read's buffer that is used again, and a user's.
struct Overwritten(Vec<u8>);

impl AsRef<[u8]> for Overwritten {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Overwritten {
    fn drop(&mut self) {
        self.0.fill(0xee);
        std::hint::black_box(&self.0);
    }
}

#[test]
fn the_largest_payloads_go_both_ways_beside_each_other() {
    with_server(|peer| async move {
        let link = TcpConnect.connect(&peer).await.unwrap();
        let calls = (0..64).map(|number| {
            let link = &link;
            async move {
                let written = Bytes::from_owner(Overwritten(vec![9; 1 << 20]));
                let (reply, _) = link.call(&Envelope::NONE, &write(256), &written).await.unwrap();
                assert_eq!(reply.answer, Answer::Written);
                drop(written);
                let read = Operation::Read { first: BlockIndex(number % 20), count: 256 };
                let (_, payload) = link.call(&Envelope::NONE, &read, &Bytes::new()).await.unwrap();
                assert_eq!(payload, vec![(number % 20) as u8; 1 << 20]);
            }
        });
        futures::future::join_all(calls).await;
    });
}

#[test]
fn who_is_on_the_host_needs_no_network() {
    torus_rpc::runtime::glommio::run("test", None, async {
        let identity = Identity { cluster: ClusterId::random(), node: NodeId::random(), shard: ShardIndex(0) };
        // Nobody can tell where that is.
        let address = format!("nowhere.invalid:{}", std::process::id());
        let listener =
            Listener::new(std::net::TcpListener::bind("127.0.0.1:0").unwrap()).advertised_as(&address, patience());
        let server = glommio::spawn_local(serve(listener, identity, Echo, Default::default()));
        let peer = Peer { cluster: identity.cluster, node: identity.node, shard: identity.shard, address };
        let link = TcpConnect.connect(&peer).await.unwrap();
        let payload = Bytes::from(vec![9; 1 << 20]);
        let (reply, _) = link.call(&Envelope::NONE, &write(256), &payload).await.unwrap();
        assert_eq!(reply.answer, Answer::Written);
        server.cancel().await;
    })
    .unwrap();
}

#[test]
fn who_does_not_greet_within_the_host_is_looked_for_where_the_address_says() {
    with_one_server(false, |peer| async move {
        // As of a node that was killed: the kernel has its socket still, and nobody accepts.
        let dead = local::listen(&peer.address, patience()).unwrap();
        let link = TcpConnect.connect(&peer).await.unwrap();
        let payload = Bytes::from(vec![9; 4096]);
        assert_eq!(link.call(&Envelope::NONE, &write(1), &payload).await.unwrap().0.answer, Answer::Written);
        drop(dead);
    });
}

#[test]
fn a_hello_that_looks_for_another_shard_is_refused_and_says_both() {
    with_server(|mut peer| async move {
        peer.shard = ShardIndex(7);
        let error = TcpConnect.connect(&peer).await.err().unwrap();
        assert!(matches!(&error, LinkError::Hello { .. }), "{error}");
        assert!(error.to_string().contains("shard: 7"), "{error}");
    });
}

#[test]
fn a_port_where_nobody_listens_is_a_refused_connection() {
    with_server(|mut peer| async move {
        let unused = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        peer.address = unused.local_addr().unwrap().to_string();
        drop(unused);
        let error = TcpConnect.connect(&peer).await.err().unwrap();
        assert!(matches!(error, LinkError::ConnectionRefused { .. }), "{error}");
    });
}

#[test]
fn garbage_ends_its_own_connection_and_no_other() {
    with_server(|peer| async move {
        let link = TcpConnect.connect(&peer).await.unwrap();
        let mut stranger = glommio::net::TcpStream::connect(&*peer.address).await.unwrap();
        stranger.write_all(&[0x55; 4096]).await.unwrap();
        let mut rest = Vec::new();
        // A reset counts as an end too.
        let _ = stranger.read_to_end(&mut rest).await;
        assert!(rest.is_empty());
        let payload = Bytes::from(vec![9; 4096]);
        assert_eq!(link.call(&Envelope::NONE, &write(1), &payload).await.unwrap().0.answer, Answer::Written);
    });
}

#[test]
fn nothing_is_answered_before_the_hello() {
    with_server(|peer| async move {
        let mut stranger = glommio::net::TcpStream::connect(&*peer.address).await.unwrap();
        let mut frame = Vec::new();
        torus_rpc::frame::encode_request(&mut frame, 3, &Envelope::NONE, &Operation::Flush, 0);
        stranger.write_all(&frame).await.unwrap();
        let mut rest = Vec::new();
        let _ = stranger.read_to_end(&mut rest).await;
        let prefix = torus_rpc::frame::Prefix::parse(&rest).unwrap().unwrap();
        let reply = torus_rpc::frame::decode_reply(&prefix, &rest[torus_rpc::frame::PREFIX_BYTES..]).unwrap();
        assert!(matches!(reply.answer, Answer::Refused(Refusal::WrongPeer { .. })));
    });
}
