@0xd1f6a9c04be87325;

# The control plane of a storage node, by capnp-rpc on its control port.

interface NodeControl {
  status @0 () -> (status :NodeStatus);
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
}
