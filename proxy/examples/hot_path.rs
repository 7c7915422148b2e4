//! A fixed amount of the work that the proxy does for every byte: framing, sealing, opening, decoding.
//!
//! Made to be run under callgrind, which counts instructions: a figure that no noise of the machine can move
//! (`make bench-instructions`). One argument, `small` or `bulk`, says which work; the handshake before it is not counted.

use std::hint::black_box;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use opencluster_identity::authority::Root;
use opencluster_identity::key::PrivateKey;
use opencluster_identity::revocation::RevocationSet;
use opencluster_identity::svid::{Svid, SvidStore};
use opencluster_identity::tls::{ClientAuth, ExpectedPeer, ServerIdentity, client_config, server_config, server_name};
use opencluster_identity::trust::Trust;
use opencluster_identity::{SpiffeId, TrustDomain};
use opencluster_proxy::tunnel::info::wall_clock;
use opencluster_proxy::tunnel::oct;
use opencluster_proxy::tunnel::oct::frame::{Decoder, Event, Framing, HEADER, SHARED_HEADER};
use opencluster_proxy::tunnel::oct::frame::{data_header, shared_data_header};
use opencluster_proxy::tunnel::tls::handshake;
use opencluster_proxy::tunnel::tls::record::{MAX_CONTENT, MAX_OWN_RECORD, Opened, RECORD_HEADER, Session};
use tokio::net::{TcpListener, TcpStream};

/// Messages, or records of bulk: what scripts/bench-instructions.sh divides by.
const ROUNDS: usize = 10_000;
const MESSAGE: usize = 64;
const HOUR: Duration = Duration::from_hours(1);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hot_path: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<()> {
    let work = std::env::args().nth(1);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut client, mut server) = runtime.block_on(sessions())?;
    let carried = match work.as_deref() {
        Some("small") => carry_small(&mut client, &mut server)?,
        Some("bulk") => carry_bulk(&mut client, &mut server)?,
        _ => bail!("the argument must be small or bulk"),
    };
    println!("{ROUNDS} rounds, {carried} bytes");
    Ok(())
}

/// A message of a flow on a shared tunnel, one record each.
#[inline(never)]
fn carry_small(client: &mut Session, server: &mut Session) -> anyhow::Result<usize> {
    let mut decoder = Decoder::new(Framing::Shared);
    carry(client, server, &mut decoder, &shared_data_header(7, MESSAGE), MESSAGE)
}

/// Bulk of a flow that has a tunnel of its own, in full records.
#[inline(never)]
fn carry_bulk(client: &mut Session, server: &mut Session) -> anyhow::Result<usize> {
    let mut decoder = Decoder::new(Framing::Leased);
    carry(client, server, &mut decoder, &data_header(MAX_CONTENT - HEADER), MAX_CONTENT - HEADER)
}

fn carry(
    client: &mut Session,
    server: &mut Session,
    decoder: &mut Decoder,
    header: &[u8],
    length: usize,
) -> anyhow::Result<usize> {
    const { assert!(SHARED_HEADER + MESSAGE < MAX_CONTENT) };
    let mut slot = vec![0; MAX_OWN_RECORD];
    let mut carried = 0;
    for _ in 0..ROUNDS {
        slot[RECORD_HEADER..][..header.len()].copy_from_slice(header);
        let sealed = client.seal_data(&mut slot, header.len() + length)?;
        let Opened::Data(content) = server.open(&mut slot[..sealed])? else { bail!("not data") };
        let mut rest = &slot[content];
        while !rest.is_empty() {
            let (used, event) = decoder.next(rest)?;
            if let Some(Event::Data(bytes)) = event {
                carried += black_box(&rest[used - bytes..used]).len();
            }
            rest = &rest[used..];
        }
    }
    ensure!(carried == ROUNDS * length, "{carried} bytes arrived");
    Ok(carried)
}

/// An established session of a tunnel, both ends, over loopback.
async fn sessions() -> anyhow::Result<(Session, Session)> {
    let domain = TrustDomain::parse("bench.test")?;
    let root = Root::create(&domain, 24 * HOUR, wall_clock())?;
    let issuer = root.create_issuer(12 * HOUR, wall_clock())?;
    let trust = Trust::with_bundle(root.bundle()?);
    trust.replace_revocations(RevocationSet::new(1));
    let install = |name: &str| -> anyhow::Result<(SpiffeId, SvidStore)> {
        let id = SpiffeId::workload(&domain, "default", name)?;
        let key = PrivateKey::generate()?;
        let issued = issuer.issue(&key.csr_der(&id)?, &id, HOUR, wall_clock())?;
        let svids = SvidStore::new();
        svids.install(Svid::new(&id, issued.chain, key)?);
        Ok((id, svids))
    };
    let ((a, a_svids), (b, b_svids)) = (install("a")?, install("b")?);
    let mut client = Arc::unwrap_or_clone(client_config(&a_svids, &a, &trust, ExpectedPeer::ServerName, &[oct::ALPN])?);
    let identity = ServerIdentity::ByServerName(b_svids);
    let mut server = Arc::unwrap_or_clone(server_config(identity, &trust, ClientAuth::Required, &[oct::ALPN])?);
    // As the proxy does it: the record layer takes over the traffic keys.
    client.enable_secret_extraction = true;
    server.enable_secret_extraction = true;

    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let mut near = TcpStream::connect(listener.local_addr()?).await?;
    let (mut far, _) = listener.accept().await?;
    let (near, far) = tokio::join!(
        handshake::connect(&mut near, Arc::new(client), server_name(&b)?),
        handshake::accept(&mut far, Arc::new(server)),
    );
    Ok((near.context("the client's handshake")?.session, far.context("the server's handshake")?.session))
}
