//! Every way an administrative command is refused or fails: the place, both values, and what to do next.

use std::time::Duration;
use thiserror::Error;
use torus_rpc::control::ControlError;
use torus_rpc::metadata::MetadataError;
use torus_rpc::token::KeyError;
use torus_schema::ids::{ClusterId, SliceId, VolumeId};
use torus_schema::limits::{BLOCK_BYTES, REPLICAS_MAX, SLICES_MAX, VOLUME_NAME_BYTES_MAX};
use torus_schema::records::RecordError;
use torus_schema::ring::RingError;
use torus_schema::size;

#[derive(Clone, Debug, Error)]
pub enum AdminError {
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("{0}")]
    Record(String),
    #[error("the ring document is not valid ({0}); restore it from a backup of the metadata store")]
    Ring(#[from] RingError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error("there is no cluster in this metadata store; `torusadm init` makes one")]
    NotInitialised,
    #[error("there is a cluster in this metadata store already: {id}; use it, or another store")]
    AlreadyInitialised { id: ClusterId },
    #[error(
        "the cluster's records have format version {found}, this program knows {expected}; use the version that made it"
    )]
    FormatVersion { found: u32, expected: u32 },
    #[error("--slices {found}: expected a power of two up to {SLICES_MAX}")]
    Slices { found: u32 },
    #[error("{found} replicas: expected 1 to {REPLICAS_MAX}")]
    Replicas { found: u8 },
    #[error("a minimum of {found} replicas: expected 1 to {replicas}, the number of replicas")]
    MinReplicas { found: u8, replicas: u8 },
    #[error("--width {found}: expected a power of two up to {slices}, the slices of the ring")]
    Width { found: u32, slices: u32 },

    #[error("no node in this cluster is {wanted:?}; `torusadm peer list` shows address and uuid of those there are")]
    UnknownPeer { wanted: String },
    #[error("{wanted:?} is the address of several node records ({uuids}); name one by its uuid")]
    AmbiguousPeer { wanted: String, uuids: String },
    #[error("name the nodes by uuid or address, or say --all-peers")]
    NoPeers,
    #[error("node {node} is in the ring already")]
    AlreadyMember { node: String },
    #[error("node {node} is not in the ring, so there is nothing to remove")]
    NotMember { node: String },
    #[error("node {node} has no heartbeat: start it first, a node that is down cannot take data")]
    PeerDown { node: String },
    #[error("node {node} still has a heartbeat: stop it first (moving the data of a node that lives is not built yet)")]
    PeerUp { node: String },
    #[error(
        "node {node} has {found} shards, {expected} are to be replaced; it lacks {lacks}: start one with --shards {expected}"
    )]
    LacksShards { node: String, found: usize, expected: usize, lacks: String },
    #[error(
        "shard {shard} of the new node has {found}, about {expected} are to be put there (as full as the other nodes are); \
         use a larger node, or --force"
    )]
    TooSmall { shard: String, found: String, expected: String },
    #[error(
        "without the old node {volumes} volumes have fewer replicas in sync than their minimum: {examples}; bring back the old node \
         or other replicas first. With --force these cannot be attached until the old node is back by `peer replace` in the \
         other direction and `volume promote`"
    )]
    ReplaceBelowMinimum { volumes: usize, examples: String },
    #[error(
        "this change would move data of {affected} of {volumes} volumes ({examples}); ring changes under data come later: \
         change the ring before volumes are created, or delete these volumes first"
    )]
    WouldMoveData { affected: usize, volumes: usize, examples: String },
    #[error(
        "the ring document would take {found} bytes, at most {limit} fit; use fewer slices (`torusadm init --slices`)"
    )]
    RingTooLarge { found: usize, limit: usize },
    #[error("the ring or the volumes changed meanwhile, {attempts} times in a row; try again")]
    Contended { attempts: u32 },
    #[error("there is no slice {found}; the ring has {slices}, counted from 0")]
    NoSlice { found: SliceId, slices: u32 },

    #[error("offset {offset} lies beyond the end of volume {name:?}, which has {size} bytes")]
    OffsetBeyond { name: String, offset: u64, size: u64 },
    #[error("there is no volume {name:?}; `volume list` shows those there are")]
    NoVolume { name: String },
    #[error("the name {name:?} is taken by volume {volume}; choose another, or `volume delete` that one")]
    NameTaken { name: String, volume: VolumeId },
    #[error(
        "{name:?} is no name for a volume ({because}); use 1 to {VOLUME_NAME_BYTES_MAX} of A-Z a-z 0-9 . _ -, \
         not beginning with . or -"
    )]
    Name { name: String, because: &'static str },
    #[error("a volume of 0 bytes holds nothing; give a size such as 10GiB")]
    SizeZero,
    #[error("a volume of {}: at most {} are possible", size::format(*found), size::format(*limit))]
    SizeTooLarge { found: u64, limit: u64 },
    #[error(
        "a volume of {found} bytes: the size has to be a multiple of {BLOCK_BYTES}; the nearest are {below} and {above}"
    )]
    SizeUneven { found: u64, below: u64, above: u64 },
    #[error(
        "{replicas} replicas need {replicas} nodes in the ring, there are {nodes}; add nodes with `torusadm peer add`, \
         or ask for fewer with --replicas"
    )]
    TooFewNodes { replicas: u8, nodes: usize },
    #[error("volume {name:?} could not be created on {place}: {because}; {undone}")]
    Instances { name: String, place: String, because: String, undone: String },
    #[error("volume {name:?}: the instances of shard {shard} could not be created: {because}; try again")]
    InstancesOn { name: String, shard: String, because: String },
    #[error("there is nothing of volume {name:?} that {node} could be promoted for: {because}")]
    NothingToPromote { name: String, node: String, because: String },
    #[error(
        "--yes-lose-writes-since {found}: what would be lost is everything since {expected}; look at it without this option first"
    )]
    OtherLoss { found: String, expected: String },
    #[error("volume {name:?} is not ready: it is being created, or that was broken off; `volume show {name}`")]
    NotReady { name: String },
    #[error(
        "volume {name:?} has {}, {} is less: what lies beyond would be lost; say --allow-shrink if that is meant",
        size::format(*from), size::format(*to)
    )]
    Shrinks { name: String, from: u64, to: u64 },
    #[error(
        "volume {name:?} could not be cleared beyond its new end ({because}), and keeps its size; what lies there may be lost \
         already. Try again"
    )]
    NotCleared { name: String, because: String },
    #[error("volume {name:?} was attached or changed meanwhile; nothing was done, look again")]
    ChangedMeanwhile { name: String },
    #[error("volume {name:?} stays unfinished ({because}); `volume delete {name}` cleans up, then create it again")]
    Unfinished { name: String, because: MetadataError },
    #[error("volume {name:?} was deleted while it was being created")]
    DeletedMeanwhile { name: String },
    #[error(
        "volume {name:?} is attached by {host}, process {process} (pid {pid}), for {age_s} s; detach it there first"
    )]
    Attached { name: String, host: String, process: String, pid: u32, age_s: u64 },
    #[error(
        "volume {name:?} has {replicas} replicas but the ring only {nodes} nodes: its record or the ring is damaged"
    )]
    Misplaced { name: String, replicas: u8, nodes: usize },

    #[error(
        "nothing came of it within {deadline:?} while {doing}; is everything reachable? --deadline gives it longer"
    )]
    Deadline { deadline: Duration, doing: &'static str },
}

impl From<RecordError> for AdminError {
    fn from(error: RecordError) -> Self {
        Self::Record(error.to_string())
    }
}
