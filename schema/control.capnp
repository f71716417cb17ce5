@0xd1f6a9c04be87325;

# The control plane of a storage node, by capnp-rpc on its control port.

interface NodeControl {
  status @0 () -> (status :NodeStatus);
  # Begins a pass now, ends the one that runs, or only tells.
  scrub @1 (order :ScrubOrder) -> (status :ScrubStatus);
  # What cannot be read as it was written, at most so many of each list and shard.
  damage @2 (limit :UInt32) -> (shards :List(ShardDamage));
  # What the shards hold of a volume (its uuid), or of all (empty).
  instances @3 (volume :Text) -> (shards :List(ShardInstances));
  # How long the stages of users' operations took: of a volume (its uuid), or of all (empty).
  stages @4 (volume :Text) -> (shards :List(ShardStages));
}

struct NodeStatus {
  # JSON of the node's record and heartbeat, as they stand in the metadata store.
  node @0 :Text;
  heartbeat @1 :Text;
  shards @2 :List(ShardStatus);
}

struct ShardStatus {
  index @0 :UInt16;
  segments @1 :UInt32;
  segmentsFree @2 :UInt32;
  liveBytes @3 :UInt64;
  volumes @4 :UInt32;
  connections @5 :UInt32;
  reads @6 :UInt64;
  writes @7 :UInt64;
  flushes @8 :UInt64;
  batches @9 :UInt64;
  syncs @10 :UInt64;
  bytesAppended @11 :UInt64;
  checksumErrors @12 :UInt64;
  refused @13 :UInt64;
  # Blocks with data that the index knows, and the memory it takes for them.
  indexBlocks @14 :UInt64;
  indexBytes @15 :UInt64;
  # Blocks that cannot be read as they were written and are not repaired yet.
  damaged @16 :UInt64;
  # Since the shard was opened.
  damagedFound @17 :UInt64;
  repaired @18 :UInt64;
  conflicts @19 :UInt64;
  # Why the shard answers nothing; empty: all is well.
  failed @20 :Text;
  # How often its disk failed since the node was started.
  failures @21 :UInt32;
}

enum ScrubOrder {
  status @0;
  start @1;
  stop @2;
}

struct ScrubStatus {
  # Bytes a second of the whole node; 0: passes are not made.
  rateBytesS @0 :UInt64;
  # Seconds since the epoch of Unix, by the node's clock; 0: none is planned.
  nextS @1 :UInt64;
  shards @2 :List(ShardScrub);
}

struct ShardScrub {
  index @0 :UInt16;
  segments @1 :UInt32;
  # The pass that runs, or was stopped or cut off.
  current @2 :ScrubPass;
  running @3 :Bool;
  # The last one that came to its end.
  last @4 :ScrubPass;
}

struct ScrubPass {
  # 0: there is none.
  startedS @0 :UInt64;
  # 0: it has not ended.
  finishedS @1 :UInt64;
  segment @2 :UInt32;
  blocksRead @3 :UInt64;
  blocksCompared @4 :UInt64;
  damaged @5 :UInt64;
  conflicts @6 :UInt64;
  segmentsUnread @7 :UInt64;
}

struct ShardDamage {
  index @0 :UInt16;
  # All there are; the lists may hold fewer.
  damaged @1 :UInt64;
  conflicts @2 :UInt64;
  blocks @3 :List(DamagedBlock);
  conflictList @4 :List(ConflictingBlock);
}

struct DamagedBlock {
  # Uuid.
  volume @0 :Text;
  block @1 :UInt64;
  epoch @2 :UInt32;
  sequence @3 :UInt64;
  # Block of the shard's disk.
  position @4 :UInt32;
  # Who came across it: read, scrub, start, cleaner.
  foundBy @5 :Text;
  ageS @6 :UInt64;
  # Repairs tried so far.
  attempts @7 :UInt32;
}

struct ConflictingBlock {
  volume @0 :Text;
  block @1 :UInt64;
  epoch @2 :UInt32;
  sequence @3 :UInt64;
  checksumHere @4 :UInt32;
  checksumThere @5 :UInt32;
  # Uuid and shard of the peer.
  peerNode @6 :Text;
  peerShard @7 :UInt16;
  ageS @8 :UInt64;
}

struct ShardInstances {
  index @0 :UInt16;
  # Why the shard answers nothing; empty: all is well.
  failed @1 :Text;
  volumes @2 :List(HeldVolume);
}

struct HeldVolume {
  # Uuid.
  volume @0 :Text;
  epoch @1 :UInt32;
  flushEpoch @2 :UInt32;
  flushSequence @3 :UInt64;
  # With data.
  blocks @4 :UInt64;
  slices @5 :List(HeldSlices);
  # How often the volume's status had changed, as the shard was told.
  statusChanges @6 :UInt64;
}

# Slices that are alike.
struct HeldSlices {
  generation @0 :UInt64;
  # Nothing of them was lost since they were created.
  valid @1 :Bool;
  slices @2 :List(UInt32);
}

struct ShardStages {
  index @0 :UInt16;
  # Those of which there is something, since the node was started.
  stages @1 :List(StageHistogram);
}

enum OperationKind {
  read @0;
  write @1;
  flush @2;
}

enum Stage {
  clientQueue @0;
  wire @1;
  shardQueue @2;
  disk @3;
  reply @4;
  whole @5;
}

struct StageHistogram {
  operation @0 :OperationKind;
  stage @1 :Stage;
  # Buckets that are not empty, as schema/src/latency numbers them, and what they count.
  buckets @2 :List(UInt16);
  counts @3 :List(UInt64);
  sumNs @4 :UInt64;
  maxUs @5 :UInt64;
}
