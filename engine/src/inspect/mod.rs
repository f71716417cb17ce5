//! `torus-engine inspect`: what stands on the disks of a node that does not run. Nothing is written: the steps of a
//! start run over an overlay that keeps their writes in memory (`disk::overlay`), so what is shown is what a start
//! would believe.
//!
//! * `open`     which areas, and that nobody uses them
//! * `report`   what is shown, as data
//! * `records`  every record of a block; the checksum of everything
//! * `picture`  how full the segments are, in characters
//! * `text`     the report for people

mod open;
mod picture;
mod records;
mod report;
mod text;

use crate::config::{InspectArguments, InspectOutput};
use crate::datadir::DataDirError;
use crate::disk::area::BlockArea;
use crate::disk::overlay::OverlayDisk;
use crate::shard::ShardError;
use crate::shard::survey::survey;
use futures::executor::block_on;
use open::Opened;
use report::{NodeInspection, ShardInspection};
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use thiserror::Error;
use torus_rpc::runtime::DiskError;
use torus_schema::ids::ShardIndex;

#[derive(Debug, Error)]
pub enum InspectError {
    #[error(transparent)]
    DataDir(#[from] DataDirError),
    #[error("{path}: {source}")]
    Shard { path: PathBuf, source: ShardError },
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error("cannot {operation} {path}: {because}")]
    Io { path: PathBuf, operation: &'static str, because: String },
    #[error("{path} holds no superblock of a shard, expected one at its start; is it the right device?")]
    NoShard { path: PathBuf },
    #[error("there is no shard {asked} here, expected one below {found}")]
    ShardIndex { asked: ShardIndex, found: u16 },
    #[error("name a DIR, or devices with --device; see --help")]
    Nothing,
    #[error("{damaged} of {checked} blocks are damaged; a running node repairs them from their replicas")]
    Damaged { damaged: u64, checked: u64 },
    #[error("the report cannot be written: {0}")]
    Output(#[from] io::Error),
}

/// Prints the report. Damage found by `--verify` is an error, told after it.
pub fn run(arguments: &InspectArguments) -> Result<(), InspectError> {
    let opened = Opened::new(arguments)?;
    let mut node = NodeInspection::new(&opened);
    let (mut damaged, mut checked) = (0, 0);
    for area in &opened.areas {
        let file = File::open(&area.path).map_err(|error| open::io_error(&area.path, "open", error))?;
        let shard = inspect(OverlayDisk::new(file, area.clone()), area, arguments)?;
        if let Some(verified) = &shard.verified {
            damaged += verified.damaged_blocks;
            checked += verified.blocks;
        }
        node.shards.push(shard);
    }
    let mut out = io::stdout().lock();
    match arguments.output {
        InspectOutput::Json => {
            let text = serde_json::to_string_pretty(&node).map_err(io::Error::from)?;
            writeln!(out, "{text}")?;
        }
        InspectOutput::Text => text::write(&mut out, &node)?,
    }
    if damaged > 0 { Err(InspectError::Damaged { damaged, checked }) } else { Ok(()) }
}

fn inspect(disk: OverlayDisk, area: &BlockArea, arguments: &InspectArguments) -> Result<ShardInspection, InspectError> {
    let failed = |source| InspectError::Shard { path: area.path.clone(), source };
    let found = block_on(survey(&disk)).map_err(failed)?;
    let mut shard = ShardInspection::new(area, &found);
    if let Some((volume, block)) = arguments.block() {
        shard.records = Some(records::of_block(&disk, &found, volume, block)?);
    }
    if arguments.verify {
        let shows_progress = io::stderr().is_terminal();
        shard.verified = Some(records::verify(&disk, &found, shows_progress)?);
    }
    Ok(shard)
}
