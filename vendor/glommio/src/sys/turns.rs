// Not part of glommio 0.9.0: see vendor/README.md of Torus.

//! Which reads of a file go to the kernel at once, and which wait for one that
//! is under way.
//!
//! Some disks, those of many virtual machines, work off what is queued and tell
//! of it when nothing is left. Who hands on everything there gets everything
//! back at once: it works while the disk does nothing, then waits while the disk
//! works. So only about half of what is asked for is handed on. The rest waits
//! until one of that half is done (with such a disk: all are), and is handed on
//! before anything is done with what was read; disk and processor then work at the
//! same time, each on its half. A disk that tells of each read soon after the one
//! before keeps nobody waiting for longer than that.
//!
//! Each file has turns of its own, so that one whose disk does not answer holds
//! up no other. (A file is a descriptor here: one that is opened while reads of a
//! closed one with the same number are under way waits for these.)

use std::collections::VecDeque;
use std::os::unix::io::RawFd;

/// Where there are fewer at a time, none waits.
const ENOUGH: usize = 12;
/// After so many reads it is looked anew how many there are at a time.
const WINDOW: usize = 256;

#[derive(Debug)]
pub(crate) struct Turns<T> {
    files: Vec<File<T>>,
}

/// Those that wait do so only as long as one is under way: nobody else lets them go.
#[derive(Debug)]
struct File<T> {
    fd: RawFd,
    under_way: usize,
    waiting: VecDeque<T>,
    /// Of those that were let go, so many have not come by again.
    let_go: usize,
    /// The most that were under way or waiting, of the last window and so far in this one.
    most: usize,
    peak: usize,
    done: usize,
}

impl<T> File<T> {
    fn must_wait(&self) -> bool {
        self.let_go == 0 && self.most >= ENOUGH && self.under_way >= self.most / 2
    }
}

impl<T> Turns<T> {
    pub(crate) fn new() -> Self {
        Self { files: Vec::new() }
    }

    fn file(&mut self, fd: RawFd) -> &mut File<T> {
        let found = self.files.iter().position(|file| file.fd == fd);
        let at = found.unwrap_or_else(|| {
            self.files.push(File { fd, under_way: 0, waiting: VecDeque::new(), let_go: 0, most: 0, peak: 0, done: 0 });
            self.files.len() - 1
        });
        &mut self.files[at]
    }

    /// Whether the next read of the file has to wait, by `wait`.
    pub(crate) fn must_wait(&mut self, fd: RawFd) -> bool {
        self.file(fd).must_wait()
    }

    pub(crate) fn wait(&mut self, fd: RawFd, read: T) {
        let file = self.file(fd);
        debug_assert!(file.must_wait());
        file.waiting.push_back(read);
    }

    /// One that need not wait left the queue, to the kernel or because nobody
    /// wants it any more.
    pub(crate) fn passed(&mut self, fd: RawFd) {
        let file = self.file(fd);
        file.let_go = file.let_go.saturating_sub(1);
    }

    /// One went to the kernel.
    pub(crate) fn begun(&mut self, fd: RawFd) {
        self.file(fd).under_way += 1;
    }

    /// One is done: all that wait are let go, the last first.
    pub(crate) fn done(&mut self, fd: RawFd, mut let_go: impl FnMut(T)) {
        let file = self.file(fd);
        debug_assert!(file.under_way > 0);
        file.peak = file.peak.max(file.under_way + file.waiting.len());
        file.under_way -= 1;
        file.done += 1;
        if file.done == WINDOW {
            file.most = file.peak;
            file.peak = 0;
            file.done = 0;
        }
        file.let_go += file.waiting.len();
        while let Some(read) = file.waiting.pop_back() {
            let_go(read);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FD: RawFd = 7;

    /// A disk and who reads from it: `asked` are queued, `disk` are under way.
    struct Reader {
        turns: Turns<u32>,
        asked: VecDeque<u32>,
        disk: VecDeque<u32>,
    }

    impl Reader {
        /// It knows that there are so many at a time.
        fn used_to(most: usize) -> Self {
            let mut turns = Turns::new();
            turns.file(FD).most = most;
            Self { turns, asked: VecDeque::new(), disk: VecDeque::new() }
        }

        fn ask(&mut self, reads: impl IntoIterator<Item = u32>) {
            self.asked.extend(reads);
            self.submit();
        }

        fn submit(&mut self) {
            while let Some(read) = self.asked.pop_front() {
                if self.turns.must_wait(FD) {
                    self.turns.wait(FD, read);
                } else {
                    self.turns.passed(FD);
                    self.turns.begun(FD);
                    self.disk.push_back(read);
                }
            }
        }

        /// As many as are told of at once are done, then what was let go is submitted.
        fn done(&mut self, reads: usize) -> Vec<u32> {
            let done: Vec<u32> = self.disk.drain(..reads).collect();
            for _ in &done {
                let asked = &mut self.asked;
                self.turns.done(FD, |read| asked.push_front(read));
            }
            self.submit();
            done
        }
    }

    #[test]
    fn a_few_never_wait() {
        let mut reader = Reader::used_to(0);
        for read in 0..100 {
            reader.ask(read * 11..read * 11 + 11);
            assert_eq!(reader.disk.len(), 11);
            reader.done(11);
        }
    }

    #[test]
    fn a_disk_that_tells_at_the_end_has_half_of_them_and_so_has_the_processor() {
        let mut reader = Reader::used_to(0);
        reader.ask(0..32);
        let mut sizes = Vec::new();
        // What is read is asked for again, while the disk has the others.
        for _ in 0..60 {
            let done = reader.done(reader.disk.len());
            sizes.push(reader.disk.len());
            reader.ask(done);
        }
        assert!(sizes[20..].iter().all(|size| (12..=20).contains(size)), "{sizes:?}");
    }

    #[test]
    fn a_disk_that_tells_of_each_has_nearly_all_of_them_always() {
        let mut reader = Reader::used_to(0);
        reader.ask(0..32);
        let mut least = usize::MAX;
        for turn in 0..200 {
            let done = reader.done(1);
            if turn >= 10 {
                least = least.min(reader.disk.len());
            }
            reader.ask(done);
        }
        assert!(least >= 31, "{least}");
    }

    #[test]
    fn what_was_let_go_keeps_its_order_and_goes_before_what_came_later() {
        let mut reader = Reader::used_to(ENOUGH);
        reader.ask(0..14);
        assert_eq!(reader.disk, [0, 1, 2, 3, 4, 5]);
        assert_eq!(reader.done(6), [0, 1, 2, 3, 4, 5]);
        assert_eq!(reader.disk, [6, 7, 8, 9, 10, 11, 12, 13]);
        reader.ask(14..16);
        assert_eq!(reader.disk.len(), 8, "two wait");
        reader.done(1);
        assert_eq!(reader.disk, [7, 8, 9, 10, 11, 12, 13, 14, 15]);
    }

    #[test]
    fn nothing_waits_for_ever() {
        let mut reader = Reader::used_to(0);
        let mut asked = 0;
        let mut answered = 0;
        for turn in 0_u32..10_000 {
            let more = turn.wrapping_mul(2_654_435_761) >> 27;
            reader.ask(asked..asked + more);
            asked += more;
            let told = (turn.wrapping_mul(40_503) >> 3) as usize % (reader.disk.len() + 1);
            answered += reader.done(told).len();
        }
        while !reader.disk.is_empty() {
            answered += reader.done(1).len();
        }
        assert_eq!(answered, asked as usize);
    }

    #[test]
    fn a_file_whose_disk_does_not_answer_holds_up_no_other() {
        let mut turns = Turns::<u32>::new();
        for fd in [FD, FD + 1] {
            turns.file(fd).most = ENOUGH;
        }
        for _ in 0..ENOUGH / 2 {
            turns.begun(FD);
        }
        assert!(turns.must_wait(FD));
        assert!(!turns.must_wait(FD + 1));
    }

    #[test]
    fn a_quieter_time_is_noticed() {
        let mut reader = Reader::used_to(0);
        reader.ask(0..1000);
        while !reader.disk.is_empty() {
            reader.done(reader.disk.len());
        }
        assert!(reader.turns.file(FD).most > 400);
        for _ in 0..2 * WINDOW / 32 {
            reader.ask(0..32);
            reader.done(reader.disk.len());
            reader.done(reader.disk.len());
        }
        assert_eq!(reader.turns.file(FD).most, 32);
    }
}
