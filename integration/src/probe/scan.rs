//! Looks for secrets in the memory of processes, knowing none of them: a private key is any 32 bytes whose public key is a
//! wanted one, and an AES key in use lies in memory as its key schedule, which nothing else looks like.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use anyhow::Context;
use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use clap::Args;
use opencluster_identity::digest::Sha256Digest;
use opencluster_integration::report::Event;

/// See [`search`].
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Whose memory
    #[arg(long, value_name = "PID", required = true)]
    pid: Vec<u32>,
    /// SHA-256 of the SubjectPublicKeyInfo of keys to look for (hexadecimal)
    #[arg(long = "key", value_name = "SHA256")]
    keys: Vec<String>,
}

const SCALAR: usize = 32;
const PIECE: usize = 1 << 20;

/// Tells what is found in each process.
pub(crate) fn search(options: &Options) -> anyhow::Result<()> {
    let wanted: BTreeSet<String> = options.keys.iter().map(|key| key.to_ascii_lowercase()).collect();
    for pid in &options.pid {
        let mut found = Found::default();
        let memory = File::open(format!("/proc/{pid}/mem")).with_context(|| format!("the memory of {pid}"))?;
        for (start, end) in writable(&fs::read_to_string(format!("/proc/{pid}/maps"))?)? {
            found.region(&memory, start, end, &wanted);
        }
        let Found { bytes, keys, aes128, aes256 } = found;
        let keys = keys.into_iter().collect();
        crate::tell(&Event::Scanned { pid: *pid, bytes, keys, aes128: aes128.len(), aes256: aes256.len() })?;
    }
    Ok(())
}

/// Where secrets can be: what the process may write to.
fn writable(maps: &str) -> anyhow::Result<Vec<(u64, u64)>> {
    let mut regions = Vec::new();
    for line in maps.lines() {
        let (range, rest) = line.split_once(' ').context("a line of maps")?;
        let (start, end) = range.split_once('-').context("a range of maps")?;
        if rest.starts_with("rw") {
            regions.push((u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?));
        }
    }
    Ok(regions)
}

#[derive(Default)]
struct Found {
    bytes: u64,
    keys: BTreeSet<String>,
    /// Places, so that the overlap of two pieces does not count twice.
    aes128: BTreeSet<u64>,
    aes256: BTreeSet<u64>,
}

impl Found {
    fn region(&mut self, memory: &File, start: u64, end: u64, wanted: &BTreeSet<String>) {
        // Pieces overlap by more than the largest thing that is looked for.
        const OVERLAP: u64 = 512;
        let mut at = start;
        let mut piece = vec![0; PIECE];
        while at < end {
            let length = usize::try_from(end - at).unwrap_or(PIECE).min(PIECE);
            match memory.read_at(&mut piece[..length], at) {
                Ok(read) if read > 0 => {
                    self.bytes += read as u64;
                    self.piece(&piece[..read], at, wanted);
                    if at + read as u64 >= end {
                        return;
                    }
                    at += (read as u64).saturating_sub(OVERLAP).max(1);
                }
                // Nobody can read it, so no secret is read from it either (vvar, for example).
                Ok(_) | Err(_) => return,
            }
        }
    }

    fn piece(&mut self, piece: &[u8], at: u64, wanted: &BTreeSet<String>) {
        for (offset, window) in piece.windows(SCALAR).enumerate() {
            let aligned = offset.is_multiple_of(8);
            // In the library's own form (limbs in the machine's order), and in that of encoded keys.
            let encoded = offset >= 2 && piece[offset - 2..offset] == [0x04, 0x20];
            if (aligned || encoded) && random_like(window) && !wanted.is_empty() {
                if aligned {
                    self.try_key(window.iter().rev().copied(), wanted);
                }
                self.try_key(window.iter().copied(), wanted);
            }
            if offset.is_multiple_of(4) {
                if is_schedule_of(&piece[offset..], 4, 44) {
                    self.aes128.insert(at + offset as u64);
                }
                if is_schedule_of(&piece[offset..], 8, 60) {
                    self.aes256.insert(at + offset as u64);
                }
            }
        }
    }

    fn try_key(&mut self, scalar: impl Iterator<Item = u8>, wanted: &BTreeSet<String>) {
        let scalar: Vec<u8> = scalar.collect();
        let Ok(key) = PrivateKey::from_private_key(&ECDH_P256, &scalar) else { return };
        let Ok(public) = key.compute_public_key() else { return };
        let Ok(spki): Result<PublicKeyX509Der<'_>, _> = public.as_der() else { return };
        let digest = Sha256Digest::of(spki.as_ref()).to_string();
        if wanted.contains(&digest) {
            self.keys.insert(digest);
        }
    }
}

/// No window of a random key has a zero among its words' upper halves or so few different bytes; most of memory has.
fn random_like(window: &[u8]) -> bool {
    let words = window.chunks_exact(4).all(|word| word != [0; 4] && word != [0xff; 4]);
    let mut seen = [false; 256];
    for byte in window {
        seen[usize::from(*byte)] = true;
    }
    words && seen.iter().filter(|seen| **seen).count() >= 22
}

/// Whether an expanded AES key of so many words begins here (FIPS 197, section 5.2).
fn is_schedule_of(bytes: &[u8], key_words: usize, words: usize) -> bool {
    let word = |index: usize| -> Option<[u8; 4]> { bytes.get(index * 4..)?.first_chunk().copied() };
    let mut round = 1_u8;
    for index in key_words..words {
        let (Some(before), Some(past), Some(here)) = (word(index - 1), word(index - key_words), word(index)) else {
            return false;
        };
        let mut mixed = before;
        if index.is_multiple_of(key_words) {
            mixed.rotate_left(1);
            mixed = mixed.map(substitute);
            mixed[0] ^= round;
            round = double(round);
        } else if key_words == 8 && index % 8 == 4 {
            mixed = mixed.map(substitute);
        }
        if std::iter::zip(mixed, past).map(|(a, b)| a ^ b).ne(here) {
            return false;
        }
    }
    true
}

fn double(byte: u8) -> u8 {
    (byte << 1) ^ if byte & 0x80 == 0 { 0 } else { 0x1b }
}

/// AES's S-box, computed once.
fn substitute(byte: u8) -> u8 {
    static TABLE: std::sync::OnceLock<[u8; 256]> = std::sync::OnceLock::new();
    let table = TABLE.get_or_init(|| {
        let mut table = [0x63; 256];
        let (mut p, mut q) = (1_u8, 1_u8);
        loop {
            // p runs through all powers of 3, q through their inverses.
            p ^= double(p);
            q ^= q << 1;
            q ^= q << 2;
            q ^= q << 4;
            if q & 0x80 != 0 {
                q ^= 0x09;
            }
            table[usize::from(p)] =
                0x63 ^ q ^ q.rotate_left(1) ^ q.rotate_left(2) ^ q.rotate_left(3) ^ q.rotate_left(4);
            if p == 1 {
                return table;
            }
        }
    });
    table[usize::from(byte)]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// FIPS 197, appendix A.1.
    fn example() -> Vec<u8> {
        let key = [0x2b, 0x7e, 0x15, 0x16, 0x28, 0xae, 0xd2, 0xa6, 0xab, 0xf7, 0x15, 0x88, 0x09, 0xcf, 0x4f, 0x3c];
        let mut words: Vec<[u8; 4]> = key.chunks_exact(4).map(|word| word.try_into().expect("4 bytes")).collect();
        let mut round = 1;
        for index in 4..44 {
            let mut mixed: [u8; 4] = words[index - 1];
            if index % 4 == 0 {
                mixed.rotate_left(1);
                mixed = mixed.map(substitute);
                mixed[0] ^= round;
                round = double(round);
            }
            let past = words[index - 4];
            words.push(std::array::from_fn(|byte| mixed[byte] ^ past[byte]));
        }
        words.concat()
    }

    #[test]
    fn the_schedule_of_the_standards_example_is_one() {
        let schedule = example();
        assert_eq!(
            schedule[160..],
            [0xd0, 0x14, 0xf9, 0xa8, 0xc9, 0xee, 0x25, 0x89, 0xe1, 0x3f, 0x0c, 0xc8, 0xb6, 0x63, 0x0c, 0xa6]
        );
        assert!(is_schedule_of(&schedule, 4, 44));
        let mut broken = schedule.clone();
        broken[100] ^= 1;
        assert!([&broken[..], &schedule[..175], &[0; 240]].iter().all(|bytes| !is_schedule_of(bytes, 4, 44)));
    }

    #[test]
    fn a_key_is_found_in_either_form() {
        let key = rcgen::KeyPair::generate().expect("key");
        let der = key.serialize_der();
        // PKCS#8 holds the scalar in its ECPrivateKey: OCTET STRING of 32 bytes.
        let at = der.windows(2).position(|pair| pair == [0x04, 0x20]).expect("the scalar") + 2;
        let wanted =
            BTreeSet::from([Sha256Digest::of(&rcgen::PublicKeyData::subject_public_key_info(&key)).to_string()]);
        let mut memory = vec![0; 64];
        memory.extend(der[at..at + SCALAR].iter().rev());
        let mut limbs = Found::default();
        limbs.piece(&memory, 0, &wanted);
        assert_eq!(limbs.keys, wanted);
        let mut encoded = Found::default();
        encoded.piece(&der, 0, &wanted);
        assert_eq!(encoded.keys, wanted);
        let mut nothing = Found::default();
        nothing.piece(&memory[..70], 0, &wanted);
        assert!(nothing.keys.is_empty());
    }
}
