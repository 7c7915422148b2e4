//! Resources: what is accepted, and that everything wrong is said, with its place.

use std::fmt::Write as _;

use opencluster_policy::lifetime::Age;
use opencluster_policy::resource::{
    Effect, Fault, From, Kind, Metadata, NodeSpec, Object, PolicySpec, Protocol, Resource, ServicePort, ServiceSpec,
    To, WorkloadSpec,
};
use opencluster_policy::snapshot::Snapshot;
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index as Pick, select};

/// The smallest useful pair, as the contract has it.
const SMALLEST: &str = "\
apiVersion: opencluster/v1
kind: Service
metadata: {name: echo, namespace: default}
spec: {ports: [{port: 9000}], workloads: [b]}
---
apiVersion: opencluster/v1
kind: Policy
metadata: {name: a-to-echo, namespace: default}
spec: {to: {service: echo, ports: [9000]}, from: [{workload: a}]}
";

#[test]
fn the_smallest_pair_is_accepted() {
    let resources = Resource::parse_documents(SMALLEST).unwrap();
    let [Resource::Service(service), Resource::Policy(policy)] = resources.as_slice() else { panic!("{resources:?}") };
    assert_eq!(service.spec.ports, [ServicePort { port: 9000, name: None, protocol: Protocol::Tcp }]);
    assert_eq!(policy.spec.action, Effect::Allow);
    assert!(!policy.spec.dry_run);
    assert_eq!(resources[0].key().to_string(), "Service default/echo");
    assert_eq!(
        resources[1].to_yaml(),
        "\
apiVersion: opencluster/v1
kind: Policy
metadata:
  name: a-to-echo
  namespace: default
spec:
  action: allow
  from:
    - workload: a
  to:
    ports:
      - 9000
    service: echo
"
    );
}

#[test]
fn namespaces_default_and_json_is_a_document_too() {
    let json =
        r#"{"apiVersion": "opencluster/v1", "kind": "Workload", "metadata": {"name": "b"}, "spec": {"nodes": ["b"]}}"#;
    let from_yaml = Resource::parse_documents(&format!("---\n---\n# nothing here\n---\n{json}\n---\n")).unwrap();
    let from_json = Resource::from_json(json.as_bytes()).unwrap();
    assert_eq!(from_yaml, std::slice::from_ref(&from_json));
    assert_eq!(from_json.metadata().namespace, "default");
    assert_eq!(Resource::parse_documents("").unwrap(), []);
}

#[test]
fn kinds_have_their_names() {
    for kind in Kind::ALL {
        assert_eq!(Kind::parse(kind.name()), Some(kind));
        assert_eq!(Kind::parse(&kind.plural().to_uppercase()), Some(kind));
    }
    assert_eq!(Kind::parse("svc"), Some(Kind::Service));
    assert_eq!(Kind::parse("pods"), None);
}

fn faults(text: &str) -> Vec<Fault> {
    Resource::parse_documents(text).expect_err("it is faulty").0
}

/// One fault of one document, as a person reads it.
fn fault(text: &str) -> String {
    let faults = faults(text);
    assert_eq!(faults.len(), 1, "{faults:?}");
    faults[0].to_string()
}

fn service(spec: &str) -> String {
    format!("apiVersion: opencluster/v1\nkind: Service\nmetadata: {{name: echo}}\nspec: {spec}\n")
}

#[test]
fn bad_input_says_what_and_where_and_what_to_do() {
    for (text, message) in [
        (
            service("{ports: [{prot: 1, port: 9000}], workloads: [b]}"),
            "document 1, spec.ports[0].prot (line 4, column 17): unknown field `prot`, did you mean `port`?",
        ),
        (
            service("{ports: [{port: 0}], workloads: [b]}"),
            "document 1, spec.ports[0].port (line 4, column 23): expected a whole number from 1 to 65535, found `0`",
        ),
        (
            service("{ports: [{port: \"80\"}], workloads: [b]}"),
            "document 1, spec.ports[0].port (line 4, column 23): expected a whole number from 1 to 65535, found the text `80`: \
             leave out the quotes",
        ),
        (
            service("{ports: [{port: 0x50}], workloads: [b]}"),
            "document 1, spec.ports[0].port (line 4, column 23): expected a whole number from 1 to 65535, found `0x50`: write \
             it in decimal, without leading zeros",
        ),
        (
            service("{ports: [{port: 80}, {port: 80}], workloads: [b]}"),
            "document 1, spec.ports[1] (line 4, column 28): the same as spec.ports[0]",
        ),
        (
            service("{ports: [], workloads: [b]}"),
            "document 1, spec.ports (line 4, column 15): expected a list of 1 to 256, found 0",
        ),
        (
            service("{ports: [{port: 80}], workloads: b}"),
            "document 1, spec.workloads (line 4, column 40): expected a list, found the text `b`: put a value into brackets or \
             behind `- `",
        ),
        (
            service("{ports: [{port: 80}], workloads: [a/b/c]}"),
            "document 1, spec.workloads[0] (line 4, column 41): `a/b/c` names no resource: write `name` (in the same \
             namespace) or `namespace/name`, each 1–63 of `a-z 0-9 -`",
        ),
        (
            service("{ports: [{port: 80}], workloads: [1]}"),
            "document 1, spec.workloads[0] (line 4, column 41): expected a text, found the number `1`: quote it (\"1\")",
        ),
        (service("{ports: [{port: 80}]}"), "document 1, spec.workloads (line 4, column 7): `workloads` is missing"),
        (
            service("{ports: [{port: 80, protocol: sctp}], workloads: [b]}"),
            "document 1, spec.ports[0].protocol (line 4, column 37): unknown protocol `sctp`: it must be `tcp` or `udp`",
        ),
        (
            SMALLEST.replace("name: echo", "name: Echo_"),
            "document 1, metadata.name (line 3, column 18): `Echo_` is not a name: 1–63 of `a-z 0-9 -`, no hyphen at either \
             end",
        ),
        (
            SMALLEST.replace("kind: Policy", "kind: Polciy"),
            "document 2, kind (line 7, column 7): unknown kind `Polciy`, did you mean `Policy`?",
        ),
        (
            SMALLEST.replacen("opencluster/v1", "v1", 1),
            "document 1, apiVersion (line 1, column 13): unknown apiVersion `v1`: it must be `opencluster/v1`",
        ),
        (
            SMALLEST.replace("{workload: a}", "{}"),
            "document 2, spec.from[0] (line 9, column 51): a source must say who: give at least one of workload, identity, \
             service, namespace, node, cidr",
        ),
        (
            SMALLEST.replace("{workload: a}", "{cidr: 10.0.0.1/8}"),
            "document 2, spec.from[0].cidr (line 9, column 58): `10.0.0.1/8` has bits set behind the prefix: write \
             `10.0.0.0/8`",
        ),
        (
            SMALLEST.replace("{workload: a}", "{identity: \"spiffe://x:1/a\"}"),
            "document 2, spec.from[0].identity (line 9, column 62): the trust domain `x:1` must not have a port",
        ),
        (
            SMALLEST.replace("namespace: default}\nspec: {to", "namespace: node}\nspec: {to"),
            "document 2, metadata.namespace (line 8, column 40): the namespace `node` is reserved: its names in TLS would be a \
             node's",
        ),
        (
            "apiVersion: opencluster/v1\nkind: Node\nmetadata: {name: a, namespace: default}\nspec: {addresses: [10.0.0.1]}"
                .to_owned(),
            "document 1, metadata.namespace (line 3, column 32): nodes are in no namespace: leave this field out",
        ),
        (
            "apiVersion: opencluster/v1\nkind: Node\nmetadata: {name: a}\nspec: {addresses: [127.0.0.1]}".to_owned(),
            "document 1, spec.addresses[0] (line 4, column 20): `127.0.0.1` is the same address on every host",
        ),
        (
            "apiVersion: opencluster/v1\nkind: Node\nmetadata: {name: a}\nspec: {addresses: [somewhere]}".to_owned(),
            "document 1, spec.addresses[0] (line 4, column 20): `somewhere` is not an IPv4 or IPv6 address",
        ),
        (
            format!("{SMALLEST}---\n{}", service("{ports: [{port: 1}], workloads: [c]}")),
            "document 3, metadata (line 11, column 1): Service default/echo is already defined by document 1",
        ),
        (
            service("{ports: [{port: 80}], workloads: [b], workloads: [c]}"),
            "document 1 (line 4, column 45): the field `workloads` is given twice",
        ),
        (
            service("{ports: &x [{port: 80}], workloads: [b]}"),
            "document 1 (line 4, column 15): anchors (`&name`) are not accepted: write the value where it is needed",
        ),
        (
            service("{ports: [{port: !!int 80}], workloads: [b]}"),
            "document 1 (line 4, column 23): tags (`!name`) are not accepted: leave it out",
        ),
        (
            "just a text".to_owned(),
            "document 1 (line 1, column 1): expected a mapping (apiVersion, kind, metadata, spec), found the text `just a \
             text`",
        ),
    ] {
        assert_eq!(fault(&text), message, "{text}");
    }
}

#[test]
fn all_faults_of_all_documents_are_told() {
    let text = "\
apiVersion: opencluster/v1
kind: Service
metadata: {name: Echo, labels: {team: 7}}
spec: {ports: [{port: 0, nmae: x}], workloads: []}
---
kind: [
---
apiVersion: opencluster/v2
kind: Workload
metadata: {}
spec: {nodes: [a, a]}
";
    let places: Vec<(usize, String, usize, usize)> =
        faults(text).into_iter().map(|fault| (fault.document, fault.field, fault.line, fault.column)).collect();
    let place = |document, field: &str, line, column| (document, field.to_owned(), line, column);
    assert_eq!(
        places,
        [
            place(0, "metadata.name", 3, 18),
            place(0, "metadata.labels.team", 3, 39),
            place(0, "spec.ports[0].port", 4, 23),
            place(0, "spec.ports[0].nmae", 4, 26),
            place(0, "spec.workloads", 4, 48),
            place(1, "", 7, 1),
            place(2, "apiVersion", 8, 13),
            place(2, "metadata.name", 10, 11),
            place(2, "spec.nodes[1]", 11, 19),
        ]
    );
}

#[test]
fn limits_hold() {
    let aliases = "a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n";
    assert!(faults(aliases).iter().any(|fault| fault.message.contains("aliases")));
    for deep in ["[".repeat(100_000), "- ".repeat(10_000), "{a: ".repeat(200), "[".repeat(65) + &"]".repeat(65)] {
        let faults = faults(&deep);
        assert!(faults[0].message.contains("deep") || faults[0].message.contains("not valid YAML"), "{faults:?}");
    }
    assert!(Resource::from_json("[".repeat(100_000).as_bytes()).unwrap_err().0[0].message.contains("deep"));
    assert!(faults(&" ".repeat((4 << 20) + 1))[0].message.contains("at most 4194304"));
    assert!(Resource::from_json(&vec![b' '; (4 << 20) + 1]).unwrap_err().0[0].message.contains("at most 4194304"));
    assert!(faults(&"--- x\n".repeat(10_001)).iter().any(|fault| fault.message == "more than 10000 documents"));
    let many = faults(&"--- x\n".repeat(10_000));
    assert_eq!((many.len(), many[200].message.as_str()), (201, "9800 further faults are not shown"));
}

/// Work grows with the text, not with its square. A quadratic reader would take minutes here.
#[test]
fn large_texts_take_no_longer_than_they_must() {
    let mut many_documents = String::new();
    for number in 0..9000 {
        write!(
            many_documents,
            "apiVersion: opencluster/v1\nkind: Workload\nmetadata: {{name: w{number}}}\nspec: {{nodes: [a]}}\n---\n"
        )
        .unwrap();
    }
    assert_eq!(Resource::parse_documents(&many_documents).unwrap().len(), 9000);
    let nodes: Vec<String> = (0..4096).map(|number| format!("n{number}")).collect();
    let one = format!("apiVersion: opencluster/v1\nkind: Workload\nmetadata: {{name: w}}\nspec: {{nodes: {nodes:?}}}");
    assert_eq!(Resource::parse_documents(&one).unwrap().len(), 1);
    for odd in ["%\n", "--- \n", "a:\n", "- ", "[],", "? ", "\t", "\"", "#\n", "!", "&a ", "\u{feff}", "k: v\n", "|\n"]
    {
        let text = odd.repeat((1 << 20) / odd.len());
        // Some are empty documents, some are wrong: all are answered.
        answered(&text);
    }
}

// Random resources, valid on their own.

fn label() -> impl Strategy<Value = String> {
    "[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?"
        .prop_filter("reserved namespaces", |text| !matches!(text.as_str(), "node" | "controller"))
}

fn reference() -> impl Strategy<Value = String> {
    prop_oneof![label(), (label(), label()).prop_map(|(namespace, name)| format!("{namespace}/{name}"))]
}

fn metadata(namespaced: bool) -> impl Strategy<Value = Metadata> {
    let value = prop_oneof![
        "\\PC{0,20}",
        select(vec!["true", "~", "", "1e3", "0x1", "no", "- a", "a: b", "\u{2028}"]).prop_map(str::to_owned)
    ];
    (label(), label(), btree_map("[A-Za-z0-9._/-]{1,12}", value, 0..4), option::of(any::<u64>())).prop_map(
        move |(name, namespace, labels, resource_version)| Metadata {
            name,
            namespace: if namespaced { namespace } else { String::new() },
            labels,
            resource_version,
        },
    )
}

fn protocol() -> impl Strategy<Value = Protocol> {
    select(&[Protocol::Tcp, Protocol::Udp][..])
}

fn cidr() -> impl Strategy<Value = ipnet::IpNet> {
    let v4 = (any::<std::net::Ipv4Addr>(), 0..=32_u8).prop_map(|(address, length)| (address.into(), length));
    let v6 = (any::<std::net::Ipv6Addr>(), 0..=128_u8).prop_map(|(address, length)| (address.into(), length));
    prop_oneof![v4, v6]
        .prop_map(|(address, length)| ipnet::IpNet::new(address, length).unwrap().trunc())
        .prop_filter("IPv4 in IPv6 form", |net| net.addr().to_canonical() == net.addr())
}

fn from() -> impl Strategy<Value = From> {
    let identity = (label(), label()).prop_map(|(domain, name)| format!("spiffe://{domain}.test/{name}/X_y.Z"));
    (
        option::of(reference()),
        option::of(identity),
        option::of(reference()),
        option::of(label()),
        option::of(label()),
        option::of(cidr()),
    )
        .prop_map(|(workload, identity, service, namespace, node, cidr)| From {
            workload,
            identity,
            service,
            namespace,
            node,
            cidr,
        })
        .prop_filter("says who", |from| *from != From::default())
}

fn ports(least: usize) -> impl Strategy<Value = Vec<u16>> {
    btree_set(1..=u16::MAX, least..4).prop_map(|ports| ports.into_iter().collect())
}

fn resource() -> impl Strategy<Value = Resource> {
    let addresses = btree_set(
        prop_oneof![
            any::<u32>().prop_map(|bits| std::net::IpAddr::from((0x0A00_0000 | (bits & 0x00FF_FFFF)).to_be_bytes())),
            any::<u64>().prop_map(|bits| std::net::IpAddr::from(std::net::Ipv6Addr::from_bits(
                0xFD88 << 112 | u128::from(bits)
            ))),
        ],
        1..4,
    );
    let max_age =
        prop::option::of((10..=366 * 86_400_u64).prop_map(|seconds| Age::from_seconds(seconds).expect("an age")));
    let node =
        (metadata(false), addresses, 1..=u16::MAX, max_age).prop_map(|(metadata, addresses, tunnel_port, max_age)| {
            let addresses = addresses.into_iter().collect();
            Resource::Node(Object { metadata, spec: NodeSpec { addresses, tunnel_port, max_age } })
        });
    let service_ports = btree_map((1..=u16::MAX, protocol()), option::of(label()), 1..4);
    let service =
        (metadata(true), service_ports, btree_set(reference(), 1..4)).prop_map(|(metadata, ports, workloads)| {
            let ports =
                ports.into_iter().map(|((port, protocol), name)| ServicePort { port, name, protocol }).collect();
            Resource::Service(Object {
                metadata,
                spec: ServiceSpec { ports, workloads: workloads.into_iter().collect() },
            })
        });
    let workload = (metadata(true), btree_set(label(), 1..4), ports(0)).prop_map(|(metadata, nodes, ports)| {
        Resource::Workload(Object { metadata, spec: WorkloadSpec { nodes: nodes.into_iter().collect(), ports } })
    });
    let policy = (metadata(true), reference(), ports(0), vec(from(), 1..4), any::<[bool; 2]>())
        .prop_filter("no source twice", |(.., from, _)| {
            from.iter().enumerate().all(|(at, one)| !from[..at].contains(one))
        })
        .prop_map(|(metadata, service, ports, from, [deny, dry_run])| {
            let action = if deny { Effect::Deny } else { Effect::Allow };
            Resource::Policy(Object { metadata, spec: PolicySpec { to: To { service, ports }, from, action, dry_run } })
        });
    prop_oneof![node, service, workload, policy]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    /// What is written is read back: as YAML, as JSON, and as JSON given for YAML; by `serde` too.
    #[test]
    fn resources_round_trip(resources in vec(resource(), 1..4)) {
        let unique = Snapshot::new(0, resources);
        let resources: Vec<Resource> = unique.resources.values().map(|resource| (**resource).clone()).collect();
        let yaml: Vec<String> = resources.iter().map(Resource::to_yaml).collect();
        prop_assert_eq!(&Resource::parse_documents(&yaml.join("---\n")).unwrap(), &resources);
        let json: Vec<String> = resources.iter().map(|resource| format!("{:#}", resource.to_json())).collect();
        prop_assert_eq!(&Resource::parse_documents(&json.join("\n---\n")).unwrap(), &resources);
        for (resource, json) in resources.iter().zip(&json) {
            prop_assert_eq!(&Resource::from_json(json.as_bytes()).unwrap(), resource);
            let mut value = resource.to_json();
            let object = value.as_object_mut().unwrap();
            object.remove("apiVersion");
            object.remove("kind");
            let by_serde = match resource {
                Resource::Node(_) => serde_json::from_value(value).map(Resource::Node),
                Resource::Service(_) => serde_json::from_value(value).map(Resource::Service),
                Resource::Workload(_) => serde_json::from_value(value).map(Resource::Workload),
                Resource::Policy(_) => serde_json::from_value(value).map(Resource::Policy),
            };
            prop_assert_eq!(&by_serde.unwrap(), resource);
        }
    }

    /// Whatever comes: an answer, no panic; what is accepted is written and read back; places lie within the text.
    #[test]
    fn mutated_documents_are_answered(
        resources in vec(resource(), 1..4),
        mutations in vec((any::<Pick>(), 0..6_usize, "\\PC|[-:{}\\[\\],&*!|>'\"%@`#?~ \n\t]|---\n"), 1..6),
    ) {
        let yaml: Vec<String> = resources.iter().map(Resource::to_yaml).collect();
        let mut text: Vec<char> = yaml.join("---\n").chars().collect();
        for (pick, removed, inserted) in mutations {
            let at = pick.index(text.len() + 1);
            text.splice(at..(at + removed).min(text.len()), inserted.chars());
        }
        answered(&text.into_iter().collect::<String>());
    }

    #[test]
    fn random_texts_are_answered(text in "(\\PC|[-:{}\\[\\],&*!|>'\"%@`#?~ \n\t\r]|---\n|apiVersion|kind|spec|\\.\\.\\.\n){0,60}") {
        answered(&text);
    }

    #[test]
    fn random_bytes_as_json_are_answered(bytes in vec(any::<u8>(), 0..200)) {
        if let Ok(resource) = Resource::from_json(&bytes) {
            prop_assert_eq!(Resource::from_json(resource.to_json().to_string().as_bytes()).unwrap(), resource);
        }
    }
}

fn answered(text: &str) {
    match Resource::parse_documents(text) {
        Ok(resources) => {
            let yaml: Vec<String> = resources.iter().map(Resource::to_yaml).collect();
            assert_eq!(Resource::parse_documents(&yaml.join("---\n")).unwrap(), resources);
        }
        Err(faults) => {
            assert!(!faults.0.is_empty());
            let lines = text.split(['\n', '\r']).count();
            for fault in faults.0 {
                assert!(!fault.message.is_empty());
                assert!(fault.line <= lines + 1, "{fault} in {text:?}");
            }
        }
    }
}
