//! Who serves an address: whoever is the volume's writer. All others answer nothing and wait until its owner's lease has
//! ended, or it has let go; nobody is ever forced out.
//!
//! ```text
//!   standby ── attached: nobody owned it ──► serving (advertised on every interface)
//!      ▲                                        │
//!      └────── fenced, or too much is lost ─────┘
//! ```

use super::export::{Export, Named};
use super::port::Port;
use super::store::{is_named, key, stored};
use crate::device::{Device, Exports, VolumeError};
use futures::future::{Either, FutureExt, Shared, select};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use torus_rpc::metadata::{Entry, Event, Metadata, MetadataError, Revision, Watch};
use torus_rpc::runtime::{Clock, Runtime};
use torus_schema::records::keys;

/// Pause before the volume is asked for again, after anything but its having an owner.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// An owner is looked at again after this, whatever the watch says; and an address that is another volume's.
const LOOK_AGAIN: Duration = Duration::from_secs(10);

/// Why the address's record could not be learned.
enum Unlearned {
    /// It may be another time.
    Yet(String),
    /// The address is another volume's, or the volume's name is.
    NotOurs(String),
}

impl<E: std::fmt::Display> From<E> for Unlearned {
    fn from(error: E) -> Self {
        Self::Yet(error.to_string())
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    Serving,
    /// And who has it, or why it cannot be had.
    Standby(String),
}

/// Until `stop`.
pub async fn hold<D: Device, R: Runtime, E: Exports<Device = D>>(
    export: Rc<Export<D, R>>,
    exports: E,
    ports: Vec<Rc<Port>>,
    stop: Shared<impl Future<Output = ()>>,
    tell: impl Fn(&Named, Held),
) {
    let holding = async {
        let mut told = None;
        loop {
            // Not attached for nothing: nobody else could have it meanwhile.
            if let Err(Unlearned::NotOurs(because)) = learn(&export).await {
                tell(&export.named, Held::Standby(because));
                told = None;
                until_ours(&export).await;
            }
            match exports.attach(&export.named.name).await {
                Ok(device) => {
                    let because = serve(&export, device, &ports, &tell).await;
                    tell(&export.named, Held::Standby(because));
                    told = None;
                }
                Err(error) => {
                    // Who owns it is said once, not how long it has done so.
                    let kind = std::mem::discriminant(&error);
                    if told.replace(kind) != Some(kind) {
                        tell(&export.named, Held::Standby(error.to_string()));
                    }
                    wait(&export, &error).await;
                }
            }
        }
    };
    select(pin!(stop), pin!(holding)).await;
    export.disown();
}

/// Until it is no longer ours to serve; why.
async fn serve<D: Device, R: Runtime>(
    export: &Rc<Export<D, R>>,
    device: D,
    ports: &[Rc<Port>],
    tell: &impl Fn(&Named, Held),
) -> String {
    let revision = loop {
        let learned = learn(export).fuse();
        match select(pin!(learned), pin!(device.ended())).await {
            Either::Left((Ok(revision), _)) => break revision,
            Either::Left((Err(Unlearned::NotOurs(because)), _)) => return because,
            Either::Left((Err(Unlearned::Yet(because)), _)) => {
                // Without its lists, everybody could be heard.
                tracing::warn!(address = %export.named.address, because, "the address's lists cannot be read yet");
                export.runtime.clock().sleep(RETRY_AFTER).await;
            }
            Either::Right((because, _)) => return because,
        }
    };
    export.own(device.clone());
    ports.iter().for_each(|port| port.advertise(export.named.address, &export.lists()));
    tell(&export.named, Held::Serving);
    let following = follow(export, revision);
    let resized = readvertise(export, &device, ports);
    let ended = device.ended();
    let because = match select(pin!(ended), select(pin!(following), pin!(resized))).await {
        Either::Left((because, _)) | Either::Right((Either::Left((because, _)), _)) => because,
        Either::Right((Either::Right((never, _)), _)) => never,
    };
    export.disown();
    because
}

/// Initiators that do not use it now look at its size again. For ever.
async fn readvertise<D: Device, R: Runtime>(export: &Rc<Export<D, R>>, device: &D, ports: &[Rc<Port>]) -> String {
    let mut size_bytes = device.size_bytes();
    loop {
        size_bytes = device.resized(size_bytes).await;
        ports.iter().for_each(|port| port.advertise(export.named.address, &export.lists()));
    }
}

/// The address's lists, if it is ours. An attached volume cannot be deleted, so the name stays its own from then on.
async fn learn<D: Device, R: Runtime>(export: &Rc<Export<D, R>>) -> Result<Revision, Unlearned> {
    let Named { address, name, volume } = &export.named;
    let (key, metadata) = (key(*address), export.runtime.metadata());
    if !is_named(metadata, name, *volume).await? {
        return Err(Unlearned::NotOurs(format!("{name} is no longer the name of volume {volume}; start anew")));
    }
    let range = metadata.range(&key).await?;
    let entry = range.entries.iter().find(|entry| entry.key == key);
    let entry = entry.ok_or_else(|| Unlearned::NotOurs(format!("{key} is gone; start anew")))?;
    learn_from(export, entry)?;
    Ok(range.revision)
}

fn learn_from<D: Device, R: Runtime>(export: &Export<D, R>, entry: &Entry) -> Result<(), Unlearned> {
    let stored = stored(entry)?;
    if stored.volume != export.named.volume {
        let because = format!("{} is the address of volume {} now", export.named.address, stored.volume);
        return Err(Unlearned::NotOurs(because));
    }
    export.learn(stored);
    Ok(())
}

async fn until_ours<D: Device, R: Runtime>(export: &Rc<Export<D, R>>) {
    while let Err(Unlearned::NotOurs(_)) = learn(export).await {
        export.runtime.clock().sleep(LOOK_AGAIN).await;
    }
}

/// Changes that other processes make, until the address is no longer ours: why.
async fn follow<D: Device, R: Runtime>(export: &Rc<Export<D, R>>, mut from: Revision) -> String {
    loop {
        let followed: Result<(), Unlearned> = async {
            let key = key(export.named.address);
            let mut watch = export.runtime.metadata().watch(&key, Revision(from.0 + 1)).await?;
            loop {
                for event in watch.next().await? {
                    match event {
                        Event::Put(entry) if entry.key == key => learn_from(export, &entry)?,
                        Event::Deleted { key: gone, .. } if gone == key => {
                            return Err(Unlearned::NotOurs(format!("{key} is gone")));
                        }
                        _ => {}
                    }
                }
            }
        }
        .await;
        match followed {
            Err(Unlearned::NotOurs(because)) => return because,
            Err(Unlearned::Yet(because)) => {
                tracing::warn!(address = %export.named.address, because, "cannot follow the address's lists; trying on");
            }
            Ok(()) => {}
        }
        export.runtime.clock().sleep(RETRY_AFTER).await;
        match learn(export).await {
            Ok(revision) => from = revision,
            Err(Unlearned::NotOurs(because)) => return because,
            Err(Unlearned::Yet(_)) => {}
        }
    }
}

async fn wait<D: Device, R: Runtime>(export: &Rc<Export<D, R>>, error: &VolumeError) {
    let clock = export.runtime.clock();
    if let VolumeError::Attached { .. } = error {
        let gone = until_unowned(export);
        match select(pin!(gone), pin!(clock.sleep(LOOK_AGAIN))).await {
            Either::Left((Ok(()), _)) | Either::Right(_) => return,
            Either::Left((Err(error), _)) => {
                tracing::warn!(address = %export.named.address, %error, "cannot see whether the volume has an owner");
            }
        }
    }
    clock.sleep(RETRY_AFTER).await;
}

async fn until_unowned<D: Device, R: Runtime>(export: &Rc<Export<D, R>>) -> Result<(), MetadataError> {
    let key = keys::owner(export.named.volume);
    let metadata = export.runtime.metadata();
    let range = metadata.range(&key).await?;
    if range.entries.is_empty() {
        return Ok(());
    }
    let mut watch = metadata.watch(&key, Revision(range.revision.0 + 1)).await?;
    loop {
        let events = watch.next().await?;
        if events.iter().any(|event| matches!(event, Event::Deleted { .. })) {
            return Ok(());
        }
    }
}
