//! What a node does with its files and devices before they serve: a format, once; at every later start a check, and
//! growth where more is asked for.

use super::NodeError;
use crate::config::NodeArguments;
use crate::datadir::{self, DataDir, Devices, FORMAT_VERSION, Found, Identity, Layout};
use crate::disk::area::BlockArea;
use crate::disk::faulty::FaultFile;
use crate::node::executor::{self, ShardOptions};
use crate::node::numa;
use crate::shard::ShardIdentity;
use torus_rpc::runtime::glommio::Thread;
use torus_schema::ids::{ClusterId, NodeId, ShardIndex};
use torus_schema::records::ClusterRecord;

#[derive(Clone, Copy)]
pub struct Disks<'a> {
    pub arguments: &'a NodeArguments,
    pub dir: &'a DataDir,
    /// Those that the node may use.
    pub cores: &'a [usize],
}

impl Disks<'_> {
    /// Changes nothing; what cannot be formatted is refused.
    pub fn plan_format(&self) -> Result<(Layout, Devices), NodeError> {
        let arguments = self.arguments;
        let devices = Devices::take(&arguments.devices)?;
        let shards = arguments.shards_for_format(self.cores.len());
        let layout = self.dir.plan_format(arguments.size, shards, &devices.0)?;
        if !arguments.force {
            devices.check_empty(self.dir.draft())?;
        }
        Ok((layout, devices))
    }

    pub async fn format(&self, cluster: &ClusterRecord, found: &Found) -> Result<(Identity, Devices), NodeError> {
        let path = self.dir.path().display();
        match found {
            Found::InterruptedFormat => tracing::warn!("data dir {path}: a format was cut off; formatting it again"),
            _ => tracing::info!("data dir {path} is empty: formatting it for cluster {}", cluster.id),
        }
        let (Layout { shards, shard_bytes, size }, devices) = self.plan_format()?;
        // That of a format that was cut off goes on: its superblocks on devices are then still known as ours.
        let node = self.dir.draft().unwrap_or_else(NodeId::random);
        self.dir.begin_format(node)?;
        devices.wipe(shards, shard_bytes)?;
        let identity = Identity {
            format_version: FORMAT_VERSION,
            cluster: cluster.id,
            node,
            shards,
            shard_bytes,
            size,
            growing: None,
            devices: devices.paths(),
        };
        for options in self.options_of(&identity, self.dir.areas(&identity, shard_bytes)) {
            executor::format(options).await?;
        }
        self.dir.finish_format(&identity)?;
        tracing::info!(%node, shards, shard_bytes, "formatted");
        Ok((identity, devices))
    }

    /// Of a node that was formatted: checked against what is asked for, and grown.
    pub async fn take(&self, identity: Identity, cluster: ClusterId) -> Result<(Identity, Devices), NodeError> {
        let Self { arguments, dir, .. } = *self;
        dir.check(&identity, cluster, arguments.shards)?;
        dir.check_files(&identity)?;
        let (devices, found) = datadir::attach(&identity, &arguments.devices)?;
        if found != identity {
            dir.write_identity(&found)?;
        }
        let mut identity = found;
        if identity.growing.is_some() {
            tracing::warn!("growing was cut off; it is taken up again");
            identity = self.grow(identity).await?;
        }
        if let Some(layout) = dir.plan_growth(&identity, arguments.size, &devices.0)? {
            let (from, to) = (identity.shard_bytes, layout.shard_bytes);
            tracing::info!(shards = layout.shards, from, to, "growing: bytes of each shard");
            identity = self.grow(dir.begin_growth(&identity, &layout)?).await?;
        }
        dir.forget_format()?;
        Ok((identity, devices))
    }

    /// `datadir::growth` has the steps and why in that order.
    async fn grow(&self, identity: Identity) -> Result<Identity, NodeError> {
        let Some(growing) = &identity.growing else { return Ok(identity) };
        self.dir.extend_files(&identity)?;
        for options in self.options_of(&identity, self.dir.areas(&identity, growing.shard_bytes)) {
            executor::grow(options).await?;
        }
        Ok(self.dir.finish_growth(&identity)?)
    }

    /// To serve with: those that are pinned are near their disks, unless the operator said where.
    pub fn shard_options(&self, identity: &Identity) -> Vec<ShardOptions> {
        let mut options = self.options_of(identity, self.dir.areas(identity, identity.shard_bytes));
        let usual: Option<Vec<usize>> = options.iter().map(|options| options.thread.cpu).collect();
        if let (Some(usual), None) = (usual, &self.arguments.cpus) {
            let paths: Vec<_> = options.iter().map(|options| options.area.path.as_path()).collect();
            let near = numa::near_disks(usual, &paths);
            options.iter_mut().zip(near).for_each(|(options, core)| options.thread.cpu = Some(core));
        }
        options
    }

    fn options_of(&self, identity: &Identity, areas: Vec<BlockArea>) -> Vec<ShardOptions> {
        let pinning = self.arguments.pinning(identity.shards, self.cores);
        let option = |(shard, area): (ShardIndex, BlockArea)| ShardOptions {
            identity: ShardIdentity { cluster: identity.cluster, node: identity.node, shard },
            area,
            faults: FaultFile::new(self.arguments.fault_file.as_deref()),
            thread: Thread {
                cpu: pinning.as_ref().map(|cpus| cpus[usize::from(shard.0)]),
                spin: self.arguments.spin.0,
            },
            resync_bytes_s: self.arguments.resync_rate,
        };
        (0..identity.shards).map(ShardIndex).zip(areas).map(option).collect()
    }
}
