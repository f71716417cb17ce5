//! An address's record in the metadata store: which volume it stands for, and its lists. Whoever serves the address has
//! the same ones; a change is stored before it is answered.

use super::lists::{Answer, Lists, Offered, Request};
use super::wire::Address;
use pnet::util::MacAddr;
use std::fmt::Write as _;
use thiserror::Error;
use torus_rpc::metadata::{Compare, Entry, Metadata, MetadataError, Revision, Transaction, Write};
use torus_schema::ids::VolumeId;
use torus_schema::records::{AoeRecord, NameRecord, OwnerRecord, RecordError, VolumeRecord, decode, encode, keys};

#[derive(Debug, Error)]
pub enum StoreError {
    #[error(
        "{address} is the address of volume {owner}, not of {wanted}: two volumes under one address would be taken for one \
         disk; choose another address, or say --take-address if {owner} is no longer to be served there"
    )]
    Taken { address: Address, owner: String, wanted: String },
    #[error(
        "{address} is the address of volume {volume}, which {owner} has attached: it may answer there still, and two volumes \
         under one address would be taken for one disk; detach it first, then say --take-address again"
    )]
    Served { address: Address, volume: VolumeId, owner: String },
    #[error(transparent)]
    Metadata(#[from] MetadataError),
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// Lists as they were at a revision.
#[derive(Clone, Debug)]
pub struct Stored {
    pub volume: VolumeId,
    pub lists: Lists,
    pub revision: Revision,
}

/// What may be done to an address's record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct How {
    /// Although it is another volume's.
    pub take: bool,
    /// Mask list and reservation are forgotten.
    pub clear: bool,
}

/// Whether an address was served before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claimed {
    /// Nobody ever answered under it.
    New,
    Known,
}

pub fn key(address: Address) -> String {
    keys::aoe(address.shelf, address.slot)
}

pub fn stored(entry: &Entry) -> Result<Stored, RecordError> {
    let record: AoeRecord = decode(&entry.key, &entry.value)?;
    let bad = |because: String| RecordError { key: entry.key.clone(), because };
    let macs = |texts: &[String]| texts.iter().map(|text| mac(text)).collect::<Result<Vec<_>, _>>().map_err(bad);
    let lists = Lists {
        config: from_hex(&record.config).map_err(bad)?,
        masks: macs(&record.masks)?,
        reserved: macs(&record.reserved)?,
    };
    Ok(Stored { volume: record.volume, lists, revision: entry.mod_revision })
}

fn mac(text: &str) -> Result<MacAddr, String> {
    text.parse().map_err(|_| format!("found {text:?}, expected an Ethernet address"))
}

fn from_hex(text: &str) -> Result<Vec<u8>, String> {
    let bad = || format!("found {text:?}, expected hexadecimal digits");
    let digits: Vec<u8> =
        text.chars().map(|digit| digit.to_digit(16).map(|digit| digit as u8)).collect::<Option<_>>().ok_or_else(bad)?;
    if !digits.len().is_multiple_of(2) {
        return Err(bad());
    }
    Ok(digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

fn encoded(volume: VolumeId, lists: &Lists) -> Vec<u8> {
    let config = lists.config.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    });
    let texts = |macs: &[MacAddr]| macs.iter().map(MacAddr::to_string).collect();
    encode(&AoeRecord { volume, config, masks: texts(&lists.masks), reserved: texts(&lists.reserved) })
}

/// Makes the address the volume's, unless it is another's.
pub async fn claim<M: Metadata>(
    metadata: &M,
    address: Address,
    (volume, name): (VolumeId, &str),
    how: How,
) -> Result<Claimed, StoreError> {
    let key = key(address);
    loop {
        let entry = metadata.get(&key).await?;
        let (compares, lists) = match &entry {
            None => (vec![Compare::Absent(key.clone())], Lists::default()),
            Some(entry) => {
                let found = stored(entry)?;
                let is_ours = found.volume == volume;
                let cleared = Lists { config: found.lists.config.clone(), ..Lists::default() };
                if is_ours && (!how.clear || cleared == found.lists) {
                    return Ok(Claimed::Known);
                }
                if !is_ours
                    && !how.take
                    && let Some(owner) = name_of(metadata, found.volume).await?
                {
                    return Err(StoreError::Taken { address, owner, wanted: name.to_string() });
                }
                let mut compares = vec![Compare::ModRevision(key.clone(), entry.mod_revision)];
                if !is_ours {
                    refuse_if_owned(metadata, address, found.volume).await?;
                    // Who attaches it from now on looks at the address afterwards.
                    compares.push(Compare::Absent(keys::owner(found.volume)));
                }
                // Of a volume that is deleted, or that is no longer wanted there: its lists go with it.
                (compares, if is_ours { cleared } else { Lists::default() })
            }
        };
        let put = Write::Put { key: key.clone(), value: encoded(volume, &lists), lease: None };
        let transaction = Transaction { compares, writes: vec![put], ..Transaction::default() };
        match metadata.transact(transaction).await {
            Ok(result) if result.applied => {
                let claimed = if entry.is_none() { Claimed::New } else { Claimed::Known };
                return Ok(claimed);
            }
            // Somebody was faster, or perhaps it is done: looked at again.
            Ok(_) | Err(MetadataError::Unknown { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

async fn refuse_if_owned<M: Metadata>(metadata: &M, address: Address, volume: VolumeId) -> Result<(), StoreError> {
    let key = keys::owner(volume);
    let Some(entry) = metadata.get(&key).await? else { return Ok(()) };
    let OwnerRecord { host, process, pid, .. } = decode(&key, &entry.value)?;
    let owner = format!("{process} on {host} (pid {pid})");
    Err(StoreError::Served { address, volume, owner })
}

/// Whether the name is that volume's.
pub async fn is_named<M: Metadata>(metadata: &M, name: &str, volume: VolumeId) -> Result<bool, StoreError> {
    let key = keys::name(name);
    let Some(entry) = metadata.get(&key).await? else { return Ok(false) };
    let named: NameRecord = decode(&key, &entry.value)?;
    Ok(named.volume == volume)
}

/// Of a volume that there is.
async fn name_of<M: Metadata>(metadata: &M, volume: VolumeId) -> Result<Option<String>, StoreError> {
    let key = keys::volume(volume);
    let Some(entry) = metadata.get(&key).await? else { return Ok(None) };
    let record: VolumeRecord = decode(&key, &entry.value)?;
    let name = keys::name(&record.name);
    let Some(entry) = metadata.get(&name).await? else { return Ok(None) };
    let named: NameRecord = decode(&name, &entry.value)?;
    Ok((named.volume == volume).then_some(record.name))
}

/// Carries out a request of a client: what it changes is stored when this returns.
pub async fn change<M: Metadata>(
    metadata: &M,
    address: Address,
    request: &Request,
    source: MacAddr,
    offered: Offered,
) -> Result<(Option<Answer>, Stored), StoreError> {
    let key = key(address);
    let mut tried: Option<(Lists, Option<Answer>)> = None;
    loop {
        let entry = metadata.get(&key).await?;
        let entry = entry.ok_or_else(|| RecordError { key: key.clone(), because: "it is gone".to_string() })?;
        let now = stored(&entry)?;
        // A transaction whose outcome was unknown took place after all.
        if let Some((wanted, answer)) = tried.take_if(|(wanted, _)| *wanted == now.lists) {
            drop(wanted);
            return Ok((answer, now));
        }
        let outcome = request.outcome(&now.lists, source, offered);
        let Some(lists) = outcome.changed else { return Ok((outcome.answer, now)) };
        let put = Write::Put { key: key.clone(), value: encoded(now.volume, &lists), lease: None };
        let compares = vec![Compare::ModRevision(key.clone(), now.revision)];
        let transaction = Transaction { compares, writes: vec![put], ..Transaction::default() };
        match metadata.transact(transaction).await {
            Ok(result) if result.applied => {
                return Ok((outcome.answer, Stored { lists, revision: result.revision, ..now }));
            }
            Ok(_) => {}
            Err(MetadataError::Unknown { .. }) => tried = Some((lists, outcome.answer)),
            Err(error) => return Err(error.into()),
        }
    }
}
