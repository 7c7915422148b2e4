//! How resources name each other: `name` (same namespace) or `namespace/name`.

use super::{Key, Kind};
use crate::spiffe::is_dns_label;

/// A reference, resolved against the namespace of the resource that holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference<'a> {
    /// The namespace.
    pub namespace: &'a str,
    /// The name.
    pub name: &'a str,
}

impl<'a> Reference<'a> {
    /// Resolves `name` or `namespace/name`.
    pub fn resolve(text: &'a str, own_namespace: &'a str) -> Self {
        match text.split_once('/') {
            Some((namespace, name)) => Self { namespace, name },
            None => Self { namespace: own_namespace, name: text },
        }
    }

    /// The key of the resource of this kind that it names.
    pub fn key(self, kind: Kind) -> Key {
        Key { kind, namespace: self.namespace.to_owned(), name: self.name.to_owned() }
    }
}

/// Whether `text` has the form of a reference.
pub fn is_reference(text: &str) -> bool {
    text.split('/').count() <= 2 && text.split('/').all(is_dns_label)
}
