//! When a shard is scrubbed, how fast, and what is remembered of it: the node's part; the passes themselves are the
//! shard's.
//!
//! Each shard has a note: the pass under way (it goes on where it was after a restart or a disk error), whether an
//! operator stopped it, and the last one that came to its end. The notes are kept in the data dir.
//!
//! | the shard says | the note has        | then                                                             |
//! |----------------|---------------------|------------------------------------------------------------------|
//! | finished it    | a pass under way    | that is the last one now                                         |
//! | it runs        | a pass under way    | how far it came is noted                                         |
//! | nothing runs   | a pass, not stopped | the shard was opened anew: it goes on                            |
//! | nothing runs   | none, or stopped    | a new one starts `SCRUB_INTERVAL` after the last one started     |

use crate::node::executor::ShardThreadError;
use crate::node::membership::now_s;
use crate::node::shards::Shards;
use crate::shard::{ScrubPass, ScrubReport};
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use torus_rpc::control::{Pass, ScrubOrder, ScrubStatus, ShardScrub};
use torus_schema::ids::ShardIndex;
use torus_schema::limits::{
    SCRUB_FIRST_AFTER, SCRUB_INTERVAL, SCRUB_LOOK_INTERVAL, SCRUB_NOTE_INTERVAL, SCRUB_PASS, SCRUB_SIZE_MIN_BYTES,
};

/// Bytes a second of a node of that size, if nothing else is said: a pass over all of it takes `SCRUB_PASS`, and a
/// smaller node is no slower than one of `SCRUB_SIZE_MIN_BYTES`.
pub fn default_rate(size_bytes: u64) -> u64 {
    size_bytes.max(SCRUB_SIZE_MIN_BYTES) / SCRUB_PASS.as_secs()
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Notes {
    shards: BTreeMap<ShardIndex, Note>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    current: Option<PassNote>,
    stopped: bool,
    last: Option<PassNote>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct PassNote {
    started_s: u64,
    finished_s: u64,
    segment: u32,
    blocks_read: u64,
    blocks_compared: u64,
    damaged: u64,
    conflicts: u64,
    segments_unread: u64,
}

impl PassNote {
    fn of(pass: &ScrubPass, finished_s: u64) -> Self {
        let &ScrubPass { started_s, segment, blocks_read, blocks_compared, damaged, conflicts, segments_unread } = pass;
        Self { started_s, finished_s, segment, blocks_read, blocks_compared, damaged, conflicts, segments_unread }
    }

    fn pass(&self) -> ScrubPass {
        let &PassNote { started_s, segment, blocks_read, blocks_compared, damaged, conflicts, segments_unread, .. } =
            self;
        ScrubPass { started_s, segment, blocks_read, blocks_compared, damaged, conflicts, segments_unread }
    }

    fn told(&self) -> Pass {
        let &PassNote { started_s, segment, blocks_read, blocks_compared, damaged, conflicts, segments_unread, .. } =
            self;
        let finished_s = self.finished_s;
        Pass { started_s, finished_s, segment, blocks_read, blocks_compared, damaged, conflicts, segments_unread }
    }
}

/// When passes start by themselves.
#[derive(Clone, Copy, Debug)]
struct Plan {
    automatic: bool,
    /// The first ever.
    first_s: u64,
}

impl Note {
    /// The table at the top; gives the pass that should run and does not.
    fn look(&mut self, report: &ScrubReport, plan: Plan, now_s: u64) -> Option<ScrubPass> {
        let started_s = self.current.map(|current| current.started_s);
        if let Some(finished) = report.finished.filter(|pass| Some(pass.started_s) == started_s) {
            self.last = Some(PassNote::of(&finished, now_s));
            self.current = None;
        }
        if let Some(running) = report.running {
            if Some(running.started_s) == started_s {
                self.current = Some(PassNote::of(&running, 0));
            }
            return None;
        }
        if let Some(current) = self.current.filter(|_| !self.stopped) {
            return Some(current.pass());
        }
        (plan.automatic && now_s >= self.due_s(plan)).then(|| self.begin(now_s))
    }

    fn due_s(&self, plan: Plan) -> u64 {
        let begun = [self.current, self.last].into_iter().flatten().map(|pass| pass.started_s).max();
        begun.map_or(plan.first_s, |begun| begun.saturating_add(SCRUB_INTERVAL.as_secs()))
    }

    /// A pass is named by its start, so no two start in one second.
    fn begin(&mut self, now_s: u64) -> ScrubPass {
        let started_s = now_s.max(self.last.map_or(0, |last| last.started_s + 1));
        let pass = ScrubPass { started_s, ..ScrubPass::default() };
        self.stopped = false;
        self.current = Some(PassNote::of(&pass, 0));
        pass
    }

    /// What has to be written down at once; how far a pass came may wait.
    fn milestones(&self) -> (Option<u64>, bool, Option<PassNote>) {
        (self.current.map(|current| current.started_s), self.stopped, self.last)
    }
}

pub struct Scrubber {
    shards: Rc<Shards>,
    /// Of the whole node; 0: by order only, at the default rate.
    rate_bytes_s: u64,
    default_rate_bytes_s: u64,
    plan: Plan,
    notes: RefCell<Notes>,
    /// An order has changed the notes.
    ordered: tokio::sync::Notify,
    saved: RefCell<Notes>,
    saved_s: Cell<u64>,
}

impl Scrubber {
    /// `text`: what `follow` saved. Notes that cannot be read are begun anew: they are a convenience.
    pub fn new(shards: Rc<Shards>, rate_bytes_s: Option<u64>, size_bytes: u64, text: Option<String>) -> Self {
        let read = text.map(|text| serde_json::from_str::<Notes>(&text));
        let notes = match read {
            Some(Ok(notes)) => notes,
            Some(Err(error)) => {
                tracing::warn!(%error, "the notes of earlier scrubs cannot be read; beginning new ones");
                Notes::default()
            }
            None => Notes::default(),
        };
        let default_rate_bytes_s = default_rate(size_bytes);
        let rate_bytes_s = rate_bytes_s.unwrap_or(default_rate_bytes_s);
        let plan = Plan { automatic: rate_bytes_s > 0, first_s: now_s() + SCRUB_FIRST_AFTER.as_secs() };
        let (saved, saved_s) = (RefCell::new(notes.clone()), Cell::new(0));
        let (notes, ordered) = (RefCell::new(notes), tokio::sync::Notify::new());
        Self { shards, rate_bytes_s, default_rate_bytes_s, plan, notes, ordered, saved, saved_s }
    }

    /// As long as the shards' threads live.
    pub async fn follow(&self, save: impl Fn(&str) -> Result<(), String>) -> ShardThreadError {
        loop {
            if let Err(error) = self.step().await {
                return error;
            }
            self.save_if_worth(&save);
            tokio::select! {
                () = tokio::time::sleep(SCRUB_LOOK_INTERVAL) => {}
                () = self.ordered.notified() => {}
            }
        }
    }

    async fn step(&self) -> Result<(), ShardThreadError> {
        let reports = self.shards.scrub_reports().await?;
        let mut starts = Vec::new();
        {
            let notes = &mut *self.notes.borrow_mut();
            for (index, report, _) in &reports {
                let note = notes.shards.entry(*index).or_default();
                starts.extend(note.look(report, self.plan, now_s()).map(|pass| (*index, pass)));
            }
        }
        let rate = if self.rate_bytes_s > 0 { self.rate_bytes_s } else { self.default_rate_bytes_s };
        let of_each = (rate / reports.len().max(1) as u64).max(1);
        starts.into_iter().for_each(|(index, pass)| self.shards.start_scrub(index, pass, of_each));
        Ok(())
    }

    fn save_if_worth(&self, save: &impl Fn(&str) -> Result<(), String>) {
        let notes = self.notes.borrow().clone();
        let milestones = |notes: &Notes| notes.shards.values().map(Note::milestones).collect::<Vec<_>>();
        let at_once = milestones(&notes) != milestones(&self.saved.borrow());
        let due = notes != *self.saved.borrow() && now_s() >= self.saved_s.get() + SCRUB_NOTE_INTERVAL.as_secs();
        if !at_once && !due {
            return;
        }
        let text = serde_json::to_string(&notes).expect("notes hold only numbers, which JSON can always express");
        if let Err(error) = save(&text) {
            tracing::warn!(%error, "the notes of scrubs cannot be saved; a restart would not know of them");
        }
        self.saved_s.set(now_s());
        *self.saved.borrow_mut() = notes;
    }

    /// From the control port.
    pub async fn order(&self, order: ScrubOrder) -> Result<ScrubStatus, ShardThreadError> {
        match order {
            ScrubOrder::Status => {}
            ScrubOrder::Start => self.shards.indexes().into_iter().for_each(|index| self.want(index)),
            ScrubOrder::Stop => {
                for index in self.shards.indexes() {
                    self.stop(index).await?;
                }
            }
        }
        // Also for a status: it tells how it is now, not how it was at the last look.
        self.step().await?;
        self.ordered.notify_one();
        let notes = self.notes.borrow().clone();
        let reports = self.shards.scrub_reports().await?;
        let shards = reports.iter().map(|(index, report, segments)| {
            let note = notes.shards.get(index).cloned().unwrap_or_default();
            let current = report.running.map(|pass| PassNote::of(&pass, 0)).or(note.current);
            let (current, last) = (current.map(|pass| pass.told()), note.last.map(|pass| pass.told()));
            ShardScrub { index: *index, segments: *segments, current, running: report.running.is_some(), last }
        });
        let next_s = notes.shards.values().map(|note| note.due_s(self.plan)).min().filter(|_| self.plan.automatic);
        let (rate_bytes_s, next_s) = (self.rate_bytes_s, next_s.unwrap_or(0));
        Ok(ScrubStatus { rate_bytes_s, next_s, shards: shards.collect() })
    }

    /// A pass that was stopped goes on.
    fn want(&self, index: ShardIndex) {
        let notes = &mut *self.notes.borrow_mut();
        let note = notes.shards.entry(index).or_default();
        note.stopped = false;
        if note.current.is_none() {
            note.begin(now_s());
        }
    }

    async fn stop(&self, index: ShardIndex) -> Result<(), ShardThreadError> {
        let stopped = self.shards.stop_scrub(index).await?;
        let notes = &mut *self.notes.borrow_mut();
        let note = notes.shards.entry(index).or_default();
        note.stopped = note.current.is_some();
        let same = |pass: &ScrubPass| note.current.is_some_and(|current| current.started_s == pass.started_s);
        if let Some(pass) = stopped.filter(same) {
            note.current = Some(PassNote::of(&pass, 0));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::limits::{MIB, TIB};

    const PLAN: Plan = Plan { automatic: true, first_s: 1000 };

    fn running(started_s: u64, segment: u32) -> ScrubReport {
        let pass = ScrubPass { started_s, segment, ..ScrubPass::default() };
        ScrubReport { running: Some(pass), finished: None }
    }

    fn finished(started_s: u64) -> ScrubReport {
        let pass = ScrubPass { started_s, segment: 9, ..ScrubPass::default() };
        ScrubReport { running: None, finished: Some(pass) }
    }

    #[test]
    fn a_tebibyte_takes_a_day_and_a_small_node_is_scrubbed_no_slower() {
        assert_eq!(default_rate(TIB), TIB / 86400);
        assert_eq!(default_rate(4 * TIB), 4 * TIB / 86400);
        assert_eq!(default_rate(MIB), TIB / 86400);
    }

    #[test]
    fn passes_start_by_themselves_an_interval_apart() {
        let mut note = Note::default();
        assert_eq!(note.look(&ScrubReport::default(), PLAN, 999), None);
        assert_eq!(note.look(&ScrubReport::default(), PLAN, 1000).unwrap().started_s, 1000);
        assert_eq!(note.look(&running(1000, 3), PLAN, 1010), None);
        assert_eq!(note.current.unwrap().segment, 3);
        assert_eq!(note.look(&finished(1000), PLAN, 1020), None);
        assert_eq!((note.current, note.last.unwrap().finished_s), (None, 1020));
        let next = 1000 + SCRUB_INTERVAL.as_secs();
        assert_eq!(note.look(&finished(1000), PLAN, next - 1), None);
        assert_eq!(note.look(&finished(1000), PLAN, next).unwrap().started_s, next);
        let off = Plan { automatic: false, ..PLAN };
        assert_eq!(Note::default().look(&ScrubReport::default(), off, u64::MAX), None);
    }

    #[test]
    fn a_pass_that_was_cut_off_goes_on_where_it_was_and_one_that_was_stopped_does_not() {
        let mut note = Note::default();
        note.begin(1000);
        note.look(&running(1000, 5), PLAN, 1010);
        let resumed = note.look(&ScrubReport::default(), PLAN, 1020).unwrap();
        assert_eq!((resumed.started_s, resumed.segment), (1000, 5));
        note.stopped = true;
        assert_eq!(note.look(&ScrubReport::default(), PLAN, 1030), None);
        let next = 1000 + SCRUB_INTERVAL.as_secs();
        let new = note.look(&ScrubReport::default(), PLAN, next).unwrap();
        assert_eq!((new.started_s, new.segment, note.stopped), (next, 0, false));
    }

    #[test]
    fn a_pass_ordered_in_the_second_in_which_the_last_one_started_has_another_name() {
        let mut note = Note::default();
        note.begin(1000);
        note.look(&finished(1000), PLAN, 1000);
        assert_eq!(note.begin(1000).started_s, 1001);
    }

    #[test]
    fn the_notes_keep_their_form() {
        let note = Note { current: Some(PassNote { started_s: 5, ..PassNote::default() }), ..Note::default() };
        let notes = Notes { shards: BTreeMap::from([(ShardIndex(1), note)]) };
        let text = r#"{"shards":{"1":{"current":{"started_s":5,"finished_s":0,"segment":0,"blocks_read":0,"blocks_compared":0,"damaged":0,"conflicts":0,"segments_unread":0},"stopped":false,"last":null}}}"#;
        assert_eq!(serde_json::to_string(&notes).unwrap(), text);
        assert_eq!(serde_json::from_str::<Notes>(text).unwrap(), notes);
    }
}
