//! Which appends a batch takes, which batch is written durable, and who hears of it when.

use super::*;
use crate::log::SegmentIndex;
use futures::FutureExt;
use torus_rpc::message::Refusal;
use torus_schema::ids::{Epoch, Version};

const GEOMETRY: Geometry = Geometry { segments: 100, blocks: 64 };

fn append(queue: &mut Queue) -> Waiting {
    queue.push(Need::Note, Record::Drop(VolumeId::from_bytes([1; 16])), Bytes::new(), None)
}

#[test]
fn who_waits_for_an_append_hears_when_its_last_piece_is_applied_or_dropped() {
    let mut queue = Queue::new(BatchNumber(1), 1);
    let mut waiting = Box::pin(append(&mut queue).done());
    let first = queue.take_all().remove(0).piece;
    let second = first.another();
    assert!(!first.done(Span::default()));
    drop(first);
    assert!(waiting.as_mut().now_or_never().is_none());
    assert!(second.done(Span::default()));
    assert_eq!(waiting.now_or_never(), Some(Ok(Span::default())));
    let waiting = append(&mut queue);
    drop(queue);
    assert!(matches!(waiting.done().now_or_never(), Some(Err(Refusal::Disk { .. }))));
}

#[test]
fn an_era_has_passed_when_nothing_of_it_or_before_it_is_under_way() {
    let eras = Rc::<Eras>::default();
    let old = [eras.enter(), eras.enter()];
    let first = eras.begin();
    let later = eras.enter();
    let second = eras.begin();
    drop(later);
    assert!(!eras.passed(first) && !eras.passed(second));
    let newest = eras.enter();
    drop(old);
    assert!(eras.passed(first) && eras.passed(second));
    drop(newest);
    assert!(eras.open.borrow().is_empty());
}

fn data(queue: &mut Queue, durable: bool) {
    let (volume, version) = (VolumeId::from_bytes([1; 16]), Version::new(Epoch(1), 1));
    let (first, position, checksums) = (BlockIndex(0), Position(0), [7].into_iter().collect());
    let record = Record::Data(Data { volume, first, version, flush_point: version, position, checksums });
    let payload = Bytes::from(vec![0; BLOCK_BYTES as usize]);
    match durable {
        true => drop(queue.push_durable(record, payload)),
        false => drop(queue.push(Need::Data, record, payload, None)),
    }
}

fn next(queue: &mut Queue) -> Batch {
    let Next::Batch(batch) = queue.next(GEOMETRY, 100) else { panic!("there is one, and room for it") };
    batch
}

#[test]
fn a_batch_is_written_durable_when_that_is_asked_for_and_all_before_it_is() {
    let mut queue = Queue::new(BatchNumber(1), 1);
    queue.head =
        Some(Filling::new(SegmentIdentity { segment: SegmentIndex(0), nonce: 1, sequence: 1 }, BatchNumber(1)));
    data(&mut queue, true);
    data(&mut queue, false);
    let first = next(&mut queue);
    assert!(first.durable && first.appends.len() == 2);
    data(&mut queue, true);
    let beside = next(&mut queue);
    assert!(!beside.durable, "the one before it is on its way and may be lost");
    queue.batch_done(beside);
    assert!(!queue.is_all_durable(), "it is applied, and lost if the one before it is");
    queue.batch_done(first);
    assert_eq!((queue.durable, queue.applied), (BatchNumber(1), BatchNumber(2)));
    data(&mut queue, true);
    let behind = next(&mut queue);
    assert!(!behind.durable, "what is before it waits for a sync");
    queue.batch_done(behind);
    queue.durable = queue.applied;
    data(&mut queue, false);
    let plain = next(&mut queue);
    assert!(!plain.durable, "nobody asked for it");
}
