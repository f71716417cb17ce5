//! Who else holds each slice, and links to them. The node tells its shards when ring or addresses change; a table that
//! is out of date costs a repair a refused question, nothing else: what a peer answers is checked by itself.

use super::{Shard, ShardIdentity};
use bytes::Bytes;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;
use torus_rpc::error::LinkError;
use torus_rpc::message::{Answer, Envelope, Operation};
use torus_rpc::runtime::{Clock, Connect, Link, Peer, Runtime};
use torus_schema::hash::Map;
use torus_schema::ids::{ClusterId, NodeId, ShardId, ShardIndex, SliceId};
use torus_schema::records::NodeRecord;
use torus_schema::ring::table::Ring;

/// Shared by all shards of a node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PeerTable {
    shards: Vec<Peer>,
    /// By slice: places in `shards`. Empty while no ring is known.
    slices: Vec<Vec<u32>>,
}

impl PeerTable {
    /// Every slice of the ring must be there; places are those in `shards`.
    pub fn new(shards: Vec<Peer>, slices: Vec<Vec<u32>>) -> Self {
        assert!(slices.iter().flatten().all(|place| (*place as usize) < shards.len()));
        Self { shards, slices }
    }

    /// Everybody of the ring whose address is known.
    pub fn from_ring(cluster: ClusterId, ring: &Ring, records: &BTreeMap<NodeId, NodeRecord>) -> Self {
        let mut shards = Vec::new();
        let mut places = BTreeMap::new();
        for node in ring.nodes() {
            for shard in records.get(&node.id).into_iter().flat_map(|record| &record.shards) {
                places.insert(ShardId { node: node.number, shard: shard.index }, shards.len() as u32);
                let address = shard.address.clone();
                shards.push(Peer { cluster, node: node.id, shard: shard.index, address });
            }
        }
        let count = u8::try_from(ring.replicas_max()).unwrap_or(u8::MAX);
        let holders = |slice| ring.replicas(SliceId(slice), count).iter();
        let slice = |slice| holders(slice).filter_map(|shard| places.get(shard).copied()).collect();
        Self { shards, slices: (0..ring.slices()).map(slice).collect() }
    }

    /// Those that hold the slice, `own` shard left out. None for a ring of another size.
    fn others(&self, ring_slices: u32, slice: SliceId, own: &ShardIdentity) -> Vec<Peer> {
        if self.slices.len() != ring_slices as usize {
            return Vec::new();
        }
        let places = self.slices.get(slice.0 as usize).into_iter().flatten();
        let peers = places.map(|place| &self.shards[*place as usize]);
        peers.filter(|peer| (peer.node, peer.shard) != (own.node, own.shard)).cloned().collect()
    }
}

pub(super) struct Peers<L> {
    own: ShardIdentity,
    table: RefCell<Arc<PeerTable>>,
    /// Closed when there is nothing left to ask.
    links: RefCell<Map<Peer, L>>,
}

impl<L: Link> Peers<L> {
    pub fn new(own: ShardIdentity) -> Self {
        Self { own, table: RefCell::default(), links: RefCell::default() }
    }

    /// True if it is not what was known.
    pub fn set(&self, table: Arc<PeerTable>) -> bool {
        let changed = *self.table.borrow() != table;
        *self.table.borrow_mut() = table;
        changed
    }

    pub fn others(&self, ring_slices: u32, slice: SliceId) -> Vec<Peer> {
        self.table.borrow().others(ring_slices, slice, &self.own)
    }

    /// As somebody else says where it is.
    pub fn at(&self, node: NodeId, shard: ShardIndex, address: &str) -> Peer {
        Peer { cluster: self.own.cluster, node, shard, address: address.to_string() }
    }

    pub fn close_links(&self) {
        self.links.borrow_mut().clear();
    }
}

impl<R: Runtime> Shard<R> {
    /// Tells who holds what; repairs that had nobody to ask are tried at once.
    pub fn set_peers(&self, table: Arc<PeerTable>) {
        if self.peers.set(table) {
            let now = self.runtime.clock().now();
            self.state.borrow_mut().contents.damage.all_due(now);
            self.background.notify();
        }
    }

    /// A link that failed is made anew the next time.
    pub(super) async fn ask_peer(
        &self,
        peer: &Peer,
        envelope: &Envelope,
        operation: &Operation,
    ) -> Result<(Answer, Bytes), LinkError> {
        let known = self.peers.links.borrow().get(peer).cloned();
        let link = match known {
            Some(link) => link,
            None => {
                let link = self.runtime.connect().connect(peer).await?;
                self.peers.links.borrow_mut().insert(peer.clone(), link.clone());
                link
            }
        };
        match link.call(envelope, operation, &Bytes::new()).await {
            Ok((reply, payload)) => Ok((reply.answer, payload)),
            Err(error) => {
                self.peers.links.borrow_mut().remove(peer);
                Err(error)
            }
        }
    }
}
