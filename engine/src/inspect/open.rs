//! Which areas are looked at: those of a data dir, or those that the superblocks of devices tell of. Refused while a
//! node uses them: what it writes meanwhile would look like damage.

use super::InspectError;
use crate::config::InspectArguments;
use crate::datadir::{DataDir, Identity, look_for_devices};
use crate::disk::area::{AreaKind, BlockArea};
use crate::disk::device::{peek_area, peek_exclusively};
use std::io;
use std::path::{Path, PathBuf};
use torus_schema::ids::ShardIndex;

pub struct Opened {
    /// `None`: only devices were named.
    pub identity: Option<Identity>,
    pub path: Option<PathBuf>,
    pub areas: Vec<BlockArea>,
    /// Keep nodes away for as long as they live.
    _lock: Option<DataDir>,
    _devices: Vec<std::fs::File>,
}

impl Opened {
    pub fn new(arguments: &InspectArguments) -> Result<Self, InspectError> {
        let mut opened = match &arguments.dir {
            Some(dir) => Self::data_dir(dir, &arguments.devices)?,
            None => Self::devices(&arguments.devices)?,
        };
        if let Some(asked) = arguments.shard.map(ShardIndex) {
            let found = opened.areas.len() as u16;
            if asked.0 >= found {
                return Err(InspectError::ShardIndex { asked, found });
            }
            opened.areas = vec![opened.areas.swap_remove(usize::from(asked.0))];
        }
        Ok(opened)
    }

    fn data_dir(dir: &Path, given: &[PathBuf]) -> Result<Self, InspectError> {
        let (lock, identity) = DataDir::look(dir)?;
        let devices = look_for_devices(&identity, given)?;
        let identity = Identity { devices: devices.clone(), ..identity };
        let held = hold(&devices)?;
        let areas = lock.areas(&identity, identity.shard_bytes);
        let path = Some(lock.path().to_path_buf());
        Ok(Self { identity: Some(identity), path, areas, _lock: Some(lock), _devices: held })
    }

    /// An area after the other, for as long as there is a superblock of the same node.
    fn devices(paths: &[PathBuf]) -> Result<Self, InspectError> {
        if paths.is_empty() {
            return Err(InspectError::Nothing);
        }
        let held = hold(paths)?;
        let mut areas = Vec::new();
        for path in paths {
            let read = |offset| peek_area(path, offset).map_err(|error| io_error(path, "read", error));
            let first = read(0)?.ok_or_else(|| InspectError::NoShard { path: path.clone() })?;
            let mut offset_bytes = 0;
            while let Some(found) = read(offset_bytes)?.filter(|found| found.node == first.node) {
                let bytes = found.size_bytes;
                areas
                    .push((found.shard, BlockArea { path: path.clone(), kind: AreaKind::Device, offset_bytes, bytes }));
                offset_bytes += bytes;
            }
        }
        areas.sort_by_key(|(shard, _)| *shard);
        let areas = areas.into_iter().map(|(_, area)| area).collect();
        Ok(Self { identity: None, path: None, areas, _lock: None, _devices: held })
    }
}

fn hold(paths: &[PathBuf]) -> Result<Vec<std::fs::File>, InspectError> {
    let held: Result<Vec<_>, _> = paths.iter().map(|path| peek_exclusively(path)).collect();
    Ok(held.map_err(crate::datadir::DataDirError::from)?)
}

pub fn io_error(path: &Path, operation: &'static str, error: io::Error) -> InspectError {
    InspectError::Io { path: path.to_path_buf(), operation, because: error.to_string() }
}
