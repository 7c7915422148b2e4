//! What the daemon says of itself, for people and programs.

use serde::{Deserialize, Serialize};

/// Everything at one moment. What is said to be in force was applied, not only wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) node: String,
    pub(crate) spiffe_id: Option<String>,
    /// `enrolling`, `active` or `severed`.
    pub(crate) state: String,
    /// Why, if it is not `active`.
    pub(crate) reason: Option<String>,
    pub(crate) lease_remaining_ms: u64,
    pub(crate) controller: Option<String>,
    pub(crate) firewall_applied: bool,
    pub(crate) firewall_repairs: u64,
    /// Whether a change of this machine's generation (VMGENID) would be seen.
    pub(crate) generation_watched: bool,
    pub(crate) config_version: Option<u64>,
    pub(crate) revocation_version: Option<u64>,
    pub(crate) certificate_expires_in_s: Option<u64>,
    pub(crate) proxy: ProxyStatus,
    pub(crate) workloads: Vec<WorkloadStatus>,
}

/// The proxy, as far as the daemon knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProxyStatus {
    pub(crate) running: bool,
    pub(crate) ready: bool,
    pub(crate) waiting_for: Option<String>,
    pub(crate) restarts: u64,
    pub(crate) flows: u64,
    pub(crate) config_version: u64,
    pub(crate) sandbox: Vec<String>,
}

/// One workload of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WorkloadStatus {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) capture_port: u16,
    /// Whether the proxy holds its identity.
    pub(crate) identity_ready: bool,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let reason = self.reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
        writeln!(f, "node        {}", self.spiffe_id.as_deref().unwrap_or(&self.node))?;
        writeln!(f, "state       {}{reason}", self.state)?;
        writeln!(f, "lease       {} ms left", self.lease_remaining_ms)?;
        writeln!(f, "controller  {}", self.controller.as_deref().unwrap_or("none"))?;
        let applied = if self.firewall_applied { "applied" } else { "NOT APPLIED" };
        writeln!(f, "firewall    {applied}, {} repairs", self.firewall_repairs)?;
        writeln!(f, "generation  {}", if self.generation_watched { "watched" } else { "NOT WATCHED" })?;
        writeln!(
            f,
            "config      {}",
            self.config_version.map_or("none yet".to_owned(), |version| version.to_string())
        )?;
        let proxy = match (&self.proxy.waiting_for, self.proxy.running, self.proxy.ready) {
            (_, false, _) => "not running".to_owned(),
            (Some(what), true, false) => format!("waiting for {what}"),
            (None, true, false) => "not ready".to_owned(),
            (_, true, true) => format!("ready, {} flows", self.proxy.flows),
        };
        writeln!(
            f,
            "proxy       {proxy}, {} restarts, sandbox: {}",
            self.proxy.restarts,
            self.proxy.sandbox.join(", ")
        )?;
        for workload in &self.workloads {
            let identity = if workload.identity_ready { "has its identity" } else { "has no identity yet" };
            writeln!(
                f,
                "workload    {}/{} {identity}, captured at port {}",
                workload.namespace, workload.name, workload.capture_port
            )?;
        }
        Ok(())
    }
}
