//! Private keys do not show: not in Debug or Display, and not in memory once their last owner has dropped them.

use std::fmt::Debug;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;

use opencluster_identity::authority::Root;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::svid::SvidStore;
use opencluster_identity::tls::{self, ServerIdentity};
use opencluster_identity::{SpiffeId, UnixTime};
use rustls::SignatureScheme;
use rustls::sign::SigningKey;
use zeroize::Zeroizing;

use crate::common::{ALPN, Cluster, HOUR, domain, workload};

/// Where the scalar is in an authority's secret bytes.
const SCALAR: std::ops::Range<usize> = 8..40;

#[test]
fn r31_debug_shows_no_key() {
    let cluster = Cluster::new(&domain());
    let a = workload("a");
    let file = rcgen::KeyPair::generate().unwrap();
    // PKCS#8 of a P-256 key: the scalar is behind the fixed 36 bytes.
    let scalar = file.serialize_der()[36..68].to_vec();
    let key = PrivateKey::from_pem(file.serialize_pem().as_bytes()).unwrap();
    assert_hidden(&key, &scalar);
    assert_hidden(&key.choose_scheme(&[SignatureScheme::ECDSA_NISTP256_SHA256]).unwrap(), &scalar);

    let issued = cluster.issuer.issue(&key.csr_der(&a).unwrap(), &a, HOUR, UnixTime::now()).unwrap();
    let svid = opencluster_identity::svid::Svid::new(&a, issued.chain, key).unwrap();
    assert_hidden(&svid, &scalar);
    let svids = SvidStore::new();
    svids.install(svid);
    assert_hidden(&svids, &scalar);
    assert_hidden(&ServerIdentity::ByServerName(svids.clone()), &scalar);
    let process = crate::common::Process { svids, trust: cluster.trust() };
    assert_hidden(&process.client(&a), &scalar);
    assert_hidden(&process.server(), &scalar);
    let identity = ServerIdentity::Fixed(process.svids.clone(), a.clone());
    assert_hidden(&tls::server_config(identity, &process.trust, tls::ClientAuth::Optional, ALPN).unwrap(), &scalar);

    let root_secret = cluster.root.danger_secret_bytes().unwrap();
    assert_hidden(&cluster.root, &root_secret[SCALAR]);
    let issuer_secret = cluster.issuer.danger_secret_bytes().unwrap();
    assert_hidden(&cluster.issuer, &issuer_secret[SCALAR]);
    let error = Root::from_secret_bytes(&issuer_secret).unwrap_err();
    assert_hidden(&error, &issuer_secret[SCALAR]);
    assert_text_hides(&error.to_string(), &issuer_secret[SCALAR]);
    let error = PrivateKey::from_pem(&file.serialize_pem().as_bytes()[..120]).unwrap_err();
    assert_hidden(&error, &scalar);
    assert_text_hides(&error.to_string(), &scalar);
}

/// The detector detects: what a derived Debug would have printed.
#[test]
fn the_search_for_key_bytes_finds_them_when_they_are_there() {
    let scalar: Vec<u8> = (100..132).collect();
    for text in [format!("{scalar:?}"), format!("{scalar:#?}"), format!("{scalar:02x?}"), hex::encode(&scalar)] {
        std::panic::catch_unwind(|| assert_text_hides(&text, &scalar)).expect_err("it shows the key");
    }
}

fn assert_hidden(value: &impl Debug, scalar: &[u8]) {
    assert_text_hides(&format!("{value:?}"), scalar);
    assert_text_hides(&format!("{value:#?}"), scalar);
}

/// No four bytes of the key in a row, as numbers or in hex.
fn assert_text_hides(text: &str, scalar: &[u8]) {
    assert!(!text.is_empty());
    let dense: String = text.chars().filter(|c| !c.is_whitespace()).flat_map(char::to_lowercase).collect();
    for part in scalar.windows(4) {
        let numbers = part.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        let hexes = part.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(",");
        for needle in [numbers, hexes, hex::encode(part)] {
            assert!(!dense.contains(&needle), "key bytes {needle} in {text}");
        }
    }
}

#[test]
fn r31_dropped_keys_leave_memory() {
    let now = UnixTime::now();
    let root = Root::create(&domain(), HOUR, now).unwrap();
    let scalar = Masked::new(&root.danger_secret_bytes().unwrap()[SCALAR]);
    // It signs, so that every copy that signing makes is made.
    let issuer = root.create_issuer(HOUR, now).unwrap();
    let controller = SpiffeId::controller(&domain(), "ctl").unwrap();
    let csr = PrivateKey::generate().unwrap().csr_der(&controller).unwrap();
    issuer.issue(&csr, &controller, HOUR, now).unwrap();
    assert!(scalar.copies() > 0, "the control: a living key must be found");
    drop(issuer);
    drop(root);
    assert_eq!(scalar.copies(), 0);
}

/// A key that we look for without holding a copy that we would find.
struct Masked(Vec<u8>);

const MASK: u8 = 0xa5;

impl Masked {
    fn new(scalar: &[u8]) -> Self {
        Self(scalar.iter().map(|byte| byte ^ MASK).collect())
    }

    /// Big-endian as it is written, or little-endian as AWS-LC computes with it; in everything that malloc gives out
    /// and on the stacks of threads.
    fn copies(&self) -> usize {
        let memory = File::open("/proc/self/mem").unwrap();
        let maps = BufReader::new(File::open("/proc/self/maps").unwrap());
        let mut found = 0;
        for line in maps.lines().map(Result::unwrap) {
            let fields: Vec<_> = line.split_whitespace().collect();
            // The main heap, and what is anonymous: the arenas and stacks of threads.
            if !fields[1].starts_with("rw") || !(fields.len() == 5 || fields[5] == "[heap]") {
                continue;
            }
            let (start, end) = fields[0].split_once('-').unwrap();
            let (start, end) = (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap());
            // What is read here must not be found by the next search.
            let mut region = Zeroizing::new(vec![0; (end - start) as usize]);
            // Regions come and go under other threads: what cannot be read now is not heap any more.
            if memory.read_exact_at(&mut region, start).is_err() {
                continue;
            }
            found += region.windows(self.0.len()).filter(|window| self.matches(window)).count();
        }
        found
    }

    fn matches(&self, window: &[u8]) -> bool {
        let unmasked = self.0.iter().map(|byte| byte ^ MASK);
        unmasked.clone().eq(window.iter().copied()) || unmasked.rev().eq(window.iter().copied())
    }
}
