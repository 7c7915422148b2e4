//! The sealed store, from outside.

use std::path::Path;
use std::sync::Arc;

use opencluster_controller::init::{InitError, init};
use opencluster_controller::serve::{Controller, ServeError};
use opencluster_controller::store::{Batch, EmbeddedStore, Expect, Store as _, StoreError, StoreKey, Table};
use redb::{Database, ReadableTable as _, TableDefinition};

use crate::harness::Cluster;

const OPERATORS: TableDefinition<'static, &str, &[u8]> = TableDefinition::new("operators");

fn key(byte: &str) -> StoreKey {
    StoreKey::parse(&byte.repeat(32)).expect("key")
}

/// A store with two operators and a longer record.
fn filled(path: &Path) -> EmbeddedStore {
    let store = EmbeddedStore::create(path, &key("11")).expect("create");
    let mut batch = Batch::default();
    batch.put(Table::Operators, "token/admin", b"role: admin".to_vec());
    batch.put(Table::Operators, "token/viewer", b"role: viewer".to_vec());
    batch.put(Table::Resources, "Policy/default/long", vec![0x5a; 20_000]);
    store.commit(batch).expect("commit");
    store
}

fn content(store: &EmbeddedStore) -> Vec<(String, Vec<u8>)> {
    Table::ALL
        .iter()
        .flat_map(|table| store.scan(*table, "", "", usize::MAX).expect("scan"))
        .map(|(key, entry)| (key, entry.value.to_vec()))
        .collect()
}

#[test]
fn r36_a_wrong_key_is_refused_and_nothing_is_written() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("store");
    let expected = content(&filled(&path));
    let before = std::fs::read(&path).expect("read");

    let error = EmbeddedStore::open(&path, &key("22")).expect_err("another key");
    assert!(matches!(error, StoreError::WrongKey(_)), "{error}");
    assert!(error.to_string().contains("sealed with another key"), "{error}");
    assert_eq!(std::fs::read(&path).expect("read"), before, "not a byte was changed");

    let store = EmbeddedStore::open(&path, &key("11")).expect("the right key");
    assert_eq!(content(&store), expected);
}

#[tokio::test]
async fn r36_serve_refuses_a_wrong_key_and_init_overwrites_nothing() {
    let mut cluster = Cluster::start().await;
    cluster.stop().await;
    let before = std::fs::read(cluster.store_path()).expect("read");

    let error = init(&cluster.config, None, None).map(|_| ()).expect_err("it is there");
    assert!(matches!(error, InitError::Exists(_)), "{error}");
    std::fs::write(cluster.directory.path().join("store.key"), "66".repeat(32)).expect("another key");
    let error = init(&cluster.config, None, None).map(|_| ()).expect_err("it is there");
    assert!(matches!(error, InitError::Exists(_)), "{error}");
    let error = Controller::start(&cluster.config).await.expect_err("another key");
    assert!(matches!(error, ServeError::Store(StoreError::WrongKey(_))), "{error}");
    assert_eq!(std::fs::read(cluster.store_path()).expect("read"), before, "not a byte was changed");

    std::fs::write(cluster.directory.path().join("store.key"), "5a".repeat(32)).expect("the right key");
    cluster.serve().await;
    assert_eq!(cluster.get("/v1/whoami").await.0, 200);
}

#[test]
fn r36_a_damaged_store_is_refused_and_left_alone() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("store");
    let expected = content(&filled(&path));
    let sound = std::fs::read(&path).expect("read");

    let mut refused = 0;
    // Behind the database's own header; a prime step visits every part of a page.
    for at in (4096..sound.len()).step_by(521) {
        let mut damaged = sound.clone();
        damaged[at] ^= 0x10;
        std::fs::write(&path, &damaged).expect("write");
        match EmbeddedStore::open(&path, &key("11")) {
            // A byte that nothing uses.
            Ok(store) => assert_eq!(content(&store), expected, "flipped byte {at} changed what is read"),
            Err(error) => {
                assert!(matches!(error, StoreError::Damaged { .. }), "byte {at}: {error}");
                assert_eq!(std::fs::read(&path).expect("read"), damaged, "byte {at}: the file was touched");
                refused += 1;
            }
        }
    }
    assert!(refused > 20, "only {refused} refused");

    for (name, bytes) in [
        ("empty", Vec::new()),
        ("garbage", vec![0x42; 10_000]),
        ("cut off", sound[..sound.len() / 2].to_vec()),
        ("magic lost", [&[0; 9], &sound[9..]].concat()),
    ] {
        std::fs::write(&path, &bytes).expect("write");
        let error = EmbeddedStore::open(&path, &key("11")).expect_err(name);
        assert!(matches!(error, StoreError::Damaged { .. }), "{name}: {error}");
        assert_eq!(std::fs::read(&path).expect("read"), bytes, "{name}: the file was touched");
    }

    std::fs::write(&path, &sound).expect("write");
    assert_eq!(content(&EmbeddedStore::open(&path, &key("11")).expect("sound again")), expected);
}

#[test]
fn r36_sealed_values_cannot_be_swapped() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("store");
    drop(filled(&path));
    EmbeddedStore::open(&path, &key("11")).expect("sound before");

    // Somebody who can write the file, checksums and all, but has no key.
    let database = Database::open(&path).expect("redb");
    let transaction = database.begin_write().expect("write");
    {
        let mut table = transaction.open_table(OPERATORS).expect("table");
        let admin = table.get("token/admin").expect("get").expect("there").value().to_vec();
        table.insert("token/viewer", admin.as_slice()).expect("insert");
    }
    transaction.commit().expect("commit");
    drop(database);

    let error = EmbeddedStore::open(&path, &key("11")).expect_err("swapped");
    let text = error.to_string();
    assert!(matches!(error, StoreError::Damaged { .. }), "{text}");
    assert!(text.contains("token/viewer") && text.contains("operators"), "{text}");
}

#[test]
fn r36_of_two_batches_with_the_same_condition_one_wins() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let store = Arc::new(filled(&directory.path().join("store")));
    for round in 0..20 {
        let key = format!("node/{round}");
        let mut batch = Batch::default();
        batch.put(Table::Tokens, key.clone(), b"token".to_vec());
        let revision = store.commit(batch).expect("commit");
        let wins: Vec<bool> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|thread| {
                    let (store, key) = (Arc::clone(&store), key.clone());
                    scope.spawn(move || {
                        let mut batch = Batch::default();
                        batch.require(Table::Tokens, key.clone(), Expect::Revision(revision));
                        batch.delete(Table::Tokens, key);
                        batch.put(Table::Enrolments, format!("{round}/{thread}"), b"enrolled".to_vec());
                        match store.commit(batch) {
                            Ok(_) => true,
                            Err(StoreError::Conflict { .. }) => false,
                            Err(error) => panic!("{error}"),
                        }
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        assert_eq!(wins.iter().filter(|win| **win).count(), 1, "{wins:?}");
        let enrolled = store.scan(Table::Enrolments, &format!("{round}/"), "", 10).expect("scan");
        assert_eq!(enrolled.len(), 1, "the losers wrote nothing");
    }
}

#[test]
fn r36_one_controller_at_a_time_has_the_store() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("store");
    let store = filled(&path);
    let error = EmbeddedStore::open(&path, &key("11")).expect_err("in use");
    assert!(matches!(error, StoreError::InUse(_)), "{error}");
    drop(store);
    EmbeddedStore::open(&path, &key("11")).expect("free again");
}

#[test]
fn r36_no_value_is_readable_in_the_file() {
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().join("store");
    drop(filled(&path));
    let file = std::fs::read(&path).expect("read");
    let contains = |needle: &[u8]| file.windows(needle.len()).any(|window| window == needle);
    assert!(contains(b"token/viewer"), "positive control: keys are in the clear");
    assert!(!contains(b"role: viewer"));
    assert!(!contains(&[0x5a; 32]));
}
