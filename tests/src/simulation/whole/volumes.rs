//! Volumes come, are deleted while things go wrong, and come again under the same name; and one is left whose record is
//! missing, which nobody may touch.

use super::{VOLUME_BYTES, Volume, Whole};
use std::rc::Rc;
use std::time::Duration;
use torus_frontends::admin::volume_delete::{Wait, delete};
use torus_rpc::metadata::{Metadata, Transaction, Write};
use torus_schema::records::keys;

/// A volume may be attached for as long as its clients wait for what is away.
const ATTEMPTS: u32 = 300;

impl Whole {
    pub(super) async fn create(&self, name: &str) {
        let Self { cluster, profile, .. } = self;
        let id = cluster.create_volume(name, VOLUME_BYTES, profile.replicas, profile.min_replicas).await;
        self.world.note(|| format!("{name} is created: {id}"));
        let workload = self.workload.beside();
        let volume = Volume {
            id,
            workload,
            powerless: Rc::default(),
            holders: Rc::default(),
            places: Rc::new(self.places(id).await),
            newest: Rc::default(),
            closed: false,
        };
        self.volumes.borrow_mut().insert(name.to_string(), volume);
    }

    /// Instances without a record, as a metadata store that lost it would leave them.
    pub(super) async fn leave_orphan(&self) {
        let Self { cluster, profile, .. } = self;
        let id = cluster.create_volume("orphan", VOLUME_BYTES, profile.replicas, profile.min_replicas).await;
        let writes = vec![Write::Delete { key: keys::volume(id) }, Write::Delete { key: keys::name("orphan") }];
        let result = cluster.store.transact(Transaction { writes, ..Transaction::default() }).await;
        assert!(result.expect("available").applied);
        self.orphan.set(Some(id));
    }

    /// Deletes a volume as soon as nobody has it; the operator reaches the store all the time.
    pub(super) async fn delete_one(self: &Rc<Self>) {
        let names: Vec<String> = self.volumes.borrow().keys().cloned().collect();
        let Some(name) = names.get(self.world.random_below(names.len().max(1) as u64) as usize) else { return };
        let volume = {
            let mut volumes = self.volumes.borrow_mut();
            let volume = volumes.get_mut(name).expect("just listed");
            if std::mem::replace(&mut volume.closed, true) {
                return;
            }
            volume.clone()
        };
        let runtime = self.cluster.runtime(self.operator);
        for _ in 0..ATTEMPTS {
            if delete(&runtime, name, Wait::No, |_| {}).await.is_ok() {
                self.world.note(|| format!("{name} is deleted: {}", volume.id));
                self.deleted.borrow_mut().push(volume.id);
                self.volumes.borrow_mut().remove(name);
                self.missing.borrow_mut().push(name.clone());
                return;
            }
            self.world.sleep(Duration::from_secs(1)).await;
        }
        self.volumes.borrow_mut().get_mut(name).expect("nobody else deletes it").closed = false;
    }

    /// What was deleted comes again, empty.
    pub(super) async fn recreate(&self) {
        let missing = self.missing.take();
        for name in missing {
            self.create(&name).await;
        }
    }
}
