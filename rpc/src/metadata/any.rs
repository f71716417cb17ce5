//! The metadata store a program is told to use: `--metadata URL`.

use super::remote::{Remote, RemoteWatch};
use super::{
    Entry, LeaseId, Metadata, MetadataError, Range, Result, Revision, Transaction, TransactionResult, embedded, etcd,
};
use std::time::Duration;

/// A client of either server. It is `Send`: one connection serves every executor of a process.
#[derive(Clone)]
pub enum AnyMetadata {
    Etcd(Remote),
    Embedded(Remote),
}

#[derive(Clone, PartialEq, Eq, Debug)]
enum Place {
    Etcd(Vec<String>),
    Embedded(String),
}

impl AnyMetadata {
    /// Understands the URL and connects to nobody yet: the first call reports who cannot be reached.
    pub fn connect(url: &str, deadline: Duration) -> Result<Self> {
        match parse(url)? {
            Place::Etcd(endpoints) => etcd::connect(endpoints, deadline).map(Self::Etcd),
            Place::Embedded(address) => embedded::connect(address, deadline).map(Self::Embedded),
        }
    }

    fn remote(&self) -> &Remote {
        match self {
            Self::Etcd(remote) | Self::Embedded(remote) => remote,
        }
    }
}

impl Metadata for AnyMetadata {
    type Watch = RemoteWatch;

    async fn get(&self, key: &str) -> Result<Option<Entry>> {
        self.remote().get(key).await
    }

    async fn range(&self, prefix: &str) -> Result<Range> {
        self.remote().range(prefix).await
    }

    async fn transact(&self, transaction: Transaction) -> Result<TransactionResult> {
        self.remote().transact(transaction).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Self::Watch> {
        self.remote().watch(prefix, from).await
    }

    async fn grant_lease(&self, ttl: Duration) -> Result<LeaseId> {
        self.remote().grant_lease(ttl).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<()> {
        self.remote().keep_alive(lease).await
    }

    async fn revoke_lease(&self, lease: LeaseId) -> Result<()> {
        self.remote().revoke_lease(lease).await
    }
}

/// `etcd://a:2379,b:2379`, the same without its scheme, or `torus://host:port`.
fn parse(url: &str) -> Result<Place> {
    let not_understood = || MetadataError::Url { found: url.to_owned() };
    let (is_etcd, rest) = match url.split_once("://") {
        Some(("etcd", rest)) => (true, rest),
        Some(("torus", rest)) => (false, rest),
        Some(_) => return Err(not_understood()),
        None => (true, url),
    };
    let addresses: Vec<String> = rest.split(',').map(str::to_owned).collect();
    if !addresses.iter().all(|address| is_address(address)) {
        return Err(not_understood());
    }
    match (is_etcd, addresses.as_slice()) {
        (true, _) => Ok(Place::Etcd(addresses)),
        (false, [address]) => Ok(Place::Embedded(address.clone())),
        (false, _) => Err(not_understood()),
    }
}

/// `host:port`, an IPv6 host in brackets.
fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host_is_good = match bare {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')),
    };
    host_is_good && port.parse::<u16>().is_ok_and(|port| port > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_name_one_store_each() {
        let etcd = |endpoints: &[&str]| Ok(Place::Etcd(endpoints.iter().map(|e| e.to_string()).collect()));
        assert_eq!(parse("etcd://a:2379,b:2380"), etcd(&["a:2379", "b:2380"]));
        assert_eq!(parse("10.0.0.1:2379"), etcd(&["10.0.0.1:2379"]));
        assert_eq!(parse("etcd://[::1]:2379"), etcd(&["[::1]:2379"]));
        assert_eq!(parse("torus://node-1:7700"), Ok(Place::Embedded("node-1:7700".to_owned())));
    }

    #[test]
    fn a_url_that_is_none_is_shown_in_the_error() {
        let wrong = [
            "",
            "etcd://",
            "etcd://a",
            "a:",
            "a:0",
            "a:70000",
            "http://a:1",
            "torus://a:1,b:2",
            "etcd://a:1,,b:2",
            "::1:2",
        ];
        for url in wrong {
            assert_eq!(parse(url), Err(MetadataError::Url { found: url.to_owned() }), "{url}");
        }
    }

    #[test]
    fn one_client_may_be_shared_by_threads() {
        fn is_send<T: Send + Sync>() {}
        is_send::<AnyMetadata>();
    }
}
