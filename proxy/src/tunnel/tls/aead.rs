//! AES-GCM for records, by whichever of two libraries has the faster code for this processor (decision 0025).
//!
//! The only unsafe code here reads a key that was written when it was made: it lies in memory that is wiped with it, and
//! memory that may be wiped has no type that says that it is whole.
#![allow(unsafe_code)]

use std::fmt;
use std::mem::MaybeUninit;
use std::sync::LazyLock;

use zeroize::Zeroize;

/// The authentication tag's length.
pub(super) const TAG: usize = 16;

/// RFC 8446, section 5.3: 96 bits.
pub(super) const NONCE: usize = 12;

/// It did not work: opening, the bytes are not authentic; sealing, there are too many of them; a key, of the wrong length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused;

/// The algorithms of our TLS suites.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Algorithm {
    Aes128Gcm,
    Aes256Gcm,
}

/// Who seals and opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Library {
    /// AWS-LC: the fastest with AVX-512, and what makes all handshakes.
    AwsLc,
    /// ring: has code for VAES in 256-bit registers, where AWS-LC falls back to one block for each instruction (AES-NI).
    Ring,
}

impl Library {
    /// The faster one on this processor.
    pub fn fastest() -> Self {
        static FASTEST: LazyLock<Library> = LazyLock::new(|| Processor::present().library());
        *FASTEST
    }
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AwsLc => "aws-lc",
            Self::Ring => "ring",
        })
    }
}

/// What decides: the instructions for several blocks at a time.
#[derive(Clone, Copy, Debug)]
struct Processor {
    /// VAES and VPCLMULQDQ, with AVX2.
    wide: bool,
    /// AVX-512 as AWS-LC's fastest code wants it (F, BW, DQ, VL).
    wider: bool,
}

impl Processor {
    #[cfg(target_arch = "x86_64")]
    fn present() -> Self {
        use std::arch::is_x86_feature_detected as has;
        Self {
            wide: has!("avx2") && has!("vaes") && has!("vpclmulqdq"),
            wider: has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl"),
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn present() -> Self {
        Self { wide: false, wider: false }
    }

    fn library(self) -> Library {
        if self.wide && !self.wider { Library::Ring } else { Library::AwsLc }
    }
}

/// A key, ready for use.
pub(super) enum Key {
    AwsLc(aws_lc_rs::aead::LessSafeKey),
    Ring(RingKey),
}

impl Key {
    pub(super) fn new(library: Library, algorithm: Algorithm, key: &[u8]) -> Result<Self, Refused> {
        match library {
            Library::AwsLc => {
                use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, LessSafeKey, UnboundKey};
                let algorithm = match algorithm {
                    Algorithm::Aes128Gcm => &AES_128_GCM,
                    Algorithm::Aes256Gcm => &AES_256_GCM,
                };
                let key = UnboundKey::new(algorithm, key).map_err(|_| Refused)?;
                Ok(Self::AwsLc(LessSafeKey::new(key)))
            }
            Library::Ring => {
                use ring::aead::{AES_128_GCM, AES_256_GCM, LessSafeKey, UnboundKey};
                let algorithm = match algorithm {
                    Algorithm::Aes128Gcm => &AES_128_GCM,
                    Algorithm::Aes256Gcm => &AES_256_GCM,
                };
                let key = UnboundKey::new(algorithm, key).map_err(|_| Refused)?;
                Ok(Self::Ring(RingKey::new(LessSafeKey::new(key))))
            }
        }
    }

    /// Seals `plaintext` in place. A nonce must never be used twice with a key.
    pub(super) fn seal(&self, nonce: [u8; NONCE], aad: &[u8], plaintext: &mut [u8]) -> Result<[u8; TAG], Refused> {
        let mut bytes = [0; TAG];
        match self {
            Self::AwsLc(key) => {
                use aws_lc_rs::aead::{Aad, Nonce};
                let nonce = Nonce::assume_unique_for_key(nonce);
                let tag = key.seal_in_place_separate_tag(nonce, Aad::from(aad), plaintext).map_err(|_| Refused)?;
                bytes.copy_from_slice(tag.as_ref());
            }
            Self::Ring(key) => {
                use ring::aead::{Aad, Nonce};
                let nonce = Nonce::assume_unique_for_key(nonce);
                let tag =
                    key.get().seal_in_place_separate_tag(nonce, Aad::from(aad), plaintext).map_err(|_| Refused)?;
                bytes.copy_from_slice(tag.as_ref());
            }
        }
        Ok(bytes)
    }

    /// Opens in place what has its tag at the end, and returns the plaintext.
    pub(super) fn open<'a>(
        &self,
        nonce: [u8; NONCE],
        aad: &[u8],
        sealed: &'a mut [u8],
    ) -> Result<&'a mut [u8], Refused> {
        match self {
            Self::AwsLc(key) => {
                use aws_lc_rs::aead::{Aad, Nonce};
                key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(aad), sealed).map_err(|_| Refused)
            }
            Self::Ring(key) => {
                use ring::aead::{Aad, Nonce};
                key.get()
                    .open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(aad), sealed)
                    .map_err(|_| Refused)
            }
        }
    }
}

/// ring keeps keys in the object itself and does not wipe them: that happens here. (AWS-LC wipes its own.) What making it
/// left on the stack is not wiped.
pub(super) struct RingKey(Box<MaybeUninit<ring::aead::LessSafeKey>>);

/// Wiping runs no destructor, so there must be none to run.
const _: () = assert!(!std::mem::needs_drop::<ring::aead::LessSafeKey>());

impl RingKey {
    fn new(key: ring::aead::LessSafeKey) -> Self {
        Self(Box::new(MaybeUninit::new(key)))
    }

    fn get(&self) -> &ring::aead::LessSafeKey {
        // SAFETY: `new` has written it, and only `drop` wipes it.
        unsafe { self.0.assume_init_ref() }
    }

    /// Afterwards, [`get`](Self::get) must not be called.
    fn wipe(&mut self) {
        // As a slice, because then every byte is written, those between the fields too.
        std::slice::from_mut(&mut *self.0).zeroize();
    }
}

impl Drop for RingKey {
    fn drop(&mut self) {
        self.wipe();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::record::MAX_CONTENT;
    use super::*;

    const LIBRARIES: [Library; 2] = [Library::AwsLc, Library::Ring];

    fn algorithms() -> impl Strategy<Value = (Algorithm, Vec<u8>)> {
        prop_oneof![
            prop::array::uniform16(any::<u8>()).prop_map(|key| (Algorithm::Aes128Gcm, key.to_vec())),
            prop::array::uniform32(any::<u8>()).prop_map(|key| (Algorithm::Aes256Gcm, key.to_vec())),
        ]
    }

    /// Of all kinds: below a block, around the widths of loops, behind the counter's first byte, a whole record.
    fn lengths() -> impl Strategy<Value = usize> {
        const RECORD: usize = MAX_CONTENT + 1;
        prop_oneof![
            1..=RECORD,
            1..=300_usize,
            (1..=RECORD / 16, 0..=2_usize).prop_map(|(blocks, more)| (16 * blocks + more - 1).min(RECORD)),
            Just(RECORD),
        ]
    }

    proptest! {
        #[test]
        fn both_libraries_seal_alike_and_open_each_others_and_refuse_what_was_changed(
            (algorithm, key) in algorithms(),
            nonce: [u8; NONCE],
            aad: [u8; 5],
            length in lengths(),
            fill: u8,
            flipped: prop::sample::Index,
            bit in 0..8_u8,
        ) {
            let plaintext: Vec<_> = (0..length).map(|at| fill.wrapping_add((at * 167 / 13) as u8)).collect();
            let keys = LIBRARIES.map(|library| Key::new(library, algorithm, &key).expect("key"));
            let sealed = keys.each_ref().map(|key| {
                let mut bytes = plaintext.clone();
                let tag = key.seal(nonce, &aad, &mut bytes).expect("sealed");
                bytes.extend_from_slice(&tag);
                bytes
            });
            prop_assert_eq!(&sealed[0], &sealed[1]);
            let flip = |bytes: &[u8]| {
                let mut changed = bytes.to_vec();
                changed[flipped.index(bytes.len())] ^= 1 << bit;
                changed
            };
            for key in &keys {
                let open = |aad: &[u8], sealed: &[u8]| {
                    let mut bytes = sealed.to_vec();
                    key.open(nonce, aad, &mut bytes).map(|opened| opened.to_vec())
                };
                prop_assert_eq!(open(&aad, &sealed[0]), Ok(plaintext.clone()));
                prop_assert_eq!(open(&aad, &flip(&sealed[0])), Err(Refused));
                prop_assert_eq!(open(&flip(&aad), &sealed[0]), Err(Refused));
                prop_assert_eq!(open(&aad, &[0; TAG - 1]), Err(Refused));
            }
        }
    }

    #[test]
    fn rings_keys_are_wiped() {
        use ring::aead::{AES_128_GCM, LessSafeKey, UnboundKey};
        let mut key = RingKey::new(LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &[7; 16]).expect("key")));
        key.wipe();
        let bytes = key.0.as_ptr().cast::<u8>();
        // SAFETY: within the box, and `wipe` has written every byte.
        let bytes = unsafe { std::slice::from_raw_parts(bytes, size_of::<LessSafeKey>()) };
        assert!(bytes.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_key_of_the_wrong_length_is_refused() {
        for library in LIBRARIES {
            assert!(Key::new(library, Algorithm::Aes128Gcm, &[0; 32]).is_err(), "{library}");
            assert!(Key::new(library, Algorithm::Aes256Gcm, &[0; 16]).is_err(), "{library}");
        }
    }

    #[test]
    fn the_processor_decides() {
        assert_eq!(Processor { wide: true, wider: false }.library(), Library::Ring);
        assert_eq!(Processor { wide: true, wider: true }.library(), Library::AwsLc);
        assert_eq!(Processor { wide: false, wider: false }.library(), Library::AwsLc);
        assert_eq!(Processor { wide: false, wider: true }.library(), Library::AwsLc);
    }
}
