//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use opencluster_policy::resource::Kind;
use opencluster_policy::spiffe::SpiffeId;

use crate::client::settings::ConnectionArgs;
use crate::output::Format;
use crate::output::human::parse_duration;

/// Operates an Opencluster cluster: what runs where, who may connect to what, and whether all is well.
///
/// The controller is named by OPENCLUSTER_SERVER and verified with OPENCLUSTER_CA; OPENCLUSTER_TOKEN_FILE says who you are.
/// Exit codes: 0 done, 1 refused or failed, 2 usage.
#[derive(Debug, Parser)]
#[command(name = "opencluster", version, max_term_width = 110, arg_required_else_help = true)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) global: GlobalArgs,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What every command takes.
#[derive(Args, Debug)]
pub(crate) struct GlobalArgs {
    /// How results are printed
    #[arg(short, long, global = true, value_enum, default_value_t)]
    pub(crate) output: Format,
    #[command(flatten)]
    pub(crate) connection: ConnectionArgs,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create or change resources: all documents or none
    Apply(ApplyArgs),
    /// Show resources
    Get(GetArgs),
    /// Delete resources
    Delete(DeleteArgs),
    /// Show what apply would change
    Diff(DiffArgs),
    /// Say why a flow is allowed or denied, or what the fields of a kind mean
    #[command(
        override_usage = "opencluster explain flow --from WORKLOAD --to SERVICE:PORT\n       opencluster explain KIND"
    )]
    Explain(ExplainArgs),
    /// Show, enrol and revoke nodes
    Node {
        #[command(subcommand)]
        command: NodeCommand,
    },
    /// Show workloads' identities, revoke and restore them
    Workload {
        #[command(subcommand)]
        command: WorkloadCommand,
    },
    /// Show what is revoked
    Revocation {
        #[command(subcommand)]
        command: RevocationCommand,
    },
    /// Diagnose the whole cluster; exits 1 if any check fails
    Check,
    /// Show the controller's state
    Status,
    /// Read and verify the audit trail
    Audit {
        #[command(subcommand)]
        command: AuditCommand,
    },
    /// Make, list and end operators' credentials (administrators only)
    Operator {
        #[command(subcommand)]
        command: OperatorCommand,
    },
    /// Follow changes as they happen
    Watch(WatchArgs),
    /// Print a completion script for a shell
    Completion(CompletionArgs),
    /// Show the versions of this command and of the controller
    Version,
}

/// `-f`, repeatable.
#[derive(Args, Debug)]
pub(crate) struct FileArgs {
    /// A file of YAML or JSON documents; - is standard input; may be repeated
    #[arg(short, long = "file", value_name = "FILE", required = true)]
    pub(crate) files: Vec<PathBuf>,
}

/// See [`Command::Apply`].
#[derive(Args, Debug)]
pub(crate) struct ApplyArgs {
    #[command(flatten)]
    pub(crate) files: FileArgs,
    /// Check everything and change nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

/// See [`Command::Diff`].
#[derive(Args, Debug)]
pub(crate) struct DiffArgs {
    #[command(flatten)]
    pub(crate) files: FileArgs,
}

/// `-n`.
#[derive(Args, Debug)]
pub(crate) struct NamespaceArgs {
    /// The namespace of names that have none
    #[arg(
        short,
        long,
        env = "OPENCLUSTER_NAMESPACE",
        value_name = "NS",
        default_value = "default",
        value_parser = label,
        hide_env_values = true
    )]
    pub(crate) namespace: String,
}

/// See [`Command::Get`].
#[derive(Args, Debug)]
pub(crate) struct GetArgs {
    /// node, workload, service or policy
    #[arg(value_parser = kind)]
    pub(crate) kind: Kind,
    /// NAME or NAMESPACE/NAME; all when absent
    #[arg(value_parser = name)]
    pub(crate) name: Option<Name>,
    #[command(flatten)]
    pub(crate) namespace: NamespaceArgs,
    /// The resources of all namespaces
    #[arg(short = 'A', long, conflicts_with = "name")]
    pub(crate) all_namespaces: bool,
}

/// See [`Command::Delete`].
#[derive(Args, Debug)]
pub(crate) struct DeleteArgs {
    /// node, workload, service or policy
    #[arg(value_parser = kind, requires = "name", required_unless_present = "files")]
    pub(crate) kind: Option<Kind>,
    /// NAME or NAMESPACE/NAME
    #[arg(value_parser = name)]
    pub(crate) name: Option<Name>,
    /// Delete what these documents name; - is standard input; may be repeated
    #[arg(short, long = "file", value_name = "FILE", conflicts_with_all = ["kind", "name"])]
    pub(crate) files: Vec<PathBuf>,
    /// It is no failure when a resource is gone already
    #[arg(long)]
    pub(crate) ignore_not_found: bool,
    #[command(flatten)]
    pub(crate) namespace: NamespaceArgs,
}

/// See [`Command::Explain`].
#[derive(Args, Debug)]
pub(crate) struct ExplainArgs {
    /// flow, or a kind: node, workload, service, policy
    #[arg(value_parser = topic)]
    pub(crate) topic: Topic,
    /// Who connects: a workload (NAME, NAMESPACE/NAME) or a SPIFFE ID
    #[arg(long, value_name = "WORKLOAD", required_if_eq("topic", "flow"))]
    pub(crate) from: Option<String>,
    /// To what: SERVICE:PORT or NAMESPACE/SERVICE:PORT
    #[arg(long, value_name = "SERVICE:PORT", required_if_eq("topic", "flow"))]
    pub(crate) to: Option<String>,
    #[command(flatten)]
    pub(crate) namespace: NamespaceArgs,
}

/// What can be explained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Topic {
    /// Why a flow is allowed or denied.
    Flow,
    /// The fields of a kind.
    Kind(Kind),
}

/// See [`Command::Node`].
#[derive(Debug, Subcommand)]
pub(crate) enum NodeCommand {
    /// Show all nodes and how they are
    List,
    /// Show all that is known of one node
    Show {
        /// The node
        #[arg(value_parser = label)]
        name: String,
    },
    /// Make a one-time token with which a host enrols as this node
    Token {
        /// The node
        #[arg(value_parser = label)]
        name: String,
        /// How long the token can be used, at most 24h
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        ttl: Option<Duration>,
        /// Write the token to this new file (mode 0600) instead of printing it
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Refuse all identities of a node from now on, everywhere, and cut its flows
    Revoke {
        /// The node
        #[arg(value_parser = label)]
        name: String,
        #[command(flatten)]
        reason: ReasonArgs,
    },
}

/// See [`Command::Workload`].
#[derive(Debug, Subcommand)]
pub(crate) enum WorkloadCommand {
    /// Show how the workloads' identities stand
    List {
        #[command(flatten)]
        namespace: NamespaceArgs,
        /// The workloads of all namespaces
        #[arg(short = 'A', long)]
        all_namespaces: bool,
    },
    /// Show all that is known of one workload's identity, its keys too
    Show {
        /// NAME or NAMESPACE/NAME
        #[arg(value_parser = name)]
        name: Name,
        #[command(flatten)]
        namespace: NamespaceArgs,
    },
    /// Refuse the identity of a workload from now on, everywhere, and cut its flows
    Revoke {
        /// NAME, NAMESPACE/NAME or a SPIFFE ID (also of a workload that was deleted)
        #[arg(value_name = "WORKLOAD", value_parser = subject)]
        subject: Subject,
        /// Only this key of it, for good: SHA-256 of the public key (as `workload show` prints it)
        #[arg(long, value_name = "SHA256", value_parser = digest)]
        key: Option<String>,
        #[command(flatten)]
        reason: ReasonArgs,
        #[command(flatten)]
        namespace: NamespaceArgs,
    },
    /// Lift a revocation: the workload gets new certificates
    Restore {
        /// NAME, NAMESPACE/NAME or a SPIFFE ID
        #[arg(value_name = "WORKLOAD", value_parser = subject)]
        subject: Subject,
        #[command(flatten)]
        reason: ReasonArgs,
        #[command(flatten)]
        namespace: NamespaceArgs,
    },
}

/// See [`Command::Revocation`].
#[derive(Debug, Subcommand)]
pub(crate) enum RevocationCommand {
    /// Show all identities and keys that are refused, and since when
    List,
}

/// `--reason`.
#[derive(Args, Debug)]
pub(crate) struct ReasonArgs {
    /// Why: for the audit trail and the peers' logs
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: String,
}

/// See [`Command::Audit`].
#[derive(Debug, Subcommand)]
pub(crate) enum AuditCommand {
    /// Show events
    List {
        /// The first sequence number to show
        #[arg(long, value_name = "SEQUENCE", conflicts_with = "last")]
        from: Option<u64>,
        /// Show the last N events
        #[arg(long, value_name = "N", default_value_t = 50)]
        last: u64,
    },
    /// Fetch the whole trail and verify its hash chain here
    Verify,
}

/// See [`Command::Operator`].
#[derive(Debug, Subcommand)]
pub(crate) enum OperatorCommand {
    /// Make a bearer token
    Create {
        /// Who: appears in the audit trail
        #[arg(value_parser = label)]
        name: String,
        /// What they may do
        #[arg(long, value_enum)]
        role: RoleArg,
        /// How long the token can be used, at most 30d
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        ttl: Option<Duration>,
        /// Write the token to this new file (mode 0600) instead of printing it
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Sign a client certificate for a key that stays where it is
    ///
    /// The request is PKCS#10 for a P-256 key, its one SAN the URI spiffe://TRUST-DOMAIN/operator/NAME.
    Certificate {
        /// Who: appears in the audit trail
        #[arg(value_parser = label)]
        name: String,
        /// What they may do
        #[arg(long, value_enum)]
        role: RoleArg,
        /// The certificate request (PEM)
        #[arg(long, value_name = "FILE")]
        csr: PathBuf,
        /// How long the certificate is valid, at most 30d
        #[arg(long, value_name = "TIME", value_parser = parse_duration)]
        ttl: Option<Duration>,
    },
    /// Show who has which credentials, and until when
    List,
    /// End all credentials of an operator, at once
    Delete {
        /// Who
        #[arg(value_parser = label)]
        name: String,
    },
}

/// The API's roles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum RoleArg {
    /// Reads
    Viewer,
    /// Reads and changes resources, enrols and revokes
    Operator,
    /// Everything, operators included
    Admin,
}

/// See [`Command::Watch`].
#[derive(Args, Debug)]
pub(crate) struct WatchArgs {
    /// node, workload, service or policy; all when absent
    #[arg(value_parser = kind)]
    pub(crate) kind: Option<Kind>,
    /// The version to start behind (as in `get -o json`); now when absent
    #[arg(long, value_name = "VERSION")]
    pub(crate) from: Option<u64>,
    /// Stop after N changes
    #[arg(long, value_name = "N")]
    pub(crate) count: Option<u64>,
}

/// See [`Command::Completion`].
#[derive(Args, Debug)]
pub(crate) struct CompletionArgs {
    /// Which shell
    #[arg(value_parser = clap::builder::EnumValueParser::<Shell>::new())]
    pub(crate) shell: Shell,
}

/// The name of a resource, with its namespace where it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Name {
    /// As in `NAMESPACE/NAME`.
    pub(crate) namespace: Option<String>,
    /// The name.
    pub(crate) name: String,
}

impl Name {
    /// The namespace that was given, or else that of `-n`.
    pub(crate) fn namespace_or<'a>(&'a self, default: &'a str) -> &'a str {
        self.namespace.as_deref().unwrap_or(default)
    }
}

/// Whose identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A workload that there is.
    Workload(Name),
    /// Whoever has this SPIFFE ID.
    Id(String),
}

fn subject(text: &str) -> Result<Subject, String> {
    if !text.starts_with("spiffe://") {
        return name(text).map(Subject::Workload);
    }
    SpiffeId::parse(text).map(|id| Subject::Id(id.to_string())).map_err(|error| error.to_string())
}

fn digest(text: &str) -> Result<String, String> {
    let text = text.to_ascii_lowercase();
    let good = text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if good { Ok(text) } else { Err("a SHA-256 is 64 hexadecimal digits".to_owned()) }
}

fn name(text: &str) -> Result<Name, String> {
    match text.split_once('/') {
        Some((namespace, name)) => Ok(Name { namespace: Some(label(namespace)?), name: label(name)? }),
        None => Ok(Name { namespace: None, name: label(text)? }),
    }
}

/// A DNS label (RFC 1123), which all names are. Checked here because names become parts of URL paths.
fn label(text: &str) -> Result<String, String> {
    let bytes = text.as_bytes();
    let ends = [bytes.first(), bytes.last()];
    let alphanumeric = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let valid = bytes.len() <= 63
        && ends.iter().all(|end| end.is_some_and(|&byte| alphanumeric(byte)))
        && bytes.iter().all(|&byte| alphanumeric(byte) || byte == b'-');
    if valid { Ok(text.to_owned()) } else { Err("a name is 1 to 63 of a-z, 0-9 and -, not at the ends".to_owned()) }
}

fn kind(text: &str) -> Result<Kind, String> {
    Kind::parse(text).ok_or_else(|| {
        let names: Vec<_> = Kind::ALL.iter().map(|kind| kind.name().to_ascii_lowercase()).collect();
        format!("the kinds are {}", names.join(", "))
    })
}

fn topic(text: &str) -> Result<Topic, String> {
    if text == "flow" {
        Ok(Topic::Flow)
    } else {
        kind(text).map(Topic::Kind).map_err(|kinds| format!("{kinds}, and flow"))
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn names_cannot_leave_their_place_in_a_path() {
        for text in ["", "-a", "a-", "A", "a_b", "a.b", "../x", "a/b/c", "a/", "/a", "a%2f", "ä", &"x".repeat(64)] {
            name(text).expect_err(text);
        }
        let parsed = name("prod/echo").expect("a name");
        assert_eq!((parsed.namespace_or("default"), parsed.name.as_str()), ("prod", "echo"));
        let id = "spiffe://rig.test/ns/default/sa/b";
        assert_eq!(subject(id), Ok(Subject::Id(id.to_owned())));
        for text in ["spiffe://", "spiffe://Rig/ns/default/sa/b", "spiffe://rig.test/../b", "a/b/c"] {
            subject(text).expect_err(text);
        }
        assert_eq!(digest(&"Ab".repeat(32)), Ok("ab".repeat(32)));
        digest("ab").expect_err("too short");
        assert_eq!(name("echo").expect("a name").namespace_or("default"), "default");
        assert_eq!(name(&"x".repeat(63)).map(|name| name.name.len()), Ok(63));
    }
}
