//! Commands that change a volume while nobody owns it: an owner that only repairs is asked to let go, as a client asks.

use super::AdminError;
use super::snapshot::Found;
use super::volume_delete::attached;
use std::time::Duration;
use torus_rpc::metadata::{LeaseId, Metadata, Transaction, Write};
use torus_rpc::runtime::{Clock, Runtime};
use torus_schema::limits::{OWNER_LEASE_TTL, REPAIR_LETS_GO_WITHIN};
use torus_schema::records::{WantedRecord, encode, keys};

const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// As long as it lives no repair begins; `release` when what was to be done is done.
pub struct Unowned {
    lease: Option<LeaseId>,
}

impl Unowned {
    pub async fn release<R: Runtime>(self, runtime: &R) {
        if let Some(lease) = self.lease {
            // It ends by itself soon if this does not arrive.
            let _ = runtime.metadata().revoke_lease(lease).await;
        }
    }
}

/// The volume as it is once nobody owns it. An owner that is more than a repair is named in the error.
pub async fn without_owner<R: Runtime>(runtime: &R, name: &str) -> Result<(Found, Unowned), AdminError> {
    let metadata = runtime.metadata();
    let mut unowned = Unowned { lease: None };
    let asked = runtime.clock().now();
    loop {
        let found = Found::read(metadata, name).await?;
        let is_late = runtime.clock().now().since(asked) > OWNER_LEASE_TTL + REPAIR_LETS_GO_WITHIN;
        match &found.owner {
            None => return Ok((found, unowned)),
            Some(owner) if !owner.repair || is_late => {
                unowned.release(runtime).await;
                return Err(attached(name, owner));
            }
            Some(_) if unowned.lease.is_some() => {}
            Some(_) => {
                let lease = metadata.grant_lease(OWNER_LEASE_TTL + REPAIR_LETS_GO_WITHIN * 2).await?;
                unowned.lease = Some(lease);
                let key = keys::wanted(found.record.id);
                let (host, process) = ("an operator".to_string(), "torusadm".to_string());
                let value = encode(&WantedRecord { host, process, pid: std::process::id() });
                let writes = vec![Write::Put { key, value, lease: Some(lease) }];
                metadata.transact(Transaction { writes, ..Transaction::default() }).await?;
            }
        }
        runtime.clock().sleep(LOOK_AGAIN).await;
    }
}
