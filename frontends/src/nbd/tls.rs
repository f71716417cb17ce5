//! TLS of one connection without I/O: bytes in, bytes out; and what a server needs for it.

use crate::nbd::handshake::TlsMode;
use bytes::{Buf, BytesMut};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use thiserror::Error;

/// Files in the directory of certificates, as qemu-nbd and nbdkit call them.
const CERTIFICATE: &str = "server-cert.pem";
const KEY: &str = "server-key.pem";
const CLIENTS_CA: &str = "ca-cert.pem";

#[derive(Debug, Error)]
pub enum TlsError {
    #[error("TLS needs a {what} in {path}: {because}", path = path.display())]
    File { what: &'static str, path: PathBuf, because: String },
    #[error("the certificates in {path} cannot be used: {because}", path = path.display())]
    Unusable { path: PathBuf, because: String },
}

/// What goes wrong on a connection.
#[derive(Debug, Error)]
#[error("TLS: {0}")]
pub struct TlsFailure(String);

impl From<rustls::Error> for TlsFailure {
    fn from(error: rustls::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<io::Error> for TlsFailure {
    fn from(error: io::Error) -> Self {
        Self(error.to_string())
    }
}

/// Whether clients show certificates of the authority in `ca-cert.pem`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum ClientCertificates {
    /// Nobody is asked for one
    #[default]
    Ignored,
    /// Who shows one shows a good one
    Optional,
    /// Everybody shows a good one
    Required,
}

/// What a server offers of TLS.
#[derive(Clone, Default)]
pub struct TlsOffer {
    mode: TlsMode,
    config: Option<Arc<ServerConfig>>,
}

impl TlsOffer {
    /// With the files of a directory; `TlsMode::Off` needs none.
    pub fn load(mode: TlsMode, directory: &Path, clients: ClientCertificates) -> Result<Self, TlsError> {
        if mode == TlsMode::Off {
            return Ok(Self::default());
        }
        let unusable = |because: String| TlsError::Unusable { path: directory.to_owned(), because };
        let certificates = certificates(directory, "chain of certificates", CERTIFICATE)?;
        let path = directory.join(KEY);
        let key = PrivateKeyDer::from_pem_file(&path).map_err(|error| TlsError::File {
            what: "private key",
            path,
            because: error.to_string(),
        })?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        // "MUST support TLS version 1.2, SHOULD support any later versions […] MAY support older versions but SHOULD
        // NOT do so by default": rustls has none.
        let builder = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| unusable(error.to_string()))?;
        let builder = match verifier(directory, clients)? {
            Some(verifier) => builder.with_client_cert_verifier(verifier),
            None => builder.with_no_client_auth(),
        };
        let config = builder.with_single_cert(certificates, key).map_err(|error| unusable(error.to_string()))?;
        Ok(Self { mode, config: Some(Arc::new(config)) })
    }

    pub fn mode(&self) -> TlsMode {
        self.mode
    }

    /// A client was told to begin: none is unless there is TLS.
    pub(crate) fn begin(&self) -> Result<Tls, TlsFailure> {
        let config = self.config.clone().ok_or_else(|| TlsFailure("this server was started without it".into()))?;
        Ok(Tls { connection: RefCell::new(ServerConnection::new(config)?) })
    }
}

fn certificates(directory: &Path, what: &'static str, name: &str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let path = directory.join(name);
    let found = CertificateDer::pem_file_iter(&path).and_then(|found| found.collect::<Result<Vec<_>, _>>());
    match found {
        Ok(found) if found.is_empty() => Err(TlsError::File { what, path, because: "no certificate in it".into() }),
        Ok(found) => Ok(found),
        Err(error) => Err(TlsError::File { what, path, because: error.to_string() }),
    }
}

fn verifier(directory: &Path, clients: ClientCertificates) -> Result<Option<Arc<dyn ClientCertVerifier>>, TlsError> {
    if clients == ClientCertificates::Ignored {
        return Ok(None);
    }
    let unusable = |because: String| TlsError::Unusable { path: directory.join(CLIENTS_CA), because };
    let mut roots = RootCertStore::empty();
    for certificate in certificates(directory, "certificate of the clients' authority", CLIENTS_CA)? {
        roots.add(certificate).map_err(|error| unusable(error.to_string()))?;
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    if clients == ClientCertificates::Optional {
        builder = builder.allow_unauthenticated();
    }
    Ok(Some(builder.build().map_err(|error| unusable(error.to_string()))?))
}

/// Shared by the directions of one connection.
pub(crate) struct Tls {
    connection: RefCell<ServerConnection>,
}

impl Tls {
    pub fn is_handshaking(&self) -> bool {
        self.connection.borrow().is_handshaking()
    }

    /// Takes some of what was received. What it decrypted has to be fetched before more is given.
    pub fn received(&self, ciphertext: &mut BytesMut) -> Result<(), TlsFailure> {
        let mut connection = self.connection.borrow_mut();
        let taken = connection.read_tls(&mut &ciphertext[..])?;
        ciphertext.advance(taken);
        connection.process_new_packets()?;
        Ok(())
    }

    /// Bytes that were decrypted into `into`: `None` if more has to be received for that, 0 if the client has closed.
    pub fn decrypted(&self, into: &mut [u8]) -> Result<Option<usize>, TlsFailure> {
        match self.connection.borrow_mut().reader().read(into) {
            Ok(count) => Ok(Some(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// How many of the bytes were encrypted: as many as there is room for until `outgoing` is sent.
    pub fn encrypt(&self, bytes: &[u8]) -> Result<usize, TlsFailure> {
        Ok(self.connection.borrow_mut().writer().write(bytes)?)
    }

    /// What is to be sent; it counts as sent.
    pub fn outgoing(&self) -> Result<Vec<u8>, TlsFailure> {
        let mut connection = self.connection.borrow_mut();
        let mut ciphertext = Vec::new();
        while connection.wants_write() {
            connection.write_tls(&mut ciphertext)?;
        }
        Ok(ciphertext)
    }

    /// Nothing is encrypted after it.
    pub fn close(&self) {
        self.connection.borrow_mut().send_close_notify();
    }
}
