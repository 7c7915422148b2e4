//! A pair of stunnel: a thread and a TLS session for each connection, sessions resumed.

use std::path::PathBuf;

use super::pki::SERVER_NAME;
use super::{Kind, Launch, Service, Site, write};
use crate::error::BenchError;
use crate::process;
use crate::topology;

/// The client side and the server side.
pub(super) fn pair(site: &Site<'_>) -> Result<Vec<Launch>, BenchError> {
    let wire = topology::SERVER;
    let common = |pem: &PathBuf| {
        format!(
            "foreground = yes\nsyslog = no\ndebug = 4\npid =\n\
             socket = l:TCP_NODELAY=1\nsocket = r:TCP_NODELAY=1\n\
             sslVersion = TLSv1.3\nciphersuites = TLS_AES_128_GCM_SHA256\ncurves = X25519\n\
             cert = {}\nCAfile = {}\nverifyChain = yes\n\
             sessionCacheSize = 20000\nsessionCacheTimeout = 3600\nTIMEOUTidle = 86400\n",
            pem.display(),
            site.pki.authority.display()
        )
    };
    let client = Service::ALL.map(|service| {
        let (name, own, peer) = (service.name(), Kind::Stunnel.local_port(service), Kind::Stunnel.wire_port(service));
        format!(
            "[{name}]\nclient = yes\naccept = 127.0.0.1:{own}\nconnect = {wire}:{peer}\n\
             checkHost = {SERVER_NAME}\nsni = {SERVER_NAME}\n"
        )
    });
    let server = Service::ALL.map(|service| {
        let (name, app, own) = (service.name(), service.port(), Kind::Stunnel.wire_port(service));
        format!("[{name}]\naccept = {wire}:{own}\nconnect = 127.0.0.1:{app}\n")
    });
    [
        ("client", site.topology.client(), common(&site.pki.client), client),
        ("server", site.topology.server(), common(&site.pki.server), server),
    ]
    .into_iter()
    .map(|(side, host, common, text)| {
        let config = site.folder.join(format!("stunnel-{side}.conf"));
        write(&config, &(common + &text.concat()))?;
        let mut command = process::in_namespace(&host, "stunnel4")?;
        command.arg(config);
        Ok(Launch::counted(site.folder.join(format!("stunnel-{side}.log")), command))
    })
    .collect()
}
