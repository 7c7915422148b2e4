//! The policy API on one kept connection, so that what is measured is the cluster and not the start of a program.

use std::path::Path;

use anyhow::{Context, bail, ensure};
use opencluster_identity::bundle::TrustBundle;
use opencluster_identity::tls::{ExpectedPeer, anonymous_client_config};
use opencluster_identity::trust::Trust;
use rustls::pki_types::ServerName;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufStream};
use tokio::net::UnixStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// An administrator's connection.
pub(crate) struct Api {
    stream: BufStream<TlsStream<UnixStream>>,
    token: String,
}

impl Api {
    /// Connects to the socket of a controller whose root certificate (PEM) this is.
    pub(crate) async fn connect(socket: &Path, root_pem: &str, token: &str) -> anyhow::Result<Self> {
        let trust = Trust::with_bundle(TrustBundle::from_pem(root_pem.as_bytes())?);
        let config = anonymous_client_config(&trust, ExpectedPeer::AnyController, &[b"http/1.1"])?;
        let stream = UnixStream::connect(socket).await?;
        let name = ServerName::try_from("controller.invalid")?;
        let stream = TlsConnector::from(config).connect(name, stream).await?;
        Ok(Self { stream: BufStream::new(stream), token: token.trim().to_owned() })
    }

    /// Sends a request and waits for its answer, which must be a success.
    pub(crate) async fn call(&mut self, method: &str, path: &str, body: &str) -> anyhow::Result<Value> {
        let (token, length) = (&self.token, body.len());
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: controller\r\nauthorization: Bearer {token}\r\ncontent-length: {length}\r\n\r\n"
        );
        self.stream.write_all(head.as_bytes()).await?;
        self.stream.write_all(body.as_bytes()).await?;
        self.stream.flush().await?;
        let status = self.line().await?;
        let code = status.split(' ').nth(1).context("a status line")?.to_owned();
        let mut length = 0;
        loop {
            let line = self.line().await?;
            if line.is_empty() {
                break;
            }
            let (name, value) = line.split_once(':').context("a header")?;
            if name.eq_ignore_ascii_case("content-length") {
                length = value.trim().parse()?;
            }
            ensure!(!name.eq_ignore_ascii_case("transfer-encoding"), "the answer comes in chunks");
        }
        let mut body = vec![0; length];
        self.stream.read_exact(&mut body).await?;
        if code != "200" {
            bail!("{method} {path}: {status}: {}", String::from_utf8_lossy(&body));
        }
        Ok(serde_json::from_slice(&body)?)
    }

    async fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        ensure!(self.stream.read_line(&mut line).await? > 0, "the controller closed the connection");
        Ok(line.trim_end().to_owned())
    }
}
