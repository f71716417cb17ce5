//! A shard's disk has become larger. The superblock says so last, when nothing in the new segments can be taken for
//! part of the log; until then the new space is nobody's.

use super::start::{check_owner, clear_ends, read_superblock, write_superblock};
use super::{Shard, ShardError, ShardIdentity};
use crate::log::superblock::Superblock;
use crate::log::{Geometry, SegmentIndex};
use torus_rpc::runtime::{Disk, Runtime};

impl<R: Runtime> Shard<R> {
    /// Takes all of the disk. May be cut off anywhere and be called again; a shard that has its size is left alone.
    pub async fn grow(disk: &R::Disk, identity: ShardIdentity) -> Result<(), ShardError> {
        let old = read_superblock(disk).await?.map_err(ShardError::Superblock)?.superblock;
        check_owner(&old, identity)?;
        let size_bytes = disk.size_bytes();
        if size_bytes < old.size_bytes {
            return Err(ShardError::Size { found: size_bytes, expected: old.size_bytes });
        }
        if size_bytes == old.size_bytes {
            return Ok(());
        }
        let before = Geometry::new(old.size_bytes, old.segment_bytes);
        let after = Geometry::new(size_bytes, old.segment_bytes);
        for segment in (before.segments..after.segments).map(SegmentIndex) {
            clear_ends(disk, after, segment).await?;
        }
        disk.sync().await?;
        let grown = Superblock { size_bytes, revision: old.revision + 1, ..old };
        write_superblock(disk, &grown).await?;
        Ok(())
    }
}
