//! Sealing of values: AES-256-GCM under the store's key, a random 96-bit nonce for each value.
//!
//! The additional data is the format version, the table and the key, so that a value opens only where it was put: whoever
//! can write to the file cannot move an administrator's record over a viewer's. Random nonces are good for 2^32 values
//! under one key, which a controller that writes a hundred times a second reaches after more than a year of nothing else.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::{hmac, rand};
use zeroize::Zeroizing;

use super::Table;
use super::key::StoreKey;

/// The format of sealed values and of the tables.
pub(super) const FORMAT: u32 = 1;

/// Not opened: another key, another place, or not what was sealed.
#[derive(Debug)]
pub(super) struct Unopened;

/// The sealing key, ready for use.
pub(super) struct Sealer {
    key: LessSafeKey,
    id: [u8; 32],
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Sealer")
    }
}

impl Sealer {
    pub(super) fn new(key: &StoreKey) -> Self {
        let unbound =
            UnboundKey::new(&AES_256_GCM, key.bytes()).expect("StoreKey holds exactly the 32 bytes of AES-256");
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key.bytes()), b"opencluster store key identifier");
        let mut id = [0; 32];
        id.copy_from_slice(digest(&SHA256, tag.as_ref()).as_ref());
        Self { key: LessSafeKey::new(unbound), id }
    }

    /// Tells keys apart without telling anything about them.
    pub(super) fn id(&self) -> &[u8; 32] {
        &self.id
    }

    pub(super) fn seal(&self, table: Table, key: &str, revision: u64, value: &[u8]) -> Result<Vec<u8>, Unopened> {
        let mut nonce = [0; NONCE_LEN];
        rand::fill(&mut nonce).map_err(|_| Unopened)?;
        let mut plain = Zeroizing::new(Vec::with_capacity(8 + value.len() + AES_256_GCM.tag_len()));
        plain.extend_from_slice(&revision.to_be_bytes());
        plain.extend_from_slice(value);
        self.key
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(place(table, key)), &mut *plain)
            .map_err(|_| Unopened)?;
        let mut sealed = Vec::with_capacity(NONCE_LEN + plain.len());
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(&plain);
        Ok(sealed)
    }

    pub(super) fn open(&self, table: Table, key: &str, sealed: &[u8]) -> Result<(u64, Zeroizing<Vec<u8>>), Unopened> {
        let (nonce, body) = sealed.split_first_chunk::<NONCE_LEN>().ok_or(Unopened)?;
        let mut buffer = Zeroizing::new(body.to_vec());
        let plain = self
            .key
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(place(table, key)), &mut buffer)
            .map_err(|_| Unopened)?;
        let (revision, value) = plain.split_first_chunk::<8>().ok_or(Unopened)?;
        Ok((u64::from_be_bytes(*revision), Zeroizing::new(value.to_vec())))
    }
}

/// Unambiguous: the lengths of both names are part of it.
fn place(table: Table, key: &str) -> Vec<u8> {
    let table = table.name();
    let mut place = Vec::with_capacity(12 + table.len() + key.len());
    place.extend_from_slice(&FORMAT.to_be_bytes());
    place.extend_from_slice(&(table.len() as u32).to_be_bytes());
    place.extend_from_slice(table.as_bytes());
    place.extend_from_slice(&(key.len() as u32).to_be_bytes());
    place.extend_from_slice(key.as_bytes());
    place
}
