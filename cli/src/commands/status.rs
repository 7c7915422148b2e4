//! `opencluster status`

use opencluster_api::rest::{ClusterStatus, path};

use super::Context;
use crate::error::CliError;
use crate::output::human::printable;
use crate::output::lines::Lines;
use crate::output::style::Style;

pub(super) async fn run(context: &mut Context<'_>) -> Result<(), CliError> {
    let mut client = context.client().await?;
    let status: ClusterStatus = client.get(path::STATUS).await?;
    let controller = format!("{} at {}", client.peer(), client.settings().server);
    Ok(context.printer.print(&status, |status, style| text(status, &controller, style))?)
}

fn text(status: &ClusterStatus, controller: &str, style: Style) -> String {
    let counts = status.resources.iter().map(|(kind, count)| format!("{kind} {count}"));
    let audit = if status.audit_chain_ok { "verified from its start".into() } else { style.red("BROKEN") };
    let rows = [
        ("controller", printable(controller)),
        ("version", printable(&status.version)),
        ("time", printable(&status.now)),
        ("root", format!("{}, ends {}", printable(&status.root_fingerprint), printable(&status.root_expires))),
        ("issuer", format!("ends {}", printable(&status.issuer_expires))),
        ("store", format!("version {}", status.store_version)),
        ("configuration", format!("version {}", status.config_version)),
        ("revocations", format!("version {}", status.revocation_version)),
        ("lease", format!("{} ms, heartbeat every {} ms", status.lease_ms, status.heartbeat_ms)),
        ("audit chain", audit),
        ("resources", printable(&counts.collect::<Vec<_>>().join(", "))),
    ];
    let mut text = Lines::default();
    text.push(style.bold(&format!("Trust domain {}", printable(&status.trust_domain))));
    for (name, value) in rows {
        text.push(format_args!("  {name:<13}  {value}"));
    }
    text.text()
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// A controller in good order.
    pub(crate) fn healthy() -> ClusterStatus {
        ClusterStatus {
            trust_domain: "rig.test".into(),
            version: "0.1.0".into(),
            store_version: 17,
            config_version: 17,
            revocation_version: 2,
            now: "2026-11-24T16:00:00Z".into(),
            root_expires: "2036-11-22T16:00:00Z".into(),
            issuer_expires: "2027-11-24T16:00:00Z".into(),
            root_fingerprint: "ab12".into(),
            lease_ms: 3000,
            heartbeat_ms: 500,
            audit_chain_ok: true,
            resources: BTreeMap::from([("nodes".into(), 2), ("policies".into(), 1)]),
        }
    }

    #[test]
    fn a_controller_at_a_glance() {
        let expected = "\
Trust domain rig.test
  controller     spiffe://rig.test/controller/ctl at unix:/run/api.sock
  version        0.1.0
  time           2026-11-24T16:00:00Z
  root           ab12, ends 2036-11-22T16:00:00Z
  issuer         ends 2027-11-24T16:00:00Z
  store          version 17
  configuration  version 17
  revocations    version 2
  lease          3000 ms, heartbeat every 500 ms
  audit chain    verified from its start
  resources      nodes 2, policies 1
";
        assert_eq!(text(&healthy(), "spiffe://rig.test/controller/ctl at unix:/run/api.sock", Style::PLAIN), expected);
    }
}
