//! The noun `volume`, the same in `torusblk` and `torusadm`.

use super::volume_create::{NewVolume, check_name, check_size, create};
use super::volume_delete::{Wait, delete};
use super::volume_promote::{self, PromoteArguments};
use super::volume_resize::{self, ResizeArguments};
use super::volume_set::{self, SetArguments};
use super::{AdminError, Report, snapshot, volume_compare, volume_show};
use clap::{Args, Subcommand};
use serde_json::json as object;
use std::time::Duration;
use torus_rpc::metadata::Metadata;
use torus_rpc::runtime::Runtime;
use torus_schema::limits::VOLUME_BYTES_MAX;
use torus_schema::records::VolumeRecord;
use torus_schema::size::{self, SizeError};

#[derive(Subcommand, Clone, Debug)]
pub enum VolumeCommand {
    /// Make a volume
    #[command(
        after_help = "Examples:\n  volume create db-1 500GiB\n  volume create scratch 1TiB --replicas 2 --width 256"
    )]
    Create(CreateArguments),
    /// Show all volumes
    List,
    /// Show all that is known of a volume: record, owner, stale replicas, where it lies
    Show { name: String },
    /// Compare what all replicas in sync hold, by version and checksum of each block; best while nobody writes
    Compare { name: String },
    /// Delete a volume that nobody has attached; its space comes back as the nodes confirm
    Delete(DeleteArguments),
    /// Change a volume that nobody has attached
    Set(SetArguments),
    /// Change a volume's size: it grows while it is used, and shrinks while nobody has it attached
    Resize(ResizeArguments),
    /// Have a node's stale replicas count where every replica in sync is lost for good: LOSES WRITES, and shows which
    Promote(PromoteArguments),
}

impl VolumeCommand {
    /// It takes as long as it takes, and shows how far it is.
    pub fn is_long(&self) -> bool {
        matches!(self, Self::Compare { .. } | Self::Resize(ResizeArguments { allow_shrink: true, .. }))
    }
}

#[derive(Args, Clone, Debug)]
pub struct CreateArguments {
    /// 1 to 128 of A-Z a-z 0-9 . _ -, not beginning with . or -
    pub name: String,
    /// Such as 10GiB, 1.5T, 4096 (bytes). Thin: only what is written takes space, so it may exceed the capacity
    #[arg(value_parser = parse_size)]
    pub size: u64,
    /// Copies of every block, each on another node [default: the cluster's, 3 unless set at init]
    #[arg(long)]
    pub replicas: Option<u8>,
    /// Replicas in sync below which nothing is written: every acknowledged write is on at least that many
    /// [default: replicas − 1, at least 1]
    #[arg(long)]
    pub min_replicas: Option<u8>,
    /// Slices the volume is spread over, a power of two: more spread the load over more shards, fewer let the death
    /// of a node touch fewer volumes [default: 64]
    #[arg(long)]
    pub width: Option<u32>,
    /// Make every write durable before it is acknowledged, for users that never flush
    #[arg(long)]
    pub write_through: bool,
}

/// Past the largest u64 a size is too large all the same; saying so is for `check_size`.
pub(super) fn parse_size(text: &str) -> Result<u64, SizeError> {
    match size::parse(text) {
        Err(SizeError::TooLarge { .. }) => Ok(u64::MAX),
        other => other,
    }
}

#[derive(Args, Clone, Debug)]
pub struct DeleteArguments {
    pub name: String,
    /// Do not wait for the nodes to drop the data; they do it all the same
    #[arg(long)]
    pub no_wait: bool,
}

/// `progress` hears what is waited for.
pub async fn run<R: Runtime>(
    runtime: &R,
    command: &VolumeCommand,
    deadline: Duration,
    progress: impl FnMut(&[String]),
) -> Result<Report, AdminError> {
    match command {
        VolumeCommand::Compare { name } => volume_compare::compare(runtime, name, deadline, progress).await,
        VolumeCommand::Create(arguments) => run_create(runtime, arguments, deadline).await,
        VolumeCommand::List => volume_show::list(runtime.metadata()).await,
        VolumeCommand::Show { name } => volume_show::show(runtime.metadata(), name).await,
        VolumeCommand::Delete(arguments) => run_delete(runtime, arguments, deadline, progress).await,
        VolumeCommand::Set(arguments) => volume_set::set(runtime, arguments).await,
        VolumeCommand::Resize(arguments) => volume_resize::resize(runtime, arguments).await,
        VolumeCommand::Promote(arguments) => volume_promote::run(runtime, arguments, deadline).await,
    }
}

async fn run_create<R: Runtime>(
    runtime: &R,
    arguments: &CreateArguments,
    deadline: Duration,
) -> Result<Report, AdminError> {
    check_name(&arguments.name)?;
    check_size(arguments.size)?;
    let new = NewVolume {
        name: arguments.name.clone(),
        size_bytes: arguments.size,
        replicas: arguments.replicas,
        min_replicas: arguments.min_replicas,
        width: arguments.width,
        write_through: arguments.write_through,
    };
    let volume = create(runtime, &new, deadline).await?;
    let sentence = format!(
        "volume {} made: {}, {} replicas, uuid {}",
        volume.name,
        size::format(volume.size_bytes),
        volume.replicas,
        volume.id
    );
    let warnings = thin_warning(runtime.metadata(), &volume).await?.into_iter().collect();
    Ok(Report { warnings, ..Report::said(sentence, &volume) })
}

/// A volume may be larger than the cluster; whoever makes one should know.
async fn thin_warning<M: Metadata>(metadata: &M, volume: &VolumeRecord) -> Result<Option<String>, AdminError> {
    let cluster = snapshot::Cluster::read(metadata).await?;
    let capacity: u64 = cluster.ring.nodes().iter().map(|node| node.weight_bytes()).sum();
    let full = u128::from(volume.size_bytes) * u128::from(volume.replicas);
    if full <= u128::from(capacity) {
        return Ok(None);
    }
    let ratio = full as f64 / capacity.max(1) as f64;
    let raw = size::format(u64::try_from(full).unwrap_or(VOLUME_BYTES_MAX));
    Ok(Some(format!(
        "full, this volume would take {raw} with its {} replicas, {ratio:.1} times the ring's raw capacity of {}; \
         writes fail with \"no space\" once that is used up",
        volume.replicas,
        size::format(capacity)
    )))
}

async fn run_delete<R: Runtime>(
    runtime: &R,
    arguments: &DeleteArguments,
    deadline: Duration,
    progress: impl FnMut(&[String]),
) -> Result<Report, AdminError> {
    // The rest of the deadline is for the metadata store.
    let wait = if arguments.no_wait { Wait::No } else { Wait::AtMost(deadline / 2) };
    let deleted = delete(runtime, &arguments.name, wait, progress).await?;
    let sentence = format!("volume {} deleted, uuid {}", deleted.volume.name, deleted.volume.id);
    let waits = format!("space comes back once these nodes have confirmed: {}", deleted.awaited.join(", "));
    let warnings = if deleted.awaited.is_empty() || arguments.no_wait { vec![] } else { vec![waits] };
    let document = object!({"name": deleted.volume.name, "uuid": deleted.volume.id, "awaited": deleted.awaited});
    Ok(Report { warnings, ..Report::said(sentence, document) })
}
