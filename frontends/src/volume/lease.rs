//! The lease of this process: what its ownership of volumes hangs on, and until when its reads may trust it.
//!
//! Reads are valid until (the moment the last successful keepalive was *sent*) + TTL − drift, by CLOCK_BOOTTIME
//! (protocol rule 7): whoever takes over waits TTL + drift after the lease ended, with the TTL and drift that this
//! process wrote beside its name.
//!
//! The lease may live only as long as the executor that answers data turns (rule 2). So each executor of a server has
//! one of its own, for the volumes that live there: the loop below runs on it, so that an executor that hangs, or a
//! process that is stopped, sends no keepalive.

use futures::future::{Either, select};
use std::cell::Cell;
use std::pin::pin;
use std::rc::{Rc, Weak};
use std::time::Duration;
use torus_rpc::metadata::{LeaseId, Metadata, MetadataError, Result};
use torus_rpc::notify::Notify;
use torus_rpc::runtime::{Class, Clock, Instant, Runtime, Spawn};
use torus_schema::limits::{
    LEASE_DRIFT, LEASE_DRIFT_PARTS_MIN, OWNER_LEASE_TTL, OWNER_LEASE_TTL_MAX, OWNER_LEASE_TTL_MIN,
};
use torus_schema::records::OwnerRecord;

/// Keepalives in one TTL: two may be lost.
const KEEPALIVES_PER_TTL: u32 = 3;

/// How long a lease lasts, and how far clocks may drift apart meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeaseTerms {
    ttl: Duration,
    drift: Duration,
}

impl Default for LeaseTerms {
    fn default() -> Self {
        Self { ttl: OWNER_LEASE_TTL, drift: LEASE_DRIFT }
    }
}

impl LeaseTerms {
    /// Or what is wrong with them. The metadata store counts in whole seconds.
    pub fn new(ttl: Duration, drift: Duration) -> std::result::Result<Self, String> {
        if !(OWNER_LEASE_TTL_MIN..=OWNER_LEASE_TTL_MAX).contains(&ttl) || ttl.subsec_nanos() > 0 {
            return Err(format!(
                "a lease of {ttl:?}; expected whole seconds from {OWNER_LEASE_TTL_MIN:?} to {OWNER_LEASE_TTL_MAX:?}"
            ));
        }
        let drift_max = ttl / LEASE_DRIFT_PARTS_MIN;
        if drift > drift_max {
            return Err(format!("a clock drift of {drift:?}; expected at most {drift_max:?}, a quarter of the lease"));
        }
        Ok(Self { ttl, drift })
    }

    pub fn ttl(&self) -> Duration {
        self.ttl
    }

    pub fn drift(&self) -> Duration {
        self.drift
    }

    /// From the moment a keepalive was sent, by the owner's clock.
    fn validity(&self) -> Duration {
        self.ttl - self.drift
    }

    pub fn keepalive_interval(&self) -> Duration {
        self.ttl / KEEPALIVES_PER_TTL
    }

    /// From the end of `owner`'s lease, by our clock, until it can read no more by its own.
    pub fn wait_out(&self, owner: &OwnerRecord) -> Duration {
        let theirs = Duration::from_millis(owner.clock_drift_ms);
        Duration::from_millis(owner.lease_ttl_ms) + theirs.max(self.drift)
    }
}

pub struct ProcessLease<R: Runtime> {
    runtime: R,
    terms: LeaseTerms,
    lease: Cell<LeaseId>,
    valid_until: Cell<Instant>,
    /// Counts the leases of this process; owners compare it to learn that theirs is gone.
    generation: Cell<u64>,
    changed: Notify,
}

impl<R: Runtime> ProcessLease<R> {
    /// Granted now, kept alive until the last handle is dropped.
    pub async fn grant(runtime: R, terms: LeaseTerms) -> Result<Rc<Self>> {
        let asked = runtime.clock().now();
        let lease = runtime.metadata().grant_lease(terms.ttl).await?;
        let this = Rc::new(Self {
            lease: Cell::new(lease),
            terms,
            valid_until: Cell::new(asked.after(terms.validity())),
            generation: Cell::new(0),
            changed: Notify::default(),
            runtime: runtime.clone(),
        });
        runtime.spawn().spawn(Class::Foreground, keep_alive(runtime.clone(), terms, Rc::downgrade(&this)));
        Ok(this)
    }

    pub fn id(&self) -> LeaseId {
        self.lease.get()
    }

    pub fn terms(&self) -> LeaseTerms {
        self.terms
    }

    pub fn generation(&self) -> u64 {
        self.generation.get()
    }

    /// No other process can own our volumes at this moment.
    pub fn is_valid(&self, now: Instant) -> bool {
        now < self.valid_until.get()
    }

    /// Waits until the lease `generation` has been replaced by another.
    pub async fn replaced(&self, generation: u64) {
        self.changed.until(|| (self.generation.get() != generation).then_some(())).await;
    }

    fn renewed(&self, lease: LeaseId, sent: Instant) {
        self.valid_until.set(sent.after(self.terms.validity()));
        if self.lease.replace(lease) != lease {
            self.generation.set(self.generation.get() + 1);
            self.changed.notify();
        }
    }
}

async fn keep_alive<R: Runtime>(runtime: R, terms: LeaseTerms, lease: Weak<ProcessLease<R>>) {
    let interval = terms.keepalive_interval();
    let mut waited = false;
    loop {
        if !std::mem::take(&mut waited) {
            runtime.clock().sleep(interval).await;
        }
        let Some(id) = lease.upgrade().map(|lease| lease.id()) else { return };
        let sent = runtime.clock().now();
        let attempt = pin!(runtime.metadata().keep_alive(id));
        // A slow answer must not keep the next attempt from being made while the lease still lives.
        let renewed = match select(attempt, pin!(runtime.clock().sleep(interval))).await {
            Either::Left((renewed, _)) => renewed,
            Either::Right(_) => {
                tracing::warn!("the metadata store is slow to keep the lease alive; trying on");
                waited = true;
                continue;
            }
        };
        let renewed = match renewed {
            Ok(()) => Ok((id, sent)),
            Err(MetadataError::LeaseGone(_)) => {
                tracing::warn!(lease = id.0, "the lease is gone; asking for another");
                let asked = runtime.clock().now();
                runtime.metadata().grant_lease(terms.ttl).await.map(|id| (id, asked))
            }
            Err(error) => Err(error),
        };
        let Some(lease) = lease.upgrade() else { return };
        match renewed {
            Ok((id, sent)) => lease.renewed(id, sent),
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

#[cfg(test)]
mod tests {
    use super::*;
    use torus_schema::ids::Epoch;

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    #[test]
    fn terms_that_could_not_be_kept_are_refused_with_what_is_expected() {
        for (ttl, drift, says) in [
            (ms(1000), ms(0), "whole seconds from 2s to 60s"),
            (ms(2500), ms(0), "whole seconds"),
            (ms(61_000), ms(0), "to 60s"),
            (ms(4000), ms(1001), "at most 1s"),
        ] {
            let refused = LeaseTerms::new(ttl, drift).unwrap_err();
            assert!(refused.contains(says), "{refused}");
        }
        let terms = LeaseTerms::new(ms(4000), ms(1000)).unwrap();
        assert_eq!((terms.validity(), terms.keepalive_interval().as_millis()), (ms(3000), 1333));
    }

    #[test]
    fn who_is_forced_out_is_waited_for_by_its_own_terms() {
        let owner = OwnerRecord {
            host: String::new(),
            process: String::new(),
            pid: 1,
            epoch: Epoch(1),
            lease: "1".to_string(),
            attached_s: 0,
            lease_ttl_ms: 60_000,
            clock_drift_ms: 100,
            repair: false,
        };
        assert_eq!(LeaseTerms::new(ms(2000), ms(300)).unwrap().wait_out(&owner), ms(60_300), "the larger drift");
        assert_eq!(LeaseTerms::new(ms(2000), ms(0)).unwrap().wait_out(&owner), ms(60_100));
    }
}
