//! A pair of haproxy: plain TCP in and mutual TLS out on the client's host, the reverse on the server's.
//!
//! In TCP mode every client connection has a server connection of its own: haproxy can neither keep nor pool them, and
//! each new one pays a TLS handshake. Sessions are resumed (haproxy's default), which makes that as cheap as it gets.
//!
//! The same pair without TLS, moving bulk inside the kernel (`splice`), is `plain`: what two hops cost whoever encrypts nothing.

use super::pki::SERVER_NAME;
use super::{Kind, Launch, Service, Site, write};
use crate::error::BenchError;
use crate::process;
use crate::topology;

/// The client side and the server side; of [`Kind::Plain`] without TLS.
pub(super) fn pair(kind: &Kind, site: &Site<'_>) -> Result<Vec<Launch>, BenchError> {
    let (authority, wire, contender) = (site.pki.authority.display(), topology::SERVER, kind.name());
    let common = common(process::flows_within(site.open_files).min(20_000), *kind == Kind::Plain);
    let (mut towards_peer, mut from_peer) = (String::new(), String::new());
    if *kind != Kind::Plain {
        towards_peer = format!(
            " ssl crt {} ca-file {authority} verify required verifyhost {SERVER_NAME} sni str({SERVER_NAME})",
            site.pki.client.display()
        );
        from_peer = format!(" ssl crt {} ca-file {authority} verify required curves X25519", site.pki.server.display());
    }
    let client = Service::ALL.map(|service| {
        let (name, own, peer) = (service.name(), kind.local_port(service), kind.wire_port(service));
        format!("listen {name}\n  bind 127.0.0.1:{own} backlog 16384\n  server peer {wire}:{peer}{towards_peer}\n")
    });
    let server = Service::ALL.map(|service| {
        let (name, app, own) = (service.name(), service.port(), kind.wire_port(service));
        format!("listen {name}\n  bind {wire}:{own} backlog 16384{from_peer}\n  server app 127.0.0.1:{app}\n")
    });
    [("client", site.topology.client(), client), ("server", site.topology.server(), server)]
        .into_iter()
        .map(|(side, host, text)| {
            let config = site.folder.join(format!("{contender}-{side}.cfg"));
            write(&config, &(common.clone() + &text.concat()))?;
            let mut command = process::in_namespace(&host, "haproxy")?;
            command.arg("-db").arg("-f").arg(config);
            Ok(Launch::counted(site.folder.join(format!("{contender}-{side}.log")), command))
        })
        .collect()
}

/// One thread a core; larger buffers than by default, which save it an eighth of the CPU time in bulk and cost it nothing
/// elsewhere (an idle flow holds none). `haproxy-*.cfg` and `plain-*.cfg` beside the report is what was really run.
fn common(flows: usize, splice: bool) -> String {
    // Pipes count as open files, too: as many as busy flows need.
    let (pipes, option) = if splice { ("\n  maxpipes 256", "\n  option splice-auto") } else { ("", "") };
    format!(
        "\
global
  nbthread 2
  maxconn {flows}{pipes}
  tune.bufsize 65536
  tune.ssl.cachesize 20000
  ssl-default-bind-options ssl-min-ver TLSv1.3
  ssl-default-server-options ssl-min-ver TLSv1.3
  ssl-default-bind-ciphersuites TLS_AES_128_GCM_SHA256
  ssl-default-server-ciphersuites TLS_AES_128_GCM_SHA256
defaults
  mode tcp{option}
  maxconn {flows}
  timeout connect 5s
  timeout client 1h
  timeout server 1h
"
    )
}
