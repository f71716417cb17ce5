//! A stale replica takes from another what it lacks, and gives up what nobody else has. `here` is stale, `there` the
//! source; what the writer does around it is simulated with the whole cluster.

use super::harness::*;
use super::repair::Pair;
use std::time::Duration;
use torus_rpc::message::{Answer, Operation, Refusal, Resync, Resynced, Source};
use torus_rpc::runtime::simulated::World;
use torus_schema::ids::*;

const BLOCKS_MAX: u32 = 64;

impl Pair {
    /// Written by somebody of an earlier epoch than the resync; gives F as it is then.
    async fn start(world: &World) -> Self {
        let pair = Self::new(world).await;
        pair.link();
        pair
    }

    async fn flush(&self) -> Version {
        self.here.flush().await.unwrap();
        self.there.flush().await.unwrap();
        self.here.last_version()
    }

    /// The versions of both go on from the further one: `here` may have been written alone, or `there`.
    fn align(&self) {
        let sequence = self.here.sequence.get().max(self.there.sequence.get());
        self.here.sequence.set(sequence);
        self.there.sequence.set(sequence);
    }

    async fn next_epoch(&self) {
        let epoch = Epoch(self.here.envelope.get().epoch.0 + 1);
        self.here.open_in(epoch).await.unwrap();
        self.there.open_in(epoch).await.unwrap();
    }

    fn request(&self, slice: SliceId, since: Version, from: BlockIndex, pull: bool) -> Operation {
        let identity = identity_of(3);
        let source = Source {
            node: identity.node,
            shard: identity.shard,
            address: identity.node.to_string(),
            incarnation: self.there.envelope.get().incarnation,
            generation: GENERATION,
        };
        let through = self.here.last_version();
        Operation::Resync(Resync { slice, since, through, source, from, blocks_max: BLOCKS_MAX, pull })
    }

    async fn resync(&self, since: Version) -> Result<Resynced, Refusal> {
        self.align();
        let mut total = Resynced::default();
        for pull in [false, true] {
            for slice in placement(self.here.volume).slices() {
                let mut from = BlockIndex(0);
                loop {
                    let answer = self.here.call(self.request(*slice, since, from, pull)).await?;
                    let Answer::Resynced(done) = answer else { panic!("{answer:?}") };
                    total.examined += done.examined;
                    total.pulled += done.pulled;
                    total.revoked += done.revoked;
                    match done.next {
                        Some(next) => from = next,
                        None => break,
                    }
                }
            }
        }
        Ok(total)
    }

    /// What each block reads as; zeros are zeros.
    async fn assert_same(&self, first: u64, count: u32) {
        let zeros = |found: Vec<(Version, bool)>| found.into_iter().map(|(version, data)| data.then_some(version));
        let here: Vec<_> = zeros(self.here.read(first, count).await.unwrap()).collect();
        let there: Vec<_> = zeros(self.there.read(first, count).await.unwrap()).collect();
        assert_eq!(here, there, "{count} blocks from {first}");
    }
}

#[test]
fn what_is_missing_is_taken_under_its_version_clears_too() {
    for seed in 0..10 {
        simulate(seed, |world| async move {
            let pair = Pair::start(&world).await;
            pair.write(0, 20).await;
            let since = pair.flush().await;
            pair.there.sequence.set(pair.here.sequence.get());
            for block in [3, 4, 5, 9, 1023, 1024] {
                pair.there.write(block, 1).await.unwrap();
            }
            pair.there.clear(12, 15).await.unwrap();
            pair.there.clear(2048, 4096).await.unwrap();
            let done = pair.resync(since).await.unwrap();
            assert!(done.pulled >= 6 && done.revoked == 0, "{done:?}");
            pair.assert_same(0, 30).await;
            pair.assert_same(1023, 1).await;
            let last = pair.there.describe(since).await.unwrap();
            assert_eq!(pair.here.describe(since).await.unwrap(), last);
            assert_eq!(pair.resync(since).await.unwrap().pulled, 0, "nothing is left to do");
            pair.here.flush().await.unwrap();
            pair.here.machine.crash_and_start().await;
            pair.here.open().await.unwrap();
            assert_eq!(pair.here.describe(since).await.unwrap(), last);
        });
    }
}

/// Above data, above zeros, one above the other, by a clear; and what stood below is there again, now and after a start.
#[test]
fn versions_that_only_the_stale_replica_has_are_taken_back() {
    for seed in 0..10 {
        simulate(seed, |world| async move {
            let pair = Pair::start(&world).await;
            let old = pair.write(0, 8).await;
            pair.here.clear(6, 8).await.unwrap();
            pair.there.clear(6, 8).await.unwrap();
            let since = pair.flush().await;
            pair.here.write(0, 2).await.unwrap();
            pair.here.write(1, 1).await.unwrap();
            pair.here.write(6, 1).await.unwrap();
            pair.here.write(20, 1).await.unwrap();
            pair.here.clear(3, 5).await.unwrap();
            pair.next_epoch().await;
            let done = pair.resync(since).await.unwrap();
            assert!(done.revoked >= 7, "{done:?}");
            let expected: Vec<_> = [true, true, true, true, true, true, false, false].into();
            for _ in 0..2 {
                pair.assert_same(0, 30).await;
                let found = pair.here.read(0, 8).await.unwrap();
                assert_eq!(found.iter().map(|(_, data)| *data).collect::<Vec<_>>(), expected, "seed {seed}");
                assert!(found[..6].iter().all(|(version, _)| *version == old));
                pair.here.flush().await.unwrap();
                pair.here.machine.crash_and_start().await;
                pair.here.open().await.unwrap();
                pair.there.open().await.unwrap();
            }
        });
    }
}

/// A slice whose mark is zero, on a disk that had something of it: all of that is compared, and what the source no
/// longer even remembers to have cleared does not stay.
#[test]
fn from_nothing_on_what_the_source_has_counts_and_nothing_else() {
    simulate(3, |world| async move {
        let pair = Pair::start(&world).await;
        pair.write(0, 4).await;
        pair.here.write(10, 3).await.unwrap();
        pair.align();
        pair.there.write(2, 1).await.unwrap();
        pair.align();
        pair.next_epoch().await;
        let done = pair.resync(Version::ZERO).await.unwrap();
        assert_eq!((done.pulled, done.revoked), (1, 3));
        pair.assert_same(0, 30).await;
        pair.here.flush().await.unwrap();
        pair.here.machine.crash_and_start().await;
        pair.here.open().await.unwrap();
        pair.assert_same(0, 30).await;
    });
}

/// Interleaving 23.
#[test]
fn two_contents_under_one_version_are_an_alarm_and_neither_is_touched() {
    simulate(4, |world| async move {
        let pair = Pair::start(&world).await;
        let since = pair.flush().await;
        pair.write_two_things(5).await;
        let before = pair.here.read(5, 1).await.unwrap();
        let refused = pair.resync(since).await;
        assert!(matches!(&refused, Err(Refusal::Malformed { because }) if because.contains("block 5")), "{refused:?}");
        assert_eq!(pair.here.machine.shard().statistics().conflicts, 1);
        assert_eq!(pair.here.read(5, 1).await.unwrap(), before);
    });
}

/// Interleaving 16: a request of an epoch that is over, of a life that is over, for a slice that is not held, or from a
/// source that has restarted since, does nothing.
#[test]
fn a_request_that_comes_too_late_does_nothing() {
    simulate(5, |world| async move {
        let pair = Pair::start(&world).await;
        let since = pair.flush().await;
        pair.there.write(1, 1).await.unwrap();
        pair.align();
        let slice = placement(pair.here.volume).slice_of(ExtentIndex(0));
        let late = pair.request(slice, since, BlockIndex(0), true);
        let other = (0..RING_SLICES).map(SliceId).find(|other| !placement(pair.here.volume).slices().contains(other));
        let not_held = pair.request(other.unwrap(), since, BlockIndex(0), true);
        assert_eq!(pair.here.call(not_held).await, Err(Refusal::NotOwner { slice: other.unwrap() }));
        pair.there.machine.crash_and_start().await;
        pair.link();
        pair.there.open_in(Epoch(1)).await.unwrap();
        let refused = pair.here.call(late.clone()).await;
        assert!(matches!(refused, Err(Refusal::Source { restarted: true, .. })), "{refused:?}");
        let envelope = pair.here.envelope.get();
        pair.here.open_in(Epoch(2)).await.unwrap();
        pair.here.envelope.set(envelope);
        assert_eq!(pair.here.call(late.clone()).await, Err(Refusal::StaleEpoch { replica: Epoch(2) }));
        pair.here.machine.crash_and_start().await;
        pair.here.open_in(Epoch(3)).await.unwrap();
        let incarnation = envelope.incarnation;
        pair.here.envelope.set(torus_rpc::message::Envelope { incarnation, ..pair.here.envelope.get() });
        assert_eq!(pair.here.call(late).await, Err(Refusal::OtherIncarnation));
    });
}

/// The writer is fenced while the source is being asked: what comes back then is not appended, since the new writer may
/// know that it never was.
#[test]
fn what_a_source_answers_after_the_writer_was_fenced_is_not_taken() {
    for seed in 0..20 {
        simulate(seed, |world| async move {
            let pair = Pair::start(&world).await;
            let since = pair.flush().await;
            let version = pair.there.write(1, 1).await.unwrap();
            pair.align();
            let slice = placement(pair.here.volume).slice_of(ExtentIndex(0));
            let asked = pair.here.clone();
            let late = asked.call(pair.request(slice, since, BlockIndex(0), true));
            let fence = async {
                world.sleep(Duration::from_micros(world.random_below(3000))).await;
                pair.here.clone_for(Epoch(2)).open_in(Epoch(2)).await.unwrap();
                pair.here.clone_for(Epoch(2))
            };
            let (answer, new) = futures::future::join(late, fence).await;
            new.open_in(Epoch(2)).await.unwrap();
            let had = new.describe(since).await.unwrap();
            world.sleep(Duration::from_secs(5)).await;
            assert_eq!(new.describe(since).await.unwrap(), had, "seed {seed}: {answer:?}, {version}");
        });
    }
}

impl Client {
    /// Another writer on the same machine.
    fn clone_for(&self, epoch: Epoch) -> Self {
        let envelope = torus_rpc::message::Envelope { epoch, ..self.envelope.get() };
        Self { envelope: std::rc::Rc::new(std::cell::Cell::new(envelope)), ..self.clone() }
    }
}

#[test]
fn a_request_moves_no_more_than_it_may_and_says_where_to_go_on() {
    simulate(6, |world| async move {
        let pair = Pair::start(&world).await;
        let since = pair.flush().await;
        // Apart from each other, so that each is read by itself.
        for first in (0..200).step_by(2) {
            pair.there.write(first, 1).await.unwrap();
        }
        pair.align();
        let slice = placement(pair.here.volume).slice_of(ExtentIndex(0));
        let (mut from, mut requests) = (BlockIndex(0), 0);
        loop {
            let answer = pair.here.call(pair.request(slice, since, from, true)).await.unwrap();
            let Answer::Resynced(done) = answer else { panic!("{answer:?}") };
            requests += 1;
            // Of the reads that were under way at once when it was over.
            assert!(done.pulled <= u64::from(BLOCKS_MAX) + 4, "{done:?}");
            match done.next {
                Some(next) => from = next,
                None => break,
            }
        }
        assert!(requests >= 2, "{requests}");
        pair.assert_same(0, 256).await;
    });
}

/// Two are carried out; the third waits, and is told before the writer would take the shard for dead.
#[test]
fn requests_take_turns_and_who_waits_too_long_is_told() {
    simulate(7, |world| async move {
        let pair = Pair::start(&world).await;
        let since = pair.flush().await;
        pair.there.write(0, 200).await.unwrap();
        pair.align();
        let (here, there) = (pair.here.machine.process.get(), pair.there.machine.process.get());
        world.cut(here, there);
        let slice = placement(pair.here.volume).slice_of(ExtentIndex(0));
        let began = world.now();
        let three = (0..3).map(|_| async {
            let answer = pair.here.call(pair.request(slice, since, BlockIndex(0), true)).await;
            (answer, world.now().since(began))
        });
        let answers = futures::future::join_all(three).await;
        for (answer, _) in &answers[..2] {
            assert!(matches!(answer, Err(Refusal::Source { restarted: false, .. })), "{answer:?}");
        }
        let nothing = Resynced { next: Some(BlockIndex(0)), ..Resynced::default() };
        assert_eq!(answers[2].0, Ok(Answer::Resynced(nothing)));
        assert_eq!(answers[2].1.as_millis(), 1000);
        world.heal(here, there);
        pair.resync(since).await.unwrap();
        pair.assert_same(0, 200).await;
    });
}

/// A damaged block of the source is no reason to take zeros, or to end with less.
#[test]
fn a_source_that_cannot_read_a_block_is_named() {
    simulate(8, |world| async move {
        let pair = Pair::start(&world).await;
        let since = pair.flush().await;
        pair.there.write(0, 8).await.unwrap();
        pair.there.rot(3);
        let refused = pair.resync(since).await;
        assert!(matches!(refused, Err(Refusal::Source { restarted: false, .. })), "{refused:?}");
        assert_eq!(pair.here.read(3, 1).await.unwrap(), vec![(Version::ZERO, false)]);
    });
}
