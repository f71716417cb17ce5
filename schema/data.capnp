@0xb4d0c2a7f1e35986;

# The header of one data-plane frame: what is asked of a shard, and what it answers. Raw payload follows the header
# in the frame (rpc/src/frame.rs). Field numbers are never reused; retired ones stay, with a sentence.

struct Version {
  epoch @0 :UInt32;
  sequence @1 :UInt64;
}

struct Id {
  # A uuid or another 128-bit number, in two halves.
  high @0 :UInt64;
  low @1 :UInt64;
}

struct Request {
  # The envelope: zero in hello, ping and createInstances, checked by the shard in everything else.
  volumeHigh @0 :UInt64;
  volumeLow @1 :UInt64;
  incarnationHigh @2 :UInt64;
  incarnationLow @3 :UInt64;
  generation @4 :UInt64;
  epoch @5 :UInt32;
  # F: everything up to it is durable on every in-sync replica of the volume.
  flushEpoch @6 :UInt32;
  flushSequence @7 :UInt64;

  operation :union {
    hello @8 :Hello;
    ping @9 :Void;
    createInstances @10 :CreateInstances;
    open @11 :Open;
    read @12 :BlockRange;
    write @13 :Write;
    clear @14 :Clear;
    flush @15 :Void;
    describe @16 :Describe;
    retain @17 :Retain;
    revoke @18 :Revoke;
    map @19 :BlockRange;
    peerRead @20 :PeerRead;
    resync @21 :Resync;
  }
}

struct Hello {
  protocol @0 :UInt32;
  clusterHigh @1 :UInt64;
  clusterLow @2 :UInt64;
  nodeHigh @3 :UInt64;
  nodeLow @4 :UInt64;
  shard @5 :UInt16;
}

struct CreateInstances {
  token @0 :Data;
  placementHigh @1 :UInt64;
  placementLow @2 :UInt64;
  width @3 :UInt32;
  # Slices of the ring.
  ringSlices @4 :UInt32;
  slices @5 :List(UInt32);
}

struct Open {
  token @0 :Data;
  owner @1 :Text;
  slices @2 :List(UInt32);
}

struct BlockRange {
  first @0 :UInt64;
  count @1 :UInt32;
}

struct Write {
  first @0 :UInt64;
  version @1 :Version;
  durable @2 :Bool;
  # CRC32C of each block of the payload, made by the client.
  checksums @3 :List(UInt32);
}

struct Clear {
  # The blocks of the range that lie in the slice read as zeros.
  first @0 :UInt64;
  count @1 :UInt64;
  slice @2 :UInt32;
  durable @3 :Bool;
  version @4 :Version;
}

struct Describe {
  # Newest records above this version, from this block on, in block order.
  above @0 :Version;
  from @1 :UInt64;
  # Only of this slice, if it is set.
  ofSlice @2 :Bool;
  slice @3 :UInt32;
}

struct Retain {
  # What the writer needs kept: all snapshots below the horizon are in the pins, ascending.
  horizon @0 :Version;
  pins @1 :List(Version);
  # The lowest mark of a stale replica, if there is one.
  isStale @2 :Bool;
  staleSince @3 :Version;
  # How often the volume's status has changed; what is remembered never falls.
  statusChanges @4 :UInt64;
}

struct Revoke {
  # Exactly these records are taken back, wherever they stand in the log.
  revoked @0 :List(Revoked);
}

struct Revoked {
  block @0 :UInt64;
  version @1 :Version;
}

struct PeerRead {
  # Between shards: no epoch, since a record is named by its version and never changes.
  token @0 :Data;
  first @1 :UInt64;
  count @2 :UInt32;
  # The blocks too, not only their versions and checksums.
  data @3 :Bool;
}

struct Resync {
  # To a stale replica: what it lacks or has too much of a slice, from a block on, it takes from another shard. The
  # envelope is the replica's; the source is asked with its own incarnation and generation.
  slice @0 :UInt32;
  since @1 :Version;
  # What the source has up to here is final.
  through @2 :Version;
  sourceNodeHigh @3 :UInt64;
  sourceNodeLow @4 :UInt64;
  sourceShard @5 :UInt16;
  sourceAddress @6 :Text;
  sourceIncarnation @7 :Id;
  from @8 :UInt64;
  # Moved by this request at most.
  blocksMax @9 :UInt32;
  # Else only versions that never were are taken back.
  pull @10 :Bool;
  # Of the source's place in the ring.
  sourceGeneration @11 :UInt64;
}

struct Reply {
  # The shard takes no new data from clients: its reserve is reached.
  full @0 :Bool;

  union {
    hello @1 :UInt32;
    pong @2 :Void;
    created @3 :Void;
    opened @4 :Opened;
    read @5 :ReadResult;
    written @6 :Void;
    cleared @7 :Void;
    flushed @8 :Void;
    described @9 :Described;
    refused @10 :Refusal;
    retained @11 :Void;
    revoked @12 :Void;
    mapped @13 :List(Run);
    resynced @14 :Resynced;
  }

  # What the shard took for it, in microseconds: until its disk operation began, and from then on until it was answered.
  # Both are 0 where no disk was to be asked or nobody measures.
  queueUs @15 :UInt32;
  serviceUs @16 :UInt32;
}

struct Opened {
  incarnation @0 :Id;
  # This incarnation was open all through the epoch before: false if it restarted within it, replayed or not.
  openInPreviousEpoch @1 :Bool;
  flushPoint @2 :Version;
  # Slices asked for of which the shard holds no instance of this generation.
  missing @3 :List(UInt32);
  # The highest that a retain ever said.
  statusChanges @4 :UInt64;
}

struct ReadResult {
  # Runs of blocks in order, together the range asked for.
  runs @0 :List(Run);
  # CRC32C of each block that has data, in order; the payload holds just these blocks.
  checksums @1 :List(UInt32);
}

struct Run {
  count @0 :UInt32;
  data @1 :Bool;
  version @2 :Version;
}

struct Described {
  descriptors @0 :List(Descriptor);
  # Where to go on, if there is more.
  next @1 :UInt64;
  more @2 :Bool;
}

struct Resynced {
  # Where to go on, if there is more.
  more @0 :Bool;
  next @1 :UInt64;
  # Blocks compared, blocks taken from the source, versions taken back.
  examined @2 :UInt64;
  pulled @3 :UInt64;
  revoked @4 :UInt64;
}

struct Descriptor {
  first @0 :UInt64;
  # Above 1 only for cleared blocks.
  count @1 :UInt32;
  checksum @2 :UInt32;
  cleared @3 :Bool;
  version @4 :Version;
}

struct Refusal {
  union {
    # The shard knows a later epoch of the volume.
    staleEpoch @0 :UInt32;
    otherIncarnation @1 :Void;
    # No instance of the slice in that generation: never zeros.
    notOwner @2 :UInt32;
    notOpen @3 :Void;
    badToken @4 :Void;
    noSpace @5 :Void;
    # The block is damaged here; another replica has it.
    damaged @6 :UInt64;
    # The payload does not match its checksum: block, then what was found and expected.
    corrupt @7 :Corrupt;
    # Disk error; the shard goes on under another incarnation or not at all.
    disk @8 :Text;
    malformed @9 :Text;
    # Hello: place and both values.
    wrongPeer @10 :Text;
    # The shard that was to be the source of a resync does not do.
    source @11 :Source;
  }
}

struct Source {
  because @0 :Text;
  # It is not the incarnation it was said to be, or no longer open.
  restarted @1 :Bool;
}

struct Corrupt {
  block @0 :UInt64;
  found @1 :UInt32;
  expected @2 :UInt32;
}
