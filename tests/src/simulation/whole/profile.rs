//! What one seed is like. Each seed has only some kinds of trouble, so that each kind is also seen alone and with few
//! others: where everything goes wrong all the time, little ever gets far enough to be wrong.

use super::super::cluster::{SEGMENT_BYTES, Shape};
use std::time::Duration;
use torus_rpc::runtime::simulated::{Faults, World};

/// Real clocks are a hundred times better; the drift that leases allow for is 5 % of their time.
const DRIFT_MILLIONTHS: u64 = 1000;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    KillNode,
    PowerOfNode,
    PowerOfAll,
    PauseNode,
    SlowNode,
    CutPair,
    CutPairOneWay,
    Isolate,
    DiskErrors,
    DiskGone,
    KillClient,
    PauseClient,
    StoreAwayFromOne,
    StoreAwayFromAll,
    StoreSlow,
    OutcomeUnknown,
    /// Pages of a disk rot, or are those of another place or time.
    Damage,
    /// A node comes back with empty disks.
    EmptyDisk,
    Delete,
    /// The moments at which a rule counts; see `moments`.
    PowerAfterResync,
    PowerAfterAttach,
    Split,
    LetGo,
}

const ALL: [Trouble; 21] = [
    Trouble::KillNode,
    Trouble::PowerOfNode,
    Trouble::PowerOfAll,
    Trouble::PauseNode,
    Trouble::SlowNode,
    Trouble::CutPair,
    Trouble::CutPairOneWay,
    Trouble::Isolate,
    Trouble::DiskErrors,
    Trouble::DiskGone,
    Trouble::KillClient,
    Trouble::PauseClient,
    Trouble::StoreAwayFromOne,
    Trouble::StoreAwayFromAll,
    Trouble::StoreSlow,
    Trouble::OutcomeUnknown,
    Trouble::Delete,
    Trouble::PowerAfterResync,
    Trouble::PowerAfterAttach,
    Trouble::Split,
    Trouble::LetGo,
];

/// What can be survived while one node may have lost anything: whatever else happens to nodes happens to that one.
const BESIDE_A_WEAK_NODE: [Trouble; 11] = [
    Trouble::Damage,
    Trouble::EmptyDisk,
    Trouble::KillNode,
    Trouble::PowerOfNode,
    Trouble::DiskErrors,
    Trouble::KillClient,
    Trouble::StoreAwayFromOne,
    Trouble::OutcomeUnknown,
    Trouble::Delete,
    Trouble::PowerAfterResync,
    Trouble::PowerAfterAttach,
];

#[derive(Clone, Debug)]
pub struct Profile {
    pub nodes: usize,
    pub shards: usize,
    pub clients: usize,
    pub volumes: usize,
    pub replicas: u8,
    pub min_replicas: u8,
    pub shard_bytes: u64,
    pub drift_millionths: u64,
    pub faults: Faults,
    pub troubles: Vec<Trouble>,
    /// The node that alone may lose what it promised to keep.
    pub weak: Option<usize>,
    pub rounds: u64,
    /// How long things go wrong in each round.
    pub trouble_for: Duration,
    /// At most so long between two troubles.
    pub trouble_every: Duration,
    /// At most so long between two operations of a worker.
    pub pause: Duration,
    /// At the end of a round nobody attaches: the nodes repair by themselves.
    pub left_alone: bool,
}

impl Profile {
    pub fn draw(world: &World) -> Self {
        let between = |least: u64, most: u64| least + world.random_below(most - least + 1);
        let nodes = between(3, 5) as usize;
        let weak = world.one_in(4).then(|| world.random_below(nodes as u64) as usize);
        let replicas = if weak.is_some() { 3 } else { between(2, 3) as u8 };
        let min_replicas = if weak.is_some() { 2 } else { between(1, u64::from(replicas)) as u8 };
        let kinds: &[Trouble] = if weak.is_some() { &BESIDE_A_WEAK_NODE } else { &ALL };
        let likely = between(1, 3);
        let troubles = kinds.iter().copied().filter(|_| world.random_below(4) < likely).collect();
        let noise = weak.is_none() && !world.one_in(3);
        let faults = match noise {
            true => Faults { slow: 30, very_late: 400, answer_lost: 200, carried_out_twice: 20 },
            false => Faults { slow: 30, carried_out_twice: 20, ..Faults::NONE },
        };
        Self {
            nodes,
            shards: between(1, 2) as usize,
            clients: between(1, 3) as usize,
            volumes: between(1, 2) as usize,
            replicas,
            min_replicas,
            shard_bytes: if world.one_in(3) { 16 } else { 64 } * SEGMENT_BYTES,
            drift_millionths: if world.one_in(2) { DRIFT_MILLIONTHS } else { 0 },
            faults,
            troubles,
            weak,
            rounds: between(1, 2),
            trouble_for: Duration::from_secs(between(10, 60)),
            trouble_every: Duration::from_millis(between(500, 8000)),
            pause: Duration::from_millis(between(5, 400)),
            left_alone: world.one_in(2),
        }
    }

    pub fn shape(&self) -> Shape {
        Shape {
            members: self.nodes,
            spares: 0,
            shards: self.shards,
            shard_bytes: self.shard_bytes,
            drift_millionths: self.drift_millionths,
        }
    }
}
