@0xe7a3b58d26c4f019;

# The embedded metadata store, by capnp-rpc (rpc/src/metadata/embedded.rs). Same semantics as the trait `Metadata`.

interface MetadataStore {
  range @0 (key :Text, isPrefix :Bool) -> (entries :List(Entry), revision :Int64);
  transact @1 (compares :List(Compare), writes :List(Write), reads :List(Text))
      -> (applied :Bool, revision :Int64, reads :List(MaybeEntry), leaseGone :Int64);
  # `leaseGone`: a put names this lease, which does not exist any more; nothing was applied. 0: none.
  watch @2 (prefix :Text, fromRevision :Int64, watcher :Watcher) -> (handle :WatchHandle);
  grantLease @3 (ttlSeconds :UInt32) -> (lease :Int64);
  # `gone` where the lease does not exist any more.
  keepAlive @4 (lease :Int64) -> (gone :Bool);
  revokeLease @5 (lease :Int64) -> ();
}

interface Watcher {
  # Whole revisions, perhaps none; `next` is where a watch goes on after this. The next ones come when these are
  # answered.
  events @0 (events :List(Event), next :Int64) -> ();
  compacted @1 (oldestRevision :Int64) -> ();
}

interface WatchHandle {}

struct Entry {
  key @0 :Text;
  value @1 :Data;
  createRevision @2 :Int64;
  modRevision @3 :Int64;
}

struct MaybeEntry {
  union {
    absent @0 :Void;
    present @1 :Entry;
  }
}

struct Compare {
  key @0 :Text;
  union {
    absent @1 :Void;
    present @2 :Void;
    createRevision @3 :Int64;
    modRevision @4 :Int64;
    # `key` is a prefix.
    prefixUnchanged @5 :Int64;
  }
}

struct Write {
  key @0 :Text;
  union {
    delete @1 :Void;
    put @2 :Data;
  }
  # 0: none.
  lease @3 :Int64;
}

struct Event {
  union {
    put @0 :Entry;
    deleted @1 :Text;
  }
  revision @2 :Int64;
}
