//! The configuration that this node has: documents by key, and what follows from them for the node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use opencluster_api::control::{ConfigUpdate, Document, DocumentKey};
use opencluster_identity::{SpiffeId, Subject, TrustDomain};
use opencluster_policy::index::Index;
use opencluster_policy::lifetime::Age;
use opencluster_policy::resource::{Key, Kind, Resource};
use opencluster_policy::snapshot::Snapshot;

/// Why an update was not taken. What was in force before still is.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UpdateError {
    #[error("the update builds on version {base}, but this node has {have:?}")]
    OtherBase { base: u64, have: Option<u64> },
    #[error("a document without a key")]
    NoKey,
    #[error("resource {0}: {1}")]
    Document(String, String),
    #[error("the key {0} is not that of its document")]
    Key(String),
}

/// A workload of this node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Workload {
    pub(crate) namespace: String,
    pub(crate) name: String,
}

impl std::fmt::Display for Workload {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// One consistent version.
#[derive(Debug)]
pub(crate) struct Resources {
    node: String,
    domain: TrustDomain,
    version: Option<u64>,
    documents: BTreeMap<(String, String, String), Document>,
    index: Option<Index>,
    addresses: Vec<IpAddr>,
    tunnel_port: Option<u16>,
    max_age: Option<Age>,
}

impl Resources {
    /// Nothing known yet.
    pub(crate) fn new(node: &str, domain: &TrustDomain) -> Self {
        Self {
            node: node.to_owned(),
            domain: domain.clone(),
            version: None,
            documents: BTreeMap::new(),
            index: None,
            addresses: Vec::new(),
            tunnel_port: None,
            max_age: None,
        }
    }

    /// Takes a snapshot or a delta, as a whole or not at all.
    pub(crate) fn update(&mut self, update: &ConfigUpdate) -> Result<(), UpdateError> {
        let mut documents = if update.base_version == 0 {
            BTreeMap::new()
        } else if self.version == Some(update.base_version) {
            self.documents.clone()
        } else {
            return Err(UpdateError::OtherBase { base: update.base_version, have: self.version });
        };
        for key in &update.deletes {
            documents.remove(&tuple(key));
        }
        for document in &update.upserts {
            let key = document.key.as_ref().ok_or(UpdateError::NoKey)?;
            documents.insert(tuple(key), document.clone());
        }

        let mut resources = BTreeMap::new();
        for (key, document) in &documents {
            let name = format!("{} {}/{}", key.0, key.1, key.2);
            let resource = Resource::from_json(&document.json)
                .map_err(|faults| UpdateError::Document(name.clone(), faults.to_string()))?;
            let own: Key = resource.key();
            if (own.kind.name(), own.namespace.as_str(), own.name.as_str()) != (&*key.0, &*key.1, &*key.2) {
                return Err(UpdateError::Key(name));
            }
            resources.insert(own, Arc::new(resource));
        }
        let snapshot = Snapshot { version: update.version, resources: Arc::new(resources) };
        let own = Key { kind: Kind::Node, namespace: String::new(), name: self.node.clone() };
        (self.addresses, self.tunnel_port, self.max_age) = match snapshot.resources.get(&own).map(AsRef::as_ref) {
            Some(Resource::Node(node)) => (node.spec.addresses.clone(), Some(node.spec.tunnel_port), node.spec.max_age),
            _ => (Vec::new(), None, None),
        };
        self.index = Some(Index::compile(&self.domain, &snapshot));
        self.documents = documents;
        self.version = Some(update.version);
        Ok(())
    }

    /// Everything, for a proxy that starts; `None`: nothing is known yet.
    pub(crate) fn snapshot(&self) -> Option<ConfigUpdate> {
        Some(ConfigUpdate {
            version: self.version?,
            base_version: 0,
            upserts: self.documents.values().cloned().collect(),
            deletes: Vec::new(),
        })
    }

    pub(crate) fn version(&self) -> Option<u64> {
        self.version
    }

    /// The node's own addresses and tunnel port, if its resource is known.
    pub(crate) fn endpoint(&self) -> Option<(&[IpAddr], u16)> {
        Some((&self.addresses, self.tunnel_port?))
    }

    /// How old this node's enrolment may get, if its resource says so.
    pub(crate) fn max_age(&self) -> Option<Age> {
        self.max_age
    }

    /// The identities that belong here.
    pub(crate) fn identities(&self) -> BTreeSet<Arc<SpiffeId>> {
        self.index.as_ref().map(|index| index.workloads_on(&self.node).cloned().collect()).unwrap_or_default()
    }

    /// The workloads that belong here.
    pub(crate) fn workloads(&self) -> BTreeSet<Workload> {
        self.identities()
            .iter()
            .filter_map(|id| match id.subject() {
                Subject::Workload { namespace, name } => {
                    Some(Workload { namespace: namespace.to_owned(), name: name.to_owned() })
                }
                _ => None,
            })
            .collect()
    }
}

fn tuple(key: &DocumentKey) -> (String, String, String) {
    (key.kind.clone(), key.namespace.clone(), key.name.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn document(kind: &str, namespace: &str, name: &str, spec: &str) -> Document {
        let place = if namespace.is_empty() { String::new() } else { format!(r#","namespace":"{namespace}""#) };
        let json = format!(
            r#"{{"apiVersion":"opencluster/v1","kind":"{kind}","metadata":{{"name":"{name}"{place}}},"spec":{spec}}}"#
        );
        Document {
            key: Some(DocumentKey { kind: kind.into(), namespace: namespace.into(), name: name.into() }),
            json: json.into_bytes(),
        }
    }

    fn resources() -> Resources {
        let mut resources = Resources::new("a", &TrustDomain::parse("example.org").expect("domain"));
        let update = ConfigUpdate {
            version: 3,
            base_version: 0,
            upserts: vec![
                document("Node", "", "a", r#"{"addresses":["10.0.0.1"]}"#),
                document("Workload", "default", "web", r#"{"nodes":["a"]}"#),
                document("Workload", "default", "elsewhere", r#"{"nodes":["b"]}"#),
            ],
            deletes: Vec::new(),
        };
        resources.update(&update).expect("update");
        resources
    }

    #[test]
    fn what_belongs_here_follows_from_a_snapshot() {
        let resources = resources();
        let names: Vec<String> = resources.workloads().iter().map(ToString::to_string).collect();
        assert_eq!(names, ["default/web"]);
        assert_eq!(resources.endpoint(), Some((&["10.0.0.1".parse().expect("address")][..], 15443)));
        assert_eq!(resources.snapshot().expect("snapshot").upserts.len(), 3);
    }

    #[test]
    fn a_delta_counts_only_upon_its_base() {
        let mut resources = resources();
        let web = DocumentKey { kind: "Workload".into(), namespace: "default".into(), name: "web".into() };
        let delta = ConfigUpdate { version: 5, base_version: 4, upserts: Vec::new(), deletes: vec![web] };
        let error = resources.update(&delta).expect_err("base 4");
        assert_eq!(error, UpdateError::OtherBase { base: 4, have: Some(3) });
        resources.update(&ConfigUpdate { base_version: 3, ..delta }).expect("base 3");
        assert!(resources.workloads().is_empty());
        assert_eq!(resources.version(), Some(5));
    }

    #[test]
    fn a_faulty_update_changes_nothing() {
        let mut resources = resources();
        let broken = ConfigUpdate {
            version: 4,
            base_version: 3,
            upserts: vec![document("Workload", "default", "web", r#"{"nods":["a"]}"#)],
            deletes: Vec::new(),
        };
        assert!(matches!(resources.update(&broken), Err(UpdateError::Document(..))));
        let mut swapped = document("Workload", "default", "web", r#"{"nodes":["a"]}"#);
        swapped.key.as_mut().expect("key").name = "other".into();
        let swapped = ConfigUpdate { upserts: vec![swapped], ..broken };
        assert!(matches!(resources.update(&swapped), Err(UpdateError::Key(_))));
        assert_eq!((resources.version(), resources.workloads().len()), (Some(3), 1));
    }
}
