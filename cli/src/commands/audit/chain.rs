//! The hash chain, verified link by link and independently of the controller: each event's hash is SHA-256 over the hash
//! before it (32 bytes) and the event's canonical JSON (keys sorted, no spaces) without `hash`.

use opencluster_api::rest::AuditEvent;
use opencluster_identity::digest::Sha256Digest;
use serde_json::Value;

/// What has been verified so far.
#[derive(Debug)]
pub(super) struct Chain {
    length: u64,
    head: [u8; 32],
}

impl Default for Chain {
    /// No events: the first one's previous hash is of zeros.
    fn default() -> Self {
        Self { length: 0, head: [0; 32] }
    }
}

/// Why an event does not continue the chain.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ChainError {
    /// Events are missing, doubled or out of order.
    #[error("event {found} stands where event {expected} should be")]
    Sequence {
        /// What should come.
        expected: u64,
        /// What came.
        found: u64,
    },
    /// The event before it was changed, or another one.
    #[error("event {0} does not continue the one before it: its previous hash is another")]
    Previous(u64),
    /// The event was changed.
    #[error("event {0} was changed: its content does not have its hash")]
    Content(u64),
    /// The event cannot be put into canonical form.
    #[error("event {0} cannot be hashed: {1}")]
    Form(u64, String),
}

impl Chain {
    /// Verifies the next event.
    pub(super) fn append(&mut self, event: &AuditEvent) -> Result<(), ChainError> {
        let expected = self.length + 1;
        if event.sequence != expected {
            return Err(ChainError::Sequence { expected, found: event.sequence });
        }
        if event.previous != hexadecimal(self.head) {
            return Err(ChainError::Previous(expected));
        }
        let hash = hash(self.head, event).map_err(|error| ChainError::Form(expected, error.to_string()))?;
        if event.hash != hexadecimal(hash) {
            return Err(ChainError::Content(expected));
        }
        *self = Self { length: expected, head: hash };
        Ok(())
    }

    /// How many events were verified.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// The hash of the last one.
    pub(super) fn head(&self) -> String {
        hexadecimal(self.head)
    }
}

fn hash(previous: [u8; 32], event: &AuditEvent) -> Result<[u8; 32], serde_json::Error> {
    let mut value = serde_json::to_value(event)?;
    if let Some(fields) = value.as_object_mut() {
        fields.remove("hash");
    }
    let mut bytes = previous.to_vec();
    write_canonical(&value, &mut bytes)?;
    Ok(*Sha256Digest::of(&bytes).as_bytes())
}

/// Keys in the order of their bytes, whatever order the value keeps them in.
fn write_canonical(value: &Value, bytes: &mut Vec<u8>) -> Result<(), serde_json::Error> {
    match value {
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            fields.sort_unstable_by_key(|(name, _)| *name);
            bytes.push(b'{');
            for (position, (name, value)) in fields.into_iter().enumerate() {
                if position > 0 {
                    bytes.push(b',');
                }
                serde_json::to_writer(&mut *bytes, name)?;
                bytes.push(b':');
                write_canonical(value, bytes)?;
            }
            bytes.push(b'}');
        }
        Value::Array(items) => {
            bytes.push(b'[');
            for (position, item) in items.iter().enumerate() {
                if position > 0 {
                    bytes.push(b',');
                }
                write_canonical(item, bytes)?;
            }
            bytes.push(b']');
        }
        scalar => serde_json::to_writer(bytes, scalar)?,
    }
    Ok(())
}

fn hexadecimal(hash: [u8; 32]) -> String {
    hash.iter().fold(String::with_capacity(64), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn trail(count: u64) -> Vec<AuditEvent> {
        let mut head = [0; 32];
        let mut events = Vec::new();
        for sequence in 1..=count {
            let mut event = AuditEvent {
                sequence,
                time: "2026-11-24T16:00:00Z".into(),
                actor: "anna".into(),
                action: "apply".into(),
                subject: "Policy default/a-to-echo".into(),
                before: None,
                after: Some(json!({"z": [sequence, {"b": 1, "a": null}], "a": "ü\n"})),
                previous: hexadecimal(head),
                hash: String::new(),
            };
            head = hash(head, &event).expect("JSON");
            event.hash = hexadecimal(head);
            events.push(event);
        }
        events
    }

    fn verify(events: &[AuditEvent]) -> Result<(), ChainError> {
        let mut chain = Chain::default();
        events.iter().try_for_each(|event| chain.append(event))
    }

    #[test]
    fn the_canonical_form_is_the_documented_one() {
        let mut bytes = Vec::new();
        write_canonical(&json!({"b": [1, {"d": null, "c": "ü\n"}], "a": true}), &mut bytes).expect("JSON");
        assert_eq!(String::from_utf8(bytes).expect("text"), r#"{"a":true,"b":[1,{"c":"ü\n","d":null}]}"#);
    }

    #[test]
    fn every_way_to_tamper_is_found() {
        assert_eq!(verify(&trail(5)), Ok(()), "positive control");
        let tamper = |change: fn(&mut Vec<AuditEvent>)| {
            let mut events = trail(5);
            change(&mut events);
            verify(&events)
        };
        assert_eq!(tamper(|events| drop(events.remove(2))), Err(ChainError::Sequence { expected: 3, found: 4 }));
        assert_eq!(tamper(|events| events.swap(1, 2)), Err(ChainError::Sequence { expected: 2, found: 3 }));
        assert_eq!(tamper(|events| events[1].actor = "eve".into()), Err(ChainError::Content(2)));
        assert_eq!(tamper(|events| events[1].after = Some(json!({}))), Err(ChainError::Content(2)));
        assert_eq!(tamper(|events| events[1].before = Some(json!(1))), Err(ChainError::Content(2)));
        assert_eq!(tamper(|events| events[0].previous = "00".into()), Err(ChainError::Previous(1)));
        // Changed and hashed anew, which breaks the next link.
        let rehashed = tamper(|events| {
            events[1].actor = "eve".into();
            let previous = Sha256Digest::from_hex(&events[1].previous).expect("a hash");
            events[1].hash = hexadecimal(hash(*previous.as_bytes(), &events[1]).expect("JSON"));
        });
        assert_eq!(rehashed, Err(ChainError::Previous(3)));
    }

    proptest! {
        #[test]
        fn no_foreign_event_is_taken_for_a_link(sequence in 0_u64..3, previous in "[0-9a-f]{0,64}", hash in "[0-9a-f]{64}", actor in ".{0,8}") {
            let event = AuditEvent { sequence, actor, previous, hash, ..trail(1).remove(0) };
            prop_assert!(Chain::default().append(&event).is_err());
        }
    }
}
