//! Warm tunnels: reused, bounded, and dropped when they are of no use any more.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use opencluster_identity::SpiffeId;
use opencluster_identity::revocation::RevocationSet;

use super::{HOUR, World, echo, eventually};
use crate::limits::Limits;

pub(super) fn counter(site: &super::Site, name: &str) -> u64 {
    let text = World::metrics(site);
    text.lines()
        .filter(|line| !line.starts_with('#') && line.split(['{', ' ']).next() == Some(name))
        .filter_map(|line| line.rsplit(' ').next()?.parse::<u64>().ok())
        .sum()
}

fn close(world: &World, stream: TcpStream) {
    drop(stream);
    eventually("the flow is gone", || super::live_flows(&world.a).is_empty());
}

#[test]
fn r34_flows_one_after_another_share_a_tunnel() {
    let world = World::with(echo, &Limits { sharing: false, warm_tunnels: 0, ..Limits::default() }, 1);
    for _ in 0..20 {
        let mut stream = world.connect();
        World::echo(&mut stream);
        close(&world, stream);
    }
    assert_eq!(counter(&world.a, "opencluster_proxy_tls_handshakes_total"), 1);
    assert_eq!(counter(&world.a, "opencluster_proxy_tunnels_reused_total"), 19);
}

#[test]
fn an_active_pair_has_a_tunnel_ready() {
    let world = World::with(echo, &Limits { sharing: false, ..Limits::default() }, 1);
    let mut first = world.connect();
    World::echo(&mut first);
    close(&world, first);
    let mut second = world.connect();
    World::echo(&mut second);
    // The second flow took the idle one: another is opened ahead of need.
    eventually("a third tunnel", || counter(&world.a, "opencluster_proxy_tls_handshakes_total") == 2);
    let mut third = world.connect();
    World::echo(&mut third);
    assert_eq!(counter(&world.a, "opencluster_proxy_tunnels_reused_total"), 2);
}

#[test]
fn idle_tunnels_are_closed_by_both_sides_in_time() {
    let limits =
        Limits { idle_timeout: Duration::from_millis(200), sharing: false, warm_tunnels: 0, ..Limits::default() };
    let world = World::with(echo, &limits, 1);
    let mut stream = world.connect();
    World::echo(&mut stream);
    close(&world, stream);
    eventually("the peer holds a tunnel", || counter(&world.b, "opencluster_proxy_open_tunnels") == 1);
    eventually("the peer holds no tunnel", || counter(&world.b, "opencluster_proxy_open_tunnels") == 0);
    eventually("none is idle", || counter(&world.a, "opencluster_proxy_idle_tunnels") == 0);
    let mut stream = world.connect();
    World::echo(&mut stream);
    assert_eq!(counter(&world.a, "opencluster_proxy_tls_handshakes_total"), 2);
}

#[test]
fn r31_a_revocation_drops_the_idle_tunnels_of_the_identity() {
    let world = World::with(echo, &Limits { sharing: false, warm_tunnels: 0, ..Limits::default() }, 1);
    let flow = || {
        let mut stream = world.connect();
        World::echo(&mut stream);
        close(&world, stream);
    };
    let revoke = |version, id: &SpiffeId| {
        let mut set = RevocationSet::new(version);
        set.revoke(id.clone(), None);
        // Here alone: what the destination would do is left out.
        world.a.shared.trust.replace_revocations(set);
        world.a.shared.notify_workers();
    };
    let idle = || counter(&world.a, "opencluster_proxy_idle_tunnels");
    let handshakes = || counter(&world.a, "opencluster_proxy_tls_handshakes_total");
    flow();
    eventually("a tunnel is idle", || idle() == 1);
    revoke(2, &SpiffeId::parse("spiffe://rig.test/ns/default/sa/somebody-else").expect("id"));
    flow();
    eventually("it is idle again", || idle() == 1);
    assert_eq!(handshakes(), 1, "positive control: what is not revoked is used again");

    revoke(3, &world.b.workload);
    eventually("nothing is idle", || idle() == 0);
    world.a.shared.trust.replace_revocations(RevocationSet::new(4));
    world.a.shared.notify_workers();
    flow();
    assert_eq!(handshakes(), 2, "the tunnel of a revoked identity came back with it");
}

#[test]
fn a_tunnel_is_not_used_beyond_its_certificates_but_its_flow_is() {
    let world = World::with(echo, &Limits { sharing: false, warm_tunnels: 0, ..Limits::default() }, 1);
    world.install(&world.a, Duration::from_secs(3));
    let mut stream = world.connect();
    World::echo(&mut stream);
    // Rotation: a successor is installed while the flow lives.
    world.install(&world.a, HOUR);
    std::thread::park_timeout(Duration::from_millis(4200));
    World::echo(&mut stream);
    close(&world, stream);
    let mut stream = world.connect();
    World::echo(&mut stream);
    assert_eq!(counter(&world.a, "opencluster_proxy_tls_handshakes_total"), 2, "the old tunnel was not leased again");
}

#[test]
fn a_stale_tunnel_is_replaced_without_the_application_noticing() {
    // The destination's side times out first, and is not asked: the source finds out when it uses the tunnel.
    let world = World::with(echo, &Limits { sharing: false, warm_tunnels: 0, ..Limits::default() }, 1);
    let mut stream = world.connect();
    World::echo(&mut stream);
    close(&world, stream);
    let cut = crate::worker::registry::Cut::Timeout("test");
    assert_eq!(cut.name(), "timeout");
    // A replaced certificate authority is no reason, a removed identity is: b drops its tunnels.
    world.b.shared.svids.remove(&world.b.workload);
    world.b.shared.notify_workers();
    eventually("b holds no tunnel", || counter(&world.b, "opencluster_proxy_open_tunnels") == 0);
    world.install(&world.b, HOUR);
    let mut stream = world.connect();
    stream.write_all(b"hello").expect("write");
    stream.read_exact(&mut [0; 5]).expect("read");
}
