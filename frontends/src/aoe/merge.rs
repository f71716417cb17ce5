//! Writes on their way to the device: those that wait for the same or for neighbouring blocks become one.
//!
//! A frame of MTU 1500 carries 1 KiB, a quarter of a block: written one by one, each would cost a read, a record and a
//! durable write of 4 KiB. So a block that is written in part is read once, kept here under its lock, and whatever
//! arrives for it meanwhile goes into the same durable write; what arrives while that is under way waits and is merged
//! into the next, for which nothing has to be read again.
//!
//! Order: what overlaps is applied in the order in which it was given here. Nothing is answered before the device has
//! answered the write that it went into.

use crate::device::{Device, Piece, Pieces, VolumeError};
use bytes::{Bytes, BytesMut};
use futures::future::join_all;
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;
use torus_rpc::runtime::{Class, Spawn};
use torus_schema::limits::{AOE_MERGED_BLOCKS_MAX, BLOCK_BYTES};

type Blocks = Range<u64>;
type Done = Box<dyn FnOnce(Result<(), VolumeError>)>;

pub struct Writes<D, S> {
    inner: Rc<Inner<D, S>>,
}

impl<D, S> Clone for Writes<D, S> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

struct Inner<D, S> {
    device: D,
    spawn: S,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    next: u64,
    active: Vec<Active>,
    /// In the order in which they came.
    waiting: Vec<Waiting>,
}

struct Active {
    id: u64,
    blocks: Blocks,
    /// Further parts can be added: its blocks are still being read.
    open: Option<Rc<RefCell<Vec<Part>>>>,
}

struct Waiting {
    blocks: Blocks,
    what: What,
}

enum What {
    Write(Part),
    Clear(Vec<Range<u64>>, Done),
}

struct Part {
    offset: u64,
    data: Bytes,
    done: Done,
}

/// What can be started together.
struct Group {
    blocks: Blocks,
    parts: Vec<What>,
}

/// Blocks as they were written last, still under their lock.
struct Kept {
    blocks: Blocks,
    image: Bytes,
}

fn overlap(a: &Blocks, b: &Blocks) -> bool {
    a.start < b.end && b.start < a.end
}

fn touch(a: &Blocks, b: &Blocks) -> bool {
    a.start <= b.end && b.start <= a.end
}

fn union(a: &Blocks, b: &Blocks) -> Blocks {
    a.start.min(b.start)..a.end.max(b.end)
}

fn blocks_of(range: &Range<u64>) -> Blocks {
    range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES)
}

impl<D: Device, S: Spawn> Writes<D, S> {
    pub fn new(device: D, spawn: S) -> Self {
        Self { inner: Rc::new(Inner { device, spawn, state: RefCell::default() }) }
    }

    /// Waits until `start`, so that what came in one batch is merged.
    pub fn write(&self, offset: u64, data: Bytes, done: impl FnOnce(Result<(), VolumeError>) + 'static) {
        let blocks = blocks_of(&(offset..offset + data.len() as u64));
        self.enter(blocks, What::Write(Part { offset, data, done: Box::new(done) }));
    }

    /// Advisory, like a trim. Also under the blocks' locks: it must not undo a write that came after it.
    pub fn clear(&self, ranges: Vec<Range<u64>>, done: impl FnOnce(Result<(), VolumeError>) + 'static) {
        let hull = ranges.iter().map(blocks_of).reduce(|a, b| union(&a, &b));
        match hull {
            Some(blocks) => self.enter(blocks, What::Clear(ranges, Box::new(done))),
            None => done(Ok(())),
        }
    }

    fn enter(&self, blocks: Blocks, what: What) {
        self.inner.state.borrow_mut().waiting.push(Waiting { blocks, what });
    }

    /// Starts what nothing is in the way of.
    pub fn start(&self) {
        self.start_keeping(None);
    }

    /// `kept`: blocks that were under a lock until now.
    fn start_keeping(&self, kept: Option<Kept>) {
        let kept = kept.map(Rc::new);
        let groups = self.inner.state.borrow_mut().groups();
        for Group { blocks, parts } in groups {
            let mut writes = Vec::new();
            for part in parts {
                match part {
                    What::Write(part) => writes.push(part),
                    What::Clear(ranges, done) => self.begin_clear(blocks.clone(), ranges, done),
                }
            }
            if !writes.is_empty() {
                self.begin_write(blocks, writes, kept.clone());
            }
        }
    }

    fn begin_clear(&self, blocks: Blocks, ranges: Vec<Range<u64>>, done: Done) {
        let id = self.inner.state.borrow_mut().activate(blocks, None);
        let writes = self.clone();
        self.inner.spawn.spawn(Class::Foreground, async move {
            let mut cleared = Ok(());
            for range in ranges {
                if cleared.is_ok() {
                    cleared = writes.inner.device.clear(range.start, range.end - range.start, true, true).await;
                }
            }
            writes.inner.state.borrow_mut().deactivate(id);
            done(cleared);
            writes.start();
        });
    }

    fn begin_write(&self, blocks: Blocks, parts: Vec<Part>, kept: Option<Rc<Kept>>) {
        let missing = missing(&blocks, &parts, kept.as_deref());
        let parts = Rc::new(RefCell::new(parts));
        let open = (!missing.is_empty()).then(|| parts.clone());
        let id = self.inner.state.borrow_mut().activate(blocks.clone(), open);
        let writes = self.clone();
        self.inner.spawn.spawn(Class::Foreground, async move {
            let found = writes.read(&missing).await;
            // From here on nothing is added.
            writes.inner.state.borrow_mut().close(id);
            let parts = parts.take();
            let written = match found {
                Ok(found) => writes.write_image(&blocks, &parts, found, kept).await,
                Err(error) => Err(error),
            };
            if parts.len() > 1 && written.as_ref().is_err_and(is_of_one_part) {
                writes.write_singly(parts).await;
                writes.inner.state.borrow_mut().deactivate(id);
                return writes.start();
            }
            writes.inner.state.borrow_mut().deactivate(id);
            let result = written.as_ref().map(|_| ()).map_err(VolumeError::clone);
            parts.into_iter().for_each(|part| (part.done)(result.clone()));
            writes.start_keeping(written.ok().map(|image| Kept { blocks, image }));
        });
    }

    /// One after the other, in their order: what one of them suffers is not the others'.
    async fn write_singly(&self, parts: Vec<Part>) {
        for part in parts {
            let blocks = blocks_of(&(part.offset..part.offset + part.data.len() as u64));
            let missing = missing(&blocks, std::slice::from_ref(&part), None);
            let written = match self.read(&missing).await {
                Ok(found) => self.write_image(&blocks, std::slice::from_ref(&part), found, None).await,
                Err(error) => Err(error),
            };
            (part.done)(written.map(drop));
        }
    }

    async fn read(&self, missing: &[Blocks]) -> Result<Vec<(Blocks, Pieces)>, VolumeError> {
        let reads = missing.iter().map(|blocks| async move {
            let (offset, length) = (blocks.start * BLOCK_BYTES, (blocks.end - blocks.start) * BLOCK_BYTES);
            Ok((blocks.clone(), self.inner.device.read(offset, length).await?))
        });
        join_all(reads).await.into_iter().collect()
    }

    /// All parts in one durable write of whole blocks; gives what was written.
    async fn write_image(
        &self,
        blocks: &Blocks,
        parts: &[Part],
        found: Vec<(Blocks, Pieces)>,
        kept: Option<Rc<Kept>>,
    ) -> Result<Bytes, VolumeError> {
        let start = blocks.start * BLOCK_BYTES;
        let bytes = ((blocks.end - blocks.start) * BLOCK_BYTES) as usize;
        let image = match parts {
            [only] if only.data.len() == bytes => only.data.clone(),
            _ => {
                let mut image = BytesMut::zeroed(bytes);
                for block in blocks.clone() {
                    if let Some(bytes) = kept.as_deref().and_then(|kept| kept.block(block)) {
                        put(&mut image, block * BLOCK_BYTES - start, bytes);
                    }
                }
                for (read, pieces) in found {
                    put_pieces(&mut image, read.start * BLOCK_BYTES - start, &pieces);
                }
                parts.iter().for_each(|part| put(&mut image, part.offset - start, &part.data));
                image.freeze()
            }
        };
        self.inner.device.write(start, image.clone(), true).await?;
        Ok(image)
    }
}

/// It says something of certain blocks, or of how many there are.
fn is_of_one_part(error: &VolumeError) -> bool {
    matches!(error, VolumeError::Unreadable { .. } | VolumeError::NoSpace { .. })
}

fn put(image: &mut [u8], at: u64, bytes: &[u8]) {
    image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
}

/// Into an image of zeros or of what stood there before: zeros are put as well.
fn put_pieces(image: &mut [u8], mut at: u64, pieces: &[Piece]) {
    for piece in pieces {
        match piece {
            Piece::Data(data) => {
                put(image, at, data);
                at += data.len() as u64;
            }
            Piece::Zeros(count) => {
                image[at as usize..(at + count) as usize].fill(0);
                at += count;
            }
        }
    }
}

impl Kept {
    fn block(&self, block: u64) -> Option<&[u8]> {
        let at = (block.checked_sub(self.blocks.start)? * BLOCK_BYTES) as usize;
        self.image.get(at..at + BLOCK_BYTES as usize)
    }
}

/// Blocks that the parts do not cover and that are not kept: runs of them.
fn missing(blocks: &Blocks, parts: &[Part], kept: Option<&Kept>) -> Vec<Blocks> {
    let mut runs: Vec<Blocks> = Vec::new();
    for block in blocks.clone() {
        let range = block * BLOCK_BYTES..(block + 1) * BLOCK_BYTES;
        if kept.is_some_and(|kept| kept.block(block).is_some()) || is_covered(&range, parts) {
            continue;
        }
        match runs.last_mut() {
            Some(run) if run.end == block => run.end += 1,
            _ => runs.push(block..block + 1),
        }
    }
    runs
}

fn is_covered(range: &Range<u64>, parts: &[Part]) -> bool {
    let mut at = range.start;
    // As often as it gets on: parts come in any order.
    while at < range.end {
        let next = parts.iter().map(|part| (part.offset, part.offset + part.data.len() as u64));
        match next.filter(|(start, end)| *start <= at && at < *end).map(|(_, end)| end).max() {
            Some(end) => at = end,
            None => return false,
        }
    }
    true
}

impl State {
    fn activate(&mut self, blocks: Blocks, open: Option<Rc<RefCell<Vec<Part>>>>) -> u64 {
        let id = self.next;
        self.next += 1;
        self.active.push(Active { id, blocks, open });
        id
    }

    fn close(&mut self, id: u64) {
        let active = self.active.iter_mut().find(|active| active.id == id);
        active.expect("a write is active until it has ended").open = None;
    }

    fn deactivate(&mut self, id: u64) {
        self.active.retain(|active| active.id != id);
    }

    /// Takes what can be started out of `waiting`; the rest stays in its order.
    fn groups(&mut self) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        let mut staying: Vec<Waiting> = Vec::new();
        for waiting in std::mem::take(&mut self.waiting) {
            if staying.iter().any(|other| overlap(&other.blocks, &waiting.blocks)) {
                staying.push(waiting);
                continue;
            }
            if let Some(waiting) = self.join(waiting) {
                let is_free = !self.active.iter().any(|active| overlap(&active.blocks, &waiting.blocks));
                let kept_out = if is_free { into_groups(&mut groups, waiting) } else { Some(waiting) };
                staying.extend(kept_out);
            }
        }
        self.waiting = staying;
        groups
    }

    /// Adds it to a write whose blocks are still being read, if that has all of its.
    fn join(&self, waiting: Waiting) -> Option<Waiting> {
        let Waiting { blocks, what } = waiting;
        let within = |active: &&Active| active.blocks.start <= blocks.start && blocks.end <= active.blocks.end;
        let parts = self.active.iter().find(within).and_then(|active| active.open.as_ref());
        match (what, parts) {
            (What::Write(part), Some(parts)) => {
                parts.borrow_mut().push(part);
                None
            }
            (what, _) => Some(Waiting { blocks, what }),
        }
    }
}

/// Gives it back if it has to wait for one of them.
fn into_groups(groups: &mut Vec<Group>, waiting: Waiting) -> Option<Waiting> {
    let Waiting { blocks, what } = waiting;
    let is_write = matches!(what, What::Write(_));
    let fits = |group: &Group| {
        let all = union(&group.blocks, &blocks);
        is_write && matches!(group.parts[0], What::Write(_)) && all.end - all.start <= AOE_MERGED_BLOCKS_MAX
    };
    let overlapping: Vec<usize> = (0..groups.len()).filter(|index| overlap(&groups[*index].blocks, &blocks)).collect();
    let into = match overlapping[..] {
        [] => groups.iter().position(|group| touch(&group.blocks, &blocks) && fits(group)),
        [only] if fits(&groups[only]) => Some(only),
        _ => return Some(Waiting { blocks, what }),
    };
    match into {
        Some(index) => {
            groups[index].blocks = union(&groups[index].blocks, &blocks);
            groups[index].parts.push(what);
        }
        None => groups.push(Group { blocks, parts: vec![what] }),
    }
    None
}

#[cfg(test)]
#[path = "merge_tests.rs"]
mod tests;
