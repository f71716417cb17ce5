//! The story of a run, for whoever has to find out why a seed failed: what was sent to whom, answered, done to the world
//! and decided. Off by default and free then; a run that failed is run again with it.

use super::{ProcessId, World};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};

/// Longer lines are cut: lists of checksums say little.
const LINE_CHARS_MAX: usize = 260;

#[derive(Default)]
pub(super) struct Trace {
    /// How many events are kept; 0: none are even put into words.
    kept: Cell<usize>,
    events: RefCell<VecDeque<String>>,
    names: RefCell<BTreeMap<ProcessId, String>>,
}

impl World {
    /// From now on the last `events` are kept.
    pub fn keep_trace(&self, events: usize) {
        self.state.trace.kept.set(events);
    }

    /// How the story calls a process.
    pub fn name(&self, process: ProcessId, name: &str) {
        if self.state.trace.kept.get() > 0 {
            self.state.trace.names.borrow_mut().insert(process, name.to_string());
        }
    }

    pub fn name_of(&self, process: ProcessId) -> String {
        let names = self.state.trace.names.borrow();
        names.get(&process).cloned().unwrap_or_else(|| format!("process {}", process.0))
    }

    /// One line of the story.
    pub fn note(&self, event: impl FnOnce() -> String) {
        let kept = self.state.trace.kept.get();
        if kept == 0 {
            return;
        }
        let mut line = format!("{:12.6} {}", self.now().0.as_secs_f64(), event());
        if let Some((cut, _)) = line.char_indices().nth(LINE_CHARS_MAX) {
            line.truncate(cut);
            line.push('…');
        }
        let mut events = self.state.trace.events.borrow_mut();
        if events.len() == kept {
            events.pop_front();
        }
        events.push_back(line);
    }

    /// The last events, oldest first.
    pub fn story(&self) -> Vec<String> {
        self.state.trace.events.borrow().iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_events_are_kept_and_without_a_trace_none_is_put_into_words() {
        let world = World::new(1);
        world.note(|| panic!("nobody listens"));
        world.keep_trace(2);
        (1..=3).for_each(|number| world.note(|| format!("event {number}")));
        let story = world.story();
        assert_eq!(story.len(), 2);
        assert!(story[0].ends_with("event 2") && story[1].ends_with("event 3"), "{story:?}");
    }
}
