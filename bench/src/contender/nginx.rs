//! A pair of nginx with its stream module: plain TCP in and mutual TLS out on the client's host, the reverse on the
//! server's.
//!
//! Each side is two processes that share their ports (SO_REUSEPORT), one a core: what `worker_processes 2` with
//! `reuseport` is, without the master above them, which would leave its workers behind when it is killed. They share a
//! ticket key, so that either resumes what the other issued.

use std::path::{Path, PathBuf};

use rustix::rand::{GetRandomFlags, getrandom};

use super::pki::SERVER_NAME;
use super::{Kind, Launch, Service, Site, write};
use crate::error::BenchError;
use crate::process;
use crate::topology;

/// One process a core.
const PROCESSES: usize = 2;

/// Where Debian's package puts it.
const MODULE: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// The processes of the client side and of the server side.
pub(super) fn pair(site: &Site<'_>) -> Result<Vec<Launch>, BenchError> {
    let (authority, wire) = (site.pki.authority.display(), topology::SERVER);
    let ticket_key = ticket_key(site.folder)?;
    let certificate = site.pki.client.display();
    let client = format!(
        "  proxy_ssl on;\n  proxy_ssl_protocols TLSv1.3;\n  proxy_ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;\n  \
         proxy_ssl_conf_command Groups X25519;\n  proxy_ssl_certificate {certificate};\n  \
         proxy_ssl_certificate_key {certificate};\n  proxy_ssl_trusted_certificate {authority};\n  \
         proxy_ssl_verify on;\n  proxy_ssl_name {SERVER_NAME};\n  proxy_ssl_server_name on;\n"
    ) + &Service::ALL
        .map(|service| {
            let (own, peer) = (Kind::Nginx.local_port(service), Kind::Nginx.wire_port(service));
            format!("  server {{ listen 127.0.0.1:{own} backlog=16384 reuseport; proxy_pass {wire}:{peer}; }}\n")
        })
        .concat();
    let certificate = site.pki.server.display();
    let server = format!(
        "  ssl_protocols TLSv1.3;\n  ssl_conf_command Ciphersuites TLS_AES_128_GCM_SHA256;\n  ssl_ecdh_curve X25519;\n  \
         ssl_certificate {certificate};\n  ssl_certificate_key {certificate};\n  ssl_verify_client on;\n  \
         ssl_client_certificate {authority};\n  ssl_session_ticket_key {};\n",
        ticket_key.display()
    ) + &Service::ALL
        .map(|service| {
            let (app, own) = (service.port(), Kind::Nginx.wire_port(service));
            format!("  server {{ listen {wire}:{own} backlog=16384 reuseport ssl; proxy_pass 127.0.0.1:{app}; }}\n")
        })
        .concat();
    let mut launches = Vec::new();
    for (side, host, text) in [("client", site.topology.client(), client), ("server", site.topology.server(), server)] {
        for index in 0..PROCESSES {
            let config = site.folder.join(format!("nginx-{side}-{index}.conf"));
            let pid_file = config.with_extension("pid");
            write(&config, &whole(&pid_file, site.open_files, &text))?;
            let mut command = process::in_namespace(&host, "nginx")?;
            command.arg("-e").arg("stderr").arg("-c").arg(&config);
            launches.push(Launch::counted(config.with_extension("log"), command));
        }
    }
    Ok(launches)
}

/// Larger buffers than by default, as haproxy has them; room for all flows in one process, should the kernel send it all.
fn whole(pid_file: &Path, open_files: u64, stream: &str) -> String {
    let connections = 2 * process::flows_within(open_files).min(20_000) + 64;
    format!(
        "load_module {MODULE};\ndaemon off;\nmaster_process off;\npid {};\nerror_log stderr warn;\n\
         events {{ worker_connections {connections}; multi_accept on; }}\nstream {{\n  \
         proxy_buffer_size 64k;\n  proxy_half_close on;\n  proxy_timeout 1d;\n  proxy_connect_timeout 5s;\n{stream}}}\n",
        pid_file.display()
    )
}

fn ticket_key(folder: &Path) -> Result<PathBuf, BenchError> {
    let path = folder.join("pki").join("nginx-ticket.key");
    let mut key = [0; 80];
    getrandom(&mut key, GetRandomFlags::empty()).map_err(|e| BenchError::file("drawing", &path)(e.into()))?;
    std::fs::write(&path, key).map_err(BenchError::file("writing", &path))?;
    Ok(path)
}
