use serde_json::json;

use super::*;
use crate::store::{EmbeddedStore, StoreKey};

fn store() -> (tempfile::TempDir, EmbeddedStore) {
    let directory = tempfile::tempdir().expect("temporary directory");
    let key = StoreKey::parse(&"07".repeat(32)).expect("key");
    let store = EmbeddedStore::create(&directory.path().join("store"), &key).expect("create");
    (directory, store)
}

fn draft(subject: &str) -> Draft {
    Draft {
        actor: "alice".into(),
        action: "apply",
        subject: subject.into(),
        before: None,
        after: Some(json!({"b": 1, "a": {"d": 2, "c": 3}})),
    }
}

fn filled(store: &EmbeddedStore, count: usize) -> Head {
    let mut head = Head::empty();
    for number in 0..count {
        let mut batch = Batch::default();
        head = head
            .append(&mut batch, vec![draft(&format!("event {number}"))], OffsetDateTime::UNIX_EPOCH)
            .expect("append");
        store.commit(batch).expect("commit");
    }
    head
}

#[test]
fn r36_a_whole_chain_verifies_over_several_pages() {
    let (_directory, store) = store();
    assert_eq!(Head::verify(&store).expect("empty"), Head::empty());
    let head = filled(&store, PAGE + 3);
    assert_eq!(Head::verify(&store).expect("whole"), head);
    let events = page(&store, PAGE as u64, 10).expect("page");
    assert_eq!(events.iter().map(|event| event.sequence).collect::<Vec<_>>(), [512, 513, 514, 515]);
}

#[test]
fn r36_every_kind_of_tampering_with_the_trail_is_found() {
    type Tamper = fn(&EmbeddedStore) -> Batch;
    let cases: [(&str, Tamper, u64); 5] = [
        ("changed content", |store| changed(store, 2, |event| event.actor = "mallory".into()), 2),
        (
            "changed content and hash",
            |store| {
                changed(store, 2, |event| {
                    event.actor = "mallory".into();
                    event.hash = hex::encode(hash_of(event).expect("hash"));
                })
            },
            3,
        ),
        (
            "removed in the middle",
            |_| {
                one(|batch| {
                    batch.delete(Table::Audit, key_of(2));
                })
            },
            2,
        ),
        (
            "cut off at the end",
            |_| {
                one(|batch| {
                    batch.delete(Table::Audit, key_of(4));
                })
            },
            4,
        ),
        (
            "all removed",
            |_| {
                one(|batch| {
                    for sequence in 1..=4 {
                        batch.delete(Table::Audit, key_of(sequence));
                    }
                })
            },
            1,
        ),
    ];
    for (name, tamper, expected) in cases {
        let (_directory, store) = store();
        filled(&store, 4);
        Head::verify(&store).expect("whole before");
        store.commit(tamper(&store)).expect("commit");
        match Head::verify(&store) {
            Err(AuditError::Broken { sequence, .. }) => assert_eq!(sequence, expected, "{name}"),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn r36_two_writers_cannot_both_append_to_the_same_head() {
    let (_directory, store) = store();
    let head = filled(&store, 1);
    let batches = ["one", "two"].map(|subject| {
        let mut batch = Batch::default();
        head.append(&mut batch, vec![draft(subject)], OffsetDateTime::UNIX_EPOCH).expect("append");
        batch
    });
    let [first, second] = batches;
    store.commit(first).expect("the first");
    let error = store.commit(second).expect_err("the second");
    assert!(matches!(error, StoreError::Conflict { table: Table::Audit, .. }), "{error}");
}

fn one(fill: impl FnOnce(&mut Batch)) -> Batch {
    let mut batch = Batch::default();
    fill(&mut batch);
    batch
}

fn changed(store: &EmbeddedStore, sequence: u64, change: impl FnOnce(&mut AuditEvent)) -> Batch {
    let entry = store.get(Table::Audit, &key_of(sequence)).expect("get").expect("there");
    let mut event = parse(&entry).expect("parse");
    change(&mut event);
    one(|batch| {
        batch.put(Table::Audit, key_of(sequence), to_json(&event).expect("json"));
    })
}
