//! Every bound of the system, with its reason, and the relations between them checked by the compiler.

use std::time::Duration;

pub const KIB: u64 = 1024;
pub const MIB: u64 = 1024 * KIB;
pub const GIB: u64 = 1024 * MIB;
pub const TIB: u64 = 1024 * GIB;

/// Unit of version and checksum, in bytes; the logical sector of every disk we run on divides it.
pub const BLOCK_BYTES: u64 = 4 * KIB;
/// Unit of placement, in bytes: large enough that a page of the index costs little per block.
pub const EXTENT_BYTES: u64 = 4 * MIB;
pub const BLOCKS_PER_EXTENT: u64 = EXTENT_BYTES / BLOCK_BYTES;

/// Payload of one data-plane frame at most, in bytes. A larger request is cut, so that one frame never
/// holds up a connection for longer than about a millisecond.
pub const PAYLOAD_BYTES_MAX: u64 = MIB;
pub const BLOCKS_PER_FRAME_MAX: u64 = PAYLOAD_BYTES_MAX / BLOCK_BYTES;
/// Cap'n Proto header of one frame at most, in bytes; the largest is an Open that lists every slice.
pub const HEADER_BYTES_MAX: u64 = 256 * KIB;
/// Descriptors in one answer to Describe; more are fetched by asking again behind the last.
pub const DESCRIPTORS_PER_REPLY_MAX: usize = 1024;

/// Largest sequence of a version: 48 bits last 8.9 years at a million writes a second in one epoch.
pub const SEQUENCE_MAX: u64 = (1 << 48) - 1;

/// Volume size at most: block indexes stay far below 2^53 and within every frontend's sector count.
pub const VOLUME_BYTES_MAX: u64 = 1024 * TIB;
pub const VOLUME_NAME_BYTES_MAX: usize = 128;

/// Slices of the ring; the default suits up to some hundred shards.
pub const SLICES_DEFAULT: u32 = 4096;
pub const SLICES_MAX: u32 = 65536;
/// The ring document at most, in bytes: etcd takes 1.5 MiB in one request by default.
pub const RING_BYTES_MAX: usize = MIB as usize;
/// Width of a volume by default: a small volume touches few nodes.
pub const WIDTH_DEFAULT: u32 = 64;
pub const REPLICAS_DEFAULT: u8 = 3;
pub const REPLICAS_MAX: u8 = 7;

/// Segment of a shard's block file, in bytes.
pub const SEGMENT_BYTES: u64 = 64 * MIB;
/// A shard smaller than this has too few segments to clean with.
pub const SHARD_BYTES_MIN: u64 = 8 * SEGMENT_BYTES;
/// Block positions are 32 bits in the index.
pub const SHARD_BYTES_MAX: u64 = (1 << 32) * BLOCK_BYTES;
/// Looked at, at the start and at the end of a device that is to be formatted: there every file system, partition
/// table, RAID or volume manager leaves its mark (ZFS reaches furthest, 512 KiB from either end).
pub const DEVICE_PROBE_BYTES: u64 = MIB;
/// Executors of one node: beyond this a machine runs several nodes.
pub const SHARDS_PER_NODE_MAX: u16 = 256;
/// Cores that `--cpus` can name: what a kernel's CPU set holds.
pub const CPUS_MAX: usize = 1024;
/// How long an executor looks for work before it sleeps, unless told otherwise: about what a sleep and a wake cost. It
/// stops by itself where that does not pay, and while others want the core (`vendor/glommio`, `executor/spin.rs`).
pub const EXECUTOR_SPIN_DEFAULT: Duration = Duration::from_micros(50);
/// The most that may be asked for: an idle executor wakes a few times a second, so this costs it less than 1 % of a core.
pub const EXECUTOR_SPIN_MAX: Duration = Duration::from_millis(1);
/// Appends in flight per shard; later writes gather meanwhile.
pub const BATCHES_IN_FLIGHT_MAX: usize = 4;
/// Volumes of which a shard keeps how long their stages took, each apart, at 55 KiB each; and how long one of them has not
/// been used when it makes room for another.
pub const STAGES_VOLUMES_MAX: usize = 64;
pub const STAGES_KEPT_AT_LEAST: Duration = Duration::from_secs(60);
/// Of `--http`: connections at once (a few who watch; more are closed), how long a client may take to ask and all in all,
/// and bytes of what it asks.
pub const HTTP_CONNECTIONS_MAX: usize = 16;
pub const HTTP_HEAD_TIME: Duration = Duration::from_secs(5);
pub const HTTP_CONNECTION_TIME: Duration = Duration::from_secs(15);
pub const HTTP_HEAD_BYTES_MAX: usize = 16 * 1024;
/// How long the process may take for the answer: longer, and it is not well.
pub const HTTP_ANSWER_TIME: Duration = Duration::from_secs(5);
const _: () = assert!(HTTP_HEAD_TIME.as_secs() + HTTP_ANSWER_TIME.as_secs() < HTTP_CONNECTION_TIME.as_secs());
/// Share of a shard kept for cleaning, tombstones and resync, in percent.
pub const RESERVE_PERCENT: u64 = 7;

/// Pause before a shard whose disk failed is opened again, growing from the first to the second: a glitch costs little,
/// and a disk that is gone is not looked for all day.
pub const DISK_REOPEN_PAUSE_MIN: Duration = Duration::from_millis(100);
pub const DISK_REOPEN_PAUSE_MAX: Duration = Duration::from_secs(60);
/// A scrub of a whole node takes this long by default.
pub const SCRUB_PASS: Duration = Duration::from_secs(24 * 3600);
/// A node smaller than this is scrubbed as fast as one of this size: 12.1 MiB/s hurt no disk.
pub const SCRUB_SIZE_MIN_BYTES: u64 = TIB;
/// From the start of one pass to the start of the next: a week, in which few disks lose a block on every replica.
pub const SCRUB_INTERVAL: Duration = Duration::from_secs(7 * 24 * 3600);
/// The first pass of a node's life starts this long after it was started: at first there is little to read.
pub const SCRUB_FIRST_AFTER: Duration = Duration::from_secs(3600);
/// How often the node looks how far its shards came, and how often it writes that down.
pub const SCRUB_LOOK_INTERVAL: Duration = Duration::from_secs(2);
pub const SCRUB_NOTE_INTERVAL: Duration = Duration::from_secs(60);
/// Damaged blocks, and conflicts, of one shard in one answer of the control port: it has to fit in a message.
pub const DAMAGE_TOLD_MAX: u32 = 1024;
/// Damaged blocks a shard lists, at about 100 bytes each; more are counted, and found again by the next scrub.
pub const DAMAGED_LISTED_MAX: usize = 16 * 1024;
/// Conflicts (two whole copies of one version that differ) a shard lists: each is for a person to look at.
pub const CONFLICTS_LISTED_MAX: usize = 1024;
/// Damaged blocks of a shard that are being repaired at once: a repair is a read at a peer and an append here.
pub const REPAIRS_IN_FLIGHT_MAX: usize = 16;
/// Pause before a damaged block that no peer had is asked for again, growing from the first to the second.
pub const REPAIR_PAUSE_MIN: Duration = Duration::from_secs(1);
pub const REPAIR_PAUSE_MAX: Duration = Duration::from_secs(600);

/// What resyncs write to one shard by default, bytes a second: a quarter of what a fast disk takes.
pub const RESYNC_BYTES_S: u64 = 200 * MIB;
/// Nothing makes a resync slower than this: it has to come to its end under any load.
pub const RESYNC_PACE_MIN_BYTES_S: u64 = 4 * MIB;
/// Requests to resync that a shard carries out at once; others wait in the order in which they came.
pub const RESYNCS_AT_ONCE: usize = 2;
/// How long one of them waits before it is answered that nothing was done: the writer asks again, and sees that the
/// shard lives.
pub const RESYNC_TURN_WAIT: Duration = Duration::from_secs(1);
/// A request to resync goes on for about this long at most.
pub const RESYNC_REQUEST_TIME: Duration = Duration::from_millis(500);
/// A source that has not answered for this long does not do.
pub const RESYNC_SOURCE_DEADLINE: Duration = Duration::from_secs(2);
/// Blocks that one request to resync moves at most.
pub const RESYNC_BLOCKS_PER_REQUEST: u32 = 2048;
/// Blocks in one read of a resync: small, so that clients of the source do not wait behind it.
pub const RESYNC_READ_BLOCKS: u32 = 64;
/// Such reads under way for one request.
pub const RESYNC_READS_IN_FLIGHT: usize = 4;
/// Pause before a resync that failed is tried again, growing from the first to the second.
pub const RESYNC_PAUSE_MIN: Duration = Duration::from_secs(1);
pub const RESYNC_PAUSE_MAX: Duration = Duration::from_secs(10);
/// Slices of one shard that a writer has resynced at once, so that the shard always has the next request.
pub const RESYNC_SLICES_AT_ONCE: usize = 2;
/// How often a writer says how far a resync came.
pub const RESYNC_LOG_INTERVAL: Duration = Duration::from_secs(10);

/// Snapshots of one volume whose data a shard can be told to keep: one record names them all, and it has to fit into
/// the smallest segment beside others.
pub const PINS_MAX: usize = 512;
/// What one revoke record lists at most, for the same reason; a longer request becomes several.
pub const REVOKED_PER_RECORD_MAX: usize = 256;

/// What one connection to a shard may have under way before it is not read from; an idle one may always start.
pub const CONNECTION_REQUESTS_MAX: usize = 1024;
pub const CONNECTION_BYTES_MAX: u64 = 64 * MIB;

/// Records above the flush point that a writer keeps of one volume, to replay them to a replica that restarted. At half
/// of it the volume flushes by itself, so that writes seldom wait at the whole.
pub const REPLAY_BYTES_PER_VOLUME_MAX: u64 = 64 * MIB;
/// The same for all volumes of one process. A volume may always keep one frame, so that one whose replicas are away
/// does not stop the others: a process of many volumes may exceed this by a frame for each.
pub const REPLAY_BYTES_PER_PROCESS_MAX: u64 = 512 * MIB;
/// Volumes that flush at once because the process keeps too much.
pub const REPLAY_FLUSHES_MAX: usize = 4;
/// Records on their way to one restarted replica: they fill the link and leave room on its connection for others.
pub const REPLAYS_IN_FLIGHT_MAX: usize = 16;

/// The same while a shard says it is full: until the flush, what is overwritten takes room twice. Some hundred volumes
/// can do so at once within what a shard of a few GiB holds back beyond saying that it is full.
pub const UNFLUSHED_BYTES_WHEN_FULL_MAX: u64 = MIB;
/// How long clears that were flushed may be kept for no reason, so that shards are not told again with every flush.
pub const RETAIN_INTERVAL: Duration = Duration::from_secs(10);

/// Every call to the metadata store ends within this.
pub const METADATA_DEADLINE: Duration = Duration::from_secs(5);
/// Operations in one metadata transaction: what etcd accepts by default (`--max-txn-ops`).
pub const METADATA_OPERATIONS_MAX: usize = 128;
/// Keys and values of one metadata transaction: etcd refuses requests above 1.5 MiB by default, framing included.
pub const METADATA_TRANSACTION_BYTES_MAX: u64 = MIB + MIB / 4;
/// One answer of the metadata store, in bytes; listing every volume has to fit.
pub const METADATA_ANSWER_BYTES_MAX: u64 = 256 * MIB;
/// Revisions the embedded store keeps for watches that were away; a longer absence reads the range again.
pub const METADATA_HISTORY_REVISIONS_MAX: usize = 4096;
/// Bytes of that history, kept in memory and on disk.
pub const METADATA_HISTORY_BYTES_MAX: u64 = 64 * MIB;
/// A watch that is behind gets about this much at a time, so that it never holds up the store.
pub const METADATA_WATCH_BATCH_BYTES: u64 = MIB;
/// Pause before a failed call or watch of the metadata store is tried again, growing from the first to the second.
pub const METADATA_RETRY_PAUSE_MIN: Duration = Duration::from_millis(10);
pub const METADATA_RETRY_PAUSE_MAX: Duration = Duration::from_millis(500);
/// A metadata connection with nothing heard on it for this long is probed, so that a watch on a dead host ends.
pub const METADATA_PROBE_AFTER: Duration = Duration::from_secs(10);
/// Lease of a volume's writer, by default and at the bounds of what can be asked for: etcd raises less than 2 s by
/// itself, and after a minute nobody wants to wait for a dead writer any more.
pub const OWNER_LEASE_TTL: Duration = Duration::from_secs(10);
pub const OWNER_LEASE_TTL_MIN: Duration = Duration::from_secs(2);
pub const OWNER_LEASE_TTL_MAX: Duration = Duration::from_secs(60);
/// Clock drift between hosts over one lease, allowed for on both sides. At most a quarter of the lease, so that an
/// owner that misses one keepalive of three still reads.
pub const LEASE_DRIFT: Duration = Duration::from_millis(500);
/// By how much an operator's decision about a volume whose metadata store was restored goes beyond the highest epoch and
/// the highest count of changes that any replica told of: one that did not answer may know more, and what it wrote must
/// not come again under the same versions. More attaches than this lie between no backup and its restore.
pub const REGRESSED_MARGIN: u32 = 1 << 16;
/// A client that wants a volume waits for its repair owner to let go this much longer than that one's lease may live.
pub const REPAIR_LETS_GO_WITHIN: Duration = Duration::from_secs(2);
/// Volumes that one storage node repairs at once: each costs it an attach and memory, and the nodes bound the traffic.
pub const REPAIRS_OWNED_MAX: usize = 4;
/// Before the first in rank takes an unowned volume over for repair, and for each rank more: a client that restarts or
/// moves is back by then.
pub const REPAIR_OWNER_AFTER: Duration = Duration::from_secs(5);
/// A repair owner that got nowhere for this long lets go; the pause before its next attempt grows from the second to
/// the third.
pub const REPAIR_STUCK_AFTER: Duration = Duration::from_secs(60);
pub const REPAIR_BACKOFF_MIN: Duration = Duration::from_secs(10);
pub const REPAIR_BACKOFF_MAX: Duration = Duration::from_secs(600);
/// How often a volume's writer says how far a resync is, for `torusadm status`.
pub const RESYNC_TOLD_INTERVAL: Duration = Duration::from_secs(5);
pub const LEASE_DRIFT_PARTS_MIN: u32 = 4;
/// Owners ask their replicas whether they are still theirs, while the metadata store does not answer: so many at once.
pub const OWNER_PROBES_IN_FLIGHT_MAX: usize = 32;
/// Lease of a node's heartbeat, and how often it is renewed.
pub const HEARTBEAT_LEASE_TTL: Duration = Duration::from_secs(10);
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(3);

/// Pause before a background task asks a metadata store again that failed it.
pub const METADATA_RETRY_AFTER: Duration = Duration::from_secs(1);

/// Connections to a node's control port: people and monitoring, not data.
pub const CONTROL_CONNECTIONS_MAX: usize = 64;
/// A message to the control port, in words of 8 bytes: its calls carry a few numbers.
pub const CONTROL_MESSAGE_WORDS_MAX: usize = 16 * 1024;
/// Pause after a failed accept: it failed for want of descriptors, which are not back at once.
pub const ACCEPT_RETRY_AFTER: Duration = Duration::from_millis(100);

/// Extents whose allocation is looked up for one request, each in one frame without payload: half a GiB in the time of
/// a few round trips.
pub const VOLUME_MAP_EXTENTS_MAX: u64 = 128;
/// Runs told for one such request: one MiB of NBD's longest descriptors, however scattered the data is.
pub const VOLUME_MAP_RUNS_MAX: u64 = 64 * KIB;

/// Requests of one volume under way at once, and their bytes; reads have as much again. Further ones wait. The bytes are
/// what one NBD connection may have outstanding: a single client never waits here, a thousand share it.
pub const VOLUME_OPERATIONS_MAX: usize = 1024;
pub const VOLUME_OUTSTANDING_BYTES_MAX: u64 = 64 * MIB;
/// Requests of one shard under way at once over all its connections, and their bytes; reads have as much again. A
/// connection with nothing under way may always have one request.
pub const SHARD_REQUESTS_MAX: usize = 8 * CONNECTION_REQUESTS_MAX;
pub const SHARD_OUTSTANDING_BYTES_MAX: u64 = 4 * CONNECTION_BYTES_MAX;
/// Volumes of one process whose replicas are being marked stale at the same time: the metadata store serves others too.
pub const MARKS_IN_FLIGHT_MAX: usize = 32;
/// Those who have to wait for that start so much apart at most, so that a thousand volumes do not move in step.
pub const MARK_JITTER: Duration = Duration::from_millis(20);
/// A node's record is not read again sooner, however many volumes of a process look for the node.
pub const NODE_LOOKUP_INTERVAL: Duration = Duration::from_millis(500);

/// A read is asked of a second replica after this factor times what 19 of 20 reads take, and not before the minimum.
pub const HEDGE_AFTER_P95_FACTOR: u32 = 4;
pub const HEDGE_AFTER_MIN: Duration = Duration::from_millis(5);
/// One second replica for so many reads at most, and so many of them saved up.
pub const READS_PER_HEDGE: u32 = 20;
pub const HEDGE_CREDIT_MAX: u32 = 16;
/// A replica on the client's own host is read from until it is so many times as slow as another.
pub const LOCAL_READ_ADVANTAGE: u64 = 4;
/// Reads that are asked within so much of the first, and are no more than that together, go to the same replica. With
/// 10 µs, with 20 KiB, or with 50 µs and 64 KiB it gains less (`bench/README.md`).
pub const READS_TOGETHER_WITHIN: Duration = Duration::from_micros(20);
pub const READS_TOGETHER_BYTES_MAX: u64 = 32 * KIB;
/// Unless it is so many times as slow as the fastest one.
pub const READS_TOGETHER_SLOWNESS_MAX: u64 = 2;

/// A link with requests outstanding that has been silent this long is probed.
pub const LINK_PROBE_AFTER: Duration = Duration::from_millis(500);
/// A link silent this long though probed, or not reconnected within it, is dead.
pub const LINK_DEAD_AFTER: Duration = Duration::from_secs(2);
/// When a shard's link is dead, the node's other shards get so long to answer, and those that stay to flush what they hold:
/// what they do with a live link is a matter of milliseconds, and I/O stands still meanwhile (3 s at most, with what it
/// took to notice).
pub const SIBLING_ANSWERS_WITHIN: Duration = Duration::from_millis(250);
/// A request unanswered this long on a live link makes its replica stale.
pub const REQUEST_DEADLINE: Duration = Duration::from_secs(5);

/// NBD: payload of one request at most, in bytes; what the specification has every server accept.
pub const NBD_PAYLOAD_BYTES_MAX: u64 = 32 * MIB;
/// NBD: payload of a refused write that is still read and thrown away, in bytes, so that the connection can go on.
/// More is taken for an attack: the connection is closed.
pub const NBD_DISCARD_BYTES_MAX: u64 = 64 * MIB;
/// NBD: requests of one connection that are not answered yet; no more are read meanwhile.
pub const NBD_REQUESTS_MAX: usize = 256;
/// NBD: payload of those requests, in bytes, received or to be sent.
pub const NBD_OUTSTANDING_BYTES_MAX: u64 = 64 * MIB;
/// NBD: options of one handshake; a client that looks at a hundred exports before it takes one is served.
pub const NBD_OPTIONS_MAX: u32 = 256;
/// NBD: data of one option that is looked at, in bytes: the longest name, and a thousand information requests or the
/// longest query.
pub const NBD_OPTION_BYTES_MAX: u64 = 16 * KIB;
/// NBD: data of an option that is still read and thrown away, in bytes; more closes the connection.
pub const NBD_OPTION_DISCARD_BYTES_MAX: u64 = MIB;
/// NBD: a name, as the specification bounds every string.
pub const NBD_NAME_BYTES_MAX: usize = 4096;
/// NBD: text of an error, in bytes; also a string.
pub const NBD_MESSAGE_BYTES_MAX: usize = NBD_NAME_BYTES_MAX;
/// NBD: time from the connection to the transmission phase; enough for a human who types the options.
pub const NBD_HANDSHAKE_DEADLINE: Duration = Duration::from_secs(60);
/// NBD: executors of a server that is not told how many. Each keeps rings and 10 MiB of I/O memory, and wakes some times
/// a second when it is idle; and all of them share REPLAY_BYTES_PER_PROCESS_MAX.
pub const NBD_EXECUTORS_DEFAULT_MAX: usize = 8;
/// NBD: looks at VOLUME_MAP_EXTENTS_MAX extents for one request for block status: 32 GiB, in some tens of milliseconds.
pub const NBD_STATUS_LOOKS_MAX: u64 = 64;
/// NBD: with so many runs to tell, no further look is taken.
pub const NBD_STATUS_RUNS_ENOUGH: usize = 1024;
/// NBD: connections of one executor; each may hold NBD_OUTSTANDING_BYTES_MAX.
pub const NBD_CONNECTIONS_MAX: usize = 1024;
/// NBD: what a stopping server waits for requests in flight and for clients to take their replies.
pub const NBD_STOP_GRACE: Duration = Duration::from_secs(10);

/// AoE: how long a frame can be under way in a segment: what IEEE 802.1D lets eight bridges hold it by its recommended
/// maximum of a second each, or two at the absolute one. So long it is remembered which write came last.
pub const AOE_FRAME_LIFETIME: Duration = Duration::from_secs(8);
/// AoE: writes of one source that are remembered for that, about 200 bytes each; beyond them everything older is refused.
pub const AOE_WRITES_REMEMBERED_MAX: usize = 16 * 1024;
/// AoE: sources of one target whose writes are remembered at the same time.
pub const AOE_SOURCES_MAX: usize = 64;
/// AoE: what a target says it can take at once. Linux keeps no more than 64 frames outstanding at an address, and with less
/// than two it does not work at all.
pub const AOE_BUFFERS: u16 = 64;
/// AoE: ATA commands of one source that are not answered yet; further ones are dropped, and sent again. Copies of
/// unanswered ones count too.
pub const AOE_OUTSTANDING_PER_SOURCE_MAX: usize = 4 * AOE_BUFFERS as usize;
/// AoE: those of all sources of one target.
pub const AOE_OUTSTANDING_MAX: usize = 1024;
/// AoE: frames received, or sent, with one system call.
pub const AOE_BATCH_FRAMES: usize = 64;
/// AoE: answers that wait for an interface; only one that takes nothing has so many.
pub const AOE_OUTBOX_FRAMES_MAX: usize = 4 * AOE_OUTSTANDING_MAX;
/// AoE: what a stopping target waits for requests in flight.
pub const AOE_STOP_GRACE: Duration = Duration::from_secs(10);
/// AoE: bytes that a socket keeps in the kernel for each direction; a few hundred jumbo frames with what the kernel counts
/// for them.
pub const AOE_SOCKET_BUFFER_BYTES: usize = 4 * MIB as usize;
/// AoE: sectors of one command, by the width of its field.
pub const AOE_SECTORS_MAX: u8 = 255;
/// AoE: addresses of a mask list, as the specification bounds it, and of a reserve list, by the width of its count.
pub const AOE_MASKS_MAX: usize = 255;
pub const AOE_RESERVATIONS_MAX: usize = 255;
/// AoE: blocks of the device that waiting writes are merged into at most: one record of the data plane.
pub const AOE_MERGED_BLOCKS_MAX: u64 = 32;
/// AoE: volumes of one process; the filter in the kernel compares each address, by a byte's worth of jump.
pub const AOE_EXPORTS_MAX: usize = 64;

// Ticks of 16 bits at 1000 a second tell 32.767 s apart: what is remembered, and a frame that came late by as much.
const _: () = assert!(2 * AOE_FRAME_LIFETIME.as_millis() < 32_767);
const _: () = assert!(AOE_BUFFERS >= 2 && AOE_OUTSTANDING_MAX >= AOE_OUTSTANDING_PER_SOURCE_MAX);
const _: () = assert!(AOE_MERGED_BLOCKS_MAX <= BLOCKS_PER_FRAME_MAX);
// A merged write is a list, a frame a command: each fits.
const _: () = assert!(AOE_SECTORS_MAX as u64 * 512 <= AOE_MERGED_BLOCKS_MAX * BLOCK_BYTES);
const _: () = assert!(AOE_MASKS_MAX <= u8::MAX as usize && AOE_RESERVATIONS_MAX <= u8::MAX as usize);
const _: () = assert!(RESYNC_READ_BLOCKS as u64 <= BLOCKS_PER_FRAME_MAX);
// A request to resync waits, asks its source in vain, and is answered in time all the same.
const _: () = assert!(
    RESYNC_TURN_WAIT.as_millis() + RESYNC_REQUEST_TIME.as_millis() + RESYNC_SOURCE_DEADLINE.as_millis()
        < REQUEST_DEADLINE.as_millis()
);
const _: () = assert!(SCRUB_PASS.as_secs() < SCRUB_INTERVAL.as_secs());
const _: () = assert!(EXTENT_BYTES.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(PAYLOAD_BYTES_MAX.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(PAYLOAD_BYTES_MAX <= EXTENT_BYTES);
const _: () = assert!(CONNECTION_BYTES_MAX >= 8 * (PAYLOAD_BYTES_MAX + HEADER_BYTES_MAX));
const _: () = assert!(VOLUME_OUTSTANDING_BYTES_MAX >= NBD_OUTSTANDING_BYTES_MAX);
const _: () = assert!(VOLUME_OPERATIONS_MAX >= NBD_REQUESTS_MAX);
const _: () = assert!(REPLAY_BYTES_PER_VOLUME_MAX >= 4 * PAYLOAD_BYTES_MAX);
const _: () = assert!(REPLAY_BYTES_PER_PROCESS_MAX >= REPLAY_BYTES_PER_VOLUME_MAX);
const _: () =
    assert!(2 * REPLAYS_IN_FLIGHT_MAX as u64 * (PAYLOAD_BYTES_MAX + HEADER_BYTES_MAX) <= CONNECTION_BYTES_MAX);
const _: () = assert!(SEGMENT_BYTES.is_multiple_of(BLOCK_BYTES));
const _: () = assert!(SEGMENT_BYTES >= 8 * PAYLOAD_BYTES_MAX);
const _: () = assert!(UNFLUSHED_BYTES_WHEN_FULL_MAX < REPLAY_BYTES_PER_VOLUME_MAX);
const _: () = assert!(VOLUME_BYTES_MAX.is_multiple_of(EXTENT_BYTES));
const _: () = assert!(VOLUME_BYTES_MAX / BLOCK_BYTES < 1 << 53);
const _: () = assert!(SLICES_DEFAULT.is_power_of_two() && SLICES_MAX.is_power_of_two());
const _: () = assert!(WIDTH_DEFAULT.is_power_of_two() && WIDTH_DEFAULT <= SLICES_DEFAULT);
const _: () = assert!(LINK_PROBE_AFTER.as_millis() * 2 < LINK_DEAD_AFTER.as_millis());
const _: () = assert!(LINK_DEAD_AFTER.as_millis() < REQUEST_DEADLINE.as_millis());
const _: () = assert!(HEARTBEAT_INTERVAL.as_millis() * 3 < HEARTBEAT_LEASE_TTL.as_millis());
const _: () = assert!(LEASE_DRIFT.as_millis() * (LEASE_DRIFT_PARTS_MIN as u128) <= OWNER_LEASE_TTL.as_millis());
const _: () = assert!(OWNER_LEASE_TTL_MIN.as_millis() <= OWNER_LEASE_TTL.as_millis());
const _: () = assert!(OWNER_LEASE_TTL.as_millis() <= OWNER_LEASE_TTL_MAX.as_millis());
const _: () = assert!(METADATA_TRANSACTION_BYTES_MAX < MIB + MIB / 2);
// A transaction that reads as many of the largest values as it may has to be answered.
const _: () = assert!(METADATA_OPERATIONS_MAX as u64 * METADATA_TRANSACTION_BYTES_MAX < METADATA_ANSWER_BYTES_MAX);
const _: () = assert!(METADATA_TRANSACTION_BYTES_MAX < METADATA_HISTORY_BYTES_MAX);
const _: () = assert!(METADATA_RETRY_PAUSE_MAX.as_millis() * 2 < METADATA_DEADLINE.as_millis());
// An Open with every slice of the largest ring (4 bytes each) has to fit in one header, twice over.
const _: () = assert!(SLICES_MAX as u64 * 4 <= HEADER_BYTES_MAX);
const _: () = assert!(DESCRIPTORS_PER_REPLY_MAX as u64 * 40 < HEADER_BYTES_MAX);
const _: () = assert!(VOLUME_NAME_BYTES_MAX <= NBD_NAME_BYTES_MAX);
const _: () = assert!(NBD_NAME_BYTES_MAX as u64 + 1024 * 2 + 8 <= NBD_OPTION_BYTES_MAX);
const _: () = assert!(2 * NBD_NAME_BYTES_MAX as u64 + 12 <= NBD_OPTION_BYTES_MAX);
const _: () = assert!(NBD_MESSAGE_BYTES_MAX <= u16::MAX as usize);
const _: () = assert!(VOLUME_MAP_RUNS_MAX * 16 <= NBD_PAYLOAD_BYTES_MAX);
// A run of an answer takes 40 bytes: the scattered blocks of a whole extent fit one header.
const _: () = assert!(BLOCKS_PER_EXTENT * 40 + KIB < HEADER_BYTES_MAX);
const _: () = assert!(NBD_OPTION_BYTES_MAX < NBD_OPTION_DISCARD_BYTES_MAX);
// The largest request fits beside another one, so that a connection never waits for itself.
const _: () = assert!(2 * NBD_PAYLOAD_BYTES_MAX <= NBD_OUTSTANDING_BYTES_MAX);
const _: () = assert!(REPLAY_BYTES_PER_PROCESS_MAX / NBD_EXECUTORS_DEFAULT_MAX as u64 >= REPLAY_BYTES_PER_VOLUME_MAX);
const _: () = assert!(NBD_PAYLOAD_BYTES_MAX <= NBD_DISCARD_BYTES_MAX);
