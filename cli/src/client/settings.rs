//! Where the controller is and who the operator is: from flags and the environment.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use hyper::header::HeaderValue;

use crate::error::CliError;
use crate::output::human::parse_duration;

/// The default port of the policy API.
const DEFAULT_PORT: u16 = 7480;

/// No credential file is larger.
const MAX_FILE: u64 = 1024 * 1024;

/// The flags that say how to reach the controller.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ConnectionArgs {
    /// The controller: https://HOST:PORT or unix:/PATH
    #[arg(long, global = true, env = "OPENCLUSTER_SERVER", value_name = "ADDRESS", hide_env_values = true)]
    server: Option<String>,
    /// The cluster's root certificate (PEM); nothing else is trusted
    #[arg(long, global = true, env = "OPENCLUSTER_CA", value_name = "FILE", hide_env_values = true)]
    ca: Option<PathBuf>,
    /// A file with your bearer token
    #[arg(long, global = true, env = "OPENCLUSTER_TOKEN_FILE", value_name = "FILE", hide_env_values = true)]
    token_file: Option<PathBuf>,
    /// Your bearer token itself (other users can see a flag in the process list: prefer --token-file)
    #[arg(long, global = true, env = "OPENCLUSTER_TOKEN", value_name = "TOKEN", hide_env_values = true)]
    token: Option<RawToken>,
    /// Your client certificate, instead of a token (PEM, leaf first)
    #[arg(
        long,
        global = true,
        env = "OPENCLUSTER_CERT",
        value_name = "FILE",
        hide_env_values = true,
        requires = "key"
    )]
    cert: Option<PathBuf>,
    /// The client certificate's private key (PEM, PKCS#8)
    #[arg(
        long,
        global = true,
        env = "OPENCLUSTER_KEY",
        value_name = "FILE",
        hide_env_values = true,
        requires = "cert"
    )]
    key: Option<PathBuf>,
    /// The longest wait for a connection, and for an answer
    #[arg(long, global = true, value_name = "TIME", default_value = "30s", value_parser = parse_duration)]
    timeout: Duration,
}

/// What a connection needs; files are read.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    /// The controller's address.
    pub(crate) server: Server,
    /// The cluster's root certificates, PEM, and where they came from.
    pub(crate) ca: PemFile,
    /// The bearer token.
    pub(crate) token: Option<Token>,
    /// Client certificate and key.
    pub(crate) certificate: Option<(PemFile, PemFile)>,
    /// The longest wait.
    pub(crate) timeout: Duration,
}

/// A file that was read. Debug shows its name only: it may hold a key.
#[derive(Clone)]
pub(crate) struct PemFile {
    /// Where from.
    pub(crate) path: PathBuf,
    /// What was in it.
    pub(crate) text: String,
}

impl fmt::Debug for PemFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PemFile").field("path", &self.path).finish_non_exhaustive()
    }
}

impl ConnectionArgs {
    /// Reads what the flags name.
    pub(crate) fn settings(&self) -> Result<Settings, CliError> {
        let server = self.server.as_deref().ok_or_else(|| {
            CliError::usage(
                "no controller is named",
                "set OPENCLUSTER_SERVER (or --server) to https://HOST:7480 or unix:/PATH",
            )
        })?;
        let ca = self.ca.as_deref().ok_or_else(|| {
            CliError::usage(
                "no root certificate is named, and nothing is trusted without",
                "set OPENCLUSTER_CA (or --ca) to the file that `opencluster-controller ca --config FILE` printed",
            )
        })?;
        let token = match (&self.token, &self.token_file) {
            // Of a flag and a variable, the flag counts; of both kinds, the token itself does.
            (Some(RawToken(token)), _) => {
                let hint = "the value of OPENCLUSTER_TOKEN or --token must be the token and nothing else";
                Some(token.parse().map_err(|message: String| CliError::usage(message, hint))?)
            }
            (None, Some(path)) => Some(read_token(path)?),
            (None, None) => None,
        };
        let certificate = match (&self.cert, &self.key) {
            (Some(cert), Some(key)) => Some((read_pem(cert)?, read_pem(key)?)),
            _ => None,
        };
        Ok(Settings { server: Server::parse(server)?, ca: read_pem(ca)?, token, certificate, timeout: self.timeout })
    }

    /// Whether a controller is named at all.
    pub(crate) fn names_server(&self) -> bool {
        self.server.is_some()
    }
}

fn read_token(path: &Path) -> Result<Token, CliError> {
    let text = read_text(path)?;
    text.trim().parse().map_err(|message| {
        CliError::failed(format!("{}: {message}", path.display()), "the file must hold the token and nothing else")
    })
}

fn read_pem(path: &Path) -> Result<PemFile, CliError> {
    Ok(PemFile { path: path.to_owned(), text: read_text(path)? })
}

/// A small text file.
pub(crate) fn read_text(path: &Path) -> Result<String, CliError> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_string(&mut text))
        .map_err(|source| CliError::File { action: "read", path: path.to_owned(), source })?;
    Ok(text)
}

/// Where the policy API listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Server {
    /// `https://HOST:PORT`
    Tcp {
        /// A name or an address.
        host: String,
        /// 7480 unless said otherwise.
        port: u16,
    },
    /// `unix:/PATH`: the same HTTPS, for operators on the controller's own host.
    Unix(PathBuf),
}

impl Server {
    /// Reads an address as operators write it.
    pub(crate) fn parse(text: &str) -> Result<Self, CliError> {
        let bad = |what: &str| {
            CliError::usage(
                format!("the controller's address '{}' {what}", text.escape_debug()),
                "write https://HOST:7480, https://[IPV6]:7480 or unix:/PATH",
            )
        };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            return if path.starts_with('/') {
                Ok(Self::Unix(path.into()))
            } else {
                Err(bad("does not name a socket by its absolute path"))
            };
        }
        if text.starts_with("http://") {
            return Err(bad("is not encrypted, and the controller speaks only HTTPS"));
        }
        let rest = text.strip_prefix("https://").ok_or_else(|| bad("begins with neither https:// nor unix:"))?;
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let (host, port) = if let Some(rest) = rest.strip_prefix('[') {
            let (host, port) = rest.split_once(']').ok_or_else(|| bad("has no ] after its IPv6 address"))?;
            (host, port.strip_prefix(':'))
        } else {
            rest.split_once(':').map_or((rest, None), |(host, port)| (host, Some(port)))
        };
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte);
        if host.is_empty() || !host.bytes().all(valid) {
            return Err(bad("has no valid host"));
        }
        let port = match port {
            None => DEFAULT_PORT,
            Some(port) => port.parse().map_err(|_| bad("has no valid port"))?,
        };
        Ok(Self::Tcp { host: host.to_owned(), port })
    }

    /// For the Host header.
    pub(crate) fn authority(&self) -> String {
        match self {
            Self::Tcp { host, port } if host.contains(':') => format!("[{host}]:{port}"),
            Self::Tcp { host, port } => format!("{host}:{port}"),
            Self::Unix(_) => "localhost".to_owned(),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { .. } => write!(f, "https://{}", self.authority()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A token as it was given: checked later, because clap's own message would show a wrong one.
#[derive(Clone)]
struct RawToken(String);

impl From<String> for RawToken {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl fmt::Debug for RawToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RawToken(…)")
    }
}

/// A bearer token: fit for a header, and never shown.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Token(HeaderValue);

impl Token {
    /// The Authorization header.
    pub(crate) fn header(&self) -> HeaderValue {
        self.0.clone()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

impl std::str::FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fit = !text.is_empty() && text.len() <= 4096 && text.bytes().all(|byte| byte.is_ascii_graphic());
        let header = fit.then(|| HeaderValue::try_from(format!("Bearer {text}"))).and_then(Result::ok);
        let mut header = header.ok_or("this is no token (1 to 4096 printable characters without spaces)")?;
        header.set_sensitive(true);
        Ok(Self(header))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_as_operators_write_them() {
        let tcp = |host: &str, port| Server::Tcp { host: host.to_owned(), port };
        for (text, expected) in [
            ("https://ctl.example:7000", tcp("ctl.example", 7000)),
            ("https://10.88.0.2", tcp("10.88.0.2", DEFAULT_PORT)),
            ("https://[fd88::2]:7480/", tcp("fd88::2", 7480)),
            ("unix:/run/api.sock", Server::Unix("/run/api.sock".into())),
            ("unix:///run/api.sock", Server::Unix("/run/api.sock".into())),
        ] {
            assert_eq!(Server::parse(text).expect(text), expected, "{text}");
        }
        for text in [
            "",
            "ctl:7480",
            "http://ctl:7480",
            "https://",
            "https://a b",
            "https://a:99999",
            "https://a/b",
            "https://[::1",
            "unix:run",
            "https://user@host",
        ] {
            let error = Server::parse(text).expect_err(text);
            assert!(matches!(error, CliError::Usage { .. }), "{text}: {error}");
        }
    }

    #[test]
    fn a_token_is_never_shown() {
        let token: Token = "s3cret-s3cret".parse().expect("a token");
        assert!(!format!("{token:?} {:?}", token.header()).contains("s3cret"));
        assert_eq!(token.header().as_bytes(), b"Bearer s3cret-s3cret", "positive control");
        for text in ["", "a b", "a\r\nX-Evil: 1", "ü"] {
            let message = text.parse::<Token>().expect_err(text);
            assert!(message.starts_with("this is no token"), "{message}");
        }
    }

    proptest! {
        #[test]
        fn any_address_is_read_or_refused(text in "(https://|unix:|http://)?[\\[\\]:a-z0-9./@ -]{0,30}") {
            if let Ok(server) = Server::parse(&text) {
                prop_assert_eq!(Server::parse(&server.to_string()).expect("its own form"), server);
            }
        }
    }
}
