//! How a shard knows a writer: whoever was let in by the metadata store knows the cluster's key and signs with it.
//! Without this a stranger could open a volume at epoch 2^63 and lock everybody out.

use crate::message::Token;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use thiserror::Error;
use torus_schema::ids::{Epoch, VolumeId};

pub const KEY_BYTES: usize = 32;
/// Begins the signed bytes, so that the key can sign other things later without one passing for another.
const PURPOSE: &[u8; 12] = b"torus open 1";

#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("the cluster's key is {found} hex digits or not hex, expected {} hex digits; read it from the cluster record again", KEY_BYTES * 2)]
pub struct KeyError {
    pub found: usize,
}

/// The cluster's secret, drawn by `torusadm init`.
#[derive(Clone)]
pub struct ClusterKey([u8; KEY_BYTES]);

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterKey(…)")
    }
}

impl ClusterKey {
    pub fn from_hex(text: &str) -> Result<Self, KeyError> {
        let mut key = [0; KEY_BYTES];
        hex::decode_to_slice(text, &mut key).map_err(|_| KeyError { found: text.len() })?;
        Ok(Self(key))
    }

    /// HMAC-SHA-256 by the cluster key over these bytes:
    ///
    /// | offset | bytes | what                                                             |
    /// |--------|-------|------------------------------------------------------------------|
    /// | 0      | 12    | `torus open 1`                                                   |
    /// | 12     | 16    | volume id                                                        |
    /// | 28     | 4     | epoch, little-endian                                             |
    /// | 32     | rest  | owner, UTF-8; last, so that its length need not be signed        |
    pub fn sign(&self, volume: VolumeId, epoch: Epoch, owner: &str) -> Token {
        Token(self.mac(volume, epoch, owner).finalize().into_bytes().into())
    }

    /// In constant time.
    pub fn verify(&self, volume: VolumeId, epoch: Epoch, owner: &str, token: &Token) -> bool {
        self.mac(volume, epoch, owner).verify_slice(&token.0).is_ok()
    }

    fn mac(&self, volume: VolumeId, epoch: Epoch, owner: &str) -> Hmac<Sha256> {
        Hmac::<Sha256>::new_from_slice(&self.0)
            .expect("HMAC takes keys of any length")
            .chain_update(PURPOSE)
            .chain_update(volume.to_bytes())
            .chain_update(epoch.0.to_le_bytes())
            .chain_update(owner.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> ClusterKey {
        ClusterKey::from_hex(&"2a".repeat(32)).unwrap()
    }

    #[test]
    fn a_token_is_good_for_its_volume_epoch_and_owner_only() {
        let (volume, other) = (VolumeId::from_bytes([1; 16]), VolumeId::from_bytes([2; 16]));
        let token = key().sign(volume, Epoch(3), "host");
        assert!(key().verify(volume, Epoch(3), "host", &token));
        assert!(!key().verify(other, Epoch(3), "host", &token));
        assert!(!key().verify(volume, Epoch(4), "host", &token));
        assert!(!key().verify(volume, Epoch(3), "hosts", &token));
        let stranger = ClusterKey::from_hex(&"2b".repeat(32)).unwrap();
        assert!(!stranger.verify(volume, Epoch(3), "host", &token));
    }

    #[test]
    fn the_bytes_of_a_token_never_change() {
        let token = key().sign(VolumeId::from_bytes([7; 16]), Epoch(9), "host/1");
        assert_eq!(hex::encode(token.0), "6426b3a7d462ebf282abf8c6378c33bf7d9990fd972885ffcbb6587d7147ff35");
    }

    #[test]
    fn a_key_of_the_wrong_length_is_refused_with_what_was_found() {
        assert_eq!(ClusterKey::from_hex("abcd").unwrap_err(), KeyError { found: 4 });
        assert_eq!(ClusterKey::from_hex(&"zz".repeat(32)).unwrap_err(), KeyError { found: 64 });
    }
}
