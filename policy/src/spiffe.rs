//! SPIFFE IDs (the SPIFFE-ID standard: syntax and limits) and what Opencluster reads in their paths.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

const SCHEME: &str = "spiffe://";
const MAX_ID: usize = 2048;
const MAX_TRUST_DOMAIN: usize = 255;
const MAX_DNS_NAME: usize = 253;
const MAX_DNS_LABEL: usize = 63;

/// A trust domain: 1–255 of `a-z 0-9 . - _`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(String);

/// A valid SPIFFE ID, at most 2048 bytes. Compared byte for byte. Cheap to clone.
#[derive(Clone)]
pub struct SpiffeId {
    text: Arc<str>,
    domain_end: usize,
}

/// What a SPIFFE ID of our own trust domain names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject<'a> {
    /// `/ns/<namespace>/sa/<name>`
    Workload {
        /// The namespace.
        namespace: &'a str,
        /// The workload's name.
        name: &'a str,
    },
    /// `/node/<name>`
    Node {
        /// The node's name.
        name: &'a str,
    },
    /// `/controller/<name>`
    Controller {
        /// The replica's name.
        name: &'a str,
    },
    /// `/operator/<name>`: a person or program with a client certificate for the policy API. Its role is the
    /// controller's to know, never the certificate's to claim. It serves nothing, so it has no server name.
    Operator {
        /// The operator's name.
        name: &'a str,
    },
    /// Anything else.
    Other,
}

/// Why a text is not a SPIFFE ID or trust domain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SpiffeError(pub String);

impl TrustDomain {
    /// Parses a trust domain name (without scheme).
    pub fn parse(text: &str) -> Result<Self, SpiffeError> {
        check_trust_domain(text)?;
        Ok(Self(text.to_owned()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether a cluster can have this trust domain: every name that its resources may have, however long, gets a
    /// [`SpiffeId::server_name`]. A controller that starts with another one would fail for some workloads, later.
    pub fn check_serves_names(&self) -> Result<(), SpiffeError> {
        let room = MAX_DNS_NAME - 2 * (MAX_DNS_LABEL + 1) - ".controller".len();
        if self.0.len() > room {
            return Err(SpiffeError(format!(
                "the trust domain `{self}` has {} characters: at most {room} leave room for the names of workloads in TLS",
                self.0.len()
            )));
        }
        if !is_dns_name(&self.0) {
            return Err(SpiffeError(format!(
                "the trust domain `{self}` is not a DNS name, which TLS needs: labels of 1–{MAX_DNS_LABEL} of `a-z 0-9 -` \
                 with dots between them, not only digits in the last one"
            )));
        }
        Ok(())
    }
}

impl FromStr for TrustDomain {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        Self::parse(text)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl SpiffeId {
    /// Parses `spiffe://…`.
    pub fn parse(text: &str) -> Result<Self, SpiffeError> {
        if text.len() > MAX_ID {
            return Err(SpiffeError(format!("a SPIFFE ID of {} bytes: at most {MAX_ID} are allowed", text.len())));
        }
        let Some(rest) = text.strip_prefix(SCHEME) else {
            return Err(SpiffeError(format!("`{}` is not a SPIFFE ID: it must start with `{SCHEME}`", excerpt(text))));
        };
        let domain_length = rest.find('/').unwrap_or(rest.len());
        let (domain, path) = rest.split_at(domain_length);
        check_trust_domain(domain)?;
        // An empty path is the trust domain's own ID.
        if let Some(segments) = path.strip_prefix('/') {
            segments.split('/').try_for_each(check_segment)?;
        }
        Ok(Self { text: text.into(), domain_end: SCHEME.len() + domain_length })
    }

    /// `spiffe://<domain>/ns/<namespace>/sa/<name>`
    pub fn workload(domain: &TrustDomain, namespace: &str, name: &str) -> Result<Self, SpiffeError> {
        check_segment(namespace)?;
        check_segment(name)?;
        Self::parse(&format!("{SCHEME}{domain}/ns/{namespace}/sa/{name}"))
    }

    /// `spiffe://<domain>/node/<name>`
    pub fn node(domain: &TrustDomain, name: &str) -> Result<Self, SpiffeError> {
        check_segment(name)?;
        Self::parse(&format!("{SCHEME}{domain}/node/{name}"))
    }

    /// `spiffe://<domain>/controller/<name>`
    pub fn controller(domain: &TrustDomain, name: &str) -> Result<Self, SpiffeError> {
        check_segment(name)?;
        Self::parse(&format!("{SCHEME}{domain}/controller/{name}"))
    }

    /// `spiffe://<domain>/operator/<name>`
    pub fn operator(domain: &TrustDomain, name: &str) -> Result<Self, SpiffeError> {
        check_segment(name)?;
        Self::parse(&format!("{SCHEME}{domain}/operator/{name}"))
    }

    /// The whole ID.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The trust domain's name.
    pub fn trust_domain(&self) -> &str {
        &self.text[SCHEME.len()..self.domain_end]
    }

    /// Whether it is of this trust domain.
    pub fn is_of(&self, domain: &TrustDomain) -> bool {
        self.trust_domain() == domain.as_str()
    }

    /// The path, with its leading slash; empty for a trust domain's own ID.
    pub fn path(&self) -> &str {
        &self.text[self.domain_end..]
    }

    /// What it names, if it is of our own trust domain: the paths of others mean what they want them to mean.
    pub fn subject(&self) -> Subject<'_> {
        let path = self.path();
        if let Some((namespace, name)) = path.strip_prefix("/ns/").and_then(|rest| rest.split_once("/sa/")) {
            // A namespace `x/sa/y` or a name `x/y` would be more segments than a workload's ID has.
            if !namespace.contains('/') && !name.contains('/') {
                return Subject::Workload { namespace, name };
            }
        }
        match path.strip_prefix('/').and_then(|rest| rest.split_once('/')) {
            Some((_, name)) if name.contains('/') => Subject::Other,
            Some(("node", name)) => Subject::Node { name },
            Some(("controller", name)) => Subject::Controller { name },
            Some(("operator", name)) => Subject::Operator { name },
            _ => Subject::Other,
        }
    }

    /// The DNS name that stands for this ID in TLS server name indication, so that the peer can choose the certificate:
    /// `<name>.<namespace>.sa.<trust-domain>`, `<name>.node.<trust-domain>`, `<name>.controller.<trust-domain>`.
    ///
    /// `None` for other subjects, and wherever the result would not be a DNS name or could be read as another ID's: no two
    /// IDs have the same server name. (The second is why namespaces called `node` or `controller` have none: `x.node.sa.t`
    /// would also be node `x` of trust domain `sa.t`.)
    pub fn server_name(&self) -> Option<String> {
        let domain = self.trust_domain();
        let name = match self.subject() {
            Subject::Workload { namespace, name }
                if is_dns_label(name) && is_dns_label(namespace) && !is_reserved_namespace(namespace) =>
            {
                format!("{name}.{namespace}.sa.{domain}")
            }
            Subject::Node { name } if is_dns_label(name) => format!("{name}.node.{domain}"),
            Subject::Controller { name } if is_dns_label(name) => format!("{name}.controller.{domain}"),
            _ => return None,
        };
        (name.len() <= MAX_DNS_NAME && is_dns_name(domain)).then_some(name)
    }
}

// The text says it all: `domain_end` follows from it.
impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl Eq for SpiffeId {}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.text.cmp(&other.text)
    }
}

impl std::hash::Hash for SpiffeId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

// Maps keyed by IDs can be asked by text: both hash and compare alike.
impl std::borrow::Borrow<str> for SpiffeId {
    fn borrow(&self) -> &str {
        &self.text
    }
}

impl FromStr for SpiffeId {
    type Err = SpiffeError;

    fn from_str(text: &str) -> Result<Self, SpiffeError> {
        Self::parse(text)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Whether `text` is a DNS label as RFC 1123 has it, in lower case: 1–63 of `a-z 0-9 -`, no hyphen at the ends.
pub fn is_dns_label(text: &str) -> bool {
    (1..=MAX_DNS_LABEL).contains(&text.len())
        && text.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-'))
        && !text.starts_with('-')
        && !text.ends_with('-')
}

/// Namespaces that no workload may have, because their server names could be read as those of nodes or controllers.
pub fn is_reserved_namespace(namespace: &str) -> bool {
    matches!(namespace, "node" | "controller")
}

/// Whether TLS takes it for a DNS name: a last label of digits only would make it look like an address.
fn is_dns_name(text: &str) -> bool {
    let numeric_end = text.rsplit('.').next().is_some_and(|label| label.bytes().all(|byte| byte.is_ascii_digit()));
    text.len() <= MAX_DNS_NAME && text.split('.').all(is_dns_label) && !numeric_end
}

fn check_trust_domain(text: &str) -> Result<(), SpiffeError> {
    if text.is_empty() {
        return Err(SpiffeError("the trust domain is empty".to_owned()));
    }
    if text.len() > MAX_TRUST_DOMAIN {
        return Err(SpiffeError(format!(
            "a trust domain of {} bytes: at most {MAX_TRUST_DOMAIN} are allowed",
            text.len()
        )));
    }
    let allowed = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_');
    match text.chars().find(|&c| !allowed(c)) {
        None => Ok(()),
        Some(':') => Err(SpiffeError(format!("the trust domain `{}` must not have a port", excerpt(text)))),
        Some('@') => Err(SpiffeError(format!("the trust domain `{}` must not have user information", excerpt(text)))),
        Some(wrong) => Err(SpiffeError(format!(
            "the trust domain `{}` holds {wrong:?}: only `a-z 0-9 . - _` are allowed",
            excerpt(text)
        ))),
    }
}

fn check_segment(segment: &str) -> Result<(), SpiffeError> {
    match segment {
        "" => {
            return Err(SpiffeError("a SPIFFE ID's path must not have empty segments or end with a slash".to_owned()));
        }
        "." | ".." => return Err(SpiffeError(format!("a SPIFFE ID's path must not have the segment `{segment}`"))),
        _ => {}
    }
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    match segment.chars().find(|&c| !allowed(c)) {
        None => Ok(()),
        Some('?') => Err(SpiffeError("a SPIFFE ID must not have a query".to_owned())),
        Some('#') => Err(SpiffeError("a SPIFFE ID must not have a fragment".to_owned())),
        Some('%') => Err(SpiffeError("a SPIFFE ID must not have percent-encoded characters".to_owned())),
        Some(wrong) => Err(SpiffeError(format!(
            "the path segment `{}` of a SPIFFE ID holds {wrong:?}: only `a-z A-Z 0-9 . - _` are allowed",
            excerpt(segment)
        ))),
    }
}

/// Enough of a text to recognize it in an error message, whatever it holds.
fn excerpt(text: &str) -> String {
    const SHOWN: usize = 80;
    let shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() { format!("{shown}…") } else { shown }
}
