//! How volumes are served over NBD, whichever program does it: what is asked for on the command line, and what becomes
//! of it.

use super::ServeError;
use crate::nbd::{ClientCertificates, Listener, Offer, TlsMode, TlsOffer};
use crate::volume::{Attacher, LeaseTerms, ReplayLimits, VolumeSettings};
use clap::Args;
use std::net::ToSocketAddrs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use torus_schema::limits::{LEASE_DRIFT, NBD_EXECUTORS_DEFAULT_MAX, OWNER_LEASE_TTL, REPLAY_BYTES_PER_PROCESS_MAX};

#[derive(Args, Clone, Debug)]
pub struct NbdOptions {
    /// Listen on other than loopback addresses although clients may talk without TLS
    #[arg(long)]
    pub insecure: bool,
    #[command(flatten)]
    pub tls: TlsArguments,
    /// Refuse to write any export; their volumes are attached all the same
    #[arg(long)]
    pub read_only: bool,
    /// Fail a request that has waited so many seconds for replicas to come back; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 0)]
    pub io_timeout: u64,
    /// Volumes of a process that died can be attached again this long after its last sign of life
    #[arg(long, value_name = "SECONDS", default_value_t = OWNER_LEASE_TTL.as_secs())]
    pub lease_ttl: u64,
    /// How far the clocks of two hosts may drift apart within the lease; at most a quarter of it
    #[arg(long, value_name = "MILLISECONDS", default_value_t = LEASE_DRIFT.as_millis() as u64)]
    pub clock_drift: u64,
    /// Write counters to this file every second, in Prometheus' text format
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
}

#[derive(Args, Clone, Debug)]
pub struct TlsArguments {
    /// Whether NBD clients may, or have to, talk over TLS
    #[arg(long = "tls", value_name = "MODE", default_value = "off")]
    pub mode: TlsMode,
    /// Directory with server-cert.pem, server-key.pem and, for certificates of clients, ca-cert.pem
    #[arg(long = "tls-certificates", value_name = "DIRECTORY", required_if_eq_any([("mode", "allow"), ("mode", "require")]))]
    pub certificates: Option<PathBuf>,
    /// Whether clients show a certificate of the authority in ca-cert.pem
    #[arg(long = "tls-clients", value_name = "WHETHER", default_value = "ignored")]
    pub clients: ClientCertificates,
}

impl NbdOptions {
    /// Whether a server can begin with these: before anything else is begun that would have to be taken back.
    pub fn check(&self) -> Result<(), ServeError> {
        self.lease_terms()?;
        self.offer(&[]).map(drop)
    }

    pub(super) fn lease_terms(&self) -> Result<LeaseTerms, ServeError> {
        let (ttl, drift) = (Duration::from_secs(self.lease_ttl), Duration::from_millis(self.clock_drift));
        LeaseTerms::new(ttl, drift).map_err(|because| ServeError::Lease { because })
    }

    /// Of each executor.
    pub fn settings(&self, executors: usize) -> Result<VolumeSettings, ServeError> {
        let io_timeout = (self.io_timeout > 0).then(|| Duration::from_secs(self.io_timeout));
        let defaults = ReplayLimits::default();
        // However little that is, a volume keeps a frame.
        let process_bytes = REPLAY_BYTES_PER_PROCESS_MAX / executors as u64;
        let replay = ReplayLimits { process_bytes, ..defaults };
        Ok(VolumeSettings { io_timeout, replay, lease: self.lease_terms()?, ..VolumeSettings::default() })
    }

    /// `volumes`: those that are attached from the start.
    pub(super) fn offer(&self, volumes: &[String]) -> Result<Offer, ServeError> {
        let TlsArguments { mode, certificates, clients } = &self.tls;
        let directory = certificates.as_deref().unwrap_or(Path::new("."));
        let default_export = match volumes {
            [only] => Some(only.clone()),
            _ => None,
        };
        let tls = TlsOffer::load(*mode, directory, *clients)?;
        Ok(Offer { tls, read_only: self.read_only, default_export, ..Offer::default() })
    }

    /// `HOST:PORT` or `unix:PATH` each.
    pub fn listen(&self, addresses: &[String]) -> Result<Vec<Listener>, ServeError> {
        addresses.iter().map(|address| self.listen_on(address)).collect()
    }

    fn listen_on(&self, address: &str) -> Result<Listener, ServeError> {
        if let Some(path) = address.strip_prefix("unix:") {
            return Ok(Listener::unix(Path::new(path))?);
        }
        let resolved: Vec<_> = address
            .to_socket_addrs()
            .map_err(|error| ServeError::Address { address: address.to_string(), because: error.to_string() })?
            .collect();
        let is_loopback = resolved.iter().all(|resolved| resolved.ip().is_loopback());
        let private = self.insecure || self.tls.mode == TlsMode::Require;
        if !private && !is_loopback {
            return Err(ServeError::NotLoopback { address: address.to_string() });
        }
        if self.tls.clients != ClientCertificates::Required && !is_loopback {
            tracing::warn!(%address, "everybody who reaches it may read and write: --tls-clients is not required");
        }
        Ok(Listener::tcp(address)?)
    }
}

/// This process, as others will read who has a volume.
pub fn attacher(process: &str, force: bool) -> Attacher {
    let host = nix::unistd::gethostname().map_or_else(|_| "?".to_string(), |name| name.to_string_lossy().into_owned());
    Attacher { host, process: process.to_string(), pid: std::process::id(), force, repair: false }
}

/// One for each core that the process may use.
pub(super) fn default_executors() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(NBD_EXECUTORS_DEFAULT_MAX)
}
