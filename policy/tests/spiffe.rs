//! SPIFFE IDs: the standard's syntax and limits, and what Opencluster reads in them.

use std::collections::HashMap;

use opencluster_policy::spiffe::{SpiffeId, Subject, TrustDomain, is_dns_label};
use proptest::prelude::*;
use proptest::sample::select;

#[test]
fn what_the_standard_allows_is_accepted() {
    for text in [
        "spiffe://trust.test",
        "spiffe://trust.test/path",
        "spiffe://a_b-c.1/A-Z_a.z/0.../...",
        "spiffe://1.2.3.4/service",
        &format!("spiffe://{}", "t".repeat(255)),
        &format!("spiffe://t/{}", "x".repeat(2048 - "spiffe://t/".len())),
    ] {
        assert_eq!(SpiffeId::parse(text).unwrap().as_str(), text);
    }
}

#[test]
fn what_the_standard_forbids_is_refused() {
    for text in [
        "",
        "trust.test/path",
        "spiffe:/trust.test",
        "spiffe:///path",
        "SPIFFE://trust.test/path",
        "https://trust.test/path",
        "spiffe://Trust.test/path",
        "spiffe://trust.test:80/path",
        "spiffe://user@trust.test/path",
        "spiffe://user:secret@trust.test/path",
        "spiffe://trust.test/",
        "spiffe://trust.test/path/",
        "spiffe://trust.test//path",
        "spiffe://trust.test/./path",
        "spiffe://trust.test/../path",
        "spiffe://trust.test/path?query",
        "spiffe://trust.test?query",
        "spiffe://trust.test/path#fragment",
        "spiffe://trust.test#fragment",
        "spiffe://trust.test/%41",
        "spiffe://trust%2etest/path",
        "spiffe://trust.test/pa th",
        "spiffe://trust.test/päth",
        "spiffe://träst.test/path",
        "spiffe://trust.test/path\n",
        "spiffe://trust.test/path\0",
        " spiffe://trust.test/path",
        "spiffe://[fd00::1]/path",
        &format!("spiffe://{}/path", "t".repeat(256)),
        &format!("spiffe://t/{}", "x".repeat(2048 - "spiffe://t/".len() + 1)),
    ] {
        assert!(SpiffeId::parse(text).is_err(), "{text:?}");
    }
}

#[test]
fn faults_say_what_is_wrong() {
    for (text, message) in [
        ("spiffe://t.test:1/a", "the trust domain `t.test:1` must not have a port"),
        ("spiffe://T.test/a", "the trust domain `T.test` holds 'T': only `a-z 0-9 . - _` are allowed"),
        ("spiffe://t.test/a/", "a SPIFFE ID's path must not have empty segments or end with a slash"),
        ("http://t.test/a", "`http://t.test/a` is not a SPIFFE ID: it must start with `spiffe://`"),
        (
            "spiffe://t.test/a\u{7}",
            "the path segment `a\\u{7}` of a SPIFFE ID holds '\\u{7}': only `a-z A-Z 0-9 . - _` are allowed",
        ),
    ] {
        assert_eq!(SpiffeId::parse(text).unwrap_err().to_string(), message);
    }
}

#[test]
fn subjects_are_read_from_whole_paths() {
    let subject = |path: &str| format!("{:?}", SpiffeId::parse(&format!("spiffe://t.test{path}")).unwrap().subject());
    assert_eq!(subject("/ns/default/sa/web"), r#"Workload { namespace: "default", name: "web" }"#);
    assert_eq!(subject("/node/a"), r#"Node { name: "a" }"#);
    assert_eq!(subject("/controller/ctl"), r#"Controller { name: "ctl" }"#);
    assert_eq!(subject("/operator/ann"), r#"Operator { name: "ann" }"#);
    for other in [
        "",
        "/ns",
        "/ns/a",
        "/ns/a/sa",
        "/ns/a/sa/b/c",
        "/ns/a/b/sa/c",
        "/ns/a/sa/b/sa/c",
        "/node",
        "/node/a/b",
        "/x/node/a",
        "/NODE/a",
        "/controller/a/b",
    ] {
        assert_eq!(subject(other), "Other", "{other}");
    }
}

#[test]
fn server_names_are_dns_names_or_none() {
    let name = |text: &str| SpiffeId::parse(text).unwrap().server_name();
    assert_eq!(name("spiffe://t.test/ns/default/sa/web").as_deref(), Some("web.default.sa.t.test"));
    assert_eq!(name("spiffe://t.test/node/a").as_deref(), Some("a.node.t.test"));
    assert_eq!(name("spiffe://t.test/controller/ctl").as_deref(), Some("ctl.controller.t.test"));
    for none in [
        "spiffe://t.test",
        "spiffe://t.test/operator/ann",
        "spiffe://t.test/ns/default/sa/Web",
        "spiffe://t.test/ns/default/sa/we.b",
        "spiffe://t.test/ns/default/sa/we_b",
        "spiffe://t.test/ns/default/sa/-web",
        "spiffe://t_t.test/node/a",
        "spiffe://10.0.0.1/node/a",
        "spiffe://t..test/node/a",
        "spiffe://t.test./node/a",
        // It would be the name of node `x` of trust domain `sa.t.test`.
        "spiffe://t.test/ns/node/sa/x",
        "spiffe://t.test/ns/controller/sa/x",
        &format!("spiffe://t.test/node/{}", "a".repeat(64)),
        &format!("spiffe://{}/ns/default/sa/web", format!("{}.", "t".repeat(60)).repeat(4) + "t"),
    ] {
        assert_eq!(name(none), None, "{none}");
    }
}

#[test]
fn a_clusters_trust_domain_has_a_server_name_for_every_workload() {
    let longest = "x".repeat(63);
    for (labels, fits) in [(1, true), (57, true), (58, false), (120, false)] {
        let domain = TrustDomain::parse(&vec!["a"; labels].join(".")).unwrap();
        assert_eq!(domain.check_serves_names().is_ok(), fits, "{labels} labels");
        if fits {
            assert!(SpiffeId::workload(&domain, &longest, &longest).unwrap().server_name().is_some());
            assert!(SpiffeId::controller(&domain, &longest).unwrap().server_name().is_some());
        }
    }
    for (domain, fits) in
        [("rig.test", true), ("cluster", true), ("a_b.test", false), ("10.0.0.1", false), ("a.", false)]
    {
        assert_eq!(TrustDomain::parse(domain).unwrap().check_serves_names().is_ok(), fits, "{domain}");
    }
}

#[test]
fn makers_refuse_what_would_change_the_meaning() {
    let domain = TrustDomain::parse("t.test").unwrap();
    for name in ["", ".", "..", "a/b", "a/sa/b", "a?b", "ä"] {
        assert!(SpiffeId::workload(&domain, "default", name).is_err(), "{name}");
        assert!(SpiffeId::workload(&domain, name, "web").is_err(), "{name}");
        assert!(SpiffeId::node(&domain, name).is_err(), "{name}");
        assert!(SpiffeId::controller(&domain, name).is_err(), "{name}");
    }
}

fn segment() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9._-]{1,12}".prop_filter("dots", |text| text != "." && text != "..")
}

/// Few words, so that different IDs come close to the same server name.
fn confusing() -> impl Strategy<Value = SpiffeId> {
    let word = || select(&["a", "sa", "node", "controller", "ns", "b-1"][..]);
    let domain =
        proptest::collection::vec(word(), 1..4).prop_map(|labels| TrustDomain::parse(&labels.join(".")).unwrap());
    (domain, word(), word(), 0..3).prop_map(|(domain, namespace, name, kind)| {
        match kind {
            0 => SpiffeId::workload(&domain, namespace, name),
            1 => SpiffeId::node(&domain, name),
            _ => SpiffeId::controller(&domain, name),
        }
        .unwrap()
    })
}

/// The standard once more, as a set of characters for each place.
fn valid(text: &str) -> bool {
    let Some(rest) = text.strip_prefix("spiffe://") else { return false };
    let (domain, path) = rest.split_once('/').map_or((rest, None), |(domain, path)| (domain, Some(path)));
    text.len() <= 2048
        && (1..=255).contains(&domain.len())
        && domain.bytes().all(|byte| b"abcdefghijklmnopqrstuvwxyz0123456789.-_".contains(&byte))
        && path.is_none_or(|path| {
            path.split('/').all(|segment| {
                !segment.is_empty()
                    && segment != "."
                    && segment != ".."
                    && segment.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
            })
        })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn valid_ids_are_taken_apart_and_put_together(domain in "[a-z0-9._-]{1,20}", segments in proptest::collection::vec(segment(), 0..5)) {
        let path = [String::new()].into_iter().chain(segments).collect::<Vec<_>>().join("/");
        let text = format!("spiffe://{domain}{path}");
        let id = SpiffeId::parse(&text).unwrap();
        prop_assert_eq!(id.as_str(), &text);
        prop_assert_eq!(id.trust_domain(), &domain);
        prop_assert_eq!(id.path(), &path);
        prop_assert_eq!(id.to_string().parse::<SpiffeId>().unwrap(), id.clone());
        prop_assert!(id.is_of(&TrustDomain::parse(&domain).unwrap()));
        match id.subject() {
            Subject::Workload { namespace, name } => prop_assert_eq!(path, format!("/ns/{namespace}/sa/{name}")),
            Subject::Node { name } => prop_assert_eq!(path, format!("/node/{name}")),
            Subject::Controller { name } => prop_assert_eq!(path, format!("/controller/{name}")),
            Subject::Operator { name } => prop_assert_eq!(path, format!("/operator/{name}")),
            Subject::Other => {}
        }
    }

    #[test]
    fn texts_are_judged_by_the_standard(text in "(spiffe://)?([a-z./_-]|[A-Z0-9%?#:@]|/\\.|\\PC){0,24}") {
        prop_assert_eq!(SpiffeId::parse(&text).is_ok(), valid(&text), "{:?}", text);
    }

    #[test]
    fn near_ids_are_judged_by_the_standard(text in "spiffe://[a-z0-9.]{0,3}[a-zA-Z/]{0,4}(/|/\\.|\\.|[?#%: ]|[a-z]){0,6}") {
        prop_assert_eq!(SpiffeId::parse(&text).is_ok(), valid(&text), "{:?}", text);
    }

    /// No two IDs have the same server name, and each is a name that TLS takes.
    #[test]
    fn r31_server_names_are_injective(ids in proptest::collection::vec(confusing(), 2..60)) {
        let mut owners: HashMap<String, SpiffeId> = HashMap::new();
        for id in ids {
            let Some(name) = id.server_name() else { continue };
            prop_assert!(name.len() <= 253 && name.split('.').all(is_dns_label), "{}", name);
            if let Some(owner) = owners.insert(name.clone(), id.clone()) {
                prop_assert_eq!(owner, id, "{}", name);
            }
        }
    }
}
