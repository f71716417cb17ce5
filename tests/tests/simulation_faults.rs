//! A cluster under load in which things go wrong, from many seeds (`SIMULATION_SEEDS=first..last` for others).
//!
//! Goal: nothing answered is lost or unseen, nothing flushed is lost whatever fails. Method: see
//! `torus_tests::simulation`. A seed that failed once stays in `FOUND`.

use std::ops::Range;
use std::rc::Rc;
use torus_tests::simulation::scenario::{Run, Trouble, journal_with, load_with, simulate};

/// Seeds that once found something.
const FOUND: [u64; 0] = [];

fn seeds() -> Range<u64> {
    let Ok(text) = std::env::var("SIMULATION_SEEDS") else { return 0..40 };
    let bounds = text.split_once("..").and_then(|(first, last)| Some((first.parse().ok()?, last.parse().ok()?)));
    let (first, last) = bounds.expect("SIMULATION_SEEDS=first..last");
    first..last
}

fn run(trouble: Trouble) {
    in_worlds(seeds().chain(FOUND), move |run| load_with(run, trouble));
}

fn run_journal(trouble: Trouble) {
    in_worlds(seeds(), move |run| journal_with(run, trouble));
}

fn in_worlds<F: Future<Output = ()> + 'static>(
    seeds: impl Iterator<Item = u64>,
    scenario: impl Fn(Rc<Run>) -> F + Copy + 'static,
) {
    for seed in seeds {
        let min_replicas = 1 + (seed % 2) as u8;
        simulate(seed, min_replicas, scenario);
    }
}

#[test]
fn without_trouble_everything_answered_is_read() {
    run(Trouble::None);
}

#[test]
fn nodes_that_are_killed_take_nothing_with_them() {
    run(Trouble::Kills);
}

#[test]
fn power_failures_take_nothing_that_was_flushed() {
    run(Trouble::PowerFailures);
}

#[test]
fn cut_links_and_an_absent_metadata_store_lose_nothing() {
    run(Trouble::Cuts);
}

#[test]
fn disks_that_fail_or_vanish_lose_nothing() {
    run(Trouble::Disks);
}

#[test]
fn everything_at_once_loses_nothing() {
    run(Trouble::Mixed);
}

/// Its writes are made durable before it asks for that, and its flushes ask nobody.
#[test]
fn a_journal_loses_nothing_when_the_power_fails() {
    run_journal(Trouble::PowerFailures);
}

#[test]
fn a_journal_loses_nothing_whatever_happens() {
    run_journal(Trouble::Mixed);
}
