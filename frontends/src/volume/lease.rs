//! The lease of this process: what its ownership of volumes hangs on, and until when its reads may trust it.
//!
//! Reads are valid until (the moment the last successful keepalive was *sent*) + TTL − drift, by CLOCK_BOOTTIME
//! (protocol rule 7): whoever takes over waits TTL + drift after the lease ended.

use futures::future::{Either, select};
use std::cell::Cell;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::time::Duration;
use torus_rpc::metadata::{LeaseId, Metadata, MetadataError, Result};
use torus_rpc::notify::Notify;
use torus_rpc::runtime::{Class, Clock, Instant, Runtime, Spawn};
use torus_schema::limits::{LEASE_DRIFT, OWNER_LEASE_TTL};

/// Three attempts fit into one TTL.
const KEEPALIVE_INTERVAL: Duration = Duration::from_millis(OWNER_LEASE_TTL.as_millis() as u64 / 3);

pub struct ProcessLease<R: Runtime> {
    runtime: R,
    lease: Cell<LeaseId>,
    valid_until: Cell<Instant>,
    /// Counts the leases of this process; owners compare it to learn that theirs is gone.
    generation: Cell<u64>,
    changed: Notify,
}

impl<R: Runtime> ProcessLease<R> {
    /// Granted now, kept alive until the last handle is dropped.
    pub async fn grant(runtime: R) -> Result<Rc<Self>> {
        let asked = runtime.clock().now();
        let lease = runtime.metadata().grant_lease(OWNER_LEASE_TTL).await?;
        let this = Rc::new(Self {
            lease: Cell::new(lease),
            valid_until: Cell::new(asked.after(OWNER_LEASE_TTL - LEASE_DRIFT)),
            generation: Cell::new(0),
            changed: Notify::default(),
            runtime: runtime.clone(),
        });
        runtime.spawn().spawn(Class::Foreground, keep_alive(runtime.clone(), Rc::downgrade(&this)));
        Ok(this)
    }

    pub fn id(&self) -> LeaseId {
        self.lease.get()
    }

    pub fn generation(&self) -> u64 {
        self.generation.get()
    }

    /// No other process can own our volumes at this moment.
    pub fn is_valid(&self) -> bool {
        self.runtime.clock().now() < self.valid_until.get()
    }

    /// Waits until the lease `generation` has been replaced by another.
    pub async fn replaced(&self, generation: u64) {
        self.changed.until(|| (self.generation.get() != generation).then_some(())).await;
    }

    fn renewed(&self, lease: LeaseId, sent: Instant) {
        self.valid_until.set(sent.after(OWNER_LEASE_TTL - LEASE_DRIFT));
        if self.lease.replace(lease) != lease {
            self.generation.set(self.generation.get() + 1);
            self.changed.notify();
        }
    }
}

async fn keep_alive<R: Runtime>(runtime: R, lease: Weak<ProcessLease<R>>) {
    let mut waited = false;
    loop {
        if !std::mem::take(&mut waited) {
            runtime.clock().sleep(KEEPALIVE_INTERVAL).await;
        }
        let Some(id) = lease.upgrade().map(|lease| lease.id()) else { return };
        let sent = runtime.clock().now();
        let attempt = pin!(runtime.metadata().keep_alive(id));
        // A slow answer must not keep the next attempt from being made while the lease still lives.
        let renewed = match select(attempt, pin!(runtime.clock().sleep(KEEPALIVE_INTERVAL))).await {
            Either::Left((renewed, _)) => renewed,
            Either::Right(_) => {
                tracing::warn!("the metadata store is slow to keep the lease alive; trying on");
                waited = true;
                continue;
            }
        };
        let renewed = match renewed {
            Ok(()) => Ok(id),
            Err(MetadataError::LeaseGone(_)) => {
                tracing::warn!(lease = id.0, "the lease is gone; asking for another");
                runtime.metadata().grant_lease(OWNER_LEASE_TTL).await
            }
            Err(error) => Err(error),
        };
        let Some(lease) = lease.upgrade() else { return };
        match renewed {
            Ok(id) => lease.renewed(id, sent),
            Err(error) => tracing::warn!(%error, "cannot keep the lease alive; trying on"),
        }
    }
}

impl<R: Runtime> Drop for ProcessLease<R> {
    fn drop(&mut self) {
        let (runtime, lease) = (self.runtime.clone(), self.lease.get());
        self.runtime.spawn().spawn(Class::Foreground, async move {
            // It ends by itself in a few seconds if this does not arrive.
            let _ = runtime.metadata().revoke_lease(lease).await;
        });
    }
}
