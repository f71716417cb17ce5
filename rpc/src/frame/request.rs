//! `Request` of data.capnp ⇄ `Envelope` and `Operation`.

use super::{Prefix, SCRATCH_BYTES, Scratch, append_frame, from_halves, get_version, reader_options, set_version};
use super::{put_message, to_halves, version, words};
use crate::error::FrameError;
use crate::message::{Envelope, Operation, Resync, Retention, Revoked, Source, Token};
use capnp::message::{Builder, ScratchSpaceHeapAllocator};
use torus_schema::data_capnp::{
    clear, create_instances, describe, hello, open, peer_read, request, resync, retain, revoke, write,
};
use torus_schema::ids::VolumeId;
use torus_schema::ids::{BlockIndex, ClusterId, Epoch, Incarnation, NodeId, RingGeneration, ShardIndex, SliceId};

/// Appends the frame up to its payload, of which `payload_bytes` are to follow.
pub fn encode_request(
    out: &mut Vec<u8>,
    request_id: u64,
    envelope: &Envelope,
    operation: &Operation,
    payload_bytes: usize,
) {
    append_frame(out, request_id, payload_bytes, |out| {
        if !words::put_request(out, envelope, operation) {
            build(out, envelope, operation);
        }
    });
}

fn build(out: &mut Vec<u8>, envelope: &Envelope, operation: &Operation) {
    let mut scratch = Scratch([0; SCRATCH_BYTES]);
    let mut message = Builder::new(ScratchSpaceHeapAllocator::new(&mut scratch.0));
    let mut request = message.init_root::<request::Builder<'_>>();
    let (high, low) = to_halves(envelope.volume.to_bytes());
    request.set_volume_high(high);
    request.set_volume_low(low);
    request.set_incarnation_high((envelope.incarnation.0 >> 64) as u64);
    request.set_incarnation_low(envelope.incarnation.0 as u64);
    request.set_generation(envelope.generation.0);
    request.set_epoch(envelope.epoch.0);
    request.set_flush_epoch(envelope.flush_point.epoch.0);
    request.set_flush_sequence(envelope.flush_point.sequence);
    set_operation(request.init_operation(), operation);
    put_message(out, &message);
}

fn set_operation(mut builder: request::operation::Builder<'_>, operation: &Operation) {
    match operation {
        Operation::Hello { protocol, cluster, node, shard } => {
            let mut hello = builder.init_hello();
            hello.set_protocol(*protocol);
            let (high, low) = to_halves(cluster.to_bytes());
            hello.set_cluster_high(high);
            hello.set_cluster_low(low);
            let (high, low) = to_halves(node.to_bytes());
            hello.set_node_high(high);
            hello.set_node_low(low);
            hello.set_shard(shard.0);
        }
        Operation::Ping => builder.set_ping(()),
        Operation::CreateInstances { token, placement, width, ring_slices, slices } => {
            let mut create = builder.init_create_instances();
            create.set_token(&token.0);
            let (high, low) = to_halves(placement.to_bytes());
            create.set_placement_high(high);
            create.set_placement_low(low);
            create.set_width(*width);
            create.set_ring_slices(*ring_slices);
            set_slices(create.init_slices(slices.len() as u32), slices);
        }
        Operation::Open { token, owner, slices } => set_open(builder.init_open(), token, owner, slices),
        Operation::Read { first, count } => {
            let mut read = builder.init_read();
            read.set_first(first.0);
            read.set_count(*count);
        }
        Operation::Write { first, version, durable, checksums } => {
            let mut write = builder.init_write();
            write.set_first(first.0);
            write.set_durable(*durable);
            set_version(write.reborrow().init_version(), *version);
            let mut list = write.init_checksums(checksums.len() as u32);
            for (index, checksum) in checksums.iter().enumerate() {
                list.set(index as u32, *checksum);
            }
        }
        Operation::Clear { first, count, slice, version, durable } => {
            let mut clear = builder.init_clear();
            clear.set_first(first.0);
            clear.set_count(*count);
            clear.set_slice(slice.0);
            clear.set_durable(*durable);
            set_version(clear.init_version(), *version);
        }
        Operation::Flush => builder.set_flush(()),
        Operation::Describe { above, from, slice } => {
            let mut describe = builder.init_describe();
            describe.set_from(from.0);
            describe.set_of_slice(slice.is_some());
            describe.set_slice(slice.unwrap_or_default().0);
            set_version(describe.init_above(), *above);
        }
        Operation::Retain(retention) => set_retain(builder.init_retain(), retention),
        Operation::Revoke { revoked } => set_revoke(builder.init_revoke(), revoked),
        Operation::Map { first, count } => {
            let mut map = builder.init_map();
            map.set_first(first.0);
            map.set_count(*count);
        }
        Operation::PeerRead { token, first, count, data } => {
            set_peer_read(builder.init_peer_read(), token, (*first, *count), *data)
        }
        Operation::Resync(asked) => set_resync(builder.init_resync(), asked),
    }
}

fn set_resync(mut builder: resync::Builder<'_>, asked: &Resync) {
    builder.set_slice(asked.slice.0);
    set_version(builder.reborrow().init_since(), asked.since);
    set_version(builder.reborrow().init_through(), asked.through);
    let (high, low) = to_halves(asked.source.node.to_bytes());
    builder.set_source_node_high(high);
    builder.set_source_node_low(low);
    builder.set_source_shard(asked.source.shard.0);
    builder.set_source_address(asked.source.address.as_str());
    let mut incarnation = builder.reborrow().init_source_incarnation();
    incarnation.set_high((asked.source.incarnation.0 >> 64) as u64);
    incarnation.set_low(asked.source.incarnation.0 as u64);
    builder.set_source_generation(asked.source.generation.0);
    builder.set_from(asked.from.0);
    builder.set_blocks_max(asked.blocks_max);
    builder.set_pull(asked.pull);
}

fn set_open(mut open: open::Builder<'_>, token: &Token, owner: &str, slices: &[SliceId]) {
    open.set_token(&token.0);
    open.set_owner(owner);
    set_slices(open.init_slices(slices.len() as u32), slices);
}

fn set_peer_read(mut read: peer_read::Builder<'_>, token: &Token, (first, count): (BlockIndex, u32), data: bool) {
    read.set_token(&token.0);
    read.set_first(first.0);
    read.set_count(count);
    read.set_data(data);
}

fn set_retain(mut builder: retain::Builder<'_>, retention: &Retention) {
    set_version(builder.reborrow().init_horizon(), retention.horizon);
    builder.set_status_changes(retention.status_changes);
    builder.set_is_stale(retention.stale_since.is_some());
    set_version(builder.reborrow().init_stale_since(), retention.stale_since.unwrap_or_default());
    let mut pins = builder.init_pins(retention.pins.len() as u32);
    for (index, pin) in (0..).zip(&retention.pins) {
        set_version(pins.reborrow().get(index), *pin);
    }
}

fn set_revoke(builder: revoke::Builder<'_>, revoked: &[Revoked]) {
    let mut list = builder.init_revoked(revoked.len() as u32);
    for (index, revoked) in (0..).zip(revoked) {
        let mut entry = list.reborrow().get(index);
        entry.set_block(revoked.block.0);
        set_version(entry.init_version(), revoked.version);
    }
}

fn set_slices(mut list: capnp::primitive_list::Builder<'_, u32>, slices: &[SliceId]) {
    for (index, slice) in slices.iter().enumerate() {
        list.set(index as u32, slice.0);
    }
}

pub fn decode_request(prefix: &Prefix, header: &[u8]) -> Result<(Envelope, Operation), FrameError> {
    let mut header = prefix.verify(header)?;
    let message = capnp::serialize::read_message_from_flat_slice_no_alloc(&mut header, reader_options())?;
    let request = message.get_root::<request::Reader<'_>>()?;
    let envelope = Envelope {
        volume: VolumeId::from_bytes(from_halves(request.get_volume_high(), request.get_volume_low())),
        epoch: Epoch(request.get_epoch()),
        incarnation: Incarnation(
            u128::from(request.get_incarnation_high()) << 64 | u128::from(request.get_incarnation_low()),
        ),
        generation: RingGeneration(request.get_generation()),
        flush_point: version(request.get_flush_epoch(), request.get_flush_sequence())?,
    };
    let operation = match request.get_operation().which()? {
        request::operation::Hello(hello) => get_hello(hello?),
        request::operation::Ping(()) => Operation::Ping,
        request::operation::CreateInstances(create) => get_create_instances(create?)?,
        request::operation::Open(open) => get_open(open?)?,
        request::operation::Read(read) => {
            let read = read?;
            Operation::Read { first: BlockIndex(read.get_first()), count: read.get_count() }
        }
        request::operation::Write(write) => get_write(write?)?,
        request::operation::Clear(clear) => get_clear(clear?)?,
        request::operation::Flush(()) => Operation::Flush,
        request::operation::Describe(describe) => get_describe(describe?)?,
        request::operation::Retain(retain) => Operation::Retain(get_retention(retain?)?),
        request::operation::Revoke(revoke) => get_revoke(revoke?)?,
        request::operation::Map(map) => {
            let map = map?;
            Operation::Map { first: BlockIndex(map.get_first()), count: map.get_count() }
        }
        request::operation::PeerRead(read) => get_peer_read(read?)?,
        request::operation::Resync(asked) => Operation::Resync(get_resync(asked?)?),
    };
    Ok((envelope, operation))
}

fn get_hello(hello: hello::Reader<'_>) -> Operation {
    Operation::Hello {
        protocol: hello.get_protocol(),
        cluster: ClusterId::from_bytes(from_halves(hello.get_cluster_high(), hello.get_cluster_low())),
        node: NodeId::from_bytes(from_halves(hello.get_node_high(), hello.get_node_low())),
        shard: ShardIndex(hello.get_shard()),
    }
}

fn get_create_instances(create: create_instances::Reader<'_>) -> Result<Operation, FrameError> {
    Ok(Operation::CreateInstances {
        token: get_token(create.get_token()?)?,
        placement: VolumeId::from_bytes(from_halves(create.get_placement_high(), create.get_placement_low())),
        width: create.get_width(),
        ring_slices: create.get_ring_slices(),
        slices: create.get_slices()?.iter().map(SliceId).collect(),
    })
}

fn get_open(open: open::Reader<'_>) -> Result<Operation, FrameError> {
    Ok(Operation::Open {
        token: get_token(open.get_token()?)?,
        owner: open.get_owner()?.to_str()?.to_string(),
        slices: open.get_slices()?.iter().map(SliceId).collect(),
    })
}

fn get_write(write: write::Reader<'_>) -> Result<Operation, FrameError> {
    Ok(Operation::Write {
        first: BlockIndex(write.get_first()),
        version: get_version(write.get_version()?)?,
        durable: write.get_durable(),
        checksums: write.get_checksums()?.iter().collect(),
    })
}

fn get_clear(clear: clear::Reader<'_>) -> Result<Operation, FrameError> {
    Ok(Operation::Clear {
        first: BlockIndex(clear.get_first()),
        count: clear.get_count(),
        slice: SliceId(clear.get_slice()),
        version: get_version(clear.get_version()?)?,
        durable: clear.get_durable(),
    })
}

fn get_describe(describe: describe::Reader<'_>) -> Result<Operation, FrameError> {
    let slice = describe.get_of_slice().then_some(SliceId(describe.get_slice()));
    Ok(Operation::Describe { above: get_version(describe.get_above()?)?, from: BlockIndex(describe.get_from()), slice })
}

fn get_resync(asked: resync::Reader<'_>) -> Result<Resync, FrameError> {
    let incarnation = asked.get_source_incarnation()?;
    let source = Source {
        node: NodeId::from_bytes(from_halves(asked.get_source_node_high(), asked.get_source_node_low())),
        shard: ShardIndex(asked.get_source_shard()),
        address: asked.get_source_address()?.to_str()?.to_string(),
        incarnation: Incarnation(u128::from(incarnation.get_high()) << 64 | u128::from(incarnation.get_low())),
        generation: RingGeneration(asked.get_source_generation()),
    };
    Ok(Resync {
        slice: SliceId(asked.get_slice()),
        since: get_version(asked.get_since()?)?,
        through: get_version(asked.get_through()?)?,
        source,
        from: BlockIndex(asked.get_from()),
        blocks_max: asked.get_blocks_max(),
        pull: asked.get_pull(),
    })
}

fn get_retention(retain: retain::Reader<'_>) -> Result<Retention, FrameError> {
    let stale_since = get_version(retain.get_stale_since()?)?;
    Ok(Retention {
        horizon: get_version(retain.get_horizon()?)?,
        pins: retain.get_pins()?.iter().map(get_version).collect::<Result<_, _>>()?,
        stale_since: retain.get_is_stale().then_some(stale_since),
        status_changes: retain.get_status_changes(),
    })
}

fn get_revoke(revoke: revoke::Reader<'_>) -> Result<Operation, FrameError> {
    let revoked = revoke.get_revoked()?.iter().map(|revoked| {
        Ok::<_, FrameError>(Revoked {
            block: BlockIndex(revoked.get_block()),
            version: get_version(revoked.get_version()?)?,
        })
    });
    Ok(Operation::Revoke { revoked: revoked.collect::<Result<_, _>>()? })
}

fn get_peer_read(read: peer_read::Reader<'_>) -> Result<Operation, FrameError> {
    let (first, count, data) = (BlockIndex(read.get_first()), read.get_count(), read.get_data());
    Ok(Operation::PeerRead { token: get_token(read.get_token()?)?, first, count, data })
}

fn get_token(bytes: &[u8]) -> Result<Token, FrameError> {
    let length = bytes.len();
    bytes
        .try_into()
        .map(Token)
        .map_err(|_| FrameError::Header { because: format!("token of {length} bytes, expected 32") })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::PREFIX_BYTES;
    use proptest::prelude::*;
    use torus_schema::ids::Version;

    fn envelope() -> Envelope {
        Envelope {
            volume: VolumeId::from_bytes(*b"0123456789abcdef"),
            epoch: Epoch(7),
            incarnation: Incarnation(0x1122_3344_5566_7788_99aa_bbcc_ddee_ff00),
            generation: RingGeneration(3),
            flush_point: Version::new(Epoch(6), 12345),
        }
    }

    fn operations() -> Vec<Operation> {
        let version = Version::new(Epoch(7), 99);
        let slices = vec![SliceId(1), SliceId(4095)];
        vec![
            Operation::Hello {
                protocol: 1,
                cluster: ClusterId::from_bytes([1; 16]),
                node: NodeId::from_bytes([2; 16]),
                shard: ShardIndex(3),
            },
            Operation::Ping,
            Operation::CreateInstances {
                token: Token([9; 32]),
                placement: VolumeId::from_bytes([5; 16]),
                width: 64,
                ring_slices: 4096,
                slices: slices.clone(),
            },
            Operation::Open { token: Token([8; 32]), owner: "host/12".to_string(), slices },
            Operation::Read { first: BlockIndex(1 << 40), count: 256 },
            Operation::Write { first: BlockIndex(5), version, durable: true, checksums: [1, 2, 3].as_slice().into() },
            Operation::Clear { first: BlockIndex(0), count: 1 << 30, slice: SliceId(17), version, durable: false },
            Operation::Flush,
            Operation::Describe { above: version, from: BlockIndex(1024), slice: None },
            Operation::Describe { above: version, from: BlockIndex(0), slice: Some(SliceId(0)) },
            Operation::Resync(resync(version)),
            Operation::Retain(Retention {
                horizon: version,
                pins: vec![version],
                stale_since: Some(Version::ZERO),
                status_changes: 7,
            }),
            Operation::Retain(Retention { horizon: version, ..Retention::default() }),
            Operation::Revoke { revoked: vec![Revoked { block: BlockIndex(8), version }] },
            Operation::Map { first: BlockIndex(9), count: 10 },
            Operation::PeerRead { token: Token([7; 32]), first: BlockIndex(9), count: 10, data: true },
        ]
    }

    fn resync(version: Version) -> Resync {
        let (node, incarnation) = (NodeId::from_bytes([4; 16]), Incarnation(0xffee_0000_0000_0000_0000_0000_0000_0011));
        let (shard, generation) = (ShardIndex(2), RingGeneration(5));
        let source = Source { node, shard, address: "host:7000".to_string(), incarnation, generation };
        let (slice, since, from) = (SliceId(6), Version::new(Epoch(3), 8), BlockIndex(77));
        Resync { slice, since, through: version, source, from, blocks_max: 512, pull: true }
    }

    fn decode(bytes: &[u8]) -> Result<(Envelope, Operation), FrameError> {
        let Some(prefix) = Prefix::parse(bytes)? else {
            return Err(FrameError::Header { because: "cut short".to_string() });
        };
        match bytes.get(PREFIX_BYTES..PREFIX_BYTES + prefix.header_bytes) {
            Some(header) => decode_request(&prefix, header),
            None => Err(FrameError::Header { because: "cut short".to_string() }),
        }
    }

    #[test]
    fn every_operation_survives_its_encoding() {
        for operation in operations() {
            let mut out = Vec::new();
            encode_request(&mut out, 42, &envelope(), &operation, 0);
            assert_eq!(Prefix::parse(&out).unwrap().unwrap().request_id, 42);
            assert_eq!(decode(&out), Ok((envelope(), operation)));
        }
    }

    #[test]
    fn requests_that_are_written_word_by_word_are_what_the_builder_makes() {
        let write = |number: u64| Operation::Write {
            first: BlockIndex(number << 33),
            version: Version::new(Epoch(9), number),
            durable: number % 2 == 1,
            checksums: (0..number).map(|at| at as u32 | 1 << 31).collect(),
        };
        let writes = (1..100).map(write);
        let read = Operation::Read { first: BlockIndex(1 << 40), count: u32::MAX };
        for operation in writes.chain([read, Operation::Flush]) {
            let (mut words, mut built) = (Vec::new(), Vec::new());
            assert!(words::put_request(&mut words, &envelope(), &operation), "{operation:?}");
            build(&mut built, &envelope(), &operation);
            assert_eq!(hex::encode(words), hex::encode(built), "{operation:?}");
        }
        let mut out = Vec::new();
        assert!(!words::put_request(&mut out, &envelope(), &Operation::Ping));
        assert!(!words::put_request(&mut out, &envelope(), &write(0)) && out.is_empty());
    }

    #[test]
    fn the_bytes_of_a_request_do_not_change_by_accident() {
        let mut out = Vec::new();
        encode_request(&mut out, 1, &envelope(), &Operation::Read { first: BlockIndex(2), count: 3 }, 4096);
        assert_eq!(hex::encode(&out), GOLDEN_READ);
    }

    const GOLDEN_READ: &str = "\
        544f52316800000000100000000000000100000000000000a014a01df46ff309000000000c0000000000000008000100\
        37363534333231306665646362613938887766554433221100ffeeddccbbaa9903000000000000000700000006000000\
        39300000000000000400000000000000000000000200000002000000000000000300000000000000";

    #[test]
    fn a_flipped_bit_anywhere_before_the_payload_is_noticed() {
        let mut out = Vec::new();
        encode_request(&mut out, 1, &envelope(), &operations()[5], 4096 * 3);
        for bit in 0..out.len() * 8 {
            let mut damaged = out.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(decode(&damaged).is_err(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(header in proptest::collection::vec(any::<u8>(), 0..512)) {
            let header = &header[..header.len() / 8 * 8];
            let prefix = Prefix {
                header_bytes: header.len(),
                payload_bytes: 0,
                request_id: 0,
                header_checksum: crc32c::crc32c(header),
            };
            let _ = decode_request(&prefix, header);
        }
    }
}
