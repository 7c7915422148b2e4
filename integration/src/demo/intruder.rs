//! Somebody on the same switch, and somebody who is root on a node.

use std::time::Duration;

use anyhow::{bail, ensure};
use opencluster_integration::report::Event;

use super::stage::{Stage, said};
use super::story::Story;

const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn try_everything(story: &mut Story, stage: &Stage) -> anyhow::Result<()> {
    story.check("intruder-ports", "The applications' ports are closed to host x", || {
        let echo = stage.host_probe("y", &["echo", "--listen", "[::]:9000"]);
        let mut echo = echo?;
        echo.event(PATIENCE)?;
        for (to, open) in [
            ("10.88.0.201:9000", true),
            ("10.88.0.12:8080", false),
            ("[fd88::12]:8080", false),
            ("10.88.0.12:5432", false),
            ("10.88.0.12:6379", false),
            ("10.88.0.12:9000", false),
        ] {
            let arguments = ["send", "tcp", "--times", "1", "--to", to, "--marker", "hello"];
            let event = stage.host_probe("x", &arguments)?.event(PATIENCE)?.1;
            let reached = matches!(event, Event::Attempted { connected: true, .. });
            ensure!(reached == open, "{to}: {event:?}");
        }
        Ok("five ports on b silent, while another bare host answers".to_owned())
    })?;
    story.check("intruder-tunnel", "The tunnel port takes no identity that the controller did not issue", || {
        let mut reasons = Vec::new();
        for identity in ["none", "self-signed", "foreign"] {
            let claim = ["--identity", identity, "--id", "spiffe://rig.test/ns/shop/sa/till"];
            let to = ["tunnel", "--to", "10.88.0.12:15443", "--target", "10.88.0.12:9000", "--marker", "hello"];
            let peer = ["--peer", "spiffe://rig.test/ns/shop/sa/meter"];
            let event = stage.host_probe("x", &[&to[..], &peer, &claim].concat())?.event(PATIENCE)?.1;
            match event {
                Event::Refused { why } => reasons.push(format!("{identity}: {}", last_part(&why))),
                event => bail!("with a certificate of kind {identity}: {event:?}"),
            }
        }
        let plain = ["attack", "plaintext", "--to", "10.88.0.12:15443"];
        match stage.host_probe("x", &plain)?.event(PATIENCE)?.1 {
            Event::Attacked { ended_by_peer: 1, longest_ms, .. } => {
                reasons.push(format!("plaintext: closed after {longest_ms} ms"));
            }
            event => bail!("plaintext: {event:?}"),
        }
        Ok(reasons.join("; "))
    })?;
    story.check("root-outside", "Root on node a, outside of every workload, has no network", || {
        let mut curl = stage.host("a", &["curl", "-sS", "-m", "2", "http://10.88.0.12:8080/"])?;
        if let Ok(page) = said(&mut curl) {
            bail!("it got a page: {page:?}");
        }
        let capture = stage.capture("a", "root")?;
        for way in ["udp", "raw-ip", "packet4"] {
            let arguments = ["send", way, "--to", "10.88.0.201:9000", "--marker", "MARK-OF-ROOT"];
            stage.host_probe("a", &arguments)?.event(PATIENCE)?;
        }
        let leaked = capture.stop()?.count(b"MARK-OF-ROOT");
        ensure!(leaked == 0, "{leaked} of its packets got out");
        let capture = stage.capture("x", "root-control")?;
        for way in ["udp", "raw-ip", "packet4"] {
            let arguments = ["send", way, "--to", "10.88.0.201:9000", "--marker", "MARK-OF-ROOT"];
            stage.host_probe("x", &arguments)?.event(PATIENCE)?;
        }
        let seen = capture.stop()?.count(b"MARK-OF-ROOT");
        ensure!(seen >= 9, "the control from x shows only {seen} of 9 packets");
        Ok(format!("TCP, UDP, raw and packet sockets: nothing on the wire (from host x: {seen} packets)"))
    })
}

fn last_part(why: &str) -> &str {
    why.rsplit(": ").next().unwrap_or(why)
}
