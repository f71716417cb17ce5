//! From one size to a larger one, so that a crash between any two steps ends in one of the two and works.
//!
//! | step                                                      | what a start finds that comes after a crash here     |
//! |-----------------------------------------------------------|------------------------------------------------------|
//! | 1. `torus.json` says what the shards are to become        | the intent: all the following, which begins anew     |
//! | 2. block files are extended (devices are long enough)     | the same; a file of the full length is not extended  |
//! | 3. shard by shard: the ends of the new segments are made  | the same; a superblock of the new size is left alone |
//! |    zero and durable, then the superblock, one copy and    |                                                      |
//! |    the other                                              |                                                      |
//! | 4. `torus.json` says the new size, and no intent          | the new size                                         |
//!
//! Where step 2 finds no space after all, what it extended is cut off again, the intent is withdrawn, and the start is
//! refused: the node then starts in the old size. That is done only while every superblock still says the old size.

use super::{DataDir, DataDirError, Growing, Identity, Layout, io_error};
use crate::log::BLOCK;
use crate::log::superblock::{SUPERBLOCK_BLOCKS, decode_either};
use std::fs::{self, OpenOptions};
use std::io::{self, Read};
use std::path::Path;
use torus_schema::ids::ShardIndex;

impl DataDir {
    /// Step 1.
    pub fn begin_growth(&self, identity: &Identity, layout: &Layout) -> Result<Identity, DataDirError> {
        let growing = Growing { shard_bytes: layout.shard_bytes, size: layout.size.clone() };
        assert!(growing.shard_bytes > identity.shard_bytes && identity.growing.is_none());
        let intended = Identity { growing: Some(growing), ..identity.clone() };
        self.write_identity(&intended)?;
        Ok(intended)
    }

    /// Step 2. With devices nothing is to be done.
    pub fn extend_files(&self, identity: &Identity) -> Result<(), DataDirError> {
        let Some(growing) = identity.growing.as_ref().filter(|_| identity.devices.is_empty()) else { return Ok(()) };
        for shard in (0..identity.shards).map(ShardIndex) {
            let path = self.block_file(shard);
            let extended = extend(&path, identity.shard_bytes, growing.shard_bytes);
            if let Err(error) = extended.map_err(|error| io_error(&path, "extend", error)) {
                let withdrawn = self.withdraw(identity)?;
                tracing::error!(%error, withdrawn, "the node does not grow");
                return Err(error);
            }
        }
        Ok(())
    }

    /// Step 4.
    pub fn finish_growth(&self, identity: &Identity) -> Result<Identity, DataDirError> {
        let Some(Growing { shard_bytes, size }) = identity.growing.clone() else { return Ok(identity.clone()) };
        let grown = Identity { shard_bytes, size, growing: None, ..identity.clone() };
        self.write_identity(&grown)?;
        Ok(grown)
    }

    /// No shard has been told of the new size: then the old one holds again.
    fn withdraw(&self, identity: &Identity) -> Result<bool, DataDirError> {
        let files: Vec<_> = (0..identity.shards).map(|shard| self.block_file(ShardIndex(shard))).collect();
        for path in &files {
            let size = superblock_size(path).map_err(|error| io_error(path, "read", error))?;
            if size != Some(identity.shard_bytes) {
                return Ok(false);
            }
        }
        for path in &files {
            let cut = || -> io::Result<()> {
                let file = OpenOptions::new().write(true).open(path)?;
                if file.metadata()?.len() > identity.shard_bytes {
                    file.set_len(identity.shard_bytes)?;
                    file.sync_all()?;
                }
                Ok(())
            };
            cut().map_err(|error| io_error(path, "shorten", error))?;
        }
        self.write_identity(&Identity { growing: None, ..identity.clone() })?;
        Ok(true)
    }

    /// Block files are as long as they have to be; while one grows it may be between the two lengths.
    pub fn check_files(&self, identity: &Identity) -> Result<(), DataDirError> {
        if !identity.devices.is_empty() {
            return Ok(());
        }
        let longest = identity.growing.as_ref().map_or(identity.shard_bytes, |growing| growing.shard_bytes);
        for shard in (0..identity.shards).map(ShardIndex) {
            let path = self.block_file(shard);
            let metadata = fs::metadata(&path).map_err(|error| io_error(&path, "find the block file", error))?;
            let found = metadata.len();
            if !(identity.shard_bytes..=longest).contains(&found) {
                return Err(DataDirError::BlockFileLength { path, found, expected: identity.shard_bytes });
            }
        }
        Ok(())
    }
}

/// A file of the full length has all its space: the length follows the space that was taken.
fn extend(path: &Path, from: u64, to: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    if file.metadata()?.len() < to {
        nix::fcntl::posix_fallocate(&file, from as i64, (to - from) as i64)?;
    }
    // Also of one that an earlier, cut-off start extended.
    file.sync_all()
}

fn superblock_size(path: &Path) -> io::Result<Option<u64>> {
    let mut start = Vec::new();
    fs::File::open(path)?.take(SUPERBLOCK_BLOCKS * BLOCK as u64).read_to_end(&mut start)?;
    Ok(decode_either(&start).ok().map(|superblock| superblock.size_bytes))
}

#[cfg(test)]
mod tests {
    use super::super::Found;
    use super::super::tests::formatted;
    use super::*;
    use crate::log::superblock;
    use std::os::unix::fs::FileExt;
    use torus_schema::limits::{SEGMENT_BYTES, SHARD_BYTES_MIN};

    const GROWN: u64 = SHARD_BYTES_MIN + SEGMENT_BYTES;

    fn length(dir: &DataDir) -> u64 {
        fs::metadata(dir.block_file(ShardIndex(0))).unwrap().len()
    }

    fn to(shard_bytes: u64) -> Layout {
        Layout { shards: 1, shard_bytes, size: shard_bytes.to_string() }
    }

    #[test]
    fn growth_is_found_again_after_every_step() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, identity) = formatted(temporary.path());
        let intended = dir.begin_growth(&identity, &to(GROWN)).unwrap();
        assert_eq!(dir.inspect(), Ok(Found::Formatted(intended.clone())));
        assert_eq!(dir.check_files(&intended), Ok(()));
        for _ in 0..2 {
            dir.extend_files(&intended).unwrap();
            assert_eq!((length(&dir), dir.check_files(&intended)), (GROWN, Ok(())));
        }
        let grown = dir.finish_growth(&intended).unwrap();
        assert_eq!(dir.inspect(), Ok(Found::Formatted(grown.clone())));
        assert_eq!((grown.shard_bytes, grown.growing.is_none(), grown.size.as_str()), (GROWN, true, "603979776"));
        assert_eq!(dir.check_files(&grown), Ok(()));
        assert!(matches!(dir.check_files(&identity), Err(DataDirError::BlockFileLength { .. })), "longer is not ours");
    }

    #[test]
    fn growth_that_finds_no_space_leaves_the_old_size() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, identity) = formatted(temporary.path());
        let file = OpenOptions::new().write(true).open(dir.block_file(ShardIndex(0))).unwrap();
        file.write_all_at(&superblock::example(SHARD_BYTES_MIN).encode(), 0).unwrap();
        let intended = dir.begin_growth(&identity, &to(1 << 50)).unwrap();
        let text = dir.extend_files(&intended).unwrap_err().to_string();
        assert!(text.contains("extend") && text.contains("shard-0.blocks"), "{text}");
        assert_eq!((dir.inspect(), length(&dir)), (Ok(Found::Formatted(identity)), SHARD_BYTES_MIN));
    }

    #[test]
    fn growth_that_a_shard_knows_of_is_not_withdrawn() {
        let temporary = tempfile::tempdir().unwrap();
        let (dir, identity) = formatted(temporary.path());
        let file = OpenOptions::new().write(true).open(dir.block_file(ShardIndex(0))).unwrap();
        file.write_all_at(&superblock::example(1 << 50).encode(), 0).unwrap();
        let intended = dir.begin_growth(&identity, &to(1 << 50)).unwrap();
        dir.extend_files(&intended).unwrap_err();
        assert_eq!(dir.inspect(), Ok(Found::Formatted(intended)));
    }
}
