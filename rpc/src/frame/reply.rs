//! `Reply` of data.capnp ⇄ `Reply`.

use super::{
    Prefix, SCRATCH_BYTES, Scratch, append_frame, get_version, put_message, reader_options, set_version, words,
};
use crate::error::FrameError;
use crate::message::{Answer, Descriptor, Few, Opened, Refusal, Reply, Resynced, Run, Took};
use capnp::message::{Builder, ScratchSpaceHeapAllocator};
use torus_schema::data_capnp::{described, opened, read_result, refusal, reply, resynced, run};
use torus_schema::ids::{BlockIndex, Epoch, Incarnation, SliceId};

/// Appends the frame up to its payload, of which `payload_bytes` are to follow.
pub fn encode_reply(out: &mut Vec<u8>, request_id: u64, reply: &Reply, payload_bytes: usize) {
    append_frame(out, request_id, payload_bytes, |out| {
        if !words::put_reply(out, reply) {
            build(out, reply);
        }
    });
}

fn build(out: &mut Vec<u8>, answer: &Reply) {
    let mut scratch = Scratch([0; SCRATCH_BYTES]);
    let mut message = Builder::new(ScratchSpaceHeapAllocator::new(&mut scratch.0));
    let mut builder = message.init_root::<reply::Builder<'_>>();
    builder.set_full(answer.full);
    builder.set_queue_us(answer.took.queue_us);
    builder.set_service_us(answer.took.service_us);
    match &answer.answer {
        Answer::Hello { protocol } => builder.set_hello(*protocol),
        Answer::Pong => builder.set_pong(()),
        Answer::Created => builder.set_created(()),
        Answer::Opened(opened) => set_opened(builder.init_opened(), opened),
        Answer::Read { runs, checksums } => set_read(builder.init_read(), runs, checksums),
        Answer::Written => builder.set_written(()),
        Answer::Cleared => builder.set_cleared(()),
        Answer::Flushed => builder.set_flushed(()),
        Answer::Described { descriptors, next } => set_described(builder.init_described(), descriptors, *next),
        Answer::Retained => builder.set_retained(()),
        Answer::Revoked => builder.set_revoked(()),
        Answer::Mapped { runs } => set_runs(builder.init_mapped(runs.len() as u32), runs),
        Answer::Resynced(done) => set_resynced(builder.init_resynced(), done),
        Answer::Refused(because) => set_refusal(builder.init_refused(), because),
    }
    put_message(out, &message);
}

fn set_opened(mut builder: opened::Builder<'_>, opened: &Opened) {
    let mut incarnation = builder.reborrow().init_incarnation();
    incarnation.set_high((opened.incarnation.0 >> 64) as u64);
    incarnation.set_low(opened.incarnation.0 as u64);
    builder.set_open_in_previous_epoch(opened.open_in_previous_epoch);
    builder.set_status_changes(opened.status_changes);
    set_version(builder.reborrow().init_flush_point(), opened.flush_point);
    let mut missing = builder.init_missing(opened.missing.len() as u32);
    for (index, slice) in opened.missing.iter().enumerate() {
        missing.set(index as u32, slice.0);
    }
}

fn set_read(mut builder: read_result::Builder<'_>, runs: &[Run], checksums: &[u32]) {
    set_runs(builder.reborrow().init_runs(runs.len() as u32), runs);
    let mut list = builder.init_checksums(checksums.len() as u32);
    for (index, checksum) in checksums.iter().enumerate() {
        list.set(index as u32, *checksum);
    }
}

fn set_runs(mut list: capnp::struct_list::Builder<'_, run::Owned>, runs: &[Run]) {
    for (index, run) in runs.iter().enumerate() {
        let mut entry = list.reborrow().get(index as u32);
        entry.set_count(run.count);
        entry.set_data(run.data);
        set_version(entry.init_version(), run.version);
    }
}

fn set_described(mut builder: described::Builder<'_>, descriptors: &[Descriptor], next: Option<BlockIndex>) {
    builder.set_more(next.is_some());
    builder.set_next(next.unwrap_or_default().0);
    let mut list = builder.init_descriptors(descriptors.len() as u32);
    for (index, descriptor) in descriptors.iter().enumerate() {
        let mut entry = list.reborrow().get(index as u32);
        entry.set_first(descriptor.first.0);
        entry.set_count(descriptor.count);
        entry.set_checksum(descriptor.checksum.unwrap_or_default());
        entry.set_cleared(descriptor.checksum.is_none());
        set_version(entry.init_version(), descriptor.version);
    }
}

fn set_resynced(mut builder: resynced::Builder<'_>, done: &Resynced) {
    builder.set_more(done.next.is_some());
    builder.set_next(done.next.unwrap_or_default().0);
    builder.set_examined(done.examined);
    builder.set_pulled(done.pulled);
    builder.set_revoked(done.revoked);
}

fn set_refusal(mut builder: refusal::Builder<'_>, because: &Refusal) {
    match because {
        Refusal::StaleEpoch { replica } => builder.set_stale_epoch(replica.0),
        Refusal::OtherIncarnation => builder.set_other_incarnation(()),
        Refusal::NotOwner { slice } => builder.set_not_owner(slice.0),
        Refusal::NotOpen => builder.set_not_open(()),
        Refusal::BadToken => builder.set_bad_token(()),
        Refusal::NoSpace => builder.set_no_space(()),
        Refusal::Damaged { block } => builder.set_damaged(block.0),
        Refusal::Corrupt { block, found, expected } => {
            let mut corrupt = builder.init_corrupt();
            corrupt.set_block(block.0);
            corrupt.set_found(*found);
            corrupt.set_expected(*expected);
        }
        Refusal::Disk { because } => builder.set_disk(because.as_str()),
        Refusal::Malformed { because } => builder.set_malformed(because.as_str()),
        Refusal::WrongPeer { because } => builder.set_wrong_peer(because.as_str()),
        Refusal::Source { because, restarted } => {
            let mut source = builder.init_source();
            source.set_because(because.as_str());
            source.set_restarted(*restarted);
        }
    }
}

pub fn decode_reply(prefix: &Prefix, header: &[u8]) -> Result<Reply, FrameError> {
    let mut header = prefix.verify(header)?;
    let message = capnp::serialize::read_message_from_flat_slice_no_alloc(&mut header, reader_options())?;
    let reply = message.get_root::<reply::Reader<'_>>()?;
    let answer = match reply.which()? {
        reply::Hello(protocol) => Answer::Hello { protocol },
        reply::Pong(()) => Answer::Pong,
        reply::Created(()) => Answer::Created,
        reply::Opened(opened) => Answer::Opened(get_opened(opened?)?),
        reply::Read(read) => get_read(read?)?,
        reply::Written(()) => Answer::Written,
        reply::Cleared(()) => Answer::Cleared,
        reply::Flushed(()) => Answer::Flushed,
        reply::Described(described) => get_described(described?)?,
        reply::Retained(()) => Answer::Retained,
        reply::Revoked(()) => Answer::Revoked,
        reply::Mapped(runs) => Answer::Mapped { runs: get_runs(runs?)? },
        reply::Resynced(done) => {
            let done = done?;
            Answer::Resynced(Resynced {
                next: done.get_more().then_some(BlockIndex(done.get_next())),
                examined: done.get_examined(),
                pulled: done.get_pulled(),
                revoked: done.get_revoked(),
            })
        }
        reply::Refused(refusal) => Answer::Refused(get_refusal(refusal?)?),
    };
    let took = Took { queue_us: reply.get_queue_us(), service_us: reply.get_service_us() };
    Ok(Reply { full: reply.get_full(), took, answer })
}

fn get_opened(opened: opened::Reader<'_>) -> Result<Opened, FrameError> {
    let incarnation = opened.get_incarnation()?;
    Ok(Opened {
        incarnation: Incarnation(u128::from(incarnation.get_high()) << 64 | u128::from(incarnation.get_low())),
        open_in_previous_epoch: opened.get_open_in_previous_epoch(),
        flush_point: get_version(opened.get_flush_point()?)?,
        missing: opened.get_missing()?.iter().map(SliceId).collect(),
        status_changes: opened.get_status_changes(),
    })
}

fn get_read(read: read_result::Reader<'_>) -> Result<Answer, FrameError> {
    Ok(Answer::Read { runs: get_runs(read.get_runs()?)?, checksums: read.get_checksums()?.iter().collect() })
}

fn get_runs(list: capnp::struct_list::Reader<'_, run::Owned>) -> Result<Few<Run>, FrameError> {
    let mut runs = Few::with_capacity(list.len() as usize);
    for run in list.iter() {
        runs.push(Run { count: run.get_count(), data: run.get_data(), version: get_version(run.get_version()?)? });
    }
    Ok(runs)
}

fn get_described(described: described::Reader<'_>) -> Result<Answer, FrameError> {
    let mut descriptors = Vec::with_capacity(described.get_descriptors()?.len() as usize);
    for descriptor in described.get_descriptors()?.iter() {
        descriptors.push(Descriptor {
            first: BlockIndex(descriptor.get_first()),
            count: descriptor.get_count(),
            version: get_version(descriptor.get_version()?)?,
            checksum: (!descriptor.get_cleared()).then_some(descriptor.get_checksum()),
        });
    }
    let next = described.get_more().then_some(BlockIndex(described.get_next()));
    Ok(Answer::Described { descriptors, next })
}

fn get_refusal(refusal: refusal::Reader<'_>) -> Result<Refusal, FrameError> {
    Ok(match refusal.which()? {
        refusal::StaleEpoch(replica) => Refusal::StaleEpoch { replica: Epoch(replica) },
        refusal::OtherIncarnation(()) => Refusal::OtherIncarnation,
        refusal::NotOwner(slice) => Refusal::NotOwner { slice: SliceId(slice) },
        refusal::NotOpen(()) => Refusal::NotOpen,
        refusal::BadToken(()) => Refusal::BadToken,
        refusal::NoSpace(()) => Refusal::NoSpace,
        refusal::Damaged(block) => Refusal::Damaged { block: BlockIndex(block) },
        refusal::Corrupt(corrupt) => {
            let corrupt = corrupt?;
            Refusal::Corrupt {
                block: BlockIndex(corrupt.get_block()),
                found: corrupt.get_found(),
                expected: corrupt.get_expected(),
            }
        }
        refusal::Disk(because) => Refusal::Disk { because: because?.to_str()?.to_string() },
        refusal::Malformed(because) => Refusal::Malformed { because: because?.to_str()?.to_string() },
        refusal::WrongPeer(because) => Refusal::WrongPeer { because: because?.to_str()?.to_string() },
        refusal::Source(source) => {
            let source = source?;
            Refusal::Source { because: source.get_because()?.to_str()?.to_string(), restarted: source.get_restarted() }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::PREFIX_BYTES;
    use torus_schema::ids::Version;

    fn answers() -> Vec<Answer> {
        let version = Version::new(Epoch(7), 99);
        let data = Descriptor { first: BlockIndex(3), count: 1, version, checksum: Some(0) };
        let cleared = Descriptor { first: BlockIndex(9), count: 1000, version, checksum: None };
        let mut answers = vec![
            Answer::Hello { protocol: 1 },
            Answer::Pong,
            Answer::Created,
            Answer::Opened(Opened {
                incarnation: Incarnation(1 << 100),
                open_in_previous_epoch: true,
                flush_point: version,
                missing: vec![SliceId(3)],
                status_changes: 9,
            }),
            Answer::Read {
                runs: Few::from_vec(vec![
                    Run { count: 1, version, data: true },
                    Run { count: 2, version: Version::ZERO, data: false },
                ]),
                checksums: [7].as_slice().into(),
            },
            Answer::Written,
            Answer::Cleared,
            Answer::Flushed,
            Answer::Described { descriptors: vec![data, cleared], next: Some(BlockIndex(1009)) },
            Answer::Described { descriptors: vec![], next: None },
            Answer::Retained,
            Answer::Revoked,
            Answer::Mapped { runs: [Run { count: 3, version, data: true }].into() },
            Answer::Resynced(Resynced { next: Some(BlockIndex(7)), examined: 1, pulled: 2, revoked: 3 }),
            Answer::Resynced(Resynced::default()),
        ];
        answers.extend(refusals().into_iter().map(Answer::Refused));
        answers
    }

    fn refusals() -> Vec<Refusal> {
        vec![
            Refusal::StaleEpoch { replica: Epoch(8) },
            Refusal::OtherIncarnation,
            Refusal::NotOwner { slice: SliceId(2) },
            Refusal::NotOpen,
            Refusal::BadToken,
            Refusal::NoSpace,
            Refusal::Damaged { block: BlockIndex(4) },
            Refusal::Corrupt { block: BlockIndex(4), found: 1, expected: 2 },
            Refusal::Disk { because: "gone".to_string() },
            Refusal::Malformed { because: "odd".to_string() },
            Refusal::WrongPeer { because: "other".to_string() },
            Refusal::Source { because: "gone".to_string(), restarted: true },
        ]
    }

    #[test]
    fn every_answer_survives_its_encoding() {
        for answer in answers() {
            let reply = Reply { full: true, took: Took { queue_us: 7, service_us: u32::MAX }, answer };
            let mut out = Vec::new();
            encode_reply(&mut out, 5, &reply, 0);
            let prefix = Prefix::parse(&out).unwrap().unwrap();
            assert_eq!(decode_reply(&prefix, &out[PREFIX_BYTES..]), Ok(reply));
        }
    }

    #[test]
    fn answers_that_are_written_word_by_word_are_what_the_builder_makes() {
        let run = |number: u64| Run {
            count: number as u32,
            version: Version::new(Epoch(3), number << 40 | number),
            data: number % 2 == 1,
        };
        let read = |number: u64| Answer::Read {
            runs: [run(number)].into(),
            checksums: (0..number).map(|at| at as u32 | 1 << 31).collect(),
        };
        let reads = (1..100).map(read);
        for answer in reads.chain([Answer::Written, Answer::Cleared, Answer::Flushed]) {
            for full in [false, true] {
                let took = Took { queue_us: 7, service_us: u32::MAX };
                let reply = Reply { full, took, answer: answer.clone() };
                let (mut words, mut built) = (Vec::new(), Vec::new());
                assert!(words::put_reply(&mut words, &reply), "{reply:?}");
                build(&mut built, &reply);
                assert_eq!(hex::encode(words), hex::encode(built), "{reply:?}");
            }
        }
        let mut out = Vec::new();
        let others = [Answer::Pong, Answer::Read { runs: [run(2)].into(), checksums: Default::default() }];
        assert!(others.into_iter().all(|other| !words::put_reply(&mut out, &Reply::of(other))));
        assert!(out.is_empty());
    }

    #[test]
    fn the_bytes_of_an_answer_do_not_change_by_accident() {
        let mut out = Vec::new();
        let runs = [Run { count: 1, version: Version::new(Epoch(1), 2), data: true }].into();
        let took = Took { queue_us: 5, service_us: 9 };
        let reply = Reply { took, ..Reply::of(Answer::Read { runs, checksums: [3].as_slice().into() }) };
        encode_reply(&mut out, 1, &reply, 4096);
        assert_eq!(hex::encode(&out), GOLDEN_READ);
    }

    const GOLDEN_READ: &str = "\
        544f523168000000001000000000000001000000000000007edf3030dcf93eee000000000c0000000000000002000100\
        0000040000000000050000000900000000000000000002000500000017000000150000000c0000000400000001000100\
        01000000010000000000000002000000010000000000000002000000000000000300000000000000";
}
