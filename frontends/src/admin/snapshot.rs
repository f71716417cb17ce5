//! What stands in the metadata store, read and checked: nothing an administrator's command does starts from less.

use super::AdminError;
use std::collections::BTreeMap;
use torus_rpc::metadata::{Entry, Metadata, Revision, Transaction};
use torus_schema::ids::{NodeId, VolumeId};
use torus_schema::records::{
    ClusterRecord, FORMAT_VERSION, HeartbeatRecord, NameRecord, NodeRecord, OwnerRecord, StatusRecord, VolumeRecord,
    decode, keys,
};
use torus_schema::ring::{Ring, RingRecord};

/// The cluster and its ring, as of one moment.
pub struct Cluster {
    pub record: ClusterRecord,
    pub ring: Ring,
    pub ring_entry: Entry,
    /// `None` as long as no volume was ever placed.
    pub placements: Option<Revision>,
}

impl Cluster {
    pub async fn read<M: Metadata>(metadata: &M) -> Result<Self, AdminError> {
        let reads = vec![keys::cluster(), keys::ring(), keys::placements()];
        let mut entries = read_together(metadata, reads).await?.into_iter();
        let (cluster, ring, placements) =
            (entries.next().flatten(), entries.next().flatten(), entries.next().flatten());
        let cluster = cluster.ok_or(AdminError::NotInitialised)?;
        let cluster: ClusterRecord = decode(&cluster.key, &cluster.value)?;
        if cluster.format_version != FORMAT_VERSION {
            return Err(AdminError::FormatVersion { found: cluster.format_version, expected: FORMAT_VERSION });
        }
        let ring_entry = ring.ok_or(AdminError::NotInitialised)?;
        let record = decode::<RingRecord>(&ring_entry.key, &ring_entry.value)?;
        Ok(Self {
            record: cluster,
            ring: Ring::from_record(record)?,
            ring_entry,
            placements: placements.map(|entry| entry.mod_revision),
        })
    }
}

/// Every node that has ever joined, and its heartbeat if it is up.
pub struct Nodes {
    pub records: BTreeMap<NodeId, NodeRecord>,
    pub heartbeats: BTreeMap<NodeId, HeartbeatRecord>,
}

impl Nodes {
    pub async fn read<M: Metadata>(metadata: &M) -> Result<Self, AdminError> {
        let mut records = BTreeMap::new();
        for entry in metadata.range(&keys::nodes()).await?.entries {
            let record: NodeRecord = decode(&entry.key, &entry.value)?;
            records.insert(record.id, record);
        }
        let mut heartbeats = BTreeMap::new();
        for entry in metadata.range(&keys::heartbeats()).await?.entries {
            let record: HeartbeatRecord = decode(&entry.key, &entry.value)?;
            heartbeats.insert(record.node, record);
        }
        Ok(Self { records, heartbeats })
    }

    /// How people find the node again: its address and uuid.
    pub fn name(&self, node: NodeId) -> String {
        match self.records.get(&node) {
            Some(record) => format!("{} ({node})", record.control),
            None => node.to_string(),
        }
    }
}

/// In the order of their names.
pub async fn volumes<M: Metadata>(metadata: &M) -> Result<Vec<VolumeRecord>, AdminError> {
    let mut volumes = Vec::new();
    for entry in metadata.range(&keys::volumes()).await?.entries {
        volumes.push(decode::<VolumeRecord>(&entry.key, &entry.value)?);
    }
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(volumes)
}

/// Records of one kind by the volume whose uuid ends their key.
pub async fn by_volume<M: Metadata, T: serde::de::DeserializeOwned>(
    metadata: &M,
    prefix: &str,
) -> Result<BTreeMap<VolumeId, T>, AdminError> {
    let mut found = BTreeMap::new();
    for entry in metadata.range(prefix).await?.entries {
        let volume = entry.key[prefix.len()..].parse();
        let volume = volume.map_err(|_| AdminError::Record(format!("the key {} does not end in a uuid", entry.key)))?;
        found.insert(volume, decode(&entry.key, &entry.value)?);
    }
    Ok(found)
}

/// With the revision of each.
pub type Statuses = BTreeMap<VolumeId, (StatusRecord, Revision)>;

pub async fn statuses<M: Metadata>(metadata: &M) -> Result<Statuses, AdminError> {
    Ok(statuses_at(metadata).await?.0)
}

/// Also the moment at which they were so.
pub async fn statuses_at<M: Metadata>(metadata: &M) -> Result<(Statuses, Revision), AdminError> {
    let prefix = keys::statuses();
    let mut found = BTreeMap::new();
    let range = metadata.range(&prefix).await?;
    for entry in range.entries {
        let volume = entry.key[prefix.len()..].parse();
        let volume = volume.map_err(|_| AdminError::Record(format!("the key {} does not end in a uuid", entry.key)))?;
        found.insert(volume, (decode(&entry.key, &entry.value)?, entry.mod_revision));
    }
    Ok((found, range.revision))
}

/// One volume and all that is known of it, as of one moment.
pub struct Found {
    pub name_entry: Entry,
    pub entry: Entry,
    pub record: VolumeRecord,
    pub status: StatusRecord,
    /// Of the status, if there is one.
    pub status_revision: Option<Revision>,
    pub epoch: Option<torus_schema::records::EpochRecord>,
    pub epoch_revision: Option<Revision>,
    pub owner: Option<OwnerRecord>,
}

impl Found {
    pub async fn read<M: Metadata>(metadata: &M, name: &str) -> Result<Self, AdminError> {
        let missing = || AdminError::NoVolume { name: name.to_string() };
        let entry = metadata.get(&keys::name(name)).await?.ok_or_else(missing)?;
        let volume = decode::<NameRecord>(&entry.key, &entry.value)?.volume;
        let reads = vec![
            keys::name(name),
            keys::volume(volume),
            keys::status(volume),
            keys::epoch(volume),
            keys::owner(volume),
        ];
        let mut entries = read_together(metadata, reads).await?.into_iter();
        let mut next = || entries.next().flatten();
        let (name_entry, entry) = (next().ok_or_else(missing)?, next().ok_or_else(missing)?);
        let (status, epoch) = (next(), next());
        Ok(Self {
            record: decode(&entry.key, &entry.value)?,
            name_entry,
            entry,
            status_revision: status.as_ref().map(|entry| entry.mod_revision),
            status: decode_optional(status)?.unwrap_or_default(),
            epoch_revision: epoch.as_ref().map(|entry| entry.mod_revision),
            epoch: decode_optional(epoch)?,
            owner: decode_optional(next())?,
        })
    }
}

fn decode_optional<T: serde::de::DeserializeOwned>(entry: Option<Entry>) -> Result<Option<T>, AdminError> {
    Ok(entry.map(|entry| decode(&entry.key, &entry.value)).transpose()?)
}

/// All keys as of one moment.
pub async fn read_together<M: Metadata>(metadata: &M, reads: Vec<String>) -> Result<Vec<Option<Entry>>, AdminError> {
    Ok(metadata.transact(Transaction { reads, ..Transaction::default() }).await?.reads)
}
